//! Memory that is written all the time and looked at before: a page that a snapshot lost, or has of another moment, is
//! found out.

use core::ptr::{read_volatile, write_volatile};

use crate::console::{self, Hex, say};
use crate::machine::Machine;
use crate::next_byte;

/// Where the memory begins in the machine's largest range: clear of all that was loaded.
const CLEAR: u64 = 16 << 20;
/// The distance between two words that are written, in bytes: each page has several of them.
const STEP: usize = 1 << 10;
const PAGE: u64 = 4 << 10;
/// Of so many pages that are filled, one is touched: what lies between two is more than Linux reads around a fault of a
/// file (128 KiB).
const TOUCHED_OF: u64 = 64;
/// The factor by which pages that are touched one after the other lie far from each other: a prime, so that each is
/// touched once.
const SCATTER: u64 = 0x9e37_79b1;

/// Where so many MiB begin that are nobody else's; says it if there are not so many.
fn room(machine: &Machine, mib: u64) -> Option<u64> {
    let largest = machine.memory().iter().copied().max_by_key(|(_, size)| *size).unwrap_or_default();
    if largest.1 < CLEAR + (mib << 20) {
        say!("work: there is not so much memory\n");
        return None;
    }
    Some(largest.0 + CLEAR)
}

/// Works on so many MiB until a line ends, and answers every other byte that is typed. Returns whether memory
/// was always as it had been written.
pub fn work(machine: &Machine, mib: u64) -> bool {
    let Some(start) = room(machine, mib) else { return false };
    let places = || (start..start + (mib << 20)).step_by(STEP);
    let word = |pass: u64, place: u64| {
        (place ^ pass.wrapping_mul(0x9e37_79b9_7f4a_7c15)).rotate_left(pass as u32 % 64)
    };
    // SAFETY: the memory from `CLEAR` on is nobody else's, and is written here alone; others read it meanwhile.
    places().for_each(|place| unsafe { write_volatile(place as *mut u64, word(0, place)) });
    say!("working\n");
    for pass in 1.. {
        for place in places() {
            // SAFETY: as above.
            let found = unsafe { read_volatile(place as *const u64) };
            let expected = word(pass - 1, place);
            if found != expected {
                say!(
                    "work: expected ",
                    Hex(expected),
                    " at ",
                    Hex(place),
                    " in pass ",
                    pass,
                    ", found ",
                    Hex(found),
                    "\n"
                );
                return false;
            }
            // SAFETY: as above.
            unsafe { write_volatile(place as *mut u64, word(pass, place)) };
        }
        match console::receive() {
            Some(b'\n' | b'\r') => break,
            Some(_) => say!("passed\n"),
            None => {}
        }
    }
    say!("worked\n");
    true
}

/// Writes to every page of so many MiB, waits for a byte, and sends it back when it has looked at some of the pages.
/// Returns whether they were as they had been written.
pub fn touch(machine: &Machine, mib: u64) -> bool {
    let Some(start) = room(machine, mib) else { return false };
    let pages = (mib << 20) / PAGE;
    for page in 0..pages {
        // SAFETY: the memory from `CLEAR` on is nobody else's.
        unsafe { write_volatile((start + page * PAGE) as *mut u64, !page) };
    }
    say!("filled\n");
    let byte = next_byte();
    let touched = pages / TOUCHED_OF;
    for index in 0..touched {
        let page = index * SCATTER % touched * TOUCHED_OF;
        // SAFETY: as above.
        let found = unsafe { read_volatile((start + page * PAGE) as *const u64) };
        if found != !page {
            say!("touch: page ", page, " has ", Hex(found), "\n");
            return false;
        }
    }
    console::send(byte);
    true
}
