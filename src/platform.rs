//! What the boot tables must tell the guest, as plain data: the architecture writes ACPI or a device
//! tree from it, as a pure function.

use crate::memory::Range;

/// The machine as the guest is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// How many CPUs.
    pub cpus: u16,
    /// Two hardware threads per core instead of one (x86_64).
    pub smt: bool,
    /// Guest memory.
    pub memory: Vec<Range>,
    /// The kernel's command line, without NUL.
    pub command_line: String,
    /// Where the initial ramdisk was loaded.
    pub initrd: Option<Range>,
    /// Fresh random bytes for the guest's generator; where a boot protocol can carry them, it does.
    pub random_seed: [u8; 32],
    /// Devices behind virtio-mmio.
    pub virtio_mmio: Vec<MmioDevice>,
    /// There is a PCI bus.
    pub pci: bool,
}

/// A device with one block of registers and one interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioDevice {
    /// Where its registers are.
    pub registers: Range,
    /// Its interrupt line: a GSI, which is an I/O APIC pin on x86_64 and an SPI on aarch64.
    pub gsi: u32,
}
