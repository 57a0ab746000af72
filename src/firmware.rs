//! The firmware guest (`firmware/`), built with the crate: what `alula run` boots without a kernel.

/// A kernel image of this architecture: ELF with a PVH note on x86_64, Image on aarch64.
pub static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/firmware.bin"));
