//! The case of persistent memory: what is written there is found again, and a flush is answered.

// Without `black_box`, the compiler believes unchanged what the device wrote.
use core::hint::black_box;

use crate::arch;
use crate::cases::is_chosen;
use crate::console::{Hex, say};
use crate::machine::Machine;
use crate::virtio::{CONFIG, Device, Queue, read_by_device, written_by_device};
use crate::words::Words;

const TYPE: u32 = 27;
const FLUSH: u32 = 0;
const DONE: u32 = 0;
const FAILED: u32 = u32::MAX;
/// Where a start and a size of persistent memory are multiples of this.
const HUGE_PAGE: u64 = 2 << 20;
/// Where the numbers of earlier runs are: one, and its complement, far from the start.
const NUMBER: u64 = 0x1000;

/// The answer to a request of this kind.
#[inline(never)]
fn ask(queue: &Queue, kind: u32) -> Option<u32> {
    let (request, mut answer) = (kind.to_le_bytes(), [0x55; 4]);
    let written = queue.request(&[read_by_device(&request), written_by_device(&mut answer)])?;
    (written == 4).then(|| u32::from_le_bytes(*black_box(&answer)))
}

/// The first persistent memory counts how often this case ran by its name; what cannot be written stays as it is, and
/// so does all of it where the case was not asked for: somebody may need it. A flush is done, and what is no flush is
/// refused.
pub fn pmem(_: &Machine, words: &Words) -> bool {
    let device = Device::find(TYPE);
    let queue = device.and_then(|device| device.start::<1>());
    let (Some(device), Some([queue])) = (device, queue) else {
        say!("expected persistent memory that starts, found none");
        return false;
    };
    let wide =
        |offset| u64::from(device.read(CONFIG + offset)) | u64::from(device.read(CONFIG + offset + 4)) << 32;
    let (start, size) = (wide(0), wide(8));
    if start == 0 || size == 0 || (start | size) % HUGE_PAGE != 0 {
        say!("expected whole pages of 2 MiB, found ", Hex(size), " bytes at ", Hex(start));
        return false;
    }
    let place = arch::reach(start) + NUMBER;
    let number = arch::read32(place);
    let writes = is_chosen(words, b"pmem");
    if writes {
        arch::write32(place, number.wrapping_add(1));
        arch::write32(place + 4, !number.wrapping_add(1));
    }
    let found = arch::read32(place);
    let is_written = found == number.wrapping_add(1) && arch::read32(place + 4) == !found;
    if !is_written && found != number {
        say!("expected ", number, " or one more, found ", found);
        return false;
    }
    for (kind, expected) in [(FLUSH, DONE), (7, FAILED), (FLUSH, DONE)] {
        let found = ask(&queue, kind);
        if found != Some(expected) {
            say!("expected the answer ", Hex(expected.into()), " to a request ", kind, ", found ");
            match found {
                Some(answer) => say!(Hex(answer.into())),
                None => say!("none"),
            }
            return false;
        }
    }
    // The last bytes belong to it, too, whether the file has them or not.
    let last = arch::read32(arch::reach(start + size - HUGE_PAGE) + HUGE_PAGE - 4);
    say!("ok (", size >> 20, " MiB at ", Hex(start), ", number ", number, ", ends with ", Hex(last.into()));
    say!(match (writes, is_written) {
        (true, true) => ")",
        (true, false) => ", read-only)",
        (false, _) => ", only read)",
    });
    true
}
