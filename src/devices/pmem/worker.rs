//! The running half of persistent memory: its queue, by which the driver asks that what the guest wrote be on stable
//! storage. All that is asked for while the host is at it is one flush together, the next one: the host may take seconds
//! for each.

use std::io::{Error as IoError, ErrorKind, Result as IoResult};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use vm_memory::GuestAddressSpace;

use super::device::Shared;
use crate::devices::limit::{self, Limit};
use crate::error::{Context, Result};
use crate::history::{self, Event};
use crate::log;
use crate::memory::{Memory, Regions};
use crate::poll::{Interest, Timer};
use crate::uring::{Operation, Uring};
use crate::virtio::buffers::Buffers;
use crate::virtio::{Queue, Registrar, Share, Worker};

const KICK: u32 = 0;
const TIMER: u32 = 1;

/// The type of a request to flush (virtio 1.2, 5.19.6), the only one.
const FLUSH: u32 = 0;
/// The answers to a request (5.19.6): all that was written before it is on stable storage, or not.
const DONE: i32 = 0;
const FAILED: i32 = -1;
/// The size of an answer, in bytes.
const ANSWER: usize = 4;

/// A request, and where its answer goes.
struct Request {
    head: u16,
    answer: Buffers,
}

impl Request {
    /// Answers it, and says how many bytes that are: none where there is no room for an answer.
    fn answer(&self, code: i32) -> u32 {
        if self.answer.len() < ANSWER {
            return 0;
        }
        self.answer.copy_from(0, &code.to_le_bytes());
        ANSWER as u32
    }
}

/// The queue of a running device. The ring is dropped first: it waits for what names the file.
pub struct Running {
    /// Where flushes go; None: they are done here, and the loop waits for them.
    ring: Option<Uring>,
    queue: Queue,
    memory: Memory,
    shared: Arc<Shared>,
    limit: Limit,
    timer: Option<Timer>,
    /// The words of a request, before it is known what it is.
    asked: Buffers,
    /// Flushes that were taken off the queue, the first `taken` of these places: none, or all that are one flush.
    requests: Vec<Request>,
    taken: usize,
    /// The host is at it.
    is_flushing: bool,
}

impl Running {
    /// The queue of a device.
    pub fn new(queue: Queue, memory: Memory, shared: Arc<Shared>, limit: Limit) -> Result<Self> {
        let (asked, timer) = (Buffers::new(memory.clone()), limit.timer()?);
        let (ring, requests) = (None, Vec::new());
        Ok(Self { ring, queue, memory, shared, limit, timer, asked, requests, taken: 0, is_flushing: false })
    }

    /// Does everything that can be done now.
    fn turn(&mut self) -> Result<()> {
        let memory = self.memory.clone();
        let memory = memory.memory();
        if !self.queue.begin_turn(&memory)? {
            return Ok(());
        }
        self.shared.metrics.queue_event_count.add(1);
        let mut share = Share::new(self.queue.size());
        loop {
            self.complete(&memory)?;
            if self.is_flushing {
                // Its end is a turn, too.
                return self.queue.notify(&memory);
            }
            let is_throttled = self.take(&memory, &mut share)?;
            self.flush(&memory)?;
            self.queue.notify(&memory)?;
            if is_throttled || self.is_flushing || !self.queue.look_again(&memory, &share)? {
                return Ok(());
            }
        }
    }

    /// Takes all flushes off the queue, and answers what is none. True: the rate limit is reached, the timer goes on.
    fn take(&mut self, memory: &Regions, share: &mut Share) -> Result<bool> {
        let Self { queue, shared, requests, taken, asked, limit, timer, .. } = self;
        while let Some(chain) = queue.pop(memory, share)? {
            if *taken == requests.len() {
                requests.push(Request { head: 0, answer: Buffers::new(self.memory.clone()) });
            }
            let request = &mut requests[*taken];
            request.head = chain.head();
            Buffers::split(chain, asked, &mut request.answer)?;
            let mut kind = [0; 4];
            let is_whole = asked.read_front(&mut kind) && request.answer.len() >= ANSWER;
            if !is_whole || u32::from_le_bytes(kind) != FLUSH {
                shared.metrics.invalid_reqs_count.add(1);
                queue.push(memory, request.head, request.answer(FAILED))?;
                continue;
            }
            // One flush does all requests that are taken together, and counts once.
            if *taken == 0
                && let Err(wait) = limit.take(shared.view.length() as usize)
            {
                shared.metrics.rate_limiter_throttled_events.add(1);
                queue.undo_pop();
                limit::set(timer, Some(wait))?;
                return Ok(true);
            }
            *taken += 1;
        }
        Ok(false)
    }

    /// Has what was taken done, or begins to.
    fn flush(&mut self, memory: &Regions) -> Result<()> {
        if self.taken == 0 {
            return Ok(());
        }
        let view = &self.shared.view;
        let done = match &mut self.ring {
            // The guest has written nothing.
            _ if view.is_read_only() => Ok(()),
            _ if self.shared.has_failed.load(SeqCst) => Err(IoError::other("an earlier flush failed")),
            Some(ring) => {
                begin(ring, &self.shared).context("use io_uring")?;
                self.is_flushing = true;
                return Ok(());
            }
            None => view.file().sync_data(),
        };
        self.end(memory, done)
    }

    /// Takes what is complete.
    fn complete(&mut self, memory: &Regions) -> Result<()> {
        while let Some(ring) = &mut self.ring
            && let Some(completion) = ring.next()
        {
            match completion.result {
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {
                    begin(ring, &self.shared).context("use io_uring")?;
                }
                result => {
                    self.is_flushing = false;
                    self.end(memory, result.map(drop))?;
                }
            }
        }
        Ok(())
    }

    /// Answers all that was taken.
    fn end(&mut self, memory: &Regions, result: IoResult<()>) -> Result<()> {
        let Self { queue, shared, requests, taken, .. } = self;
        let count = std::mem::take(taken);
        let (counter, code) = match &result {
            Ok(()) => (&shared.metrics.flush_count, DONE),
            Err(_) => (&shared.metrics.flush_fails, FAILED),
        };
        counter.add(count as u64);
        if let Err(error) = result
            && !shared.has_failed.swap(true, SeqCst)
        {
            let reason = format!("flush: {error}");
            log::error(format_args!(
                "{}: {reason}: data that the guest wrote may be lost, so that its flushes fail from now on, until the \
                 guest is started again",
                shared.name
            ));
            let device = shared.name.clone();
            history::tell(|| Event::DeviceError { device, reason, needs_reset: false });
        }
        requests[..count]
            .iter()
            .try_for_each(|request| queue.push(memory, request.head, request.answer(code)))
    }

    /// Waits for what the host is at, and tells the driver. What was not begun was not taken.
    fn finish(&mut self) -> Result<()> {
        let memory = self.memory.clone();
        let memory = memory.memory();
        while let Some(ring) = &mut self.ring
            && ring.in_flight() > 0
        {
            ring.wait().context("use io_uring")?;
            self.complete(&memory)?;
        }
        if self.queue.is_ready() {
            self.queue.notify(&memory)?;
        }
        match &mut self.ring {
            Some(ring) => ring.submit().context("use io_uring"),
            None => Ok(()),
        }
    }
}

/// Has the kernel write what was written to the view to stable storage. The file is open for as long as the worker has
/// the device's shared half, which it drops after its ring, and the ring waits for what is in flight.
fn begin(ring: &mut Uring, shared: &Shared) -> IoResult<()> {
    ring.push(Operation::Sync { file: shared.view.file().as_raw_fd() }, 0)
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        if let Some(timer) = &self.timer {
            registrar.add(timer, Interest::IN | Interest::EDGE_TRIGGERED, TIMER)?;
        }
        if self.queue.is_ready() && !self.shared.view.is_read_only() {
            match Uring::new(1) {
                Ok(ring) => self.ring = Some(ring),
                Err(error) => self.shared.refused.call_once(|| {
                    let name = &self.shared.name;
                    log::line(format_args!("{name}: {error}: other devices wait while it is flushed"));
                }),
            }
        }
        match &mut self.ring {
            Some(ring) => registrar.ring(ring, &self.queue),
            None => registrar.kick(&self.queue, KICK),
        }
    }

    fn handle(&mut self, token: u32) -> Result<()> {
        if token == TIMER {
            self.shared.metrics.rate_limiter_event_count.add(1);
        }
        self.turn()
    }

    fn ring(&mut self) -> Option<&mut Uring> {
        self.ring.as_mut()
    }

    fn stop(mut self: Box<Self>) -> Vec<Queue> {
        if let Err(error) = self.finish() {
            log::error(format_args!("{}: stop it: {error}", self.shared.name));
        }
        let Self { ring, queue, .. } = *self;
        drop(ring);
        vec![queue]
    }
}
