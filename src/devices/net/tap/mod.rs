//! A pair of queues over a queue of a TAP: the worker. [`port`] is the TAP's queue, [`outgoing`] and [`receive`]
//! the two directions.

pub mod outgoing;
pub mod port;
pub mod receive;

use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::GuestAddressSpace;

use super::TURN;
use super::answers::Answers;
use super::metrics::Metrics;
use super::status::Status;
use super::transmit::Transmitter;
use crate::devices::limit::set;
use crate::error::Result;
use crate::memory::{Memory, Regions};
use crate::poll::{Interest, Timer};
use crate::virtio::pool::Unfilled;
use crate::virtio::{Interrupts, Queue, Registrar, Share, Switch, Worker};
use outgoing::Outgoing;
use port::Port;
use receive::{Left, Received, Receiver};

const RX: u32 = 0;
const TX: u32 = 1;
const TAP: u32 = 2;
const LINK: u32 = 3;
const RX_TIMER: u32 = 4;
const TX_TIMER: u32 = 5;
const ANSWERS_TIMER: u32 = 6;

/// Where a pair's receive buffers are kept that no frame has filled, while no worker has them.
pub type Home = Arc<Mutex<Vec<Unfilled>>>;

/// The running half.
pub struct Running {
    /// Guest memory.
    pub memory: Memory,
    /// From the TAP to the driver.
    pub receiver: Receiver,
    /// From the driver to the TAP.
    pub transmitter: Transmitter<Outgoing>,
    /// The TAP's queue.
    pub port: Port,
    /// Frames wait to be read. None: not yet registered.
    pub tap_events: Option<Switch>,
    /// What is sent is answered at once, as far as is known: the TAP has had frames since it was last found
    /// empty after that.
    pub is_answered: bool,
    /// The interface's link, if this is the pair that looks after it.
    pub link: Option<(Arc<Status>, Arc<Interrupts>)>,
    /// For the receiver's buffers.
    pub home: Home,
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
        let edge = Interest::IN | Interest::EDGE_TRIGGERED;
        for (timer, token) in [(&self.rx_timer, RX_TIMER), (&self.tx_timer, TX_TIMER)] {
            if let Some(timer) = timer {
                registrar.add(timer, edge, token)?;
            }
        }
        if let Some(timer) = self.transmitter.answers.as_ref().and_then(Answers::timer) {
            registrar.add(timer, edge, ANSWERS_TIMER)?;
        }
        if let Some((status, _)) = &self.link
            && let Some(watch) = &status.watch
        {
            registrar.add(watch, Interest::IN, LINK)?;
            // It may have changed while nobody listened.
            self.look_at_link();
        }
        // Edge-triggered: frames that wait for the driver's buffers must not keep the loop awake; the
        // kick that brings buffers looks again.
        self.tap_events = Some(registrar.add_switched(self.port.tap(), edge, TAP)?);
        Ok(())
    }

    fn handle(&mut self, token: u32) -> Result<()> {
        let memory = self.memory.memory();
        match token {
            RX => self.metrics.rx_queue_event_count.add(1),
            TX => self.metrics.tx_queue_event_count.add(1),
            TAP => {
                self.metrics.rx_tap_event_count.add(1);
                self.is_answered = true;
            }
            _ => {}
        }
        match token {
            TX | TX_TIMER => self.exchange(&memory)?,
            LINK => self.look_at_link(),
            ANSWERS_TIMER => self.transmitter.answers.iter_mut().for_each(Answers::wake),
            _ => drop(self.receive(&memory, Share::new(u16::MAX))?),
        }
        if let Some(answers) = &mut self.transmitter.answers {
            let mut share = Share::new(TURN as u16);
            answers.deliver(|frame| self.receiver.deliver_frame(&memory, frame, &mut share))?;
        }
        // Once a turn, of both ways: of a frame that has gone and of the answer to it by one interrupt.
        self.receiver.queue.notify_both(&mut self.transmitter.queue, &memory)
    }

    fn stop(self: Box<Self>) -> Vec<Queue> {
        let Self { memory, receiver, transmitter, home, .. } = *self;
        let (rx, unfilled) = receiver.stop(&memory.memory());
        *home.lock().unwrap_or_else(PoisonError::into_inner) = unfilled;
        vec![rx, transmitter.queue]
    }
}

impl Running {
    /// Sends, and takes the answers to that at once: those of a TCP on this host are there as soon as the TAP
    /// has taken the frames, and would be another turn with an interrupt of its own.
    fn exchange(&mut self, memory: &Regions) -> Result<()> {
        let mut share = Share::new(TURN as u16);
        let wait = self.transmitter.transmit(memory, &mut self.port, &mut share)?;
        set(&mut self.tx_timer, wait)?;
        if self.is_answered && !share.is_used_up() {
            self.is_answered = self.receive(memory, share.rest())? > 0;
        }
        Ok(())
    }

    /// Returns how many frames were read.
    fn receive(&mut self, memory: &Regions, share: Share) -> Result<usize> {
        let Received { frames, left, wait } = self.receiver.receive(memory, &mut self.port, share)?;
        if let Some(events) = &mut self.tap_events
            && left != Left::Some
        {
            // Frames that keep coming while there is no room for them are no news.
            events.set(left == Left::Nothing)?;
        }
        set(&mut self.rx_timer, wait)?;
        Ok(frames)
    }

    fn look_at_link(&self) {
        if let Some((status, interrupts)) = &self.link
            && status.refresh(self.port.tap())
        {
            interrupts.configuration_changed();
        }
    }
}
