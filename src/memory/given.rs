//! Guest memory that is given back to the host.

use std::io::Result as IoResult;

use vm_memory::GuestMemoryBackend;

use super::mapping::page_size;
use super::{Range, Regions};

/// Gives the host back all of its pages that lie in `range` as a whole, and returns how many bytes these are. The range
/// may be anything: the parts of it that are no memory are left out. A guest that touches these addresses later finds
/// new pages there: of zeros, or of the file that its memory came from. Huge pages of the host's pool stay: one that
/// somebody else has taken meanwhile would be missing when the guest touches it, which would end this process.
///
/// # Errors
/// The kernel's, of madvise(2): what it refuses in one region is not tried in the next.
pub fn give_back(memory: &Regions, range: Range) -> IoResult<u64> {
    let page = page_size();
    let end = range.start.saturating_add(range.size);
    let mut given = 0;
    for region in memory.iter() {
        let own = region.range();
        if region.is_huge() || range.start >= own.end() || end <= own.start {
            continue;
        }
        let first = (range.start.max(own.start) - own.start).next_multiple_of(page);
        let last = (end.min(own.end()) - own.start) / page * page;
        if first < last {
            region.give_back(first as usize, (last - first) as usize)?;
            given += last - first;
        }
    }
    Ok(given)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Source, allocate, map};
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    const MIB: u64 = 1 << 20;

    fn ranges() -> [Range; 2] {
        [0, 4 * MIB].map(|start| Range { start, size: 2 * MIB })
    }

    #[test]
    fn whole_pages_alone_are_given_back_of_every_kind_of_memory() {
        let page = page_size();
        for source in [Source::Anonymous, Source::Shared] {
            let memory = map(&ranges(), source).unwrap();
            let memory = memory.memory();
            memory.iter().for_each(|region| region.written().start());
            for range in ranges() {
                memory.write_slice(&vec![7; range.size as usize], GuestAddress(range.start)).unwrap();
            }
            memory.iter().for_each(|region| drop(region.written().take()));
            // From the middle of a page of one region into the other one, and what lies between is no memory.
            let start = 2 * MIB - 2 * page - page / 2;
            let range = Range { start, size: 2 * MIB + 4 * page };
            assert_eq!(give_back(&memory, range).unwrap(), 3 * page);
            let byte = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
            assert_eq!([byte(start), byte(2 * MIB - 2 * page - 1), byte(4 * MIB + page)], [7, 7, 7]);
            assert_eq!([byte(2 * MIB - 2 * page), byte(2 * MIB - 1), byte(4 * MIB + page - 1)], [0, 0, 0]);
            let [low, high] = [0, 1].map(|index| memory.iter().nth(index).unwrap());
            assert!(low.written().dirty_at((2 * MIB - page) as usize) && high.written().dirty_at(0));
            assert!(!low.written().dirty_at((2 * MIB - 3 * page) as usize));
            assert!(!high.written().dirty_at(page as usize));
        }
    }

    #[test]
    fn what_is_no_memory_is_left_out() {
        let memory = allocate(&ranges()).unwrap();
        let memory = memory.memory();
        for (start, size, given) in [
            (2 * MIB, 2 * MIB, 0),
            (6 * MIB, u64::MAX, 0),
            (u64::MAX, u64::MAX, 0),
            (u64::MAX - 1, 1, 0),
            (0, 0, 0),
            (1, page_size(), 0),
            (0, u64::MAX, 4 * MIB),
        ] {
            assert_eq!(give_back(&memory, Range { start, size }).unwrap(), given, "{start:#x} {size:#x}");
        }
    }

    #[test]
    fn what_comes_from_a_file_is_as_in_the_file_again() {
        let file = crate::memory::mapping::memory_file(2 * MIB).unwrap();
        let range = Range { start: 0, size: 2 * MIB };
        let pieces = [crate::memory::Piece { range, position: 0 }];
        std::os::unix::fs::FileExt::write_all_at(&file, &[9], 0).unwrap();
        let memory = map(&[range], Source::Private { file: &file, pieces: &pieces }).unwrap();
        let memory = memory.memory();
        memory.write_obj(7_u8, GuestAddress(0)).unwrap();
        assert_eq!(give_back(&memory, range).unwrap(), 2 * MIB);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 9);
    }
}
