//! x86_64: registers, CPUID, ACPI, the PVH and Linux boot protocols.

mod acpi;
mod boot;
mod cpu_slots;
mod cpuid;
mod elf;
mod features;
mod ioctls;
pub mod layout;
mod msrs;
mod registers;
mod slots;
mod state;
pub mod trap;
mod wdat;

use std::ops::Deref;

use kvm_bindings::{
    CpuId, KVM_CAP_X2APIC_API, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

pub use boot::{Entry, check_kernel, load};
pub use features::lacking;
pub use msrs::change_registers;
pub use registers::{
    await_start, boot, is_halted_for_good, is_software_kvm, refuse_instruction, tell_that_it_stood_still,
};
pub use state::{VcpuState, VmState, restore_vcpus, restore_vm, save_vcpus, save_vm};

use crate::arch::{PowerAnswer, PowerCall};
use crate::error::{Context, Error, Result};
use crate::platform::{CpuChanges, CpuidModifier, FeatureModifier, Node, Platform};

/// What uname calls this architecture.
pub const NAME: &str = "x86_64";

/// The number of this architecture in ELF files (`e_machine`).
pub const ELF_MACHINE: u16 = 62;

/// Keeps a kernel from searching a PCI bus that is not there.
pub fn no_pci_words() -> Option<&'static str> {
    Some("pci=off")
}

/// Whether boot tables of this architecture say this.
pub fn prints(node: &Node) -> bool {
    !matches!(node, Node::Tree(_) | Node::MessageTree(_) | Node::Chosen(_))
}

/// Whether a core can be given two hardware threads.
pub const HAS_SMT: bool = true;

/// Whether CPUs have a CPUID instruction.
pub const HAS_CPUID: bool = true;

/// There is none: KVM switches CPUs on, by their start-up interrupts.
pub enum PowerSwitch {}

impl PowerSwitch {
    /// There is no switch here.
    pub fn new(_vm: &VmFd, _features: CpuFeatures) -> Result<Option<Self>> {
        Ok(None)
    }

    /// As on aarch64.
    pub fn call(&self, _vcpu: &VcpuFd) -> Result<PowerCall> {
        match *self {}
    }

    /// As on aarch64.
    pub fn answer(&self, _vcpu: &VcpuFd, _answer: PowerAnswer) -> Result<()> {
        match *self {}
    }

    /// As on aarch64.
    pub fn ask_again(&self, _vcpu: &VcpuFd) -> Result<()> {
        match *self {}
    }

    /// As on aarch64.
    pub fn switch_on(&self, _vcpu: &VcpuFd, _entry: u64, _argument: u64) -> Result<()> {
        match *self {}
    }

    /// As on aarch64.
    pub fn is_on(&self, _vcpu: &VcpuFd) -> Result<bool> {
        match *self {}
    }
}

/// The command line a stock kernel gets when none is given: console on the serial port, and an end
/// that the monitor notices.
pub const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 reboot=k panic=-1";

/// The command line of a stock kernel with a virtio console. Its driver may be in a module: until that is there, the
/// serial port says what there is to say.
pub const DEFAULT_COMMAND_LINE_OF_VIRTIO: &str = "earlycon=uart8250,io,0x3f8 console=hvc0 reboot=k panic=-1";

/// With more CPUs than this, one has the APIC id 255. To a local APIC in xAPIC mode that means "all",
/// and KVM takes it so in x2APIC mode too unless told otherwise.
const XAPIC_CPUS: u16 = 255;

/// Entries of CPUID that are asked for first: today's processors have about 60, and room for all that KVM
/// may tell would be 10 KiB of every monitor's memory. What is not needed of it is given back.
const CPUID_ENTRIES: usize = 80;

/// What KVM is told of CPUs; what does not depend on the machine is asked once, ahead.
pub struct CpuModel {
    supported: CpuId,
    tsc_deadline: bool,
}

impl CpuModel {
    /// Asks KVM what it supports.
    pub fn new(kvm: &Kvm) -> Result<Self> {
        let supported = kvm
            .get_supported_cpuid(CPUID_ENTRIES)
            .or_else(|error| match error.errno() {
                libc::E2BIG => kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES),
                _ => Err(error),
            })
            .context("ask KVM for the supported CPUID")?;
        let supported = CpuId::from_entries(supported.as_slice()).expect("as many as KVM can tell of");
        Ok(Self { supported, tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer) })
    }

    /// Tells KVM what the CPUs are, before they first run: those of the host, with two of them a core if `smt`, and with
    /// `changes`.
    pub fn apply(
        &self,
        vcpus: &[impl Deref<Target = VcpuFd>],
        smt: bool,
        changes: &CpuChanges,
    ) -> Result<()> {
        let vendor = cpuid::vendor(&self.supported);
        if let Some(expected) = changes.vendor.filter(|expected| *expected.as_bytes() != vendor) {
            let vendor = String::from_utf8_lossy(&vendor);
            return Err(Error::config(format!(
                "`cpu_template` is for processors of {expected}, and this host has one of {vendor}: leave it out, or name \
                 one for {vendor}"
            )));
        }
        let topology = topology(vcpus.len() as u16, smt);
        let mut cpuid = self.of_machine(topology, &changes.cpuid)?;
        for (index, vcpu) in vcpus.iter().enumerate() {
            cpuid::set_apic_id(&mut cpuid, topology, index as u32);
            vcpu.set_cpuid2(&cpuid).with_context(|| format!("set the CPUID of vCPU {index}"))?;
        }
        Ok(())
    }

    /// Whether a machine that is built here would be told of all features that these saved CPUs were told of. Numbers
    /// that differ from host to host are no features, and stay as they were.
    ///
    /// # Errors
    /// The host lacks some: all of them are named.
    pub fn check(
        &self,
        vcpu: &VcpuFd,
        saved: &[VcpuState],
        platform: &Platform,
        modifiers: &[CpuidModifier],
    ) -> Result<()> {
        let ours = self.of_machine(topology(platform.cpus, platform.smt), modifiers)?;
        // What KVM reads back is what was saved, too, and more than it is given where it is a software KVM: such a one
        // has no say in what the processor's instruction tells.
        vcpu.set_cpuid2(&ours).context("set the CPUID")?;
        let ours = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).context("get the CPUID")?;
        for (index, state) in saved.iter().enumerate() {
            let lacking = features::lacking_of_cpuid(&state.cpuid, ours.as_slice());
            if !lacking.is_empty() {
                return Err(Error::config(format!(
                    "CPU {index} of the guest was told of what this host's processor or KVM does not have: {}: restore \
                     it on a host like the one that saved it, or boot it with less (`cpu-config`)",
                    lacking.join(", ")
                )));
            }
        }
        Ok(())
    }

    fn of_machine(&self, topology: cpuid::Topology, modifiers: &[CpuidModifier]) -> Result<CpuId> {
        match modifiers {
            [] => cpuid::machine(&self.supported, topology, self.tsc_deadline),
            modifiers => {
                let changed = cpuid::modified(&self.supported, modifiers)?;
                cpuid::machine(&changed, topology, self.tsc_deadline)
            }
        }
    }
}

fn topology(cpus: u16, smt: bool) -> cpuid::Topology {
    cpuid::Topology { cpus, threads: if smt { 2 } else { 1 } }
}

/// The guest can read registers from memory: caches are coherent for the accesses of every kind that a guest makes (Intel
/// SDM, 12.3).
pub const READS_REGISTERS_FROM_MEMORY: bool = true;

/// Interrupt messages are written to a CPU's local APIC: who wrote them does not matter.
pub const MESSAGES_NAME_THEIR_DEVICE: bool = false;

/// The number that KVM_IRQ_LINE takes for an interrupt line: the line's own (KVM api, 4.25).
pub const fn irq_of_line(gsi: u32) -> u32 {
    gsi
}

/// The routes that KVM begins with: pins of the two PICs and of the I/O APIC.
pub fn default_routes() -> Vec<kvm_irq_routing_entry> {
    let pin = |gsi: u32, irqchip: u32, pin: u32| {
        let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        entry
    };
    let pics = (0..16).map(|gsi| match gsi {
        0..8 => pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi),
        _ => pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
    });
    pics.chain((0..24).map(|gsi| pin(gsi, KVM_IRQCHIP_IOAPIC, gsi))).collect()
}

/// Makes a virtual machine.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    kvm.create_vm()
}

/// Whether a vCPU that has no state yet can enter KVM, if it is to return at once.
pub const ENTERS_WITHOUT_STATE: bool = true;

/// What must exist before the vCPUs do: with memory already there, the in-kernel PIC, I/O APIC and
/// local APICs. A change of memory regions soon after would wait for them (KVM's SRCU grace period).
pub fn before_vcpus(vm: &VmFd, cpus: u16) -> Result<()> {
    if cpus > XAPIC_CPUS {
        let api = kvm_enable_cap {
            cap: KVM_CAP_X2APIC_API,
            args: [(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK).into(), 0, 0, 0],
            ..Default::default()
        };
        vm.enable_cap(&api).context("enable interrupts to more than 255 CPUs")?;
    }
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).context("place KVM's identity map")?;
    vm.set_tss_address(layout::KVM_TSS).context("place KVM's task state segment")?;
    vm.create_irq_chip().context("create the in-kernel interrupt controllers")
}

/// Nothing to hold: KVM keeps the interrupt controllers by itself.
pub struct InterruptController;

impl InterruptController {
    /// Nothing to add for a machine like this.
    pub fn complete(&mut self, _vm: &VmFd, _platform: &mut Platform) -> Result<()> {
        Ok(())
    }
}

/// The features that CPUs are initialised with: on this architecture there are none, CPUID says what a CPU has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuFeatures(());

impl CpuFeatures {
    /// The features that `changes` ask for, of which there can be none.
    ///
    /// # Errors
    /// There is a change.
    pub fn new(changes: &[FeatureModifier]) -> Result<Self> {
        match changes {
            [] => Ok(Self(())),
            _ => Err(Error::config("`vcpu_features`: x86_64 has no features of aarch64")),
        }
    }
}

/// What must exist once the vCPUs do: nothing here.
pub fn after_vcpus(_vm: &VmFd, _vcpus: &[VcpuFd], _features: CpuFeatures) -> Result<InterruptController> {
    Ok(InterruptController)
}
