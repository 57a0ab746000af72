//! The memory slots of a virtual machine: which guest addresses KVM finds where in this process
//! (KVM api, 4.35).

use std::collections::BTreeMap;

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_ioctls::VmFd;

use super::kvm::{self, SlotPages};
use crate::error::{Context, Error, Result};
use crate::memory::{Range, Region};

/// The slots that are in use, by number.
#[derive(Default)]
pub struct Slots(BTreeMap<u32, Slot>);

struct Slot {
    range: Range,
    pages: SlotPages,
    /// KVM notes what the guest's CPUs write.
    is_tracked: bool,
}

impl Slots {
    /// Gives KVM a region, in the lowest slot that is free, and returns the slot.
    pub fn add(&mut self, fd: &VmFd, region: &Region, is_tracked: bool) -> Result<u32> {
        let range = region.range();
        let attempt = || format!("give KVM {} MiB of guest memory at {:#x}", range.size >> 20, range.start);
        let ends_before = |range: &Range, other: &Range| range.start + (range.size - 1) < other.start;
        let is_beside = |slot: &Slot| ends_before(&range, &slot.range) || ends_before(&slot.range, &range);
        if let Some(taken) = self.0.values().find(|slot| !is_beside(slot)) {
            return Err(Error::config(format!("{} are there already", taken.range))).with_context(attempt);
        }
        let slot = Slot { range, pages: SlotPages::of(region)?, is_tracked };
        let number = (0..).zip(self.0.keys()).find(|(free, used)| free != *used);
        let number = number.map_or(self.0.len() as u32, |(free, _)| free);
        set(fd, number, &slot, range.size).with_context(attempt)?;
        self.0.insert(number, slot);
        Ok(number)
    }

    /// Takes the region that is exactly `range` from KVM; its slot is free again. The guest finds nothing there
    /// any more.
    pub fn remove(&mut self, fd: &VmFd, range: Range) -> Result<()> {
        let attempt = || format!("take {range} of guest memory from KVM");
        let number = self.0.iter().find(|(_, slot)| slot.range == range).map(|(number, _)| *number);
        let number = number.ok_or_else(|| Error::config("it has no such region")).with_context(attempt)?;
        set(fd, number, &self.0[&number], 0).with_context(attempt)?;
        self.0.remove(&number);
        Ok(())
    }

    /// Has KVM note what the guest's CPUs write from now on, in all slots, or no more.
    pub fn track(&mut self, fd: &VmFd, is_tracked: bool) -> Result<()> {
        for (number, slot) in self.0.iter_mut().filter(|(_, slot)| slot.is_tracked != is_tracked) {
            let before = std::mem::replace(&mut slot.is_tracked, is_tracked);
            if let Err(error) = set(fd, *number, slot, slot.range.size) {
                slot.is_tracked = before;
                return Err(error).with_context(|| format!("note writes to {}", slot.range));
            }
        }
        Ok(())
    }

    /// The pages that the guest's CPUs wrote since the last call, or since `track`, by region: a bit for each page
    /// of the host's size, the first of them in the lowest bit of the first word.
    pub fn take_written(&self, fd: &VmFd) -> Result<Vec<(Range, Vec<u64>)>> {
        let tracked = self.0.iter().filter(|(_, slot)| slot.is_tracked);
        let taken = tracked.map(|(number, slot)| {
            let pages = fd.get_dirty_log(*number, slot.range.size as usize);
            Ok((slot.range, pages.with_context(|| format!("ask KVM what was written of {}", slot.range))?))
        });
        taken.collect()
    }

    /// Whether no slot is in use.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Which slot has which addresses.
    pub fn list(&self) -> Vec<(u32, Range)> {
        self.0.iter().map(|(number, slot)| (*number, slot.range)).collect()
    }
}

/// Tells KVM what a slot is; a `size` of 0 empties it.
fn set(fd: &VmFd, number: u32, slot: &Slot, size: u64) -> Result<()> {
    let flags = if slot.is_tracked { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
    let given = kvm::set_slot(fd, number, flags, slot.range.start, size, &slot.pages);
    given.map_err(|error| match error.errno() {
        // aarch64 says EFAULT of what is beyond its guests' addresses.
        libc::EINVAL | libc::EFAULT => {
            Error::config("it takes less: give the guest less (`mem_size_mib`, --memory)")
        }
        _ => Error::host(error.to_string()),
    })
}
