//! Why nobody can listen at a path: what is there already.

use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::error::Error;
use crate::paths;

/// How long somebody who listens at a path has to let us in.
const ANSWER_TIME: Duration = Duration::from_secs(1);

/// Why the address cannot be had, and what to do.
pub fn cannot_bind(path: &Path, error: &std::io::Error) -> Error {
    let length = path.as_os_str().len();
    let message = match error.kind() {
        ErrorKind::AddrInUse => match try_to_connect(path) {
            None => "another process serves it: choose another path".to_owned(),
            // The kernel also refuses a connection to a file that is no socket.
            Some(ErrorKind::ConnectionRefused) if is_socket(path) => format!(
                "a socket is left there by a process that has ended: remove it (`rm '{}'`)",
                path.display()
            ),
            Some(_) => "there is something else already: choose another path, or move that away".to_owned(),
        },
        ErrorKind::InvalidInput => {
            format!(
                "its {length} bytes are too long for a socket (107 at most) or contain a NUL: choose a shorter path"
            )
        }
        _ => return paths::cannot_make(path, error),
    };
    Error::config(message)
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
