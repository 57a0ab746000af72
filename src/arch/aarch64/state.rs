//! What KVM holds of a guest, as plain data: the only place that says in which order it is read and written
//! back, with `gic_state.rs` for the registers of the GIC. The CPUs must not run, and no device may raise an
//! interrupt meanwhile.

use std::ops::{Deref, DerefMut};

use kvm_bindings::{
    KVM_REG_ARM64, KVM_REG_ARM64_SYSREG, KVM_REG_SIZE_MASK, KVM_REG_SIZE_SHIFT, KVM_REG_SIZE_U64, RegList,
    kvm_mp_state, kvm_vcpu_events, kvm_vcpu_init,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::CpuFeatures;
use super::features;
use super::gic::InterruptController;
use super::gic_state::{self, GicState};
use crate::error::{Context, Error, Result};
use crate::platform::{CpuChanges, RegisterModifier};
use crate::snapshot;

/// More registers than any KVM has of a CPU, and what `kvm-bindings` can list: a saved state cannot keep KVM busy
/// with more.
const REGISTERS_MAX: usize = 500;
/// The largest register that KVM can name, in bytes.
const REGISTER_MAX: usize = 256;

/// The virtual and the physical counter (CNTVCT_EL0, which KVM names by the number of CNTV_CVAL_EL0 since ever,
/// and CNTPCT_EL0).
const COUNTERS: [u64; 2] = [system_register(3, 14, 3, 2), system_register(3, 14, 0, 1)];

/// KVM's name of a 64-bit system register with op0 3: op1, CRn, CRm, op2.
const fn system_register(op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    let encoding = 3 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2;
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG as u64 | encoding
}

/// What KVM holds of a machine beside its CPUs.
#[derive(Clone, Serialize, Deserialize)]
pub struct VmState {
    gic: GicState,
}

impl VmState {
    /// The guest's clock is the CPUs' counter, which goes on where it was.
    ///
    /// # Errors
    /// Always.
    pub fn follow_time_of_day(&mut self) -> Result<()> {
        Err(Error::config(
            "KVM keeps no clock for guests of aarch64: leave it out, and have the guest set its clock",
        ))
    }
}

/// What KVM holds of a CPU.
#[derive(Clone, Serialize, Deserialize)]
pub struct VcpuState {
    /// What the CPU was initialised as (KVM_ARM_VCPU_INIT).
    target: u32,
    features: [u32; 7],
    mp_state: u32,
    /// Numbers and values, in the order in which KVM lists them.
    #[serde(deserialize_with = "snapshot::at_most::<REGISTERS_MAX, _, _>")]
    registers: Vec<(u64, Vec<u8>)>,
    events: Events,
}

/// `struct kvm_vcpu_events`.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Events {
    serror_pending: u8,
    serror_has_esr: u8,
    ext_dabt_pending: u8,
    serror_esr: u64,
}

impl VcpuState {
    /// Returns the changes that make another CPU like this one.
    pub fn told(&self) -> CpuChanges {
        features::told(&self.registers)
    }
}

/// What KVM holds of a machine; its lines and devices are quiet. Guest memory is saved after this, which writes
/// to it.
pub fn save_vm(_vm: &VmFd, controller: &InterruptController) -> Result<VmState> {
    Ok(VmState { gic: gic_state::save(controller)? })
}

/// Gives a machine that was just built, and that has its memory, the state of another one.
pub fn restore_vm(_vm: &VmFd, controller: &InterruptController, state: &VmState) -> Result<()> {
    gic_state::restore(controller, &state.gic)
}

/// What KVM holds of the CPUs.
pub fn save_vcpus(
    _kvm: &Kvm,
    vm: &VmFd,
    vcpus: &mut [impl DerefMut<Target = VcpuFd>],
    features: CpuFeatures,
) -> Result<Vec<VcpuState>> {
    let init = super::kind_of_cpus(vm, features)?;
    let save =
        |(index, vcpu): (usize, &_)| save_vcpu(&init, vcpu).with_context(|| format!("save CPU {index}"));
    vcpus.iter().map(|vcpu| &**vcpu).enumerate().map(save).collect()
}

fn save_vcpu(init: &kvm_vcpu_init, vcpu: &VcpuFd) -> Result<VcpuState> {
    let mp_state = vcpu.get_mp_state().context("get the run state")?.mp_state;
    let mut list = RegList::new(REGISTERS_MAX).expect("so many can be listed");
    vcpu.get_reg_list(&mut list).context("ask KVM for the list of registers")?;
    let read = |register: &u64| Ok((*register, get(vcpu, *register)?));
    let registers = list.as_slice().iter().map(read).collect::<Result<_>>()?;
    // Last: reading a register has KVM do the reset that a CPU owes since it was switched on.
    let kvm_vcpu_events { exception, .. } = vcpu.get_vcpu_events().context("get the pending events")?;
    let events = Events {
        serror_pending: exception.serror_pending,
        serror_has_esr: exception.serror_has_esr,
        ext_dabt_pending: exception.ext_dabt_pending,
        serror_esr: exception.serror_esr,
    };
    Ok(VcpuState { target: init.target, features: init.features, mp_state, registers, events })
}

/// Gives CPUs that have not run yet the state of others. Whatever the state says, KVM or this function refuses
/// it, or the CPU is as if it had come there by itself.
pub fn restore_vcpus(
    vm: &VmFd,
    vcpus: &mut [impl DerefMut<Target = VcpuFd>],
    states: &[VcpuState],
    features: CpuFeatures,
) -> Result<()> {
    let init = super::kind_of_cpus(vm, features)?;
    for (index, (vcpu, state)) in vcpus.iter().zip(states).enumerate() {
        restore_vcpu(&init, vcpu, state).with_context(|| format!("restore CPU {index}"))?;
    }
    // Last, and of one CPU: it is all CPUs' counter, which would be set back by as long as all of the above took,
    // and again by each CPU.
    let Some((first, state)) = vcpus.first().zip(states.first()) else { return Ok(()) };
    let counters = state.registers.iter().filter(|(register, _)| COUNTERS.contains(register));
    counters.into_iter().try_for_each(|(register, value)| set(first, *register, value))
}

fn restore_vcpu(init: &kvm_vcpu_init, vcpu: &VcpuFd, state: &VcpuState) -> Result<()> {
    let VcpuState { target, features, mp_state, registers, events } = state;
    if (*target, *features) != (init.target, init.features) {
        return Err(Error::config(format!(
            "it was of KVM's kind {target} with the features {features:x?}, and this host's are of kind {} \
             with {:x?}: the host's processor must be like that of the host that saved it",
            init.target, init.features
        )));
    }
    // The CPU was initialised when it was made, those but the first switched off: this says which are on.
    vcpu.set_mp_state(kvm_mp_state { mp_state: *mp_state }).context("set the run state")?;
    for (register, value) in registers.iter().filter(|(register, _)| !COUNTERS.contains(register)) {
        set(vcpu, *register, value)?;
    }
    let mut pending = kvm_vcpu_events::default();
    pending.exception.serror_pending = events.serror_pending;
    pending.exception.serror_has_esr = events.serror_has_esr;
    pending.exception.ext_dabt_pending = events.ext_dabt_pending;
    pending.exception.serror_esr = events.serror_esr;
    // Last: an external abort that is pending changes registers as soon as it is set.
    vcpu.set_vcpu_events(&pending).context("set the pending events")
}

/// The size of a register in bytes, as its number says.
fn size(register: u64) -> usize {
    1 << ((register & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT)
}

fn get(vcpu: &VcpuFd, register: u64) -> Result<Vec<u8>> {
    let mut value = [0; REGISTER_MAX];
    let attempt = || format!("get the register {register:#x}");
    let size = vcpu.get_one_reg(register, &mut value).with_context(attempt)?;
    Ok(value[..size].to_vec())
}

/// Changes registers of CPUs that have not run.
///
/// # Errors
/// The register that this host's KVM does not have, or does not take so, is named.
pub fn change_registers(
    _kvm: &Kvm,
    vcpus: &[impl Deref<Target = VcpuFd>],
    changes: &[RegisterModifier],
) -> Result<()> {
    for RegisterModifier { number, mask, value } in changes {
        let attempt =
            || format!("change the register {number:#x} (`reg_modifiers`, or those of `cpu_template`)");
        let bits = 8 * size(*number) as u32;
        if bits > u128::BITS || mask.checked_shr(bits).unwrap_or(0) != 0 {
            return Err(Error::config(format!("{}: it has {bits} bits", attempt())));
        }
        for vcpu in vcpus {
            let mut held = [0; size_of::<u128>()];
            let read = get(vcpu, *number).with_context(attempt)?;
            held[..read.len()].copy_from_slice(&read);
            let wanted = u128::from_le_bytes(held) & !mask | value;
            set(vcpu, *number, &wanted.to_le_bytes()[..read.len()]).with_context(attempt)?;
        }
    }
    Ok(())
}

fn set(vcpu: &VcpuFd, register: u64, value: &[u8]) -> Result<()> {
    if value.len() != size(register) {
        return Err(Error::config(format!(
            "the register {register:#x} has a saved value of {} bytes",
            value.len()
        )));
    }
    match vcpu.set_one_reg(register, value) {
        Ok(_) => Ok(()),
        // A register that is read-only, and holds the value for all that, loses nothing.
        Err(_) if get(vcpu, register).is_ok_and(|held| held == value) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("set the register {register:#x} to {value:x?}")),
    }
}
