//! The case of a CPU that sleeps, again and again: nothing but its timer wakes it, on time, and its counter never goes back.

use crate::arch;
use crate::console::say;
use crate::machine::Machine;
use crate::words::Words;

/// How often the CPU sleeps.
const NAPS: u32 = 50;

pub fn sleep(_: &Machine, _: &Words) -> bool {
    let mut last = 0;
    for nap in 1..=NAPS {
        say!("nap ", nap, "\n");
        match arch::nap() {
            Ok(woken) if woken > last => last = woken,
            Ok(_) => {
                say!("expected a counter that goes on, found one that went back");
                return false;
            }
            Err(found) => {
                say!("expected an interrupt at the deadline, found ", found);
                return false;
            }
        }
    }
    say!("ok (", NAPS, " naps)");
    true
}
