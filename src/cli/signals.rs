//! The signals that end the process, or tell that it goes on, as a descriptor to wait for.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use crate::error::{Context, Result};

const ENDING: [i32; 5] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGXCPU];

/// Signals wait here to be read: those that would end the process, unless they were ignored when it was
/// started (nohup(1), a background job of a script), and SIGCONT.
pub struct Signals {
    file: File,
    set: libc::sigset_t,
}

/// Makes a write beyond RLIMIT_FSIZE fail with EFBIG instead of ending the process. The handler does
/// nothing; a program that this process starts has the default again, which it would not if the signal were
/// ignored (execve(2)).
#[allow(unsafe_code)]
pub fn survive_file_size_limit() {
    extern "C" fn on_signal(_: i32) {}
    // SAFETY: the handler touches nothing; the structure is plain data of which zeros are valid.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        let mut before: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGXFSZ, &action, &mut before);
        // What was ignored at the start stays so, here and in programs started from here.
        if before.sa_sigaction == libc::SIG_IGN {
            libc::sigaction(libc::SIGXFSZ, &before, std::ptr::null_mut());
        }
    }
}

impl Signals {
    /// Blocks the signals in this thread and in those it starts later.
    #[allow(unsafe_code)]
    pub fn block() -> Result<Self> {
        // SAFETY: the calls only read the local set and change this thread's signal mask; the new
        // descriptor is given away whole.
        unsafe {
            let set = awaited();
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            let fd = libc::signalfd(-1, &set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC);
            if fd < 0 {
                return Err(std::io::Error::last_os_error()).context("wait for signals");
            }
            Ok(Self { file: File::from_raw_fd(fd), set })
        }
    }

    /// From here on the signals end the process as usual, those that wait at once.
    #[allow(unsafe_code)]
    pub fn unblock(&mut self) {
        // SAFETY: the call only changes this thread's signal mask.
        unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &self.set, std::ptr::null_mut()) };
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
fn awaited() -> libc::sigset_t {
    // SAFETY: `sigset_t` is plain data that sigemptyset initialises; the other calls read and write locals.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCONT);
        for signal in ENDING {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &mut action);
            // A blocked signal waits to be read even where it is ignored.
            if action.sa_sigaction != libc::SIG_IGN {
                libc::sigaddset(&mut set, signal);
            }
        }
        set
    }
}
