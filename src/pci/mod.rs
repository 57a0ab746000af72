//! PCI (PCI Local Bus 3.0, 6; PCI Express 5.0, 7.2.2): one bus, its functions' configuration space by
//! ECAM and by ports, and their registers wherever the guest puts them.

pub mod config;
pub mod msix;
pub mod root;

/// Bytes of configuration space of one function.
pub const CONFIG_SIZE: u64 = 4096;
/// The most devices that the bus can have, of one function each.
pub const DEVICES_MAX: usize = 32;
