//! Streams of the host's programs, as the device reads and writes them: many pieces of memory by one system
//! call, which never waits.

use std::io::{Error as IoError, ErrorKind, Result as IoResult};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use super::backlog::{Backlog, Blocks};
use crate::sys::{descriptor, network};
use crate::virtio::buffers::{Buffers, VECTORS_MAX};
use crate::virtio::pool::Pool;

/// Memory for system calls, in its order.
///
/// Invariant: every vector lies in guest memory, as those of `Buffers` and `Pool` do, or in a block of a
/// backlog that is not given back before the next [`Vectors::clear`].
#[derive(Default)]
pub struct Vectors {
    all: Vec<libc::iovec>,
    /// Vectors before this one are done with.
    first: usize,
    length: usize,
}

// SAFETY: the pointers are to guest memory, which others change at any time anyway, or to blocks on the heap
// that move with their owner, who has the vectors, too.
#[allow(unsafe_code)]
unsafe impl Send for Vectors {}

impl Vectors {
    /// Nothing again.
    pub fn clear(&mut self) {
        self.all.clear();
        (self.first, self.length) = (0, 0);
    }

    /// How many bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// How many vectors.
    pub fn count(&self) -> usize {
        self.all.len() - self.first
    }

    /// Appends the first `most` bytes of a request, and returns how many bytes there are of these.
    pub fn add_buffers(&mut self, buffers: &Buffers, most: usize) -> usize {
        self.add(buffers.vectors(), 0, most)
    }

    /// Appends at most `most` bytes of an entry of a pool, whose vectors these are, after `skip` bytes of it.
    pub fn add_entry(&mut self, pool: &Pool, vectors: Range<usize>, skip: usize, most: usize) -> usize {
        self.add(&pool.vectors()[vectors], skip, most)
    }

    fn add(&mut self, vectors: &[libc::iovec], mut skip: usize, most: usize) -> usize {
        let before = self.length;
        for vector in vectors {
            let here = skip.min(vector.iov_len);
            skip -= here;
            let length = (vector.iov_len - here).min(most - (self.length - before));
            if length > 0 {
                let iov_base = vector.iov_base.wrapping_byte_add(here);
                self.all.push(libc::iovec { iov_base, iov_len: length });
                self.length += length;
            }
        }
        self.length - before
    }

    /// Appends what `other` has in this range of its vectors.
    pub fn add_range(&mut self, other: &Self, range: Range<usize>) {
        for vector in &other.all[range] {
            self.all.push(*vector);
            self.length += vector.iov_len;
        }
    }

    /// Appends what is kept, as much of it as one system call takes.
    pub fn add_backlog(&mut self, backlog: &Backlog, blocks: &mut Blocks) {
        backlog.pieces(blocks, |piece| {
            self.all.push(libc::iovec { iov_base: piece.as_mut_ptr().cast(), iov_len: piece.len() });
            self.length += piece.len();
            self.all.len() < VECTORS_MAX
        });
    }

    /// Takes the first `count` bytes away, which must be there.
    fn advance(&mut self, count: usize) {
        self.length -= count;
        let mut left = count;
        while left > 0 {
            let vector = &mut self.all[self.first];
            let here = left.min(vector.iov_len);
            vector.iov_base = vector.iov_base.wrapping_byte_add(here);
            vector.iov_len -= here;
            left -= here;
            self.first += usize::from(vector.iov_len == 0);
        }
    }

    /// Writes as much as the reader has room for now; what was written is taken away. Returns how many bytes
    /// that is, and how many system calls it took.
    #[allow(unsafe_code)]
    pub fn write(&mut self, stream: &UnixStream) -> (IoResult<usize>, u64) {
        let (before, mut calls) = (self.length, 0);
        while self.length > 0 {
            let vectors = &mut self.all[self.first..];
            let count = vectors.len().min(VECTORS_MAX);
            let asked: usize = vectors[..count].iter().map(|vector| vector.iov_len).sum();
            let message = message(vectors.as_mut_ptr(), count);
            let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
            calls += 1;
            // SAFETY: the vectors are valid (see `Vectors`); the call reads them.
            let sent = unsafe { libc::sendmsg(stream.as_raw_fd(), &raw const message, flags) };
            match usize::try_from(sent) {
                Ok(sent) => {
                    self.advance(sent);
                    if sent < asked {
                        break;
                    }
                }
                Err(_) => match IoError::last_os_error() {
                    error if error.kind() == ErrorKind::Interrupted => {}
                    error if error.kind() == ErrorKind::WouldBlock => break,
                    error => return (Err(error), calls),
                },
            }
        }
        (Ok(before - self.length), calls)
    }

    /// Fills the vectors, as far as there are bytes, by one system call. Returns how many bytes there were; 0:
    /// the end. True: there may be more, though they are not full: bytes of a client that sent a descriptor
    /// along (which is closed) are not read together with those after them.
    #[allow(unsafe_code)]
    pub fn read(&mut self, stream: &UnixStream) -> IoResult<(usize, bool)> {
        let vectors = &mut self.all[self.first..];
        let count = vectors.len().min(VECTORS_MAX);
        let mut message = message(vectors.as_mut_ptr(), count);
        // SAFETY: the vectors are valid (see `Vectors`); the call writes to them.
        let received = unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        let received = usize::try_from(received).map_err(|_| IoError::last_os_error())?;
        Ok((received, received == self.length || message.msg_flags & libc::MSG_CTRUNC != 0))
    }

    /// Keeps what is here at the end of a backlog; false: there is no memory for all of it.
    #[allow(unsafe_code)]
    pub fn keep(&mut self, backlog: &mut Backlog, blocks: &mut Blocks) -> bool {
        while self.length > 0 {
            let vector = self.all[self.first];
            let Some(room) = backlog.room(blocks, vector.iov_len) else { return false };
            let count = room.len();
            // SAFETY: the vector lies in guest memory (see `Vectors`), the room is ours and not longer.
            unsafe { std::ptr::copy_nonoverlapping(vector.iov_base.cast(), room.as_mut_ptr(), count) };
            self.advance(count);
        }
        true
    }
}

#[allow(unsafe_code)]
fn message(vectors: *mut libc::iovec, count: usize) -> libc::msghdr {
    // SAFETY: `msghdr` is plain data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors;
    message.msg_iovlen = count as _;
    message
}

/// Whether whoever had the other end has closed it, both ways.
pub fn is_gone(stream: &UnixStream) -> bool {
    descriptor::poll(stream, 0, 0) & (libc::POLLHUP | libc::POLLERR) != 0
}

/// Looks at what there is to read, at most as much as `bytes` holds, and leaves it.
pub fn peek(stream: &UnixStream, bytes: &mut [u8]) -> IoResult<usize> {
    network::receive(stream, bytes, libc::MSG_PEEK | libc::MSG_DONTWAIT)
}
