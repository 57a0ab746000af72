//! A driver of virtio-mmio devices (virtio 1.2, 4.2), just enough to ask them for something and to
//! wait for the answer.

use core::ptr::{read_volatile, write_volatile};

use crate::arch::{self, read32, write32};

const DEVICES_MAX: u64 = 32;
const STRIDE: u64 = 0x1000;

pub const STATUS: u64 = 0x70;
pub const QUEUE_SELECT: u64 = 0x30;
pub const QUEUE_SIZE_MAX: u64 = 0x34;
pub const QUEUE_SIZE: u64 = 0x38;
pub const QUEUE_READY: u64 = 0x44;
pub const QUEUE_NOTIFY: u64 = 0x50;
pub const CONFIG: u64 = 0x100;
const QUEUE_DESC: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xa0;
pub const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
const DEVICE_FEATURES: u64 = 0x10;
const DRIVER_FEATURES: u64 = 0x20;

const FEATURES_OK: u32 = 8;
pub const F_VERSION_1: u64 = 1 << 32;

/// Entries of our rings.
pub const SIZE: usize = 8;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// One entry of the descriptor table.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Descriptor {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
    pub next: u16,
}

/// The three parts of a split ring.
#[repr(C, align(4096))]
pub struct Ring {
    pub descriptors: [Descriptor; SIZE],
    pub available_flags: u16,
    pub available_index: u16,
    pub available: [u16; SIZE],
    padding: [u8; 4],
    pub used_flags: u16,
    pub used_index: u16,
    pub used: [[u32; 2]; SIZE],
}

const EMPTY: Ring = Ring {
    descriptors: [Descriptor { address: 0, length: 0, flags: 0, next: 0 }; SIZE],
    available_flags: 0,
    available_index: 0,
    available: [0; SIZE],
    padding: [0; 4],
    used_flags: 0,
    used_index: 0,
    used: [[0; 2]; SIZE],
};

/// Rings for the devices of one case: it uses at most four queues.
static mut RINGS: [Ring; 4] = [EMPTY; 4];
static mut RINGS_TAKEN: usize = 0;

/// Where a device's registers are.
#[derive(Clone, Copy)]
enum Place {
    /// virtio-mmio at this address.
    Mmio(u64),
    /// A function of PCI bus 0: its configuration space.
    Pci(u64),
}

/// A device. Registers go by their offsets in virtio-mmio, whatever the transport.
#[derive(Clone, Copy)]
pub struct Device(Place);

/// Configuration space: command and status, the BAR.
const COMMAND: u64 = 0x04;
pub const BAR: u64 = 0x10;
const MEMORY_AND_MASTER: u32 = 6;
/// Where registers of functions can be: behind the configuration space of 16 buses.
const PCI_MEMORY: u64 = arch::ECAM + (16 << 20);
/// A port of a PCIe slot, by its vendor and device, and its registers.
const PORT: u32 = 0x000c_1b36;
const BUS_NUMBERS: u64 = 0x18;
const WINDOW: u64 = 0x20;
/// Where our monitor's functions have their structures in the BAR; the capabilities say the same.
const PCI_DEVICE: u64 = 0x1000;
const PCI_NOTIFY: u64 = 0x2000;
const PCI_QUEUE_VECTOR: u64 = 0x1a;
/// The register of a queue's vector reads as this after a vector that there is not (virtio 1.2, 4.1.5.1.2).
const NO_VECTOR: u16 = 0xffff;
pub const PCI_TABLE: u64 = 0x3000;

/// The common configuration's offset and width for a register of virtio-mmio.
fn common(offset: u64) -> Option<(u64, u32)> {
    Some(match offset {
        DEVICE_FEATURES => (0x04, 4),
        0x14 => (0x00, 4),
        DRIVER_FEATURES => (0x0c, 4),
        0x24 => (0x08, 4),
        QUEUE_SELECT => (0x16, 2),
        QUEUE_SIZE | QUEUE_SIZE_MAX => (0x18, 2),
        QUEUE_READY => (0x1c, 2),
        STATUS => (0x14, 1),
        0x80..=0x84 => (offset - 0x60, 4),
        0x90..=0x94 => (offset - 0x68, 4),
        0xa0..=0xa4 => (offset - 0x70, 4),
        _ => return None,
    })
}

/// Where a device in the slot of this port is in configuration space, if there is one: on the bus with this number, with its
/// registers in a window of its own. Our monitor's ports are the last devices of bus 0, so that buses have the first numbers.
#[inline(never)]
fn behind(port: u64, bus: u64) -> u64 {
    let window = PCI_MEMORY + (bus << 20);
    let device = arch::ECAM + (bus << 20);
    write32(port + BUS_NUMBERS, (bus << 8 | bus << 16) as u32);
    write32(port + WINDOW, (window >> 16 | window) as u32);
    write32(port + COMMAND, MEMORY_AND_MASTER);
    write32(device + BAR, window as u32);
    device
}

impl Device {
    /// The first device of this type, behind virtio-mmio or on the PCI bus.
    #[inline(never)]
    pub fn find(kind: u32) -> Option<Self> {
        let places = (0..DEVICES_MAX).map(|index| Self(Place::Mmio(arch::VIRTIO_MMIO + index * STRIDE)));
        let mmio = places
            .take_while(|device| device.read(0) == u32::from_le_bytes(*b"virt"))
            .find(|device| device.read(8) == kind);
        let id = (0x1040 + kind) << 16 | 0x1af4;
        let pci = || {
            let functions = (0..DEVICES_MAX).map(|index| arch::ECAM + (index << 15));
            let found = functions.take_while(|at| read32(*at) != u32::MAX).find(|at| read32(*at) == id)?;
            write32(found + COMMAND, MEMORY_AND_MASTER);
            Some(Self(Place::Pci(found)))
        };
        mmio.or_else(pci)
    }

    /// All devices that are on the PCI bus now, and in the slots behind its ports.
    pub fn all_on_pci() -> impl Iterator<Item = Self> {
        let functions = (0..DEVICES_MAX).map(|index| match arch::ECAM + (index << 15) {
            port if read32(port) == PORT => behind(port, DEVICES_MAX - index),
            function => function,
        });
        let found = functions.filter(|at| read32(*at) != u32::MAX && read32(*at) & 0xffff == 0x1af4);
        found.map(|at| {
            write32(at + COMMAND, MEMORY_AND_MASTER);
            Self(Place::Pci(at))
        })
    }

    /// Whether it offers this feature, one of the first 32.
    pub fn offers(self, feature: u32) -> bool {
        self.write(DEVICE_FEATURES + 4, 0);
        self.read(DEVICE_FEATURES) & feature != 0
    }

    /// Whether a driver has set it to work.
    pub fn is_driven(self) -> bool {
        self.read(STATUS) & 4 != 0
    }

    /// Its configuration space, if it is on the PCI bus.
    pub fn config_space(self) -> Option<u64> {
        match self.0 {
            Place::Mmio(_) => None,
            Place::Pci(config) => Some(config),
        }
    }

    /// Where its registers begin.
    pub fn start_of_registers(self) -> u64 {
        match self.0 {
            Place::Mmio(start) => start,
            Place::Pci(config) => {
                let (low, high) = (read32(config + BAR), read32(config + BAR + 4));
                // A device that has just gone: in its configuration space is nothing, either.
                match low == u32::MAX || high == u32::MAX {
                    true => config,
                    false => u64::from(low & !15) | u64::from(high) << 32,
                }
            }
        }
    }

    #[inline(never)]
    pub fn read(self, offset: u64) -> u32 {
        let start = self.start_of_registers();
        match (self.0, common(offset)) {
            (Place::Mmio(_), _) => read32(start + offset),
            (_, Some((at, 1))) => arch::read8(start + at).into(),
            (_, Some((at, 2))) => arch::read16(start + at).into(),
            (_, Some((at, _))) => read32(start + at),
            _ if offset >= CONFIG => read32(start + PCI_DEVICE + offset - CONFIG),
            _ => 0,
        }
    }

    #[inline(never)]
    pub fn write(self, offset: u64, value: u32) {
        let start = self.start_of_registers();
        match (self.0, common(offset)) {
            (Place::Mmio(_), _) => write32(start + offset, value),
            (_, Some((at, 1))) => arch::write8(start + at, value as u8),
            (_, Some((at, 2))) => arch::write16(start + at, value as u16),
            (_, Some((at, _))) => write32(start + at, value),
            _ if offset == QUEUE_NOTIFY => {
                arch::write16(start + PCI_NOTIFY + u64::from(value & 0xff) * 4, value as u16)
            }
            _ if offset >= CONFIG => write32(start + PCI_DEVICE + offset - CONFIG, value),
            _ => {}
        }
    }

    /// Takes the interrupt for a used buffer as a driver's handler does; false: there is none. Behind PCI
    /// there is nothing to be taken.
    #[inline(never)]
    pub fn acknowledge(self) -> bool {
        let Place::Mmio(_) = self.0 else { return true };
        // Raised after the buffer is used.
        let raised = wait_for(|| self.is_interrupting());
        self.write(INTERRUPT_ACKNOWLEDGE, 1);
        raised
    }

    /// Whether an interrupt is there that was not acknowledged.
    pub fn is_interrupting(self) -> bool {
        self.read(INTERRUPT_STATUS) != 0
    }

    /// What kicks a queue, looked up once: behind PCI that takes exits.
    pub fn doorbell(self, queue: u32) -> Doorbell {
        let start = self.start_of_registers();
        match self.0 {
            Place::Mmio(_) => Doorbell { at: start + QUEUE_NOTIFY, is_wide: true, queue },
            Place::Pci(_) => {
                Doorbell { at: start + PCI_NOTIFY + u64::from(queue) * 4, is_wide: false, queue }
            }
        }
    }

    /// Behind PCI, has a queue interrupt by a vector of its own, or by one for all queues where the device has
    /// not so many; MMIO has one line for all.
    pub fn set_vector(self, queue: u32, vector: u16) {
        if let Place::Pci(_) = self.0 {
            let register = self.start_of_registers() + PCI_QUEUE_VECTOR;
            self.write(QUEUE_SELECT, queue);
            arch::write16(register, vector);
            if arch::read16(register) == NO_VECTOR {
                arch::write16(register, 1);
            }
        }
    }

    #[inline(never)]
    fn write64(self, offset: u64, value: u64) {
        self.write(offset, value as u32);
        self.write(offset + 4, (value >> 32) as u32);
    }

    /// Resets the device; false: it does not come back.
    pub fn reset(self) -> bool {
        self.write(STATUS, 0);
        wait_for(|| self.read(STATUS) == 0)
    }

    /// Reset, then up to FEATURES_OK with `features`; false: it does not accept them.
    #[inline(never)]
    pub fn negotiate(self, features: u64) -> bool {
        if !self.reset() {
            return false;
        }
        self.write(STATUS, 1);
        self.write(STATUS, 3);
        for half in 0..2 {
            self.write(DRIVER_FEATURES + 4, half);
            self.write(DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.write(STATUS, 3 | FEATURES_OK);
        self.read(STATUS) & FEATURES_OK != 0
    }

    /// Sets up a queue with rings at these addresses.
    #[inline(never)]
    pub fn set_queue(self, queue: u32, size: u32, descriptors: u64, driver: u64, device: u64) {
        self.write(QUEUE_SELECT, queue);
        self.write(QUEUE_SIZE, size);
        self.write64(QUEUE_DESC, descriptors);
        self.write64(QUEUE_DRIVER, driver);
        self.write64(QUEUE_DEVICE, device);
        self.write(QUEUE_READY, 1);
    }

    /// Ready to be used.
    pub fn run(self) {
        self.write(STATUS, 0xf);
    }

    /// The device with `queues` sound queues, running. No feature but VERSION_1 is accepted.
    pub fn start<const N: usize>(self) -> Option<[Queue; N]> {
        if !self.negotiate(F_VERSION_1) {
            return None;
        }
        let mut index = 0;
        let queues = [(); N].map(|()| {
            let queue = Queue::new(self, index);
            queue.connect();
            index += 1;
            queue
        });
        self.run();
        Some(queues)
    }
}

/// A queue's notification register.
pub struct Doorbell {
    at: u64,
    is_wide: bool,
    queue: u32,
}

impl Doorbell {
    pub fn ring(&self) {
        match self.is_wide {
            true => write32(self.at, self.queue),
            false => arch::write16(self.at, self.queue as u16),
        }
    }
}

/// Waits as long as a device on a busy host may take; false: in vain.
pub fn wait_for(condition: impl Fn() -> bool) -> bool {
    wait_until(arch::ticks() + arch::PATIENCE_TICKS, condition)
}

/// Waits until the counter is at `end`; false: in vain.
fn wait_until(end: u64, condition: impl Fn() -> bool) -> bool {
    loop {
        if condition() {
            return true;
        }
        if arch::ticks() > end {
            return false;
        }
        core::hint::spin_loop();
    }
}

/// Forgets all rings: a new case begins.
pub fn forget_rings() {
    // SAFETY: one CPU runs the cases, one after the other.
    unsafe { RINGS_TAKEN = 0 };
}

/// A queue of a device, and its ring.
#[derive(Clone, Copy)]
pub struct Queue {
    device: Device,
    index: u32,
    /// One of [`RINGS`], which no other queue has. The device reads and writes it, too: all accesses to what
    /// both use are volatile.
    ring: *mut Ring,
}

/// One buffer of a request.
#[derive(Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
}

/// What the device reads.
pub fn read_by_device(bytes: &[u8]) -> Buffer {
    Buffer { address: bytes.as_ptr() as u64, length: bytes.len() as u32, flags: 0 }
}

/// What the device writes.
pub fn written_by_device(bytes: &mut [u8]) -> Buffer {
    Buffer { address: bytes.as_mut_ptr() as u64, length: bytes.len() as u32, flags: WRITE }
}

impl Queue {
    fn new(device: Device, index: u32) -> Self {
        // SAFETY: one CPU runs the cases, which take no more rings than there are, each once until all are
        // forgotten.
        unsafe {
            let ring = (&raw mut RINGS).cast::<Ring>().add(RINGS_TAKEN);
            RINGS_TAKEN += 1;
            ring.write(EMPTY);
            Self { device, index, ring }
        }
    }

    /// The addresses of the three parts.
    pub fn parts(&self) -> [u64; 3] {
        // SAFETY: the ring is one of `RINGS`; only addresses are taken.
        unsafe {
            [
                (&raw const (*self.ring).descriptors) as u64,
                (&raw const (*self.ring).available_flags) as u64,
                (&raw const (*self.ring).used_flags) as u64,
            ]
        }
    }

    fn connect(&self) {
        let [descriptors, driver, device] = self.parts();
        self.device.set_queue(self.index, SIZE as u32, descriptors, driver, device);
    }

    #[inline(never)]
    pub fn set_descriptor(&self, index: usize, descriptor: Descriptor) {
        // SAFETY: the ring is one of `RINGS`, and the index is looked at.
        unsafe { write_volatile(&raw mut (*self.ring).descriptors[index], descriptor) };
    }

    pub fn available_index(&self) -> u16 {
        // SAFETY: the ring is one of `RINGS`.
        unsafe { read_volatile(&raw const (*self.ring).available_index) }
    }

    pub fn set_available_index(&self, index: u16) {
        arch::barrier();
        // SAFETY: the ring is one of `RINGS`.
        unsafe { write_volatile(&raw mut (*self.ring).available_index, index) };
        arch::barrier();
    }

    /// Makes the chain that begins with descriptor `head` available, and kicks.
    #[inline(never)]
    pub fn offer(&self, head: u16) {
        let index = self.available_index();
        // SAFETY: the ring is one of `RINGS`, and the index is below its size.
        unsafe { write_volatile(&raw mut (*self.ring).available[index as usize % SIZE], head) };
        self.set_available_index(index.wrapping_add(1));
        self.kick();
    }

    pub fn kick(&self) {
        self.device.write(QUEUE_NOTIFY, self.index);
    }

    pub fn used_index(&self) -> u16 {
        // SAFETY: the ring is one of `RINGS`.
        unsafe { read_volatile(&raw const (*self.ring).used_index) }
    }

    /// Sends a request of up to 4 buffers and waits for the answer: how many bytes were written.
    #[inline(never)]
    pub fn request(&self, buffers: &[Buffer]) -> Option<u32> {
        self.request_until(arch::ticks() + arch::PATIENCE_TICKS, buffers)
    }

    /// Sends such a request, and gives its answer up when the counter is at `end`.
    #[inline(never)]
    pub fn request_until(&self, end: u64, buffers: &[Buffer]) -> Option<u32> {
        let before = self.used_index();
        self.offer_chain(buffers);
        let answered = wait_until(end, || self.used_index() != before);
        arch::barrier();
        // SAFETY: the ring is one of `RINGS`, and the index is below its size.
        answered.then(|| unsafe { read_volatile(&raw const (*self.ring).used[before as usize % SIZE][1]) })
    }

    /// Sends a request of up to 4 buffers.
    #[inline(never)]
    pub fn offer_chain(&self, buffers: &[Buffer]) {
        for (index, buffer) in buffers.iter().enumerate() {
            let more = index + 1 < buffers.len();
            self.set_descriptor(
                index,
                Descriptor {
                    address: buffer.address,
                    length: buffer.length,
                    flags: buffer.flags | if more { NEXT } else { 0 },
                    next: index as u16 + 1,
                },
            );
        }
        self.offer(0);
    }
}
