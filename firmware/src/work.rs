//! Memory that is written all the time and looked at before: a page that a snapshot lost, or has of another moment, is
//! found out.

use core::ptr::{read_volatile, write_volatile};

use crate::console::{self, Hex, say};
use crate::machine::Machine;

/// Where the memory begins in the machine's largest range: clear of all that was loaded.
const CLEAR: u64 = 16 << 20;
/// The distance between two words that are written, in bytes: each page has several of them.
const STEP: usize = 1 << 10;

/// Works on so many MiB until a line ends, and answers every other byte that is typed. Returns whether memory
/// was always as it had been written.
pub fn work(machine: &Machine, mib: u64) -> bool {
    let largest = machine.memory().iter().copied().max_by_key(|(_, size)| *size).unwrap_or_default();
    if largest.1 < CLEAR + (mib << 20) {
        say!("work: there is not so much memory\n");
        return false;
    }
    let start = largest.0 + CLEAR;
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
