//! A batch of the driver's frames on their way to a TAP.

use std::ops::{Range, RangeInclusive};

use super::port::{BATCH, Port};
use crate::devices::net::header;
use crate::devices::net::metrics::Metrics;
use crate::devices::net::transmit::{Batch, Done};
use crate::error::Result;
use crate::memory::Memory;
use crate::virtio::Chain;
use crate::virtio::pool::Pool;

/// The longest frame with its header; a chain can name the same memory many times, and ask the host to
/// gather gigabytes.
const FRAME_MAX: usize = header::SIZE + 14 + 4 + 65535;
/// What a batch usually has: a driver gives a frame in a few pieces.
const VECTORS: usize = 4 * BATCH;

/// A batch of frames. The TAP takes or loses all of them at once.
pub struct Outgoing {
    pool: Pool,
    /// The vectors of each frame.
    frames: Vec<Range<usize>>,
    /// So many frames went back to the driver.
    done: usize,
}

impl Outgoing {
    /// An empty batch of frames in `memory`.
    pub fn new(memory: Memory) -> Self {
        Self { pool: Pool::new(memory, VECTORS), frames: Vec::with_capacity(BATCH), done: 0 }
    }
}

impl Batch for Outgoing {
    type Port = Port;
    const LENGTHS: RangeInclusive<usize> = header::SIZE..=FRAME_MAX;

    fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    fn has_room(&self) -> bool {
        self.frames.len() < BATCH
    }

    fn add(&mut self, chain: Chain<'_>) -> Result<()> {
        let start = self.pool.vectors().count();
        self.pool.add_readable(chain)?;
        self.frames.push(start..self.pool.vectors().count());
        Ok(())
    }

    fn send(&mut self, port: &mut Port, metrics: &Metrics) -> bool {
        port.write(&self.pool, &self.frames);
        metrics.tx_call_count.add(port.calls());
        true
    }

    fn next_done(&mut self, port: &Port) -> Option<Done> {
        let Some(entry) = self.pool.entries().get(self.done) else {
            self.pool.clear();
            self.frames.clear();
            self.done = 0;
            return None;
        };
        let sent = port.results()[self.done].map(|length| length.saturating_sub(header::SIZE));
        self.done += 1;
        Some(Done { head: entry.head, sent })
    }
}
