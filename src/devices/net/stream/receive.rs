//! Frames from a stream to the driver.

use std::sync::Arc;
use std::time::Duration;

use super::port::Port;
use crate::devices::limit::Limit;
use crate::devices::net::answers::Delivery;
use crate::devices::net::metrics::Metrics;
use crate::devices::net::{TURN, header};
use crate::error::{Error, Result};
use crate::memory::{Memory, Regions};
use crate::virtio::buffers::Buffers;
use crate::virtio::queue::DESCRIPTORS_PER_TURN;
use crate::virtio::{Queue, Share};

/// Reads of the stream in one turn: one that gives byte after byte never comes to an end.
const READS: usize = 256;
/// A frame that finds no room in buffers of so many descriptors is lost: they are taken in one turn.
const DESCRIPTORS_MAX: usize = DESCRIPTORS_PER_TURN as usize / 2;

/// The driver's receive buffers, each taken when a frame fills it.
pub struct Receiver {
    /// Buffers come by it.
    pub queue: Queue,
    mergeable: bool,
    /// Of one received frame, filled again for each.
    buffers: Buffers,
    /// Heads and lengths of their chains.
    chains: Vec<(u16, usize)>,
    limit: Limit,
    metrics: Arc<Metrics>,
    /// The limit has let the next frame through.
    is_paid: bool,
}

impl Receiver {
    /// `mergeable`: a frame may take several buffers.
    pub fn new(memory: Memory, queue: Queue, mergeable: bool, limit: Limit, metrics: Arc<Metrics>) -> Self {
        let buffers = Buffers::new(memory);
        Self { queue, mergeable, buffers, chains: Vec::new(), limit, metrics, is_paid: false }
    }

    /// Gives back the queue. A frame that waits for buffers asks the limit again.
    pub fn stop(self, port: &Port) -> Queue {
        if self.is_paid
            && let Ok(Some(frame)) = port.stream.decoder.frame()
        {
            self.limit.refund(frame.len());
        }
        self.queue
    }

    /// Moves frames until the stream is empty, the driver has no more buffers, or the limit is reached: then this
    /// is to be called again after so long. The caller notifies the driver.
    pub fn receive(
        &mut self,
        memory: &Regions,
        port: &mut Port,
        share: &mut Share,
    ) -> Result<Option<Duration>> {
        if !self.queue.begin_turn(memory)? {
            return Ok(None);
        }
        let (mut moved, mut reads) = (0, 0);
        loop {
            let Ok(frame) = port.stream.decoder.frame() else {
                port.end();
                return Ok(None);
            };
            let Some(frame) = frame else {
                if reads == READS {
                    self.queue.kick_again();
                    return Ok(None);
                }
                reads += 1;
                if port.read_ahead(&self.metrics) {
                    continue;
                }
                return Ok(None);
            };
            if !self.is_paid
                && let Err(wait) = self.limit.take(frame.len())
            {
                self.metrics.rx_rate_limiter_throttled.add(1);
                return Ok(Some(wait));
            }
            // It may have to wait for buffers, and is not counted again then.
            self.is_paid = true;
            match self.deliver(memory, frame, share)? {
                Delivery::Done => {
                    port.stream.decoder.done();
                    self.is_paid = false;
                    moved += 1;
                    if moved == TURN {
                        self.queue.kick_again();
                        return Ok(None);
                    }
                }
                Delivery::Short { more } => {
                    self.metrics.no_rx_avail_buffer.add(u64::from(!share.is_used_up()));
                    if !more {
                        return Ok(None);
                    }
                }
            }
        }
    }

    /// Copies a frame to the driver's buffers. The caller notifies the driver.
    pub fn deliver(&mut self, memory: &Regions, frame: &[u8], share: &mut Share) -> Result<Delivery> {
        let Self { buffers, chains, queue, mergeable, metrics, .. } = self;
        let needed = header::SIZE + frame.len();
        buffers.clear();
        chains.clear();
        let mut descriptors = 0;
        while buffers.len() < needed
            && (*mergeable || chains.is_empty())
            && descriptors < DESCRIPTORS_MAX
            && let Some(chain) = queue.pop(memory, share)?
        {
            descriptors += chain.pieces().len();
            chains.push((chain.head(), buffers.add_writable(chain)?));
        }
        if chains.first().is_some_and(|(_, first)| *first < header::SIZE) {
            return Err(Error::guest("the driver gave a receive buffer too small for a header"));
        }
        if buffers.len() < needed {
            // More may come; but what would not even fit all of its buffers is lost.
            let is_all = chains.len() >= usize::from(queue.size()) || descriptors >= DESCRIPTORS_MAX;
            let never = is_all || !*mergeable && !chains.is_empty();
            // The driver is asked before its buffers are given back: after that, the same ones would be news,
            // and this would look at them again and again.
            let more = !never && queue.look_again(memory, share)?;
            chains.iter().for_each(|_| queue.undo_pop());
            if !never {
                return Ok(Delivery::Short { more });
            }
            metrics.rx_fails.add(1);
            return Ok(Delivery::Done);
        }
        metrics.rx_packets_count.add(1);
        metrics.rx_bytes_count.add(frame.len() as u64);
        metrics.rx_count.add(chains.len() as u64);
        buffers.copy_from(0, &header::plain(chains.len() as u16));
        buffers.copy_from(header::SIZE, frame);
        let mut left = needed;
        for (head, length) in chains.iter() {
            let here = left.min(*length);
            queue.push(memory, *head, here as u32)?;
            left -= here;
        }
        Ok(Delivery::Done)
    }
}
