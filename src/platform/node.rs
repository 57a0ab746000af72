//! What boot tables say of the parts of a machine, as plain data. A part says it for ACPI and for a device
//! tree, whatever the architecture; the tables print what is for them, in the order of the parts.

use super::Place;
use crate::memory::Range;

/// Something that boot tables say of a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// ACPI: a device of the namespace.
    Acpi(AcpiDevice),
    /// ACPI: an interrupt line by which a device says that what it tells has changed.
    Event(AcpiEvent),
    /// ACPI: the registers by which a guest powers off and resets.
    Power(PowerRegisters),
    /// ACPI: where the configuration space of PCI bus 0 is memory.
    Ecam(Range),
    /// ACPI: the registers by which devices of PCI bus 0 come and go.
    Slots(SlotRegisters),
    /// ACPI: the registers of the guest's watchdog.
    Watchdog(WatchdogRegisters),
    /// ACPI: the registers by which CPUs come and go.
    Cpus(CpuRegisters),
    /// Device tree: a node below the root.
    Tree(TreeNode),
    /// Device tree: a node below the interrupt controller, of what takes interrupt messages.
    MessageTree(TreeNode),
    /// Device tree: a property of `/chosen`.
    Chosen(Property),
}

impl Node {
    /// The nodes of a device that is in guest memory at `place`, and whose interrupt says that what is there has
    /// changed: for a guest with ACPI, `acpi` and an event of that device; for a device tree, a node called `name` with
    /// this `compatible`.
    pub fn of_memory(place: Place, name: &str, compatible: &str, acpi: AcpiDevice) -> Vec<Self> {
        let tree =
            TreeNode::at(name, place).texts("compatible", &[compatible]).registers(place).interrupt(place);
        let event = place.gsi().map(|gsi| Self::Event(AcpiEvent { gsi, device: acpi.name.clone() }));
        [Self::Acpi(acpi), Self::Tree(tree)].into_iter().chain(event).collect()
    }
}

/// An event of ACPI's Generic Event Device (ACPI 6.5, 5.6.9): when the interrupt comes, the driver of the device is
/// notified with [`AcpiEvent::CHANGED`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiEvent {
    /// The interrupt line, by its GSI: an edge, high. Several devices may have one line.
    pub gsi: u32,
    /// The name of the device, four characters.
    pub device: String,
}

impl AcpiEvent {
    /// The first of the values whose meaning is the device's own (5.6.6).
    pub const CHANGED: u8 = 0x80;
}

/// A device of ACPI's namespace (ACPI 6.5, 6.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiDevice {
    /// Four characters.
    pub name: String,
    /// Its identification: names and values.
    pub objects: Vec<(&'static str, AcpiValue)>,
    /// What it has of the machine (`_CRS`).
    pub resources: Vec<Resource>,
    /// Bits of the FADT's IAPC boot architecture flags that say that it is there (5.2.9.3).
    pub boot_flags: u16,
}

impl AcpiDevice {
    /// A device with this hardware ID (`_HID`).
    pub fn new(name: impl Into<String>, id: AcpiValue, resources: Vec<Resource>) -> Self {
        Self { name: name.into(), objects: vec![("_HID", id)], resources, boot_flags: 0 }
    }

    /// The same with one more object.
    pub fn with(mut self, name: &'static str, value: AcpiValue) -> Self {
        self.objects.push((name, value));
        self
    }
}

/// The value of an object in ACPI's namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AcpiValue {
    /// An ID of EISA's form, as `PNP0501`.
    Eisa(&'static str),
    /// Any text.
    Text(&'static str),
    /// A number.
    Number(u32),
    /// A package of two numbers.
    Pair(u32, u32),
}

/// A resource of a device in ACPI's namespace (ACPI 6.5, 6.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// I/O ports.
    Ports(Range),
    /// Memory-mapped registers below 4 GiB.
    Memory(Range),
    /// An interrupt line, by its GSI: an edge, high, not shared.
    Interrupt(u32),
    /// PCI bus 0, and no other.
    Bus,
    /// Memory below 4 GiB for the registers of the devices behind it.
    Window(Range),
}

impl Place {
    /// The resources of a device that has all of its place.
    pub fn resources(self) -> Vec<Resource> {
        let registers = match self {
            Self::Ports { range, .. } => Some(Resource::Ports(range)),
            Self::Registers { range, .. } | Self::Memory { range, .. } => Some(Resource::Memory(range)),
            Self::Pci(_) | Self::Calls => None,
        };
        registers.into_iter().chain(self.gsi().map(Resource::Interrupt)).collect()
    }
}

/// Three 8-bit I/O ports: sleep control, sleep status, reset (ACPI 6.5, 4.8.3.7 and 4.8.3.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PowerRegisters {
    /// The first one.
    pub port: u16,
    /// The sleep type that is "off" (`_S5`).
    pub off: u8,
    /// Written to the reset register, it resets.
    pub reset: u8,
}

/// The registers by which devices of a bus come and go while the guest runs, 32-bit I/O ports. A bit of a word is a
/// device's, by its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotRegisters {
    /// The port of the first one: whether devices have come or gone (a read clears it).
    pub port: u16,
    /// The interrupt line, by its GSI, an edge, high: there is something to read.
    pub gsi: u32,
    /// The numbers of the devices that may come and go.
    pub devices: std::ops::Range<u32>,
}

impl SlotRegisters {
    /// The offset of the second one: the devices that the guest is asked to let go (a read clears it).
    pub const LEAVING: u16 = 4;
    /// The offset of the third one: the guest has let these devices go.
    pub const EJECT: u16 = 8;
    /// The number of ports.
    pub const SIZE: u16 = 12;
}

/// The registers of a watchdog, 32-bit I/O ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchdogRegisters {
    /// The port of the first one.
    pub port: u16,
    /// The period that counts are of, in milliseconds.
    pub period_ms: u32,
    /// The counts that make sense as the length of a countdown.
    pub counts: std::ops::RangeInclusive<u32>,
}

impl WatchdogRegisters {
    /// The offset of the first one: 1, the countdown runs; written, it begins (1) or stops (0).
    pub const IS_ON: u16 = 0;
    /// The offset of the second one: how many counts are left; written, the countdown begins anew.
    pub const LEFT: u16 = 4;
    /// The offset of the third one: how many counts a countdown has, from the next one on.
    pub const LENGTH: u16 = 8;
    /// The offset of the fourth one: 1, a countdown was over, in this machine or in the one before its reset; written, that
    /// is forgotten.
    pub const HAS_EXPIRED: u16 = 12;
    /// The offset of the fifth one: 1, the end of a countdown resets the machine.
    pub const RESETS: u16 = 16;
    /// The number of ports.
    pub const SIZE: u16 = 20;
}

/// The registers by which CPUs come and go while the guest runs, 32-bit I/O ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuRegisters {
    /// The port of the first one. A read gives the number of a CPU that has come, or, with [`Self::IS_LEAVING`], of one
    /// that the guest is to let go, of each once, and then [`Self::NOTHING`]; written is the number of one that the guest
    /// has let go.
    pub port: u16,
    /// The interrupt line, by its GSI, an edge, high: there is something to read.
    pub gsi: u32,
    /// How many CPUs there can be.
    pub cpus: u16,
    /// How many of them, the first ones, there are when the guest starts.
    pub given: u16,
}

impl CpuRegisters {
    /// The most CPUs of a machine to which some can come: each has a device in ACPI's tables, which lie in the last
    /// 128 KiB of the first MiB.
    pub const CPUS_MAX: u16 = 512;
    /// The offset of the register of news.
    pub const NEWS: u16 = 0;
    /// The CPU is to be let go.
    pub const IS_LEAVING: u32 = 1 << 16;
    /// There are no news.
    pub const NOTHING: u32 = u32::MAX;
    /// The offset of the words in which each CPU that is there has its bit.
    pub const THERE: u16 = 4;

    /// The number of ports for so many CPUs.
    pub const fn size(cpus: u16) -> u16 {
        Self::THERE + cpus.div_ceil(32) * 4
    }
}

/// A property of a device tree: its name, and its value as the tree has it.
pub type Property = (&'static str, Vec<u8>);

/// A node of a device tree (Devicetree Specification 0.4, 2.2).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TreeNode {
    /// The name, with the unit address if there is one.
    pub name: String,
    /// Properties, in order.
    pub properties: Vec<Property>,
    /// The nodes below it.
    pub children: Vec<TreeNode>,
}

impl TreeNode {
    /// A node without an address.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// The node of what is at `place`.
    pub fn at(name: &str, place: Place) -> Self {
        Self::new(&unit(name, place))
    }

    fn property(mut self, name: &'static str, value: Vec<u8>) -> Self {
        self.properties.push((name, value));
        self
    }

    /// With a property that has no value.
    pub fn flag(self, name: &'static str) -> Self {
        self.property(name, Vec::new())
    }

    /// With a property of 32-bit numbers.
    pub fn cells(self, name: &'static str, cells: &[u32]) -> Self {
        self.property(name, cells.iter().flat_map(|cell| cell.to_be_bytes()).collect())
    }

    /// With a property of texts.
    pub fn texts(self, name: &'static str, texts: &[&str]) -> Self {
        self.property(name, texts.iter().flat_map(|text| text.bytes().chain([0])).collect())
    }

    /// With the registers of `place` (`reg`, of two cells each).
    pub fn registers(self, place: Place) -> Self {
        let Range { start, size } = range(place);
        self.property("reg", [start.to_be_bytes(), size.to_be_bytes()].concat())
    }

    /// With the interrupt line of `place`, if there is one: a shared interrupt of Arm's GIC, by its rising
    /// edge (Linux' bindings, arm,gic-v3).
    pub fn interrupt(self, place: Place) -> Self {
        const SHARED: u32 = 0;
        const EDGE_RISING: u32 = 1;
        match place.gsi() {
            Some(gsi) => self.cells("interrupts", &[SHARED, gsi, EDGE_RISING]),
            None => self,
        }
    }

    /// With a node below it.
    pub fn child(mut self, child: Self) -> Self {
        self.children.push(child);
        self
    }
}

/// The property of `/chosen` that says that the console is the device called `name` at `place`.
pub fn stdout(name: &str, place: Place) -> Property {
    ("stdout-path", format!("/{}\0", unit(name, place)).into_bytes())
}

fn unit(name: &str, place: Place) -> String {
    format!("{name}@{:x}", range(place).start)
}

fn range(place: Place) -> Range {
    match place {
        Place::Ports { range, .. } | Place::Registers { range, .. } | Place::Memory { range, .. } => range,
        Place::Pci(number) => Range { start: number.into(), size: 0 },
        Place::Calls => Range { start: 0, size: 0 },
    }
}

/// The numbers by which nodes of the device tree refer to each other: each is given to one node.
pub mod phandle {
    /// The interrupt controller.
    pub const INTERRUPTS: u32 = 1;
    /// The clock of Arm's peripherals, 24 MHz.
    pub const CLOCK: u32 = 2;
    /// What takes interrupt messages: a GICv3's ITS, a GICv2's message frame.
    pub const MESSAGES: u32 = 3;
    /// The GPIO controller.
    pub const GPIO: u32 = 4;
}
