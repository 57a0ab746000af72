//! Calls of KVM on aarch64 that `kvm-ioctls` leaves to the caller's care, each as a safe function.
#![allow(unsafe_code)]

use kvm_bindings::kvm_device_attr;
use kvm_ioctls::{DeviceFd, Error, VcpuFd};

/// A register of an interrupt controller, of 32 or 64 bits.
pub fn device_register(device: &DeviceFd, group: u32, attr: u64) -> Result<u64, Error> {
    let mut value = 0_u64;
    let mut attribute = kvm_device_attr { group, attr, addr: (&raw mut value) as u64, flags: 0 };
    // SAFETY: KVM writes 4 or 8 bytes to the local that the attribute names.
    unsafe { device.get_device_attr(&mut attribute) }?;
    Ok(value)
}

/// The guest physical address of a load or store that KVM could not do; to be asked for after KVM_RUN returned
/// KVM_EXIT_ARM_NISV.
pub fn refused_address(vcpu: &mut VcpuFd) -> u64 {
    // SAFETY: the kernel fills in this member of the union for this exit, and after another it has other plain numbers.
    unsafe { vcpu.get_kvm_run().__bindgen_anon_1.arm_nisv.fault_ipa }
}
