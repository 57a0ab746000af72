//! Notices that a guest has halted for good: with the interrupt controllers in the kernel, HLT does
//! not come back to us, so now and then we look at CPUs that have used no time since the last look.

use crate::arch;
use crate::error::Result;
use crate::history;
use crate::log;
use crate::machine::{Machine, RunState};
use crate::vm::exit::Exit;

/// CPU time after which a guest counts as having done something since it was looked at; the look
/// itself costs it some tens of microseconds.
const BUSY_NS: u64 = 5_000_000;
/// A guest that idles and could wake is looked at again after 1, 2, 4 ... and at last this many checks.
const WAIT_MAX: u32 = 64;

/// What the last check saw.
#[derive(Default)]
pub struct Watch {
    /// None: nothing was checked yet, and a guest that has just been started has used no time either.
    cpu_time_ns: Option<u64>,
    looked_ns: u64,
    wait: u32,
    next_wait: u32,
    /// The guest has halted and stays; that was told.
    is_over: bool,
}

pub fn check(machine: &mut Machine) -> Result<()> {
    if machine.state != RunState::Running || machine.halt.is_over {
        return Ok(());
    }
    // A guest whose watchdog counts does not stand still for ever.
    if machine.watchdog().is_some_and(|watchdog| watchdog.lock().ends_at().is_some()) {
        return Ok(());
    }
    let now = machine.vcpus.iter().map(|vcpu| vcpu.cpu_time_ns()).sum::<u64>();
    let watch = &mut machine.halt;
    if now - watch.looked_ns > BUSY_NS {
        watch.next_wait = 1;
    }
    watch.wait = watch.wait.min(watch.next_wait).saturating_sub(1);
    let before = watch.cpu_time_ns.replace(now);
    if before != Some(now) || watch.wait > 0 {
        return Ok(());
    }
    watch.looked_ns = now;
    watch.next_wait = (watch.next_wait * 2).clamp(1, WAIT_MAX);
    watch.wait = watch.next_wait;
    // Devices of a guest that waits for them go on while its CPUs are looked at.
    machine.vcpus.stop();
    let halted = all_halted(machine);
    if !matches!(halted, Ok(true)) {
        machine.surroundings.gate.open();
        return halted.map(|_| ());
    }
    if machine.stays_when_halted {
        machine.halt.is_over = true;
        log::guest_line(&Exit::Halted);
        history::tell(|| Exit::Halted.event());
        machine.surroundings.gate.open();
        return Ok(());
    }
    // A device that cannot stop is waited for when the process ends, where a signal can cut that short.
    if let Err(error) = machine.pause() {
        log::guest_line(&error);
    }
    machine.surroundings.end.set(Exit::Halted);
    Ok(())
}

fn all_halted(machine: &Machine) -> Result<bool> {
    // The others cannot wake, whatever the guest has sent them.
    for vcpu in machine.vcpus.iter().filter(|vcpu| vcpu.is_given()) {
        if !arch::is_halted_for_good(&mut vcpu.stopped())? {
            return Ok(false);
        }
    }
    Ok(true)
}
