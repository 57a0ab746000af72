//! Guest memory as a guest sees it: a few instructions of its own read it, say what they read, and write it.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;

use alula::arch::layout;
use alula::config::Config;
use alula::host::Host;
use alula::machine::{Machine, Prepared};
use alula::memory::{self, Piece, Range, Source};
use alula::platform::{CpuChanges, Platform};
use alula::vm::Vm;
use common::Folder;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, MemoryRegionAddress};

/// The size of every region here.
const SIZE: u64 = 4 << 20;
/// A multiple of the size of a page on every host.
const PAGE: u64 = 64 << 10;

/// Where the regions lie: the first has the code.
fn place(number: u64) -> u64 {
    layout::memory(SIZE)[0].start + number * 2 * SIZE
}

fn region(number: u64) -> Range {
    Range { start: place(number), size: SIZE }
}

/// A virtual machine with one CPU. Its guest reads the byte at the address that it is given, writes it to the address
/// after that, says what it was, and begins again.
struct Guest {
    vm: Vm,
    cpu: VcpuFd,
    memory: memory::Memory,
}

#[cfg(target_arch = "x86_64")]
mod code {
    use super::*;

    /// Real mode: `mov al, [0]`, `mov [1], al`, `out 0x99, al`, and back.
    pub const CODE: &[u8] = &[0xa0, 0, 0, 0xa2, 1, 0, 0xe6, 0x99, 0xeb, 0xf6];

    pub fn start(cpu: &VcpuFd) {
        let mut registers = cpu.get_regs().unwrap();
        (registers.rip, registers.rflags) = (place(0), 2);
        cpu.set_regs(&registers).unwrap();
    }

    pub fn look_at(cpu: &VcpuFd, address: u64) {
        let mut registers = cpu.get_sregs().unwrap();
        (registers.cs.base, registers.cs.selector) = (0, 0);
        registers.ds.base = address;
        cpu.set_sregs(&registers).unwrap();
    }
}

#[cfg(target_arch = "aarch64")]
mod code {
    use super::*;

    /// `ldrb w0, [x1]`, `strb w0, [x1, #1]`, `strb w0, [x2]`, and back.
    pub const CODE: &[u8] =
        &[0x20, 0, 0x40, 0x39, 0x20, 0x04, 0, 0x39, 0x40, 0, 0, 0x39, 0xfd, 0xff, 0xff, 0x17];

    /// `index`: in words of 32 bits (`struct kvm_regs`).
    fn set(cpu: &VcpuFd, index: u64, value: u64) {
        cpu.set_one_reg(0x6030_0000_0010_0000 | index, &value.to_le_bytes()).unwrap();
    }

    pub fn start(cpu: &VcpuFd) {
        set(cpu, 64, place(0));
        set(cpu, 4, layout::VIRTIO_MMIO.start);
    }

    pub fn look_at(cpu: &VcpuFd, address: u64) {
        set(cpu, 2, address);
    }
}

impl Guest {
    fn new() -> Self {
        let memory = memory::allocate(&[region(0)]).unwrap();
        memory.memory().write_slice(code::CODE, GuestAddress(place(0))).unwrap();
        let mut platform = Platform {
            cpus: 1,
            smt: false,
            memory: vec![region(0)],
            command_line: String::new(),
            initrd: None,
            random_seed: [0; 32],
            nodes: Vec::new(),
            pci: false,
            gic: None,
        };
        let mut vm = Vm::new(Prepared::new().unwrap(), &memory.memory()).unwrap();
        let cpu = vm.create_vcpus(platform.cpus, Default::default()).unwrap().remove(0);
        vm.complete(&mut platform).unwrap();
        vm.with_cpu_model(|model| model.apply(&[&cpu], platform.smt, &CpuChanges::default())).unwrap();
        code::start(&cpu);
        Self { vm, cpu, memory }
    }

    /// What the guest reads at this address, which is then at the next one, too; None: there is no memory.
    fn copy(&mut self, address: u64) -> Option<u8> {
        code::look_at(&self.cpu, address);
        let read = self.next();
        // The byte that the guest tells of an address without memory means nothing.
        while read.is_none() && self.next().is_none() {}
        read
    }

    fn next(&mut self) -> Option<u8> {
        match self.cpu.run().unwrap() {
            VcpuExit::IoOut(_, bytes) => Some(bytes[0]),
            VcpuExit::MmioWrite(at, bytes) if at == layout::VIRTIO_MMIO.start => Some(bytes[0]),
            VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..) => None,
            other => panic!("{other:?}"),
        }
    }
}

/// A file of four pages; what a page is full of is its number, from 1 on.
fn file(folder: &Folder) -> File {
    let content: Vec<u8> = (1..=4).flat_map(|page| vec![page; PAGE as usize]).collect();
    let path = folder.write("memory", content);
    // Open for reading only: nothing could be written there.
    File::open(path).unwrap()
}

fn piece(start: u64, pages: u64, position: u64) -> Piece {
    Piece { range: Range { start, size: pages * PAGE }, position: position * PAGE }
}

#[test]
fn a_guest_sees_a_files_content_and_its_writes_stay_private() {
    let folder = Folder::new();
    let file = file(&folder);
    let mut guest = Guest::new();
    // Two pieces in another order than in the file, with holes before, between and behind.
    let start = place(1);
    let pieces = [piece(start + 5 * PAGE, 1, 0), piece(start + PAGE, 2, 2)];
    let source = Source::Private { file: &file, pieces: &pieces };
    let regions: Vec<_> = (0..2).map(|_| memory::map_region(region(1), source).unwrap()).collect();
    guest.vm.add_memory(&regions[0], false).unwrap();
    let seen = [0, 1, 2, 3, 5, 6].map(|page| guest.copy(start + page * PAGE));
    assert_eq!(seen, [0, 3, 4, 0, 1, 0].map(Some));
    // What the guest writes is in its memory alone.
    regions[0].write(&[9], MemoryRegionAddress(PAGE)).unwrap();
    assert_eq!(guest.copy(start + PAGE), Some(9));
    assert_eq!(guest.copy(start + PAGE + 1), Some(9));
    let mut byte = [0; 2];
    file.read_exact_at(&mut byte, 2 * PAGE).unwrap();
    assert_eq!(byte, [3, 3]);
    let mut byte = [0];
    regions[1].read(&mut byte, MemoryRegionAddress(PAGE + 1)).unwrap();
    assert_eq!(byte, [3], "another mapping of the same file");
}

#[test]
fn a_region_comes_and_goes_and_its_slot_is_used_again() {
    let mut guest = Guest::new();
    let regions = [1, 2, 3].map(|number| memory::map_region(region(number), Source::Shared).unwrap());
    let slots = regions.iter().map(|region| guest.vm.add_memory(region, false).unwrap());
    assert_eq!(slots.collect::<Vec<_>>(), [1, 2, 3]);
    for (number, region) in (1..).zip(&regions) {
        // Another process, which has the file, sees and writes the same pages.
        region.file().unwrap().write_all_at(&[number as u8 * 7], 0).unwrap();
        assert_eq!(guest.copy(place(number)), Some(number as u8 * 7));
        let mut byte = [0];
        region.file().unwrap().read_exact_at(&mut byte, 1).unwrap();
        assert_eq!(byte, [number as u8 * 7]);
    }
    guest.vm.remove_memory(region(2)).unwrap();
    assert_eq!(guest.copy(place(2)), None);
    let error = guest.vm.remove_memory(region(2)).unwrap_err().to_string();
    assert!(error.contains("it has no such region"), "{error}");
    let error = guest.vm.add_memory(&regions[2], false).unwrap_err().to_string();
    assert!(error.contains("are there already"), "{error}");
    assert_eq!(guest.vm.add_memory(&regions[1], false).unwrap(), 2, "the lowest one that is free");
    assert_eq!(guest.vm.memory_slots(), [(0, region(0)), (1, region(1)), (2, region(2)), (3, region(3))]);
    assert_eq!(guest.copy(place(2)), Some(14));
    assert_eq!(guest.memory.memory().read_obj::<u8>(GuestAddress(place(0))).unwrap(), code::CODE[0]);
}

#[test]
fn what_the_guest_writes_is_noted_while_somebody_wants_to_know() {
    let mut guest = Guest::new();
    let added = memory::map_region(region(1), Source::Anonymous).unwrap();
    guest.vm.add_memory(&added, false).unwrap();
    guest.copy(place(1));
    assert!(guest.vm.take_written().unwrap().is_empty());
    guest.vm.track_memory(true).unwrap();
    guest.vm.take_written().unwrap();
    guest.copy(place(1) + 5 * memory::mapping::page_size());
    let written = |pages: &[u64]| -> Vec<usize> {
        let is_set = |page: &usize| pages[page / 64] >> (page % 64) & 1 == 1;
        (0..pages.len() * 64).filter(is_set).collect()
    };
    let pages = guest.vm.take_written().unwrap();
    assert_eq!(pages.iter().map(|(range, _)| *range).collect::<Vec<_>>(), [region(0), region(1)]);
    assert_eq!((written(&pages[0].1), written(&pages[1].1)), (vec![], vec![5]));
    let pages = guest.vm.take_written().unwrap();
    assert!(written(&pages[1].1).is_empty(), "each page is told of once");
    guest.vm.track_memory(false).unwrap();
    guest.copy(place(1));
    assert!(guest.vm.take_written().unwrap().is_empty());
}

#[test]
fn a_machine_gets_memory_while_it_runs_and_gives_it_up_paused() {
    let folder = Folder::new();
    let file = file(&folder);
    let mut config = Config::parse(br#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 64}}"#).unwrap();
    config.firmware_words = Some("case=serial end=spin".to_owned());
    let mut host = Host::default();
    host.give_console(Box::new(std::io::sink()));
    let mut machine = Machine::build("test", &config, &mut host, Prepared::new().unwrap()).unwrap();
    machine.load(&config, &mut host).unwrap();
    machine.resume().unwrap();
    // Beyond the memory that the machine was built with.
    let ram = layout::memory(64 << 20)[0];
    let range = Range { start: ram.end() + (64 << 20), size: SIZE };
    let pieces = [piece(range.start + PAGE, 1, 3)];
    let add = |machine: &mut Machine, range: Range| {
        machine.add_memory(range, Source::Private { file: &file, pieces: &pieces })
    };
    let read =
        |machine: &Machine| machine.memory().memory().read_obj::<u8>(GuestAddress(range.start + PAGE)).ok();
    for _ in 0..3 {
        add(&mut machine, range).unwrap();
        assert_eq!(read(&machine), Some(4));
        let error = add(&mut machine, range).unwrap_err().to_string();
        assert!(error.starts_with(&format!("add {range} of guest memory")), "{error}");
        let error = machine.remove_memory(range).unwrap_err().to_string();
        assert!(error.contains("the machine runs: pause it first"), "{error}");
        // Whether it runs or not.
        machine.track_writes(true).unwrap();
        machine.memory().memory().write_obj(1_u8, GuestAddress(range.start)).unwrap();
        machine.pause().unwrap();
        let written = machine.tracker().take().unwrap();
        assert!(written.runs().any(|run| run.start == range.start), "{written:?}");
        machine.track_writes(false).unwrap();
        machine.remove_memory(range).unwrap();
        assert_eq!(read(&machine), None);
        machine.resume().unwrap();
    }
    for (range, expected) in [
        (Range { start: layout::ECAM.start, size: PAGE }, "there is more than memory, or a device"),
        (Range { start: u64::MAX - PAGE + 1, size: PAGE }, "there is more than memory, or a device"),
        (Range { start: range.start + 1, size: PAGE }, "is not in one region of the guest's memory"),
    ] {
        let error = add(&mut machine, range).unwrap_err().to_string();
        assert!(error.contains(expected), "{range}: {error}");
    }
    let error = machine.add_memory(Range { start: range.start, size: 100 }, Source::Anonymous).unwrap_err();
    assert!(error.to_string().contains("is not whole pages"), "{error}");
    let error = machine.add_memory(ram, Source::Anonymous).unwrap_err();
    assert!(error.to_string().starts_with("add 0x"), "{error}");
}
