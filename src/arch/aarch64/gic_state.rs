//! The registers of KVM's GIC as plain data (KVM's devices/arm-vgic.rst, arm-vgic-v3.rst, arm-vgic-its.rst): which
//! there are, in the order in which they are written back. They are read in the same order.

use kvm_bindings::{
    KVM_DEV_ARM_ITS_RESTORE_TABLES, KVM_DEV_ARM_ITS_SAVE_TABLES, KVM_DEV_ARM_VGIC_CPUID_SHIFT,
    KVM_DEV_ARM_VGIC_GRP_CPU_REGS, KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_DIST_REGS, KVM_DEV_ARM_VGIC_GRP_ITS_REGS, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO,
    KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT,
    KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT, VGIC_LEVEL_INFO_LINE_LEVEL,
};
use kvm_ioctls::DeviceFd;
use serde::{Deserialize, Serialize};

use super::gic::InterruptController;
use super::layout::{self, affinity};
use crate::error::{Context, Error, Result};
use crate::kvm::{attribute as get, set_attribute as set};

/// Registers of one kind that follow each other: KVM's group, the first one's offset, how many, how far apart.
type Block = (u32, u64, u32, u64);

const DISTRIBUTOR: u32 = KVM_DEV_ARM_VGIC_GRP_DIST_REGS;
const REDISTRIBUTOR: u32 = KVM_DEV_ARM_VGIC_GRP_REDIST_REGS;
const INTERFACE_V2: u32 = KVM_DEV_ARM_VGIC_GRP_CPU_REGS;
const INTERFACE_V3: u32 = KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS;
const LEVELS: u32 = KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO;
const ITS: u32 = KVM_DEV_ARM_VGIC_GRP_ITS_REGS;

/// Shared interrupts, and how many fit a register with 1, 2 and 8 bits for each.
const SHARED: u32 = layout::GIC_INTERRUPTS - 32;
const BY_BITS: u32 = SHARED / 32;
const BY_PAIRS: u32 = SHARED / 16;
const BY_BYTES: u32 = SHARED / 4;

/// GICD_ISPENDR0: in a GICv2 its low half says which software interrupts are pending and not from which CPU,
/// which GICD_SPENDSGIR says as well.
const ISPENDR0: u64 = 0x200;
const SOFTWARE_INTERRUPTS: u64 = 0xffff;

/// The distributor's registers of shared interrupts. First what says how KVM takes the others: IIDR (the
/// revision of KVM's GIC), CTLR, IGROUPR. An interrupt's kind (ICFGR), priority and target come before its state:
/// ISPENDR means a latch or a line by the kind.
const SHARED_V3: [Block; 9] = [
    (DISTRIBUTOR, 0x8, 1, 4),
    (DISTRIBUTOR, 0x0, 1, 4),
    (DISTRIBUTOR, 0x84, BY_BITS, 4),
    (DISTRIBUTOR, 0xc08, BY_PAIRS, 4),
    (DISTRIBUTOR, 0x420, BY_BYTES, 4),
    // The low half of each IROUTER: KVM has no affinity level 3.
    (DISTRIBUTOR, 0x6100, SHARED, 8),
    (DISTRIBUTOR, 0x104, BY_BITS, 4),
    (DISTRIBUTOR, 0x204, BY_BITS, 4),
    (DISTRIBUTOR, 0x304, BY_BITS, 4),
];

/// A CPU's redistributor, in the same order. PROPBASER and PENDBASER cannot be written once CTLR has switched
/// interrupt messages on, so that CTLR is last.
const PRIVATE_V3: [Block; 9] = [
    (REDISTRIBUTOR, 0x70, 2, 4),
    (REDISTRIBUTOR, 0x78, 2, 4),
    (REDISTRIBUTOR, 0x1_0080, 1, 4),
    (REDISTRIBUTOR, 0x1_0c04, 1, 4),
    (REDISTRIBUTOR, 0x1_0400, 8, 4),
    (REDISTRIBUTOR, 0x1_0100, 1, 4),
    (REDISTRIBUTOR, 0x1_0200, 1, 4),
    (REDISTRIBUTOR, 0x1_0300, 1, 4),
    (REDISTRIBUTOR, 0x0, 1, 4),
];

/// As `SHARED_V3`, with ITARGETSR in the place of IROUTER.
const SHARED_V2: [Block; 9] = [
    (DISTRIBUTOR, 0x8, 1, 4),
    (DISTRIBUTOR, 0x0, 1, 4),
    (DISTRIBUTOR, 0x84, BY_BITS, 4),
    (DISTRIBUTOR, 0xc08, BY_PAIRS, 4),
    (DISTRIBUTOR, 0x420, BY_BYTES, 4),
    (DISTRIBUTOR, 0x820, BY_BYTES, 4),
    (DISTRIBUTOR, 0x104, BY_BITS, 4),
    (DISTRIBUTOR, 0x204, BY_BITS, 4),
    (DISTRIBUTOR, 0x304, BY_BITS, 4),
];

/// A CPU's own interrupts (SPENDSGIR last: which CPU sent a software interrupt), then its interface: PMR, BPR,
/// ABPR, the active priorities, and CTLR, which switches it on.
const PRIVATE_V2: [Block; 12] = [
    (DISTRIBUTOR, 0x80, 1, 4),
    (DISTRIBUTOR, 0xc04, 1, 4),
    (DISTRIBUTOR, 0x400, 8, 4),
    (DISTRIBUTOR, 0x100, 1, 4),
    (DISTRIBUTOR, ISPENDR0, 1, 4),
    (DISTRIBUTOR, 0x300, 1, 4),
    (DISTRIBUTOR, 0xf20, 4, 4),
    (INTERFACE_V2, 0x4, 1, 4),
    (INTERFACE_V2, 0x8, 1, 4),
    (INTERFACE_V2, 0x1c, 1, 4),
    (INTERFACE_V2, 0xd0, 4, 4),
    (INTERFACE_V2, 0x0, 1, 4),
];

/// A system register of the CPU interface as KVM names it: op0, op1, CRn, CRm, op2.
const fn icc(crm_of: (u64, u64), op2: u64) -> u64 {
    let (crn, crm) = crm_of;
    3 << 14 | crn << 7 | crm << 3 | op2
}

/// SRE and CTLR, which say how the others are to be read; PMR, BPR0, BPR1, IGRPEN0, IGRPEN1.
const INTERFACE: [u64; 7] = [
    icc((12, 12), 5),
    ICC_CTLR,
    icc((4, 6), 0),
    icc((12, 8), 3),
    icc((12, 12), 3),
    icc((12, 12), 6),
    icc((12, 12), 7),
];
const ICC_CTLR: u64 = icc((12, 12), 4);
/// The active priorities of both groups: the first register of four each.
const ACTIVE: [u64; 2] = [icc((12, 8), 4), icc((12, 9), 0)];

/// The ITS, in the order of KVM's documentation: CBASER first, for it sets the two after it to 0, CWRITER and
/// CREADR; IIDR, which says how the tables in memory are laid out, and the eight BASERs. CTLR comes after the tables.
const ITS_REGISTERS: [Block; 5] =
    [(ITS, 0x80, 1, 8), (ITS, 0x4, 1, 8), (ITS, 0x90, 1, 8), (ITS, 0x88, 1, 8), (ITS, 0x100, 8, 8)];
const ITS_CTLR: (u32, u64) = (ITS, 0x0);

/// The state of a GIC.
#[derive(Clone, Serialize, Deserialize)]
pub struct GicState {
    is_v2: bool,
    /// The registers of the distributor and of all CPUs, in the order of `registers`.
    registers: Vec<u64>,
    /// The registers of the ITS but for the tables, which are in guest memory.
    its: Option<Vec<u64>>,
}

/// The registers of `blocks`, for the CPU that the upper half of an attribute names.
fn spread(blocks: &[Block], cpu: u64) -> impl Iterator<Item = (u32, u64)> {
    blocks.iter().flat_map(move |&(group, first, count, step)| {
        (0..u64::from(count)).map(move |index| (group, cpu | (first + index * step)))
    })
}

/// The registers of a GIC in the order in which they are written: of shared interrupts, then of each CPU.
fn registers(gic: &InterruptController) -> Result<Vec<(u32, u64)>> {
    let mut all = Vec::new();
    if gic.is_v2 {
        all.extend(spread(&SHARED_V2, 0));
        for cpu in 0..u64::from(gic.cpus) {
            all.extend(spread(&PRIVATE_V2, cpu << KVM_DEV_ARM_VGIC_CPUID_SHIFT));
        }
        return Ok(all);
    }
    let lines = VGIC_LEVEL_INFO_LINE_LEVEL << KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT;
    let line = |interrupt: u32| u64::from(lines | interrupt);
    all.extend(spread(&SHARED_V3, 0));
    all.extend((32..layout::GIC_INTERRUPTS).step_by(32).map(|first| (LEVELS, line(first))));
    // How many registers tell the active priorities: 1, 2 or 4, by the bits that a priority has.
    let control = get(&gic.device, INTERFACE_V3, ICC_CTLR).context("get the GIC's ICC_CTLR_EL1")?;
    let active = match (control >> 8 & 7) + 1 {
        ..=5 => 1,
        6 => 2,
        _ => 4,
    };
    for cpu in 0..gic.cpus {
        let mpidr = u64::from(affinity(cpu)) << KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT;
        all.extend(spread(&PRIVATE_V3, mpidr));
        all.push((LEVELS, mpidr | line(0)));
        all.extend(INTERFACE.map(|register| (INTERFACE_V3, mpidr | register)));
        let active = ACTIVE.into_iter().flat_map(|first| first..first + active);
        all.extend(active.map(|register| (INTERFACE_V3, mpidr | register)));
    }
    Ok(all)
}

/// The state of a GIC. Interrupt messages that are pending, and the tables of the ITS, are written to guest
/// memory.
pub fn save(gic: &InterruptController) -> Result<GicState> {
    if let Some(its) = &gic.its {
        // Both before memory is saved; before the registers, for what is written to memory is in none of them.
        command(&gic.device, KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES)
            .context("write the GIC's pending messages to guest memory")?;
        command(its, KVM_DEV_ARM_ITS_SAVE_TABLES).context("write the ITS's tables to guest memory")?;
    }
    let read = |(group, attr)| {
        let value = get(&gic.device, group, attr).with_context(|| format!("get {}", name(group, attr)))?;
        let is_half = gic.is_v2 && group == DISTRIBUTOR && attr & u64::from(u32::MAX) == ISPENDR0;
        Ok(if is_half { value & !SOFTWARE_INTERRUPTS } else { value })
    };
    let registers = registers(gic)?.into_iter().map(read).collect::<Result<_>>()?;
    let of_its = |its: &DeviceFd| {
        let all = spread(&ITS_REGISTERS, 0).chain([ITS_CTLR]);
        let read =
            |(group, attr)| get(its, group, attr).with_context(|| format!("get {}", name(group, attr)));
        all.map(read).collect::<Result<_>>()
    };
    let its = gic.its.as_deref().map(of_its).transpose()?;
    Ok(GicState { is_v2: gic.is_v2, registers, its })
}

/// Gives a GIC that was just made that state. Guest memory must be as it was saved.
pub fn restore(gic: &InterruptController, state: &GicState) -> Result<()> {
    let GicState { is_v2, registers: values, its } = state;
    if *is_v2 != gic.is_v2 {
        let version = |is_v2| if is_v2 { "GICv2" } else { "GICv3" };
        return Err(Error::config(format!(
            "the saved interrupt controller is a {}, and this host's KVM has a {}",
            version(*is_v2),
            version(gic.is_v2)
        )));
    }
    write(&gic.device, registers(gic)?.into_iter(), values)?;
    match (&gic.its, its) {
        (None, None) => Ok(()),
        (Some(device), Some(values)) => restore_its(device, values),
        _ => Err(Error::config("the saved interrupt controller and this machine's differ in the ITS of PCI")),
    }
}

fn restore_its(its: &DeviceFd, values: &[u64]) -> Result<()> {
    let (control, values) = values.split_last().ok_or_else(|| Error::config("the ITS has no registers"))?;
    write(its, spread(&ITS_REGISTERS, 0), values)?;
    command(its, KVM_DEV_ARM_ITS_RESTORE_TABLES).context("read the ITS's tables from guest memory")?;
    write(its, [ITS_CTLR].into_iter(), &[*control])
}

fn write(device: &DeviceFd, registers: impl Iterator<Item = (u32, u64)>, values: &[u64]) -> Result<()> {
    let registers: Vec<_> = registers.collect();
    if registers.len() != values.len() {
        return Err(Error::config(format!(
            "the saved interrupt controller has {} registers, this machine's has {}",
            values.len(),
            registers.len()
        )));
    }
    for ((group, attr), value) in registers.into_iter().zip(values) {
        set(device, group, attr, *value)
            .with_context(|| format!("set {} to {value:#x}", name(group, attr)))?;
    }
    Ok(())
}

/// What an error calls a register.
fn name(group: u32, attr: u64) -> String {
    let (cpu, offset) = (attr >> 32, attr as u32);
    match group {
        DISTRIBUTOR => format!("the GIC's distributor register {offset:#x} (CPU {cpu:#x})"),
        REDISTRIBUTOR => format!("the GIC's redistributor register {offset:#x} of CPU {cpu:#x}"),
        LEVELS => format!("the GIC's lines from {:#x} of CPU {cpu:#x}", offset & 0x3ff),
        ITS => format!("the ITS's register {offset:#x}"),
        _ => format!("the GIC's register {offset:#x} of the interface of CPU {cpu:#x}"),
    }
}

fn command(device: &DeviceFd, attr: u32) -> Result<(), kvm_ioctls::Error> {
    set(device, KVM_DEV_ARM_VGIC_GRP_CTRL, attr.into(), 0)
}
