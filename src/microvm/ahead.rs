//! Parts of a machine that are made before anybody asks for one.

use super::Microvm;
use crate::carry::stored;
use crate::config::MachineConfig;
use crate::error::{Context, Result};
use crate::log;
use crate::machine::{Base, Cpus, Prepared, Shell};
use crate::sys::program;

/// The machine that is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Warm {
    /// How many CPUs it has.
    pub cpus: u16,
    /// How much memory it has.
    pub memory_mib: u64,
}

impl Warm {
    /// As a configuration says it.
    fn config(self) -> MachineConfig {
        MachineConfig { vcpu_count: self.cpus, mem_size_mib: self.memory_mib, ..MachineConfig::default() }
    }

    fn shell(self) -> Result<Base> {
        Shell::new(Prepared::new()?, self.cpus, Some(self.memory_mib)).map(Base::from)
    }
}

impl Microvm {
    /// Makes all of a machine that is like `warm` but what it is made for, and makes it again whenever it was used for
    /// one that failed.
    ///
    /// # Errors
    /// There can be no such machine, or not on this host.
    pub fn keep_warm(&mut self, warm: Warm) -> Result<()> {
        let attempt = || format!("prepare for a guest of {} CPUs and {} MiB", warm.cpus, warm.memory_mib);
        self.config.check_machine(&warm.config()).with_context(attempt)?;
        self.ahead = Some(warm.shell().with_context(attempt)?);
        self.warm = Some(warm);
        Ok(())
    }

    /// Does what does not depend on the configuration, ahead, while nobody waits. What stands in the
    /// way is told by `start`.
    pub fn prepare(&mut self) {
        if self.ahead.is_none() && self.machine.is_none() {
            let made = self.warm.map_or_else(|| Prepared::new().map(Base::from), Warm::shell);
            self.ahead = made.ok();
        }
        stored::prepare();
        program::map_code();
    }

    /// The machine came to nothing: the next one is expected as this one was.
    pub(super) fn prepare_again(&mut self) {
        if self.warm.is_some() {
            self.prepare();
        }
    }

    /// The base of a machine with these CPUs and so much memory: the shell that was made ahead, if it is for such a machine,
    /// which uses it up; else KVM is opened by `prepare`.
    pub(super) fn take_base(
        &mut self,
        cpus: Cpus,
        memory_mib: u64,
        prepare: impl FnOnce() -> Result<Prepared>,
    ) -> Result<Base> {
        match self.ahead.take() {
            Some(Base::Shell(shell)) if !is_for(&shell, cpus, memory_mib) => {
                let features =
                    if shell.cpus().features == cpus.features { "" } else { " without `vcpu_features`" };
                log::line(format_args!(
                    "the guest has {} CPUs and {memory_mib} MiB, and what was prepared (--warm) is for {} and \
                     {}{features}: it is not used",
                    cpus.count,
                    shell.cpus().count,
                    shell.memory_size() >> 20,
                ));
                // To end it takes its time. If the guest can be started without it, it is ended then.
                self.ahead = Some(Base::Shell(shell));
                prepare().map(Base::from)
            }
            Some(base) => Ok(base),
            None => prepare().map(Base::from),
        }
    }
}

fn is_for(shell: &Shell, cpus: Cpus, memory_mib: u64) -> bool {
    shell.cpus() == cpus && memory_mib.checked_mul(1 << 20) == Some(shell.memory_size())
}
