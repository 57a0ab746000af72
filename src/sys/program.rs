//! Programs that this one starts: who they are, their terminals, their signals and their end.
#![allow(unsafe_code)]

use std::io::Result;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use super::descriptor::owned;
use super::{check, process};

/// How a process ended: by itself with a code, or by a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Its exit code.
    Code(u8),
    /// The signal.
    Signal(u8),
}

/// Who a program runs as.
pub struct User {
    /// The user's number.
    pub uid: u32,
    /// The number of the user's group.
    pub gid: u32,
    /// Those of further groups.
    pub groups: Vec<u32>,
}

/// A descriptor that is readable when one of these signals has come. They are blocked for it, which programs that are
/// started do not inherit (`std::process::Command` gives them an empty mask).
pub fn watch(signals: &[i32]) -> Result<OwnedFd> {
    let set = process::signals(signals);
    process::block_signals(&set);
    // SAFETY: the call reads the set.
    owned(unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) })
}

/// The next signal that came to such a descriptor.
pub fn next_signal(mut watched: impl std::io::Read) -> Option<u8> {
    let mut told = [0; mem::size_of::<libc::signalfd_siginfo>()];
    let count = watched.read(&mut told).ok()?;
    // Its first field is the number (signalfd(2)).
    let number = told[..count].first_chunk().map(|number| u32::from_ne_bytes(*number))?;
    u8::try_from(number).ok()
}

/// The size of the terminal that this is, if it is one: rows and columns.
pub fn window(terminal: &impl AsRawFd) -> Option<(u16, u16)> {
    // SAFETY: the structure is plain data of which zeros are valid, and the call writes it.
    unsafe {
        let mut size: libc::winsize = mem::zeroed();
        check(libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &mut size)).ok()?;
        Some((size.ws_row, size.ws_col))
    }
}

/// A child that has ended, if one has: any that this process is the parent of.
pub fn reap() -> Option<(u32, Exit)> {
    let mut status = 0;
    // SAFETY: the call writes the local number.
    let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
    let pid = u32::try_from(pid).ok().filter(|pid| *pid > 0)?;
    let exit = match libc::WIFSIGNALED(status) {
        true => Exit::Signal(libc::WTERMSIG(status) as u8),
        false => Exit::Code(libc::WEXITSTATUS(status) as u8),
    };
    Some((pid, exit))
}

/// Sends a signal to a process group. A group that is gone gets none.
pub fn signal_group(group: u32, signal: u8) {
    // A group of 0 or 1 would be our own, or everybody.
    if let Ok(group) = libc::pid_t::try_from(group)
        && group > 1
    {
        // SAFETY: the call takes numbers.
        unsafe { libc::kill(-group, signal.into()) };
    }
}

/// Sends a signal to every process but this one, if this is process 1.
pub fn signal_all(signal: i32) {
    if std::process::id() == 1 {
        // SAFETY: the call takes numbers.
        unsafe { libc::kill(-1, signal) };
    }
}

/// Both ends of a new pseudoterminal, ours and the program's, which belongs to `owner`.
pub fn terminal(size: (u16, u16), owner: u32) -> Result<(OwnedFd, OwnedFd)> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the call reads a static string.
    let ours = owned(unsafe { libc::open(c"/dev/ptmx".as_ptr(), flags | libc::O_NONBLOCK) })?;
    let unlocked: libc::c_int = 0;
    // SAFETY: the call reads the local number (ioctl_tty(2)).
    check(unsafe { libc::ioctl(ours.as_raw_fd(), libc::TIOCSPTLCK, &unlocked) })?;
    // SAFETY: the call takes flags. The other end needs no path by it: /dev/pts may be another's.
    let theirs = owned(unsafe { libc::ioctl(ours.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    // SAFETY: the call takes numbers.
    check(unsafe { libc::fchown(theirs.as_raw_fd(), owner, libc::gid_t::MAX) })?;
    set_window(&ours, size)?;
    Ok((ours, theirs))
}

/// Tells a terminal's program its size; what is 0 is not known, and stays as it is.
pub fn set_window(terminal: &impl AsRawFd, (rows, columns): (u16, u16)) -> Result<()> {
    // SAFETY: the structure is plain data of which zeros are valid, and the calls read and write it.
    unsafe {
        let mut size: libc::winsize = mem::zeroed();
        check(libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &mut size))?;
        size.ws_row = if rows > 0 { rows } else { size.ws_row };
        size.ws_col = if columns > 0 { columns } else { size.ws_col };
        check(libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size)).map(drop)
    }
}

/// The process group in a terminal's foreground.
pub fn foreground(terminal: &impl AsRawFd) -> Option<u32> {
    // SAFETY: the call takes a number.
    u32::try_from(unsafe { libc::tcgetpgrp(terminal.as_raw_fd()) }).ok()
}

/// The highest number of a signal with a name (signal(7)).
const SIGNALS: i32 = 31;

/// Has the program start in a session of its own, whose terminal its standard input is, if that is said, and as
/// this user.
pub fn prepare(command: &mut Command, user: Option<User>, has_terminal: bool) {
    let enter = move || {
        // SAFETY: the calls take numbers, and the list is as long as is said. This thread is the only one: nobody
        // else can have held a lock when it forked.
        unsafe {
            check(libc::setsid())?;
            // Whoever started the agent may have had signals ignored, as a shell's background job has Ctrl-C, and a
            // program inherits that. The kernel refuses two of these numbers (KILL, STOP), which are never ignored.
            for number in 1..=SIGNALS {
                libc::signal(number, libc::SIG_DFL);
            }
            if has_terminal {
                check(libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0))?;
            }
            if let Some(User { uid, gid, groups }) = &user {
                check(libc::setgroups(groups.len(), groups.as_ptr()))?;
                check(libc::setgid(*gid))?;
                check(libc::setuid(*uid))?;
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls only, and allocates nothing.
    unsafe { command.pre_exec(enter) };
}

/// Who this process is: its user and its group.
pub fn identity() -> (u32, u32) {
    // SAFETY: the calls return numbers.
    unsafe { (libc::geteuid(), libc::getegid()) }
}
