//! The boot tables that a guest finds in its memory, byte for byte: a table that changes its bytes changes
//! what every kernel is told, so such a change is made on purpose and shows in `tests/boot_tables/`.
//!
//! `ALULA_WRITE_TABLES=FOLDER cargo test --test boot_tables` writes the tables of this host's architecture
//! into FOLDER instead of comparing them (`tests/boot_tables`, by its absolute path). For another architecture
//! the test runs in a rig, once for each version of aarch64's interrupt controller, and prints what it wrote:
//! `scripts/rig aarch64 --gic 2 --copy TEST -- sh -c 'mkdir t; ALULA_WRITE_TABLES=t ./TEST; tar c -C t . | base64'`.
//! `dtc -I dtb` and `iasl -d` (of the DSDT in an x86_64 file) show them as text.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::fs::File;
use std::path::Path;

use alula::arch;
use alula::config::Config;
use alula::descriptors::Named;
use alula::host::{Access, Host, RANDOM_SEED, Resource};
use alula::machine::{Machine, Prepared};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use common::{Folder, network};

macro_rules! tables {
    ($($name:literal,)*) => {
        &[$(($name, include_bytes!(concat!("boot_tables/", $name, ".bin"))),)*]
    };
}

/// By architecture, transport, count of CPUs, and version of the GIC.
const TABLES: &[(&str, &[u8])] = tables![
    "x86_64-mmio-1",
    "x86_64-mmio-2",
    "x86_64-pci-1",
    "x86_64-pci-2",
    "aarch64-mmio-1-gic2",
    "aarch64-mmio-2-gic2",
    "aarch64-pci-1-gic2",
    "aarch64-pci-2-gic2",
    "aarch64-mmio-1-gic3",
    "aarch64-mmio-2-gic3",
    "aarch64-pci-1-gic3",
    "aarch64-pci-2-gic3",
];

/// A host whose random numbers are known, and whose console says nothing.
fn known(folder: &Folder) -> Host {
    let path = folder.write("seed", std::array::from_fn::<u8, 32, _>(|index| index as u8));
    let file = Named::new(RANDOM_SEED, File::open(&path).unwrap());
    let mut host = Host::default();
    host.give(RANDOM_SEED, Resource::File { path, access: Access::Read, file });
    host.give_console(Box::new(std::io::sink()));
    host
}

/// A machine with a disk and a network interface, loaded with the firmware guest.
fn machine(folder: &Folder, cpus: u16, pci: bool) -> Box<Machine> {
    let disk = folder.write("disk", vec![0; 1 << 20]);
    let text = format!(
        r#"{{"machine-config": {{"vcpu_count": {cpus}, "mem_size_mib": 64}},
            "drives": [{{"drive_id": "disk", "path_on_host": {disk:?}, "is_root_device": false}}],
            "network-interfaces": [{{"iface_id": "net", "host_dev_name": "tables0"}}]}}"#
    );
    let mut config = Config::parse(text.as_bytes()).unwrap();
    config.pci = pci;
    let mut host = known(folder);
    let mut machine = Machine::build("test", &config, &mut host, Prepared::new().unwrap()).unwrap();
    machine.load(&config, &mut host).unwrap();
    machine
}

/// The memory from PVH's start info, which is before the RSDP, to the end of the first MiB. The RSDP is found as a kernel
/// finds it on a PC: on a 16-byte boundary (ACPI 6.5, 5.2.5.1).
fn acpi_tables(machine: &Machine) -> Vec<u8> {
    const PVH_MAGIC: u32 = 0x336e_c578;
    let mut firmware = vec![0; 0x2_0000];
    machine.memory().memory().read_slice(&mut firmware, GuestAddress(0xe_0000)).unwrap();
    let begins = |what: &[u8]| firmware.chunks(16).position(|chunk| chunk.starts_with(what)).unwrap();
    let (info, tables) = (begins(&PVH_MAGIC.to_le_bytes()), begins(b"RSD PTR "));
    assert!(info < tables);
    // The generation ID before the reset vector is another one in each machine.
    let id = &mut firmware[0x1_ffe0..0x1_fff0];
    assert!(id != [0; 16]);
    id.fill(0);
    firmware.split_off(info * 16)
}

/// The device tree: the last page that begins as one does (Devicetree Specification 0.4, 5.2).
fn device_tree(machine: &Machine) -> Vec<u8> {
    const MAGIC: u32 = 0xd00d_feed;
    let memory = machine.memory().memory();
    let be32 = |at: u64| memory.read_obj::<u32>(GuestAddress(at)).map(u32::from_be).unwrap();
    let ram = arch::layout::memory(64 << 20)[0];
    let mut pages = (0..(ram.size / 4096) as u32).rev().map(|page| ram.start + u64::from(page) * 4096);
    let start = pages.find(|page| be32(*page) == MAGIC).unwrap();
    let mut tree = vec![0; be32(start + 4) as usize];
    memory.read_slice(&mut tree, GuestAddress(start)).unwrap();
    tree
}

/// The offset of the first byte in which they differ, and what is there.
fn difference(found: &[u8], expected: &[u8]) -> Option<String> {
    let length = found.len().max(expected.len());
    let at = (0..length).find(|index| found.get(*index) != expected.get(*index))?;
    let around = |bytes: &[u8]| {
        let bytes = &bytes[at.saturating_sub(24).min(bytes.len())..(at + 24).min(bytes.len())];
        bytes.escape_ascii().to_string()
    };
    Some(format!("at {at:#x}: found {}, expected {}", around(found), around(expected)))
}

#[test]
fn boot_tables_keep_every_byte() {
    network::enter();
    network::add_interface("tables0", network::TAP);
    let folder = Folder::new();
    let mut faults = Vec::new();
    for (pci, cpus) in [(false, 1), (false, 2), (true, 1), (true, 2)] {
        let machine = machine(&folder, cpus, pci);
        let transport = if pci { "pci" } else { "mmio" };
        let (found, gic) = match arch::NAME {
            "x86_64" => (acpi_tables(&machine), ""),
            _ => {
                let tree = device_tree(&machine);
                let is_gic2 = tree.windows(12).any(|bytes| bytes == b"arm,gic-400\0");
                (tree, if is_gic2 { "-gic2" } else { "-gic3" })
            }
        };
        let name = format!("{}-{transport}-{cpus}{gic}", arch::NAME);
        if let Some(to) = std::env::var_os("ALULA_WRITE_TABLES") {
            std::fs::write(Path::new(&to).join(format!("{name}.bin")), found).unwrap();
            continue;
        }
        let (_, expected) = TABLES.iter().find(|(other, _)| *other == name).unwrap();
        faults.extend(difference(&found, expected).map(|difference| format!("{name} {difference}")));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
