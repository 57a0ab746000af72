//! The case of the watchdog: it is fed and stopped, and then left to itself, so that it expires if the guest goes on.

use crate::console::say;
use crate::machine::Machine;
use crate::words::Words;

/// The registers of the ACPI watchdog (x86_64), by their ports.
#[cfg(target_arch = "x86_64")]
mod registers {
    use crate::arch::{read_port32, write_port32};

    const IS_ON: u16 = 0x620;
    const LEFT: u16 = 0x624;
    const LENGTH: u16 = 0x628;
    const HAS_EXPIRED: u16 = 0x62c;

    pub fn is_there() -> bool {
        read_port32(IS_ON) != u32::MAX
    }

    pub fn is_on() -> bool {
        read_port32(IS_ON) == 1
    }

    pub fn has_expired() -> bool {
        read_port32(HAS_EXPIRED) == 1
    }

    /// Begins the shortest countdown.
    pub fn begin() {
        write_port32(LENGTH, 0);
        write_port32(IS_ON, 1);
    }

    pub fn feed() {
        write_port32(LEFT, 1);
    }

    pub fn stop() {
        write_port32(IS_ON, 0);
    }
}

/// The registers of the SP805 (aarch64).
#[cfg(target_arch = "aarch64")]
mod registers {
    use crate::arch::{read32, write32};

    const LOAD: u64 = 0x0906_0000;
    const CONTROL: u64 = 0x0906_0008;
    const CLEAR: u64 = 0x0906_000c;
    const IDENTIFICATION: u64 = 0x0906_0fe0;

    pub fn is_there() -> bool {
        read32(IDENTIFICATION) == 0x05
    }

    pub fn is_on() -> bool {
        read32(CONTROL) == 3
    }

    /// This watchdog does not say.
    pub fn has_expired() -> bool {
        false
    }

    /// Begins the shortest countdown.
    pub fn begin() {
        write32(LOAD, 1);
        write32(CONTROL, 3);
    }

    pub fn feed() {
        write32(CLEAR, 1);
    }

    pub fn stop() {
        write32(CONTROL, 0);
    }
}

pub fn watchdog(_: &Machine, _: &Words) -> bool {
    if !registers::is_there() {
        say!("expected a watchdog, found none");
        return false;
    }
    if registers::is_on() {
        say!("expected a watchdog that stands still, found one that runs");
        return false;
    }
    let has_expired = registers::has_expired();
    for _ in 0..1000 {
        registers::begin();
        registers::feed();
        if !registers::is_on() {
            say!("expected a watchdog that runs, found one that stands still");
            return false;
        }
        registers::stop();
    }
    registers::begin();
    say!("ok (", if has_expired { "has expired before" } else { "new" }, ")");
    true
}
