//! The running half of a disk: one queue, its requests in flight, and the engine that does them.

use std::io::{ErrorKind, Result as IoResult};
use std::sync::{Arc, Once, PoisonError};
use std::time::{Duration, Instant};

use vm_memory::GuestAddressSpace;

use super::bounce::Bounce;
use super::flushes::{Flushing, Turn};
use super::request::{Code, Disk, Request, RequestKind, Scratch};
use super::ring::Ring;
use crate::error::{Context, Error, Result};
use crate::history::{self, Event};
use crate::log;
use crate::memory::{Regions, lost};
use crate::poll::{self, Interest, Timer};
use crate::uring::Uring;
use crate::virtio::{Queue, Registrar, Share, Worker};

const KICK: u32 = 0;
const TIMER: u32 = 1;

/// So many requests of a queue are with the kernel at a time, and have their places from the start: what
/// a guest has waiting beyond these costs the host nothing. A disk that takes 100 us for each does
/// 640,000 a second so, which is more than one thread can ask for.
const IN_FLIGHT_MAX: u16 = 64;

/// So many bytes at a time, or one request: a pause waits for what is in flight, and a guest that read
/// terabytes into the same few pages would keep its host waiting.
const BYTES_IN_FLIGHT_MAX: u64 = 64 << 20;

/// So many bytes of the disk are read, written or made zeros in a turn, or one request's: where requests
/// are done at once, a ring full of the largest would keep the loop from its inbox for minutes.
const BYTES_PER_TURN: u64 = 64 << 20;

/// What ended the taking of requests.
#[derive(PartialEq)]
enum Taken {
    /// The queue gave none: it has none, or the turn's share is used up.
    All,
    /// As much is in flight as may be: a completion makes room.
    Full,
    /// The rate limit is reached: the timer goes on.
    Throttled,
    /// Another queue's flush is under way: its end is a kick.
    Waits,
}

/// What becomes of a request that was taken.
enum Way {
    /// It is done.
    On,
    /// It is answered by this.
    Answered(IoResult<()>),
    /// It waits for the flush that is under way, by this number.
    Wait(u64),
}

/// One queue of a running disk. The ring is dropped first: it waits for what names the rest.
pub struct Running {
    ring: Option<Ring>,
    wants_ring: bool,
    refused: Arc<Once>,
    timer: Option<Timer>,
    queue: Queue,
    disk: Arc<Disk>,
    /// Requests in flight, and places for those to come. They stay where they are: the kernel reads their
    /// vectors, of which each has at most two per descriptor that a driver may use.
    requests: Box<[Request]>,
    free: Vec<u16>,
    bytes_in_flight: u64,
    /// The flush that this queue has under way.
    flushing: Option<Flushing>,
    /// The request taken last, if it is a flush that waits for another one: its place, and the number by which it
    /// waits. The limits have let it through; nothing is taken before it goes on.
    waiting: Option<(u16, u64)>,
    scratch: Scratch,
    bounce: Bounce,
    /// The time, as far as it matters: looked at once for many requests.
    now: Instant,
}

impl Running {
    /// A queue of `disk`; `refused` is told once if the host does not let us have a ring.
    pub fn new(queue: Queue, disk: Arc<Disk>, wants_ring: bool, refused: Arc<Once>) -> Self {
        let scratch = Scratch::new(&disk.memory);
        Self {
            ring: None,
            wants_ring,
            refused,
            timer: None,
            queue,
            // One is done at a time.
            requests: [Request::new(&disk.memory)].into(),
            free: vec![0],
            bytes_in_flight: 0,
            flushing: None,
            waiting: None,
            disk,
            scratch,
            bounce: Bounce::default(),
            now: Instant::now(),
        }
    }

    fn open_ring(&mut self) {
        // Clusters that one worker gives back may not be where another's operations are in flight.
        let ring = match self.disk.image.raw().is_some() || self.disk.workers == 1 {
            true => Ring::new(IN_FLIGHT_MAX),
            false => Err(Error::config("a qcow2 image with several queues is used by one request at a time")),
        };
        match ring {
            Ok(ring) => {
                self.ring = Some(ring);
                self.requests = (0..IN_FLIGHT_MAX).map(|_| Request::new(&self.disk.memory)).collect();
                self.free = (0..IN_FLIGHT_MAX).rev().collect();
            }
            Err(error) => self.refused.call_once(|| {
                let id = &self.disk.id;
                log::line(format_args!("disk `{id}`: {error}: its `io_engine` is Sync instead of Async"))
            }),
        }
    }

    /// Does everything that can be done now.
    fn turn(&mut self) -> Result<()> {
        let disk = self.disk.clone();
        let memory = disk.memory.memory();
        if !self.queue.begin_turn(&memory)? {
            return Ok(());
        }
        disk.metrics.queue_event_count.add(1);
        let (mut share, mut bytes) = (Share::new(self.queue.size()), 0);
        loop {
            if self.complete(&memory)? {
                // Before the kernel does what is taken next: the driver waits for this.
                self.notify(&memory)?;
            }
            let taken = self.take(&memory, &mut share, &mut bytes)?;
            self.notify(&memory)?;
            if taken != Taken::All || !self.queue.look_again(&memory, &share)? {
                return Ok(());
            }
        }
    }

    /// Starts the requests that there are, or does them at once; `bytes` are those of this turn so far.
    fn take(&mut self, memory: &Regions, share: &mut Share, bytes: &mut u64) -> Result<Taken> {
        self.now = Instant::now();
        loop {
            let (index, asked) = match self.waiting.take() {
                Some((index, number)) => (index, Some(number)),
                None => match self.next(memory, share, *bytes)? {
                    Ok(index) => (index, None),
                    Err(taken) => return Ok(taken),
                },
            };
            let way = self.way(index, asked);
            if let Way::Wait(number) = way {
                self.waiting = Some((index, number));
                return Ok(Taken::Waits);
            }
            let request = &self.requests[usize::from(index)];
            self.bytes_in_flight += request.length;
            *bytes += request.extent();
            match way {
                Way::Answered(result) => self.end(memory, index, result)?,
                _ => self.go_on(memory, index)?,
            }
        }
    }

    /// Reads the next request that is one, and has the limits let it through: its place, or why there is none.
    /// `bytes` are those of this turn so far.
    fn next(
        &mut self,
        memory: &Regions,
        share: &mut Share,
        bytes: u64,
    ) -> Result<std::result::Result<u16, Taken>> {
        loop {
            let Some(index) = self.free.pop() else { return Ok(Err(Taken::Full)) };
            if bytes >= BYTES_PER_TURN {
                self.free.push(index);
                share.use_up();
                return Ok(Err(Taken::All));
            }
            let Some(chain) = self.queue.pop(memory, share)? else {
                self.free.push(index);
                return Ok(Err(Taken::All));
            };
            let request = &mut self.requests[usize::from(index)];
            request.begun = self.now;
            if let Err(code) = request.take(chain, &mut self.scratch, &self.disk)? {
                self.disk.metrics.invalid_reqs_count.add(1);
                self.answer(memory, index, code)?;
                continue;
            }
            let length = request.length;
            if self.bytes_in_flight > 0 && self.bytes_in_flight + length > BYTES_IN_FLIGHT_MAX {
                self.queue.undo_pop();
                self.free.push(index);
                return Ok(Err(Taken::Full));
            }
            if let Err(wait) = self.allow(length) {
                self.queue.undo_pop();
                self.free.push(index);
                self.throttle(wait)?;
                return Ok(Err(Taken::Throttled));
            }
            return Ok(Ok(index));
        }
    }

    /// Whether a request is to be done now: a flush has its turn among those of all queues. `asked`: the number
    /// by which it has waited for that.
    fn way(&mut self, index: u16, asked: Option<u64>) -> Way {
        if self.requests[usize::from(index)].kind != RequestKind::Flush {
            return Way::On;
        }
        match self.disk.image.flushes().enter(asked, self.queue.waker()) {
            Turn::Begin(flushing) => {
                self.flushing = Some(flushing);
                Way::On
            }
            Turn::Done => Way::Answered(Ok(())),
            Turn::Failed => Way::Answered(Err(std::io::Error::other("an earlier flush failed"))),
            Turn::Wait(number) => Way::Wait(number),
        }
    }

    /// Gives the flush that waits back to the queue: whoever has the queue next reads it again.
    fn give_back(&mut self) {
        let Some((index, _)) = self.waiting.take() else { return };
        let length = self.requests[usize::from(index)].length;
        if let Some(limiter) = &self.disk.limiter {
            limiter.lock().unwrap_or_else(PoisonError::into_inner).refund(length);
        }
        self.queue.undo_pop();
        self.free.push(index);
    }

    /// Whether the rate limit lets `bytes` more through now; else after so long.
    fn allow(&self, bytes: u64) -> Result<(), Duration> {
        match &self.disk.limiter {
            Some(limiter) => limiter.lock().unwrap_or_else(PoisonError::into_inner).take(bytes),
            None => Ok(()),
        }
    }

    fn throttle(&mut self, wait: Duration) -> Result<()> {
        self.disk.metrics.rate_limiter_throttled_events.add(1);
        // A timer for no time at all would be none.
        let wait = wait.max(Duration::from_micros(1));
        let timer = self.timer.as_mut().expect("where there are limits there is a timer");
        timer.reset(wait, None).context("set a timer")
    }

    /// Starts the next step of a request, or does all that is left.
    fn go_on(&mut self, memory: &Regions, index: u16) -> Result<()> {
        let request = &mut self.requests[usize::from(index)];
        if let Some(ring) = &mut self.ring
            && ring.push(request, index, &self.disk.image, self.disk.durable).context("use io_uring")?
        {
            return Ok(());
        }
        if matches!(request.kind, RequestKind::Discard | RequestKind::Zero) && self.disk.image.raw().is_none()
        {
            // They are where their clusters were.
            self.drain(memory)?;
        }
        let request = &mut self.requests[usize::from(index)];
        let result = request.perform(&self.disk, &mut self.bounce);
        self.now = Instant::now();
        self.end(memory, index, result)
    }

    /// Takes what is complete, if anything is.
    fn complete(&mut self, memory: &Regions) -> Result<bool> {
        self.now = Instant::now();
        let mut anything = false;
        while let Some((index, result)) = self.ring.as_mut().and_then(Ring::next) {
            anything = true;
            self.step(memory, index, result)?;
        }
        Ok(anything)
    }

    fn notify(&mut self, memory: &Regions) -> Result<()> {
        match &mut self.ring {
            Some(ring) => self.queue.notify_through(memory, ring.uring()),
            None => self.queue.notify(memory),
        }
    }

    /// A step of a request is complete.
    fn step(&mut self, memory: &Regions, index: u16, result: IoResult<u32>) -> Result<()> {
        let request = &mut self.requests[usize::from(index)];
        let done = match (result, request.kind) {
            (Ok(0), RequestKind::Read | RequestKind::Write) if !request.data.is_empty() => {
                // The end of the file; an image may mean zeros by that.
                request.perform(&self.disk, &mut self.bounce).map(|()| true)
            }
            (Ok(count), RequestKind::Read | RequestKind::Write) => {
                if request.kind == RequestKind::Read {
                    request.data.mark_dirty(count as usize);
                }
                request.data.advance(count as usize);
                request.offset += u64::from(count);
                Ok(request.data.is_empty())
            }
            (Ok(_), RequestKind::Discard | RequestKind::Zero) => {
                request.ranges.pop();
                Ok(request.ranges.is_empty())
            }
            (Ok(_), _) => Ok(true),
            (Err(error), _) => match error.kind() {
                ErrorKind::Interrupted | ErrorKind::WouldBlock => Ok(false),
                // A file system without: we have another way.
                ErrorKind::Unsupported if request.kind == RequestKind::Zero => {
                    request.perform(&self.disk, &mut self.bounce).map(|()| true)
                }
                _ => Err(error),
            },
        };
        match done {
            Ok(false) => self.go_on(memory, index),
            Ok(true) => self.end(memory, index, Ok(())),
            Err(error) => self.end(memory, index, Err(error)),
        }
    }

    fn end(&mut self, memory: &Regions, index: u16, result: IoResult<()>) -> Result<()> {
        let request = &self.requests[usize::from(index)];
        self.bytes_in_flight -= request.length;
        let flushing = if request.kind == RequestKind::Flush { self.flushing.take() } else { None };
        let is_first_loss = flushing.is_some_and(|flushing| flushing.end(result.is_ok()));
        let code = match result {
            Ok(()) => {
                self.count(request);
                Code::Ok
            }
            Err(error) => {
                lost::look_at(&error);
                self.disk.metrics.execute_fails.add(1);
                let device = format!("disk `{}`", self.disk.id);
                let reason = match request.kind {
                    RequestKind::Flush => format!("flush: {error}"),
                    kind => format!("{} at byte {}: {error}", kind.name(), request.offset),
                };
                if is_first_loss {
                    log::error(format_args!(
                        "{device}: {reason}: data that the guest wrote may be lost, so that its flushes fail from \
                         now on, until PATCH /drives/{} names an image",
                        self.disk.id
                    ));
                } else {
                    log::guest_line(format_args!("{device}: {reason}"));
                }
                history::tell(|| Event::DeviceError { device, reason, needs_reset: false });
                Code::IoError
            }
        };
        self.answer(memory, index, code)
    }

    fn count(&self, request: &Request) {
        let metrics = &self.disk.metrics;
        let took = || self.now.saturating_duration_since(request.begun);
        match request.kind {
            RequestKind::Read => {
                metrics.read_count.add(1);
                metrics.read_bytes.add(request.length);
                metrics.read_agg.add(took());
            }
            RequestKind::Write => {
                metrics.write_count.add(1);
                metrics.write_bytes.add(request.length);
                metrics.write_agg.add(took());
            }
            RequestKind::Flush => metrics.flush_count.add(1),
            RequestKind::Discard => metrics.discard_count.add(1),
            RequestKind::Zero => metrics.write_zeroes_count.add(1),
            RequestKind::Id => {}
        }
    }

    fn answer(&mut self, memory: &Regions, index: u16, code: Code) -> Result<()> {
        let request = &self.requests[usize::from(index)];
        let length = request.answer(code);
        self.free.push(index);
        self.queue.push(memory, request.head, length)
    }

    /// Waits for what is in flight.
    fn drain(&mut self, memory: &Regions) -> Result<()> {
        while let Some(ring) = &mut self.ring
            && ring.uring().in_flight() > 0
        {
            ring.uring().wait().context("use io_uring")?;
            self.complete(memory)?;
        }
        Ok(())
    }

    /// Waits for what is in flight, and tells the driver.
    fn finish(&mut self) -> Result<()> {
        let disk = self.disk.clone();
        let memory = disk.memory.memory();
        self.give_back();
        self.drain(&memory)?;
        if self.queue.is_ready() {
            self.notify(&memory)?;
        }
        match &mut self.ring {
            Some(ring) => ring.uring().submit().context("use io_uring"),
            None => Ok(()),
        }
    }
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        if self.wants_ring && self.queue.is_ready() {
            self.open_ring();
        }
        if self.disk.limiter.is_some() {
            let timer = self.timer.insert(poll::timer("limit of a disk")?);
            registrar.add(timer, Interest::IN | Interest::EDGE_TRIGGERED, TIMER)?;
        }
        match &mut self.ring {
            Some(ring) => registrar.ring(ring.uring(), &self.queue),
            None => registrar.kick(&self.queue, KICK),
        }
    }

    fn handle(&mut self, _token: u32) -> Result<()> {
        self.turn()
    }

    fn ring(&mut self) -> Option<&mut Uring> {
        self.ring.as_mut().map(Ring::uring)
    }

    fn stop(mut self: Box<Self>) -> Vec<Queue> {
        let disk = self.disk.clone();
        let flush = |()| disk.image.flush(false).context("write the image's tables");
        if let Err(error) = self.finish().and_then(flush) {
            log::error(format_args!("disk `{}`: stop it: {error}", self.disk.id));
        }
        let Self { ring, queue, .. } = *self;
        drop(ring);
        vec![queue]
    }
}
