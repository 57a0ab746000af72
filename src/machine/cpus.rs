//! CPUs of a machine that come and go while the guest runs: told of and asked for by slots (x86_64), or switched on and
//! off by calls that this process answers (aarch64). All CPUs are made with the machine; one that the guest has not been
//! given has no thread that would run it.

use std::sync::{Arc, Mutex};

use super::Machine;
use super::plug::note;
use crate::arch;
use crate::config::MachineConfig;
use crate::devices::cpu_slots::CpuSlots;
use crate::error::{Error, Result};
use crate::log;
use crate::part::Part;
use crate::platform::Place;
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
        // Where the guest says so by switching a CPU off, the CPU is looked at.
        let asked: Vec<_> = self.with_cpu_slots(|slots| slots.asked().collect()).unwrap_or_default();
        let off: Vec<_> = asked.into_iter().filter(|number| self.vcpus.take_if_off(*number)).collect();
        self.with_cpu_slots(|slots| slots.let_go(&off));
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

    /// The numbers of the CPUs of which the guest does not hear by itself that it is to let them go.
    pub fn unheard_cpus(&self) -> Vec<u16> {
        let unheard = self.with_cpu_slots(|slots| slots.unheard().map(|number| number as u16).collect());
        unheard.unwrap_or_default()
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
        self.vcpus.follow_power()
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
    let place =
        arch::fixed_place(CpuSlots::NAME).ok_or_else(|| Error::config("CPUs do not come and go here"))?;
    let interrupt = place.gsi().map(|gsi| Line::Kvm(vm.clone(), gsi));
    let component = Arc::new(Mutex::new(CpuSlots::new(interrupt, wake.clone(), given, most)));
    if place != Place::Calls {
        surroundings.attach(place, component.clone())?;
    }
    if let Some(switch) = vm.power_switch()? {
        vcpus.set_power(switch)?;
    }
    vcpus.set_given(|number| number < usize::from(given));
    parts.push(Part { name: CpuSlots::NAME.to_owned(), place, metrics: Vec::new(), component });
    Ok(())
}
