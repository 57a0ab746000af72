//! The slots of the PCI bus: registers that a guest reads and writes in any way, while devices come and are asked to go.
//! Whatever it does, it takes away what it was asked for and nothing else, once, and is told what it has not read.

use std::sync::Arc;

use alula::bus::BusDevice;
use alula::devices::slots::PciSlots;
use alula::platform::node::SlotRegisters;
use alula::poll;
use alula::snapshot::Snapshot;
use alula::vm::irq::Line;
use arbitrary::{Result, Unstructured};

const STEPS_MAX: usize = 256;
const CAME: u64 = 0;
const LEAVING: u64 = SlotRegisters::LEAVING as u64;
const EJECT: u64 = SlotRegisters::EJECT as u64;

pub fn run(bytes: &[u8]) {
    let mut bytes = Unstructured::new(bytes);
    let mut world = World::new();
    for _ in 0..STEPS_MAX {
        if bytes.is_empty() || world.step(&mut bytes).is_err() {
            break;
        }
        let asked: u32 = world.slots.asked().map(|number| 1 << number).sum();
        assert_eq!(asked, world.asked | world.ejected);
    }
}

/// The registers, and what they must be: the bits of a word are those of devices.
struct World {
    slots: PciSlots,
    interrupt: Arc<poll::EventFd>,
    has_changed: bool,
    untold: u32,
    asked: u32,
    ejected: u32,
}

fn slots() -> (PciSlots, Arc<poll::EventFd>) {
    let [interrupt, wake] = ["interrupt", "wake"].map(|name| Arc::new(poll::event(name).unwrap()));
    (PciSlots::new(Line::Event(interrupt.clone()), wake), interrupt)
}

impl World {
    fn new() -> Self {
        let (slots, interrupt) = slots();
        Self { slots, interrupt, has_changed: false, untold: 0, asked: 0, ejected: 0 }
    }

    /// What the owner does, and what the guest does.
    fn step(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        match bytes.arbitrary::<u8>()? % 10 {
            0 => {
                self.slots.tell_changed().unwrap();
                self.has_changed = true;
                assert!(self.interrupt.read().is_ok());
            }
            1 => {
                let number = bytes.arbitrary::<u8>()? % 40;
                let bit = 1_u32.checked_shl(number.into());
                assert_eq!(self.slots.ask(number.into()).is_ok(), bit.is_some());
                self.asked |= bit.unwrap_or(0);
                self.untold |= bit.unwrap_or(0);
                assert_eq!(self.interrupt.read().is_ok(), bit.is_some());
            }
            2 => {
                let number = bytes.arbitrary::<u8>()? % 32;
                self.slots.forget(number.into());
                for word in [&mut self.untold, &mut self.asked, &mut self.ejected] {
                    *word &= !(1 << number);
                }
            }
            3 => {
                let ejected: u32 = self.slots.take_ejected().map(|number| 1 << number).sum();
                assert_eq!(ejected, std::mem::take(&mut self.ejected));
            }
            4 => {
                self.slots.remind().unwrap();
                let is_told = self.interrupt.read().is_ok();
                assert!(!is_told || self.has_changed || self.untold != 0);
            }
            5 => {
                let state = self.slots.save().unwrap();
                (self.slots, self.interrupt) = slots();
                self.slots.restore(state).unwrap();
            }
            6 | 7 => self.read(bytes)?,
            _ => self.write(bytes)?,
        }
        Ok(())
    }

    fn place(bytes: &mut Unstructured<'_>) -> Result<(u64, usize)> {
        let kind = bytes.arbitrary::<u8>()?;
        let offset = match kind % 8 {
            0 => bytes.arbitrary()?,
            1 | 2 => CAME,
            3 | 4 => LEAVING,
            _ => EJECT,
        };
        Ok((offset, if kind < 200 { 4 } else { usize::from(kind % 9) }))
    }

    fn read(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        let (offset, length) = Self::place(bytes)?;
        let mut data = vec![0xff; length];
        self.slots.read(offset, &mut data);
        let expected = match (offset, length) {
            (CAME, 4) => std::mem::take(&mut self.has_changed).into(),
            (LEAVING, 4) => std::mem::take(&mut self.untold),
            _ => 0,
        };
        assert_eq!(data, u64::from(expected).to_le_bytes()[..length.min(8)], "{offset}");
        Ok(())
    }

    fn write(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        let (offset, length) = Self::place(bytes)?;
        let devices: u32 = bytes.arbitrary()?;
        self.slots.write(offset, &u64::from(devices).to_le_bytes()[..length.min(8)]);
        if (offset, length) == (EJECT, 4) {
            let gone = devices & self.asked;
            (self.asked, self.untold, self.ejected) =
                (self.asked & !gone, self.untold & !gone, self.ejected | gone);
        }
        Ok(())
    }
}
