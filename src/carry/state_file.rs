//! The file of a saved machine's state: a header, a table of sections, then the sections.
//!
//! All numbers are little-endian. The header has 64 bytes, each entry of the table has 32; sections follow in
//! the order of the table, without gaps. A checksum covers header and table, and each entry has the checksum
//! of its section. A file is untrusted: whatever it says, reading it ends in sections or in an error.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::error::{Context, Error, Result};

/// The first bytes of every state file.
pub(super) const MAGIC: [u8; 8] = *b"ALULASNP";
/// The form of header and table that this file describes; other forms are refused.
pub(super) const FORMAT: u16 = 1;
const HEADER_SIZE: usize = 64;
const ENTRY_SIZE: usize = 32;
/// The most that a state file may be, in bytes: its length decides how much memory is allocated to read it, and
/// a sparse file costs its owner nothing. A machine of 32 vCPUs and 100 devices has less than 1 MiB; the checksums of
/// 1 TiB of memory have 4 MiB.
const FILE_MAX: u64 = 64 << 20;
/// The most that its sections may have together without the checksums of memory, which a restore does not read.
const SECTIONS_SIZE_MAX: u64 = 16 << 20;
/// The most sections that a file may have, so that the table of a damaged file is never large.
const SECTIONS_MAX: usize = 4096;

/// The kind of [`Section`] that is the machine without its memory.
pub const MACHINE: u16 = 1;
/// The kind of section that says where the memory is.
pub const MEMORY: u16 = 2;
/// The kind of section, of no bytes, of a state whose memory is that of a difference.
pub const DIFF: u16 = 3;
/// The kind of section that says which snapshot a state is of; states of old have none.
pub const LINE: u16 = 4;
/// The kind of section that holds the checksums of memory. It stands last, and a restore does not read it.
pub const CHECKSUMS: u16 = 0xffff;

/// Names the content of the sections of this kind, in messages about a damaged file.
fn holds(kind: u16) -> &'static str {
    match kind {
        MACHINE => "the state of CPUs and devices",
        MEMORY => "what it says of the memory's file",
        DIFF => "the mark of a difference",
        LINE => "what it says of the snapshots before it",
        CHECKSUMS => "the list of the memory's checksums",
        _ => "a part that this Alula does not know",
    }
}

/// What the file says of where it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The architecture's number in ELF (`e_machine`): 62 is x86_64, 183 is aarch64.
    pub architecture: u16,
    /// The boot of the host (/proc/sys/kernel/random/boot_id). The same boot has the same kernel, the same KVM and
    /// the same CPUs.
    pub boot_id: [u8; 16],
}

/// A piece of the state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// What the section is about.
    pub kind: u16,
    /// The form of what the section holds.
    pub version: u16,
    /// What the section holds.
    pub bytes: Vec<u8>,
}

/// The line of a section in the table.
#[derive(Clone, Copy, Debug)]
struct Entry {
    kind: u16,
    version: u16,
    checksum: u32,
    offset: u64,
    length: u64,
}

impl Entry {
    fn write(&self, table: &mut Vec<u8>) {
        table.extend(self.kind.to_le_bytes());
        table.extend(self.version.to_le_bytes());
        table.extend(self.checksum.to_le_bytes());
        table.extend(self.offset.to_le_bytes());
        table.extend(self.length.to_le_bytes());
        table.extend([0; 8]);
    }

    fn read(bytes: &[u8; ENTRY_SIZE]) -> Self {
        Self {
            kind: number(bytes, 0) as u16,
            version: number(bytes, 2) as u16,
            checksum: number(bytes, 4) as u32,
            offset: number(bytes, 8),
            length: number(bytes, 16),
        }
    }
}

/// The 8 bytes at `offset` as a number; what lies after the end counts as 0.
fn number(bytes: &[u8], offset: usize) -> u64 {
    let mut eight = [0; 8];
    let there = &bytes[offset..bytes.len().min(offset + 8)];
    eight[..there.len()].copy_from_slice(there);
    u64::from_le_bytes(eight)
}

/// The content of a state file. A section of [`CHECKSUMS`] must be the last one.
pub fn write(origin: &Origin, sections: &[Section]) -> Vec<u8> {
    let first = HEADER_SIZE + sections.len() * ENTRY_SIZE;
    let mut offset = first as u64;
    let mut table = Vec::with_capacity(first - HEADER_SIZE);
    for section in sections {
        let (length, checksum) = (section.bytes.len() as u64, crc32fast::hash(&section.bytes));
        Entry { kind: section.kind, version: section.version, checksum, offset, length }.write(&mut table);
        offset += length;
    }
    let mut file = Vec::with_capacity(offset as usize);
    file.extend(MAGIC);
    file.extend(FORMAT.to_le_bytes());
    file.extend(origin.architecture.to_le_bytes());
    file.extend((sections.len() as u32).to_le_bytes());
    file.extend(offset.to_le_bytes());
    file.extend(origin.boot_id);
    file.resize(HEADER_SIZE - 4, 0);
    let checksum = checksum(&file, &table);
    file.extend(checksum.to_le_bytes());
    file.extend(table);
    sections.iter().for_each(|section| file.extend(&section.bytes));
    file
}

/// The checksum of a header, without the checksum at its end, and of a table.
fn checksum(header: &[u8], table: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(table);
    hasher.finalize()
}

/// Reads a state file; the section of [`CHECKSUMS`] only if `with_checksums`.
pub fn read(file: &File, with_checksums: bool) -> Result<(Origin, Vec<Section>)> {
    let length = file.metadata().context("read its length")?.len();
    if length < HEADER_SIZE as u64 {
        return Err(Error::config(format!("it has {length} bytes: no state of a machine is as short")));
    }
    let mut header = [0; HEADER_SIZE];
    file.read_exact_at(&mut header, 0).context("read its header")?;
    let (origin, count) = parse_header(&header, length)?;
    let mut table = vec![0; count * ENTRY_SIZE];
    file.read_exact_at(&mut table, HEADER_SIZE as u64).context("read its table of sections")?;
    if checksum(&header[..HEADER_SIZE - 4], &table) != number(&header, HEADER_SIZE - 4) as u32 {
        return Err(Error::config("it is damaged: the checksum of its header does not fit"));
    }
    let entries = parse_table(&table, length)?;
    let size: u64 = entries.iter().filter(|entry| entry.kind != CHECKSUMS).map(|entry| entry.length).sum();
    if size > SECTIONS_SIZE_MAX {
        return Err(Error::config(format!(
            "its sections have {size} bytes without the checksums, at most {SECTIONS_SIZE_MAX} are read: it is damaged"
        )));
    }
    let wanted = |entry: &&Entry| with_checksums || entry.kind != CHECKSUMS;
    let sections = entries.iter().filter(wanted).map(|entry| {
        let (mut bytes, what) = (vec![0; entry.length as usize], holds(entry.kind));
        file.read_exact_at(&mut bytes, entry.offset).with_context(|| format!("read {what}"))?;
        if crc32fast::hash(&bytes) != entry.checksum {
            return Err(Error::config(format!("it is damaged: {what} in it is not as it was written")));
        }
        Ok(Section { kind: entry.kind, version: entry.version, bytes })
    });
    Ok((origin, sections.collect::<Result<_>>()?))
}

/// What a header says: where the state comes from, and how many sections there are.
fn parse_header(header: &[u8; HEADER_SIZE], length: u64) -> Result<(Origin, usize)> {
    if header[..8] != MAGIC {
        return Err(Error::config("it is no state of a machine that Alula saved"));
    }
    let format = number(header, 8) as u16;
    if format != FORMAT {
        return Err(Error::config(format!("its format is {format}, this Alula reads format {FORMAT}")));
    }
    let said = number(header, 16);
    if said != length || length > FILE_MAX {
        return Err(Error::config(format!(
            "it has {length} bytes, its header says {said}, and at most {FILE_MAX} are read: it was cut short or \
             is damaged"
        )));
    }
    let count = number(header, 12) as u32 as usize;
    if count > SECTIONS_MAX || (HEADER_SIZE + count * ENTRY_SIZE) as u64 > length {
        return Err(Error::config(format!("it is damaged: it cannot have {count} sections")));
    }
    let mut boot_id = [0; 16];
    boot_id.copy_from_slice(&header[24..40]);
    Ok((Origin { architecture: number(header, 10) as u16, boot_id }, count))
}

/// The entries of a table, whose sections fill a file of `length` bytes to its end.
fn parse_table(table: &[u8], length: u64) -> Result<Vec<Entry>> {
    let (entries, _) = table.as_chunks();
    let entries: Vec<_> = entries.iter().map(Entry::read).collect();
    let mut end = (HEADER_SIZE + table.len()) as u64;
    for entry in &entries {
        let next = end.checked_add(entry.length).filter(|next| entry.offset == end && *next <= length);
        end = next.ok_or_else(|| {
            Error::config(format!("it is damaged: {} is not in its place", holds(entry.kind)))
        })?;
    }
    match end == length {
        true => Ok(entries),
        false => Err(Error::config("it is damaged: there is more behind its last section")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const ORIGIN: Origin = Origin { architecture: 62, boot_id: *b"0123456789abcdef" };

    fn sections() -> Vec<Section> {
        let section = |kind, bytes: &[u8]| Section { kind, version: 3, bytes: bytes.to_vec() };
        vec![
            section(1, b"configuration"),
            section(2, b""),
            section(1, &[7; 5000]),
            section(CHECKSUMS, b"sums"),
        ]
    }

    fn read_bytes(bytes: &[u8], with_checksums: bool) -> Result<(Origin, Vec<Section>)> {
        let mut file = tempfile();
        file.write_all(bytes).unwrap();
        read(&file, with_checksums)
    }

    fn tempfile() -> File {
        let path = std::env::temp_dir().join(format!(
            "alula-state-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }

    #[test]
    fn sections_come_back_as_they_were_written() {
        let bytes = write(&ORIGIN, &sections());
        let (origin, read) = read_bytes(&bytes, true).unwrap();
        assert_eq!((origin, &read), (ORIGIN, &sections()));
        let (_, read) = read_bytes(&bytes, false).unwrap();
        assert_eq!(read, sections()[..3]);
        assert_eq!(read_bytes(&write(&ORIGIN, &[]), true).unwrap(), (ORIGIN, vec![]));
    }

    #[test]
    fn every_changed_bit_and_every_cut_is_an_error() {
        let mut sections = sections();
        sections[2].bytes.truncate(10);
        let bytes = write(&ORIGIN, &sections);
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            let error = read_bytes(&changed, true).expect_err(&format!("bit {bit}"));
            assert!(!error.to_string().is_empty());
        }
        for length in 0..bytes.len() {
            read_bytes(&bytes[..length], true).expect_err(&format!("{length} bytes"));
        }
        read_bytes(&[&bytes[..], &[0]].concat(), true).unwrap_err();
    }

    #[test]
    fn what_is_damaged_is_told_by_what_it_holds() {
        for (kind, what) in
            [(MACHINE, "CPUs and devices"), (LINE, "the snapshots before it"), (9, "a part that")]
        {
            let mut bytes = write(&ORIGIN, &[Section { kind, version: 1, bytes: vec![1, 2, 3] }]);
            *bytes.last_mut().unwrap() ^= 1;
            let error = read_bytes(&bytes, true).unwrap_err().to_string();
            assert!(error.contains(what) && error.ends_with(" in it is not as it was written"), "{error}");
        }
    }

    #[test]
    fn a_sound_checksum_does_not_make_a_table_true() {
        let damage = |at: usize, value: u64, expected: &str| {
            let mut bytes = write(&ORIGIN, &sections());
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            let table = &bytes[HEADER_SIZE..HEADER_SIZE + 4 * ENTRY_SIZE];
            let sum = checksum(&bytes[..HEADER_SIZE - 4], table);
            bytes[HEADER_SIZE - 4..HEADER_SIZE].copy_from_slice(&sum.to_le_bytes());
            let error = read_bytes(&bytes, true).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        let first = HEADER_SIZE;
        damage(first + 8, 0, "the state of CPUs and devices is not in its place");
        damage(first + 16, u64::MAX, "the state of CPUs and devices is not in its place");
        damage(first + 16, 1 << 20, "the state of CPUs and devices is not in its place");
        damage(first + 3 * ENTRY_SIZE + 16, 3, "more behind its last section");
        damage(16, 1 << 40, "its header says 1099511627776");
        damage(8, 2, "its format is 2");
        damage(0, 0, "no state of a machine");
    }

    #[test]
    fn a_length_that_only_a_sparse_file_has_is_refused() {
        let mut bytes = write(&ORIGIN, &sections());
        bytes[16..24].copy_from_slice(&(1_u64 << 40).to_le_bytes());
        let mut file = tempfile();
        file.write_all(&bytes).unwrap();
        file.set_len(1 << 40).unwrap();
        let error = read(&file, true).unwrap_err().to_string();
        assert!(error.contains("at most 67108864 are read"), "{error}");
    }
}
