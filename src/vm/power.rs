//! CPUs that the guest switches on and off by calls that this process answers, where CPUs come and go on aarch64: one
//! that the guest has not been given stays off. A CPU that is off waits at a gate of its own, outside of KVM: whoever
//! switches it on can take its lock.

use std::sync::{Arc, MutexGuard, TryLockError};

use kvm_ioctls::VcpuFd;

use super::vcpu::Shared;
use crate::arch::{PowerAnswer, PowerCall, PowerSwitch, await_start};
use crate::error::Result;

/// The power of a machine's CPUs.
pub struct Power {
    switch: PowerSwitch,
    /// In their order.
    cpus: Vec<Arc<Shared>>,
}

impl Power {
    /// The power of `cpus`, none of which runs.
    pub(super) fn new(switch: PowerSwitch, cpus: Vec<Arc<Shared>>) -> Self {
        Self { switch, cpus }
    }

    /// Has the gate of each CPU be as KVM says that the CPU is: none of them may run.
    pub(super) fn follow(&self) -> Result<()> {
        self.cpus.iter().try_for_each(|cpu| {
            let is_on = self.switch.is_on(&cpu.lock())?;
            if is_on {
                cpu.on.open()
            } else {
                cpu.on.close()
            }
            Ok(())
        })
    }

    /// Takes a CPU from the guest, if the CPU is off; whether it was.
    pub(super) fn take_if_off(&self, number: usize) -> bool {
        let Some(cpu) = self.cpus.get(number) else { return false };
        // One that is about to switch off holds its lock still, and one that runs holds it for as long as it likes.
        let Some(_stopped) = try_lock(cpu) else { return false };
        let is_off = !cpu.on.is_open();
        if is_off {
            cpu.given.close();
        }
        is_off
    }

    /// Answers the call for which the CPU with this number, `caller`, has left the guest.
    pub(super) fn answer(&self, caller: &VcpuFd, number: usize) -> Result<()> {
        match self.switch.call(caller)? {
            PowerCall::Off => {
                // In this order: a guest that finds the CPU off (AFFINITY_INFO, which KVM answers) can switch it on.
                self.cpus[number].on.close();
                await_start(caller)
            }
            PowerCall::On { cpu, entry, argument } => match self.switch_on(cpu, entry, argument)? {
                Some(answer) => self.switch.answer(caller, answer),
                // Waiting for the lock would be a deadlock with whoever stops all CPUs, and has that one already. The
                // guest calls again instead, once this CPU has looked at the gate.
                None => self.switch.ask_again(caller),
            },
        }
    }

    /// Switches a CPU on for a guest that may have it, and returns the answer. There is none yet while somebody else has the
    /// CPU, to switch it on or to look at it.
    fn switch_on(&self, cpu: Option<usize>, entry: u64, argument: u64) -> Result<Option<PowerAnswer>> {
        let Some(cpu) = cpu.and_then(|number| self.cpus.get(number)) else {
            return Ok(Some(PowerAnswer::NoSuchCpu));
        };
        let refusal = || match (cpu.given.is_open(), cpu.on.is_open()) {
            (false, _) => Some(PowerAnswer::Denied),
            (true, true) => Some(PowerAnswer::WasOn),
            (true, false) => None,
        };
        // A CPU that is on holds its lock.
        if let Some(refusal) = refusal() {
            return Ok(Some(refusal));
        }
        let Some(stopped) = try_lock(cpu) else { return Ok(None) };
        // With the lock, this stays as it is.
        if let Some(refusal) = refusal() {
            return Ok(Some(refusal));
        }
        self.switch.switch_on(&stopped, entry, argument)?;
        cpu.on.open();
        Ok(Some(PowerAnswer::IsOn))
    }
}

fn try_lock(cpu: &Shared) -> Option<MutexGuard<'_, VcpuFd>> {
    match cpu.fd.try_lock() {
        Ok(stopped) => Some(stopped),
        Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}
