//! What a guest has sent and the host's program has not read: kept in blocks of memory that all connections
//! of a device share.

use super::flow::Promises;

/// The size of a block, in bytes.
pub const BLOCK: usize = 4096;
/// What all connections of a guest together may keep, in blocks (64 MiB): a guest that sends to thousands of
/// programs that do not read would take up as many windows.
pub const BLOCKS_MAX: usize = (64 << 20) / BLOCK;
/// So many blocks that nobody needs stay allocated for the next who does.
const SPARE_MAX: usize = 64;
/// No block.
const NONE: u16 = u16::MAX;

/// The blocks of all connections.
#[derive(Default)]
pub struct Blocks {
    all: Vec<Block>,
    /// The first of the blocks that nobody uses and that have memory.
    spare: Chain,
    /// The first of those without memory.
    empty: Chain,
    in_use: usize,
    /// What the guest was told that it may send.
    pub promises: Promises,
}

#[derive(Default)]
struct Block {
    bytes: Option<Box<[u8; BLOCK]>>,
    /// The block after this one in its chain.
    next: u16,
}

/// A stack of blocks.
struct Chain {
    first: u16,
    length: usize,
}

impl Default for Chain {
    fn default() -> Self {
        Self { first: NONE, length: 0 }
    }
}

impl Blocks {
    /// How many bytes of memory are in use.
    #[cfg(test)]
    fn in_use(&self) -> usize {
        self.in_use * BLOCK
    }

    /// A block that nobody uses; none: all are in use.
    fn take(&mut self) -> Option<u16> {
        let index = match (self.spare.first, self.empty.first) {
            (NONE, NONE) if self.all.len() < BLOCKS_MAX => {
                self.all.push(Block::default());
                self.all.len() as u16 - 1
            }
            (NONE, NONE) => return None,
            (NONE, _) => pop(&mut self.all, &mut self.empty),
            _ => pop(&mut self.all, &mut self.spare),
        };
        let block = &mut self.all[usize::from(index)];
        block.bytes.get_or_insert_with(|| Box::new([0; BLOCK]));
        block.next = NONE;
        self.in_use += 1;
        Some(index)
    }

    /// Takes a block back.
    fn give(&mut self, index: u16) {
        self.in_use -= 1;
        let is_spare = self.spare.length < SPARE_MAX;
        if !is_spare {
            self.all[usize::from(index)].bytes = None;
        }
        let chain = if is_spare { &mut self.spare } else { &mut self.empty };
        self.all[usize::from(index)].next = chain.first;
        (chain.first, chain.length) = (index, chain.length + 1);
    }

    fn kept(&self, index: u16) -> &[u8; BLOCK] {
        self.all[usize::from(index)].bytes.as_ref().expect("a block in use has memory")
    }

    fn bytes(&mut self, index: u16) -> &mut [u8; BLOCK] {
        self.all[usize::from(index)].bytes.as_mut().expect("a block in use has memory")
    }
}

fn pop(all: &mut [Block], chain: &mut Chain) -> u16 {
    let index = chain.first;
    (chain.first, chain.length) = (all[usize::from(index)].next, chain.length - 1);
    index
}

/// What is kept for one connection: bytes in blocks, first in, first out. It has no memory when it is empty.
pub struct Backlog {
    first: u16,
    last: u16,
    /// Where the bytes begin in the first block.
    start: u16,
    /// Where they end in the last one.
    end: u16,
    length: u32,
}

impl Default for Backlog {
    fn default() -> Self {
        Self { first: NONE, last: NONE, start: 0, end: 0, length: 0 }
    }
}

impl Backlog {
    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Room for bytes at the end, at most `most`, which then count as kept; the caller fills them. None: all
    /// blocks are in use.
    pub fn room<'b>(&mut self, blocks: &'b mut Blocks, most: usize) -> Option<&'b mut [u8]> {
        if self.last == NONE || usize::from(self.end) == BLOCK {
            let block = blocks.take()?;
            match self.last {
                NONE => (self.first, self.start) = (block, 0),
                last => blocks.all[usize::from(last)].next = block,
            }
            (self.last, self.end) = (block, 0);
        }
        let start = usize::from(self.end);
        let end = BLOCK.min(start + most);
        self.end = end as u16;
        self.length += (end - start) as u32;
        Some(&mut blocks.bytes(self.last)[start..end])
    }

    /// Calls `each` with the pieces of what is kept, in their order, until it returns false.
    pub fn pieces<'b>(&self, blocks: &'b Blocks, mut each: impl FnMut(&'b [u8]) -> bool) {
        let (mut block, mut start) = (self.first, usize::from(self.start));
        while block != NONE {
            let end = if block == self.last { usize::from(self.end) } else { BLOCK };
            if !each(&blocks.kept(block)[start..end]) {
                break;
            }
            (block, start) = (blocks.all[usize::from(block)].next, 0);
        }
    }

    /// Forgets the first `count` bytes, which must be there.
    pub fn advance(&mut self, blocks: &mut Blocks, mut count: usize) {
        self.length -= count as u32;
        while self.first != NONE {
            let end = if self.first == self.last { usize::from(self.end) } else { BLOCK };
            let here = count.min(end - usize::from(self.start));
            (self.start, count) = (self.start + here as u16, count - here);
            if usize::from(self.start) < end {
                return;
            }
            let next = blocks.all[usize::from(self.first)].next;
            blocks.give(self.first);
            (self.first, self.start) = (next, 0);
        }
        *self = Self::default();
    }

    /// Forgets everything.
    pub fn clear(&mut self, blocks: &mut Blocks) {
        self.advance(blocks, self.length as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(backlog: &mut Backlog, blocks: &mut Blocks, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len()
            && let Some(room) = backlog.room(blocks, bytes.len() - done)
        {
            let count = room.len();
            room.copy_from_slice(&bytes[done..done + count]);
            done += count;
        }
        done
    }

    fn take(backlog: &mut Backlog, blocks: &mut Blocks, most: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        backlog.pieces(blocks, |piece| {
            bytes.extend_from_slice(piece);
            bytes.len() < most
        });
        bytes.truncate(most);
        backlog.advance(blocks, bytes.len());
        bytes
    }

    #[test]
    fn bytes_come_out_as_they_went_in_and_leave_no_memory() {
        let (mut blocks, mut backlogs) = (Blocks::default(), [(); 3].map(|()| Backlog::default()));
        let mut expected = [(); 3].map(|()| Vec::new());
        let mut next = 0_u8;
        for round in 0..200_usize {
            let one = round * 7 % 3;
            let bytes: Vec<u8> = (0..round * 131 % 9000).map(|at| (at as u8).wrapping_add(next)).collect();
            next = next.wrapping_add(77);
            assert_eq!(put(&mut backlogs[one], &mut blocks, &bytes), bytes.len());
            expected[one].extend(bytes);
            let other = round * 5 % 3;
            let most = round * 97 % 12_000;
            let taken = take(&mut backlogs[other], &mut blocks, most);
            assert_eq!(taken.len(), most.min(expected[other].len()));
            assert!(expected[other].drain(..taken.len()).eq(taken), "round {round}");
        }
        for (backlog, expected) in backlogs.iter_mut().zip(&expected) {
            assert_eq!(backlog.is_empty(), expected.is_empty());
            let kept = blocks.in_use();
            backlog.clear(&mut blocks);
            assert!(backlog.is_empty() && blocks.in_use() <= kept);
        }
        assert_eq!(blocks.in_use(), 0);
        let allocated = blocks.all.iter().filter(|block| block.bytes.is_some()).count();
        assert!(allocated <= SPARE_MAX, "{allocated} blocks are kept for nobody");
    }

    #[test]
    fn all_together_keep_no_more_than_the_limit() {
        let (mut blocks, mut one, mut other) = (Blocks::default(), Backlog::default(), Backlog::default());
        assert_eq!(put(&mut other, &mut blocks, b"x"), 1);
        let all = BLOCKS_MAX * BLOCK;
        assert_eq!(put(&mut one, &mut blocks, &vec![1; all]), all - BLOCK);
        assert_eq!((blocks.in_use(), put(&mut one, &mut blocks, b"y")), (all, 0));
        // What has room in a block goes on.
        assert_eq!(put(&mut other, &mut blocks, b"yz"), 2);
        one.advance(&mut blocks, BLOCK);
        assert_eq!(put(&mut one, &mut blocks, &[2; BLOCK + 1]), BLOCK);
        one.clear(&mut blocks);
        assert_eq!((take(&mut other, &mut blocks, 9), blocks.in_use()), (b"xyz".to_vec(), 0));
    }
}
