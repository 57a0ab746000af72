//! The balloon's work on its queues. Pages go back to the host in ranges, each as long as pages lie together: a
//! request of Linux' driver has 256 pages.

use std::sync::Arc;
use std::time::Duration;

use vm_memory::GuestAddressSpace;

use super::device::{DONE, Metrics, PAGE, Shared};
use super::statistics::{SIZE_MAX, Statistics};
use crate::error::{Context, Error, Result};
use crate::log;
use crate::memory::{self, Memory, Range, Regions};
use crate::poll::{self, Interest, Timer};
use crate::virtio::buffers::Buffers;
use crate::virtio::{Chain, Interrupts, Io, Queue, Registrar, Share, Worker};

/// The number of pages that go back in one turn, and of page numbers that are looked at in one request: a guest can
/// have each page be a system call, which makes all of its CPUs forget the page. Pages that a longer request gives
/// beyond that stay where they are, as a device may decide.
const PAGES_PER_TURN: usize = 1024;
/// The number of bytes that go back in one turn of memory that a guest says is free, which the guest can name by the
/// GiB in a few descriptors. Linux names 128 MiB at a time.
const FREE_PER_TURN: u64 = 256 << 20;

/// The purpose of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The queue on which the driver gives pages.
    Inflate,
    /// The queue on which the driver takes pages back.
    Deflate,
    /// The queue on which the driver tells its statistics.
    Statistics,
    /// The queue on which the driver tells which pages are free when it is asked.
    Hinting,
    /// The queue on which the driver tells which pages are free of itself.
    Reporting,
}

/// The number of the timer's event; events of the queues have the queues' numbers.
const TIMER: u32 = u32::MAX - 1;

/// The running half of the balloon, which serves its queues.
pub struct Running {
    queues: Vec<(Work, Queue)>,
    /// The driver's buffer of statistics, which it gets back when it is to tell anew.
    held: Option<u16>,
    timer: Option<Timer>,
    /// The time between two requests for statistics.
    interval: Duration,
    shared: Shared,
    pages: Pages,
    interrupts: Arc<Interrupts>,
}

/// The part of the running half that gives pages back to the host.
struct Pages {
    memory: Memory,
    buffers: Buffers,
    /// The ranges of memory that one request gives.
    ranges: Vec<Range>,
    metrics: Arc<Metrics>,
}

/// The fate of a request's pages: how many bytes went back to the host, and how often the host did not take some.
#[derive(Default)]
struct Given {
    bytes: u64,
    fails: u64,
}

impl Running {
    /// A running half with the queues of `io`, which are for `work` in this order. Statistics are asked for every
    /// `interval_s` seconds; 0: never.
    pub fn new(
        io: Io,
        work: Vec<Work>,
        interval_s: u16,
        shared: Shared,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let Io { memory, queues, interrupts, .. } = io;
        let timer = (interval_s > 0).then(|| poll::timer("statistics of the balloon")).transpose()?;
        let interval = Duration::from_secs(interval_s.into());
        let timer = timer.map(|mut timer| set(&mut timer, interval).map(|()| timer));
        let buffers = Buffers::new(memory.clone());
        let pages = Pages { memory, buffers, ranges: Vec::new(), metrics };
        let queues = work.into_iter().zip(queues).collect();
        Ok(Self { queues, held: None, timer: timer.transpose()?, interval, shared, pages, interrupts })
    }

    /// Takes the statistics that the driver tells, and keeps the last buffer of them.
    fn take_statistics(&mut self, at: usize) -> Result<()> {
        let Self { queues, held, shared, pages, .. } = self;
        let (queue, memory) = (&mut queues[at].1, pages.memory.memory());
        pages.metrics.stats_updates_count.add(1);
        if !queue.begin_turn(&memory)? {
            return Ok(());
        }
        let mut share = Share::new(queue.size());
        loop {
            while let Some(chain) = queue.pop(&memory, &mut share)? {
                let mut bytes = [0; SIZE_MAX];
                let length = pages.read(chain, &mut bytes)?;
                let (told, unknown) = Statistics::parse(&bytes[..length]);
                pages.metrics.stats_update_fails.add(unknown);
                shared.lock().statistics = told;
                let head = chain.head();
                // One buffer is held at a time: a driver that gives another one has no use for that before.
                if let Some(before) = held.replace(head) {
                    queue.push(&memory, before, 0)?;
                }
            }
            if !queue.look_again(&memory, &share)? {
                return queue.notify(&memory);
            }
        }
    }

    /// Has the driver tell its statistics anew, by giving the buffer of the last ones back to it.
    fn ask_for_statistics(&mut self) -> Result<()> {
        let Self { queues, held, pages, timer, interval, .. } = self;
        timer.as_mut().map_or(Ok(()), |timer| set(timer, *interval))?;
        let queue = queues.iter_mut().find(|(work, _)| *work == Work::Statistics);
        match (queue, held.take()) {
            (Some((_, queue)), Some(head)) => {
                let memory = pages.memory.memory();
                queue.push(&memory, head, 0)?;
                queue.notify(&memory)
            }
            // The driver has given no buffer of statistics yet, and may never do so.
            _ => Ok(()),
        }
    }

    /// Takes the pages that a driver says are free, in a run that it was asked for, and how far the driver is with it.
    fn take_hints(&mut self, at: usize) -> Result<()> {
        let Self { queues, shared, pages, interrupts, .. } = self;
        let (memory, mut left) = (pages.memory.memory(), FREE_PER_TURN);
        queues[at].1.serve_within(&memory, |chain, share| {
            if chain.readable_length() > 0 {
                let mut command = [0; 4];
                if !chain.read_front(&mut command) {
                    return Err(Error::guest("the driver gave a command of free pages that is too short"));
                }
                let command = u32::from_le_bytes(command);
                let mut state = shared.lock();
                state.hinting.guest_cmd = Some(command);
                if command <= DONE && state.acknowledges && state.hinting.host_cmd > DONE {
                    state.hinting.host_cmd = DONE;
                    drop(state);
                    interrupts.configuration_changed();
                }
            }
            let hinting = shared.lock().hinting;
            // Pages of a run that is over may be in use again.
            if hinting.host_cmd > DONE && hinting.guest_cmd == Some(hinting.host_cmd) {
                let (count, given) = pages.give_back_pieces(&memory, chain, &mut left);
                pages.metrics.free_page_hint_count.add(count);
                pages.metrics.free_page_hint_freed.add(given.bytes);
                pages.metrics.free_page_hint_fails.add(given.fails);
                share.use_up_if(left == 0);
            }
            Ok(Some(0))
        })
    }

    fn handle_queue(&mut self, at: usize) -> Result<()> {
        let Self { queues, pages, .. } = self;
        let Some((work, queue)) = queues.get_mut(at) else { return Ok(()) };
        let memory = pages.memory.memory();
        match work {
            Work::Inflate => {
                pages.metrics.inflate_count.add(1);
                let mut left = PAGES_PER_TURN as u64 * PAGE;
                queue.serve_within(&memory, |chain, share| {
                    pages.give_back_numbers(&memory, chain, &mut left)?;
                    share.use_up_if(left == 0);
                    Ok(Some(0))
                })
            }
            Work::Deflate => {
                // There is nothing to do: a guest that takes a page back touches it, and has another one.
                pages.metrics.deflate_count.add(1);
                queue.serve(&memory, |_| Ok(Some(0)))
            }
            Work::Statistics => self.take_statistics(at),
            Work::Hinting => self.take_hints(at),
            Work::Reporting => {
                let mut left = FREE_PER_TURN;
                queue.serve_within(&memory, |chain, share| {
                    let (count, given) = pages.give_back_pieces(&memory, chain, &mut left);
                    pages.metrics.free_page_report_count.add(count);
                    pages.metrics.free_page_report_freed.add(given.bytes);
                    pages.metrics.free_page_report_fails.add(given.fails);
                    share.use_up_if(left == 0);
                    Ok(Some(0))
                })
            }
        }
    }
}

/// Has the timer go off once, after this time. The kernel goes on with one that repeats itself only when somebody has read
/// it (fs/timerfd.c), for which a worker would have to wait.
fn set(timer: &mut Timer, after: Duration) -> Result<()> {
    timer.reset(after, None).map_err(|error| Error::host(error.to_string())).context("set a timer")
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        if let Some(timer) = &self.timer {
            registrar.add(timer, Interest::IN | Interest::EDGE_TRIGGERED, TIMER)?;
        }
        self.queues.iter().zip(0..).try_for_each(|((_, queue), token)| registrar.kick(queue, token))
    }

    fn handle(&mut self, token: u32) -> Result<()> {
        match token {
            TIMER => self.ask_for_statistics(),
            queue => self.handle_queue(queue as usize),
        }
    }

    fn stop(self: Box<Self>) -> Vec<Queue> {
        let Self { queues, held, .. } = *self;
        let give = |(work, mut queue): (Work, Queue)| {
            // The buffer that is held was popped last, and will be popped again.
            if work == Work::Statistics && held.is_some() {
                queue.undo_pop();
            }
            queue
        };
        queues.into_iter().map(give).collect()
    }
}

impl Pages {
    /// Reads the first bytes that a driver has written, as far as there is room, and returns how many.
    fn read(&mut self, chain: Chain<'_>, bytes: &mut [u8]) -> Result<usize> {
        self.buffers.clear();
        self.buffers.add_readable(chain)?;
        self.buffers.copy_to(bytes);
        Ok(self.buffers.len().min(bytes.len()))
    }

    /// Gives back the pages whose numbers a request has, of which `left` bytes may be given back in this turn.
    fn give_back_numbers(&mut self, memory: &Regions, chain: Chain<'_>, left: &mut u64) -> Result<()> {
        let mut bytes = [0; 4 * PAGES_PER_TURN];
        let length = self.read(chain, &mut bytes)?;
        let (numbers, _) = bytes[..length].as_chunks();
        self.ranges.clear();
        let page = |number| Range { start: u64::from(u32::from_le_bytes(number)) * PAGE, size: PAGE };
        self.ranges.extend(numbers.iter().copied().map(page));
        self.give_back(memory, left);
        Ok(())
    }

    /// Gives back the pieces of memory that a request consists of, and returns how many there are and what became of
    /// them.
    fn give_back_pieces(&mut self, memory: &Regions, chain: Chain<'_>, left: &mut u64) -> (u64, Given) {
        self.ranges.clear();
        let pieces = chain.pieces().iter().filter(|piece| piece.is_writable);
        self.ranges.extend(pieces.map(|piece| Range { start: piece.address.0, size: piece.length.into() }));
        let count = self.ranges.len() as u64;
        (count, self.give_back(memory, left))
    }

    /// Gives back the ranges, which may be anything, as far as `left` goes.
    fn give_back(&mut self, memory: &Regions, left: &mut u64) -> Given {
        let mut given = Given::default();
        self.ranges.sort_unstable_by_key(|range| range.start);
        for mut range in merged(&self.ranges) {
            range.size = range.size.min(*left);
            *left -= range.size;
            match memory::give_back(memory, range) {
                Ok(bytes) => given.bytes += bytes,
                Err(error) => {
                    given.fails += 1;
                    log::guest_line(format_args!(
                        "the host does not take {range} of the guest back: {error}"
                    ));
                }
            }
        }
        given
    }
}

/// Sorted ranges, with those that touch or overlap made one.
fn merged(ranges: &[Range]) -> impl Iterator<Item = Range> {
    let mut rest = ranges.iter().copied().peekable();
    std::iter::from_fn(move || {
        let first = rest.next()?;
        let end_of = |range: Range| range.start.saturating_add(range.size);
        let mut end = end_of(first);
        while let Some(next) = rest.next_if(|next| next.start <= end) {
            end = end.max(end_of(next));
        }
        Some(Range { start: first.start, size: end - first.start })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_or_overlap_are_one() {
        let range = |start, size| Range { start, size };
        let ranges = [
            range(0, 4096),
            range(0, 4096),
            range(4096, 4096),
            range(12288, 8192),
            range(16384, 0),
            range(16384, 1),
            range(1 << 40, 5),
            range(u64::MAX - 1, 9),
            range(u64::MAX, 9),
        ];
        let expected = [range(0, 8192), range(12288, 8192), range(1 << 40, 5), range(u64::MAX - 1, 1)];
        assert_eq!(merged(&ranges).collect::<Vec<_>>(), expected);
        assert_eq!(merged(&[]).count(), 0);
    }
}
