//! Looks at an ELF kernel before it is loaded: every segment must be in the file, in memory, above
//! the boot tables and clear of the others, and the entry must be in one of them.

use std::io::SeekFrom;

use super::layout;
use crate::arch::kernel::Source;
use crate::error::{Context, Error, Result};
use crate::memory::Range;

/// A kernel has a handful of segments; a header that claims many would cost a read each.
const SEGMENTS_MAX: u16 = 64;
const PT_LOAD: u32 = 1;

struct Header {
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([bytes[offset], bytes[offset + 1]])
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("8 bytes"))
}

/// Checks the kernel whose first bytes are `head` and returns where its last segment ends.
pub fn check(kernel: &mut impl Source, head: &[u8], length: u64, memory: &[Range]) -> Result<u64> {
    if head.len() < 64 {
        return Err(Error::config("the file ends within the ELF header: it is truncated"));
    }
    if head[4..6] != [2, 1] {
        return Err(Error::config("it is not a 64-bit little-endian ELF file"));
    }
    let (table, size, count) = (u64_at(head, 32), u16_at(head, 54), u16_at(head, 56));
    if size != 56 || count == 0 || count > SEGMENTS_MAX {
        return Err(Error::config(format!(
            "the ELF header gives {count} program headers of {size} bytes: expected 1 to {SEGMENTS_MAX} of 56"
        )));
    }
    let mut headers = vec![0; usize::from(count) * 56];
    kernel.seek(SeekFrom::Start(table)).context("find the program headers")?;
    kernel
        .read_exact(&mut headers)
        .map_err(|_| Error::config("the file ends within the program headers: it is truncated"))?;

    let mut loaded: Vec<Range> = Vec::new();
    for raw in headers.chunks_exact(56).filter(|raw| raw[..4] == PT_LOAD.to_le_bytes()) {
        let header = Header {
            offset: u64_at(raw, 8),
            address: u64_at(raw, 24),
            file_size: u64_at(raw, 32),
            memory_size: u64_at(raw, 40),
        };
        if header.memory_size == 0 {
            continue;
        }
        let range = segment(&header, length, memory)?;
        if let Some(other) =
            loaded.iter().find(|other| other.start < range.end() && range.start < other.end())
        {
            return Err(Error::config(format!(
                "the segments at {:#x} and {:#x} overlap",
                other.start, range.start
            )));
        }
        loaded.push(range);
    }
    let entry = u64_at(head, 24);
    if !loaded.iter().any(|range| (range.start..range.end()).contains(&entry)) {
        return Err(Error::config(format!("its entry point {entry:#x} lies in none of its segments")));
    }
    Ok(loaded.iter().map(Range::end).max().expect("the entry lies in one"))
}

fn segment(header: &Header, length: u64, memory: &[Range]) -> Result<Range> {
    let Header { offset, address, file_size, memory_size } = *header;
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
    Ok(range)
}
