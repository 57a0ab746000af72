//! Guest memory: where its pages come from, and by which type everything else sees it.

pub mod backing;
pub mod faults;
mod given;
pub mod lost;
pub mod mapping;
pub mod page_set;
pub mod registers;
pub mod singly;
pub mod slots;
mod source;
pub mod window;
pub mod written;

use std::fmt;
use std::fs::File;
use std::io::Result as IoResult;
use std::ops::Deref;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::guest_memory::Result as AccessResult;
use vm_memory::{
    GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestRegionMmap, MemoryRegionAddress, MmapRegion,
};

use crate::error::{Context, Error, Result};
use backing::Backing;
pub use given::give_back;
use mapping::{HUGE_PAGE, Mapping, Pages, page_size};
pub use source::{Piece, Source};
pub use written::{Written, is_tracked};

/// The regions of guest memory.
pub type Regions = GuestRegionCollection<Region>;

/// A piece of guest memory.
pub type Slice<'m> = vm_memory::VolatileSlice<'m, BS<'m, Written>>;

/// Guest memory, shared by all who work on it; regions can be added while the guest runs.
pub type Memory = GuestMemoryAtomic<Regions>;

/// A range of guest physical addresses, in bytes.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Range {
    /// The first address.
    pub start: u64,
    /// How many bytes.
    pub size: u64,
}

impl Range {
    /// The first address after the range.
    pub fn end(&self) -> u64 {
        self.start + self.size
    }

    /// Whether all of `other` lies in the range; both may be anything.
    pub fn contains(&self, other: Range) -> bool {
        let end = |range: &Range| range.start.checked_add(range.size);
        let ends = end(self).zip(end(&other));
        self.start <= other.start && ends.is_some_and(|(own, its)| its <= own)
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} bytes at {:#x}", self.size, self.start)
    }
}

/// One region of guest memory. The mapping that its pages are in is given back with it.
#[derive(Debug)]
pub struct Region {
    pages: GuestRegionMmap<Written>,
    /// None: whoever made the pages gives them back.
    mapping: Option<Arc<Mapping>>,
    /// None: no page comes from a file.
    backing: Option<Backing>,
    /// Whether pages that are not there come from another process.
    is_served: bool,
    /// Whether its pages are huge ones of the host's pool.
    is_huge: bool,
}

impl From<GuestRegionMmap<Written>> for Region {
    fn from(pages: GuestRegionMmap<Written>) -> Self {
        Self { pages, mapping: None, backing: None, is_served: false, is_huge: false }
    }
}

impl Region {
    /// Maps a region for `range`, which is a multiple of the host's page size in all respects, with the content
    /// that `source` has for it.
    ///
    /// # Errors
    /// The range or a piece of `source` cannot be, or the host has no address space for it.
    fn map(range: Range, source: Source<'_>) -> Result<Self> {
        let attempt = || {
            let mib = range.size >> 20;
            format!("map {mib} MiB of guest memory: give the guest less (`mem_size_mib`, --memory)")
        };
        let page = page_size();
        if range.size == 0 || !(range.start | range.size).is_multiple_of(page) {
            return Err(Error::config(format!("{range} of guest memory is not whole pages of {page} bytes")));
        }
        if range.start.checked_add(range.size).is_none() {
            return Err(Error::config(format!("{range} of guest memory goes beyond the last address")));
        }
        let mapping =
            Mapping::new(usize::try_from(range.size).with_context(attempt)?).with_context(attempt)?;
        Self::over(Arc::new(mapping), range, source)
    }

    /// The region at `range` in a mapping of that size, where nobody has written anything yet, with the content that
    /// `source` has for the region.
    fn over(mapping: Arc<Mapping>, range: Range, source: Source<'_>) -> Result<Self> {
        let backing = match source {
            Source::Anonymous | Source::Huge | Source::Served(_) | Source::ServedHuge(_) => None,
            Source::Shared => Some(Backing::shared(range)?),
            Source::Private { file, pieces } => Some(Backing::private(range, file, pieces)?),
        };
        if let Some(backing) = &backing {
            backing.show(range, &mapping)?;
        }
        let size = range.size as usize;
        if source.is_huge() {
            mapping.take_huge_pages(size).with_context(|| {
                format!(
                    "map {} MiB of guest memory in huge pages of 2 MiB: have the host keep {} of them for guests \
                     (sysctl vm.nr_hugepages)",
                    size >> 20,
                    size / HUGE_PAGE
                )
            })?;
        }
        if let Some(faults) = source.faults() {
            faults.serve(&mapping, size).context("have page faults of guest memory served")?;
        }
        let pages = mapping.describe(size, Written::new(size))?;
        let pages = GuestRegionMmap::new(pages, GuestAddress(range.start))
            .ok_or_else(|| Error::config("guest memory does not fit the address space"))?;
        let (is_served, is_huge) = (source.faults().is_some(), source.is_huge());
        Ok(Self { pages, mapping: Some(mapping), backing, is_served, is_huge })
    }

    /// The guest addresses of the region.
    pub fn range(&self) -> Range {
        Range { start: self.start_addr().0, size: self.len() }
    }

    /// The file that another process can map for the same pages, from its beginning; None: its pages are this
    /// process's own.
    pub fn file(&self) -> Option<&File> {
        self.backing.as_ref().and_then(Backing::shared_file)
    }

    /// The file that its content comes from where no page is this process's own; None: zeros.
    pub fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// Whether pages that are not there come from another process, and are not zeros.
    pub fn is_served(&self) -> bool {
        self.is_served
    }

    /// Whether its pages are huge ones of the host's pool.
    pub fn is_huge(&self) -> bool {
        self.is_huge
    }

    /// The size of its pages, in bytes: of the host's, or of its huge ones.
    pub fn page_size(&self) -> u64 {
        if self.is_huge { HUGE_PAGE as u64 } else { page_size() }
    }

    /// Asks the host for transparent huge pages, or to give none, whatever its policy is.
    ///
    /// # Errors
    /// A kernel without transparent huge pages refuses both.
    pub fn ask_for_huge_pages(&self, wanted: bool) -> IoResult<()> {
        mapping::ask_for_huge_pages(&self.pages, wanted)
    }

    /// Gives the pages of `size` bytes from `offset` on back to the host; both are multiples of the host's page
    /// size. What the guest finds there afterwards is anything that was there before, or zeros.
    ///
    /// # Errors
    /// The range is not in the region, or the kernel's, of madvise(2).
    fn give_back(&self, offset: usize, size: usize) -> IoResult<()> {
        let whose = if self.file().is_some() { Pages::OfFile } else { Pages::Private };
        mapping::give_back(&self.pages, offset, size, whose)?;
        // KVM notes what CPUs write, and giving back is no write: a difference has to have what is there now.
        self.written().mark_dirty(offset, size);
        Ok(())
    }

    /// Which of its pages this process has written.
    pub fn written(&self) -> &Written {
        MmapRegion::bitmap(&self.pages)
    }

    /// The mapping that keeps the pages of the region mapped for as long as somebody has it.
    pub fn mapping(&self) -> Option<Arc<Mapping>> {
        self.mapping.clone()
    }
}

impl Deref for Region {
    type Target = GuestRegionMmap<Written>;

    fn deref(&self) -> &Self::Target {
        &self.pages
    }
}

impl GuestMemoryRegion for Region {
    type B = Written;

    fn len(&self) -> u64 {
        self.pages.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.pages.start_addr()
    }

    fn bitmap(&self) -> BS<'_, Written> {
        GuestMemoryRegion::bitmap(&self.pages)
    }

    fn get_host_address(&self, address: MemoryRegionAddress) -> AccessResult<*mut u8> {
        self.pages.get_host_address(address)
    }

    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> AccessResult<Slice<'_>> {
        GuestMemoryRegion::get_slice(&self.pages, offset, count)
    }
}

impl GuestMemoryRegionBytes for Region {}

/// Maps one region: see [`map`].
pub fn map_region(range: Range, source: Source<'_>) -> Result<Region> {
    source.check(&[range])?;
    Region::map(range, source)
}

/// Maps memory for `ranges`, whose starts are multiples of 2 MiB, with the content that `source` has for them.
/// Pages come when they are first touched, of the size that the host's policy on transparent huge pages
/// gives.
///
/// # Errors
/// A range is not whole pages or the host has no address space for it; ranges or pieces overlap; a piece is in no
/// range, beyond its file, or not whole pages.
pub fn map(ranges: &[Range], source: Source<'_>) -> Result<Memory> {
    source.check(ranges)?;
    let regions = ranges.iter().map(|range| Region::map(*range, source)).collect::<Result<Vec<_>>>()?;
    let regions = Regions::from_regions(regions).context("lay out guest memory")?;
    Ok(Memory::new(regions))
}

/// Memory in the very place of `regions`, which must be of zeros and which nobody has written to, with the content
/// that `source` has for it. Who knows where in this process the old regions are, as KVM does, need not be told of
/// the new ones. The old ones are not to be used any more.
///
/// # Errors
/// As [`map`]. What is in memory is anything then.
pub fn refill(regions: &Regions, source: Source<'_>) -> Result<Memory> {
    source.check(&regions.iter().map(Region::range).collect::<Vec<_>>())?;
    let refill = |region: &Region| {
        let mapping =
            region.mapping().ok_or_else(|| Error::host("the pages of guest memory are another one's"))?;
        Region::over(mapping, region.range(), source)
    };
    let regions = regions.iter().map(refill).collect::<Result<Vec<_>>>()?;
    Ok(Memory::new(Regions::from_regions(regions).context("lay out guest memory")?))
}

/// Memory of zeros for `ranges`: see [`map`].
pub fn allocate(ranges: &[Range]) -> Result<Memory> {
    map(ranges, Source::Anonymous)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    use super::mapping::memory_file;
    use vm_memory::{Bytes, GuestAddressSpace};

    fn ranges(memory: &Regions) -> Vec<Range> {
        memory.iter().map(|region| Range { start: region.start_addr().0, size: region.len() }).collect()
    }

    #[test]
    fn memory_is_where_it_was_asked_for_and_zero() {
        let asked = [Range { start: 0, size: 2 << 20 }, Range { start: 4 << 30, size: 1 << 20 }];
        let memory = allocate(&asked).unwrap();
        assert_eq!(ranges(&memory.memory()), asked);
        assert_eq!(memory.memory().read_obj::<u64>(GuestAddress((4 << 30) + 8)).unwrap(), 0);
        assert!(memory.memory().read_obj::<u64>(GuestAddress(2 << 20)).is_err());
    }

    #[test]
    fn more_than_can_be_mapped_is_refused_with_advice() {
        let error = allocate(&[Range { start: 0, size: 1 << 60 }]).unwrap_err().to_string();
        assert!(error.contains("map 1099511627776 MiB of guest memory: give the guest less"), "{error}");
    }

    /// How much address space this process has, in bytes.
    fn address_space() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    #[test]
    fn memory_begins_with_a_huge_page_whatever_its_size() {
        let sizes =
            [1, 2, 3, 5, 64].map(|mib| allocate(&[Range { start: 4 << 30, size: mib << 20 }]).unwrap());
        for memory in sizes {
            let memory = memory.memory();
            let region = memory.iter().next().unwrap();
            assert_eq!(region.as_ptr() as usize % HUGE_PAGE, 0, "{region:?}");
            let last = region.last_addr();
            memory.write_obj(7_u8, last).unwrap();
            assert_eq!(memory.read_obj::<u8>(last).unwrap(), 7);
        }
    }

    #[test]
    fn what_was_mapped_for_memory_is_given_back_whole() {
        // Whatever other tests map meanwhile, it is less than what a leak of any part comes to.
        const ROUNDS: u64 = 20_000;
        let before = address_space();
        for _ in 0..ROUNDS {
            drop(allocate(&[Range { start: 0, size: 1 << 20 }]).unwrap());
        }
        let grown = address_space().saturating_sub(before);
        assert!(grown < ROUNDS << 19, "{} MiB more", grown >> 20);
    }

    #[test]
    fn what_is_cut_off_is_given_back_at_once() {
        const MAPPINGS: u64 = 2000;
        let before = address_space();
        let memory: Vec<_> =
            (0..MAPPINGS).map(|_| allocate(&[Range { start: 0, size: 2 << 20 }]).unwrap()).collect();
        let grown = address_space().saturating_sub(before) >> 20;
        assert!(grown < MAPPINGS * 3, "{grown} MiB for {} times 2 MiB", memory.len());
    }

    /// A file of `pages` pages, each full of its number.
    fn file(pages: u64) -> File {
        let file = memory_file(pages * page_size()).unwrap();
        for page in 0..pages {
            file.write_all_at(&vec![page as u8; page_size() as usize], page * page_size()).unwrap();
        }
        file
    }

    #[test]
    fn ranges_and_pieces_that_cannot_be_are_refused() {
        let (file, page, mib) = (file(4), page_size(), 1 << 20);
        let range = |start, size| Range { start, size };
        let whole = [range(0, 2 * mib), range(4 * mib, 2 * mib)];
        for (ranges, expected) in [
            (vec![range(0, mib + 1)], "0x100001 bytes at 0x0 of guest memory is not whole pages"),
            (vec![range(1, mib)], "0x100000 bytes at 0x1 of guest memory is not whole pages"),
            (vec![range(0, 0)], "is not whole pages"),
            (vec![range(u64::MAX - page + 1, page)], "goes beyond the last address"),
            (vec![range(0, 2 * mib), range(mib, mib)], "lay out guest memory"),
            (vec![range(4 * mib, mib), range(0, mib)], "lay out guest memory"),
        ] {
            for source in [Source::Anonymous, Source::Shared] {
                let error = map(&ranges, source).unwrap_err().to_string();
                assert!(error.contains(expected), "{ranges:?}: {error}");
            }
        }
        let piece = |start, size, position| Piece { range: Range { start, size }, position };
        for (pieces, expected) in [
            (vec![piece(0, page, 1)], "is not whole pages"),
            (vec![piece(1, page, 0)], "is not whole pages"),
            (vec![piece(0, page - 1, 0)], "is not whole pages"),
            (vec![piece(0, 0, 0)], "is not whole pages"),
            (vec![piece(0, 5 * page, 0)], "it was cut short"),
            (vec![piece(0, page, 4 * page)], "it was cut short"),
            (vec![piece(0, page, u64::MAX - page + 1)], "it was cut short"),
            (vec![piece(2 * mib, page, 0)], "is not in one region"),
            (vec![piece(2 * mib - page, 2 * page, 0)], "is not in one region"),
            (vec![piece(u64::MAX - page + 1, page, 0)], "is not in one region"),
            (vec![piece(page, page, 0), piece(0, 2 * page, 0)], "two pieces of it overlap"),
        ] {
            let error =
                map(&whole, Source::Private { file: &file, pieces: &pieces }).unwrap_err().to_string();
            assert!(error.starts_with("map guest memory from its file: "), "{error}");
            assert!(error.contains(expected), "{pieces:?}: {error}");
        }
        let folder = File::open("/").unwrap();
        let error = map(&whole, Source::Private { file: &folder, pieces: &[] }).unwrap_err().to_string();
        assert!(error.ends_with("it is not a regular file"), "{error}");
    }

    #[test]
    fn what_a_file_has_is_mapped_and_changed_in_memory_alone() {
        let (file, page) = (file(4), page_size());
        let ranges = [0, 4 << 20].map(|start| Range { start, size: 2 << 20 });
        let pieces = [(ranges[1].start + page, 2, 1), (0, 1, 3)].map(|(start, pages, position)| Piece {
            range: Range { start, size: pages * page },
            position: position * page,
        });
        let source = Source::Private { file: &file, pieces: &pieces };
        let [one, other] = [(); 2].map(|()| map(&ranges, source).unwrap());
        let read = |memory: &Memory, address| memory.memory().read_obj::<u8>(GuestAddress(address)).unwrap();
        let start = ranges[1].start;
        let places = [0, page, start, start + page, start + 2 * page, start + 3 * page];
        assert_eq!(places.map(|place| read(&one, place)), [3, 0, 0, 1, 2, 0]);
        one.memory().write_obj(9_u8, GuestAddress(start + page)).unwrap();
        assert_eq!((read(&one, start + page), read(&other, start + page)), (9, 1));
        let mut byte = [0];
        file.read_exact_at(&mut byte, page).unwrap();
        assert_eq!(byte, [1]);
        let aligned = |region: &Region| (region.as_ptr() as usize).is_multiple_of(HUGE_PAGE);
        assert!(one.memory().iter().all(aligned));
    }

    #[test]
    fn another_process_maps_the_same_pages_and_cannot_take_them() {
        let memory = map(&[Range { start: 4 << 30, size: 2 << 20 }], Source::Shared).unwrap();
        let memory = memory.memory();
        let region = memory.iter().next().unwrap();
        let file = region.file().unwrap();
        memory.write_obj(7_u8, GuestAddress((4 << 30) + 5)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 5).unwrap();
        assert_eq!(byte, [7]);
        file.write_all_at(&[8], 6).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress((4 << 30) + 6)).unwrap(), 8);
        assert!(file.set_len(0).is_err() && file.set_len(4 << 20).is_err());
        assert!((region.as_ptr() as usize).is_multiple_of(HUGE_PAGE));
    }

    #[test]
    fn writes_are_noted_from_the_moment_somebody_asks() {
        let page = page_size();
        let memory = allocate(&[Range { start: 0, size: 1 << 20 }]).unwrap();
        let memory = memory.memory();
        let region = memory.iter().next().unwrap();
        let write = |page_number: u64| {
            memory.write_obj(1_u64, GuestAddress(page_number * page + 8)).unwrap();
        };
        write(1);
        assert!(!region.written().dirty_at(page as usize));
        for _ in 0..2 {
            region.written().start();
            assert!(is_tracked());
            write(2);
            memory.write_obj(1_u64, GuestAddress(4 * page - 4)).unwrap();
            assert_eq!(region.written().take()[0], 0b11100);
            assert_eq!(region.written().take()[0], 0);
            write(5);
            region.written().stop();
            write(6);
            assert_eq!(region.written().take()[0], 1 << 5);
        }
    }
}
