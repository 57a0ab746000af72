//! An interface over a stream of frames (passt): the worker.

use std::io::{ErrorKind, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vm_memory::GuestAddressSpace;
use vmm_sys_util::timerfd::TimerFd;

use super::TURN;
use super::framing::Decoder;
use super::header;
use super::metrics::Metrics;
use super::outgoing::Outgoing;
use super::status::Status;
use crate::devices::limit::{Limit, set};
use crate::error::{Error, Result};
use crate::event::Interest;
use crate::host::passt::Passt;
use crate::log;
use crate::memory::{Memory, Regions};
use crate::virtio::buffers::Buffers;
use crate::virtio::queue::DESCRIPTORS_PER_TURN;
use crate::virtio::{Interrupts, Queue, Registrar, Share, Worker};

const RX: u32 = 0;
const TX: u32 = 1;
const SOCKET: u32 = 2;
const RX_TIMER: u32 = 3;
const TX_TIMER: u32 = 4;

/// Reads of the stream in one turn: one that gives byte after byte never comes to an end.
const READS: usize = 256;
/// A frame that finds no room in buffers of so many descriptors is lost: they are taken in one turn.
const DESCRIPTORS_MAX: usize = DESCRIPTORS_PER_TURN as usize / 2;

/// A stream, with what is half read and half written of it.
pub struct Stream {
    passt: Passt,
    decoder: Decoder,
    /// Of a frame that had begun when the worker was stopped.
    rest: Vec<u8>,
    ended: bool,
}

impl Stream {
    /// To a passt just started.
    pub fn new(passt: Passt) -> Self {
        Self { passt, decoder: Decoder::default(), rest: Vec::new(), ended: false }
    }
}

/// What became of a frame for the driver.
enum Delivery {
    /// It is delivered, or lost.
    Done,
    /// The driver gave too few buffers, or more than the turn's share has room for. More came meanwhile, or
    /// the turn is over.
    Short { more: bool },
}

/// Where the stream is while no worker has it.
pub type Home = Arc<Mutex<Option<Stream>>>;

/// The running half.
pub struct Running {
    name: String,
    metrics: Arc<Metrics>,
    memory: Memory,
    rx: Queue,
    tx: Queue,
    mergeable: bool,
    stream: Stream,
    home: Home,
    status: Arc<Status>,
    interrupts: Arc<Interrupts>,
    /// Of one received frame, filled again for each.
    buffers: Buffers,
    /// Heads and lengths of their chains.
    chains: Vec<(u16, usize)>,
    outgoing: Outgoing,
    rx_limit: Limit,
    tx_limit: Limit,
    rx_timer: Option<TimerFd>,
    tx_timer: Option<TimerFd>,
    /// The limit has let the next frame through.
    is_paid: bool,
}

impl Running {
    /// Takes the stream from its home; `name` is the interface's.
    pub fn new(
        (name, metrics): (String, Arc<Metrics>),
        memory: &Memory,
        [rx, tx]: [Queue; 2],
        mergeable: bool,
        home: &Home,
        (status, interrupts): (Arc<Status>, Arc<Interrupts>),
        [rx_limit, tx_limit]: [Limit; 2],
    ) -> Result<Self> {
        let (rx_timer, tx_timer) = (rx_limit.timer()?, tx_limit.timer()?);
        let stream = home.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(Self {
            name,
            metrics,
            memory: memory.clone(),
            rx,
            tx,
            mergeable,
            stream: stream.ok_or_else(|| Error::host("an earlier worker still has passt's stream"))?,
            home: home.clone(),
            status,
            interrupts,
            buffers: Buffers::new(memory.clone()),
            chains: Vec::new(),
            outgoing: Outgoing::new(memory.clone()),
            rx_limit,
            tx_limit,
            rx_timer,
            tx_timer,
            is_paid: false,
        })
    }
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        registrar.kick(&self.rx, RX)?;
        registrar.kick(&self.tx, TX)?;
        for (timer, token) in [(&self.rx_timer, RX_TIMER), (&self.tx_timer, TX_TIMER)] {
            if let Some(timer) = timer {
                registrar.add(timer, Interest::IN | Interest::EDGE_TRIGGERED, token)?;
            }
        }
        // Edge-triggered: frames that wait for the driver's buffers, and room that no frame needs, must
        // not keep the loop awake. What is there already is an edge, too.
        let interest = Interest::IN | Interest::OUT | Interest::EDGE_TRIGGERED;
        registrar.add(self.stream.passt.stream(), interest, SOCKET)
    }

    fn handle(&mut self, token: u32) -> Result<()> {
        let memory = self.memory.memory();
        match token {
            RX => self.metrics.rx_queue_event_count.add(1),
            TX => self.metrics.tx_queue_event_count.add(1),
            SOCKET => self.metrics.rx_tap_event_count.add(1),
            _ => {}
        }
        // One for both: what the second one does not get it takes in a turn of its own.
        let mut share = Share::new(2 * TURN as u16);
        if matches!(token, TX | TX_TIMER | SOCKET) {
            self.transmit(&memory, &mut share)?;
        }
        if matches!(token, RX | RX_TIMER | SOCKET) {
            self.receive(&memory, &mut share)?;
        }
        // Once a turn, of both ways.
        self.rx.notify_both(&mut self.tx, &memory)
    }

    fn stop(mut self: Box<Self>) -> Vec<Queue> {
        let memory = self.memory.memory();
        if let Some(rest) = self.outgoing.rest_of_first() {
            self.stream.rest = rest;
            if let Some(head) = self.outgoing.give_up() {
                self.metrics.tx_count.add(1);
                // A ring that is broken by now is noticed when it is used again.
                let _ = self.tx.push(&memory, head, 0).and_then(|()| self.tx.notify(&memory));
            }
        }
        // These go, and what has come is delivered, when there is a worker again: it asks the limits anew.
        while let Some(length) = self.outgoing.undo() {
            self.tx.undo_pop();
            self.tx_limit.refund(length);
        }
        if self.is_paid
            && let Ok(Some(frame)) = self.stream.decoder.frame()
        {
            self.rx_limit.refund(frame.len());
        }
        let Self { rx, tx, stream, home, .. } = *self;
        *home.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
        vec![rx, tx]
    }
}

impl Running {
    /// Moves frames until the stream is empty or the driver has no more buffers.
    fn receive(&mut self, memory: &Regions, share: &mut Share) -> Result<()> {
        if !self.rx.begin_turn(memory)? {
            return Ok(());
        }
        let (mut moved, mut reads) = (0, 0);
        loop {
            let Ok(is_there) = self.stream.decoder.frame().map(|frame| frame.is_some()) else {
                self.end();
                break;
            };
            if !is_there {
                if reads == READS {
                    self.rx.kick_again();
                    break;
                }
                reads += 1;
                if self.read_ahead() {
                    continue;
                }
                break;
            }
            if !self.is_paid
                && let Ok(Some(frame)) = self.stream.decoder.frame()
                && let Err(wait) = self.rx_limit.take(frame.len())
            {
                set(&mut self.rx_timer, Some(wait))?;
                self.metrics.rx_rate_limiter_throttled.add(1);
                break;
            }
            // It may have to wait for buffers, and is not counted again then.
            self.is_paid = true;
            match self.deliver(memory, share)? {
                Delivery::Done => {
                    self.is_paid = false;
                    moved += 1;
                    if moved == TURN {
                        self.rx.kick_again();
                        break;
                    }
                }
                Delivery::Short { more } => {
                    self.metrics.no_rx_avail_buffer.add(u64::from(!share.is_used_up()));
                    if !more {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads what there is; false: there is nothing, or there will never be again.
    fn read_ahead(&mut self) -> bool {
        if self.stream.ended {
            return false;
        }
        self.metrics.rx_call_count.add(1);
        match self.stream.passt.stream().read(self.stream.decoder.room()) {
            Ok(0) => self.end(),
            Ok(count) => {
                self.stream.decoder.filled(count);
                return true;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => return true,
            Err(_) => self.end(),
        }
        false
    }

    /// Copies the next frame to the driver's buffers.
    fn deliver(&mut self, memory: &Regions, share: &mut Share) -> Result<Delivery> {
        let Self { buffers, chains, rx, stream, mergeable, metrics, .. } = self;
        let Ok(Some(frame)) = stream.decoder.frame() else { return Ok(Delivery::Done) };
        let needed = header::SIZE + frame.len();
        buffers.clear();
        chains.clear();
        let mut descriptors = 0;
        while buffers.len() < needed
            && (*mergeable || chains.is_empty())
            && descriptors < DESCRIPTORS_MAX
            && let Some(chain) = rx.pop(memory, share)?
        {
            descriptors += chain.pieces().len();
            chains.push((chain.head(), buffers.add_writable(chain)?));
        }
        if chains.first().is_some_and(|(_, first)| *first < header::SIZE) {
            return Err(Error::guest("the driver gave a receive buffer too small for a header"));
        }
        if buffers.len() < needed {
            // More may come; but what would not even fit all of its buffers is lost.
            let is_all = chains.len() >= usize::from(rx.size()) || descriptors >= DESCRIPTORS_MAX;
            let never = is_all || !*mergeable && !chains.is_empty();
            // The driver is asked before its buffers are given back: after that, the same ones would be news,
            // and this would look at them again and again.
            let more = !never && rx.look_again(memory, share)?;
            chains.iter().for_each(|_| rx.undo_pop());
            if !never {
                return Ok(Delivery::Short { more });
            }
            metrics.rx_fails.add(1);
            stream.decoder.done();
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
            rx.push(memory, *head, here as u32)?;
            left -= here;
        }
        stream.decoder.done();
        Ok(Delivery::Done)
    }

    /// Sends frames until there are no more or the stream takes no more; it tells when it does again.
    fn transmit(&mut self, memory: &Regions, share: &mut Share) -> Result<()> {
        if !self.send_rest() || !self.tx.begin_turn(memory)? {
            return Ok(());
        }
        loop {
            if self.outgoing.is_empty() {
                let wait = self.gather(memory, share)?;
                set(&mut self.tx_timer, wait)?;
                if self.outgoing.is_empty() {
                    if wait.is_some() || !self.tx.look_again(memory, share)? {
                        break;
                    }
                    continue;
                }
            }
            let is_blocked = !self.send();
            while let Some((head, length)) = self.outgoing.done() {
                self.metrics.tx_packets_count.add(1);
                self.metrics.tx_bytes_count.add(length as u64);
                self.metrics.tx_count.add(1);
                self.tx.push(memory, head, 0)?;
            }
            while self.stream.ended
                && let Some(head) = self.outgoing.give_up()
            {
                self.metrics.tx_fails.add(1);
                self.metrics.tx_count.add(1);
                self.tx.push(memory, head, 0)?;
            }
            if is_blocked && !self.stream.ended {
                break;
            }
        }
        Ok(())
    }

    /// Takes a batch of the driver's frames; or how long the next one must wait.
    fn gather(&mut self, memory: &Regions, share: &mut Share) -> Result<Option<Duration>> {
        self.outgoing.clear();
        while self.outgoing.has_room()
            && let Some(chain) = self.tx.pop(memory, share)?
        {
            let Some(length) = Outgoing::length(&chain) else {
                if !self.outgoing.is_empty() {
                    // Looked at again when those before it have gone: what goes back unsent are always
                    // the last.
                    self.tx.undo_pop();
                    break;
                }
                let head = chain.head();
                self.metrics.tx_malformed_frames.add(1);
                self.metrics.tx_count.add(1);
                self.tx.push(memory, head, 0)?;
                continue;
            };
            if let Err(wait) = self.tx_limit.take(length) {
                self.tx.undo_pop();
                self.metrics.tx_rate_limiter_throttled.add(1);
                return Ok(Some(wait));
            }
            self.outgoing.add(chain)?;
        }
        Ok(None)
    }

    /// False: the stream takes no more now.
    fn send(&mut self) -> bool {
        if self.stream.ended {
            return false;
        }
        self.metrics.tx_call_count.add(1);
        match self.outgoing.send(self.stream.passt.stream()) {
            Ok(()) => true,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => false,
            Err(_) => {
                self.end();
                false
            }
        }
    }

    /// Sends what is left of a frame that an earlier worker began; false: not all of it.
    fn send_rest(&mut self) -> bool {
        while !self.stream.rest.is_empty() && !self.stream.ended {
            match self.stream.passt.stream().write(&self.stream.rest) {
                Ok(count) => drop(self.stream.rest.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.end(),
            }
        }
        true
    }

    /// The stream is of no more use: the guest's link is down, and it goes on without.
    fn end(&mut self) {
        if std::mem::replace(&mut self.stream.ended, true) {
            return;
        }
        let why = match self.stream.decoder.frame() {
            Err(error) => error.to_string(),
            Ok(_) => "it ended".to_owned(),
        };
        let words = self.stream.passt.last_words();
        let colon = if words.is_empty() { "" } else { ": " };
        log::line(format_args!(
            "network interface `{}` has no link any more: passt: {why}{colon}{words}",
            self.name
        ));
        if self.status.set_down() {
            self.interrupts.configuration_changed();
        }
    }
}
