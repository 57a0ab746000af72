//! Standard input on its way to the guest's serial console: whose terminal it is, and what is kept of it.

use std::io::Read;

use crate::error::Result;
use crate::log;
use crate::machine::Machine;
use crate::poll::{Events, Interest};
use crate::sys::descriptor;
use crate::terminal::{self, Keys, Raw};

/// The token of standard input on the main loop.
pub(super) const STDIN: u64 = 0;
/// What is read of standard input at once: about what the guest's UART takes.
const READ_MAX: usize = 64;
/// What is kept of a terminal's input for a guest that has no room for it now: a paste. A terminal is read
/// on, so that Ctrl-A X always works, and a guest that never reads must not make us grow.
const KEPT_MAX: usize = 64 << 10;

/// Standard input on its way to the guest.
#[derive(Default)]
pub(super) struct Input {
    raw: Option<Raw>,
    keys: Keys,
    /// Read, and not yet typed.
    typed: Vec<u8>,
    /// There is something to read, or its end.
    pub(super) is_ready: bool,
    /// Waiting is not possible (a regular file): it is always ready.
    is_file: bool,
    on_events: bool,
    ended: bool,
    /// What the guest has no room for is being lost, and that was told.
    is_losing: bool,
    /// Standard input is the guest's: the machine runs.
    is_wanted: bool,
    /// Standard input is a terminal that others have now.
    pub(super) is_elsewhere: bool,
}

impl Input {
    /// Gives standard input to the guest from now on.
    pub(super) fn enter(&mut self, events: &Events) {
        self.is_wanted = true;
        self.go_on(events);
    }

    /// Takes the terminal, if standard input is one and this process is in its foreground; else leaves it
    /// alone, since a background process that touches its terminal is stopped (termios(3), `tcsetattr`, SIGTTIN).
    /// To be called again when the process goes on (SIGCONT): the shell may have moved it, and has changed the
    /// terminal.
    pub(super) fn go_on(&mut self, events: &Events) {
        if !self.is_wanted {
            return;
        }
        // What was is over, whoever has the terminal now.
        self.raw.take().into_iter().for_each(Raw::forget);
        self.is_elsewhere = terminal::is_in_background();
        if self.is_elsewhere {
            self.stop_waiting(events);
            self.is_ready = false;
        } else {
            self.raw = Raw::enter(log::wants(log::Level::Warning));
            self.await_more(events);
        }
    }

    /// Gives the terminal back.
    pub(super) fn leave(&mut self, events: &Events) {
        self.stop_waiting(events);
        self.raw = None;
    }

    /// Waits for more; a file that epoll refuses is read at once.
    fn await_more(&mut self, events: &Events) {
        if !self.on_events && !self.is_file && !self.ended && !self.is_elsewhere {
            match events.add(&*descriptor::standard_input(), Interest::IN, STDIN) {
                Ok(()) => self.on_events = true,
                Err(_) => self.is_file = true,
            }
        }
    }

    fn stop_waiting(&mut self, events: &Events) {
        if self.on_events {
            // Closed elsewhere, it has left the set by itself.
            let _ = events.remove(&*descriptor::standard_input());
            self.on_events = false;
        }
    }

    /// Types what there is on the guest's console; true: the user leaves.
    pub(super) fn type_on(&mut self, machine: &mut Machine, events: &Events) -> Result<bool> {
        loop {
            if !self.typed.is_empty() {
                let count = machine.type_on_console(&self.typed);
                self.typed.drain(..count);
                self.is_losing &= !self.typed.is_empty();
                if !self.typed.is_empty() && self.raw.is_none() {
                    // The guest must read first; nothing is read ahead. A terminal is, so that
                    // Ctrl-A X always works.
                    self.stop_waiting(events);
                    return Ok(false);
                }
            }
            self.await_more(events);
            if self.ended || !(self.is_ready || self.is_file) {
                return Ok(false);
            }
            self.is_ready = false;
            if self.read(events) {
                return Ok(true);
            }
        }
    }

    fn read(&mut self, events: &Events) -> bool {
        let mut bytes = [0; READ_MAX];
        // Our own buffer instead of the library's: what it reads ahead, epoll does not tell of.
        let count = match descriptor::standard_input().read(&mut bytes) {
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => return false,
            Err(_) => 0,
        };
        if count == 0 {
            self.stop_waiting(events);
            self.ended = true;
            log::debug("standard input has ended");
            return false;
        }
        if self.raw.is_none() {
            self.typed.extend_from_slice(&bytes[..count]);
            return false;
        }
        let left = self.keys.filter(&bytes[..count], &mut self.typed);
        if self.typed.len() > KEPT_MAX {
            self.typed.truncate(KEPT_MAX);
            if !std::mem::replace(&mut self.is_losing, true) {
                log::line(format_args!(
                    "the guest does not read its console: what is typed beyond {} KiB is lost",
                    KEPT_MAX >> 10
                ));
            }
        }
        left
    }
}
