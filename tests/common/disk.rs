//! A disk as its driver sees it: guest memory, rings and registers, without a guest.

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use alula::devices::block::Config;
use alula::devices::kind::{DeviceConfig, DeviceKind};
use alula::errands::Errands;
use alula::host::Host;
use alula::memory::{Memory, Range, allocate};
use alula::poll::EventFd;
use alula::virtio::Interrupts;
use alula::virtio::transport::{Register, Transport};
use alula::virtio::workers::Loop;
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::PATIENCE;

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

const F_VERSION_1: u64 = 1 << 32;
const F_EVENT_IDX: u64 = 1 << 29;
const QUEUE_SIZE: u16 = 256;
/// Each request has a header, data in one piece, and a status.
pub const IN_FLIGHT_MAX: u16 = QUEUE_SIZE / 3;
/// So much data a request can have.
pub const DATA_MAX: usize = 64 << 10;

const RINGS: u64 = 0x1_0000;
const DATA: u64 = 16 << 20;

pub struct Disk {
    pub transport: Arc<Mutex<Transport>>,
    pub memory: Memory,
    loops: Vec<Arc<Loop>>,
    interrupt: EventFd,
    next: Vec<u16>,
    seen: Vec<u16>,
    /// Added to where data lies.
    pub misalignment: u64,
}

impl Disk {
    /// The disk that `config` (the API's body) tells of, running.
    pub fn new(config: Value) -> Result<Self, String> {
        let config: Config = serde_json::from_value(config).map_err(|error| error.to_string())?;
        config.check().map_err(|error| error.to_string())?;
        let begun = Instant::now();
        let device = loop {
            match config.open("vm", &mut Host::default()).map_err(|error| error.to_string()) {
                // Another test starts a program: its new process has what we just closed for a moment.
                Err(error) if error.contains("it is in use by process ") && begun.elapsed() < PATIENCE => {
                    std::thread::yield_now();
                }
                result => break result?,
            }
        };
        let memory = allocate(&[Range { start: 0, size: 128 << 20 }]).unwrap();
        // Disks ask `main` for nothing.
        let errands = Errands::new(Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()));
        let loops: Vec<_> = (0..config.threads.max(1)).map(|_| Loop::new("io", &errands).unwrap()).collect();
        loops.iter().for_each(|event_loop| event_loop.start().unwrap());
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let queues = device.queue_sizes().len();
        let (interrupt, kicks) = (event(), (0..queues).map(|_| Arc::new(event())).collect());
        let interrupts = Interrupts::line(Arc::new(interrupt.try_clone().unwrap()), None, None);
        let transport =
            Transport::new("disk".to_owned(), device, memory.clone(), loops.clone(), interrupts, kicks);
        let (next, seen) = (vec![0; queues], vec![0; queues]);
        let mut disk = Self { transport, memory, loops, interrupt, next, seen, misalignment: 0 };
        disk.start();
        Ok(disk)
    }

    fn register(&self, register: Register, value: u32) {
        let stopping = self.transport.lock().unwrap().write(register, value);
        stopping.wait();
    }

    /// What the device offers.
    pub fn features(&self) -> u64 {
        let half = |select| {
            self.register(Register::DeviceFeaturesSelect, select);
            u64::from(self.transport.lock().unwrap().read(Register::DeviceFeatures))
        };
        half(0) | half(1) << 32
    }

    fn start(&mut self) {
        self.register(Register::Status, 3);
        let accepted = self.features() & (F_VERSION_1 | F_EVENT_IDX | 0xffff);
        for select in 0..2 {
            self.register(Register::DriverFeaturesSelect, select);
            self.register(Register::DriverFeatures, (accepted >> (32 * select)) as u32);
        }
        self.register(Register::Status, 3 | 8);
        for queue in 0..self.next.len() {
            let rings = RINGS * (queue as u64 + 1);
            self.register(Register::QueueSelect, queue as u32);
            self.register(Register::QueueSize, QUEUE_SIZE.into());
            for (register, address) in [
                (Register::QueueDescLow, rings),
                (Register::QueueDriverLow, rings + 0x1000),
                (Register::QueueDeviceLow, rings + 0x2000),
            ] {
                self.register(register, address as u32);
            }
            self.register(Register::QueueReady, 1);
        }
        self.register(Register::Status, 3 | 8 | 4);
    }

    pub fn config(&self, offset: u64, length: usize) -> u64 {
        let mut bytes = [0; 8];
        self.transport.lock().unwrap().read_config(offset, &mut bytes[..length]);
        u64::from_le_bytes(bytes)
    }

    fn place(&self, queue: usize, slot: u16) -> u64 {
        DATA + (queue as u64 * u64::from(IN_FLIGHT_MAX) + u64::from(slot)) * (DATA_MAX as u64 + 4096)
    }

    fn data(&self, queue: usize, slot: u16) -> GuestAddress {
        GuestAddress(self.place(queue, slot) + 4096 + self.misalignment)
    }

    /// Makes a request available in the descriptors of `slot`, without a kick.
    pub fn put(&mut self, queue: usize, slot: u16, kind: u32, sector: u64, length: usize) {
        self.put_repeated(queue, slot, kind, sector, length, usize::from(length > 0));
    }

    /// The same, with its data named so many times; more than once takes descriptors of the next slots.
    pub fn put_repeated(
        &mut self,
        queue: usize,
        slot: u16,
        kind: u32,
        sector: u64,
        length: usize,
        times: usize,
    ) {
        let memory = self.memory.memory();
        let rings = RINGS * (queue as u64 + 1);
        let place = self.place(queue, slot);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        memory.write_slice(&header, GuestAddress(place)).unwrap();
        memory.write_obj(0xff_u8, GuestAddress(place + 16)).unwrap();
        let writes = if kind == IN || kind == GET_ID { 2 } else { 0 };
        let first = slot * 3;
        let data = self.data(queue, slot).0;
        let mut descriptors = vec![(place, 16, 0)];
        descriptors.extend(std::iter::repeat_n((data, length as u32, writes), times));
        descriptors.push((place + 16, 1, 2));
        let count = descriptors.len();
        for (index, (address, length, flags)) in descriptors.into_iter().enumerate() {
            let next = if index + 1 < count { (1, first + index as u16 + 1) } else { (0, 0) };
            let at = rings + u64::from(first + index as u16) * 16;
            memory.write_obj(address, GuestAddress(at)).unwrap();
            memory.write_obj(length, GuestAddress(at + 8)).unwrap();
            memory.write_obj(flags | next.0, GuestAddress(at + 12)).unwrap();
            memory.write_obj(next.1, GuestAddress(at + 14)).unwrap();
        }
        self.offer(queue, slot);
    }

    /// Changes where on the disk the request of `slot` begins.
    pub fn set_sector(&self, queue: usize, slot: u16, sector: u64) {
        let place = GuestAddress(self.place(queue, slot) + 8);
        self.memory.memory().write_obj(sector.to_le(), place).unwrap();
    }

    /// Makes the descriptors of `slot` available again, as they are.
    pub fn offer(&mut self, queue: usize, slot: u16) {
        let memory = self.memory.memory();
        let available = RINGS * (queue as u64 + 1) + 0x1000;
        let next = self.next[queue];
        memory.write_obj(slot * 3, GuestAddress(available + 4 + u64::from(next % QUEUE_SIZE) * 2)).unwrap();
        // Interrupts are not waited for here: none is asked for but by the first used buffer of all.
        fence(Ordering::SeqCst);
        self.next[queue] = next.wrapping_add(1);
        memory.write_obj(self.next[queue], GuestAddress(available + 2)).unwrap();
        fence(Ordering::SeqCst);
    }

    /// How many requests were ever made available.
    pub fn available(&self, queue: usize) -> u16 {
        self.next[queue]
    }

    /// Whether the device wants a kick for what was made available since there were `before`
    /// (virtio 1.2, 2.7.10.1).
    pub fn needs_kick(&self, queue: usize, before: u16) -> bool {
        let used = RINGS * (queue as u64 + 1) + 0x2000;
        fence(Ordering::SeqCst);
        let event = GuestAddress(used + 4 + 8 * u64::from(QUEUE_SIZE));
        let event: u16 = self.memory.memory().read_obj(event).unwrap();
        let new = self.next[queue];
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(before)
    }

    pub fn kick(&self, queue: usize) {
        self.register(Register::QueueNotify, queue as u32);
    }

    /// Takes one used slot, if there is one.
    pub fn take(&mut self, queue: usize) -> Option<(u16, u32)> {
        let memory = self.memory.memory();
        let used = RINGS * (queue as u64 + 1) + 0x2000;
        let index: u16 = memory.read_obj(GuestAddress(used + 2)).unwrap();
        fence(Ordering::SeqCst);
        let seen = self.seen[queue];
        if index == seen {
            return None;
        }
        let at = used + 4 + u64::from(seen % QUEUE_SIZE) * 8;
        self.seen[queue] = seen.wrapping_add(1);
        let head: u32 = memory.read_obj(GuestAddress(at)).unwrap();
        Some((head as u16 / 3, memory.read_obj(GuestAddress(at + 4)).unwrap()))
    }

    /// Waits for a used slot.
    pub fn wait(&mut self, queue: usize) -> (u16, u32) {
        let begun = Instant::now();
        loop {
            if let Some(used) = self.take(queue) {
                return used;
            }
            assert!(begun.elapsed() < PATIENCE, "queue {queue} does not answer");
            std::thread::yield_now();
        }
    }

    pub fn status(&self, queue: usize, slot: u16) -> u8 {
        self.memory.memory().read_obj(GuestAddress(self.place(queue, slot) + 16)).unwrap()
    }

    pub fn set_data(&self, queue: usize, slot: u16, bytes: &[u8]) {
        self.memory.memory().write_slice(bytes, self.data(queue, slot)).unwrap();
    }

    pub fn get_data(&self, queue: usize, slot: u16, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.memory().read_slice(&mut bytes, self.data(queue, slot)).unwrap();
        bytes
    }

    fn one(&mut self, kind: u32, sector: u64, length: usize) -> Result<(), u8> {
        self.put(0, 0, kind, sector, length);
        self.kick(0);
        let (slot, written) = self.wait(0);
        assert_eq!(slot, 0);
        let expected = if kind == IN || kind == GET_ID { length as u32 + 1 } else { 1 };
        match self.status(0, 0) {
            0 => {
                assert_eq!(written, expected);
                Ok(())
            }
            code => Err(code),
        }
    }

    pub fn read(&mut self, sector: u64, length: usize) -> Result<Vec<u8>, u8> {
        self.one(IN, sector, length)?;
        Ok(self.get_data(0, 0, length))
    }

    pub fn write(&mut self, sector: u64, bytes: &[u8]) -> Result<(), u8> {
        self.set_data(0, 0, bytes);
        self.one(OUT, sector, bytes.len())
    }

    pub fn flush(&mut self) -> Result<(), u8> {
        self.one(FLUSH, 0, 0)
    }

    pub fn id(&mut self) -> Vec<u8> {
        self.one(GET_ID, 0, 20).unwrap();
        self.get_data(0, 0, 20)
    }

    /// Discards or writes zeros: ranges of sector, sectors, flags.
    pub fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> Result<(), u8> {
        let bytes = ranges.iter().flat_map(|(sector, sectors, flags)| {
            [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
        });
        let bytes: Vec<u8> = bytes.collect();
        self.set_data(0, 0, &bytes);
        self.one(kind, 0, bytes.len())
    }

    /// Returns when the device is stopped; `resume` lets it go on.
    pub fn pause(&self) {
        let (stopped, when) = std::sync::mpsc::channel();
        self.transport.lock().unwrap().pause(stopped);
        assert!(when.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Disconnected));
    }

    pub fn resume(&self) {
        self.transport.lock().unwrap().resume();
    }

    /// What the API's PATCH does.
    pub fn patch(&self, body: Value) -> Result<(), String> {
        let kind = DeviceKind::of::<Config>();
        let change = kind.parse_patch("", body.to_string().as_bytes()).map_err(|error| error.to_string())?;
        self.pause();
        let result = self.transport.lock().unwrap().patch(change.patch(), &mut Host::default());
        self.resume();
        result.map_err(|error| error.to_string())
    }

    /// Whether it asks for a reset.
    pub fn is_broken(&self) -> bool {
        self.transport.lock().unwrap().read(Register::Status) & 64 != 0
    }

    /// Whether it interrupted since the last time.
    pub fn was_interrupted(&self) -> bool {
        self.interrupt.read().is_ok()
    }

    /// Ends the threads, and the device with all that it wrote.
    pub fn end(self) {
        drop(self);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // A test that has failed does not wait for what may be the reason.
        if !std::thread::panicking() {
            self.loops.iter().for_each(Loop::end);
        }
    }
}
