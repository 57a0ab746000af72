//! What loading a kernel has in common on both architectures.

use std::io::{Read, Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile};

use crate::error::{Context, Error, Result};
use crate::memory::{Range, Region, Regions};

/// Where a kernel or an initial ramdisk is read from: a file, or bytes of our own.
pub trait KernelSource: Read + ReadVolatile + Seek {}
impl<T: Read + ReadVolatile + Seek> KernelSource for T {}

/// What a kernel file is, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// ELF for the machine with this number.
    Elf(u16),
    /// Linux's compressed image for x86.
    BzImage,
    /// Linux's flat image for arm64.
    Arm64Image,
    /// An image that nobody but us could unpack.
    Compressed(Packed),
}

/// Something compressed: how, and which bytes of the file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    /// The program that does it.
    pub how: &'static str,
    /// Where in the file it starts.
    pub start: u64,
    /// How many bytes it has at most.
    pub size: u64,
}

/// How much of the file's beginning tells its format.
const HEAD: usize = 0x264;

/// Looks at the first bytes of `kernel`; anything but a kernel is an error that says what was expected.
pub fn format(kernel: &mut (impl Read + Seek)) -> Result<(Format, Vec<u8>)> {
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
        Format::Compressed(Packed { how: "gzip", start: 0, size: u64::MAX })
    } else if at(0, b"\x28\xb5\x2f\xfd") {
        Format::Compressed(Packed { how: "zstd", start: 0, size: u64::MAX })
    } else if at(0, b"MZ") && at(4, b"zimg") && head.len() >= 64 {
        Format::Compressed(zboot(&head))
    } else {
        return Err(Error::config(
            "not a kernel image: expected ELF (vmlinux) or bzImage on x86_64, Image on aarch64",
        ));
    };
    Ok((format, head))
}

/// Linux's EFI program that unpacks itself (`struct linux_efi_zboot_header`, drivers/firmware/efi).
fn zboot(head: &[u8]) -> Packed {
    let u32_at = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("4 bytes")).into();
    let name = head[24..56].split(|byte| *byte == 0).next().expect("there is always a first");
    let known = ["gzip", "zstd", "lz4", "lzma", "lzo", "xz"].into_iter().find(|how| how.as_bytes() == name);
    Packed { how: known.unwrap_or("an unknown program"), start: u32_at(8), size: u32_at(12) }
}

/// The length of `source` in bytes.
pub fn length(source: &mut impl KernelSource) -> Result<u64> {
    source.seek(SeekFrom::End(0)).context("find the end of the file")
}

/// Copies the whole of `initrd` to `range` in guest memory.
pub fn load_initrd(memory: &Regions, initrd: &mut impl KernelSource, range: Range) -> Result<()> {
    initrd.rewind().context("rewind the initrd")?;
    read(memory, initrd, range).context("read the initrd into guest memory")
}

/// Fills `range` of guest memory from where `source` stands. One system call reads at most 0x7ffff000
/// bytes (read(2)), so what is larger takes several.
pub fn read(memory: &Regions, source: &mut impl KernelSource, range: Range) -> Result<()> {
    let mut done = 0;
    while done < range.size {
        let (at, rest) = (range.start + done, range.size - done);
        // One region at a time: where a read of one was short, vm-memory would go on in the next one, and leave a gap.
        let region = memory.find_region(GuestAddress(at)).map(Region::range);
        let room = region.map_or(rest, |region| rest.min(region.end() - at)) as usize;
        let read =
            memory.read_volatile_from(GuestAddress(at), source, room).context("read it into guest memory")?;
        if read == 0 {
            return Err(Error::config(format!(
                "the file ends {rest} bytes early: it has become shorter since it was looked at"
            )));
        }
        done += read as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, ErrorKind, Result as IoResult};

    use vm_memory::bitmap::BitmapSlice;
    use vm_memory::{GuestAddressSpace, VolatileMemoryError, VolatileSlice};

    use super::*;
    use crate::memory::allocate;

    /// As many bytes as one system call reads at most (read(2)).
    const MOST: usize = 0x7fff_f000;

    /// A file that is read as the kernel reads one: `most` bytes at a time, and now and then a signal comes
    /// instead. Its bytes say in which read they came; of a read, only the first and the last are written.
    struct Short {
        length: usize,
        most: usize,
        reads: Vec<usize>,
        interrupts: bool,
    }

    impl Read for Short {
        fn read(&mut self, _: &mut [u8]) -> IoResult<usize> {
            unreachable!("it is read into guest memory");
        }
    }

    impl Seek for Short {
        fn seek(&mut self, _: SeekFrom) -> IoResult<u64> {
            Ok(0)
        }
    }

    impl ReadVolatile for Short {
        fn read_volatile<B: BitmapSlice>(
            &mut self,
            to: &mut VolatileSlice<B>,
        ) -> Result<usize, VolatileMemoryError> {
            self.interrupts = !self.interrupts;
            if self.interrupts {
                return Err(VolatileMemoryError::IOError(ErrorKind::Interrupted.into()));
            }
            let count = to.len().min(self.most).min(self.length - self.reads.iter().sum::<usize>());
            if count > 0 {
                self.reads.push(count);
                let number = self.reads.len() as u8;
                to.write_obj(number, 0)?;
                to.write_obj(number, count - 1)?;
            }
            Ok(count)
        }
    }

    #[test]
    fn what_takes_several_reads_is_read_to_its_end() {
        const GIB: usize = 1 << 30;
        let start = 0x1000;
        let cases = [(3 * GIB, MOST, 2), (2 * MOST, MOST, 2), (MOST, MOST, 1), (1000, 300, 4), (1, 1, 1)];
        let memory = allocate(&[Range { start: 0, size: 5 * GIB as u64 }]).unwrap();
        let memory = memory.memory();
        for (length, most, reads) in cases {
            let mut file = Short { length, most, reads: Vec::new(), interrupts: false };
            load_initrd(&memory, &mut file, Range { start, size: length as u64 }).unwrap();
            assert_eq!((file.reads.len(), file.reads.iter().sum::<usize>()), (reads, length));
            check_places(&memory, &file, start);
        }
    }

    /// Each read lies behind the one before it.
    fn check_places(memory: &Regions, file: &Short, start: u64) {
        let mut at = start;
        for (index, count) in file.reads.iter().enumerate() {
            for place in [at, at + *count as u64 - 1] {
                let found: u8 = memory.read_obj(GuestAddress(place)).unwrap();
                assert_eq!(found, index as u8 + 1, "{} bytes, at {place:#x}", file.length);
            }
            at += *count as u64;
        }
    }

    #[test]
    fn short_reads_leave_no_gap_where_one_region_follows_another() {
        const MIB: u64 = 1 << 20;
        let ranges =
            [(0, 4), (4, 2), (6, 6)].map(|(start, size)| Range { start: start * MIB, size: size * MIB });
        let memory = allocate(&ranges).unwrap();
        for most in [300_000, 3 << 20, usize::MAX] {
            let mut file = Short { length: 10 << 20, most, reads: Vec::new(), interrupts: false };
            read(&memory.memory(), &mut file, Range { start: MIB, size: 10 * MIB }).unwrap();
            assert_eq!(file.reads.iter().sum::<usize>(), file.length);
            check_places(&memory.memory(), &file, MIB);
        }
    }

    #[test]
    fn a_file_that_has_become_shorter_is_an_error() {
        let memory = allocate(&[Range { start: 0, size: 1 << 20 }]).unwrap();
        let memory = memory.memory();
        let range = Range { start: 0, size: 1000 };
        let mut file = Short { length: 990, most: 300, reads: Vec::new(), interrupts: false };
        let error = load_initrd(&memory, &mut file, range).unwrap_err().to_string();
        let expected = "read the initrd into guest memory: the file ends 10 bytes early";
        assert!(error.starts_with(expected), "{error}");
        read(&memory, &mut Cursor::new([7; 1000]), range).unwrap();
    }
}
