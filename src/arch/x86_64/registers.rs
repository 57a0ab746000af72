//! vCPU registers: how the first CPU begins, what tells that a CPU can never wake again, and what
//! KVM could not go on with.

use std::arch::x86_64::__cpuid;
use std::ops::Deref;

use kvm_bindings::{
    KVM_CAP_SYNC_REGS, KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION, KVM_MP_STATE_HALTED,
    KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_SYNC_X86_REGS, Msrs, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_segment,
};
use kvm_ioctls::{SyncReg, VcpuFd, VmFd};

use super::boot::{Entry, Protocol};
use super::{ioctls, layout};
use crate::error::{Context, Result};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_FIXED: u64 = 2;
const RFLAGS_IF: u64 = 1 << 9;

/// IA32_APIC_BASE: on, in x2APIC mode.
const APIC_BASE_X2APIC: u64 = 1 << 11 | 1 << 10;

/// MTRRs on, all memory write-back (SDM 3A, 11.11): without it Linux takes memory for uncached.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;

/// `__BOOT_CS`, `__BOOT_DS` of the Linux boot protocol, and a task state segment.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        s: 1,
        g: 1,
        l: long.into(),
        db: (!long).into(),
        ..Default::default()
    }
}

/// Puts the first CPU at `entry`; the others wait for their start-up interrupt as after power-on.
pub fn boot(vcpus: &[impl Deref<Target = VcpuFd>], entry: &Entry) -> Result<()> {
    let msrs = [kvm_msr_entry { index: MSR_MTRR_DEF_TYPE, data: MTRR_ON_WRITE_BACK, ..Default::default() }];
    let msrs = Msrs::from_entries(&msrs).expect("one entry is few enough");
    for vcpu in vcpus {
        vcpu.set_msrs(&msrs).context("set the model-specific registers")?;
        if vcpus.len() > usize::from(super::XAPIC_CPUS) {
            // As a PC's firmware does: else the start-up interrupt for APIC id 255 starts them all.
            let mut sregs = vcpu.get_sregs().context("get the system registers")?;
            sregs.apic_base |= APIC_BASE_X2APIC;
            vcpu.set_sregs(&sregs).context("set the system registers")?;
        }
    }
    let first = &vcpus[0];
    let mut sregs = first.get_sregs().context("get the system registers")?;
    let long = entry.protocol == Protocol::Linux64;
    sregs.cs = segment(CODE_SELECTOR, 0xb, long);
    let data = segment(DATA_SELECTOR, 0x3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, s: 0, g: 0, db: 0, ..segment(TSS_SELECTOR, 0xb, false) };
    let mut regs = kvm_regs { rip: entry.address, rflags: RFLAGS_FIXED, ..Default::default() };
    match entry.protocol {
        Protocol::Pvh => {
            sregs.cr0 = CR0_PE | CR0_ET;
            regs.rbx = entry.info;
        }
        Protocol::Linux64 => {
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            regs.rsi = entry.info;
            // The boot protocol promises a loaded GDT with these selectors; it lies in `layout::GDT`.
            sregs.gdt.base = layout::GDT;
            sregs.gdt.limit = 5 * 8 - 1;
        }
    }
    first.set_sregs(&sregs).context("set the system registers")?;
    first.set_regs(&regs).context("set the registers")
}

/// The registers of this stopped CPU.
pub fn registers(vcpu: &mut VcpuFd) -> Result<kvm_regs> {
    match vcpu.get_kvm_run().kvm_dirty_regs & u64::from(KVM_SYNC_X86_REGS) {
        0 => vcpu.get_regs().context("get the registers"),
        // The CPU was restored, and KVM takes them when it runs.
        _ => Ok(vcpu.sync_regs().regs),
    }
}

/// Has this CPU, which has not run yet and waits for no start-up interrupt, these registers. KVM takes them when the CPU
/// runs, from the page that it has in common with this process (KVM_CAP_SYNC_REGS), without a call.
///
/// Only the first CPU may have them so: one that the guest is given later is started before it runs (KVM_GET_MP_STATE), and
/// would then begin with these registers.
pub fn set_registers_for_its_run(vm: &VmFd, vcpu: &mut VcpuFd, regs: &kvm_regs) -> Result<()> {
    let fields = vm.check_extension_raw(KVM_CAP_SYNC_REGS.into()).cast_unsigned();
    if fields & KVM_SYNC_X86_REGS == 0 {
        return vcpu.set_regs(regs).context("set the registers");
    }
    vcpu.sync_regs_mut().regs = *regs;
    vcpu.set_sync_dirty_reg(SyncReg::Register);
    Ok(())
}

/// Whether this stopped CPU waits for something that no other halted CPU and no device can send:
/// HLT with interrupts off, or still waiting for its first start-up interrupt.
pub fn is_halted_for_good(vcpu: &mut VcpuFd) -> Result<bool> {
    Ok(match vcpu.get_mp_state().context("get the CPU's run state")?.mp_state {
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => true,
        KVM_MP_STATE_HALTED => registers(vcpu)?.rflags & RFLAGS_IF == 0,
        _ => false,
    })
}

/// Has this stopped CPU wait for its start-up interrupt, as after power-on.
pub fn await_start(vcpu: &VcpuFd) -> Result<()> {
    let state = kvm_mp_state { mp_state: KVM_MP_STATE_UNINITIALIZED };
    vcpu.set_mp_state(state).context("set the CPU's run state")
}

/// Has this CPU's guest told, by its KVM clock, that it stood still: its watchdogs then let the time pass
/// that it cannot account for (KVM api, KVM_KVMCLOCK_CTRL).
pub fn tell_that_it_stood_still(vcpu: &VcpuFd) -> Result<()> {
    match vcpu.kvmclock_ctrl() {
        // The guest has no KVM clock, or none yet.
        Err(error) if error.errno() == libc::EINVAL => Ok(()),
        result => result.context("KVM_KVMCLOCK_CTRL"),
    }
}

/// Invalid opcode, the exception for an instruction that a processor does not have.
const INVALID_OPCODE: u8 = 6;

/// Lets the guest go on after an instruction that KVM had to do for it and could not, an unusual access to
/// registers of a device or code outside of memory: it gets an exception. Says what was done, or why it
/// cannot be: KVM went out of the guest for another reason, or this host's KVM is the one to blame.
pub fn refuse_instruction(vcpu: &mut VcpuFd, index: usize) -> Result<String, String> {
    let reason = vcpu.get_kvm_run().exit_reason;
    if reason != KVM_EXIT_INTERNAL_ERROR {
        return Err(format!("KVM_RUN on CPU {index} returned an exit of the unknown kind {reason}"));
    }
    let (text, is_instruction) = internal_error(vcpu, index);
    if !is_instruction || is_software_kvm() {
        return Err(text);
    }
    raise_invalid_opcode(vcpu).map_err(|error| format!("{text}; {error}"))?;
    Ok(format!("{text}; it gets an exception for it"))
}

/// KVM has done so itself in most cases before it told us.
fn raise_invalid_opcode(vcpu: &VcpuFd) -> Result<()> {
    let mut events = vcpu.get_vcpu_events().context("get the CPU's events")?;
    let exception = &mut events.exception;
    if exception.injected == 0 && exception.pending == 0 {
        (exception.injected, exception.nr, exception.has_error_code) = (1, INVALID_OPCODE, 0);
        vcpu.set_vcpu_events(&events).context("set the CPU's events")?;
    }
    Ok(())
}

/// What KVM says of an internal error (KVM api, 5, KVM_EXIT_INTERNAL_ERROR), with what can be done; and
/// whether it is about one instruction.
fn internal_error(vcpu: &mut VcpuFd, index: usize) -> (String, bool) {
    let (suberror, data) = ioctls::internal_error(vcpu);
    let (rip, mode) = match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(regs), Ok(sregs)) => (
            format!("{:#x}", regs.rip),
            format!("{}-bit, ring {}", if sregs.cs.l == 1 { 64 } else { 32 }, sregs.cs.dpl),
        ),
        _ => ("an unknown address".to_owned(), "unknown mode".to_owned()),
    };
    if suberror != KVM_INTERNAL_ERROR_EMULATION {
        return (format!("KVM reports internal error {suberror} on CPU {index} at {rip} ({mode})"), false);
    }
    // data[0] is flags; bit 0: the instruction's bytes follow, a length byte first.
    let bytes: Vec<u8> = data.iter().skip(1).flat_map(|word| word.to_le_bytes()).collect();
    let instruction = match bytes.split_first() {
        Some((length, bytes)) if data.first().is_some_and(|flags| flags & 1 != 0) => {
            let shown = bytes.iter().take(usize::from(*length).min(15));
            format!(" `{}`", shown.map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" "))
        }
        _ => String::new(),
    };
    let hint = if is_software_kvm() {
        "this host's KVM (kvm_pvm) has no hardware virtualisation and emulates kernel code instruction by \
         instruction: it runs only kernels built for it; run a stock kernel on a host with hardware virtualisation"
    } else {
        "the guest ran code that this host's processor or KVM does not support, or jumped to a wrong address"
    };
    (
        format!(
            "KVM could not emulate the instruction{instruction} at {rip} on CPU {index} ({mode}): {hint}"
        ),
        true,
    )
}

/// Whether this host's KVM emulates all code of kernels: what it cannot do is no fault of the guest's. Such a
/// KVM (kvm_pvm) runs where the processor has neither VMX nor SVM, of which any other needs one. The processor
/// says so (CPUID): a vCPU's thread opens no file.
pub fn is_software_kvm() -> bool {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    __cpuid(1).ecx & VMX == 0 && __cpuid(0x8000_0001).ecx & SVM == 0
}
