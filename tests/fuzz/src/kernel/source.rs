//! A file as somebody may have made it: longer than what was written to it, shorter than it was a moment ago, and read
//! in pieces.

use std::cell::Cell;
use std::io::{Error, ErrorKind, Read, Result as IoResult, Seek, SeekFrom};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// Reads of more than this in all are a finding: each part of guest memory twice, and the notes of as many segments as
/// a kernel may have.
const READ_MAX: u64 = 64 << 20;
/// More reads and seeks than this are a finding, too.
const CALLS_MAX: u64 = 100_000;

pub struct Source {
    pub bytes: Vec<u8>,
    /// The length that the file tells: behind its bytes are zeros.
    pub length: u64,
    /// Where reads end.
    pub end: u64,
    /// How much one read gives at most.
    pub most: usize,
    pub at: u64,
    pub done: Cell<(u64, u64)>,
}

impl Source {
    pub fn new(bytes: Vec<u8>) -> Self {
        let length = bytes.len() as u64;
        Self { bytes, length, end: length, most: usize::MAX, at: 0, done: Cell::default() }
    }

    /// Reads the bytes at `offset` of the file, however long the file is.
    pub fn content(&self, offset: u64, into: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(self.bytes.len());
        let known = &self.bytes[start..(start + into.len()).min(self.bytes.len())];
        into[..known.len()].copy_from_slice(known);
        into[known.len()..].fill(0);
    }

    /// How many of `wanted` bytes the next read gives.
    fn next(&self, wanted: usize) -> usize {
        let left = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let count = wanted.min(self.most).min(left);
        self.account(count as u64);
        count
    }

    fn account(&self, read: u64) {
        let (bytes, calls) = self.done.get();
        let (bytes, calls) = (bytes + read, calls + 1);
        assert!(bytes <= READ_MAX && calls <= CALLS_MAX, "{bytes} bytes were read in {calls} calls");
        self.done.set((bytes, calls));
    }
}

impl Read for Source {
    fn read(&mut self, into: &mut [u8]) -> IoResult<usize> {
        let count = self.next(into.len());
        self.content(self.at, &mut into[..count]);
        self.at += count as u64;
        Ok(count)
    }
}

impl ReadVolatile for Source {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        into: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let count = self.next(into.len());
        let mut bytes = vec![0; count.min(64 << 10)];
        let mut done = 0;
        while done < count {
            let piece = (count - done).min(bytes.len());
            self.content(self.at, &mut bytes[..piece]);
            into.subslice(done, piece)?.copy_from(&bytes[..piece]);
            self.at += piece as u64;
            done += piece;
        }
        Ok(count)
    }
}

impl Seek for Source {
    fn seek(&mut self, to: SeekFrom) -> IoResult<u64> {
        self.account(0);
        let to = match to {
            SeekFrom::Start(at) => i64::try_from(at).ok(),
            SeekFrom::End(by) => (self.length as i64).checked_add(by),
            SeekFrom::Current(by) => (self.at as i64).checked_add(by),
        };
        // lseek(2) knows no other places.
        self.at = to.filter(|at| *at >= 0).ok_or(Error::from(ErrorKind::InvalidInput))? as u64;
        Ok(self.at)
    }
}
