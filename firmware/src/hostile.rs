//! A driver that breaks every rule it can. After each breach, all other devices must still answer, and the device
//! that it was done to must work again after a reset.

use crate::arch::{read32, write32};
use crate::console::say;
use crate::machine::Machine;
use crate::virtio::{
    self, BAR, CONFIG, Descriptor, Device, INDIRECT, NEXT, PCI_TABLE, QUEUE_NOTIFY, QUEUE_READY,
    QUEUE_SELECT, QUEUE_SIZE, Queue, SIZE, STATUS, WRITE, read_by_device, written_by_device,
};
use crate::words::Words;

const VERSION_1: u64 = 1 << 32;
/// Where nothing is: above all memory, and where it wraps around.
pub const NOWHERE: u64 = 1 << 46;
const TOP: u64 = u64::MAX - 15;

/// A breach: the disk, and its queue that works until now.
type Attack = fn(Device, Queue);

const ATTACKS: [(&str, Attack); 34] = [
    ("a chain that loops", |_, queue| chain(queue, [(0x1000, 16, NEXT, 1), (0x1000, 16, NEXT, 0)])),
    ("a descriptor that is its own next", |_, queue| chain(queue, [(0x1000, 16, NEXT, 0), (0, 0, 0, 0)])),
    ("a next beyond the table", |_, queue| chain(queue, [(0x1000, 16, NEXT, 500), (0, 0, 0, 0)])),
    ("a head beyond the table", |_, queue| queue.offer(60_000)),
    ("a buffer where no memory is", |_, queue| {
        chain(queue, [(NOWHERE, 16, NEXT, 1), (NOWHERE, 1, WRITE, 0)])
    }),
    ("a buffer that wraps around", |_, queue| chain(queue, [(TOP, 64, NEXT, 1), (TOP, 64, WRITE, 0)])),
    ("a buffer of 4 GiB", |_, queue| {
        chain(queue, [(0x1000, u32::MAX, NEXT, 1), (0x1000, u32::MAX, WRITE, 0)])
    }),
    ("empty buffers", |_, queue| chain(queue, [(0x1000, 0, NEXT, 1), (0x1000, 0, WRITE, 0)])),
    ("no status", |_, queue| chain(queue, [(0x1000, 16, 0, 0), (0, 0, 0, 0)])),
    ("only a status", |_, queue| chain(queue, [(0x1000, 1, WRITE, 0), (0, 0, 0, 0)])),
    ("a header to be written", |_, queue| {
        chain(queue, [(0x1000, 16, WRITE | NEXT, 1), (0x1000, 1, WRITE, 0)])
    }),
    ("a short header", |_, queue| chain(queue, [(0x1000, 3, NEXT, 1), (0x1000, 1, WRITE, 0)])),
    ("a status to be read", |_, queue| chain(queue, [(0x1000, 16, NEXT, 1), (0x1000, 1, 0, 0)])),
    ("an indirect table in an indirect table", |_, queue| {
        let table = queue.parts()[0];
        chain(queue, [(table, 16, INDIRECT, 0), (0, 0, 0, 0)]);
    }),
    ("an indirect table of 4 GiB", |_, queue| {
        chain(queue, [(0x1000, u32::MAX - 15, INDIRECT, 0), (0, 0, 0, 0)]);
    }),
    ("an indirect table of 7 bytes", |_, queue| chain(queue, [(0x1000, 7, INDIRECT, 0), (0, 0, 0, 0)])),
    ("an indirect table nowhere", |_, queue| chain(queue, [(NOWHERE, 64, INDIRECT, 0), (0, 0, 0, 0)])),
    ("an indirect table with a next", |_, queue| {
        chain(queue, [(0x1000, 64, INDIRECT | NEXT, 1), (0, 0, 0, 0)])
    }),
    ("the ring's own memory as a buffer", |_, queue| {
        let [table, available, used] = queue.parts();
        chain(queue, [(available, 16, NEXT, 1), (table, 128, WRITE, 0)]);
        chain(queue, [(table, 16, NEXT, 1), (used, 64, WRITE, 0)]);
    }),
    ("an available index that runs away", |_, queue| {
        queue.set_available_index(queue.available_index().wrapping_add(1000));
        queue.kick();
    }),
    ("an available index that goes back", |_, queue| {
        queue.set_available_index(queue.available_index().wrapping_sub(3));
        queue.kick();
    }),
    ("rings where no memory is", |device, _| rings(device, SIZE as u32, NOWHERE, NOWHERE, NOWHERE)),
    ("rings that wrap around", |device, _| rings(device, SIZE as u32, TOP, TOP & !1, TOP & !3)),
    ("rings on device registers", |device, _| {
        let registers = device.start_of_registers();
        rings(device, SIZE as u32, registers, registers, registers);
    }),
    ("rings on top of each other", |device, queue| {
        let table = queue.parts()[0];
        rings(device, SIZE as u32, table, table, table);
    }),
    ("unaligned rings", |device, queue| {
        let [table, available, used] = queue.parts();
        rings(device, SIZE as u32, table + 1, available + 1, used + 1);
    }),
    ("a queue of 0", |device, queue| sized(device, queue, 0)),
    ("a queue of 7", |device, queue| sized(device, queue, 7)),
    ("a queue of 65535", |device, queue| sized(device, queue, 0xffff)),
    ("features that were not offered", |device, _| {
        if device.negotiate(!0) {
            say!("(accepted!) ");
        }
        device.run();
    }),
    ("kicks without a driver", |device, _| {
        device.reset();
        for queue in [0, 1, 7, 0xffff, u32::MAX] {
            device.write(QUEUE_NOTIFY, queue);
        }
    }),
    ("resets while it works", |device, queue| {
        for _ in 0..50 {
            chain(queue, [(0x1000, 16, NEXT, 1), (0x1000, 1, WRITE, 0)]);
            device.write(STATUS, 0);
            device.write(STATUS, 0xf);
        }
    }),
    ("every register, every value", |device, _| {
        for offset in (0..CONFIG).step_by(4) {
            for value in [0, 1, 0xffff, u32::MAX] {
                device.write(offset, value);
                device.read(offset);
            }
        }
        for offset in (CONFIG..CONFIG + 0x200).step_by(32) {
            device.write(offset, u32::MAX);
            device.read(offset);
        }
    }),
    ("queues that are not there", |device, _| {
        device.negotiate(VERSION_1);
        for queue in [1, 8, u32::MAX] {
            device.write(QUEUE_SELECT, queue);
            device.write(QUEUE_SIZE, 8);
            device.write(QUEUE_READY, 1);
        }
        device.run();
    }),
];

/// Breaches that only a device on a PCI bus knows.
const PCI_ATTACKS: [(&str, Attack); 5] = [
    ("registers on top of memory", |device, _| move_registers(device, 0x20_0000)),
    ("registers on top of another device's", |device, _| {
        let (own, other) =
            (device.start_of_registers(), Device::find(4).map_or(0, Device::start_of_registers));
        // Who was there first stays: what is accessed there is the other device.
        place_registers(device, other);
        place_registers(device, own);
    }),
    ("registers at the end of the address space", |device, _| {
        // We cannot look there ourselves.
        let own = device.start_of_registers();
        place_registers(device, !0xf);
        place_registers(device, own);
    }),
    ("garbage in the table of messages", |device, queue| {
        let table = device.start_of_registers() + PCI_TABLE;
        for at in (table..table + 0x100).step_by(4) {
            // The last word of each message masks it: these are sent.
            write32(at, if at % 16 == 12 { 0 } else { 0xdead_beef });
        }
        // MSI-X on: the messages are garbage.
        each_dword(device, |config, offset, value| {
            if value & 0xff == 0x11 {
                write32(config + offset, value | 1 << 31);
            }
        });
        chain(queue, [(0x1000, 16, NEXT, 1), (0x1000, 1, WRITE, 0)]);
    }),
    ("every byte of configuration space", |device, _| {
        let registers = device.start_of_registers();
        each_dword(device, |config, offset, _| write32(config + offset, u32::MAX));
        each_dword(device, |config, offset, _| write32(config + offset, 0));
        place_registers(device, registers);
    }),
];

/// Calls `visit` with every 32-bit word of the header and the capabilities.
fn each_dword(device: Device, visit: impl Fn(u64, u64, u32)) {
    if let Some(config) = device.config_space() {
        (0..256).step_by(4).for_each(|offset| visit(config, offset, read32(config + offset)));
    }
}

/// Puts the registers elsewhere, uses them there, and puts them back.
fn move_registers(device: Device, to: u64) {
    let before = device.start_of_registers();
    place_registers(device, to);
    device.write(STATUS, 0);
    device.read(STATUS);
    place_registers(device, before);
}

#[inline(never)]
fn place_registers(device: Device, at: u64) {
    if let Some(config) = device.config_space() {
        write32(config + BAR, at as u32);
        write32(config + BAR + 4, (at >> 32) as u32);
        // Memory decoding and bus mastering.
        write32(config + 4, 6);
    }
}

/// Offers a chain of two descriptors (address, length, flags, next), the second of which may be unused.
#[inline(never)]
pub fn chain(queue: Queue, descriptors: [(u64, u32, u16, u16); 2]) {
    for (index, (address, length, flags, next)) in descriptors.into_iter().enumerate() {
        queue.set_descriptor(index, Descriptor { address, length, flags, next });
    }
    queue.offer(0);
}

/// Starts the device with rings at these addresses, and kicks.
#[inline(never)]
fn rings(device: Device, size: u32, table: u64, available: u64, used: u64) {
    device.negotiate(VERSION_1);
    device.set_queue(0, size, table, available, used);
    device.run();
    device.write(QUEUE_NOTIFY, 0);
}

fn sized(device: Device, queue: Queue, size: u32) {
    let [table, available, used] = queue.parts();
    rings(device, size, table, available, used);
}

/// Whether the entropy device answers.
pub fn answers(queue: Queue) -> bool {
    let mut bytes = [0; 16];
    queue.request(&[written_by_device(&mut bytes)]) == Some(16)
}

/// Whether the disk answers a read.
fn reads(queue: Queue) -> bool {
    let (header, mut data, mut status) = ([0; 16], [0; 512], [0xff]);
    let request = [read_by_device(&header), written_by_device(&mut data), written_by_device(&mut status)];
    queue.request(&request) == Some(513)
}

pub fn run(_: &Machine, _: &Words) -> bool {
    let (Some(disk), Some(entropy)) = (Device::find(2), Device::find(4)) else {
        say!("expected a disk and a source of random bytes, found less");
        return false;
    };
    let pci = PCI_ATTACKS.into_iter().filter(|_| disk.config_space().is_some());
    let mut count = 0u32;
    for (what, attack) in ATTACKS.into_iter().chain(pci) {
        count += 1;
        virtio::forget_rings();
        let (Some([witness]), Some([queue])) = (entropy.start::<1>(), disk.start::<1>()) else {
            say!("expected the devices to start before ", what, ", found them dead");
            return false;
        };
        attack(disk, queue);
        if !answers(witness) {
            say!("expected another device to answer after ", what, ", found it silent");
            return false;
        }
        virtio::forget_rings();
        let Some([_, queue]) = entropy.start::<1>().zip(disk.start::<1>()).map(|([a], [b])| [a, b]) else {
            say!("expected a reset to help after ", what, ", found none");
            return false;
        };
        if !reads(queue) {
            say!("expected the disk to read again after ", what, ", found it silent");
            return false;
        }
    }
    say!("ok (", count, " breaches)");
    true
}
