//! Memory hotplug, beyond what every device promises: blocks that come and go, as drivers ask for them that behave and
//! that do not.

use alula::memory::slots::{Held, Slots};
use serde_json::Value;

use super::*;

pub const PLUG: u16 = 0;
pub const UNPLUG: u16 = 1;
pub const UNPLUG_ALL: u16 = 2;
pub const STATE: u16 = 3;
const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;
const ALL_PLUGGED: u16 = 0;
const ALL_UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

/// Four slots of 64 blocks, at 8 GiB.
const ROOM: memory::Range = memory::Range { start: 8 << 30, size: 4 * SLOT };
const SLOT: u64 = 128 << 20;
const BLOCK: u64 = 2 << 20;
const PER_SLOT: u16 = (SLOT / BLOCK) as u16;

/// A request as a driver writes it (struct virtio_mem_req).
pub fn request(kind: u16, address: u64, count: u16) -> Vec<u8> {
    let fields = [kind.into(), address, count.into()];
    fields.map(u64::to_le_bytes).concat()
}

fn config() -> ConfiguredDevice {
    let kind = KINDS.iter().find(|kind| kind.section == "memory-hotplug").unwrap();
    kind.parse(json!({ "total_size_mib": 512 }).to_string().as_bytes()).unwrap()
}

/// A guest whose driver runs, in a machine without KVM.
struct Hotplug {
    guest: Guest,
    held: Arc<Held>,
}

impl Hotplug {
    fn new() -> Self {
        let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
        let mut this = Self::over(memory);
        this.guest.start(F_EVENT_IDX);
        this.guest.turn();
        this
    }

    fn over(memory: memory::Memory) -> Self {
        let held = Arc::new(Held::new(memory.clone()));
        let mut opened = config().open("it", &mut host::Host::default()).unwrap();
        opened.set_window(ROOM);
        opened.set_slots(held.clone());
        Self { guest: Guest::by_hand(TransportKind::Pci, opened, memory), held }
    }

    fn patch(&mut self, mib: u64) -> Result<()> {
        let body = json!({ "requested_size_mib": mib }).to_string();
        let change = config().kind().parse_patch("", body.as_bytes()).unwrap();
        self.guest.pause();
        let result = self.guest.transport.lock().unwrap().patch(change.patch(), &mut host::Host::default());
        self.guest.resume();
        self.guest.turn();
        result
    }

    /// The answer to a request, and the state of blocks in it.
    fn ask(&mut self, kind: u16, block: u64, count: u16) -> (u16, u16) {
        self.ask_at(kind, ROOM.start + block * BLOCK, count)
    }

    fn ask_at(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        self.guest.notes.allocated = 0;
        let asked = self.guest.allocate(&request(kind, address, count));
        let answer = self.guest.allocate(&[0xff; 10]);
        assert_eq!(self.guest.request(0, &[(asked, 0), (answer, WRITE)]), 10);
        let bytes = self.guest.bytes(answer);
        assert_eq!(bytes[2..8], [0; 6]);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        (half(0), half(8))
    }

    fn is_done(&mut self, kind: u16, block: u64, count: u16) {
        assert_eq!(self.ask(kind, block, count), (ACK, 0), "{kind} {block} {count}");
    }

    /// The slots that the guest finds, by their numbers.
    fn slots(&self) -> Vec<u64> {
        self.held.list(ROOM).iter().map(|slot| (slot.start - ROOM.start) / SLOT).collect()
    }

    /// Usable, plugged and requested, in MiB.
    fn sizes(&mut self) -> [u64; 3] {
        [32, 40, 48].map(|offset| self.word(offset) >> 20)
    }

    fn word(&mut self, offset: u64) -> u64 {
        let mut halves = [[0; 4]; 2];
        self.guest.config(offset, &mut halves[0]);
        self.guest.config(offset + 4, &mut halves[1]);
        u64::from_le_bytes(halves.concat().try_into().unwrap())
    }

    fn counted(&self, name: &str) -> u64 {
        self.guest.transport.lock().unwrap().metrics(View::Total)[name].as_u64().unwrap()
    }

    fn told(&self) -> Value {
        self.guest.transport.lock().unwrap().tell("").unwrap()
    }

    /// A byte in a block; None: the guest finds no memory there.
    fn byte(&self, block: u64) -> Option<u8> {
        self.guest.memory.memory().read_obj(GuestAddress(ROOM.start + block * BLOCK)).ok()
    }

    fn write(&self, block: u64) {
        self.guest.memory.memory().write_obj(7_u8, GuestAddress(ROOM.start + block * BLOCK)).unwrap();
    }
}

#[test]
fn a_machine_that_is_reset_has_nothing_plugged() {
    let mut hotplug = Hotplug::new();
    hotplug.patch(256).unwrap();
    hotplug.is_done(PLUG, 0, 3);
    let Hotplug { guest, held } = hotplug;
    let device = guest.transport.lock().unwrap().take_device();
    drop(guest);
    // The machine before has what was plugged until it is gone, and the device does not.
    assert_eq!((held.list(ROOM).len(), Arc::strong_count(&held)), (1, 1));
    let told = device.tell("").unwrap();
    assert_eq!((&told["plugged_size_mib"], &told["requested_size_mib"]), (&json!(0), &json!(256)));
}

#[test]
fn a_driver_is_told_where_memory_can_be_and_how_much_is_wanted() {
    let mut it = Hotplug::new();
    assert_ne!(it.guest.features() & 2, 0, "unplugged memory is inaccessible");
    assert_eq!([0, 8, 16, 24].map(|offset| it.word(offset)), [BLOCK, 0, ROOM.start, ROOM.size]);
    assert_eq!(it.sizes(), [0, 0, 0]);
    it.patch(130).unwrap();
    assert!(it.guest.is_interrupted(None), "the driver is not told");
    assert_eq!(it.sizes(), [256, 0, 130]);
    let told = json!({
        "total_size_mib": 512, "block_size_mib": 2, "slot_size_mib": 128,
        "plugged_size_mib": 0, "requested_size_mib": 130,
    });
    assert_eq!(it.told(), told);
    // Beyond its end, configuration is zeros; and no driver writes any of it.
    it.guest.set_config(48, &[0xff; 8]);
    assert_eq!((it.word(56), it.sizes()), (0, [256, 0, 130]));
}

#[test]
fn slots_come_with_their_first_block_and_go_with_their_last() {
    let mut it = Hotplug::new();
    it.patch(512).unwrap();
    assert_eq!((it.slots(), it.byte(0)), (vec![], None));
    // The end of one slot and the beginning of the next.
    it.is_done(PLUG, 62, 4);
    assert_eq!((it.slots(), it.sizes()), (vec![0, 1], [512, 8, 512]));
    (62..66).for_each(|block| it.write(block));
    assert_eq!(it.ask(STATE, 62, 4), (ACK, ALL_PLUGGED));
    assert_eq!(it.ask(STATE, 61, 4), (ACK, MIXED));
    assert_eq!(it.ask(STATE, 66, 100), (ACK, ALL_UNPLUGGED));
    // The memory goes back at once, and the slots stay for what is left in them.
    it.is_done(UNPLUG, 63, 2);
    assert_eq!([62, 63, 64, 65].map(|block| it.byte(block)), [Some(7), Some(0), Some(0), Some(7)]);
    it.is_done(UNPLUG, 62, 1);
    assert_eq!((it.slots(), it.byte(62), it.byte(65)), (vec![1], None, Some(7)));
    it.is_done(PLUG, 0, 3 * PER_SLOT / 3);
    it.is_done(PLUG, 128, 128);
    assert_eq!((it.slots(), it.sizes()[1]), (vec![0, 1, 2, 3], 128 + 2 + 256));
    it.is_done(UNPLUG_ALL, 0, 0);
    assert_eq!((it.slots(), it.sizes()), (vec![], [512, 0, 512]));
    it.is_done(PLUG, 65, 1);
    assert_eq!(it.byte(65), Some(0));
    let counts =
        ["plug_count", "unplug_count", "unplug_all_count", "state_count"].map(|name| it.counted(name));
    assert_eq!((counts, it.counted("plug_bytes")), ([4, 2, 1, 3], (4 + 64 + 128 + 1) * BLOCK));
    assert_eq!((it.counted("unplug_bytes"), it.counted("unplug_discard_fails")), (3 * BLOCK, 0));
}

#[test]
fn requests_that_cannot_be_change_nothing() {
    let mut it = Hotplug::new();
    assert_eq!(it.ask(PLUG, 0, 1), (ERROR, 0), "nothing is requested");
    it.patch(8).unwrap();
    it.is_done(PLUG, 1, 2);
    let end = ROOM.start + ROOM.size;
    for kind in [PLUG, UNPLUG, STATE] {
        for (address, count) in [
            (ROOM.start, 0),
            (ROOM.start + 1, 1),
            (ROOM.start - BLOCK, 1),
            (ROOM.start, PER_SLOT + 1),
            (ROOM.start, u16::MAX),
            (ROOM.start + SLOT, 1),
            (end - BLOCK, 1),
            (end, 1),
            (u64::MAX - BLOCK + 1, u16::MAX),
            (0, 1),
        ] {
            assert_eq!(it.ask_at(kind, address, count), (ERROR, 0), "{kind} {address:#x} {count}");
        }
    }
    for (kind, block, count, expected) in [
        (PLUG, 1, 1, ERROR),
        (PLUG, 0, 2, ERROR),
        (PLUG, 3, 3, NACK),
        (UNPLUG, 0, 1, ERROR),
        (UNPLUG, 0, 2, ERROR),
        (UNPLUG, 2, 2, ERROR),
        (4, 1, 1, ERROR),
        (u16::MAX, 1, 1, ERROR),
    ] {
        assert_eq!(it.ask(kind, block, count), (expected, 0), "{kind} {block} {count}");
    }
    assert_eq!((it.sizes(), it.slots(), it.counted("plug_fails")), ([128, 4, 8], vec![0], 14));
    // Requests that are too short, and such without room for an answer, come back without one.
    let (asked, answer) = (it.guest.allocate(&request(PLUG, ROOM.start, 1)), it.guest.allocate(&[0xff; 10]));
    for pieces in [
        vec![((asked.0, 23), 0), (answer, WRITE)],
        vec![(asked, 0), ((answer.0, 9), WRITE)],
        vec![(asked, 0)],
        vec![(answer, WRITE)],
    ] {
        assert_eq!(it.guest.request(0, &pieces), 0);
    }
    assert_eq!((it.sizes(), it.guest.bytes(answer)), ([128, 4, 8], vec![0xff; 10]));
    // A request in memory that is not there is no request at all.
    it.guest.offer(0, &[((ROOM.start + SLOT, 24), 0), (answer, WRITE)]);
    it.guest.kick(0);
    it.guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
}

#[test]
fn what_cannot_come_now_is_for_another_time() {
    let mut it = Hotplug::new();
    it.patch(512).unwrap();
    it.is_done(PLUG, 0, PER_SLOT);
    it.held.hold();
    assert_eq!(it.ask(PLUG, 64, 1), (BUSY, 0));
    // What goes, goes for the guest; its memory goes back, and stays a slot of the snapshot that is written.
    it.write(5);
    it.is_done(UNPLUG, 0, PER_SLOT);
    assert_eq!((it.slots(), it.byte(5), it.sizes()[1]), (vec![0], Some(0), 0));
    it.is_done(PLUG, 3, 1);
    it.held.release();
    it.is_done(PLUG, 64, 64);
    it.is_done(UNPLUG, 3, 1);
    assert_eq!(it.slots(), [1]);
    // A device that is in no machine has no memory to give.
    let opened = config().open("it", &mut host::Host::default()).unwrap();
    let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
    it.guest = Guest::by_hand(TransportKind::Mmio, opened, memory);
    it.guest.start(0);
    it.guest.turn();
    it.patch(2).unwrap();
    assert_eq!(it.ask_at(PLUG, 0, 1), (BUSY, 0));
}

#[test]
fn what_is_usable_is_what_was_requested_and_never_less_than_plugged() {
    let mut it = Hotplug::new();
    it.patch(260).unwrap();
    it.is_done(PLUG, 128, 2);
    it.patch(0).unwrap();
    // The driver may take its time: what it has plugged stays where it is.
    assert_eq!(it.sizes(), [384, 4, 0]);
    assert_eq!(it.ask(PLUG, 0, 1), (NACK, 0));
    it.is_done(UNPLUG, 128, 1);
    it.is_done(UNPLUG_ALL, 0, 0);
    assert_eq!((it.sizes(), it.slots()), ([0, 0, 0], vec![]));
    for size in [1, 3, 514, u64::MAX] {
        let error = it.patch(size).unwrap_err().to_string();
        assert!(
            error.contains("it must be a multiple of block size and less than the total size"),
            "{error}"
        );
    }
}

#[test]
fn plugged_memory_is_the_guests_through_resets_and_moves() {
    let mut it = Hotplug::new();
    it.patch(128).unwrap();
    it.is_done(PLUG, 10, 3);
    it.write(11);
    it.guest.reset();
    assert_eq!((it.byte(11), it.sizes()), (Some(7), [128, 6, 128]));
    let early = it.patch(64).unwrap_err().to_string();
    assert!(early.starts_with("Device is not active"), "{early}");
    it.guest.start(0);
    it.guest.turn();
    assert_eq!(it.ask(STATE, 10, 3), (ACK, ALL_PLUGGED));
    let (memory, notes) = (it.guest.memory.clone(), it.guest.notes.clone());
    it.guest.pause();
    let state = it.guest.save();
    let mut other = Hotplug::over(memory.clone());
    other.guest.notes = notes;
    other.guest.restore(&state).unwrap();
    other.guest.resume();
    other.guest.turn();
    assert_eq!((other.sizes(), other.byte(11), other.slots()), ([128, 6, 128], Some(7), vec![0]));
    other.is_done(UNPLUG, 10, 3);
    assert_eq!(other.slots(), [] as [u64; 0]);
    // A machine that has not the memory that the state says is plugged is another one's.
    let error = Hotplug::over(memory.clone()).guest.restore(&state).unwrap_err().to_string();
    assert!(error.contains("lacks 0x8000000 bytes at 0x200000000"), "{error}");
    // One that has a slot more lets it go.
    let mut more = Hotplug::over(memory);
    for slot in [0, 1] {
        let range = memory::Range { start: ROOM.start + slot * SLOT, size: SLOT };
        Slots::add(&*more.held, range).unwrap();
    }
    more.guest.restore(&state).unwrap();
    assert_eq!(more.slots(), [0]);
}
