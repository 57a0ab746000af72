//! Telling a service manager that the service is ready: sd_notify(3), a datagram to the socket that the
//! environment names.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use crate::error::{Context, Error, Result};
use crate::log;
use crate::sys::process;

/// Names the socket of the service manager that started this process.
const VARIABLE: &str = "NOTIFY_SOCKET";

/// The service manager that waits for this service, if there is one.
pub struct Readiness(Option<UnixDatagram>);

impl Readiness {
    /// Finds the service manager. Its variable is gone from the environment afterwards: programs that are started
    /// from here have nothing to tell it. No other thread may exist yet.
    pub fn expected() -> Self {
        Self(process::take_variable(VARIABLE).and_then(|name| {
            let attempt = || format!("reach the service manager at `{}` ({VARIABLE})", name.display());
            // The service is as good without; it is the manager that will complain that nobody told it.
            connect(&name).with_context(attempt).inspect_err(|error| log::line(format_args!("{error}"))).ok()
        }))
    }

    /// Tells it, once.
    pub fn tell(self) {
        let Some(socket) = self.0 else { return };
        // The guest runs: of the calls that would do this, `main` may still make write(2).
        let mut socket = File::from(OwnedFd::from(socket));
        if let Err(error) = socket.write_all(b"READY=1") {
            log::line(format_args!("tell the service manager that the service is ready: {error}"));
        }
    }
}

/// A name that begins with `@` is one of the abstract namespace.
fn connect(name: &OsStr) -> Result<UnixDatagram> {
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        [b'/', ..] => SocketAddr::from_pathname(name),
        _ => {
            return Err(Error::config(
                "expected an absolute path, or `@` and the name of an abstract socket",
            ));
        }
    };
    let socket = UnixDatagram::unbound().context("make a socket")?;
    address.and_then(|address| socket.connect_addr(&address)).context("connect")?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manager_is_told_by_a_path_and_by_an_abstract_name() {
        let name = format!("alula-readiness-{}", std::process::id());
        let path = std::env::temp_dir().join(&name);
        let at_path = UnixDatagram::bind(&path).unwrap();
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let at_name = UnixDatagram::bind_addr(&address).unwrap();
        for (manager, called) in [(at_path, path.to_str().unwrap()), (at_name, &format!("@{name}"))] {
            Readiness(Some(connect(called.as_ref()).unwrap())).tell();
            let mut bytes = [0; 100];
            let count = manager.recv(&mut bytes).unwrap();
            assert_eq!(&bytes[..count], b"READY=1", "{called}");
        }
        std::fs::remove_file(&path).unwrap();
        for (called, expected) in
            [("", "expected an absolute"), ("vsock:2:1", "expected an absolute"), ("/x/y", "No such")]
        {
            let error = connect(called.as_ref()).unwrap_err().to_string();
            assert!(error.contains(expected), "{called}: {error}");
        }
    }
}
