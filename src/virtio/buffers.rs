//! The memory of requests: what a device reads or writes, as vectors that the kernel takes. A worker
//! keeps its buffers and fills them again for every request: once they are large enough, nothing is
//! allocated any more.

use std::fs::File;
use std::io::{ErrorKind, IoSliceMut};
use std::ptr::NonNull;

use smallvec::SmallVec;
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, Permissions,
};

use super::chain::{Chain, Piece};
use crate::error::{Error, Result};
use crate::memory::{self, Memory, Region, Regions};
use crate::sys::vectors::{VECTORS_MAX, Vectors};

/// Pieces of guest memory, in the order of their descriptors.
///
/// Invariant: every vector lies in a region of `memory`, which is mapped for as long as this lives: while the devices of a
/// machine run, regions are added to it, and of those that are taken away (`memory/slots.rs`), the mappings stay.
pub struct Buffers {
    memory: Memory,
    /// Most requests have one.
    vectors: SmallVec<[libc::iovec; 1]>,
    /// Vectors before this one are taken away.
    first: u32,
    length: usize,
}

// SAFETY: the pointers are to memory that is shared with the guest anyway; all accesses to it are as
// to memory that others change at any time.
#[allow(unsafe_code)]
unsafe impl Send for Buffers {}

/// One byte of guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Byte {
    pointer: NonNull<u8>,
}

// SAFETY: as for `Buffers`.
#[allow(unsafe_code)]
unsafe impl Send for Byte {}

impl Buffers {
    /// Nothing yet, of `memory`.
    pub fn new(memory: Memory) -> Self {
        Self { memory, vectors: SmallVec::new(), first: 0, length: 0 }
    }

    /// Makes room for so many vectors.
    pub fn reserve(&mut self, vectors: usize) {
        self.vectors.reserve(vectors);
    }

    /// Nothing again.
    pub fn clear(&mut self) {
        self.vectors.clear();
        (self.first, self.length) = (0, 0);
    }

    /// Fills `readable` with what the device may read of a request, and `writable` with what it may write.
    pub fn split(chain: Chain<'_>, readable: &mut Self, writable: &mut Self) -> Result<()> {
        readable.clear();
        writable.clear();
        for piece in chain.pieces() {
            if piece.is_writable { &mut *writable } else { &mut *readable }.add(chain.memory(), piece)?;
        }
        Ok(())
    }

    /// Appends what the device may write of a request, and returns how much that is.
    pub fn add_writable(&mut self, chain: Chain<'_>) -> Result<usize> {
        self.add_all(chain, true)
    }

    /// Appends what the device may read of a request, and returns how much that is.
    pub fn add_readable(&mut self, chain: Chain<'_>) -> Result<usize> {
        self.add_all(chain, false)
    }

    fn add_all(&mut self, chain: Chain<'_>, is_writable: bool) -> Result<usize> {
        let before = self.length;
        for piece in chain.pieces().iter().filter(|piece| piece.is_writable == is_writable) {
            self.add(chain.memory(), piece)?;
        }
        Ok(self.length - before)
    }

    fn add(&mut self, memory: &Regions, piece: &Piece) -> Result<()> {
        let Piece { address, length, is_writable } = *piece;
        let access = if is_writable { Permissions::Write } else { Permissions::Read };
        let outside = |error| Error::guest(format!("the driver gave a buffer at {:#x}: {error}", address.0));
        for slice in GuestMemory::get_slices(memory, address, length as usize, access).map_err(outside)? {
            let slice = slice.map_err(outside)?;
            if !slice.is_empty() {
                let pointer = slice.ptr_guard_mut().as_ptr().cast();
                self.vectors.push(libc::iovec { iov_base: pointer, iov_len: slice.len() });
                self.length += slice.len();
            }
        }
        Ok(())
    }

    /// Takes what `other` has, which keeps its room for the next ones; this has no more than it needs.
    pub fn take(&mut self, other: &mut Self) {
        self.vectors.clear();
        if other.count() > self.vectors.capacity() {
            self.vectors.reserve_exact(other.count().next_power_of_two());
        }
        self.vectors.extend_from_slice(other.left());
        (self.first, self.length) = (0, other.length);
        other.clear();
    }

    /// Appends the first `most` bytes of `other`, of the same memory, which keeps them.
    pub fn add_front(&mut self, other: &Self, most: usize) {
        let mut left = most.min(other.length);
        self.length += left;
        for vector in other.left() {
            let iov_len = vector.iov_len.min(left);
            left -= iov_len;
            if iov_len > 0 {
                self.vectors.push(libc::iovec { iov_len, ..*vector });
            }
        }
    }

    /// Appends a piece of memory that the device may write, as an earlier chain named it.
    pub fn add_piece(&mut self, address: u64, length: u32) -> Result<()> {
        let memory = self.memory.memory();
        self.add(&memory, &Piece { address: GuestAddress(address), length, is_writable: true })
    }

    /// Address and length of each vector, as the guest has them: for [`Self::add_piece`]. A vector in memory that the guest
    /// has unplugged is told as at the last address, where no memory is.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, u32)> {
        let memory = self.memory.memory();
        // A vector is a part of one descriptor, whose length has 32 bits.
        self.left().iter().map(move |vector| {
            let address = place(&memory, vector.iov_base)
                .map_or(u64::MAX, |(region, offset)| region.start_addr().0 + offset as u64);
            (address, vector.iov_len as u32)
        })
    }

    /// Takes away the vectors for whose index `keep` is false.
    pub fn retain(&mut self, mut keep: impl FnMut(usize) -> bool) {
        let first = self.first as usize;
        let mut kept = first;
        for at in first..self.vectors.len() {
            if keep(at - first) {
                self.vectors[kept] = self.vectors[at];
                kept += 1;
            } else {
                self.length -= self.vectors[at].iov_len;
            }
        }
        self.vectors.truncate(kept);
    }

    /// How many bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    fn left(&self) -> &[libc::iovec] {
        &self.vectors[self.first as usize..]
    }

    /// How many vectors.
    pub fn count(&self) -> usize {
        self.left().len()
    }

    /// For the kernel: none is empty.
    pub fn vectors(&self) -> Vectors<'_> {
        // SAFETY: the vectors lie in `memory` (see `Buffers`), which others change at any time anyway.
        #[allow(unsafe_code)]
        unsafe {
            Vectors::new(self.left())
        }
    }

    /// Takes the first `count` bytes away; false: there are fewer.
    pub fn advance(&mut self, count: usize) -> bool {
        if count > self.length {
            return false;
        }
        self.length -= count;
        let mut left = count;
        while left > 0 {
            let vector = &mut self.vectors[self.first as usize];
            let here = vector.iov_len.min(left);
            vector.iov_base = vector.iov_base.wrapping_byte_add(here);
            vector.iov_len -= here;
            left -= here;
            if vector.iov_len == 0 {
                self.first += 1;
            }
        }
        true
    }

    /// Takes the first bytes away, as many as `bytes` holds, and puts them there; false: there are fewer.
    pub fn read_front(&mut self, bytes: &mut [u8]) -> bool {
        if bytes.len() > self.length {
            return false;
        }
        self.copy_to(bytes);
        self.advance(bytes.len())
    }

    /// Takes the last byte away.
    pub fn take_last(&mut self) -> Option<Byte> {
        if self.length == 0 {
            return None;
        }
        let vector = self.vectors.last_mut()?;
        vector.iov_len -= 1;
        let pointer = NonNull::new(vector.iov_base.wrapping_byte_add(vector.iov_len).cast());
        if vector.iov_len == 0 {
            self.vectors.pop();
        }
        self.length -= 1;
        pointer.map(|pointer| Byte { pointer })
    }

    /// Writes a byte that was taken from here.
    #[allow(unsafe_code)]
    pub fn write_byte(&self, byte: Byte, value: u8) {
        // SAFETY: it lies in `memory` (see `Buffers`).
        unsafe { byte.pointer.as_ptr().write_volatile(value) };
        self.mark(byte.pointer.as_ptr().cast(), 1);
    }

    /// Copies the bytes out, as far as there is room.
    pub fn copy_to(&self, bytes: &mut [u8]) {
        self.vectors().copy_to(bytes);
    }

    /// Copies `bytes` to byte `offset` of this and on, as far as there is room.
    pub fn copy_from(&self, offset: usize, bytes: &[u8]) {
        self.copy_from_vector(0, offset, bytes);
    }

    /// The same, where `offset` counts from the vector of this index on.
    #[allow(unsafe_code)]
    pub fn copy_from_vector(&self, vector: usize, mut offset: usize, bytes: &[u8]) {
        let mut rest = bytes;
        let from = self.first as usize + vector;
        for vector in &self.vectors[from..] {
            if offset >= vector.iov_len {
                offset -= vector.iov_len;
                continue;
            }
            let (here, after) = rest.split_at(rest.len().min(vector.iov_len - offset));
            let place: *mut u8 = vector.iov_base.wrapping_byte_add(offset).cast();
            // SAFETY: the place and what follows, up to the vector's end, lies in `memory` (see
            // `Buffers`).
            unsafe { std::ptr::copy_nonoverlapping(here.as_ptr(), place, here.len()) };
            self.mark(place.cast(), here.len());
            (rest, offset) = (after, 0);
            if rest.is_empty() {
                break;
            }
        }
    }

    /// Reads from byte `offset` of `file` into this, all of it, which is then taken away.
    pub fn read_at(&mut self, file: &File, offset: u64) -> std::io::Result<()> {
        self.read_some_at(file, offset, self.length)
    }

    /// Reads `count` bytes from byte `offset` of `file` into the front of this, which is then taken away.
    pub fn read_some_at(&mut self, file: &File, offset: u64, count: usize) -> std::io::Result<()> {
        self.transfer(offset, count, true, |vectors, at| vectors.read_at(file, at))
    }

    /// Writes all of this from byte `offset` of `file` on; it is then taken away.
    pub fn write_at(&mut self, file: &File, offset: u64) -> std::io::Result<()> {
        self.write_some_at(file, offset, self.length)
    }

    /// Writes the first `count` bytes of this from byte `offset` of `file` on; they are then taken away.
    pub fn write_some_at(&mut self, file: &File, offset: u64, count: usize) -> std::io::Result<()> {
        self.transfer(offset, count, false, |vectors, at| vectors.write_at(file, at))
    }

    /// Calls until the first `left` bytes are transferred.
    fn transfer(
        &mut self,
        mut offset: u64,
        mut left: usize,
        dirties: bool,
        call: impl Fn(Vectors<'_>, u64) -> std::io::Result<usize>,
    ) -> std::io::Result<()> {
        while left > 0 {
            let result = self.with_first(left, |vectors| call(vectors, offset));
            let count = match result {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if dirties {
                self.mark_dirty(count);
            }
            self.advance(count);
            offset += count as u64;
            left -= count;
        }
        Ok(())
    }

    /// Calls with the vectors of the first `count` bytes, or of so many of them as fit one call.
    fn with_first<T>(&mut self, count: usize, call: impl FnOnce(Vectors<'_>) -> T) -> T {
        let first = self.first as usize;
        let (mut used, mut end) = (0, first);
        while used < count && end < self.vectors.len() && end - first < VECTORS_MAX {
            used += self.vectors[end].iov_len;
            end += 1;
        }
        let over = used.saturating_sub(count);
        if over > 0 {
            self.vectors[end - 1].iov_len -= over;
        }
        let result = call(self.vectors().range(0..end - first));
        if over > 0 {
            self.vectors[end - 1].iov_len += over;
        }
        result
    }

    /// The first `count` bytes, for system calls and plain copies: the guest may write there at any time.
    #[allow(unsafe_code)]
    pub fn front(&mut self, count: usize) -> Vec<IoSliceMut<'_>> {
        let mut left = count;
        let piece = |vector: &libc::iovec| {
            let length = vector.iov_len.min(left);
            left -= length;
            // SAFETY: the vector lies in `memory` (see `Buffers`), and the slice lives no longer than this. What
            // the guest writes there meanwhile is seen or not: it is bytes whatever it is.
            (length > 0).then(|| unsafe { std::slice::from_raw_parts_mut(vector.iov_base.cast(), length) })
        };
        self.left().iter().map_while(piece).map(IoSliceMut::new).collect()
    }

    /// Makes the first `count` bytes zeros; they are then taken away.
    #[allow(unsafe_code)]
    pub fn zero(&mut self, count: usize) {
        let mut left = count;
        for vector in self.left() {
            let here = vector.iov_len.min(left);
            // SAFETY: the vector lies in `memory` (see `Buffers`).
            unsafe { vector.iov_base.write_bytes(0, here) };
            left -= here;
        }
        self.mark_dirty(count);
        self.advance(count);
    }

    /// Whether every vector begins and ends at a multiple of `alignment`, a power of two.
    pub fn are_aligned(&self, alignment: usize) -> bool {
        let misaligned = |vector: &libc::iovec| (vector.iov_base as usize | vector.iov_len) & (alignment - 1);
        self.left().iter().all(|vector| misaligned(vector) == 0)
    }

    /// Notes that `length` bytes from `pointer` on, which lie in one region, were written.
    fn mark(&self, pointer: *const libc::c_void, length: usize) {
        if memory::is_tracked()
            && length > 0
            && let Some((region, offset)) = place(&self.memory.memory(), pointer)
        {
            region.bitmap().mark_dirty(offset, length);
        }
    }

    /// Notes that the kernel has written the first `count` bytes.
    pub fn mark_dirty(&self, count: usize) {
        self.mark_vectors_dirty(0, count);
    }

    /// The same from the vector of this index on.
    pub fn mark_vectors_dirty(&self, vector: usize, mut count: usize) {
        let from = self.first as usize + vector;
        for vector in &self.vectors[from..] {
            let here = vector.iov_len.min(count);
            self.mark(vector.iov_base, here);
            count -= here;
            if count == 0 {
                break;
            }
        }
    }
}

/// The region that a place of ours lies in, and where in it.
fn place(memory: &Regions, pointer: *const libc::c_void) -> Option<(&Region, usize)> {
    let offset = |region: &Region| (pointer as usize).wrapping_sub(region.as_ptr() as usize);
    memory.iter().map(|region| (region, offset(region))).find(|(region, offset)| *offset < region.size())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Range, allocate};

    const PAGE: usize = 4096;

    /// Two regions of four pages; what is written to them is noted.
    fn memory() -> Memory {
        let size = 4 * PAGE as u64;
        let memory = allocate(&[0, 1 << 30].map(|start| Range { start, size })).unwrap();
        memory.memory().iter().for_each(|region| region.written().start());
        memory
    }

    fn dirty(memory: &Memory) -> Vec<u64> {
        let pages = |region: &Region| {
            let is_dirty = |page: &u64| region.bitmap().dirty_at(*page as usize * PAGE);
            let first = region.start_addr().0;
            (0..4).filter(is_dirty).map(|page| first + page * PAGE as u64).collect::<Vec<_>>()
        };
        memory.memory().iter().flat_map(pages).collect()
    }

    #[test]
    fn what_is_written_is_noted_where_the_guest_has_it_and_vectors_are_told_as_it_gave_them() {
        let (memory, high) = (memory(), 1 << 30);
        let mut buffers = Buffers::new(memory.clone());
        buffers.add_piece(0x1ff0, 0x20).unwrap();
        buffers.add_piece(high + 0x1000, 0x1001).unwrap();
        assert_eq!(buffers.pieces().collect::<Vec<_>>(), [(0x1ff0, 0x20), (high + 0x1000, 0x1001)]);
        let last = buffers.take_last().unwrap();
        buffers.write_byte(last, 7);
        assert_eq!(dirty(&memory), [high + 0x2000]);
        buffers.copy_from(0x18, &[1; 4]);
        assert_eq!(dirty(&memory), [0x2000, high + 0x2000]);
        let mut taken = Buffers::new(memory.clone());
        taken.take(&mut buffers);
        assert!(buffers.is_empty() && taken.advance(0x28));
        assert_eq!(taken.pieces().collect::<Vec<_>>(), [(high + 0x1008, 0xff8)]);
        taken.mark_dirty(1);
        assert_eq!(dirty(&memory), [0x2000, high + 0x1000, high + 0x2000]);
    }
}
