//! The running half: three queues, the listening socket, and the streams of all connections, on one loop.

use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::GuestAddressSpace;

use super::host::TIMER;
use super::mux::{FIRST_TOKEN, Mux, Told};
use super::receive::{Receiver, Turn};
use super::transmit::{OVERDUE, Transmitter};
use crate::error::{Error, Result};
use crate::memory::{Memory, Regions};
use crate::poll::Interest;
use crate::virtio::buffers::Buffers;
use crate::virtio::{Queue, Registrar, Share, Worker};

const RX: u32 = 0;
const TX: u32 = 1;
const EVENT: u32 = 2;
const LISTENER: u32 = 3;
/// What tells that a program of the host sends no more.
const ENDS: Interest = Interest::READ_HANG_UP.union(Interest::HANG_UP).union(Interest::ERROR);
/// struct virtio_vsock_event of VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (virtio 1.2, 5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// Where the connections are while no worker has them.
pub type Home = Arc<Mutex<Option<Box<Mux>>>>;

/// The worker.
pub struct Running {
    memory: Memory,
    receiver: Receiver,
    transmitter: Transmitter,
    events: EventQueue,
    mux: Box<Mux>,
    home: Home,
}

impl Running {
    /// Takes the connections from their home.
    pub fn new(memory: &Memory, [rx, tx, event]: [Queue; 3], home: &Home) -> Result<Self> {
        let mux = home.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(Self {
            memory: memory.clone(),
            receiver: Receiver::new(memory.clone(), rx),
            transmitter: Transmitter::new(memory.clone(), tx),
            events: EventQueue { queue: event, buffers: Buffers::new(memory.clone()), taken: 0 },
            mux: mux.ok_or_else(|| Error::host("an earlier worker still has the connections"))?,
            home: home.clone(),
        })
    }
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        registrar.kick(self.receiver.queue(), RX)?;
        registrar.kick(self.transmitter.queue(), TX)?;
        registrar.kick(&self.events.queue, EVENT)?;
        // Edge-triggered: clients that no limit lets in must not keep the loop awake.
        registrar.add(&self.mux.listener, Interest::IN | Interest::EDGE_TRIGGERED, LISTENER)?;
        let desk = registrar.desk().clone();
        self.transmitter.wake(&desk);
        self.mux.wake(&desk)
    }

    fn handle(&mut self, token: u32) -> Result<()> {
        self.handle_ready(token, Interest::empty())
    }

    fn handle_ready(&mut self, token: u32, ready: Interest) -> Result<()> {
        let memory = self.memory.memory();
        let mux = &mut *self.mux;
        match token {
            RX => {
                mux.metrics.rx_queue_event_count.add(1);
                self.receiver.look(&memory)?;
            }
            TX => {
                mux.metrics.tx_queue_event_count.add(1);
                self.transmitter.transmit(&memory, mux)?;
            }
            EVENT => self.events.tell(&memory, mux)?,
            LISTENER => mux.may_accept = true,
            TIMER => mux.ask_again()?,
            OVERDUE => self.transmitter.tell(&memory)?,
            _ => match (token.wrapping_sub(FIRST_TOKEN) / 2, token % 2) {
                (index, 0) => mux.ready(index, ready.intersects(ENDS))?,
                (index, _) => mux.connected(index)?,
            },
        }
        if mux.may_accept {
            mux.accept()?;
        }
        let turn = self.receiver.deliver(&memory, mux, self.transmitter.news())?;
        if turn == Turn::More || mux.may_accept {
            self.receiver.queue().kick_again();
        }
        Ok(())
    }

    fn stop(self: Box<Self>) -> Vec<Queue> {
        let Self { memory, receiver, transmitter, events, mut mux, home } = *self;
        mux.rest();
        let transmitter = transmitter.stop(&memory.memory());
        *home.lock().unwrap_or_else(PoisonError::into_inner) = Some(mux);
        vec![receiver.stop(), transmitter, events.stop()]
    }
}

/// The queue by which the guest is told that all its connections are gone.
struct EventQueue {
    queue: Queue,
    buffers: Buffers,
    /// Buffers taken from the queue and not used.
    taken: usize,
}

impl EventQueue {
    /// Tells the guest, and finds out whether it has heard. A driver gives a buffer back to the queue once it has
    /// handled the event that was in it: what it gets before that is for connections that it is about to reset.
    fn tell(&mut self, memory: &Regions, mux: &mut Mux) -> Result<()> {
        if !self.queue.begin_turn(memory)? {
            return Ok(());
        }
        let mut share = Share::new(self.queue.size());
        loop {
            let mut event = None;
            while let Some(chain) = self.queue.pop(memory, &mut share)? {
                let head = chain.head();
                self.buffers.clear();
                if self.buffers.add_writable(chain)? < TRANSPORT_RESET.len() {
                    return Err(Error::guest("the driver gave an event buffer too small for an event"));
                }
                if mux.told == Told::Owed && event.is_none() {
                    self.buffers.copy_from(0, &TRANSPORT_RESET);
                    event = Some(head);
                } else {
                    self.taken += 1;
                }
                if self.taken > self.queue.size().into() {
                    return Err(Error::guest("the driver gave more event buffers than its ring holds"));
                }
            }
            if let Some(head) = event {
                self.queue.push(memory, head, TRANSPORT_RESET.len() as u32)?;
                mux.told = Told::Sent(self.taken);
            }
            if matches!(mux.told, Told::Sent(before) if self.taken > before) {
                mux.told = Told::Nothing;
            }
            if mux.told == Told::Nothing {
                self.give_back();
                break;
            }
            // Every buffer there was is taken: a driver that gives one back kicks.
            if !self.queue.look_again(memory, &share)? {
                break;
            }
        }
        self.queue.notify(memory)
    }

    fn give_back(&mut self) {
        (0..std::mem::take(&mut self.taken)).for_each(|_| self.queue.undo_pop());
    }

    fn stop(mut self) -> Queue {
        self.give_back();
        self.queue
    }
}
