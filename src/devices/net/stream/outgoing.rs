//! Frames on their way into a stream: many in one system call, from guest memory, without a copy of ours.

use std::collections::VecDeque;
use std::io::{Error as IoError, ErrorKind, Result as IoResult};
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;

use super::framing::{FRAME_MAX, FRAME_MIN, PREFIX, prefix};
use super::port::Port;
use crate::devices::net::header;
use crate::devices::net::metrics::Metrics;
use crate::devices::net::transmit::{Batch, Done};
use crate::error::Result;
use crate::memory::Memory;
use crate::virtio::Chain;
use crate::virtio::buffers::Buffers;

/// Frames of one batch.
pub const BATCH: usize = 64;
/// Their vectors, as many as the kernel takes at once (IOV_MAX).
const VECTORS: usize = libc::UIO_MAXIOV as usize;

/// A frame of the batch: the chain it came in, and how much of it is still to go.
struct Frame {
    head: u16,
    /// With its prefix.
    length: usize,
    left: usize,
}

/// A batch of frames.
pub struct Outgoing {
    frames: VecDeque<Frame>,
    prefixes: Box<[[u8; PREFIX]; BATCH]>,
    buffers: Buffers,
    /// What is still to go: prefixes and guest memory in turn.
    vectors: Vec<libc::iovec>,
    first: usize,
    /// The stream has ended: what is left never goes.
    is_lost: bool,
}

// SAFETY: the vectors point into the prefixes, which are on the heap, and into guest memory, as those
// of `Buffers` do.
#[allow(unsafe_code)]
unsafe impl Send for Outgoing {}

impl Outgoing {
    /// An empty batch of frames in `memory`.
    pub fn new(memory: Memory) -> Self {
        Self {
            frames: VecDeque::with_capacity(BATCH),
            prefixes: Box::new([[0; PREFIX]; BATCH]),
            buffers: Buffers::new(memory),
            vectors: Vec::with_capacity(VECTORS),
            first: 0,
            is_lost: false,
        }
    }
    /// Sends as much as the other side takes now.
    #[allow(unsafe_code)]
    fn write_to(&mut self, socket: &impl AsRawFd) -> IoResult<()> {
        while self.first < self.vectors.len() {
            let vectors = &mut self.vectors[self.first..];
            // SAFETY: `msghdr` is plain data.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = vectors.as_mut_ptr();
            message.msg_iovlen = vectors.len().min(VECTORS) as _;
            let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
            // SAFETY: the vectors are valid (see `Send` above); the call reads them.
            let count = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) };
            match usize::try_from(count) {
                Ok(count) => self.went(count),
                Err(_) => match IoError::last_os_error() {
                    error if error.kind() == ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }

    fn went(&mut self, count: usize) {
        let mut rest = count;
        while let Some(vector) = self.vectors.get_mut(self.first).filter(|_| rest > 0) {
            let here = rest.min(vector.iov_len);
            vector.iov_base = vector.iov_base.wrapping_byte_add(here);
            vector.iov_len -= here;
            rest -= here;
            self.first += usize::from(vector.iov_len == 0);
        }
        let mut rest = count;
        for frame in &mut self.frames {
            let here = rest.min(frame.left);
            frame.left -= here;
            rest -= here;
        }
    }

    /// Takes the first frame away, if it is done with.
    fn take_done(&mut self) -> Option<Done> {
        let is_lost = self.is_lost;
        let Some(frame) = self.frames.pop_front_if(|frame| frame.left == 0 || is_lost) else {
            if self.frames.is_empty() {
                self.vectors.clear();
                self.buffers.clear();
                self.first = 0;
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
    #[allow(unsafe_code)]
    pub fn rest_of_first(&self) -> Option<Vec<u8>> {
        let frame = self.frames.front().filter(|frame| frame.left < frame.length)?;
        let mut bytes = Vec::with_capacity(frame.left);
        for vector in &self.vectors[self.first..] {
            let here = vector.iov_len.min(frame.left - bytes.len());
            let start = bytes.len();
            bytes.resize(start + here, 0);
            // SAFETY: the vector is valid (see `Send` above), the bytes are ours and as many.
            unsafe {
                std::ptr::copy_nonoverlapping(vector.iov_base.cast(), bytes[start..].as_mut_ptr(), here)
            };
        }
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
        self.frames.len() < BATCH && self.vectors.len() < VECTORS / 2
    }

    fn add(&mut self, chain: Chain<'_>) -> Result<()> {
        let (head, before) = (chain.head(), self.buffers.vectors().len());
        let length = self.buffers.add_readable(chain)? - header::SIZE;
        let place = &mut self.prefixes[self.frames.len()];
        *place = prefix(length);
        self.vectors.push(libc::iovec { iov_base: place.as_mut_ptr().cast(), iov_len: PREFIX });
        // The header for offloads, of which a stream has none, stays behind.
        let mut skip = header::SIZE;
        for vector in &self.buffers.vectors()[before..] {
            let here = skip.min(vector.iov_len);
            skip -= here;
            if vector.iov_len > here {
                self.vectors.push(libc::iovec {
                    iov_base: vector.iov_base.wrapping_byte_add(here),
                    iov_len: vector.iov_len - here,
                });
            }
        }
        let length = PREFIX + length;
        self.frames.push_back(Frame { head, length, left: length });
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
