//! Checks of guest memory as a kernel for x86_64 finds it: its segments, the parameters of its boot protocol, the memory
//! map, ACPI's tables.

use alula::arch::{Entry, layout};
use alula::memory::{Range, Regions};
use alula::platform::{Node, Platform};
use vm_memory::{Bytes, GuestAddress};

use super::source::Source;
use super::{PAGE, check_content, read, text_in};

const RAM: u32 = 1;
/// Which protocol is spoken is told by where the parameters are.
const PVH_MAGIC: u32 = 0x336e_c578;
/// Tables end where the firmware of a PC begins.
const TABLES_END: u64 = layout::RESET_VECTOR;

fn u32_of(memory: &Regions, at: u64) -> u32 {
    u32::from_le_bytes(read(memory, at))
}

fn u64_of(memory: &Regions, at: u64) -> u64 {
    u64::from_le_bytes(read(memory, at))
}

/// Checks that the file's parts are where the file says, and returns where they are.
pub fn check_kernel(memory: &Regions, file: &Source, entry: &Entry) -> Vec<Range> {
    let mut head = [0; 64];
    file.content(0, &mut head);
    if !head.starts_with(b"\x7fELF") {
        let mut sectors = [0];
        file.content(0x1f1, &mut sectors);
        let setup = (u64::from(if sectors[0] == 0 { 4 } else { sectors[0] }) + 1) * 512;
        let place = Range { start: layout::KERNEL_START, size: file.length - setup };
        check_content(memory, file, setup, place);
        assert_eq!(entry.address, layout::KERNEL_START + 0x200);
        return vec![place];
    }
    let table = u64::from_le_bytes(head[32..40].try_into().unwrap());
    let count = u16::from_le_bytes([head[56], head[57]]);
    let mut places = Vec::new();
    for index in 0..u64::from(count) {
        let mut header = [0; 56];
        file.content(table + index * 56, &mut header);
        let field = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap());
        let place = Range { start: field(24), size: field(40) };
        if header[..4] == [1, 0, 0, 0] && place.size > 0 {
            check_content(memory, file, field(8), Range { start: place.start, size: field(32) });
            places.push(place);
        }
    }
    for (index, place) in places.iter().enumerate() {
        assert!(place.start >= layout::KERNEL_START, "{place} lies over the boot tables");
        let lies_over = |other: &Range| other.start < place.end() && place.start < other.end();
        assert!(!places[..index].iter().any(lies_over), "{place} lies over another");
    }
    let is_in = |place: &Range| (place.start..place.end()).contains(&entry.address);
    assert!(places.iter().any(is_in), "{:#x} is in none of the segments", entry.address);
    places
}

/// All that is below the kernel.
pub fn check_tables(memory: &Regions, platform: &Platform, entry: &Entry) {
    let is_pvh = u32_of(memory, entry.info) == PVH_MAGIC;
    let told = if is_pvh { "Pvh" } else { "Linux64" };
    assert_eq!(format!("{:?}", entry.protocol), told);
    let (rsdp, map) = match is_pvh {
        true => check_start_info(memory, platform, entry.info),
        false => check_boot_params(memory, platform, entry.info),
    };
    // The start info is in one piece with the tables.
    let begin = if is_pvh { entry.info } else { rsdp };
    assert!(begin <= rsdp, "{begin:#x} is behind {rsdp:#x}");
    check_map(platform, &map, begin);
    check_acpi(memory, platform, rsdp, begin);
}

fn check_command_line(memory: &Regions, platform: &Platform, at: u64) {
    let mut line = [0; layout::COMMAND_LINE_SIZE];
    memory.read_slice(&mut line, GuestAddress(at)).unwrap();
    assert_eq!(text_in(&line), platform.command_line.as_bytes());
}

type Found = (u64, Vec<(Range, u32)>);

/// The start info of PVH (Xen, include/public/arch-x86/hvm/start_info.h).
fn check_start_info(memory: &Regions, platform: &Platform, info: u64) -> Found {
    let modules = u32_of(memory, info + 12);
    assert_eq!(modules, u32::from(platform.initrd.is_some()));
    if let Some(initrd) = platform.initrd {
        let module = u64_of(memory, info + 16);
        assert_eq!((u64_of(memory, module), u64_of(memory, module + 8)), (initrd.start, initrd.size));
    }
    check_command_line(memory, platform, u64_of(memory, info + 24));
    let (at, count) = (u64_of(memory, info + 40), u32_of(memory, info + 48));
    let entries = (0..u64::from(count)).map(|index| {
        let at = at + index * 24;
        let range = Range { start: u64_of(memory, at), size: u64_of(memory, at + 8) };
        (range, u32_of(memory, at + 16))
    });
    (u64_of(memory, info + 32), entries.collect())
}

/// The zero page (Documentation/arch/x86/zero-page.rst).
fn check_boot_params(memory: &Regions, platform: &Platform, page: u64) -> Found {
    check_command_line(memory, platform, u32_of(memory, page + 0x228).into());
    if let Some(initrd) = platform.initrd {
        let told = (u32_of(memory, page + 0x218).into(), u32_of(memory, page + 0x21c).into());
        assert_eq!(told, (initrd.start, initrd.size));
    }
    let [count] = read(memory, page + 0x1e8);
    let entries = (0..u64::from(count)).map(|index| {
        let at = page + 0x2d0 + index * 20;
        let range = Range { start: u64_of(memory, at), size: u64_of(memory, at + 8) };
        (range, u32_of(memory, at + 16))
    });
    (u64_of(memory, page + 0x70), entries.collect())
}

/// The map is in order, and what it calls RAM is guest memory that nothing else has.
fn check_map(platform: &Platform, map: &[(Range, u32)], begin: u64) {
    let tables = Range { start: begin, size: layout::KERNEL_START - begin };
    let mut ram = Vec::new();
    for (index, (range, kind)) in map.iter().enumerate() {
        let lies_over = |other: &Range| other.start < range.end() && range.start < other.end();
        assert!(!map[..index].iter().any(|(other, _)| lies_over(other)), "{map:x?}");
        if *kind == RAM {
            assert!(platform.memory.iter().any(|memory| memory.contains(*range)), "{map:x?}");
            assert!(!lies_over(&tables), "{map:x?}");
            ram.push(*range);
        }
    }
    let is_ram = |range: &Range| ram.iter().any(|ram| ram.contains(*range));
    assert!(platform.initrd.iter().all(is_ram), "{map:x?}");
    assert!(platform.memory[1..].iter().all(is_ram), "{map:x?}");
}

/// A table of ACPI, whole and with its checksum.
fn table(memory: &Regions, at: u64, signature: &[u8; 4]) -> Vec<u8> {
    let mut table = vec![0; u32_of(memory, at + 4) as usize];
    assert!(table.len() >= 36 && at + table.len() as u64 <= TABLES_END, "{at:#x}: {} bytes", table.len());
    memory.read_slice(&mut table, GuestAddress(at)).unwrap();
    assert_eq!(&table[..4], signature);
    assert_eq!(table.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte)), 0);
    table
}

fn check_acpi(memory: &Regions, platform: &Platform, rsdp: u64, begin: u64) {
    let root: [u8; 36] = read(memory, rsdp);
    assert_eq!((&root[..8], rsdp % 16), (&b"RSD PTR "[..], 0));
    for length in [20, 36] {
        assert_eq!(root[..length].iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte)), 0);
    }
    // Devices in memory have the places before.
    for (name, place) in layout::in_memory(&platform.memory) {
        let alula::platform::Place::Memory { range, .. } = place else { panic!("{name}: {place}") };
        let is_free = range.end() <= begin || range.start >= layout::GENERATION_ID;
        assert!(is_free && range.end() <= TABLES_END, "the tables at {begin:#x} lie over {name}");
    }
    let xsdt = table(memory, u64_of(memory, rsdp + 24), b"XSDT");
    let tables: Vec<u64> =
        xsdt[36..].chunks(8).map(|entry| u64::from_le_bytes(entry.try_into().unwrap())).collect();
    let fadt = table(memory, tables[0], b"FACP");
    let dsdt = table(memory, u64::from_le_bytes(fadt[140..148].try_into().unwrap()), b"DSDT");
    check_namespace(platform, &dsdt[36..]);
    let madt = table(memory, tables[1], b"APIC");
    let mut cpus = Vec::new();
    let mut rest = &madt[44..];
    while let [kind, length, ..] = rest {
        match kind {
            0 => cpus.push(u32::from(rest[3])),
            9 => cpus.push(u32::from_le_bytes(rest[4..8].try_into().unwrap())),
            _ => {}
        }
        rest = &rest[usize::from(*length)..];
    }
    assert!(rest.is_empty() && cpus.into_iter().eq(0..platform.cpus.into()));
    let ecam: Vec<_> = platform.ecam().collect();
    assert_eq!(tables.len(), 2 + ecam.len());
    for (at, range) in tables[2..].iter().zip(ecam) {
        let mcfg = table(memory, *at, b"MCFG");
        assert_eq!(mcfg[44..52], range.start.to_le_bytes());
        assert!(range.start.is_multiple_of(PAGE));
    }
}

/// The definition block is a list of names and devices (ACPI 6.5, 20.2), each as long as it says, and names every
/// device once.
fn check_namespace(platform: &Platform, mut aml: &[u8]) {
    const NAME: u8 = 8;
    const PACKAGE: u8 = 0x12;
    const DEVICE: [u8; 2] = [0x5b, 0x82];
    let mut found = Vec::new();
    while !aml.is_empty() {
        let at = match aml {
            [NAME, _, _, _, _, PACKAGE, ..] => 6,
            _ if aml.starts_with(&DEVICE) => 2,
            _ => panic!("{:02x?} is no name and no device", &aml[..aml.len().min(8)]),
        };
        // PkgLength (20.2.4) counts itself.
        let lead = aml[at];
        let more = usize::from(lead >> 6);
        let mut length = usize::from(if more == 0 { lead & 0x3f } else { lead & 0xf });
        for index in 0..more {
            length |= usize::from(aml[at + 1 + index]) << (4 + 8 * index);
        }
        let content = &aml[at + 1 + more..at + length];
        if at == 2 {
            // A path of two names: DualNamePrefix, `_SB_`, its own.
            assert_eq!(content[..5], *b"._SB_");
            found.push(content[5..9].to_vec());
        }
        aml = &aml[at + length..];
    }
    let mut expected: Vec<_> = platform
        .nodes
        .iter()
        .filter_map(|node| match node {
            Node::Acpi(device) => Some(device.name.clone().into_bytes()),
            _ => None,
        })
        .collect();
    if platform.nodes.iter().any(|node| matches!(node, Node::Event(_))) {
        expected.push(b"GED_".to_vec());
    }
    assert_eq!(found, expected);
}
