//! The one recipe for a device of the configuration: opened, given a place on the machine's bus by MMIO or by
//! PCI (registers, interrupts, kicks), and taken away again.

use std::sync::{Arc, Mutex, PoisonError};

use super::ahead::{Ahead, OpenedAhead};
use super::parts::{self, Places};
use super::windows::{self, Shown};
use super::{Machine, RunState};
use crate::arch::{self, layout};
use crate::config::Config;
use crate::devices::console::Console;
use crate::devices::fixed::FixedDevice;
use crate::devices::kind::ConfiguredDevice;
use crate::devices::slots::PciSlots;
use crate::error::{Context, Error, Result};
use crate::host::Host;
use crate::host::console::Output;
use crate::host::line::UserLine;
use crate::log;
use crate::memory::Range;
use crate::memory::registers::RegisterPage;
use crate::memory::slots::Slots;
use crate::memory::window::Window;
use crate::part::{Component, Part};
use crate::pci::msix::Msix;
use crate::pci::port::Port;
use crate::pci::root::{Ecam, Fixture, FunctionRegisters, Ports, Root};
use crate::pci::{self, DEVICES_MAX};
use crate::platform::Place;
use crate::poll::{self, EventFd};
use crate::virtio::mmio::{INTERRUPT_ACKNOWLEDGE, Mmio, QUEUE_NOTIFY, REGISTERS_SIZE};
use crate::virtio::pci::{BAR_SIZE, HostBridge, NOTIFY, NOTIFY_MULTIPLIER, Pci};
use crate::virtio::transport::Transport;
use crate::virtio::workers::Loop;
use crate::virtio::{Interrupts, VirtioDevice};
use crate::vm::Vm;
use crate::vm::irq::Line;
use crate::vm::vcpu::Surroundings;

/// A device that is open and has no place yet.
struct Opened {
    name: String,
    device: Box<dyn VirtioDevice>,
    /// Where its workers will live.
    loops: Vec<Arc<Loop>>,
}

impl Machine {
    /// Opens a device and puts it in the place that `places` gives it, or else in the lowest one that no part
    /// has and that `places` gives to nobody. A machine without a PCI bus must be paused. After an error the machine is as
    /// it was before.
    pub fn attach(&mut self, device: &ConfiguredDevice, places: &Places, host: &mut Host) -> Result<()> {
        let name = device.name();
        let attempt = || format!("attach {name}");
        let place = self.find_place(device, places).with_context(attempt)?;
        let opened = device.open(&self.id, host)?;
        let mut ahead = Ahead::of(device, opened, places, &self.platform.memory, &self.windows())?;
        if let Some(window) = &ahead.window {
            self.vm.add_window(window).with_context(attempt)?;
        }
        let window = ahead.window.as_ref().map(|window| window.range);
        self.put(device, &mut ahead, place).with_context(attempt).inspect_err(|_| {
            // KVM was just told of it.
            window.inspect(|range| drop(self.vm.remove_memory(*range)));
        })
    }

    /// Does the same with all devices of a configuration, some of which were there before the machine had its shell, which
    /// has their windows.
    pub(super) fn attach_all(
        &mut self,
        config: &Config,
        mut ahead: OpenedAhead,
        host: &mut Host,
    ) -> Result<()> {
        for device in config.devices() {
            let name = device.name();
            let (places, Some(ahead)) = ahead.of(&name) else {
                self.attach(device, &ahead.places, host)?;
                continue;
            };
            let attempt = || format!("attach {name}");
            let place = self.find_place(device, places).with_context(attempt)?;
            self.put(device, ahead, place).with_context(attempt)?;
        }
        Ok(())
    }

    /// The place of a device that is to be attached now.
    fn find_place(&self, device: &ConfiguredDevice, places: &Places) -> Result<Place> {
        let name = device.name();
        if self.state != RunState::Paused && self.root.is_none() {
            return Err(Error::config("the machine runs: pause it first"));
        }
        if self.parts.get(&name).is_ok() {
            return Err(Error::config("the machine has it already"));
        }
        self.config.check_beside(device)?;
        let place = self.place_for(&name, places)?;
        match place {
            Place::Pci(number) => match pci::slot_of(number) {
                Some(slot) => log::debug(format_args!("attach {name} in PCIe slot {slot}")),
                None => log::debug(format_args!("attach {name} as PCI device {number}")),
            },
            Place::Ports { range, .. } | Place::Registers { range, .. } | Place::Memory { range, .. } => {
                log::debug(format_args!("attach {name} at {:#x}", range.start));
            }
            Place::Calls => {}
        }
        Ok(place)
    }

    /// Puts a device that is open at `place`, with its window, of which KVM knows.
    fn put(&mut self, device: &ConfiguredDevice, ahead: &mut Ahead, place: Place) -> Result<()> {
        let name = device.name();
        let loops = self.loops.for_device(device.threads())?;
        let mut opened = ahead.device.take().expect("a device is put in one place");
        if let Some(Window { range, view }) = &ahead.window {
            let shown = Shown::new(&name, view.clone(), &self.surroundings.end);
            let shown = Arc::new(Mutex::new(shown));
            self.surroundings.mmio.attach(*range, shown.clone())?;
            log::debug(format_args!("{name} shows {range}"));
            self.parts.0.push(windows::part(&name, shown, *range));
        }
        if let Some(range) = ahead.room {
            opened.set_slots(self.slots());
            log::debug(format_args!("{name} plugs memory at {range}"));
            self.parts.0.push(windows::room_part(&name, range));
        }
        if let Some(line) = opened.line() {
            self.connect(&line).with_context(|| format!("connect {name} to the terminal"))?;
            self.line = Some(line);
        }
        let shown = ahead.registers.take().map(|(_, page)| page);
        let opened = Opened { name: name.clone(), device: opened, loops: loops.clone() };
        let component = match (place, &self.root) {
            (Place::Pci(number), Some(root)) => self.put_on_pci(root, opened, number),
            (Place::Registers { range, gsi: Some(gsi) }, None) => self.put_on_mmio(opened, range, gsi, shown),
            _ => unreachable!("a place for a device is on the machine's bus"),
        };
        let component = match component {
            Ok(component) => component,
            Err(error) => {
                self.take_window_part(&name);
                return Err(error);
            }
        };
        self.loops.keep(device.threads(), loops);
        self.parts.0.push(Part { name, place, metrics: device.metrics(), component });
        self.config.put(device.clone())
    }

    /// Has what goes out by the line of a console go where the serial port's output goes.
    fn connect(&self, line: &UserLine) -> Result<()> {
        let another = |serial: &mut Console| serial.output().another();
        let output = || self.parts.with(Console::NAME, another).unwrap_or_else(|| Ok(Output::nowhere()));
        line.connect(self.wake.clone(), output)
    }

    /// Takes the window of a device from the list of parts, if it has one, and returns where that is.
    fn take_window_part(&mut self, name: &str) -> Option<Range> {
        let window = windows::name_of(name);
        let index = self.parts.0.iter().position(|part| part.name == window)?;
        let Place::Memory { range, .. } = self.parts.0.remove(index).place else { return None };
        self.surroundings.mmio.detach(range.start);
        Some(range)
    }

    /// Where windows are already, and what else is in memory and no RAM.
    fn windows(&self) -> Vec<Range> {
        let in_memory = |part: &Part| match part.place {
            Place::Memory { range, .. } => Some(range),
            _ => None,
        };
        self.parts.0.iter().filter_map(in_memory).collect()
    }

    /// Stops the device called `name`, takes it from its bus, ends its own threads, and closes what it has of
    /// the host. Its place is free again.
    pub fn detach(&mut self, name: &str) -> Result<()> {
        let part = self.parts.get(name)?;
        let held = part.with(|device: &mut Transport| {
            (device.kicks().to_vec(), device.loops().to_vec(), device.is_driven(), device.is_shown())
        });
        let (kicks, loops, is_driven, is_shown) =
            held.ok_or_else(|| Error::config(format!("detach {name}: it is a fixed part of the machine")))?;
        parts::pause(std::slice::from_ref(part));
        match (part.place, &self.root) {
            (Place::Pci(number), Some(root)) => {
                let mut root = root.lock().unwrap_or_else(PoisonError::into_inner);
                if is_driven { root.tear_away(number) } else { root.remove(number) }?;
            }
            (Place::Registers { range, .. }, None) => {
                self.surroundings.mmio.detach(range.start);
                disconnect(&self.vm, range, &kicks);
                if is_shown {
                    self.vm.remove_memory(range)?;
                }
            }
            _ => unreachable!("a device is on the machine's bus"),
        }
        match self.take_window_part(name) {
            Some(room)
                if self.config.devices().any(|device| device.name() == name && device.room().is_some()) =>
            {
                let slots = self.slots();
                slots.list(room).into_iter().try_for_each(|slot| slots.remove(slot))?;
            }
            Some(window) => self.vm.remove_memory(window)?,
            None => {}
        }
        self.parts.0.retain(|part| part.name != name);
        self.changing.retain(|other| other != name);
        self.config.remove(name);
        self.loops.end_own(&loops);
        Ok(())
    }

    /// All places that devices are attached to, on the bus and then in slots, and those that fixed parts have there.
    pub(super) fn device_places(&self) -> impl Iterator<Item = Place> + use<> {
        let is_pci = self.root.is_some();
        let slots = usize::from(self.config.pcie_slots);
        let count = if is_pci { DEVICES_MAX + slots } else { layout::DEVICE_GSIS.len() };
        let numbers = self.numbers_of_places(count);
        numbers.map(move |number| if is_pci { Place::Pci(number) } else { mmio_place(number) })
    }

    /// Whether no part has this place.
    pub(super) fn is_free(&self, place: Place) -> bool {
        self.parts.0.iter().all(|part| part.place != place)
    }

    fn place_for(&self, name: &str, places: &Places) -> Result<Place> {
        let is_free = |place: &Place| self.is_free(*place);
        let is_for_nobody = |place: &Place| places.values().all(|other| other != place);
        match places.get(name) {
            Some(given) if self.device_places().any(|place| place == *given) && is_free(given) => Ok(*given),
            Some(given) => Err(Error::config(format!(
                "its place, {given}, is taken, or is none for a device of this machine"
            ))),
            None => {
                self.device_places().find(|place| is_free(place) && is_for_nobody(place)).ok_or_else(|| {
                    Error::config(match self.root {
                        Some(_) => format!(
                            "the PCI bus has no free place: there can be {} devices on it, and one has to be taken away \
                             first (`DELETE /drives/ID`, ...)",
                            // The bridge has a place, too, and so has each port.
                            DEVICES_MAX - 1
                        ),
                        None => {
                            format!("at most {} devices have an interrupt line", layout::DEVICE_GSIS.len())
                        }
                    })
                })
            }
        }
    }

    /// Puts a device behind virtio-mmio; KVM knows the page `shown`, if there is one, in the place of its registers.
    fn put_on_mmio(
        &self,
        device: Opened,
        registers: Range,
        gsi: u32,
        shown: Option<Arc<RegisterPage>>,
    ) -> Result<Arc<Mutex<Transport>>> {
        let kicks = events(&device.name, "kick", device.device.queue_sizes().len())?;
        let put = || -> Result<_> {
            for (queue, kick) in kicks.iter().enumerate() {
                self.vm.kick(kick, registers.start + QUEUE_NOTIFY, queue as u32)?;
            }
            // A driver that reads the status from memory must not find there what it has acknowledged.
            let acknowledged = match &shown {
                Some(_) => None,
                None => self.vm.post(&self.vcpus[0].stopped(), registers.start + INTERRUPT_ACKNOWLEDGE),
            };
            let interrupts = Interrupts::line(self.vm.interrupt(gsi)?, acknowledged, shown);
            let transport = self.transport(device, interrupts, kicks.clone());
            self.surroundings.mmio.attach(registers, Arc::new(Mutex::new(Mmio(transport.clone()))))?;
            Ok(transport)
        };
        put().inspect_err(|_| disconnect(&self.vm, registers, &kicks))
    }

    fn put_on_pci(&self, root: &Mutex<Root>, device: Opened, number: u32) -> Result<Arc<Mutex<Transport>>> {
        let queues = device.device.queue_sizes().len();
        let kicks = events(&device.name, "kick", queues)?;
        // One for configuration changes.
        let vectors = events(&device.name, "interrupt", 1 + device.device.queue_vectors())?;
        let interrupts = Interrupts::vectors(vectors.clone(), queues);
        // In a slot, the bus there says who it is that sends messages.
        let msix = Arc::new(Mutex::new(Msix::new(self.vm.clone(), number << 3, vectors)?));
        let at = |queue: usize| NOTIFY + queue as u64 * NOTIFY_MULTIPLIER;
        let kicked = kicks.iter().cloned().enumerate().map(|(queue, kick)| (at(queue), kick)).collect();
        let transport = self.transport(device, interrupts.clone(), kicks);
        let bar = layout::PCI_MEMORY.start + u64::from(number) * BAR_SIZE;
        let function = Pci::new(transport.clone(), interrupts, msix, bar);
        let registers =
            FunctionRegisters { device: Arc::new(Mutex::new(function.registers())), kicks: kicked };
        let mut root = root.lock().unwrap_or_else(PoisonError::into_inner);
        root.add(number, Arc::new(Mutex::new(function)), Some(registers))?;
        Ok(transport)
    }

    fn transport(
        &self,
        device: Opened,
        interrupts: Arc<Interrupts>,
        kicks: Vec<Arc<EventFd>>,
    ) -> Arc<Mutex<Transport>> {
        let Opened { name, device, loops } = device;
        Transport::new(name, device, self.memory.clone(), loops, interrupts, kicks)
    }
}

/// Undoes what KVM was told of the registers of a virtio-mmio device; its interrupt goes with its event.
fn disconnect(vm: &Vm, registers: Range, kicks: &[Arc<EventFd>]) {
    for (queue, kick) in kicks.iter().enumerate() {
        // A kick that could not be connected cannot be disconnected.
        let _ = vm.unkick(kick, registers.start + QUEUE_NOTIFY, queue as u32);
    }
    vm.unpost(registers.start + INTERRUPT_ACKNOWLEDGE);
}

/// The place of the virtio-mmio device with this number.
pub(super) fn mmio_place(number: u32) -> Place {
    let start = layout::VIRTIO_MMIO.start + u64::from(number) * REGISTERS_SIZE;
    let gsi = Some(layout::DEVICE_GSIS.start + number);
    Place::Registers { range: Range { start, size: REGISTERS_SIZE }, gsi }
}

/// So many events of the device called `name`.
fn events(name: &str, what: &str, count: usize) -> Result<Vec<Arc<EventFd>>> {
    (0..count).map(|number| poll::event(format!("{name}, {what} {number}")).map(Arc::new)).collect()
}

/// Makes the PCI bus, which is reached by memory and, where there are such, by ports; its first device is the
/// bridge to the CPUs, its last ones are the ports with the slots that are configured. `wake` is written to when the guest has let a device go. In a frame of its own: the compiler makes the bus on the stack, in three places, and
/// every machine would keep these pages.
#[inline(never)]
pub fn pci_bus(
    config: &Config,
    vm: &Arc<Vm>,
    surroundings: &Surroundings,
    wake: &Arc<EventFd>,
    parts: &mut Vec<Part>,
) -> Result<Arc<Mutex<Root>>> {
    let mut part = |name: &str, place, component: Arc<Mutex<dyn Component>>| {
        parts.push(Part { name: name.to_owned(), place, metrics: Vec::new(), component });
    };
    let root = Arc::new(Mutex::new(Root::new(vm.clone(), &surroundings.mmio)));
    let slots = u32::from(config.pcie_slots);
    let Range { start, size } = layout::ECAM;
    let memory = Place::Registers { range: Range { start, size: size * u64::from(1 + slots) }, gsi: None };
    surroundings.attach(memory, Arc::new(Mutex::new(Ecam(root.clone()))))?;
    part("PCI bus", memory, root.clone());
    if let Some(range) = layout::PCI_PORTS {
        let (place, ports) = (Place::Ports { range, gsi: None }, Arc::new(Mutex::new(Ports(root.clone()))));
        surroundings.attach(place, ports.clone())?;
        part("PCI ports", place, ports);
    }
    let bridge = Arc::new(Mutex::new(HostBridge::default()));
    root.lock().unwrap_or_else(PoisonError::into_inner).add(0, bridge, None)?;
    part("PCI host bridge", Place::Pci(0), Arc::new(Mutex::new(Fixture)));
    for slot in 1..=slots {
        let (device, name) = (DEVICES_MAX as u32 - 1 - slots + slot, format!("PCIe port {slot}"));
        let event = Arc::new(poll::event(format!("{name}, interrupt"))?);
        let port = Port::new(vm.clone(), event, device, slot)?;
        root.lock().unwrap_or_else(PoisonError::into_inner).add_port(device, port)?;
        part(&name, Place::Pci(device), Arc::new(Mutex::new(Fixture)));
    }
    if let Some(place) = arch::fixed_place(PciSlots::NAME)
        && let Some(gsi) = place.gsi()
    {
        let slots = PciSlots::new(Line::Kvm(vm.clone(), gsi), wake.clone());
        let slots = Arc::new(Mutex::new(slots));
        surroundings.attach(place, slots.clone())?;
        part(PciSlots::NAME, place, slots);
    }
    Ok(root)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_must_be_told_finds_devices_where_the_documentation_says() {
        let Place::Registers { range: Range { start, size }, gsi: Some(gsi) } = mmio_place(0) else {
            panic!()
        };
        let word = format!("virtio_mmio.device={}K@{start:#x}:{gsi}`", size >> 10);
        let text = include_str!("../../docs/troubleshooting.md");
        // Device trees tell every kernel of aarch64.
        assert!(text.contains(&word) || arch::NAME == "aarch64", "{word}");
        let second = Range { start: start + 0x1000, size };
        assert_eq!(mmio_place(1), Place::Registers { range: second, gsi: Some(gsi + 1) });
    }
}
