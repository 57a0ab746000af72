//! Where things are in an x86_64 guest's physical address space and among its I/O ports.

#![allow(missing_docs, reason = "the groups are documented by their first line")]

use crate::memory::Range;
use crate::platform::Place;
use crate::platform::node::CpuRegisters;

/// Memory below this address is in one piece; what does not fit goes on above 4 GiB.
pub const LOW_MEMORY_END: u64 = 0xc000_0000;
const HIGH_MEMORY_START: u64 = 0x1_0000_0000;

/// Registers of virtio-mmio devices, one page each.
pub const VIRTIO_MMIO: Range = Range { start: 0xc010_0000, size: 0x10_0000 };
/// PCI: configuration space of one bus (ECAM), and where functions' registers may be.
pub const ECAM: Range = Range { start: 0xc100_0000, size: 0x10_0000 };
pub const PCI_MEMORY: Range = Range { start: 0xc200_0000, size: 0x0e00_0000 };
/// PCI configuration by ports.
pub const PCI_PORTS: Option<Range> = Some(Range { start: 0xcf8, size: 8 });
/// Interrupts that are messages: their numbers come after the I/O APIC's pins.
pub const MESSAGE_GSIS: u32 = 24;
pub const MESSAGES_MAX: u32 = 1000;
/// The I/O APIC and the local APICs (their architectural places).
pub const IO_APIC: u32 = 0xfec0_0000;
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page, then three, that KVM wants for itself on Intel processors, in the gap below 4 GiB.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
pub const KVM_TSS: usize = 0xfffb_d000;

/// The devices at fixed places.
pub const FIXED: &[(&str, Place)] = &[
    // Sleep control, sleep status, reset.
    ("power", ports(0x600, 3, None)),
    // The 16550 UART known as COM1, and the I/O APIC's pin.
    ("serial", ports(0x3f8, 8, Some(4))),
    // The i8042: ports 0x60 (data) to 0x64 (command).
    ("keyboard", ports(0x60, 5, Some(1))),
    ("pvpanic", ports(0x505, 1, None)),
    // With a PCI bus alone, on which no device has a pin of the I/O APIC: the one of a PC's power management.
    ("PCI slots", ports(0x610, 12, Some(9))),
    ("ACPI watchdog", ports(0x620, 20, None)),
    // With CPUs that can come alone. What is in memory has the same pin, and looks for nothing when it comes for these.
    ("CPU slots", ports(0x640, CpuRegisters::size(CpuRegisters::CPUS_MAX) as u64, Some(3))),
    ("exit register", registers(0xc000_2000, 4)),
    // Where Firecracker has it.
    ("boot timer", registers(0xc000_0000, 0x1000)),
];

const fn ports(start: u64, size: u64, gsi: Option<u32>) -> Place {
    Place::Ports { range: Range { start, size }, gsi }
}

/// No guest has more physical addresses than this: the page tables of x86_64 have no more bits.
const ADDRESSES: u64 = 1 << 52;
const WINDOWS_ALIGNMENT: u64 = 1 << 30;

const fn registers(start: u64, size: u64) -> Place {
    Place::Registers { range: Range { start, size }, gsi: None }
}

/// The devices that are in guest memory instead, in the part of the first MiB that the memory map reserves. Of a
/// PC's interrupts, that of the second serial port is nobody's here: both have it, since what changes one of them
/// changes both.
pub fn in_memory(_: &[Range]) -> [(&'static str, Place); 2] {
    [
        ("VM generation ID", memory_of(GENERATION_ID, 16)),
        // A page of its own, which guests map to their programs. The memory map of a PC has option ROMs there.
        ("VM clock", memory_of(0xd_f000, 0x1000)),
    ]
}

const fn memory_of(start: u64, size: u64) -> Place {
    Place::Memory { range: Range { start, size }, gsi: Some(3) }
}

/// I/O APIC pins for devices that are added: after those that PC tradition has given away.
pub const DEVICE_GSIS: std::ops::Range<u32> = 5..24;

/// The boot tables of the Linux boot protocol, all below 1 MiB: the kernel's own segments start there. What PVH has
/// lies before the ACPI tables, in their page as far as it fits: each page costs every guest 4 KiB.
pub const GDT: u64 = 0x500;
pub const COMMAND_LINE: u64 = 0x6800;
/// Linux's COMMAND_LINE_SIZE, with the NUL.
pub const COMMAND_LINE_SIZE: usize = 2048;
pub const BOOT_PARAMS: u64 = 0x7000;
const _: () = assert!(COMMAND_LINE + COMMAND_LINE_SIZE as u64 <= BOOT_PARAMS);
pub const PAGE_TABLES: u64 = 0x9000;
/// The end of the memory that the page tables at `PAGE_TABLES` map: a kernel that is entered in long mode is below it.
pub const MAPPED_AT_ENTRY: u64 = 1 << 30;
/// The first 640 KiB less one, where PCs keep the extended BIOS data area.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// Where the generation ID of the virtual machine is: in the page of the ACPI tables, which end below it, so that it
/// costs no page of its own.
pub const GENERATION_ID: u64 = RESET_VECTOR - 16;
/// Where the firmware of a PC begins in real mode (FFFF:0): a kernel that wants the firmware to reset the machine goes
/// there. The ACPI tables are in the same page as far as they fit.
pub const RESET_VECTOR: u64 = 0xf_fff0;
pub const KERNEL_START: u64 = 0x10_0000;

/// The addresses that windows of devices may have: above all memory of the machine. They begin with a new GiB, so that no
/// section of a guest's memory map (128 MiB; include/asm/sparsemem.h) is half RAM and half window.
pub fn windows(memory: &[Range]) -> Range {
    let end = memory.last().map_or(0, |last| last.start.saturating_add(last.size)).max(HIGH_MEMORY_START);
    let start = end.checked_next_multiple_of(WINDOWS_ALIGNMENT).unwrap_or(ADDRESSES).min(ADDRESSES);
    Range { start, size: ADDRESSES - start }
}

/// The ranges that `size` bytes of memory lie in.
pub fn memory(size: u64) -> Vec<Range> {
    let low = size.min(LOW_MEMORY_END);
    let mut ranges = vec![Range { start: 0, size: low }];
    if size > low {
        ranges.push(Range { start: HIGH_MEMORY_START, size: size - low });
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_around_the_gap_below_4_gib() {
        assert_eq!(memory(2 << 20), [Range { start: 0, size: 2 << 20 }]);
        assert_eq!(memory(3 << 30), [Range { start: 0, size: 3 << 30 }]);
        assert_eq!(
            memory(5 << 30),
            [Range { start: 0, size: 3 << 30 }, Range { start: 4 << 30, size: 2 << 30 }]
        );
    }
}
