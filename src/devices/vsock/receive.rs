//! What the guest receives: packets in the buffers that it gives, which are kept until there is something for
//! them, so that one system call fills as many as there are.

use super::connection::{Connection, Saying};
use super::mux::{Mux, Next};
use super::packet::{HEADER, Header, op};
use super::socket;
use crate::error::{Error, Result};
use crate::memory::{Memory, Regions};
use crate::sys::vectors::{Room, VECTORS_MAX};
use crate::virtio::pool::Pool;
use crate::virtio::{Queue, Share};

/// Packets of one turn; then other devices of the loop have theirs. As many as the ring has buffers.
pub const PACKETS_PER_TURN: usize = 256;

/// The queue of received packets, and the buffers taken from it.
pub struct Receiver {
    queue: Queue,
    pool: Pool,
    /// Entries of the pool before this one are used, and their vectors.
    entry: usize,
    vector: usize,
    /// Room for the list of a system call.
    room: Room,
}

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// All is delivered that can be.
    Done,
    /// There is more to do, in another turn.
    More,
}

impl Receiver {
    /// None of its buffers taken yet.
    pub fn new(memory: Memory, queue: Queue) -> Self {
        let chains = queue.size().into();
        Self { queue, pool: Pool::new(memory, chains), entry: 0, vector: 0, room: Room::default() }
    }

    /// Which kicks it waits for.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Gives the buffers back that were not used.
    pub fn stop(mut self) -> Queue {
        (self.entry..self.pool.entries().len()).for_each(|_| self.queue.undo_pop());
        self.queue
    }

    /// Takes the buffers that the driver gives, for what comes.
    pub fn look(&mut self, memory: &Regions) -> Result<()> {
        match self.queue.is_ready() {
            true => self.take_buffers(memory, &mut Share::new(self.queue.size())),
            false => Ok(()),
        }
    }

    /// Sends the guest what there is for it, as far as it gives buffers. Who is interrupted for that learns at the
    /// same time of what was pushed to `other`.
    pub fn deliver(&mut self, memory: &Regions, mux: &mut Mux, other: &mut Queue) -> Result<Turn> {
        if !mux.has_something() || !self.queue.begin_turn(memory)? {
            return Ok(Turn::Done);
        }
        let mut share = Share::new(self.queue.size());
        let mut packets = 0;
        let turn = loop {
            if !mux.has_something() {
                break Turn::Done;
            }
            if packets >= PACKETS_PER_TURN {
                break Turn::More;
            }
            self.take_buffers(memory, &mut share)?;
            if self.is_empty() {
                // Kicks are of use only to who has no buffer left.
                match self.queue.look_again(memory, &share)? {
                    true => continue,
                    false => break Turn::Done,
                }
            }
            match mux.next() {
                Some(Next::Refusal(header)) => {
                    self.send(memory, mux, &header, 0)?;
                    packets += 1;
                }
                Some(Next::Of(index)) => packets += self.serve(memory, mux, index)?,
                None => break Turn::Done,
            }
        };
        self.queue.notify_with(other, memory)?;
        Ok(turn)
    }

    fn is_empty(&self) -> bool {
        self.entry == self.pool.entries().len()
    }

    /// Takes what buffers the driver has given since.
    fn take_buffers(&mut self, memory: &Regions, share: &mut Share) -> Result<()> {
        if self.is_empty() {
            self.pool.clear();
            (self.entry, self.vector) = (0, 0);
        } else if self.entry >= usize::from(self.queue.size()) {
            // Those that were used would be kept as long as there is always another one.
            self.pool.remove_used();
            (self.entry, self.vector) = (0, 0);
        }
        while let Some(chain) = self.queue.pop(memory, share)? {
            let length = self.pool.add_writable(chain)?;
            if length <= HEADER {
                return Err(Error::guest(format!(
                    "the driver gave a receive buffer of {length} bytes, which has no room for a packet"
                )));
            }
            if self.pool.entries().len() - self.entry > self.queue.size().into() {
                // One after the other, the same again and again: what is kept of them would have no end.
                return Err(Error::guest("the driver gave more receive buffers than its ring holds"));
            }
        }
        Ok(())
    }

    /// Sends one thing that a connection has for the guest; it is queued again if it has more. Returns how many
    /// packets that was.
    fn serve(&mut self, memory: &Regions, mux: &mut Mux, index: u32) -> Result<usize> {
        let packets = match mux.get(index).and_then(Connection::say) {
            None => return Ok(0),
            Some(Saying::Bytes) => self.read(memory, mux, index)?,
            Some(Saying::Packet(op, flags)) => {
                if let Some(header) = mux.header(index, op, flags) {
                    self.send(memory, mux, &header, 0)?;
                }
                if op == op::RST {
                    mux.remove(index);
                }
                1
            }
        };
        if mux.get(index).is_some_and(|connection| connection.has_something()) {
            mux.queue(index);
        }
        Ok(packets)
    }

    /// Reads bytes of the host's program into as many buffers as there are, and sends them.
    fn read(&mut self, memory: &Regions, mux: &mut Mux, index: u32) -> Result<usize> {
        let Some((connection, _, metrics)) = mux.split(index) else { return Ok(0) };
        let Some(stream) = &connection.stream else {
            connection.may_read = false;
            return Ok(0);
        };
        let mut list = self.room.scatter();
        let (credit, mut vector) = (connection.flow.credit() as usize, self.vector);
        for entry in self.entry..self.pool.entries().len() {
            let count = self.pool.count_vectors(entry..entry + 1);
            if list.len() == credit || list.count() + count > VECTORS_MAX {
                break;
            }
            let left = credit - list.len();
            list.add(self.pool.vectors().range(vector..vector + count), HEADER, left);
            vector += count;
        }
        metrics.rx_call_count.add(1);
        let (count, may_be_more) = match socket::read(&mut list, stream) {
            Ok((0, _)) => {
                connection.host_ended = true;
                mux.look_whether_gone(index);
                return Ok(0);
            }
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => return Ok(0),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                connection.may_read = false;
                return Ok(0);
            }
            Err(_) => {
                metrics.rx_read_fails.add(1);
                mux.lose(index);
                return Ok(0);
            }
        };
        connection.may_read = may_be_more || connection.host_is_ending;
        connection.flow.send(count as u32);
        metrics.rx_bytes_count.add(count as u64);
        let (mut left, mut packets) = (count, 0);
        while left > 0 {
            let here = left.min(self.pool.entries()[self.entry].length - HEADER);
            if let Some(header) = mux.header(index, op::RW, 0) {
                self.send(memory, mux, &header, here)?;
            }
            left -= here;
            packets += 1;
        }
        Ok(packets)
    }

    /// Sends a packet whose `length` bytes are in the next buffer already.
    fn send(&mut self, memory: &Regions, mux: &Mux, header: &Header, length: usize) -> Result<()> {
        let header = Header { len: length as u32, ..*header };
        let entry = self.pool.entries()[self.entry];
        self.pool.copy_from(self.vector, 0, &header.to_bytes());
        self.pool.mark_dirty(self.vector, HEADER + length);
        self.queue.push(memory, entry.head, (HEADER + length) as u32)?;
        self.vector += self.pool.count_vectors(self.entry..self.entry + 1);
        self.pool.set_used(self.entry);
        self.entry += 1;
        mux.metrics.rx_packets_count.add(1);
        Ok(())
    }
}
