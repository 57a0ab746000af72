//! Memory of an x86_64 machine that the page tables do not map by themselves: all but the first GiB, and the devices.

use core::arch::asm;
use core::ptr::{read_volatile, write_volatile};

use super::{HUGE_PAGE, PRESENT_HUGE_PAGE};

/// Through these 2 MiB any memory can be looked at.
const WINDOW: u64 = 1 << 30;

unsafe extern "C" {
    static mut window: [u64; 512];
}

/// Where the memory at `address` can be reached, with what lies in the same 2 MiB, until this is called again.
pub fn reach(address: u64) -> u64 {
    // SAFETY: the first entry of the table maps the 2 MiB of `WINDOW`, and only who calls this looks through them.
    unsafe {
        (&raw mut window).cast::<u64>().write_volatile(address & !(HUGE_PAGE - 1) | PRESENT_HUGE_PAGE);
        asm!("invlpg [{}]", in(reg) WINDOW, options(nostack));
    }
    WINDOW + address % HUGE_PAGE
}

/// Whether the 8 bytes at `address` keep what is written; they stay as they were.
pub fn is_writable(address: u64) -> bool {
    const PATTERN: u64 = 0x5aa5_1234_8765_a55a;
    let at = reach(address) as *mut u64;
    // SAFETY: the place is mapped. What is written there is undone at once, while nobody else uses that memory.
    unsafe {
        let before = read_volatile(at);
        write_volatile(at, PATTERN);
        let found = read_volatile(at);
        write_volatile(at, before);
        found == PATTERN
    }
}
