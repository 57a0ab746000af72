//! The io threads: event loops on which the devices' workers live. The owner of the machine starts them: a
//! thread inherits the CPUs, the filter of system calls and whatever else binds the thread that starts it, and
//! those of a vCPU's thread are not those of an io thread.

mod inbox;
mod registrar;

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::Worker;
use super::transport::Transport;
use crate::errands::{Answered, Errands};
use crate::error::{Context, Error, Result};
use crate::log;
use crate::poll::{self, EventFd, Events, Interest, Ready};
use crate::uring::Uring;
use crate::walls;

use inbox::{Inbox, Wake};
pub use registrar::{Desk, Registrar, Switch, Watched};

/// The locks and atomics that the inbox is made of. `tests/interleavings` compiles the file of the inbox once more, with
/// those of `loom` in their place.
mod locks {
    pub(super) use std::sync::atomic::{AtomicBool, Ordering};
    pub(super) use std::sync::{Mutex, MutexGuard, PoisonError};
}

/// The token by which a worker is told that its [`Worker::ring`] has completions.
pub const RING: u32 = u32::MAX;

pub(super) type Shared = Arc<Mutex<Transport>>;

/// What a loop is asked to do.
pub(super) enum Job {
    /// Starts a device: its first loop builds the workers and hands them round.
    Start(Shared),
    /// Takes one worker of a device.
    Add(Box<dyn Worker>, Shared),
    /// Ends the device's workers here and gives their queues back to it.
    Stop(Shared),
    /// Tells the worker in this slot, by this token, that an errand of its is answered.
    Tell(usize, u32, Answered),
    /// Ends all workers, and the thread.
    End,
}

impl Wake for EventFd {
    fn wake(&self) {
        // A counter that is full wakes as well.
        let _ = self.write(1);
    }

    fn hush(&self) {
        // Nothing written: somebody was faster.
        let _ = self.read();
    }
}

/// A loop's inbox and its thread.
pub struct Loop {
    name: String,
    /// Its owner turns it ([`ByHand`]): it never has a thread.
    by_hand: bool,
    /// Where its workers ask `main`.
    errands: Arc<Errands>,
    inbox: Inbox<Job, EventFd>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Loop {
    /// A loop without a thread yet, which takes no jobs; `name` is what its thread will be called. Its workers
    /// ask `main` by `errands`.
    pub fn new(name: impl Into<String>, errands: &Arc<Errands>) -> Result<Arc<Self>> {
        Self::build(name.into(), errands.clone(), false)
    }

    fn build(name: String, errands: Arc<Errands>, by_hand: bool) -> Result<Arc<Self>> {
        let inbox = Inbox::new(poll::event("jobs of a loop")?);
        Ok(Arc::new(Self { name, by_hand, errands, inbox, thread: Mutex::default() }))
    }

    fn thread(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the thread and all workers.
    pub fn end(self: &Arc<Self>) {
        let thread = self.thread().take();
        if let Some(thread) = thread {
            self.inbox.post_last(Job::End);
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }

    /// Starts the loop's thread. No effect when it has one.
    pub fn start(self: &Arc<Self>) -> Result<()> {
        let mut own = self.thread();
        if own.is_none() {
            let this = self.clone();
            let thread = std::thread::Builder::new().name(self.name.clone()).spawn(move || {
                poll::leave_signals_to_others();
                walls::enclose(walls::Kind::Io);
                this.run();
            });
            *own = Some(thread.with_context(|| format!("start the thread `{}`", self.name))?);
            self.inbox.attend();
        }
        Ok(())
    }

    /// Whether the loop turns without its owner, now or once it is started.
    pub(super) fn has_thread(&self) -> bool {
        !self.by_hand
    }

    /// Has something done, soon; false: nobody is there to do it. May be called with a transport locked.
    pub(super) fn post(self: &Arc<Self>, job: Job) -> bool {
        self.inbox.post(job)
    }

    fn run(self: &Arc<Self>) {
        if let Err(error) = Seats::new(self).and_then(|mut running| running.run(self)) {
            log::error(format_args!("the io thread ended: {error}: devices will not answer"));
        }
        self.conclude();
    }

    /// Nobody takes jobs any more.
    fn conclude(&self) {
        // Whoever waits for a device to stop must not wait for ever.
        for job in self.inbox.close() {
            if let Job::Stop(transport) = job {
                transport.lock().unwrap_or_else(PoisonError::into_inner).returned(Vec::new());
            }
        }
    }
}

/// A loop without a thread: its owner turns it, and in between nothing happens. For tests that decide
/// what happens when.
pub struct ByHand {
    event_loop: Arc<Loop>,
    running: Seats,
}

impl ByHand {
    /// A loop that nobody has turned yet.
    pub fn new() -> Result<Self> {
        let errands = Errands::new(Arc::new(poll::event("errands")?));
        let event_loop = Loop::build(String::new(), errands, true)?;
        event_loop.inbox.attend();
        let running = Seats::new(&event_loop)?;
        Ok(Self { event_loop, running })
    }

    /// For the transports whose devices live on it.
    pub fn event_loop(&self) -> Arc<Loop> {
        self.event_loop.clone()
    }

    /// The errands that its workers ask for. Nobody does them but who calls [`Errands::turn`].
    pub fn errands(&self) -> &Errands {
        &self.event_loop.errands
    }

    /// Does what there is to do, once; false: there was nothing.
    pub fn turn(&mut self) -> Result<bool> {
        let mut ready = Vec::new();
        self.running.look(Some(Duration::ZERO), &mut ready)?;
        let anything = !ready.is_empty();
        self.running.handle_all(&self.event_loop, &mut ready);
        Ok(anything)
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        self.running.end();
        self.event_loop.conclude();
    }
}

/// A worker, whose it is, and what it waits for.
struct Seat {
    worker: Box<dyn Worker>,
    transport: Shared,
    waits: Vec<RawFd>,
    /// The device failed and is about to be stopped: nothing is handled any more.
    failed: bool,
}

impl Seat {
    fn ring(&mut self) -> Option<&mut Uring> {
        self.worker.ring()
    }

    /// Hands over what its ring has queued; true: something is complete that its event will not tell of.
    fn hand_over(&mut self) -> bool {
        let Some(ring) = self.worker.ring() else { return false };
        match ring.submit() {
            Ok(()) => ring.rearm(),
            Err(error) => {
                self.fail(&refused(error));
                false
            }
        }
    }

    /// Tells whose turn it is, and for what.
    fn trace(&self, token: u32) {
        let transport = self.transport.lock().unwrap_or_else(PoisonError::into_inner);
        match token {
            RING => log::guest_trace(format_args!("{}: its io_uring is ready", transport.name())),
            token => log::guest_trace(format_args!("{}: event {token} is ready", transport.name())),
        }
    }

    fn fail(&mut self, error: &Error) {
        self.failed = true;
        self.transport.lock().unwrap_or_else(PoisonError::into_inner).fail(error);
    }
}

fn refused(error: std::io::Error) -> Error {
    Error::host(format!("use io_uring: {error}"))
}

/// What a slot's events carry.
fn token(slot: usize, token: u32) -> u64 {
    (slot as u64 + 1) << 32 | u64::from(token)
}

/// Whose event it is.
fn slot(token: u64) -> usize {
    (token >> 32) as usize - 1
}

/// The workers of a loop, as the thread that runs it has them.
struct Seats {
    events: Arc<Events>,
    /// A worker's seat is part of its events' tokens; a free one is used again.
    seats: Vec<Option<Seat>>,
    /// The seat whose ring had something last; none: another event came.
    last: Option<usize>,
}

const WAKE: u64 = 0;

impl Seats {
    fn new(this: &Loop) -> Result<Self> {
        let events = Arc::new(Events::new()?);
        events.add(&this.inbox.wake, Interest::IN, WAKE)?;
        Ok(Self { events, seats: Vec::new(), last: None })
    }

    fn run(&mut self, this: &Arc<Loop>) -> Result<()> {
        let mut ready = Vec::new();
        loop {
            self.wait(&mut ready)?;
            if self.handle_all(this, &mut ready) {
                return Ok(());
            }
        }
    }

    /// The seats with rings.
    fn rings(&mut self) -> impl Iterator<Item = (usize, &mut Seat)> {
        let seats = self.seats.iter_mut().enumerate();
        seats.filter_map(|(slot, seat)| {
            let seat = seat.as_mut().filter(|seat| !seat.failed)?;
            seat.ring().is_some().then_some((slot, seat))
        })
    }

    /// Waits for something to do. Where one ring alone is busy, in that: what is queued is handed over by
    /// the same system call.
    fn wait(&mut self, ready: &mut Vec<Ready>) -> Result<()> {
        match self.ring_to_wait_in() {
            Some(slot) if !self.wait_in_ring(slot) => Ok(()),
            Some(_) => {
                self.last = None;
                self.events.wait(Some(Duration::ZERO), ready)
            }
            None => self.look(None, ready),
        }
    }

    /// The only busy one; where none is, the one that had something last may soon have more. The events
    /// of the others tell of what comes to them.
    fn ring_to_wait_in(&mut self) -> Option<usize> {
        let last = self.last;
        let mut loud = self.rings().filter_map(|(slot, seat)| (!seat.ring()?.is_quiet()).then_some(slot));
        match (loud.next(), loud.next()) {
            (Some(slot), None) => Some(slot),
            (Some(_), Some(_)) => None,
            (None, _) => {
                drop(loud);
                last.filter(|last| self.rings().any(|(slot, _)| slot == *last))
            }
        }
    }

    /// Waits in a worker's ring and handles what it has; true: the loop's own events are ready, too.
    fn wait_in_ring(&mut self, slot: usize) -> bool {
        let events = self.events.as_raw_fd();
        let Some(seat) = self.seats.get_mut(slot).and_then(Option::as_mut) else { return true };
        let Some(ring) = seat.ring() else { return true };
        if let Err(error) = ring.wait_beside(events) {
            seat.fail(&refused(error));
            return true;
        }
        self.last = Some(slot);
        self.handle(slot, RING, Interest::IN);
        let seat = self.seats.get_mut(slot).and_then(Option::as_mut);
        seat.and_then(Seat::ring).is_none_or(|ring| ring.woke())
    }

    /// Hands over what all rings have queued, and waits for events; those of the rings are among them.
    fn look(&mut self, timeout: Option<Duration>, ready: &mut Vec<Ready>) -> Result<()> {
        let mut complete = false;
        for (_, seat) in self.rings() {
            complete |= seat.hand_over();
        }
        self.events.wait(if complete { Some(Duration::ZERO) } else { timeout }, ready)?;
        if complete {
            let rings = self.rings().filter_map(|(slot, seat)| Some((slot, seat.ring()?)));
            let rings = rings.filter_map(|(slot, ring)| ring.rearm().then_some(slot));
            // One whose event has told of it as well has one turn all the same.
            for token in rings.map(|slot| token(slot, RING)) {
                if ready.iter().all(|event| event.token != token) {
                    ready.push(Ready { token, events: Interest::IN });
                }
            }
        }
        self.last = ready.iter().find(|event| event.token as u32 == RING).map(|event| slot(event.token));
        Ok(())
    }

    /// Handles what is ready, and looks at the inbox after each event: who wants a device to stop waits for
    /// one worker's turn, not for those of all. True: that was the end. A worker that came into a seat
    /// meanwhile may be told of what was ready for the one before it: for nothing, which does no harm.
    fn handle_all(&mut self, this: &Arc<Loop>, ready: &mut Vec<Ready>) -> bool {
        for event in ready.drain(..) {
            if event.token != WAKE {
                self.handle(slot(event.token), event.token as u32, event.events);
            }
            if this.inbox.has_jobs() && self.do_jobs(this) {
                return true;
            }
        }
        false
    }

    /// Does what the loop is asked to do; true: that was the end.
    fn do_jobs(&mut self, this: &Arc<Loop>) -> bool {
        for job in this.inbox.take() {
            match job {
                Job::Start(transport) => start(&transport),
                Job::Add(worker, transport) => self.add(this, worker, transport),
                Job::Tell(slot, token, answered) if answered.is_wanted() => {
                    self.handle(slot, token, Interest::empty())
                }
                Job::Tell(..) => {}
                Job::Stop(transport) => self.stop(transport),
                Job::End => {
                    self.end();
                    return true;
                }
            }
        }
        false
    }

    /// What is in flight is finished: its buffers are about to be unmapped.
    fn end(&mut self) {
        self.seats.drain(..).flatten().for_each(|seat| drop(seat.worker.stop()));
    }

    /// Its worker may have gone since the event came.
    fn handle(&mut self, slot: usize, token: u32, ready: Interest) {
        let Some(seat) = self.seats.get_mut(slot).and_then(Option::as_mut) else { return };
        if seat.failed {
            return;
        }
        if log::wants(log::Level::Trace) {
            seat.trace(token);
        }
        if let Err(error) = seat.worker.handle_ready(token, ready) {
            seat.fail(&error);
        }
    }

    fn add(&mut self, this: &Arc<Loop>, mut worker: Box<dyn Worker>, transport: Shared) {
        let slot = self.seats.iter().position(Option::is_none).unwrap_or(self.seats.len());
        let mut waits = Vec::new();
        let desk = Desk::new(&self.events, this, slot);
        let registered = worker.register(&mut Registrar::new(desk, &mut waits));
        let failed = registered.is_err();
        if let Err(error) = registered {
            transport.lock().unwrap_or_else(PoisonError::into_inner).fail(&error);
        }
        let seat = Some(Seat { worker, transport, waits, failed });
        match slot == self.seats.len() {
            true => self.seats.push(seat),
            false => self.seats[slot] = seat,
        }
    }

    fn stop(&mut self, transport: Shared) {
        let mut queues = Vec::new();
        for slot in &mut self.seats {
            if let Some(seat) = slot.take_if(|seat| Arc::ptr_eq(&seat.transport, &transport)) {
                for fd in seat.waits {
                    // A descriptor that was closed has left the set by itself.
                    let _ = self.events.remove(&fd);
                }
                queues.extend(seat.worker.stop());
            }
        }
        let waiting = transport.lock().unwrap_or_else(PoisonError::into_inner).returned(queues);
        drop(transport);
        drop(waiting);
    }
}

fn start(transport: &Shared) {
    transport.lock().unwrap_or_else(PoisonError::into_inner).start();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Host;

    #[test]
    fn a_loop_that_has_done_its_jobs_is_not_woken_for_them() {
        const JOBS: usize = 20_000;
        let mut by_hand = ByHand::new().unwrap();
        let event_loop = by_hand.event_loop();
        let posting = event_loop.clone();
        let poster = std::thread::spawn(move || {
            let mut posted = 0;
            while posted < JOBS {
                let event_loop = posting.clone();
                let tell = move |answered| {
                    event_loop.post(Job::Tell(0, 0, answered));
                };
                // Refused while too many are under way.
                if let Ok(pending) = posting.errands.ask(|_| Err(Error::host("nothing")), tell) {
                    posting.errands.turn(&mut Host::default());
                    drop(pending);
                    posted += 1;
                }
            }
        });
        while !poster.is_finished() {
            by_hand.turn().unwrap();
            let is_sound = event_loop.inbox.look(|jobs, wake| !jobs.is_empty() || wake.read().is_err());
            assert!(is_sound, "it is woken, and has no job");
        }
        poster.join().unwrap();
    }
}
