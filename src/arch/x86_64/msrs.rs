//! Model-specific registers (Intel SDM 4; KVM api, KVM_GET_MSRS): which of them are a CPU's state, and how they
//! are read and written without losing one.

use std::ops::Deref;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::error::{Context, Error, Result};
use crate::platform::RegisterModifier;

/// A register's number and its value.
pub type Msr = (u32, u64);

/// The time stamp counter.
pub const TSC: u32 = 0x10;
/// When the local APIC's timer interrupts next, against the time stamp counter.
pub const TSC_DEADLINE: u32 = 0x6e0;

/// The registers of the KVM clock, an older and a newer one (KVM, MSR_KVM_SYSTEM_TIME): the place that the clock is written
/// to, and in the lowest bit whether the guest has it at all.
pub const KVM_CLOCK: [u32; 2] = [0x12, 0x4b56_4d01];
pub const KVM_CLOCK_ON: u64 = 1;

const MCG_CAP: u32 = 0x179;
/// How many banks of machine checks there are (MCG_CAP), and what KVM has at most.
const MCG_CAP_BANKS: u64 = 0xff;
const BANKS_MAX: u64 = 32;
const BANK_0: u32 = 0x400;
const BANK_REGISTERS: u32 = 4;

/// The registers of memory types, machine checks and the timer, which KVM has and does not list.
const UNLISTED: [u32; 33] = [
    0x17a,
    0x17b,
    0x200,
    0x201,
    0x202,
    0x203,
    0x204,
    0x205,
    0x206,
    0x207,
    0x208,
    0x209,
    0x20a,
    0x20b,
    0x20c,
    0x20d,
    0x20e,
    0x20f,
    0x250,
    0x258,
    0x259,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    0x26f,
    0x277,
    0x2ff,
    TSC,
    TSC_DEADLINE,
];

/// KVM takes fewer than 256 at a time.
const BATCH: usize = 255;

/// The numbers of the registers that are the state of this KVM's CPUs, of which `vcpu` is one.
pub fn of_cpus(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>> {
    let listed = kvm.get_msr_index_list().context("ask KVM for the list of model-specific registers")?;
    let mut all = listed.as_slice().to_vec();
    all.extend(UNLISTED);
    if let [(_, capabilities)] = get(vcpu, &[MCG_CAP])?[..] {
        let banks = (capabilities & MCG_CAP_BANKS).min(BANKS_MAX) as u32;
        all.extend(BANK_0..BANK_0 + banks * BANK_REGISTERS);
    }
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

/// The values of those of the registers `indices` that this CPU has.
pub fn get(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let entries = batch.iter().map(|index| (*index, 0));
        let mut entries = entries_of(entries);
        let read = vcpu.get_msrs(&mut entries).context("get the model-specific registers")?;
        found.extend(entries.as_slice().iter().take(read).map(|entry| (entry.index, entry.data)));
        // KVM stops at the first register that this CPU does not have.
        rest = &rest[(read + 1).min(batch.len())..];
    }
    Ok(found)
}

/// Sets registers in their order; all of them, or it is an error that names the one that KVM did not take.
pub fn set(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<()> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let entries = entries_of(batch.iter().copied());
        let written = vcpu.set_msrs(&entries).context("set the model-specific registers")?;
        rest = &rest[written..];
        if let Some((index, value)) = batch.get(written) {
            // A register that is read-only, and holds the value for all that, loses nothing.
            if get(vcpu, &[*index])? != [(*index, *value)] {
                return Err(Error::config(format!(
                    "set the model-specific register {index:#x} to {value:#x}: this host's KVM does not take it"
                )));
            }
            rest = &rest[1..];
        }
    }
    Ok(())
}

/// Changes registers of CPUs that have not run. A register that is not among a CPU's state would be lost by a snapshot.
///
/// # Errors
/// The register that this host's KVM does not have, does not list as state or does not take so is named.
pub fn change_registers(
    kvm: &Kvm,
    vcpus: &[impl Deref<Target = VcpuFd>],
    changes: &[RegisterModifier],
) -> Result<()> {
    let Some(first) = vcpus.first().filter(|_| !changes.is_empty()) else { return Ok(()) };
    let state = of_cpus(kvm, first)?;
    for RegisterModifier { number, mask, value } in changes {
        let lacks = || {
            Error::config(format!(
                "change the model-specific register {number:#x} (`msr_modifiers`, or those of `cpu_template`): this host's KVM does not have it \
                 among a CPU's state"
            ))
        };
        let index = u32::try_from(*number).ok().filter(|index| state.contains(index)).ok_or_else(lacks)?;
        for vcpu in vcpus {
            let [(_, held)] = get(vcpu, &[index])?[..] else { return Err(lacks()) };
            let wanted = held & !(*mask as u64) | *value as u64;
            set(vcpu, &[(index, wanted)]).context("`msr_modifiers`, or those of `cpu_template`")?;
        }
    }
    Ok(())
}

fn entries_of(msrs: impl Iterator<Item = Msr>) -> Msrs {
    let entries: Vec<_> =
        msrs.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).expect("a batch is few enough")
}
