//! The devices at fixed places, on a bus or in guest memory: each describes itself in its own file by
//! [`FixedDevice`], and the architecture's `layout` says where the device is.

use std::sync::{Arc, Mutex};

use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use super::boot_timer::BootTimer;
use super::console;
use super::watchdog::Watchdog;
use crate::arch;
use crate::bus::BusDevice;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::memory::{Memory, Region};
use crate::part::{Component, Part};
use crate::platform::{MessageFrame, Place};
use crate::poll::EventFd;
use crate::vm::Vm;
use crate::vm::irq::Line;
use crate::vm::vcpu::Surroundings;

/// A device that a machine has at the place that `layout` gives.
pub trait FixedDevice: Component + Sized {
    /// The name of the device in `layout` and in the machine.
    const NAME: &'static str;
    /// The group of metrics that what the device counts is added to.
    const METRICS: Option<&'static str> = None;

    /// Makes the device for this place; None: the machine is not to have one.
    fn build(place: Place, site: &mut Site<'_>) -> Result<Option<Self>>;
}

/// What fixed devices are made from, and the parts that have been made.
pub struct Site<'a> {
    /// The virtual machine.
    pub vm: &'a Arc<Vm>,
    /// The guest's memory.
    pub memory: &'a Memory,
    /// The buses that devices are put on, and where they note the guest's end.
    pub surroundings: &'a Surroundings,
    /// Where the serial console's output goes.
    pub host: &'a mut Host,
    /// How the serial console is configured.
    pub serial: Option<&'a console::Config>,
    /// Written to when the guest has read all that was typed on the serial console.
    pub room: &'a Arc<EventFd>,
    /// The boot timer, which runs already, if the machine is to have one.
    pub boot_timer: Option<BootTimer>,
    /// The watchdog, if the machine is to have one.
    pub watchdog: Option<&'a Watchdog>,
    /// Where interrupt messages of PCI devices are written, if that is a frame of ours.
    pub message_frame: Option<MessageFrame>,
    /// The parts that are at their places, in order.
    pub parts: Vec<Part>,
}

impl Site<'_> {
    /// An event that raises the interrupt line of `place`.
    pub fn interrupt(&self, place: Place) -> Result<Arc<EventFd>> {
        self.vm.interrupt(gsi(place)?)
    }

    /// The interrupt line of `place`, for a device that has `main` raise it.
    pub fn line(&self, place: Place) -> Result<Line> {
        Ok(Line::Kvm(self.vm.clone(), gsi(place)?))
    }

    fn add<D: FixedDevice>(&mut self, place: Place, component: Arc<Mutex<D>>) {
        let metrics = D::METRICS.map(str::to_owned).into_iter().collect();
        self.parts.push(Part { name: D::NAME.to_owned(), place, metrics, component });
    }
}

fn gsi(place: Place) -> Result<u32> {
    place.gsi().ok_or_else(|| Error::host("the device's place has no interrupt line"))
}

/// Makes a device and puts it at its place on a bus, where this architecture has one.
pub fn put<D: FixedDevice + BusDevice>(site: &mut Site<'_>) -> Result<()> {
    let Some(place) = arch::fixed_place(D::NAME) else { return Ok(()) };
    let Some(device) = D::build(place, site)? else { return Ok(()) };
    let device = Arc::new(Mutex::new(device));
    site.surroundings.attach(place, device.clone())?;
    site.add::<D>(place, device);
    Ok(())
}

/// Makes a device whose place is in guest memory, where this architecture has one.
pub fn put_in_memory<D: FixedDevice>(site: &mut Site<'_>) -> Result<()> {
    let ranges: Vec<_> = site.memory.memory().iter().map(Region::range).collect();
    let Some(place) = arch::place_in_memory(D::NAME, &ranges) else { return Ok(()) };
    if let Some(device) = D::build(place, site)? {
        site.add::<D>(place, Arc::new(Mutex::new(device)));
    }
    Ok(())
}
