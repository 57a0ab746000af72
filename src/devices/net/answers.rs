//! The metadata service on an interface: frames of the guest that are for it go there instead of to what carries
//! the others, and its frames go to the driver with the others.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::header;
use crate::clock;
use crate::devices::limit::set;
use crate::error::Result;
use crate::metadata::METRICS;
use crate::metadata::stack::{FRONT, Stack, is_for};
use crate::poll::{self, Timer};
use crate::virtio::Chain;

/// What became of a frame for the driver.
pub enum Delivery {
    /// It is delivered, or lost.
    Done,
    /// The driver gave too few buffers, or more than the turn's share has room for. More came meanwhile, or
    /// the turn is over.
    Short { more: bool },
}

/// What a pair of queues has to do with the service. Several pairs share the stack: a connection of the guest's may
/// move from one to another.
pub struct Answers {
    stack: Arc<Mutex<Stack>>,
    address: Ipv4Addr,
    /// Goes off when the stack wants to be looked at.
    timer: Option<Timer>,
    /// A frame of the guest's, filled again for each.
    frame: Vec<u8>,
    /// Something has come, or waits for the driver's buffers.
    has_work: bool,
}

impl Answers {
    /// Of a pair that starts. What an earlier one has left is done first.
    pub fn new(stack: &Arc<Mutex<Stack>>) -> Result<Self> {
        let timer = poll::timer("metadata service")?;
        let address = lock(stack).address();
        Ok(Self { stack: stack.clone(), address, timer: Some(timer), frame: Vec::new(), has_work: true })
    }

    /// Goes off when [`Self::wake`] is to be called.
    pub fn timer(&self) -> Option<&Timer> {
        self.timer.as_ref()
    }

    /// The timer has gone off.
    pub fn wake(&mut self) {
        self.has_work = true;
    }

    /// Whether the frame in `chain` is for the service.
    pub fn are_asked_by(&self, chain: &Chain<'_>) -> bool {
        let mut front = [0; header::SIZE + FRONT];
        chain.read_front(&mut front)
            && front[header::SIZE..].first_chunk().is_some_and(|front| is_for(self.address, front))
    }

    /// Gives the frame in `chain`, which is no longer than a frame can be, to the service.
    pub fn take(&mut self, chain: &Chain<'_>) {
        self.frame.resize(chain.readable_length(), 0);
        // The driver may have changed the frame since it was looked at: what makes no sense is lost.
        if chain.read_front(&mut self.frame) {
            lock(&self.stack).take(&self.frame[header::SIZE..], clock::monotonic());
        }
        self.has_work = true;
    }

    /// Delivers the frames of the service by `deliver`, as far as the driver has buffers.
    pub fn deliver(&mut self, mut deliver: impl FnMut(&[u8]) -> Result<Delivery>) -> Result<()> {
        if !self.has_work {
            return Ok(());
        }
        let (mut stack, now) = (lock(&self.stack), clock::monotonic());
        stack.poll(now);
        loop {
            let Some(frame) = stack.frame() else {
                // There is room for more: what waits for acknowledgements of the guest's does not come.
                stack.poll(now);
                if stack.frame().is_none() {
                    self.has_work = false;
                    break;
                }
                continue;
            };
            match deliver(frame)? {
                Delivery::Done => stack.frame_is_delivered(),
                Delivery::Short { more: true } => {}
                Delivery::Short { more: false } => {
                    METRICS.tx_errors.add(1);
                    break;
                }
            }
        }
        let wait = stack.next_poll(now);
        drop(stack);
        set(&mut self.timer, wait)
    }
}

fn lock(stack: &Mutex<Stack>) -> MutexGuard<'_, Stack> {
    stack.lock().unwrap_or_else(PoisonError::into_inner)
}
