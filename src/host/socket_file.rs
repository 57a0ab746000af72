//! The files of the sockets that this process listens on, and the folder that such a socket may have to itself: each
//! file is removed with its socket, and all of them when the process ends at once, by a signal's handler or a panic.

use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::SeqCst};

use crate::sys::descriptor;

/// The longest path of a socket, in bytes (unix(7)).
pub const PATH_MAX: usize = 107;
/// As many files are known to [`remove_all`]: a process has an API socket and a vsock socket, and while the
/// latter moves, one more; a folder; and as many ports as there are places for devices. Others are removed with their
/// sockets alone.
const FILES_MAX: usize = 5 + 31;

/// What a signal's handler may read at any time: no locks, no memory that is freed.
static NOTES: [Note; FILES_MAX] = [const { Note::new() }; FILES_MAX];

/// The file of a socket, removed when this is dropped.
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode; none: it was gone as soon as it was there.
    identity: Option<(u64, u64)>,
    note: Option<&'static Note>,
}

impl SocketFile {
    /// What was made at `path`.
    pub fn at(path: &Path) -> Self {
        let identity = identity(path);
        let note = identity.and_then(|identity| Note::take(path, identity));
        Self { path: path.to_owned(), identity, note }
    }

    /// Leaves the file to the process that this one is a copy of, which has the socket, too.
    pub fn leave(mut self) {
        self.identity = None;
    }

    /// Whether it is this file that programs find at `path`.
    pub fn is_at(&self, path: &Path) -> bool {
        self.path == path && self.identity.is_some() && identity(path) == self.identity
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody may have removed it already, and another one may listen there now.
        if self.is_at(&self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
        self.note.into_iter().for_each(Note::give_back);
    }
}

/// How the name of a folder begins that a process has made for itself; the process's number follows.
const OWN: &str = "alula-";
/// The name of the socket in such a folder, and that of a folder at runtime that it is in, if not in one of temporary files.
const SOCKET: &str = "vsock";
const RUNTIME: &str = "alula";

/// A folder that this process has made for a socket. The folder and what is in it are removed when this is dropped; when
/// the process ends at once, the folder is removed after the sockets.
pub struct OwnFolder {
    path: PathBuf,
    note: Option<&'static Note>,
}

impl OwnFolder {
    /// Makes one in the folder `base`, named after this process, which nobody else can enter.
    pub fn make(base: &Path) -> std::io::Result<Self> {
        let path = base.join(format!("{OWN}{}", std::process::id()));
        std::fs::DirBuilder::new().mode(0o700).create(&path).map(|()| Self::at(path))
    }

    /// Where the socket in it is.
    pub fn socket(&self) -> PathBuf {
        self.path.join(SOCKET)
    }

    /// Whether a path is that of the socket in such a folder, of whichever process, as far as its words tell: all of them
    /// are those of [`Self::make`] and [`Self::socket`], in a folder for what lives as long as a process.
    pub fn is_of(path: &Path) -> bool {
        let text = |path: &Path| path.file_name().and_then(OsStr::to_str).map(str::to_owned);
        let mut folders = path.ancestors().skip(1);
        let (Some(own), Some(base)) = (folders.next(), folders.next()) else { return false };
        let name = text(own).unwrap_or_default();
        let number = name.strip_prefix(OWN).and_then(|number| number.parse::<u32>().ok());
        let is_temporary = base == std::env::temp_dir() || base == Path::new("/tmp");
        let is_base = base.is_absolute() && (is_temporary || text(base).as_deref() == Some(RUNTIME));
        is_base && path.ends_with(SOCKET) && number.is_some_and(|number| name == format!("{OWN}{number}"))
    }

    /// The folder that was made at `path`.
    pub fn at(path: PathBuf) -> Self {
        let note = identity(&path).and_then(|identity| Note::take(&path, identity));
        Self { path, note }
    }

    /// The folder's path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for OwnFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
        self.note.into_iter().for_each(Note::give_back);
    }
}

/// Device and inode of what is at a path.
pub fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Removes the files of all sockets, for an end at once, and then the folder that was made for one of them. A signal's
/// handler may call this.
pub fn remove_all() {
    for _ in ["sockets", "the folder that is empty then"] {
        NOTES.iter().for_each(Note::remove);
    }
}

/// A file, as a handler finds it.
struct Note {
    is_taken: AtomicBool,
    path: [AtomicU8; PATH_MAX],
    device: AtomicU64,
    /// 0: there is no file.
    inode: AtomicU64,
}

impl Note {
    const fn new() -> Self {
        let path = [const { AtomicU8::new(0) }; PATH_MAX];
        Self { is_taken: AtomicBool::new(false), path, device: AtomicU64::new(0), inode: AtomicU64::new(0) }
    }

    /// Notes a file or a folder. None: so many are noted already, or the path is too long for a socket's.
    fn take(path: &Path, (device, inode): (u64, u64)) -> Option<&'static Self> {
        if path.as_os_str().len() > PATH_MAX {
            return None;
        }
        let note = NOTES.iter().find(|note| !note.is_taken.swap(true, SeqCst))?;
        let bytes = path.as_os_str().as_bytes().iter().copied().chain(std::iter::repeat(0));
        note.path.iter().zip(bytes).for_each(|(to, from)| to.store(from, SeqCst));
        note.device.store(device, SeqCst);
        note.inode.store(inode, SeqCst);
        Some(note)
    }

    fn give_back(&'static self) {
        self.inode.store(0, SeqCst);
        self.is_taken.store(false, SeqCst);
    }

    /// Removes the file, unless somebody else has theirs at its path by now. A note that is just being written
    /// has no file yet, or a path at which the file is not.
    fn remove(&self) {
        let (device, inode) = (self.device.load(SeqCst), self.inode.load(SeqCst));
        if inode == 0 {
            return;
        }
        let mut path = [0; PATH_MAX + 1];
        path.iter_mut().zip(&self.path).for_each(|(to, from)| *to = from.load(SeqCst));
        if let Ok(path) = CStr::from_bytes_until_nul(&path) {
            descriptor::remove_if_same(path, (device, inode));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_socket_of_our_own_making_is_moved() {
        let temporary = std::env::temp_dir().join("alula-9/vsock");
        for own in
            [temporary.to_str().unwrap(), "/run/alula/alula-9/vsock", "/run/user/7/alula/alula-12/vsock"]
        {
            assert!(OwnFolder::is_of(Path::new(own)), "{own}");
        }
        for other in [
            "alula-9/vsock",
            "alula/alula-9/vsock",
            "/run/alula/alula-9/named.sock",
            "/run/alula/alula-09/vsock",
            "/run/alula/alula-+9/vsock",
            "/run/alula/alula-x/vsock",
            "/home/me/alula-9/vsock",
            "/vsock",
        ] {
            assert!(!OwnFolder::is_of(Path::new(other)), "{other}");
        }
    }
}
