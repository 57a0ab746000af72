//! CPUs that come and go while the guest runs.

use super::{Microvm, not_started};
use crate::config::MachinePatch;
use crate::error::{Error, Result};
use crate::history::{self, Event};

/// The reasons why CPUs have gone: the guest, which let them go when it was asked; a reset, before which it was asked.
const BY_GUEST: &str = "guest";
const BY_RESET: &str = "reset";

impl Microvm {
    /// Changes CPUs and memory before the start; later, how many CPUs the guest has.
    pub fn patch_machine(&mut self, patch: &MachinePatch) -> Result<()> {
        let changed = self.config.machine_config.patched(patch);
        if self.machine.is_none() {
            return self.set_machine(changed);
        }
        let count = changed.vcpu_count;
        if *patch != (MachinePatch { vcpu_count: Some(count), ..MachinePatch::default() }) {
            return Err(Error::config("once the guest has started, `vcpu_count` alone can be changed"));
        }
        self.check_not_saving()?;
        self.config.check_machine(&changed)?;
        self.take_gone_cpus();
        let machine = self.machine.as_deref_mut().ok_or_else(not_started)?;
        let before = machine.cpus();
        machine.set_cpus(count)?;
        self.config.machine_config.vcpu_count = machine.cpus();
        if count > before {
            history::tell(|| Event::CpusPlugged { vcpu_count: count });
        } else if count < before {
            history::tell(|| Event::CpusAskedToGo { vcpu_count: count });
        }
        // Some may be off already.
        self.take_gone_cpus();
        Ok(())
    }

    /// Takes away the CPUs that the guest was asked to let go, before the machine is reset.
    pub(super) fn take_asked_cpus(&mut self) {
        let Some(machine) = &self.machine else { return };
        let vcpu_count = machine.staying_cpus();
        if vcpu_count != self.config.machine_config.vcpu_count {
            self.config.machine_config.vcpu_count = vcpu_count;
            history::tell(|| Event::CpusGone { vcpu_count, reason: BY_RESET });
        }
    }

    /// True if the guest can be given more CPUs while it runs, and fewer.
    pub fn has_cpus_to_come(&self) -> bool {
        self.config.machine_config.max_vcpus.is_some()
    }

    /// Takes away the CPUs that the guest has let go since this was last called.
    pub(super) fn take_gone_cpus(&mut self) {
        let Some(machine) = &mut self.machine else { return };
        if machine.take_gone_cpus() > 0 {
            let vcpu_count = machine.cpus();
            self.config.machine_config.vcpu_count = vcpu_count;
            history::tell(|| Event::CpusGone { vcpu_count, reason: BY_GUEST });
        }
    }
}
