//! The WDAT table: by which registers a guest uses its watchdog (Microsoft, Hardware Watchdog Timers Design
//! Specification; the numbers are those of Linux' include/acpi/actbl3.h).

use acpi_tables::Aml;
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::sdt::Sdt;

use super::acpi::{OEM, OEM_TABLE};
use crate::platform::node::WatchdogRegisters;

/// From the header's own length to the entries, in bytes.
const HEADER: u32 = 32;
/// The watchdog is no PCI device.
const NO_PCI_DEVICE: [u8; 5] = [0xff, 0, 0xff, 0xff, 0xff];
const ENABLED: u8 = 1;

/// The kinds of instructions: has the register this value, what is its value, write this value, write the guest's.
const HAS: u8 = 0;
const READ: u8 = 1;
const WRITE: u8 = 2;
const WRITE_GIVEN: u8 = 3;

/// By action: what is done, with which register, and with which value.
const ENTRIES: [(u8, u8, u16, u32); 12] = [
    // The countdown begins anew.
    (1, WRITE, WatchdogRegisters::LEFT, 1),
    // How much of it is left, how long it is, how long it is to be.
    (4, READ, WatchdogRegisters::LEFT, 0),
    (5, READ, WatchdogRegisters::LENGTH, 0),
    (6, WRITE_GIVEN, WatchdogRegisters::LENGTH, 0),
    // Whether it counts, and that it is to count; whether it is stopped, and that it is to stop.
    (8, HAS, WatchdogRegisters::IS_ON, 1),
    (9, WRITE, WatchdogRegisters::IS_ON, 1),
    (10, HAS, WatchdogRegisters::IS_ON, 0),
    (11, WRITE, WatchdogRegisters::IS_ON, 0),
    // Whether the end of it resets, and that it is to reset.
    (16, HAS, WatchdogRegisters::RESETS, 1),
    (17, WRITE, WatchdogRegisters::RESETS, 1),
    // Whether it was over, and that this has been read.
    (32, HAS, WatchdogRegisters::HAS_EXPIRED, 1),
    (33, WRITE, WatchdogRegisters::HAS_EXPIRED, 0),
];

/// The table for these registers.
pub fn wdat(registers: &WatchdogRegisters) -> Sdt {
    let mut body = Vec::with_capacity(HEADER as usize + 24 * ENTRIES.len());
    body.extend(HEADER.to_le_bytes());
    body.extend(NO_PCI_DEVICE);
    body.extend([0; 3]);
    for number in [registers.period_ms, *registers.counts.end(), *registers.counts.start()] {
        body.extend(number.to_le_bytes());
    }
    body.extend([ENABLED, 0, 0, 0]);
    body.extend((ENTRIES.len() as u32).to_le_bytes());
    let mut table = Sdt::new(*b"WDAT", 36, 1, OEM, OEM_TABLE, 1);
    table.append_slice(&body);
    for (action, instruction, register, value) in ENTRIES {
        let port = (registers.port + register).into();
        let mut entry = vec![action, instruction, 0, 0];
        GAS::new(AddressSpace::SystemIo, 32, 0, AccessSize::DwordAccess, port).to_aml_bytes(&mut entry);
        entry.extend(value.to_le_bytes());
        entry.extend(u32::MAX.to_le_bytes());
        table.append_slice(&entry);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_entry_is_where_a_driver_looks_for_it() {
        let registers = WatchdogRegisters { port: 0x620, period_ms: 100, counts: 1..=0x1234 };
        let mut bytes = Vec::new();
        wdat(&registers).to_aml_bytes(&mut bytes);
        assert_eq!(bytes.len(), 68 + 24 * ENTRIES.len());
        assert_eq!((&bytes[..4], bytes[36]), (&b"WDAT"[..], 32));
        let u32_at = |offset: usize| u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap());
        assert_eq!([48, 52, 56, 60, 64].map(u32_at), [100, 0x1234, 1, 1, 12]);
        // SET_COUNTDOWN_PERIOD: the fourth one.
        let entry = &bytes[68 + 3 * 24..][..24];
        let expected =
            [6, 3, 0, 0, 1, 32, 0, 3, 0x28, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(entry, expected);
    }
}
