//! Where an x86_64 machine has its identity, and the interrupt by which it tells that the identity has changed.

use super::{MSR_SPURIOUS, enable_x2apic, mask_pic, read_msr, write_msr, write32};
use crate::machine::Machine;

/// The generation ID of the virtual machine, and the page of the VM clock.
const GENERATION_ID: u64 = 0xf_ffe0;
const VM_CLOCK: u64 = 0xd_f000;
/// The I/O APIC's pin that tells of changes of the generation ID and of the VM clock.
const PIN: u32 = 3;
/// The vector that the pin is given here: the highest that has a gate, by which a guest that has told what it found, and
/// lets interrupts in to wait, goes on waiting.
pub const VECTOR: usize = 0x41;
const IO_APIC: u64 = 0xfec0_0000;
/// Interrupts that have come and were not taken: 32 vectors in each register.
const MSR_IRR: u32 = 0x820;

/// Notes where both are: the firmware does not read the code in which ACPI says so.
pub fn note_places(machine: &mut Machine) {
    (machine.generation_id, machine.vm_clock) = (GENERATION_ID, VM_CLOCK);
}

/// Has the interrupt of a changed identity come to this CPU. As long as the CPU takes none, it stays with the local APIC.
pub fn expect_identity() {
    mask_pic();
    enable_x2apic();
    write_msr(MSR_SPURIOUS, 0x1ff);
    // The two halves of the pin's entry: to the CPU 0; fixed, an edge, not masked (Intel 82093AA, 3.2.4).
    for (register, value) in [(0x11 + 2 * PIN, 0), (0x10 + 2 * PIN, VECTOR as u32)] {
        write32(IO_APIC, register);
        write32(IO_APIC + 0x10, value);
    }
}

/// Whether that interrupt has come and was not taken.
pub fn has_identity_come() -> bool {
    read_msr(MSR_IRR + VECTOR as u32 / 32) & 1 << (VECTOR % 32) != 0
}
