//! Guest memory that comes and goes after the machine was built, and what is written to it.

use std::sync::{Arc, PoisonError};

use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use super::{Machine, RunState, windows};
use crate::arch::layout;
use crate::config::HugePages;
use crate::error::{Context, Error, Result};
use crate::log;
use crate::memory::page_set::PageSet;
use crate::memory::slots::{self, Held, Slots as _};
use crate::memory::{self, Memory, Range, Region, Regions, Source};
use crate::platform::Place;
use crate::sys::process::order_all_threads;
use crate::vm::Vm;
use crate::vm::brake::Brake;

/// The largest memory whose addresses `layout` is asked for: no processor of today has more address bits than 52.
const ADDRESSES: u64 = 1 << 52;

impl Machine {
    /// Whether other processes can map its memory: it was built with a device whose work another one does.
    pub fn shares_memory(&self) -> bool {
        self.memory.memory().iter().all(|region| region.file().is_some())
    }

    /// Gives the guest memory at `range`, with the content that `source` has for it. The guest may run, and has to
    /// be told: no boot table says so.
    ///
    /// # Errors
    /// The range is not whole pages, is not where this architecture's memory can be, or is taken already.
    pub fn add_memory(&mut self, range: Range, source: Source<'_>) -> Result<()> {
        let attempt = || format!("add {range} of guest memory");
        if !layout::memory(ADDRESSES).iter().any(|possible| possible.contains(range)) {
            let reason = "there is more than memory, or a device, at these addresses";
            return Err(Error::config(reason)).with_context(attempt);
        }
        let source = self.huge_pages.source(source).with_context(attempt)?;
        let region = memory::map_region(range, source).with_context(attempt)?;
        self.huge_pages.choose(&region);
        if self.tracks_writes {
            region.written().start();
        }
        let region = Arc::new(region);
        let regions = self.memory.memory().insert_region(region.clone()).with_context(attempt)?;
        let slot = self.vm.add_memory(&region, self.tracks_writes)?;
        self.replace_memory(regions);
        log::debug(format_args!("added {range} of guest memory in slot {slot}"));
        Ok(())
    }

    /// Takes the memory at `range`, one region exactly, from the guest, which must be paused: a device that works
    /// could be writing there. The guest has to know that nothing is there any more.
    ///
    /// # Errors
    /// The machine runs, or no region is exactly there.
    pub fn remove_memory(&mut self, range: Range) -> Result<()> {
        let attempt = || format!("remove {range} of guest memory");
        if self.state != RunState::Paused {
            return Err(Error::config("the machine runs: pause it first")).with_context(attempt);
        }
        let memory = self.memory.memory();
        let removed = memory.remove_region(GuestAddress(range.start), range.size);
        let (regions, _removed) = removed.with_context(attempt)?;
        self.vm.remove_memory(range)?;
        self.replace_memory(regions);
        Ok(())
    }

    /// Notes from now on which pages are written, by the guest's CPUs and by its devices, or no more.
    ///
    /// # Errors
    /// KVM's.
    pub fn track_writes(&mut self, is_on: bool) -> Result<()> {
        let tracker = self.tracker();
        if is_on {
            tracker.start()?
        } else {
            tracker.stop()?
        }
        self.tracks_writes = is_on;
        Ok(())
    }

    /// Whether it is noted which pages are written.
    pub fn tracks_writes(&self) -> bool {
        self.tracks_writes
    }

    /// What notes which pages are written, for whoever asks on a thread of its own. No memory may come or go
    /// meanwhile.
    pub fn tracker(&self) -> Tracker {
        Tracker { vm: self.vm.clone(), memory: self.memory.clone() }
    }

    /// A brake that slows the machine's CPUs down, for whoever has to keep up with what they write.
    ///
    /// # Errors
    /// The host gives no more threads.
    pub fn brake(&self) -> Result<Brake> {
        self.vcpus.brake()
    }

    /// By this, memory comes and goes while the guest runs.
    pub(super) fn slots(&mut self) -> Arc<Slots> {
        let make = || {
            let held = Held::new(self.memory.clone());
            Arc::new(Slots { held, vm: self.vm.clone(), huge_pages: self.huge_pages })
        };
        self.slots.get_or_insert_with(make).clone()
    }

    /// Whether it has a device that plugs memory and unplugs it while the guest runs.
    pub fn plugs_memory(&self) -> bool {
        self.slots.is_some()
    }

    /// Has no memory be plugged or unplugged until the answer is dropped: the guest has to try again. None: the machine
    /// has no device that plugs memory.
    pub fn hold_slots(&self) -> Option<Hold> {
        self.slots.clone().map(|slots| {
            slots.held.hold();
            Hold(slots)
        })
    }

    /// The memory that is plugged, slot by slot.
    pub(super) fn plugged(&self) -> Vec<Range> {
        let rooms = self.config.devices().filter(|device| device.room().is_some());
        let names: Vec<_> = rooms.map(|device| windows::name_of(&device.name())).collect();
        let rooms = self.parts.0.iter().filter(|part| names.contains(&part.name));
        let slots = rooms.flat_map(|part| match (&self.slots, part.place) {
            (Some(slots), Place::Memory { range, .. }) => slots.held.list(range),
            _ => Vec::new(),
        });
        slots.collect()
    }

    fn replace_memory(&self, regions: Regions) {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).replace(regions);
    }
}

/// The slots of a machine's memory that come and go while the guest runs.
pub struct Slots {
    held: Held,
    vm: Arc<Vm>,
    /// Of which size their pages are.
    huge_pages: HugePages,
}

impl slots::Slots for Slots {
    fn add(&self, range: Range) -> Result<()> {
        let source = self.huge_pages.source(Source::Anonymous)?;
        self.held.add(range, source, |region| {
            self.huge_pages.choose(region);
            let is_tracked = self.vm.tracks_memory();
            if is_tracked {
                region.written().start();
            }
            self.vm.add_memory(region, is_tracked).map(drop)
        })
    }

    fn remove(&self, range: Range) -> Result<()> {
        self.held.remove(range, || self.vm.remove_memory(range))
    }

    fn list(&self, within: Range) -> Vec<Range> {
        self.held.list(within)
    }
}

/// While this is there, no memory is plugged or unplugged.
pub struct Hold(Arc<Slots>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.held.release();
    }
}

/// The record of which pages of guest memory are written.
pub struct Tracker {
    vm: Arc<Vm>,
    memory: Memory,
}

impl Tracker {
    /// Notes from now on which pages are written. The machine may run: what is written before this returns is in
    /// memory for whoever reads it afterwards, or is noted.
    ///
    /// # Errors
    /// KVM's.
    pub fn start(&self) -> Result<()> {
        self.vm.track_memory(true)?;
        self.memory.memory().iter().for_each(|region| region.written().start());
        // A device's thread writes first and then asks whether that is noted: one that has asked too early may
        // have its write under way still.
        order_all_threads().context("note what is written to guest memory")
    }

    /// Notes nothing any more.
    ///
    /// # Errors
    /// KVM's.
    pub fn stop(&self) -> Result<()> {
        self.memory.memory().iter().for_each(|region| region.written().stop());
        self.vm.track_memory(false)
    }

    /// The pages that were written since the last call, or since [`Self::start`]. What is written to them after
    /// this is told by the next call.
    ///
    /// # Errors
    /// KVM's.
    pub fn take(&self) -> Result<PageSet> {
        let memory = self.memory.memory();
        let mut taken = self.vm.take_written()?;
        for (range, pages) in &mut taken {
            let region = memory.find_region(GuestAddress(range.start));
            let written = region.map(|region: &Region| region.written().take()).unwrap_or_default();
            pages.iter_mut().zip(written).for_each(|(page, written)| *page |= written);
        }
        Ok(PageSet::new(taken))
    }
}
