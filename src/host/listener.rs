//! Unix sockets that programs of this host connect to: made at a path where nobody listens, removed at the end.

use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::ops::Deref;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use super::socket;
use super::socket_file::{self, PATH_MAX, SocketFile};
use crate::descriptors::Named;
use crate::error::{Context, Error, Result};
use crate::paths;
use crate::sys::network;

/// How long somebody who listens at a path has to let us in.
const ANSWER_TIME: Duration = Duration::from_secs(1);
/// A process that has just made a socket at a path lets nobody in before it listens, and looks like one that has
/// ended: so long it has between the two.
const SETTLE_TIME: Duration = Duration::from_millis(100);
/// So long one waits for another process that takes a path over in the same folder, and looks again as often.
const LOCK_TIME: Duration = Duration::from_secs(2);
const LOCK_STEP: Duration = Duration::from_millis(10);

/// A listening socket, which does not block. Its file is removed when it is dropped, and when the process ends at
/// once ([`socket_file::remove_all`]).
pub struct Listener {
    socket: Named<UnixListener>,
    file: SocketFile,
}

impl Listener {
    /// Listens at `path`, where nothing may be yet but a socket that a process has left there: one that was killed
    /// could not remove it. Errors call the new one `what`.
    pub fn bind(what: &str, path: &Path) -> Result<Self> {
        let attempt = || format!("listen on {what} `{}`", path.display());
        check(path).with_context(attempt)?;
        let socket = match listen(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => take_over(path),
            socket => socket.map_err(|error| paths::cannot_make(path, &error)),
        };
        let socket = Named::new(what.to_owned(), socket.with_context(attempt)?);
        Ok(Self { socket, file: SocketFile::at(path) })
    }

    /// Whether a socket could have this path at all.
    pub fn check(what: &str, path: &Path) -> Result<()> {
        check(path).with_context(|| format!("listen on {what} `{}`", path.display()))
    }

    /// Whether one could listen at `path` now: nothing is made, nor removed.
    pub fn look(what: &str, path: &Path) -> Result<()> {
        let attempt = || format!("listen on {what} `{}`", path.display());
        check(path).with_context(attempt)?;
        match (path.symlink_metadata(), paths::folder(path).is_dir()) {
            (Ok(_), _) => check_left(path),
            (Err(_), false) => Err(paths::cannot_make(path, &ErrorKind::NotFound.into())),
            (Err(_), true) => Ok(()),
        }
        .with_context(attempt)
    }

    /// Closes the socket, which the process that this one is a copy of goes on to serve.
    pub fn leave(self) {
        self.file.leave();
    }

    /// Removes the socket that a process has left at `path`. Returns whether there was one: one that somebody listens at
    /// stays.
    pub fn sweep(path: &Path) -> Result<bool> {
        if check_left(path).is_err() {
            return Ok(false);
        }
        let swept = clear(path).map(|_| true);
        swept.with_context(|| format!("remove what a process has left at `{}`", path.display()))
    }

    /// Whether it is this socket that programs find at `path`.
    pub fn is_at(&self, path: &Path) -> bool {
        self.file.is_at(path)
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

/// Listens at `path` in place of a process that has ended.
fn take_over(path: &Path) -> Result<UnixListener> {
    let _lock = clear(path)?;
    listen(path).map_err(|error| paths::cannot_make(path, &error))
}

/// Removes what a process has left at `path`. What anybody listens at stays as it is: who takes a path over has the
/// folder's lock, which is returned, so that nobody removes what another one has just made there.
fn clear(path: &Path) -> Result<File> {
    let before = socket_file::identity(path);
    check_left(path)?;
    let lock = lock(paths::folder(path))?;
    std::thread::sleep(SETTLE_TIME);
    check_left(path)?;
    if socket_file::identity(path) != before {
        return Err(Error::config("another process is about to serve it: choose another path"));
    }
    let removed = std::fs::remove_file(path);
    removed.with_context(|| {
        format!("remove the socket that a process has left there (`rm '{}'`)", path.display())
    })?;
    Ok(lock)
}

/// A listening socket at `path` that does not block from the first.
fn listen(path: &Path) -> std::io::Result<UnixListener> {
    let (address, length) = socket::address(path).ok_or(ErrorKind::InvalidInput)?;
    let socket = network::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
    network::listen(&socket, &address, length)?;
    Ok(socket.into())
}

/// The only one to take over a path in `folder`, as long as the result is there.
fn lock(folder: &Path) -> Result<File> {
    let attempt = || format!("lock the folder `{}`", folder.display());
    let (file, begun) = (File::open(folder).with_context(attempt)?, Instant::now());
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if begun.elapsed() < LOCK_TIME => std::thread::sleep(LOCK_STEP),
            // Anybody may hold it for ever.
            Err(TryLockError::WouldBlock) => {
                return Err(Error::host("another process holds it")).with_context(attempt);
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(attempt),
        }
    }
}

/// Whether what is at `path` is a socket that a process has left there; else, what to do.
fn check_left(path: &Path) -> Result<()> {
    Err(Error::config(match try_to_connect(path) {
        None => "another process serves it: choose another path",
        // The kernel also refuses a connection to a file that is no socket.
        Some(ErrorKind::ConnectionRefused) if is_socket(path) => return Ok(()),
        Some(_) => "there is something else already: choose another path, or move that away",
    }))
}

/// How a connection to what is at `path` fails. None: somebody listens there. Who hangs, and has more clients
/// waiting than the kernel lets in, would keep one more waiting for ever; that one is left behind.
fn try_to_connect(path: &Path) -> Option<ErrorKind> {
    let (sender, answer) = std::sync::mpsc::channel();
    let path = path.to_owned();
    let connect = move || sender.send(UnixStream::connect(path).err().map(|error| error.kind()));
    let thread = std::thread::spawn(connect);
    let answer = answer.recv_timeout(ANSWER_TIME);
    if answer.is_ok() {
        // A process that is to be copied must not have a thread that is about to end. This one has nothing left to do.
        let _ = thread.join();
    }
    answer.unwrap_or(None)
}

fn is_socket(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|metadata| metadata.file_type().is_socket())
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
        let [live, stale, link, file] = ["live", "stale", "link", "file"].map(|name| folder.join(name));
        let _live = Listener::bind("socket", &live).unwrap();
        drop(UnixListener::bind(&stale).unwrap());
        std::os::unix::fs::symlink(&stale, &link).unwrap();
        std::fs::write(&file, "").unwrap();
        let long = folder.join("x".repeat(PATH_MAX));
        let missing = folder.join("none/socket");
        for (path, expected) in [
            (&*live, "another process serves it: choose another path".to_owned()),
            (&*file, "there is something else already".to_owned()),
            (&*link, "there is something else already".to_owned()),
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
        assert!(Listener::look("socket", &stale).is_ok() && stale.exists());
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn of_many_who_take_over_a_path_one_has_it() {
        let folder = std::env::temp_dir().join(format!("alula-listener-left-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("left");
        drop(UnixListener::bind(&path).unwrap());
        let all: Vec<_> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..4).map(|_| scope.spawn(|| Listener::bind("socket", &path))).collect();
            all.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let (made, refused): (Vec<_>, Vec<_>) = all.into_iter().partition(Result::is_ok);
        assert!(made.len() == 1 && made[0].as_ref().unwrap().is_at(&path));
        for error in refused.into_iter().filter_map(Result::err) {
            assert!(error.to_string().contains("choose another path"), "{error}");
        }
        UnixStream::connect(&path).expect("it listens there");
        drop(made);
        assert!(!path.exists());
        // Who begins to listen there meanwhile stays.
        drop(UnixListener::bind(&path).unwrap());
        let lock = lock(&folder).unwrap();
        let thread = std::thread::spawn({
            let path = path.clone();
            move || Listener::bind("socket", &path)
        });
        std::fs::remove_file(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        drop(lock);
        assert!(thread.join().unwrap().is_err());
        UnixStream::connect(&path).expect("it listens there still");
        drop(listener);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
