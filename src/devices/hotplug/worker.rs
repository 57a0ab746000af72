//! The running half of memory hotplug: its queue, by which the driver plugs blocks and unplugs them. Pages go back to the
//! host in ranges, one for each slot that keeps some of its blocks; a slot that keeps none goes as a whole.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::GuestAddressSpace;

use super::blocks::{Layout, Shared, State};
use super::device::Metrics;
use crate::error::{Error, Result};
use crate::history::{self, Event};
use crate::log;
use crate::memory::slots::Slots;
use crate::memory::{self, Memory};
use crate::virtio::buffers::Buffers;
use crate::virtio::{Chain, Queue, Registrar, Worker};

const KICK: u32 = 0;

/// The types of requests, and of answers (virtio 1.2, 5.15.6).
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;
/// The states of blocks.
const ALL_PLUGGED: u16 = 0;
const ALL_UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

/// The sizes of a request and of an answer, in bytes.
const REQUEST: usize = 24;
const ANSWER: usize = 10;

/// The bytes that come and go in one turn, after which other devices have theirs: KVM has all CPUs wait for a slot that
/// goes, and a guest can ask for that as fast as it likes.
const PER_TURN: u64 = 1 << 30;

/// The running half of the device.
pub struct Running {
    memory: Memory,
    queue: Queue,
    buffers: [Buffers; 2],
    plugs: Plugs,
}

impl Running {
    /// A running half with this queue, for the blocks at `layout`, whose memory `slots` gives and takes.
    pub fn new(
        memory: Memory,
        queue: Queue,
        layout: Layout,
        state: Shared,
        slots: Option<Arc<dyn Slots>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let buffers = [0; 2].map(|_| Buffers::new(memory.clone()));
        let plugs = Plugs { memory: memory.clone(), layout, state, slots, metrics };
        Self { memory, queue, buffers, plugs }
    }
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        registrar.kick(&self.queue, KICK)
    }

    fn handle(&mut self, _: u32) -> Result<()> {
        let Self { memory, queue, buffers: [asked, answer], plugs } = self;
        plugs.metrics.queue_event_count.add(1);
        let mut left = PER_TURN;
        queue.serve_within(&memory.memory(), |chain, share| {
            let Some(request) = read(chain, asked, answer)? else {
                plugs.metrics.queue_event_fails.add(1);
                return Ok(Some(0));
            };
            let (code, state) = plugs.answer(&request, &mut left);
            let mut bytes = [0; ANSWER];
            bytes[..2].copy_from_slice(&code.to_le_bytes());
            bytes[8..].copy_from_slice(&state.to_le_bytes());
            answer.copy_from(0, &bytes);
            share.use_up_if(left == 0);
            Ok(Some(ANSWER as u32))
        })
    }

    fn stop(self: Box<Self>) -> Vec<Queue> {
        vec![self.queue]
    }
}

/// A request of the driver: what is to be done with so many blocks from an address on.
struct Request {
    kind: u16,
    address: u64,
    count: u16,
}

/// The request that a chain has; None: the chain is too short for one, or for its answer, which is to go to `answer`.
fn read(chain: Chain<'_>, asked: &mut Buffers, answer: &mut Buffers) -> Result<Option<Request>> {
    Buffers::split(chain, asked, answer)?;
    let mut bytes = [0; REQUEST];
    if !asked.read_front(&mut bytes) || answer.len() < ANSWER {
        return Ok(None);
    }
    let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let address = bytes[8..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    Ok(Some(Request { kind: half(0), address, count: half(16) }))
}

/// The blocks, as the worker plugs and unplugs them.
struct Plugs {
    memory: Memory,
    layout: Layout,
    state: Shared,
    slots: Option<Arc<dyn Slots>>,
    metrics: Arc<Metrics>,
}

impl Plugs {
    /// Does what a request asks for, and returns the answer, with the state of blocks if that was asked for. What comes or
    /// goes is taken off `left`.
    fn answer(&self, request: &Request, left: &mut u64) -> (u16, u16) {
        let (begun, metrics) = (Instant::now(), &self.metrics);
        let mut state = self.state.lock();
        let blocks = state.blocks(&self.layout, request.address, request.count);
        let before = state.plugged(&self.layout);
        let (code, told) = match (request.kind, &blocks) {
            (PLUG, Some(blocks)) => (self.plug(&mut state, blocks), 0),
            (UNPLUG, Some(blocks)) => (self.unplug(&mut state, blocks), 0),
            (UNPLUG_ALL, _) => (self.unplug_all(&mut state), 0),
            (STATE, Some(blocks)) => (ACK, state_of(&state, blocks)),
            _ => (ERROR, 0),
        };
        let moved = state.plugged(&self.layout).abs_diff(before);
        *left = left.saturating_sub(moved);
        if moved > 0 {
            self.tell(&mut state);
        }
        drop(state);
        let is_refused = u64::from(code != ACK);
        let (time, count, fails) = match request.kind {
            PLUG => (&metrics.plug_agg, &metrics.plug_count, &metrics.plug_fails),
            UNPLUG => (&metrics.unplug_agg, &metrics.unplug_count, &metrics.unplug_fails),
            UNPLUG_ALL => (&metrics.unplug_all_agg, &metrics.unplug_all_count, &metrics.unplug_all_fails),
            STATE => (&metrics.state_agg, &metrics.state_count, &metrics.state_fails),
            _ => {
                metrics.queue_event_fails.add(1);
                return (code, told);
            }
        };
        time.add(begun.elapsed());
        count.add(1);
        fails.add(is_refused);
        match request.kind {
            PLUG => metrics.plug_bytes.add(moved),
            UNPLUG => metrics.unplug_bytes.add(moved),
            _ => {}
        }
        (code, told)
    }

    fn plug(&self, state: &mut State, blocks: &Range<u64>) -> u16 {
        let size = self.layout.addresses(blocks).size;
        if state.count(blocks) > 0 {
            return ERROR;
        }
        if state.plugged(&self.layout) + size > state.requested {
            return NACK;
        }
        let new: Vec<_> = self.layout.slots(blocks).filter(|slot| state.count(slot) == 0).collect();
        for (index, slot) in new.iter().enumerate() {
            let slot = self.layout.addresses(slot);
            let added = match &self.slots {
                Some(slots) => slots.add(slot),
                None => Err(Error::host("no machine has the device")),
            };
            if let Err(error) = added {
                log::guest_line(format_args!("the guest cannot have {slot} more now: {error}"));
                new[..index].iter().for_each(|slot| self.take(slot));
                return BUSY;
            }
        }
        state.set(blocks, true);
        ACK
    }

    fn unplug(&self, state: &mut State, blocks: &Range<u64>) -> u16 {
        if state.count(blocks) < blocks.end - blocks.start {
            return ERROR;
        }
        state.set(blocks, false);
        for slot in self.layout.slots(blocks) {
            match state.count(&slot) {
                0 => self.take(&slot),
                _ => self.give_back(&(blocks.start.max(slot.start)..blocks.end.min(slot.end))),
            }
        }
        ACK
    }

    fn unplug_all(&self, state: &mut State) -> u16 {
        let all = 0..self.layout.total / self.layout.block;
        let plugged: Vec<_> = self.layout.slots(&all).filter(|slot| state.count(slot) > 0).collect();
        state.set(&all, false);
        plugged.iter().for_each(|slot| self.take(slot));
        state.usable = state.requested.next_multiple_of(self.layout.slot);
        ACK
    }

    /// Takes a slot of which no block is plugged from the guest. If that cannot be, its memory goes back all the same.
    fn take(&self, slot: &Range<u64>) {
        let range = self.layout.addresses(slot);
        if let Some(slots) = &self.slots
            && let Err(error) = slots.remove(range)
        {
            log::guest_line(format_args!("{range} stay where the guest finds them: {error}"));
            self.give_back(slot);
        }
    }

    fn give_back(&self, blocks: &Range<u64>) {
        let range = self.layout.addresses(blocks);
        if let Err(error) = memory::give_back(&self.memory.memory(), range) {
            self.metrics.unplug_discard_fails.add(1);
            log::guest_line(format_args!("the host does not take {range} of the guest back: {error}"));
        }
    }

    /// Tells once that the guest has plugged as much as it is to have.
    fn tell(&self, state: &mut State) {
        let plugged = state.plugged(&self.layout);
        if plugged == state.requested && !state.is_told {
            state.is_told = true;
            history::tell(|| Event::MemoryResized { plugged_mib: plugged >> 20 });
        }
    }
}

/// The answer to a driver that asks for the state of these blocks.
fn state_of(state: &State, blocks: &Range<u64>) -> u16 {
    match state.count(blocks) {
        0 => ALL_UNPLUGGED,
        all if all == blocks.end - blocks.start => ALL_PLUGGED,
        _ => MIXED,
    }
}
