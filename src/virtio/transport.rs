//! The register file of a device: negotiation, set-up, activation and reset, once for all transports
//! (virtio 1.2, 2.1 to 2.4, 3.1). A transport only finds the register behind an offset.

use std::sync::{Arc, Mutex, Weak};

use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

use super::workers::Workers;
use super::{Interrupts, Io, Queue, VirtioDevice, Worker};
use crate::error::{Error, Result};
use crate::event::EventFd;
use crate::log;
use crate::memory::Memory;

/// Device status bits (virtio 1.2, 2.1).
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;

const F_INDIRECT_DESC: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;

/// The registers that every transport has, by one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "names of the specification")]
pub enum Register {
    DeviceFeatures,
    DeviceFeaturesSelect,
    DriverFeatures,
    DriverFeaturesSelect,
    QueueSelect,
    QueueSizeMax,
    QueueSize,
    QueueReady,
    QueueDescLow,
    QueueDescHigh,
    QueueDriverLow,
    QueueDriverHigh,
    QueueDeviceLow,
    QueueDeviceHigh,
    QueueNotify,
    InterruptStatus,
    InterruptAcknowledge,
    Status,
    ConfigGeneration,
}

/// What the driver set up of one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct QueueRegisters {
    size: u16,
    ready: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

/// Where the running half is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// There is none.
    Idle,
    /// The loop was asked to start it.
    Starting,
    /// It runs.
    Running,
    /// The loop was asked to end it; the driver sees the reset complete when it has.
    Resetting,
}

/// A device with its registers. Lock order: a transport's lock is taken before nothing else but the
/// workers' inbox.
pub struct Transport {
    // Fixed
    name: String,
    offered: u64,
    // Host
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    workers: Arc<Workers>,
    interrupts: Arc<Interrupts>,
    kicks: Vec<EventFd>,
    phase: Phase,
    this: Weak<Mutex<Transport>>,
    // Guest-visible
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
    config_generation: u32,
}

impl Transport {
    /// A device at power-on. `name` is what log lines call it; `kicks` has an event per queue.
    pub fn new(
        name: String,
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        workers: Arc<Workers>,
        interrupts: Arc<Interrupts>,
        kicks: Vec<EventFd>,
    ) -> Arc<Mutex<Self>> {
        let queues = vec![QueueRegisters::default(); device.queue_sizes().len()];
        let offered = device.features() | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC;
        Arc::new_cyclic(|this| {
            let mut transport = Self {
                name,
                offered,
                device,
                memory,
                workers,
                interrupts,
                kicks,
                phase: Phase::Idle,
                this: this.clone(),
                status: 0,
                device_features_select: 0,
                driver_features_select: 0,
                driver_features: 0,
                queue_select: 0,
                queues,
                config_generation: 0,
            };
            transport.reset_registers();
            Mutex::new(transport)
        })
    }

    /// The device's type.
    pub fn device_type(&self) -> u32 {
        self.device.device_type()
    }

    /// How many queues it has.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// The driver reads a register.
    pub fn read(&self, register: Register) -> u32 {
        let half = |value: u64, select: u32| match select {
            0 => value as u32,
            1 => (value >> 32) as u32,
            _ => 0,
        };
        let queue = self.queue();
        match register {
            Register::DeviceFeatures => half(self.offered, self.device_features_select),
            Register::DeviceFeaturesSelect => self.device_features_select,
            Register::DriverFeatures => half(self.driver_features, self.driver_features_select),
            Register::DriverFeaturesSelect => self.driver_features_select,
            Register::QueueSelect => self.queue_select,
            Register::QueueSizeMax => {
                self.device.queue_sizes().get(self.queue_select as usize).copied().unwrap_or(0).into()
            }
            Register::QueueSize => queue.size.into(),
            Register::QueueReady => queue.ready.into(),
            Register::QueueDescLow => half(queue.descriptors, 0),
            Register::QueueDescHigh => half(queue.descriptors, 1),
            Register::QueueDriverLow => half(queue.driver, 0),
            Register::QueueDriverHigh => half(queue.driver, 1),
            Register::QueueDeviceLow => half(queue.device, 0),
            Register::QueueDeviceHigh => half(queue.device, 1),
            Register::QueueNotify | Register::InterruptAcknowledge => 0,
            Register::InterruptStatus => self.interrupts.status(),
            Register::Status => self.status,
            Register::ConfigGeneration => self.config_generation,
        }
    }

    /// The driver writes a register. What it may not write now is ignored.
    pub fn write(&mut self, register: Register, value: u32) {
        match register {
            Register::DeviceFeaturesSelect => self.device_features_select = value,
            Register::DriverFeaturesSelect => self.driver_features_select = value,
            Register::DriverFeatures if self.status & FEATURES_OK == 0 => match self.driver_features_select {
                0 => set_half(&mut self.driver_features, 0, value),
                1 => set_half(&mut self.driver_features, 1, value),
                _ => {}
            },
            Register::QueueSelect => self.queue_select = value,
            Register::QueueNotify => {
                // Where no ioeventfd took it. A counter that is full says the same.
                if let Some(kick) = self.kicks.get(value as usize) {
                    let _ = kick.write(1);
                }
            }
            Register::InterruptAcknowledge => self.interrupts.acknowledge(value),
            Register::Status => self.set_status(value),
            other => self.set_up_queue(other, value),
        }
    }

    /// The driver reads device configuration.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.device.read_config(offset, data);
    }

    /// The driver writes device configuration.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    /// The device's configuration has changed while it may be running: the driver is told so.
    pub fn configuration_changed(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
        if self.status & DRIVER_OK != 0 {
            self.interrupts.configuration_change();
        }
    }

    fn queue(&self) -> QueueRegisters {
        self.queues.get(self.queue_select as usize).copied().unwrap_or_default()
    }

    /// Queues are set up between FEATURES_OK and DRIVER_OK, and not changed while they are ready.
    fn set_up_queue(&mut self, register: Register, value: u32) {
        if self.status & (FEATURES_OK | DRIVER_OK) != FEATURES_OK {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else { return };
        if register == Register::QueueReady {
            queue.ready = value & 1 != 0;
        } else if !queue.ready {
            match register {
                Register::QueueSize => queue.size = value as u16,
                Register::QueueDescLow => set_half(&mut queue.descriptors, 0, value),
                Register::QueueDescHigh => set_half(&mut queue.descriptors, 1, value),
                Register::QueueDriverLow => set_half(&mut queue.driver, 0, value),
                Register::QueueDriverHigh => set_half(&mut queue.driver, 1, value),
                Register::QueueDeviceLow => set_half(&mut queue.device, 0, value),
                Register::QueueDeviceHigh => set_half(&mut queue.device, 1, value),
                _ => {}
            }
        }
    }

    fn set_status(&mut self, value: u32) {
        let value = value & 0xff;
        if value == 0 {
            return self.reset();
        }
        let mut new = value & !self.status & !NEEDS_RESET;
        let accepted = self.driver_features & !self.offered == 0 && self.driver_features & F_VERSION_1 != 0;
        if new & FEATURES_OK != 0 && !accepted {
            new &= !FEATURES_OK;
        }
        self.status |= new;
        if new & DRIVER_OK != 0 && self.status & FEATURES_OK != 0 && self.phase == Phase::Idle {
            self.phase = Phase::Starting;
            self.workers.start(self.this());
        }
    }

    fn reset(&mut self) {
        match self.phase {
            Phase::Idle => self.reset_registers(),
            Phase::Starting | Phase::Running => {
                self.phase = Phase::Resetting;
                self.workers.reset(self.this());
            }
            Phase::Resetting => {}
        }
    }

    fn this(&self) -> Arc<Mutex<Self>> {
        self.this.upgrade().expect("it is being used")
    }

    fn reset_registers(&mut self) {
        let sizes = self.device.queue_sizes();
        self.queues = sizes.iter().map(|size| QueueRegisters { size: *size, ..Default::default() }).collect();
        (self.status, self.driver_features, self.queue_select) = (0, 0, 0);
        (self.device_features_select, self.driver_features_select) = (0, 0);
        self.interrupts.reset();
        for kick in &self.kicks {
            // Empty already: fine.
            let _ = kick.read();
        }
    }

    /// Called by the loop: builds the queues and starts the device. None: the driver has reset it
    /// meanwhile, or it cannot start.
    pub(super) fn start(&mut self) -> Option<Vec<Box<dyn Worker>>> {
        if self.phase != Phase::Starting {
            return None;
        }
        self.phase = Phase::Running;
        let io = Io { memory: self.memory.clone(), features: self.driver_features, queues: Vec::new() };
        match self.build_queues().and_then(|queues| self.device.start(Io { queues, ..io })) {
            Ok(workers) => Some(workers),
            Err(error) => {
                self.fail(&error);
                None
            }
        }
    }

    fn build_queues(&self) -> Result<Vec<Queue>> {
        let memory = self.memory.memory();
        let build = |index: usize| {
            let QueueRegisters { size, ready, descriptors, driver, device } = self.queues[index];
            let max = self.device.queue_sizes()[index];
            let broken = |what: &str| Error::guest(format!("the driver set up queue {index} with {what}"));
            let mut ring = virtio_queue::Queue::new(max).map_err(|_| broken("no size"))?;
            if ready {
                ring.try_set_size(size).map_err(|_| broken("a wrong size"))?;
                ring.try_set_desc_table_address(vm_memory::GuestAddress(descriptors))
                    .and_then(|()| ring.try_set_avail_ring_address(vm_memory::GuestAddress(driver)))
                    .and_then(|()| ring.try_set_used_ring_address(vm_memory::GuestAddress(device)))
                    .map_err(|_| broken("unaligned rings"))?;
                ring.set_event_idx(self.driver_features & F_EVENT_IDX != 0);
                ring.set_ready(true);
                if !ring.is_valid(&*memory) {
                    return Err(broken("rings outside memory"));
                }
            }
            let kick = self.kicks[index].try_clone().map_err(|error| Error::host(error.to_string()))?;
            Ok(Queue::new(ring, kick, index, self.interrupts.clone()))
        };
        (0..self.queues.len()).map(build).collect()
    }

    /// Called by the loop when no worker of the device is left: the driver's reset is complete.
    pub(super) fn stopped(&mut self) {
        if self.phase == Phase::Resetting {
            self.device.reset();
            self.reset_registers();
            self.phase = Phase::Idle;
        }
    }

    /// The device cannot go on: it asks its driver for a reset (virtio 1.2, 2.1.2).
    pub(super) fn fail(&mut self, error: &Error) {
        log::guest_line(format_args!("{} stopped and waits for a reset: {error}", self.name));
        self.status |= NEEDS_RESET;
        if self.status & DRIVER_OK != 0 {
            self.interrupts.configuration_change();
        }
    }
}

fn set_half(value: &mut u64, half: u32, to: u32) {
    let shift = 32 * half;
    *value = *value & !(0xffff_ffff << shift) | u64::from(to) << shift;
}
