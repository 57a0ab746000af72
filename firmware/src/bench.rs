//! Loads for benches. Each line that is typed is a command, answered with `done` and how many requests
//! were done:
//! - `read BYTES DEPTH COUNT`, `write BYTES DEPTH COUNT`: requests of the first disk, at most DEPTH of
//!   them in flight; at random places, or one after the other from 1 MiB on.
//! - `send BYTES DEPTH COUNT`, `receive BYTES DEPTH COUNT`: frames with the EtherType for local
//!   experiments; received are as many as it takes.
//! - `end`.
//!
//! The driver does what Linux's does: EVENT_IDX, all requests of a batch by one kick, an interrupt
//! asked for whenever nothing is left to look at. The interrupt is not taken, the ring is watched.

use core::ptr::{read_volatile, write_volatile};

use crate::arch;
use crate::console::{self, say};
use crate::machine::Machine;
use crate::virtio::{CONFIG, Device, Doorbell, NEXT, QUEUE_SELECT, QUEUE_SIZE_MAX, WRITE, wait_for};
use crate::words::number;

const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;
const F_MRG_RXBUF: u64 = 1 << 15;
const NET_HEADER: u64 = 12;
const ETHER_TYPE: u16 = 0xb588;
const SECTOR: u64 = 512;

/// Entries of the rings, if the device has as many.
const SIZE: u32 = 256;
/// Descriptors of a request of the disk, and of a frame.
const OF_REQUEST: u64 = 3;
const OF_FRAME: u64 = 1;
/// The parts of a ring, and where the next one begins.
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const RING: u64 = 0x4000;
/// Headers of requests, then their data, from the start of our memory.
const HEADERS: u64 = 2 * RING;
const HEADER: u64 = 32;
const DATA: u64 = 0x1_0000;
/// Memory that is used, and where it begins in the machine's largest range: clear of all that was loaded.
const AREA: u64 = 64 << 20;
const CLEAR: u64 = 16 << 20;

fn load<T: Copy>(address: u64) -> T {
    // SAFETY: the addresses are in the memory from `CLEAR` on, which is nobody else's; the device reads and
    // writes it, too, so the access is volatile. Every value of the integers there is valid.
    unsafe { read_volatile(address as *const T) }
}

fn store<T>(address: u64, value: T) {
    // SAFETY: as in `load`.
    unsafe { write_volatile(address as *mut T, value) }
}

/// A queue under load. Request number N is made of the descriptors from N times `each` on.
struct Queue {
    doorbell: Doorbell,
    ring: u64,
    size: u64,
    each: u64,
    available: u16,
    published: u16,
    seen: u16,
}

impl Queue {
    fn new(device: Device, index: u32, each: u64, area: u64) -> Self {
        let ring = area + u64::from(index) * RING;
        for offset in (0..RING).step_by(8) {
            store(ring + offset, 0_u64);
        }
        device.write(QUEUE_SELECT, index);
        let size = device.read(QUEUE_SIZE_MAX).min(SIZE);
        device.set_vector(index, index as u16 + 1);
        device.set_queue(index, size, ring, ring + AVAILABLE, ring + USED);
        Self {
            doorbell: device.doorbell(index),
            ring,
            size: size.into(),
            each,
            available: 0,
            published: 0,
            seen: 0,
        }
    }

    #[inline(never)]
    fn describe(&self, request: u64, part: u64, address: u64, length: u32, flags: u16) {
        let at = self.each * request + part;
        store(self.ring + 16 * at, address);
        store(self.ring + 16 * at + 8, length);
        store(self.ring + 16 * at + 12, flags);
        store(self.ring + 16 * at + 14, at as u16 + 1);
    }

    /// Puts a request into the ring; the device does not know yet.
    fn offer(&mut self, request: u64) {
        let place = u64::from(self.available) & (self.size - 1);
        store(self.ring + AVAILABLE + 4 + 2 * place, (self.each * request) as u16);
        self.available = self.available.wrapping_add(1);
    }

    /// Lets the device know, and asks for an interrupt with the next used request.
    #[inline(never)]
    fn publish(&mut self) {
        store(self.ring + AVAILABLE + 4 + 2 * self.size, self.seen);
        let (old, new) = (self.published, self.available);
        arch::barrier();
        store(self.ring + AVAILABLE + 2, new);
        self.published = new;
        arch::full_barrier();
        let event: u16 = load(self.ring + USED + 4 + 8 * self.size);
        // virtio 1.2, 2.7.10.1
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            self.doorbell.ring();
        }
    }

    fn used(&self) -> u16 {
        load(self.ring + USED + 2)
    }

    /// Keeps `depth` requests in flight until `count` are done; `prepare` makes one ready, `counts` says
    /// whether one that is done counts. With `endless`, as many are in flight at the end. Returns how many are done when the device does not answer.
    #[inline(never)]
    fn run(
        &mut self,
        depth: u64,
        count: u64,
        endless: bool,
        prepare: &mut dyn FnMut(u64),
        counts: &dyn Fn(u64) -> bool,
    ) -> u64 {
        let (mut offered, mut done) = (0, 0);
        let limit = if endless { u64::MAX } else { count };
        for request in 0..depth.min(limit) {
            prepare(request);
            self.offer(request);
            offered += 1;
        }
        self.publish();
        while done < count {
            if !wait_for(|| self.used() != self.seen) {
                break;
            }
            while self.used() != self.seen && done < count {
                arch::barrier();
                let place = u64::from(self.seen) & (self.size - 1);
                let request = u64::from(load::<u32>(self.ring + USED + 4 + 8 * place)) / self.each;
                self.seen = self.seen.wrapping_add(1);
                let counted = counts(request);
                done += u64::from(counted);
                if offered < limit || !counted {
                    prepare(request);
                    self.offer(request);
                    offered += u64::from(counted);
                }
            }
            self.publish();
        }
        done
    }
}

/// Where our memory begins.
fn area(machine: &Machine) -> Option<u64> {
    let largest = machine.memory().iter().max_by_key(|(_, size)| *size)?;
    (largest.1 > CLEAR + AREA).then(|| (largest.0 + CLEAR).next_multiple_of(4096))
}

fn disk(area: u64, kind: u32, [bytes, depth, count]: [u64; 3]) -> Option<u64> {
    let device = Device::find(2)?;
    if !device.negotiate(F_VERSION_1 | F_EVENT_IDX) {
        return None;
    }
    let mut queue = Queue::new(device, 0, OF_REQUEST, area);
    device.run();
    let sectors = u64::from(device.read(CONFIG)) | u64::from(device.read(CONFIG + 4)) << 32;
    let places = sectors * SECTOR / bytes;
    let depth = depth.min(queue.size / OF_REQUEST).min((AREA - DATA) / bytes).max(1);
    let header = |request| area + HEADERS + HEADER * request;
    let data_flags = if kind == 0 { NEXT | WRITE } else { NEXT };
    for request in 0..depth {
        store(header(request), kind);
        queue.describe(request, 0, header(request), 16, NEXT);
        queue.describe(request, 1, area + DATA + bytes * request, bytes as u32, data_flags);
        queue.describe(request, 2, header(request) + 16, 1, WRITE);
    }
    let mut place = 1_u64;
    let mut prepare = |request| {
        // Knuth's MMIX generator: its upper bits are good.
        let random = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        place = if bytes < 1 << 20 { random } else { place + (1 << 33) };
        store(header(request) + 8, (place >> 33) % places * (bytes / SECTOR));
        store(header(request) + 16, 0xff_u8);
    };
    Some(queue.run(depth, count, false, &mut prepare, &|request| load::<u8>(header(request) + 16) == 0))
}

fn frames(area: u64, receives: bool, [bytes, depth, count]: [u64; 3]) -> Option<u64> {
    let device = Device::find(1)?;
    if !device.negotiate(F_VERSION_1 | F_EVENT_IDX | F_MRG_RXBUF) {
        return None;
    }
    let mut queues = [0, 1].map(|index| Queue::new(device, index, OF_FRAME, area));
    device.run();
    let queue = &mut queues[usize::from(!receives)];
    let depth = depth.min(queue.size / OF_FRAME).max(1);
    let frame = |request| area + DATA + 4096 * request;
    let ether_type = |request| frame(request) + NET_HEADER + 12;
    for request in 0..depth {
        for offset in (0..2048).step_by(8) {
            store(frame(request) + offset, 0_u64);
        }
        // To nobody, from nobody.
        store(frame(request) + NET_HEADER, 0x02_u8);
        store(frame(request) + NET_HEADER + 6, 0x02_u8);
        store(ether_type(request), ETHER_TYPE);
        let (length, flags) = if receives { (2048, WRITE) } else { (NET_HEADER + bytes, 0) };
        queue.describe(request, 0, frame(request), length as u32, flags);
    }
    let counts = |request| !receives || load::<u16>(ether_type(request)) == ETHER_TYPE;
    Some(queue.run(depth, count, receives, &mut |_| {}, &counts))
}

/// The next line that is typed; one that is too long is cut.
fn line(buffer: &mut [u8]) -> &[u8] {
    let mut length = 0;
    loop {
        match console::receive() {
            Some(b'\n' | b'\r') => return &buffer[..length],
            Some(byte) if length < buffer.len() => {
                buffer[length] = byte;
                length += 1;
            }
            Some(_) => {}
            // Every look is an exit, and there is time.
            None => {
                let end = arch::ticks() + arch::PATIENCE_TICKS / 10_000;
                while arch::ticks() < end {}
            }
        }
    }
}

/// Does what is typed, until `end`.
pub fn serve(machine: &Machine) {
    let Some(area) = area(machine) else {
        say!("a bench takes 96 MiB\n");
        return;
    };
    say!("bench: ready\n");
    loop {
        let mut buffer = [0; 80];
        let mut words = line(&mut buffer).split(|byte| *byte == b' ');
        let name = words.next().unwrap_or_default();
        let mut value = || words.next().and_then(number).unwrap_or(1).max(1);
        let values = [value(), value(), value()];
        let done = match name {
            b"read" => disk(area, 0, values),
            b"write" => disk(area, 1, values),
            b"send" => frames(area, false, values),
            b"receive" => frames(area, true, values),
            b"end" => return,
            _ => None,
        };
        match done {
            Some(count) => say!("done ", count, "\n"),
            None => say!("cannot\n"),
        }
    }
}
