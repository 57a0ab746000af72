//! The devices: those at fixed places, and those that a configuration lists, each in a file of its own.

pub mod balloon;
pub mod block;
pub mod boot_timer;
pub mod change;
pub mod console;
pub mod cpu_slots;
pub mod entropy;
pub mod exit;
pub mod fixed;
pub mod generation;
pub mod gpio;
pub mod hotplug;
pub mod keyboard;
pub mod kind;
pub mod limit;
mod lock;
pub mod net;
mod notice;
mod option;
pub mod pmem;
pub mod power;
pub mod pvpanic;
mod remote;
pub mod rtc;
pub mod slots;
pub mod v2m;
pub mod vhost_user;
pub mod virtio_console;
pub mod vmclock;
pub mod vsock;
pub mod watchdog;

use crate::error::{Error, Result};
use fixed::{Site, put, put_in_memory};
use kind::DeviceKind;

/// The devices that a configuration can list, in the order that guests find them: a new one is a file
/// that implements [`kind::DeviceConfig`], its module above, and its line here.
pub static KINDS: &[DeviceKind] = &[
    DeviceKind::of::<block::Config>(),
    DeviceKind::of::<net::Config>(),
    DeviceKind::of::<entropy::Config>(),
    DeviceKind::of::<vsock::Config>(),
    DeviceKind::of::<balloon::Config>(),
    DeviceKind::of::<pmem::Config>(),
    DeviceKind::of::<hotplug::Config>(),
    DeviceKind::of::<virtio_console::console::Config>(),
    DeviceKind::of::<virtio_console::port::Config>(),
    DeviceKind::of::<vhost_user::Config>(),
];

/// Makes the devices at fixed places, in the order in which boot tables list them: a new one is a file that
/// implements [`fixed::FixedDevice`], its module above, its line here, and its place in the `layout` of each
/// architecture that has one. In a stack frame of its own: each device is made on the stack, and a machine's build,
/// which calls deep, has no room to give away.
#[inline(never)]
pub fn put_fixed(site: &mut Site<'_>) -> Result<()> {
    put::<power::Power>(site)?;
    put::<console::Console>(site)?;
    put::<keyboard::Keyboard>(site)?;
    put::<rtc::Clock>(site)?;
    put::<gpio::Gpio>(site)?;
    put::<exit::ExitRegister>(site)?;
    put::<pvpanic::PvPanic>(site)?;
    put::<boot_timer::BootTimer>(site)?;
    put::<v2m::V2m>(site)?;
    put::<watchdog::acpi::AcpiWatchdog>(site)?;
    put::<watchdog::sp805::Sp805>(site)?;
    put_in_memory::<generation::GenerationId>(site)?;
    put_in_memory::<vmclock::VmClock>(site)
}

/// The part of `config` that is read at `offset`; beyond its end there are zeros.
fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    let count = rest.len().min(data.len());
    data[..count].copy_from_slice(&rest[..count]);
}

/// Whether `id` can name a resource of the API.
pub fn check_id(id: &str) -> Result<()> {
    if id.is_empty() {
        return Err(Error::config("The ID cannot be empty."));
    }
    if !id.chars().all(|character| character.is_alphanumeric() || character == '_') {
        return Err(Error::config(
            "API Resource IDs can only contain alphanumeric characters and underscores.",
        ));
    }
    Ok(())
}
