//! Unix sockets that programs of this host connect to: made at a path where nothing is, removed at the end.

use std::io::ErrorKind;
use std::ops::Deref;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::descriptors::Named;
use crate::error::{Context, Error, Result};
use crate::paths;

/// How long somebody who listens at a path has to let us in.
const ANSWER_TIME: Duration = Duration::from_secs(1);
/// The longest path of a socket, in bytes (unix(7)).
const PATH_MAX: usize = 107;

/// A listening socket, which does not block. Its file is removed when it is dropped.
pub struct Listener {
    socket: Named<UnixListener>,
    path: PathBuf,
    /// Device and inode of the socket there.
    file: Option<(u64, u64)>,
}

impl Listener {
    /// Listens at `path`, where nothing may be yet, not even a socket that a process has left there: that, its
    /// owner removes. Errors call it `what`.
    pub fn bind(what: &str, path: &Path) -> Result<Self> {
        let attempt = || format!("listen on {what} `{}`", path.display());
        check(path).with_context(attempt)?;
        let socket =
            UnixListener::bind(path).map_err(|error| cannot_bind(path, &error)).with_context(attempt)?;
        let socket = Named::new(what.to_owned(), socket);
        let listener = Self { socket, path: path.to_owned(), file: identity(path) };
        listener.socket.set_nonblocking(true).with_context(attempt)?;
        Ok(listener)
    }

    /// Whether a socket could have this path at all.
    pub fn check(what: &str, path: &Path) -> Result<()> {
        check(path).with_context(|| format!("listen on {what} `{}`", path.display()))
    }

    /// Whether one could listen at `path` now: nothing is made.
    pub fn look(what: &str, path: &Path) -> Result<()> {
        let attempt = || format!("listen on {what} `{}`", path.display());
        check(path).with_context(attempt)?;
        let kind = match (path.symlink_metadata(), paths::folder(path).is_dir()) {
            (Ok(_), _) => ErrorKind::AddrInUse,
            (Err(_), false) => ErrorKind::NotFound,
            (Err(_), true) => return Ok(()),
        };
        Err(cannot_bind(path, &kind.into())).with_context(attempt)
    }

    /// Device and inode of its file; none: that was gone as soon as it was there.
    pub fn file(&self) -> Option<(u64, u64)> {
        self.file
    }

    /// Whether it is this socket that programs find at `path`.
    pub fn is_at(&self, path: &Path) -> bool {
        self.path == path && self.file.is_some() && identity(path) == self.file
    }
}

impl Deref for Listener {
    type Target = UnixListener;
    fn deref(&self) -> &UnixListener {
        &self.socket
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Somebody may have removed it already, and another one may listen there now.
        if self.is_at(&self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Device and inode of what is at a path.
fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// An empty path would be taken for a name that the kernel chooses.
fn check(path: &Path) -> Result<()> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.len() > PATH_MAX || bytes.contains(&0) {
        let length = bytes.len();
        return Err(Error::config(match length {
            0 => "its path is empty: give it one".to_owned(),
            _ => format!(
                "its {length} bytes are too long for a socket ({PATH_MAX} at most) or contain a NUL: choose a shorter path"
            ),
        }));
    }
    Ok(())
}

/// Why the address cannot be had, and what to do.
fn cannot_bind(path: &Path, error: &std::io::Error) -> Error {
    if error.kind() != ErrorKind::AddrInUse {
        return paths::cannot_make(path, error);
    }
    Error::config(match try_to_connect(path) {
        None => "another process serves it: choose another path".to_owned(),
        // The kernel also refuses a connection to a file that is no socket.
        Some(ErrorKind::ConnectionRefused) if is_socket(path) => format!(
            "a socket is left there by a process that has ended: remove it (`rm '{}'`)",
            path.display()
        ),
        Some(_) => "there is something else already: choose another path, or move that away".to_owned(),
    })
}

/// How a connection to what is at `path` fails. None: somebody listens there. Who hangs, and has more clients
/// waiting than the kernel lets in, would keep one more waiting for ever; that one is left behind.
fn try_to_connect(path: &Path) -> Option<ErrorKind> {
    let (sender, answer) = std::sync::mpsc::channel();
    let path = path.to_owned();
    std::thread::spawn(move || sender.send(UnixStream::connect(path).err().map(|error| error.kind())));
    answer.recv_timeout(ANSWER_TIME).unwrap_or(None)
}

fn is_socket(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_of_another_one_at_the_same_path_is_left() {
        let path = std::env::temp_dir().join(format!("alula-listener-{}", std::process::id()));
        let first = Listener::bind("socket", &path).unwrap();
        assert!(first.is_at(&path));
        std::fs::remove_file(&path).unwrap();
        let second = Listener::bind("socket", &path).unwrap();
        assert!(!first.is_at(&path));
        drop(first);
        UnixStream::connect(&path).expect("the second one still listens there");
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_that_cannot_be_had_is_refused_with_what_to_do() {
        let folder = std::env::temp_dir().join(format!("alula-listener-paths-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let [live, stale, file] = ["live", "stale", "file"].map(|name| folder.join(name));
        let _live = Listener::bind("socket", &live).unwrap();
        drop(UnixListener::bind(&stale).unwrap());
        std::fs::write(&file, "").unwrap();
        let long = folder.join("x".repeat(PATH_MAX));
        let missing = folder.join("none/socket");
        for (path, expected) in [
            (&*live, "another process serves it: choose another path".to_owned()),
            (
                &*stale,
                format!("left there by a process that has ended: remove it (`rm '{}'`)", stale.display()),
            ),
            (&*file, "there is something else already".to_owned()),
            (&*long, "bytes are too long for a socket (107 at most)".to_owned()),
            (Path::new(""), "its path is empty: give it one".to_owned()),
            (&*missing, format!("there is no folder `{}`: create it", folder.join("none").display())),
        ] {
            for error in [
                Listener::bind("socket", path).err().map(|error| error.to_string()),
                Listener::look("socket", path).err().map(|error| error.to_string()),
            ] {
                let error = error.expect("it cannot be had");
                assert!(error.starts_with("listen on socket `") && error.contains(&expected), "{error}");
            }
        }
        assert!(Listener::look("socket", &folder.join("free")).is_ok() && !folder.join("free").exists());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
