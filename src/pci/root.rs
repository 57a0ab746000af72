//! The root: finds the function behind a configuration access, and moves its registers on the bus when
//! the guest moves its BAR.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde::{Deserialize, Serialize};

use super::config::HEADER_SIZE;
use super::port::Port;
use super::{CONFIG_SIZE, DEVICES_MAX, PLACES_MAX, SLOTS_MAX};
use crate::arch::layout;
use crate::bus::{Bus, BusDevice, Shared};
use crate::error::{Context, Error, Result};
use crate::log;
use crate::memory::Range;
use crate::part::Component;
use crate::platform::node::{AcpiDevice, AcpiValue, Resource, TreeNode, phandle};
use crate::platform::{Node, Place};
use crate::poll::EventFd;
use crate::snapshot::{SaveState, Snapshot, at_most, stateless};
use crate::vm::Vm;
use crate::vm::irq::Message;

/// Bytes of configuration space of one bus.
const BUS_SIZE: u64 = 256 * CONFIG_SIZE;

/// A function of the bus.
pub trait Function: SaveState + Send {
    /// The guest reads configuration space; the root has filled `data` with ones.
    fn read_config(&mut self, offset: usize, data: &mut [u8]);
    /// The guest writes configuration space.
    fn write_config(&mut self, offset: usize, data: &[u8]);
    /// Where its registers are now; none: nowhere.
    fn place(&self) -> Option<Range>;
    /// The interrupt messages that the function sends now, with their numbers.
    fn messages(&self) -> Vec<(u32, Message)> {
        Vec::new()
    }
    /// Has the function send these. To be called once it was restored.
    fn connect(&mut self) {}
    /// The function is this one from here on, by bus, device and function.
    fn set_requester(&mut self, _requester: u32) {}
}

/// What a function has on the memory bus, wherever it is.
pub struct FunctionRegisters {
    /// The registers themselves.
    pub device: Shared,
    /// Events that writes at these offsets trigger.
    pub kicks: Vec<(u64, Arc<EventFd>)>,
}

struct Slot {
    function: Arc<Mutex<dyn Function>>,
    registers: Option<FunctionRegisters>,
    placed: Option<Range>,
}

/// Bus 0 with up to 32 devices of one function each, some of which may be ports, with a place for one device behind each.
/// Buses end there: no number that a guest gives to a bus leads further than to that place.
pub struct Root {
    vm: Arc<Vm>,
    /// The bus has the root among its devices (configuration space is memory), and a bus that the root kept would never be dropped.
    mmio: Weak<Bus>,
    /// By place. On the heap each, as most are empty: a root is made on the stack, whose pages stay.
    slots: [Option<Box<Slot>>; PLACES_MAX],
    /// The ports, in the order of the places behind them.
    ports: Vec<Arc<Mutex<Port>>>,
    /// The address register of the port mechanism (x86).
    address: u32,
    /// Where the registers were of devices that were torn away from their drivers, by place.
    remains: Vec<(u32, Range)>,
}

/// The registers of a device that was torn away from its driver: all are 0. A driver that lets go of the device resets it,
/// and waits until the status is 0: Linux's would wait for ever for ones, which a bus reads as where nobody is.
struct Remains;

impl BusDevice for Remains {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}

impl Root {
    /// An empty bus whose functions' registers appear on `mmio`.
    pub fn new(vm: Arc<Vm>, mmio: &Arc<Bus>) -> Self {
        Self {
            vm,
            mmio: Arc::downgrade(mmio),
            slots: [const { None }; PLACES_MAX],
            ports: Vec::new(),
            address: 0,
            remains: Vec::new(),
        }
    }

    /// Adds a port as this device of bus 0; the place behind it is the next one after those behind other ports.
    pub fn add_port(&mut self, device: u32, port: Port) -> Result<()> {
        if self.ports.len() == SLOTS_MAX {
            return Err(Error::config(format!("there are {SLOTS_MAX} PCIe slots already")));
        }
        let port = Arc::new(Mutex::new(port));
        self.add(device, port.clone(), None)?;
        self.ports.push(port);
        Ok(())
    }

    /// The port that this place is behind.
    fn port_of(&self, place: usize) -> Option<MutexGuard<'_, Port>> {
        let port = self.ports.get(place.checked_sub(DEVICES_MAX)?)?;
        Some(port.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Adds a function at this place.
    pub fn add(
        &mut self,
        device: u32,
        function: Arc<Mutex<dyn Function>>,
        registers: Option<FunctionRegisters>,
    ) -> Result<()> {
        let places = DEVICES_MAX + self.ports.len();
        match self.slots[..places].get_mut(device as usize) {
            Some(slot @ None) => {
                *slot = Some(Box::new(Slot { function, registers, placed: None }));
                self.port_of(device as usize).iter_mut().for_each(|port| port.set_occupied(true));
                Ok(())
            }
            Some(_) => Err(Error::config(format!("PCI device {device} is taken"))),
            None => Err(Error::config(format!("PCI device {device}: the bus has {places}"))),
        }
    }

    /// Takes the function of this device away, with its registers wherever they are.
    pub fn remove(&mut self, device: u32) -> Result<()> {
        self.take(device).map(drop)
    }

    /// As [`Self::remove`], of a function whose driver still uses it: where its registers were are zeros, until another
    /// function's registers are there, or the next function at this place is torn away, too. A function that only comes to
    /// this place, or goes in order, leaves the zeros to the driver, which may not have let go yet.
    pub fn tear_away(&mut self, device: u32) -> Result<()> {
        match self.take(device)? {
            Some(place) => self.leave_remains(device, place),
            None => Ok(()),
        }
    }

    fn leave_remains(&mut self, device: u32, place: Range) -> Result<()> {
        clear(&self.mmio, &mut self.remains, |other, _| other == device);
        if let Some(mmio) = self.mmio.upgrade() {
            mmio.attach(place, Arc::new(Mutex::new(Remains)))?;
            self.remains.push((device, place));
        }
        Ok(())
    }

    /// Takes the function of this device away, and returns where its registers were.
    fn take(&mut self, device: u32) -> Result<Option<Range>> {
        let slot = self.slots.get_mut(device as usize).and_then(Option::take);
        let slot = slot.ok_or_else(|| Error::config(format!("there is no PCI device {device}")))?;
        self.port_of(device as usize).iter_mut().for_each(|port| port.set_occupied(false));
        if let (Some(registers), Some(place), Some(mmio)) = (slot.registers, slot.placed, self.mmio.upgrade())
        {
            take_away(&self.vm, &mmio, &registers, place);
            return Ok(Some(place));
        }
        Ok(None)
    }

    /// Has a restored function at a place behind a port send its messages from the bus there, as the guest has numbered it.
    fn settle_requester(&self, place: usize) {
        if let (Some(port), Some(slot)) = (self.port_of(place), &self.slots[place]) {
            let requester = u32::from(port.secondary_bus()) << 8;
            slot.function.lock().unwrap_or_else(PoisonError::into_inner).set_requester(requester);
        }
    }

    /// The place that `address` is for, an offset in ECAM: bus, device, function 0, register. A guest can give one number
    /// to several buses: the first one has it.
    fn place_at(&self, address: u64) -> Option<usize> {
        let function = address / CONFIG_SIZE;
        let (bus, device) = (function / 256, (function % 256 / 8) as usize);
        match (bus, device) {
            _ if !function.is_multiple_of(8) => None,
            (0, _) => Some(device),
            (_, 0) => (DEVICES_MAX..DEVICES_MAX + self.ports.len()).find(|place| {
                self.port_of(*place).is_some_and(|port| u64::from(port.secondary_bus()) == bus)
            }),
            _ => None,
        }
    }

    /// The function that answers at `address`, an offset in ECAM, and the offset of the register there in its
    /// configuration space.
    fn slot(&mut self, address: u64) -> Option<(&mut Slot, usize)> {
        let place = self.place_at(address)?;
        let slot = self.slots[place].as_deref_mut()?;
        Some((slot, (address % CONFIG_SIZE) as usize))
    }

    fn read_config(&mut self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((slot, offset)) = self.slot(address) {
            slot.function.lock().unwrap_or_else(PoisonError::into_inner).read_config(offset, data);
        }
    }

    fn write_config(&mut self, address: u64, data: &[u8]) {
        let bus = address / BUS_SIZE;
        let Some((slot, offset)) = self.slot(address) else { return };
        {
            let mut function = slot.function.lock().unwrap_or_else(PoisonError::into_inner);
            // A function takes the number of its bus from what is written to it (PCI Express 5.0, 2.2.6.2), and keeps the
            // number while a guest takes that away from the port: Linux does for a moment whenever it looks for devices, and
            // interrupts that are sent meanwhile must not come from another function.
            if bus > 0 {
                function.set_requester((bus as u32) << 8);
            }
            function.write_config(offset, data);
        }
        if let (Some(place), true) = (self.place_at(address), offset < HEADER_SIZE) {
            self.settle_registers(place);
            // The function may be a port, and the guest may have moved its window.
            (DEVICES_MAX..DEVICES_MAX + self.ports.len()).for_each(|behind| self.settle_registers(behind));
        }
    }

    /// Puts the registers of the function at this place where it has them now, if the guest reaches that: behind a port,
    /// what is not in the port's window is nowhere.
    fn settle_registers(&mut self, place: usize) {
        let window = self.port_of(place).map(|port| port.window());
        let (Some(mmio), Some(slot)) = (self.mmio.upgrade(), &mut self.slots[place]) else { return };
        let range = slot.function.lock().unwrap_or_else(PoisonError::into_inner).place();
        let range =
            range.filter(|range| window.is_none_or(|window| window.is_some_and(|of| of.contains(*range))));
        if let (Some(range), false) = (range, self.remains.is_empty()) {
            clear(&self.mmio, &mut self.remains, |_, other| {
                // A guest can write any address.
                other.start < range.start.saturating_add(range.size) && range.start < other.end()
            });
        }
        slot.place(range, &self.vm, &mmio);
    }
}

/// Takes those of the `remains` from the bus that are in the way.
fn clear(mmio: &Weak<Bus>, remains: &mut Vec<(u32, Range)>, is_in_the_way: impl Fn(u32, Range) -> bool) {
    remains.retain(|(device, range)| {
        let goes = is_in_the_way(*device, *range);
        if let (true, Some(mmio)) = (goes, mmio.upgrade()) {
            mmio.detach(range.start);
        }
        !goes
    });
}

impl Component for Root {
    /// Bus 0 and those behind it, as many as there is room for in `place`, with their windows. Their devices have no interrupt lines but messages, which name them by bus, device
    /// and function.
    fn nodes(&self, place: Place) -> Vec<Node> {
        const MEMORY_32: u32 = 0x0200_0000;
        let Place::Registers { range: ecam, .. } = place else { return Vec::new() };
        let window = layout::PCI_MEMORY;
        let ports = layout::PCI_PORTS.map(Resource::Ports);
        let resources = [Resource::Bus].into_iter().chain(ports).chain([Resource::Window(window)]).collect();
        let acpi = AcpiDevice::new("PCI0", AcpiValue::Eisa("PNP0A08"), resources)
            .with("_CID", AcpiValue::Eisa("PNP0A03"))
            .with("_UID", AcpiValue::Number(0))
            .with("_SEG", AcpiValue::Number(0))
            .with("_BBN", AcpiValue::Number(0))
            .with("_CCA", AcpiValue::Number(1));
        let (start, size) = (window.start as u32, window.size as u32);
        let tree = TreeNode::at("pci", place)
            .texts("compatible", &["pci-host-ecam-generic"])
            .texts("device_type", &["pci"])
            .flag("dma-coherent")
            .cells("#address-cells", &[3])
            .cells("#size-cells", &[2])
            .cells("bus-range", &[0, (ecam.size / BUS_SIZE - 1) as u32])
            .registers(place)
            .cells("ranges", &[MEMORY_32, 0, start, 0, start, 0, size])
            .cells("msi-map", &[0, phandle::MESSAGES, 0, 0x1_0000]);
        vec![Node::Ecam(ecam), Node::Acpi(acpi), Node::Tree(tree)]
    }
}

impl Slot {
    /// Puts the registers at this place. The function's lock is not held: they can be reached while they move.
    fn place(&mut self, place: Option<Range>, vm: &Vm, mmio: &Bus) {
        if let Some(registers) = &self.registers
            && place != self.placed
        {
            if let Some(old) = self.placed.take() {
                take_away(vm, mmio, registers, old);
            }
            self.placed = place.filter(|place| put(vm, mmio, registers, *place));
        }
    }
}

/// The address register, the functions with their places, and what remains of devices that were torn away.
#[derive(Debug, Deserialize, Serialize)]
pub struct State {
    address: u32,
    functions: Vec<(u32, Vec<u8>)>,
    #[serde(deserialize_with = "at_most::<PLACES_MAX, _, _>")]
    remains: Vec<(u32, Range)>,
}

impl Snapshot for Root {
    type State = State;
    const VERSION: u16 = 2;
    // Nothing remains.
    const OLDER: &'static [(u16, &'static [u8])] = &[(1, &[0])];

    fn save(&self) -> Result<State> {
        let slots = self.slots.iter().enumerate();
        let functions = slots.filter_map(|(number, slot)| Some((number as u32, slot.as_ref()?)));
        let functions = functions
            .map(|(number, slot)| {
                let function = slot.function.lock().unwrap_or_else(PoisonError::into_inner);
                Ok((number, function.save_state().with_context(|| format!("save PCI device {number}"))?))
            })
            .collect::<Result<_>>()?;
        Ok(State { address: self.address, functions, remains: self.remains.clone() })
    }

    fn restore(&mut self, state: State) -> Result<()> {
        let vm = self.vm.clone();
        self.address = state.address;
        let mut messages = Vec::new();
        for (number, bytes) in state.functions {
            let attempt = || format!("restore PCI device {number}");
            let slot = self.slots.get_mut(number as usize).and_then(Option::as_mut);
            let slot = slot.ok_or_else(|| Error::config("there is no such device")).with_context(attempt)?;
            let mut function = slot.function.lock().unwrap_or_else(PoisonError::into_inner);
            function.restore_state(&bytes).with_context(attempt)?;
        }
        // A function that the guest had put where another one was is there from now on, in place of what remains of that.
        for (number, place) in state.remains {
            let attempt = || format!("restore what remains of PCI device {number}, at {place}");
            if number as usize >= DEVICES_MAX + self.ports.len()
                || place.size == 0
                || !layout::PCI_MEMORY.contains(place)
            {
                return Err(Error::config("no PCI device was there")).with_context(attempt);
            }
            self.leave_remains(number, place).with_context(attempt)?;
        }
        // Ports know the numbers of their buses now, and their windows.
        for place in 0..PLACES_MAX {
            self.settle_requester(place);
            self.settle_registers(place);
            let function = self.slots[place].iter();
            let function = function.map(|slot| slot.function.lock().unwrap_or_else(PoisonError::into_inner));
            messages.extend(function.flat_map(|function| function.messages()));
        }
        if let Err(error) = vm.route(&messages) {
            // Each function finds out which of them it is when it connects its own.
            log::guest_debug(format_args!("{error}: one of all that PCI devices send is none"));
        }
        for slot in self.slots.iter().flatten() {
            slot.function.lock().unwrap_or_else(PoisonError::into_inner).connect();
        }
        Ok(())
    }
}

/// Puts the registers on the bus, if `place` is in the window that the boot tables give to PCI: elsewhere are memory and
/// other devices. Returns whether it did.
fn put(vm: &Vm, mmio: &Bus, registers: &FunctionRegisters, place: Range) -> bool {
    let window = layout::PCI_MEMORY;
    if place.start < window.start || place.start > window.end() - place.size {
        return false;
    }
    if let Err(error) = mmio.attach(place, registers.device.clone()) {
        log::guest_line(format_args!("the guest put a PCI device where it cannot be: {error}"));
        return false;
    }
    for (offset, kick) in &registers.kicks {
        if let Err(error) = vm.kick_any(kick, place.start + offset) {
            // Kicks then arrive as ordinary writes.
            log::guest_line(error);
        }
    }
    true
}

fn take_away(vm: &Vm, mmio: &Bus, registers: &FunctionRegisters, place: Range) {
    mmio.detach(place.start);
    for (offset, kick) in &registers.kicks {
        // One that could not be connected cannot be disconnected.
        let _ = vm.unkick_any(kick, place.start + offset);
    }
}

/// Configuration space as memory (PCI Express 5.0, 7.2.2).
pub struct Ecam(pub Arc<Mutex<Root>>);

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).read_config(offset, data);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write_config(offset, data);
    }
}

/// Configuration space by ports 0xcf8 (address) and 0xcfc to 0xcff (data) (PCI Local Bus 3.0, 3.2.2.3.2).
pub struct Ports(pub Arc<Mutex<Root>>);

/// A function that is no device, as a part of its machine: its state is in that of the bus, which places the
/// registers of all functions when it is restored.
pub struct Fixture;

// The address register is the bus's own.
stateless!(Ports, Fixture);
impl Component for Ports {}
impl Component for Fixture {}

impl Ports {
    /// The ECAM offset of a data access, while the address register enables them.
    fn target(root: &Root, offset: u64) -> Option<u64> {
        let address = u64::from(root.address);
        let bus_zero = address >> 16 & 0xff == 0;
        let register = address & 0xfc | offset & 3;
        (address & 1 << 31 != 0 && bus_zero).then(|| ((address >> 8 & 0xff) * CONFIG_SIZE) | register)
    }
}

impl BusDevice for Ports {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut root = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match offset {
            0 if data.len() == 4 => data.copy_from_slice(&root.address.to_le_bytes()),
            4.. => match Self::target(&root, offset) {
                Some(address) => root.read_config(address, data),
                None => data.fill(0xff),
            },
            _ => {}
        }
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut root = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match (offset, <[u8; 4]>::try_from(data)) {
            (0, Ok(data)) => root.address = u32::from_le_bytes(data),
            (4.., _) => {
                if let Some(address) = Self::target(&root, offset) {
                    root.write_config(address, data);
                }
            }
            _ => {}
        }
    }
}
