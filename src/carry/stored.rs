//! A saved machine in files: what is in which section of its state, where its memory is, and what is checked
//! before any of it is believed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::diff;
use super::folder::{self, Draft};
use super::line::Line;
use super::memory_file::{self, BLOCK, MemoryFile};
use super::state_file::{self, DIFF, LINE, MACHINE, MEMORY, Origin, Section};
use crate::arch;
use crate::descriptors::Named;
use crate::error::{Context, Error, Result};
use crate::host::{Access, Sharing, file};
use crate::machine::SavedMachine;
use crate::memory::{Piece, Range};
use crate::paths;
use crate::sys::{descriptor, process};

/// The form of each section; the machine says its own beside.
const VERSION: u16 = 1;
/// The most that the machine may have as bytes. What is read from them may take several times as much memory of
/// this process, and anybody may have written them.
const MACHINE_MAX: usize = 8 << 20;
/// Where Linux says by a number which boot of the host this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Where a saved machine is, or is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// In a folder of ours.
    Folder(PathBuf),
    /// In two files, as Firecracker's API names them.
    Files {
        /// The file of the state.
        state: PathBuf,
        /// The file of the memory.
        memory: PathBuf,
    },
}

/// What a state file says.
pub struct Stored {
    /// Where it was made.
    pub origin: Origin,
    /// The machine.
    pub machine: SavedMachine,
    /// Where its memory is.
    pub memory: MemoryFile,
    /// The snapshot's place, and what the snapshot comes after; None: the state does not say.
    pub line: Option<Line>,
    /// The checksums of its memory, or none if they were not asked for.
    pub sums: Sums,
}

/// The number of blocks of a memory's file that are compared before a save takes its place. More blocks would hold up the
/// requests of other clients, and a file of somebody else's differs in any block.
const SAMPLES: usize = 4;

/// Which memory a memory file has, and its checksums.
pub enum Sums {
    /// All of it: the checksum of each block.
    Whole(Vec<u32>),
    /// The pages that were written since another snapshot.
    Diff(Vec<diff::Block>),
}

impl Sums {
    /// Reads the checksums out of the sections of a state whose memory has `size` bytes.
    ///
    /// # Errors
    /// The sections do not describe pages of such a memory.
    pub fn of(sections: &[Section], size: u64) -> Result<Self> {
        let checksums = sections.iter().find(|section| section.kind == state_file::CHECKSUMS);
        let checksums = checksums.map_or(&[][..], |section| &section.bytes);
        match sections.iter().any(|section| section.kind == DIFF) {
            true => Ok(Self::Diff(diff::from_bytes(checksums, size)?)),
            false => {
                let (words, _) = checksums.as_chunks();
                Ok(Self::Whole(words.iter().map(|word| u32::from_le_bytes(*word)).collect()))
            }
        }
    }

    /// Whether `file` has what these are of, as far as [`SAMPLES`] blocks with data tell, spread over all of them. What
    /// these are of may be memory without data, as of a difference in which no page was written: its file is a hole.
    pub fn seem_of(&self, file: &File, size: u64) -> bool {
        let spread = |count: usize| (0..SAMPLES.min(count)).map(move |one| one * (count - 1) / (SAMPLES - 1));
        let is_hole = || descriptor::next_data(file, 0).is_ok_and(|data| data.is_none());
        match self {
            Self::Whole(checksums) => {
                let zeros = memory_file::checksum_of_zeros(BLOCK);
                let with_data: Vec<_> =
                    checksums.iter().enumerate().filter(|(_, checksum)| **checksum != zeros).collect();
                if with_data.is_empty() {
                    return is_hole();
                }
                let mut block = vec![0; BLOCK];
                spread(with_data.len()).map(|one| with_data[one]).all(|(index, checksum)| {
                    let place = (index * BLOCK) as u64;
                    let block = &mut block[..size.saturating_sub(place).min(BLOCK as u64) as usize];
                    memory_file::read_block(file, place, block, *checksum).is_ok()
                })
            }
            Self::Diff(blocks) if blocks.is_empty() => is_hole(),
            Self::Diff(blocks) => {
                let some: Vec<_> = spread(blocks.len()).map(|one| blocks[one].clone()).collect();
                diff::verify(file, size, &some).is_ok()
            }
        }
    }

    /// The word of the API for it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Whole(_) => "Full",
            Self::Diff(_) => "Diff",
        }
    }

    /// Compares the memory in `file`, of `size` bytes, with them.
    ///
    /// # Errors
    /// The memory is not as it was written.
    pub fn verify(&self, file: &File, size: u64) -> Result<()> {
        match self {
            Self::Whole(checksums) => memory_file::verify(file, size, checksums),
            Self::Diff(blocks) => diff::verify(file, size, blocks),
        }
    }
}

/// Refuses a folder without a name: a file in it would be one of the working folder.
fn check_named(folder: &Path) -> Result<()> {
    match folder.as_os_str().is_empty() {
        true => Err(Error::config(
            "the name of the snapshot's folder (`folder`) is empty: give one (`.` is the working folder)",
        )),
        false => Ok(()),
    }
}

impl Location {
    /// Begins to save a machine there.
    ///
    /// # Errors
    /// Of [`Draft`].
    pub fn begin(&self) -> Result<Draft> {
        match self {
            Self::Folder(path) => {
                check_named(path)?;
                Draft::in_folder(path, random()?)
            }
            Self::Files { state, memory } => Draft::at_paths(state, memory),
        }
    }

    /// Finishes what a crash has left there of a saved machine, so that it can be read.
    ///
    /// # Errors
    /// Another process saves there, or a file cannot be renamed.
    pub fn finish_left(&self) -> Result<()> {
        match self {
            // A state in a folder is there before and after.
            Self::Folder(_) => Ok(()),
            Self::Files { state, memory } => folder::finish_left(state, memory),
        }
    }

    /// Whether nothing is there that a difference, which is of no use alone, would replace.
    ///
    /// # Errors
    /// There is a snapshot, or its memory.
    pub fn check_free(&self) -> Result<()> {
        let memory = match self {
            Self::Folder(_) => None,
            Self::Files { memory, .. } => Some(memory.clone()),
        };
        match [Some(self.state()), memory].into_iter().flatten().find(|path| path.exists()) {
            Some(path) => Err(Error::config(format!(
                "`{}` is there already: a difference needs files of its own, and the snapshot before it",
                path.display()
            ))),
            None => Ok(()),
        }
    }

    /// The place of a snapshot that is there, whose state says `said` of its memory: its folder, if the two files that are
    /// named are those of a folder of ours.
    pub fn of_its_form(&self, said: &MemoryFile) -> Self {
        let Self::Files { state, memory } = self else { return self.clone() };
        let (folder, real) = (paths::folder(state), |path: &Path| path.canonicalize().ok());
        let is_beside = |name: &String| {
            let path = beside(name).ok().and_then(|name| real(&folder.join(name)));
            path.is_some() && path == real(memory)
        };
        match state.file_name() == Some(folder::STATE.as_ref()) && said.name.as_ref().is_some_and(is_beside) {
            true => Self::Folder(folder.to_owned()),
            false => self.clone(),
        }
    }

    /// The file of the state.
    pub fn state(&self) -> PathBuf {
        match self {
            Self::Folder(path) => path.join(folder::STATE),
            Self::Files { state, .. } => state.clone(),
        }
    }

    /// The file of the memory, of which the state says `memory`.
    ///
    /// # Errors
    /// The state cannot be one of this place.
    pub fn memory(&self, memory: &MemoryFile) -> Result<PathBuf> {
        match (self, &memory.name) {
            (Self::Files { memory, .. }, _) => Ok(memory.clone()),
            (Self::Folder(folder), Some(name)) => Ok(folder.join(beside(name)?)),
            (Self::Folder(_), None) => {
                let message =
                    "its memory is at a path of its own: give both paths (`snapshot_path`, `mem_backend`)";
                Err(Error::config(message))
            }
        }
    }

    /// Reads the state, and opens the memory.
    ///
    /// # Errors
    /// One of them cannot be opened, is not what Alula wrote on this architecture, or they do not belong together.
    pub fn open(&self, with_checksums: bool) -> Result<(Stored, Named<File>)> {
        self.check_folder()?;
        let (stored, memory) = self.read_with(with_checksums)?;
        let attempt = || format!("open the memory of a machine, `{}`", memory.display());
        let opened = open(&memory, "memory of a saved machine", attempt)?;
        let (length, size) = (opened.metadata().with_context(attempt)?.len(), stored.memory.size);
        if length != size {
            return Err(Error::config(format!(
                "it has {length} bytes, and the state says {size}: it was cut short, or belongs to another state"
            )))
            .with_context(attempt);
        }
        Ok((stored, opened))
    }

    /// Reads the state alone: its memory is somebody else's.
    ///
    /// # Errors
    /// The state cannot be opened, or is not what Alula wrote on this architecture.
    pub fn read(&self) -> Result<Stored> {
        self.check_folder()?;
        self.read_with(false).map(|(stored, _)| stored)
    }

    /// Refuses a folder without a name, and a file where a folder belongs: most likely, it is one of the two files of a snapshot.
    fn check_folder(&self) -> Result<()> {
        match self {
            Self::Folder(path) if path.is_file() => Err(Error::config(format!(
                "`{}` is a file: give the folder that a microVM was saved to (`alula ctl ID snapshot FOLDER`); a state and a \
                 memory with paths of their own are taken by `PUT /snapshot/load` and `alula template STATE MEMORY`",
                path.display()
            ))),
            Self::Folder(path) => check_named(path),
            Self::Files { .. } => Ok(()),
        }
    }

    /// Reads the state, and says where the memory is.
    fn read_with(&self, checksums: bool) -> Result<(Stored, PathBuf)> {
        let path = self.state();
        let stored = Stored::read(&path, checksums)?;
        let attempt = || format!("read the state of a machine, `{}`", path.display());
        let memory = self.memory(&stored.memory).with_context(attempt)?;
        Ok((stored, memory))
    }
}

impl Stored {
    /// Reads the state file at `path`.
    ///
    /// # Errors
    /// The state cannot be opened, or is not what Alula wrote on this architecture.
    pub fn read(path: &Path, with_checksums: bool) -> Result<Self> {
        let attempt = || format!("read the state of a machine, `{}`", path.display());
        let file = open(path, "state of a saved machine", attempt)?;
        let (origin, sections) = state_file::read(&file, with_checksums).with_context(attempt)?;
        check_origin(&origin).with_context(attempt)?;
        Self::of(origin, &sections).with_context(attempt)
    }

    fn of(origin: Origin, sections: &[Section]) -> Result<Self> {
        let machine = section(sections, MACHINE, "machine")?;
        if machine.len() > MACHINE_MAX {
            return Err(Error::config(format!(
                "its machine has {} bytes, at most {MACHINE_MAX} are read",
                machine.len()
            )));
        }
        let machine = SavedMachine::from_bytes(machine)?;
        let memory = match postcard::take_from_bytes::<MemoryFile>(section(sections, MEMORY, "memory")?) {
            Ok((place, [])) => place,
            _ => return Err(Error::config("what it says of the memory is damaged")),
        };
        let line = match sections.iter().any(|section| section.kind == LINE) {
            true => match postcard::take_from_bytes::<Line>(section(sections, LINE, "line")?) {
                Ok((line, [])) => Some(line),
                _ => return Err(Error::config("what it says of the snapshots before it is damaged")),
            },
            false => None,
        };
        if total(machine.memory()) != Some(memory.size) {
            return Err(Error::config("its memory has another size than its file: it is damaged"));
        }
        let sums = Sums::of(sections, memory.size)?;
        Ok(Self { origin, machine, memory, line, sums })
    }

    /// What of the memory is where in its file.
    pub fn pieces(&self) -> Vec<Piece> {
        let ranges = self.machine.memory();
        let positions = memory_file::offsets(ranges);
        ranges.iter().zip(positions).map(|(range, position)| Piece { range: *range, position }).collect()
    }
}

/// The version of states that are written and read here: the form of their file, of what is in it, and of the machine.
pub fn version() -> String {
    format!("v{}.{VERSION}.{}", state_file::FORMAT, SavedMachine::version())
}

/// The version of the state file at `path`, as [`version`] has it; of a file of another form there is an error.
pub fn version_of(path: &Path) -> Result<String> {
    let attempt = || format!("read the version of the state of a machine, `{}`", path.display());
    let file = open(path, "state of a saved machine", attempt)?;
    let (_, sections) = state_file::read(&file, false).with_context(attempt)?;
    let machine = sections.iter().find(|section| section.kind == MACHINE);
    let machine =
        machine.ok_or_else(|| Error::config("it has no section `machine`")).with_context(attempt)?;
    let of_machine = SavedMachine::version_of(&machine.bytes).with_context(attempt)?;
    Ok(format!("v{}.{}.{of_machine}", state_file::FORMAT, machine.version))
}

/// An error if the state was not made on this architecture, whose CPUs and devices alone are understood here.
fn check_origin(origin: &Origin) -> Result<()> {
    match origin.architecture {
        arch::ELF_MACHINE => Ok(()),
        other => Err(Error::config(format!(
            "it is of a machine of another architecture ({other} in ELF), and this host's is {}",
            arch::NAME
        ))),
    }
}

/// The content of the state file of a machine, of which `machine` are the bytes, whose memory was written so and is
/// called `name` beside it; `line`: which snapshot it is, if that is known.
///
/// # Errors
/// The state is larger than what can be read again.
pub fn state(
    machine: Vec<u8>,
    memory: &MemoryFile,
    sums: &Sums,
    boot_id: [u8; 16],
    line: Option<&Line>,
) -> Result<Vec<u8>> {
    if machine.len() > MACHINE_MAX {
        let message =
            format!("the state of the machine has {} bytes, at most {MACHINE_MAX} are kept", machine.len());
        return Err(Error::config(message));
    }
    let memory = postcard::to_extend(memory, Vec::new()).context("write where the memory is")?;
    let section = |kind, bytes| Section { kind, version: VERSION, bytes };
    let mut sections = vec![section(MACHINE, machine), section(MEMORY, memory)];
    if let Some(line) = line {
        let line = postcard::to_extend(line, Vec::new()).context("write which snapshot it is")?;
        sections.push(section(LINE, line));
    }
    let checksums = match sums {
        Sums::Whole(checksums) => checksums.iter().flat_map(|sum| sum.to_le_bytes()).collect(),
        Sums::Diff(blocks) => {
            sections.push(section(DIFF, Vec::new()));
            diff::to_bytes(blocks)
        }
    };
    sections.push(section(state_file::CHECKSUMS, checksums));
    Ok(state_file::write(&Origin { architecture: arch::ELF_MACHINE, boot_id }, &sections))
}

/// Which boot of the host this is; None: there is nothing that says so, as where there is no /proc. The file is read once.
pub fn boot_id() -> Option<[u8; 16]> {
    static READ: OnceLock<Option<[u8; 16]>> = OnceLock::new();
    *READ.get_or_init(|| {
        let text = std::fs::read_to_string(BOOT_ID).ok()?;
        u128::from_str_radix(&text.trim().replace('-', ""), 16).ok().map(u128::to_be_bytes)
    })
}

/// Does what the first state that is read needs, and no later one: asks which boot of the host this is, and what the
/// processor has for checksums (CPUID, which takes a virtual machine some microseconds each time).
pub fn prepare() {
    boot_id();
    crc32fast::hash(&[]);
}

/// A random number, which nothing else has.
///
/// # Errors
/// The host has no random bytes.
pub fn random() -> Result<u128> {
    let mut bytes = [0; 16];
    process::random(&mut bytes).context("get random bytes of the host")?;
    Ok(u128::from_le_bytes(bytes))
}

fn open(path: &Path, what: &str, attempt: impl Fn() -> String) -> Result<Named<File>> {
    let opened = file::open(path, Access::Read, Sharing::Refused, what, &attempt)?;
    match opened.metadata().is_ok_and(|metadata| metadata.is_file()) {
        true => Ok(opened),
        false => Err(Error::config("it is a block device, a file is needed")).with_context(attempt),
    }
}

/// A name of a file in the folder of the state; a state must not name any other file of the host.
fn beside(name: &str) -> Result<&str> {
    match folder::is_memory(name) {
        true => Ok(name),
        false => Err(Error::config("what it names as its memory is no memory of a machine that Alula saved")),
    }
}

fn section<'s>(sections: &'s [Section], kind: u16, what: &str) -> Result<&'s [u8]> {
    let mut found = sections.iter().filter(|section| section.kind == kind);
    match (found.next(), found.next()) {
        (Some(section), None) if section.version == VERSION => Ok(&section.bytes),
        (Some(section), None) => Err(Error::config(format!(
            "its section `{what}` has version {}, this Alula reads version {VERSION}",
            section.version
        ))),
        (None, _) => Err(Error::config(format!("it has no section `{what}`"))),
        (Some(_), Some(_)) => Err(Error::config(format!("it has the section `{what}` twice"))),
    }
}

/// How many bytes the ranges have; None: one of them, or all together, cannot be.
fn total(ranges: &[Range]) -> Option<u64> {
    ranges.iter().try_fold(0_u64, |sum, range| {
        range.start.checked_add(range.size)?;
        sum.checked_add(range.size)
    })
}
