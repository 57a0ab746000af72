//! virtio-pci, modern (virtio 1.2, 4.1): capabilities, and offsets to registers.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::Interrupts;
use super::transport::{Register, Transport};
use crate::bus::BusDevice;
use crate::error::{Error, Result};
use crate::memory::Range;
use crate::pci::config::{self, ConfigSpace, Identity};
use crate::pci::msix::{self, Msix};
use crate::pci::root::Function;
use crate::snapshot::Snapshot;
use crate::vm::irq::Message;

const VENDOR: u16 = 0x1af4;
/// Modern devices' IDs begin here; the device type is added.
const DEVICE_BASE: u16 = 0x1040;

/// The BAR, and what is where in it.
pub const BAR_SIZE: u64 = 0x4000;
const COMMON: u64 = 0;
const COMMON_SIZE: u64 = 0x40;
const ISR: u64 = 0x800;
const DEVICE: u64 = 0x1000;
const DEVICE_SIZE: u64 = 0x1000;
/// Kicks: queue N at `NOTIFY + N * NOTIFY_MULTIPLIER`.
pub const NOTIFY: u64 = 0x2000;
/// Bytes from one queue's kick to the next.
pub const NOTIFY_MULTIPLIER: u64 = 4;
const NOTIFY_SIZE: u64 = 0x800;
const TABLE: u64 = 0x3000;
const TABLE_SIZE: u64 = 0x800;
const PENDING: u64 = 0x3800;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
/// virtio_pci_cap.cfg_type.
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_PCI: u8 = 5;
/// struct virtio_pci_cap without ID and link; the access window has 4 bytes of data after it.
const CAP_BODY: usize = 14;

const MSIX_ENABLED: u8 = 1 << 7;
const MSIX_MASKED: u8 = 1 << 6;

/// A device behind PCI: its configuration space and its BAR.
pub struct Pci {
    transport: Arc<Mutex<Transport>>,
    interrupts: Arc<Interrupts>,
    msix: Arc<Mutex<Msix>>,
    space: ConfigSpace,
    /// High byte of MSI-X message control.
    control: usize,
    /// Body of the capability that gives access to the BAR through configuration space (4.1.4.9).
    window: usize,
}

impl Pci {
    /// The function for `transport`, whose BAR lies at `bar` to begin with.
    pub fn new(
        transport: Arc<Mutex<Transport>>,
        interrupts: Arc<Interrupts>,
        msix: Arc<Mutex<Msix>>,
        bar: u64,
    ) -> Self {
        let kind = transport.lock().unwrap_or_else(PoisonError::into_inner).device_type() as u16;
        let identity = Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + kind,
            class: class(kind),
            revision: 1,
            subsystem: DEVICE_BASE + kind,
        };
        let mut space = ConfigSpace::new(identity, bar, BAR_SIZE);
        let structure = |space: &mut ConfigSpace, kind: u8, offset: u64, length: u64, more: &[u8]| {
            let mut body = vec![0; CAP_BODY];
            body[0] = (2 + CAP_BODY + more.len()) as u8;
            body[1] = kind;
            body[6..10].copy_from_slice(&(offset as u32).to_le_bytes());
            body[10..14].copy_from_slice(&(length as u32).to_le_bytes());
            body.extend_from_slice(more);
            space.add_capability(CAPABILITY_VENDOR, &body)
        };
        structure(&mut space, TYPE_COMMON, COMMON, COMMON_SIZE, &[]);
        structure(&mut space, TYPE_ISR, ISR, 1, &[]);
        structure(&mut space, TYPE_DEVICE, DEVICE, DEVICE_SIZE, &[]);
        structure(&mut space, TYPE_NOTIFY, NOTIFY, NOTIFY_SIZE, &(NOTIFY_MULTIPLIER as u32).to_le_bytes());
        let window = structure(&mut space, TYPE_PCI, 0, 0, &[0; 4]);
        // BAR, offset, length and data of the window.
        for offset in [2].into_iter().chain(6..18) {
            space.make_writable(window + offset, 0xff);
        }
        let vectors = msix.lock().unwrap_or_else(PoisonError::into_inner).count() as u16;
        let mut body = (vectors - 1).to_le_bytes().to_vec();
        body.extend((TABLE as u32).to_le_bytes());
        body.extend((PENDING as u32).to_le_bytes());
        let control = space.add_capability(CAPABILITY_MSIX, &body) + 1;
        space.make_writable(control, MSIX_ENABLED | MSIX_MASKED);
        Self { transport, interrupts, msix, space, control, window }
    }

    /// The registers behind the BAR.
    pub fn registers(&self) -> Bar {
        Bar {
            transport: self.transport.clone(),
            interrupts: self.interrupts.clone(),
            msix: self.msix.clone(),
        }
    }

    /// Where in the BAR the access window looks now, and how many bytes.
    fn target(&self) -> Option<(u64, usize)> {
        let u32_at = |at: usize| {
            u32::from_le_bytes(std::array::from_fn(|index| self.space.byte(self.window + at + index)))
        };
        let (offset, length) = (u64::from(u32_at(6)), u32_at(10));
        let fits = [1, 2, 4].contains(&length) && offset.is_multiple_of(length.into());
        (fits && self.space.byte(self.window + 2) == 0 && offset < BAR_SIZE)
            .then_some((offset, length as usize))
    }
}

/// Base class, subclass and interface that match a device type.
fn class(kind: u16) -> [u8; 3] {
    match kind {
        1 => [0x02, 0x00, 0],
        2 => [0x01, 0x80, 0],
        _ => [0xff, 0x00, 0],
    }
}

impl Function for Pci {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        let window = self.window + CAP_BODY;
        if (window..window + 4).contains(&offset)
            && let Some((at, length)) = self.target()
        {
            let mut bytes = [0; 4];
            self.registers().read(at, &mut bytes[..length]);
            let rest = &bytes[offset - window..];
            data.iter_mut().zip(rest).for_each(|(place, byte)| *place = *byte);
            return;
        }
        self.space.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let was_master = self.space.is_master();
        self.space.write(offset, data);
        if self.space.is_master() != was_master {
            let mut transport = self.transport.lock().unwrap_or_else(PoisonError::into_inner);
            let stopping = transport.set_bus_master(!was_master);
            drop(transport);
            stopping.wait();
        }
        let window = self.window + CAP_BODY;
        if (window..window + 4).contains(&offset)
            && let Some((at, length)) = self.target()
        {
            let bytes: [u8; 4] = std::array::from_fn(|index| self.space.byte(window + index));
            self.registers().write(at, &bytes[..length]);
        }
        if offset <= self.control && self.control < offset + data.len() {
            let control = self.space.byte(self.control);
            let mut msix = self.msix.lock().unwrap_or_else(PoisonError::into_inner);
            msix.set_control(control & MSIX_ENABLED != 0, control & MSIX_MASKED != 0);
        }
    }

    fn place(&self) -> Option<Range> {
        self.space.bar().map(|start| Range { start, size: BAR_SIZE })
    }

    fn messages(&self) -> Vec<(u32, Message)> {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner).messages().collect()
    }

    fn connect(&mut self) {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner).connect();
    }

    fn set_requester(&mut self, requester: u32) {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner).set_requester(requester);
    }
}

/// What the guest can see of the function itself; its device is saved by its transport.
#[derive(Debug, Deserialize, Serialize)]
pub struct State {
    space: config::State,
    msix: msix::State,
    /// Its device may reach memory.
    is_master: bool,
}

impl Snapshot for Pci {
    type State = State;

    fn save(&self) -> Result<State> {
        let msix = self.msix.lock().unwrap_or_else(PoisonError::into_inner).save()?;
        let is_master = self.transport.lock().unwrap_or_else(PoisonError::into_inner).is_master();
        Ok(State { space: self.space.save()?, msix, is_master })
    }

    fn restore(&mut self, state: State) -> Result<()> {
        self.space.restore(state.space)?;
        // A driver that gave bus mastering does not give it again: its device would stand still for ever.
        if self.space.is_master() && !state.is_master {
            return Err(Error::config("the saved function is a bus master, and its device is not"));
        }
        let mut transport = self.transport.lock().unwrap_or_else(PoisonError::into_inner);
        transport.restore_bus_master(state.is_master);
        drop(transport);
        self.msix.lock().unwrap_or_else(PoisonError::into_inner).restore(state.msix)
    }
}

/// The registers behind the BAR.
pub struct Bar {
    transport: Arc<Mutex<Transport>>,
    interrupts: Arc<Interrupts>,
    msix: Arc<Mutex<Msix>>,
}

/// Offset in the common configuration (4.1.4.3) to (register, width); 64-bit fields are two registers.
fn register(offset: u64) -> Option<(Register, usize)> {
    Some(match offset {
        0x00 => (Register::DeviceFeaturesSelect, 4),
        0x04 => (Register::DeviceFeatures, 4),
        0x08 => (Register::DriverFeaturesSelect, 4),
        0x0c => (Register::DriverFeatures, 4),
        0x14 => (Register::Status, 1),
        0x15 => (Register::ConfigGeneration, 1),
        0x16 => (Register::QueueSelect, 2),
        0x18 => (Register::QueueSize, 2),
        0x1c => (Register::QueueReady, 2),
        0x20 => (Register::QueueDescLow, 4),
        0x24 => (Register::QueueDescHigh, 4),
        0x28 => (Register::QueueDriverLow, 4),
        0x2c => (Register::QueueDriverHigh, 4),
        0x30 => (Register::QueueDeviceLow, 4),
        0x34 => (Register::QueueDeviceHigh, 4),
        _ => return None,
    })
}

const CONFIG_VECTOR: u64 = 0x10;
const QUEUES: u64 = 0x12;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_NOTIFY_OFFSET: u64 = 0x1e;

impl Bar {
    fn read_common(&self, offset: u64) -> u32 {
        let transport = self.transport.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = transport.read(Register::QueueSelect);
        match (offset, register(offset)) {
            (_, Some((register, _))) => transport.read(register),
            (CONFIG_VECTOR, _) => self.interrupts.config_vector().into(),
            (QUEUES, _) => transport.queues() as u32,
            (QUEUE_VECTOR, _) => self.interrupts.queue_vector(queue).into(),
            (QUEUE_NOTIFY_OFFSET, _) => queue,
            _ => 0,
        }
    }

    fn write_register(&self, register: Register, value: u32) {
        let stopping = self.transport.lock().unwrap_or_else(PoisonError::into_inner).write(register, value);
        stopping.wait();
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let transport = self.transport.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = [0; 4];
        let count = data.len().min(4);
        bytes[..count].copy_from_slice(&data[..count]);
        let value = u32::from_le_bytes(bytes);
        match (offset, register(offset)) {
            (_, Some((register, width))) if width == data.len() => {
                drop(transport);
                self.write_register(register, value);
            }
            (CONFIG_VECTOR, _) if data.len() == 2 => self.interrupts.set_config_vector(value as u16),
            (QUEUE_VECTOR, _) if data.len() == 2 => {
                self.interrupts.set_queue_vector(transport.read(Register::QueueSelect), value as u16);
            }
            // A driver may write a 64-bit field at once.
            (_, Some(_)) if data.len() == 8 => {
                drop(transport);
                self.write_common(offset, &data[..4]);
                self.write_common(offset + 4, &data[4..]);
            }
            _ => {}
        }
    }
}

impl BusDevice for Bar {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON..COMMON_SIZE => {
                for (index, part) in data.chunks_mut(4).enumerate() {
                    let bytes = self.read_common(offset + 4 * index as u64).to_le_bytes();
                    part.copy_from_slice(&bytes[..part.len()]);
                }
            }
            // Reading the ISR acknowledges it (4.1.4.5).
            ISR => {
                data[0] = self.interrupts.take_status() as u8;
            }
            DEVICE..NOTIFY => {
                let transport = self.transport.lock().unwrap_or_else(PoisonError::into_inner);
                transport.read_config(offset - DEVICE, data);
            }
            TABLE.. if offset < TABLE + TABLE_SIZE => {
                self.msix.lock().unwrap_or_else(PoisonError::into_inner).read_table(offset - TABLE, data);
            }
            PENDING.. => {
                self.msix.lock().unwrap_or_else(PoisonError::into_inner).read_pending(offset - PENDING, data);
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..COMMON_SIZE => self.write_common(offset, data),
            DEVICE..NOTIFY => {
                let mut transport = self.transport.lock().unwrap_or_else(PoisonError::into_inner);
                transport.write_config(offset - DEVICE, data);
            }
            NOTIFY..TABLE => {
                self.write_register(Register::QueueNotify, ((offset - NOTIFY) / NOTIFY_MULTIPLIER) as u32);
            }
            TABLE..PENDING => {
                self.msix.lock().unwrap_or_else(PoisonError::into_inner).write_table(offset - TABLE, data);
            }
            _ => {}
        }
    }
}

/// The host bridge: a function without registers, device 0 of the bus.
pub struct HostBridge(pub ConfigSpace);

impl Default for HostBridge {
    fn default() -> Self {
        // A generic PCI Express host bridge, by Red Hat's IDs for it.
        let identity =
            Identity { vendor: 0x1b36, device: 0x0008, class: [0x06, 0, 0], revision: 0, subsystem: 0x1100 };
        Self(ConfigSpace::new(identity, 0, 0))
    }
}

impl Snapshot for HostBridge {
    type State = config::State;
    fn save(&self) -> Result<config::State> {
        self.0.save()
    }
    fn restore(&mut self, state: config::State) -> Result<()> {
        self.0.restore(state)
    }
}

impl Function for HostBridge {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.0.write(offset, data);
    }
    fn place(&self) -> Option<Range> {
        None
    }
}
