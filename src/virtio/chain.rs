//! A request as its driver describes it: a chain of descriptors (virtio 1.2, 2.7.5), read once. A driver
//! can change a descriptor at any time: who reads it twice may see two requests.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory};

use crate::error::{Error, Result};
use crate::memory::Regions;

/// One buffer of a request: what one descriptor names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins.
    pub address: GuestAddress,
    /// How many bytes it has.
    pub length: u32,
    /// The device may write it; else it may read it.
    pub is_writable: bool,
}

/// One request of the driver's, as it was when it was taken from its queue.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'q> {
    head: u16,
    memory: &'q Regions,
    pieces: &'q [Piece],
}

impl<'q> Chain<'q> {
    /// The request that begins with descriptor `head`, of these pieces of `memory`.
    pub fn new(head: u16, memory: &'q Regions, pieces: &'q [Piece]) -> Self {
        Self { head, memory, pieces }
    }

    /// By which it goes back to the driver.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Where its pieces lie.
    pub fn memory(&self) -> &'q Regions {
        self.memory
    }

    /// What its descriptors name, in their order.
    pub fn pieces(&self) -> &'q [Piece] {
        self.pieces
    }

    /// How many bytes the device may read.
    pub fn readable_length(&self) -> usize {
        let readable = self.pieces.iter().filter(|piece| !piece.is_writable);
        readable.map(|piece| piece.length as usize).sum()
    }

    /// Copies the first bytes that the device may read, as many as `bytes` has room for. False: there are fewer, or
    /// they lie outside of memory.
    pub fn read_front(&self, bytes: &mut [u8]) -> bool {
        let mut rest = bytes;
        for piece in self.pieces.iter().filter(|piece| !piece.is_writable) {
            let (here, after) = rest.split_at_mut(rest.len().min(piece.length as usize));
            if self.memory.read_slice(here, piece.address).is_err() {
                return false;
            }
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        rest.is_empty()
    }
}

/// Where a chain is to be looked for, and how long it may be.
pub(super) struct Table {
    pub address: GuestAddress,
    /// How many descriptors it has.
    pub size: u16,
    /// So many pieces a chain may have, direct and indirect together. An indirect table can have 65,535
    /// descriptors for each of a ring's requests, which all name the same byte: work for seconds, and a
    /// list of hundreds of megabytes.
    pub pieces_max: u16,
}

impl Table {
    /// Puts what the chain from `head` on names into `pieces`; returns how many descriptors were read. A
    /// chain that does not come to its end is the driver's fault: half a request is none.
    pub fn read(&self, memory: &Regions, head: u16, pieces: &mut Vec<Piece>) -> Result<u16> {
        pieces.clear();
        let (mut table, mut size, mut index) = (self.address, u32::from(self.size), head);
        let (mut is_indirect, mut total) = (false, 0_u32);
        loop {
            if u32::from(index) >= size {
                return Err(fault(format_args!("a chain goes to descriptor {index} of a table of {size}")));
            }
            let descriptor = read(memory, table, index)?;
            if descriptor.refers_to_indirect_table() {
                // 2.7.5.3.1: not within such a table, nothing may follow, and whole descriptors.
                let whole = descriptor.len().is_multiple_of(size_of::<Descriptor>() as u32);
                if is_indirect || descriptor.has_next() || !whole {
                    return Err(fault("an indirect table is in the wrong place or has a wrong length"));
                }
                (table, size, index) = (descriptor.addr(), descriptor.len() / 16, 0);
                is_indirect = true;
                continue;
            }
            if pieces.len() == usize::from(self.pieces_max) {
                let max = self.pieces_max;
                return Err(fault(format_args!("a request has more descriptors than the queue's {max}")));
            }
            // 2.7.5.2: more than 2^32 bytes are not allowed; a used length could not tell of them.
            let longer = total.checked_add(descriptor.len());
            total = longer.ok_or_else(|| fault("a request has 4 GiB or more"))?;
            pieces.push(Piece {
                address: descriptor.addr(),
                length: descriptor.len(),
                is_writable: descriptor.is_write_only(),
            });
            if !descriptor.has_next() {
                return Ok(pieces.len() as u16 + u16::from(is_indirect));
            }
            index = descriptor.next();
        }
    }
}

fn read(memory: &Regions, table: GuestAddress, index: u16) -> Result<Descriptor> {
    let offset = u64::from(index) * size_of::<Descriptor>() as u64;
    let address = table.0.checked_add(offset).map(GuestAddress);
    let descriptor = address.and_then(|address| {
        // Where it lies in one region, which is nearly always, it is read in one piece: a read that may go on
        // in another region takes several times the instructions.
        let slice = memory.get_slice(address, size_of::<Descriptor>()).ok();
        let whole = slice.and_then(|slice| Some(slice.get_ref(0).ok()?.load()));
        whole.or_else(|| memory.read_obj(address).ok())
    });
    descriptor.ok_or_else(|| fault(format_args!("a table of descriptors at {:#x} is not in memory", table.0)))
}

/// What a driver did that it must not do.
pub(super) fn fault(what: impl std::fmt::Display) -> Error {
    Error::guest(format!("the driver broke the ring: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Range, allocate};
    use vm_memory::GuestAddressSpace;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    const DIRECT_TABLE: u64 = 0x1000;
    const INDIRECT_TABLE: u64 = 0x8000;

    /// Reads the chain of a ring of `size` that a device offers with 256, whose descriptors these are:
    /// (address, length, flags, next); those of the indirect table follow the ring's.
    fn read(size: u16, tables: [&[(u64, u32, u16, u16)]; 2]) -> Result<(Vec<Piece>, u16)> {
        let memory = allocate(&[Range { start: 0, size: 1 << 20 }]).unwrap();
        let regions = memory.memory();
        for (table, start) in tables.iter().zip([DIRECT_TABLE, INDIRECT_TABLE]) {
            for (index, (address, length, flags, next)) in table.iter().enumerate() {
                let descriptor = Descriptor::new(*address, *length, *flags, *next);
                regions.write_obj(descriptor, GuestAddress(start + 16 * index as u64)).unwrap();
            }
        }
        let table = Table { address: GuestAddress(DIRECT_TABLE), size, pieces_max: 256 };
        // What an earlier request left is gone.
        let mut pieces = vec![Piece { address: GuestAddress(7), length: 7, is_writable: true }];
        let read = table.read(&regions, 0, &mut pieces)?;
        Ok((pieces, read))
    }

    /// So many that follow each other.
    fn line(count: u16) -> Vec<(u64, u32, u16, u16)> {
        let one = |index| (u64::from(index), 1, if index + 1 < count { NEXT } else { 0 }, index + 1);
        (0..count).map(one).collect()
    }

    /// `direct` ones and then so many by a table.
    fn mixed(direct: u16, indirect: u16) -> Result<(Vec<Piece>, u16)> {
        let mut ring = line(direct + 1);
        *ring.last_mut().unwrap() = (INDIRECT_TABLE, 16 * u32::from(indirect), INDIRECT | WRITE, 0);
        read(256, [&ring, &line(indirect)])
    }

    #[test]
    fn a_chain_is_read_as_it_is_direct_indirect_or_both() {
        let chain = [(0x10, 16, NEXT, 2), (9, 9, 9, 9), (0x20, 1, WRITE, 77)];
        let piece =
            |address, length, is_writable| Piece { address: GuestAddress(address), length, is_writable };
        let expected = vec![piece(0x10, 16, false), piece(0x20, 1, true)];
        assert_eq!(read(4, [&chain, &[]]).unwrap(), (expected.clone(), 2));
        let by_table = [(INDIRECT_TABLE, 48, INDIRECT, 0)];
        assert_eq!(read(4, [&by_table, &chain]).unwrap(), (expected.clone(), 3));
        let both = [(0x30, 8, NEXT, 3), (0, 0, 0, 0), (0, 0, 0, 0), (INDIRECT_TABLE, 48, INDIRECT, 0)];
        let all = [vec![piece(0x30, 8, false)], expected].concat();
        assert_eq!(read(4, [&both, &chain]).unwrap(), (all, 4));
        let memory = allocate(&[Range { start: 0, size: 4096 }]).unwrap();
        let regions = memory.memory();
        let pieces = [piece(0, 5, false), piece(0, 7, true), piece(0, u32::MAX, false)];
        assert_eq!(Chain::new(0, &regions, &pieces).readable_length(), 5 + u32::MAX as usize);
    }

    #[test]
    fn a_table_may_lie_across_two_regions() {
        let memory = allocate(&[Range { start: 0, size: 8192 }, Range { start: 8192, size: 8192 }]).unwrap();
        let regions = memory.memory();
        // The first descriptor begins in one region and ends in the other.
        for (index, flags) in [(0, NEXT), (1, WRITE)] {
            let descriptor = Descriptor::new(0x100, 8, flags, 1);
            regions.write_obj(descriptor, GuestAddress(8184 + 16 * index)).unwrap();
        }
        let table = Table { address: GuestAddress(8184), size: 2, pieces_max: 2 };
        let mut pieces = Vec::new();
        assert_eq!(table.read(&regions, 0, &mut pieces).unwrap(), 2);
        let piece = |is_writable| Piece { address: GuestAddress(0x100), length: 8, is_writable };
        assert_eq!(pieces, [piece(false), piece(true)]);
    }

    #[test]
    fn as_many_as_the_device_offers_pass_and_one_more_is_a_fault() {
        assert_eq!(read(256, [&line(256), &[]]).unwrap().0.len(), 256);
        for (direct, indirect) in [(0, 256), (1, 255), (255, 1)] {
            assert_eq!(mixed(direct, indirect).unwrap().0.len(), 256, "{direct} + {indirect}");
            let error = mixed(direct, indirect + 1).unwrap_err().to_string();
            assert!(error.contains("more descriptors than the queue's 256"), "{error}");
        }
        // A ring that the driver chose smaller has room for a table all the same.
        let by_table = [(INDIRECT_TABLE, 16 * 256, INDIRECT, 0)];
        assert_eq!(read(128, [&by_table, &line(256)]).unwrap().0.len(), 256);
    }

    #[test]
    fn a_chain_that_does_not_come_to_its_end_is_a_fault() {
        let table = (INDIRECT_TABLE, 32, INDIRECT, 0);
        let (goes_on, last) = ((0, 1, NEXT, 1), (0, 1, 0, 0));
        for (ring, indirect, expected) in [
            (vec![(0, 1, NEXT, 0)], vec![], "more descriptors than"),
            (vec![(0, 1, NEXT, 4)], vec![], "to descriptor 4 of a table of 4"),
            (vec![(0, 1, NEXT, 65535)], vec![], "to descriptor 65535"),
            (vec![table], vec![(0, 1, NEXT, 2), last], "to descriptor 2 of a table of 2"),
            (vec![table], vec![goes_on, (0, 1, NEXT, 0)], "more descriptors than"),
            (vec![table], vec![goes_on, table], "an indirect table is in the wrong place"),
            (vec![(INDIRECT_TABLE, 32, INDIRECT | NEXT, 1), last], vec![last], "in the wrong place"),
            (vec![(INDIRECT_TABLE, 31, INDIRECT, 0)], vec![last], "a wrong length"),
            (vec![(INDIRECT_TABLE, 0, INDIRECT, 0)], vec![last], "to descriptor 0 of a table of 0"),
            (vec![(1 << 40, 32, INDIRECT, 0)], vec![], "at 0x10000000000 is not in memory"),
            (vec![(u64::MAX - 7, 32, INDIRECT, 0)], vec![], "is not in memory"),
            (vec![(0, u32::MAX, NEXT, 1), last], vec![], "has 4 GiB or more"),
        ] {
            let error = read(4, [&ring, &indirect]).unwrap_err().to_string();
            assert!(error.starts_with("the driver broke the ring: ") && error.contains(expected), "{error}");
        }
    }
}
