//! Calls that `kvm-ioctls` leaves to its caller's care on every architecture, each as a safe function: KVM's descriptor,
//! the pages behind memory slots, numbers that are attributes, and what a CPU and this process share.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Result as IoResult;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use kvm_bindings::{
    KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring, kvm_device_attr,
    kvm_run__bindgen_ty_1, kvm_userspace_memory_region,
};
use kvm_ioctls::{Error, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::error::{self, Context};
use crate::memory::Region;
use crate::memory::mapping::{Mapping, Window, page_size};
use crate::memory::registers::RegisterPage;
use crate::memory::window::View;

/// The numbers of two calls (linux/kvm.h).
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
const KVM_GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;

/// KVM, of which `file` is the device.
pub fn of_file(file: File) -> Kvm {
    // SAFETY: the descriptor is open and is given away whole.
    unsafe { Kvm::from_raw_fd(file.into_raw_fd()) }
}

/// The pages of a region of guest memory, mapped for as long as this lives: it has a part in the mapping or in the page
/// of registers, or whoever made the region without one keeps its pages for as long as the machine.
pub struct SlotPages {
    address: u64,
    _mapping: Option<Arc<Mapping>>,
    _registers: Option<Arc<RegisterPage>>,
}

impl SlotPages {
    /// The pages of `region`.
    pub fn of(region: &Region) -> error::Result<Self> {
        let address = region.get_host_address(MemoryRegionAddress(0)).context("find guest memory")?;
        Ok(Self { address: address as u64, _mapping: region.mapping(), _registers: None })
    }

    /// The pages of what is seen through a window.
    pub fn of_view(view: &View) -> Self {
        let mapping = view.mapping();
        let address = mapping.start().as_ptr() as u64;
        Self { address, _mapping: Some(mapping.clone()), _registers: None }
    }

    /// A page of registers.
    pub fn of_registers(page: &Arc<RegisterPage>) -> Self {
        Self { address: page.address(), _mapping: None, _registers: Some(page.clone()) }
    }
}

/// Tells KVM what a slot is; a `size` of 0 empties it. `pages` are kept for as long as the slot has them.
pub fn set_slot(
    fd: &VmFd,
    slot: u32,
    flags: u32,
    guest_phys_addr: u64,
    memory_size: u64,
    pages: &SlotPages,
) -> Result<(), Error> {
    let userspace_addr = pages.address;
    let region = kvm_userspace_memory_region { slot, flags, guest_phys_addr, memory_size, userspace_addr };
    // SAFETY: the range is mapped for the guest, and stays so for as long as the slot is in use: see `SlotPages`.
    unsafe { fd.set_user_memory_region(region) }
}

fn attribute_at(group: u32, attr: u64, value: *mut u64) -> kvm_device_attr {
    kvm_device_attr { group, attr, addr: value as u64, flags: 0 }
}

fn done(result: i32) -> Result<(), Error> {
    if result < 0 { Err(Error::last()) } else { Ok(()) }
}

/// A number of 32 or 64 bits that is an attribute of a device or a CPU of KVM's (KVM api, KVM_GET_DEVICE_ATTR).
pub fn attribute(of: &impl AsRawFd, group: u32, attr: u64) -> Result<u64, Error> {
    let mut value = 0;
    let attribute = attribute_at(group, attr, &raw mut value);
    // SAFETY: the kernel reads one structure of this type, and writes to the local that it names: no attribute that KVM
    // gives has more than 8 bytes.
    done(unsafe { ioctl_with_ref(of, KVM_GET_DEVICE_ATTR, &attribute) })?;
    Ok(value)
}

/// Sets what [`attribute`] tells.
pub fn set_attribute(of: &impl AsRawFd, group: u32, attr: u64, mut value: u64) -> Result<(), Error> {
    let attribute = attribute_at(group, attr, &raw mut value);
    // SAFETY: the kernel reads one structure of this type, and the 4 or 8 bytes of the number that it names.
    done(unsafe { ioctl_with_ref(of, KVM_SET_DEVICE_ATTR, &attribute) })
}

/// The reason, in words of 64 bits, that KVM gives for the return of its last KVM_RUN of this CPU: the union in
/// `struct kvm_run` (KVM api, 5).
pub fn exit_words(vcpu: &mut VcpuFd) -> [u64; 32] {
    let said = &raw const vcpu.get_kvm_run().__bindgen_anon_1;
    const { assert!(size_of::<[u64; 32]>() == size_of::<kvm_run__bindgen_ty_1>()) };
    // SAFETY: the union is as large, as was just seen, and has plain numbers, whatever it is that the kernel last wrote.
    unsafe { said.cast::<[u64; 32]>().read() }
}

/// The byte in `struct kvm_run` that makes the next KVM_RUN return at once (KVM api, 5). It is kept with the vCPU.
pub struct ImmediateExit(*const AtomicU8);

// SAFETY: the byte lies in the mapping of `struct kvm_run`, which lives as long as the `VcpuFd` that this is kept with,
// and it is only used as an atomic.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// That of this vCPU, which must live as long as this.
    pub fn of(fd: &mut VcpuFd) -> Self {
        let byte: *mut u8 = &raw mut fd.get_kvm_run().immediate_exit;
        Self(byte as *const AtomicU8)
    }

    /// Sets the byte.
    pub fn set(&self, value: u8) {
        // SAFETY: the pointer is valid as long as the vCPU is (see above); nobody else writes the byte but through here,
        // and the kernel reads it.
        unsafe { (*self.0).store(value, Ordering::SeqCst) };
    }
}

/// KVM's ring of the writes that it notes, which all vCPUs of a machine have in common (KVM api,
/// KVM_REGISTER_COALESCED_MMIO). The ring of `kvm-ioctls` belongs to the thread of one vCPU.
pub struct PostedRing {
    window: Window,
}

impl PostedRing {
    /// Maps the ring; `vcpu` is any of the machine's.
    pub fn map(vcpu: &VcpuFd) -> IoResult<Self> {
        let size = page_size() as usize;
        let offset = size * KVM_COALESCED_MMIO_PAGE_OFFSET as usize;
        Ok(Self { window: Window::of_descriptor(vcpu.as_raw_fd(), offset, size)? })
    }

    /// How many entries the ring has place for, of which one is always free.
    fn capacity(&self) -> usize {
        (self.window.size() - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()
    }

    fn parts(&self) -> (&AtomicU32, &AtomicU32, *mut kvm_coalesced_mmio) {
        let ring: NonNull<kvm_coalesced_mmio_ring> = self.window.start().cast();
        let ring = ring.as_ptr();
        // SAFETY: the fields are of the mapped page, and aligned as the structure is.
        unsafe {
            let indices = (&raw mut (*ring).first, &raw mut (*ring).last);
            let entries = (&raw mut (*ring).coalesced_mmio).cast();
            (AtomicU32::from_ptr(indices.0), AtomicU32::from_ptr(indices.1), entries)
        }
    }

    /// Takes everything out of the ring, in its order.
    pub fn take(&mut self, mut each: impl FnMut(kvm_coalesced_mmio)) {
        let capacity = self.capacity();
        let (first, last, entries) = self.parts();
        let end = last.load(Ordering::Acquire) as usize % capacity;
        let mut at = first.load(Ordering::Relaxed) as usize % capacity;
        while at != end {
            // SAFETY: the index is below the capacity; KVM leaves entries alone until they are taken.
            each(unsafe { entries.add(at).read() });
            at = (at + 1) % capacity;
        }
        first.store(at as u32, Ordering::Release);
    }
}

/// A ring on which a test plays KVM.
#[cfg(test)]
impl PostedRing {
    /// An empty one of a page.
    pub fn for_test() -> Self {
        Self { window: Window::for_test(4096) }
    }

    /// Notes a write as KVM does; false: there is no room, KVM would leave the guest.
    pub fn note(&self, entry: kvm_coalesced_mmio) -> bool {
        let (first, last, entries) = self.parts();
        let at = last.load(Ordering::Relaxed);
        let next = (at + 1) % self.capacity() as u32;
        if next == first.load(Ordering::Acquire) {
            return false;
        }
        // SAFETY: the index is below the capacity, and nobody takes the entry before `last` says that it is there.
        unsafe { entries.add(at as usize).write(entry) };
        last.store(next, Ordering::Release);
        true
    }

    /// How many writes fit.
    pub fn room(&self) -> usize {
        self.capacity() - 1
    }
}
