//! A queue as a device sees it: the ring (by `virtio-queue`), its kick and its interrupt.

use std::sync::Arc;

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestAddress;

use super::Interrupts;
use super::chain::{Chain, Piece, Table, fault};
use crate::error::{Context, Error, Result};
use crate::memory::Regions;
use crate::poll::EventFd;
use crate::uring::Uring;

/// So many descriptors a worker handles between two looks at its loop's inbox: a pause, a reset and the
/// other devices of the loop wait for no more than these, however long a driver makes its requests.
pub const DESCRIPTORS_PER_TURN: u16 = 1024;

/// What a worker may take of its queues in one turn: then its loop has a look at its inbox.
pub struct Share {
    requests: u16,
    descriptors: u16,
    is_used_up: bool,
}

impl Share {
    /// At most so many requests, of [`DESCRIPTORS_PER_TURN`] descriptors together.
    pub fn new(requests: u16) -> Self {
        Self { requests, descriptors: DESCRIPTORS_PER_TURN, is_used_up: false }
    }

    /// Takes nothing more in this turn: a worker has reached a bound of its own.
    pub fn use_up(&mut self) {
        self.is_used_up = true;
    }

    /// Takes nothing more in this turn, as after [`Share::use_up`], if `is_all`.
    pub fn use_up_if(&mut self, is_all: bool) {
        self.is_used_up |= is_all;
    }

    /// What is left, for a worker that counts something else than requests.
    pub fn rest(self) -> Self {
        Self { requests: u16::MAX, ..self }
    }

    /// A request was wanted that was more than this: its queue is to be handled again in another turn.
    pub fn is_used_up(&self) -> bool {
        self.is_used_up
    }
}

/// A queue of a running device.
pub struct Queue {
    ring: virtio_queue::Queue,
    /// Of the request popped last. It grows to the longest one that there was, which is bounded.
    pieces: Vec<Piece>,
    kick: Arc<EventFd>,
    index: usize,
    interrupts: Arc<Interrupts>,
    /// How many requests were pushed since the driver was last notified.
    news: u16,
}

fn broken(error: virtio_queue::Error) -> Error {
    fault(error)
}

impl Queue {
    /// The queue `index` over `ring`, which the driver set up and kicks by `kick`.
    pub fn new(
        ring: virtio_queue::Queue,
        kick: Arc<EventFd>,
        index: usize,
        interrupts: Arc<Interrupts>,
    ) -> Self {
        Self { ring, pieces: Vec::new(), kick, index, interrupts, news: 0 }
    }

    /// Its number among the device's queues.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The largest number of requests that can be in flight.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Whether the driver has set it up.
    pub fn is_ready(&self) -> bool {
        self.ring.ready()
    }

    /// Where in guest memory its descriptors, what is available and what is used are, for who works at it elsewhere.
    pub fn places(&self) -> [GuestAddress; 3] {
        [self.ring.desc_table(), self.ring.avail_ring(), self.ring.used_ring()].map(GuestAddress)
    }

    /// Somebody else has worked at it, and everything before the request `next` is done.
    pub fn set_position(&mut self, next: u16) {
        self.ring.set_next_avail(next);
        self.ring.set_next_used(next);
    }

    /// How far it is: the next available and the next used index.
    pub fn position(&self) -> (u16, u16) {
        (self.ring.next_avail(), self.ring.next_used())
    }

    /// Written to when the driver has made buffers available (`Registrar::kick` waits for it).
    pub(super) fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The kick, for whoever the device waits for: it is written to when there is something to do again.
    pub fn waker(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// Handles the queue again in the next turn, as if the driver had kicked: not all was done.
    pub fn kick_again(&self) {
        // A counter that is full says the same.
        let _ = self.kick.write(1);
    }

    /// The next request, if there is one and `share` has room for the longest that there can be.
    pub fn pop<'q>(&'q mut self, memory: &'q Regions, share: &mut Share) -> Result<Option<Chain<'q>>> {
        if !self.ring.ready() {
            return Ok(None);
        }
        let pieces_max = self.ring.max_size();
        // One more names the indirect table.
        if share.is_used_up || share.requests == 0 || share.descriptors <= pieces_max {
            share.use_up();
            return Ok(None);
        }
        let next = self.ring.iter(memory).map_err(broken)?.next();
        let Some(head) = next.map(|chain| chain.head_index()) else { return Ok(None) };
        let (address, size) = (GuestAddress(self.ring.desc_table()), self.ring.size());
        let read = Table { address, size, pieces_max }.read(memory, head, &mut self.pieces)?;
        share.requests -= 1;
        share.descriptors -= read;
        Ok(Some(Chain::new(head, memory, &self.pieces)))
    }

    /// Gives the request popped last back: it will be popped again.
    pub fn undo_pop(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// The request with this head is done, and `len` bytes were written to it.
    pub fn push(&mut self, memory: &Regions, head: u16, len: u32) -> Result<()> {
        self.news = self.news.saturating_add(1);
        self.ring.add_used(memory, head, len).map_err(broken)
    }

    /// How many requests were pushed of which the driver was not notified.
    pub fn news(&self) -> u16 {
        self.news
    }

    /// Interrupts the driver, if it wants to know of what was pushed.
    pub fn notify(&mut self, memory: &Regions) -> Result<()> {
        if let Some(event) = self.interrupt(memory)? {
            // A counter that is full has interrupted it already.
            let _ = event.write(1);
        }
        Ok(())
    }

    /// As [`Self::notify`], for two queues of a device: where one interrupt tells of both, there is one.
    pub fn notify_both(&mut self, other: &mut Self, memory: &Regions) -> Result<()> {
        let (event, others) = (self.interrupt(memory)?, other.interrupt(memory)?);
        let others = others.filter(|others| event.is_none_or(|event| !std::ptr::eq(event, *others)));
        for event in [event, others].into_iter().flatten() {
            // A counter that is full has interrupted it already.
            let _ = event.write(1);
        }
        Ok(())
    }

    /// As [`Self::notify`]. Where one interrupt tells of both queues, the driver learns at the same time of what was
    /// pushed to `other`, whose news can wait.
    pub fn notify_with(&mut self, other: &mut Self, memory: &Regions) -> Result<()> {
        let is_one = self.interrupts.are_one(self.index, other.index);
        if let Some(event) = self.interrupt(memory)? {
            if is_one {
                other.interrupt(memory)?;
            }
            // A counter that is full has interrupted the driver already.
            let _ = event.write(1);
        }
        Ok(())
    }

    /// As [`Self::notify`], by what `ring` hands over next.
    pub fn notify_through(&mut self, memory: &Regions, ring: &mut Uring) -> Result<()> {
        if let Some(event) = self.interrupt(memory)?
            && !ring.signal(event).context("use io_uring")?
        {
            let _ = event.write(1);
        }
        Ok(())
    }

    /// The event that interrupts the driver, if it wants to know of what was pushed.
    fn interrupt(&mut self, memory: &Regions) -> Result<Option<&EventFd>> {
        // A driver without EVENT_IDX wants to know of whatever was pushed, but not of nothing.
        let has_news = std::mem::take(&mut self.news) > 0 && self.ring.ready();
        let wanted = has_news && self.ring.needs_notification(memory).map_err(broken)?;
        Ok(wanted.then(|| self.interrupts.used_buffer(self.index)).flatten())
    }

    /// Begins a turn: tells the driver that it need not kick, because requests are looked for until
    /// [`Self::look_again`] says that the turn is over. A turn that ends without asking that waits for something
    /// other than requests, and has no kick until it is over. False: the driver has not set the queue up, and
    /// there is nothing to look for.
    pub fn begin_turn(&mut self, memory: &Regions) -> Result<bool> {
        // Without a ring, any place in memory would be taken for one.
        if self.ring.ready() {
            self.ring.disable_notification(memory).map_err(broken)?;
        }
        Ok(self.ring.ready())
    }

    /// To be asked when [`Self::pop`] has given no request: whether there are requests now, for which the turn
    /// goes on. False: the turn is over. The driver kicks for its next request, or the queue has another turn at
    /// once, where `share` had no room for a request that may be there.
    pub fn look_again(&mut self, memory: &Regions, share: &Share) -> Result<bool> {
        if share.is_used_up() {
            self.kick_again();
            return Ok(false);
        }
        // A request that came before the driver saw that it is to kick has no kick: the ring is looked at once
        // more after that was written (virtio 1.2, 2.7.10).
        if !self.ring.ready() || !self.ring.enable_notification(memory).map_err(broken)? {
            return Ok(false);
        }
        self.begin_turn(memory)
    }

    /// After a kick: handles the requests there are, each with `handle`, which returns how many bytes
    /// it wrote, or none: the request has to wait, and those after it with it. A driver that never stops
    /// adding gets a ring's worth at a time (see [`Share`]), so that other devices of the same loop have
    /// their turn.
    pub fn serve(
        &mut self,
        memory: &Regions,
        mut handle: impl FnMut(Chain<'_>) -> Result<Option<u32>>,
    ) -> Result<()> {
        self.serve_within(memory, |chain, _| handle(chain))
    }

    /// Handles requests as [`Queue::serve`] does, but such that cost more than their descriptors: `handle` uses the
    /// turn's share up when it has done as much as a turn may.
    pub fn serve_within(
        &mut self,
        memory: &Regions,
        mut handle: impl FnMut(Chain<'_>, &mut Share) -> Result<Option<u32>>,
    ) -> Result<()> {
        if !self.begin_turn(memory)? {
            return Ok(());
        }
        let mut share = Share::new(self.ring.size());
        loop {
            while let Some(chain) = self.pop(memory, &mut share)? {
                let head = chain.head();
                let Some(written) = handle(chain, &mut share)? else {
                    self.undo_pop();
                    return self.notify(memory);
                };
                self.push(memory, head, written)?;
            }
            if !self.look_again(memory, &share)? {
                break;
            }
        }
        self.notify(memory)
    }
}
