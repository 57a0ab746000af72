//! What the guest sends: the packets of a turn, of which each connection's bytes are given to the host's
//! program by one system call. The guest gets the packets back at once, and is interrupted for them later: with
//! what it receives next, which often is an answer.

use std::time::Duration;

use super::mux::Mux;
use super::packet::{HEADER, Header, op};
use crate::error::Result;
use crate::memory::{Memory, Regions};
use crate::poll::{self, Interest, Timer};
use crate::sys::vectors::Room;
use crate::virtio::buffers::Buffers;
use crate::virtio::{Desk, Queue, Share, Watched};

/// Packets of one turn; then other devices of the loop have theirs. As many as the ring has.
pub const PACKETS_PER_TURN: u16 = 256;
/// The guest is interrupted for packets that it got back after this time at the latest. Nothing waits for that but
/// the memory of those packets: Linux sends as long as its ring has room.
const TOLD_AFTER: Duration = Duration::from_millis(5);
/// At once, if they are this part of what the ring holds, each of up to 18 pieces (Linux sends 64 KiB in pages): a ring
/// that is full is told of.
const TOLD_AT_PART: u16 = 32;
/// The token of the timer for that.
pub const OVERDUE: u32 = 5;

/// Bytes of one packet that wait for the turn's end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Packet {
    connection: u32,
    /// Its vectors among all of the turn.
    first: usize,
    end: usize,
}

/// The queue of sent packets.
pub struct Transmitter {
    queue: Queue,
    /// One packet, with its header.
    buffers: Buffers,
    /// The bytes of all packets that wait.
    all: Buffers,
    packets: Vec<Packet>,
    /// Their chains, and those of packets in between.
    heads: Vec<u16>,
    /// Room for the list of the bytes of one connection.
    room: Room,
    /// Of the loop, once there is one.
    desk: Option<Desk>,
    /// The timer that goes off when the guest is to be interrupted for what it has back.
    timer: Option<Watched<Timer>>,
    is_timer_on: bool,
}

impl Transmitter {
    /// Of this queue, in `memory`.
    pub fn new(memory: Memory, queue: Queue) -> Self {
        let capacity = queue.size().into();
        Self {
            queue,
            buffers: Buffers::new(memory.clone()),
            all: Buffers::new(memory),
            packets: Vec::with_capacity(capacity),
            heads: Vec::with_capacity(capacity),
            room: Room::default(),
            desk: None,
            timer: None,
            is_timer_on: false,
        }
    }

    /// Lives on this loop from now on.
    pub fn wake(&mut self, desk: &Desk) {
        self.desk = Some(desk.clone());
    }

    /// Which kicks it waits for.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Interrupts the guest for what it has back; no packet is kept between two turns.
    pub fn stop(mut self, memory: &Regions) -> Queue {
        // An error: the driver has broken its ring, which is told of when the device goes on.
        let _ = self.queue.notify(memory);
        self.queue
    }

    /// The queue, for `Queue::notify_with`.
    pub fn news(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// The timer went off: interrupts the guest for what it has back.
    pub fn tell(&mut self, memory: &Regions) -> Result<()> {
        self.is_timer_on = false;
        self.queue.notify(memory)
    }

    /// Interrupts the guest for what it has back, now or soon.
    fn tell_soon(&mut self, memory: &Regions) -> Result<()> {
        let is_much = self.queue.news() >= self.queue.size() / TOLD_AT_PART;
        if is_much || !self.is_timer_on && self.queue.news() > 0 && !self.set_timer() {
            return self.queue.notify(memory);
        }
        Ok(())
    }

    /// Sets the timer. False: the host has none left.
    fn set_timer(&mut self) -> bool {
        if self.timer.is_none()
            && let Some(desk) = &self.desk
        {
            let new = poll::timer("vsock, what was sent");
            let interest = Interest::IN | Interest::EDGE_TRIGGERED;
            self.timer = new.and_then(|new| desk.watch(new, interest, OVERDUE)).ok();
        }
        self.is_timer_on = self.timer.as_mut().is_some_and(|timer| timer.reset(TOLD_AFTER, None).is_ok());
        self.is_timer_on
    }

    /// Takes the packets that there are.
    pub fn transmit(&mut self, memory: &Regions, mux: &mut Mux) -> Result<()> {
        if !self.queue.begin_turn(memory)? {
            return Ok(());
        }
        let mut share = Share::new(PACKETS_PER_TURN);
        loop {
            while self.take(memory, &mut share, mux)? {}
            self.conclude(memory, mux)?;
            if !self.queue.look_again(memory, &share)? {
                break;
            }
        }
        self.tell_soon(memory)
    }

    /// Takes the next packet; false: there is none, or it is for the next turn.
    fn take(&mut self, memory: &Regions, share: &mut Share, mux: &mut Mux) -> Result<bool> {
        let Some(chain) = self.queue.pop(memory, share)? else { return Ok(false) };
        self.heads.push(chain.head());
        self.buffers.clear();
        self.buffers.add_readable(chain)?;
        mux.metrics.tx_packets_count.add(1);
        let mut header = [0; HEADER];
        if !self.buffers.read_front(&mut header) {
            mux.metrics.tx_malformed_packets.add(1);
            return Ok(true);
        }
        let mut header = Header::from_bytes(&header);
        // A packet that says that it has more than it has makes a hole in its stream: as one of an operation
        // that there is not, it ends its connection.
        let has_bytes = header.op == op::RW;
        if has_bytes && header.len as usize > self.buffers.len() {
            mux.metrics.tx_malformed_packets.add(1);
            (header.op, header.len) = (0, 0);
        }
        if header.op != op::RW && header.op != op::CREDIT_UPDATE {
            // What was sent before has arrived before.
            self.give(mux)?;
        }
        if let Some(connection) = mux.hear(&header)? {
            let first = self.all.count();
            self.all.add_front(&self.buffers, header.len as usize);
            self.packets.push(Packet { connection, first, end: self.all.count() });
        }
        Ok(true)
    }

    /// Gives the programs of the host what waits for them, and all chains back.
    fn conclude(&mut self, memory: &Regions, mux: &mut Mux) -> Result<()> {
        self.give(mux)?;
        for head in self.heads.drain(..) {
            self.queue.push(memory, head, 0)?;
        }
        Ok(())
    }

    fn give(&mut self, mux: &mut Mux) -> Result<()> {
        if self.packets.is_empty() {
            return Ok(());
        }
        // Those of one connection after each other, in their order.
        if !self.packets.is_sorted() {
            self.packets.sort_unstable();
        }
        for packets in self.packets.chunk_by(|one, other| one.connection == other.connection) {
            let mut list = self.room.gather();
            for packet in packets {
                list.add(self.all.vectors().range(packet.first..packet.end), 0, usize::MAX);
            }
            mux.forward(packets[0].connection, &mut list)?;
        }
        self.packets.clear();
        self.all.clear();
        Ok(())
    }
}
