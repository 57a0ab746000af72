//! Guest memory whose pages cannot be had any more: the file that they come from was made shorter while it was mapped, the
//! file system has no room for a page, or the disk is broken; or the program that gives them is gone. Whoever touches such a page in this process gets SIGBUS,
//! and a system call that does, KVM_RUN among them, fails with EFAULT. The guest cannot go on then: what it would read
//! next is not what it wrote.
//!
//! A process has one machine. Which memory of it comes from which file is noted here for the signal's handler, which
//! takes no lock and finds no memory that is freed.

use std::io::Error as IoError;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, AtomicUsize, Ordering::SeqCst};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::backing::Backing;
use super::{Region, Regions};
use crate::sys::descriptor;

/// More regions than any machine begins with.
const PLACES_MAX: usize = 8;
/// The longest path that is noted whole, in bytes: the kernel takes no longer ones (PATH_MAX).
const PATH_MAX: usize = 4096;
/// The words around the path of a file.
const BEFORE: &str = "the guest's memory is lost: its file `";
const AFTER: &str = "` was made shorter, or cannot be read or given room (a broken or a full disk, a full tmpfs): leave \
                     the file as it is while a guest uses it, and restore the guest again from a whole snapshot; \
                     of a file that is sound, the log of the host's kernel (dmesg) has why KVM gave up";
/// The words around the path of a socket.
const BEFORE_SOCKET: &str = "the guest's memory is lost: the page-fault handler at `";
const AFTER_SOCKET: &str = "` is gone, or has given what is no page, and the guest needs one: have a handler run, with its \
                            connection open, for as long as the guest does, and restore the guest again";

/// The first address of this process and the one after the last.
struct Place {
    start: AtomicUsize,
    end: AtomicUsize,
}

static PLACES: [Place; PLACES_MAX] =
    [const { Place { start: AtomicUsize::new(0), end: AtomicUsize::new(0) } }; PLACES_MAX];
static PATH: [AtomicU8; PATH_MAX] = [const { AtomicU8::new(0) }; PATH_MAX];
/// The file, which is open for as long as the memory is there, and how long it must be.
static FILE: AtomicI32 = AtomicI32::new(-1);
static LENGTH: AtomicU64 = AtomicU64::new(0);
/// The path is that of a page-fault handler's socket.
static IS_SERVED: AtomicBool = AtomicBool::new(false);
static IS_LOST: AtomicBool = AtomicBool::new(false);

/// Notes that `memory` comes from the file at `path`, or from who listens at this socket. What was noted before is
/// forgotten.
pub fn watch(memory: &Regions, path: &Path) {
    forget();
    IS_SERVED.store(memory.iter().any(Region::is_served), SeqCst);
    let bytes = path.as_os_str().as_bytes().iter().copied().chain(std::iter::repeat(0));
    PATH.iter().zip(bytes).for_each(|(to, from)| to.store(from, SeqCst));
    for (place, region) in PLACES.iter().zip(memory.iter()) {
        let start = region.as_ptr() as usize;
        place.start.store(start, SeqCst);
        place.end.store(start + region.len() as usize, SeqCst);
        if let Some((file, length)) = region.backing().map(Backing::extent) {
            FILE.store(file, SeqCst);
            LENGTH.fetch_max(length, SeqCst);
        }
    }
}

/// No memory of this process comes from a file or from another process any more.
pub fn forget() {
    for place in &PLACES {
        place.end.store(0, SeqCst);
    }
    FILE.store(-1, SeqCst);
    LENGTH.store(0, SeqCst);
}

/// Notes that a page at this address of the process cannot be had. False: the address is not one of memory that comes
/// from a file. A signal's handler may call this.
pub fn note_fault(address: usize) -> bool {
    let has = |place: &Place| (place.start.load(SeqCst)..place.end.load(SeqCst)).contains(&address);
    let is_ours = PLACES.iter().any(has);
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
    if error.raw_os_error() == Some(libc::EFAULT) && PLACES.iter().any(|place| place.end.load(SeqCst) > 0) {
        IS_LOST.store(true, SeqCst);
    }
}

/// Looks whether a guest that has crashed has lost memory. KVM, which walks the guest's page tables and reads the
/// instructions that it emulates, has no way to say that it could not read them: it tells the guest of an exception.
pub fn look_at_file() {
    let file: RawFd = FILE.load(SeqCst);
    if file >= 0 && (is_short(file) || descriptor::is_full_tmpfs(file)) {
        IS_LOST.store(true, SeqCst);
    }
}

fn is_short(file: RawFd) -> bool {
    descriptor::length(file).is_some_and(|length| length < LENGTH.load(SeqCst))
}

/// Whether a page could not be had. A signal's handler may call this.
pub fn is_lost() -> bool {
    IS_LOST.load(SeqCst)
}

/// Gives `put` piece by piece what to say then, which names the file or the socket. A signal's handler may call this.
pub fn say(mut put: impl FnMut(&[u8])) {
    let mut path = [0; PATH_MAX];
    path.iter_mut().zip(&PATH).for_each(|(to, from)| *to = from.load(SeqCst));
    let length = path.iter().position(|byte| *byte == 0).unwrap_or(PATH_MAX);
    let (before, after) =
        if IS_SERVED.load(SeqCst) { (BEFORE_SOCKET, AFTER_SOCKET) } else { (BEFORE, AFTER) };
    [before.as_bytes(), &path[..length], after.as_bytes()].into_iter().for_each(&mut put);
}

/// The same as a text.
pub fn words() -> String {
    let mut words = Vec::new();
    say(|piece| words.extend_from_slice(piece));
    String::from_utf8_lossy(&words).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{self, Range};
    use vm_memory::GuestAddressSpace;

    #[test]
    fn only_memory_that_comes_from_a_file_is_lost() {
        let ranges = [0, 4 << 30].map(|start| Range { start, size: 1 << 20 });
        let memory = memory::allocate(&ranges).unwrap();
        let memory = memory.memory();
        let starts: Vec<_> = memory.iter().map(|region| region.as_ptr() as usize).collect();
        let (bad_address, no_room) = [libc::EFAULT, libc::ENOSPC].map(IoError::from_raw_os_error).into();
        look_at(&bad_address);
        assert!(!note_fault(starts[0]) && !is_lost(), "no memory comes from a file");
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
    }
}
