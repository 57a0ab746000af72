//! One KVM virtual machine: memory regions, vCPUs, interrupt lines.

pub mod brake;
pub mod exit;
pub mod gate;
pub mod irq;
pub mod posted;
pub mod power;
mod slots;
pub mod state;
pub mod vcpu;
pub mod vcpus;

use std::fs::File;
use std::io::ErrorKind;
use std::ops::Deref;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vm_memory::GuestMemoryBackend as _;

use crate::arch::{self, CpuFeatures, CpuModel, PowerSwitch};
use crate::descriptors::Name;
use crate::error::{Context, Error, Result};
use crate::kvm;
use crate::memory::registers::RegisterPage;
use crate::memory::window::Window;
use crate::memory::{Range, Region, Regions};
use crate::platform::{CpuChanges, MessageFrame, Platform};
use crate::poll::EventFd;
use crate::timeline::Timeline;
use slots::Slots;

/// The locks and atomics that the gate is made of. `tests/interleavings` compiles the file of the gate once more, with
/// those of `loom` in their place.
mod locks {
    pub use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    pub use std::sync::{Condvar, Mutex, PoisonError};
}

const KVM_DEVICE: &str = "/dev/kvm";
const KVM_API_VERSION: i32 = 12;

/// KVM, open. A copy of this process can use it as well, while a virtual machine is of use only to the process that
/// made it.
pub struct OpenKvm {
    name: Name,
    kvm: Kvm,
}

impl OpenKvm {
    /// Opens it.
    ///
    /// # Errors
    /// This host has none, or this user may not use it.
    pub fn new() -> Result<Self> {
        let kvm = open_kvm()?;
        Ok(Self { name: Name::new(&kvm, "KVM"), kvm })
    }

    /// Makes a virtual machine, whose CPUs are what saved ones were.
    ///
    /// # Errors
    /// There are as many as there may be, or no memory for another.
    pub fn prepare(self) -> Result<Prepared> {
        let Self { name, kvm } = self;
        let mut timeline = Timeline::default();
        let vm = create_vm(&kvm)?;
        timeline.mark("virtual machine");
        let names = [name, Name::new(&vm, "virtual machine")];
        Ok(Prepared { names, kvm, vm, cpu_model: None, timeline })
    }
}

/// A virtual machine, and what KVM says of itself: nothing here depends on the guest.
pub struct Prepared {
    names: [Name; 2],
    kvm: Kvm,
    vm: VmFd,
    /// None: it is asked for when it is needed.
    cpu_model: Option<CpuModel>,
    timeline: Timeline,
}

impl Prepared {
    /// Opens KVM, makes a virtual machine and asks what its CPUs can be.
    pub fn new() -> Result<Self> {
        let mut prepared = OpenKvm::new()?.prepare()?;
        prepared.cpu_model = Some(CpuModel::new(&prepared.kvm)?);
        prepared.timeline.mark("CPU model");
        Ok(prepared)
    }
}

/// Opens the device, by which nothing is asked of KVM yet.
///
/// # Errors
/// This host has none, or this user may not open it; what can be done about that.
pub fn open_device() -> Result<File> {
    File::options().read(true).write(true).open(KVM_DEVICE).map_err(|error| {
        let advice = match error.kind() {
            ErrorKind::NotFound => {
                "is virtualisation on in the firmware, and is the module kvm_intel, kvm_amd or arm64's KVM loaded?"
                    .to_owned()
            }
            ErrorKind::PermissionDenied => {
                let found = std::fs::metadata(KVM_DEVICE).map_or((0o660, None), |found| {
                    (found.mode() & 0o777, Some(found.gid()).filter(|group| *group != 0))
                });
                let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
                way_in(found.0, found.1, &groups)
            }
            _ => "is this host's KVM in working order?".to_owned(),
        };
        Error::host(format!("open {KVM_DEVICE}: {error}: {advice}"))
    })
}

fn open_kvm() -> Result<Kvm> {
    let kvm = kvm::of_file(open_device()?);
    match kvm.get_api_version() {
        KVM_API_VERSION => Ok(kvm),
        other => Err(Error::host(format!(
            "{KVM_DEVICE} answers with API version {other}, {KVM_API_VERSION} is needed: it is not Linux's KVM"
        ))),
    }
}

/// Says how a user gets access to a KVM device of this `mode` and this `group`, if that is not root's; `groups` are those of
/// the machine (group(5)).
fn way_in(mode: u32, group: Option<u32>, groups: &str) -> String {
    let name = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, number) = (fields.next()?, fields.nth(1)?);
        group.is_some_and(|group| number.parse() == Ok(group)).then_some(name)
    });
    match name {
        Some(name) if mode & 0o060 == 0o060 => {
            format!(
                "add this user to the group that owns it (`sudo usermod -aG {name} \"$USER\"`) and log in again"
            )
        }
        _ => format!(
            "it is open to no group that a user can be in (mode {mode:o}): `sudo setfacl -m u:\"$USER\":rw {KVM_DEVICE}` \
             (package acl) opens it to this user until the next boot"
        ),
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
    _names: [Name; 2],
    /// What is asked of KVM itself when the machine is saved.
    kvm: Kvm,
    fd: VmFd,
    /// The features that KVM supports. They are asked for when a CPU first needs them, and forgotten once the CPUs are
    /// settled.
    cpu_model: Mutex<Option<CpuModel>>,
    max_vcpus: usize,
    /// The features that the CPUs were initialised with.
    cpu_features: CpuFeatures,
    slots: Mutex<Slots>,
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
    /// The machine that was prepared, with `memory` as its memory, of which there may be none yet.
    pub fn new(prepared: Prepared, memory: &Regions) -> Result<Self> {
        let Prepared { names, kvm, vm: fd, cpu_model, mut timeline } = prepared;
        timeline.skip();
        let max_vcpus = kvm.get_max_vcpus();
        let mut slots = Slots::default();
        memory.iter().try_for_each(|region| slots.add(&fd, region, false).map(drop))?;
        if !slots.is_empty() {
            timeline.mark("memory");
        }
        Ok(Self {
            _names: names,
            kvm,
            fd,
            cpu_model: Mutex::new(cpu_model),
            max_vcpus,
            cpu_features: CpuFeatures::default(),
            slots: Mutex::new(slots),
            routes: irq::Routes::default(),
            connections: irq::Connections::default(),
            posted: Mutex::default(),
            message_frame: None,
            timeline,
            controller: None,
        })
    }

    /// Makes the interrupt controllers and so many vCPUs, with these features.
    ///
    /// # Errors
    /// This host's KVM has not so many, or not with all of them.
    pub fn create_vcpus(&mut self, count: u16, features: CpuFeatures) -> Result<Vec<VcpuFd>> {
        if usize::from(count) > self.max_vcpus {
            return Err(Error::config(format!(
                "{count} CPUs (`vcpu_count`, --cpus; `max_vcpus`, --max-cpus) are more than this host's KVM has: at most {}",
                self.max_vcpus
            )));
        }
        arch::before_vcpus(&self.fd, count)?;
        self.timeline.mark("interrupt controllers");
        let vcpus = (0..u64::from(count))
            .map(|index| self.fd.create_vcpu(index).with_context(|| format!("create vCPU {index}")))
            .collect::<Result<Vec<_>>>()?;
        self.controller = Some(arch::after_vcpus(&self.fd, &vcpus, features)?);
        self.cpu_features = features;
        self.timeline.mark("CPUs");
        Ok(vcpus)
    }

    /// The features that the CPUs were initialised with.
    pub fn cpu_features(&self) -> CpuFeatures {
        self.cpu_features
    }

    /// The switch of the CPUs where KVM would switch on those, too, that the guest has not been given. There is none where KVM
    /// switches on none of those. No CPU has run yet.
    ///
    /// # Errors
    /// This host's KVM has no means for it.
    pub fn power_switch(&self) -> Result<Option<PowerSwitch>> {
        PowerSwitch::new(&self.fd, self.cpu_features)
    }

    /// Makes what a machine like this has beside, once it has CPUs, and notes in `platform` what the host's KVM
    /// has of it.
    pub fn complete(&mut self, platform: &mut Platform) -> Result<()> {
        if let Some(controller) = &mut self.controller {
            controller.complete(&self.fd, platform)?;
        }
        self.message_frame = platform.message_frame();
        Ok(())
    }

    /// Has `ask` ask what KVM is told of CPUs, which KVM says here if nobody has wanted to know yet. A machine asks once:
    /// what KVM has said is 3 KiB, for which there is other use then.
    pub fn with_cpu_model<T>(&self, ask: impl FnOnce(&CpuModel) -> Result<T>) -> Result<T> {
        let model = self.lock_cpu_model().take();
        match model {
            Some(model) => ask(&model),
            None => ask(&CpuModel::new(&self.kvm)?),
        }
    }

    fn lock_cpu_model(&self) -> MutexGuard<'_, Option<CpuModel>> {
        self.cpu_model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells KVM what the CPUs are, before they first run: those of the host, with two of them a core if `smt`, and with
    /// `changes`.
    ///
    /// # Errors
    /// This host's KVM lacks what `changes` asks for, or does not take it.
    pub fn settle_cpus(
        &self,
        vcpus: &[impl Deref<Target = VcpuFd>],
        smt: bool,
        changes: &CpuChanges,
    ) -> Result<()> {
        let lacks = |number: &&u32| self.fd.check_extension_raw(u64::from(**number)) <= 0;
        if let Some(number) = changes.capabilities.iter().find(lacks) {
            return Err(Error::config(format!(
                "capability {number} of KVM (`kvm_capabilities`): this host's KVM does not have it"
            )));
        }
        self.with_cpu_model(|model| model.apply(vcpus, smt, changes))?;
        // CPUID says which registers a CPU has.
        arch::change_registers(&self.kvm, vcpus, &changes.registers)
    }

    /// Tells KVM what the CPUs most likely are, before that is known: those of the host. KVM can be told otherwise until
    /// they run.
    pub fn foresee_cpu_model(&self, vcpus: &[impl Deref<Target = VcpuFd>]) -> Result<()> {
        self.lock_cpu_model()
            .as_ref()
            .map_or(Ok(()), |model| model.apply(vcpus, false, &CpuChanges::default()))
    }

    /// Gives the guest another region of memory, in the lowest slot that is free, and returns that. `is_tracked`:
    /// KVM notes what the guest's CPUs write there. The guest may run meanwhile.
    ///
    /// # Errors
    /// It has memory there already, or KVM does not take it.
    pub fn add_memory(&self, region: &Region, is_tracked: bool) -> Result<u32> {
        self.slots().add(&self.fd, region, is_tracked)
    }

    /// Gives the guest a window, in the lowest slot that is free, and returns that. The guest may run meanwhile.
    ///
    /// # Errors
    /// The guest has memory there already, or KVM does not take it.
    pub fn add_window(&self, window: &Window) -> Result<u32> {
        self.slots().add_window(&self.fd, window)
    }

    /// Has the guest read a page of registers at `start` from memory, as [`Self::add_window`] has it see a window.
    ///
    /// # Errors
    /// KVM does not take it.
    pub fn add_registers(&self, start: u64, page: &Arc<RegisterPage>) -> Result<u32> {
        self.slots().add_registers(&self.fd, start, page)
    }

    /// Takes the region or the window that is exactly `range` from the guest; its slot is free again.
    ///
    /// # Errors
    /// There is no such region, or KVM does not give it up.
    pub fn remove_memory(&self, range: Range) -> Result<()> {
        self.slots().remove(&self.fd, range)
    }

    /// Has KVM note what the guest's CPUs write to memory from now on, or no more.
    ///
    /// # Errors
    /// KVM's.
    pub fn track_memory(&self, is_tracked: bool) -> Result<()> {
        self.slots().track(&self.fd, is_tracked)
    }

    /// Whether KVM notes what the guest's CPUs write to memory.
    pub fn tracks_memory(&self) -> bool {
        self.slots().is_tracked()
    }

    /// The pages that the guest's CPUs wrote since the last call, or since writes are noted, by region: a bit for
    /// each page of the host's size, the first of them in the lowest bit of the first word.
    ///
    /// # Errors
    /// KVM's.
    pub fn take_written(&self) -> Result<Vec<(Range, Vec<u64>)>> {
        self.slots().take_written(&self.fd)
    }

    /// Which memory slot has which addresses of the guest.
    pub fn memory_slots(&self) -> Vec<(u32, Range)> {
        self.slots().list()
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_let_in_by_the_group_of_the_device_or_alone() {
        let groups = "root:x:0:\nkvm:x:104:me\n";
        for (mode, group, expected) in [
            (0o660, Some(104), "(`sudo usermod -aG kvm \"$USER\"`) and log in again"),
            (
                0o600,
                Some(104),
                "no group that a user can be in (mode 600): `sudo setfacl -m u:\"$USER\":rw /dev/kvm` (package acl)",
            ),
            (0o640, Some(104), "(mode 640): `sudo setfacl "),
            (0o660, Some(9), "(mode 660): `sudo setfacl "),
            (0o660, None, "(mode 660): `sudo setfacl "),
        ] {
            let told = way_in(mode, group, groups);
            assert!(told.contains(expected), "{mode:o} {group:?}: {told}");
        }
    }
}
