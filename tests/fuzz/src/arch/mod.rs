//! The loader of arm64 kernels as it stands in its files, so that it is fuzzed on any machine.

pub mod aarch64;

#[path = "../../../../src/arch/kernel.rs"]
pub mod kernel;
