//! Requests taken from a queue before it is known what becomes of each: receive buffers that wait for
//! frames, frames that leave in one batch. Once it is large enough, nothing is allocated any more.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::Chain;
use super::buffers::Buffers;
use crate::error::Result;
use crate::memory::Memory;
use crate::sys::vectors::Vectors;

/// A chain in a pool.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The head by which it goes back to the driver.
    pub head: u16,
    /// How many bytes it has.
    pub length: usize,
    vectors: usize,
    is_used: bool,
}

/// An entry as saved state: the driver does not offer it a second time.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Unfilled {
    head: u16,
    /// Addresses and lengths in bytes.
    pieces: Vec<(u64, u32)>,
}

/// Chains in the order in which they were taken, and their memory.
pub struct Pool {
    buffers: Buffers,
    entries: Vec<Entry>,
}

impl Pool {
    /// An empty pool for so many chains in `memory`; with more vectors than chains it grows, once.
    pub fn new(memory: Memory, chains: usize) -> Self {
        let mut buffers = Buffers::new(memory);
        buffers.reserve(chains);
        Self { buffers, entries: Vec::with_capacity(chains) }
    }

    /// Takes a chain for what the device may write to it; returns how much that is.
    pub fn add_writable(&mut self, chain: Chain<'_>) -> Result<usize> {
        self.add(chain.head(), |buffers| buffers.add_writable(chain).map(drop))
    }

    /// Takes a chain for what the device may read of it; returns how much that is.
    pub fn add_readable(&mut self, chain: Chain<'_>) -> Result<usize> {
        self.add(chain.head(), |buffers| buffers.add_readable(chain).map(drop))
    }

    /// Takes back what [`Self::unfilled`] gave.
    pub fn add_unfilled(&mut self, unfilled: &Unfilled) -> Result<()> {
        let add = |buffers: &mut Buffers| {
            unfilled.pieces.iter().try_for_each(|(address, length)| buffers.add_piece(*address, *length))
        };
        self.add(unfilled.head, add).map(drop)
    }

    fn add(&mut self, head: u16, add: impl FnOnce(&mut Buffers) -> Result<()>) -> Result<usize> {
        let (vectors, length) = (self.buffers.count(), self.buffers.len());
        add(&mut self.buffers)?;
        let (vectors, length) = (self.buffers.count() - vectors, self.buffers.len() - length);
        self.entries.push(Entry { head, length, vectors, is_used: false });
        Ok(length)
    }

    /// All entries, for whoever goes on with them later.
    pub fn unfilled(&self) -> Vec<Unfilled> {
        let mut pieces = self.buffers.pieces();
        let unfilled = |entry: &Entry| Unfilled {
            head: entry.head,
            pieces: pieces.by_ref().take(entry.vectors).collect(),
        };
        self.entries.iter().map(unfilled).collect()
    }

    /// The entries.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// How many bytes they have.
    pub fn length(&self) -> usize {
        self.buffers.len()
    }

    /// The vectors of all of them, for the kernel (see `Buffers`).
    pub fn vectors(&self) -> Vectors<'_> {
        self.buffers.vectors()
    }

    /// How many vectors the entries of this range have.
    pub fn count_vectors(&self, entries: Range<usize>) -> usize {
        self.entries[entries].iter().map(|entry| entry.vectors).sum()
    }

    /// Copies `bytes` to what begins with the vector of this index, after `offset` bytes.
    pub fn copy_from(&self, vector: usize, offset: usize, bytes: &[u8]) {
        self.buffers.copy_from_vector(vector, offset, bytes);
    }

    /// Notes that the kernel has written `count` bytes from the vector of this index on.
    pub fn mark_dirty(&self, vector: usize, count: usize) {
        self.buffers.mark_vectors_dirty(vector, count);
    }

    /// Notes that an entry went back to the driver.
    pub fn set_used(&mut self, entry: usize) {
        self.entries[entry].is_used = true;
    }

    /// Forgets the entries that went back.
    pub fn remove_used(&mut self) {
        let (mut entry, mut left) = (0, self.entries.first().map_or(0, |entry| entry.vectors));
        let entries = &self.entries;
        self.buffers.retain(|_| {
            while left == 0 {
                entry += 1;
                left = entries[entry].vectors;
            }
            left -= 1;
            !entries[entry].is_used
        });
        self.entries.retain(|entry| !entry.is_used);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.buffers.clear();
        self.entries.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Range as Addresses, allocate};

    fn pool() -> Pool {
        let memory = allocate(&[Addresses { start: 0, size: 1 << 20 }]).unwrap();
        let mut pool = Pool::new(memory, 4);
        for (head, pieces) in [(7, vec![(0x1000, 10)]), (3, vec![(0x2000, 20), (0x3000, 30)]), (5, vec![])] {
            pool.add_unfilled(&Unfilled { head, pieces }).unwrap();
        }
        pool.add_unfilled(&Unfilled { head: 9, pieces: vec![(0x4000, 40)] }).unwrap();
        pool
    }

    fn heads(pool: &Pool) -> Vec<u16> {
        pool.entries().iter().map(|entry| entry.head).collect()
    }

    #[test]
    fn what_went_back_is_forgotten_and_the_rest_keeps_its_memory() {
        let mut pool = pool();
        assert_eq!((heads(&pool), pool.length(), pool.vectors().count()), (vec![7, 3, 5, 9], 100, 4));
        pool.set_used(0);
        pool.set_used(2);
        pool.remove_used();
        assert_eq!((heads(&pool), pool.length(), pool.vectors().count()), (vec![3, 9], 90, 3));
        assert_eq!(pool.count_vectors(0..1), 2);
        pool.set_used(0);
        pool.set_used(1);
        pool.remove_used();
        assert_eq!((heads(&pool), pool.length(), pool.vectors().count()), (vec![], 0, 0));
        pool.remove_used();
    }

    #[test]
    fn what_is_held_comes_back_as_it_was() {
        let unfilled = pool().unfilled();
        let mut other = Pool::new(allocate(&[Addresses { start: 0, size: 1 << 20 }]).unwrap(), 0);
        unfilled.iter().for_each(|unfilled| other.add_unfilled(unfilled).unwrap());
        assert_eq!(other.unfilled(), unfilled);
        let nowhere = Unfilled { head: 0, pieces: vec![(1 << 40, 8)] };
        assert!(
            other.add_unfilled(&nowhere).unwrap_err().to_string().contains("gave a buffer at 0x10000000000")
        );
    }
}
