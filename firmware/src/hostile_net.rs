//! The breaches that only a network interface knows: frames that are none, commands that are none.

use crate::arch::write8;
use crate::console::say;
use crate::hostile::{NOWHERE, answers, chain};
use crate::machine::Machine;
use crate::virtio::{
    self, Device, NEXT, QUEUE_NOTIFY, Queue, STATUS, WRITE, read_by_device, written_by_device,
};
use crate::words::Words;

/// A breach: the interface, and its queues (receive, transmit, control).
type Attack = fn(Device, [Queue; 3]);

/// For a header that asks for everything at once, and a frame of the same: no bytes of the image until it is sent.
static mut GARBAGE: [u8; 256] = [0; 256];
/// A header that asks for segments of TCP whose headers lie beyond the frame.
static SEGMENTS: [u8; 64] = {
    let mut bytes = [0; 64];
    // flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
    (bytes[0], bytes[1], bytes[3], bytes[4], bytes[7], bytes[9]) = (1, 1, 0xff, 1, 0xff, 0xff);
    bytes
};
const VERSION_1: u64 = 1 << 32;
/// Memory of ours, which nobody minds being sent.
const MEMORY: u64 = 0x20_0000;

const ATTACKS: [(&str, Attack); 19] = [
    ("a receive buffer of 4 bytes", |_, [rx, ..]| chain(rx, [(0x1000, 4, WRITE, 0), (0, 0, 0, 0)])),
    ("a receive buffer to be read", |_, [rx, ..]| chain(rx, [(0x1000, 2000, 0, 0), (0, 0, 0, 0)])),
    ("an empty receive buffer", |_, [rx, ..]| chain(rx, [(0x1000, 0, WRITE, 0), (0, 0, 0, 0)])),
    ("a receive buffer nowhere", |_, [rx, ..]| chain(rx, [(NOWHERE, 2000, WRITE, 0), (0, 0, 0, 0)])),
    ("a frame shorter than its header", |_, [_, tx, _]| chain(tx, [(0x1000, 5, 0, 0), (0, 0, 0, 0)])),
    ("a header without a frame", |_, [_, tx, _]| chain(tx, [(0x1000, 12, 0, 0), (0, 0, 0, 0)])),
    ("a frame to be written", |_, [_, tx, _]| chain(tx, [(0x1000, 100, WRITE, 0), (0, 0, 0, 0)])),
    ("a frame of 128 KiB", |_, [_, tx, _]| {
        chain(tx, [(MEMORY, 0x1_0000, NEXT, 1), (MEMORY, 0x1_0000, 0, 0)])
    }),
    ("a frame of 8 GiB", |_, [_, tx, _]| chain(tx, [(0x1000, u32::MAX, NEXT, 1), (0x1000, u32::MAX, 0, 0)])),
    ("a frame that is garbage", |_, [_, tx, _]| {
        let garbage = (&raw mut GARBAGE) as u64;
        (garbage..garbage + 256).for_each(|at| write8(at, 0xff));
        chain(tx, [(garbage, 256, 0, 0), (0, 0, 0, 0)])
    }),
    ("segments without headers", |_, [_, tx, _]| {
        chain(tx, [(SEGMENTS.as_ptr() as u64, 64, 0, 0), (0, 0, 0, 0)])
    }),
    ("a frame sent a hundred times at once", |_, [_, tx, _]| {
        (0..100).for_each(|_| chain(tx, [(MEMORY, 100, 0, 0), (0, 0, 0, 0)]));
    }),
    ("a command without an answer's place", |_, [.., control]| {
        chain(control, [(MEMORY, 3, 0, 0), (0, 0, 0, 0)])
    }),
    ("an answer's place without a command", |_, [.., control]| {
        chain(control, [(MEMORY, 1, WRITE, 0), (0, 0, 0, 0)])
    }),
    ("an answer's place nowhere", |_, [.., control]| {
        chain(control, [(MEMORY, 3, NEXT, 1), (NOWHERE, 1, WRITE, 0)])
    }),
    ("tables of 4 G addresses", |_, [.., control]| {
        // Set tables: the count is all ones.
        static COMMAND: [u8; 16] = [1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        chain(control, [(COMMAND.as_ptr() as u64, 16, NEXT, 1), (MEMORY, 1, WRITE, 0)]);
    }),
    ("every command", |_, [.., control]| {
        for class in 0..6 {
            for command in 0..6 {
                let bytes = [class, command, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
                let mut ack = [0xee];
                let _ = control.request(&[read_by_device(&bytes), written_by_device(&mut ack)]);
            }
        }
    }),
    ("kicks before it is ready", |device, _| {
        device.negotiate(VERSION_1);
        (0..3).for_each(|queue| device.write(QUEUE_NOTIFY, queue));
        device.run();
        (0..3).for_each(|queue| device.write(QUEUE_NOTIFY, queue));
    }),
    ("resets while frames are on their way", |device, [_, tx, _]| {
        for _ in 0..50 {
            chain(tx, [(MEMORY, 100, 0, 0), (0, 0, 0, 0)]);
            device.write(STATUS, 0);
            device.write(STATUS, 0xf);
        }
    }),
];

pub fn run(_: &Machine, _: &Words) -> bool {
    let (Some(net), Some(entropy)) = (Device::find(1), Device::find(4)) else {
        say!("expected a network interface and a source of random bytes, found less");
        return false;
    };
    let mut count = 0u32;
    for (what, attack) in ATTACKS {
        count += 1;
        virtio::forget_rings();
        let (Some([witness]), Some(queues)) = (entropy.start::<1>(), net.start::<3>()) else {
            say!("expected the devices to start before ", what, ", found them dead");
            return false;
        };
        attack(net, queues);
        if !answers(witness) {
            say!("expected another device to answer after ", what, ", found it silent");
            return false;
        }
        virtio::forget_rings();
        let sends = net.start::<3>().is_some_and(|[_, tx, _]| {
            let frame = [0; 72];
            tx.request(&[read_by_device(&frame)]).is_some()
        });
        if !sends {
            say!("expected the interface to send again after ", what, ", found it silent");
            return false;
        }
    }
    say!("ok (", count, " breaches)");
    true
}
