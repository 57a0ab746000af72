//! The memory of one request: what the device reads or writes, as slices of guest memory.

use std::collections::VecDeque;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;

use vm_memory::bitmap::{Bitmap, BitmapSlice};
use vm_memory::{GuestMemory, Permissions};

use super::Chain;
use crate::error::{Error, Result};
use crate::memory::{Regions, Slice};

/// So many vectors the kernel takes at once (IOV_MAX).
const VECTORS_MAX: usize = libc::UIO_MAXIOV as usize;

/// A sequence of slices, in the order of their descriptors.
#[derive(Default)]
pub struct Buffers<'m> {
    slices: VecDeque<Slice<'m>>,
    length: usize,
}

impl<'m> Buffers<'m> {
    /// What the device may read of a request.
    pub fn readable(memory: &'m Regions, chain: Chain<'m>) -> Result<Self> {
        let mut buffers = Self::default();
        for descriptor in chain.readable() {
            buffers.add(memory, descriptor.addr(), descriptor.len(), Permissions::Read)?;
        }
        Ok(buffers)
    }

    /// What the device may write of a request.
    pub fn writable(memory: &'m Regions, chain: Chain<'m>) -> Result<Self> {
        let mut buffers = Self::default();
        for descriptor in chain.writable() {
            buffers.add(memory, descriptor.addr(), descriptor.len(), Permissions::Write)?;
        }
        Ok(buffers)
    }

    fn add(
        &mut self,
        memory: &'m Regions,
        address: vm_memory::GuestAddress,
        length: u32,
        access: Permissions,
    ) -> Result<()> {
        let outside = |error| Error::guest(format!("the driver gave a buffer at {:#x}: {error}", address.0));
        for slice in GuestMemory::get_slices(memory, address, length as usize, access).map_err(outside)? {
            let slice = slice.map_err(outside)?;
            self.length += slice.len();
            self.slices.push_back(slice);
        }
        Ok(())
    }

    /// How many bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Takes the first `count` bytes away; none: there are fewer.
    pub fn take_front(&mut self, count: usize) -> Option<Self> {
        if count > self.length {
            return None;
        }
        let mut front = Self::default();
        while front.length < count {
            let slice = self.slices.pop_front()?;
            let (taken, rest) = slice.split_at(slice.len().min(count - front.length)).ok()?;
            if !rest.is_empty() {
                self.slices.push_front(rest);
            }
            front.length += taken.len();
            front.slices.push_back(taken);
        }
        self.length -= count;
        Some(front)
    }

    /// Takes the last byte away.
    pub fn take_last(&mut self) -> Option<Self> {
        let before = self.take_front(self.length.checked_sub(1)?)?;
        Some(std::mem::replace(self, before))
    }

    /// Appends what another request gives.
    pub fn append(&mut self, mut other: Self) {
        self.length += other.length;
        self.slices.append(&mut other.slices);
    }

    /// Copies the bytes out; `bytes` is as long as this.
    pub fn copy_to(&self, bytes: &mut [u8]) {
        let mut at = 0;
        for slice in &self.slices {
            at += slice.copy_to(&mut bytes[at..]);
        }
    }

    /// Copies `bytes` in, as far as there is room.
    pub fn copy_from(&self, bytes: &[u8]) {
        let mut rest = bytes;
        for slice in &self.slices {
            let count = slice.len().min(rest.len());
            slice.copy_from(&rest[..count]);
            rest = &rest[count..];
        }
    }

    /// Reads from byte `offset` of `file` into this, all of it.
    pub fn read_at(&self, file: &File, offset: u64) -> std::io::Result<()> {
        // SAFETY: see `io_vectors`; preadv writes to them.
        #[allow(unsafe_code)]
        let call = |vectors: &[libc::iovec], at| unsafe {
            libc::preadv64(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, at)
        };
        let result = self.transfer(offset, call);
        self.mark_dirty(self.length);
        result
    }

    /// Writes all of this from byte `offset` of `file` on.
    pub fn write_at(&self, file: &File, offset: u64) -> std::io::Result<()> {
        // SAFETY: see `io_vectors`; pwritev reads them.
        #[allow(unsafe_code)]
        let call = |vectors: &[libc::iovec], at| unsafe {
            libc::pwritev64(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, at)
        };
        self.transfer(offset, call)
    }

    /// Reads once, as much as there is: a frame.
    pub fn read_frame(&self, file: &File) -> std::io::Result<usize> {
        let vectors = self.io_vectors();
        let count = vectors.len().min(VECTORS_MAX) as i32;
        // SAFETY: see `io_vectors`; readv writes to them.
        #[allow(unsafe_code)]
        let count = checked(unsafe { libc::readv(file.as_raw_fd(), vectors.as_ptr(), count) })?;
        self.mark_dirty(count);
        Ok(count)
    }

    /// Writes once: a frame.
    pub fn write_frame(&self, file: &File) -> std::io::Result<usize> {
        let vectors = self.io_vectors();
        let count = vectors.len().min(VECTORS_MAX) as i32;
        // SAFETY: see `io_vectors`; writev reads them.
        #[allow(unsafe_code)]
        checked(unsafe { libc::writev(file.as_raw_fd(), vectors.as_ptr(), count) })
    }

    /// Calls until everything is transferred.
    fn transfer(&self, offset: u64, call: impl Fn(&[libc::iovec], i64) -> isize) -> std::io::Result<()> {
        let mut vectors = self.io_vectors();
        let (mut done, mut first) = (0, 0);
        while done < self.length {
            let batch = &vectors[first..vectors.len().min(first + VECTORS_MAX)];
            let count = match checked(call(batch, (offset + done as u64) as i64)) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            done += count;
            let mut left = count;
            while left > 0 {
                let vector = &mut vectors[first];
                let here = vector.iov_len.min(left);
                vector.iov_base = vector.iov_base.wrapping_byte_add(here);
                vector.iov_len -= here;
                left -= here;
                if vector.iov_len == 0 {
                    first += 1;
                }
            }
        }
        Ok(())
    }

    /// The slices for the kernel. They are guest memory, which stays mapped as long as `'m` lives, and
    /// which nobody but the guest, by its own fault, and the kernel touch meanwhile.
    fn io_vectors(&self) -> Vec<libc::iovec> {
        let vector = |slice: &Slice<'m>| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        self.slices.iter().filter(|slice| !slice.is_empty()).map(vector).collect()
    }

    /// Notes that the kernel has written the first `count` bytes.
    fn mark_dirty(&self, mut count: usize) {
        for slice in &self.slices {
            let here = slice.len().min(count);
            mark(slice.bitmap(), here);
            count -= here;
        }
    }
}

fn checked(result: isize) -> std::io::Result<usize> {
    usize::try_from(result).map_err(|_| std::io::Error::last_os_error())
}

fn mark(bitmap: &impl BitmapSlice, length: usize) {
    if length > 0 {
        Bitmap::mark_dirty(bitmap, 0, length);
    }
}
