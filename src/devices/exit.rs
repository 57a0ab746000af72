//! The exit register: a guest writes a code there and ends with it (docs/exit-codes.md).

use super::fixed::{FixedDevice, Site};
use crate::bus::BusDevice;
use crate::error::Result;
use crate::part::Component;
use crate::platform::node::{AcpiDevice, AcpiValue, TreeNode};
use crate::platform::{Node, Place};
use crate::snapshot::stateless;
use crate::vm::exit::{End, Exit};

/// What a read of the register returns, so that a guest can tell that it is there: "ALUX".
pub const IDENTIFICATION: u32 = u32::from_be_bytes(*b"ALUX");

/// One 32-bit register.
pub struct ExitRegister {
    end: End,
}

impl ExitRegister {
    /// A register whose writes are noted in `end`.
    pub fn new(end: End) -> Self {
        Self { end }
    }
}

impl FixedDevice for ExitRegister {
    const NAME: &'static str = "exit register";

    fn build(_: Place, site: &mut Site<'_>) -> Result<Option<Self>> {
        Ok(Some(Self::new(site.surroundings.end.clone())))
    }
}

// A guest that has written its code has ended, and is not saved.
stateless!(ExitRegister);

impl Component for ExitRegister {
    fn nodes(&self, place: Place) -> Vec<Node> {
        let acpi = AcpiDevice::new("EXIT", AcpiValue::Text("ALUL0001"), place.resources());
        let tree = TreeNode::at("exit", place).texts("compatible", &["alula,exit"]).registers(place);
        vec![Node::Acpi(acpi), Node::Tree(tree)]
    }
}

impl BusDevice for ExitRegister {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let bytes = IDENTIFICATION.to_le_bytes();
        data.copy_from_slice(&bytes[offset as usize..][..data.len()]);
    }

    /// A narrower write is taken for the code's low bytes.
    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 {
            let mut code = [0; 4];
            code[..data.len()].copy_from_slice(data);
            self.end.set(Exit::Code(u32::from_le_bytes(code)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_code_written_is_the_guests_end() {
        let end = End::new(Default::default()).unwrap();
        let mut register = ExitRegister::new(end.clone());
        let mut id = [0; 4];
        register.read(0, &mut id);
        assert_eq!(u32::from_le_bytes(id), 0x414c_5558);
        assert_eq!(end.get(), None);
        register.write(0, &7u32.to_le_bytes());
        register.write(0, &[9]);
        assert_eq!(end.get(), Some(&Exit::Code(7)));
        assert_eq!(end.event().read().unwrap(), 1);
    }
}
