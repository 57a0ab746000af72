//! The pvpanic device (QEMU's docs/specs/pvpanic): by it a guest says that its kernel panicked. That is
//! not its end: its own configuration decides whether it stops, resets or boots a crash kernel.

use super::fixed::{FixedDevice, Site};
use crate::bus::BusDevice;
use crate::error::Result;
use crate::part::Component;
use crate::platform::node::{AcpiDevice, AcpiValue, TreeNode};
use crate::platform::{Node, Place};
use crate::snapshot::Snapshot;
use crate::vm::exit::End;

/// It panicked.
const PANICKED: u8 = 1 << 0;
/// It panicked, and goes on with a crash kernel that it had loaded.
const CRASH_LOADED: u8 = 1 << 1;

/// One 8-bit register.
pub struct PvPanic {
    end: End,
}

impl PvPanic {
    /// A register whose writes are noted in `end`.
    pub fn new(end: End) -> Self {
        Self { end }
    }
}

impl FixedDevice for PvPanic {
    const NAME: &'static str = "pvpanic";

    fn build(_: Place, site: &mut Site<'_>) -> Result<Option<Self>> {
        Ok(Some(Self::new(site.surroundings.end.clone())))
    }
}

impl Snapshot for PvPanic {
    /// The guest's kernel has panicked.
    type State = bool;

    fn save(&self) -> Result<bool> {
        Ok(self.end.panicked())
    }

    fn restore(&mut self, panicked: bool) -> Result<()> {
        self.end.restore_panicked(panicked);
        Ok(())
    }
}

impl Component for PvPanic {
    fn nodes(&self, place: Place) -> Vec<Node> {
        let acpi = AcpiDevice::new("PEVT", AcpiValue::Text("QEMU0001"), place.resources());
        let tree =
            TreeNode::at("pvpanic", place).texts("compatible", &["qemu,pvpanic-mmio"]).registers(place);
        vec![Node::Acpi(acpi), Node::Tree(tree)]
    }
}

impl BusDevice for PvPanic {
    /// The events it understands.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == 0 {
            data[0] = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data[0]) {
            (0, event) if event & PANICKED != 0 => self.end.panicked_with("the guest panicked"),
            (0, event) if event & CRASH_LOADED != 0 => {
                self.end.panicked_with("the guest panicked; its crash kernel takes over")
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::exit::Exit;

    #[test]
    fn a_panic_is_remembered_and_is_not_the_end() {
        for (event, panicked) in [(0, false), (4, false), (0xfc, false), (1, true), (2, true), (0xff, true)] {
            let end = End::new(Default::default()).unwrap();
            let mut device = PvPanic::new(end.clone());
            device.write(1, &[1]);
            device.write(0, &[event]);
            device.write(0, &[event]);
            assert_eq!((end.panicked(), end.get()), (panicked, None), "{event:#x}");
            end.set(Exit::Reset);
            assert_eq!(end.get(), Some(if panicked { &Exit::PanicReset } else { &Exit::Reset }));
        }
    }

    #[test]
    fn a_guest_finds_the_events_it_may_send() {
        let mut device = PvPanic::new(End::new(Default::default()).unwrap());
        let mut data = [0xff; 2];
        device.read(0, &mut data);
        assert_eq!(data, [3, 0]);
        device.read(1, &mut data[..1]);
        assert_eq!(data[0], 0);
    }
}
