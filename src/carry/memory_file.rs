//! The file of a guest's memory: its regions one after the other, as they are, with holes where memory is zero.
//!
//! Nothing is faulted in to be saved: /proc/self/pagemap tells which pages the process has of its own
//! (Documentation/admin-guide/mm/pagemap.rst). What it has not is zero, or is what the file holds that the
//! memory was mapped from.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::pagemap::{Pagemap, is_own};
use crate::error::{Context, Error, Result};
use crate::memory::lost;
use crate::memory::mapping::page_size;
use crate::memory::{Piece, Range, Region, Regions};
use crate::sys::descriptor;

/// Memory is checked in blocks of this size, in bytes.
pub const BLOCK: usize = 1 << 20;
/// The smallest page that a host has, in bytes.
pub(super) const PAGE_MIN: usize = 4096;
/// Where the memory of a saved machine is.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct MemoryFile {
    /// The name of its file, beside the state; None: it has a path of its own.
    pub name: Option<String>,
    /// How long the file is, in bytes.
    pub size: u64,
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// The checksum (CRC-32) of each block, in the order of the file.
    pub checksums: Vec<u32>,
    /// How many of the host's pages were written; the others are holes.
    pub pages: u64,
}

/// Where each of `ranges` lies in the file: one after the other.
pub fn offsets(ranges: &[Range]) -> Vec<u64> {
    let next = |end: &mut u64, range: &Range| {
        let offset = *end;
        *end += range.size;
        Some(offset)
    };
    ranges.iter().scan(0, next).collect()
}

/// Writes `memory` to `file`, which is empty, with each page as it is at some moment meanwhile.
///
/// # Errors
/// The file cannot be written, or the pages cannot be read.
pub fn write(memory: &Regions, pagemap: &Pagemap, file: &File) -> Result<Written> {
    let (page, written) = (page_size() as usize, Written::default());
    let mut writer = Writer { file, pagemap, page, block: vec![0; BLOCK], offset: 0, written };
    for region in memory.iter() {
        writer.region(region)?;
    }
    file.set_len(writer.offset).context("give it its length")?;
    Ok(writer.written)
}

struct Writer<'f> {
    file: &'f File,
    pagemap: &'f Pagemap,
    /// The size of the host's pages, which divides that of a block.
    page: usize,
    /// The block under way.
    block: Vec<u8>,
    /// Where the block goes in the file.
    offset: u64,
    written: Written,
}

impl Writer<'_> {
    fn region(&mut self, region: &Region) -> Result<()> {
        let mut at = 0;
        while at < region.len() {
            let length = (region.len() - at).min(BLOCK as u64) as usize;
            self.block(region, at, length)?;
            at += length as u64;
            self.offset += length as u64;
        }
        Ok(())
    }

    /// Writes the pages of the block of `region` at `at` that are not zero.
    fn block(&mut self, region: &Region, at: u64, length: usize) -> Result<()> {
        let host = region.get_host_address(MemoryRegionAddress(at)).context("find a page of the guest")?;
        let mut entries = [[0; 8]; BLOCK / PAGE_MIN];
        let entries = &mut entries[..length.div_ceil(self.page)];
        self.pagemap.read(entries, host as usize)?;
        let is_untouched = !entries.iter().any(|entry| is_own(u64::from_le_bytes(*entry)));
        if is_untouched && region.backing().is_none() && !region.is_served() {
            // Nobody needs to look at zeros.
            self.written.checksums.push(checksum_of_zeros(length));
            return Ok(());
        }
        let block = &mut self.block[..length];
        block.fill(0);
        // What the process has no page of its own for is still in the file that it was mapped from.
        if let Some(backing) = region.backing() {
            let start = region.range().start + at;
            let read = backing.read(start, block).map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof => Error::host(lost::words()),
                _ => Error::host(error.to_string()),
            });
            read.context("read the memory that it was restored from")?;
        }
        for (index, (page, entry)) in block.chunks_mut(self.page).zip(entries).enumerate() {
            // A page that another process has yet to give is given now.
            if region.is_served() || is_own(u64::from_le_bytes(*entry)) {
                let from = MemoryRegionAddress(at + (index * self.page) as u64);
                region.read_slice(page, from).context("read a page of the guest")?;
            }
        }
        self.written.checksums.push(crc32fast::hash(block));
        for (start, end) in runs(block, self.page) {
            let place = self.offset + start as u64;
            self.file.write_all_at(&block[start..end], place).context("write to it")?;
            self.written.pages += (end - start).div_ceil(self.page) as u64;
        }
        Ok(())
    }
}

/// The runs of pages, of `page` bytes each, of `block` that are not zero.
pub(super) fn runs(block: &[u8], page: usize) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (index, page_bytes) in block.chunks(page).enumerate().filter(|(_, bytes)| !is_zero(bytes)) {
        let (start, end) = (index * page, index * page + page_bytes.len());
        match runs.last_mut() {
            Some((_, last)) if *last == start => *last = end,
            _ => runs.push((start, end)),
        }
    }
    runs
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// Makes those of `checksums` new whose blocks have one of `pieces`, from what `file` has now.
///
/// # Errors
/// The file cannot be read.
pub fn check_anew(file: &File, pieces: impl Iterator<Item = Piece>, checksums: &mut [u32]) -> Result<()> {
    let size = file.metadata().context("read its length")?.len();
    let blocks: BTreeSet<u64> = pieces
        .flat_map(|piece| {
            let last = piece.position + (piece.range.size - 1);
            piece.position / BLOCK as u64..=last / BLOCK as u64
        })
        .collect();
    let mut bytes = vec![0; BLOCK];
    for index in blocks {
        let place = index * BLOCK as u64;
        let bytes = &mut bytes[..size.saturating_sub(place).min(BLOCK as u64) as usize];
        file.read_exact_at(bytes, place).context("read what was written")?;
        if let Some(checksum) = checksums.get_mut(index as usize) {
            *checksum = crc32fast::hash(bytes);
        }
    }
    Ok(())
}

/// Compares a file with the checksums of its blocks; the error names the first block that is not as it was
/// written.
pub fn verify(file: &File, length: u64, checksums: &[u32]) -> Result<()> {
    check_length(file, length, checksums)?;
    let mut block = vec![0; BLOCK];
    for (index, expected) in checksums.iter().enumerate() {
        let place = (index * BLOCK) as u64;
        let block = &mut block[..(length - place).min(BLOCK as u64) as usize];
        let _has_data = read_block(file, place, block, *expected)?;
    }
    Ok(())
}

/// Whether a file has `length` bytes, and there are as many checksums as it has blocks.
pub(super) fn check_length(file: &File, length: u64, checksums: &[u32]) -> Result<()> {
    let there = file.metadata().context("read its length")?.len();
    if there != length || checksums.len() as u64 != length.div_ceil(BLOCK as u64) {
        return Err(Error::config(format!(
            "it has {there} bytes, and {} checksums; the state says {length} bytes",
            checksums.len()
        )));
    }
    Ok(())
}

/// The checksum of so many zeros, at most a block.
pub(super) fn checksum_of_zeros(length: usize) -> u32 {
    static OF_BLOCK: OnceLock<u32> = OnceLock::new();
    let sum = || crc32fast::hash(&vec![0; length]);
    if length == BLOCK { *OF_BLOCK.get_or_init(sum) } else { sum() }
}

/// Reads the block of `file` at `place`, which must have this checksum. False: it is a hole, all zeros.
pub(super) fn read_block(file: &File, place: u64, block: &mut [u8], checksum: u32) -> Result<bool> {
    let attempt = || format!("read its block at {place:#x}");
    let data = descriptor::next_data(file, place).with_context(attempt)?;
    let is_hole = data.is_none_or(|(start, _)| start >= place + block.len() as u64);
    let found = match is_hole {
        true => {
            block.fill(0);
            checksum_of_zeros(block.len())
        }
        false => {
            file.read_exact_at(block, place).with_context(attempt)?;
            crc32fast::hash(block)
        }
    };
    if found == checksum { Ok(!is_hole) } else { Err(damaged(place)) }
}

pub(super) fn damaged(place: u64) -> Error {
    Error::config(format!("it is damaged: the MiB at {place:#x} is not as it was written"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::carry::pagemap::IS_PRESENT;
    use crate::memory;
    use std::os::unix::fs::MetadataExt;
    use vm_memory::{GuestAddress, GuestAddressSpace};

    fn file(name: &str) -> File {
        let path = std::env::temp_dir().join(format!("alula-memory-{name}-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }

    const RANGES: [Range; 2] = [Range { start: 0, size: 3 << 20 }, Range { start: 4 << 30, size: 5 << 20 }];

    #[test]
    fn memory_is_written_with_holes_where_it_is_zero() {
        let memory = memory::allocate(&RANGES).unwrap();
        let memory = memory.memory();
        memory.write_slice(&[1; 10_000], GuestAddress(4000)).unwrap();
        memory.write_obj(7_u64, GuestAddress((4 << 30) + (5 << 20) - 8)).unwrap();
        // A page that was written and is zero again, and one that was only read, are holes.
        memory.write_obj(0_u64, GuestAddress(2 << 20)).unwrap();
        let _: u64 = memory.read_obj(GuestAddress((4 << 30) + (1 << 20))).unwrap();
        let file = file("holes");
        let written = write(&memory, &Pagemap::open().unwrap(), &file).unwrap();
        let pages = if page_size() == PAGE_MIN as u64 { 5 } else { 2 };
        assert_eq!((written.pages, written.checksums.len()), (pages, 8));
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), 8 << 20);
        assert!(metadata.blocks() * 512 <= 256 << 10, "{} blocks", metadata.blocks());
        let mut bytes = vec![0; 8 << 20];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let mut expected = vec![0; 8 << 20];
        expected[4000..14_000].fill(1);
        expected[(8 << 20) - 8] = 7;
        assert!(bytes == expected);
        verify(&file, 8 << 20, &written.checksums).unwrap();
    }

    #[test]
    fn pages_that_were_not_touched_stay_untouched() {
        let memory = memory::allocate(&[Range { start: 0, size: 64 << 20 }]).unwrap();
        let file = file("untouched");
        assert_eq!(write(&memory.memory(), &Pagemap::open().unwrap(), &file).unwrap().pages, 0);
        let region = memory.memory().iter().next().unwrap().as_ptr() as usize;
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let mut entries = vec![0; (64 << 20) / page_size() as usize * 8];
        pagemap.read_exact_at(&mut entries, (region / page_size() as usize * 8) as u64).unwrap();
        assert!(entries.as_chunks().0.iter().all(|entry| u64::from_le_bytes(*entry) & IS_PRESENT == 0));
    }

    #[test]
    fn memory_that_came_from_a_file_is_written_whole() {
        let total = 8 << 20;
        let origin = file("origin");
        let content: Vec<u8> = (0..total / 8_u64).flat_map(|word| (word % 251).to_le_bytes()).collect();
        origin.write_all_at(&content, 0).unwrap();
        let pieces: Vec<_> = RANGES
            .iter()
            .zip(offsets(&RANGES))
            .map(|(range, position)| memory::Piece { range: *range, position })
            .collect();
        let private = memory::Source::Private { file: &origin, pieces: &pieces };
        for (source, content) in [(private, content), (memory::Source::Shared, vec![0; total as usize])] {
            let memory = memory::map(&RANGES, source).unwrap();
            let memory = memory.memory();
            let _: u64 = memory.read_obj(GuestAddress(1 << 20)).unwrap();
            memory.write_slice(&[9; 5000], GuestAddress((4 << 30) + (2 << 20) - 2500)).unwrap();
            let mut expected = content;
            let place = (3 << 20) + (2 << 20) - 2500;
            expected[place..place + 5000].fill(9);
            for pagemap in [Pagemap::open().unwrap(), Pagemap(None)] {
                let file = file("copy");
                let written = write(&memory, &pagemap, &file).unwrap();
                let mut bytes = vec![0; total as usize];
                file.read_exact_at(&mut bytes, 0).unwrap();
                assert!(bytes == expected);
                verify(&file, total, &written.checksums).unwrap();
            }
        }
        let mut bytes = [0; 8];
        origin.read_exact_at(&mut bytes, (5 << 20) - 2500).unwrap();
        assert_ne!(bytes, [9; 8], "what the guest writes stays its own");
    }

    #[test]
    fn damaged_memory_is_named_by_its_place() {
        let memory = memory::allocate(&RANGES).unwrap();
        memory.memory().write_slice(&[1; 10_000], GuestAddress(4000)).unwrap();
        let file = file("damaged");
        let written = write(&memory.memory(), &Pagemap::open().unwrap(), &file).unwrap();
        file.write_all_at(&[9], (6 << 20) + 5).unwrap();
        let error = verify(&file, 8 << 20, &written.checksums).unwrap_err().to_string();
        assert!(error.contains("the MiB at 0x600000"), "{error}");
        file.set_len(7 << 20).unwrap();
        let error = verify(&file, 8 << 20, &written.checksums).unwrap_err().to_string();
        assert!(error.contains("it has 7340032 bytes"), "{error}");
        verify(&file, 8 << 20, &written.checksums[1..]).unwrap_err();
    }

    #[test]
    fn regions_lie_one_after_the_other() {
        assert_eq!(offsets(&RANGES), [0, 3 << 20]);
    }
}
