//! virtio-mmio (virtio 1.2, 4.2): offsets to registers.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use super::transport::{Register, Transport};
use crate::arch::layout;
use crate::bus::BusDevice;
use crate::memory::registers::{self, RegisterPage};
use crate::platform::node::{AcpiDevice, AcpiValue, TreeNode};
use crate::platform::{Node, Place};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// No vendor of PCI's list: any value will do.
const VENDOR: u32 = u32::from_le_bytes(*b"ALUL");
/// Device configuration begins here.
pub const CONFIG: u64 = 0x100;
/// The bytes of device configuration that can be read from memory: no device has more (a vhost-user backend has 256 at
/// most).
const CONFIG_SIZE: usize = 0x100;
/// Where QueueNotify is: kicks arrive there.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Where InterruptStatus is.
pub const INTERRUPT_STATUS: u64 = 0x60;
/// Where InterruptACK is: nobody waits for what is written there.
pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
/// Where ConfigGeneration is.
pub const CONFIG_GENERATION: u64 = 0xfc;

/// The registers of one device take a page, so that they can be mapped alone.
pub const REGISTERS_SIZE: u64 = registers::SIZE;

/// What boot tables say of a device behind virtio-mmio at this place.
pub fn nodes(place: Place) -> Vec<Node> {
    let Place::Registers { range, .. } = place else { return Vec::new() };
    let number = (range.start - layout::VIRTIO_MMIO.start) / REGISTERS_SIZE;
    let acpi = AcpiDevice::new(format!("V{number:03}"), AcpiValue::Text("LNRO0005"), place.resources())
        .with("_UID", AcpiValue::Number(number as u32))
        .with("_CCA", AcpiValue::Number(1));
    let tree = TreeNode::at("virtio_mmio", place)
        .texts("compatible", &["virtio,mmio"])
        .flag("dma-coherent")
        .registers(place)
        .interrupt(place);
    vec![Node::Acpi(acpi), Node::Tree(tree)]
}

/// Offset to register (virtio 1.2, 4.2.2).
fn register(offset: u64) -> Option<Register> {
    Some(match offset {
        0x10 => Register::DeviceFeatures,
        0x14 => Register::DeviceFeaturesSelect,
        0x20 => Register::DriverFeatures,
        0x24 => Register::DriverFeaturesSelect,
        0x30 => Register::QueueSelect,
        0x34 => Register::QueueSizeMax,
        0x38 => Register::QueueSize,
        0x44 => Register::QueueReady,
        QUEUE_NOTIFY => Register::QueueNotify,
        INTERRUPT_STATUS => Register::InterruptStatus,
        INTERRUPT_ACKNOWLEDGE => Register::InterruptAcknowledge,
        0x70 => Register::Status,
        0x80 => Register::QueueDescLow,
        0x84 => Register::QueueDescHigh,
        0x90 => Register::QueueDriverLow,
        0x94 => Register::QueueDriverHigh,
        0xa0 => Register::QueueDeviceLow,
        0xa4 => Register::QueueDeviceHigh,
        CONFIG_GENERATION => Register::ConfigGeneration,
        _ => return None,
    })
}

/// The register that a driver finds at `offset`, below the device configuration.
fn value(transport: &Transport, offset: u64) -> u32 {
    match offset {
        0x00 => MAGIC,
        0x04 => VERSION,
        0x08 => transport.device_type(),
        0x0c => VENDOR,
        // Shared memory regions (0xb0 to 0xbc): all ones, there are none.
        0xb0..=0xbc => u32::MAX,
        _ => register(offset).map_or(0, |register| transport.read(register)),
    }
}

/// Writes the registers as they are now to the page that the driver reads. Two lie in that page alone.
pub(super) fn show(transport: &Transport, page: &RegisterPage) {
    for offset in (0..CONFIG).step_by(4).filter(|at| ![INTERRUPT_STATUS, CONFIG_GENERATION].contains(at)) {
        page.word(offset).store(value(transport, offset), Ordering::SeqCst);
    }
    let mut config = [0; CONFIG_SIZE];
    transport.read_config(0, &mut config);
    let (words, _) = config.as_chunks();
    for (offset, word) in (CONFIG..).step_by(4).zip(words) {
        page.word(offset).store(u32::from_le_bytes(*word), Ordering::SeqCst);
    }
}

/// A device behind virtio-mmio.
pub struct Mmio(pub Arc<Mutex<Transport>>);

impl BusDevice for Mmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let transport = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return transport.read_config(offset, data);
        }
        // Registers are read whole (4.2.2.2).
        match <&mut [u8; 4]>::try_from(data) {
            Ok(data) => *data = value(&transport, offset).to_le_bytes(),
            Err(_) => log_width(),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut transport = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return transport.write_config(offset, data);
        }
        match (register(offset), <[u8; 4]>::try_from(data)) {
            (Some(register), Ok(data)) => {
                let stopping = transport.write(register, u32::from_le_bytes(data));
                drop(transport);
                stopping.wait();
            }
            (_, Err(_)) => log_width(),
            (None, _) => {}
        }
    }
}

fn log_width() {
    crate::log::guest_line("the guest accessed a virtio register with a width other than 32 bits: ignored");
}
