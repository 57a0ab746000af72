//! Connections to programs of this host that listen on a Unix socket.

use std::io::{Error as IoError, ErrorKind, Result as IoResult};
use std::mem::offset_of;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::sys::network;

/// Connects to whoever listens at `path`, and waits for nobody: a listener that does not take its clients is an
/// error once the kernel keeps no more of them waiting (unix(7)). The stream does not block.
pub fn connect(path: &Path) -> Result<UnixStream> {
    open(path).map_err(refused).with_context(|| format!("connect to `{}`", path.display()))
}

/// Connects as [`connect`] does, and returns the kernel's error.
pub fn open(path: &Path) -> IoResult<UnixStream> {
    let wrong = || IoError::new(ErrorKind::InvalidInput, "a socket's path has 1 to 107 bytes, and no NUL");
    let (address, length) = address(path).ok_or_else(wrong)?;
    let socket = network::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
    network::connect(&socket, &address, length)?;
    Ok(socket.into())
}

/// The address of the socket at `path`, and how long it is; None: a socket cannot have this path.
pub(super) fn address(path: &Path) -> Option<(libc::sockaddr_un, usize)> {
    let bytes = path.as_os_str().as_bytes();
    let mut address = libc::sockaddr_un { sun_family: libc::AF_UNIX as _, sun_path: [0; 108] };
    // The path ends with a zero.
    if bytes.is_empty() || bytes.contains(&0) || bytes.len() >= address.sun_path.len() {
        return None;
    }
    address.sun_path.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from as libc::c_char);
    Some((address, offset_of!(libc::sockaddr_un, sun_path) + bytes.len() + 1))
}

fn refused(error: IoError) -> Error {
    let why = match error.kind() {
        ErrorKind::NotFound => "there is no socket: start what shall listen there first",
        ErrorKind::ConnectionRefused => "nobody listens there, or it is no socket: start what shall listen",
        ErrorKind::WouldBlock => "who listens there does not take its clients, and many wait already",
        ErrorKind::InvalidInput => return Error::config(error.to_string()),
        _ => return Error::host(error.to_string()),
    };
    Err::<(), _>(error).context(why).expect_err("it is an error")
}

/// Whether an error of [`connect`] says that who listens has no room for one more client now.
pub fn is_busy(error: &Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let kind = error.downcast_ref::<IoError>().map(IoError::kind);
        if kind == Some(ErrorKind::WouldBlock) {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    fn error(path: &Path) -> String {
        connect(path).unwrap_err().to_string()
    }

    #[test]
    fn a_connection_waits_for_nobody() {
        let path = std::env::temp_dir().join(format!("alula-socket-{}", std::process::id()));
        assert!(error(&path).contains("there is no socket"), "{}", error(&path));
        let listener = UnixListener::bind(&path).unwrap();
        let mut stream = connect(&path).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        stream.write_all(b"x").unwrap();
        listener.accept().unwrap().0.read_exact(&mut [0]).unwrap();
        // As many as the kernel keeps for who does not take them.
        let mut waiting = Vec::new();
        let full = loop {
            match connect(&path) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
        };
        assert!(is_busy(&full) && full.to_string().contains("does not take its clients"), "{full}");
        drop(listener);
        // A child that another case begins has the listener, too, until it executes its program.
        let nobody_listens = (0..1000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            let refused = connect(&path).unwrap_err();
            !is_busy(&refused) && refused.to_string().contains("nobody listens there")
        });
        assert!(nobody_listens, "{}", error(&path));
        std::fs::remove_file(&path).unwrap();
        assert!(error(Path::new(&"x".repeat(108))).contains("1 to 107 bytes"));
    }
}
