//! A whole machine as saved state, all but its memory, and the one order in which machines are saved and
//! restored.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::build::memory_size;
use super::parts::Places;
use super::{Machine, RunState, windows};
use crate::arch::layout;
use crate::config::Config;
use crate::devices::slots::PciSlots;
use crate::error::{Context, Error, Result};
use crate::memory::Range;
use crate::memory::slots::SLOTS_MAX;
use crate::platform::{CpuChanges, Place};
use crate::snapshot;
use crate::vm::state::{VcpuState, VmState};

/// The form of a saved machine as bytes; another one is refused. One more whenever [`SavedMachine`] changes.
const VERSION: u16 = 1;

/// Parts that states of this version may lack, as they came later. The guest of such a state knows nothing of them.
const NEWER: [&str; 1] = [PciSlots::NAME];

/// More parts and regions of memory than any machine has, and the longest configuration that is read, in bytes: of what
/// anybody may have written, what is small in a file and large in memory is bounded.
const PARTS_MAX: usize = 1024;
const RANGES_MAX: usize = 16 + SLOTS_MAX as usize;
const CONFIG_MAX: usize = 1 << 20;

/// A machine that stands still, without its memory: from this, [`Machine::build_at`] and [`Machine::restore`] make
/// one that goes on where it stood, over the same memory.
#[derive(Deserialize, Serialize)]
pub struct SavedMachine {
    /// What the machine is made of, with what was changed while it ran.
    #[serde(serialize_with = "write_config", deserialize_with = "read_config")]
    pub config: Config,
    /// Where its parts are.
    #[serde(deserialize_with = "snapshot::at_most_named::<PARTS_MAX, _, _>")]
    pub places: Places,
    #[serde(deserialize_with = "snapshot::at_most::<RANGES_MAX, _, _>")]
    memory: Vec<Range>,
    vm: VmState,
    vcpus: Vec<VcpuState>,
    /// The states of the parts by their names, each with its version, as the part writes it.
    #[serde(deserialize_with = "snapshot::at_most_named::<PARTS_MAX, _, _>")]
    pub parts: BTreeMap<String, Vec<u8>>,
}

fn write_config<S: Serializer>(config: &Config, serializer: S) -> Result<S::Ok, S::Error> {
    config.saved().map_err(serde::ser::Error::custom)?.serialize(serializer)
}

fn read_config<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Config, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.len() > CONFIG_MAX {
        let length = text.len();
        return Err(serde::de::Error::custom(format_args!(
            "its configuration has {length} bytes, at most {CONFIG_MAX} are read"
        )));
    }
    Config::from_saved(&text).map_err(serde::de::Error::custom)
}

impl SavedMachine {
    /// The saved machine as bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let bytes = postcard::to_extend(&VERSION, Vec::new());
        bytes.and_then(|bytes| postcard::to_extend(self, bytes)).context("write the saved machine")
    }

    /// The form of what [`Self::to_bytes`] writes.
    pub fn version() -> u16 {
        VERSION
    }

    /// The form of these bytes, whether or not it is one that is understood here.
    pub fn version_of(bytes: &[u8]) -> Result<u16> {
        let (version, _) = postcard::take_from_bytes(bytes).context("read the saved machine's version")?;
        Ok(version)
    }

    /// Where its memory is in the guest's address space.
    pub fn memory(&self) -> &[Range] {
        &self.memory
    }

    /// Returns the changes that make other CPUs like those of this machine.
    pub fn cpu(&self) -> CpuChanges {
        self.vcpus.first().map(VcpuState::told).unwrap_or_default()
    }

    /// How many CPUs it has.
    pub fn cpus(&self) -> usize {
        self.vcpus.len()
    }

    /// Has a restore put the guest's clock forward by the time of day that has passed since the machine was saved.
    /// Without this, the clock goes on where it was.
    ///
    /// # Errors
    /// The architecture has no such clock, or nobody knows when the machine was saved.
    pub fn follow_time_of_day(&mut self) -> Result<()> {
        self.vm.follow_time_of_day()
    }

    /// The machine that was saved as these bytes, which anybody may have written.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let damaged = |error| Error::config(format!("the saved machine is damaged: {error}"));
        let (version, bytes): (u16, _) = postcard::take_from_bytes(bytes).map_err(damaged)?;
        if version != VERSION {
            let message = format!("the saved machine has version {version}, this is for {VERSION}");
            return Err(Error::config(message));
        }
        let (saved, rest): (Self, _) = postcard::take_from_bytes(bytes).map_err(damaged)?;
        if !rest.is_empty() {
            return Err(Error::config(format!("the saved machine has {} bytes too many", rest.len())));
        }
        saved.check()?;
        Ok(saved)
    }

    /// Whether what it has of memory and CPUs is what its configuration says, before anything of that size is made.
    fn check(&self) -> Result<()> {
        let machine = &self.config.machine_config;
        if !self.memory.starts_with(&layout::memory(memory_size(machine.mem_size_mib)?)) {
            let size = machine.mem_size_mib;
            return Err(Error::config(format!(
                "the saved machine is damaged: it has other memory than the {size} MiB of its configuration"
            )));
        }
        if !self.plugged().is_empty() && !self.has_room_for_plugged() {
            let reason = "the saved machine is damaged: it has more memory than its devices plug";
            return Err(Error::config(reason));
        }
        let (cpus, other) = (machine.vcpus_made(), self.vcpus.len());
        if usize::from(cpus) != other {
            return Err(Error::config(format!(
                "the saved machine is damaged: it has {other} CPUs, and its configuration says {cpus}"
            )));
        }
        Ok(())
    }
}

impl SavedMachine {
    /// The memory that was plugged, slot by slot: all beyond what its configuration says.
    pub fn plugged(&self) -> &[Range] {
        let size = memory_size(self.config.machine_config.mem_size_mib);
        let ram = size.map_or(0, |size| layout::memory(size).len());
        self.memory.get(ram..).unwrap_or_default()
    }

    /// Whether the memory that was plugged is slots of a device, in their order.
    fn has_room_for_plugged(&self) -> bool {
        let device = self.config.devices().find_map(|device| Some((device.name(), device.room()?)));
        let Some((name, room)) = device else { return false };
        let Some(Place::Memory { range, .. }) = self.places.get(&windows::name_of(&name)) else {
            return false;
        };
        let is_slot = |slot: &Range| {
            slot.size == room.slot
                && range.contains(*slot)
                && (slot.start - range.start).is_multiple_of(room.slot)
        };
        self.plugged().iter().all(is_slot)
            && self.plugged().is_sorted_by(|one, other| one.start < other.start)
    }
}

impl Machine {
    /// Whether it can be saved, as far as that is known before it stands still.
    ///
    /// # Errors
    /// Another process has a part of its state.
    pub fn check_to_save(&self) -> Result<()> {
        match self.config.devices().find(|device| device.shares_memory()) {
            None => Ok(()),
            Some(device) => Err(Error::config(format!(
                "memory is shared with the vhost-user backend of {} (`socket`), and what that has of it is in no \
                 snapshot: give the guest what it needs without one (a disk by an image, `path_on_host`)",
                device.name()
            ))),
        }
    }

    /// Saves all but the memory of a paused machine, which can go on afterwards. Memory is to be copied after
    /// this: the tables of an interrupt controller are written to it now.
    pub fn save(&mut self) -> Result<SavedMachine> {
        const ATTEMPT: &str = "save the machine";
        if self.state != RunState::Paused {
            return Err(Error::config("it runs: pause it first")).context(ATTEMPT);
        }
        if self.exit().is_some() {
            return Err(Error::guest("the guest has ended")).context(ATTEMPT);
        }
        // The CPUs stand still with their last I/O instruction done, and no device's worker is left: nothing
        // raises an interrupt any more. One that is under way is in no state, and must arrive first.
        self.vm.settle_interrupts().context(ATTEMPT)?;
        // Devices note what the guest has acknowledged by posted writes.
        let save = |part: &crate::part::Part| {
            let bytes = part.lock().save_state().with_context(|| format!("save {}", part.name))?;
            Ok((part.name.clone(), bytes))
        };
        let parts = self.parts.0.iter().map(save).collect::<Result<_>>()?;
        // Interrupt controllers after all that raises interrupts; CPUs after the controllers that interrupt them.
        let vm = self.vm.save().context(ATTEMPT)?;
        let vcpus = self.vm.save_vcpus(&self.vcpus).context(ATTEMPT)?;
        let (config, places) = (self.config.clone(), self.places());
        let memory = self.platform.memory.iter().copied().chain(self.plugged()).collect();
        Ok(SavedMachine { config, places, memory, vm, vcpus, parts })
    }

    /// Whether this host's CPUs have what those of the saved machine had, which may be another host's. On one host,
    /// with the kernel that it had, they do.
    ///
    /// # Errors
    /// What they lack, by name.
    pub fn check_host(&self, saved: &SavedMachine) -> Result<()> {
        let stopped = self.vcpus.stopped();
        let Some(first) = stopped.first() else { return Ok(()) };
        let modifiers = saved.config.cpu_changes().cpuid;
        self.vm.with_cpu_model(|model| model.check(first, &saved.vcpus, &self.platform, &modifiers))
    }

    /// Makes this machine the one that was saved. The caller promises that it was just built, from the saved
    /// configuration and places, and that its memory holds, or will hold before it is resumed, what the saved
    /// one's did. After an error it must not be used.
    pub fn restore(&mut self, saved: &SavedMachine) -> Result<()> {
        const ATTEMPT: &str = "restore the machine";
        self.check_fits(saved).context(ATTEMPT)?;
        // Interrupt controllers first: CPUs have some of their state, and devices raise interrupts.
        self.vm.restore(&saved.vm).context(ATTEMPT)?;
        self.vm.restore_vcpus(&self.vcpus, &saved.vcpus).context(ATTEMPT)?;
        for part in &self.parts.0 {
            // One that is newer than the state is as at power-on.
            let Some(state) = saved.parts.get(&part.name) else { continue };
            part.lock().restore_state(state).with_context(|| format!("restore {}", part.name))?;
        }
        self.restore_cpus().context(ATTEMPT)
    }

    /// Whether the saved machine can be this one, as far as that can be told ahead.
    fn check_fits(&self, saved: &SavedMachine) -> Result<()> {
        if self.has_run {
            return Err(Error::config("it has run already: build it anew"));
        }
        let (vcpus, other) = (self.vcpus.len(), saved.vcpus.len());
        if vcpus != other {
            return Err(Error::config(format!("the saved machine has {other} CPUs, and this one {vcpus}")));
        }
        let plugged = self.plugged();
        if !self.platform.memory.iter().chain(&plugged).eq(&saved.memory) {
            return Err(Error::config("the saved machine has other memory"));
        }
        if let Some(name) = saved.parts.keys().find(|name| self.parts.get(name).is_err()) {
            return Err(Error::config(format!(
                "the saved machine has a part that this one lacks: {name}: a later version of Alula may have saved it: \
                 restore it with that version, or boot the guest anew and save it with this one"
            )));
        }
        for part in &self.parts.0 {
            if !saved.parts.contains_key(&part.name) && !NEWER.contains(&part.name.as_str()) {
                let name = &part.name;
                return Err(Error::config(format!(
                    "the saved machine lacks a part of this one: {name}: an earlier version of Alula may have saved \
                     it: restore it with that version, or boot the guest anew and save it with this one"
                )));
            }
        }
        self.parts.check_places(&saved.places)
    }
}
