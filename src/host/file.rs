//! The one way in which the files that a configuration names are opened: nothing at a path keeps the
//! process waiting, and only what has content with an end is taken.

use std::ffi::OsString;
use std::fs::{File, FileType, Metadata, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::{Access, Sharing};
use crate::descriptors::Named;
use crate::error::{Context, Error, Result};
use crate::history::{self, Event};
use crate::log;
use crate::paths;
use crate::sys::descriptor;

/// Opens the regular file or block device at `path`, which is what `what`, the name of a resource, is made
/// of. The open of a FIFO waits for its other end, and a terminal can become the one that controls the process: both are
/// prevented before it is known what is there. Anything else is refused by what it is: a character
/// device has no end (`/dev/zero`) or no content.
///
/// A block device that is to be written is claimed (O_EXCL, open(2)): the kernel refuses that while the
/// device, or a part of it, is mounted, belongs to another device, or is claimed by somebody else.
pub fn open(
    path: &Path,
    access: Access,
    sharing: Sharing,
    what: &str,
    attempt: impl Fn() -> String,
) -> Result<Named<File>> {
    let write = access == Access::ReadWrite;
    let open = |more: i32| {
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY | more;
        OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)
    };
    // Of what is no block device, Linux ignores O_EXCL without O_CREAT.
    let mut opened = open(if write { libc::O_EXCL } else { 0 });
    if write && opened.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY)) {
        sharing.judge(what, path, &claimant(path)).with_context(&attempt)?;
        opened = open(0);
    }
    // Of a socket, or a directory that is to be written, the kernel's error does not say what it is.
    let metadata = match &opened {
        Ok(file) => file.metadata(),
        Err(_) => std::fs::metadata(path),
    };
    if let Some(kind) = metadata.ok().and_then(|metadata| wrong_kind(metadata.file_type())) {
        let reason = format!("it is {kind}, a file or block device is needed");
        return Err(Error::config(reason)).with_context(attempt);
    }
    let file = opened.map_err(|error| paths::cannot_open(path, &error, write)).with_context(&attempt)?;
    let_it_wait(&file).with_context(attempt)?;
    let (how, fd) = (if write { "read and write" } else { "read" }, file.as_raw_fd());
    log::debug(format_args!("opened {what} `{}` to {how}, as descriptor {fd}", path.display()));
    Ok(Named::new(what.to_owned(), file))
}

fn wrong_kind(kind: FileType) -> Option<&'static str> {
    match kind {
        kind if kind.is_file() || kind.is_block_device() => None,
        kind if kind.is_dir() => Some("a directory"),
        kind if kind.is_fifo() => Some("a FIFO"),
        kind if kind.is_socket() => Some("a socket"),
        kind if kind.is_char_device() => Some("a character device"),
        _ => Some("of an unknown kind"),
    }
}

impl Sharing {
    /// What becomes of `what` at `path`, which `user` uses as well: an error, or a warning.
    pub fn judge(self, what: &str, path: &Path, user: &str) -> Result<()> {
        let reason = format!("it is in use by {user}");
        let advice = match self {
            Self::Refused => Some(
                "stop that, share it read-only, or say that you know better (`\"lock\": false`, `lock=off`)",
            ),
            Self::RefusedAsSaved => Some("stop that first"),
            Self::Warned => None,
        };
        if let Some(advice) = advice {
            return Err(Error::config(format!("{reason}: {advice}")));
        }
        log::line(format_args!(
            "{what} `{}`: {reason}, and used all the same: its content may be damaged",
            path.display()
        ));
        history::tell(|| Event::DiskShared { device: what.to_owned(), path: path.to_owned(), reason });
        Ok(())
    }
}

/// Who keeps the block device at `path` from being claimed, as far as can be told.
fn claimant(path: &Path) -> String {
    let unknown = "the host (it or a part of it is mounted, or belongs to another device) or another process";
    let Ok(metadata) = std::fs::metadata(path) else { return unknown.to_owned() };
    let number = format!("{}:{}", libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    // proc_pid_mountinfo(5): the third word is the device, the fifth where it is mounted.
    let mounted = |number: &str| {
        mounts.lines().find_map(|line| {
            let mut words = line.split(' ').skip(2);
            (words.next()? == number).then(|| words.nth(1)).flatten()
        })
    };
    if let Some(place) = mounted(&number) {
        return format!("the host, which has it mounted at `{place}`");
    }
    // A partition has a folder in that of its disk, and what is made of a device is in its `holders`.
    let folder = Path::new("/sys/dev/block").join(number);
    let parts = names(&folder).map(|name| folder.join(name)).filter(|part| part.join("partition").exists());
    let parts: Vec<_> = parts.collect();
    for part in &parts {
        let number = std::fs::read_to_string(part.join("dev")).unwrap_or_default();
        if let Some(place) = mounted(number.trim()) {
            return format!("the host, which has a part of it mounted at `{place}`");
        }
    }
    if let Some(holder) =
        parts.iter().chain([&folder]).find_map(|device| names(&device.join("holders")).next())
    {
        return format!("`{}`, a device of the host that is made of it", holder.display());
    }
    let same =
        |_: &Path, other: &Metadata| other.file_type().is_block_device() && other.rdev() == metadata.rdev();
    user(same).unwrap_or_else(|| unknown.to_owned())
}

/// What is in a folder; nothing, if it cannot be looked at.
fn names(folder: &Path) -> impl Iterator<Item = OsString> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name())
}

/// Who holds a lock on `file`, as far as can be told; not by this descriptor.
pub fn locker(file: &File) -> String {
    let same = |descriptor: &Path, other: &Metadata| {
        let wanted = file.metadata();
        let is_same = wanted.is_ok_and(|wanted| (wanted.dev(), wanted.ino()) == (other.dev(), other.ino()));
        is_same && holds_lock(descriptor)
    };
    user(same).unwrap_or_else(|| "another process, which /proc does not show".to_owned())
}

/// Whether `/proc/PID/fd/N` is the description that a lock belongs to: `/proc/PID/fdinfo/N` lists them.
fn holds_lock(descriptor: &Path) -> bool {
    let info = || {
        let process = descriptor.parent()?.parent()?;
        std::fs::read_to_string(process.join("fdinfo").join(descriptor.file_name()?)).ok()
    };
    info().is_some_and(|info| info.lines().any(|line| line.starts_with("lock:")))
}

/// The user of a file: this process, or else another one, with a descriptor of which `is_it` says yes.
fn user(is_it: impl Fn(&Path, &Metadata) -> bool) -> Option<String> {
    let uses = |process: &Path| {
        let descriptors = std::fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        descriptors
            .map(|descriptor| descriptor.path())
            .any(|path| std::fs::metadata(&path).is_ok_and(|metadata| is_it(&path, &metadata)))
    };
    if uses(Path::new("/proc/self")) {
        return Some("another disk or pmem device of this microVM".to_owned());
    }
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let Ok(pid) = process.file_name().to_string_lossy().parse::<u32>() else { continue };
        if pid != std::process::id() && uses(&process.path()) {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("process {pid} ({})", name.trim()));
        }
    }
    None
}

/// Device and inode of an open file.
pub fn identity(file: &File) -> Result<(u64, u64)> {
    let metadata = file.metadata().context("look at it")?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Whether `file` and what is at `path` are one block device, by whatever nodes.
pub fn is_same_device(file: &File, path: &Path) -> bool {
    let (Ok(file), Ok(other)) = (file.metadata(), std::fs::metadata(path)) else { return false };
    let are_devices = file.file_type().is_block_device() && other.file_type().is_block_device();
    are_devices && file.rdev() == other.rdev()
}

/// Takes O_NONBLOCK away, the only flag of those that can be changed (F_SETFL, fcntl(2)) with which [`open`] opens a
/// file: io_uring would answer EAGAIN where it has to wait for a disk.
fn let_it_wait(file: &File) -> std::io::Result<()> {
    descriptor::set_status(file, 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_files_and_block_devices_are_opened() {
        let folder = std::env::temp_dir().join(format!("alula-file-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = |name: &str| folder.join(name);
        descriptor::make_fifo(&path("fifo"));
        std::os::unix::fs::symlink("fifo", path("link")).unwrap();
        let _socket = UnixListener::bind(path("socket")).unwrap();
        std::fs::write(path("file"), "x").unwrap();
        for access in [Access::Read, Access::ReadWrite] {
            for (path, kind) in [
                (path("fifo"), "a FIFO"),
                (path("link"), "a FIFO"),
                (path("socket"), "a socket"),
                ("/dev/zero".into(), "a character device"),
                ("/dev/null".into(), "a character device"),
                (folder.clone(), "a directory"),
            ] {
                let error = open(&path, access, Sharing::Refused, "it", || "open it".to_owned())
                    .unwrap_err()
                    .to_string();
                let expected = format!("open it: it is {kind}, a file or block device is needed");
                assert_eq!(error, expected, "{}", path.display());
            }
            let file = open(&path("file"), access, Sharing::Refused, "it", String::new).unwrap();
            assert_eq!(descriptor::status(&file).unwrap() & libc::O_NONBLOCK, 0);
        }
        let error = open(&path("none"), Access::Read, Sharing::Refused, "it", || "open it".to_owned())
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("open it: No such file"), "{error}");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
