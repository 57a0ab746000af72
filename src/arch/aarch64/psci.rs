//! PSCI's calls that switch CPUs on and off (Arm DEN 0022, 5.1.3 and 5.1.4), where this process answers them: KVM would
//! switch on a CPU that the guest has not been given.

use kvm_bindings::{
    KVM_ARM_VM_SMCCC_CTRL, KVM_ARM_VM_SMCCC_FILTER, kvm_device_attr, kvm_smccc_filter,
    kvm_smccc_filter_action_KVM_SMCCC_FILTER_FWD_TO_USER as TO_USER_SPACE, kvm_vcpu_init,
};
use kvm_ioctls::{VcpuFd, VmFd};

use super::{CpuFeatures, PC, X0, core_register, is_off, kind_of_cpus, layout};
use crate::arch::power::{PowerAnswer, PowerCall};
use crate::error::{Context, Error, Result};

const CPU_OFF: u32 = 0x8400_0002;
/// With arguments of 32 bits, and of 64.
const CPU_ON: u32 = 0x8400_0003;
const CPU_ON_64: u32 = 0xc400_0003;

/// The calls that KVM leaves to this process.
const ANSWERED: [u32; 3] = [CPU_OFF, CPU_ON, CPU_ON_64];

/// The size of the instruction that a guest calls by, HVC or SMC.
const CALL_SIZE: u64 = 4;

/// Switches CPUs on and off as the guest calls for it.
pub struct PowerSwitch {
    /// The kind that CPUs are initialised as: one that is switched on begins as after a reset.
    init: kvm_vcpu_init,
}

impl PowerSwitch {
    /// Has KVM leave the calls to this process, in a machine of which no CPU has run yet.
    ///
    /// # Errors
    /// This host's KVM answers them itself.
    pub fn new(vm: &VmFd, features: CpuFeatures) -> Result<Option<Self>> {
        let (group, attr) = (KVM_ARM_VM_SMCCC_CTRL, KVM_ARM_VM_SMCCC_FILTER.into());
        let attribute = |addr| kvm_device_attr { group, attr, addr, flags: 0 };
        if vm.has_device_attr(&attribute(0)).is_err() {
            return Err(Error::config(
                "`max_vcpus` (--max-cpus): the host's kernel cannot hold CPUs back from a guest, which takes KVM's \
                 SMCCC filter (since Linux 6.4): leave it out, or have a newer kernel on the host",
            ));
        }
        for base in ANSWERED {
            let call = kvm_smccc_filter { base, nr_functions: 1, action: TO_USER_SPACE as u8, pad: [0; 15] };
            vm.set_device_attr(&attribute((&raw const call) as u64))
                .context("have KVM leave PSCI's calls to this process (KVM_ARM_VM_SMCCC_FILTER)")?;
        }
        Ok(Some(Self { init: kind_of_cpus(vm, features)? }))
    }

    /// The call for which a CPU has left the guest.
    pub fn call(&self, vcpu: &VcpuFd) -> Result<PowerCall> {
        let argument = |number: u64| get(vcpu, X0 + number * size_of::<u64>() as u64);
        let function = argument(0)? as u32;
        if function == CPU_OFF {
            return Ok(PowerCall::Off);
        }
        let is_wide = function == CPU_ON_64;
        let argument =
            |number| argument(number).map(|value| if is_wide { value } else { value & 0xffff_ffff });
        Ok(PowerCall::On { cpu: layout::cpu_of(argument(1)?), entry: argument(2)?, argument: argument(3)? })
    }

    /// Gives the CPU that has called its answer.
    pub fn answer(&self, vcpu: &VcpuFd, answer: PowerAnswer) -> Result<()> {
        // 5.2.2.
        let code: i64 = match answer {
            PowerAnswer::IsOn => 0,
            PowerAnswer::NoSuchCpu => -2,
            PowerAnswer::Denied => -3,
            PowerAnswer::WasOn => -4,
        };
        set(vcpu, X0, code as u64)
    }

    /// Has the CPU that has called call once more, when it goes on.
    pub fn ask_again(&self, vcpu: &VcpuFd) -> Result<()> {
        set(vcpu, PC, get(vcpu, PC)?.wrapping_sub(CALL_SIZE))
    }

    /// Switches this CPU on, which stands still: it begins at `entry`.
    pub fn switch_on(&self, vcpu: &VcpuFd, entry: u64, argument: u64) -> Result<()> {
        vcpu.vcpu_init(&self.init).context("reset the CPU")?;
        set(vcpu, PC, entry)?;
        set(vcpu, X0, argument)
    }

    /// Whether this CPU is on, which stands still.
    pub fn is_on(&self, vcpu: &VcpuFd) -> Result<bool> {
        Ok(!is_off(vcpu)?)
    }
}

fn get(vcpu: &VcpuFd, offset: u64) -> Result<u64> {
    let mut value = [0; 8];
    vcpu.get_one_reg(core_register(offset), &mut value).context("get a register")?;
    Ok(u64::from_le_bytes(value))
}

fn set(vcpu: &VcpuFd, offset: u64, value: u64) -> Result<()> {
    vcpu.set_one_reg(core_register(offset), &value.to_le_bytes()).context("set a register").map(drop)
}
