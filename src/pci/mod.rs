//! PCI (PCI Local Bus 3.0, 6; PCI Express 5.0, 7.2.2): one bus and a bus behind each hotplug slot, their functions'
//! configuration space by ECAM and by ports, and their registers wherever the guest puts them and ports pass that on.

use crate::arch::layout;

pub mod config;
pub mod msix;
pub mod port;
pub mod root;

/// Bytes of configuration space of one function.
pub const CONFIG_SIZE: u64 = 4096;
/// The most devices that bus 0 can have, of one function each.
pub const DEVICES_MAX: usize = 32;
/// The most hotplug slots that a machine can have: ECAM has room for bus 0 and a bus behind each of them.
pub const SLOTS_MAX: usize = 15;
/// Places of functions: those on bus 0 by their device numbers, then those in slots, by the slots' order.
pub const PLACES_MAX: usize = DEVICES_MAX + SLOTS_MAX;

/// The number, as the guest has it, of the slot that this place is in; None: on bus 0.
pub fn slot_of(place: u32) -> Option<u32> {
    (place as usize >= DEVICES_MAX).then(|| place - DEVICES_MAX as u32 + 1)
}

const _: () =
    assert!(layout::ECAM.start + layout::ECAM.size * (1 + SLOTS_MAX as u64) <= layout::PCI_MEMORY.start);
