//! PCIe slots: a guest finds what is in them by the numbers that it gives to their buses, and hears of what comes and goes.

use std::sync::{Arc, Mutex};

use alula::arch::layout::PCI_MEMORY;
use alula::bus::{Bus, BusDevice};
use alula::pci::port::Port;
use alula::pci::root::{Ecam, Function, FunctionRegisters, Root};
use alula::pci::{DEVICES_MAX, SLOTS_MAX};
use alula::poll::EventFd;
use alula::snapshot::SaveState;
use alula::virtio::pci::Pci;
use alula::virtio::workers::ByHand;

use super::*;

/// Registers of a port: those of a bridge, and those of its capabilities.
const COMMAND: u64 = 0x04;
const BUS_NUMBERS: u64 = 0x18;
const WINDOW: u64 = 0x20;
const BAR: u64 = 0x10;
const EXPRESS: u8 = 0x10;
const MSI: u8 = 0x05;
const LINK_STATUS: u64 = 0x12;
const SLOT_CONTROL: u64 = 0x18;
const SLOT_STATUS: u64 = 0x1a;

/// Slot control: both kinds of interrupts; slot status: both changes, and that somebody is there.
const INTERRUPTS: u16 = 1 << 3 | 1 << 5 | 1 << 12;
const CHANGES: u16 = 1 << 3 | 1 << 8;
const PRESENT: u16 = 1 << 6;

/// The register of how many queues a device has, in those that its BAR leads to (virtio 1.3, 4.1.4.3).
const QUEUES: u64 = 0x12;

const NOBODY: u32 = u32::MAX;
const ENTROPY: u32 = 0x1044_1af4;

/// Where this MiB of PCI's memory is.
fn mib(number: u64) -> u64 {
    PCI_MEMORY.start + (number << 20)
}

/// A bus with two slots.
struct Ports {
    root: Arc<Mutex<Root>>,
    ecam: Ecam,
    /// The interrupts of the ports.
    events: [Arc<EventFd>; 2],
    by_hand: ByHand,
    mmio: Arc<Bus>,
}

impl Ports {
    fn new() -> Self {
        let mmio = Arc::<Bus>::default();
        let mut root = Root::new(driver::vm(), &mmio);
        let events = [1, 2].map(|slot| {
            let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap());
            let port = Port::new(driver::vm(), event.clone(), 29 + slot, slot).unwrap();
            root.add_port(29 + slot, port).unwrap();
            event
        });
        let root = Arc::new(Mutex::new(root));
        Self { ecam: Ecam(root.clone()), root, events, by_hand: ByHand::new().unwrap(), mmio }
    }

    /// A device comes in a slot.
    fn plug(&self, slot: u32) -> Arc<Mutex<Pci>> {
        let memory = memory::allocate(&[memory::Range { start: 0, size: 1 << 20 }]).unwrap();
        let entropy = KINDS.iter().find(|kind| kind.section == "entropy").unwrap();
        let device = entropy.parse(b"{}").unwrap().open("test", &mut alula::host::Host::default()).unwrap();
        let place = DEVICES_MAX as u32 + slot - 1;
        let (_, function) = driver::function(device, memory, self.by_hand.event_loop(), place);
        let registers =
            FunctionRegisters { device: Arc::new(Mutex::new(function.registers())), kicks: Vec::new() };
        let function = Arc::new(Mutex::new(function));
        self.root.lock().unwrap().add(place, function.clone(), Some(registers)).unwrap();
        function
    }

    fn take_away(&self, slot: u32) {
        self.root.lock().unwrap().remove(DEVICES_MAX as u32 + slot - 1).unwrap();
    }

    fn read<const N: usize>(&mut self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.ecam.read(address, &mut data);
        data
    }

    /// Who is the device with this number on this bus.
    fn id(&mut self, bus: u64, device: u64) -> u32 {
        u32::from_le_bytes(self.read(bus << 20 | device << 15))
    }

    /// Where the configuration space of a slot's port is.
    fn port(slot: u64) -> u64 {
        (29 + slot) << 15
    }

    /// Where a capability of this function is.
    fn capability(&mut self, function: u64, id: u8) -> u64 {
        let [mut at] = self.read(function + 0x34);
        for _ in 0..16 {
            let [found, next] = self.read(function + u64::from(at));
            if found == id {
                return function + u64::from(at);
            }
            at = next;
        }
        panic!("no capability {id:#x}");
    }

    fn express(&mut self, slot: u64, register: u64) -> u16 {
        let at = self.capability(Self::port(slot), EXPRESS);
        u16::from_le_bytes(self.read(at + register))
    }

    fn set_express(&mut self, slot: u64, register: u64, value: u16) {
        let at = self.capability(Self::port(slot), EXPRESS);
        self.ecam.write(at + register, &value.to_le_bytes());
    }

    /// Gives the bus behind a port this number.
    fn number(&mut self, slot: u64, bus: u8) {
        self.ecam.write(Self::port(slot) + BUS_NUMBERS, &[0, bus, bus, 0]);
    }

    /// Has a port pass on what is from this MiB of PCI's memory to that one.
    fn open_window(&mut self, slot: u64, first: u64, last: u64) {
        let [first, last] = [first, last].map(|number| (mib(number) >> 16) as u16);
        let window = u32::from(first) | u32::from(last) << 16;
        self.ecam.write(Self::port(slot) + WINDOW, &window.to_le_bytes());
    }

    /// The numbers of the MiB of PCI's memory, of the first eight, in which the guest reaches registers.
    fn reached(&self) -> Vec<u64> {
        let answers = |number: &u64| {
            let mut data = [0; 4];
            self.mmio.read(mib(*number), &mut data);
            u32::from_le_bytes(data) != NOBODY
        };
        (0..8).filter(answers).collect()
    }

    /// How many queues the device has whose registers are in this MiB of PCI's memory: 0 is what remains of one.
    fn queues_at(&self, number: u64) -> u16 {
        let mut queues = [0; 2];
        self.mmio.read(mib(number) + QUEUES, &mut queues);
        u16::from_le_bytes(queues)
    }

    /// How many interrupts the port of a slot has sent since this was last asked.
    fn interrupts(&self, slot: usize) -> u64 {
        self.events[slot - 1].read().unwrap_or(0)
    }

    fn save(&self) -> Vec<u8> {
        self.root.lock().unwrap().save_state().unwrap()
    }
}

#[test]
fn a_device_in_a_slot_is_on_the_bus_that_the_guest_numbers() {
    let mut ports = Ports::new();
    ports.plug(2);
    // Until it is numbered, nobody is on any other bus; ports are bridges whatever the guest writes.
    assert!((1..=255).all(|bus| ports.id(bus, 0) == NOBODY));
    for slot in [1, 2] {
        let [bridge, class] =
            [0x0e, 0x0a].map(|register| u16::from_le_bytes(ports.read(Ports::port(slot) + register)));
        assert_eq!((bridge & 0x7f, class), (1, 0x0604));
        ports.ecam.write(Ports::port(slot), &[0xff; 4]);
        assert_eq!(ports.id(0, 29 + slot), 0x000c_1b36);
    }
    for bus in [1, 15, 255] {
        ports.number(2, bus);
        let found: Vec<_> =
            (0..=255).filter(|bus| (0..32).any(|device| ports.id(*bus, device) == ENTROPY)).collect();
        assert_eq!(found, [u64::from(bus)]);
        assert!((1..32).all(|device| ports.id(bus.into(), device) == NOBODY));
    }
    ports.take_away(2);
    assert_eq!(ports.id(255, 0), NOBODY);
}

#[test]
fn a_number_of_several_buses_is_that_of_the_first() {
    let mut ports = Ports::new();
    ports.plug(2);
    ports.number(1, 7);
    ports.number(2, 7);
    assert_eq!(ports.id(7, 0), NOBODY, "the first one's slot is empty");
    ports.plug(1);
    assert_eq!(ports.id(7, 0), ENTROPY);
    // Bus 0 stays that of the root.
    let bridge = ports.id(0, 0);
    ports.number(1, 0);
    assert_eq!(ports.id(0, 0), bridge);
}

#[test]
fn a_device_in_a_slot_is_reached_in_the_window_of_its_port() {
    let mut ports = Ports::new();
    ports.plug(1);
    ports.number(1, 3);
    let device = 3 << 20;
    ports.ecam.write(device + BAR, &mib(2).to_le_bytes());
    ports.ecam.write(device + COMMAND, &[6, 0]);
    ports.open_window(1, 1, 3);
    assert!(ports.reached().is_empty(), "the port decodes no memory yet");
    ports.ecam.write(Ports::port(1) + COMMAND, &[6, 0]);
    assert_eq!(ports.reached(), [2]);
    for (first, last, is_open) in [(0, 1, false), (2, 2, true), (3, 5, false), (3, 1, false), (0, 2, true)] {
        ports.open_window(1, first, last);
        assert_eq!(ports.reached().contains(&2), is_open, "{first} to {last}");
    }
    // The guest moves the device out of the window, and back in.
    for (number, is_open) in [(3, false), (1, true)] {
        ports.ecam.write(device + BAR, &mib(number).to_le_bytes());
        assert_eq!(ports.reached(), if is_open { vec![number] } else { vec![] });
    }
    // Each port has a window of its own.
    ports.open_window(2, 4, 5);
    ports.ecam.write(Ports::port(2) + COMMAND, &[6, 0]);
    assert_eq!(ports.reached(), [1]);
    let mut other = Ports::new();
    other.plug(1);
    other.root.lock().unwrap().restore_state(&ports.save()).unwrap();
    assert_eq!(other.reached(), [1]);
    other.ecam.write(Ports::port(1) + COMMAND, &[4, 0]);
    assert!(other.reached().is_empty());
    // What remains of a device that was torn away is in nobody's way until a port lets the next one there.
    ports.root.lock().unwrap().tear_away(DEVICES_MAX as u32).unwrap();
    assert_eq!(ports.reached(), [1]);
    ports.plug(2);
    ports.number(2, 4);
    ports.ecam.write((4 << 20) + BAR, &mib(1).to_le_bytes());
    ports.ecam.write((4 << 20) + COMMAND, &[6, 0]);
    assert_eq!(ports.queues_at(1), 0, "the torn one's");
    ports.open_window(2, 1, 1);
    assert_eq!(ports.queues_at(1), 1);
}

#[test]
fn a_driver_that_is_late_finds_zeros_beside_the_next_device() {
    let mut ports = Ports::new();
    ports.number(1, 3);
    ports.open_window(1, 0, 7);
    ports.ecam.write(Ports::port(1) + COMMAND, &[6, 0]);
    for round in 0..3 {
        ports.plug(1);
        // The driver of the device before has not reset that yet.
        let before = ports.queues_at(1);
        assert_eq!(before, if round == 0 { u16::MAX } else { 0 });
        ports.ecam.write((3 << 20) + BAR, &mib(1).to_le_bytes());
        assert_eq!(ports.queues_at(1), before, "the new one decodes no memory yet");
        ports.ecam.write((3 << 20) + COMMAND, &[6, 0]);
        assert_eq!(ports.queues_at(1), 1);
        ports.root.lock().unwrap().tear_away(DEVICES_MAX as u32).unwrap();
    }
    // One that is elsewhere when it is torn away leaves what remains in one place alone.
    ports.plug(1);
    ports.ecam.write((3 << 20) + BAR, &mib(2).to_le_bytes());
    ports.ecam.write((3 << 20) + COMMAND, &[6, 0]);
    assert_eq!(ports.reached(), [1, 2]);
    ports.root.lock().unwrap().tear_away(DEVICES_MAX as u32).unwrap();
    assert_eq!(ports.reached(), [2]);
}

#[test]
fn a_device_that_waits_for_a_place_has_it_after_a_restore() {
    let mut ports = Ports::new();
    for slot in [1, 2] {
        ports.plug(slot);
        ports.number(slot as u64, 2 + slot as u8);
        ports.open_window(slot as u64, 0, 7);
        ports.ecam.write(Ports::port(slot as u64) + COMMAND, &[6, 0]);
        // A guest puts both in one place, where the first one is.
        ports.ecam.write((u64::from(2 + slot) << 20) + BAR, &mib(1).to_le_bytes());
        ports.ecam.write((u64::from(2 + slot) << 20) + COMMAND, &[6, 0]);
    }
    ports.root.lock().unwrap().tear_away(DEVICES_MAX as u32).unwrap();
    assert_eq!(ports.queues_at(1), 0, "the torn one's");
    let other = Ports::new();
    other.plug(2);
    other.root.lock().unwrap().restore_state(&ports.save()).unwrap();
    assert_eq!(other.queues_at(1), 1);
}

#[test]
fn a_device_in_a_slot_sends_messages_from_its_bus() {
    let mut ports = Ports::new();
    let senders = |device: &Mutex<Pci>| -> Vec<_> {
        let messages = device.lock().unwrap().messages();
        messages.into_iter().map(|(_, message)| message.device).collect()
    };
    let device = ports.plug(1);
    ports.number(1, 3);
    let control = ports.capability(3 << 20, 0x11) + 2;
    let mut registers = device.lock().unwrap().registers();
    for (register, value) in (0..).zip([0xfee0_0000_u32, 0, 0x40, 0]) {
        registers.write(0x3000 + register * 4, &value.to_le_bytes());
    }
    ports.ecam.write(control, &[0, 0x80]);
    assert_eq!(senders(&device), [3 << 8]);
    // Linux of aarch64 numbers all buses anew whenever it looks for devices, whose interrupts come meanwhile.
    for bus in [0, 9] {
        ports.number(1, bus);
        assert_eq!(senders(&device), [3 << 8], "nobody has told the device of bus {bus}");
    }
    ports.ecam.write((9 << 20) + COMMAND, &[6, 0]);
    assert_eq!(senders(&device), [9 << 8]);
    // A machine that is built anew knows the number as well.
    let mut other = Ports::new();
    let device = other.plug(1);
    other.root.lock().unwrap().restore_state(&ports.save()).unwrap();
    assert_eq!(senders(&device), [9 << 8]);
    assert_eq!(other.id(9, 0), ENTROPY);
}

#[test]
fn a_guest_hears_of_what_comes_and_goes_if_it_wants_to() {
    let mut ports = Ports::new();
    assert_eq!((ports.express(1, SLOT_STATUS), ports.express(1, LINK_STATUS)), (0, 0x11));
    // The guest has switched on no interrupt of the port.
    ports.plug(1);
    assert_eq!((ports.express(1, SLOT_STATUS), ports.express(1, LINK_STATUS)), (CHANGES | PRESENT, 0x2011));
    assert_eq!(ports.interrupts(1), 0);
    // Whoever asks hears what there is to tell, once.
    ports.set_express(1, SLOT_CONTROL, INTERRUPTS);
    assert_eq!(ports.interrupts(1), 1);
    ports.set_express(1, SLOT_CONTROL, INTERRUPTS);
    assert_eq!(ports.interrupts(1), 0);
    // Ones are acknowledged, zeros are not; whether somebody is there is not the guest's to say.
    ports.set_express(1, SLOT_STATUS, 1 << 3);
    assert_eq!(ports.express(1, SLOT_STATUS), 1 << 8 | PRESENT);
    ports.take_away(1);
    assert_eq!(ports.interrupts(1), 0, "a change that is unseen tells of those after it");
    ports.set_express(1, SLOT_STATUS, 0xffff);
    assert_eq!((ports.express(1, SLOT_STATUS), ports.express(1, LINK_STATUS)), (0, 0x11));
    for _ in 0..3 {
        ports.plug(1);
        assert_eq!(ports.interrupts(1), 1);
        ports.set_express(1, SLOT_STATUS, CHANGES);
        ports.take_away(1);
        assert_eq!(ports.interrupts(1), 1);
        ports.set_express(1, SLOT_STATUS, CHANGES);
    }
    // One of both changes, and none of them.
    for (control, count) in [(1 << 5 | 1 << 3, 1), (1 << 5 | 1 << 12, 1), (1 << 5, 0), (1 << 3 | 1 << 12, 0)]
    {
        ports.set_express(1, SLOT_CONTROL, control);
        ports.plug(1);
        assert_eq!(ports.interrupts(1), count, "{control:#x}");
        ports.take_away(1);
        ports.set_express(1, SLOT_STATUS, CHANGES);
        ports.interrupts(1);
    }
    assert_eq!(ports.interrupts(2), 0);
}

#[test]
fn what_a_guest_was_told_of_a_slot_is_saved() {
    let mut ports = Ports::new();
    ports.set_express(1, SLOT_CONTROL, INTERRUPTS);
    ports.set_express(2, SLOT_CONTROL, INTERRUPTS);
    let message = ports.capability(Ports::port(1), MSI);
    ports.ecam.write(message + 4, &0xfee0_0000_u32.to_le_bytes());
    ports.ecam.write(message + 12, &0x41_u16.to_le_bytes());
    ports.plug(1);
    ports.plug(2);
    ports.set_express(2, SLOT_STATUS, CHANGES);
    ports.interrupts(2);
    let saved = ports.save();
    let mut other = Ports::new();
    other.plug(1);
    other.plug(2);
    other.root.lock().unwrap().restore_state(&saved).unwrap();
    assert_eq!(other.express(1, SLOT_STATUS), CHANGES | PRESENT);
    assert_eq!(other.express(2, SLOT_STATUS), PRESENT);
    // The interrupt that was pending when the port was saved comes once after the restore, and the other port, which had
    // none, sends none.
    assert_eq!((other.interrupts(1), other.interrupts(2)), (1, 0));
    assert_eq!(other.read(message + 12), 0x41_u16.to_le_bytes());
    other.take_away(2);
    assert_eq!((other.interrupts(1), other.interrupts(2)), (0, 1));
    // A state of slots that this bus lacks is refused.
    let mmio = Arc::default();
    let mut bare = Root::new(driver::vm(), &mmio);
    let error = bare.restore_state(&saved).unwrap_err().to_string();
    assert!(error.contains("restore PCI device 30: there is no such device"), "{error}");
}

#[test]
fn a_port_sends_its_message_while_it_may() {
    let mut ports = Ports::new();
    let message = ports.capability(Ports::port(1), MSI);
    ports.ecam.write(message + 4, &[0xff; 10]);
    assert_eq!(ports.read::<4>(message + 4), [0xfc, 0xff, 0xff, 0xff]);
    ports.ecam.write(message + 4, &0xfee0_0000_u64.to_le_bytes());
    ports.ecam.write(message + 12, &0x41_u16.to_le_bytes());
    ports.set_express(1, SLOT_CONTROL, INTERRUPTS);
    ports.ecam.write(message + 2, &[1, 0]);
    ports.plug(1);
    assert_eq!(ports.interrupts(1), 1, "a function that is no master writes nothing");
    ports.set_express(1, SLOT_STATUS, CHANGES);
    ports.ecam.write(Ports::port(1) + COMMAND, &[6, 0]);
    ports.take_away(1);
    assert_eq!(ports.interrupts(1), 0, "KVM has taken it");
}

#[test]
fn a_hostile_guest_writes_anything_to_ports() {
    let mut ports = Ports::new();
    ports.plug(1);
    let mut random = 1_u64;
    for _ in 0..20_000 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (address, value) = (random >> 36, random.to_le_bytes());
        let width = 1 << (random >> 33 & 3);
        // Mostly at the ports' registers.
        let address = if random >> 35 & 1 == 0 { 30 << 15 | address & 0x80ff } else { address & 0xff_ffff };
        ports.ecam.write(address & !(width as u64 - 1), &value[..width]);
    }
    ports.save();
    ports.number(1, 1);
    assert_eq!(ports.id(1, 0), ENTROPY);
    let more = |slot| {
        Port::new(driver::vm(), Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()), slot, slot).unwrap()
    };
    let mut root = ports.root.lock().unwrap();
    (3..=SLOTS_MAX as u32).for_each(|slot| root.add_port(slot, more(slot)).unwrap());
    assert!(root.add_port(29, more(29)).unwrap_err().to_string().contains("15 PCIe slots already"));
}
