//! The power key of aarch64 machines: a PL061 GPIO controller (Arm DDI 0190) with the key on one of its
//! lines. The device tree's `gpio-keys` tells the guest so.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::fixed::{FixedDevice, Site};
use crate::bus::BusDevice;
use crate::error::Result;
use crate::part::Component;
use crate::platform::node::{TreeNode, phandle};
use crate::platform::{Node, Place};
use crate::poll::EventFd;
use crate::snapshot::Snapshot;

/// The line that the power key is on.
const KEY_LINE: u8 = 3;
/// Linux's code of the power key (include/uapi/linux/input-event-codes.h).
const KEY_POWER: u32 = 116;
/// Linux' bindings, gpio: a line's flags.
const ACTIVE_HIGH: u32 = 0;

/// Eight lines.
pub struct Gpio {
    // Fixed
    /// The line that the key pulls up, as a bit.
    key: u8,
    // Host
    interrupt: Arc<EventFd>,
    // Guest-visible
    state: State,
}

/// What the guest can see of the controller, which is what is saved.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct State {
    pressed: bool,
    /// What the guest gives out on the lines that it made outputs.
    output: u8,
    registers: Registers,
    /// Edges that were seen and not cleared.
    edges: u8,
}

/// The registers that only keep what is written (3.2): one bit for each line.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
struct Registers {
    /// 1: an output.
    direction: u8,
    /// 1: the level interrupts; 0: an edge does.
    sense: u8,
    /// 1: both edges do.
    both: u8,
    /// 1: a high level or a rising edge does.
    event: u8,
    /// 1: the line's interrupts are let through.
    mask: u8,
    /// 1: the line is its peripheral's: nothing here has one.
    alternate: u8,
}

const DIRECTION: u64 = 0x400;
const SENSE: u64 = 0x404;
const BOTH: u64 = 0x408;
const EVENT: u64 = 0x40c;
const MASK: u64 = 0x410;
const RAW_STATUS: u64 = 0x414;
const MASKED_STATUS: u64 = 0x418;
const CLEAR: u64 = 0x41c;
const ALTERNATE: u64 = 0x420;
/// The peripheral's and PrimeCell's identification, a byte in each of the last eight words.
const IDENTIFICATION: u64 = 0xfe0;
const IDENTIFIERS: [u8; 8] = [0x61, 0x10, 0x04, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

impl Gpio {
    /// A controller that raises `interrupt`, with a key, not pressed, on line `line`.
    pub fn new(interrupt: Arc<EventFd>, line: u8) -> Self {
        Self { key: 1 << line, interrupt, state: State::default() }
    }

    /// Presses the power key. It is released once the guest has seen it: no clock decides what a guest
    /// notices, and one whose driver comes later still finds the key pressed.
    pub fn press_power_key(&mut self) {
        self.set_key(true);
    }

    fn set_key(&mut self, pressed: bool) {
        if self.state.pressed != pressed {
            self.state.pressed = pressed;
            let Registers { sense, both, event, .. } = self.state.registers;
            let wanted = both | if pressed { event } else { !event };
            self.state.edges |= self.key & wanted & !sense;
            self.raise();
        }
    }

    /// The levels of all lines.
    fn lines(&self) -> u8 {
        let inputs = if self.state.pressed { self.key } else { 0 };
        let direction = self.state.registers.direction;
        inputs & !direction | self.state.output & direction
    }

    fn raw_status(&self) -> u8 {
        let Registers { sense, event, .. } = self.state.registers;
        self.state.edges | sense & !(self.lines() ^ event)
    }

    /// The interrupt line knows edges only: whatever is left is told again.
    fn raise(&self) {
        if self.raw_status() & self.state.registers.mask != 0 {
            // A counter that is full has raised it already.
            let _ = self.interrupt.write(1);
        }
    }

    /// The register that only keeps what is written, at `offset`.
    fn register(&mut self, offset: u64) -> Option<&mut u8> {
        Some(match offset {
            DIRECTION => &mut self.state.registers.direction,
            SENSE => &mut self.state.registers.sense,
            BOTH => &mut self.state.registers.both,
            EVENT => &mut self.state.registers.event,
            MASK => &mut self.state.registers.mask,
            ALTERNATE => &mut self.state.registers.alternate,
            _ => return None,
        })
    }
}

/// In an access to the data, bits 2 to 9 of the address say which lines are meant (2.2).
fn lines_meant(offset: u64) -> u8 {
    (offset >> 2) as u8
}

impl FixedDevice for Gpio {
    const NAME: &'static str = "gpio";

    fn build(place: Place, site: &mut Site<'_>) -> Result<Option<Self>> {
        Ok(Some(Self::new(site.interrupt(place)?, KEY_LINE)))
    }
}

impl Snapshot for Gpio {
    type State = State;

    fn save(&self) -> Result<State> {
        Ok(self.state)
    }

    fn restore(&mut self, state: State) -> Result<()> {
        self.state = state;
        self.raise();
        Ok(())
    }
}

impl Component for Gpio {
    /// The controller, and a key on one of its lines that is pressed when the line is high.
    fn nodes(&self, place: Place) -> Vec<Node> {
        let controller = TreeNode::at("gpio", place)
            .texts("compatible", &["arm,pl061", "arm,primecell"])
            .registers(place)
            .interrupt(place)
            .flag("gpio-controller")
            .cells("#gpio-cells", &[2])
            .cells("clocks", &[phandle::CLOCK])
            .texts("clock-names", &["apb_pclk"])
            .cells("phandle", &[phandle::GPIO]);
        let key = TreeNode::new("power")
            .texts("label", &["Power"])
            .cells("linux,code", &[KEY_POWER])
            .cells("gpios", &[phandle::GPIO, KEY_LINE.into(), ACTIVE_HIGH]);
        let keys = TreeNode::new("gpio-keys").texts("compatible", &["gpio-keys"]).child(key);
        vec![Node::Tree(controller), Node::Tree(keys)]
    }
}

impl BusDevice for Gpio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            0..DIRECTION => self.lines() & lines_meant(offset),
            RAW_STATUS => self.raw_status(),
            MASKED_STATUS => self.raw_status() & self.state.registers.mask,
            IDENTIFICATION.. => IDENTIFIERS[(offset - IDENTIFICATION) as usize / 4],
            _ => self.register(offset).copied().unwrap_or(0),
        };
        data.fill(0);
        data[0] = value;
        if offset < DIRECTION && value & self.key & !self.state.registers.direction != 0 {
            self.set_key(false);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let value = data[0];
        match offset {
            0..DIRECTION => {
                let meant = lines_meant(offset) & self.state.registers.direction;
                self.state.output = self.state.output & !meant | value & meant;
            }
            CLEAR => self.state.edges &= !value,
            _ => {
                if let Some(register) = self.register(offset) {
                    *register = value;
                }
            }
        }
        self.raise();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: u8 = 3;
    const KEY: u8 = 1 << LINE;
    const KEY_DATA: u64 = (KEY as u64) << 2;

    fn gpio() -> Gpio {
        Gpio::new(Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()), LINE)
    }

    fn read(gpio: &mut Gpio, offset: u64) -> u8 {
        let mut data = [0xff; 4];
        gpio.read(offset, &mut data);
        assert_eq!(data[1..], [0; 3]);
        data[0]
    }

    fn interrupted(gpio: &Gpio) -> bool {
        gpio.interrupt.read().is_ok()
    }

    #[test]
    fn a_driver_identifies_it() {
        let mut gpio = gpio();
        let found: Vec<u8> = (0..8).map(|n| read(&mut gpio, 0xfe0 + 4 * n)).collect();
        assert_eq!(found, [0x61, 0x10, 0x04, 0x00, 0x0d, 0xf0, 0x05, 0xb1]);
    }

    #[test]
    fn a_press_and_its_release_are_seen_one_after_the_other() {
        let mut gpio = gpio();
        gpio.write(BOTH, &[KEY]);
        gpio.write(MASK, &[KEY]);
        assert!(!interrupted(&gpio));
        gpio.press_power_key();
        gpio.press_power_key();
        assert!(interrupted(&gpio));
        assert_eq!((read(&mut gpio, RAW_STATUS), read(&mut gpio, MASKED_STATUS)), (KEY, KEY));
        gpio.write(CLEAR, &[KEY]);
        assert_eq!(read(&mut gpio, MASKED_STATUS), 0);
        assert!(!interrupted(&gpio));
        // Other lines are looked at: it stays pressed.
        assert_eq!(read(&mut gpio, !KEY_DATA & 0x3fc), 0);
        assert_eq!(read(&mut gpio, KEY_DATA), KEY);
        assert!(interrupted(&gpio));
        assert_eq!(read(&mut gpio, MASKED_STATUS), KEY);
        gpio.write(CLEAR, &[0xff]);
        assert_eq!(read(&mut gpio, KEY_DATA), 0);
        assert!(!interrupted(&gpio));
    }

    #[test]
    fn a_restored_controller_has_the_key_as_it_was() {
        let mut gpio = gpio();
        gpio.write(BOTH, &[KEY]);
        gpio.write(MASK, &[KEY]);
        gpio.write(DIRECTION, &[0x80]);
        gpio.write(0x3fc, &[0x80]);
        gpio.press_power_key();
        let state = gpio.save().unwrap();
        let mut other = Gpio::new(Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()), LINE);
        other.restore(state).unwrap();
        assert!(interrupted(&other));
        assert_eq!(other.save().unwrap(), state);
        assert_eq!((read(&mut other, MASKED_STATUS), read(&mut other, 0x3fc)), (KEY, KEY | 0x80));
        // The key is released, as it has been seen.
        assert_eq!(read(&mut other, 0x3fc), 0x80);
    }

    #[test]
    fn a_press_waits_for_a_driver() {
        let mut gpio = gpio();
        gpio.write(BOTH, &[KEY]);
        gpio.press_power_key();
        assert!(!interrupted(&gpio));
        gpio.write(MASK, &[KEY]);
        assert!(interrupted(&gpio));
        assert_eq!(read(&mut gpio, 0x3fc), KEY);
    }

    #[test]
    fn one_edge_or_a_level_interrupts_where_that_is_asked_for() {
        for (event, press, release) in [(KEY, true, false), (0, false, true)] {
            let mut gpio = gpio();
            gpio.write(EVENT, &[event]);
            gpio.write(MASK, &[KEY]);
            gpio.press_power_key();
            assert_eq!(interrupted(&gpio), press);
            gpio.write(CLEAR, &[KEY]);
            read(&mut gpio, KEY_DATA);
            assert_eq!(interrupted(&gpio), release);
        }
        let mut gpio = gpio();
        gpio.write(SENSE, &[KEY]);
        gpio.write(EVENT, &[KEY]);
        gpio.write(MASK, &[KEY]);
        assert!(!interrupted(&gpio));
        gpio.press_power_key();
        assert!(interrupted(&gpio));
        gpio.write(CLEAR, &[KEY]);
        assert!(interrupted(&gpio), "a level stays");
        read(&mut gpio, KEY_DATA);
        assert_eq!(read(&mut gpio, MASKED_STATUS), 0);
    }

    #[test]
    fn outputs_are_given_back_and_inputs_cannot_be_written() {
        let mut gpio = gpio();
        gpio.write(DIRECTION, &[0x81]);
        gpio.write(0x3fc, &[0xff]);
        assert_eq!(read(&mut gpio, 0x3fc), 0x81);
        gpio.write(0x01 << 2, &[0]);
        assert_eq!(read(&mut gpio, 0x3fc), 0x80);
        assert_eq!(read(&mut gpio, 0x01 << 2), 0);
        assert_eq!(read(&mut gpio, DIRECTION), 0x81);
    }
}
