//! KVM's GIC: a GICv3 with its ITS, or, where the host has only that, a GICv2 (KVM's
//! devices/arm-vgic-v3.rst, arm-vgic.rst, arm-vgic-its.rst).

use kvm_bindings::{
    KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI, KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR,
    KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_IRQ_ROUTING_IRQCHIP, KVM_VGIC_ITS_ADDR_TYPE,
    KVM_VGIC_V2_ADDR_TYPE_CPU, KVM_VGIC_V2_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
};
use kvm_ioctls::{DeviceFd, VmFd};

use super::layout;
use crate::descriptors::Named;
use crate::error::{Context, Result};
use crate::platform::{Gic, Platform};

/// KVM's GIC, and a GICv3's ITS.
pub struct InterruptController {
    /// A GICv2 rather than a GICv3.
    pub is_v2: bool,
    /// How many CPUs it is the interrupt controller of.
    pub cpus: u32,
    /// The GIC.
    pub device: Named<DeviceFd>,
    /// The ITS of a GICv3, with PCI.
    pub its: Option<Named<DeviceFd>>,
}

/// What its descriptor is called.
const NAME: &str = "interrupt controller";

/// A guest maps registers as device memory, and its reads then pass caches by where the CPU lacks FEAT_S2FWB: it would find
/// what memory held before this process wrote to it (Arm ARM, D8.6).
pub const READS_REGISTERS_FROM_MEMORY: bool = false;

/// The ITS tells devices apart that write interrupt messages.
pub const MESSAGES_NAME_THEIR_DEVICE: bool = true;

/// The number that KVM_IRQ_LINE takes for an interrupt line: lines are shared interrupts of the GIC (KVM api, 4.25).
pub const fn irq_of_line(gsi: u32) -> u32 {
    KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | (gsi + 32)
}

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

impl InterruptController {
    /// Makes the GIC that the host's KVM has, once all vCPUs exist and are initialised, of which there are so many.
    pub fn new(vm: &VmFd, cpus: u32) -> Result<Self> {
        match create(vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3) {
            Ok(device) => set_up_v3(cpus, device),
            Err(error) if error.errno() == libc::ENODEV => set_up_v2(vm, cpus),
            Err(error) => Err(error).context("create a GICv3"),
        }
    }

    /// Notes in `platform` which GIC it is, and makes what a machine like this has beside the GIC.
    pub fn complete(&mut self, vm: &VmFd, platform: &mut Platform) -> Result<()> {
        if self.is_v2 {
            platform.gic = Some(Gic::V2(layout::GIC_MESSAGE_FRAME));
            return Ok(());
        }
        platform.gic = Some(Gic::V3);
        if platform.pci {
            let device = create(vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS)
                .context("create the GIC's ITS, which PCI needs")?;
            set(&device, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_ITS_ADDR_TYPE, layout::GIC_ITS.start)?;
            set(&device, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, 0)?;
            self.its = Some(Named::new("ITS of the interrupt controller", device));
        }
        Ok(())
    }
}

fn create(vm: &VmFd, kind: u32) -> Result<DeviceFd, kvm_ioctls::Error> {
    vm.create_device(&mut kvm_create_device { type_: kind, fd: 0, flags: 0 })
}

fn set(device: &DeviceFd, group: u32, attr: u32, value: u64) -> Result<()> {
    let attr = kvm_device_attr { group, attr: attr.into(), addr: (&raw const value) as u64, flags: 0 };
    device.set_device_attr(&attr).with_context(|| format!("set up the GIC (attribute {group}.{})", attr.attr))
}

fn set_up_v3(cpus: u32, device: DeviceFd) -> Result<InterruptController> {
    const ADDRESS: u32 = KVM_DEV_ARM_VGIC_GRP_ADDR;
    set(&device, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, layout::GIC_INTERRUPTS.into())?;
    set(&device, ADDRESS, KVM_VGIC_V3_ADDR_TYPE_DIST, layout::GIC_DISTRIBUTOR.start)?;
    set(&device, ADDRESS, KVM_VGIC_V3_ADDR_TYPE_REDIST, layout::GIC_REDISTRIBUTORS)?;
    set(&device, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, 0)?;
    Ok(InterruptController { is_v2: false, cpus, device: Named::new(NAME, device), its: None })
}

/// KVM itself says that it has at most 8 CPUs then: more have been refused.
fn set_up_v2(vm: &VmFd, cpus: u32) -> Result<InterruptController> {
    let device = create(vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2)
        .context("create an interrupt controller: this host's KVM has neither a GICv3 nor a GICv2")?;
    const ADDRESS: u32 = KVM_DEV_ARM_VGIC_GRP_ADDR;
    set(&device, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, layout::GIC_INTERRUPTS.into())?;
    set(&device, ADDRESS, KVM_VGIC_V2_ADDR_TYPE_DIST, layout::GIC_DISTRIBUTOR.start)?;
    set(&device, ADDRESS, KVM_VGIC_V2_ADDR_TYPE_CPU, layout::GIC_CPU_INTERFACE.start)?;
    set(&device, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, 0)?;
    Ok(InterruptController { is_v2: true, cpus, device: Named::new(NAME, device), its: None })
}
