//! Guest memory: how it is allocated and by which type everything else sees it.

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap};

use crate::error::{Context, Error, Result};

/// The regions of guest memory; the bitmap notes pages that we dirty ourselves, when that is asked for.
pub type Regions = GuestMemoryMmap<Option<AtomicBitmap>>;

/// One of them.
pub type Region = GuestRegionMmap<Option<AtomicBitmap>>;

/// A piece of guest memory.
pub type Slice<'m> = vm_memory::VolatileSlice<'m, vm_memory::bitmap::BS<'m, Option<AtomicBitmap>>>;

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

/// Allocates anonymous memory for `ranges`. Pages come when they are first touched.
pub fn allocate(ranges: &[Range]) -> Result<Memory> {
    let regions = ranges.iter().map(region).collect::<Result<Vec<_>>>()?;
    let regions = Regions::from_regions(regions).context("lay out guest memory")?;
    Ok(Memory::new(regions))
}

fn region(range: &Range) -> Result<Region> {
    let too_large = || {
        format!(
            "map {} MiB of guest memory: give the guest less (`mem_size_mib`, --memory)",
            range.size >> 20
        )
    };
    let size = usize::try_from(range.size).with_context(too_large)?;
    let mapping = MmapRegionBuilder::new_with_bitmap(size, None)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()
        .with_context(too_large)?;
    // Where the host gives huge pages to everybody, one touched byte would cost the guest 2 MiB.
    advise(mapping.as_ptr(), size, libc::MADV_NOHUGEPAGE);
    GuestRegionMmap::new(mapping, GuestAddress(range.start))
        .ok_or_else(|| Error::config("guest memory does not fit the address space"))
}

/// Advice is only that: a kernel built without huge pages refuses it, and nothing is lost.
#[allow(unsafe_code)]
fn advise(start: *mut u8, size: usize, advice: i32) {
    // SAFETY: the range is a mapping that the caller just made and owns; the advice given here does
    // not change what the memory holds.
    unsafe { libc::madvise(start.cast(), size, advice) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

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
}
