//! The folder that is all a jailed program sees of the host's files: `BASE/PROGRAM/ID/root`, with the program, the
//! devices that it needs, and what was put there before.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, Permissions};
use std::io::{Error as IoError, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::User;
use super::made::{Made, Place};
use crate::error::{Context, Error, Result};
use crate::paths;
use crate::sys::{confine, descriptor, process};

/// The path of this program itself, even if its file is gone.
const OWN: &str = "/proc/self/exe";
/// Where a device is in the host and in a jail, and its numbers (Documentation/admin-guide/devices.txt).
const DEVICES: [(&str, u32, u32); 3] =
    [("dev/kvm", 10, 232), ("dev/net/tun", 10, 200), ("dev/urandom", 1, 9)];
/// The device for page faults, which has no fixed number. A jail has none where the host has none, nor where this
/// program goes on in it, which has opened the device before.
pub const USERFAULTFD: &str = "/dev/userfaultfd";
/// Folders in the jail for devices, each after the one that it is in.
const FOLDERS: [&str; 2] = ["dev", "dev/net"];
/// The folder in which a program makes its socket, and which belongs to the program.
const RUN: &str = "run";

/// The program that runs in a jail, opened before its folder can be changed by anybody.
pub struct Program {
    /// The name of its file.
    pub name: OsString,
    /// The program is this one, which is not executed anew.
    goes_on: bool,
    file: File,
    metadata: Metadata,
}

impl Program {
    /// Opens what `--exec-file` names, or this program.
    ///
    /// # Errors
    /// The path leads to a link, to no file, or to one that cannot be executed.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self { goes_on: true, ..Self::own()? }) };
        let said = || format!("--exec-file {}", path.display());
        let name = path
            .file_name()
            .ok_or_else(|| Error::config(format!("{}: expected the path of a file", said())))?;
        // The path is opened without waiting for somebody who writes to a FIFO.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = File::options().read(true).custom_flags(flags).open(path).map_err(|error| match error
            .raw_os_error()
        {
            Some(libc::ELOOP) => Error::config(format!(
                "{}: it is a symbolic link: name the program that it leads to, or give that a second name by \
                     `ln`, without `-s`",
                said()
            )),
            _ => Error::host(format!("{}: {}", said(), paths::cannot_open(path, &error, false))),
        })?;
        Self::of(path, name, file)
    }

    fn own() -> Result<Self> {
        let attempt = || format!("open this program by `{OWN}`");
        let path = std::fs::read_link(OWN).with_context(attempt)?;
        let own = File::open(OWN).with_context(attempt)?;
        let own = Self::of(&path, path.file_name().unwrap_or_default(), own)?;
        // The file at the path, if it is the same, can have a second name; the file of /proc belongs to another mount
        // namespace, from which nothing can be linked.
        match Self::open(Some(&path)) {
            Ok(found) if found.is_same(&own) => Ok(found),
            _ => Ok(own),
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        let identity = |program: &Self| (program.metadata.dev(), program.metadata.ino());
        identity(self) == identity(other)
    }

    fn of(path: &Path, name: &OsStr, file: File) -> Result<Self> {
        let metadata =
            file.metadata().with_context(|| format!("--exec-file {}: look at it", path.display()))?;
        if !metadata.is_file() {
            return Err(Error::config(format!(
                "--exec-file {}: it is no file: name a program",
                path.display()
            )));
        }
        if metadata.mode() & 0o111 == 0 {
            return Err(Error::config(format!(
                "--exec-file {}: it is not executable: make it so by `chmod +x`, if it is a program",
                path.display()
            )));
        }
        Ok(Self { name: name.to_owned(), goes_on: false, file, metadata })
    }

    /// Says whether the user could change the program, and so what every other jail executes.
    fn can_be_written_by(&self, user: User) -> bool {
        let (uid, gid) = if user.is_mapped { process::identity() } else { (user.uid, user.gid) };
        let (metadata, mode) = (&self.metadata, self.metadata.mode());
        // Root could change the program anyway.
        uid != 0 && (metadata.uid() == uid || metadata.gid() == gid && mode & 0o020 != 0 || mode & 0o002 != 0)
    }

    /// The descriptor by which the program is executed.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The folder that becomes the root of a jail.
pub struct Root {
    place: Place,
    path: PathBuf,
    user: User,
    /// Devices of the host that are to be mounted in the folder.
    bound: Vec<&'static str>,
}

/// The error for something that could not be made at `path`, which comes from the option `option`.
fn cannot_make(option: &str, path: &Path, error: &IoError) -> Error {
    let path = path.display();
    match error.raw_os_error() {
        Some(libc::ELOOP) => Error::config(format!(
            "{option}: `{path}` is a symbolic link, which could lead anywhere: remove it, or choose another {option}"
        )),
        Some(libc::ENOTDIR) => {
            Error::config(format!("{option}: `{path}` is no folder: remove it, or choose another {option}"))
        }
        Some(libc::EEXIST) => Error::config(format!(
            "{option}: `{path}` is left from an earlier jail: if that has ended, remove its folder, else choose another \
             {option}"
        )),
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => Error::host(format!(
            "{option}: make `{path}`: {error}: `--chroot-base-dir DIR` names a place that this user may write to"
        )),
        _ => Error::host(format!("{option}: make `{path}`: {error}")),
    }
}

impl Root {
    /// Makes the folder of the jail `id` below `base`, with all that its program needs. A folder that is there already
    /// is taken with what it holds, unless an earlier jail has left it.
    ///
    /// # Errors
    /// A part of the folder's path is a link, or this user may not make the folder.
    pub fn make(base: &Path, id: &str, program: &Program, user: User, made: &mut Made) -> Result<Self> {
        let mut place = make_base(base, made)?;
        let mut path = base.to_owned();
        for (name, mode) in
            [(program.name.as_os_str(), 0o755), (id.as_ref(), 0o755), ("root".as_ref(), 0o700)]
        {
            path.push(name);
            place = made.folder(&place, name, mode).map_err(|error| cannot_make("--id", &path, &error))?;
        }
        let mut root = Self { place, path, user, bound: Vec::new() };
        if !user.is_mapped && descriptor::has_no_devices(&*root.place) {
            return Err(Error::config(format!(
                "--chroot-base-dir {}: its file system is mounted without devices (`nodev`), so that none could be \
                 opened there: choose another place",
                base.display()
            )));
        }
        root.put_program(program, made)?;
        let mut folders = vec![("", Rc::clone(&root.place))];
        for path in FOLDERS {
            let (above, name) = split(path, &folders);
            let folder = root.within(path, made.folder(above, name, 0o755))?;
            folders.push((path, folder));
        }
        let run = root.within(RUN, made.folder(&root.place, RUN, 0o700))?;
        for (device, major, minor) in DEVICES {
            root.put_device(device, split(device, &folders), libc::makedev(major, minor), made)?;
        }
        if !program.goes_on
            && let Ok(found) = std::fs::metadata(USERFAULTFD)
            && found.file_type().is_char_device()
        {
            let within = &USERFAULTFD[1..];
            root.put_device(within, split(within, &folders), found.rdev(), made)?;
        }
        if !user.is_mapped {
            for (name, folder) in [(RUN, &run), ("", &root.place)] {
                root.within(name, descriptor::set_owner(&**folder, user.uid, user.gid))?;
            }
            let own = File::from(root.within("", root.place.try_clone())?);
            root.within("", own.set_permissions(Permissions::from_mode(0o700)))?;
        }
        Ok(root)
    }

    fn within<T>(&self, name: impl AsRef<Path>, result: std::io::Result<T>) -> Result<T> {
        result.map_err(|error| cannot_make("--id", &self.path.join(name), &error))
    }

    /// Puts the program where clients look for it: a second name of the same file, or a copy where there can be none, or
    /// where the program in the jail could change every jail's by it.
    fn put_program(&self, program: &Program, made: &mut Made) -> Result<()> {
        if !program.can_be_written_by(self.user) {
            match descriptor::link_in(&program.file, &*self.place, &program.name) {
                Ok(()) => {
                    made.note(&self.place, &program.name);
                    return Ok(());
                }
                Err(error) if [Some(libc::EXDEV), Some(libc::EPERM)].contains(&error.raw_os_error()) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return self.within(&program.name, Err(error)),
            }
        }
        let copy = self.within(&program.name, made.file(&self.place, &program.name, 0o755))?;
        let copied = std::io::copy(&mut &program.file, &mut File::from(copy));
        self.within(&program.name, copied).map(drop)
    }

    /// Makes a device that belongs to the program; in a user namespace, where nobody can, a file for the host's to be
    /// mounted on, if there is one.
    fn put_device(
        &mut self,
        path: &'static str,
        (folder, name): (&Place, &str),
        number: u64,
        made: &mut Made,
    ) -> Result<()> {
        if self.user.is_mapped {
            if Path::new("/").join(path).exists() {
                self.within(path, made.file(folder, name, 0o600))?;
                self.bound.push(path);
            }
            return Ok(());
        }
        self.within(path, descriptor::make_device_in(&**folder, name, number))?;
        made.note(folder, name);
        // The owner of a folder that was there already could have exchanged the device by now.
        let node = self.within(path, descriptor::open_in(&**folder, name, libc::O_PATH, 0))?;
        let node = File::from(node);
        let is_it = |found: &Metadata| found.file_type().is_char_device() && found.rdev() == number;
        if !self.within(path, node.metadata()).is_ok_and(|found| is_it(&found)) {
            return self.within(path, Err(ErrorKind::AlreadyExists.into()));
        }
        self.within(path, descriptor::set_owner(&node, self.user.uid, self.user.gid))
    }

    /// Makes the folder the root of everything. This process is in a mount namespace of its own.
    ///
    /// # Errors
    /// The kernel's.
    pub fn enter(&self, made: &mut Made) -> Result<()> {
        let attempt = || format!("--id: make `{}` the root of the jail", self.path.display());
        let mounts = confine::copy_mounts(Some(&*self.place), "").with_context(attempt)?;
        confine::attach(&mounts, &self.place).with_context(attempt)?;
        let (mounts, _) = made.mounts.insert((mounts, self.bound.clone()));
        for device in &self.bound {
            let attempt = || format!("--userns: mount /{device} in the jail");
            let node = confine::copy_mounts(None, format!("/{device}")).with_context(attempt)?;
            let place = descriptor::open_in(mounts, device, libc::O_PATH, 0).with_context(attempt)?;
            confine::attach(&node, &place).with_context(attempt)?;
        }
        let outside = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
        confine::become_root(mounts).map(|()| paths::note_root(outside)).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => Error::host(format!(
                "{}: {error}: the root of this process is an initial ramdisk, or a folder that nothing is mounted on, \
                 which pivot_root(2) cannot replace",
                attempt()
            )),
            _ => Error::host(format!("{}: {error}", attempt())),
        })
    }

    /// Tells in the jail's folder the number of the process that the program is.
    ///
    /// # Errors
    /// The jail's folder has a file of this name already.
    pub fn tell_process(&self, program: &Program, pid: u32, made: &mut Made) -> Result<()> {
        let mut name = program.name.clone();
        name.push(".pid");
        let file = self.within(&name, made.file(&self.place, &name, 0o644))?;
        let text = format!("{pid}");
        self.within(&name, std::io::Write::write_all(&mut File::from(file), text.as_bytes()))
    }
}

/// The open folder that a path of the jail leads to, and the name there. The owner of a folder that was there already
/// could make a link of a part of the path meanwhile, so that nothing is made, or removed, by the path.
fn split<'p>(path: &'p str, folders: &'p [(&str, Place)]) -> (&'p Place, &'p str) {
    let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
    let folder = folders.iter().find(|(path, _)| *path == above);
    (&folder.expect("the folders of all devices are made").1, name)
}

/// Opens the folder of all jails, which is made if there is none.
fn make_base(base: &Path, made: &mut Made) -> Result<Place> {
    let failed = |path: &Path, error: IoError| cannot_make("--chroot-base-dir", path, &error);
    let base = std::path::absolute(base).map_err(|error| failed(base, error))?;
    let mut there = base.as_path();
    // The user who names the folder may name it by way of links.
    let opened = loop {
        match File::options().read(true).custom_flags(libc::O_DIRECTORY).open(there) {
            Err(error) if error.kind() == ErrorKind::NotFound => match there.parent() {
                Some(above) => there = above,
                None => return Err(failed(there, error)),
            },
            opened => break opened.map_err(|error| failed(there, error))?,
        }
    };
    let mut place: Place = Rc::new(OwnedFd::from(opened));
    let missing = base.strip_prefix(there).unwrap_or(Path::new(""));
    let mut path = there.to_owned();
    for name in missing.components() {
        path.push(name);
        place = made.folder(&place, name.as_os_str(), 0o755).map_err(|error| failed(&path, error))?;
    }
    Ok(place)
}
