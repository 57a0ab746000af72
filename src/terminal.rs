//! The terminal as the guest's console: raw while the guest has it, as it was on every way out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Once, OnceLock};

use crate::sys::{descriptor, process};

const STDIN: i32 = libc::STDIN_FILENO;
/// Ctrl-A: the next key is for us, as [`KEYS`] tells.
const ESCAPE: u8 = 0x01;

/// The line that a terminal is told once, when the guest gets the keys.
const HINT: &str = "alula: Ctrl-A X leaves, Ctrl-A ? lists the keys\n";
/// The answer to Ctrl-A ?. It begins on a new line, because the guest may have left the cursor anywhere.
const KEYS: &str = "\r
alula: Ctrl-A X leaves; a guest that was started for this ends\r
alula: Ctrl-A Ctrl-A types a Ctrl-A\r
alula: Ctrl-A ? lists these keys; all others are typed\r
";

/// How the terminal was before it was first changed here; kept for the panic hook and signals too, which
/// cannot wait for a lock.
static ORIGINAL: OnceLock<libc::termios> = OnceLock::new();
/// The terminal is ours, and not as it was.
static IS_RAW: AtomicBool = AtomicBool::new(false);
/// A line feed on standard error, which is such a terminal, does not go back to the first column by itself.
static KEEPS_COLUMN: AtomicBool = AtomicBool::new(false);

/// The end of a line on standard error.
pub fn line_end() -> &'static str {
    let keeps_column = IS_RAW.load(Ordering::SeqCst) && KEEPS_COLUMN.load(Ordering::SeqCst);
    if keeps_column { "\r\n" } else { "\n" }
}

/// Whether standard input is a terminal in whose background this process is (tcgetpgrp(3)).
pub fn is_in_background() -> bool {
    // No terminal, or not the one that controls this process: nobody is stopped for using it.
    descriptor::process_groups(STDIN).is_some_and(|(foreground, own)| foreground != own)
}

/// How many rows and columns the terminal has that this process writes to, or else the one that it reads from; 0: there
/// is no terminal.
pub fn size() -> (u16, u16) {
    let size = process::window(&descriptor::standard_output()).or_else(|| process::window(&STDIN));
    size.unwrap_or_default()
}

/// The terminal in raw mode; as it was again when this is dropped.
pub struct Raw(());

impl Raw {
    /// Makes standard input raw, if it is a terminal: keys go to the guest as they are typed. The first time,
    /// `tells` has a terminal that messages go to told how to leave.
    pub fn enter(tells: bool) -> Option<Self> {
        Self::enter_with(tells, 0)
    }

    /// Makes standard input raw, as [`Self::enter`] does, for a program that has a terminal of its own in the guest. That
    /// terminal has put carriage returns into the program's output, which is shown byte for byte here: a program that
    /// draws its screen relies on that.
    pub fn enter_for_program(tells: bool) -> Option<Self> {
        Self::enter_with(tells, libc::OPOST)
    }

    /// Makes standard input raw, and switches these modes of output off.
    fn enter_with(tells: bool, without: libc::tcflag_t) -> Option<Self> {
        static TOLD: Once = Once::new();
        let now = descriptor::terminal_mode(STDIN)?;
        if tells && descriptor::terminal_mode(libc::STDERR_FILENO).is_some() {
            TOLD.call_once(|| process::write_error(HINT.as_bytes()));
        }
        // A shell may have made it raw again, as it was when this process was stopped.
        let mut mode = *ORIGINAL.get_or_init(|| now);
        mode.c_lflag &= !(libc::ICANON | libc::ECHO | libc::ISIG | libc::IEXTEN);
        mode.c_iflag &= !(libc::ICRNL | libc::INLCR | libc::IGNCR | libc::IXON | libc::ISTRIP | libc::BRKINT);
        mode.c_oflag &= !without;
        let is_shown_on = descriptor::terminal_mode(libc::STDERR_FILENO).is_some();
        KEEPS_COLUMN.store(without != 0 && is_shown_on, Ordering::SeqCst);
        IS_RAW.store(true, Ordering::SeqCst);
        descriptor::set_terminal_mode(STDIN, &mode);
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let report = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                report(panic);
            }));
        });
        Some(Self(()))
    }

    /// Leaves the terminal as it is: others have it now.
    pub fn forget(self) {
        IS_RAW.store(false, Ordering::SeqCst);
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal its modes back, unless others have it now: they have set their own, and a background
/// process that sets them is stopped (SIGTTOU). A signal handler may call this.
pub fn restore() {
    if IS_RAW.load(Ordering::SeqCst)
        && !is_in_background()
        && let Some(mode) = ORIGINAL.get()
    {
        descriptor::set_terminal_mode(STDIN, mode);
    }
    // Last: a signal that comes before this ends the process with the terminal restored, once or twice.
    IS_RAW.store(false, Ordering::SeqCst);
}

/// What is typed, without the keys that are for us.
#[derive(Default)]
pub struct Keys {
    escaped: bool,
}

impl Keys {
    /// Appends what the guest gets of `typed` to `guest`; true: the user leaves.
    pub fn filter(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> bool {
        for key in typed {
            match (self.escaped, *key) {
                (false, ESCAPE) => self.escaped = true,
                (true, b'x' | b'X') => return true,
                (true, b'?') => {
                    self.escaped = false;
                    process::write_error(KEYS.as_bytes());
                }
                (true, ESCAPE) => {
                    self.escaped = false;
                    guest.push(ESCAPE);
                }
                (true, other) => {
                    self.escaped = false;
                    guest.extend([ESCAPE, other]);
                }
                (false, other) => guest.push(other),
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_leaves_and_other_keys_reach_the_guest() {
        let filter = |pieces: &[&[u8]]| {
            let (mut keys, mut guest) = (Keys::default(), Vec::new());
            let left = pieces.iter().any(|piece| keys.filter(piece, &mut guest));
            (guest, left)
        };
        assert_eq!(filter(&[b"ls\r"]), (b"ls\r".to_vec(), false));
        assert_eq!(filter(&[b"a\x01", b"xb"]), (b"a".to_vec(), true));
        assert_eq!(filter(&[b"\x01\x01x"]), (b"\x01x".to_vec(), false));
        assert_eq!(filter(&[b"\x01b"]), (b"\x01b".to_vec(), false));
        assert_eq!(filter(&[b"a\x01?b\x01", b"?x"]), (b"abx".to_vec(), false));
    }
}
