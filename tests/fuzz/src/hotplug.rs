//! Memory hotplug, whose driver and owner are up to the bytes: requests for any blocks, sizes that are asked for, memory
//! that is held for a snapshot, pauses and moves. Whatever they are, the device says what a plain model of it says, the
//! guest finds the slots that have plugged blocks, and the device works afterwards.

use std::sync::Arc;

use alula::devices::kind::ConfiguredDevice;
use alula::memory::slots::{Held, Slots};
use alula::memory::{self, Memory, Range};
use arbitrary::{Result, Unstructured};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::driver::{F_EVENT_IDX, Guest, MEMORY, TransportKind, WRITE};
use crate::host::{self, Host};

const STEPS_MAX: usize = 64;
const SLOT: u64 = 128 << 20;
const BLOCK: u64 = 2 << 20;
const ROOM: Range = Range { start: 1 << 40, size: 4 * SLOT };
const BLOCKS: usize = (ROOM.size / BLOCK) as usize;
const PER_SLOT: usize = (SLOT / BLOCK) as usize;
const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

pub fn run(bytes: &[u8]) {
    host::with(|host| {
        let device = host.devices.iter().find(|device| device.kind().section == "memory-hotplug").unwrap();
        let mut bytes = Unstructured::new(bytes);
        let kind = if bytes.arbitrary().unwrap_or(false) { TransportKind::Mmio } else { TransportKind::Pci };
        let memory = memory::allocate(&[Range { start: 0, size: MEMORY }]).unwrap();
        let (mut guest, held) = guest(host, kind, device, memory);
        guest.start(F_EVENT_IDX);
        guest.turn();
        let model = Model { plugged: [false; BLOCKS], usable: 0, requested: 0, is_held: false };
        let mut driver = Driver { host, device, guest: Some(guest), held, model };
        for _ in 0..STEPS_MAX {
            if bytes.is_empty() || driver.step(&mut bytes).is_err() {
                break;
            }
            driver.look();
        }
        let mut guest = driver.guest.take().unwrap();
        guest.start(0);
        host.exercise(device, &mut guest);
    });
}

/// A guest over this memory.
fn guest(host: &Host, kind: TransportKind, device: &ConfiguredDevice, memory: Memory) -> (Guest, Arc<Held>) {
    let held = Arc::new(Held::new(memory.clone()));
    let mut opened = host.open(device);
    opened.set_window(ROOM);
    opened.set_slots(held.clone());
    (Guest::by_hand(kind, opened, memory), held)
}

/// The blocks as they must be.
struct Model {
    plugged: [bool; BLOCKS],
    usable: usize,
    requested: usize,
    is_held: bool,
}

impl Model {
    fn count(&self) -> usize {
        self.plugged.iter().filter(|is_plugged| **is_plugged).count()
    }

    /// Whether a slot has plugged blocks.
    fn has(&self, slot: usize) -> bool {
        self.plugged[slot * PER_SLOT..][..PER_SLOT].contains(&true)
    }

    /// The answer to a request, which is done; `there` are the slots that the guest finds before.
    fn answer(&mut self, kind: u16, address: u64, count: u16, there: &[usize]) -> (u16, u16) {
        if kind == 2 {
            self.plugged = [false; BLOCKS];
            self.usable = self.requested.next_multiple_of(PER_SLOT);
            return (ACK, 0);
        }
        let first = address.wrapping_sub(ROOM.start) / BLOCK;
        let end = first.saturating_add(count.into());
        let is_there = address >= ROOM.start && address.is_multiple_of(BLOCK) && count > 0;
        if !is_there || end > self.usable as u64 || ![0, 1, 3].contains(&kind) {
            return (ERROR, 0);
        }
        let (blocks, total) = (first as usize..end as usize, self.count());
        let plugged = self.plugged[blocks.clone()].iter().filter(|is_plugged| **is_plugged).count();
        let (is_none, is_all) = (plugged == 0, plugged == blocks.len());
        match kind {
            0 if !is_none => (ERROR, 0),
            0 if total + blocks.len() > self.requested => (NACK, 0),
            0 if self.is_held
                && (blocks.start / PER_SLOT..blocks.end.div_ceil(PER_SLOT))
                    .any(|slot| !there.contains(&slot)) =>
            {
                (BUSY, 0)
            }
            1 if !is_all => (ERROR, 0),
            3 => (
                ACK,
                if is_all {
                    0
                } else if is_none {
                    1
                } else {
                    2
                },
            ),
            kind => {
                self.plugged[blocks].fill(kind == 0);
                (ACK, 0)
            }
        }
    }
}

struct Driver<'a> {
    host: &'a Host,
    device: &'a ConfiguredDevice,
    /// The guest; None: it is being built anew.
    guest: Option<Guest>,
    held: Arc<Held>,
    model: Model,
}

impl Driver<'_> {
    fn guest(&mut self) -> &mut Guest {
        let guest = self.guest.as_mut().unwrap();
        guest.notes.allocated = 0;
        guest
    }

    fn there(&self) -> Vec<usize> {
        self.held.list(ROOM).iter().map(|slot| ((slot.start - ROOM.start) / SLOT) as usize).collect()
    }

    fn step(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        match bytes.arbitrary::<u8>()? % 12 {
            0..=7 => self.ask(bytes)?,
            8 | 9 => self.patch(bytes)?,
            10 => {
                self.model.is_held = !self.model.is_held;
                match self.model.is_held {
                    true => self.held.hold(),
                    false => self.held.release(),
                }
            }
            _ => self.build_anew(),
        }
        Ok(())
    }

    fn ask(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        let kind = u16::from(bytes.arbitrary::<u8>()? % 5);
        let (block, count) =
            (u64::from(bytes.arbitrary::<u16>()? % 300), u16::from(bytes.arbitrary::<u8>()?));
        let (address, count) = match bytes.arbitrary::<u8>()? % 8 {
            0 => (bytes.arbitrary()?, bytes.arbitrary()?),
            1 => (ROOM.start + block * BLOCK + 1, count),
            _ => (ROOM.start + block * BLOCK, count),
        };
        let there = self.there();
        let expected = self.model.answer(kind, address, count, &there);
        let guest = self.guest();
        let request = [kind.into(), address, count.into()].map(u64::to_le_bytes).concat();
        let (asked, answer) = (guest.allocate(&request), guest.allocate(&[0xff; 10]));
        assert_eq!(guest.request(0, &[(asked, 0), (answer, WRITE)]), 10);
        let told = guest.bytes(answer);
        let half = |at: usize| u16::from_le_bytes([told[at], told[at + 1]]);
        assert_eq!((half(0), half(8)), expected, "{kind} {address:#x} {count}");
        Ok(())
    }

    fn patch(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        let any = bytes.arbitrary::<u8>()? % 4 == 0;
        let mib = u64::from(bytes.arbitrary::<u16>()?) % if any { u64::MAX } else { 600 };
        let body = format!(r#"{{"requested_size_mib": {mib}}}"#);
        let change = self.device.kind().parse_patch("", body.as_bytes()).unwrap();
        self.guest().pause();
        let patched =
            self.guest().transport.lock().unwrap().patch(change.patch(), &mut alula::host::Host::default());
        let is_right = mib << 20 <= ROOM.size && (mib << 20).is_multiple_of(BLOCK);
        assert_eq!(patched.is_ok(), is_right, "{mib}");
        if is_right {
            self.model.requested = ((mib << 20) / BLOCK) as usize;
            self.model.usable = self.model.usable.max(self.model.requested.next_multiple_of(PER_SLOT));
        }
        self.guest().resume();
        self.guest().turn();
        Ok(())
    }

    /// Has another machine go on from the state of this guest's machine, with the memory that it has.
    fn build_anew(&mut self) {
        if std::mem::take(&mut self.model.is_held) {
            self.held.release();
        }
        self.guest().pause();
        let old = self.guest.take().unwrap();
        let (state, notes, kind, memory) = (old.save(), old.notes.clone(), old.kind(), old.memory.clone());
        drop(old);
        let (mut guest, held) = guest(self.host, kind, self.device, memory);
        guest.notes = notes;
        guest.restore(&state).unwrap();
        assert!(guest.save() == state, "what was restored is not what was saved");
        guest.resume();
        guest.turn();
        (self.guest, self.held) = (Some(guest), held);
    }

    /// Asserts that the guest finds what is plugged, and is told how much that is.
    fn look(&mut self) {
        let there = self.there();
        for slot in 0..BLOCKS / PER_SLOT {
            // One that could not go while memory was held is there until its next block comes and goes.
            assert!(there.contains(&slot) || !self.model.has(slot), "slot {slot}");
            let start = GuestAddress(ROOM.start + slot as u64 * SLOT);
            let found = self.guest().memory.memory().read_obj::<u8>(start).is_ok();
            assert_eq!(found, there.contains(&slot), "slot {slot}");
        }
        let (plugged, requested) = (self.model.count() as u64 * 2, self.model.requested as u64 * 2);
        let told = self.guest().transport.lock().unwrap().tell("").unwrap();
        assert_eq!(told["plugged_size_mib"], plugged, "{told}");
        assert_eq!(told["requested_size_mib"], requested, "{told}");
    }
}
