//! CPUs of a machine that come and go while the guest runs: told of and asked for by slots, where there are such (x86_64).
//! All CPUs are made with the machine; one that the guest has not been given has no thread that would run it.

use std::sync::{Arc, Mutex};

use super::Machine;
use super::plug::note;
use crate::arch;
use crate::config::MachineConfig;
use crate::devices::cpu_slots::CpuSlots;
use crate::error::{Error, Result};
use crate::log;
use crate::part::Part;
use crate::poll::EventFd;
use crate::vm::Vm;
use crate::vm::irq::Line;
use crate::vm::vcpu::Surroundings;
use crate::vm::vcpus::Vcpus;

impl Machine {
    /// Gives the guest CPUs until it has `count`, or asks it to let go those that it has too many
    /// ([`Self::take_gone_cpus`]).
    ///
    /// # Errors
    /// The machine has no CPUs to come, or the host gives no more threads: the guest has those that it had.
    pub fn set_cpus(&mut self, count: u16) -> Result<()> {
        let missing: Option<Vec<_>> = self.with_cpu_slots(|slots| slots.missing(count.into()).collect());
        let missing = missing.ok_or_else(|| Error::config("the machine has no CPUs that come and go"))?;
        // The guest may start them as soon as it hears of them.
        self.vcpus.give(&missing)?;
        note(self.with_cpu_slots(|slots| slots.set_count(count.into())));
        self.count_cpus();
        Ok(())
    }

    /// Takes away the CPUs that the guest has let go since this was last called, and returns how many those are.
    pub fn take_gone_cpus(&mut self) -> usize {
        let gone = self.with_cpu_slots(CpuSlots::take_gone).unwrap_or_default();
        for number in &gone {
            if let Err(error) = self.vcpus.take(*number) {
                // The CPU does not run all the same.
                log::line(error);
            }
        }
        self.count_cpus();
        gone.len()
    }

    /// How many CPUs the guest has.
    pub fn cpus(&self) -> u16 {
        self.config.machine_config.vcpu_count
    }

    /// The numbers of the CPUs that the guest has.
    pub fn given_cpus(&self) -> impl Iterator<Item = u16> {
        (0..).zip(self.vcpus.iter()).filter(|(_, vcpu)| vcpu.is_given()).map(|(number, _)| number)
    }

    /// How many CPUs the guest has that it was not asked to let go.
    pub fn staying_cpus(&self) -> u16 {
        self.with_cpu_slots(|slots| slots.staying() as u16).unwrap_or(self.cpus())
    }

    /// Has those CPUs run that the slots say the guest has, in a machine that has not run yet.
    pub(super) fn restore_cpus(&mut self) -> Result<()> {
        let given: Option<Vec<_>> = self.with_cpu_slots(|slots| slots.given().collect());
        let Some(given) = given else { return Ok(()) };
        let (expected, found) = (usize::from(self.cpus()), given.len());
        if found != expected {
            return Err(Error::config(format!(
                "the saved machine is damaged: its guest has {found} CPUs, and its configuration says {expected}"
            )));
        }
        self.vcpus.set_given(|number| given.contains(&number));
        Ok(())
    }

    pub(super) fn with_cpu_slots<R>(&self, act: impl FnOnce(&mut CpuSlots) -> R) -> Option<R> {
        self.config.machine_config.max_vcpus?;
        self.parts.with(CpuSlots::NAME, act)
    }

    fn count_cpus(&mut self) {
        if let Some(count) = self.with_cpu_slots(|slots| slots.given().count()) {
            self.config.machine_config.vcpu_count = count as u16;
        }
    }
}

/// Makes the slots of CPUs, if some can come, and has the guest have the first ones alone. `wake` is written to when it has
/// let one go.
pub fn put_slots(
    config: &MachineConfig,
    vm: &Arc<Vm>,
    surroundings: &Surroundings,
    wake: &Arc<EventFd>,
    vcpus: &mut Vcpus,
    parts: &mut Vec<Part>,
) -> Result<()> {
    let (given, Some(most)) = (config.vcpu_count, config.max_vcpus) else { return Ok(()) };
    let Some((place, gsi)) = arch::fixed_place(CpuSlots::NAME).and_then(|place| Some((place, place.gsi()?)))
    else {
        return Ok(());
    };
    let slots = CpuSlots::new(Line::Idle(vm.clone(), gsi), wake.clone(), given, most);
    let component = Arc::new(Mutex::new(slots));
    surroundings.attach(place, component.clone())?;
    vcpus.set_given(|number| number < usize::from(given));
    parts.push(Part { name: CpuSlots::NAME.to_owned(), place, metrics: Vec::new(), component });
    Ok(())
}
