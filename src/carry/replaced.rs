//! The files that a save may take the place of: those that a save has made, and empty ones. Anything else is somebody's
//! own file, whose path was given by mistake: the save is refused before the guest is disturbed.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::memory_file::MemoryFile;
use super::state_file;
use super::stored::Sums;
use crate::error::{Context, Error, Result};
use crate::paths;
use crate::sys::descriptor;

/// The first bytes of the file of a working set; the last of them is the version of its form.
pub(super) const WORKING_SET: [u8; 8] = *b"ALULAWS1";

/// Reads what the state at `path`, which a save may replace, says of its memory. None: no state is there, or the state
/// does not say so in a form that is read here.
///
/// # Errors
/// Something else is there, or it cannot be read what.
pub fn state(path: &Path) -> Result<Option<Said>> {
    let Some(file) = there(path)? else { return Ok(None) };
    match begins_with(&file, &state_file::MAGIC) {
        true => Ok(memory_of(&file)),
        false => Err(not_ours(path, "no state of a machine that Alula saved")),
    }
}

/// The words of a state about its memory.
pub struct Said {
    /// The name and the length of its file.
    pub memory: MemoryFile,
    sums: Sums,
}

impl Said {
    /// Whether the state's memory seems to be at `path`: a file as long, and in some places with the content.
    pub fn is_at(&self, path: &Path) -> bool {
        there(path).is_ok_and(|file| file.is_some_and(|file| self.is_of(&file)))
    }

    fn is_of(&self, file: &File) -> bool {
        let length = file.metadata().map(|metadata| metadata.len());
        length.is_ok_and(|length| length == self.memory.size) && self.sums.seem_of(file, self.memory.size)
    }
}

/// Reads what the state in `file` says of its memory, if the state is whole.
pub fn memory_of(file: &File) -> Option<Said> {
    let (_, sections) = state_file::read(file, true).ok()?;
    let section = sections.iter().find(|section| section.kind == state_file::MEMORY)?;
    let (memory, _): (MemoryFile, _) = postcard::take_from_bytes(&section.bytes).ok()?;
    let sums = Sums::of(&sections, memory.size).ok()?;
    Some(Said { memory, sums })
}

/// Whether a save may replace what is at `path`, beside a state at `state`: nothing, an empty file, or the memory of that
/// state, which `said` so.
///
/// # Errors
/// Something else is there, a disk that is in use, or it cannot be read what.
pub fn check_memory(path: &Path, state: &Path, said: Option<&Said>) -> Result<()> {
    let Some(file) = there(path)? else { return Ok(()) };
    if !said.is_some_and(|said| said.is_of(&file)) {
        let what = format!("not the memory of a snapshot whose state is `{}`", state.display());
        return Err(not_ours(path, &what));
    }
    // A disk that somebody writes to is locked.
    match descriptor::lock(&file, false) {
        Ok(()) => Ok(()),
        Err(_) => Err(not_ours(path, "a disk that is in use")),
    }
}

/// Whether a save may remove or replace what is at `path`, where working sets are.
///
/// # Errors
/// Something else is there, or it cannot be read what.
pub fn check_working_set(path: &Path) -> Result<()> {
    match there(path)? {
        Some(file) if !begins_with(&file, &WORKING_SET[..WORKING_SET.len() - 1]) => {
            Err(not_ours(path, "not what Alula has noted of a guest"))
        }
        _ => Ok(()),
    }
}

/// An error if there is something else than a file at `path`: a link, or a device, is not replaced.
pub fn check_kind(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.is_file() => Err(Error::config(format!(
            "there is something else than a file already at `{}`: remove it first, or choose another path",
            path.display()
        ))),
        _ => Ok(()),
    }
}

/// The file at `path`, open; None: nothing is there, or an empty file.
fn there(path: &Path) -> Result<Option<File>> {
    check_kind(path)?;
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.len() == 0 => return Ok(None),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        _ => {}
    }
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
    opened.map(Some).map_err(|error| paths::cannot_open(path, &error, false)).with_context(|| look(path))
}

fn look(path: &Path) -> String {
    format!("look what is at `{}` already", path.display())
}

fn begins_with(mut file: &File, expected: &[u8]) -> bool {
    let mut first = vec![0; expected.len()];
    file.read_exact(&mut first).is_ok() && first == expected
}

fn not_ours(path: &Path, what: &str) -> Error {
    Error::config(format!(
        "`{}` is there already, and is {what}: remove it first, or choose another path",
        path.display()
    ))
}

/// The bytes of a state whose memory, of one block, is in a file of this name, for a test.
#[cfg(test)]
pub(super) fn state_of(name: Option<&str>, memory: &[u8]) -> Vec<u8> {
    let file = MemoryFile { name: name.map(str::to_owned), size: memory.len() as u64 };
    let origin = state_file::Origin { architecture: 62, boot_id: [0; 16] };
    let file = postcard::to_extend(&file, Vec::new()).unwrap();
    let checksum = crc32fast::hash(memory).to_le_bytes().to_vec();
    let sections = [(state_file::MEMORY, file), (state_file::CHECKSUMS, checksum)];
    let sections = sections.map(|(kind, bytes)| state_file::Section { kind, version: 1, bytes });
    state_file::write(&origin, &sections)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    /// A path in a folder that goes with the test, where `bytes` are.
    fn written(name: &str, bytes: &[u8]) -> PathBuf {
        let path = std::env::temp_dir().join(format!("alula-replaced-{name}-{}", std::process::id()));
        fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn only_states_and_empty_files_make_room_for_a_state() {
        let path = written("state", b"#!/bin/sh\n");
        let refused = |path: &Path| state(path).err().unwrap().to_string();
        let told = refused(&path);
        assert!(
            told.contains(&*path.to_string_lossy()) && told.contains("is no state of a machine"),
            "{told}"
        );
        assert!(told.ends_with("remove it first, or choose another path"), "{told}");
        fs::write(&path, "ALULA").unwrap();
        refused(&path);
        fs::write(&path, "").unwrap();
        assert!(state(&path).unwrap().is_none());
        // One that cannot be read any more is a state all the same.
        fs::write(&path, "ALULASNP, and it is damaged").unwrap();
        assert!(state(&path).unwrap().is_none());
        fs::write(&path, state_of(Some("m"), b"a block")).unwrap();
        let said = state(&path).unwrap().unwrap().memory;
        assert_eq!(said, MemoryFile { name: Some("m".to_owned()), size: 7 });
        fs::remove_file(&path).unwrap();
        assert!(state(&path).unwrap().is_none());
        assert!(refused(&std::env::temp_dir()).contains("something else than a file"));
    }

    #[test]
    fn only_memory_that_a_state_names_makes_room() {
        let path = written("memory", &[1; 4096]);
        let said = |size: u64, checksums: &[u32]| Said {
            memory: MemoryFile { name: None, size },
            sums: Sums::Whole(checksums.to_vec()),
        };
        let check = |said: Option<&Said>| check_memory(&path, Path::new("s"), said);
        // Another file as long has another content.
        let (right, others) = (crc32fast::hash(&[1; 4096]), crc32fast::hash(&[2; 4096]));
        for said in
            [None, Some(said(4095, &[right])), Some(said(8192, &[right])), Some(said(4096, &[others]))]
        {
            let told = check(said.as_ref()).unwrap_err().to_string();
            assert!(told.contains("not the memory of a snapshot whose state is `s`"), "{told}");
        }
        // Memory without data is a hole, whatever is as long.
        for sums in [Sums::Whole(Vec::new()), Sums::Diff(Vec::new())] {
            let said = Said { memory: MemoryFile { name: None, size: 4096 }, sums };
            check(Some(&said)).unwrap_err();
            let hole = written("hole", b"");
            OpenOptions::new().write(true).open(&hole).unwrap().set_len(4096).unwrap();
            check_memory(&hole, Path::new("s"), Some(&said)).unwrap();
            fs::remove_file(&hole).unwrap();
        }
        let said = said(4096, &[right]);
        check(Some(&said)).unwrap();
        let disk = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        descriptor::lock(&disk, true).unwrap();
        let told = check(Some(&said)).unwrap_err().to_string();
        assert!(told.contains("is a disk that is in use: remove"), "{told}");
        drop(disk);
        fs::write(&path, "").unwrap();
        check(None).unwrap();
        fs::remove_file(&path).unwrap();
        check(None).unwrap();
    }

    #[test]
    fn only_working_sets_make_room_for_one() {
        let path = written("working-set", b"ALULAWS9 of a later version");
        check_working_set(&path).unwrap();
        fs::write(&path, "what I need first: coffee").unwrap();
        let told = check_working_set(&path).unwrap_err().to_string();
        assert!(told.contains("is not what Alula has noted of a guest"), "{told}");
        fs::remove_file(&path).unwrap();
        check_working_set(&path).unwrap();
    }
}
