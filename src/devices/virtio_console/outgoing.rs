//! The bytes that the guest sends: requests of any length, a turn's share at a time.

use super::BYTES_PER_TURN;
use crate::error::Result;
use crate::memory::{Memory, Regions};
use crate::virtio::Queue;
use crate::virtio::buffers::Buffers;

/// The queue of what the guest sends.
pub struct Outgoing {
    queue: Queue,
    buffers: Buffers,
    /// How many bytes of the first request are gone already.
    gone: u64,
}

impl Outgoing {
    /// The queue, of whose first request so many bytes are gone.
    pub fn new(memory: &Memory, queue: Queue, gone: u64) -> Self {
        Self { queue, buffers: Buffers::new(memory.clone()), gone }
    }

    /// Which kicks it waits for.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Gives the queue back, and how many bytes of its first request are gone.
    pub fn stop(self) -> (Queue, u64) {
        (self.queue, self.gone)
    }

    /// Has `take` take the first bytes of what there is, at most as many as it is told, until it takes none or the turn is
    /// over. `take` returns how many it has taken; they are taken away from the buffers here.
    pub fn send(
        &mut self,
        memory: &Regions,
        mut take: impl FnMut(&mut Buffers, usize) -> Result<usize>,
    ) -> Result<()> {
        let Self { queue, buffers, gone } = self;
        let (mut left, mut is_cut) = (BYTES_PER_TURN, false);
        queue.serve_within(memory, |chain, share| {
            buffers.clear();
            buffers.add_readable(chain)?;
            // A driver that has made the request shorter meanwhile has nothing left in it.
            if !usize::try_from(*gone).is_ok_and(|gone| buffers.advance(gone)) {
                buffers.clear();
            }
            while !buffers.is_empty() && left > 0 {
                let taken = take(buffers, left.min(buffers.len()))?;
                if taken == 0 {
                    return Ok(None);
                }
                buffers.advance(taken);
                *gone += taken as u64;
                left -= taken;
            }
            if !buffers.is_empty() {
                is_cut = true;
                return Ok(None);
            }
            *gone = 0;
            share.use_up_if(left == 0);
            Ok(Some(0))
        })?;
        if is_cut {
            queue.kick_again();
        }
        Ok(())
    }
}
