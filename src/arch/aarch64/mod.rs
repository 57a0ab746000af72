//! aarch64: vCPU features and registers, GICv3, the device tree, the Image boot protocol.

mod boot;
mod fdt;
pub mod layout;

use std::ops::Deref;

use kvm_bindings::{
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR,
    KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_IRQ_ROUTING_IRQCHIP, KVM_MP_STATE_STOPPED,
    KVM_REG_ARM_CORE, KVM_REG_ARM64, KVM_REG_SIZE_U64, KVM_VGIC_ITS_ADDR_TYPE, KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
    kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_vcpu_init,
};
use kvm_ioctls::{DeviceFd, Kvm, VcpuFd, VmFd};

pub use boot::{Entry, load};

use crate::error::{Context, Result};
use crate::platform::Platform;

/// What uname calls this architecture.
pub const NAME: &str = "aarch64";

/// The device tree says whether there is a PCI bus.
pub fn no_pci_words() -> Option<&'static str> {
    None
}

/// Whether a core can be given two hardware threads.
pub const HAS_SMT: bool = false;

/// The command line a stock kernel gets when none is given: console on the serial port, and an end
/// that the monitor notices.
pub const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 panic=-1";

/// Guest physical addresses are 40 bits wide where the host allows it: KVM's default.
const IPA_BITS: i32 = 40;

/// PSTATE at entry: EL1h, all interrupts masked.
const PSTATE_EL1H_MASKED: u64 = 0x3c5;

/// What KVM is told of CPUs: its preferred target.
pub struct CpuModel;

impl CpuModel {
    /// Nothing to ask ahead.
    pub fn new(_kvm: &Kvm) -> Result<Self> {
        Ok(Self)
    }

    /// Tells KVM what the CPUs are, before they first run: all but the first wait for PSCI CPU_ON.
    pub fn apply(&self, vm: &VmFd, vcpus: &[VcpuFd], _platform: &Platform) -> Result<()> {
        let mut target = kvm_vcpu_init::default();
        vm.get_preferred_target(&mut target).context("ask KVM for its preferred CPU")?;
        target.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
        for (index, vcpu) in vcpus.iter().enumerate() {
            vcpu.vcpu_init(&target).with_context(|| format!("initialise vCPU {index}"))?;
            target.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
        }
        Ok(())
    }
}

/// Makes a virtual machine.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    match kvm.get_host_ipa_limit() {
        limit @ 1..IPA_BITS => kvm.create_vm_with_ipa_size(limit as u32),
        _ => kvm.create_vm(),
    }
}

/// What must exist before the vCPUs do: nothing here.
pub fn before_vcpus(_vm: &VmFd, _platform: &Platform) -> Result<()> {
    Ok(())
}

/// KVM's GICv3, and its ITS.
pub struct InterruptController {
    _device: DeviceFd,
    _its: Option<DeviceFd>,
}

/// The ITS tells devices apart that write interrupt messages.
pub const MESSAGES_NAME_THEIR_DEVICE: bool = true;

/// The routes that KVM begins with: the shared interrupts.
pub fn default_routes() -> Vec<kvm_irq_routing_entry> {
    let pin = |pin: u32| {
        let mut entry =
            kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip: 0, pin };
        entry
    };
    (0..layout::GIC_INTERRUPTS - 32).map(pin).collect()
}

/// Makes the GIC and, for PCI, its ITS, once all vCPUs exist (KVM's devices/arm-vgic-v3.rst).
pub fn after_vcpus(vm: &VmFd, _vcpus: &[VcpuFd], platform: &Platform) -> Result<InterruptController> {
    let kind = kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3;
    let mut create = kvm_create_device { type_: kind, fd: 0, flags: 0 };
    let device = vm
        .create_device(&mut create)
        .context("create a GICv3: this host's interrupt controller must be a GICv3 or newer")?;
    let set_of = |device: &DeviceFd, group, attr, value: &u64| {
        let attr = kvm_device_attr { group, attr, addr: std::ptr::from_ref(value) as u64, flags: 0 };
        device
            .set_device_attr(&attr)
            .with_context(|| format!("set up the GIC (attribute {group}.{})", attr.attr))
    };
    let set = |group, attr, value: &u64| set_of(&device, group, attr, value);
    set(KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, &layout::GIC_INTERRUPTS.into())?;
    set(KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_DIST.into(), &layout::GIC_DISTRIBUTOR.start)?;
    set(KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_REDIST.into(), &layout::GIC_REDISTRIBUTORS)?;
    set(KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT.into(), &0)?;
    let mut its = None;
    if platform.pci {
        let kind = kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS;
        let mut create = kvm_create_device { type_: kind, fd: 0, flags: 0 };
        let device = vm.create_device(&mut create).context("create the GIC's ITS, which PCI needs")?;
        set_of(&device, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_ITS_ADDR_TYPE.into(), &layout::GIC_ITS.start)?;
        set_of(&device, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT.into(), &0)?;
        its = Some(device);
    }
    Ok(InterruptController { _device: device, _its: its })
}

/// A core register by its offset in `struct kvm_regs` (KVM api, 4.68).
fn core_register(offset: u64) -> u64 {
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | u64::from(KVM_REG_ARM_CORE) | (offset / 4)
}

const X0: u64 = 0;
const PC: u64 = 0x100;
const PSTATE: u64 = 0x108;

/// Puts the first CPU at `entry`; PSCI starts the others.
pub fn boot(vcpus: &[impl Deref<Target = VcpuFd>], entry: &Entry) -> Result<()> {
    for (offset, value) in [(PSTATE, PSTATE_EL1H_MASKED), (PC, entry.address), (X0, entry.fdt)] {
        vcpus[0].set_one_reg(core_register(offset), &value.to_le_bytes()).context("set the registers")?;
    }
    Ok(())
}

/// Whether this stopped CPU waits for something that only another CPU could send: PSCI CPU_OFF. A CPU
/// that spins with interrupts masked (what Linux's `halt` does) cannot be told from one at work.
pub fn is_halted_for_good(vcpu: &VcpuFd) -> Result<bool> {
    Ok(vcpu.get_mp_state().context("get the CPU's run state")?.mp_state == KVM_MP_STATE_STOPPED)
}

/// What KVM says of an internal error.
pub fn internal_error(vcpu: &mut VcpuFd, index: usize) -> String {
    let mut pc = [0; 8];
    match vcpu.get_one_reg(core_register(PC), &mut pc) {
        Ok(_) => format!("KVM reports an internal error on CPU {index} at {:#x}", u64::from_le_bytes(pc)),
        Err(_) => format!("KVM reports an internal error on CPU {index}"),
    }
}
