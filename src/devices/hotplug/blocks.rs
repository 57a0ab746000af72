//! The blocks of hotplugged memory: which of them are plugged, how many are to be, and how many may be.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::{BLOCKS_MAX, Config};
use crate::error::{Error, Result};
use crate::memory;
use crate::snapshot;

const WORDS_MAX: usize = (BLOCKS_MAX / 64) as usize;

/// Where the blocks are, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The first address of the guest; 0: the machine has given none yet.
    pub start: u64,
    /// The size of all blocks together.
    pub total: u64,
    /// The size of a block.
    pub block: u64,
    /// The size of a slot.
    pub slot: u64,
}

impl Layout {
    /// The sizes of `config`, nowhere yet.
    pub fn new(config: &Config) -> Self {
        let [total, block, slot] =
            [config.total_size_mib, config.block_size_mib, config.slot_size_mib].map(|mib| mib << 20);
        Self { start: 0, total, block, slot }
    }

    /// The addresses of all blocks.
    pub fn range(&self) -> memory::Range {
        memory::Range { start: self.start, size: self.total }
    }

    /// The addresses of these blocks.
    pub fn addresses(&self, blocks: &Range<u64>) -> memory::Range {
        let size = (blocks.end - blocks.start) * self.block;
        memory::Range { start: self.start + blocks.start * self.block, size }
    }

    /// The slots that have some of these blocks, each as its blocks.
    pub fn slots(&self, blocks: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let per_slot = self.slot / self.block;
        (blocks.start / per_slot..blocks.end.div_ceil(per_slot))
            .map(move |slot| slot * per_slot..(slot + 1) * per_slot)
    }
}

/// The blocks that are plugged, and the sizes that were requested of the guest.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct State {
    /// A driver has been ready for the device since its last reset.
    pub is_driven: bool,
    /// The size that the guest is to have plugged, in bytes.
    pub requested: u64,
    /// The size of the part that may be plugged, in bytes from the first block on: the slots of the largest request since
    /// the driver last gave all back. A guest that plugs one block of each slot has no more memory for it.
    pub usable: u64,
    /// Readers of events know that as much is plugged as was requested last.
    pub is_told: bool,
    /// A bit for each block that is plugged.
    #[serde(deserialize_with = "snapshot::at_most::<WORDS_MAX, _, _>")]
    plugged: Vec<u64>,
}

impl State {
    /// Nothing is plugged or requested.
    pub fn new(layout: &Layout) -> Self {
        let words = (layout.total / layout.block).div_ceil(64) as usize;
        Self { is_driven: false, requested: 0, usable: 0, is_told: true, plugged: vec![0; words] }
    }

    /// Checks that a saved state fits the blocks of `layout`.
    ///
    /// # Errors
    /// The state is damaged, or another device's.
    pub fn check(&self, layout: &Layout) -> Result<()> {
        let blocks = layout.total / layout.block;
        let beyond =
            self.plugged.last().is_some_and(|last| !blocks.is_multiple_of(64) && last >> (blocks % 64) > 0);
        let is_sound = self.plugged.len() as u64 == blocks.div_ceil(64)
            && !beyond
            && self.requested <= layout.total
            && self.requested.is_multiple_of(layout.block)
            && self.usable <= layout.total
            && self.usable.is_multiple_of(layout.slot)
            && self.count(&(self.usable / layout.block..blocks)) == 0;
        match is_sound {
            true => Ok(()),
            false => Err(Error::config("the saved blocks of memory are not those of this device")),
        }
    }

    /// Has `size` bytes requested from now on.
    pub fn request(&mut self, size: u64, layout: &Layout) {
        (self.requested, self.is_told) = (size, false);
        self.usable = self.usable.max(size.next_multiple_of(layout.slot));
    }

    /// The blocks that a request of the driver names; None: they are not all in the part that may be used.
    pub fn blocks(&self, layout: &Layout, address: u64, count: u16) -> Option<Range<u64>> {
        let offset =
            address.checked_sub(layout.start).filter(|offset| offset.is_multiple_of(layout.block))?;
        let first = offset / layout.block;
        let end = first.checked_add(count.into())?;
        (count > 0 && end <= self.usable / layout.block).then_some(first..end)
    }

    /// How many of these blocks are plugged.
    pub fn count(&self, blocks: &Range<u64>) -> u64 {
        let of_word = |word: u64| {
            let bits = |at: u64| at.clamp(word * 64, word * 64 + 64) - word * 64;
            let mask = |bits: u64| if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
            let wanted = mask(bits(blocks.end)) & !mask(bits(blocks.start));
            let plugged = self.plugged.get(word as usize).map_or(0, |bits| bits & wanted);
            u64::from(plugged.count_ones())
        };
        (blocks.start / 64..blocks.end.div_ceil(64)).map(of_word).sum()
    }

    /// Notes that these blocks are plugged now, or not.
    pub fn set(&mut self, blocks: &Range<u64>, is_plugged: bool) {
        for block in blocks.clone() {
            if let Some(word) = self.plugged.get_mut((block / 64) as usize) {
                let bit = 1 << (block % 64);
                *word = if is_plugged { *word | bit } else { *word & !bit };
            }
        }
    }

    /// Counts the bytes that are plugged.
    pub fn plugged(&self, layout: &Layout) -> u64 {
        self.plugged.iter().map(|word| u64::from(word.count_ones())).sum::<u64>() * layout.block
    }
}

/// The state as the device shares it with its worker.
#[derive(Clone)]
pub struct Shared(Arc<Mutex<State>>);

impl Shared {
    /// Makes this state one that the device and its worker share.
    pub fn new(state: State) -> Self {
        Self(Arc::new(Mutex::new(state)))
    }

    /// The state, locked: nobody else changes it meanwhile.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::DeviceConfig;
    use super::*;

    /// Two slots of 65 blocks each, at 1 GiB.
    fn layout() -> Layout {
        let config = Config::from_option("260M,slot=130M", 0).unwrap();
        Layout { start: 1 << 30, ..Layout::new(&config) }
    }

    #[test]
    fn blocks_are_counted_wherever_they_begin_and_end() {
        let layout = layout();
        let mut state = State::new(&layout);
        state.set(&(63..66), true);
        state.set(&(129..130), true);
        for (blocks, expected) in
            [(0..130, 4), (0..63, 0), (63..64, 1), (64..65, 1), (60..70, 3), (66..129, 0), (5..5, 0)]
        {
            assert_eq!(state.count(&blocks), expected, "{blocks:?}");
        }
        state.set(&(64..65), false);
        assert_eq!((state.count(&(63..66)), state.plugged(&layout)), (2, 3 * layout.block));
        assert_eq!(layout.slots(&(64..66)).collect::<Vec<_>>(), [0..65, 65..130]);
        assert!(layout.slots(&(65..130)).eq(std::iter::once(65..130)));
        assert_eq!(layout.addresses(&(65..66)).start, (1 << 30) + layout.slot);
    }

    #[test]
    fn what_may_be_plugged_is_whole_slots_of_what_was_requested() {
        let layout = layout();
        let mut state = State::new(&layout);
        let first = layout.start;
        assert_eq!(state.blocks(&layout, first, 1), None);
        state.request(layout.block, &layout);
        assert_eq!(state.blocks(&layout, first + 64 * layout.block, 1), Some(64..65));
        state.request(0, &layout);
        for (address, count) in [
            (first, 0),
            (first - layout.block, 1),
            (first + 1, 1),
            (first, 66),
            (first, u16::MAX),
            (first + layout.slot, 1),
            (u64::MAX - layout.block + 1, 1),
            (0, 1),
        ] {
            assert_eq!(state.blocks(&layout, address, count), None, "{address:#x} {count}");
        }
    }

    #[test]
    fn a_state_that_cannot_be_is_refused() {
        let layout = layout();
        let state = State::new(&layout);
        state.check(&layout).unwrap();
        let changes: [fn(&mut State); 7] = [
            |state| state.requested = 1,
            |state| state.requested = 1 << 40,
            |state| state.usable = 1 << 20,
            |state| state.usable = 390 << 20,
            |state| state.plugged.push(0),
            |state| state.plugged[2] = 4,
            |state| state.plugged[0] = 1,
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut state = state.clone();
            change(&mut state);
            assert!(state.check(&layout).is_err(), "{number}");
        }
    }
}
