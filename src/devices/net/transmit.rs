//! Frames from the driver to what carries them: one loop for a TAP and for a stream.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use super::answers::Answers;
use super::header;
use super::metrics::Metrics;
use crate::devices::limit::Limit;
use crate::error::Result;
use crate::memory::Regions;
use crate::virtio::{Chain, Queue, Share};

/// A batch of the driver's frames on their way to what carries them.
pub trait Batch {
    /// What carries the frames, in both directions.
    type Port;
    /// How long the chain of a frame can be, with the header of virtio.
    const LENGTHS: RangeInclusive<usize>;

    /// Whether every frame of the batch is done with.
    fn is_empty(&self) -> bool;
    /// Whether one more frame may be added.
    fn has_room(&self) -> bool;
    /// Adds the frame in `chain`, whose length is one of `LENGTHS`.
    fn add(&mut self, chain: Chain<'_>) -> Result<()>;
    /// Hands frames to the port, as many as it takes. False: it takes no more now, and tells when it does.
    fn send(&mut self, port: &mut Self::Port, metrics: &Metrics) -> bool;
    /// The next frame that is done with, in the order in which they were added; `port` is as [`Self::send`] left
    /// it.
    fn next_done(&mut self, port: &Self::Port) -> Option<Done>;
}

/// A frame that goes back to the driver.
pub struct Done {
    /// The head of its chain.
    pub head: u16,
    /// How many bytes have gone, without the header of virtio; none: the frame is lost.
    pub sent: Option<usize>,
}

/// The driver's frames on their way out.
pub struct Transmitter<B> {
    /// They come by it.
    pub queue: Queue,
    /// Those that are on their way.
    pub batch: B,
    /// Where frames for the metadata service go, if it answers on this interface.
    pub answers: Option<Answers>,
    /// What every frame asks.
    pub limit: Limit,
    metrics: Arc<Metrics>,
}

impl<B: Batch> Transmitter<B> {
    /// `batch` is empty.
    pub fn new(
        queue: Queue,
        batch: B,
        answers: Option<Answers>,
        limit: Limit,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { queue, batch, answers, limit, metrics }
    }

    /// Moves frames until the driver has no more, the port takes no more, `share` is used up, or the limit is
    /// reached: then this is to be called again after so long. The caller notifies the driver.
    pub fn transmit(
        &mut self,
        memory: &Regions,
        port: &mut B::Port,
        share: &mut Share,
    ) -> Result<Option<Duration>> {
        if !self.queue.begin_turn(memory)? {
            return Ok(None);
        }
        loop {
            let wait = if self.batch.is_empty() { self.gather(memory, share)? } else { None };
            if self.batch.is_empty() {
                if wait.is_some() || !self.queue.look_again(memory, share)? {
                    return Ok(wait);
                }
                continue;
            }
            let takes_more = self.batch.send(port, &self.metrics);
            while let Some(Done { head, sent }) = self.batch.next_done(port) {
                self.metrics.tx_count.add(1);
                match sent {
                    Some(bytes) => {
                        self.metrics.tx_packets_count.add(1);
                        self.metrics.tx_bytes_count.add(bytes as u64);
                    }
                    None => self.metrics.tx_fails.add(1),
                }
                self.queue.push(memory, head, 0)?;
            }
            if !takes_more || wait.is_some() {
                return Ok(wait);
            }
        }
    }

    /// Takes a batch of the driver's frames; or how long the next one must wait.
    fn gather(&mut self, memory: &Regions, share: &mut Share) -> Result<Option<Duration>> {
        while self.batch.has_room()
            && let Some(chain) = self.queue.pop(memory, share)?
        {
            let length = chain.readable_length();
            let is_frame = B::LENGTHS.contains(&length);
            let asked = self.answers.as_mut().filter(|answers| is_frame && answers.are_asked_by(&chain));
            if !is_frame || asked.is_some() {
                // Such a chain goes back at once. The driver has its chains back in the order in which it gave them:
                // the frames of the batch go first.
                if !self.batch.is_empty() {
                    self.queue.undo_pop();
                    break;
                }
                match asked {
                    Some(answers) => answers.take(&chain),
                    None => self.metrics.tx_malformed_frames.add(1),
                }
                let head = chain.head();
                self.metrics.tx_count.add(1);
                self.queue.push(memory, head, 0)?;
                continue;
            }
            if let Err(wait) = self.limit.take(length - header::SIZE) {
                self.queue.undo_pop();
                self.metrics.tx_rate_limiter_throttled.add(1);
                return Ok(Some(wait));
            }
            self.batch.add(chain)?;
        }
        Ok(None)
    }
}
