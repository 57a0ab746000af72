//! The two architectures behind one set of names: the only place that asks which one this is.
//!
//! Each offers: `layout` (where things are in the guest's address space), `create_vm`, `before_vcpus` and
//! `after_vcpus` (the interrupt controller), `CpuModel` (what the guest's CPUs are), `load` (kernel and boot
//! tables into memory), `boot` (the CPUs' registers), `await_start`, `is_halted_for_good`, `internal_error`,
//! `VmState` and `VcpuState` with `save_vm`, `restore_vm`, `save_vcpus` and `restore_vcpus` (what KVM holds of a
//! guest), `PowerSwitch` (CPUs that this process switches on and off), `default_routes` (interrupts), `trap` (registers of a system call), `prints` (of what parts say, what is for its boot tables), and a few words of
//! what it has and what its kernels are told.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
pub use aarch64::*;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

mod kernel;
mod power;

pub use power::{PowerAnswer, PowerCall};

/// The place of the device of this name that is in `memory` of a guest; none: this architecture does not have the
/// device.
pub fn place_in_memory(name: &str, memory: &[crate::memory::Range]) -> Option<crate::platform::Place> {
    layout::in_memory(memory).into_iter().find(|(other, _)| *other == name).map(|(_, place)| place)
}

/// The place of the fixed device of this name; none: this architecture does not have the device.
pub fn fixed_place(name: &str) -> Option<crate::platform::Place> {
    layout::FIXED.iter().find(|(other, _)| *other == name).map(|(_, place)| *place)
}
