//! A program in a guest, connected to this process's standard input, output and error.

use std::fs::File;
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::error::{Context, Result};
use crate::guest::call::{Call, Ending, Said};
use crate::log::{self, Level};
use crate::poll::{Events, Interest};
use crate::protocol::request::{Ask, Run, Window};
use crate::sys::process;
use crate::terminal::{Keys, Raw};

const STREAM: u64 = 0;
const INPUT: u64 = 1;
const SIGNALS: u64 = 2;

/// What a program has time for after it was told to end.
const GRACE: Duration = Duration::from_secs(2);
/// Signals that are the program's, not this process's.
const PASSED_ON: [i32; 6] =
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];

/// How often a terminal is looked at: another size of it comes by a signal, which is any thread's, and this can be
/// one of several.
const LOOK: Duration = Duration::from_millis(500);

/// Exit codes as `env`, `timeout` and shells have them.
pub const TIMED_OUT: u8 = 124;
const FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
const SIGNAL_BASE: u8 = 128;

/// How a session ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// What the agent told.
    Ended(Ending),
    /// The time was up.
    TimedOut,
    /// The user left it (Ctrl-A X).
    Left,
}

impl Outcome {
    /// The exit code for it, and what is to be said of it, if the code does not say it all.
    pub fn conclude(&self) -> (u8, Option<String>) {
        match self {
            Self::Ended(Ending::Exited(code)) => (*code, None),
            Self::Ended(Ending::Signaled(signal)) => {
                let words = format!("the command in the guest was ended by signal {signal}");
                (SIGNAL_BASE.saturating_add(*signal), Some(words))
            }
            Self::Ended(Ending::NotFound(why)) => (NOT_FOUND, Some(in_the_guest(why))),
            Self::Ended(Ending::NotExecutable(why)) => (NOT_EXECUTABLE, Some(in_the_guest(why))),
            Self::Ended(Ending::Failed(why)) => (FAILED, Some(in_the_guest(why))),
            Self::TimedOut => (TIMED_OUT, Some("the time for the command in the guest was up".to_owned())),
            Self::Left => (super::LEFT, Some("you left the command in the guest".to_owned())),
        }
    }
}

/// Says that a message of the agent is about the guest: its paths and programs are not those of the host.
fn in_the_guest(why: &str) -> String {
    format!("in the guest: {why}")
}

/// What a session is connected to.
pub struct Ends {
    /// Standard input is the program's; else it has an empty one.
    pub input: bool,
    /// Signals to this process are the program's.
    pub signals: bool,
    /// So long it may take.
    pub deadline: Option<Instant>,
}

/// A program's wish for a terminal of this process's size, if `wanted` and this process has one.
pub fn with_terminal(mut run: Run, wanted: bool) -> Run {
    if wanted {
        let size = Window::of(&std::io::stdout()).or_else(|| Window::of(&std::io::stdin()));
        run.terminal = Some(size.unwrap_or_default());
        if let Ok(term) = std::env::var("TERM") {
            run.env.insert(0, format!("TERM={term}"));
        }
    }
    run
}

struct Session {
    call: Call,
    events: Events,
    has_terminal: bool,
    input: Option<File>,
    /// Waiting for input is not possible (a regular file): it is always ready.
    is_file: bool,
    waits_for_input: bool,
    keys: Keys,
    raw: Option<Raw>,
    size: Option<Window>,
    signals: Option<File>,
    deadline: Option<Instant>,
    /// The deadline has passed, and the program was told to end.
    is_late: bool,
}

/// Asks the agent at the other end of `stream` for `run`, and stays until it has ended.
pub fn attend(stream: UnixStream, run: Run, ends: &Ends) -> Result<Outcome> {
    let has_terminal = run.terminal.is_some();
    let mut call = Call::new(stream, Ask::Run(run))?;
    let events = Events::new()?;
    events.add(&call, Interest::IN | Interest::OUT, STREAM)?;
    let signals = match ends.signals {
        true => Some(File::from(process::watch(&PASSED_ON).context("watch for signals")?)),
        false => None,
    };
    if let Some(signals) = &signals {
        events.add(signals, Interest::IN, SIGNALS)?;
    }
    let input = match ends.input {
        true => Some(own(&std::io::stdin())?),
        false => {
            call.end_input();
            None
        }
    };
    let mut session = Session {
        call,
        events,
        has_terminal,
        input,
        is_file: false,
        waits_for_input: false,
        keys: Keys::default(),
        raw: None,
        size: Window::of(&std::io::stdout()),
        signals,
        deadline: ends.deadline,
        is_late: false,
    };
    session.stay()
}

/// The same open file, without the library's buffers and locks.
fn own(standard: &impl AsFd) -> Result<File> {
    standard.as_fd().try_clone_to_owned().map(File::from).context("use standard input and output")
}

impl Session {
    fn stay(&mut self) -> Result<Outcome> {
        let (mut output, mut errors) = (own(&std::io::stdout())?, own(&std::io::stderr())?);
        let mut ready = Vec::new();
        loop {
            self.await_input()?;
            let interest = if self.call.has_to_send() { Interest::IN | Interest::OUT } else { Interest::IN };
            self.events.change(&self.call, interest, STREAM)?;
            self.events.wait(self.timeout(), &mut ready)?;
            if self.has_terminal {
                self.look_at_terminal();
            }
            if self.deadline.is_some_and(|at| at <= Instant::now()) {
                if std::mem::replace(&mut self.is_late, true) {
                    return Ok(Outcome::TimedOut);
                }
                self.call.signal(libc::SIGTERM as u8);
                self.deadline = Some(Instant::now() + GRACE);
            }
            let (mut has_input, mut is_heard) = (self.is_file, false);
            for event in &ready {
                match event.token {
                    INPUT => has_input = true,
                    SIGNALS => self.pass_signals_on(),
                    _ => is_heard = true,
                }
            }
            if has_input && self.read_input() {
                return Ok(Outcome::Left);
            }
            self.call.send();
            if is_heard && let Some(ending) = self.hear(&mut output, &mut errors)? {
                return Ok(if self.is_late { Outcome::TimedOut } else { Outcome::Ended(ending) });
            }
            self.call.check_silence()?;
        }
    }

    fn timeout(&self) -> Option<Duration> {
        if self.is_file && self.input.is_some() && self.call.room() > 0 && !self.call.has_to_send() {
            return Some(Duration::ZERO);
        }
        // A millisecond more: epoll rounds down.
        let deadline = self.deadline.into_iter().chain(self.call.greets_by()).min();
        let rest = deadline.map(|at| at.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
        rest.into_iter().chain(self.has_terminal.then_some(LOOK)).min()
    }

    fn hear(&mut self, output: &mut File, errors: &mut File) -> Result<Option<Ending>> {
        let mut ending = None;
        let Self { call, has_terminal, input, raw, .. } = self;
        call.hear(|said| {
            let written = match said {
                // Until then, Ctrl-C ends this process. What the program writes may come at once with this, and is for a
                // terminal that is raw.
                Said::Greeting(_) if *has_terminal && input.is_some() => {
                    *raw = Raw::enter_for_program(log::wants(Level::Warning));
                    Ok(())
                }
                Said::Greeting(_) => Ok(()),
                Said::Output(bytes) => output.write_all(bytes),
                Said::Errors(bytes) => errors.write_all(bytes),
                Said::Ended(how) => {
                    ending = Some(how);
                    Ok(())
                }
            };
            match written {
                // As a program on this machine would end.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                    ending = Some(Ending::Signaled(libc::SIGPIPE as u8));
                    Ok(())
                }
                written => written.context("write what the guest has written"),
            }
        })?;
        Ok(ending)
    }

    /// Waits for input only while the agent takes some.
    fn await_input(&mut self) -> Result<()> {
        let Some(input) = &self.input else { return Ok(()) };
        let wants = self.call.room() > 0 && !self.call.has_to_send() && !self.is_file;
        if wants && !self.waits_for_input {
            match self.events.add(input, Interest::IN, INPUT) {
                Ok(()) => self.waits_for_input = true,
                Err(_) => self.is_file = true,
            }
        } else if !wants && self.waits_for_input {
            self.events.remove(input)?;
            self.waits_for_input = false;
        }
        Ok(())
    }

    /// Takes input; true: the user leaves.
    fn read_input(&mut self) -> bool {
        let Some(input) = &mut self.input else { return false };
        if self.call.has_to_send() {
            return false;
        }
        let mut bytes = vec![0; self.call.room()];
        match input.read(&mut bytes) {
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            // What cannot be read has ended.
            Ok(0) | Err(_) if !bytes.is_empty() => {
                if self.waits_for_input {
                    // It is closed right after.
                    let _ = self.events.remove(input);
                    self.waits_for_input = false;
                }
                self.input = None;
                self.call.end_input();
            }
            Ok(count) if self.raw.is_some() => {
                let mut typed = Vec::with_capacity(count);
                let leaves = self.keys.filter(&bytes[..count], &mut typed);
                // A key before may have waited for this one.
                typed.truncate(self.call.room());
                self.call.give(&typed);
                return leaves;
            }
            Ok(count) => self.call.give(&bytes[..count]),
            Err(_) => {}
        }
        false
    }

    fn look_at_terminal(&mut self) {
        let size = Window::of(&std::io::stdout());
        if size != self.size {
            size.iter().for_each(|size| self.call.resize(*size));
            self.size = size;
        }
    }

    fn pass_signals_on(&mut self) {
        let Some(signals) = &mut self.signals else { return };
        while let Some(signal) = process::next_signal(&mut *signals) {
            self.call.signal(signal);
        }
    }
}

/// Whether standard input and output are terminals.
pub fn is_on_terminal() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_shells_and_timeout() {
        let code = |ending| Outcome::Ended(ending).conclude();
        assert_eq!(code(Ending::Exited(7)), (7, None));
        let (number, words) = code(Ending::Signaled(9));
        assert_eq!(
            (number, words.unwrap()),
            (137, "the command in the guest was ended by signal 9".to_owned())
        );
        assert_eq!(code(Ending::NotExecutable("a".into())).0, 126);
        assert_eq!(code(Ending::NotFound("a".into())).0, 127);
        assert_eq!(code(Ending::Failed("a".into())).0, 125);
        assert_eq!((Outcome::TimedOut.conclude().0, Outcome::Left.conclude().0), (124, 130));
    }
}
