//! Where a saved machine is kept, and how the next one takes its place: a crash at any instruction leaves the
//! old one, the new one, or none, and never new memory beside an old state.
//!
//! In a folder of ours, memory gets a new name each time, and the state says which. Renaming the state is what
//! makes a saved machine the one that counts; memory that no state names goes afterwards. With a path for each
//! of the two, as Firecracker's API gives them, both are written under other names first; when both are whole on the disk,
//! the old state goes, and the new one gets its name last. A crash between leaves the new state under its first name: the
//! next save gives it its last one before anything else.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::replaced;
use crate::descriptors::Named;
use crate::error::{Context, Error, Result};
use crate::paths;

/// The name of the state in a folder.
pub const STATE: &str = "state";
/// The name of the file that says which pages of the memory its guest needs first.
pub const WORKING_SET: &str = "working-set";
/// The beginning of the names of memory files in a folder.
const MEMORY: &str = "memory-";
/// How many digits of hexadecimal come after that: those of a number of 128 bits.
const DIGITS: usize = 32;
/// The end of the name of each file that is not whole yet. A save removes a file with such a name, which a crash has left:
/// nobody else calls a file so.
const NEW: &str = ".alula-new";
/// Who may read what is made: a guest's memory is nobody else's business.
const MODE: u32 = 0o600;

/// A saved machine that is being written. All that is opened for it is opened when it is made; the rest can be done
/// by a thread that opens nothing.
pub struct Draft {
    state: NewFile,
    memory: NewFile,
    /// A folder of ours, of which this holds the lock.
    is_folder: bool,
    /// Memory of earlier saved machines in it, and what a crash left half written.
    old: Vec<PathBuf>,
    is_kept: bool,
    /// The old state was removed: neither the old memory nor the new one, whichever is at the memory's path, is of use then.
    is_bare: bool,
    /// The folder, if it was made for this one. Dropped after the files in it are removed.
    made: Made,
}

/// A folder that was made, and goes again with this value if nothing is in it; None: it stays.
struct Made(Option<PathBuf>);

impl Drop for Made {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // The kernel refuses to remove a folder that has files of others.
            let _ = fs::remove_dir(path);
        }
    }
}

/// A file that is being written.
struct NewFile {
    path: PathBuf,
    /// Under which name it is written; it gets its own when it is whole.
    new: PathBuf,
    file: Named<File>,
    /// The folder that it is in, open to be flushed.
    folder: Named<File>,
}

impl Draft {
    /// Begins a saved machine in the folder at `path`, which is made if it is not there. `id` is a number that no
    /// earlier one had.
    ///
    /// # Errors
    /// The folder cannot be made or written to, or another process saves to it.
    pub fn in_folder(path: &Path, id: u128) -> Result<Self> {
        let attempt = || format!("save to folder `{}`", path.display());
        let made = Made(match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => Some(path.to_owned()),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => None,
            Err(error) => return Err(paths::cannot_make(path, &error)).with_context(attempt),
        });
        let folder = open_folder(path).with_context(attempt)?;
        if folder.try_lock().is_err() {
            return Err(Error::config("another process saves to it")).with_context(attempt);
        }
        let (memory, state) = (path.join(format!("{MEMORY}{id:0DIGITS$x}")), path.join(STATE));
        replaced::state(&state).with_context(attempt)?;
        let old = memory_files(path).with_context(attempt)?;
        let other = folder.try_clone().with_context(attempt)?;
        let file = make(&memory)?;
        let memory = NewFile { new: memory.clone(), path: memory, file, folder: other };
        let undo = |_: &Error| drop(fs::remove_file(&memory.new));
        let state = NewFile::new(&state, folder).inspect_err(undo)?;
        Ok(Self { state, memory, is_folder: true, old, is_kept: false, is_bare: false, made })
    }

    /// Begins a saved machine with its state at `state` and its memory at `memory`.
    ///
    /// # Errors
    /// Something else than an earlier saved machine is at one of the paths, both are one, or nothing can be made beside them.
    pub fn at_paths(state: &Path, memory: &Path) -> Result<Self> {
        let (state, memory) = (resolved(state)?, resolved(memory)?);
        if [&with_suffix(&state), &state]
            .iter()
            .any(|path| **path == memory || **path == with_suffix(&memory))
        {
            return Err(Error::config("state and memory need a file each"))
                .with_context(|| format!("save to `{}`", state.display()));
        }
        make_room(&state, &memory).with_context(|| format!("save to `{}`", state.display()))?;
        let open = |path: &Path| {
            let folder = paths::folder(path);
            open_folder(folder).with_context(|| format!("open folder `{}`", folder.display()))
        };
        let memory = NewFile::new(&memory, open(&memory)?)?;
        let undo = |_: &Error| drop(fs::remove_file(&memory.new));
        let state = open(&state).and_then(|folder| NewFile::new(&state, folder)).inspect_err(undo)?;
        Ok(Self {
            state,
            memory,
            is_folder: false,
            old: Vec::new(),
            is_kept: false,
            is_bare: false,
            made: Made(None),
        })
    }

    /// The file for the memory, which is empty.
    pub fn memory_file(&self) -> &File {
        &self.memory.file
    }

    /// Where the memory will be.
    pub fn memory_path(&self) -> &Path {
        &self.memory.path
    }

    /// The name of the memory file, beside the state in a folder of ours; None: it has a path of its own.
    pub fn memory_name(&self) -> Option<String> {
        let name = || self.memory.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.is_folder.then(name)
    }

    /// Makes the saved machine the one that counts, with `state` as its state. Its memory has been written and
    /// flushed.
    ///
    /// # Errors
    /// A file cannot be written or flushed: the one before is still there. Or a file cannot be renamed: at paths, there may
    /// be none then. Or the new names cannot be flushed: what has taken the place of another one stays, and the first one
    /// at its place is removed.
    pub fn keep(mut self, state: &[u8]) -> Result<()> {
        let Self { state: part, memory, is_folder, is_bare, is_kept, made, .. } = &mut self;
        let attempt = || format!("write `{}`", part.new.display());
        part.file.write_all(state).with_context(attempt)?;
        part.file.sync_all().with_context(attempt)?;
        let replaces = fs::symlink_metadata(&part.path).is_ok();
        if !*is_folder {
            if replaces {
                // The new name of a whole state must be on the disk before the old state goes: the memory is known by it.
                part.flush_folder()?;
                let attempt = || format!("remove `{}`", part.path.display());
                fs::remove_file(&part.path).with_context(attempt)?;
            }
            // From here on there is no saved machine until the new state has its name.
            *is_bare = true;
            if replaces {
                part.flush_folder()?;
            }
            memory.put_in_place()?;
        }
        // The name of the memory must be on the disk before a state relies on it.
        memory.flush_folder()?;
        part.put_in_place()?;
        let flushed = part.flush_folder();
        *is_kept = replaces || flushed.is_ok();
        flushed?;
        made.0 = None;
        // What cannot be removed is in nobody's way: the next saved machine tries again.
        self.old.iter().for_each(|path| drop(fs::remove_file(path)));
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_kept {
            // Nobody can use memory without its state.
            let _ = fs::remove_file(&self.memory.new);
            let _ = fs::remove_file(&self.state.new);
            if self.is_bare {
                let _ = fs::remove_file(&self.memory.path);
            }
        }
    }
}

impl NewFile {
    /// Begins the file that will be at `path`, in the folder `folder`.
    fn new(path: &Path, folder: Named<File>) -> Result<Self> {
        let new = with_suffix(path);
        remove_left(&new)?;
        let file = make(&new)?;
        match file.try_lock() {
            Ok(()) => {}
            // Another process that has it locked takes it for a file that a crash has left, and removes it.
            Err(TryLockError::WouldBlock) => return Err(in_use(&new)),
            Err(TryLockError::Error(error)) => {
                let _ = fs::remove_file(&new);
                return Err(error).with_context(|| format!("lock `{}`", new.display()));
            }
        }
        Ok(Self { path: path.to_owned(), new, file, folder })
    }

    fn put_in_place(&mut self) -> Result<()> {
        let attempt = || format!("rename `{}` to `{}`", self.new.display(), self.path.display());
        fs::rename(&self.new, &self.path).with_context(attempt)?;
        self.new = self.path.clone();
        Ok(())
    }

    fn flush_folder(&self) -> Result<()> {
        let attempt = || format!("flush folder `{}` to the disk", paths::folder(&self.path).display());
        self.folder.sync_all().with_context(attempt)
    }
}

/// Refuses to save to two paths where something else is than an earlier saved machine. What a crash has left is finished
/// first: the machine that it saved may be the only one.
fn make_room(state: &Path, memory: &Path) -> Result<()> {
    finish_left(state, memory)?;
    let old = replaced::state(state)?;
    let beside = old.as_ref().and_then(|old| old.memory.name.as_ref()).filter(|name| is_memory(name));
    if state.file_name() == Some(STATE.as_ref())
        && beside.is_some_and(|name| state.with_file_name(name).exists())
    {
        return Err(Error::config(
            "a snapshot in a folder is there: name the folder (`folder`), choose other paths, or remove it first",
        ));
    }
    replaced::check_memory(memory, state, old.as_ref())
}

/// Finishes a save to these two paths that a crash cut off between the removal of the old state and the end.
///
/// # Errors
/// Somebody saves there, or a file cannot be renamed.
pub fn finish_left(state: &Path, memory: &Path) -> Result<()> {
    let left = left_at(&with_suffix(state))?;
    match left.as_ref().and_then(replaced::memory_of) {
        Some(said) if fs::symlink_metadata(state).is_err() => finish(state, memory, &said)
            .with_context(|| format!("finish what a crash has left of `{}`", state.display())),
        _ => Ok(()),
    }
}

/// Gives the files of a saved machine their names, of which the state `said` what its memory is. Without that memory, no
/// file is touched.
fn finish(state: &Path, memory: &Path, said: &replaced::Said) -> Result<()> {
    let new = with_suffix(memory);
    let has_room =
        fs::symlink_metadata(memory).map_or(true, |there| [0, said.memory.size].contains(&there.len()));
    if has_room && said.is_at(&new) {
        fs::rename(&new, memory).with_context(|| format!("rename `{}`", new.display()))?;
        flush(paths::folder(memory))?;
    } else if !said.is_at(memory) {
        return Ok(());
    }
    let new = with_suffix(state);
    fs::rename(&new, state).with_context(|| format!("rename `{}`", new.display()))?;
    flush(paths::folder(state))
}

fn flush(folder: &Path) -> Result<()> {
    let flushed = open_folder(folder).and_then(|folder| folder.sync_all());
    flushed.with_context(|| format!("flush folder `{}`", folder.display()))
}

/// Opens the file that a crash left half written at `path`, and locks it. A file that is locked is being written.
fn left_at(path: &Path) -> Result<Option<File>> {
    let options = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    match OpenOptions::new().read(true).write(true).custom_flags(options).open(path) {
        Ok(file) if file.try_lock().is_err() => Err(in_use(path)),
        Ok(file) => Ok(Some(file)),
        // The file is not there, or making a new one tells why that cannot be.
        Err(_) => Ok(None),
    }
}

/// Removes the file that a crash left half written at `path`.
fn remove_left(path: &Path) -> Result<()> {
    match left_at(path)? {
        Some(_locked) => {
            fs::remove_file(path).with_context(|| format!("remove `{}`, which a crash left", path.display()))
        }
        None => Ok(()),
    }
}

fn in_use(path: &Path) -> Error {
    Error::config(format!(
        "save to `{}`: another process, or an earlier request, saves there",
        path.display()
    ))
}

/// The file of a working set that is being written, in the folder of its memory.
pub struct Beside(NewFile);

impl Beside {
    /// Begins the working set of a memory in the folder at `path`.
    ///
    /// # Errors
    /// The folder cannot be written to, or somebody else writes a working set there.
    pub fn new(path: &Path) -> Result<Self> {
        let attempt = || format!("note in folder `{}` what its guest needs first", path.display());
        replaced::check_working_set(&path.join(WORKING_SET)).with_context(attempt)?;
        let folder = open_folder(path).with_context(attempt)?;
        NewFile::new(&path.join(WORKING_SET), folder).with_context(attempt).map(Self)
    }

    /// Makes the file, with `bytes`, the one that counts.
    ///
    /// # Errors
    /// The file cannot be written, flushed or renamed.
    pub fn keep(mut self, bytes: &[u8]) -> Result<()> {
        let attempt = || format!("write `{}`", self.0.new.display());
        self.0.file.write_all(bytes).with_context(attempt)?;
        self.0.file.sync_all().with_context(attempt)?;
        self.0.put_in_place()
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if self.0.new != self.0.path {
            let _ = fs::remove_file(&self.0.new);
        }
    }
}

/// The number in the name of a memory in a folder of ours, by which it is known; None: it has no such name.
pub fn number_of(name: &str) -> Option<u128> {
    let digits = name.strip_prefix(MEMORY)?;
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let is_ours = digits.len() == DIGITS && digits.bytes().all(is_digit);
    if is_ours { u128::from_str_radix(digits, 16).ok() } else { None }
}

/// Whether a file in a folder of ours is called so because it is a memory.
pub fn is_memory(name: &str) -> bool {
    number_of(name).is_some()
}

/// The memory files that are in a folder of ours, and what is only of use with one of them.
fn memory_files(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        // The working set is that of an old memory, too.
        let name = entry.file_name();
        let is_set = || name == WORKING_SET && replaced::check_working_set(&entry.path()).is_ok();
        if is_memory(&name.to_string_lossy()) || is_set() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// `path` by the folder that it is really in, so that one file has one name. A file or nothing must be there: what
/// is a link, or a device, is not replaced.
fn resolved(path: &Path) -> Result<PathBuf> {
    let attempt = || format!("save to `{}`", path.display());
    replaced::check_kind(path).with_context(attempt)?;
    let name = path.file_name().ok_or_else(|| Error::config("it has no name of a file"));
    let name = name.with_context(attempt)?;
    let folder = fs::canonicalize(paths::folder(path));
    let folder = folder.map_err(|error| paths::cannot_make(path, &error)).with_context(attempt)?;
    Ok(folder.join(name))
}

fn make(path: &Path) -> Result<Named<File>> {
    let made = OpenOptions::new().read(true).write(true).create_new(true).mode(MODE).open(path);
    made.map(|file| Named::new("saved machine", file))
        .map_err(|error| paths::cannot_make(path, &error))
        .with_context(|| format!("make `{}`", path.display()))
}

fn with_suffix(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(NEW);
    name.into()
}

/// Opens a folder; anything else is an error, and is not waited for.
fn open_folder(path: &Path) -> std::io::Result<Named<File>> {
    let folder = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(path)?;
    Ok(Named::new("folder of a saved machine", folder))
}

#[cfg(test)]
mod tests;
