//! The bus: finds the device behind an address. One for memory-mapped registers, one for x86 I/O ports.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::error::{Error, Result};
use crate::memory::Range;

/// A device's registers.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes at `offset` from the device's start. Bytes that are not
    /// filled in read as ones, as on a bus where nobody answers.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device as the bus shares it. Lock order: a device may lock the bus (the PCI root moves registers),
/// so the bus is never locked while it calls a device.
pub type Shared = Arc<Mutex<dyn BusDevice>>;

struct Claim {
    size: u64,
    device: Shared,
}

/// Address to device.
#[derive(Default)]
pub struct Bus {
    claims: RwLock<BTreeMap<u64, Claim>>,
}

impl Bus {
    /// Puts `device` at `range`.
    pub fn attach(&self, range: Range, device: Shared) -> Result<()> {
        let mut claims = self.claims.write().unwrap_or_else(PoisonError::into_inner);
        let below = claims.range(..range.end()).next_back();
        if below.is_some_and(|(start, claim)| start + claim.size > range.start) {
            return Err(Error::host(format!("two devices claim bus address {:#x}", range.start)));
        }
        claims.insert(range.start, Claim { size: range.size, device });
        Ok(())
    }

    /// Takes away the device that starts at `start`.
    pub fn detach(&self, start: u64) -> Option<Shared> {
        let mut claims = self.claims.write().unwrap_or_else(PoisonError::into_inner);
        claims.remove(&start).map(|claim| claim.device)
    }

    /// The guest reads at `address`: all ones where no device is.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        }
    }

    /// The guest writes at `address`: lost where no device is.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    /// An access that runs over a device's end is nobody's.
    fn find(&self, address: u64, len: usize) -> Option<(u64, Shared)> {
        let claims = self.claims.read().unwrap_or_else(PoisonError::into_inner);
        let (start, claim) = claims.range(..=address).next_back()?;
        let offset = address - start;
        (offset.checked_add(len as u64)? <= claim.size).then(|| (offset, claim.device.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Memory([u8; 8]);
    impl BusDevice for Memory {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.copy_from_slice(&self.0[offset as usize..][..data.len()]);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0[offset as usize..][..data.len()].copy_from_slice(data);
        }
    }

    fn bus() -> Bus {
        let bus = Bus::default();
        bus.attach(Range { start: 0x100, size: 8 }, Arc::new(Mutex::new(Memory([0; 8])))).unwrap();
        bus
    }

    #[test]
    fn accesses_reach_the_device_at_its_offset() {
        let bus = bus();
        bus.write(0x104, &[1, 2]);
        let mut data = [0; 4];
        bus.read(0x104, &mut data);
        assert_eq!(data, [1, 2, 0, 0]);
    }

    #[test]
    fn accesses_beside_or_across_a_device_read_ones() {
        let bus = bus();
        for address in [0xff, 0x105, 0x108, u64::MAX - 1] {
            let mut data = [0; 4];
            bus.write(address, &[7; 4]);
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
        }
    }

    #[test]
    fn two_devices_at_one_place_are_refused() {
        let bus = bus();
        for start in [0xfc, 0x100, 0x107] {
            assert!(bus.attach(Range { start, size: 8 }, Arc::new(Mutex::new(Memory([0; 8])))).is_err());
        }
        bus.attach(Range { start: 0x108, size: 8 }, Arc::new(Mutex::new(Memory([0; 8])))).unwrap();
        assert!(bus.detach(0x100).is_some());
        bus.attach(Range { start: 0xfc, size: 8 }, Arc::new(Mutex::new(Memory([0; 8])))).unwrap();
    }
}
