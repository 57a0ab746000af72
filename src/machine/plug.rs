//! Devices of a PCI bus that come and go while the guest runs: told of and asked for by the bus's slots, where there are
//! such (x86_64); elsewhere told of by the ports that they are behind, or the guest looks for itself.

use super::parts::Pausing;
use super::{Machine, RunState};
use crate::config::Config;
use crate::devices::cpu_slots::CpuSlots;
use crate::devices::kind::ConfiguredDevice;
use crate::devices::slots::PciSlots;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::log;
use crate::pci;
use crate::platform::Place;
use crate::virtio::transport::Transport;

/// How a device goes.
pub enum Leaving {
    /// The guest is asked to let it go ([`Machine::take_let_go`]).
    Asked,
    /// The device stops, and is taken away then ([`Machine::unplug`]).
    Now(Pausing),
    /// Its driver is to let it go first, whom this machine cannot ask: the device's place on the bus or in a slot.
    Unheard(u32),
}

impl Machine {
    /// Whether devices may come and go while the guest runs.
    ///
    /// # Errors
    /// The machine has no PCI bus.
    pub fn check_plugs(config: &Config) -> Result<()> {
        if config.pci {
            return Ok(());
        }
        // The first words are Firecracker's.
        Err(Error::config(
            "PCI is not enabled: devices come and go while the guest runs on a PCI bus alone (`--enable-pci`)",
        ))
    }

    /// Attaches a device, whether the guest runs or not, and tells the guest so. In a PCIe slot that is free, its port does.
    ///
    /// # Errors
    /// The machine is as it was before.
    pub fn plug(&mut self, device: &ConfiguredDevice, host: &mut Host) -> Result<()> {
        let name = device.name();
        let is_slot = |place: &Place| matches!(place, Place::Pci(place) if pci::slot_of(*place).is_some());
        let slot = self.device_places().find(|place| is_slot(place) && self.is_free(*place));
        self.attach(device, &slot.into_iter().map(|place| (name.clone(), place)).collect(), host)?;
        let told = self.tell_plugged(&name);
        // A device that is there in half is none.
        told.inspect_err(|_| drop(self.detach(&name)))
    }

    fn tell_plugged(&mut self, name: &str) -> Result<()> {
        // The next one comes to another place: the guest may not have seen yet that somebody has left that one, and would
        // take the new device for the old.
        self.next_place = self.number_of(name)? as usize + 1;
        if self.state == RunState::Running {
            // The device may be the first one, or have threads of its own.
            self.loops.start()?;
        }
        self.with_slots(PciSlots::tell_changed).unwrap_or(Ok(()))
    }

    /// Begins to take a device away: one that no driver of the guest uses, or by `force`, at once; any other is asked for.
    pub fn begin_unplug(&mut self, name: &str, force: bool) -> Result<Leaving> {
        let number = self.number_of(name)?;
        if force || !self.is_driven(name) {
            return self.begin_change(name).map(Leaving::Now);
        }
        let Some(asked) = self.with_slots(|slots| slots.ask(number)) else {
            return Ok(Leaving::Unheard(number));
        };
        asked?;
        log::debug(format_args!("the guest is asked to let go {name}, PCI device {number}"));
        Ok(Leaving::Asked)
    }

    /// Takes a device away that has stopped, and tells the guest so.
    pub fn unplug(&mut self, name: &str) -> Result<()> {
        let number = self.number_of(name)?;
        self.detach(name)?;
        let told = self.with_slots(|slots| {
            slots.forget(number);
            slots.tell_changed()
        });
        // The device is gone all the same.
        note(told);
        Ok(())
    }

    /// The devices that the guest has let go since this was last asked, each with what is to be waited for before it is
    /// taken away.
    pub fn take_let_go(&mut self) -> Vec<(String, Pausing)> {
        let numbers: Vec<u32> = self.with_slots(|slots| slots.take_ejected().collect()).unwrap_or_default();
        let names: Vec<_> = numbers.into_iter().filter_map(|number| self.name_at(number)).collect();
        let begin = |name: String| match self.begin_change(&name) {
            Ok(pausing) => Some((name, pausing)),
            Err(error) => {
                // Whoever changes the device ends that first; then its owner asks again.
                log::line(format_args!("{name}, which the guest has let go, stays: {error}"));
                None
            }
        };
        names.into_iter().filter_map(begin).collect()
    }

    /// The devices that the guest was asked to let go and that are still there.
    pub fn asked_to_go(&mut self) -> Vec<String> {
        let numbers: Vec<u32> = self.with_slots(|slots| slots.asked().collect()).unwrap_or_default();
        numbers.into_iter().filter_map(|number| self.name_at(number)).collect()
    }

    /// Whether the guest hears by itself of devices that come and go.
    pub fn hears_of_devices(&self) -> bool {
        self.with_slots(|_| ()).is_some()
    }

    /// Whether a device is in a PCIe slot, whose port the guest hears of it by.
    pub fn is_in_slot(&self, name: &str) -> bool {
        self.number_of(name).is_ok_and(|place| pci::slot_of(place).is_some())
    }

    /// Tells the guest again of what it has not read; to be called now and then.
    pub fn remind(&self) {
        note(self.with_slots(PciSlots::remind));
        note(self.with_cpu_slots(CpuSlots::remind));
    }

    fn with_slots<R>(&self, act: impl FnOnce(&mut PciSlots) -> R) -> Option<R> {
        self.root.as_ref()?;
        self.parts.with(PciSlots::NAME, act)
    }

    /// The place of a device on the bus or in a slot.
    fn number_of(&self, name: &str) -> Result<u32> {
        match self.parts.get(name)?.place {
            Place::Pci(number) => Ok(number),
            _ => Err(Error::config(format!("{name} is not on a PCI bus"))),
        }
    }

    /// The configured device with this number on the bus.
    fn name_at(&self, number: u32) -> Option<String> {
        let part = self.parts.0.iter().find(|part| part.place == Place::Pci(number))?;
        self.config.devices().map(ConfiguredDevice::name).find(|name| *name == part.name)
    }

    fn is_driven(&self, name: &str) -> bool {
        let driven = self.parts.with(name, |device: &mut Transport| device.is_driven());
        driven.unwrap_or(false)
    }

    /// The numbers of places on the bus of `count`, in the order in which new devices take them.
    pub(super) fn numbers_of_places(&self, count: usize) -> impl Iterator<Item = u32> + use<> {
        debug_assert!(self.next_place <= pci::PLACES_MAX);
        let first = self.next_place;
        (0..count).map(move |index| ((first + index) % count) as u32)
    }
}

/// Notes that the guest could not be told: it hears the next time.
pub(super) fn note(told: Option<Result<()>>) {
    if let Some(Err(error)) = told {
        log::line(error);
    }
}
