//! The configuration space of a function: a header of type 0 with one 64-bit BAR or one of type 1, capabilities.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::memory::Range;
use crate::snapshot::Snapshot;

/// Offsets in the header.
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const HEADER_TYPE: usize = 0x0e;
/// Offsets in a header of type 1 (PCI Express 5.0, 7.5.1.3): the numbers of the bus that the bridge is on, of the one
/// behind it, and of the last one behind that.
const BUS_NUMBERS: usize = 0x18;
/// The number of the bus behind the bridge.
pub const SECONDARY_BUS: usize = BUS_NUMBERS + 1;
/// The window, which has the addresses of memory behind the bridge, in whole MiB: the upper halves of its first and of its
/// last address.
const MEMORY_BASE: usize = 0x20;
const MEMORY_LIMIT: usize = 0x22;
const WINDOW_ADDRESS: u16 = 0xfff0;
const WINDOW_UNIT: u64 = 1 << 20;
/// Bytes of the header; capabilities begin there.
pub const HEADER_SIZE: usize = 0x40;

const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_MASTER: u8 = 1 << 2;
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// 64-bit memory BAR, not prefetchable.
const BAR_64: u8 = 0b100;

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor and device ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Base class, subclass, programming interface.
    pub class: [u8; 3],
    /// Revision.
    pub revision: u8,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// The first 256 bytes of a function's configuration space; the rest reads as zeros.
pub struct ConfigSpace {
    bytes: [u8; 256],
    /// Bits that the guest can write.
    writable: [u8; 256],
    bar_size: u64,
    next_capability: usize,
    last_link: usize,
}

impl ConfigSpace {
    /// A function with a BAR of `bar_size` bytes (a power of two, 0: none), placed at `bar`.
    pub fn new(identity: Identity, bar: u64, bar_size: u64) -> Self {
        let mut space = Self {
            bytes: [0; 256],
            writable: [0; 256],
            bar_size,
            next_capability: HEADER_SIZE,
            last_link: CAPABILITIES,
        };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        let [base, sub, interface] = identity.class;
        space.set(0x08, &[identity.revision, interface, sub, base]);
        space.set(0x2c, &identity.vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        // The interrupt line register is the guest's notepad.
        space.writable[0x3c] = 0xff;
        space.writable[COMMAND] = COMMAND_MEMORY | COMMAND_MASTER;
        // Interrupt disable.
        space.writable[COMMAND + 1] = 1 << 2;
        if bar_size > 0 {
            space.set(BAR0, &(bar | u64::from(BAR_64)).to_le_bytes());
            space.writable[BAR0..BAR0 + 8].copy_from_slice(&(!(bar_size - 1)).to_le_bytes());
        }
        space
    }

    /// A bridge to another bus, which has windows for neither ports nor prefetchable memory.
    pub fn bridge(identity: Identity) -> Self {
        let mut space = Self::new(identity, 0, 0);
        space.bytes[HEADER_TYPE] = 1;
        // Other registers are where a header of type 0 has vendor and device of the subsystem.
        space.set(0x2c, &[0; 4]);
        space.writable[BUS_NUMBERS..BUS_NUMBERS + 3].fill(0xff);
        for register in [MEMORY_BASE, MEMORY_LIMIT] {
            space.writable[register..register + 2].copy_from_slice(&WINDOW_ADDRESS.to_le_bytes());
        }
        space
    }

    /// Has these bytes stand at `offset`, whatever the guest can write there.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Adds a capability with this body after its ID and link; returns the offset of the body.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next_capability;
        self.bytes[self.last_link] = at as u8;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.bytes[at] = id;
        self.set(at + 2, body);
        self.last_link = at + 1;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        at + 2
    }

    /// Lets the guest write these bits at `offset`.
    pub fn make_writable(&mut self, offset: usize, mask: u8) {
        self.writable[offset] |= mask;
    }

    /// One byte, as the guest left it.
    pub fn byte(&self, offset: usize) -> u8 {
        self.bytes[offset]
    }

    /// Two bytes, as they stand there.
    pub fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// The guest reads.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset + index).copied().unwrap_or(0);
        }
    }

    /// The guest writes.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            if let (Some(place), Some(mask)) =
                (self.bytes.get_mut(offset + index), self.writable.get(offset + index))
            {
                *place = *place & !mask | byte & mask;
            }
        }
    }

    /// Whether the guest lets the function reach memory.
    pub fn is_master(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_MASTER != 0
    }

    /// The addresses of memory that a bridge passes on to the bus behind it, while the guest has that on: none if the last
    /// one is before the first (PCI-to-PCI Bridge 1.2, 3.2.5.8 and 4.2).
    pub fn window(&self) -> Option<Range> {
        let [base, limit] =
            [MEMORY_BASE, MEMORY_LIMIT].map(|register| u64::from(self.word(register) & WINDOW_ADDRESS) << 16);
        let is_open = self.bytes[COMMAND] & COMMAND_MEMORY != 0 && base <= limit;
        is_open.then(|| Range { start: base, size: limit - base + WINDOW_UNIT })
    }

    /// Where the BAR is, while the guest has memory decoding on.
    pub fn bar(&self) -> Option<u64> {
        let bytes = self.bytes[BAR0..BAR0 + 8].try_into().expect("8 bytes");
        let decoding = self.bytes[COMMAND] & COMMAND_MEMORY != 0 && self.bar_size > 0;
        decoding.then(|| u64::from_le_bytes(bytes) & !(self.bar_size - 1))
    }
}

/// All 256 bytes, of which only what the guest can write counts.
#[derive(Debug, Deserialize, Serialize)]
pub struct State(Vec<u8>);

impl Snapshot for ConfigSpace {
    type State = State;

    fn save(&self) -> Result<State> {
        Ok(State(self.bytes.to_vec()))
    }

    fn restore(&mut self, state: State) -> Result<()> {
        if state.0.len() != self.bytes.len() {
            return Err(Error::config("the saved configuration space is not one of 256 bytes"));
        }
        self.write(0, &state.0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity =
            Identity { vendor: 0x1af4, device: 0x1042, class: [1, 0x80, 0], revision: 1, subsystem: 2 };
        ConfigSpace::new(identity, 0xc200_0000, 0x4000)
    }

    #[test]
    fn a_guest_sizes_and_moves_the_bar() {
        let mut space = space();
        assert_eq!(space.bar(), None, "not decoding yet");
        space.write(0x10, &[0xff; 8]);
        let mut sized = [0; 8];
        space.read(0x10, &mut sized);
        assert_eq!(u64::from_le_bytes(sized), !0x3fff | 4);
        space.write(0x10, &0x1_2345_6789_0000_u64.to_le_bytes());
        space.write(0x04, &[2, 0]);
        assert_eq!(space.bar(), Some(0x1_2345_6789_0000 & !0x3fff));
    }

    #[test]
    fn what_is_not_writable_stays_and_what_is_beyond_is_zero() {
        let mut space = space();
        space.write(0, &[0xff; 4]);
        let mut id = [0; 4];
        space.read(0, &mut id);
        assert_eq!(u32::from_le_bytes(id), 0x1042_1af4);
        space.write(300, &[1]);
        let mut beyond = [9; 4];
        space.read(254, &mut beyond);
        assert_eq!(beyond, [0; 4]);
    }

    #[test]
    fn capabilities_are_linked_from_the_header() {
        let mut space = space();
        space.add_capability(9, &[1, 2, 3]);
        space.add_capability(0x11, &[4; 10]);
        let (first, second) = (space.byte(0x34) as usize, space.byte(0x41) as usize);
        assert_eq!((space.byte(first), space.byte(second)), (9, 0x11));
        assert_eq!(space.byte(second + 1), 0);
        assert_eq!(space.byte(6) & 0x10, 0x10);
    }
}
