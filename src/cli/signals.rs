//! The signals that end the process, as a descriptor to wait for.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use crate::error::{Context, Result};

const ENDING: [i32; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// Signals that would end the process wait here to be read.
pub struct Signals {
    file: File,
}

impl Signals {
    /// Blocks the signals in this thread and in those it starts later.
    #[allow(unsafe_code)]
    pub fn block() -> Result<Self> {
        // SAFETY: the calls only read the local set and change this thread's signal mask; the new
        // descriptor is given away whole.
        unsafe {
            let set = ending();
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            let fd = libc::signalfd(-1, &set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC);
            if fd < 0 {
                return Err(std::io::Error::last_os_error()).context("wait for signals");
            }
            Ok(Self { file: File::from_raw_fd(fd) })
        }
    }

    /// From here on the signals end the process as usual, those that wait at once.
    #[allow(unsafe_code)]
    pub fn unblock(&mut self) {
        // SAFETY: the call only changes this thread's signal mask.
        unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &ending(), std::ptr::null_mut()) };
    }

    /// The signal that came, if one did.
    pub fn next(&mut self) -> Option<u8> {
        // `struct signalfd_siginfo`: 128 bytes, the number first.
        let mut info = [0; 128];
        self.file.read_exact(&mut info).ok()?;
        Some(info[0])
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

#[allow(unsafe_code)]
fn ending() -> libc::sigset_t {
    // SAFETY: `sigset_t` is plain data that sigemptyset initialises.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in ENDING {
            libc::sigaddset(&mut set, signal);
        }
        set
    }
}
