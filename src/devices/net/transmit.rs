//! Frames from the driver to a TAP: the other half of a pair.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::header;
use super::metrics::Metrics;
use super::port::{BATCH, Port};
use crate::devices::limit::Limit;
use crate::error::Result;
use crate::memory::{Memory, Regions};
use crate::virtio::pool::Pool;
use crate::virtio::{Queue, Share};

/// The longest frame with its header; a chain can name the same memory many times, and ask the host to
/// gather gigabytes.
const FRAME_MAX: usize = header::SIZE + 14 + 4 + 65535;
/// What a batch usually has: a driver gives a frame in a few pieces.
const VECTORS: usize = 4 * BATCH;

/// The driver's frames on their way out.
pub struct Transmitter {
    /// They come by it.
    pub queue: Queue,
    pool: Pool,
    limit: Limit,
    metrics: Arc<Metrics>,
    /// The vectors of each frame of a batch that can go.
    frames: Vec<Range<usize>>,
}

impl Transmitter {
    /// Nothing is on its way yet.
    pub fn new(memory: Memory, queue: Queue, limit: Limit, metrics: Arc<Metrics>) -> Self {
        Self { queue, pool: Pool::new(memory, VECTORS), limit, metrics, frames: Vec::with_capacity(BATCH) }
    }

    /// Moves frames until the driver has no more, `share` is used up, or the limit is reached: then it is to be
    /// called again after so long. The caller notifies the driver.
    pub fn transmit(
        &mut self,
        memory: &Regions,
        port: &mut Port,
        share: &mut Share,
    ) -> Result<Option<Duration>> {
        if !self.queue.begin_turn(memory)? {
            return Ok(None);
        }
        loop {
            let wait = self.gather(memory, share)?;
            if self.pool.entries().is_empty() {
                if wait.is_some() || !self.queue.look_again(memory, share)? {
                    return Ok(wait);
                }
                continue;
            }
            port.write(&self.pool, &self.frames);
            self.count(port);
            for entry in self.pool.entries() {
                self.queue.push(memory, entry.head, 0)?;
            }
            if wait.is_some() {
                return Ok(wait);
            }
        }
    }

    fn count(&self, port: &Port) {
        let gone = port.results().iter().flatten();
        let (frames, bytes) = gone.fold((0, 0), |(frames, bytes), length| {
            (frames + 1, bytes + length.saturating_sub(header::SIZE) as u64)
        });
        self.metrics.tx_packets_count.add(frames);
        self.metrics.tx_bytes_count.add(bytes);
        self.metrics.tx_fails.add(self.frames.len() as u64 - frames);
        self.metrics.tx_malformed_frames.add((self.pool.entries().len() - self.frames.len()) as u64);
        self.metrics.tx_count.add(self.pool.entries().len() as u64);
        self.metrics.tx_call_count.add(port.calls());
    }

    /// Takes a batch of the driver's frames; or how long the next one must wait.
    fn gather(&mut self, memory: &Regions, share: &mut Share) -> Result<Option<Duration>> {
        self.pool.clear();
        self.frames.clear();
        let mut vector = 0;
        while self.pool.entries().len() < BATCH
            && let Some(chain) = self.queue.pop(memory, share)?
        {
            if self.limit.is_limited()
                && let length @ header::SIZE..=FRAME_MAX = chain.readable_length()
                && let Err(wait) = self.limit.take(length - header::SIZE)
            {
                self.queue.undo_pop();
                self.metrics.tx_rate_limiter_throttled.add(1);
                return Ok(Some(wait));
            }
            let length = self.pool.add_readable(chain)?;
            let end = self.pool.vectors().len();
            // What cannot be a frame goes back unsent.
            if (header::SIZE..=FRAME_MAX).contains(&length) {
                self.frames.push(vector..end);
            }
            vector = end;
        }
        Ok(None)
    }
}
