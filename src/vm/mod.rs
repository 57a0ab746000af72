//! One KVM virtual machine: memory regions, vCPUs, interrupt lines.

pub mod exit;
pub mod gate;
pub mod irq;
pub mod posted;
pub mod state;
pub mod vcpu;

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion};

use crate::arch::{self, CpuModel};
use crate::error::{Context, Error, Result};
use crate::event::EventFd;
use crate::memory::Regions;
use crate::platform::{CpuidModifier, MessageFrame, Platform};
use crate::timeline::Timeline;

const KVM_DEVICE: &str = "/dev/kvm";
const KVM_API_VERSION: i32 = 12;

/// KVM, open, and what it says of itself: nothing here depends on the guest.
pub struct Prepared {
    kvm: Kvm,
    vm: VmFd,
    cpu_model: CpuModel,
    timeline: Timeline,
}

impl Prepared {
    /// Opens KVM, makes a virtual machine and asks what its CPUs can be.
    pub fn new() -> Result<Self> {
        let mut timeline = Timeline::default();
        let kvm = open_kvm()?;
        let vm = create_vm(&kvm)?;
        timeline.mark("virtual machine");
        let cpu_model = CpuModel::new(&kvm)?;
        timeline.mark("CPU model");
        Ok(Self { kvm, vm, cpu_model, timeline })
    }
}

#[allow(unsafe_code)]
fn open_kvm() -> Result<Kvm> {
    let file = File::options().read(true).write(true).open(KVM_DEVICE).map_err(|error| {
        let advice = match error.kind() {
            ErrorKind::NotFound => {
                "is virtualisation on in the firmware, and is the module kvm_intel, kvm_amd or arm64's KVM loaded?"
            }
            ErrorKind::PermissionDenied => {
                "add this user to the group that owns it (`usermod -aG kvm USER`) and log in again"
            }
            _ => "is this host's KVM in working order?",
        };
        Error::host(format!("open {KVM_DEVICE}: {error}: {advice}"))
    })?;
    // SAFETY: the descriptor was just opened and is given away whole.
    let kvm = unsafe { Kvm::from_raw_fd(file.into_raw_fd()) };
    match kvm.get_api_version() {
        KVM_API_VERSION => Ok(kvm),
        other => Err(Error::host(format!(
            "{KVM_DEVICE} answers with API version {other}, {KVM_API_VERSION} is needed: it is not Linux's KVM"
        ))),
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    loop {
        match arch::create_vm(kvm) {
            // KVM_CREATE_VM is interruptible and may be asked again.
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.context("create a virtual machine"),
        }
    }
}

/// A virtual machine.
pub struct Vm {
    /// What is asked of KVM itself when the machine is saved.
    kvm: Kvm,
    fd: VmFd,
    cpu_model: CpuModel,
    max_vcpus: usize,
    routes: irq::Routes,
    connections: irq::Connections,
    /// Mapped for the first register that needs it.
    posted: Mutex<Option<Arc<Mutex<posted::Writes>>>>,
    /// Where interrupt messages are written, if that is a frame of ours.
    message_frame: Option<MessageFrame>,
    /// What its start is made of.
    pub timeline: Timeline,
    /// Made with the CPUs.
    controller: Option<arch::InterruptController>,
}

impl Vm {
    /// The machine that was prepared, with `memory` as its memory.
    pub fn new(prepared: Prepared, memory: &Regions) -> Result<Self> {
        let Prepared { kvm, vm: fd, cpu_model, mut timeline } = prepared;
        timeline.skip();
        let max_vcpus = kvm.get_max_vcpus();
        for (slot, region) in memory.iter().enumerate() {
            map(&fd, slot as u32, region)?;
        }
        timeline.mark("memory");
        Ok(Self {
            kvm,
            fd,
            cpu_model,
            max_vcpus,
            routes: irq::Routes::default(),
            connections: irq::Connections::default(),
            posted: Mutex::default(),
            message_frame: None,
            timeline,
            controller: None,
        })
    }

    /// Makes the interrupt controllers and the vCPUs; notes in `platform` what the host made of them.
    /// `modifiers` change their CPUID.
    pub fn create_vcpus(
        &mut self,
        platform: &mut Platform,
        modifiers: &[CpuidModifier],
    ) -> Result<Vec<VcpuFd>> {
        let count = platform.cpus;
        if usize::from(count) > self.max_vcpus {
            return Err(Error::config(format!(
                "{count} CPUs (`vcpu_count`, --cpus) are more than this host's KVM has: at most {}",
                self.max_vcpus
            )));
        }
        arch::before_vcpus(&self.fd, platform)?;
        self.timeline.mark("interrupt controllers");
        let vcpus = (0..u64::from(count))
            .map(|index| self.fd.create_vcpu(index).with_context(|| format!("create vCPU {index}")))
            .collect::<Result<Vec<_>>>()?;
        self.cpu_model.apply(&self.fd, &vcpus, platform, modifiers)?;
        self.controller = Some(arch::after_vcpus(&self.fd, &vcpus, platform)?);
        self.message_frame = platform.message_frame();
        self.timeline.mark("CPUs");
        Ok(vcpus)
    }

    /// Writes to `event` when the guest writes the 32-bit `value` at `address`, without leaving KVM.
    pub fn kick(&self, event: &EventFd, address: u64, value: u32) -> Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.fd.register_ioevent(event, &address, value).context("connect a queue's kick")
    }

    /// Undoes `kick`.
    pub fn unkick(&self, event: &EventFd, address: u64, value: u32) -> Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.fd.unregister_ioevent(event, &address, value).context("disconnect a queue's kick")
    }

    /// Writes to `event` when the guest writes anything at `address`.
    pub fn kick_any(&self, event: &EventFd, address: u64) -> Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.fd.register_ioevent(event, &address, NoDatamatch).context("connect a queue's kick")
    }

    /// No longer.
    pub fn unkick_any(&self, event: &EventFd, address: u64) -> Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.fd.unregister_ioevent(event, &address, NoDatamatch).context("disconnect a queue's kick")
    }
}

#[allow(unsafe_code)]
fn map(fd: &VmFd, slot: u32, region: &impl GuestMemoryRegion) -> Result<()> {
    let host = region.get_host_address(vm_memory::MemoryRegionAddress(0)).context("find guest memory")?;
    let kvm_region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: host as u64,
    };
    // SAFETY: the range is mapped as guest memory, which the machine keeps for longer than `fd`.
    let given = unsafe { fd.set_user_memory_region(kvm_region) };
    given
        .map_err(|error| match error.errno() {
            // aarch64 says EFAULT of what is beyond its guests' addresses.
            libc::EINVAL | libc::EFAULT => {
                Error::config("it takes less: give the guest less (`mem_size_mib`, --memory)")
            }
            _ => Error::host(error.to_string()),
        })
        .with_context(|| {
            format!("give KVM {} MiB of guest memory at {:#x}", region.len() >> 20, region.start_addr().0)
        })
}
