//! ACPI tables (ACPI 6.5, hardware-reduced): CPUs, interrupt controllers, the fixed devices, the way off.

use acpi_tables::aml::{
    AddressSpace as Window, AddressSpaceCacheable, Arg, Device, EISAName, Equal, IO, If, Interrupt,
    Memory32Fixed, Method, MethodCall, Name, Notify, Package, Path, ResourceTemplate,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use super::{cpu_slots, layout, slots, wdat};
use crate::memory::Range;
use crate::platform::node::{AcpiDevice, AcpiEvent, AcpiValue, PowerRegisters, Resource};
use crate::platform::{Node, Platform};

/// Who made the tables, and what they are of.
pub const OEM: [u8; 6] = *b"ALULA ";
pub const OEM_TABLE: [u8; 8] = *b"MICROVM ";

/// FADT, IAPC boot flags (5.2.9.3): there is no VGA, and no CMOS clock.
const BOOT_FLAGS: u16 = 1 << 2 | 1 << 5;

/// The reset register among the power registers.
const RESET_REGISTER: u16 = 2;

/// Room for all tables of a machine with few CPUs. What grows from nothing leaves a piece of the heap behind with each
/// step, and the C library keeps pieces of at most 1032 bytes apart (`tcache`) instead of putting them together again.
const ROOM: usize = 1280;
/// Room for any one of them, which is more than such a piece as well.
const ROOM_OF_ONE: usize = 1040;

struct Bytes(Vec<u8>);

impl Bytes {
    fn new() -> Self {
        Self(Vec::with_capacity(ROOM_OF_ONE))
    }
}

impl AmlSink for Bytes {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
    fn vec(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }
}

/// What a kernel finds in the place of a PC's firmware when it leaves a reset to that, in real mode: the
/// reset register is written, as the FADT says.
fn reset_code(platform: &Platform) -> [u8; 7] {
    let power = power(platform);
    let [low, high] = (power.port + RESET_REGISTER).to_le_bytes();
    // mov dx, port; mov al, value; out dx, al; hlt
    [0xba, low, high, 0xb0, power.reset, 0xee, 0xf4]
}

fn power(platform: &Platform) -> PowerRegisters {
    let power = platform.nodes.iter().find_map(|node| match node {
        Node::Power(power) => Some(*power),
        _ => None,
    });
    power.expect("every machine of this architecture has power registers")
}

/// The tables and the code after them, as they lie in guest memory.
pub struct Tables {
    /// The guest physical address of the first byte, where the RSDP is.
    pub start: u64,
    /// All of them.
    pub bytes: Vec<u8>,
}

/// All tables, down from the reset vector and the generation ID before it.
pub fn tables(platform: &Platform) -> Tables {
    let mut bytes = Vec::with_capacity(ROOM);
    bytes.resize((layout::RESET_VECTOR - layout::GENERATION_ID) as usize, 0);
    bytes.extend(reset_code(platform));
    let mut all = Tables { start: layout::GENERATION_ID, bytes };
    let dsdt = all.prepend(&dsdt(platform));
    let fadt = all.prepend(&fadt(platform, dsdt));
    let madt = all.prepend(&madt(platform));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    for ecam in platform.ecam() {
        let mut mcfg = MCFG::new(OEM, OEM_TABLE, 1);
        mcfg.add_ecam(ecam.start, 0, 0, 0);
        xsdt.add_entry(all.prepend(&mcfg));
    }
    for node in &platform.nodes {
        if let Node::Watchdog(registers) = node {
            xsdt.add_entry(all.prepend(&wdat::wdat(registers)));
        }
    }
    let xsdt = all.prepend(&xsdt);
    all.prepend(&Rsdp::new(OEM, xsdt));
    all
}

impl Tables {
    /// Puts a table before the others and returns its guest physical address.
    fn prepend(&mut self, table: &dyn Aml) -> u64 {
        let mut new = Bytes::new();
        table.to_aml_bytes(&mut new);
        new.0.resize(new.0.len().next_multiple_of(16), 0);
        self.start -= new.0.len() as u64;
        self.bytes.splice(..0, new.0);
        self.start
    }
}

fn fadt(platform: &Platform, dsdt: u64) -> impl Aml {
    let power = power(platform);
    let port = |offset: u16| {
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, (power.port + offset).into())
    };
    let flags = platform.nodes.iter().map(|node| match node {
        Node::Acpi(device) => device.boot_flags,
        _ => 0,
    });
    let mut fadt =
        FADTBuilder::new(OEM, OEM_TABLE, 1).dsdt_64(dsdt).flag(Flags::HwReducedAcpi).flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = flags.fold(BOOT_FLAGS, |all, flags| all | flags).into();
    fadt.sleep_control_reg = port(0);
    fadt.sleep_status_reg = port(1);
    fadt.reset_reg = port(RESET_REGISTER);
    fadt.reset_value = power.reset;
    fadt.finalize()
}

/// MADT (5.2.12): a local APIC per CPU, which the guest may have later only, and one I/O APIC.
fn madt(platform: &Platform) -> Sdt {
    let given = platform.nodes.iter().find_map(|node| match node {
        Node::Cpus(registers) => Some(registers.given),
        _ => None,
    });
    let given = given.unwrap_or(platform.cpus);
    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM, OEM_TABLE, 1);
    let mut body = Vec::with_capacity(20 + 8 * usize::from(platform.cpus));
    body.extend(layout::LOCAL_APIC.to_le_bytes());
    body.extend(0u32.to_le_bytes());
    for cpu in 0..platform.cpus {
        let flags = if cpu < given { cpu_slots::ENABLED } else { cpu_slots::ONLINE_CAPABLE };
        cpu_slots::add_entry(cpu.into(), flags, &mut body);
    }
    body.extend([1, 12, 0, 0]);
    body.extend(layout::IO_APIC.to_le_bytes());
    body.extend(0u32.to_le_bytes());
    madt.append_slice(&body);
    madt
}

/// DSDT: the devices that a guest cannot find by probing, and how to power off.
fn dsdt(platform: &Platform) -> Sdt {
    let mut aml = Bytes::new();
    for node in &platform.nodes {
        match node {
            Node::Power(power) => {
                Name::new("_S5_".into(), &Package::new(vec![&power.off])).to_aml_bytes(&mut aml);
            }
            Node::Acpi(node) => device(node, &mut aml),
            Node::Slots(registers) => slots::slots(registers, &mut aml),
            Node::Cpus(registers) => cpu_slots::slots(registers, &mut aml),
            _ => {}
        }
    }
    events(platform, &mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, 1);
    dsdt.append_slice(&aml.0);
    dsdt
}

impl Aml for AcpiValue {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        match self {
            Self::Eisa(id) => EISAName::new(id).to_aml_bytes(sink),
            Self::Text(text) => text.to_aml_bytes(sink),
            Self::Number(number) => number.to_aml_bytes(sink),
            Self::Pair(first, second) => Package::new(vec![first, second]).to_aml_bytes(sink),
        }
    }
}

fn device(node: &AcpiDevice, aml: &mut Bytes) {
    let resources: Vec<_> = node.resources.iter().map(resource).collect();
    let resources = ResourceTemplate::new(resources.iter().map(Box::as_ref).collect());
    let mut names: Vec<_> =
        node.objects.iter().map(|(name, value)| Name::new((*name).into(), value)).collect();
    names.push(Name::new("_CRS".into(), &resources));
    let names = names.iter().map(|name| name as &dyn Aml).collect();
    Device::new(format!("_SB_.{}", node.name).as_str().into(), names).to_aml_bytes(aml);
}

/// The Generic Event Device (5.6.9): its method is told which of its interrupts came, and notifies the drivers of all
/// devices that have that one, or has the slots of the PCI bus or of CPUs looked at.
fn events(platform: &Platform, aml: &mut Bytes) {
    let events: Vec<&AcpiEvent> = platform
        .nodes
        .iter()
        .filter_map(|node| if let Node::Event(event) = node { Some(event) } else { None })
        .collect();
    let scans: Vec<(u32, &str)> = platform
        .nodes
        .iter()
        .filter_map(|node| match node {
            Node::Slots(registers) => Some((registers.gsi, slots::SCAN)),
            Node::Cpus(registers) => Some((registers.gsi, cpu_slots::SCAN)),
            _ => None,
        })
        .collect();
    let scanned = scans.iter().map(|(gsi, _)| gsi);
    let mut lines: Vec<u32> = events.iter().map(|event| &event.gsi).chain(scanned.clone()).copied().collect();
    lines.sort_unstable();
    lines.dedup();
    if lines.is_empty() {
        return;
    }
    let lines: Vec<_> = lines.into_iter().map(|gsi| resource(&Resource::Interrupt(gsi))).collect();
    let resources = ResourceTemplate::new(lines.iter().map(Box::as_ref).collect());
    let paths: Vec<_> = events.iter().map(|event| Path::new(&format!("\\_SB_.{}", event.device))).collect();
    let notifications: Vec<_> = paths.iter().map(|path| Notify::new(path, &AcpiEvent::CHANGED)).collect();
    let calls: Vec<_> = scans.iter().map(|(_, scan)| MethodCall::new((*scan).into(), Vec::new())).collect();
    let conditions: Vec<_> =
        events.iter().map(|event| &event.gsi).chain(scanned).map(|gsi| Equal::new(&Arg(0), gsi)).collect();
    let actions = notifications.iter().map(|it| it as &dyn Aml).chain(calls.iter().map(|it| it as &dyn Aml));
    let steps: Vec<_> =
        conditions.iter().zip(actions).map(|(condition, action)| If::new(condition, vec![action])).collect();
    let steps = steps.iter().map(|step| step as &dyn Aml).collect();
    let (id, resources) = (Name::new("_HID".into(), &"ACPI0013"), Name::new("_CRS".into(), &resources));
    let method = Method::new("_EVT".into(), 1, true, steps);
    Device::new("_SB_.GED_".into(), vec![&id, &resources, &method]).to_aml_bytes(aml);
}

fn resource(resource: &Resource) -> Box<dyn Aml> {
    match *resource {
        Resource::Ports(Range { start, size }) => {
            Box::new(IO::new(start as u16, start as u16, 1, size as u8))
        }
        Resource::Memory(Range { start, size }) => {
            Box::new(Memory32Fixed::new(true, start as u32, size as u32))
        }
        Resource::Interrupt(gsi) => Box::new(Interrupt::new(true, true, false, false, gsi)),
        Resource::Bus => Box::new(Window::new_bus_number(0u16, 0u16)),
        Resource::Window(range) => {
            let (first, last) = (range.start as u32, (range.end() - 1) as u32);
            Box::new(Window::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::Place;
    use crate::platform::node::CpuRegisters;

    fn platform(cpus: u16) -> Platform {
        Platform {
            cpus,
            smt: false,
            memory: layout::memory(128 << 20),
            command_line: String::new(),
            initrd: None,
            random_seed: [0; 32],
            nodes: vec![
                Node::Power(PowerRegisters { port: 0x600, off: 5, reset: 1 }),
                Node::Ecam(layout::ECAM),
            ],
            pci: true,
            gic: None,
        }
    }

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    /// The table at a guest physical address, with its checksum checked.
    fn table(all: &Tables, address: u64) -> &[u8] {
        let start = (address - all.start) as usize;
        let table = &all.bytes[start..start + u32_at(&all.bytes, start + 4) as usize];
        assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        table
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_with_a_right_checksum() {
        let all = tables(&platform(2));
        let rsdp = &all.bytes;
        assert_eq!((&rsdp[..8], all.start % 16), (&b"RSD PTR "[..], 0));
        assert_eq!(rsdp[..20].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let xsdt = table(&all, u64_at(rsdp, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let found: Vec<_> = xsdt[36..].chunks(8).map(|entry| table(&all, u64_at(entry, 0))).collect();
        assert_eq!(found.iter().map(|table| &table[..4]).collect::<Vec<_>>(), [b"FACP", b"APIC", b"MCFG"]);
        assert_eq!(&table(&all, u64_at(found[0], 140))[..4], b"DSDT");
        assert_eq!(u32_at(found[0], 112) & 1 << 20, 1 << 20, "hardware-reduced");
    }

    #[test]
    fn the_reset_vector_resets_and_shares_its_page_with_the_tables() {
        let all = tables(&platform(2));
        let code = &all.bytes[(layout::RESET_VECTOR - all.start) as usize..];
        assert_eq!(code, [0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xf4]);
        let page = layout::RESET_VECTOR & !0xfff;
        assert!(all.start >= page, "{:#x} costs every guest a page more", all.start);
        // The tables of a machine as large as any grow down.
        let large = tables(&platform(4096));
        assert!((layout::LOW_RAM_END..page).contains(&large.start), "{:#x}", large.start);
    }

    /// The APIC ids of the CPUs that the MADT lists, with their flags.
    fn listed(platform: &Platform) -> Vec<(u32, u32)> {
        let mut bytes = Bytes(Vec::new());
        madt(platform).to_aml_bytes(&mut bytes);
        let mut entries = &bytes.0[44..];
        let mut listed = Vec::new();
        while !entries.is_empty() {
            match entries[0] {
                0 => listed.push((entries[3].into(), u32_at(entries, 4))),
                9 => listed.push((u32_at(entries, 4), u32_at(entries, 8))),
                _ => {}
            }
            entries = &entries[usize::from(entries[1])..];
        }
        listed
    }

    #[test]
    fn a_cpu_beyond_what_8_bits_name_gets_an_x2apic_entry() {
        assert_eq!(listed(&platform(257)), (0..257).map(|id| (id, 1)).collect::<Vec<_>>());
    }

    /// A machine of so many CPUs, of which the guest has some at first.
    fn with_cpus_to_come(given: u16, cpus: u16) -> Platform {
        let mut platform = platform(cpus);
        platform.nodes.push(Node::Cpus(CpuRegisters { port: 0x640, gsi: 3, cpus, given }));
        platform
    }

    #[test]
    fn cpus_that_can_come_are_listed_as_such_and_have_devices() {
        let platform = with_cpus_to_come(2, 300);
        assert_eq!(
            listed(&platform),
            (0..300).map(|id| (id, if id < 2 { 1 } else { 2 })).collect::<Vec<_>>()
        );
        let mut bytes = Bytes(Vec::new());
        dsdt(&platform).to_aml_bytes(&mut bytes);
        let find = |what: &[u8]| bytes.0.windows(what.len()).filter(|bytes| *bytes == what).count();
        // Each is a device and is notified of two things; all but the first can go.
        assert_eq!([&b"ACPI0007"[..], b"_EJ0", b"_STA"].map(find), [300, 299, 300]);
        assert_eq!([&b"C000"[..], b"C12B", b"P12B"].map(find), [3, 3, 2]);
        // A CPU that has come is enabled (`_MAT`).
        let apic = [0x11, 0xb, 0xa, 8, 0, 8, 7, 7, 1, 0, 0, 0];
        assert_eq!(find(&apic), 1);
        assert!(find(b"GED_") == 1 && find(b"CSCN") == 2);
    }

    #[test]
    fn as_many_cpus_as_can_come_leave_the_place_of_the_vm_clock() {
        let large = tables(&with_cpus_to_come(1, CpuRegisters::CPUS_MAX));
        let clock = layout::in_memory(&[]).into_iter().find(|(name, _)| *name == "VM clock").unwrap().1;
        let Place::Memory { range, .. } = clock else { panic!() };
        assert!(large.start >= range.end(), "{:#x}", large.start);
    }
}
