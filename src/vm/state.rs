//! What KVM holds of a guest, saved as plain data and given back to a machine that was just built. In which order
//! KVM is asked and told stands in `state.rs` of each architecture.
//!
//! A machine is saved when its CPUs are out of the guest and its devices stand still: devices, then
//! [`Vm::save`], then [`Vm::save_vcpus`]; and after these, on aarch64, memory, which saving the ITS writes to. It
//! is restored in the order [`Vm::restore`], [`Vm::restore_vcpus`], then the devices. Saved state is untrusted:
//! what KVM does not take ends in an error that says which step failed, after which the machine must not be
//! used.

use super::vcpu::Vcpu;
use super::{Prepared, Vm};
use crate::arch;
use crate::error::{Error, Result};
use crate::memory::Regions;
use crate::platform::CpuChanges;

pub use crate::arch::{VcpuState, VmState};

impl Vm {
    /// The state of what is the machine's and no CPU's: interrupt controllers, clock.
    pub fn save(&self) -> Result<VmState> {
        arch::save_vm(&self.fd, self.controller()?)
    }

    /// Gives the machine, of which no CPU has run yet, that state.
    pub fn restore(&self, state: &VmState) -> Result<()> {
        arch::restore_vm(&self.fd, self.controller()?, state)
    }

    /// The state of the CPUs, in their order; waits until they are stopped. The gate must be closed, and they
    /// must have been kicked.
    pub fn save_vcpus(&self, vcpus: &[Vcpu]) -> Result<Vec<VcpuState>> {
        let mut stopped: Vec<_> = vcpus.iter().map(Vcpu::stopped).collect();
        arch::save_vcpus(&self.kvm, &self.fd, &mut stopped, self.cpu_features)
    }

    /// Gives the machine's CPUs, none of which has run yet, the states `states`, one for each.
    pub fn restore_vcpus(&self, vcpus: &[Vcpu], states: &[VcpuState]) -> Result<()> {
        if vcpus.len() != states.len() {
            return Err(Error::config(format!(
                "the saved state has {} CPUs, this machine has {}",
                states.len(),
                vcpus.len()
            )));
        }
        let mut stopped: Vec<_> = vcpus.iter().map(Vcpu::stopped).collect();
        arch::restore_vcpus(&self.fd, &mut stopped, states, self.cpu_features)
    }

    fn controller(&self) -> Result<&arch::InterruptController> {
        self.controller.as_ref().ok_or_else(|| Error::host("the machine has no CPUs yet"))
    }
}

/// Returns the changes that make another CPU like the one that a guest gets on this host if nothing is configured of it.
///
/// # Errors
/// This host has no KVM that this user may use.
pub fn cpu_of_this_host() -> Result<CpuChanges> {
    let mut vm = Vm::new(Prepared::new()?, &Regions::default())?;
    let mut vcpus = vm.create_vcpus(1, arch::CpuFeatures::default())?;
    vm.settle_cpus(&vcpus.iter().collect::<Vec<_>>(), false, &CpuChanges::default())?;
    let mut vcpus: Vec<_> = vcpus.iter_mut().collect();
    let states = arch::save_vcpus(&vm.kvm, &vm.fd, &mut vcpus, vm.cpu_features)?;
    Ok(states.first().map(VcpuState::told).unwrap_or_default())
}
