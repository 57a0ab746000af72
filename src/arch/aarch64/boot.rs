//! Loads an Image, an initrd and the device tree (Documentation/arch/arm64/booting.rst).

use std::io::{Read, Seek};

use vm_memory::{Bytes, GuestAddress};

use super::{fdt, layout, unpack};
use crate::arch::kernel::{self, Format, KernelSource};
use crate::error::{Context, Error, Result};
use crate::memory::{Range, Regions};
use crate::platform::Platform;

const EM_X86_64: u16 = 62;
const PAGE: u64 = 4096;
/// The initrd must lie within 32 GiB of the kernel.
const INITRD_WINDOW: u64 = 32 << 30;
/// Linux's COMMAND_LINE_SIZE, with the NUL.
const COMMAND_LINE_SIZE: usize = 2048;

/// Where the first CPU begins, and what it finds in `x0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its first instruction.
    pub address: u64,
    /// The device tree.
    pub fdt: u64,
}

/// Looks at the first bytes of `kernel`, which are given back, too; what this machine does not boot is an error.
pub fn check_kernel(kernel: &mut (impl Read + Seek)) -> Result<(Format, Vec<u8>)> {
    let (format, head) = kernel::format(kernel)?;
    match format {
        Format::Arm64Image | Format::Compressed(_) => Ok((format, head)),
        Format::BzImage | Format::Elf(EM_X86_64) => {
            Err(Error::config("it is a kernel for x86_64, this machine is aarch64"))
        }
        Format::Elf(machine) => {
            Err(Error::config(format!("it is ELF for machine {machine}: an Image is needed on aarch64")))
        }
    }
}

/// Loads `kernel`, `initrd` and the tree that describes `platform` into `memory`; notes in
/// `platform` where the initrd went.
pub fn load(
    memory: &Regions,
    kernel: &mut impl KernelSource,
    initrd: Option<&mut impl KernelSource>,
    platform: &mut Platform,
) -> Result<Entry> {
    let (format, head) = check_kernel(kernel)?;
    check_command_line(&platform.command_line)?;
    let ram = layout::ram(&platform.memory);
    let (address, kernel_end) = match format {
        Format::Compressed(packed) => unpack::load(memory, kernel, packed, ram)?,
        _ => load_image(memory, kernel, &head, ram)?,
    };
    let top = ram.end().min(ram.start + INITRD_WINDOW);

    // The initrd's place is in the tree, the tree's size depends on nothing but its presence.
    if let Some(initrd) = initrd {
        platform.initrd = Some(Range { start: 0, size: kernel::length(initrd)? });
        let tree_start = top.saturating_sub(tree(platform)?.len() as u64) & !(PAGE - 1);
        let range = place_initrd(kernel::length(initrd)?, kernel_end, tree_start)?;
        kernel::load_initrd(memory, initrd, range)?;
        platform.initrd = Some(range);
    }
    let tree = tree(platform)?;
    let fdt = top.saturating_sub(tree.len() as u64) & !(PAGE - 1);
    if fdt < kernel_end {
        return Err(Error::config(
            "the kernel and the device tree do not fit memory: give the guest more (`mem_size_mib`, --memory)",
        ));
    }
    memory.write_slice(&tree, GuestAddress(fdt)).context("write the device tree")?;
    Ok(Entry { address, fdt })
}

fn tree(platform: &Platform) -> Result<Vec<u8>> {
    fdt::tree(platform).context("write the device tree")
}

fn load_image(
    memory: &Regions,
    kernel: &mut impl KernelSource,
    head: &[u8],
    ram: Range,
) -> Result<(u64, u64)> {
    let head = head
        .first_chunk()
        .ok_or_else(|| Error::config("the file ends within the Image header: it is truncated"))?;
    let size = kernel::length(kernel)?;
    let (start, end) = place(head, size, ram)?;
    kernel.rewind().context("rewind the Image")?;
    kernel::read(memory, kernel, Range { start, size }).context("load the Image")?;
    Ok((start, end))
}

/// The header of an Image.
pub type Header = [u8; 64];

/// Where an Image with this header begins and ends in `ram`; its file has `length` bytes.
pub fn place(head: &Header, length: u64, ram: Range) -> Result<(u64, u64)> {
    let field = |offset: usize| u64::from_le_bytes(head[offset..offset + 8].try_into().expect("8 bytes"));
    let size = field(16).max(length);
    // Kernels before 3.17 do not say how large they are, and mean this offset whatever they say.
    let text_offset = if field(16) == 0 { 0x8_0000 } else { field(8) };
    let needed = text_offset.checked_add(size).filter(|needed| *needed <= ram.size);
    let needed = needed.ok_or_else(|| {
        Error::config(format!(
            "its {size} bytes at offset {text_offset:#x} do not fit {} MiB of memory: give the guest more \
             (`mem_size_mib`, --memory)",
            ram.size >> 20
        ))
    })?;
    Ok((ram.start + text_offset, ram.start + needed))
}

fn place_initrd(size: u64, kernel_end: u64, end: u64) -> Result<Range> {
    let start = end.checked_sub(size.next_multiple_of(PAGE)).filter(|start| *start >= kernel_end);
    start.map(|start| Range { start, size }).ok_or_else(|| {
        Error::config(format!(
            "the initrd of {size} bytes does not fit into memory above the kernel, which ends at {kernel_end:#x} \
             of {end:#x}: give the guest more (`mem_size_mib`, --memory)"
        ))
    })
}

fn check_command_line(line: &str) -> Result<()> {
    if line.len() >= COMMAND_LINE_SIZE {
        let length = line.len();
        return Err(Error::config(format!(
            "the kernel command line has {length} bytes, at most {} fit",
            COMMAND_LINE_SIZE - 1
        )));
    }
    if line.contains('\0') {
        return Err(Error::config("the kernel command line contains a NUL"));
    }
    Ok(())
}
