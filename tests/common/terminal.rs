//! Terminals of the tests (pty(7)), and shells that have one.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{PATIENCE, alula};

/// A terminal: the user's side, and the side that the monitor gets.
pub struct Terminal {
    pub user: File,
    pub monitor: OwnedFd,
}

impl Terminal {
    #[allow(unsafe_code)]
    pub fn new() -> Self {
        let (mut user, mut monitor) = (0, 0);
        let null = std::ptr::null_mut();
        // SAFETY: the call writes the two descriptors, which are then owned here.
        unsafe {
            assert_eq!(libc::openpty(&mut user, &mut monitor, null, null.cast(), null.cast()), 0);
            Self { user: File::from_raw_fd(user), monitor: OwnedFd::from_raw_fd(monitor) }
        }
    }

    /// Gives it so many rows and columns.
    #[allow(unsafe_code)]
    pub fn set_size(&self, rows: u16, columns: u16) {
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the call reads one structure.
        assert_eq!(unsafe { libc::ioctl(self.monitor.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }, 0);
    }

    /// The input, output and local modes, of which raw mode changes some.
    #[allow(unsafe_code)]
    pub fn modes(&self) -> [u32; 3] {
        // SAFETY: `termios` is plain data that the call fills in.
        unsafe {
            let mut mode: libc::termios = std::mem::zeroed();
            assert_eq!(libc::tcgetattr(self.monitor.as_raw_fd(), &mut mode), 0);
            [mode.c_iflag, mode.c_oflag, mode.c_lflag]
        }
    }

    pub fn is_raw(&self) -> bool {
        self.modes()[2] & (libc::ICANON | libc::ECHO | libc::ISIG) == 0
    }

    /// The monitor with this terminal.
    pub fn start(&self, arguments: &[&str]) -> Child {
        self.with(Command::new(alula()).args(arguments)).spawn().unwrap()
    }

    /// A shell with job control that has the terminal. It runs `script`, whose `$0` is the monitor: its jobs
    /// have process groups of their own.
    #[allow(unsafe_code)]
    pub fn shell(&self, script: &str, arguments: &[&str]) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("set -m; {script}")]).arg(alula()).args(arguments);
        // SAFETY: between fork and exec the closure makes system calls alone.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        self.with(&mut command).spawn().unwrap()
    }

    /// `command` with this terminal.
    pub fn with<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let side = || Stdio::from(self.monitor.try_clone().unwrap());
        command.stdin(side()).stdout(side()).stderr(Stdio::null())
    }

    /// Writes to the terminal as the monitor does.
    pub fn monitor_says(&self, text: &str) {
        File::from(self.monitor.try_clone().unwrap()).write_all(text.as_bytes()).unwrap();
    }

    /// What was written to the terminal, up to this text.
    pub fn read_until(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let (mut seen, mut byte) = (Vec::new(), [0]);
        while !String::from_utf8_lossy(&seen).contains(text) {
            let is_there = readable_until(&self.user, deadline);
            assert!(is_there, "waited for `{text}`, got:\n{}", String::from_utf8_lossy(&seen));
            self.user.read_exact(&mut byte).unwrap();
            seen.push(byte[0]);
        }
        String::from_utf8_lossy(&seen).into_owned()
    }

    /// Waits until `child`, which has this terminal, has ended, and returns its exit code.
    pub fn code_of(&mut self, child: &mut Child) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status.code();
            }
            if Instant::now() >= deadline {
                let mut said = Vec::new();
                while readable_until(&self.user, Instant::now()) {
                    let mut byte = [0];
                    self.user.read_exact(&mut byte).unwrap();
                    said.push(byte[0]);
                }
                let _ = child.kill();
                panic!("it does not end; it said:\n{}", String::from_utf8_lossy(&said));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Waits until `file` has something to read, or the time is up.
#[allow(unsafe_code)]
fn readable_until(file: &File, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now()).as_millis() as i32;
    let mut wanted = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: the call reads and writes the one structure that it is told of.
    unsafe { libc::poll(&raw mut wanted, 1, left) == 1 }
}
