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
/// Interrupts that the GIC has, the 32 private ones among them.
pub const GIC_INTERRUPTS: u32 = 256;

/// The 16550 UART; GSIs are shared peripheral interrupts (SPIs).
pub const SERIAL: Range = Range { start: 0x0900_0000, size: 0x1000 };
pub const SERIAL_GSI: u32 = 0;
/// The PL031 clock.
pub const CLOCK: Option<Range> = Some(Range { start: 0x0901_0000, size: 0x1000 });
/// The exit register (devices/exit.rs).
pub const EXIT: Range = Range { start: 0x0902_0000, size: 4 };
/// The boot timer (devices/boot_timer.rs). Firecracker has it where memory begins here.
pub const BOOT_TIMER: Range = Range { start: 0x0905_0000, size: 0x1000 };
/// The pvpanic register.
pub const PVPANIC: Range = Range { start: 0x0903_0000, size: 2 };
/// Registers of virtio-mmio devices, one page each.
pub const VIRTIO_MMIO: Range = Range { start: 0x0c00_0000, size: 0x10_0000 };
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
/// The GPIO controller (devices/gpio.rs), its interrupt, and the line that the power key is on.
pub const GPIO: Option<(Range, u32, u8)> = Some((Range { start: 0x0904_0000, size: 0x1000 }, 1, 3));
/// The devices at fixed places. There is no keyboard, and there are no power registers: guests power off by
/// PSCI.
pub const FIXED: &[(&str, Place)] = &[
    ("serial", Place::Registers { range: SERIAL, gsi: Some(SERIAL_GSI) }),
    ("rtc", Place::Registers { range: Range { start: 0x0901_0000, size: 0x1000 }, gsi: None }),
    ("gpio", Place::Registers { range: Range { start: 0x0904_0000, size: 0x1000 }, gsi: Some(1) }),
    ("exit register", Place::Registers { range: EXIT, gsi: None }),
    ("pvpanic", Place::Registers { range: PVPANIC, gsi: None }),
    ("boot timer", Place::Registers { range: BOOT_TIMER, gsi: None }),
    ("v2m", Place::Registers { range: GIC_MESSAGE_FRAME.registers, gsi: None }),
];

/// Memory starts here and is in one piece.
pub const MEMORY_START: u64 = 0x4000_0000;

/// The ranges that `size` bytes of memory lie in.
pub fn memory(size: u64) -> Vec<Range> {
    vec![Range { start: MEMORY_START, size }]
}
