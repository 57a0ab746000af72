//! The main thread's event loop: clients, signals, standard input, and the guest's end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Microvm;
use super::input::{Input, STDIN};
use super::purpose::Purpose;
use super::signals::{self, Signals};
use crate::devices::watchdog::SHORTEST;
use crate::error::Result;
use crate::history::{self, Event, Feed};
use crate::jobs::Ticket;
use crate::log;
use crate::machine::{Exit, Machine};
use crate::memory::lost;
use crate::poll::{Events, Interest, Ready};
use crate::terminal;
use crate::walls::{self, refusal};

const EXIT: u64 = 1;
const MACHINE: u64 = 2;
const HAPPENED: u64 = 3;
const FEED: u64 = 4;
const JOBS: u64 = 5;
const PURPOSE: u64 = 6;
/// The first of those of the front.
const FRONT: u64 = 7;

/// How often a running guest is looked at (halted for good? console output kept?).
const LOOK: Duration = Duration::from_secs(1);
// When a watchdog ends is known in time.
const _: () = assert!(LOOK.as_nanos() <= SHORTEST.as_nanos());
/// A service that nobody asks anything for so long after its start prepares for the guest to come.
const IDLE: Duration = Duration::from_millis(50);
/// How long the end waits for readers of events that are not up to date: a reader that hangs must
/// not keep the process from ending.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How the loop ended.
pub enum Outcome {
    /// The guest ended.
    Ended(Exit),
    /// The guest ended after a client had asked it to, by this action.
    Obeyed(Exit, &'static str),
    /// The user left it.
    Left,
    /// This signal came.
    Signal(u8),
    /// What the guest was there for is done.
    Done,
}

/// How the process ends: in words, how much they matter, and its exit code.
pub struct Ending {
    /// Why, as the last line of the log says.
    pub reason: String,
    /// The level of that line.
    pub level: log::Level,
    /// The process's exit code.
    pub code: u8,
}

/// Whoever has clients that ask things of the microVM: the API's server. It lives on the main loop, and never
/// waits for a client.
pub trait Front {
    /// Puts its descriptors, and later those of its clients, on `events` with tokens from `token` on.
    fn register(&mut self, events: &Events, token: u64) -> Result<()>;
    /// Does what one of its descriptors is ready for. Returns whether a client was answered.
    fn handle(&mut self, ready: Ready, events: &Events, microvm: &mut Microvm) -> Result<bool>;
    /// A job of the microVM has ended so: whoever waits for it is answered.
    fn job_ended(
        &mut self,
        job: (Ticket, Result<Option<Value>>),
        events: &Events,
        microvm: &mut Microvm,
    ) -> Result<()>;
    /// When a client will have had its time; none: nobody is waited for.
    fn expires_at(&self) -> Option<Instant>;
    /// Gives up clients that have had their time at `now`.
    fn expire(&mut self, now: Instant, events: &Events) -> Result<()>;
    /// Tells clients that want to know what has happened, as far as they read now.
    fn tell(&mut self, events: &Events) -> Result<()>;
    /// Whether there are such clients.
    fn has_readers(&self) -> bool;
    /// Whether one of them has not read everything.
    fn is_behind(&self) -> bool;
}

/// Everything the main thread waits for.
pub struct Monitor {
    events: Events,
    signals: Signals,
    front: Option<Box<dyn Front>>,
    feed: Option<Feed>,
    /// What happens to the microVM wakes the loop: somebody wants to know.
    telling: bool,
    input: Input,
    /// Standard input is for it.
    purpose: Option<Arc<Purpose>>,
    /// The descriptors of a machine are on `events`: of the one after so many resets.
    watches: Option<u64>,
    /// The event of the microVM's jobs is on `events`.
    awaits_jobs: bool,
    /// When to prepare, if nothing happens before.
    prepare_at: Option<Instant>,
    look_at: Instant,
}

impl Monitor {
    /// Waits for `signals` and the clients of `front`, and tells `feed` what happens.
    pub fn new(signals: Signals, mut front: Option<Box<dyn Front>>, feed: Option<Feed>) -> Result<Self> {
        let events = Events::new()?;
        if let Some(front) = &mut front {
            front.register(&events, FRONT)?;
        }
        if let Some(feed) = &feed {
            // A regular file cannot be waited for, and need not be.
            let _ = events.add(feed, Interest::OUT | Interest::EDGE_TRIGGERED, FEED);
        }
        let now = Instant::now();
        let input = Input::default();
        Ok(Self {
            events,
            signals,
            front,
            feed,
            telling: false,
            input,
            purpose: None,
            watches: None,
            awaits_jobs: false,
            prepare_at: Some(now + IDLE),
            look_at: now,
        })
    }

    /// The guest is there for this alone, which standard input is for.
    pub fn wait_for(&mut self, purpose: Arc<Purpose>) -> Result<()> {
        self.events.add(purpose.event(), Interest::IN, PURPOSE)?;
        self.purpose = Some(purpose);
        Ok(())
    }

    fn is_done(&self) -> bool {
        self.purpose.as_ref().is_some_and(|purpose| purpose.is_met())
    }

    /// Does what `start` does, runs until the guest has ended, and says how that ends the process by
    /// `conclude`. The terminal and the socket are in order when this returns, what the guest has
    /// written is out, and readers of events know.
    pub fn run(
        &mut self,
        mut microvm: Box<Microvm>,
        start: impl FnOnce(&mut Microvm) -> Result<()>,
        conclude: impl FnOnce(&Result<Outcome>) -> Ending,
    ) -> Ending {
        let outcome = start(&mut microvm).and_then(|()| self.wait(&mut microvm));
        self.signals.begin_end();
        // In this order: a reader of our output that hangs must not keep the terminal or the socket waiting.
        self.input.leave(&self.events);
        microvm.write_metrics();
        let ending = conclude(&outcome);
        self.say_last_words(&ending);
        self.front = None;
        drop(microvm);
        self.signals.conclude();
        ending
    }

    fn say_last_words(&mut self, ending: &Ending) {
        history::tell(|| Event::Ended { reason: history::text(&ending.reason), exit_code: ending.code });
        let deadline = Instant::now() + LAST_WORDS;
        // An error is a reader that is gone.
        while self.tell().is_ok() && self.is_behind() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Ends the process of a guest that has lost its memory. Threads of the machine may stand still for ever, with
    /// locks that an end in order takes.
    fn end_by_lost_memory(&mut self) -> ! {
        let reason = lost::words();
        history::tell(|| Event::Failed { reason: history::text(&reason) });
        log::end(log::Level::Error, &reason);
        self.say_last_words(&Ending { reason, level: log::Level::Error, code: signals::MEMORY_LOST });
        signals::end_by_lost_memory()
    }

    /// Ends the process, a thread of which did what its filter does not allow, and stands still for ever.
    fn end_by_refusal(&mut self) -> ! {
        let reason = refusal::words();
        log::end(log::Level::Error, &reason);
        self.say_last_words(&Ending { reason, level: log::Level::Error, code: signals::REFUSED });
        signals::end_by_refusal()
    }

    /// Tells whoever wants to know what has happened.
    fn tell(&mut self) -> Result<()> {
        if let Some(feed) = &mut self.feed {
            feed.tell();
        }
        match &mut self.front {
            Some(front) => front.tell(&self.events),
            None => Ok(()),
        }
    }

    fn is_behind(&mut self) -> bool {
        self.feed.as_mut().is_some_and(Feed::is_behind)
            || self.front.as_ref().is_some_and(|front| front.is_behind())
    }

    /// From the first reader on, what happens wakes the loop.
    fn listen_for_events(&mut self) -> Result<()> {
        let is_wanted =
            || self.feed.is_some() || self.front.as_ref().is_some_and(|front| front.has_readers());
        if !self.telling && is_wanted() {
            // Clients can have used up all descriptors, and must not end the guest by that: until there is
            // one again, what happens is told when the loop turns for another reason.
            if let Ok(wake) = history::wake() {
                self.events.add(wake, Interest::IN, HAPPENED)?;
                self.telling = true;
            }
            // What came before does not wake.
            self.tell()?;
        }
        Ok(())
    }

    fn wait(&mut self, microvm: &mut Microvm) -> Result<Outcome> {
        let mut ready = Vec::new();
        loop {
            microvm.heed_watchdog();
            if let Some(error) = microvm.take_end() {
                return Err(error);
            }
            if lost::is_lost() {
                self.end_by_lost_memory();
            }
            if refusal::is_noted() {
                self.end_by_refusal();
            }
            let is_due = self.look_at <= Instant::now();
            if self.watches.is_some() && is_due {
                microvm.look_after();
            }
            // A CPU that waits for a page has not halted, and whoever looks at it would wait, too.
            let may_have_halted = is_due && !microvm.waits_for_page();
            let (resets, asked) = (microvm.resets(), microvm.asked_to_end());
            if let Some(machine) = microvm.machine() {
                if self.watches != Some(resets) {
                    self.watch(machine, resets)?;
                }
                if let Some(exit) = machine.exit() {
                    history::tell(|| exit.event());
                    return Ok(self.outcome(exit, asked));
                }
                if is_due {
                    self.look(machine, may_have_halted)?;
                }
                if self.signals.is_resized() {
                    machine.set_console_size(terminal::size());
                }
                // A command's standard input is not the console's.
                if self.purpose.is_none() && self.input.type_on(machine, &self.events)? {
                    return Ok(Outcome::Left);
                }
            } else if self.prepare_at.is_some_and(|at| at <= Instant::now()) {
                microvm.prepare();
                walls::prepare()?;
                self.prepare_at = None;
            }
            self.listen_for_events()?;
            self.expire_clients()?;
            if !self.awaits_jobs
                && let Some(event) = microvm.jobs_event()
            {
                self.events.add(event, Interest::IN, JOBS)?;
                self.awaits_jobs = true;
            }
            if let Some(signal) = self.take_signal() {
                return Ok(Outcome::Signal(signal));
            }
            self.signals.wait(&self.events, self.timeout(microvm), &mut ready)?;
            for event in &ready {
                if let Some(outcome) = self.handle(*event, microvm)? {
                    return Ok(outcome);
                }
            }
        }
    }

    /// Gives up clients that have had their time.
    fn expire_clients(&mut self) -> Result<()> {
        match &mut self.front {
            Some(front) if front.expires_at().is_some_and(|at| at <= Instant::now()) => {
                front.expire(Instant::now(), &self.events)
            }
            _ => Ok(()),
        }
    }

    /// Looks at a guest that runs.
    fn look(&mut self, machine: &mut Machine, may_have_halted: bool) -> Result<()> {
        if may_have_halted {
            machine.check_halted()?;
        }
        machine.flush_console();
        // Not every shell says so when it brings a running job to the foreground.
        if self.input.is_elsewhere {
            self.input.go_on(&self.events);
        }
        self.look_at = Instant::now() + LOOK;
        Ok(())
    }

    /// The outcome of the end of a guest that was `asked` to end, or was not.
    fn outcome(&self, exit: Exit, asked: Option<&'static str>) -> Outcome {
        match asked {
            _ if self.is_done() => Outcome::Done,
            Some(action) => Outcome::Obeyed(exit, action),
            None => Outcome::Ended(exit),
        }
    }

    /// The signal that ends the process, if one came. One that says that the process goes on is done with here.
    fn take_signal(&mut self) -> Option<u8> {
        let mut signal = self.signals.next()?;
        if i32::from(signal) == libc::SIGCONT {
            self.input.go_on(&self.events);
            signal = self.signals.next()?;
        }
        log::debug(format_args!("signal {signal} came"));
        Some(signal)
    }

    fn timeout(&self, microvm: &Microvm) -> Option<Duration> {
        let at = if self.watches.is_some() { Some(self.look_at) } else { self.prepare_at };
        let expires_at = self.front.as_ref().and_then(|front| front.expires_at());
        let at = at.into_iter().chain(expires_at).chain(microvm.watchdog_ends_at()).min();
        // A millisecond more than the rest: epoll rounds down.
        at.map(|at| at.saturating_duration_since(Instant::now()) + Duration::from_millis(1))
    }

    fn handle(&mut self, event: Ready, microvm: &mut Microvm) -> Result<Option<Outcome>> {
        match event.token {
            STDIN => self.input.is_ready = true,
            MACHINE => {
                if microvm.attend()
                    && let Some(purpose) = &self.purpose
                {
                    purpose.call();
                }
            }
            HAPPENED => {
                // Another look may have taken the count away.
                let _ = history::wake()?.read();
                self.tell()?;
            }
            FEED => self.tell()?,
            PURPOSE => return Ok(Some(Outcome::Done)),
            JOBS => {
                for job in microvm.finish_jobs() {
                    if let Some(front) = &mut self.front {
                        front.job_ended(job, &self.events, microvm)?;
                    }
                }
            }
            FRONT.. => self.serve(event, microvm)?,
            // The guest's end is looked at before every wait.
            _ => {}
        }
        Ok(None)
    }

    fn serve(&mut self, event: Ready, microvm: &mut Microvm) -> Result<()> {
        let Some(front) = &mut self.front else { return Ok(()) };
        if front.handle(event, &self.events, microvm)? && self.prepare_at.is_some() {
            // The first answer is out; its client needs a moment for the next request.
            self.prepare_at = Some(Instant::now());
        }
        Ok(())
    }

    /// Watches the machine after so many resets. The descriptors of one before it left the set as they were closed.
    fn watch(&mut self, machine: &Machine, resets: u64) -> Result<()> {
        self.events.add(machine.exit_fd(), Interest::IN, EXIT)?;
        self.events.add(machine.wake_fd(), Interest::IN, MACHINE)?;
        self.look_at = Instant::now() + LOOK;
        let is_first = self.watches.is_none();
        // A command's terminal is not the console's.
        if machine.has_sized_console() && self.purpose.is_none() {
            if is_first {
                self.signals.tell_of_sizes();
            }
            machine.set_console_size(terminal::size());
        }
        if self.watches.replace(resets).is_some() {
            return Ok(());
        }
        self.signals.share()?;
        self.signals.tell_of_going_on();
        if self.purpose.is_none() {
            self.input.enter(&self.events);
        }
        Ok(())
    }
}
