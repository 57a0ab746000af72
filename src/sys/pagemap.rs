//! PAGEMAP_SCAN (Linux 6.7; Documentation/admin-guide/mm/pagemap.rst): areas of pages that are alike, by one call where
//! reading /proc/self/pagemap copies eight bytes for each page.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Result;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::check;

/// `_IOWR('f', 16, struct pm_scan_arg)` of linux/fs.h.
const PAGEMAP_SCAN: u32 = 0xc060_6610;

/// A bit of [`Area::kinds`]: the pages belong to a file (PAGE_IS_FILE of linux/fs.h).
pub const FILES: u64 = 1 << 2;
/// The pages are in memory (PAGE_IS_PRESENT).
pub const PRESENT: u64 = 1 << 3;
/// The pages are in swap (PAGE_IS_SWAPPED).
pub const SWAPPED: u64 = 1 << 4;

/// Pages that lie together and are alike (`struct page_region`).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Area {
    /// The address of the first of them.
    pub start: u64,
    /// The address behind the last of them.
    pub end: u64,
    /// Bits for what these pages are: [`FILES`], [`PRESENT`], [`SWAPPED`].
    pub kinds: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
struct Argument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    areas: u64,
    areas_count: u64,
    pages_max: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Finds the pages in `addresses` of the process whose pagemap `pagemap` is that are in memory or in swap. Returns how many
/// of `areas` it has filled, and the address up to which it has looked: before the end, `areas` were too few.
///
/// # Errors
/// The kernel's; ENOTTY: it is older than 6.7.
pub fn scan(pagemap: &File, addresses: Range<u64>, areas: &mut [Area]) -> Result<(usize, u64)> {
    let mut argument = Argument {
        size: size_of::<Argument>() as u64,
        flags: 0,
        start: addresses.start,
        end: addresses.end,
        walk_end: 0,
        areas: areas.as_mut_ptr() as u64,
        areas_count: areas.len() as u64,
        pages_max: 0,
        category_inverted: 0,
        category_mask: 0,
        category_anyof_mask: PRESENT | SWAPPED,
        return_mask: FILES | PRESENT | SWAPPED,
    };
    // SAFETY: the kernel writes `walk_end`, and as many areas as it is told that there are.
    let count = check(unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut argument) })?;
    Ok((count as usize, argument.walk_end))
}
