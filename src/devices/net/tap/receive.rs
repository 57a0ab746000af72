//! Frames from a TAP to the driver.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::port::{BATCH, Port};
use crate::devices::limit::Limit;
use crate::devices::net::answers::Delivery;
use crate::devices::net::metrics::Metrics;
use crate::devices::net::{TURN, header};
use crate::error::{Error, Result};
use crate::memory::{Memory, Regions};
use crate::sys::vectors::VECTORS_MAX;
use crate::virtio::pool::{Pool, Unfilled};
use crate::virtio::{Queue, Share};

/// The largest frame with its header that a TAP gives: 64 KiB of segments and an Ethernet header.
const FRAME_MAX: usize = header::SIZE + 14 + 65536;
/// The same of one that is a packet of the MTU, in a VLAN, and a byte by which a longer one is known.
const fn frame_of(mtu: u16) -> usize {
    header::SIZE + 14 + 4 + mtu as usize + 1
}
/// Reads posted for a frame of which nothing is known: a second one sees that there is no second
/// frame, without a system call of its own.
const BATCH_MIN: usize = 2;

/// No more buffers are taken ahead once they have so many vectors: a driver that gives them in the
/// smallest pieces would have a megabyte of vectors kept. It is more than one read can take, so there is
/// always one that can be posted.
const VECTORS_AHEAD_MAX: usize = 2 * VECTORS_MAX;

/// A driver that has given so many times the largest frame has enough for one in the half of its ring that it
/// may leave before it fills it up. One that gave less might wait for frames, as these would for buffers.
const AMPLE: usize = 2;

/// What a turn has left in the TAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// It is empty.
    Nothing,
    /// There may be more frames.
    Some,
    /// There may be frames, and none could be moved.
    All,
}

/// What a turn has come to.
pub struct Received {
    /// So many frames were read.
    pub frames: usize,
    /// What it has left in the TAP.
    pub left: Left,
    /// It is to be called again after so long.
    pub wait: Option<Duration>,
}

/// The driver's receive buffers and what waits for them.
pub struct Receiver {
    /// Buffers come by it.
    pub queue: Queue,
    mergeable: bool,
    /// The largest frame that is reckoned with: each read gets so much.
    frame_max: usize,
    /// The buffers that it gave and no frame has filled.
    pool: Pool,
    limit: Limit,
    metrics: Arc<Metrics>,
    batch: usize,
    /// The driver gave ample buffers once: it will again, and what there is now is kept for the largest frame.
    /// Others get what fits.
    is_ample: bool,
    /// A frame that was read and may not be delivered yet: so many bytes in the first plan.
    late: Option<usize>,
    /// For each posted read: entries of the pool, and their vectors.
    entries: Vec<Range<usize>>,
    vectors: Vec<Range<usize>>,
}

impl Receiver {
    /// Goes on with the buffers that an earlier receiver left unfilled. `segments`: the driver takes packets larger
    /// than the `mtu`; what is to be larger all the same is noticed when the first one comes.
    pub fn new(
        memory: Memory,
        queue: Queue,
        mergeable: bool,
        (segments, mtu): (bool, u16),
        unfilled: &[Unfilled],
        limit: Limit,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let mut pool = Pool::new(memory, queue.size().into());
        unfilled.iter().try_for_each(|unfilled| pool.add_unfilled(unfilled))?;
        let (entries, vectors) = (Vec::with_capacity(BATCH), Vec::with_capacity(BATCH));
        let (batch, is_ample, late) = (BATCH_MIN, false, None);
        let frame_max = if segments { FRAME_MAX } else { frame_of(mtu) };
        Ok(Self {
            queue,
            mergeable,
            frame_max,
            pool,
            limit,
            metrics,
            batch,
            is_ample,
            late,
            entries,
            vectors,
        })
    }

    /// Gives back the queue and the buffers that no frame has filled.
    pub fn stop(mut self, memory: &Regions) -> (Queue, Vec<Unfilled>) {
        if let Some(length) = self.late.take() {
            // Limits or not, it is not lost, but it is owed: a driver could reset the device for each frame.
            self.limit.owe(length.saturating_sub(header::SIZE));
            // A ring that is broken is noticed when it is used again.
            let _ = self.deliver(memory, 0, length).and_then(|()| self.queue.notify(memory));
            self.pool.remove_used();
        }
        (self.queue, self.pool.unfilled())
    }

    /// Moves frames until the TAP is empty, the driver has no more buffers, `share` is used up, or the limit is
    /// reached. The caller notifies the driver.
    pub fn receive(&mut self, memory: &Regions, port: &mut Port, mut share: Share) -> Result<Received> {
        if !self.queue.begin_turn(memory)? {
            return Ok(Received { frames: 0, left: Left::Some, wait: None });
        }
        // A frame may take several buffers: frames are counted, not requests.
        let (mut moved, mut is_empty) = (0, false);
        let wait = loop {
            if let Some(wait) = self.deliver_late(memory)?.or_else(|| self.limit.debt()) {
                break Some(wait);
            }
            self.fill(memory, &mut share)?;
            self.plan();
            let posted = self.vectors.len();
            if posted == 0 {
                self.metrics.no_rx_avail_buffer.add(u64::from(!share.is_used_up()));
                if !self.queue.look_again(memory, &share)? {
                    break None;
                }
                continue;
            }
            match self.mergeable {
                true => port.read(&self.pool, &self.vectors),
                false => port.read_beyond(&self.pool, &self.vectors),
            }
            self.metrics.rx_call_count.add(port.calls());
            let (got, wait) = self.deliver_all(memory, port.results())?;
            moved += got;
            if wait.is_some() {
                break wait;
            }
            if got < posted {
                self.batch = (got + 1).clamp(BATCH_MIN, BATCH);
                is_empty = true;
                break None;
            }
            self.batch = (2 * posted).clamp(BATCH_MIN, BATCH);
            if moved >= TURN || share.is_used_up() {
                self.queue.kick_again();
                break None;
            }
        };
        let left = match (is_empty, moved) {
            (true, _) => Left::Nothing,
            (_, 0) => Left::All,
            _ => Left::Some,
        };
        Ok(Received { frames: moved, left, wait })
    }

    /// Delivers a frame that has not come from the TAP, and has no header yet. The caller notifies the driver.
    pub fn deliver_frame(&mut self, memory: &Regions, frame: &[u8], share: &mut Share) -> Result<Delivery> {
        if self.late.is_some() || !self.queue.is_ready() {
            // The first buffers have a frame that waits for the limit: the next turn is that of its timer.
            return Ok(Delivery::Short { more: false });
        }
        self.fill(memory, share)?;
        self.plan();
        let length = header::SIZE + frame.len();
        let first = self.entries.first().cloned().unwrap_or_default();
        let capacity: usize = self.pool.entries()[first].iter().map(|entry| entry.length).sum();
        // A frame that fills its buffers to the last byte would be taken for one that was cut off.
        if capacity < length || self.mergeable && capacity == length {
            let has_all = self.pool.entries().len() >= usize::from(self.queue.size());
            if has_all || !self.mergeable && capacity > 0 {
                // There will never be more room: lost, as a frame of the TAP's.
                self.metrics.rx_fails.add(1);
                return Ok(Delivery::Done);
            }
            self.metrics.no_rx_avail_buffer.add(u64::from(!share.is_used_up()));
            return Ok(Delivery::Short { more: self.queue.look_again(memory, share)? });
        }
        let vector = self.vectors[0].start;
        self.pool.copy_from(vector, 0, &header::plain(0));
        self.pool.copy_from(vector, header::SIZE, frame);
        self.deliver(memory, 0, length)?;
        self.pool.remove_used();
        Ok(Delivery::Done)
    }

    /// Takes as many of the driver's buffers as the next batch can need.
    fn fill(&mut self, memory: &Regions, share: &mut Share) -> Result<()> {
        if self.limit.is_limited() {
            self.batch = 1;
        }
        let wanted = if self.mergeable { self.batch.max(AMPLE) * self.frame_max } else { usize::MAX };
        while self.pool.length() < wanted
            && (self.mergeable || self.pool.entries().len() < self.batch)
            && self.pool.vectors().count() < VECTORS_AHEAD_MAX
            && let Some(chain) = self.queue.pop(memory, share)?
        {
            // Any of them may be a frame's first.
            if self.pool.add_writable(chain)? < header::SIZE {
                return Err(Error::guest("the driver gave a receive buffer too small for a header"));
            }
        }
        self.is_ample |= self.pool.length() >= AMPLE * self.frame_max;
        Ok(())
    }

    /// Deals the buffers out: to each read enough for the largest frame. What is not enough serves one
    /// read, if there is no other.
    fn plan(&mut self) {
        self.entries.clear();
        self.vectors.clear();
        let (mut entry, mut vector) = (0, 0);
        let entries = self.pool.entries();
        while entry < entries.len() && self.entries.len() < self.batch {
            let (first, mut length, mut count) = (entry, 0, 0);
            while entry < entries.len() && (entry == first || self.mergeable && length < self.frame_max) {
                let more = self.pool.count_vectors(entry..entry + 1);
                if entry > first && count + more > VECTORS_MAX {
                    break;
                }
                count += more;
                length += entries[entry].length;
                entry += 1;
            }
            let is_short = self.mergeable && length < self.frame_max;
            if is_short && entry == entries.len() && (first > 0 || self.is_ample) {
                break;
            }
            self.entries.push(first..entry);
            self.vectors.push(vector..vector + count);
            vector += count;
        }
    }

    /// Delivers what a batch has read: how many frames, and how long the last one must wait.
    fn deliver_all(
        &mut self,
        memory: &Regions,
        results: &[Option<usize>],
    ) -> Result<(usize, Option<Duration>)> {
        let mut got = 0;
        for (read, length) in results.iter().enumerate() {
            let Some(length) = *length else { continue };
            got += 1;
            if let Err(wait) = self.limit.take(length.saturating_sub(header::SIZE)) {
                // Limited, there was but one read.
                self.late = Some(length);
                self.metrics.rx_rate_limiter_throttled.add(1);
                return Ok((got, Some(wait)));
            }
            self.deliver(memory, read, length)?;
        }
        self.pool.remove_used();
        Ok((got, None))
    }

    /// Delivers a frame that had to wait; or how long it has to go on waiting.
    fn deliver_late(&mut self, memory: &Regions) -> Result<Option<Duration>> {
        let Some(length) = self.late else { return Ok(None) };
        if let Err(wait) = self.limit.take(length.saturating_sub(header::SIZE)) {
            return Ok(Some(wait));
        }
        self.late = None;
        self.deliver(memory, 0, length)?;
        self.pool.remove_used();
        Ok(None)
    }

    /// Gives the frame of `length` bytes that a read has put into its buffers to the driver.
    fn deliver(&mut self, memory: &Regions, read: usize, length: usize) -> Result<()> {
        let (entries, vector) = (self.entries[read].clone(), self.vectors[read].start);
        let capacity: usize = self.pool.entries()[entries.clone()].iter().map(|entry| entry.length).sum();
        if self.mergeable && length == capacity && capacity < FRAME_MAX {
            // Cut off, in all likelihood: lost, as where there is no buffer. The TAP's MTU is larger than
            // was thought; the next one will fit.
            self.metrics.rx_fails.add(1);
            (self.frame_max, self.is_ample) = (FRAME_MAX, false);
            return Ok(());
        }
        if length > capacity {
            // One buffer for a frame, and this one is longer: half a frame is none.
            self.metrics.rx_fails.add(1);
            return Ok(());
        }
        self.pool.mark_dirty(vector, length);
        let (mut left, mut filled) = (length, 0);
        for entry in entries.clone() {
            if left == 0 {
                break;
            }
            left -= left.min(self.pool.entries()[entry].length);
            filled += 1;
        }
        self.metrics.rx_packets_count.add(1);
        self.metrics.rx_bytes_count.add(length.saturating_sub(header::SIZE) as u64);
        self.metrics.rx_count.add(filled as u64);
        self.pool.copy_from(vector, header::NUM_BUFFERS, &(filled as u16).to_le_bytes());
        let mut left = length;
        for entry in entries.take(filled) {
            let here = left.min(self.pool.entries()[entry].length);
            self.queue.push(memory, self.pool.entries()[entry].head, here as u32)?;
            self.pool.set_used(entry);
            left -= here;
        }
        Ok(())
    }
}
