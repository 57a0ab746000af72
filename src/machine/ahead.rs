//! Devices of a configuration that are opened, and given places, before the machine has its shell.

use std::sync::Arc;

use super::attach::mmio_place;
use super::kept::Kept;
use super::parts::Places;
use super::shell::Base;
use super::windows;
use crate::arch::{self, layout};
use crate::config::Config;
use crate::devices::kind::ConfiguredDevice;
use crate::error::{Context, Result};
use crate::host::Host;
use crate::memory::Range;
use crate::memory::registers::RegisterPage;
use crate::memory::slots::Room;
use crate::memory::window::Window;
use crate::platform::Place;
use crate::virtio::VirtioDevice;

/// A device that is open, with its window, if it has one.
pub struct Ahead {
    /// There until the device is put in its place.
    pub device: Option<Box<dyn VirtioDevice>>,
    /// The window, in its place.
    pub window: Option<Window>,
    /// The addresses of the memory that it plugs.
    pub room: Option<Range>,
    /// The page from which the guest reads its registers, and where.
    pub registers: Option<(u64, Arc<RegisterPage>)>,
}

/// The devices of a configuration that are there before the machine has its shell, by their names: those of which KVM
/// is told as of memory, since a change of that soon after interrupt controllers are made waits for these, and those of
/// the machine before.
#[derive(Default)]
pub struct OpenedAhead {
    devices: Vec<(String, Ahead)>,
    /// The places that were given, and those that were chosen ahead.
    pub places: Places,
}

impl OpenedAhead {
    /// Opens them, but for those that were `kept`, for the machine called `id`, whose memory is at `memory`, and which is
    /// built on `base`.
    pub fn open(
        mut kept: Kept,
        id: &str,
        config: &Config,
        places: &Places,
        (memory, base): (&[Range], &Base),
        host: &mut Host,
    ) -> Result<Self> {
        // KVM has the memory of a shell that is there.
        let is_made_now = matches!(base, Base::Prepared(_));
        let reads_from_memory = arch::READS_REGISTERS_FROM_MEMORY && !config.pci && is_made_now;
        let is_ahead = |device: &&ConfiguredDevice| {
            reads_from_memory || device.kind().has_window || kept.has(&device.name())
        };
        let (mut opened, mut taken) = (Self { devices: Vec::new(), places: places.clone() }, Vec::new());
        let ahead: Vec<_> = config.devices().filter(is_ahead).collect();
        for device in ahead {
            let name = device.name();
            let own = kept.take(&name).map_or_else(|| device.open(id, host), Ok)?;
            let is_steady = own.has_steady_configuration();
            let mut ahead = Ahead::of(device, own, places, memory, &taken)?;
            taken.extend(ahead.window.as_ref().map(|window| window.range));
            if reads_from_memory && let Some(start) = opened.foresee_place(&name) {
                let is_free = opened.registers().all(|(taken, _)| *taken != start);
                ahead.registers = (is_steady && is_free).then(|| (start, RegisterPage::new()));
            }
            opened.devices.push((name, ahead));
        }
        Ok(opened)
    }

    /// Notes where the device called `name` will be behind virtio-mmio, as the machine will find it, and returns where its
    /// registers begin. None: there is no place, as will be said when the device is put there.
    fn foresee_place(&mut self, name: &str) -> Option<u64> {
        let mut all = (0..layout::DEVICE_GSIS.len() as u32).map(mmio_place);
        let place = match self.places.get(name) {
            Some(given) => all.find(|place| place == given),
            None => all.find(|place| self.places.values().all(|other| other != place)),
        }?;
        self.places.insert(name.to_owned(), place);
        match place {
            Place::Registers { range, .. } => Some(range.start),
            _ => None,
        }
    }

    /// The windows that they have.
    pub fn windows(&self) -> impl Iterator<Item = &Window> {
        self.devices.iter().filter_map(|(_, ahead)| ahead.window.as_ref())
    }

    /// The pages of their registers, and where the guest reads them.
    pub fn registers(&self) -> impl Iterator<Item = &(u64, Arc<RegisterPage>)> {
        self.devices.iter().filter_map(|(_, ahead)| ahead.registers.as_ref())
    }

    /// The places, and the device called `name`, if it is there.
    pub fn of(&mut self, name: &str) -> (&Places, Option<&mut Ahead>) {
        let device = self.devices.iter_mut().find(|(other, _)| other == name);
        (&self.places, device.map(|(_, ahead)| ahead))
    }
}

impl Ahead {
    /// A device of a machine whose memory is at `memory`, with a place for its window where `taken` has none. Nobody else
    /// knows of the window yet.
    pub fn of(
        device: &ConfiguredDevice,
        mut opened: Box<dyn VirtioDevice>,
        places: &Places,
        memory: &[Range],
        taken: &[Range],
    ) -> Result<Self> {
        let (name, attempt) = (device.name(), || format!("attach {}", device.name()));
        let find = |view| windows::put(&name, view, places, memory, taken);
        let window = opened.view().map(find).transpose().with_context(attempt)?;
        let find = |room: Room| windows::find(&name, (room.size, room.alignment), places, memory, taken);
        let room = device.room().map(find).transpose().with_context(attempt)?;
        window.iter().map(|window| window.range).chain(room).for_each(|range| opened.set_window(range));
        Ok(Self { device: Some(opened), window, room, registers: None })
    }
}
