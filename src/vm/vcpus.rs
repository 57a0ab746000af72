//! All vCPUs of a machine, with the threads that run them.

use std::ops::Deref;
use std::sync::mpsc::channel;
use std::sync::{Arc, MutexGuard};

use kvm_ioctls::VcpuFd;

use super::brake::Brake;
use super::power::Power;
use super::vcpu::{Surroundings, Vcpu, register_kick};
use crate::arch::{self, PowerSwitch};
use crate::error::{Context, Result};

/// The vCPUs of a machine, in their order. When this is dropped, their threads end first.
pub struct Vcpus {
    all: Vec<Vcpu>,
    surroundings: Arc<Surroundings>,
}

impl Vcpus {
    /// These vCPUs, without threads. They work with `surroundings`, whose gate is theirs alone and closed.
    pub fn new(made: Vec<VcpuFd>, surroundings: &Arc<Surroundings>) -> Self {
        let all = made.into_iter().enumerate().map(|(index, fd)| Vcpu::new(index, fd)).collect();
        Self { all, surroundings: surroundings.clone() }
    }

    /// Starts the threads of those that the guest has and that have none: they wait at the gate until it is opened.
    ///
    /// # Errors
    /// The host gives no more threads.
    pub fn start(&mut self) -> Result<()> {
        if self.all.iter().any(|vcpu| vcpu.is_given() && !vcpu.has_thread()) {
            register_kick()?;
        }
        let mut given = self.all.iter_mut().enumerate().filter(|(_, vcpu)| vcpu.is_given());
        given.try_for_each(|(index, vcpu)| vcpu.start(index, &self.surroundings))
    }

    /// Has the guest have these alone, none of which has run yet.
    pub fn set_given(&mut self, is_given: impl Fn(usize) -> bool) {
        self.all.iter().enumerate().for_each(|(index, vcpu)| vcpu.set_given(is_given(index)));
    }

    /// Gives the guest these, too: each has a thread, and runs as the gate and the guest want it.
    ///
    /// # Errors
    /// The host gives no more threads: the guest has none of them.
    pub fn give(&mut self, numbers: &[usize]) -> Result<()> {
        numbers.iter().try_for_each(|number| self.all[*number].start(*number, &self.surroundings))?;
        numbers.iter().for_each(|number| self.all[*number].set_given(true));
        Ok(())
    }

    /// Takes one from the guest: when this returns, it does not run, and is as after power-on.
    pub fn take(&self, number: usize) -> Result<()> {
        let vcpu = &self.all[number];
        vcpu.set_given(false);
        vcpu.kick();
        arch::await_start(&vcpu.stopped()).with_context(|| format!("take CPU {number} from the guest"))
    }

    /// Has `switch` switch them on and off, none of which has run yet, instead of KVM.
    pub fn set_power(&self, switch: PowerSwitch) -> Result<()> {
        let power = Power::new(switch, self.all.iter().map(Vcpu::shared).collect());
        power.follow()?;
        assert!(self.surroundings.power.set(power).is_ok(), "a machine is built once");
        Ok(())
    }

    /// Has those be on that KVM says are on, if KVM does not switch them; none of them has run yet.
    pub fn follow_power(&self) -> Result<()> {
        self.surroundings.power.get().map_or(Ok(()), Power::follow)
    }

    /// Takes one from the guest that is off, where that is known; whether it was.
    pub fn take_if_off(&self, number: usize) -> bool {
        self.surroundings.power.get().is_some_and(|power| power.take_if_off(number))
    }

    /// The same for vCPUs that have not run yet: returns when what KVM makes for them when they first run is there, as far
    /// as this architecture's can have it before.
    ///
    /// # Errors
    /// The host gives no more threads.
    pub fn start_ahead(&mut self) -> Result<()> {
        register_kick()?;
        let (done, all_done) = channel();
        for (index, vcpu) in self.all.iter_mut().enumerate().filter(|(_, vcpu)| vcpu.is_given()) {
            vcpu.start_ahead(index, &self.surroundings, done.clone())?;
        }
        drop(done);
        // Nothing is ever sent: this ends when the last sender is gone.
        let _ = all_done.recv();
        Ok(())
    }

    /// Returns when none of them runs any more, until the gate is opened.
    pub fn stop(&self) {
        self.surroundings.gate.close();
        self.kick();
        drop(self.stopped());
    }

    /// All of them, stopped; waits until they are. The gate must be closed, and they must have been kicked.
    pub fn stopped(&self) -> Vec<MutexGuard<'_, VcpuFd>> {
        self.all.iter().map(Vcpu::stopped).collect()
    }

    /// A brake that slows the vCPUs down.
    ///
    /// # Errors
    /// The host gives no more threads.
    pub fn brake(&self) -> Result<Brake> {
        Brake::new(self.surroundings.gate.clone(), self.all.iter().map(Vcpu::kicker).collect())
    }

    fn kick(&self) {
        self.all.iter().for_each(Vcpu::kick);
    }
}

impl Deref for Vcpus {
    type Target = [Vcpu];

    fn deref(&self) -> &[Vcpu] {
        &self.all
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.surroundings.gate.remove();
        self.all.iter().for_each(Vcpu::remove);
        self.kick();
        self.all.iter_mut().for_each(Vcpu::join);
    }
}
