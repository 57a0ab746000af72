//! Where things are in an aarch64 guest's physical address space.

#![allow(missing_docs, reason = "the groups are documented by their first line")]

use crate::memory::Range;
use crate::platform::{MessageFrame, Place};

/// The GIC: its distributor (a GICv2's takes the first 4 KiB of this).
pub const GIC_DISTRIBUTOR: Range = Range { start: 0x0800_0000, size: 0x1_0000 };
/// GICv2: the CPU interface, and the GICv2m frame with the shared interrupts that are messages.
pub const GIC_CPU_INTERFACE: Range = Range { start: 0x0801_0000, size: 0x2000 };
pub const GIC_MESSAGE_FRAME: MessageFrame =
    MessageFrame { registers: Range { start: 0x0802_0000, size: 0x1000 }, first: 128, count: 96 };
/// GICv3: one redistributor of 128 KiB per CPU from here.
pub const GIC_REDISTRIBUTORS: u64 = 0x0a00_0000;
pub const GIC_REDISTRIBUTOR_SIZE: u64 = 0x2_0000;
/// KVM's GICv3 serves no more CPUs than this (VGIC_V3_MAX_CPUS).
const GIC_CPUS_MAX: u64 = 512;
const _: () = assert!(GIC_REDISTRIBUTORS + GIC_CPUS_MAX * GIC_REDISTRIBUTOR_SIZE <= VIRTIO_MMIO.start);
/// Interrupts that the GIC has, the 32 private ones among them.
pub const GIC_INTERRUPTS: u32 = 256;

/// Registers of virtio-mmio devices, one page each.
pub const VIRTIO_MMIO: Range = Range { start: 0x0e00_0000, size: 0x10_0000 };
/// Shared peripheral interrupts for devices that are added.
pub const DEVICE_GSIS: std::ops::Range<u32> = 8..128;
/// GICv3: the ITS, which takes interrupt messages.
pub const GIC_ITS: Range = Range { start: 0x0808_0000, size: 0x2_0000 };
/// PCI: configuration space of one bus (ECAM), and where functions' registers may be.
pub const ECAM: Range = Range { start: 0x1000_0000, size: 0x10_0000 };
pub const PCI_MEMORY: Range = Range { start: 0x1100_0000, size: 0x0f00_0000 };
/// PCI configuration is memory only.
pub const PCI_PORTS: Option<Range> = None;
/// Interrupts that are messages: their numbers come after the shared ones.
pub const MESSAGE_GSIS: u32 = GIC_INTERRUPTS;
pub const MESSAGES_MAX: u32 = 1000;
/// The devices at fixed places. There is no keyboard, and there are no power registers: guests power off by
/// PSCI.
pub const FIXED: &[(&str, Place)] = &[
    // The 16550 UART.
    ("serial", registers(0x0900_0000, 0x1000, Some(0))),
    // The PL031 clock.
    ("rtc", registers(0x0901_0000, 0x1000, None)),
    ("exit register", registers(0x0902_0000, 4, None)),
    ("pvpanic", registers(0x0903_0000, 2, None)),
    // The PL061 GPIO controller, which the power key is on.
    ("gpio", registers(0x0904_0000, 0x1000, Some(1))),
    // Firecracker has it where memory begins here.
    ("boot timer", registers(0x0905_0000, 0x1000, None)),
    // The SP805 watchdog.
    ("watchdog", registers(0x0906_0000, 0x1000, None)),
    ("v2m", Place::Registers { range: GIC_MESSAGE_FRAME.registers, gsi: None }),
    ("CPU slots", Place::Calls),
];

/// Guest physical addresses are 40 bits wide where the host allows it: KVM's default.
pub const IPA_BITS: i32 = 40;
const ADDRESSES: u64 = 1 << IPA_BITS;
const WINDOWS_ALIGNMENT: u64 = 1 << 30;

const fn registers(start: u64, size: u64, gsi: Option<u32>) -> Place {
    Place::Registers { range: Range { start, size }, gsi }
}

/// Memory starts here and is in one piece.
pub const MEMORY_START: u64 = 0x4000_0000;
const PAGE: u64 = 0x1000;
/// The last pages of it are those of devices.
const DEVICE_PAGES: u64 = 2 * PAGE;

/// The part of a machine's memory that its guest is told to have as RAM.
pub fn ram(memory: &[Range]) -> Range {
    let Range { start, size } = memory[0];
    Range { start, size: size.saturating_sub(DEVICE_PAGES) }
}

/// The devices that are in guest memory: each has a page of its own behind the RAM, since guests map one of them to
/// their programs.
pub fn in_memory(memory: &[Range]) -> [(&'static str, Place); 2] {
    let page = |index: u64, size: u64, gsi: u32| {
        let range = Range { start: ram(memory).end() + index * PAGE, size };
        Place::Memory { range, gsi: Some(gsi) }
    };
    [("VM generation ID", page(0, 16, 2)), ("VM clock", page(1, PAGE, 3))]
}

/// The addresses that windows of devices may have: above all memory of the machine. They begin with a new GiB, so that no
/// section of a guest's memory map (128 MiB; include/asm/sparsemem.h) is half RAM and half window.
pub fn windows(memory: &[Range]) -> Range {
    let end = memory.last().map_or(0, |last| last.start.saturating_add(last.size)).max(MEMORY_START);
    let start = end.checked_next_multiple_of(WINDOWS_ALIGNMENT).unwrap_or(ADDRESSES).min(ADDRESSES);
    Range { start, size: ADDRESSES - start }
}

/// The ranges that `size` bytes of memory lie in.
pub fn memory(size: u64) -> Vec<Range> {
    vec![Range { start: MEMORY_START, size }]
}

/// MPIDR affinity of a CPU, as KVM gives it by index: 16 CPUs share the lowest level.
pub fn affinity(cpu: u32) -> u32 {
    (cpu & 0xf) | (cpu >> 4 & 0xff) << 8 | (cpu >> 12) << 16
}

/// The CPU with this MPIDR affinity.
pub fn cpu_of(mpidr: u64) -> Option<usize> {
    let affinity_of = u32::try_from(mpidr).ok()?;
    let cpu = (affinity_of & 0xf) | (affinity_of >> 8 & 0xff) << 4 | (affinity_of >> 16 & 0xff) << 12;
    (affinity(cpu) == affinity_of).then_some(cpu as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_has_one_affinity() {
        for cpu in [0, 1, 15, 16, 255, 511, 4095, 4096] {
            assert_eq!(cpu_of(affinity(cpu).into()), Some(cpu as usize));
        }
        for mpidr in [0x10, 0x1f1, 1 << 24, 1 << 31, 1 << 32, u64::MAX] {
            assert_eq!(cpu_of(mpidr), None, "{mpidr:#x}");
        }
    }
}
