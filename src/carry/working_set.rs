//! The file of a working set: the places in a memory's file that a restored guest needs first. The file is written once,
//! beside the snapshot in its folder; later restores ask the kernel for all of these places at once, where a guest would
//! wait for one page after the other.
//!
//! The file says nothing that a guest relies on: it is a list of places in the memory's file, which are read a little
//! earlier. Whoever writes a wrong one makes a restore slower at most.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use vm_memory::GuestMemoryBackend;

use super::folder::WORKING_SET;
use super::memory_file::PAGE_MIN;
use super::pagemap::{Pagemap, Which};
use super::pages;
use super::replaced::WORKING_SET as MAGIC;
use crate::error::{Context, Error, Result};
use crate::host::{Access, Sharing, file};
use crate::log;
use crate::memory::{Region, Regions};
use crate::sys::descriptor;

/// The bytes before the runs: the first ones, the checksum of what comes after it, the count of runs, and the number of
/// the memory that they are of.
const HEADER: usize = 32;
/// The bytes of a run: its first page and how many it has.
const RUN: usize = 8;
/// The most runs that are noted and read: anybody may have written the file, and its length decides how much memory
/// is allocated to read it (256 KiB), and how many system calls a restore makes.
const RUNS_MAX: usize = 32 << 10;
/// Runs with at most so many pages between them are one: to read these takes a disk less time than another request.
const GAP: u32 = 8;
/// The number of runs, spread over all of them, that tell whether the file is in memory: enough to find a file of which the
/// larger part is in memory, and as few as a restore that takes half a millisecond does not notice.
const LOOKS: usize = 16;
/// The size of the pages in which runs are counted, whatever the size of this host's is.
const PAGE: u64 = PAGE_MIN as u64;

/// Pages of 4 KiB of a memory's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    first: u32,
    count: u32,
}

impl Run {
    fn end(self) -> u64 {
        u64::from(self.first) + u64::from(self.count)
    }
}

/// The pages of a memory's file that its guest needs first, in their order there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    runs: Vec<Run>,
}

impl WorkingSet {
    /// The pages of `memory`, which comes from a file, that this process has touched so far. Pages in holes of the file are
    /// left out: no disk is read for them.
    ///
    /// # Errors
    /// The memory does not come from a file, or the kernel does not tell.
    pub fn note(memory: &Regions, pagemap: &Pagemap) -> Result<Self> {
        let backing = memory.iter().find_map(|region| region.backing());
        let file = backing.ok_or_else(|| Error::config("the guest's memory comes from no file"))?.file();
        let touched = pages::those(Which::Touched, memory, pagemap)?;
        let mut runs = Vec::new();
        // Memory that was plugged since is in no file, and what was unplugged leaves no gap there.
        let backings = memory.iter().filter_map(Region::backing);
        let places: Vec<_> = backings.flat_map(|backing| backing.pieces().iter().copied()).collect();
        for piece in pages::pieces(&places, &touched) {
            let (mut at, end) = (piece.position, piece.position + piece.range.size);
            while let Some((start, data_end)) = descriptor::next_data(file, at).context("find its holes")?
                && start < end
            {
                let page = |position: u64| u32::try_from(position / PAGE).context("count its pages");
                let (first, last) = (page(start.max(at))?, page(data_end.min(end).saturating_sub(1))?);
                runs.push(Run { first, count: last - first + 1 });
                at = data_end.min(end);
            }
        }
        Ok(Self { runs: joined(runs) })
    }

    /// How many pages of 4 KiB it has.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| u64::from(run.count)).sum()
    }

    /// The file's content, for the memory of this number.
    pub fn to_bytes(&self, memory: u128) -> Vec<u8> {
        let mut checked = Vec::with_capacity(HEADER - 12 + self.runs.len() * RUN);
        checked.extend((self.runs.len() as u32).to_le_bytes());
        checked.extend(memory.to_le_bytes());
        for run in &self.runs {
            checked.extend(run.first.to_le_bytes());
            checked.extend(run.count.to_le_bytes());
        }
        let mut bytes = MAGIC.to_vec();
        bytes.extend(crc32fast::hash(&checked).to_le_bytes());
        bytes.extend(checked);
        bytes
    }

    /// Reads the file's content, for the memory of this number, whose own file has `size` bytes. None: the working set is
    /// that of another memory.
    ///
    /// # Errors
    /// The file is damaged.
    fn from_bytes(bytes: &[u8], memory: u128, size: u64) -> Result<Option<Self>> {
        let damaged = || Error::config("it is damaged");
        let (head, runs) = bytes.split_at_checked(HEADER).ok_or_else(damaged)?;
        let word = |at: usize| head[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let number = head[16..].first_chunk().map_or(0, |bytes| u128::from_le_bytes(*bytes));
        let (runs, rest) = runs.as_chunks::<RUN>();
        let is_whole = head.starts_with(&MAGIC)
            && word(8) == crc32fast::hash(&bytes[12..])
            && word(12) as usize == runs.len()
            && runs.len() <= RUNS_MAX
            && rest.is_empty();
        if !is_whole {
            return Err(damaged());
        }
        if number != memory {
            return Ok(None);
        }
        let run = |bytes: &[u8; RUN]| {
            let both = u64::from_le_bytes(*bytes);
            Run { first: both as u32, count: (both >> 32) as u32 }
        };
        let runs: Vec<_> = runs.iter().map(run).collect();
        let follow = runs.windows(2).all(|pair| pair[0].end() <= u64::from(pair[1].first));
        let fit = runs.iter().all(|run| run.count > 0 && run.end() <= size / PAGE);
        if follow && fit { Ok(Some(Self { runs })) } else { Err(damaged()) }
    }

    /// The working set that is noted in `folder` for the memory of this number there, whose file has `size` bytes. None:
    /// nothing is noted, or the note cannot be used, and the log says why.
    pub fn read(folder: &Path, memory: u128, size: u64) -> Option<Self> {
        let path = folder.join(WORKING_SET);
        // Most snapshots have none.
        let length = match path.symlink_metadata() {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            Err(_) => 0,
        };
        let attempt = || format!("read what the guest needs first, `{}`", path.display());
        let read = || {
            let most = HEADER + RUNS_MAX * RUN;
            let mut bytes = Vec::with_capacity((length as usize).min(most));
            let file = file::open(&path, Access::Read, Sharing::Refused, "working set", attempt)?;
            (&*file).take(most as u64 + 1).read_to_end(&mut bytes).with_context(attempt)?;
            Self::from_bytes(&bytes, memory, size).with_context(attempt)
        };
        read().unwrap_or_else(|error| {
            log::line(format_args!("{error}: the guest is restored without"));
            None
        })
    }

    /// Whether the memory's file, of `size` bytes, is in the host's memory already, as far as a few looks tell.
    pub fn is_in_memory(&self, file: &File, size: u64) -> bool {
        let step = self.runs.len().div_ceil(LOOKS).max(1);
        let looks = self.runs.iter().step_by(step).map(|run| u64::from(run.first) * PAGE);
        // A host with larger pages has a page at the beginning of each of its own alone.
        let whole = |offset: u64| offset - offset % crate::memory::mapping::page_size();
        // A kernel that does not tell is not asked to read ahead either.
        descriptor::is_in_memory(file, size, looks.map(whole)).unwrap_or(true)
    }

    /// Has the kernel read all of it. The kernel takes what it has in memory already as read, and waits for nothing, but a
    /// disk that has enough to do can hold up who asks.
    ///
    /// # Errors
    /// The file cannot be read ahead.
    pub fn ask_for(&self, file: &File) -> Result<()> {
        let ask = |run: &Run| {
            descriptor::read_ahead(file, u64::from(run.first) * PAGE, u64::from(run.count) * PAGE)
        };
        self.runs.iter().try_for_each(ask).context("have the guest's memory read ahead")
    }
}

/// The runs, which are in order, with those joined that are near to each other, and as few as are noted.
fn joined(mut runs: Vec<Run>) -> Vec<Run> {
    let mut gap = GAP;
    loop {
        runs.dedup_by(|later, earlier| {
            let is_near = u64::from(later.first) <= earlier.end() + u64::from(gap);
            if is_near {
                earlier.count = (later.end().max(earlier.end()) - u64::from(earlier.first)) as u32;
            }
            is_near
        });
        if runs.len() <= RUNS_MAX {
            return runs;
        }
        gap = gap.saturating_mul(2);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::memory::{self, Piece, Range, Source};
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    const NUMBER: u128 = 0x1234 << 100;
    const SIZE: u64 = 64 << 20;

    fn set(runs: &[(u32, u32)]) -> WorkingSet {
        WorkingSet { runs: runs.iter().map(|(first, count)| Run { first: *first, count: *count }).collect() }
    }

    #[test]
    fn what_was_noted_is_read_again() {
        let last = (SIZE / PAGE) as u32 - 1;
        for noted in [set(&[]), set(&[(0, 1), (1, 7), (100, 3), (last, 1)])] {
            let bytes = noted.to_bytes(NUMBER);
            assert_eq!(WorkingSet::from_bytes(&bytes, NUMBER, SIZE).unwrap(), Some(noted));
            assert_eq!(WorkingSet::from_bytes(&bytes, NUMBER + 1, SIZE).unwrap(), None);
        }
    }

    #[test]
    fn what_is_damaged_or_cannot_be_is_refused() {
        let last = (SIZE / PAGE) as u32;
        for runs in [
            &[(last, 1)][..],
            &[(last - 1, 2)],
            &[(5, 0)],
            &[(5, 2), (6, 1)],
            &[(5, 1), (4, 1)],
            &[(0, u32::MAX)],
            &[(u32::MAX, u32::MAX)],
        ] {
            assert!(WorkingSet::from_bytes(&set(runs).to_bytes(NUMBER), NUMBER, SIZE).is_err(), "{runs:?}");
        }
        let many = WorkingSet {
            runs: (0..=RUNS_MAX as u32).map(|first| Run { first: 2 * first, count: 1 }).collect(),
        };
        assert!(WorkingSet::from_bytes(&many.to_bytes(NUMBER), NUMBER, 1 << 40).is_err());
        let bytes = set(&[(0, 1), (100, 3)]).to_bytes(NUMBER);
        for length in 0..bytes.len() {
            assert!(WorkingSet::from_bytes(&bytes[..length], NUMBER, SIZE).is_err(), "{length} bytes");
        }
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(WorkingSet::from_bytes(&bytes, NUMBER, SIZE).is_err(), "bit {bit}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(WorkingSet::from_bytes(&longer, NUMBER, SIZE).is_err());
    }

    #[test]
    fn runs_that_are_near_are_one_and_never_too_many() {
        let runs = |runs: &[(u32, u32)]| set(runs).runs;
        let near = runs(&[(0, 1), (1 + GAP, 2), (4 + 2 * GAP, 1)]);
        assert_eq!(joined(near), runs(&[(0, 3 + GAP), (4 + 2 * GAP, 1)]));
        let far = (0..3 * RUNS_MAX as u32).map(|run| Run { first: 20 * run, count: 1 }).collect();
        let found = joined(far);
        assert_eq!(found, [Run { first: 0, count: 20 * (3 * RUNS_MAX as u32 - 1) + 1 }]);
    }

    #[test]
    fn what_was_touched_is_noted_where_the_file_has_data() {
        let path = std::env::temp_dir().join(format!("alula-working-set-{}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        // Two regions, of which the file has the first one as a hole in its second half.
        let ranges = [0, 4 << 30].map(|start| Range { start, size: 8 << 20 });
        file.set_len(16 << 20).unwrap();
        file.write_all_at(&vec![1; 4 << 20], 0).unwrap();
        file.write_all_at(&vec![1; 8 << 20], 8 << 20).unwrap();
        let pieces = [0, 1].map(|index| Piece { range: ranges[index], position: (index as u64) << 23 });
        let memory = memory::map(&ranges, Source::Private { file: &file, pieces: &pieces }).unwrap();
        let memory = memory.memory();
        let pagemap = Pagemap::open().unwrap();
        assert_eq!(WorkingSet::note(&memory, &pagemap).unwrap().pages(), 0);
        let before = file.metadata().unwrap().blocks();
        let _: u8 = memory.read_obj(GuestAddress(1 << 20)).unwrap();
        memory.write_obj(7_u8, GuestAddress(6 << 20)).unwrap();
        memory.write_obj(7_u8, GuestAddress((4 << 30) + (3 << 20))).unwrap();
        let noted = WorkingSet::note(&memory, &pagemap).unwrap();
        let has = |position: u64| {
            let page = position / PAGE;
            noted.runs.iter().any(|run| (u64::from(run.first)..run.end()).contains(&page))
        };
        assert!(has(1 << 20) && has((8 << 20) + (3 << 20)), "{noted:?}");
        // A write to a mapped hole fills the hole of a file in memory (tmpfs), and no other.
        let is_filled = file.metadata().unwrap().blocks() > before;
        assert_eq!(has(6 << 20), is_filled, "{noted:?}");
        // The kernel maps what it has beside a page, but not far.
        assert!(!has(3 << 20) && !has((8 << 20) + (6 << 20)), "{noted:?}");
        assert!(noted.is_in_memory(&file, 16 << 20));
        noted.ask_for(&file).unwrap();
        let anonymous = memory::allocate(&ranges).unwrap();
        assert!(WorkingSet::note(&anonymous.memory(), &pagemap).is_err());
    }
}
