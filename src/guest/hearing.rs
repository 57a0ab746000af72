//! A call that is heard to its end by a caller who has nothing else to wait for.

use std::time::{Duration, Instant};

use super::call::{Call, Ending, Said};
use crate::error::{Error, Result};
use crate::poll::{Events, Interest};
use crate::protocol::request::Greeting;

/// So much of what an agent's process says on standard error is kept: a hostile guest's would not end.
const ERRORS_MAX: usize = 16 << 10;

/// A call, and what was heard of it so far.
pub struct Hearing {
    /// The call.
    pub call: Call,
    events: Events,
    deadline: Option<Instant>,
    greeting: Option<Greeting>,
    errors: Vec<u8>,
    /// How it has ended, if it has.
    pub ending: Option<Ending>,
}

impl Hearing {
    /// A call that an agent has until `deadline` to answer.
    pub fn new(call: Call, deadline: Option<Instant>) -> Result<Self> {
        let events = Events::new()?;
        events.add(&call, Interest::IN | Interest::OUT, 0)?;
        Ok(Self { call, events, deadline, greeting: None, errors: Vec::new(), ending: None })
    }

    /// Waits until there is something to hear or room for what is to be sent, and does both; what comes as output
    /// goes to `output`. An error: the time is up, or the agent has gone or lies.
    pub fn step(&mut self, output: &mut impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let interest = if self.call.has_to_send() { Interest::IN | Interest::OUT } else { Interest::IN };
        self.events.change(&self.call, interest, 0)?;
        // A millisecond more: epoll rounds down.
        let rest = |at: Instant| at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        let deadline = self.deadline.into_iter().chain(self.call.greets_by()).min();
        self.events.wait(deadline.map(rest), &mut Vec::new())?;
        if self.deadline.is_some_and(|at| at <= Instant::now()) {
            return Err(Error::guest("the agent in the guest does not answer, and the time is up"));
        }
        self.call.send();
        let Self { call, greeting, errors, ending, .. } = self;
        call.hear(|said| {
            match said {
                Said::Output(bytes) => output(bytes)?,
                Said::Errors(bytes) => {
                    let room = ERRORS_MAX - errors.len().min(ERRORS_MAX);
                    errors.extend_from_slice(&bytes[..bytes.len().min(room)]);
                }
                Said::Ended(how) => *ending = Some(how),
                Said::Greeting(text) => *greeting = Some(text),
            }
            Ok(())
        })?;
        self.call.check_silence()
    }

    /// Hears the rest of it, whose end must be a good one. What the agent's process says on standard error is the
    /// reason if it fails, and told otherwise. Returns how the agent has greeted.
    pub fn finish(mut self, mut output: impl FnMut(&[u8]) -> Result<()>) -> Result<Greeting> {
        let ending = loop {
            match self.ending.take() {
                Some(ending) => break ending,
                None => self.step(&mut output)?,
            }
        };
        let text = String::from_utf8_lossy(&self.errors);
        let lines = text.lines().map(|line| crate::log::in_one_line(line.trim_start_matches("alula: ")));
        let why = match ending {
            Ending::Exited(0) => {
                lines.for_each(|line| eprintln!("alula: in the guest: {line}"));
                return Ok(self.greeting.unwrap_or_default());
            }
            Ending::Exited(_) if !self.errors.is_empty() => lines.collect::<Vec<_>>().join("; "),
            Ending::Exited(code) => format!("exit code {code}"),
            Ending::Signaled(signal) => format!("ended by signal {signal}"),
            Ending::NotFound(why) | Ending::NotExecutable(why) | Ending::Failed(why) => why,
        };
        Err(Error::guest(format!("in the guest: {why}")))
    }
}
