//! Guest memory with ground on all sides that nobody may step on, the same for all inputs.

use std::sync::OnceLock;

use alula::memory::{Memory, Region, Regions, Written};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap};

use crate::driver::MEMORY;

/// Start and size of each region. The first two are one piece to the guest and apart in the monitor;
/// then there is a hole.
pub const REGIONS: [(u64, u64); 3] = [(0, SEAM), (SEAM, MEMORY - SEAM), (2 * MEMORY, 1 << 20)];
pub const SEAM: u64 = 3 << 20;

/// So much around each region is out of bounds.
const GUARD: usize = 1 << 20;

/// The memory, full of zeros.
pub fn memory() -> Memory {
    static MEMORY: OnceLock<(Memory, Vec<(usize, usize)>)> = OnceLock::new();
    let (memory, places) = MEMORY.get_or_init(|| {
        let places: Vec<_> =
            REGIONS.iter().map(|(_, size)| (reserve(*size as usize), *size as usize)).collect();
        let regions =
            REGIONS.iter().zip(&places).map(|((start, _), (place, size))| region(*start, *place, *size));
        (Memory::new(Regions::from_regions(regions.collect()).unwrap()), places)
    });
    for (place, size) in places {
        // SAFETY: the range is the region's mapping, which nobody has references into; zeros come anew.
        let result = unsafe { libc::madvise(*place as *mut _, *size, libc::MADV_DONTNEED) };
        assert_eq!(result, 0);
    }
    memory.clone()
}

#[cfg(fuzzing)]
unsafe extern "C" {
    /// AddressSanitizer's: from here on an access is a finding, one by a system call too.
    fn __asan_poison_memory_region(start: *const libc::c_void, size: usize);
}

/// Maps `size` bytes between two guards.
fn reserve(size: usize) -> usize {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the mapping is new; what is made accessible lies within it.
    unsafe {
        let whole = libc::mmap(std::ptr::null_mut(), size + 2 * GUARD, libc::PROT_NONE, flags, -1, 0);
        assert_ne!(whole, libc::MAP_FAILED);
        let place = whole.wrapping_byte_add(GUARD);
        assert_eq!(libc::mprotect(place, size, libc::PROT_READ | libc::PROT_WRITE), 0);
        libc::madvise(place, size, libc::MADV_NOHUGEPAGE);
        #[cfg(fuzzing)]
        for guard in [whole, place.wrapping_byte_add(size)] {
            __asan_poison_memory_region(guard, GUARD);
        }
        place as usize
    }
}

fn region(start: u64, place: usize, size: usize) -> Region {
    let builder = MmapRegionBuilder::new_with_bitmap(size, Written::new(size))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: the mapping is there for ever.
    let builder = unsafe { builder.with_raw_mmap_pointer(place as *mut u8) };
    GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(start)).unwrap().into()
}
