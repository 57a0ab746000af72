//! Lists of pieces of memory as the kernel takes them (`struct iovec`), and the calls that read and write by them. What a
//! list names is lent to it: a list does not outlive it.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Result;
use std::marker::PhantomData;
use std::mem::zeroed;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicU8;

use super::check_count;

/// The number of vectors that the kernel takes at once (IOV_MAX).
pub const VECTORS_MAX: usize = libc::UIO_MAXIOV as usize;

/// Pieces of memory that others change at any time, as they do that of a guest.
#[derive(Clone, Copy)]
pub struct Vectors<'m> {
    all: &'m [libc::iovec],
}

impl<'m> Vectors<'m> {
    /// The pieces that these vectors name.
    ///
    /// # Safety
    /// The pieces stay mapped, to be read and written, for as long as the vectors are borrowed, and nobody has a reference
    /// into them.
    pub unsafe fn new(all: &'m [libc::iovec]) -> Self {
        Self { all }
    }

    /// How many pieces.
    pub fn count(self) -> usize {
        self.all.len()
    }

    /// Those of a range.
    pub fn range(self, range: Range<usize>) -> Self {
        Self { all: &self.all[range] }
    }

    /// The vectors themselves.
    pub fn raw(self) -> &'m [libc::iovec] {
        self.all
    }

    /// Reads into these by one call (readv(2)).
    ///
    /// # Errors
    /// The kernel's; EINVAL: there are more than [`VECTORS_MAX`].
    pub fn read(self, file: &impl AsRawFd) -> Result<usize> {
        // SAFETY: the pieces can be written for as long as this lives (see `new`).
        check_count(unsafe { libc::readv(file.as_raw_fd(), self.all.as_ptr(), self.all.len() as i32) })
    }

    /// Writes these by one call (writev(2)).
    ///
    /// # Errors
    /// The kernel's; EINVAL: there are more than [`VECTORS_MAX`].
    pub fn write(self, file: &impl AsRawFd) -> Result<usize> {
        // SAFETY: the pieces can be read for as long as this lives (see `new`).
        check_count(unsafe { libc::writev(file.as_raw_fd(), self.all.as_ptr(), self.all.len() as i32) })
    }

    /// Reads into these from byte `offset` of a file on (preadv(2)).
    ///
    /// # Errors
    /// As of [`Self::read`].
    pub fn read_at(self, file: &File, offset: u64) -> Result<usize> {
        let (vectors, count) = (self.all.as_ptr(), self.all.len() as i32);
        // SAFETY: the pieces can be written for as long as this lives (see `new`).
        check_count(unsafe { libc::preadv64(file.as_raw_fd(), vectors, count, offset as i64) })
    }

    /// Writes these from byte `offset` of a file on (pwritev(2)).
    ///
    /// # Errors
    /// As of [`Self::write`].
    pub fn write_at(self, file: &File, offset: u64) -> Result<usize> {
        let (vectors, count) = (self.all.as_ptr(), self.all.len() as i32);
        // SAFETY: the pieces can be read for as long as this lives (see `new`).
        check_count(unsafe { libc::pwritev64(file.as_raw_fd(), vectors, count, offset as i64) })
    }

    /// Copies the bytes out, as far as there is room.
    pub fn copy_to(self, bytes: &mut [u8]) {
        let mut rest = bytes;
        for vector in self.all {
            let (here, after) = rest.split_at_mut(vector.iov_len.min(rest.len()));
            // SAFETY: the piece can be read for as long as this lives (see `new`); the slice is the caller's, and not
            // longer.
            unsafe { std::ptr::copy_nonoverlapping(vector.iov_base.cast(), here.as_mut_ptr(), here.len()) };
            rest = after;
        }
    }
}

/// Room for a list, used again and again: once it is large enough, nothing is allocated any more.
#[derive(Default)]
pub struct Room {
    all: Vec<libc::iovec>,
}

// SAFETY: what a list has left here is forgotten before there is another one: nobody uses its pointers.
unsafe impl Send for Room {}

impl Room {
    /// An empty list of what is to be written.
    pub fn gather<'m>(&'m mut self) -> Gather<'m> {
        Gather(self.list())
    }

    /// An empty list of places to be read into.
    pub fn scatter<'m>(&'m mut self) -> Scatter<'m> {
        Scatter(self.list())
    }

    fn list<'m>(&'m mut self) -> List<'m> {
        self.all.clear();
        List { all: &mut self.all, first: 0, length: 0, lent: PhantomData }
    }
}

struct List<'m> {
    all: &'m mut Vec<libc::iovec>,
    /// Vectors before this one are done with.
    first: usize,
    /// How many bytes the others have.
    length: usize,
    lent: PhantomData<&'m [u8]>,
}

impl<'m> List<'m> {
    fn left(&self) -> &[libc::iovec] {
        &self.all[self.first..]
    }

    /// Appends at most `most` bytes of `vectors` after the first `skip` of these, and returns how many bytes that were.
    fn add(&mut self, vectors: Vectors<'m>, mut skip: usize, most: usize) -> usize {
        let before = self.length;
        for vector in vectors.all {
            let here = skip.min(vector.iov_len);
            skip -= here;
            let length = (vector.iov_len - here).min(most - (self.length - before));
            if length > 0 {
                self.push(vector.iov_base.wrapping_byte_add(here), length);
            }
        }
        self.length - before
    }

    fn push(&mut self, iov_base: *mut libc::c_void, length: usize) {
        self.all.push(libc::iovec { iov_base, iov_len: length });
        self.length += length;
    }

    /// The header of a message (sendmsg(2), recvmsg(2)) on these pieces, as many of them as the kernel takes.
    fn message(&mut self) -> libc::msghdr {
        let vectors = &mut self.all[self.first..];
        // SAFETY: `msghdr` is plain data of which zeros are valid.
        let mut message: libc::msghdr = unsafe { zeroed() };
        message.msg_iov = vectors.as_mut_ptr();
        message.msg_iovlen = vectors.len().min(VECTORS_MAX) as _;
        message
    }
}

/// Pieces of memory that are to be written, in their order.
pub struct Gather<'m>(List<'m>);

impl<'m> Gather<'m> {
    /// How many bytes are left.
    pub fn len(&self) -> usize {
        self.0.length
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.length == 0
    }

    /// How many pieces are left.
    pub fn count(&self) -> usize {
        self.0.left().len()
    }

    /// Appends at most `most` bytes of `vectors` after the first `skip` of these, and returns how many bytes that were.
    pub fn add(&mut self, vectors: Vectors<'m>, skip: usize, most: usize) -> usize {
        self.0.add(vectors, skip, most)
    }

    /// Appends bytes of ours.
    pub fn add_bytes(&mut self, bytes: &'m [u8]) {
        if !bytes.is_empty() {
            self.0.push(bytes.as_ptr().cast_mut().cast(), bytes.len());
        }
    }

    /// Sends as much as the reader has room for now, by one call that does not wait (sendmsg(2)), and takes that away.
    /// Returns how many bytes went, and whether that is all that one call takes.
    ///
    /// # Errors
    /// There is no room (EAGAIN), or the other end has broken off.
    pub fn send(&mut self, socket: &impl AsRawFd) -> Result<(usize, bool)> {
        let message = self.0.message();
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the pieces can be read for as long as this lives; `add_bytes` has some that cannot be written, and the
        // call only reads.
        let sent = check_count(unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) })?;
        let before = self.0.first;
        self.advance(sent);
        Ok((sent, self.is_empty() || self.0.first - before == VECTORS_MAX))
    }

    /// Moves the first bytes, as many as `bytes` has and as there are, to it.
    pub fn take_front(&mut self, bytes: &mut [u8]) {
        // This only reads: there may be pieces that cannot be written.
        Vectors { all: self.0.left() }.copy_to(bytes);
        self.advance(bytes.len());
    }

    /// Takes the first `count` bytes away, or all.
    fn advance(&mut self, count: usize) {
        let List { all, first, length, .. } = &mut self.0;
        let mut left = count.min(*length);
        *length -= left;
        while left > 0 {
            let vector = &mut all[*first];
            let here = left.min(vector.iov_len);
            vector.iov_base = vector.iov_base.wrapping_byte_add(here);
            vector.iov_len -= here;
            left -= here;
            *first += usize::from(vector.iov_len == 0);
        }
    }
}

/// Pieces of memory that are to be read into, in their order.
pub struct Scatter<'m>(List<'m>);

impl<'m> Scatter<'m> {
    /// How many bytes.
    pub fn len(&self) -> usize {
        self.0.length
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.0.length == 0
    }

    /// How many pieces.
    pub fn count(&self) -> usize {
        self.0.all.len()
    }

    /// Appends at most `most` bytes of `vectors` after the first `skip` of these, and returns how many bytes that were.
    pub fn add(&mut self, vectors: Vectors<'m>, skip: usize, most: usize) -> usize {
        self.0.add(vectors, skip, most)
    }

    /// Appends a byte of ours.
    pub fn add_byte(&mut self, byte: &'m AtomicU8) {
        self.0.push(byte.as_ptr().cast(), 1);
    }

    /// The pieces.
    pub fn vectors(&self) -> Vectors<'_> {
        Vectors { all: self.0.left() }
    }

    /// Fills these, as far as there are bytes, by one call that does not wait (recvmsg(2)). Returns how many bytes there
    /// were, 0 at the end, and whether something that was sent along had no room (MSG_CTRUNC).
    ///
    /// # Errors
    /// There is nothing (EAGAIN), or the other end has broken off.
    pub fn receive(&mut self, socket: &impl AsRawFd) -> Result<(usize, bool)> {
        let mut message = self.0.message();
        // SAFETY: the pieces can be written for as long as this lives: those of `Vectors`, and atomic bytes.
        let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        check_count(received).map(|received| (received, message.msg_flags & libc::MSG_CTRUNC != 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn what_a_socket_does_not_take_is_left_of_a_list() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let bytes: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
        let (mut room, mut got) = (Room::default(), Vec::new());
        let mut list = room.gather();
        bytes.chunks(97).for_each(|chunk| list.add_bytes(chunk));
        assert_eq!((list.len(), list.count()), (1 << 20, (1_usize << 20).div_ceil(97)));
        // The kernel takes so many vectors by one call.
        let whole = 97 * VECTORS_MAX;
        assert_eq!(list.send(&ours).unwrap(), (whole, true));
        let mut sent = whole;
        let mut is_all = true;
        while is_all {
            let count;
            (count, is_all) = list.send(&ours).unwrap();
            sent += count;
        }
        assert_eq!(list.len(), bytes.len() - sent);
        let mut rest = vec![0; list.len()];
        list.take_front(&mut rest);
        assert!(list.is_empty() && rest == bytes[sent..]);
        let beyond = AtomicU8::new(0);
        while got.len() < sent {
            let mut place = [0_u8; 1000];
            let vector = [libc::iovec { iov_base: place.as_mut_ptr().cast(), iov_len: place.len() }];
            let mut list = room.scatter();
            // SAFETY: the place is there until the list is gone, and is looked at only after that.
            assert_eq!(list.add(unsafe { Vectors::new(&vector) }, 100, 800), 800);
            list.add_byte(&beyond);
            assert_eq!((list.len(), list.count()), (801, 2));
            let (count, is_cut) = list.receive(&theirs).unwrap();
            assert!(!is_cut);
            got.extend(&place[100..100 + count.min(800)]);
            got.extend((count == 801).then(|| beyond.load(std::sync::atomic::Ordering::SeqCst)));
            assert!(place[..100] == [0; 100] && place[900..] == [0; 100]);
        }
        assert!(got == bytes[..sent]);
    }
}
