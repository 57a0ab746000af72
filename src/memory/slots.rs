//! Guest memory that comes and goes while the guest runs, in slots of one size: those of memory hotplug.
//!
//! A device may be at work in a slot that a hostile guest takes away: the addresses of this process that a slot has had
//! stay mapped, and are used again when it comes back. A slot that is gone costs address space, and no memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use super::mapping::Mapping;
use super::{Memory, Range, Region, Source};
use crate::error::{Context, Error, Result};
use crate::log;

/// A machine has no more slots of such memory: each takes one of KVM's, of which there are 32764 and were 509, and one
/// mapping of this process, of which it may have 65530.
pub const SLOTS_MAX: u64 = 4096;

/// The addresses of the guest at which such memory can be, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// How many addresses.
    pub size: u64,
    /// The size of a slot, which divides that.
    pub slot: u64,
    /// The room begins at a multiple of this.
    pub alignment: u64,
}

/// Gives a guest memory in slots, and takes it away again.
pub trait Slots: Send + Sync {
    /// Gives the guest memory of zeros at `range`, which is a slot. No effect on one that is there.
    ///
    /// # Errors
    /// The host has no room for it, KVM does not take it, or no memory may come now.
    fn add(&self, range: Range) -> Result<()>;
    /// Takes the slot at `range` away, and gives its pages back to the host. No effect on one that is not there.
    ///
    /// # Errors
    /// KVM does not give it up, or no memory may go now: the slot is as it was.
    fn remove(&self, range: Range) -> Result<()>;
    /// The slots that are there and lie `within` this range.
    fn list(&self, within: Range) -> Vec<Range>;
}

/// The slots of one guest, in `memory`.
pub struct Held {
    memory: Memory,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The addresses that slots have in this process, by their first address in the guest, once they were taken away.
    kept: BTreeMap<u64, Arc<Mapping>>,
    /// The number of holders for whom no memory may come or go.
    holds: usize,
}

impl Held {
    /// No slots yet, in `memory`.
    pub fn new(memory: Memory) -> Self {
        Self { memory, state: Mutex::default() }
    }

    /// Has no slot come or go until [`Self::release`] is called as often.
    pub fn hold(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).holds += 1;
    }

    /// Undoes [`Self::hold`].
    pub fn release(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.holds = state.holds.saturating_sub(1);
    }

    fn find(&self, range: Range) -> bool {
        let memory = self.memory.memory();
        memory.find_region(GuestAddress(range.start)).is_some_and(|region: &Region| region.range() == range)
    }

    /// Does what [`Slots::add`] does, with pages of `source`; `give` is told of the region before any device can find it.
    ///
    /// # Errors
    /// The host has no room for it, `give` says no, or no memory may come now.
    pub fn add(
        &self,
        range: Range,
        source: Source<'_>,
        give: impl FnOnce(&Region) -> Result<()>,
    ) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if self.find(range) {
            return Ok(());
        }
        state.check_held()?;
        let region = match state.kept.get(&range.start) {
            Some(mapping) if mapping.size() as u64 >= range.size => {
                source.check(&[range])?;
                Region::over(mapping.clone(), range, source)?
            }
            _ => super::map_region(range, source)?,
        };
        let region = Arc::new(region);
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let regions = self.memory.memory().insert_region(region.clone()).context("lay out guest memory")?;
        give(&region)?;
        state.kept.extend(region.mapping().map(|mapping| (range.start, mapping)));
        memory.replace(regions);
        Ok(())
    }

    /// Does what [`Slots::remove`] does; `take` is told of the slot before its pages are given back.
    ///
    /// # Errors
    /// `take` says no, or no memory may go now.
    pub fn remove(&self, range: Range, take: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.find(range) {
            return Ok(());
        }
        state.check_held()?;
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let removed = self.memory.memory().remove_region(GuestAddress(range.start), range.size);
        let (regions, region) = removed.context("lay out guest memory")?;
        take()?;
        memory.replace(regions);
        if let Some(mapping) = region.mapping() {
            // A request that a device has in flight there reads and writes zeros, which nobody sees.
            if let Err(error) = mapping.clear(range.size as usize) {
                log::error(format_args!("{range} of guest memory are unplugged and not given back: {error}"));
            }
            state.kept.insert(range.start, mapping);
        }
        Ok(())
    }
}

impl State {
    fn check_held(&self) -> Result<()> {
        match self.holds {
            0 => Ok(()),
            _ => Err(Error::host("a snapshot of the guest is being written")),
        }
    }
}

/// Memory of zeros for who has no KVM.
impl Slots for Held {
    fn add(&self, range: Range) -> Result<()> {
        self.add(range, Source::Anonymous, |_| Ok(()))
    }

    fn remove(&self, range: Range) -> Result<()> {
        self.remove(range, || Ok(()))
    }

    fn list(&self, within: Range) -> Vec<Range> {
        let memory = self.memory.memory();
        memory.iter().map(Region::range).filter(|range| within.contains(*range)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;
    use vm_memory::Bytes;

    const SLOT: u64 = 2 << 20;

    #[test]
    fn a_slot_that_comes_back_has_the_addresses_that_it_had_and_zeros() {
        let memory = allocate(&[Range { start: 0, size: SLOT }]).unwrap();
        let held = Held::new(memory.clone());
        let slots = [4, 6].map(|number| Range { start: number * SLOT, size: SLOT });
        let place = |slot: Range| {
            let memory = memory.memory();
            memory.find_region(GuestAddress(slot.start)).map(|region: &Region| region.as_ptr() as usize)
        };
        for slot in slots {
            Slots::add(&held, slot).unwrap();
            memory.memory().write_obj(7_u8, GuestAddress(slot.start + 5)).unwrap();
        }
        assert_eq!(held.list(Range { start: 0, size: u64::MAX }).len(), 3);
        assert_eq!(held.list(Range { start: SLOT, size: 8 * SLOT }), slots);
        let before = slots.map(place);
        // A device that was given the memory before has it for as long as it wants.
        let old = memory.memory();
        Slots::remove(&held, slots[0]).unwrap();
        Slots::remove(&held, slots[0]).unwrap();
        assert_eq!(slots.map(place), [None, before[1]]);
        assert_eq!(old.read_obj::<u8>(GuestAddress(slots[0].start + 5)).unwrap(), 0);
        old.write_obj(9_u8, GuestAddress(slots[1].start)).unwrap();
        held.hold();
        assert!(Slots::add(&held, slots[0]).is_err() && Slots::remove(&held, slots[1]).is_err());
        held.release();
        Slots::add(&held, slots[0]).unwrap();
        assert_eq!(slots.map(place), before);
        assert_eq!(memory.memory().read_obj::<u8>(GuestAddress(slots[0].start + 5)).unwrap(), 0);
        assert_eq!(memory.memory().read_obj::<u8>(GuestAddress(slots[1].start)).unwrap(), 9);
        let overlapping = Range { start: slots[0].start + SLOT / 2, size: SLOT };
        assert!(Slots::add(&held, overlapping).is_err());
    }
}
