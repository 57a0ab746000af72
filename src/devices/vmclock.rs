//! The VM clock (Linux' include/uapi/linux/vmclock-abi.h, binding amazon,vmclock): a page of guest memory by which
//! the guest's kernel, and each program that maps the page, sees without a system call that time was disrupted or
//! that the guest went on from a snapshot. The page tells no time: the guest has other clocks for that.

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use vm_memory::{Address, Bytes, GuestAddress, GuestAddressSpace};

use super::fixed::{FixedDevice, Site};
use crate::error::{Context, Error, Result};
use crate::memory::Memory;
use crate::part::Component;
use crate::platform::node::{AcpiDevice, AcpiValue};
use crate::platform::{Node, Place};
use crate::snapshot::Snapshot;
use crate::vm::irq::Line;

const MAGIC: u32 = u32::from_le_bytes(*b"VCLK");
const SIZE: u32 = 0x1000;
const VERSION: u16 = 1;
/// The page says of no counter which time it is.
const COUNTER_INVALID: u8 = 0xff;
/// The generation counter is there.
const GENERATIONS_PRESENT: u64 = 1 << 8;
/// Changes are told by an interrupt.
const NOTIFICATIONS_PRESENT: u64 = 1 << 9;

/// Where the fields are that change: the sequence counter is odd while others are written.
const SEQUENCE: u64 = 0x0c;
const DISRUPTIONS: u64 = 0x10;
const FLAGS: u64 = 0x18;
const GENERATIONS: u64 = 0x68;

/// The page, and the interrupt that says that it has changed.
pub struct VmClock {
    memory: Memory,
    address: GuestAddress,
    interrupt: Line,
    state: State,
}

/// What the page says, which the monitor does not read back: a guest can write there.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct State {
    /// One more before and after each change.
    sequence: u32,
    /// Another one whenever the CPUs' counters were disrupted.
    disruptions: u64,
    /// Another one whenever the guest went on from a snapshot.
    generations: u64,
}

impl VmClock {
    /// A clock whose page is at `address` in `memory`, where nothing is written yet. Changes are told by
    /// `interrupt`.
    pub fn new(memory: Memory, address: u64, interrupt: Line) -> Self {
        Self { memory, address: GuestAddress(address), interrupt, state: State::default() }
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let written = self.memory.memory().write_slice(bytes, self.address.unchecked_add(offset));
        written.context("write the page of the VM clock to guest memory")
    }

    /// Writes the next sequence number, before or after the fields as `order` and the caller's fences have it.
    fn next_sequence(&mut self, order: Ordering) -> Result<()> {
        self.state.sequence = self.state.sequence.wrapping_add(1);
        let at = self.address.unchecked_add(SEQUENCE);
        let stored = self.memory.memory().store(self.state.sequence.to_le(), at, order);
        stored.context("write the page of the VM clock to guest memory")
    }

    /// Writes all but the sequence number. The guest may have written anything there.
    fn write_fields(&self) -> Result<()> {
        let constants =
            [&MAGIC.to_le_bytes()[..], &SIZE.to_le_bytes(), &VERSION.to_le_bytes(), &[COUNTER_INVALID, 0]];
        self.write(0, &constants.concat())?;
        self.write(DISRUPTIONS, &self.state.disruptions.to_le_bytes())?;
        let mut rest = [0; (GENERATIONS - FLAGS) as usize];
        rest[..8].copy_from_slice(&(GENERATIONS_PRESENT | NOTIFICATIONS_PRESENT).to_le_bytes());
        self.write(FLAGS, &rest)?;
        self.write(GENERATIONS, &self.state.generations.to_le_bytes())
    }

    /// From here on a reader knows that the page is being changed.
    fn open(&mut self) -> Result<()> {
        self.next_sequence(Ordering::Relaxed)?;
        fence(Ordering::Release);
        Ok(())
    }

    /// From here on a reader may believe the page.
    fn close(&mut self) -> Result<()> {
        self.next_sequence(Ordering::Release)
    }
}

impl FixedDevice for VmClock {
    const NAME: &'static str = "VM clock";

    fn build(place: Place, site: &mut Site<'_>) -> Result<Option<Self>> {
        let Place::Memory { range, .. } = place else {
            return Err(Error::host("the VM clock is in guest memory"));
        };
        Ok(Some(Self::new(site.memory.clone(), range.start, site.line(place)?)))
    }
}

impl Snapshot for VmClock {
    type State = State;

    fn save(&self) -> Result<State> {
        Ok(self.state)
    }

    /// The page tells of the next generation before the guest runs, and the interrupt comes behind it. A guest that
    /// was saved while it read the page finds another sequence number, and reads it again.
    fn restore(&mut self, state: State) -> Result<()> {
        // Saved between two changes: the number is even, whatever a file says.
        self.state = State { sequence: state.sequence & !1, ..state };
        self.open()?;
        self.state.disruptions = state.disruptions.wrapping_add(1);
        self.state.generations = state.generations.wrapping_add(1);
        self.write_fields()?;
        self.close()?;
        self.interrupt.raise().context("interrupt the guest for the change of its VM clock")
    }
}

impl Component for VmClock {
    fn nodes(&self, place: Place) -> Vec<Node> {
        // The interrupt is left out: it belongs to the generic event device, whose node names it.
        let resources = match place {
            Place::Memory { range, .. } => Place::Memory { range, gsi: None }.resources(),
            _ => Vec::new(),
        };
        let acpi = AcpiDevice::new("VCLK", AcpiValue::Text("AMZNC10C"), resources)
            .with("_CID", AcpiValue::Text("VMCLOCK"))
            .with("_DDN", AcpiValue::Text("VMCLOCK"));
        Node::of_memory(place, "vmclock", "amazon,vmclock", acpi)
    }

    fn begin(&mut self) -> Result<()> {
        self.open()?;
        self.write_fields()?;
        self.close()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::memory::{self, Range};
    use crate::poll::{self, EventFd};

    const AT: u64 = 0x1000;

    fn device(memory: &Memory) -> (VmClock, Arc<EventFd>) {
        let interrupt = Arc::new(poll::event("interrupt").unwrap());
        (VmClock::new(memory.clone(), AT, Line::Event(interrupt.clone())), interrupt)
    }

    fn memory() -> Memory {
        memory::allocate(&[Range { start: 0, size: 2 << 20 }]).unwrap()
    }

    fn u64_at(memory: &Memory, offset: u64) -> u64 {
        memory.memory().read_obj(GuestAddress(AT + offset)).unwrap()
    }

    fn sequence(memory: &Memory) -> u32 {
        memory.memory().read_obj(GuestAddress(AT + SEQUENCE)).unwrap()
    }

    /// What a guest reads that began when the sequence number was `begun`; None: it has to begin again.
    fn believed(memory: &Memory, begun: u32) -> Option<(u64, u64)> {
        let found = (u64_at(memory, DISRUPTIONS), u64_at(memory, GENERATIONS));
        (begun.is_multiple_of(2) && sequence(memory) == begun).then_some(found)
    }

    #[test]
    fn a_guest_that_starts_finds_the_page_as_linux_describes_it() {
        let memory = memory();
        let (mut clock, interrupt) = device(&memory);
        clock.begin().unwrap();
        let mut page = [0; 0x70];
        memory.memory().read_slice(&mut page, GuestAddress(AT)).unwrap();
        assert_eq!(&page[..12], b"VCLK\0\x10\0\0\x01\0\xff\0");
        assert_eq!(page[24..26], [0, 3], "the two flags");
        assert!(page[16..24].iter().chain(&page[26..]).all(|byte| *byte == 0), "{page:?}");
        assert_eq!(believed(&memory, sequence(&memory)), Some((0, 0)));
        assert!(interrupt.read().is_err(), "a guest that starts need not be told");
    }

    #[test]
    fn a_restored_guest_finds_both_counters_moved_on_and_hears() {
        let memory = memory();
        device(&memory).0.begin().unwrap();
        let mut state = device(&memory).0.save().unwrap();
        for generation in 1..5 {
            // Whatever a guest has done to the page.
            memory.memory().write_slice(&[0xff; 0x70], GuestAddress(AT)).unwrap();
            let (mut clone, interrupt) = device(&memory);
            clone.restore(state).unwrap();
            assert_eq!(interrupt.read().unwrap(), 1);
            assert_eq!(believed(&memory, sequence(&memory)), Some((generation, generation)));
            assert_eq!(u64_at(&memory, FLAGS), 0x300);
            state = clone.save().unwrap();
        }
        for state in [State { sequence: u32::MAX, ..state }, State { disruptions: u64::MAX, ..state }] {
            device(&memory).0.restore(state).unwrap();
            assert!(believed(&memory, sequence(&memory)).is_some(), "{state:?}");
        }
    }

    /// A reader is let in between any two steps of a change, and may have begun before any of them.
    #[test]
    fn no_reader_believes_half_of_a_change() {
        let memory = memory();
        let (mut clock, _interrupt) = device(&memory);
        clock.begin().unwrap();
        let before = sequence(&memory);
        assert_eq!(believed(&memory, before), Some((0, 0)));
        clock.open().unwrap();
        let during = sequence(&memory);
        let refused = |memory: &Memory| [before, during].map(|begun| believed(memory, begun)) == [None, None];
        assert!(refused(&memory), "opened");
        clock.state = State { disruptions: 7, generations: 7, ..clock.state };
        clock.write_fields().unwrap();
        assert!(refused(&memory), "written");
        clock.close().unwrap();
        assert!(refused(&memory), "closed");
        assert_eq!(believed(&memory, sequence(&memory)), Some((7, 7)));
    }
}
