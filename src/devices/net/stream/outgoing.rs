//! Frames on their way into a stream: many in one system call, from guest memory, without a copy of ours.

use std::collections::VecDeque;
use std::io::{ErrorKind, Result as IoResult};
use std::ops::{Range, RangeInclusive};
use std::os::fd::AsRawFd;

use super::framing::{FRAME_MAX, FRAME_MIN, PREFIX, prefix};
use super::port::Port;
use crate::devices::net::header;
use crate::devices::net::metrics::Metrics;
use crate::devices::net::transmit::{Batch, Done};
use crate::error::Result;
use crate::memory::Memory;
use crate::sys::vectors::{Gather, Room, VECTORS_MAX, Vectors};
use crate::virtio::Chain;
use crate::virtio::buffers::Buffers;

/// Frames of one batch.
pub const BATCH: usize = 64;
/// A batch of so many vectors takes no further frame: one system call is to do for all that it has.
const VECTORS: usize = VECTORS_MAX / 2;

/// A frame of the batch: the chain it came in, and how much of it is still to go.
struct Frame {
    head: u16,
    prefix: [u8; PREFIX],
    /// The vectors of the chain: a header for offloads, of which a stream has none and which stays behind, and the frame.
    vectors: Range<usize>,
    /// With its prefix.
    length: usize,
    left: usize,
}

impl Frame {
    /// Appends what is still to go of it.
    fn add_left<'m>(&'m self, chains: Vectors<'m>, list: &mut Gather<'m>) {
        if self.left > 0 {
            let gone = self.length - self.left;
            list.add_bytes(&self.prefix[gone.min(PREFIX)..]);
            let skip = header::SIZE + gone.saturating_sub(PREFIX);
            list.add(chains.range(self.vectors.clone()), skip, usize::MAX);
        }
    }
}

/// A batch of frames.
pub struct Outgoing {
    frames: VecDeque<Frame>,
    buffers: Buffers,
    /// Room for the list of a system call: prefixes and guest memory in turn.
    room: Room,
    /// The stream has ended: what is left never goes.
    is_lost: bool,
}

impl Outgoing {
    /// An empty batch of frames in `memory`.
    pub fn new(memory: Memory) -> Self {
        let frames = VecDeque::with_capacity(BATCH);
        Self { frames, buffers: Buffers::new(memory), room: Room::default(), is_lost: false }
    }

    /// Sends as much as the other side takes now.
    fn write_to(&mut self, socket: &impl AsRawFd) -> IoResult<()> {
        let mut list = self.room.gather();
        self.frames.iter().for_each(|frame| frame.add_left(self.buffers.vectors(), &mut list));
        let before = list.len();
        let result = loop {
            if list.is_empty() {
                break Ok(());
            }
            match list.send(socket) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        let mut rest = before - list.len();
        for frame in &mut self.frames {
            let here = rest.min(frame.left);
            frame.left -= here;
            rest -= here;
        }
        result
    }

    /// Takes the first frame away, if it is done with.
    fn take_done(&mut self) -> Option<Done> {
        let is_lost = self.is_lost;
        let Some(frame) = self.frames.pop_front_if(|frame| frame.left == 0 || is_lost) else {
            if self.frames.is_empty() {
                self.buffers.clear();
            }
            return None;
        };
        Some(Done { head: frame.head, sent: (frame.left == 0).then_some(frame.length - PREFIX) })
    }

    /// Takes away a frame that will never go, or that `rest` has now what is still to go of.
    pub fn give_up(&mut self) -> Option<u16> {
        self.frames.pop_front().map(|frame| frame.head)
    }

    /// If the first frame has begun: what is still to go of it, for the frames' sake that come after.
    pub fn rest_of_first(&mut self) -> Option<Vec<u8>> {
        let frame = self.frames.front().filter(|frame| frame.left < frame.length)?;
        let mut list = self.room.gather();
        frame.add_left(self.buffers.vectors(), &mut list);
        let mut bytes = vec![0; list.len()];
        list.take_front(&mut bytes);
        Some(bytes)
    }

    /// Takes away the last frame, which has not begun; its length.
    pub fn undo(&mut self) -> Option<usize> {
        self.frames.pop_back().map(|frame| frame.length - PREFIX)
    }
}

impl Batch for Outgoing {
    type Port = Port;
    const LENGTHS: RangeInclusive<usize> = header::SIZE + FRAME_MIN..=header::SIZE + FRAME_MAX;

    fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    fn has_room(&self) -> bool {
        self.frames.len() < BATCH && self.frames.len() + self.buffers.count() < VECTORS
    }

    fn add(&mut self, chain: Chain<'_>) -> Result<()> {
        let (head, before) = (chain.head(), self.buffers.count());
        let length = self.buffers.add_readable(chain)? - header::SIZE;
        let (prefix, vectors, length) = (prefix(length), before..self.buffers.count(), PREFIX + length);
        self.frames.push_back(Frame { head, prefix, vectors, length, left: length });
        Ok(())
    }

    fn send(&mut self, port: &mut Port, metrics: &Metrics) -> bool {
        if !port.has_ended() {
            metrics.tx_call_count.add(1);
            match self.write_to(port.stream.passt.stream()) {
                Ok(()) => return true,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Err(_) => port.end(),
            }
        }
        self.is_lost = true;
        true
    }

    fn next_done(&mut self, _: &Port) -> Option<Done> {
        self.take_done()
    }
}

#[cfg(test)]
mod tests {
    use super::super::framing::Decoder;
    use super::*;
    use crate::memory::{Range, allocate};
    use crate::virtio::chain::Piece;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    /// A frame with its header, in pieces that end where they like.
    fn put(memory: &Memory, at: u64, seed: u8, length: usize) -> Vec<Piece> {
        let bytes = [&[0xee; header::SIZE][..], &vec![seed; length]].concat();
        memory.memory().write_slice(&bytes, GuestAddress(at)).unwrap();
        let cuts = [0, 5, 13, 20, bytes.len()].map(|cut: usize| cut.min(bytes.len()));
        let piece = |cut: &[usize]| Piece {
            address: GuestAddress(at + cut[0] as u64),
            length: (cut[1] - cut[0]) as u32,
            is_writable: false,
        };
        cuts.windows(2).map(piece).collect()
    }

    #[test]
    fn frames_go_whole_and_in_order_through_a_stream_that_takes_little_at_a_time() {
        let memory = allocate(&[Range { start: 0, size: 8 << 20 }]).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let lengths = [60, 14, FRAME_MAX, 1514, FRAME_MAX, 100];
        let regions = memory.memory();
        let mut outgoing = Outgoing::new(memory.clone());
        for (index, length) in lengths.into_iter().enumerate() {
            let pieces = put(&memory, 0x20_0000 + 0x2_0000 * index as u64, index as u8, length);
            let chain = Chain::new(index as u16, &regions, &pieces);
            assert!(Outgoing::LENGTHS.contains(&chain.readable_length()), "{length} bytes");
            outgoing.add(chain).unwrap();
        }
        for length in [0, 13, FRAME_MAX + 1] {
            let pieces = put(&memory, 0x50_0000, 0, length);
            let chain = Chain::new(0, &regions, &pieces);
            assert!(!Outgoing::LENGTHS.contains(&chain.readable_length()), "{length} bytes");
        }
        let (mut decoder, mut frames, mut sent) = (Decoder::default(), Vec::new(), 0);
        while frames.len() < lengths.len() {
            // A socket holds less than all of them.
            let blocked = outgoing.write_to(&ours);
            while outgoing.take_done().is_some() {
                sent += 1;
            }
            assert_eq!(blocked.is_ok(), outgoing.is_empty());
            let room = decoder.room();
            let length = room.len().min(5000);
            let count = theirs.read(&mut room[..length]).unwrap();
            decoder.filled(count);
            while let Some(frame) = decoder.frame().unwrap() {
                frames.push((frame[0], frame.len()));
                assert!(frame.iter().all(|byte| *byte == frame[0]));
                decoder.done();
            }
        }
        let expected: Vec<_> =
            lengths.iter().enumerate().map(|(index, length)| (index as u8, *length)).collect();
        assert_eq!((frames, sent), (expected, lengths.len()));
    }

    #[test]
    fn what_is_left_of_a_frame_is_all_that_is_missing() {
        let memory = allocate(&[Range { start: 0, size: 8 << 20 }]).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let regions = memory.memory();
        let mut outgoing = Outgoing::new(memory.clone());
        for index in 0..8 {
            let pieces = put(&memory, 0x20_0000 + 0x2_0000 * index, index as u8, FRAME_MAX);
            outgoing.add(Chain::new(index as u16, &regions, &pieces)).unwrap();
        }
        assert!(outgoing.write_to(&ours).is_err(), "a socket holds half a megabyte");
        let mut complete = 0;
        while outgoing.take_done().is_some() {
            complete += 1;
        }
        let rest = outgoing.rest_of_first();
        let begun = usize::from(rest.is_some());
        let mut stream =
            vec![0; (complete + begun) * (PREFIX + FRAME_MAX) - rest.as_ref().map_or(0, Vec::len)];
        theirs.read_exact(&mut stream).unwrap();
        stream.extend(rest.unwrap_or_default());
        for (index, frame) in stream.chunks(PREFIX + FRAME_MAX).enumerate() {
            assert_eq!(frame[..PREFIX], prefix(FRAME_MAX));
            assert!(frame[PREFIX..].iter().all(|byte| *byte == index as u8), "{index}");
        }
    }
}
