//! Puts a virtio device on a machine's bus: its registers, its interrupt, its kicks.

use std::sync::{Arc, Mutex};

use crate::arch::layout;
use crate::bus::Bus;
use crate::error::{Context, Error, Result};
use crate::event::EventFd;
use crate::memory::{Memory, Range};
use crate::platform::{MmioDevice, Platform};
use crate::virtio::mmio::{Mmio, QUEUE_NOTIFY};
use crate::virtio::transport::Transport;
use crate::virtio::workers::Workers;
use crate::virtio::{Line, VirtioDevice};
use crate::vm::Vm;

/// Registers of one virtio-mmio device: a page, so that it could be mapped alone.
const REGISTERS: u64 = 0x1000;

/// What a device is attached to.
pub struct Slots<'a> {
    pub vm: &'a Vm,
    pub mmio: &'a Bus,
    pub memory: &'a Memory,
    pub workers: &'a Arc<Workers>,
    pub platform: &'a mut Platform,
}

impl Slots<'_> {
    /// Gives `device` the next free place and interrupt.
    pub fn attach(&mut self, name: String, device: Box<dyn VirtioDevice>) -> Result<Arc<Mutex<Transport>>> {
        let index = self.platform.virtio_mmio.len() as u32;
        let registers =
            Range { start: layout::VIRTIO_MMIO.start + u64::from(index) * REGISTERS, size: REGISTERS };
        let gsi = layout::DEVICE_GSIS.start + index;
        if gsi >= layout::DEVICE_GSIS.end {
            let most = layout::DEVICE_GSIS.len();
            return Err(Error::config(format!(
                "attach {name}: at most {most} devices have an interrupt line"
            )));
        }
        let attempt = format!("attach {name}");
        let kicks = device
            .queue_sizes()
            .iter()
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<std::io::Result<Vec<_>>>()
            .context(attempt.clone())?;
        for (queue, kick) in kicks.iter().enumerate() {
            self.vm.kick(kick, registers.start + QUEUE_NOTIFY, queue as u32).context(attempt.clone())?;
        }
        let line = Line::new(self.vm.interrupt(gsi).context(attempt)?);
        let transport = Transport::new(name, device, self.memory.clone(), self.workers.clone(), line, kicks);
        self.mmio.attach(registers, Arc::new(Mutex::new(Mmio(transport.clone()))))?;
        self.platform.virtio_mmio.push(MmioDevice { registers, gsi });
        Ok(transport)
    }
}
