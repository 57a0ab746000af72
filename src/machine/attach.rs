//! Puts virtio devices on a machine's bus, by MMIO or by PCI: registers, interrupts, kicks.

use std::sync::{Arc, Mutex, PoisonError};

use crate::arch::layout;
use crate::bus::Bus;
use crate::error::{Context, Error, Result};
use crate::event::EventFd;
use crate::memory::{Memory, Range};
use crate::pci::msix::Msix;
use crate::pci::root::{Ecam, Ports, Registers, Root};
use crate::platform::{MmioDevice, Platform};
use crate::virtio::mmio::{Mmio, QUEUE_NOTIFY};
use crate::virtio::transport::Transport;
use crate::virtio::workers::Workers;
use crate::virtio::{Interrupts, VirtioDevice, pci};
use crate::vm::Vm;

/// Registers of one virtio-mmio device: a page, so that it could be mapped alone.
const REGISTERS: u64 = 0x1000;

/// What devices are attached to.
pub struct Slots<'a> {
    pub vm: &'a Arc<Vm>,
    pub mmio: &'a Bus,
    pub memory: &'a Memory,
    pub workers: &'a Arc<Workers>,
    pub platform: &'a mut Platform,
    /// The PCI bus, if there is one.
    pub root: Option<Arc<Mutex<Root>>>,
}

impl Slots<'_> {
    /// Gives `device` the next free place.
    pub fn attach(&mut self, name: String, device: Box<dyn VirtioDevice>) -> Result<Arc<Mutex<Transport>>> {
        let attempt = format!("attach {name}");
        match self.root.clone() {
            Some(root) => self.attach_pci(&root, name, device),
            None => self.attach_mmio(name, device),
        }
        .context(attempt)
    }

    fn attach_mmio(&mut self, name: String, device: Box<dyn VirtioDevice>) -> Result<Arc<Mutex<Transport>>> {
        let index = self.platform.virtio_mmio.len() as u32;
        let registers =
            Range { start: layout::VIRTIO_MMIO.start + u64::from(index) * REGISTERS, size: REGISTERS };
        let gsi = layout::DEVICE_GSIS.start + index;
        if gsi >= layout::DEVICE_GSIS.end {
            let most = layout::DEVICE_GSIS.len();
            return Err(Error::config(format!("at most {most} devices have an interrupt line")));
        }
        let kicks = events(device.queue_sizes().len())?;
        for (queue, kick) in kicks.iter().enumerate() {
            self.vm.kick(kick, registers.start + QUEUE_NOTIFY, queue as u32)?;
        }
        let interrupts = Interrupts::line(self.vm.interrupt(gsi)?);
        let transport = self.transport(name, device, interrupts, kicks);
        self.mmio.attach(registers, Arc::new(Mutex::new(Mmio(transport.clone()))))?;
        self.platform.virtio_mmio.push(MmioDevice { registers, gsi });
        Ok(transport)
    }

    fn attach_pci(
        &mut self,
        root: &Mutex<Root>,
        name: String,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Arc<Mutex<Transport>>> {
        let mut root = root.lock().unwrap_or_else(PoisonError::into_inner);
        let number = root.next_device().ok_or_else(|| Error::config("the PCI bus has no free place"))?;
        let queues = device.queue_sizes().len();
        let kicks = events(queues)?;
        // One for configuration changes, one for each queue.
        let vectors = events(1 + queues)?;
        let copies = |events: &[EventFd]| {
            let copies = events.iter().map(EventFd::try_clone).collect::<std::io::Result<Vec<_>>>();
            copies.context("duplicate an event descriptor")
        };
        let interrupts = Interrupts::vectors(copies(&vectors)?, queues);
        let msix = Arc::new(Mutex::new(Msix::new(self.vm.clone(), number << 3, vectors)?));
        let at = |queue: usize| pci::NOTIFY + queue as u64 * pci::NOTIFY_MULTIPLIER;
        let kicked = copies(&kicks)?.into_iter().enumerate().map(|(queue, kick)| (at(queue), kick)).collect();
        let transport = self.transport(name, device, interrupts.clone(), kicks);
        let bar = layout::PCI_MEMORY.start + u64::from(number) * pci::BAR_SIZE;
        let function = pci::Pci::new(transport.clone(), interrupts, msix, bar);
        let registers = Registers { device: Arc::new(Mutex::new(function.registers())), kicks: kicked };
        root.add(Arc::new(Mutex::new(function)), Some(registers));
        Ok(transport)
    }

    fn transport(
        &self,
        name: String,
        device: Box<dyn VirtioDevice>,
        interrupts: Arc<Interrupts>,
        kicks: Vec<EventFd>,
    ) -> Arc<Mutex<Transport>> {
        Transport::new(name, device, self.memory.clone(), self.workers.clone(), interrupts, kicks)
    }
}

fn events(count: usize) -> Result<Vec<EventFd>> {
    let events = (0..count).map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC));
    events.collect::<std::io::Result<Vec<_>>>().context("create an event descriptor")
}

/// The PCI bus, reached by memory and, where there are such, by ports; its first device is the bridge
/// to the CPUs.
pub fn pci_bus(vm: &Arc<Vm>, mmio: &Arc<Bus>, pio: &Bus) -> Result<Arc<Mutex<Root>>> {
    let mut root = Root::new(vm.clone(), mmio.clone());
    root.add(Arc::new(Mutex::new(pci::HostBridge::default())), None);
    let root = Arc::new(Mutex::new(root));
    mmio.attach(layout::ECAM, Arc::new(Mutex::new(Ecam(root.clone()))))?;
    if let Some(ports) = layout::PCI_PORTS {
        pio.attach(ports, Arc::new(Mutex::new(Ports(root.clone()))))?;
    }
    Ok(root)
}
