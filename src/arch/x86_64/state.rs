//! What KVM holds of a guest, as plain data: the only place that says in which order it is read and written
//! back. The CPUs must not run, and no device may raise an interrupt meanwhile.

use std::ops::DerefMut;
use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    CpuId, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, kvm_clock_data, kvm_cpuid_entry2,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::registers::{registers, set_registers_for_its_run, tell_that_it_stood_still};
use super::{CpuFeatures, InterruptController, cpuid, features, ioctls, msrs};
use crate::error::{Context, Error, Result};
use crate::platform::CpuChanges;
use crate::snapshot;

/// More model-specific registers than any KVM has: a saved state cannot keep KVM busy with more.
const MSRS_MAX: usize = 1024;
/// More words than any processor has as the registers of its FPU and extensions: those of AMX come to 11 KiB.
const XSAVE_MAX: usize = 16 << 10;

/// The interrupt controllers of a machine; which stands where in [`VmState::chips`].
const CHIPS: [(u32, &str); 3] = [
    (KVM_IRQCHIP_PIC_MASTER, "the first PIC"),
    (KVM_IRQCHIP_PIC_SLAVE, "the second PIC"),
    (KVM_IRQCHIP_IOAPIC, "the I/O APIC"),
];

const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LMA: u64 = 1 << 10;

/// What KVM holds of a machine beside its CPUs.
#[derive(Clone, Serialize, Deserialize)]
pub struct VmState {
    chips: [kvm_irqchip; CHIPS.len()],
    /// With the host's time of day at that moment, and where KVM tells it, the host's time stamp counter.
    clock: kvm_clock_data,
    /// The clock is to be put forward by the time of day that has passed since then.
    #[serde(skip)]
    follows_time_of_day: bool,
}

impl VmState {
    /// Has a restore put the guest's clock forward by the time that has passed since this was saved, by the time of
    /// day of the two hosts.
    ///
    /// # Errors
    /// The state does not say when it was saved.
    pub fn follow_time_of_day(&mut self) -> Result<()> {
        if self.clock.realtime == 0 {
            return Err(Error::config(
                "the snapshot does not say at which time of day it was taken: leave it out",
            ));
        }
        self.follows_time_of_day = true;
        Ok(())
    }
}

/// What KVM holds of a CPU.
#[derive(Clone, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// The page directory pointers of a CPU in PAE mode.
    pdptrs: Option<[u64; 4]>,
    #[serde(deserialize_with = "snapshot::at_most::<XSAVE_MAX, _, _>")]
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    #[serde(deserialize_with = "snapshot::at_most::<KVM_MAX_CPUID_ENTRIES, _, _>")]
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    /// None: KVM does not tell.
    tsc_offset: Option<u64>,
    #[serde(deserialize_with = "snapshot::at_most::<MSRS_MAX, _, _>")]
    msrs: Vec<msrs::Msr>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Returns the changes that make another CPU like this one.
    pub fn told(&self) -> CpuChanges {
        features::told(&self.cpuid, &self.msrs)
    }
}

/// What KVM holds of a machine; its lines and devices are quiet.
pub fn save_vm(vm: &VmFd, _controller: &InterruptController) -> Result<VmState> {
    let mut chips = [kvm_irqchip::default(); CHIPS.len()];
    for (chip, (id, name)) in chips.iter_mut().zip(CHIPS) {
        chip.chip_id = id;
        vm.get_irqchip(chip).with_context(|| format!("get the state of {name}"))?;
    }
    let mut clock = vm.get_clock().context("get the guest's KVM clock")?;
    if clock.flags & KVM_CLOCK_REALTIME == 0 {
        // KVM tells the time of day only of clocks that all CPUs of the guest have in common.
        clock.realtime =
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
    }
    Ok(VmState { chips, clock, follows_time_of_day: false })
}

/// Gives a machine that was just built the state of another one.
pub fn restore_vm(vm: &VmFd, _controller: &InterruptController, state: &VmState) -> Result<()> {
    let VmState { chips, clock, follows_time_of_day } = state;
    // Before the CPUs: what an I/O APIC has pending it sends to local APICs, which are then overwritten by what
    // they had received when they were saved.
    for (chip, (id, name)) in chips.iter().zip(CHIPS) {
        let chip = kvm_irqchip { chip_id: id, ..*chip };
        vm.set_irqchip(&chip).with_context(|| format!("set the state of {name}"))?;
    }
    // Without flags the clock goes on where it was; with the time of day, KVM adds what has passed since then, and
    // nothing where that lies in the future. Before the CPUs: their clock registers make KVM write the time into the
    // guest's memory.
    let flags = if *follows_time_of_day { KVM_CLOCK_REALTIME } else { 0 };
    let clock = kvm_clock_data { clock: clock.clock, realtime: clock.realtime, flags, ..Default::default() };
    vm.set_clock(&clock).context("set the guest's KVM clock")
}

/// What KVM holds of the CPUs.
pub fn save_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    vcpus: &mut [impl DerefMut<Target = VcpuFd>],
    _features: CpuFeatures,
) -> Result<Vec<VcpuState>> {
    let Some(first) = vcpus.first() else { return Ok(Vec::new()) };
    let (indices, words) = (msrs::of_cpus(kvm, first)?, ioctls::xsave_words(vm));
    let save = |(index, vcpu): (usize, &mut _)| {
        save_vcpu(vm, vcpu, &indices, words).with_context(|| format!("save CPU {index}"))
    };
    vcpus.iter_mut().map(|vcpu| &mut **vcpu).enumerate().map(save).collect()
}

fn save_vcpu(vm: &VmFd, vcpu: &mut VcpuFd, indices: &[u32], xsave_words: usize) -> Result<VcpuState> {
    // First: KVM lets a CPU take start-up interrupts that it has not seen yet, which sets other registers.
    let mp_state = vcpu.get_mp_state().context("get the run state")?;
    let regs = registers(vcpu)?;
    let sregs = vcpu.get_sregs().context("get the system registers")?;
    let is_pae = sregs.cr0 & CR0_PG != 0 && sregs.cr4 & CR4_PAE != 0 && sregs.efer & EFER_LMA == 0;
    let pdptrs = match is_pae && vm.check_extension_raw(kvm_bindings::KVM_CAP_SREGS2.into()) > 0 {
        true => ioctls::page_directory_pointers(vcpu).context("get the page directory pointers")?,
        false => None,
    };
    let xsave = ioctls::xsave(vcpu, xsave_words).context("get the registers of the FPU (XSAVE)")?;
    let xcrs = vcpu.get_xcrs().context("get the extended control registers")?;
    let debug = vcpu.get_debug_regs().context("get the debug registers")?;
    let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).context("get the CPUID")?;
    let tsc_khz = ioctls::tsc_khz(vcpu).context("get the rate of the time stamp counter")?;
    let tsc_offset = ioctls::tsc_offset(vcpu);
    // The deadline of the timer before the local APIC: a timer that goes off between the two interrupts twice,
    // which guests bear, and in the other order not at all.
    let msrs = msrs::get(vcpu, indices)?;
    let lapic = vcpu.get_lapic().context("get the local APIC")?;
    // Last: each ioctl above may turn what is pending into something else.
    let events = vcpu.get_vcpu_events().context("get the pending events")?;
    let cpuid = cpuid.as_slice().to_vec();
    Ok(VcpuState {
        mp_state,
        regs,
        sregs,
        pdptrs,
        xsave,
        xcrs,
        debug,
        lapic,
        cpuid,
        tsc_khz,
        tsc_offset,
        msrs,
        events,
    })
}

/// Gives CPUs that have not run yet the state of others. Whatever the state says, KVM or this function refuses
/// it, or the CPU is as if it had come there by itself.
pub fn restore_vcpus(
    vm: &VmFd,
    vcpus: &mut [impl DerefMut<Target = VcpuFd>],
    states: &[VcpuState],
    _features: CpuFeatures,
) -> Result<()> {
    let words = ioctls::xsave_words(vm);
    let last = vcpus.len().saturating_sub(1);
    // The saved and the new offset of the first CPU's time stamp counter.
    let mut first = None;
    for (index, (vcpu, state)) in vcpus.iter_mut().zip(states).enumerate() {
        let restored = restore_vcpu(vm, vcpu, index, state, words, first);
        restored.with_context(|| format!("restore CPU {index}"))?;
        // The last CPU has nobody after it.
        if first.is_none() && index < last {
            first = state.tsc_offset.zip(ioctls::tsc_offset(vcpu));
        }
    }
    Ok(())
}

fn restore_vcpu(
    vm: &VmFd,
    vcpu: &mut VcpuFd,
    index: usize,
    state: &VcpuState,
    xsave_words: usize,
    first: Option<(u64, u64)>,
) -> Result<()> {
    check(state, xsave_words)?;
    let VcpuState { mp_state, regs, sregs, pdptrs, xsave, xcrs, debug, lapic, .. } = state;
    let VcpuState { cpuid, tsc_khz, tsc_offset, msrs, events, .. } = state;
    // First: it says which registers there are. A CPU that was made ahead may have been told the same, which KVM takes
    // long for.
    let has_it = vcpu.get_cpuid2(cpuid.len()).is_ok_and(|told| cpuid::is_same(told.as_slice(), cpuid));
    if !has_it {
        let cpuid = CpuId::from_entries(cpuid).expect("a state has no more than KVM takes");
        vcpu.set_cpuid2(&cpuid).context("set the CPUID")?;
    }
    if ioctls::tsc_khz(vcpu).context("get the rate of the time stamp counter")? != *tsc_khz {
        let attempt = || format!("set the rate of the time stamp counter to {tsc_khz} kHz");
        vcpu.set_tsc_khz(*tsc_khz).with_context(attempt)?;
    }
    vcpu.set_mp_state(*mp_state).context("set the run state")?;
    // Before the local APIC: they hold its mode.
    match pdptrs {
        Some(pdptrs) => ioctls::set_sregs2(vcpu, sregs, *pdptrs),
        None => vcpu.set_sregs(sregs),
    }
    .context("set the system registers")?;
    match mp_state.mp_state {
        KVM_MP_STATE_RUNNABLE | KVM_MP_STATE_HALTED if index == 0 => {
            set_registers_for_its_run(vm, vcpu, regs)?
        }
        _ => vcpu.set_regs(regs).context("set the registers")?,
    }
    ioctls::set_xsave(vm, vcpu, xsave).context("set the registers of the FPU (XSAVE)")?;
    // Each call about a CPU has KVM load all of it: one that only says what a new CPU has is left out.
    if !are_as_reset(xcrs) {
        vcpu.set_xcrs(xcrs).context("set the extended control registers")?;
    }
    if *debug != debug_as_reset() {
        vcpu.set_debug_regs(debug).context("set the debug registers")?;
    }
    // Before the model-specific registers: KVM ignores a deadline of a timer that is in another mode.
    vcpu.set_lapic(lapic).context("set the local APIC")?;
    let msrs = in_order(msrs);
    let mut rest = &msrs[..];
    // KVM gives CPUs that are set to nearly the same time the same offset; where it tells, they are made as far apart
    // as they were, before anything else is set.
    if let (Some((first_saved, first_now)), Some(saved)) = (first, tsc_offset) {
        let (tsc, others) = msrs.split_at(msrs.iter().take_while(|(index, _)| *index == msrs::TSC).count());
        msrs::set(vcpu, tsc)?;
        rest = others;
        let offset = first_now.wrapping_add(saved.wrapping_sub(first_saved));
        ioctls::set_tsc_offset(vcpu, offset).context("set the offset of the time stamp counter")?;
    }
    msrs::set(vcpu, rest)?;
    // Last: what was set above may have raised or dropped some.
    vcpu.set_vcpu_events(events).context("set the pending events")?;
    // The guest's clock register is set by now: its watchdogs learn of the time that it did not run.
    if msrs.iter().any(|(index, value)| msrs::KVM_CLOCK.contains(index) && value & msrs::KVM_CLOCK_ON != 0) {
        tell_that_it_stood_still(vcpu)?;
    }
    Ok(())
}

/// Model-specific registers in the order in which KVM is to take them, which is that of its list: the time stamp counter
/// before everything that is measured by it, the deadline above all.
fn in_order(msrs: &[msrs::Msr]) -> Vec<msrs::Msr> {
    let mut msrs = msrs.to_vec();
    msrs.sort_by_key(|(index, _)| match *index {
        msrs::TSC => 0,
        msrs::TSC_DEADLINE => 2,
        _ => 1,
    });
    msrs
}

/// Whether these are the extended control registers of a CPU after its reset: XCR0 is 1 (Intel SDM volume 1, 13.3).
fn are_as_reset(xcrs: &kvm_xcrs) -> bool {
    let set = xcrs.xcrs.get(..xcrs.nr_xcrs as usize);
    xcrs.flags == 0 && set.is_some_and(|set| set.iter().all(|one| (one.xcr, one.value) == (0, 1)))
}

/// The debug registers of a CPU after its reset (Intel SDM volume 3, "Processor State After Reset").
fn debug_as_reset() -> kvm_debugregs {
    kvm_debugregs { dr6: 0xffff_0ff0, dr7: 0x400, ..Default::default() }
}

/// Refuses what would have KVM read beyond an end.
fn check(state: &VcpuState, xsave_words: usize) -> Result<()> {
    let xsave = &state.xsave;
    if xsave.len() != xsave_words {
        return Err(Error::config(format!(
            "its saved FPU registers have {} bytes, and this host's KVM has {}: the host's processor must be \
             like that of the host that saved it",
            xsave.len() * 4,
            xsave_words * 4
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600_000_000_000;

    /// The guest's clock in a machine that was just restored.
    fn restored(state: &VmState) -> u64 {
        let vm = Kvm::new().unwrap().create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        restore_vm(&vm, &InterruptController, state).unwrap();
        vm.get_clock().unwrap().clock
    }

    #[test]
    fn a_clock_goes_on_where_it_was_or_follows_the_time_of_day() {
        let vm = Kvm::new().unwrap().create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let mut state = save_vm(&vm, &InterruptController).unwrap();
        let (saved, at) = (state.clock.clock, state.clock.realtime);
        // It was saved an hour ago.
        state.clock.realtime = at - HOUR;
        let found = restored(&state);
        assert!((saved..saved + HOUR).contains(&found), "{saved} became {found}");
        state.follow_time_of_day().unwrap();
        let found = restored(&state);
        assert!((saved + HOUR..saved + 2 * HOUR).contains(&found), "{saved} became {found}");
        // A host whose time of day is behind puts no clock back.
        state.clock.realtime = at + HOUR;
        let found = restored(&state);
        assert!((saved..saved + HOUR).contains(&found), "{saved} became {found}");
        state.clock.realtime = 0;
        assert!(state.follow_time_of_day().unwrap_err().to_string().contains("at which time of day"));
    }
}
