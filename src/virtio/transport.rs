//! The register file of a device: negotiation, set-up, activation and reset, once for all transports
//! (virtio 1.2, 2.1 to 2.4, 3.1). A transport only finds the register behind an offset.

mod life;
mod part;
mod saved;

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::workers::Loop;
use super::{Interrupts, VirtioDevice, mmio};
use crate::memory::Memory;
use crate::metrics::{Counter, Group, View, metrics};
use crate::poll::EventFd;

pub use saved::State;

/// Device status bits (virtio 1.2, 2.1).
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;

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

/// What the driver set up of one queue, and how far it is while nobody works on it.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
struct QueueRegisters {
    size: u16,
    ready: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
    next_avail: u16,
    next_used: u16,
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
    /// The loops were asked to end it, and so many have not answered yet.
    Stopping(usize),
}

metrics! {
    /// What is counted of every device; names as in Firecracker's metrics.
    struct Metrics {
        /// It could not start when its driver was ready.
        activate_fails: Counter,
        /// Its driver broke a rule and must reset it.
        event_fails: Counter,
    }
}

/// A device with its registers. It runs while the driver wants it to and the machine lets it; whatever
/// stands against that (a reset, a pause, a fault, a change by the user) stops it first.
///
/// Lock order: a transport's lock is taken before nothing else but a loop's inbox.
pub struct Transport {
    // Fixed
    name: String,
    offered: u64,
    // Host
    device: Box<dyn VirtioDevice>,
    metrics: Metrics,
    memory: Memory,
    /// The first one starts the device; its workers are dealt out over all.
    loops: Vec<Arc<Loop>>,
    interrupts: Arc<Interrupts>,
    kicks: Vec<Arc<EventFd>>,
    phase: Phase,
    paused: bool,
    /// The driver has reset it, and sees that complete once it is stopped.
    resetting: bool,
    /// The device itself may be other than at power-on: a reset of it is work for its loop.
    is_used: bool,
    /// Dropped when it is stopped.
    waiting: Vec<Sender<()>>,
    /// The device was restored, and its driver may have missed an interrupt.
    was_restored: bool,
    /// The device may reach memory: a PCI driver has not taken bus mastering away from it.
    is_master: bool,
    this: Weak<Mutex<Transport>>,
    // Guest-visible
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
}

/// A device that the driver has told to stop. The driver reuses the memory as soon as its write has returned, so
/// the vCPU waits here: without the transport's lock, which the loops take to give the queues back.
#[must_use = "the device may still reach memory"]
pub struct Stopping(Option<Receiver<()>>);

impl Stopping {
    /// Returns when the device touches neither guest memory nor interrupts any more, at once if it does not
    /// run. What is in flight bounds the time: the loops look at their inboxes after each event.
    pub fn wait(self) {
        if let Some(stopped) = self.0 {
            // An error: the sender was dropped, which is the signal.
            let _ = stopped.recv();
        }
    }
}

impl Transport {
    /// A device at power-on. `name` is what log lines call it; its workers live on `loops`, of which
    /// there is at least one; `kicks` has an event per queue.
    pub fn new(
        name: String,
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        loops: Vec<Arc<Loop>>,
        interrupts: Arc<Interrupts>,
        kicks: Vec<Arc<EventFd>>,
    ) -> Arc<Mutex<Self>> {
        let queues = vec![QueueRegisters::default(); device.queue_sizes().len()];
        let offered = device.features() | device.ring_features() | F_VERSION_1;
        Arc::new_cyclic(|this| {
            let mut transport = Self {
                name,
                offered,
                device,
                metrics: Metrics::new(),
                memory,
                loops,
                interrupts,
                kicks,
                phase: Phase::Idle,
                paused: false,
                resetting: false,
                is_used: false,
                waiting: Vec::new(),
                was_restored: false,
                is_master: true,
                this: this.clone(),
                status: 0,
                device_features_select: 0,
                driver_features_select: 0,
                driver_features: 0,
                queue_select: 0,
                queues,
            };
            transport.reset_registers();
            transport.show();
            Mutex::new(transport)
        })
    }

    /// What log lines call it.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The device's type.
    pub fn device_type(&self) -> u32 {
        self.device.device_type()
    }

    /// The events by which its driver kicks its queues.
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// The loops that its workers live on.
    pub fn loops(&self) -> &[Arc<Loop>] {
        &self.loops
    }

    /// What the device counts, and what is counted of every device.
    pub fn metrics(&self, view: View) -> Map<String, Value> {
        let mut all = Map::new();
        let groups =
            [self.device.metrics().map(|group| group.collect(view)), Some(self.metrics.collect(view))];
        for group in groups.into_iter().flatten() {
            if let Value::Object(fields) = group {
                all.extend(fields);
            }
        }
        all
    }

    /// Whether a driver of the guest uses it.
    pub fn is_driven(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    /// Whether its driver reads its registers from memory.
    pub fn is_shown(&self) -> bool {
        self.interrupts.shown().is_some()
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
            Register::ConfigGeneration => self.interrupts.generation().load(Ordering::SeqCst),
        }
    }

    /// The driver writes a register. What it may not write now is ignored. The write is done when the device
    /// that it stopped, if any, has been waited for.
    pub fn write(&mut self, register: Register, value: u32) -> Stopping {
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
                return Stopping(None);
            }
            Register::InterruptAcknowledge => {
                self.interrupts.acknowledge(value);
                return Stopping(None);
            }
            Register::Status if value & 0xff == 0 => return self.reset(),
            Register::Status => self.set_status(value & 0xff),
            other => self.set_up_queue(other, value),
        }
        self.show();
        Stopping(None)
    }

    /// The driver reads device configuration.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.device.read_config(offset, data);
    }

    /// The driver writes device configuration.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.is_used = true;
        self.device.write_config(offset, data);
        self.show();
    }

    /// The device's configuration has changed while it may be running: the driver is told so.
    pub fn configuration_changed(&mut self) {
        self.show();
        match self.status & DRIVER_OK != 0 {
            true => self.interrupts.configuration_changed(),
            false => drop(self.interrupts.generation().fetch_add(1, Ordering::SeqCst)),
        }
    }

    /// Has a driver that reads the registers from memory find them as they are now: whoever changes what the guest can see
    /// calls this before anybody else can learn of the change. The reasons for interrupts are there as soon as they change.
    fn show(&self) {
        if let Some(page) = self.interrupts.shown() {
            mmio::show(self, page);
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
        let mut new = value & !self.status & !NEEDS_RESET;
        let accepted = self.driver_features & !self.offered == 0 && self.driver_features & F_VERSION_1 != 0;
        if new & FEATURES_OK != 0 && !accepted {
            new &= !FEATURES_OK;
        }
        self.status |= new;
        self.go_on();
    }

    fn reset(&mut self) -> Stopping {
        self.resetting = true;
        // A device is reset where it is started, by its loop: a vCPU's thread has nothing to do with what a
        // device has of the host. One that is as it was at power-on has nothing to reset.
        match self.phase {
            Phase::Idle if self.is_used => self.stop(),
            Phase::Idle => drop(self.stopped()),
            _ => {}
        }
        self.stop_for_driver()
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
            // The read takes what was counted. It fails only where nothing was.
            let _ = kick.read();
        }
    }
}

fn set_half(value: &mut u64, half: u32, to: u32) {
    let shift = 32 * half;
    *value = *value & !(0xffff_ffff << shift) | u64::from(to) << shift;
}
