//! An interface over a stream of frames (passt): the worker. [`framing`] is what the stream looks like, [`port`]
//! its end here, [`outgoing`] and [`receive`] the two directions, [`cable`] what a restored guest sees of it.

pub mod cable;
pub mod framing;
pub mod outgoing;
pub mod port;
pub mod receive;

use std::sync::{Arc, PoisonError};

use vm_memory::GuestAddressSpace;

use super::TURN;
use super::answers::Answers;
use super::metrics::Metrics;
use super::transmit::Transmitter;
use crate::devices::limit::set;
use crate::error::Result;
use crate::memory::{Memory, Regions};
use crate::poll::{Interest, Timer};
use crate::virtio::{Queue, Registrar, Share, Worker};
use cable::Cable;
use outgoing::Outgoing;
use port::{Home, Port};
use receive::Receiver;

const RX: u32 = 0;
const TX: u32 = 1;
const SOCKET: u32 = 2;
const RX_TIMER: u32 = 3;
const TX_TIMER: u32 = 4;
const ANSWERS_TIMER: u32 = 5;
const CABLE_SEEN: u32 = 6;
const CABLE_TIMER: u32 = 7;

/// The running half.
pub struct Running {
    /// Guest memory.
    pub memory: Memory,
    /// From the stream to the driver.
    pub receiver: Receiver,
    /// From the driver to the stream.
    pub transmitter: Transmitter<Outgoing>,
    /// The stream.
    pub port: Port,
    /// Where the stream goes when the worker stops.
    pub home: Home,
    /// The driver is to see the link go down and come back.
    pub cable: Option<Cable>,
    /// What the interface counts.
    pub metrics: Arc<Metrics>,
    /// Goes off when the limit lets the next received frame pass; none where there is no limit.
    pub rx_timer: Option<Timer>,
    /// The same for sent frames.
    pub tx_timer: Option<Timer>,
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        registrar.kick(&self.receiver.queue, RX)?;
        registrar.kick(&self.transmitter.queue, TX)?;
        for (timer, token) in [(&self.rx_timer, RX_TIMER), (&self.tx_timer, TX_TIMER)] {
            if let Some(timer) = timer {
                registrar.add(timer, Interest::IN | Interest::EDGE_TRIGGERED, token)?;
            }
        }
        if let Some(timer) = self.transmitter.answers.as_ref().and_then(Answers::timer) {
            registrar.add(timer, Interest::IN | Interest::EDGE_TRIGGERED, ANSWERS_TIMER)?;
        }
        if let Some(cable) = &self.cable {
            cable.register(registrar, CABLE_SEEN, CABLE_TIMER)?;
        }
        // Edge-triggered: frames that wait for the driver's buffers, and room that no frame needs, must
        // not keep the loop awake. What is there already is an edge, too.
        let interest = Interest::IN | Interest::OUT | Interest::EDGE_TRIGGERED;
        registrar.add(self.port.stream.passt.stream(), interest, SOCKET)
    }

    fn handle(&mut self, token: u32) -> Result<()> {
        let memory = self.memory.memory();
        match token {
            RX => self.metrics.rx_queue_event_count.add(1),
            TX => self.metrics.tx_queue_event_count.add(1),
            SOCKET => self.metrics.rx_tap_event_count.add(1),
            CABLE_SEEN => self.cable.iter_mut().try_for_each(Cable::seen)?,
            CABLE_TIMER => self.cable.iter().for_each(Cable::put_in),
            _ => {}
        }
        // One for both: what the second one does not get it takes in a turn of its own.
        let mut share = Share::new(2 * TURN as u16);
        if matches!(token, TX | TX_TIMER | SOCKET) {
            self.transmit(&memory, &mut share)?;
        }
        if matches!(token, RX | RX_TIMER | SOCKET) {
            let wait = self.receiver.receive(&memory, &mut self.port, &mut share)?;
            set(&mut self.rx_timer, wait)?;
        }
        if let Some(answers) = &mut self.transmitter.answers {
            if token == ANSWERS_TIMER {
                answers.wake();
            }
            let receiver = &mut self.receiver;
            answers.deliver(|frame| receiver.deliver(&memory, frame, &mut share))?;
        }
        // Once a turn, of both ways.
        self.receiver.queue.notify_both(&mut self.transmitter.queue, &memory)
    }

    fn stop(self: Box<Self>) -> Vec<Queue> {
        let Self { memory, receiver, transmitter, mut port, home, metrics, .. } = *self;
        let Transmitter { queue: mut tx, batch: mut outgoing, limit, .. } = transmitter;
        if let Some(rest) = outgoing.rest_of_first() {
            port.stream.rest = rest;
            if let Some(head) = outgoing.give_up() {
                let memory = memory.memory();
                metrics.tx_count.add(1);
                // A ring that is broken by now is noticed when it is used again.
                let _ = tx.push(&memory, head, 0).and_then(|()| tx.notify(&memory));
            }
        }
        // These go, and what has come is delivered, when there is a worker again: it asks the limits anew.
        while let Some(length) = outgoing.undo() {
            tx.undo_pop();
            limit.refund(length);
        }
        let rx = receiver.stop(&port);
        *home.lock().unwrap_or_else(PoisonError::into_inner) = Some(port.stream);
        vec![rx, tx]
    }
}

impl Running {
    /// Sends frames until there are no more or the stream takes no more, of which it tells when it does again.
    fn transmit(&mut self, memory: &Regions, share: &mut Share) -> Result<()> {
        if !self.port.send_rest() {
            return Ok(());
        }
        let wait = self.transmitter.transmit(memory, &mut self.port, share)?;
        set(&mut self.tx_timer, wait)
    }
}
