//! Guest memory: how it is allocated and by which type everything else sees it.

use std::io::{Error as IoError, Result as IoResult};
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::ptr::NonNull;

use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::guest_memory::Result as AccessResult;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestRegionCollection, GuestRegionMmap, MemoryRegionAddress,
};

use crate::error::{Context, Error, Result};

/// Notes pages that we dirty ourselves, when that is asked for.
type Dirty = Option<AtomicBitmap>;

/// The regions of guest memory.
pub type Regions = GuestRegionCollection<Region>;

/// A piece of guest memory.
pub type Slice<'m> = vm_memory::VolatileSlice<'m, BS<'m, Dirty>>;

/// Guest memory, shared by all who work on it; regions can be added while the guest runs.
pub type Memory = GuestMemoryAtomic<Regions>;

/// A range of guest physical addresses, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
}

/// One region of guest memory. The mapping that its pages are in is given back with it.
#[derive(Debug)]
pub struct Region {
    pages: GuestRegionMmap<Dirty>,
    /// None: whoever made the pages gives them back.
    _mapping: Option<Mapping>,
}

impl From<GuestRegionMmap<Dirty>> for Region {
    fn from(pages: GuestRegionMmap<Dirty>) -> Self {
        Self { pages, _mapping: None }
    }
}

impl Deref for Region {
    type Target = GuestRegionMmap<Dirty>;

    fn deref(&self) -> &Self::Target {
        &self.pages
    }
}

impl GuestMemoryRegion for Region {
    type B = Dirty;

    fn len(&self) -> u64 {
        self.pages.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.pages.start_addr()
    }

    fn bitmap(&self) -> BS<'_, Dirty> {
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

/// The size of a huge page, of which every region of guest memory begins with a whole one. KVM maps
/// a huge page only where host and guest address agree modulo its size: a guest whose memory lies
/// otherwise takes a fault, and an exit, for every 4 KiB.
const HUGE_PAGE: usize = 2 << 20;

/// Anonymous memory of this process, given back when this is dropped.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: a mapping belongs to no thread, and this does nothing but give it back.
#[allow(unsafe_code)]
unsafe impl Send for Mapping {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Mapping {}

impl Mapping {
    const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;
    const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

    /// Maps `size` bytes, a multiple of the host's page size, from the start of a huge page.
    #[allow(unsafe_code)]
    fn new(size: usize) -> IoResult<Self> {
        let whole = size.checked_add(HUGE_PAGE).ok_or(IoError::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: a new mapping, where there was none.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), whole, Self::PROTECTION, Self::FLAGS, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(IoError::last_os_error());
        }
        let start = NonNull::new(start.cast::<u8>()).ok_or(IoError::from_raw_os_error(libc::ENOMEM))?;
        // A kernel may align it by itself: then the head is empty.
        let (_head, rest) = Self { start, size: whole }.split(start.align_offset(HUGE_PAGE));
        let (mapping, _tail) = rest.split(size);
        Ok(mapping)
    }

    /// The first `size` bytes, of so many at least, and the rest.
    fn split(self, size: usize) -> (Self, Self) {
        let whole = ManuallyDrop::new(self);
        let rest = whole.start.as_ptr().wrapping_add(size);
        let rest = NonNull::new(rest).expect("no mapping reaches the end of the address space");
        (Self { start: whole.start, size }, Self { start: rest, size: whole.size - size })
    }
}

impl Drop for Mapping {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if self.size > 0 {
            // SAFETY: the range was mapped by `new`, belongs to this alone, and is used no more.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.size) };
        }
    }
}

/// Allocates anonymous memory for `ranges`, whose starts are multiples of 2 MiB. Pages come when they
/// are first touched, of the size that the host's policy on transparent huge pages gives.
pub fn allocate(ranges: &[Range]) -> Result<Memory> {
    let regions = ranges.iter().map(region).collect::<Result<Vec<_>>>()?;
    let regions = Regions::from_regions(regions).context("lay out guest memory")?;
    Ok(Memory::new(regions))
}

#[allow(unsafe_code)]
fn region(range: &Range) -> Result<Region> {
    let too_large = || {
        format!(
            "map {} MiB of guest memory: give the guest less (`mem_size_mib`, --memory)",
            range.size >> 20
        )
    };
    let size = usize::try_from(range.size).with_context(too_large)?;
    let mapping = Mapping::new(size).with_context(too_large)?;
    let pages = MmapRegionBuilder::new_with_bitmap(size, None)
        .with_mmap_prot(Mapping::PROTECTION)
        .with_mmap_flags(Mapping::FLAGS);
    // SAFETY: the mapping has this size and lives as long as the region that has both.
    let pages = unsafe { pages.with_raw_mmap_pointer(mapping.start.as_ptr()) };
    let pages = pages.build().context("describe guest memory")?;
    let pages = GuestRegionMmap::new(pages, GuestAddress(range.start))
        .ok_or_else(|| Error::config("guest memory does not fit the address space"))?;
    Ok(Region { pages, _mapping: Some(mapping) })
}

/// Asks the host for huge pages in all of `memory`, or to give none, whatever its policy is. A kernel
/// without transparent huge pages refuses both.
#[allow(unsafe_code)]
pub fn ask_for_huge_pages(memory: &Memory, wanted: bool) -> IoResult<()> {
    let advice = if wanted { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
    for region in memory.memory().iter() {
        // SAFETY: the range is the region's own mapping; this advice does not change what it holds.
        if unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) } != 0 {
            return Err(IoError::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

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
}
