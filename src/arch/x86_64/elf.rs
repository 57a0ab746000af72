//! An ELF kernel: what its program headers and notes say is checked before anything of it is loaded.
//!
//! Every segment must be in the file, in memory, above the boot tables and clear of the others. A note
//! of type XEN_ELFNOTE_PHYS32_ENTRY says that the kernel is entered by PVH, and where (Xen's x86/HVM
//! direct boot ABI): kernels that have one may give a virtual address in the ELF header. Without such a note
//! the header's entry point is that of the 64-bit Linux boot protocol.
//!
//! Linux has both, and is entered by its own protocol: by PVH it first looks for Xen at 256 leaves of CPUID
//! (arch/x86/platform/pvh/enlighten.c, `xen_prepare_pvh`), and each of them is an exit. Linux is known by notes
//! that have its name (include/linux/build-salt.h). The address that is entered must lie in a segment.

use std::io::SeekFrom;

use super::layout;
use crate::arch::kernel::{self, KernelSource};
use crate::error::{Context, Error, Result};
use crate::memory::{Range, Regions};

/// A kernel has a handful of segments; a header that claims many would cost a read each.
const SEGMENTS_MAX: u16 = 64;
/// A kernel has some hundred bytes of notes in one or two segments. A sparse file can claim
/// terabytes of them, and reading those would keep the main thread from everything else.
const NOTES_MAX: u64 = 64 << 10;
const PROGRAM_HEADER: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Type of the note with the 32-bit entry point, and the name it has.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const XEN: &[u8] = b"Xen\0";
/// The name of notes that only Linux has.
const LINUX: &[u8] = b"Linux\0";

struct Header {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
    alignment: u64,
}

/// A kernel that was checked and not yet loaded.
pub struct Kernel {
    segments: Vec<Segment>,
    /// The first instruction of the first CPU.
    pub entry: u64,
    /// The kernel is entered by PVH, else by the 64-bit Linux boot protocol.
    pub pvh: bool,
}

/// The two facts that a kernel's notes tell.
#[derive(Default)]
struct Notes {
    /// Where it is entered by PVH: the first note that tells counts, in whichever of the note segments it is.
    pvh: Option<u64>,
    /// The kernel has a note named `Linux`, as Linux alone has.
    linux: bool,
}

/// A part of the file and where it goes. The memory behind the file's bytes is zero already.
struct Segment {
    offset: u64,
    file_size: u64,
    range: Range,
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([bytes[offset], bytes[offset + 1]])
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("8 bytes"))
}

impl Kernel {
    /// Reads and checks what `kernel` says of itself; `head` is its first bytes.
    pub fn read(kernel: &mut impl KernelSource, head: &[u8], memory: &[Range]) -> Result<Self> {
        let length = kernel::length(kernel)?;
        let headers = program_headers(kernel, head)?;
        let mut segments: Vec<Segment> = Vec::new();
        for header in headers.iter().filter(|header| header.kind == PT_LOAD && header.memory_size > 0) {
            let segment = segment(header, length, memory)?;
            let range = segment.range;
            let overlaps =
                |other: &&Segment| other.range.start < range.end() && range.start < other.range.end();
            if let Some(other) = segments.iter().find(overlaps) {
                return Err(Error::config(format!(
                    "the segments at {:#x} and {:#x} overlap",
                    other.range.start, range.start
                )));
            }
            segments.push(segment);
        }

        let is_right = |entry: u64, end: u64| {
            let holds = |segment: &Segment| (segment.range.start..segment.range.end()).contains(&entry);
            entry < end && segments.iter().any(holds)
        };
        let header = u64_at(head, 24);
        let notes = Notes::read(kernel, &headers, length)?;
        let is_linux = notes.linux && is_right(header, layout::MAPPED_AT_ENTRY);
        let note = notes.pvh.filter(|_| !is_linux);
        let (entry, end, from) = match note {
            // By PVH the first CPU is in 32-bit mode.
            Some(entry) => (entry, 1 << 32, "its PVH note"),
            None => (header, layout::MAPPED_AT_ENTRY, "its ELF header, for it has no PVH note,"),
        };
        if !is_right(entry, end) {
            return Err(Error::config(format!(
                "the entry point {entry:#x} of {from} lies in none of its segments below {end:#x}"
            )));
        }
        Ok(Self { segments, entry, pvh: note.is_some() })
    }

    /// Where the last segment ends of those in `memory`, one of the ranges that it was read for.
    pub fn end_in(&self, memory: Range) -> u64 {
        let ends = self.segments.iter().map(|segment| segment.range.end());
        ends.filter(|end| *end <= memory.end()).max().unwrap_or(layout::KERNEL_START)
    }

    /// Copies the segments from `kernel`, which was read, into guest memory.
    pub fn load(&self, memory: &Regions, kernel: &mut impl KernelSource) -> Result<()> {
        for Segment { offset, file_size, range } in
            self.segments.iter().filter(|segment| segment.file_size > 0)
        {
            kernel.seek(SeekFrom::Start(*offset)).context("find a segment")?;
            kernel::read(memory, kernel, Range { start: range.start, size: *file_size })
                .with_context(|| format!("load the segment at {:#x}", range.start))?;
        }
        Ok(())
    }
}

fn program_headers(kernel: &mut impl KernelSource, head: &[u8]) -> Result<Vec<Header>> {
    if head.len() < 64 {
        return Err(Error::config("the file ends within the ELF header: it is truncated"));
    }
    if head[4..6] != [2, 1] {
        return Err(Error::config("it is not a 64-bit little-endian ELF file"));
    }
    let (table, size, count) = (u64_at(head, 32), u16_at(head, 54), u16_at(head, 56));
    if usize::from(size) != PROGRAM_HEADER || count == 0 || count > SEGMENTS_MAX {
        return Err(Error::config(format!(
            "the ELF header gives {count} program headers of {size} bytes: expected 1 to {SEGMENTS_MAX} of \
             {PROGRAM_HEADER}"
        )));
    }
    let mut bytes = vec![0; usize::from(count) * PROGRAM_HEADER];
    // Mostly they follow the ELF header, and have been read with it.
    let known = usize::try_from(table).ok().and_then(|table| head.get(table..)?.get(..bytes.len()));
    if let Some(known) = known {
        bytes.copy_from_slice(known);
    } else {
        kernel.seek(SeekFrom::Start(table)).context("find the program headers")?;
        kernel
            .read_exact(&mut bytes)
            .map_err(|_| Error::config("the file ends within the program headers: it is truncated"))?;
    }
    let header = |raw: &[u8]| Header {
        kind: u32_at(raw, 0),
        offset: u64_at(raw, 8),
        address: u64_at(raw, 24),
        file_size: u64_at(raw, 32),
        memory_size: u64_at(raw, 40),
        alignment: u64_at(raw, 48),
    };
    Ok(bytes.chunks_exact(PROGRAM_HEADER).map(header).collect())
}

fn segment(header: &Header, length: u64, memory: &[Range]) -> Result<Segment> {
    let Header { offset, address, file_size, memory_size, .. } = *header;
    if offset.checked_add(file_size).is_none_or(|end| end > length) {
        return Err(Error::config(format!(
            "the segment at {address:#x} needs {file_size} bytes from offset {offset}, \
             the file has {length}: it is truncated"
        )));
    }
    if file_size > memory_size {
        return Err(Error::config(format!(
            "the segment at {address:#x} is larger in the file than in memory"
        )));
    }
    if address < layout::KERNEL_START {
        return Err(Error::config(format!(
            "the segment at {address:#x} overlaps the boot tables: kernels start at {:#x}",
            layout::KERNEL_START
        )));
    }
    let range = Range { start: address, size: memory_size };
    let fits =
        |memory: &Range| address >= memory.start && memory.end() - address.min(memory.end()) >= memory_size;
    if !memory.iter().any(fits) {
        return Err(Error::config(format!(
            "the segment at {address:#x} of {memory_size} bytes lies outside guest memory: \
             give the guest more (`mem_size_mib`, --memory)"
        )));
    }
    Ok(Segment { offset, file_size, range })
}

impl Notes {
    fn read(kernel: &mut impl KernelSource, headers: &[Header], length: u64) -> Result<Self> {
        let mut all = Self::default();
        for header in headers.iter().filter(|header| header.kind == PT_NOTE) {
            let Header { offset, file_size, alignment, .. } = *header;
            if file_size > NOTES_MAX || offset.checked_add(file_size).is_none_or(|end| end > length) {
                return Err(Error::config(format!(
                    "its notes have {file_size} bytes from offset {offset}: expected at most {NOTES_MAX}, \
                     within the {length} bytes of the file"
                )));
            }
            let mut bytes = vec![0; file_size as usize];
            kernel.seek(SeekFrom::Start(offset)).context("find its notes")?;
            kernel.read_exact(&mut bytes).context("read its notes")?;
            // Linkers that join notes of both alignments say 8 for all of them, and mean it or not.
            let both = if alignment == 8 { [8, 4] } else { [4, 4] };
            let walks = both.map(|alignment| all.walk(&bytes, alignment));
            if let ([Err(error), Err(_)], None) = (walks, all.pvh) {
                return Err(error);
            }
        }
        Ok(all)
    }

    /// Walks the notes of one segment (System V gABI, "Note Section"): name and description begin at multiples
    /// of `alignment`.
    fn walk(&mut self, notes: &[u8], alignment: usize) -> Result<()> {
        const NOTE_HEADER: usize = 12;
        let mut at = 0;
        while notes.len() - at >= NOTE_HEADER {
            let size = |offset: usize| u32_at(notes, at + offset) as usize;
            let name_at = at + NOTE_HEADER;
            let name_end = name_at + size(0);
            let description_at = name_end.next_multiple_of(alignment);
            let end = description_at + size(4);
            let Some(description) = notes.get(description_at..end) else {
                return Err(Error::config(format!(
                    "the note at byte {at} of its notes ends outside of them"
                )));
            };
            match &notes[name_at..name_end] {
                LINUX => self.linux = true,
                XEN if u32_at(notes, at + 8) == XEN_ELFNOTE_PHYS32_ENTRY && self.pvh.is_none() => {
                    self.pvh = Some(pvh_entry(description)?);
                }
                _ => {}
            }
            at = end.next_multiple_of(alignment).min(notes.len());
        }
        Ok(())
    }
}

/// The ABI means 32 bits; Linux gives 64, of which the upper half is 0.
fn pvh_entry(description: &[u8]) -> Result<u64> {
    match description.len() {
        4 => Ok(u32_at(description, 0).into()),
        8 => Ok(u64_at(description, 0)),
        size => Err(Error::config(format!("its PVH note has {size} bytes: expected 4 or 8"))),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    const RAM: Range = Range { start: 0, size: 64 << 20 };
    const START: u64 = layout::KERNEL_START;

    /// A note of `name` (with its NUL) and type `kind`, laid out at multiples of `alignment`.
    fn note(name: &[u8], kind: u32, description: &[u8], alignment: usize) -> Vec<u8> {
        let mut note: Vec<u8> = [name.len() as u32, description.len() as u32, kind]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        for part in [name, description] {
            note.extend_from_slice(part);
            note.resize(note.len().next_multiple_of(alignment), 0);
        }
        note
    }

    fn xen(entry: u64) -> Vec<u8> {
        note(XEN, XEN_ELFNOTE_PHYS32_ENTRY, &entry.to_le_bytes(), 4)
    }

    /// A kernel of one page at `START` whose ELF header gives `entry`, with a segment for each of `notes`
    /// (its bytes, its alignment, and the size that its program header claims).
    fn elf(entry: u64, notes: &[(Vec<u8>, u64, Option<u64>)]) -> Vec<u8> {
        let mut file = vec![0; 64 + PROGRAM_HEADER * (1 + notes.len())];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[24..32].copy_from_slice(&entry.to_le_bytes());
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[54..56].copy_from_slice(&(PROGRAM_HEADER as u16).to_le_bytes());
        file[56..58].copy_from_slice(&(1 + notes.len() as u16).to_le_bytes());
        let mut header = |index: usize, kind: u32, sizes: [u64; 2], alignment: u64, content: &[u8]| {
            let at = 64 + PROGRAM_HEADER * index;
            let offset = file.len() as u64;
            file[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            for (field, value) in [(8, offset), (24, START), (32, sizes[0]), (40, sizes[1]), (48, alignment)]
            {
                file[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
            }
            file.extend_from_slice(content);
        };
        header(0, PT_LOAD, [4096, 8192], 4096, &[0x90; 4096]);
        for (index, (bytes, alignment, claimed)) in notes.iter().enumerate() {
            header(1 + index, PT_NOTE, [claimed.unwrap_or(bytes.len() as u64), 0], *alignment, bytes);
        }
        file
    }

    fn read(file: Vec<u8>) -> Result<(u64, bool), String> {
        let head = file[..file.len().min(0x264)].to_vec();
        let kernel =
            Kernel::read(&mut Cursor::new(file), &head, &[RAM]).map_err(|error| error.to_string())?;
        Ok((kernel.entry, kernel.pvh))
    }

    #[test]
    fn a_pvh_note_is_found_wherever_it_stands() {
        let (other, build) = (note(b"GNU\0", 3, &[7; 20], 4), note(b"Linux\0", 257, &[0; 3], 4));
        let padded = note(b"stapsdt\0", 3, &[1; 9], 8);
        let aligned = note(XEN, XEN_ELFNOTE_PHYS32_ENTRY, &(START as u32).to_le_bytes(), 8);
        let elsewhere = note(XEN, 17, &[0; 8], 4);
        let impostor = note(b"XeN\0", XEN_ELFNOTE_PHYS32_ENTRY, &[9; 8], 4);
        let one = |notes: &[&[u8]], alignment| vec![(notes.concat(), alignment, None)];
        let cases = [
            one(&[&xen(START)], 4),
            one(&[&other, &build, &xen(START)], 4),
            one(&[&elsewhere, &impostor, &xen(START), &other], 4),
            // The segment with the entry comes first, in the middle, last; its alignment is 8, truly or not.
            vec![(xen(START), 4, None), (other.clone(), 4, None)],
            vec![(other.clone(), 4, None), (xen(START), 0, None), (build.clone(), 4, None)],
            vec![(other.clone(), 4, None), (padded.clone(), 8, None), (xen(START), 1, None)],
            one(&[&padded, &aligned], 8),
            one(&[&build, &xen(START)], 8),
            vec![(Vec::new(), 4, None), (xen(START), 4, None)],
        ];
        for (index, notes) in cases.into_iter().enumerate() {
            // A virtual address that is in no segment: nobody enters there.
            assert_eq!(read(elf(0xffff_ffff_8010_0000, &notes)), Ok((START, true)), "case {index}");
        }
    }

    #[test]
    fn a_segment_above_the_gap_leaves_the_memory_below_it_free() {
        let high = Range { start: 4 << 30, size: 1 << 30 };
        let segment = |start| Segment { offset: 0, file_size: 0, range: Range { start, size: 4096 } };
        let end_in = |starts: &[u64], memory| {
            let segments = starts.iter().map(|start| segment(*start)).collect();
            Kernel { segments, entry: 0, pvh: false }.end_in(memory)
        };
        assert_eq!(end_in(&[START + 4096, high.start, START], RAM), START + 8192);
        assert_eq!(end_in(&[RAM.end() - 4096], RAM), RAM.end());
        assert_eq!(end_in(&[high.start], RAM), START);
    }

    #[test]
    fn without_a_pvh_note_the_elf_header_says_where_to_enter() {
        let other = (note(b"GNU\0", 3, &[7; 20], 4), 4, None);
        assert_eq!(read(elf(START + 8191, &[])), Ok((START + 8191, false)));
        assert_eq!(read(elf(START, std::slice::from_ref(&other))), Ok((START, false)));
        let error = read(elf(0xffff_ffff_8010_0000, &[other])).unwrap_err();
        assert!(error.contains("0xffffffff80100000 of its ELF header, for it has no PVH note"), "{error}");
    }

    #[test]
    fn linux_is_entered_by_its_own_protocol_where_its_header_says() {
        let linux = |kind: u32| note(b"Linux\0", kind, &[0; 4], 4);
        let one = |notes: &[&[u8]]| vec![(notes.concat(), 4, None)];
        let both = [
            one(&[&linux(256), &xen(START)]),
            one(&[&xen(START), &linux(257)]),
            vec![(xen(START), 4, None), (linux(256), 4, None)],
            vec![(linux(256), 4, None), (xen(START), 4, None)],
        ];
        for notes in both {
            assert_eq!(read(elf(START + 64, &notes)), Ok((START + 64, false)));
            // Where the header's entry point is a virtual address, or is not mapped yet, the note is right.
            for elsewhere in [0xffff_ffff_8010_0000, 0, START - 1, START + 8192] {
                assert_eq!(read(elf(elsewhere, &notes)), Ok((START, true)), "{elsewhere:#x}");
            }
        }
        let other =
            one(&[&note(b"Linux2\0", 256, &[0; 4], 4), &note(b"linux\0", 256, &[0; 4], 4), &xen(START)]);
        assert_eq!(read(elf(START + 64, &other)), Ok((START, true)), "another system");
        assert_eq!(read(elf(START + 64, &one(&[&linux(256)]))), Ok((START + 64, false)), "no PVH note");
        // Notes behind the one with the entry point are not needed, and may be torn.
        let mut torn = xen(START);
        torn.extend(1u32.to_le_bytes().repeat(4));
        torn.truncate(torn.len() - 1);
        assert_eq!(read(elf(START + 64, &one(&[&torn]))), Ok((START, true)));
    }

    #[test]
    fn what_no_page_table_maps_yet_is_entered_by_pvh_or_not_at_all() {
        let high = layout::MAPPED_AT_ENTRY;
        let entry_of = |notes: &[(Vec<u8>, u64, Option<u64>)]| {
            let mut file = elf(high, notes);
            // The segment's physical address.
            file[64 + 24..64 + 32].copy_from_slice(&high.to_le_bytes());
            let head = file[..file.len().min(0x264)].to_vec();
            let memory = Range { start: 0, size: 2 * high };
            let kernel = Kernel::read(&mut Cursor::new(file), &head, &[memory]);
            kernel.map(|kernel| (kernel.entry, kernel.pvh)).map_err(|error| error.to_string())
        };
        let linux = (note(b"Linux\0", 256, &[0; 4], 4), 4, None);
        assert_eq!(entry_of(&[linux.clone(), (xen(high), 4, None)]), Ok((high, true)));
        for notes in [vec![], vec![linux]] {
            let error = entry_of(&notes).unwrap_err();
            assert!(error.contains("lies in none of its segments below 0x40000000"), "{error}");
        }
    }

    #[test]
    fn notes_that_lie_are_refused() {
        let with = |notes: Vec<u8>, claimed| read(elf(START, &[(notes, 4, claimed)])).unwrap_err();
        for outside in [START - 1, START + 8192, 0, 1 << 32 | START] {
            let error = with(xen(outside), None);
            assert!(error.contains(&format!("{outside:#x} of its PVH note lies in none")), "{error}");
        }
        // A segment of a terabyte, one that ends behind the file, one that wraps round.
        for claimed in [1 << 40, NOTES_MAX + 1, 4096, u64::MAX] {
            let error = with(xen(START), Some(claimed));
            assert!(error.contains(&format!("its notes have {claimed} bytes")), "{error}");
        }
        let mut long = xen(START);
        long[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(with(long, None).contains("the note at byte 0 of its notes ends outside of them"));
        let short = note(XEN, XEN_ELFNOTE_PHYS32_ENTRY, &[0; 2], 4);
        assert!(with(short, None).contains("its PVH note has 2 bytes"));
    }
}
