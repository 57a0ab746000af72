//! The ACPI sleep control, sleep status and reset registers (ACPI 6.5, 4.8.3.7 and 4.8.3.6), x86_64.

use super::fixed::{FixedDevice, Site};
use crate::bus::BusDevice;
use crate::error::Result;
use crate::part::Component;
use crate::platform::node::PowerRegisters;
use crate::platform::{Node, Place};
use crate::snapshot::stateless;
use crate::vm::exit::{End, Exit};

/// Sleep control: SLP_EN, and where SLP_TYP begins.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;

/// What `_S5` says of the sleep type that is "off".
const OFF: u8 = 5;
/// What the FADT says must be written to the reset register.
const RESET: u8 = 1;

/// Three 8-bit registers: sleep control, sleep status, reset.
pub struct Power {
    end: End,
}

impl Power {
    /// Registers whose writes are noted in `end`.
    pub fn new(end: End) -> Self {
        Self { end }
    }
}

impl FixedDevice for Power {
    const NAME: &'static str = "power";

    fn build(_: Place, site: &mut Site<'_>) -> Result<Option<Self>> {
        Ok(Some(Self::new(site.surroundings.end.clone())))
    }
}

stateless!(Power);

impl Component for Power {
    fn nodes(&self, place: Place) -> Vec<Node> {
        match place {
            Place::Ports { range, .. } => {
                vec![Node::Power(PowerRegisters { port: range.start as u16, off: OFF, reset: RESET })]
            }
            _ => Vec::new(),
        }
    }
}

impl BusDevice for Power {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data[0]) {
            (0, value) if value == SLEEP_ENABLE | OFF << SLEEP_TYPE_SHIFT => self.end.set(Exit::PoweredOff),
            (2, value) if value == RESET => self.end.set(Exit::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(writes: &[(u64, u8)]) -> Option<Exit> {
        let end = End::new(Default::default()).unwrap();
        let mut power = Power::new(end.clone());
        for (offset, value) in writes {
            power.write(*offset, &[*value]);
        }
        end.get().cloned()
    }

    #[test]
    fn only_sleep_type_5_with_enable_powers_off() {
        assert_eq!(after(&[(0, 5 << 2), (0, 4 << 2 | 0x20), (1, 0x34)]), None);
        assert_eq!(after(&[(0, 5 << 2 | 0x20)]), Some(Exit::PoweredOff));
    }

    #[test]
    fn the_reset_register_resets() {
        assert_eq!(after(&[(2, 0)]), None);
        assert_eq!(after(&[(2, 1)]), Some(Exit::Reset));
    }
}
