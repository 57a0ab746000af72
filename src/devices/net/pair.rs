//! A pair of queues over a TAP: the worker. Frames go between the TAP and guest memory without a copy of
//! ours.

use std::sync::Arc;

use vm_memory::GuestAddressSpace;

use super::header;
use super::status::Status;
use crate::error::{Error, Result};
use crate::event::Interest;
use crate::host::tap::Tap;
use crate::memory::{Memory, Regions};
use crate::virtio::buffers::Buffers;
use crate::virtio::{Interrupts, Queue, Registrar, Worker};

const RX: u32 = 0;
const TX: u32 = 1;
const TAP: u32 = 2;
const LINK: u32 = 3;

/// The largest frame with its header that a TAP gives: 64 KiB of segments and an Ethernet header.
const FRAME_MAX: usize = header::SIZE + 14 + 65536;
/// Frames moved in one turn; then other devices of the loop have theirs.
const TURN: usize = 256;

/// The running half.
pub struct Running {
    memory: Memory,
    rx: Queue,
    tx: Queue,
    tap: Tap,
    status: Arc<Status>,
    interrupts: Arc<Interrupts>,
    mergeable: bool,
    /// Of one frame, filled again for each.
    buffers: Buffers,
    /// Heads and lengths of the chains that a frame was read into, and of those it used.
    chains: Vec<(u16, usize)>,
    used: Vec<(u16, usize)>,
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        registrar.kick(&self.rx, RX)?;
        registrar.kick(&self.tx, TX)?;
        if let Some(link) = &self.status.watch {
            registrar.add(link, Interest::IN, LINK)?;
            // It may have changed while nobody listened.
            self.look_at_link();
        }
        // Edge-triggered: frames that wait for the driver's buffers must not keep the loop awake; the
        // kick that brings buffers looks again.
        registrar.add(&self.tap, Interest::IN | Interest::EDGE_TRIGGERED, TAP)
    }

    fn handle(&mut self, token: u32) -> Result<()> {
        let memory = self.memory.memory();
        match token {
            TX => {
                let (tap, buffers) = (&self.tap, &mut self.buffers);
                self.tx.serve(&memory, |chain| {
                    buffers.clear();
                    buffers.add_readable(chain)?;
                    send(tap, buffers);
                    Ok(0)
                })
            }
            LINK => {
                self.look_at_link();
                Ok(())
            }
            _ => self.receive(&memory),
        }
    }

    fn stop(self: Box<Self>) -> Vec<Queue> {
        vec![self.rx, self.tx]
    }
}

impl Running {
    /// Between these queues and this TAP.
    pub fn new(
        memory: Memory,
        [rx, tx]: [Queue; 2],
        mergeable: bool,
        tap: Tap,
        status: Arc<Status>,
        interrupts: Arc<Interrupts>,
    ) -> Self {
        let buffers = Buffers::new(memory.clone());
        let (chains, used) = (Vec::new(), Vec::new());
        Self { memory, rx, tx, tap, status, interrupts, mergeable, buffers, chains, used }
    }

    fn look_at_link(&self) {
        if self.status.refresh(&self.tap) {
            self.interrupts.configuration_changed();
        }
    }

    /// Moves frames until the TAP is empty or the driver has no more buffers.
    fn receive(&mut self, memory: &Regions) -> Result<()> {
        if !self.rx.is_ready() {
            return Ok(());
        }
        self.rx.disable_kicks(memory)?;
        let mut moved = 0;
        loop {
            match self.receive_frame(memory)? {
                Received::Frame if moved < TURN => moved += 1,
                Received::Frame => {
                    self.rx.kick_again();
                    break;
                }
                Received::NoFrame => break,
                Received::NoBuffers => {
                    if !self.rx.enable_kicks(memory)? {
                        break;
                    }
                    self.rx.disable_kicks(memory)?;
                }
            }
        }
        self.rx.notify(memory)
    }

    /// Reads one frame into as many of the driver's buffers as the largest could need, and gives
    /// back those that it did not.
    fn receive_frame(&mut self, memory: &Regions) -> Result<Received> {
        let Self { buffers, chains, used, .. } = self;
        buffers.clear();
        chains.clear();
        used.clear();
        while buffers.len() < FRAME_MAX && (self.mergeable || chains.is_empty()) {
            let Some(chain) = self.rx.pop(memory)? else { break };
            let head = chain.head_index();
            chains.push((head, buffers.add_writable(chain)?));
        }
        // The header must be in one piece for `num_buffers` to be found again.
        let first = chains.first().map_or(0, |(_, length)| *length);
        if chains.is_empty() {
            return Ok(Received::NoBuffers);
        }
        if first < header::SIZE {
            return Err(Error::guest("the driver gave a receive buffer too small for a header"));
        }
        let Ok(mut left) = buffers.read_frame(&self.tap) else {
            // Empty, or down: there is no frame.
            chains.iter().for_each(|_| self.rx.undo_pop());
            return Ok(Received::NoFrame);
        };
        for (head, length) in chains.iter() {
            if left == 0 {
                self.rx.undo_pop();
            } else {
                let here = left.min(*length);
                used.push((*head, here));
                left -= here;
            }
        }
        buffers.copy_from(header::NUM_BUFFERS, &(used.len() as u16).to_le_bytes());
        for (head, length) in used.iter() {
            self.rx.push(memory, *head, *length as u32)?;
        }
        Ok(Received::Frame)
    }
}

enum Received {
    Frame,
    NoFrame,
    NoBuffers,
}

/// A frame that the TAP does not take is lost, as on a wire: it is down, or the driver's header is wrong.
fn send(tap: &Tap, frame: &Buffers) {
    if frame.len() >= header::SIZE {
        let _ = frame.write_frame(tap);
    }
}
