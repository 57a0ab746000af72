//! The one way in which the files that a configuration names are opened: nothing at a path keeps the
//! process waiting, and only what has content with an end is taken.

use std::fs::{File, FileType, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use super::Access;
use crate::error::{Context, Error, Result};

/// Opens the regular file or block device at `path`; errors begin with `attempt`. The open of a FIFO
/// waits for its other end, and a terminal can become the one that controls the process: both are
/// prevented before it is known what is there. Anything else is refused by what it is: a character
/// device has no end (`/dev/zero`) or no content.
pub fn open(path: &Path, access: Access, attempt: impl Fn() -> String) -> Result<File> {
    let opened = OpenOptions::new()
        .read(true)
        .write(access == Access::ReadWrite)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    // Of a socket, or a directory that is to be written, the kernel's error does not say what it is.
    let metadata = match &opened {
        Ok(file) => file.metadata(),
        Err(_) => std::fs::metadata(path),
    };
    if let Some(kind) = metadata.ok().and_then(|metadata| wrong_kind(metadata.file_type())) {
        let reason = format!("it is {kind}, a file or block device is needed");
        return Err(Error::config(reason)).with_context(attempt);
    }
    let file = opened.with_context(&attempt)?;
    let_it_wait(&file).with_context(attempt)?;
    Ok(file)
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

/// Takes O_NONBLOCK away: io_uring would answer EAGAIN where it has to wait for a disk.
#[allow(unsafe_code)]
fn let_it_wait(file: &File) -> std::io::Result<()> {
    // SAFETY: the calls take numbers.
    let result = unsafe {
        let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK)
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    #[allow(unsafe_code)]
    fn only_files_and_block_devices_are_opened() {
        let folder = std::env::temp_dir().join(format!("alula-file-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = |name: &str| folder.join(name);
        let fifo = std::ffi::CString::new(path("fifo").to_str().unwrap()).unwrap();
        // SAFETY: the name is a string that ends with a zero.
        assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
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
                let error = open(&path, access, || "open it".to_owned()).unwrap_err().to_string();
                let expected = format!("open it: it is {kind}, a file or block device is needed");
                assert_eq!(error, expected, "{}", path.display());
            }
            let file = open(&path("file"), access, String::new).unwrap();
            // SAFETY: the call takes numbers.
            let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
            assert_eq!(flags & libc::O_NONBLOCK, 0);
        }
        let error = open(&path("none"), Access::Read, || "open it".to_owned()).unwrap_err().to_string();
        assert!(error.starts_with("open it: No such file"), "{error}");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
