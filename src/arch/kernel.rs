//! What loading a kernel has in common on both architectures.

use std::io::{Read, Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use crate::error::{Context, Error, Result};
use crate::memory::{Range, Regions};

/// Where a kernel or an initial ramdisk is read from: a file, or bytes of our own.
pub trait Source: Read + ReadVolatile + Seek {}
impl<T: Read + ReadVolatile + Seek> Source for T {}

/// What a kernel file is, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// ELF for the machine with this number.
    Elf(u16),
    /// Linux's compressed image for x86.
    BzImage,
    /// Linux's flat image for arm64.
    Arm64Image,
    /// gzip or zstd: a compressed image, which nobody but us could unpack.
    Compressed(&'static str),
}

/// How much of the file's beginning tells its format.
const HEAD: usize = 0x264;

/// Looks at the first bytes of `kernel`; anything but a kernel is an error that says what was expected.
pub fn format(kernel: &mut impl Source) -> Result<(Format, Vec<u8>)> {
    let mut head = Vec::with_capacity(HEAD);
    kernel.rewind().context("rewind the kernel")?;
    kernel.by_ref().take(HEAD as u64).read_to_end(&mut head).context("read the kernel")?;
    let at = |offset: usize, bytes: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(bytes));
    let format = if head.is_empty() {
        return Err(Error::config("the file is empty: a kernel image is needed"));
    } else if at(0, b"\x7fELF") && head.len() >= 20 {
        Format::Elf(u16::from_le_bytes([head[18], head[19]]))
    } else if at(0x202, b"HdrS") {
        Format::BzImage
    } else if at(56, b"ARM\x64") {
        Format::Arm64Image
    } else if at(0, b"\x1f\x8b") {
        Format::Compressed("gzip")
    } else if at(0, b"\x28\xb5\x2f\xfd") {
        Format::Compressed("zstd")
    } else {
        return Err(Error::config(
            "not a kernel image: expected ELF (vmlinux) or bzImage on x86_64, Image on aarch64",
        ));
    };
    Ok((format, head))
}

/// The length of `source` in bytes.
pub fn length(source: &mut impl Source) -> Result<u64> {
    source.seek(SeekFrom::End(0)).context("find the end of the file")
}

/// Copies the whole of `initrd` to `range` in guest memory.
pub fn load_initrd(memory: &Regions, initrd: &mut impl Source, range: Range) -> Result<()> {
    initrd.rewind().context("rewind the initrd")?;
    memory
        .read_exact_volatile_from(GuestAddress(range.start), initrd, range.size as usize)
        .context("read the initrd into guest memory")
}
