//! The i8042 keyboard controller of PCs with a keyboard that only knows Ctrl-Alt-Del (IBM PC AT
//! Technical Reference, 1-38; scan codes are set 2, untranslated).

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fixed::{FixedDevice, Site};
use crate::bus::BusDevice;
use crate::error::{Error, Result};
use crate::memory::Range;
use crate::metrics::{Counter, Group, View, metrics};
use crate::part::Component;
use crate::platform::node::{AcpiDevice, AcpiValue, Resource};
use crate::platform::{Node, Place};
use crate::poll::EventFd;
use crate::snapshot::Snapshot;
use crate::vm::exit::{End, Exit};

const DATA: u64 = 0;
const COMMAND: u64 = 4;

/// FADT, IAPC boot architecture flags (ACPI 6.5, 5.2.9.3): there is an 8042.
const BOOT_FLAG_8042: u16 = 1 << 1;

/// Status: a byte waits in the data register; the self-test passed; the keyboard is not locked.
const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_UNLOCKED: u8 = 1 << 4;
/// Command byte: interrupt when a byte waits; keyboard off.
const COMMAND_BYTE_INTERRUPT: u8 = 1 << 0;
const COMMAND_BYTE_SYSTEM: u8 = 1 << 2;
const COMMAND_BYTE_DISABLE: u8 = 1 << 4;

const ACK: u8 = 0xfa;
const SELF_TEST_PASSED: u8 = 0x55;
const KEYBOARD_TEST_PASSED: u8 = 0xaa;
/// Press, then release, in set 2: left Ctrl, left Alt, Delete.
const CTRL_ALT_DEL: [u8; 11] = [0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];
/// A guest that asks and never reads must not make us grow.
const OUTPUT_MAX: usize = 64;

metrics! {
    /// What a guest did with it; names as in Firecracker's metrics.
    pub struct Metrics {
        /// Bytes read from its ports.
        read_count: Counter,
        /// Bytes written to its ports.
        write_count: Counter,
        /// Resets of the processor by it.
        reset_count: Counter,
    }
}

/// The controller and its keyboard.
pub struct Keyboard {
    // Host
    interrupt: Arc<EventFd>,
    end: End,
    /// What it counts.
    pub metrics: Metrics,
    // Guest-visible
    command_byte: u8,
    /// The next byte to the data port belongs to this controller command.
    pending: Option<u8>,
    output: VecDeque<u8>,
}

impl Keyboard {
    /// A controller that raises `interrupt`, and notes a reset in `end`.
    pub fn new(interrupt: Arc<EventFd>, end: End) -> Self {
        let command_byte = COMMAND_BYTE_SYSTEM | COMMAND_BYTE_INTERRUPT;
        Self { interrupt, end, metrics: Metrics::new(), command_byte, pending: None, output: VecDeque::new() }
    }

    /// Presses and releases Ctrl-Alt-Del.
    pub fn press_ctrl_alt_del(&mut self) {
        self.send(&CTRL_ALT_DEL);
    }

    fn send(&mut self, bytes: &[u8]) {
        if self.output.len() + bytes.len() <= OUTPUT_MAX {
            self.output.extend(bytes);
            self.raise();
        }
    }

    fn raise(&self) {
        if !self.output.is_empty() && self.command_byte & COMMAND_BYTE_INTERRUPT != 0 {
            // A counter that is full has raised it already.
            let _ = self.interrupt.write(1);
        }
    }

    fn reset(&self) {
        self.metrics.reset_count.add(1);
        self.end.set(Exit::Reset);
    }

    fn command(&mut self, command: u8) {
        match command {
            0x20 => self.send(&[self.command_byte]),
            0x60 | 0xd1..=0xd4 => self.pending = Some(command),
            0xaa => self.send(&[SELF_TEST_PASSED]),
            // Interface test: the keyboard's line is fine; there is no second port (clock line stuck low).
            0xab => self.send(&[0]),
            0xa9 => self.send(&[1]),
            0xad => self.command_byte |= COMMAND_BYTE_DISABLE,
            0xae => self.command_byte &= !COMMAND_BYTE_DISABLE,
            // Pulse output lines: bit 0 is the processor's reset, active low.
            0xf0..=0xff if command & 1 == 0 => self.reset(),
            _ => {}
        }
    }

    fn data(&mut self, data: u8) {
        match self.pending.take() {
            Some(0x60) => {
                self.command_byte = data;
                self.raise();
            }
            // Output port: bit 0 is the processor's reset, active low.
            Some(0xd1) if data & 1 == 0 => self.reset(),
            // Write to the output buffer, as if the keyboard had sent it.
            Some(0xd2) => self.send(&[data]),
            Some(_) => {}
            None => match data {
                0xff => self.send(&[ACK, KEYBOARD_TEST_PASSED]),
                0xf2 => self.send(&[ACK, 0xab, 0x83]),
                _ => self.send(&[ACK]),
            },
        }
    }
}

impl FixedDevice for Keyboard {
    const NAME: &'static str = "keyboard";
    const METRICS: Option<&'static str> = Some("i8042");

    fn build(place: Place, site: &mut Site<'_>) -> Result<Option<Self>> {
        Ok(Some(Self::new(site.interrupt(place)?, site.surroundings.end.clone())))
    }
}

/// What is saved of the controller.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct State {
    command_byte: u8,
    pending: Option<u8>,
    output: Vec<u8>,
}

impl Snapshot for Keyboard {
    type State = State;

    fn save(&self) -> Result<State> {
        let Self { interrupt: _, end: _, metrics: _, command_byte, pending, output } = self;
        let output = output.iter().copied().collect();
        Ok(State { command_byte: *command_byte, pending: *pending, output })
    }

    fn restore(&mut self, state: State) -> Result<()> {
        if state.output.len() > OUTPUT_MAX {
            return Err(Error::config("the saved keyboard holds more bytes than there is room for"));
        }
        (self.command_byte, self.pending) = (state.command_byte, state.pending);
        self.output = state.output.into();
        // One interrupt too many does no harm to a driver that reads the status first.
        self.raise();
        Ok(())
    }
}

impl Component for Keyboard {
    /// Of its ports, the first and the last are its own.
    fn nodes(&self, place: Place) -> Vec<Node> {
        let Place::Ports { range, .. } = place else { return Vec::new() };
        let port = |offset| Resource::Ports(Range { start: range.start + offset, size: 1 });
        let resources = [port(DATA), port(COMMAND)].into_iter().chain(place.gsi().map(Resource::Interrupt));
        let device = AcpiDevice::new("PS2K", AcpiValue::Eisa("PNP0303"), resources.collect());
        vec![Node::Acpi(AcpiDevice { boot_flags: BOOT_FLAG_8042, ..device })]
    }

    fn metrics(&self, view: View) -> Option<Value> {
        Some(self.metrics.collect(view))
    }
}

impl BusDevice for Keyboard {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.metrics.read_count.add(1);
        data[0] = match offset {
            DATA => {
                let byte = self.output.pop_front().unwrap_or(0);
                self.raise();
                byte
            }
            COMMAND => {
                let full = if self.output.is_empty() { 0 } else { STATUS_OUTPUT_FULL };
                STATUS_SYSTEM | STATUS_UNLOCKED | full
            }
            // Ports 0x61 to 0x63 belong to nobody here; 0x61 (speaker, parity) reads as quiet.
            _ => 0,
        };
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.metrics.write_count.add(1);
        match offset {
            DATA => self.data(data[0]),
            COMMAND => self.command(data[0]),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyboard() -> (Keyboard, End) {
        let end = End::new(Default::default()).unwrap();
        (Keyboard::new(Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()), end.clone()), end)
    }

    fn read(keyboard: &mut Keyboard, offset: u64) -> u8 {
        let mut byte = [0];
        keyboard.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn a_driver_that_probes_finds_a_keyboard() {
        let (mut keyboard, _) = keyboard();
        keyboard.write(COMMAND, &[0xaa]);
        assert_eq!(read(&mut keyboard, COMMAND) & STATUS_OUTPUT_FULL, STATUS_OUTPUT_FULL);
        assert_eq!(read(&mut keyboard, DATA), SELF_TEST_PASSED);
        assert_eq!(read(&mut keyboard, COMMAND) & STATUS_OUTPUT_FULL, 0);
        keyboard.write(DATA, &[0xf2]);
        assert_eq!([0; 3].map(|_| read(&mut keyboard, DATA)), [ACK, 0xab, 0x83]);
        keyboard.write(COMMAND, &[0x60]);
        keyboard.write(DATA, &[0x61]);
        keyboard.write(COMMAND, &[0x20]);
        assert_eq!(read(&mut keyboard, DATA), 0x61);
        assert_eq!((keyboard.metrics.read_count.total(), keyboard.metrics.write_count.total()), (7, 5));
    }

    #[test]
    fn ctrl_alt_del_arrives_key_by_key_with_an_interrupt_each() {
        let (mut keyboard, _) = keyboard();
        keyboard.press_ctrl_alt_del();
        for expected in CTRL_ALT_DEL {
            assert_eq!(keyboard.interrupt.read().unwrap(), 1);
            assert_eq!(read(&mut keyboard, DATA), expected);
        }
        assert!(keyboard.interrupt.read().is_err());
    }

    #[test]
    fn a_restored_keyboard_goes_on_with_the_next_key() {
        let (mut keyboard, end) = keyboard();
        keyboard.press_ctrl_alt_del();
        assert_eq!(read(&mut keyboard, DATA), CTRL_ALT_DEL[0]);
        keyboard.write(COMMAND, &[0x60]);
        let state = keyboard.save().unwrap();
        let mut other = Keyboard::new(Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()), end);
        other.restore(state.clone()).unwrap();
        assert_eq!(other.save().unwrap(), state);
        assert_eq!(other.interrupt.read().unwrap(), 1, "a byte waits");
        assert_eq!(read(&mut other, DATA), CTRL_ALT_DEL[1]);
        // The command that was begun gets its byte: no interrupts any more.
        other.write(DATA, &[0]);
        let _ = other.interrupt.read();
        assert_eq!(read(&mut other, DATA), CTRL_ALT_DEL[2]);
        assert!(other.interrupt.read().is_err());
        let full = State { output: vec![0; OUTPUT_MAX + 1], ..state };
        assert!(other.restore(full).unwrap_err().to_string().contains("more bytes than there is room for"));
    }

    #[test]
    fn pulsing_the_reset_line_resets() {
        let (mut keyboard, end) = keyboard();
        keyboard.write(COMMAND, &[0xff]);
        assert_eq!(end.get(), None);
        keyboard.write(COMMAND, &[0xfe]);
        assert_eq!(end.get(), Some(&Exit::Reset));
        assert_eq!(keyboard.metrics.reset_count.total(), 1);
    }

    #[test]
    fn a_guest_that_never_reads_does_not_make_it_grow() {
        let (mut keyboard, _) = keyboard();
        for _ in 0..10_000 {
            keyboard.write(DATA, &[0xff]);
        }
        assert!(keyboard.output.len() <= OUTPUT_MAX);
    }
}
