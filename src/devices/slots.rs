//! The slots of the PCI bus, x86_64: the registers by which a guest is told that devices have come or gone, is asked to
//! let a device go, and says that it has. What ACPI makes of them is in `arch/x86_64/slots.rs`.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::notice::Notice;
use crate::bus::BusDevice;
use crate::error::{Error, Result};
use crate::part::Component;
use crate::pci::DEVICES_MAX;
use crate::platform::node::SlotRegisters;
use crate::platform::{Node, Place};
use crate::poll::EventFd;
use crate::snapshot::Snapshot;
use crate::vm::irq::Line;

const CAME: u64 = 0;
const LEAVING: u64 = SlotRegisters::LEAVING as u64;
const EJECT: u64 = SlotRegisters::EJECT as u64;

/// The registers. What the guest writes is taken only of devices that it was asked to let go: it can neither take away
/// what its owner has given it, nor keep anybody busy by a device that goes already.
pub struct PciSlots {
    // Host
    notice: Notice,
    /// Written to when the guest has let a device go.
    wake: Arc<EventFd>,
    // Guest-visible
    state: State,
}

/// The bits of a word are those of devices, by their numbers.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct State {
    /// Devices have come or gone, and the guest has not read so.
    has_changed: bool,
    /// The guest is asked to let these go, and has not read so.
    untold: u32,
    /// The guest is asked to let these go, and has not done it.
    asked: u32,
    /// The guest has let these go, and they are still there.
    ejected: u32,
}

impl PciSlots {
    /// The name of the part, and its place's in `layout`.
    pub const NAME: &'static str = "PCI slots";

    /// Registers that have nothing to tell. The guest is told by `interrupt` when they have; `wake` is written to when it
    /// has let a device go.
    pub fn new(interrupt: Line, wake: Arc<EventFd>) -> Self {
        Self { notice: Notice::new(interrupt, "devices"), wake, state: State::default() }
    }

    /// Tells the guest that devices have come or gone.
    pub fn tell_changed(&mut self) -> Result<()> {
        self.state.has_changed = true;
        self.notice.give()
    }

    /// Asks the guest to let the device with this number go, again if it was asked already.
    pub fn ask(&mut self, number: u32) -> Result<()> {
        let bit = bit(number).ok_or_else(|| Error::config(format!("the bus has no device {number}")))?;
        self.state.asked |= bit;
        self.state.untold |= bit;
        self.notice.give()
    }

    /// Tells the guest again of what it has not read; to be called now and then.
    pub fn remind(&mut self) -> Result<()> {
        let is_unread = self.state.has_changed || self.state.untold != 0;
        if is_unread { self.notice.repeat() } else { Ok(()) }
    }

    /// The numbers of the devices that the guest was asked to let go and that are still there.
    pub fn asked(&self) -> impl Iterator<Item = u32> + use<> {
        numbers(self.state.asked | self.state.ejected)
    }

    /// The numbers of the devices that the guest has let go since this was last called.
    pub fn take_ejected(&mut self) -> impl Iterator<Item = u32> + use<> {
        numbers(std::mem::take(&mut self.state.ejected))
    }

    /// The device with this number has gone: the next one there was not asked for.
    pub fn forget(&mut self, number: u32) {
        let kept = !bit(number).unwrap_or(0);
        let state = &mut self.state;
        (state.asked, state.untold, state.ejected) =
            (state.asked & kept, state.untold & kept, state.ejected & kept);
    }

    fn eject(&mut self, devices: u32) {
        let gone = devices & self.state.asked;
        if gone == 0 {
            return;
        }
        let state = &mut self.state;
        (state.asked, state.untold, state.ejected) =
            (state.asked & !gone, state.untold & !gone, state.ejected | gone);
        self.wake_main();
    }

    fn wake_main(&self) {
        // A counter that is full wakes as well.
        let _ = self.wake.write(1);
    }
}

fn bit(number: u32) -> Option<u32> {
    1_u32.checked_shl(number)
}

fn numbers(devices: u32) -> impl Iterator<Item = u32> {
    (0..u32::BITS).filter(move |number| devices & 1 << number != 0)
}

impl Snapshot for PciSlots {
    type State = State;

    fn save(&self) -> Result<State> {
        Ok(self.state)
    }

    fn restore(&mut self, state: State) -> Result<()> {
        self.state = state;
        if state.ejected != 0 {
            self.wake_main();
        }
        Ok(())
    }
}

impl Component for PciSlots {
    fn nodes(&self, place: Place) -> Vec<Node> {
        match place {
            // Device 0 is the bridge to the CPUs.
            Place::Ports { range, gsi: Some(gsi) } => vec![Node::Slots(SlotRegisters {
                port: range.start as u16,
                gsi,
                devices: 1..DEVICES_MAX as u32,
            })],
            _ => Vec::new(),
        }
    }
}

impl BusDevice for PciSlots {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match (offset, data.len()) {
            (CAME, 4) => std::mem::take(&mut self.state.has_changed).into(),
            (LEAVING, 4) => std::mem::take(&mut self.state.untold),
            _ => 0,
        };
        data.fill(0);
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(place, byte)| *place = byte);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (EJECT, Ok(devices)) = (offset, data.try_into()) {
            self.eject(u32::from_le_bytes(devices));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::notice::REMINDERS;
    use super::*;
    use crate::poll;

    struct Guest {
        slots: PciSlots,
        interrupt: Arc<EventFd>,
        wake: Arc<EventFd>,
    }

    impl Guest {
        fn new() -> Self {
            let [interrupt, wake] = ["interrupt", "wake"].map(|name| Arc::new(poll::event(name).unwrap()));
            let slots = PciSlots::new(Line::Event(interrupt.clone()), wake.clone());
            Self { slots, interrupt, wake }
        }

        fn read(&mut self, offset: u64) -> u32 {
            let mut data = [0xff; 4];
            self.slots.read(offset, &mut data);
            u32::from_le_bytes(data)
        }

        fn ejects(&mut self, devices: u32, expected: &[u32]) {
            self.slots.write(EJECT, &devices.to_le_bytes());
            let ejected: Vec<_> = self.slots.take_ejected().collect();
            assert_eq!(ejected, expected, "{devices:#x}");
            assert_eq!(self.wake.read().is_ok(), !ejected.is_empty(), "{devices:#x}");
        }
    }

    #[test]
    fn a_guest_reads_once_what_it_is_told() {
        let mut guest = Guest::new();
        assert_eq!((guest.read(CAME), guest.read(LEAVING)), (0, 0));
        guest.slots.tell_changed().unwrap();
        guest.slots.ask(3).unwrap();
        guest.slots.ask(31).unwrap();
        assert_eq!(guest.interrupt.read().unwrap(), 3);
        assert_eq!((guest.read(CAME), guest.read(LEAVING)), (1, 1 << 3 | 1 << 31));
        assert_eq!((guest.read(CAME), guest.read(LEAVING)), (0, 0));
        assert_eq!(guest.slots.asked().collect::<Vec<_>>(), [3, 31]);
        // A guest that was not ready for it is asked again.
        guest.slots.ask(3).unwrap();
        assert_eq!(guest.read(LEAVING), 1 << 3);
        // One that has read is not told again, and one that never reads is not told for ever.
        guest.interrupt.read().unwrap();
        guest.slots.remind().unwrap();
        assert!(guest.interrupt.read().is_err());
        guest.slots.ask(3).unwrap();
        (0..1000).for_each(|_| guest.slots.remind().unwrap());
        assert_eq!(guest.interrupt.read().unwrap(), 1 + u64::from(REMINDERS));
        assert!(guest.slots.ask(32).unwrap_err().to_string().contains("no device 32"));
    }

    #[test]
    fn a_guest_lets_go_what_it_was_asked_for_and_nothing_else() {
        let mut guest = Guest::new();
        guest.slots.ask(3).unwrap();
        // The bridge, an empty slot, a device that nobody asked for.
        for devices in [1, 0, 1 << 4, !(1 << 3)] {
            guest.ejects(devices, &[]);
        }
        // Other widths and other registers.
        guest.slots.write(EJECT, &[0xff]);
        guest.slots.write(EJECT, &[0xff; 8]);
        guest.slots.write(LEAVING, &[0xff; 4]);
        assert_eq!(guest.slots.take_ejected().count(), 0);
        guest.ejects(u32::MAX, &[3]);
        // The device goes already.
        (0..100).for_each(|_| guest.ejects(u32::MAX, &[]));
        guest.slots.ask(5).unwrap();
        guest.slots.forget(5);
        guest.ejects(u32::MAX, &[]);
        assert_eq!(guest.read(LEAVING), 0);
    }

    #[test]
    fn what_a_guest_was_asked_is_saved() {
        let (mut guest, mut other) = (Guest::new(), Guest::new());
        guest.slots.tell_changed().unwrap();
        guest.slots.ask(1).unwrap();
        guest.slots.ask(2).unwrap();
        guest.slots.write(EJECT, &(1_u32 << 2).to_le_bytes());
        other.slots.restore(guest.slots.save().unwrap()).unwrap();
        assert_eq!((other.read(CAME), other.read(LEAVING)), (1, 1 << 1));
        assert!(other.wake.read().is_ok(), "a device that was let go waits for it");
        assert_eq!(other.slots.take_ejected().collect::<Vec<_>>(), [2]);
        other.ejects(u32::MAX, &[1]);
    }
}
