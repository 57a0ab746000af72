//! The case of memory hotplug: the guest plugs as many blocks as are requested, and unplugs them, until none is wanted any
//! more. Each block has a number of its own while it is plugged.

// Without `black_box`, the compiler believes unchanged what the device wrote.
use core::hint::black_box;

use crate::arch;
use crate::console::{Hex, say};
use crate::machine::Machine;
use crate::virtio::{CONFIG, Device, Queue, read_by_device, written_by_device};
use crate::words::Words;

const TYPE: u32 = 24;
const PLUG: u64 = 0;
const UNPLUG: u64 = 1;
const UNPLUG_ALL: u64 = 2;
const ACK: u16 = 0;
/// The answer to what the host cannot do now, but may do later.
const BUSY: u16 = 2;
/// How long a request waits that is to be made again: a tenth of a second and more on any processor there is.
const RETRY_TICKS: u64 = arch::PATIENCE_TICKS / 100;
/// The size of an answer.
const ANSWER: usize = 10;

/// The answer to a request for the block at `address`.
#[inline(never)]
fn ask(queue: &Queue, kind: u64, address: u64) -> Option<u16> {
    let mut request = [0; 24];
    for (place, value) in [(0, kind), (8, address), (16, 1)] {
        request[place..place + 8].copy_from_slice(&u64::to_le_bytes(value));
    }
    let mut answer = [0x55; ANSWER];
    let written = queue.request(&[read_by_device(&request), written_by_device(&mut answer)])?;
    let answer = black_box(&answer);
    (written as usize == ANSWER).then(|| u16::from_le_bytes([answer[0], answer[1]]))
}

/// Has the block at `address` plugged, if `kind` is that, with `number` in it; or unplugged, if the number is still there.
/// A block that cannot be plugged now is asked for again and again.
fn change(queue: &Queue, kind: u64, address: u64, number: u32) -> bool {
    if kind == UNPLUG {
        let found = arch::read32(arch::reach(address));
        if found != number {
            say!("expected the number ", number, " at ", Hex(address), ", found ", found);
            return false;
        }
    }
    let mut found = ask(queue, kind, address);
    if kind == PLUG && found == Some(BUSY) {
        say!("hotplug: is to try again later\n");
        while found == Some(BUSY) {
            let end = arch::ticks() + RETRY_TICKS;
            while arch::ticks() < end {}
            found = ask(queue, kind, address);
        }
    }
    if found != Some(ACK) {
        say!("expected that request ", kind, " for ", Hex(address), " is done, found that it is not");
        return false;
    }
    if kind == PLUG {
        arch::write32(arch::reach(address), number);
    }
    true
}

/// Runs until memory was requested and then none.
pub fn hotplug(_: &Machine, _: &Words) -> bool {
    let device = Device::find(TYPE);
    let queue = device.and_then(|device| device.start::<1>());
    let (Some(device), Some([queue])) = (device, queue) else {
        say!("expected a memory hotplug device that starts, found none");
        return false;
    };
    let wide =
        |offset| u64::from(device.read(CONFIG + offset)) | u64::from(device.read(CONFIG + offset + 4)) << 32;
    let (block, start) = (wide(0), wide(16));
    let mut plugged = 0;
    if arch::is_writable(start) {
        say!("expected nothing at ", Hex(start), ", found memory");
        return false;
    }
    // As a driver begins that wants none of what another one may have plugged.
    if ask(&queue, UNPLUG_ALL, 0) != Some(ACK) {
        say!("expected that everything can be unplugged, found that it cannot");
        return false;
    }
    say!("waits\n");
    loop {
        let requested = wide(48) / block;
        let before = plugged;
        while plugged != requested {
            let kind = if plugged < requested { PLUG } else { UNPLUG };
            let number = if kind == PLUG { plugged } else { plugged - 1 };
            if !change(&queue, kind, start + number * block, number as u32 + 7) {
                return false;
            }
            plugged = if kind == PLUG { plugged + 1 } else { number };
        }
        if plugged != before {
            say!("hotplug: ", wide(40) / block, " blocks of ", plugged, "\n");
        }
        if plugged == 0 && before > 0 {
            break;
        }
    }
    if arch::is_writable(start) {
        say!("expected nothing at ", Hex(start), " any more, found memory");
        return false;
    }
    say!("ok");
    true
}
