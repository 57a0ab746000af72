//! Vectors that the guest has masked when it is saved, with KVM's own local APIC to count what comes.

use std::sync::Arc;

use alula::memory::Memory;
use alula::pci::msix::{ENTRY, Msix};
use alula::poll::EventFd;
use alula::snapshot::SaveState;
use alula::vm::Vm;
use kvm_ioctls::VcpuFd;

use crate::common::{driver, wait_for};

/// The vector of the message, and where the local APIC has its bit of those that wait (IRR; Intel SDM 3A, 11.8.4).
const VECTOR: u32 = 0x41;
const WAITING: usize = 0x200 + VECTOR as usize / 32 * 0x10;
const BIT: u8 = 1 << (VECTOR % 8);
const AT: usize = WAITING + VECTOR as usize % 32 / 8;
/// The register by which the local APIC is switched on.
const SPURIOUS: usize = 0xf0;

/// A function with two vectors in a machine of its own, whose only CPU never runs.
struct Function {
    msix: Msix,
    events: Vec<Arc<EventFd>>,
    vm: Arc<Vm>,
    cpu: VcpuFd,
    _memory: Memory,
}

impl Function {
    fn new() -> Self {
        let (vm, cpu, memory) =
            driver::vm::machine(|vm| vm.create_vcpus(1, Default::default()).unwrap().remove(0));
        let mut apic = cpu.get_lapic().unwrap();
        [0xff, 1].into_iter().enumerate().for_each(|(at, byte)| apic.regs[SPURIOUS + at] = byte as _);
        cpu.set_lapic(&apic).unwrap();
        let event = || Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap());
        let (vm, events) = (Arc::new(vm), vec![event(), event()]);
        let msix = Msix::new(vm.clone(), 1 << 3, events.clone()).unwrap();
        Self { msix, events, vm, cpu, _memory: memory }
    }

    /// Masks vector 1, or lets it go.
    fn mask(&mut self, is_masked: bool) {
        self.msix.write_table(ENTRY + 12, &u32::from(is_masked).to_le_bytes());
    }

    fn pending(&self) -> u8 {
        let mut bits = [0; 8];
        self.msix.read_pending(0, &mut bits);
        bits[0]
    }

    /// Whether the message has come to the CPU, which takes it.
    fn takes(&self) -> bool {
        self.vm.settle_interrupts().unwrap();
        let mut apic = self.cpu.get_lapic().unwrap();
        let is_there = apic.regs[AT] as u8 & BIT != 0;
        apic.regs[AT] = (apic.regs[AT] as u8 & !BIT) as _;
        self.cpu.set_lapic(&apic).unwrap();
        is_there
    }
}

#[test]
fn a_vector_pending_behind_its_mask_comes_once_after_a_restore() {
    let mut first = Function::new();
    first.msix.set_control(true, false);
    let message = [0xfee0_0000_u32.to_le_bytes(), [0; 4], VECTOR.to_le_bytes()].concat();
    first.msix.write_table(ENTRY, &message[..8]);
    first.msix.write_table(ENTRY + 8, &message[8..]);
    first.mask(false);
    first.events[1].write(1).unwrap();
    wait_for(|| first.takes());
    first.mask(true);
    assert_eq!(first.pending(), 0);
    // However often it is raised, it is one interrupt.
    (0..3).for_each(|_| first.events[1].write(1).unwrap());
    assert_eq!((first.pending(), first.takes()), (2, false));
    let saved = first.msix.save_state().unwrap();
    drop(first);

    let mut other = Function::new();
    other.msix.restore_state(&saved).unwrap();
    other.msix.connect();
    assert_eq!((other.pending(), other.takes()), (2, false), "it comes through its mask");
    // A device that goes on interrupts, as one may have been under way.
    other.events[1].write(1).unwrap();
    assert_eq!((other.pending(), other.takes()), (2, false), "it comes through its mask");
    other.mask(false);
    assert_eq!(other.pending(), 0);
    wait_for(|| other.takes());
    for is_masked in [true, false, true, false] {
        assert!(!other.takes(), "it comes a second time");
        other.mask(is_masked);
        assert_eq!(other.pending(), 0);
    }
    other.events[1].write(1).unwrap();
    wait_for(|| other.takes());
}
