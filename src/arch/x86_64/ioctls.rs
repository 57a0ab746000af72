//! Calls of KVM on x86_64 that `kvm-ioctls` lacks or leaves to the caller's care, each as a safe function.

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Xsave, kvm_sregs, kvm_sregs2, kvm_xsave2};
use kvm_ioctls::{Cap, Error, VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

use crate::kvm;

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);

/// `pdptrs` of `struct kvm_sregs2` are valid (KVM api, KVM_GET_SREGS2).
const PDPTRS_VALID: u64 = 1;

/// A word of `struct kvm_xsave`.
const WORD: usize = 4;
/// `struct kvm_xsave` without what KVM_CAP_XSAVE2 may add to it.
const XSAVE_WORDS: usize = 1024;

fn done(result: i32) -> Result<(), Error> {
    if result < 0 { Err(Error::last()) } else { Ok(()) }
}

/// The page directory pointers that the CPU has loaded, which memory may say otherwise of by now; None: the
/// CPU's mode has none.
#[allow(unsafe_code)]
pub fn page_directory_pointers(vcpu: &VcpuFd) -> Result<Option<[u64; 4]>, Error> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the kernel writes one structure of this type, of plain numbers.
    done(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) })?;
    Ok((sregs.flags & PDPTRS_VALID != 0).then_some(sregs.pdptrs))
}

/// Sets the system registers, with these page directory pointers instead of those in memory.
#[allow(unsafe_code)]
pub fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs, pdptrs: [u64; 4]) -> Result<(), Error> {
    let kvm_sregs { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, .. } = *sregs;
    let kvm_sregs { cr0, cr2, cr3, cr4, cr8, efer, apic_base, .. } = *sregs;
    let flags = PDPTRS_VALID;
    let sregs = kvm_sregs2 {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        flags,
        pdptrs,
    };
    // SAFETY: the kernel reads one structure of this type.
    done(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), &sregs) })
}

/// The rate of this CPU's time stamp counter, in kHz. The wrapper of kvm-ioctls gives back -1 as the reason of a
/// failure.
pub fn tsc_khz(vcpu: &VcpuFd) -> Result<u32, Error> {
    vcpu.get_tsc_khz().map_err(|_| Error::last())
}

/// What KVM adds to the host's time stamp counter for this CPU (KVM's devices/vcpu.rst, 4.1); None: this KVM
/// does not tell.
pub fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    kvm::attribute(vcpu, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.into()).ok()
}

/// Sets what `tsc_offset` tells.
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), Error> {
    kvm::set_attribute(vcpu, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.into(), offset)
}

/// How many words KVM reads and writes as the FPU's and its extensions' registers of this machine's CPUs.
pub fn xsave_words(vm: &VmFd) -> usize {
    let bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    bytes.div_ceil(WORD).max(XSAVE_WORDS)
}

fn xsave_of(words: usize) -> Result<Xsave, Error> {
    // The wrapper refuses lengths that memory could not hold.
    Xsave::new(words - XSAVE_WORDS).map_err(|_| Error::new(libc::ENOMEM))
}

/// The registers of the FPU and its extensions, `words` long: `xsave_words`.
#[allow(unsafe_code)]
pub fn xsave(vcpu: &VcpuFd, words: usize) -> Result<Vec<u32>, Error> {
    let mut area = xsave_of(words)?;
    // SAFETY: the area is as long as KVM said that this machine's are.
    unsafe { vcpu.get_xsave2(&mut area) }?;
    let kvm_xsave2 { xsave, .. } = area.as_fam_struct_ref();
    Ok([&xsave.region[..], area.as_slice()].concat())
}

/// Sets the registers of the FPU and its extensions.
///
/// # Panics
/// If there are fewer than `xsave_words`.
#[allow(unsafe_code)]
pub fn set_xsave(vm: &VmFd, vcpu: &VcpuFd, words: &[u32]) -> Result<(), Error> {
    assert!(words.len() >= xsave_words(vm), "KVM would read beyond the end");
    let (region, extra) = words.split_at(XSAVE_WORDS);
    let mut area = xsave_of(words.len())?;
    area.as_mut_slice().copy_from_slice(extra);
    // SAFETY: the length stays as it is; only the numbers before it change.
    let fixed = unsafe { area.as_mut_fam_struct() };
    fixed.xsave.region.copy_from_slice(region);
    // SAFETY: the area is at least as long as KVM said that this machine's are, which was looked at above.
    unsafe { vcpu.set_xsave2(&area) }
}

/// The kind of an internal error of KVM, and the numbers that the kernel gives about the error. A caller asks after
/// KVM_RUN returned KVM_EXIT_INTERNAL_ERROR.
pub fn internal_error(vcpu: &mut VcpuFd) -> (u32, Vec<u64>) {
    // The words are `suberror` and `ndata`, of 32 bits each, and then `data`.
    let [kind, data @ ..] = kvm::exit_words(vcpu);
    let count = 16.min((kind >> 32) as usize);
    (kind as u32, data[..count].to_vec())
}
