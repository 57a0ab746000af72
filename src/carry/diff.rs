//! The memory file of a difference: of a guest's memory, the pages that were written since an earlier snapshot, at
//! their places, and holes where the others are. Which pages these are is in the state: what copies a file may fill
//! its holes, and a page that is zero now is no hole.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::memory_file::{self, BLOCK, PAGE_MIN, Written};
use super::pages;
use crate::error::{Context, Error, Result};
use crate::memory::page_set::PageSet;
use crate::memory::{Piece, Regions};
use crate::sys::descriptor;

/// How many bytes [`Block::to_bytes`] has.
const BLOCK_ENTRY: usize = 40;

/// The pages of a difference in one block of the memory file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// The number of the block in the file.
    index: u32,
    /// The checksum (CRC-32) of the pages, one after the other.
    checksum: u32,
    /// A bit for each page of 4 KiB, the first of them in the lowest bit of the first byte.
    pages: [u8; BLOCK / PAGE_MIN / 8],
}

impl Block {
    fn to_bytes(&self) -> [u8; BLOCK_ENTRY] {
        let mut bytes = [0; BLOCK_ENTRY];
        bytes[..4].copy_from_slice(&self.index.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.checksum.to_le_bytes());
        bytes[8..].copy_from_slice(&self.pages);
        bytes
    }

    fn from_bytes(bytes: &[u8; BLOCK_ENTRY]) -> Self {
        let (numbers, pages) = bytes.split_at(8);
        let number = |from: usize| {
            numbers[from..from + 4].iter().rev().fold(0, |sum, byte| sum << 8 | u32::from(*byte))
        };
        let mut block = Self { index: number(0), checksum: number(4), pages: [0; BLOCK / PAGE_MIN / 8] };
        block.pages.copy_from_slice(pages);
        block
    }

    /// Where the block begins in the file.
    fn start(&self) -> u64 {
        u64::from(self.index) * BLOCK as u64
    }

    /// Reads its pages from `file` to their places in `block`, and returns their checksum.
    fn read(&self, file: &File, block: &mut [u8]) -> Result<u32> {
        let mut hasher = crc32fast::Hasher::new();
        for run in self.runs() {
            let from = self.start() + run.start as u64;
            let beyond = || Error::config("it names pages beyond the memory's end: it is damaged");
            let bytes = block.get_mut(run).ok_or_else(beyond)?;
            file.read_exact_at(bytes, from).context("read its pages")?;
            hasher.update(bytes);
        }
        Ok(hasher.finalize())
    }

    /// Where its pages are in the block, those that lie together as one.
    fn runs(&self) -> Vec<Range<usize>> {
        let is_there = |page: &usize| self.pages[page / 8] >> (page % 8) & 1 == 1;
        let mut runs: Vec<Range<usize>> = Vec::new();
        for page in (0..BLOCK / PAGE_MIN).filter(is_there) {
            let (start, end) = (page * PAGE_MIN, (page + 1) * PAGE_MIN);
            match runs.last_mut() {
                Some(run) if run.end == start => run.end = end,
                _ => runs.push(start..end),
            }
        }
        runs
    }

    /// The same, where they must be as they were written.
    fn read_checked(&self, file: &File, block: &mut [u8]) -> Result<()> {
        match self.read(file, block)? == self.checksum {
            true => Ok(()),
            false => Err(memory_file::damaged(self.start())),
        }
    }
}

/// What is written of all `blocks`.
pub fn to_bytes(blocks: &[Block]) -> Vec<u8> {
    blocks.iter().flat_map(Block::to_bytes).collect()
}

/// The blocks that were written as `bytes`, which anybody may have written, of a memory of `size` bytes.
///
/// # Errors
/// The bytes do not describe blocks of such a memory, in their order.
pub fn from_bytes(bytes: &[u8], size: u64) -> Result<Vec<Block>> {
    let damaged = || Error::config("what it says of the pages of the difference is damaged");
    let (entries, rest) = bytes.as_chunks();
    let blocks: Vec<_> = entries.iter().map(Block::from_bytes).collect();
    let is_sorted = blocks.is_sorted_by(|one, other| one.index < other.index);
    match rest.is_empty() && is_sorted && blocks.last().is_none_or(|last| last.start() < size) {
        true => Ok(blocks),
        false => Err(damaged()),
    }
}

/// Describes `pages` of `memory`, which are in `file` at their places.
///
/// # Errors
/// The file cannot be read.
pub fn describe(memory: &Regions, pages: &PageSet, file: &File) -> Result<Vec<Block>> {
    let mut bytes = vec![0; BLOCK];
    let describe = |(mut block, _): (Block, _)| {
        block.checksum = block.read(file, &mut bytes)?;
        Ok(block)
    };
    blocks(memory, pages).into_iter().map(describe).collect()
}

/// Writes `pages` of `memory`, which nobody changes meanwhile, to their places in `file`, and describes them: what was
/// just written need not be read.
///
/// # Errors
/// The pages cannot be read, or the file cannot be written.
pub fn write(memory: &Regions, pages: &PageSet, file: &File) -> Result<Vec<Block>> {
    let mut buffer = vec![0; BLOCK];
    let write = |(mut block, pieces): (Block, Vec<Piece>)| {
        let mut hasher = crc32fast::Hasher::new();
        for piece in pieces {
            hasher.update(pages::write_piece(memory, piece, &mut buffer, file)?);
        }
        block.checksum = hasher.finalize();
        // The disk is at work while the next block is copied, and not only once all of them are.
        descriptor::begin_writing(file, block.start(), BLOCK as u64);
        Ok(block)
    };
    blocks(memory, pages).into_iter().map(write).collect()
}

/// The blocks that have some of `pages`, without checksums, each with its pages, in the order of the file.
fn blocks(memory: &Regions, pages: &PageSet) -> Vec<(Block, Vec<Piece>)> {
    let mut pieces: Vec<_> = pages::pieces(&pages::places(memory), pages).collect();
    pieces.sort_unstable_by_key(|piece| piece.position);
    let mut blocks: Vec<(Block, Vec<Piece>)> = Vec::new();
    for piece in pieces {
        let index = (piece.position / BLOCK as u64) as u32;
        if blocks.last().is_none_or(|(block, _)| block.index != index) {
            blocks.push((Block { index, checksum: 0, pages: [0; _] }, Vec::new()));
        }
        let Some((block, pieces)) = blocks.last_mut() else { continue };
        let first = (piece.position % BLOCK as u64) as usize / PAGE_MIN;
        for page in first..first + piece.range.size as usize / PAGE_MIN {
            block.pages[page / 8] |= 1 << (page % 8);
        }
        pieces.push(piece);
    }
    blocks
}

/// Compares the pages of a difference in `file` with their checksums: in its own file, or where it was merged into.
///
/// # Errors
/// A block is not as it was written; the first such one is named.
pub fn verify(file: &File, size: u64, blocks: &[Block]) -> Result<()> {
    let there = file.metadata().context("read its length")?.len();
    if there != size {
        return Err(Error::config(format!("it has {there} bytes; the state says {size}")));
    }
    let mut bytes = vec![0; BLOCK];
    blocks.iter().try_for_each(|block| block.read_checked(file, &mut bytes))
}

/// Writes to `file`, which is empty, the memory of `base`, of `size` bytes with these `checksums`, with the pages of
/// `diff` in the place of its own.
///
/// # Errors
/// A file cannot be read or written, or one of the two is not as it was written.
pub fn merge(
    (base, checksums): (&File, &[u32]),
    (diff, blocks): (&File, &[Block]),
    size: u64,
    file: &File,
) -> Result<Written> {
    memory_file::check_length(base, size, checksums).context("the earlier snapshot")?;
    let (mut written, mut block) = (Written::default(), vec![0; BLOCK]);
    let mut blocks = blocks.iter().peekable();
    for (index, expected) in checksums.iter().enumerate() {
        let start = (index * BLOCK) as u64;
        let block = &mut block[..(size - start).min(BLOCK as u64) as usize];
        let has_data =
            memory_file::read_block(base, start, block, *expected).context("the earlier snapshot")?;
        match blocks.next_if(|pages| pages.index as usize == index) {
            Some(pages) => pages.read_checked(diff, block).context("the difference")?,
            None if !has_data => {
                written.checksums.push(*expected);
                continue;
            }
            None => {}
        }
        written.checksums.push(crc32fast::hash(block));
        for (from, to) in memory_file::runs(block, PAGE_MIN) {
            file.write_all_at(&block[from..to], start + from as u64).context("write what is merged")?;
            written.pages += (to - from).div_ceil(PAGE_MIN) as u64;
        }
    }
    file.set_len(size).context("give what is merged its length")?;
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(index: u32) -> Block {
        let mut pages = [0; BLOCK / PAGE_MIN / 8];
        pages[31] = 0x80;
        Block { index, checksum: 0xdead_beef, pages }
    }

    #[test]
    fn blocks_are_read_as_they_were_written_and_others_refused() {
        let blocks = [block(0), block(7), block(0x0102_0304)];
        let size = 0x0102_0305 << 20;
        assert_eq!(from_bytes(&to_bytes(&blocks), size).unwrap(), blocks);
        assert_eq!(from_bytes(&[], size).unwrap(), []);
        for bytes in [
            to_bytes(&blocks)[1..].to_vec(),
            to_bytes(&[block(1), block(1)]),
            to_bytes(&[block(2), block(1)]),
            to_bytes(&[block(0x0102_0305)]),
        ] {
            let error = from_bytes(&bytes, size).unwrap_err().to_string();
            assert!(error.contains("the pages of the difference is damaged"), "{error}");
        }
    }

    #[test]
    fn pages_beyond_the_end_of_memory_are_an_error() {
        let file = File::open("/dev/zero").unwrap();
        let mut short = vec![0; BLOCK / 2];
        let error = block(0).read(&file, &mut short).unwrap_err().to_string();
        assert!(error.contains("it names pages beyond the memory's end"), "{error}");
    }
}
