//! Posted writes: the guest's writes to a register of which nobody needs to know at once. KVM notes them
//! in a ring that we share with it, and the guest goes on without an exit to us (KVM api,
//! KVM_REGISTER_COALESCED_MMIO).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::{IoEventAddress, VcpuFd};

use super::Vm;
use crate::kvm::PostedRing;

/// The size of a register.
const REGISTER: u32 = 4;

/// A register whose writes are posted.
#[derive(Clone)]
pub struct Posted {
    writes: Arc<Mutex<Writes>>,
    bits: Arc<AtomicU32>,
}

impl Posted {
    /// Calls `apply` with the bits of all values that were written since the last call. Other callers wait until
    /// `apply` has returned: one that found no bits and went on meanwhile would have older bits applied to what it
    /// has done since.
    pub fn take(&self, apply: impl FnOnce(u32)) {
        let mut writes = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        writes.sort();
        apply(self.bits.swap(0, Ordering::SeqCst));
    }
}

/// KVM's ring, and the registers whose writes are in it.
pub(super) struct Writes {
    ring: PostedRing,
    registers: BTreeMap<u64, Arc<AtomicU32>>,
}

impl Writes {
    fn new(ring: PostedRing) -> Self {
        Self { ring, registers: BTreeMap::new() }
    }

    /// Notes for each register what was written to it.
    fn sort(&mut self) {
        self.ring.take(|entry| {
            // A part of a register, or what is none, is ignored as a device does.
            if let (Some(bits), REGISTER) = (self.registers.get(&entry.phys_addr), entry.len) {
                let [a, b, c, d, ..] = entry.data;
                bits.fetch_or(u32::from_le_bytes([a, b, c, d]), Ordering::SeqCst);
            }
        });
    }
}

impl Vm {
    /// Posts the guest's writes to the 32-bit register at `address`; `vcpu` is any of this machine's.
    /// None: this KVM cannot do that, each of them is an exit.
    pub fn post(&self, vcpu: &VcpuFd, address: u64) -> Option<Posted> {
        let mut posted = self.posted.lock().unwrap_or_else(PoisonError::into_inner);
        let writes = match &*posted {
            Some(writes) => writes.clone(),
            None => posted.insert(Arc::new(Mutex::new(Writes::new(PostedRing::map(vcpu).ok()?)))).clone(),
        };
        let bits = Arc::new(AtomicU32::new(0));
        self.fd.register_coalesced_mmio(IoEventAddress::Mmio(address), REGISTER).ok()?;
        writes.lock().unwrap_or_else(PoisonError::into_inner).registers.insert(address, bits.clone());
        Some(Posted { writes, bits })
    }

    /// Undoes `post`: each write to the register at `address` is an exit again.
    pub fn unpost(&self, address: u64) {
        let posted = self.posted.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(writes) = &*posted else { return };
        // A register that could not be posted is none whose writes KVM keeps.
        let _ = self.fd.unregister_coalesced_mmio(IoEventAddress::Mmio(address), REGISTER);
        writes.lock().unwrap_or_else(PoisonError::into_inner).registers.remove(&address);
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_coalesced_mmio;

    use super::*;

    /// A ring that this plays KVM on.
    struct Kvm {
        posted: Posted,
    }

    impl Kvm {
        fn new(address: u64) -> Self {
            let bits = Arc::new(AtomicU32::new(0));
            let mut writes = Writes::new(PostedRing::for_test());
            writes.registers.insert(address, bits.clone());
            Self { posted: Posted { writes: Arc::new(Mutex::new(writes)), bits } }
        }

        /// As KVM does it; false: there is no room, that is an exit.
        fn write(&self, phys_addr: u64, bytes: &[u8]) -> bool {
            let mut entry = kvm_coalesced_mmio { phys_addr, len: bytes.len() as u32, ..Default::default() };
            entry.data[..bytes.len()].copy_from_slice(bytes);
            self.posted.writes.lock().unwrap().ring.note(entry)
        }
    }

    /// The bits that are there.
    fn taken(posted: &Posted) -> u32 {
        let mut taken = 0;
        posted.take(|bits| taken = bits);
        taken
    }

    #[test]
    fn bits_are_applied_before_anybody_hears_that_there_are_none() {
        let kvm = Kvm::new(0x1064);
        assert!(kvm.write(0x1064, &1u32.to_le_bytes()));
        let posted = kvm.posted.clone();
        kvm.posted.take(|bits| {
            assert_eq!(bits, 1);
            assert!(posted.writes.try_lock().is_err(), "another one would find no bits by now");
        });
        assert_eq!(taken(&kvm.posted), 0);
    }

    #[test]
    fn the_bits_of_a_register_are_those_of_all_writes_to_it_and_of_no_others() {
        let kvm = Kvm::new(0x1064);
        assert_eq!(taken(&kvm.posted), 0);
        assert!(kvm.write(0x1064, &1u32.to_le_bytes()) && kvm.write(0x1064, &0x8000_0000u32.to_le_bytes()));
        // A part of it, and another.
        assert!(kvm.write(0x1064, &[2]) && kvm.write(0x1066, &[2, 2]) && kvm.write(0x2064, &[4, 0, 0, 0]));
        assert_eq!((taken(&kvm.posted), taken(&kvm.posted)), (0x8000_0001, 0));
    }

    #[test]
    fn a_ring_has_room_again_for_what_was_taken_round_after_round() {
        let kvm = Kvm::new(0);
        for round in 1..=5 {
            let written = (0..).take_while(|_| kvm.write(0, &u32::to_le_bytes(round))).count();
            assert_eq!(written, kvm.posted.writes.lock().unwrap().ring.room());
            assert_eq!(taken(&kvm.posted), round);
        }
    }
}
