//! The files of the loader, none of which needs KVM.

#[path = "../../../../src/arch/aarch64/boot.rs"]
pub mod boot;
#[path = "../../../../src/arch/aarch64/fdt.rs"]
pub mod fdt;
#[path = "../../../../src/arch/aarch64/layout.rs"]
pub mod layout;
#[path = "../../../../src/arch/aarch64/unpack.rs"]
pub mod unpack;
