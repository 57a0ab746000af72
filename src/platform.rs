//! What the boot tables must tell the guest, as plain data: the architecture writes ACPI or a device
//! tree from it, as a pure function.

pub mod node;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::memory::Range;
pub use node::Node;

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
    /// What its parts say of themselves, in their order.
    pub nodes: Vec<Node>,
    /// There is a PCI bus.
    pub pci: bool,
    /// Which interrupt controller there is, once it has been made (aarch64: what the host's KVM has).
    pub gic: Option<Gic>,
}

impl Platform {
    /// Where configuration space of a PCI bus is memory.
    pub fn ecam(&self) -> impl Iterator<Item = Range> {
        self.nodes.iter().filter_map(|node| match node {
            Node::Ecam(range) => Some(*range),
            _ => None,
        })
    }

    /// Where interrupt messages of PCI devices are written, if that is a frame of ours.
    pub fn message_frame(&self) -> Option<MessageFrame> {
        match self.gic {
            Some(Gic::V2(frame)) if self.pci => Some(frame),
            _ => None,
        }
    }
}

/// A register that CPUID (x86_64) answers in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "names of registers")]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A change of one register of CPUID, against what the host's KVM supports (x86_64).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidModifier {
    /// The leaf (EAX).
    pub leaf: u32,
    /// The subleaf (ECX).
    pub subleaf: u32,
    /// The register that is changed.
    pub register: CpuidRegister,
    /// The bits that are changed.
    pub mask: u32,
    /// The new values of these bits; 0 outside of `mask`.
    pub value: u32,
}

/// A change of a register of every CPU that has a number: a model-specific register (x86_64), or one as KVM numbers it
/// (aarch64; KVM api, KVM_GET_ONE_REG).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegisterModifier {
    /// The register.
    pub number: u64,
    /// The bits that are changed.
    pub mask: u128,
    /// The new values of these bits; 0 outside of `mask`.
    pub value: u128,
}

/// A change of what CPUs are initialised with (aarch64; KVM api, KVM_ARM_VCPU_INIT).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureModifier {
    /// Which word of features.
    pub index: u32,
    /// The bits that are changed.
    pub mask: u32,
    /// The new values of these bits; 0 outside of `mask`.
    pub value: u32,
}

/// How the guest's CPUs differ from those that this host's KVM gives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuChanges {
    /// The maker of the processors that they are for, as CPUID names it (x86_64); none: of all.
    pub vendor: Option<&'static str>,
    /// The numbers of capabilities that KVM must have (KVM api, KVM_CHECK_EXTENSION).
    pub capabilities: Vec<u32>,
    /// Changes of CPUID (x86_64).
    pub cpuid: Vec<CpuidModifier>,
    /// Changes of features (aarch64).
    pub features: Vec<FeatureModifier>,
    /// Changes of other registers.
    pub registers: Vec<RegisterModifier>,
}

/// Where a part of the machine is, as the guest reaches it. Interrupt lines are GSIs: pins of the I/O APIC on
/// x86_64, shared peripheral interrupts (SPIs) on aarch64.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub enum Place {
    /// I/O ports (x86_64), and the interrupt line if there is one.
    Ports {
        /// The ports.
        range: Range,
        /// The interrupt line.
        gsi: Option<u32>,
    },
    /// Memory-mapped registers, and the interrupt line if there is one.
    Registers {
        /// The guest physical addresses.
        range: Range,
        /// The interrupt line.
        gsi: Option<u32>,
    },
    /// A device number of PCI bus 0, or what is in a PCIe slot, whose places follow those numbers.
    Pci(u32),
    /// Memory that no guest has as its RAM, and the interrupt line if there is one: guest memory where a device without
    /// registers writes what the guest reads, or the window of a device.
    Memory {
        /// The guest physical addresses.
        range: Range,
        /// The interrupt line.
        gsi: Option<u32>,
    },
    /// Nowhere: the guest reaches the part by calls of its firmware's (PSCI on aarch64).
    Calls,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ports { range, .. } => write!(f, "port {:#x}", range.start)?,
            Self::Registers { range, .. } => write!(f, "address {:#x}", range.start)?,
            Self::Pci(number) => write!(f, "PCI device {number}")?,
            Self::Memory { range, .. } => write!(f, "memory at {:#x}", range.start)?,
            Self::Calls => write!(f, "no address")?,
        }
        match self.gsi() {
            Some(gsi) => write!(f, " with interrupt line {gsi}"),
            None => Ok(()),
        }
    }
}

impl Place {
    /// The interrupt line.
    pub fn gsi(self) -> Option<u32> {
        match self {
            Self::Ports { gsi, .. } | Self::Registers { gsi, .. } | Self::Memory { gsi, .. } => gsi,
            Self::Pci(_) | Self::Calls => None,
        }
    }
}

/// Arm's interrupt controller: which version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gic {
    /// GICv3: an ITS takes interrupt messages.
    V3,
    /// GICv2: a GICv2m frame takes interrupt messages.
    V2(MessageFrame),
}

/// A GICv2m frame (Arm Server Base System Architecture 3.0, appendix E): an interrupt's number written
/// to SETSPI_NS raises that interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageFrame {
    /// Where its registers are.
    pub registers: Range,
    /// The interrupt lines (GSIs, shared peripheral interrupts) that it raises: the first, and how many.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl MessageFrame {
    /// The offset of SETSPI_NS.
    pub const SET_SPI: u64 = 0x40;
    /// The number of the first shared interrupt: the lines before are a CPU's own.
    pub const SHARED: u32 = 32;

    /// The line that `data` raises when it is written at `address`.
    pub fn line(&self, address: u64, data: u32) -> Option<u32> {
        let line = data.checked_sub(Self::SHARED)?;
        let is_ours = line.checked_sub(self.first).is_some_and(|index| index < self.count);
        (address == self.registers.start + Self::SET_SPI && is_ours).then_some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_raises_a_line_of_the_frame_or_nothing() {
        let frame = MessageFrame { registers: Range { start: 0x1000, size: 0x1000 }, first: 128, count: 96 };
        assert_eq!(frame.line(0x1040, 160), Some(128));
        assert_eq!(frame.line(0x1040, 255), Some(223));
        for (address, data) in [(0x1040, 159), (0x1040, 256), (0x1040, 0), (0x1040, u32::MAX), (0x1044, 160)]
        {
            assert_eq!(frame.line(address, data), None, "{address:#x} {data}");
        }
    }
}
