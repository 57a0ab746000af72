//! A root port with a hotplug slot (PCI Express 5.0, 6.7, 7.5.1.3, 7.5.3): a bridge to a bus of its own, with a place for
//! one device. The port tells the guest by an interrupt when a device has come or gone. There is neither a button nor
//! a lamp nor a switch for power: a guest that lets a device go does so by its own means.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::config::{self, ConfigSpace, Identity, SECONDARY_BUS};
use super::msix::{self, Msix};
use super::root::Function;
use crate::error::{Context, Result};
use crate::log;
use crate::memory::Range;
use crate::poll::EventFd;
use crate::snapshot::Snapshot;
use crate::vm::Vm;
use crate::vm::irq::Message;

/// A PCI Express root port, by Red Hat's IDs for it.
const IDENTITY: Identity =
    Identity { vendor: 0x1b36, device: 0x000c, class: [0x06, 0x04, 0], revision: 0, subsystem: 0 };

const CAPABILITY_MSI: u8 = 0x05;
/// Offsets in the capability's body (7.7.1.2), which has a 64-bit address.
const MSI_ADDRESS: usize = 2;
const MSI_SIZE: usize = 12;
const MSI_64: u8 = 1 << 7;
const MSI_ENABLED: u8 = 1;

const CAPABILITY_EXPRESS: u8 = 0x10;
/// Offsets in the capability's body, which begins after its ID and link (7.5.3).
const DEVICE_CAPABILITIES: usize = 0x02;
const DEVICE_CONTROL: usize = 0x06;
const LINK_CAPABILITIES: usize = 0x0a;
const LINK_CONTROL: usize = 0x0e;
const LINK_STATUS: usize = 0x10;
const SLOT_CAPABILITIES: usize = 0x12;
const SLOT_CONTROL: usize = 0x16;
const SLOT_STATUS: usize = 0x18;
const ROOT_CONTROL: usize = 0x1a;
const LINK_CAPABILITIES_2: usize = 0x2a;
const EXPRESS_SIZE: usize = 0x3a;

/// Version 2, a root port, with a slot.
const EXPRESS: u16 = 2 | 4 << 4 | 1 << 8;
/// Role-based error reporting, which all devices have that are newer than PCI Express 1.0.
const ROLE_BASED_ERRORS: u32 = 1 << 15;
/// One lane of 2.5 GT/s, as capability and as status.
const LINK: u16 = 1 | 1 << 4;
const SPEEDS: u32 = 1 << 1;
/// The port says whether its link is up, as a capability and as status.
const LINK_REPORTING: u32 = 1 << 20;
const LINK_ACTIVE: u16 = 1 << 13;
/// Devices come and go, go without a word before, and no command is told of when it is done.
const SLOT: u32 = 1 << 5 | 1 << 6 | 1 << 18;
const SLOT_NUMBER: u32 = 19;

/// Slot status: somebody has come or gone, somebody is there, the link has come up or gone down.
const PRESENCE_CHANGED: u16 = 1 << 3;
const PRESENT: u16 = 1 << 6;
const LINK_CHANGED: u16 = 1 << 8;
/// Those of which the guest says that it has seen them.
const CHANGES: u16 = PRESENCE_CHANGED | LINK_CHANGED;
/// Slot control: which changes interrupt, and that any does.
const PRESENCE_INTERRUPTS: u16 = 1 << 3;
const INTERRUPTS: u16 = 1 << 5;
const LINK_INTERRUPTS: u16 = 1 << 12;

/// A port.
pub struct Port {
    space: ConfigSpace,
    /// The one vector, which the MSI capability is for.
    msix: Msix,
    /// Written to when the guest is to be interrupted.
    event: Arc<EventFd>,
    /// Bodies of the capabilities.
    message: usize,
    express: usize,
    /// There is an unseen change that interrupts.
    is_interrupting: bool,
}

impl Port {
    /// A port as this device of bus 0, with an empty slot, which the guest knows by its number `slot`. An interrupt is a
    /// write to `event`.
    pub fn new(vm: Arc<Vm>, event: Arc<EventFd>, device: u32, slot: u32) -> Result<Self> {
        let msix = Msix::new(vm, device << 3, vec![event.clone()])?;
        let mut space = ConfigSpace::bridge(IDENTITY);
        let mut body = [0; MSI_SIZE];
        body[0] = MSI_64;
        let message = space.add_capability(CAPABILITY_MSI, &body);
        space.make_writable(message, MSI_ENABLED);
        space.make_writable(message + MSI_ADDRESS, !0b11);
        (MSI_ADDRESS + 1..MSI_SIZE).for_each(|offset| space.make_writable(message + offset, 0xff));
        let express = space.add_capability(CAPABILITY_EXPRESS, &[0; EXPRESS_SIZE]);
        space.set(express, &EXPRESS.to_le_bytes());
        space.set(express + LINK_STATUS, &LINK.to_le_bytes());
        for (offset, register) in [
            (DEVICE_CAPABILITIES, ROLE_BASED_ERRORS),
            (LINK_CAPABILITIES, u32::from(LINK) | LINK_REPORTING | slot << 24),
            (SLOT_CAPABILITIES, SLOT | slot << SLOT_NUMBER),
            (LINK_CAPABILITIES_2, SPEEDS),
        ] {
            space.set(express + offset, &register.to_le_bytes());
        }
        // Error reporting and sizes, and the common clock, which nothing depends on; interrupts for power events, of which
        // there are none.
        let notepads = [(DEVICE_CONTROL, 0x7fef), (LINK_CONTROL, 0x00c0), (ROOT_CONTROL, 0x000f)];
        let control = (SLOT_CONTROL, PRESENCE_INTERRUPTS | INTERRUPTS | LINK_INTERRUPTS);
        for (offset, mask) in notepads.into_iter().chain([control]) {
            let [low, high] = u16::to_le_bytes(mask);
            space.make_writable(express + offset, low);
            space.make_writable(express + offset + 1, high);
        }
        Ok(Self { space, msix, event, message, express, is_interrupting: false })
    }

    /// The number that the guest has given to the bus behind the port.
    pub fn secondary_bus(&self) -> u8 {
        self.space.byte(SECONDARY_BUS)
    }

    /// The addresses at which the guest reaches what is behind the port; None: it reaches nothing.
    pub fn window(&self) -> Option<Range> {
        self.space.window()
    }

    /// A device has come, or gone.
    pub fn set_occupied(&mut self, is_occupied: bool) {
        let (present, active) = if is_occupied { (PRESENT, LINK_ACTIVE) } else { (0, 0) };
        self.set_word(LINK_STATUS, LINK | active);
        self.set_word(SLOT_STATUS, present | CHANGES);
        self.update_interrupt();
    }

    fn word(&self, register: usize) -> u16 {
        self.space.word(self.express + register)
    }

    fn set_word(&mut self, register: usize, value: u16) {
        self.space.set(self.express + register, &value.to_le_bytes());
    }

    /// Whether there is an unseen change of which the guest wants to be told (6.7.3.1).
    fn interrupts(&self) -> bool {
        let (control, status) = (self.word(SLOT_CONTROL), self.word(SLOT_STATUS));
        let is_wanted = |enabled: u16, changed: u16| control & enabled != 0 && status & changed != 0;
        control & INTERRUPTS != 0
            && (is_wanted(PRESENCE_INTERRUPTS, PRESENCE_CHANGED) || is_wanted(LINK_INTERRUPTS, LINK_CHANGED))
    }

    /// Interrupts the guest if there is something to tell, and was nothing before.
    fn update_interrupt(&mut self) {
        let interrupts = self.interrupts();
        let was_interrupting = std::mem::replace(&mut self.is_interrupting, interrupts);
        if self.is_interrupting
            && !was_interrupting
            && let Err(error) = self.event.write(1).context("interrupt for a PCIe slot")
        {
            log::line(error);
        }
    }

    /// The guest has seen the changes whose bits it writes as ones.
    fn acknowledge(&mut self, offset: usize, data: &[u8]) {
        let status = self.express + SLOT_STATUS;
        let written =
            |at: usize| at.checked_sub(offset).and_then(|index| data.get(index)).copied().unwrap_or(0);
        let seen = u16::from_le_bytes([written(status), written(status + 1)]) & CHANGES;
        self.set_word(SLOT_STATUS, self.word(SLOT_STATUS) & !seen);
    }

    /// Has the vector send the message of the capability.
    fn update_message(&mut self) {
        let mut entry = [0; msix::ENTRY as usize];
        self.space.read(self.message + MSI_ADDRESS, &mut entry[..MSI_SIZE - MSI_ADDRESS]);
        let is_enabled = self.space.byte(self.message) & MSI_ENABLED != 0 && self.space.is_master();
        self.msix.set_control(false, false);
        self.msix.write_table(0, &entry);
        self.msix.set_control(is_enabled, false);
    }
}

impl Function for Port {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.space.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let was_master = self.space.is_master();
        self.space.write(offset, data);
        let is_message = offset < self.message + MSI_SIZE && self.message < offset + data.len();
        if is_message || was_master != self.space.is_master() {
            self.update_message();
        }
        self.acknowledge(offset, data);
        self.update_interrupt();
    }

    fn place(&self) -> Option<Range> {
        None
    }

    fn messages(&self) -> Vec<(u32, Message)> {
        self.msix.messages().collect()
    }

    fn connect(&mut self) {
        self.msix.connect();
    }
}

/// The port's registers as the guest sees them. Whether the slot is occupied is left out: a restore adds the device
/// that is in the slot, and that sets it.
#[derive(Debug, Deserialize, Serialize)]
pub struct State {
    space: config::State,
    msix: msix::State,
    /// The changes that the guest has not seen.
    changes: u16,
}

impl Snapshot for Port {
    type State = State;

    fn save(&self) -> Result<State> {
        let changes = self.word(SLOT_STATUS) & CHANGES;
        Ok(State { space: self.space.save()?, msix: self.msix.save()?, changes })
    }

    fn restore(&mut self, state: State) -> Result<()> {
        self.space.restore(state.space)?;
        self.set_word(SLOT_STATUS, self.word(SLOT_STATUS) & PRESENT | state.changes & CHANGES);
        // An interrupt that waits is the vector's.
        self.is_interrupting = self.interrupts();
        self.msix.restore(state.msix)
    }
}
