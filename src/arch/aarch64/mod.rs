//! aarch64: vCPU features and registers, the device tree, the Image boot protocol.

mod boot;
mod fdt;
mod features;
mod gic;
mod gic_state;
pub mod layout;
mod psci;
mod state;
pub mod trap;
mod unpack;

use std::ops::Deref;

use kvm_bindings::{
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, KVM_ARM_VCPU_PTRAUTH_ADDRESS,
    KVM_ARM_VCPU_PTRAUTH_GENERIC, KVM_ARM_VCPU_SVE, KVM_CAP_ARM_NISV_TO_USER, KVM_EXIT_ARM_NISV,
    KVM_EXIT_INTERNAL_ERROR, KVM_MP_STATE_STOPPED, KVM_REG_ARM_CORE, KVM_REG_ARM64, KVM_REG_SIZE_U64,
    kvm_enable_cap, kvm_mp_state, kvm_vcpu_events, kvm_vcpu_init,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

pub use boot::{Entry, check_kernel, load};
pub use features::lacking;
pub use gic::{
    InterruptController, MESSAGES_NAME_THEIR_DEVICE, READS_REGISTERS_FROM_MEMORY, default_routes, irq_of_line,
};

pub use psci::PowerSwitch;
pub use state::{VcpuState, VmState, change_registers, restore_vcpus, restore_vm, save_vcpus, save_vm};

use crate::error::{Context, Error, Result};
use crate::kvm;
use crate::platform::{CpuChanges, CpuidModifier, FeatureModifier, Node, Platform};

/// What uname calls this architecture.
pub const NAME: &str = "aarch64";

/// The number of this architecture in ELF files (`e_machine`).
pub const ELF_MACHINE: u16 = 183;

/// The device tree says whether there is a PCI bus.
pub fn no_pci_words() -> Option<&'static str> {
    None
}

/// Whether this host's KVM emulates all code of kernels: there is none of that kind.
pub fn is_software_kvm() -> bool {
    false
}

/// Whether boot tables of this architecture say this.
pub fn prints(node: &Node) -> bool {
    matches!(node, Node::Tree(_) | Node::MessageTree(_) | Node::Chosen(_))
}

/// Whether a core can be given two hardware threads.
pub const HAS_SMT: bool = false;

/// Whether CPUs have a CPUID instruction.
pub const HAS_CPUID: bool = false;

/// The command line a stock kernel gets when none is given: console on the serial port, and an end
/// that the monitor notices.
pub const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 panic=-1";

/// The command line of a stock kernel with a virtio console. Its driver may be in a module: until that is there, the
/// serial port, which the device tree names, says what there is to say.
pub const DEFAULT_COMMAND_LINE_OF_VIRTIO: &str = "earlycon console=hvc0 panic=-1";

/// PSTATE at entry: EL1h, all interrupts masked.
const PSTATE_EL1H_MASKED: u64 = 0x3c5;

/// What KVM is told of CPUs: its preferred target.
pub struct CpuModel;

impl CpuModel {
    /// Nothing to ask ahead.
    pub fn new(_kvm: &Kvm) -> Result<Self> {
        Ok(Self)
    }

    /// Nothing to tell: CPUs are initialised when they are made.
    pub fn apply(
        &self,
        _vcpus: &[impl Deref<Target = VcpuFd>],
        _smt: bool,
        _changes: &CpuChanges,
    ) -> Result<()> {
        Ok(())
    }

    /// Nothing to compare ahead: KVM refuses the registers that say what a CPU has, if this host's has not.
    pub fn check(
        &self,
        _vcpu: &VcpuFd,
        _saved: &[VcpuState],
        _platform: &Platform,
        _modifiers: &[CpuidModifier],
    ) -> Result<()> {
        Ok(())
    }
}

/// Whether a vCPU that has no state yet can enter KVM, if it is to return at once. Here, the first KVM_RUN settles what
/// the CPU has (KVM api, KVM_ARM_VCPU_FINALIZE and the ID registers) and where the interrupt controller is.
pub const ENTERS_WITHOUT_STATE: bool = false;

/// The features that CPUs are initialised with beside those that KVM prefers (KVM api, KVM_ARM_VCPU_INIT).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuFeatures {
    mask: [u32; WORDS],
    value: [u32; WORDS],
}

/// The words of features of a CPU.
const WORDS: usize = 7;
/// The features of word 0 that a guest can be given. The others need more of a machine than to be asked for: a CPU that
/// begins switched off, one of 32 bits, performance counters, one that has guests of its own.
const GIVEN: u32 = 1 << KVM_ARM_VCPU_PSCI_0_2
    | 1 << KVM_ARM_VCPU_SVE
    | 1 << KVM_ARM_VCPU_PTRAUTH_ADDRESS
    | 1 << KVM_ARM_VCPU_PTRAUTH_GENERIC;

impl CpuFeatures {
    /// The features that `changes` ask for, one after the other.
    ///
    /// # Errors
    /// A feature that guests cannot be given is asked for.
    pub fn new(changes: &[FeatureModifier]) -> Result<Self> {
        let mut features = Self::default();
        for FeatureModifier { index, mask, value } in changes {
            let given = if *index == 0 { GIVEN } else { 0 };
            let refused = value & !given;
            if refused != 0 || *index as usize >= WORDS {
                return Err(Error::config(format!(
                    "`vcpu_features`: guests cannot be given {refused:#x} of word {index}: of word 0 there are bits \
                     {KVM_ARM_VCPU_PSCI_0_2} (PSCI), {KVM_ARM_VCPU_SVE} (SVE), and {KVM_ARM_VCPU_PTRAUTH_ADDRESS} and \
                     {KVM_ARM_VCPU_PTRAUTH_GENERIC} (pointer authentication)"
                )));
            }
            let index = *index as usize;
            features.mask[index] |= mask;
            features.value[index] = features.value[index] & !mask | value;
        }
        Ok(features)
    }

    /// The words of features of a CPU that would have `words`.
    fn of(self, mut words: [u32; WORDS]) -> [u32; WORDS] {
        for (word, (mask, value)) in words.iter_mut().zip(self.mask.into_iter().zip(self.value)) {
            *word = *word & !mask | value;
        }
        words
    }
}

/// Tells KVM what the CPUs are: all but the first wait for PSCI CPU_ON. Then makes the interrupt controller, which
/// must come after that.
pub fn after_vcpus(vm: &VmFd, vcpus: &[VcpuFd], features: CpuFeatures) -> Result<InterruptController> {
    let mut target = kind_of_cpus(vm, features)?;
    let attempt = |index: usize| match features == CpuFeatures::default() {
        true => format!("initialise vCPU {index}"),
        false => format!(
            "initialise vCPU {index} with other features than this host's KVM prefers (`vcpu_features`), all of which \
             its processor must have"
        ),
    };
    for (index, vcpu) in vcpus.iter().enumerate() {
        vcpu.vcpu_init(&target).with_context(|| attempt(index))?;
        if target.features[0] & 1 << KVM_ARM_VCPU_SVE != 0 {
            vcpu.vcpu_finalize(&(KVM_ARM_VCPU_SVE as i32)).with_context(|| attempt(index))?;
        }
        target.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
    }
    InterruptController::new(vm, vcpus.len() as u32)
}

/// The kind and the features that CPUs are initialised with: KVM's preferred ones, with PSCI, and with what `features`
/// changes of them.
fn kind_of_cpus(vm: &VmFd, features: CpuFeatures) -> Result<kvm_vcpu_init> {
    let mut target = kvm_vcpu_init::default();
    vm.get_preferred_target(&mut target).context("ask KVM for its preferred CPU")?;
    target.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
    target.features = features.of(target.features);
    Ok(target)
}

/// Makes a virtual machine.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    match kvm.get_host_ipa_limit() {
        limit @ 1..layout::IPA_BITS => kvm.create_vm_with_ipa_size(limit as u32),
        _ => kvm.create_vm(),
    }
}

/// What must be set up before the vCPUs exist: an access that KVM cannot do comes to `refuse_instruction`,
/// instead of ending KVM_RUN with an error.
pub fn before_vcpus(vm: &VmFd, _cpus: u16) -> Result<()> {
    let refusals = kvm_enable_cap { cap: KVM_CAP_ARM_NISV_TO_USER, ..Default::default() };
    vm.enable_cap(&refusals).context("enable KVM_CAP_ARM_NISV_TO_USER (since Linux 5.5)")
}

/// A core register by its offset in `struct kvm_regs` (KVM api, 4.68).
fn core_register(offset: u64) -> u64 {
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | u64::from(KVM_REG_ARM_CORE) | (offset / 4)
}

const X0: u64 = 0;
const PC: u64 = 0x100;
const PSTATE: u64 = 0x108;

/// Puts the first CPU at `entry`; PSCI starts the others.
pub fn boot(vcpus: &[impl Deref<Target = VcpuFd>], entry: &Entry) -> Result<()> {
    for (offset, value) in [(PSTATE, PSTATE_EL1H_MASKED), (PC, entry.address), (X0, entry.fdt)] {
        vcpus[0].set_one_reg(core_register(offset), &value.to_le_bytes()).context("set the registers")?;
    }
    Ok(())
}

/// Whether this stopped CPU waits for something that only another CPU could send: PSCI CPU_OFF. A CPU
/// that spins with interrupts masked (what Linux's `halt` does) cannot be told from one at work.
pub fn is_halted_for_good(vcpu: &mut VcpuFd) -> Result<bool> {
    is_off(vcpu)
}

/// Whether this stopped CPU is switched off.
fn is_off(vcpu: &VcpuFd) -> Result<bool> {
    Ok(vcpu.get_mp_state().context("get the CPU's run state")?.mp_state == KVM_MP_STATE_STOPPED)
}

/// Has this stopped CPU wait until another one switches it on (PSCI CPU_ON).
pub fn await_start(vcpu: &VcpuFd) -> Result<()> {
    let state = kvm_mp_state { mp_state: KVM_MP_STATE_STOPPED };
    vcpu.set_mp_state(state).context("set the CPU's run state")
}

/// KVM has no means to tell a guest of this architecture: its watchdogs may speak up
/// (docs/troubleshooting.md).
pub fn tell_that_it_stood_still(_vcpu: &VcpuFd) -> Result<()> {
    Ok(())
}

/// Lets the guest go on after a load or store outside of memory of which the processor tells KVM too little
/// to do it (of two registers, or with write-back): it gets an external abort, as from a bus where nobody
/// answers. Says what was done, or why it cannot be: KVM went out of the guest for another reason.
pub fn refuse_instruction(vcpu: &mut VcpuFd, index: usize) -> Result<String, String> {
    let reason = vcpu.get_kvm_run().exit_reason;
    // After KVM_EXIT_ARM_NISV, word 1 is `fault_ipa`: the guest physical address of the access.
    let address = kvm::exit_words(vcpu)[1];
    let mut pc = [0; 8];
    let pc = match vcpu.get_one_reg(core_register(PC), &mut pc) {
        Ok(_) => format!("{:#x}", u64::from_le_bytes(pc)),
        Err(_) => "an unknown address".to_owned(),
    };
    match reason {
        KVM_EXIT_ARM_NISV => {
            let mut events = kvm_vcpu_events::default();
            events.exception.ext_dabt_pending = 1;
            let text = format!("KVM could not do the access to {address:#x} at {pc} on CPU {index}");
            match vcpu.set_vcpu_events(&events) {
                Ok(()) => Ok(format!("{text}; the guest gets an external abort for it")),
                Err(error) => Err(format!("{text}; set the CPU's events: {error}")),
            }
        }
        KVM_EXIT_INTERNAL_ERROR => Err(format!("KVM reports an internal error on CPU {index} at {pc}")),
        _ => Err(format!("KVM_RUN on CPU {index} returned an exit of the unknown kind {reason} at {pc}")),
    }
}
