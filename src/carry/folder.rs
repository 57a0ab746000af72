//! Where a saved machine is kept, and how the next one takes its place: a crash at any instruction leaves the
//! old one, the new one, or none, and never new memory beside an old state.
//!
//! In a folder of ours, memory gets a new name each time, and the state says which. Renaming the state is what
//! makes a saved machine the one that counts; memory that no state names goes afterwards. With a path for each
//! of the two, as Firecracker's API gives them, the old state goes first and the new one comes last.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::descriptors::Named;
use crate::error::{Context, Error, Result};
use crate::paths;

/// The name of the state in a folder.
pub const STATE: &str = "state";
/// The name of the file that says which pages of the memory its guest needs first.
pub const WORKING_SET: &str = "working-set";
/// The beginning of the names of memory files in a folder.
const MEMORY: &str = "memory-";
/// What is added to the name of a file that is not whole yet.
const NEW: &str = ".new";
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
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(paths::cannot_make(path, &error)).with_context(attempt);
            }
            _ => {}
        }
        let folder = open_folder(path).with_context(attempt)?;
        if folder.try_lock().is_err() {
            return Err(Error::config("another process saves to it")).with_context(attempt);
        }
        let old = memory_files(path).with_context(attempt)?;
        let (memory, state) = (path.join(format!("{MEMORY}{id:032x}")), path.join(STATE));
        let other = folder.try_clone().with_context(attempt)?;
        let file = make(&memory)?;
        let memory = NewFile { new: memory.clone(), path: memory, file, folder: other };
        let undo = |_: &Error| drop(fs::remove_file(&memory.new));
        let state = NewFile::new(&state, folder).inspect_err(undo)?;
        Ok(Self { state, memory, is_folder: true, old, is_kept: false })
    }

    /// Begins a saved machine with its state at `state` and its memory at `memory`.
    ///
    /// # Errors
    /// Something else than a file is at one of the paths, both are one, or nothing can be made beside them.
    pub fn at_paths(state: &Path, memory: &Path) -> Result<Self> {
        let (state, memory) = (resolved(state)?, resolved(memory)?);
        if [&with_suffix(&state), &state]
            .iter()
            .any(|path| **path == memory || **path == with_suffix(&memory))
        {
            return Err(Error::config("state and memory need a file each"))
                .with_context(|| format!("save to `{}`", state.display()));
        }
        let open = |path: &Path| {
            let folder = paths::folder(path);
            open_folder(folder).with_context(|| format!("open folder `{}`", folder.display()))
        };
        let memory = NewFile::new(&memory, open(&memory)?)?;
        let undo = |_: &Error| drop(fs::remove_file(&memory.new));
        let state = open(&state).and_then(|folder| NewFile::new(&state, folder)).inspect_err(undo)?;
        Ok(Self { state, memory, is_folder: false, old: Vec::new(), is_kept: false })
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
    /// A file cannot be written, flushed or renamed: the one before is still there, or, at paths, there may be none.
    pub fn keep(mut self, state: &[u8]) -> Result<()> {
        let Self { state: part, memory, is_folder, .. } = &mut self;
        if !*is_folder {
            // From here on there is no saved machine until the new one is whole.
            match fs::remove_file(&part.path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove `{}`", part.path.display()));
                }
                _ => part.flush_folder()?,
            }
        }
        memory.put_in_place()?;
        // The name of the memory must be on the disk before a state relies on it.
        memory.flush_folder()?;
        let attempt = || format!("write `{}`", part.new.display());
        part.file.write_all(state).with_context(attempt)?;
        part.file.sync_all().with_context(attempt)?;
        part.put_in_place()?;
        self.is_kept = true;
        self.state.flush_folder()?;
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
        }
    }
}

impl NewFile {
    /// Begins the file that will be at `path`, in the folder `folder`.
    fn new(path: &Path, folder: Named<File>) -> Result<Self> {
        let new = with_suffix(path);
        remove_left(&new)?;
        let file = make(&new)?;
        if file.try_lock().is_err() {
            return Err(in_use(&new));
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

/// Removes what a crash left half written at `path`. One that is locked is being written.
fn remove_left(path: &Path) -> Result<()> {
    let options = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let Ok(file) = OpenOptions::new().write(true).custom_flags(options).open(path) else {
        // The file is not there, or making a new one tells why that cannot be.
        return Ok(());
    };
    if file.try_lock().is_err() {
        return Err(in_use(path));
    }
    fs::remove_file(path).with_context(|| format!("remove `{}`, which a crash left", path.display()))
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
    u128::from_str_radix(name.strip_prefix(MEMORY)?, 16).ok()
}

/// Whether a file in a folder of ours is called so because it is a memory.
pub fn is_memory(name: &str) -> bool {
    name.strip_prefix(MEMORY).is_some_and(|id| id.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// The memory files that are in a folder of ours, and what is only of use with one of them.
fn memory_files(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        // The working set is that of an old memory, too.
        let name = entry.file_name();
        if is_memory(&name.to_string_lossy()) || name == WORKING_SET {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// `path` by the folder that it is really in, so that one file has one name. A file or nothing must be there: what
/// is a link, or a device, is not replaced.
fn resolved(path: &Path) -> Result<PathBuf> {
    let attempt = || format!("save to `{}`", path.display());
    if fs::symlink_metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        return Err(Error::config("there is something else than a file already")).with_context(attempt);
    }
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
mod tests {
    use super::*;

    /// A folder that goes with the test.
    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("alula-folder-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(&self.0).unwrap();
            let mut names: Vec<_> =
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn a_new_saved_machine_takes_the_place_of_the_old_one() {
        let place = Place::new("new");
        for id in [1, 2, 0xff] {
            let draft = Draft::in_folder(&place.0, id).unwrap();
            let mut file = draft.memory_file();
            file.write_all(&[id as u8]).unwrap();
            let name = draft.memory_name().unwrap();
            draft.keep(format!("state {id}").as_bytes()).unwrap();
            assert_eq!(place.names(), [&name, STATE]);
            assert_eq!(fs::read(place.0.join(&name)).unwrap(), [id as u8]);
            assert_eq!(fs::read(place.0.join(STATE)).unwrap(), format!("state {id}").as_bytes());
        }
    }

    #[test]
    fn one_that_is_given_up_leaves_the_old_one_and_nothing_else() {
        let place = Place::new("given-up");
        Draft::in_folder(&place.0, 1).unwrap().keep(b"old").unwrap();
        let before = place.names();
        drop(Draft::in_folder(&place.0, 2).unwrap());
        assert_eq!(place.names(), before);
        // So does one whose state cannot be written.
        fs::create_dir(place.0.join("state.new")).unwrap();
        Draft::in_folder(&place.0, 3).err().unwrap();
        fs::remove_dir(place.0.join("state.new")).unwrap();
        assert_eq!((place.names(), fs::read(place.0.join(STATE)).unwrap()), (before, b"old".to_vec()));
    }

    #[test]
    fn what_a_crash_left_behind_goes_with_the_next_one() {
        let place = Place::new("crash");
        fs::write(place.0.join("memory-dead"), "half").unwrap();
        fs::write(place.0.join("state.new"), "half").unwrap();
        fs::write(place.0.join("notes"), "mine").unwrap();
        Draft::in_folder(&place.0, 1).unwrap().keep(b"new").unwrap();
        assert_eq!(place.names(), [&format!("memory-{:032x}", 1), "notes", STATE]);
    }

    #[test]
    fn two_at_once_do_not_save_to_one_folder() {
        let place = Place::new("two");
        let first = Draft::in_folder(&place.0, 1).unwrap();
        let error = Draft::in_folder(&place.0, 2).err().unwrap().to_string();
        assert!(error.contains("another process saves to it"), "{error}");
        drop(first);
        Draft::in_folder(&place.0, 2).unwrap();
    }

    #[test]
    fn paths_of_their_own_are_replaced_as_well() {
        let place = Place::new("paths");
        let (state, memory) = (place.0.join("s"), place.0.join("m"));
        fs::write(&memory, "old").unwrap();
        fs::write(&state, "old").unwrap();
        let mapped = File::open(&memory).unwrap();
        drop(Draft::at_paths(&state, &memory).unwrap());
        assert_eq!(
            (fs::read(&state).unwrap(), fs::read(&memory).unwrap()),
            (b"old".to_vec(), b"old".to_vec())
        );
        let draft = Draft::at_paths(&state, &memory).unwrap();
        let mut file = draft.memory_file();
        file.write_all(b"new").unwrap();
        draft.keep(b"newer").unwrap();
        assert_eq!(
            (fs::read(&state).unwrap(), fs::read(&memory).unwrap()),
            (b"newer".to_vec(), b"new".to_vec())
        );
        assert_eq!(mapped.metadata().unwrap().len(), 3, "who has mapped the old memory keeps it");
        assert_eq!(place.names(), ["m", "s"]);
    }

    #[test]
    fn two_at_once_do_not_save_to_one_path() {
        let place = Place::new("two-paths");
        let (state, memory) = (place.0.join("s"), place.0.join("m"));
        let first = Draft::at_paths(&state, &memory).unwrap();
        let error = Draft::at_paths(&place.0.join("other"), &memory).err().unwrap().to_string();
        assert!(error.contains("an earlier request, saves there"), "{error}");
        Draft::at_paths(&state, &place.0.join("other")).err().unwrap();
        first.keep(b"new").unwrap();
        // What a crash left is replaced, whatever it is.
        fs::write(place.0.join("m.new"), "half").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", place.0.join("s.new")).unwrap();
        let error = Draft::at_paths(&state, &memory).err().unwrap().to_string();
        assert!(error.contains("File exists"), "{error}");
        fs::remove_file(place.0.join("s.new")).unwrap();
        Draft::at_paths(&state, &memory).unwrap().keep(b"newer").unwrap();
        assert_eq!(
            (fs::read(&state).unwrap(), fs::read(&memory).unwrap(), place.names().len()),
            (b"newer".to_vec(), Vec::new(), 2)
        );
    }

    #[test]
    fn what_is_no_file_is_not_replaced() {
        let place = Place::new("kinds");
        let error = Draft::at_paths(&place.0, &place.0.join("m")).err().unwrap().to_string();
        assert!(error.contains("something else than a file"), "{error}");
        std::os::unix::fs::symlink("/etc/passwd", place.0.join("l")).unwrap();
        Draft::at_paths(&place.0.join("s"), &place.0.join("l")).err().unwrap();
        let (here, dot) =
            (place.0.join("s"), place.0.join("../").join(place.0.file_name().unwrap()).join("s"));
        for (state, memory) in [(&here, &here), (&here, &dot), (&here, &place.0.join("s.new"))] {
            let error = Draft::at_paths(state, memory).err().unwrap().to_string();
            assert!(error.contains("need a file each"), "{error}");
            Draft::at_paths(memory, state).err().unwrap();
        }
        let error = Draft::at_paths(&place.0.join("s"), &place.0.join("no/m")).err().unwrap().to_string();
        assert!(error.contains("there is no folder"), "{error}");
        assert_eq!(place.names(), ["l"]);
        fs::write(place.0.join("f"), "").unwrap();
        Draft::in_folder(&place.0.join("f"), 1).err().unwrap();
        Draft::in_folder(&place.0.join("a/b"), 1).err().unwrap();
    }
}
