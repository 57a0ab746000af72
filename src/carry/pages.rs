//! Some pages of a guest's memory, on their way to its file: copied there while the guest may go on, or kept in
//! memory first, for a guest that is not to wait for a disk.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::memory_file::{self, BLOCK};
use super::pagemap::{Pagemap, Which};
use crate::error::{Context, Result};
use crate::memory::mapping::page_size;
use crate::memory::page_set::PageSet;
use crate::memory::{Piece, Range, Region, Regions};

/// Where the regions of `memory` lie in its file.
pub fn places(memory: &Regions) -> Vec<Piece> {
    let ranges: Vec<_> = memory.iter().map(Region::range).collect();
    let positions = memory_file::offsets(&ranges);
    ranges.into_iter().zip(positions).map(|(range, position)| Piece { range, position }).collect()
}

/// The runs of `pages` with their positions in the file, in pieces that each lie in one block of the file. What is in no
/// region is left out.
pub fn pieces<'p>(places: &'p [Piece], pages: &'p PageSet) -> impl Iterator<Item = Piece> + use<'p> {
    pages.runs().flat_map(move |run| {
        let place = places.iter().find(|place| place.range.contains(run));
        place.into_iter().flat_map(move |place| {
            let mut left = Piece { range: run, position: place.position + (run.start - place.range.start) };
            std::iter::from_fn(move || {
                let size = left.range.size.min(BLOCK as u64 - left.position % BLOCK as u64);
                let piece = Piece { range: Range { size, ..left.range }, ..left };
                left.range = Range { start: left.range.start + size, size: left.range.size - size };
                left.position += size;
                (size > 0).then_some(piece)
            })
        })
    })
}

/// The pages that this process has of its own: of a guest that was restored, those that are not as in the file that it
/// was restored from; of another one, all that were touched.
///
/// # Errors
/// The kernel does not tell.
pub fn own(memory: &Regions, pagemap: &Pagemap) -> Result<PageSet> {
    those(Which::Own, memory, pagemap)
}

/// The pages of `memory` that `which` is for. Of memory that is a file's and this process's at once, all are.
///
/// # Errors
/// The kernel does not tell.
pub fn those(which: Which, memory: &Regions, pagemap: &Pagemap) -> Result<PageSet> {
    let mut regions = Vec::new();
    for region in memory.iter() {
        let pages = (region.len() / page_size()) as usize;
        let mut words = vec![0; pages.div_ceil(64)];
        if region.file().is_some() {
            words.fill(u64::MAX);
        } else {
            let host = region.get_host_address(MemoryRegionAddress(0)).context("find a page of the guest")?;
            pagemap.each(which, host as usize, pages, |page| words[page / 64] |= 1 << (page % 64))?;
        }
        regions.push((region.range(), words));
    }
    Ok(PageSet::new(regions))
}

/// Writes `pages` of `memory` to their places in `file`, as they are at this moment.
///
/// # Errors
/// The pages cannot be read, or the file cannot be written.
pub fn write(memory: &Regions, pages: &PageSet, file: &File) -> Result<()> {
    let mut buffer = vec![0; BLOCK];
    for piece in pieces(&places(memory), pages) {
        write_piece(memory, piece, &mut buffer, file)?;
    }
    Ok(())
}

/// Writes a piece of `memory` to its place in `file`, by way of `buffer`, which has a block, and returns what was written.
///
/// # Errors
/// The pages cannot be read, or the file cannot be written.
pub fn write_piece<'b>(
    memory: &Regions,
    piece: Piece,
    buffer: &'b mut [u8],
    file: &File,
) -> Result<&'b [u8]> {
    let bytes = &mut buffer[..piece.range.size as usize];
    memory.read_slice(bytes, GuestAddress(piece.range.start)).context("read pages of the guest")?;
    file.write_all_at(bytes, piece.position).context("write to it")?;
    Ok(bytes)
}
