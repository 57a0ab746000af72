//! Posted writes: the guest's writes to a register of which nobody needs to know at once. KVM notes them
//! in a ring that we share with it, and the guest goes on without an exit to us (KVM api,
//! KVM_REGISTER_COALESCED_MMIO).

use std::collections::BTreeMap;
use std::io::{Error as IoError, Result as IoResult};
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::{IoEventAddress, VcpuFd};

use super::Vm;

/// The size of a register.
const REGISTER: u32 = 4;

/// A register whose writes are posted.
#[derive(Clone)]
pub struct Posted {
    writes: Arc<Mutex<Writes>>,
    bits: Arc<AtomicU32>,
}

impl Posted {
    /// Has `apply` do with the bits that were written since the last time, of all values, what they say. Nobody
    /// else is told that there are no more of them before that is done: a device that went on meanwhile would
    /// see older bits applied to what it has done since.
    pub fn take(&self, apply: impl FnOnce(u32)) {
        let mut writes = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        writes.sort();
        apply(self.bits.swap(0, Ordering::SeqCst));
    }
}

/// KVM's ring, and the registers whose writes are in it. (That of kvm-ioctls belongs to the thread of
/// one vCPU.)
pub(super) struct Writes {
    page: NonNull<kvm_coalesced_mmio_ring>,
    size: usize,
    registers: BTreeMap<u64, Arc<AtomicU32>>,
}

// SAFETY: the page is ours as long as this lives; KVM's side of it is used by atomic indices.
#[allow(unsafe_code)]
unsafe impl Send for Writes {}

impl Writes {
    /// Maps the ring, which all vCPUs of a machine have in common.
    #[allow(unsafe_code)]
    fn map(vcpu: &VcpuFd) -> IoResult<Self> {
        // SAFETY: the call takes a number.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let offset = size * KVM_COALESCED_MMIO_PAGE_OFFSET as usize;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let (place, vcpu) = (std::ptr::null_mut(), vcpu.as_raw_fd());
        // SAFETY: a new mapping, where there was none.
        let page = unsafe { libc::mmap(place, size, access, libc::MAP_SHARED, vcpu, offset as libc::off_t) };
        match NonNull::new(page).filter(|_| page != libc::MAP_FAILED) {
            Some(page) => Ok(Self { page: page.cast(), size, registers: BTreeMap::new() }),
            None => Err(IoError::last_os_error()),
        }
    }

    /// Notes for each register what was written to it.
    #[allow(unsafe_code)]
    fn sort(&mut self) {
        let capacity = (self.size - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>();
        let ring = self.page.as_ptr();
        // SAFETY: the fields are of the mapped page, and aligned as the structure is.
        let (first, last, entries) = unsafe {
            let indices = (&raw mut (*ring).first, &raw mut (*ring).last);
            let entries: *const kvm_coalesced_mmio = (&raw const (*ring).coalesced_mmio).cast();
            (AtomicU32::from_ptr(indices.0), AtomicU32::from_ptr(indices.1), entries)
        };
        let end = last.load(Ordering::Acquire) as usize % capacity;
        let mut at = first.load(Ordering::Relaxed) as usize % capacity;
        while at != end {
            // SAFETY: the index is below the capacity; KVM leaves entries alone until they are taken.
            let entry = unsafe { entries.add(at).read() };
            // A part of a register, or what is none, is ignored as a device does.
            if let (Some(bits), REGISTER) = (self.registers.get(&entry.phys_addr), entry.len) {
                let [a, b, c, d, ..] = entry.data;
                bits.fetch_or(u32::from_le_bytes([a, b, c, d]), Ordering::SeqCst);
            }
            at = (at + 1) % capacity;
        }
        first.store(at as u32, Ordering::Release);
    }
}

impl Drop for Writes {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: it was mapped with this size, and nobody else knows of it.
        unsafe { libc::munmap(self.page.as_ptr().cast(), self.size) };
    }
}

impl Vm {
    /// Posts the guest's writes to the 32-bit register at `address`; `vcpu` is any of this machine's.
    /// None: this KVM cannot do that, each of them is an exit.
    pub fn post(&self, vcpu: &VcpuFd, address: u64) -> Option<Posted> {
        let mut posted = self.posted.lock().unwrap_or_else(PoisonError::into_inner);
        let writes = match &*posted {
            Some(writes) => writes.clone(),
            None => posted.insert(Arc::new(Mutex::new(Writes::map(vcpu).ok()?))).clone(),
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
    use super::*;

    /// A page that this plays KVM on.
    struct Kvm {
        posted: Posted,
        ring: *mut kvm_coalesced_mmio_ring,
        entries: *mut kvm_coalesced_mmio,
        capacity: u32,
    }

    #[allow(unsafe_code)]
    impl Kvm {
        fn new(address: u64) -> Self {
            let (size, access) = (4096, libc::PROT_READ | libc::PROT_WRITE);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a new mapping.
            let page = unsafe { libc::mmap(std::ptr::null_mut(), size, access, flags, -1, 0) };
            let ring: *mut kvm_coalesced_mmio_ring = page.cast();
            let bits = Arc::new(AtomicU32::new(0));
            let registers = [(address, bits.clone())].into();
            let writes = Arc::new(Mutex::new(Writes { page: NonNull::new(ring).unwrap(), size, registers }));
            // SAFETY: the page holds the ring.
            let entries = unsafe { (&raw mut (*ring).coalesced_mmio).cast() };
            let capacity = (size - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>();
            Self { posted: Posted { writes, bits }, ring, entries, capacity: capacity as u32 }
        }

        /// As KVM does it; false: there is no room, that is an exit.
        fn write(&mut self, phys_addr: u64, bytes: &[u8]) -> bool {
            let mut entry = kvm_coalesced_mmio { phys_addr, len: bytes.len() as u32, ..Default::default() };
            entry.data[..bytes.len()].copy_from_slice(bytes);
            // SAFETY: the page is mapped, and the index below the capacity.
            unsafe {
                let next = ((*self.ring).last + 1) % self.capacity;
                if next == (*self.ring).first {
                    return false;
                }
                self.entries.add((*self.ring).last as usize).write(entry);
                (*self.ring).last = next;
            }
            true
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
        let mut kvm = Kvm::new(0x1064);
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
        let mut kvm = Kvm::new(0x1064);
        assert_eq!(taken(&kvm.posted), 0);
        assert!(kvm.write(0x1064, &1u32.to_le_bytes()) && kvm.write(0x1064, &0x8000_0000u32.to_le_bytes()));
        // A part of it, and another.
        assert!(kvm.write(0x1064, &[2]) && kvm.write(0x1066, &[2, 2]) && kvm.write(0x2064, &[4, 0, 0, 0]));
        assert_eq!((taken(&kvm.posted), taken(&kvm.posted)), (0x8000_0001, 0));
    }

    #[test]
    fn a_ring_has_room_again_for_what_was_taken_round_after_round() {
        let mut kvm = Kvm::new(0);
        for round in 1..=5 {
            let written = (0..).take_while(|_| kvm.write(0, &u32::to_le_bytes(round))).count();
            assert_eq!(written as u32, kvm.capacity - 1);
            assert_eq!(taken(&kvm.posted), round);
        }
    }
}
