//! Puts virtio devices on a machine's bus, by MMIO or by PCI: registers, interrupts, kicks.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VcpuFd;

use crate::arch::layout;
use crate::bus::Bus;
use crate::error::{Context, Error, Result};
use crate::event::EventFd;
use crate::log;
use crate::memory::{Memory, Range};
use crate::part::{Component, Part};
use crate::pci::DEVICES_MAX;
use crate::pci::msix::Msix;
use crate::pci::root::{Ecam, Ports, Registers, Root};
use crate::platform::Place;
use crate::virtio::mmio::{INTERRUPT_ACKNOWLEDGE, Mmio, QUEUE_NOTIFY, REGISTERS_SIZE};
use crate::virtio::transport::Transport;
use crate::virtio::workers::Loop;
use crate::virtio::{Interrupts, VirtioDevice, pci};
use crate::vm::Vm;
use crate::vm::vcpu::Surroundings;

/// What devices are attached to.
pub struct Slots<'a> {
    pub vm: &'a Arc<Vm>,
    /// Any one of its vCPUs.
    pub vcpu: &'a VcpuFd,
    pub mmio: &'a Bus,
    pub memory: &'a Memory,
    /// The loop of devices that have no threads of their own, once there is such a device.
    pub io: Option<Arc<Loop>>,
    /// All loops that devices were put on.
    pub loops: Vec<Arc<Loop>>,
    /// The PCI bus, if there is one.
    pub root: Option<Arc<Mutex<Root>>>,
    /// What has its place already.
    pub parts: Vec<Part>,
}

impl Slots<'_> {
    /// The lowest place on the devices' bus that no part has.
    pub fn free_place(&self) -> Result<Place> {
        let is_free = |place: &Place| self.parts.iter().all(|part| part.place != *place);
        match &self.root {
            Some(_) => {
                let free = (0..DEVICES_MAX as u32).map(Place::Pci).find(is_free);
                free.ok_or_else(|| Error::config("the PCI bus has no free place"))
            }
            None => {
                let most = layout::DEVICE_GSIS.len();
                let free = (0..most as u32).map(registers).find(is_free);
                free.ok_or_else(|| Error::config(format!("at most {most} devices have an interrupt line")))
            }
        }
    }

    /// Puts a device at `place`.
    pub fn attach(&mut self, device: Unplaced, place: Place) -> Result<()> {
        let (name, metrics) = (device.name.clone(), device.metrics.clone());
        match place {
            Place::Pci(number) => log::debug(format_args!("attach {name} as PCI device {number}")),
            Place::Ports { range, .. } | Place::Registers { range, .. } => {
                log::debug(format_args!("attach {name} at {:#x}", range.start));
            }
        }
        let attached = match (place, self.root.clone()) {
            (Place::Pci(number), Some(root)) => self.attach_pci(&root, device, number),
            (Place::Registers { range, gsi: Some(gsi) }, None) => self.attach_mmio(device, range, gsi),
            _ => Err(Error::config("its place is on a bus that this machine does not have")),
        };
        let component = attached.with_context(|| format!("attach {name}"))?;
        self.parts.push(Part { name, place, metrics, component });
        Ok(())
    }

    fn attach_mmio(&mut self, device: Unplaced, registers: Range, gsi: u32) -> Result<Arc<Mutex<Transport>>> {
        let kicks = shared(events(device.device.queue_sizes().len())?);
        for (queue, kick) in kicks.iter().enumerate() {
            self.vm.kick(kick, registers.start + QUEUE_NOTIFY, queue as u32)?;
        }
        let acknowledged = self.vm.post(self.vcpu, registers.start + INTERRUPT_ACKNOWLEDGE);
        let interrupts = Interrupts::line(self.vm.interrupt(gsi)?, acknowledged);
        let transport = self.transport(device, interrupts, kicks)?;
        self.mmio.attach(registers, Arc::new(Mutex::new(Mmio(transport.clone()))))?;
        Ok(transport)
    }

    fn attach_pci(
        &mut self,
        root: &Mutex<Root>,
        device: Unplaced,
        number: u32,
    ) -> Result<Arc<Mutex<Transport>>> {
        let mut root = root.lock().unwrap_or_else(PoisonError::into_inner);
        let queues = device.device.queue_sizes().len();
        let kicks = shared(events(queues)?);
        // One for configuration changes, one for each queue.
        let vectors = events(1 + queues)?;
        let copies = |events: &[EventFd]| {
            let copies = events.iter().map(EventFd::try_clone).collect::<std::io::Result<Vec<_>>>();
            copies.context("duplicate an event descriptor")
        };
        let interrupts = Interrupts::vectors(copies(&vectors)?, queues);
        let msix = Arc::new(Mutex::new(Msix::new(self.vm.clone(), number << 3, vectors)?));
        let at = |queue: usize| pci::NOTIFY + queue as u64 * pci::NOTIFY_MULTIPLIER;
        let kicked = kicks.iter().cloned().enumerate().map(|(queue, kick)| (at(queue), kick)).collect();
        let transport = self.transport(device, interrupts.clone(), kicks)?;
        let bar = layout::PCI_MEMORY.start + u64::from(number) * pci::BAR_SIZE;
        let function = pci::Pci::new(transport.clone(), interrupts, msix, bar);
        let registers = Registers { device: Arc::new(Mutex::new(function.registers())), kicks: kicked };
        root.add(number, Arc::new(Mutex::new(function)), Some(registers))?;
        Ok(transport)
    }

    fn transport(
        &mut self,
        device: Unplaced,
        interrupts: Arc<Interrupts>,
        kicks: Vec<Arc<EventFd>>,
    ) -> Result<Arc<Mutex<Transport>>> {
        let Unplaced { name, device, threads, .. } = device;
        let loops = match (threads, &self.io) {
            (0, Some(io)) => vec![io.clone()],
            (0, None) => {
                let io = Loop::new("io")?;
                self.loops.push(io.clone());
                vec![self.io.insert(io).clone()]
            }
            _ => {
                let own = (0..threads).map(|index| Loop::new(format!("io-{index}")));
                let own = own.collect::<Result<Vec<_>>>()?;
                self.loops.extend(own.iter().cloned());
                own
            }
        };
        Ok(Transport::new(name, device, self.memory.clone(), loops, interrupts, kicks))
    }
}

/// A device that is open, and has no place yet.
pub struct Unplaced {
    /// What log lines call it.
    pub name: String,
    /// The groups of metrics that what it counts is added to.
    pub metrics: Vec<String>,
    pub device: Box<dyn VirtioDevice>,
    /// So many threads of its own its workers are to run on; 0: on the one that all share.
    pub threads: usize,
}

/// The place of the virtio-mmio device with this number.
fn registers(number: u32) -> Place {
    let start = layout::VIRTIO_MMIO.start + u64::from(number) * REGISTERS_SIZE;
    let gsi = Some(layout::DEVICE_GSIS.start + number);
    Place::Registers { range: Range { start, size: REGISTERS_SIZE }, gsi }
}

fn shared(events: Vec<EventFd>) -> Vec<Arc<EventFd>> {
    events.into_iter().map(Arc::new).collect()
}

fn events(count: usize) -> Result<Vec<EventFd>> {
    let events = (0..count).map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC));
    events.collect::<std::io::Result<Vec<_>>>().context("create an event descriptor")
}

/// Makes the PCI bus, which is reached by memory and, where there are such, by ports; its first device is the
/// bridge to the CPUs.
pub fn pci_bus(vm: &Arc<Vm>, surroundings: &Surroundings, parts: &mut Vec<Part>) -> Result<Arc<Mutex<Root>>> {
    let mut part = |name: &str, place, component: Arc<Mutex<dyn Component>>| {
        parts.push(Part { name: name.to_owned(), place, metrics: Vec::new(), component });
    };
    let root = Arc::new(Mutex::new(Root::new(vm.clone(), &surroundings.mmio)));
    let memory = Place::Registers { range: layout::ECAM, gsi: None };
    surroundings.attach(memory, Arc::new(Mutex::new(Ecam(root.clone()))))?;
    part("PCI bus", memory, root.clone());
    if let Some(range) = layout::PCI_PORTS {
        let (place, ports) = (Place::Ports { range, gsi: None }, Arc::new(Mutex::new(Ports(root.clone()))));
        surroundings.attach(place, ports.clone())?;
        part("PCI ports", place, ports);
    }
    let bridge = Arc::new(Mutex::new(pci::HostBridge::default()));
    root.lock().unwrap_or_else(PoisonError::into_inner).add(0, bridge.clone(), None)?;
    part("PCI host bridge", Place::Pci(0), bridge);
    Ok(root)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch;

    #[test]
    fn a_kernel_that_must_be_told_finds_devices_where_the_documentation_says() {
        let Place::Registers { range: Range { start, size }, gsi: Some(gsi) } = registers(0) else {
            panic!()
        };
        let word = format!("virtio_mmio.device={}K@{start:#x}:{gsi}`", size >> 10);
        let text = include_str!("../../docs/troubleshooting.md");
        // Device trees tell every kernel of aarch64.
        assert!(text.contains(&word) || arch::NAME == "aarch64", "{word}");
        let second = Range { start: start + 0x1000, size };
        assert_eq!(registers(1), Place::Registers { range: second, gsi: Some(gsi + 1) });
    }
}
