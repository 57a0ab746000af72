//! What a machine leaves to the one that comes after it: its devices, with all that they have of the host.

use super::{Machine, RunState};
use crate::devices::console::Console;
use crate::devices::fixed::FixedDevice;
use crate::host::{CONSOLE, Host, Resource};
use crate::virtio::VirtioDevice;
use crate::virtio::transport::Transport;

/// The devices of a machine that has ended, by their names, as they are at power-on. Another machine of the same
/// configuration is built with them: files stay locked and sockets bound, TAP interfaces and passt go on, and what the
/// user has changed of a device stays changed.
#[derive(Default)]
pub struct Kept {
    devices: Vec<(String, Box<dyn VirtioDevice>)>,
    /// The guest's watchdog had expired, which the next one can ask.
    pub(super) watchdog_has_expired: bool,
}

impl Kept {
    /// Whether the device of this name is among them.
    pub(super) fn has(&self, name: &str) -> bool {
        self.devices.iter().any(|(other, _)| other == name)
    }

    /// Takes the device of this name out.
    pub(super) fn take(&mut self, name: &str) -> Option<Box<dyn VirtioDevice>> {
        let index = self.devices.iter().position(|(other, _)| other == name)?;
        Some(self.devices.swap_remove(index).1)
    }
}

impl Machine {
    /// Ends the machine, which stands still, and keeps its devices. The output of its console goes back to `host`.
    pub fn retire(self: Box<Self>, host: &mut Host) -> Kept {
        debug_assert_eq!(self.state, RunState::Paused);
        if let Some(output) = self.parts.with(Console::NAME, Console::take_output) {
            host.give(CONSOLE, Resource::Console(output));
        }
        let take = |part: &crate::part::Part| {
            part.with(Transport::take_device).map(|device| (part.name.clone(), device))
        };
        Kept {
            devices: self.parts.0.iter().filter_map(take).collect(),
            watchdog_has_expired: self
                .watchdog
                .as_ref()
                .is_some_and(|watchdog| watchdog.lock().has_expired()),
        }
    }
}
