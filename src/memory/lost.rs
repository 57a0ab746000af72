//! Guest memory whose pages cannot be had any more: the file that they come from was made shorter while it was mapped, the
//! file system has no room for a page, or the disk is broken; or the program that gives them is gone. Whoever touches such a page in this process gets SIGBUS,
//! and a system call that does, KVM_RUN among them, fails with EFAULT. The guest cannot go on then: what it would read
//! next is not what it wrote.
//!
//! A process has one machine. Which memory of it comes from which file is noted here for the signal's handler, which
//! takes no lock and finds no memory that is freed. What the guest sees through windows ([`super::window`]) is touched by
//! KVM alone: of these files, only their names are noted, and how long they must be.

use std::fs::File;
use std::io::Error as IoError;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, AtomicUsize, Ordering::SeqCst};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::backing::Backing;
use super::slots::SLOTS_MAX;
use super::{Region, Regions};
use crate::error::{Error, Result};
use crate::sys::descriptor;

/// More regions than any machine begins with whose guest has plugged no memory.
const PLACES_MAX: usize = 8;
/// The longest path that is noted whole, in bytes: the kernel takes no longer ones (PATH_MAX).
const PATH_MAX: usize = 4096;
/// The words around the path of a file.
const BEFORE: &str = "the guest's memory is lost: its file `";
const AFTER: &str = "` was made shorter, or cannot be read or given room (a broken or a full disk, a full tmpfs): leave \
                     the file as it is while a guest uses it, and restore the guest again from a whole snapshot; \
                     of a file that is sound, the log of the host's kernel (dmesg) has why KVM gave up";
/// The words around the path of a file that is seen through a window.
const BEFORE_WINDOW: &str = "the guest has lost what it sees of a file: `";
const AFTER_WINDOW: &str = "` was made shorter, or cannot be read or given room (a broken or a full disk, a full tmpfs): \
                            leave the file as it is while a guest has it as persistent memory (pmem), and start the \
                            guest again; of a file that is sound, the log of the host's kernel (dmesg) has why KVM gave up";
/// The words around the path of a socket.
const BEFORE_SOCKET: &str = "the guest's memory is lost: the page-fault handler at `";
const AFTER_SOCKET: &str = "` is gone, or has given what is no page, and the guest needs one: have a handler run, with its \
                            connection open, for as long as the guest does, and restore the guest again";

/// The first address of this process and the one after the last.
struct Place {
    start: AtomicUsize,
    end: AtomicUsize,
}

impl Place {
    const fn new() -> Self {
        Self { start: AtomicUsize::new(0), end: AtomicUsize::new(0) }
    }
}

static PLACES: [Place; PLACES_MAX] = [const { Place::new() }; PLACES_MAX];
/// The places of further regions, made for a guest that had plugged memory.
static MORE: OnceLock<Box<[Place]>> = OnceLock::new();
static PATH: [AtomicU8; PATH_MAX] = [const { AtomicU8::new(0) }; PATH_MAX];
/// The file, which is open for as long as the memory is there, and how long it must be.
static FILE: AtomicI32 = AtomicI32::new(-1);
static LENGTH: AtomicU64 = AtomicU64::new(0);
/// The path is that of a page-fault handler's socket.
static IS_SERVED: AtomicBool = AtomicBool::new(false);
static IS_LOST: AtomicBool = AtomicBool::new(false);

/// The most windows of a machine whose files can be named.
pub const WINDOWS_MAX: usize = 32;

/// The file that is seen through a window.
struct Seen {
    is_taken: AtomicBool,
    /// One more than the file's descriptor; 0: there is none.
    file: AtomicI32,
    /// How long the file must be; 0: it has no length.
    length: AtomicU64,
    /// A page of it could not be had.
    is_lost: AtomicBool,
    path: [AtomicU8; PATH_MAX],
}

// The table is all zeros at first: its pages are no part of the program's file, and cost nothing before they are written.
static WINDOWS: [Seen; WINDOWS_MAX] = [const {
    Seen {
        is_taken: AtomicBool::new(false),
        file: AtomicI32::new(0),
        length: AtomicU64::new(0),
        is_lost: AtomicBool::new(false),
        path: [const { AtomicU8::new(0) }; PATH_MAX],
    }
}; WINDOWS_MAX];

/// A file that is seen through a window is noted for as long as this lives.
pub struct Watch(&'static Seen);

/// Notes that the guest sees the first `length` bytes of `file`, which is at `path`, and which is open for longer than
/// the note lives.
///
/// # Errors
/// As many files as can be are noted already.
pub fn watch_window(file: &File, length: u64, path: &Path) -> Result<Watch> {
    let is_free = |seen: &&Seen| !seen.is_taken.swap(true, SeqCst);
    let seen = WINDOWS.iter().find(is_free).ok_or_else(|| {
        Error::config(format!("{WINDOWS_MAX} files are mapped for the guest already: it can have no more"))
    })?;
    let has_length = file.metadata().is_ok_and(|metadata| metadata.is_file());
    seen.is_lost.store(false, SeqCst);
    seen.length.store(if has_length { length } else { 0 }, SeqCst);
    note_path(&seen.path, path);
    seen.file.store(file.as_raw_fd() + 1, SeqCst);
    Ok(Watch(seen))
}

impl Watch {
    /// Notes that a page of the file cannot be had.
    pub fn note_lost(&self) {
        self.0.note_lost();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.file.store(0, SeqCst);
        self.0.is_taken.store(false, SeqCst);
    }
}

impl Seen {
    fn note_lost(&self) {
        self.is_lost.store(true, SeqCst);
        IS_LOST.store(true, SeqCst);
    }

    /// Whether the file is such that some of its pages cannot be had.
    fn is_spoilt(&self) -> bool {
        let file = self.file.load(SeqCst) - 1;
        file >= 0 && (is_short(file, self.length.load(SeqCst)) || descriptor::is_full_tmpfs(file))
    }
}

/// The windows' files that are noted.
fn windows() -> impl Iterator<Item = &'static Seen> {
    WINDOWS.iter().filter(|seen| seen.file.load(SeqCst) > 0)
}

/// Notes the path, and a zero that ends it: all of the place would be another page of each process, and 30 us of each
/// restore.
fn note_path(place: &[AtomicU8; PATH_MAX], path: &Path) {
    let bytes = path.as_os_str().as_bytes().iter().copied().chain([0]);
    place.iter().zip(bytes).for_each(|(to, from)| to.store(from, SeqCst));
}

/// Notes that `memory` comes from the file at `path`, or from who listens at this socket. What was noted before is
/// forgotten.
pub fn watch(memory: &Regions, path: &Path) {
    forget();
    IS_SERVED.store(memory.iter().any(Region::is_served), SeqCst);
    note_path(&PATH, path);
    if memory.num_regions() > PLACES_MAX {
        MORE.get_or_init(|| (0..SLOTS_MAX).map(|_| Place::new()).collect());
    }
    for (place, region) in places().zip(memory.iter()) {
        let start = region.as_ptr() as usize;
        place.start.store(start, SeqCst);
        place.end.store(start + region.len() as usize, SeqCst);
        if let Some((file, length)) = region.backing().map(Backing::extent) {
            FILE.store(file, SeqCst);
            LENGTH.fetch_max(length, SeqCst);
        }
    }
}

fn places() -> impl Iterator<Item = &'static Place> {
    PLACES.iter().chain(MORE.get().into_iter().flatten())
}

/// No memory of this process comes from a file or from another process any more.
pub fn forget() {
    for place in places() {
        place.end.store(0, SeqCst);
    }
    FILE.store(-1, SeqCst);
    LENGTH.store(0, SeqCst);
}

/// Notes that a page at this address of the process cannot be had. False: the address is not one of memory that comes
/// from a file. A signal's handler may call this.
pub fn note_fault(address: usize) -> bool {
    let has = |place: &Place| (place.start.load(SeqCst)..place.end.load(SeqCst)).contains(&address);
    let is_ours = places().any(has);
    if is_ours {
        IS_LOST.store(true, SeqCst);
    }
    is_ours
}

/// Notes that who gives the pages is gone.
pub fn note_handler_gone() {
    IS_LOST.store(true, SeqCst);
}

/// Looks at how a system call failed that was given guest memory: if a page of that cannot be had, this is noted.
pub fn look_at(error: &IoError) {
    if error.raw_os_error() == Some(libc::EFAULT) && places().any(|place| place.end.load(SeqCst) > 0) {
        IS_LOST.store(true, SeqCst);
    }
}

/// Looks at how KVM_RUN failed: for a page that cannot be had, of memory or of what is seen through a window, this is
/// noted.
pub fn look_at_run(error: &IoError) {
    look_at(error);
    if error.raw_os_error() == Some(libc::EFAULT) {
        // KVM does not say which page it was: a file that cannot be is blamed first, memory's before others.
        let has_memory = places().any(|place| place.end.load(SeqCst) > 0);
        let spoilt = if is_memory_spoilt() { None } else { windows().find(|seen| seen.is_spoilt()) };
        let only = if has_memory { None } else { windows().next() };
        spoilt.or(only).into_iter().for_each(Seen::note_lost);
    }
}

/// Looks whether a guest that has crashed has lost memory. KVM, which walks the guest's page tables and reads the
/// instructions that it emulates, has no way to say that it could not read them: it tells the guest of an exception.
pub fn look_at_file() {
    if is_memory_spoilt() {
        IS_LOST.store(true, SeqCst);
    } else if let Some(seen) = windows().find(|seen| seen.is_spoilt()) {
        seen.note_lost();
    }
}

/// Whether the file of memory is such that some of its pages cannot be had.
fn is_memory_spoilt() -> bool {
    let file = FILE.load(SeqCst);
    file >= 0 && (is_short(file, LENGTH.load(SeqCst)) || descriptor::is_full_tmpfs(file))
}

fn is_short(file: RawFd, needed: u64) -> bool {
    descriptor::length(file).is_some_and(|length| length < needed)
}

/// Whether a page could not be had. A signal's handler may call this.
pub fn is_lost() -> bool {
    IS_LOST.load(SeqCst)
}

/// Gives `put` piece by piece what to say then, which names the file or the socket. A signal's handler may call this.
pub fn say(mut put: impl FnMut(&[u8])) {
    let window = windows().find(|seen| seen.is_lost.load(SeqCst));
    let mut path = [0; PATH_MAX];
    let noted = window.map_or(&PATH, |seen| &seen.path);
    path.iter_mut().zip(noted).for_each(|(to, from)| *to = from.load(SeqCst));
    let length = path.iter().position(|byte| *byte == 0).unwrap_or(PATH_MAX);
    let (before, after) = match window {
        Some(_) => (BEFORE_WINDOW, AFTER_WINDOW),
        None if IS_SERVED.load(SeqCst) => (BEFORE_SOCKET, AFTER_SOCKET),
        None => (BEFORE, AFTER),
    };
    [before.as_bytes(), &path[..length], after.as_bytes()].into_iter().for_each(&mut put);
}

/// The same as a text.
pub fn words() -> String {
    let mut words = Vec::new();
    say(|piece| words.extend_from_slice(piece));
    String::from_utf8_lossy(&words).into_owned()
}

/// The notes are the process's: tests that note something take turns.
#[cfg(test)]
pub(super) static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{self, Range};
    use vm_memory::GuestAddressSpace;

    #[test]
    fn only_memory_that_comes_from_a_file_is_lost() {
        let _alone = ALONE.lock();
        let ranges = [0, 4 << 30].map(|start| Range { start, size: 1 << 20 });
        let memory = memory::allocate(&ranges).unwrap();
        let memory = memory.memory();
        let starts: Vec<_> = memory.iter().map(|region| region.as_ptr() as usize).collect();
        let (bad_address, no_room) = [libc::EFAULT, libc::ENOSPC].map(IoError::from_raw_os_error).into();
        look_at(&bad_address);
        assert!(!note_fault(starts[0]) && !is_lost(), "no memory comes from a file");
        watch(&memory, Path::new("/a/memory/of/another/guest"));
        watch(&memory, Path::new("/a/memory"));
        look_at(&no_room);
        assert!(!note_fault(starts[0] - 1) && !note_fault(starts[1] + (1 << 20)) && !is_lost());
        assert!(note_fault(starts[1] + (1 << 20) - 1) && is_lost());
        assert!(words().starts_with("the guest's memory is lost: its file `/a/memory` was made shorter"));
        IS_LOST.store(false, SeqCst);
        look_at(&bad_address);
        assert!(is_lost());
        forget();
        assert!(!note_fault(starts[0]));
        IS_LOST.store(false, SeqCst);
        look_at_windows();
    }

    /// As in a process that has lost nothing.
    fn begin_again() {
        IS_LOST.store(false, SeqCst);
        WINDOWS.iter().for_each(|seen| seen.is_lost.store(false, SeqCst));
    }

    fn look_at_windows() {
        let files = [0, 1].map(|_| memory::mapping::memory_file(4096).unwrap());
        let bad_address = IoError::from_raw_os_error(libc::EFAULT);
        look_at_run(&bad_address);
        assert!(!is_lost(), "the guest sees no file");
        let [one, other] = [("/one", 0), ("/other", 1)]
            .map(|(path, index)| watch_window(&files[index], 4096, Path::new(path)).unwrap());
        look_at_file();
        look_at(&bad_address);
        assert!(!is_lost(), "the files are sound, and no memory comes from a file");
        look_at_run(&bad_address);
        assert!(is_lost() && words().starts_with("the guest has lost what it sees of a file: `/one` was"));
        begin_again();
        other.note_lost();
        assert!(is_lost() && words().contains("`/other` was made shorter"), "{}", words());
        begin_again();
        drop(other);
        let longer = watch_window(&files[1], 4097, Path::new("/longer")).unwrap();
        look_at_file();
        assert!(is_lost() && words().contains("`/longer` was made shorter"), "{}", words());
        begin_again();
        let more: Vec<_> =
            (2..WINDOWS_MAX).map(|_| watch_window(&files[0], 1, Path::new("/more")).unwrap()).collect();
        let error = watch_window(&files[0], 1, Path::new("/more")).err().unwrap().to_string();
        assert!(error.starts_with("32 files are mapped for the guest already"), "{error}");
        drop((one, more));
        look_at_run(&bad_address);
        assert!(is_lost() && words().contains("`/longer` was made shorter"), "{}", words());
        begin_again();
        drop(longer);
        look_at_file();
        assert!(!is_lost());
    }
}
