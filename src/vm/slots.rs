//! The memory slots of a virtual machine: which guest addresses KVM finds where in this process
//! (KVM api, 4.35).

use std::collections::BTreeMap;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
use kvm_ioctls::VmFd;

use crate::error::{Context, Error, Result};
use crate::kvm::{self, SlotPages};
use crate::memory::registers::{self, RegisterPage};
use crate::memory::window::Window;
use crate::memory::{Range, Region};

/// The most that a slot takes: KVM counts its pages by 31 bits (KVM_MEM_MAX_NR_PAGES of Linux), of 4 KiB at least.
const PIECE_MIB_MAX: u64 = ((1 << 31) - 1) >> 8;

/// The slots that are in use, by number.
#[derive(Default)]
pub struct Slots(BTreeMap<u32, Slot>);

struct Slot {
    range: Range,
    pages: SlotPages,
    kind: Kind,
}

/// The content of a slot.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The guest's memory, of which KVM notes what the guest's CPUs write if it `is_tracked`.
    Memory { is_tracked: bool },
    /// A window's view. Nobody wants to know what is written there: no snapshot has it.
    Window { is_read_only: bool },
    /// The registers of a device, which the guest reads from memory.
    Registers,
}

impl Kind {
    fn flags(self) -> u32 {
        match self {
            Self::Memory { is_tracked: true } => KVM_MEM_LOG_DIRTY_PAGES,
            Self::Window { is_read_only: true } | Self::Registers => KVM_MEM_READONLY,
            _ => 0,
        }
    }
}

impl Slots {
    /// Gives KVM a region, in the lowest slot that is free, and returns the slot.
    pub fn add(&mut self, fd: &VmFd, region: &Region, is_tracked: bool) -> Result<u32> {
        let range = region.range();
        let attempt = || format!("give KVM {} MiB of guest memory at {:#x}", range.size >> 20, range.start);
        let pages = SlotPages::of(region).with_context(attempt)?;
        self.put(fd, Slot { range, pages, kind: Kind::Memory { is_tracked } }).with_context(attempt)
    }

    /// Does the same with a window.
    pub fn add_window(&mut self, fd: &VmFd, Window { range, view }: &Window) -> Result<u32> {
        let kind = Kind::Window { is_read_only: view.is_read_only() };
        let slot = Slot { range: *range, pages: SlotPages::of_view(view), kind };
        self.put(fd, slot)
            .with_context(|| format!("give KVM a window of {} MiB at {:#x}", range.size >> 20, range.start))
    }

    /// Does the same with a page of registers, which the guest reads at `start`.
    pub fn add_registers(&mut self, fd: &VmFd, start: u64, page: &Arc<RegisterPage>) -> Result<u32> {
        let range = Range { start, size: registers::SIZE };
        let slot = Slot { range, pages: SlotPages::of_registers(page), kind: Kind::Registers };
        self.put(fd, slot).with_context(|| format!("give KVM registers at {start:#x}"))
    }

    fn put(&mut self, fd: &VmFd, slot: Slot) -> Result<u32> {
        let range = slot.range;
        let ends_before = |range: &Range, other: &Range| range.start + (range.size - 1) < other.start;
        let is_beside = |other: &Slot| ends_before(&range, &other.range) || ends_before(&other.range, &range);
        if let Some(taken) = self.0.values().find(|other| !is_beside(other)) {
            return Err(Error::config(format!("{} are there already", taken.range)));
        }
        let number = (0..).zip(self.0.keys()).find(|(free, used)| free != *used);
        let number = number.map_or(self.0.len() as u32, |(free, _)| free);
        set(fd, number, &slot, range.size)?;
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

    /// Whether KVM notes what the guest's CPUs write to memory.
    pub fn is_tracked(&self) -> bool {
        self.0.values().any(|slot| slot.kind == Kind::Memory { is_tracked: true })
    }

    /// Has KVM note what the guest's CPUs write from now on, in all slots of memory, or no more.
    pub fn track(&mut self, fd: &VmFd, is_tracked: bool) -> Result<()> {
        let (before, after) = (Kind::Memory { is_tracked: !is_tracked }, Kind::Memory { is_tracked });
        for (number, slot) in self.0.iter_mut().filter(|(_, slot)| slot.kind == before) {
            slot.kind = after;
            if let Err(error) = set(fd, *number, slot, slot.range.size) {
                slot.kind = before;
                return Err(error).with_context(|| format!("note writes to {}", slot.range));
            }
        }
        Ok(())
    }

    /// The pages that the guest's CPUs wrote since the last call, or since `track`, by region: a bit for each page
    /// of the host's size, the first of them in the lowest bit of the first word.
    pub fn take_written(&self, fd: &VmFd) -> Result<Vec<(Range, Vec<u64>)>> {
        let tracked = self.0.iter().filter(|(_, slot)| slot.kind == Kind::Memory { is_tracked: true });
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
    let given = kvm::set_slot(fd, number, slot.kind.flags(), slot.range.start, size, &slot.pages);
    given.map_err(|error| match (error.errno(), slot.kind) {
        // aarch64 says EFAULT of what is beyond its guests' addresses.
        (libc::EINVAL | libc::EFAULT, Kind::Memory { .. }) => {
            Error::config(format!(
                "it takes less, {PIECE_MIB_MAX} MiB in one piece at most, and fewer addresses where the host's CPU has \
                 fewer: give the guest less (`mem_size_mib`, --memory)"
            ))
        }
        (libc::EINVAL | libc::EFAULT, Kind::Window { .. }) => Error::config(
            "it takes less, or nothing so far up: give the guest a smaller file, or less memory (`mem_size_mib`, \
             --memory)",
        ),
        _ => Error::host(error.to_string()),
    })
}
