//! The kernel's record of the pages of this process, /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::descriptors::Named;
use crate::error::{Context, Result};
use crate::log;
use crate::memory::mapping::page_size;
use crate::sys::pagemap::{self, Area};

/// Bits of an entry of pagemap: the page is in memory; it is in swap; it belongs to a file.
pub(super) const IS_PRESENT: u64 = 1 << 63;
const IS_SWAPPED: u64 = 1 << 62;
const IS_FILES: u64 = 1 << 61;

/// Which pages of this process are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Those that the process has of its own: what a file has at their place is another page.
    Own,
    /// Those that were touched, and those of a file that the kernel has mapped beside one that was.
    Touched,
}

/// The most entries of pagemap that one read takes when pages are looked for: those of 32 MiB of memory. One read for
/// each block of a memory file would be 1,024 reads for a guest of 1 GiB.
const ENTRIES: usize = 8192;
/// The most areas of pages that one call tells, which are 12 KiB of the stack. Where every second page of 4 KiB is the
/// process's own, one call tells of 4 MiB.
const AREAS: usize = 512;

impl Which {
    /// Whether these are pages with such an entry in pagemap.
    fn has(self, entry: u64) -> bool {
        match self {
            Self::Own => is_own(entry),
            Self::Touched => entry & (IS_PRESENT | IS_SWAPPED) != 0,
        }
    }
}

/// The kernel's record of the pages that this process has of its own, open. Where there is none (None), as without /proc,
/// each page is taken for the process's own.
pub struct Pagemap(pub(super) Option<Named<File>>);

impl Pagemap {
    /// Opens it.
    pub fn open() -> Result<Self> {
        let file = File::open("/proc/self/pagemap").context("open /proc/self/pagemap")?;
        Ok(Self(Some(Named::new("map of this process's pages", file))))
    }

    /// Opens it, if it is there. Where it is not, as in a jail, all pages are looked at, also those that are zeros or as
    /// in the file that they were mapped from.
    pub fn open_or_take_all() -> Self {
        Self::open().unwrap_or_else(|error| {
            log::debug(format_args!("all pages of the guest's memory are looked at: {error}"));
            Self(None)
        })
    }

    /// Reads the entries of the pages from the address `start` on.
    pub(super) fn read(&self, entries: &mut [[u8; 8]], start: usize) -> Result<()> {
        match &self.0 {
            Some(file) => {
                let place = (start / page_size() as usize * 8) as u64;
                file.read_exact_at(entries.as_flattened_mut(), place).context("read /proc/self/pagemap")
            }
            None => {
                entries.fill(IS_PRESENT.to_le_bytes());
                Ok(())
            }
        }
    }

    /// Calls `then` with the number of each page that `which` is for, of the `pages` pages from the address `start` on,
    /// which begins one.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub(super) fn each(
        &self,
        which: Which,
        start: usize,
        pages: usize,
        mut then: impl FnMut(usize),
    ) -> Result<()> {
        if let Some(file) = &self.0 {
            let scanned = scan(file, which, start, pages, &mut then);
            // Linux before 6.7 tells by entries alone.
            if scanned.as_ref().err().and_then(std::io::Error::raw_os_error) != Some(libc::ENOTTY) {
                return scanned.context("look for pages by /proc/self/pagemap");
            }
        }
        self.each_entry(which, start, pages, then)
    }

    /// Does what [`Self::each`] does by reading an entry for each page.
    fn each_entry(
        &self,
        which: Which,
        start: usize,
        pages: usize,
        mut then: impl FnMut(usize),
    ) -> Result<()> {
        let mut entries = vec![[0; 8]; pages.min(ENTRIES)];
        let at_once = entries.len().max(1);
        for first in (0..pages).step_by(at_once) {
            let entries = &mut entries[..(pages - first).min(at_once)];
            self.read(entries, start + first * page_size() as usize)?;
            let pages = (first..).zip(&*entries);
            pages
                .filter(|(_, entry)| which.has(u64::from_le_bytes(**entry)))
                .for_each(|(page, _)| then(page));
        }
        Ok(())
    }
}

/// Calls `then` with the number of each page that `which` is for, as far as the kernel knows the call.
fn scan(
    file: &File,
    which: Which,
    start: usize,
    pages: usize,
    then: &mut impl FnMut(usize),
) -> std::io::Result<()> {
    let (page, start) = (page_size(), start as u64);
    let (mut areas, mut at, end) = ([Area::default(); AREAS], start, start + pages as u64 * page);
    while at < end {
        let (count, walked) = pagemap::scan(file, at..end, &mut areas)?;
        for area in areas[..count].iter().filter(|area| which.has(entry_of(area.kinds))) {
            ((area.start - start) / page..(area.end - start) / page).for_each(|page| then(page as usize));
        }
        at = walked;
    }
    Ok(())
}

/// The bits of an entry of pagemap for pages of these kinds.
fn entry_of(kinds: u64) -> u64 {
    let bits = [(pagemap::PRESENT, IS_PRESENT), (pagemap::SWAPPED, IS_SWAPPED), (pagemap::FILES, IS_FILES)];
    bits.iter().filter(|(kind, _)| kinds & kind != 0).fold(0, |entry, (_, bit)| entry | bit)
}

/// Whether the process has a page of its own there.
pub(super) fn is_own(entry: u64) -> bool {
    entry & IS_SWAPPED != 0 || entry & (IS_PRESENT | IS_FILES) == IS_PRESENT
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::carry::memory_file::offsets;
    use crate::memory::{self, Range};
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

    const RANGES: [Range; 2] = [Range { start: 0, size: 3 << 20 }, Range { start: 4 << 30, size: 5 << 20 }];

    #[test]
    fn areas_and_entries_tell_of_the_same_pages() {
        let path = std::env::temp_dir().join(format!("alula-areas-{}", std::process::id()));
        let origin = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        origin.set_len(8 << 20).unwrap();
        let pieces: Vec<_> = RANGES
            .iter()
            .zip(offsets(&RANGES))
            .map(|(range, position)| memory::Piece { range: *range, position })
            .collect();
        let memory =
            memory::map(&RANGES, memory::Source::Private { file: &origin, pieces: &pieces }).unwrap();
        let memory = memory.memory();
        let _: u64 = memory.read_obj(GuestAddress(1 << 20)).unwrap();
        // More areas than one call tells.
        let page = page_size();
        let others = (0..(5 << 20) / page).step_by(2).map(|index| (4 << 30) + index * page);
        others.for_each(|address| memory.write_obj(7_u8, GuestAddress(address)).unwrap());
        let pagemap = Pagemap::open().unwrap();
        for which in [Which::Own, Which::Touched] {
            for region in memory.iter() {
                let (start, pages) = (region.as_ptr() as usize, (region.len() / page) as usize);
                let (mut by_areas, mut by_entries) = (Vec::new(), Vec::new());
                pagemap.each(which, start, pages, |page| by_areas.push(page)).unwrap();
                pagemap.each_entry(which, start, pages, |page| by_entries.push(page)).unwrap();
                assert_eq!(by_areas, by_entries);
                let own = pages.div_ceil(2) * usize::from(region.len() == 5 << 20);
                assert!(which == Which::Touched || by_areas.len() == own, "{} pages", by_areas.len());
            }
        }
    }
}
