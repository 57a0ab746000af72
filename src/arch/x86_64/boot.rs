//! Loads a kernel and its boot tables: PVH (the hvm_start_info of Xen's x86/HVM direct boot ABI) or
//! the 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst), and says where to begin.

use std::io::{Read, Seek};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{acpi, elf, layout};
use crate::arch::kernel::{self, Format, KernelSource};
use crate::error::{Context, Error, Result};
use crate::memory::{Range, Regions};
use crate::platform::Platform;

const EM_X86_64: u16 = 62;
const EM_AARCH64: u16 = 183;
/// The 64-bit entry of a bzImage lies this far into its protected-mode part.
const BZIMAGE_ENTRY_64: u64 = 0x200;
/// xloadflags: the kernel has that entry.
const XLF_KERNEL_64: u16 = 1;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const PVH_MAGIC: u32 = 0x336e_c578;
const PAGE: u64 = 4096;

/// By which protocol the first CPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// 32-bit protected mode, `ebx` points to the start info.
    Pvh,
    /// Long mode, `rsi` points to the boot parameters.
    Linux64,
}

/// Where the first CPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its first instruction.
    pub address: u64,
    /// In which state it is expected there.
    pub protocol: Protocol,
    /// Where the start info or the boot parameters are.
    pub info: u64,
}

/// Looks at the first bytes of `kernel`, which are given back, too; what this machine does not boot is an error.
pub fn check_kernel(kernel: &mut (impl Read + Seek)) -> Result<(Format, Vec<u8>)> {
    let (format, head) = kernel::format(kernel)?;
    match format {
        Format::Elf(EM_X86_64) | Format::BzImage => Ok((format, head)),
        Format::Elf(EM_AARCH64) | Format::Arm64Image => {
            Err(Error::config("it is a kernel for aarch64, this machine is x86_64"))
        }
        Format::Elf(machine) => {
            Err(Error::config(format!("it is ELF for machine {machine}, this machine is x86_64 (62)")))
        }
        Format::Compressed(packed) => {
            Err(Error::config(format!("it is compressed with {}: unpack it first", packed.how)))
        }
    }
}

/// Loads `kernel`, `initrd` and the tables that describe `platform` into `memory`; notes in
/// `platform` where the initrd went.
pub fn load(
    memory: &Regions,
    kernel: &mut impl KernelSource,
    initrd: Option<&mut impl KernelSource>,
    platform: &mut Platform,
) -> Result<Entry> {
    let (format, head) = check_kernel(kernel)?;
    let (mut entry, header, kernel_end) = match format {
        Format::BzImage => load_bzimage(memory, kernel, platform)?,
        _ => load_elf(memory, kernel, &head, platform)?,
    };
    if let Some(initrd) = initrd {
        let range = place_initrd(kernel::length(initrd)?, kernel_end, platform)?;
        kernel::load_initrd(memory, initrd, range)?;
        platform.initrd = Some(range);
    }

    check_command_line(&platform.command_line)?;
    let tables = acpi::tables(platform);
    memory.write_slice(&tables.bytes, GuestAddress(tables.start)).context("write the ACPI tables")?;
    entry.info = match entry.protocol {
        Protocol::Pvh => write_start_info(memory, platform, tables.start),
        Protocol::Linux64 => {
            write_boot_params(memory, platform, header, tables.start).and_then(|()| write_cpu_tables(memory))
        }
        .map(|()| layout::BOOT_PARAMS),
    }
    .context("write the boot parameters")?;
    Ok(entry)
}

type Loaded = (Entry, Option<setup_header>, u64);

fn load_elf(
    memory: &Regions,
    kernel: &mut impl KernelSource,
    head: &[u8],
    platform: &Platform,
) -> Result<Loaded> {
    let elf = elf::Kernel::read(kernel, head, &platform.memory)?;
    elf.load(memory, kernel)?;
    let protocol = if elf.pvh { Protocol::Pvh } else { Protocol::Linux64 };
    // The initrd will be in the first range, too.
    Ok((Entry { address: elf.entry, protocol, info: 0 }, None, elf.end_in(platform.memory[0])))
}

fn load_bzimage(memory: &Regions, kernel: &mut impl KernelSource, platform: &Platform) -> Result<Loaded> {
    let load = GuestAddress(layout::KERNEL_START);
    let length = kernel::length(kernel)?;
    if length > platform.memory[0].size - layout::KERNEL_START {
        return Err(Error::config(format!(
            "its {length} bytes do not fit guest memory: give the guest more (`mem_size_mib`, --memory)"
        )));
    }
    let loaded = BzImage::load(memory, Some(load), kernel, None).context("load the bzImage")?;
    let header = loaded.setup_header.expect("a bzImage has a setup header");
    if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 {
        let version = header.version;
        return Err(Error::config(format!(
            "the bzImage has no 64-bit entry (boot protocol {}.{:02}): an x86_64 kernel since Linux 3.8 is needed",
            version >> 8,
            version & 0xff
        )));
    }
    // What is inside says what is missing: the setup header's `syssize` counts 16-byte paragraphs.
    let setup = (u64::from(if header.setup_sects == 0 { 4 } else { header.setup_sects }) + 1) * 512;
    let needed = setup + u64::from(header.syssize) * 16;
    if length < needed {
        return Err(Error::config(format!(
            "it needs {needed} bytes, the file has {length}: it is truncated"
        )));
    }
    // It unpacks itself at its preferred address or above, and needs `init_size` bytes there.
    let start = if header.pref_address == 0 { layout::KERNEL_START } else { header.pref_address };
    let end = start.saturating_add(header.init_size.into());
    if end > platform.memory[0].end() {
        return Err(Error::config(format!(
            "it unpacks to {} MiB of memory: give the guest more (`mem_size_mib`, --memory)",
            end.div_ceil(1 << 20)
        )));
    }
    let entry = Entry { address: load.0 + BZIMAGE_ENTRY_64, protocol: Protocol::Linux64, info: 0 };
    Ok((entry, Some(header), end.max(loaded.kernel_end)))
}

/// As high as possible below the 32-bit gap: what the kernel unpacks and allocates early is low.
fn place_initrd(size: u64, kernel_end: u64, platform: &Platform) -> Result<Range> {
    let end = platform.memory[0].end();
    let start = end.checked_sub(size.next_multiple_of(PAGE)).filter(|start| *start >= kernel_end);
    let advice = match end {
        layout::LOW_MEMORY_END => "more memory would be above that, where no initrd can be: make it smaller",
        _ => "give the guest more (`mem_size_mib`, --memory)",
    };
    match start {
        Some(start) => Ok(Range { start, size }),
        None => Err(Error::config(format!(
            "the initrd of {size} bytes does not fit into memory above the kernel, which ends at {kernel_end:#x} \
             of {end:#x}: {advice}"
        ))),
    }
}

fn check_command_line(line: &str) -> Result<()> {
    if line.len() >= layout::COMMAND_LINE_SIZE {
        return Err(Error::config(format!(
            "the kernel command line has {} bytes, at most {} fit",
            line.len(),
            layout::COMMAND_LINE_SIZE - 1
        )));
    }
    if line.contains('\0') {
        return Err(Error::config("the kernel command line contains a NUL"));
    }
    Ok(())
}

/// The memory map: (range, type) as E820 tells it.
fn memory_map(platform: &Platform) -> Vec<(Range, u32)> {
    let low = platform.memory[0].end();
    let between = |start, end| Range { start, size: end - start };
    let mut map = vec![
        (between(0, layout::LOW_RAM_END), E820_RAM),
        (between(layout::LOW_RAM_END, layout::KERNEL_START), E820_RESERVED),
        (between(layout::KERNEL_START, low), E820_RAM),
    ];
    // Linux uses ECAM only where the memory map keeps other things away from it.
    map.extend(platform.ecam().map(|ecam| (ecam, E820_RESERVED)));
    map.extend(platform.memory[1..].iter().map(|range| (*range, E820_RAM)));
    map
}

/// The start info, then the module list (one: the initrd), the memory map and the command line: all before the ACPI
/// tables, which begin with the RSDP, so that it costs no page of its own. Returns where the start info is.
fn write_start_info(memory: &Regions, platform: &Platform, rsdp: u64) -> Result<u64> {
    let entries = memory_map(platform);
    let before_line = 96 + entries.len() * size_of::<hvm_memmap_table_entry>();
    let size = (before_line + platform.command_line.len() + 1).next_multiple_of(16);
    let start = rsdp - size as u64;
    let (modules, map) = (start + 64, start + 96);
    let mut bytes = Vec::with_capacity(size);
    bytes.resize(96, 0);
    let info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        nr_modules: platform.initrd.is_some().into(),
        modlist_paddr: if platform.initrd.is_some() { modules } else { 0 },
        cmdline_paddr: start + before_line as u64,
        rsdp_paddr: rsdp,
        memmap_paddr: map,
        memmap_entries: entries.len() as u32,
        ..Default::default()
    };
    bytes[..56].copy_from_slice(info.as_slice());
    if let Some(initrd) = platform.initrd {
        let module = hvm_modlist_entry { paddr: initrd.start, size: initrd.size, ..Default::default() };
        bytes[64..96].copy_from_slice(module.as_slice());
    }
    for (range, kind) in entries {
        let entry = hvm_memmap_table_entry { addr: range.start, size: range.size, type_: kind, reserved: 0 };
        bytes.extend_from_slice(entry.as_slice());
    }
    bytes.extend_from_slice(platform.command_line.as_bytes());
    memory.write_slice(&bytes, GuestAddress(start)).context("write the PVH start info")?;
    Ok(start)
}

fn write_boot_params(
    memory: &Regions,
    platform: &Platform,
    header: Option<setup_header>,
    rsdp: u64,
) -> Result<()> {
    let mut params = boot_params {
        hdr: header.unwrap_or(setup_header {
            boot_flag: 0xaa55,
            header: 0x5372_6448,
            version: 0x20f,
            kernel_alignment: 0x100_0000,
            ..Default::default()
        }),
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    };
    params.hdr.type_of_loader = 0xff;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    params.hdr.cmdline_size = layout::COMMAND_LINE_SIZE as u32 - 1;
    if let Some(initrd) = platform.initrd {
        // Below the gap at 3 GiB, so both fit 32 bits.
        params.hdr.ramdisk_image = initrd.start as u32;
        params.hdr.ramdisk_size = initrd.size as u32;
    }
    for (slot, (range, kind)) in params.e820_table.iter_mut().zip(memory_map(platform)) {
        *slot = boot_e820_entry { addr: range.start, size: range.size, r#type: kind };
        params.e820_entries += 1;
    }
    let line = (platform.command_line.as_bytes(), GuestAddress(layout::COMMAND_LINE));
    memory.write_slice(line.0, line.1).context("write the command line")?;
    memory.write_slice(params.as_slice(), GuestAddress(layout::BOOT_PARAMS)).context("write the zero page")
}

/// Page tables that identity-map `layout::MAPPED_AT_ENTRY` with 2 MiB pages, and segment descriptors.
fn write_cpu_tables(memory: &Regions) -> Result<()> {
    const PRESENT_WRITABLE: u64 = 3;
    const HUGE: u64 = 1 << 7;
    let (pml4, pdpt, pd) = (layout::PAGE_TABLES, layout::PAGE_TABLES + PAGE, layout::PAGE_TABLES + 2 * PAGE);
    let pages = (0..layout::MAPPED_AT_ENTRY).step_by(2 << 20);
    let directory: Vec<u8> = pages.flat_map(|page| (page | PRESENT_WRITABLE | HUGE).to_le_bytes()).collect();
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4)).context("write the page tables")?;
    memory.write_obj(pd | PRESENT_WRITABLE, GuestAddress(pdpt)).context("write the page tables")?;
    memory.write_slice(&directory, GuestAddress(pd)).context("write the page tables")?;
    // Null, unused, `__BOOT_CS`, `__BOOT_DS`, task state segment.
    let gdt: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_ffff];
    memory.write_obj(gdt, GuestAddress(layout::GDT)).context("write the segment descriptors")
}
