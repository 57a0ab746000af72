//! Calls on open descriptors: their flags, whether they are ready, files, block devices, terminals; and on what is in an
//! open folder, by its name there (`..._in`): whoever can change the path of the folder meanwhile, or what is in it, cannot
//! lead them elsewhere.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::mem::{ManuallyDrop, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::check;
use super::machine::c_string;

/// The owner of the descriptor that a call has just made.
pub(super) fn owned(made: RawFd) -> Result<OwnedFd> {
    let fd = check(made)?;
    // SAFETY: the descriptor is new, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn control(fd: RawFd, what: i32, argument: i32) -> Result<i32> {
    // SAFETY: all that this file asks for by `control` takes and returns numbers.
    check(unsafe { libc::fcntl(fd, what, argument) })
}

/// Whether the descriptor with this number is closed when a program starts (FD_CLOEXEC, fcntl(2)).
///
/// # Errors
/// No such descriptor is open.
pub fn closes_on_exec(fd: RawFd) -> Result<bool> {
    control(fd, libc::F_GETFD, 0).map(|flags| flags & libc::FD_CLOEXEC != 0)
}

/// Has a descriptor closed, or left open, when a program starts.
///
/// # Errors
/// The descriptor is not open.
pub fn set_closes_on_exec(fd: &impl AsRawFd, closes: bool) -> Result<()> {
    control(fd.as_raw_fd(), libc::F_SETFD, if closes { libc::FD_CLOEXEC } else { 0 }).map(drop)
}

/// Closes every descriptor but standard input, output and error (close_range(2)). Nothing that this process has opened
/// may be open any more: this is for what others have left to it.
///
/// # Errors
/// The kernel has no such call (before Linux 5.9).
pub fn close_inherited() -> Result<()> {
    // SAFETY: the call takes numbers; that no owner of a descriptor is left is the caller's promise.
    check(unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) } as i32).map(drop)
}

/// Makes standard input an empty one.
///
/// # Errors
/// /dev/null cannot be opened.
pub fn empty_standard_input() -> Result<()> {
    let null = File::open("/dev/null")?;
    // SAFETY: the call takes numbers. Nobody owns descriptor 0: it is open from the start of the process to its end.
    check(unsafe { libc::dup2(null.as_raw_fd(), libc::STDIN_FILENO) }).map(drop)
}

/// The flags of an open file: `libc::O_...` (F_GETFL, fcntl(2)).
///
/// # Errors
/// The descriptor is not open.
pub fn status(fd: &impl AsRawFd) -> Result<i32> {
    control(fd.as_raw_fd(), libc::F_GETFL, 0)
}

/// Sets the flags that [`status`] gives.
///
/// # Errors
/// The file cannot have one of them.
pub fn set_status(fd: &impl AsRawFd, flags: i32) -> Result<()> {
    control(fd.as_raw_fd(), libc::F_SETFL, flags).map(drop)
}

/// Another descriptor of the same open file, which is above 2 and closed when a program starts.
///
/// # Errors
/// The process has as many descriptors as it may have.
pub fn duplicate(fd: &impl AsRawFd) -> Result<OwnedFd> {
    owned(control(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3)?)
}

/// Keeps the size of a memory file, and these seals, as they are from now on (memfd_create(2)).
///
/// # Errors
/// The kernel's, of fcntl(2).
pub fn seal_size(file: &File) -> Result<()> {
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    control(file.as_raw_fd(), libc::F_ADD_SEALS, seals).map(drop)
}

/// Writes to the open file with this number; what does not go at once is lost.
pub fn write(fd: RawFd, bytes: &[u8]) {
    // SAFETY: the call reads the slice, as long as it is.
    unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
}

/// How long the open file with this number is, in bytes (fstat(2)); None: there is none.
pub fn length(fd: RawFd) -> Option<u64> {
    // SAFETY: `stat` is plain data of which zeros are valid, and the call writes to the local one.
    unsafe {
        let mut told: libc::stat = zeroed();
        check(libc::fstat(fd, &raw mut told)).ok()?;
        u64::try_from(told.st_size).ok()
    }
}

/// Whether the open file with this number is in a tmpfs that has no room for another page (fstatfs(2)). One without a
/// limit, as that of files without names, says of everything that there are none.
pub fn is_full_tmpfs(fd: RawFd) -> bool {
    // SAFETY: `statfs` is plain data of which zeros are valid, and the call writes to the local one.
    unsafe {
        let mut told: libc::statfs = zeroed();
        let is_tmpfs = libc::fstatfs(fd, &raw mut told) == 0 && told.f_type == libc::TMPFS_MAGIC;
        is_tmpfs && told.f_blocks > 0 && told.f_bavail == 0
    }
}

/// Waits at most so long, or until a signal, for one of these events (`libc::POLL...`), and says which there are, with
/// POLLERR and POLLHUP among them; 0: none, or the wait was interrupted (poll(2)).
pub fn poll(fd: &impl AsRawFd, events: i16, timeout_ms: i32) -> i16 {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: the pointer is to one local `pollfd`, as the count says.
    match unsafe { libc::poll(&raw mut poll, 1, timeout_ms) } {
        1 => poll.revents,
        _ => 0,
    }
}

/// Waits for events of an epoll set (epoll_pwait(2)), and returns how many it has written to the front of `events`;
/// with `mask` as the signal mask of this thread meanwhile, if one is given. A `timeout_ms` of -1 is none.
///
/// # Errors
/// A signal interrupted the wait.
pub fn wait(
    epoll: &impl AsRawFd,
    events: &mut [libc::epoll_event],
    timeout_ms: i32,
    mask: Option<&libc::sigset_t>,
) -> Result<usize> {
    let mask = mask.map_or(std::ptr::null(), std::ptr::from_ref);
    let room = i32::try_from(events.len()).unwrap_or(i32::MAX);
    // SAFETY: the call writes at most as many events as there is room for, and only reads the mask.
    let count = unsafe { libc::epoll_pwait(epoll.as_raw_fd(), events.as_mut_ptr(), room, timeout_ms, mask) };
    check(count).map(|count| count as usize)
}

/// The next range of `file` from `from` on that is no hole (lseek(2)); None: there is none up to its end. On file systems
/// without holes, all of it is.
///
/// # Errors
/// The file is none that has a length.
pub fn next_data(file: &File, from: u64) -> Result<Option<(u64, u64)>> {
    let seek = |from: u64, what| {
        let from = libc::off_t::try_from(from).map_err(Error::other)?;
        // SAFETY: the call takes numbers.
        let at = unsafe { libc::lseek(file.as_raw_fd(), from, what) };
        u64::try_from(at).map_err(|_| Error::last_os_error())
    };
    match seek(from, libc::SEEK_DATA) {
        Ok(start) => Ok(Some((start, seek(start, libc::SEEK_HOLE)?))),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Has the kernel read `length` bytes of `file` from `offset` on into memory, without waiting for them
/// (POSIX_FADV_WILLNEED, posix_fadvise(2)). A file system may do nothing.
///
/// # Errors
/// The file is none that can be read ahead.
pub fn read_ahead(file: &File, offset: u64, length: u64) -> Result<()> {
    let number = |number: u64| libc::off_t::try_from(number).map_err(Error::other);
    let (offset, length) = (number(offset)?, number(length)?);
    // SAFETY: the call takes numbers.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), offset, length, libc::POSIX_FADV_WILLNEED) } {
        0 => Ok(()),
        error => Err(Error::from_raw_os_error(error)),
    }
}

/// Has the kernel begin to write `length` bytes of `file` from `offset` on to its disk (sync_file_range(2)). They are on it
/// once the file has been flushed: what cannot be begun here is done by that.
pub fn begin_writing(file: &File, offset: u64, length: u64) {
    if let (Ok(offset), Ok(length)) = (libc::off64_t::try_from(offset), libc::off64_t::try_from(length)) {
        // SAFETY: the call takes numbers.
        unsafe { libc::sync_file_range(file.as_raw_fd(), offset, length, libc::SYNC_FILE_RANGE_WRITE) };
    }
}

/// Whether the kernel has the pages of `file` at all of `offsets`, multiples of the page size that are below `length`, in
/// memory (mincore(2)). Of a file that is another user's, and that this one may not write to, the kernel says so
/// whatever is true.
///
/// # Errors
/// The file cannot be mapped.
pub fn is_in_memory(file: &File, length: u64, offsets: impl IntoIterator<Item = u64>) -> Result<bool> {
    let length = usize::try_from(length).map_err(Error::other)?;
    let (place, fd) = (std::ptr::null_mut(), file.as_raw_fd());
    // SAFETY: a new mapping, where there was none, of which nothing is read.
    let start = unsafe { libc::mmap(place, length, libc::PROT_READ, libc::MAP_SHARED, fd, 0) };
    if start == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    let has = |offset: u64| {
        let mut page = 0;
        let place = start.wrapping_byte_add(offset as usize);
        // SAFETY: the kernel writes one byte, for the one page that is asked for.
        let told = unsafe { libc::mincore(place, 1, &raw mut page) };
        told == 0 && page & 1 != 0
    };
    let has_all = offsets.into_iter().filter(|offset| *offset < length as u64).all(has);
    // SAFETY: it was mapped above with this length, and nobody else knows of it.
    unsafe { libc::munmap(start, length) };
    Ok(has_all)
}

/// Whether this user may write to what is at `path` (access(2)).
///
/// # Errors
/// The user may not.
pub fn check_writable(path: &Path) -> Result<()> {
    let name = c_string(path)?;
    // SAFETY: the name is a string that ends with a zero.
    check(unsafe { libc::access(name.as_ptr(), libc::W_OK) }).map(drop)
}

/// The names of the extended attributes of what is at `path`, itself if it is a link (llistxattr(2)), each with a zero
/// behind it. They are at most 64 KiB (xattr(7)). None: there are none, or the file system does not have any.
pub fn attributes(path: &Path) -> Option<Vec<u8>> {
    let name = c_string(path).ok()?;
    // SAFETY: the name is a string that ends with a zero; a list without room takes nothing.
    let size = unsafe { libc::llistxattr(name.as_ptr(), std::ptr::null_mut(), 0) };
    let mut names = vec![0_u8; usize::try_from(size).ok().filter(|size| *size > 0)?];
    // SAFETY: the list has so much room as the call is told.
    let size = unsafe { libc::llistxattr(name.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    names.truncate(usize::try_from(size).ok()?);
    Some(names)
}

/// A call, again as long as it is interrupted.
fn repeat(mut call: impl FnMut() -> i32) -> Result<()> {
    loop {
        match check(call()) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result.map(drop),
        }
    }
}

/// Gives blocks to a range of a file, or takes them away, as `mode` says: `libc::FALLOC_FL_...` (fallocate(2)).
///
/// # Errors
/// The file system cannot do that.
pub fn allocate(file: &File, mode: i32, offset: u64, length: u64) -> Result<()> {
    // SAFETY: the call takes numbers.
    repeat(|| unsafe { libc::fallocate64(file.as_raw_fd(), mode, offset as i64, length as i64) })
}

/// Locks a whole file until the last copy of its descriptor is closed, for one writer or for readers (F_OFD_SETLK,
/// fcntl(2)).
///
/// # Errors
/// EAGAIN or EACCES: somebody else has a lock that is in the way. Others: the file system has no locks.
pub fn lock(file: &File, for_writing: bool) -> Result<()> {
    let kind = if for_writing { libc::F_WRLCK } else { libc::F_RDLCK };
    let lock =
        libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the call reads the local structure.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }).map(drop)
}

/// What direct I/O on a file needs: by how much memory and offset must be divisible, in bytes (STATX_DIOALIGN,
/// statx(2), since Linux 6.1). None: the kernel does not say, or there is none.
pub fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    // SAFETY: all zeros are a value of this structure of numbers.
    let mut answer: libc::statx = unsafe { zeroed() };
    // SAFETY: the path is an empty string, the call writes to the local structure.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut answer,
        )
    };
    let told = result == 0 && answer.stx_mask & libc::STATX_DIOALIGN != 0 && answer.stx_dio_offset_align > 0;
    told.then_some((answer.stx_dio_mem_align, answer.stx_dio_offset_align))
}

/// Opens what has the relative path `path` in `folder`, with these `libc::O_...` and, if that makes a file, this mode.
/// No part of the path may be a link or lead out of the folder (openat2(2), since Linux 5.6).
///
/// # Errors
/// The kernel's; ELOOP: there is a link.
pub fn open_in(folder: &impl AsRawFd, path: impl AsRef<OsStr>, flags: i32, mode: u32) -> Result<OwnedFd> {
    let path = c_string(path)?;
    // SAFETY: the structure is plain data of which zeros are valid.
    let mut how: libc::open_how = unsafe { zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.mode = mode.into();
    how.resolve = libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_BENEATH;
    // SAFETY: the call reads a string that ends with a zero and the local structure, whose size it is told.
    owned(unsafe {
        libc::syscall(libc::SYS_openat2, folder.as_raw_fd(), path.as_ptr(), &raw const how, size_of_val(&how))
    } as i32)
}

/// The name of something in a folder, for the calls that would follow links in the folders of a path: of those, there must
/// be none.
fn name_in_folder(name: impl AsRef<OsStr>) -> Result<CString> {
    match name.as_ref().as_bytes().contains(&b'/') {
        true => Err(ErrorKind::InvalidFilename.into()),
        false => c_string(name),
    }
}

/// Makes a folder (mkdirat(2)); the mode is cut by the process's mask.
///
/// # Errors
/// The kernel's; EEXIST: there is something of that name, maybe a link. The name is a path.
pub fn make_folder_in(folder: &impl AsRawFd, name: impl AsRef<OsStr>, mode: u32) -> Result<()> {
    let name = name_in_folder(name)?;
    // SAFETY: the call reads a string that ends with a zero.
    check(unsafe { libc::mkdirat(folder.as_raw_fd(), name.as_ptr(), mode) }).map(drop)
}

/// Makes the node of a character device, for its owner to read and write (mknodat(2)).
///
/// # Errors
/// The kernel's; EEXIST: there is something of that name, maybe a link. The name is a path.
pub fn make_device_in(folder: &impl AsRawFd, name: impl AsRef<OsStr>, device: u64) -> Result<()> {
    let name = name_in_folder(name)?;
    // SAFETY: the call reads a string that ends with a zero.
    check(unsafe { libc::mknodat(folder.as_raw_fd(), name.as_ptr(), libc::S_IFCHR | 0o600, device) })
        .map(drop)
}

/// Gives an open file a further name (linkat(2)), by way of /proc.
///
/// # Errors
/// The kernel's; EXDEV: the folder is on another file system. EPERM: this user may not. The name is a path.
pub fn link_in(file: &impl AsRawFd, folder: &impl AsRawFd, name: impl AsRef<OsStr>) -> Result<()> {
    let (path, name) = (c_string(format!("/proc/self/fd/{}", file.as_raw_fd()))?, name_in_folder(name)?);
    let to = (folder.as_raw_fd(), name.as_ptr());
    // SAFETY: the call reads two strings that end with a zero.
    check(unsafe { libc::linkat(libc::AT_FDCWD, path.as_ptr(), to.0, to.1, libc::AT_SYMLINK_FOLLOW) })
        .map(drop)
}

/// Removes a name, and an empty folder that has it (unlinkat(2)).
///
/// # Errors
/// The kernel's. The name is a path.
pub fn remove_in(folder: &impl AsRawFd, name: impl AsRef<OsStr>) -> Result<()> {
    let name = name_in_folder(name)?;
    // SAFETY: the call reads a string that ends with a zero.
    let remove = |flags| check(unsafe { libc::unlinkat(folder.as_raw_fd(), name.as_ptr(), flags) }).map(drop);
    match remove(0) {
        Err(error) if error.raw_os_error() == Some(libc::EISDIR) => remove(libc::AT_REMOVEDIR),
        result => result,
    }
}

/// Removes the file, or the empty folder, at `path` if it has this device and inode (lstat(2), unlink(2), rmdir(2)).
pub fn remove_if_same(path: &CStr, identity: (u64, u64)) {
    // SAFETY: `stat` is plain data of which zeros are valid; the calls use it and a string that ends with a zero.
    unsafe {
        let mut found: libc::stat = zeroed();
        if libc::lstat(path.as_ptr(), &raw mut found) == 0 && (found.st_dev, found.st_ino) == identity {
            match found.st_mode & libc::S_IFMT {
                libc::S_IFDIR => libc::rmdir(path.as_ptr()),
                _ => libc::unlink(path.as_ptr()),
            };
        }
    }
}

/// Gives an open file to a user and a group (fchownat(2)); one that was opened by O_PATH, too.
///
/// # Errors
/// The kernel's.
pub fn set_owner(file: &impl AsRawFd, uid: u32, gid: u32) -> Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: the call reads an empty string, and takes numbers.
    check(unsafe { libc::fchownat(fd, c"".as_ptr(), uid, gid, libc::AT_EMPTY_PATH) }).map(drop)
}

/// Whether no device can be opened on the file system that this file is on, as it is mounted (fstatvfs(3)).
pub fn has_no_devices(file: &impl AsRawFd) -> bool {
    // SAFETY: the structure is plain data of which zeros are valid, and the call writes to the local one.
    unsafe {
        let mut told: libc::statvfs = zeroed();
        libc::fstatvfs(file.as_raw_fd(), &raw mut told) == 0 && told.f_flag & libc::ST_NODEV != 0
    }
}

/// What a block device answers with a number (linux/fs.h).
#[derive(Clone, Copy, Debug)]
pub enum DeviceNumber {
    /// BLKROGET: whether the device cannot be written.
    IsReadOnly = 0x125e,
    /// BLKSSZGET: the size of its sectors in bytes.
    SectorSize = 0x1268,
}

/// What is done with a range of bytes of a block device (linux/fs.h).
#[derive(Clone, Copy, Debug)]
pub enum DeviceRange {
    /// BLKDISCARD: the range is given back, and reads as anything then.
    Discard = 0x1277,
    /// BLKZEROOUT: the range is made zeros.
    Zero = 0x127f,
}

/// Asks a block device.
///
/// # Errors
/// The file is none.
pub fn device_number(file: &File, what: DeviceNumber) -> Result<u64> {
    let mut answer: libc::c_int = 0;
    // SAFETY: each of these calls writes an int, to the local number.
    repeat(|| unsafe { libc::ioctl(file.as_raw_fd(), what as _, &raw mut answer) })?;
    u64::try_from(answer).map_err(Error::other)
}

/// Does something with a range of a block device.
///
/// # Errors
/// The device cannot do it, or the range is not on it.
pub fn change_device(file: &File, what: DeviceRange, offset: u64, length: u64) -> Result<()> {
    let range = [offset, length];
    // SAFETY: each of these calls reads two numbers of 64 bits, the local range.
    repeat(|| unsafe { libc::ioctl(file.as_raw_fd(), what as _, range.as_ptr()) })
}

/// Standard input without the library's buffer of 8 KiB, not closed when this is dropped.
pub fn standard_input() -> ManuallyDrop<File> {
    // SAFETY: the descriptor is open for as long as the process is, and is not closed here.
    ManuallyDrop::new(unsafe { File::from_raw_fd(libc::STDIN_FILENO) })
}

/// Standard output without the library's buffer.
pub fn standard_output() -> BorrowedFd<'static> {
    // SAFETY: the descriptor is open for as long as the process is.
    unsafe { BorrowedFd::borrow_raw(libc::STDOUT_FILENO) }
}

/// The modes of a terminal; None: it is none (tcgetattr(3)).
pub fn terminal_mode(fd: RawFd) -> Option<libc::termios> {
    // SAFETY: all zeros are a value of this structure of numbers.
    let mut mode: libc::termios = unsafe { zeroed() };
    // SAFETY: the call writes to the local structure.
    check(unsafe { libc::tcgetattr(fd, &raw mut mode) }).ok().map(|_| mode)
}

/// Sets the modes of a terminal. A signal handler may call this.
pub fn set_terminal_mode(fd: RawFd, mode: &libc::termios) {
    // SAFETY: the call only reads the structure.
    unsafe { libc::tcsetattr(fd, libc::TCSANOW, mode) };
}

/// Waits until what was written to a terminal has left it (tcdrain(3)); what is no terminal has nothing to wait for.
pub fn drain_terminal(fd: RawFd) {
    // SAFETY: the call takes a number.
    unsafe { libc::tcdrain(fd) };
}

/// The process group in the foreground of the terminal that controls this process, and the process group that this
/// process is in; None: `fd` is not that terminal (tcgetpgrp(3)). A signal handler may call this.
pub fn process_groups(fd: RawFd) -> Option<(i32, i32)> {
    // SAFETY: the call takes and returns numbers.
    let foreground = unsafe { libc::tcgetpgrp(fd) };
    // SAFETY: the call returns a number.
    (foreground >= 0).then(|| (foreground, unsafe { libc::getpgrp() }))
}

/// Makes a FIFO, for a test.
#[cfg(test)]
pub fn make_fifo(path: &Path) {
    let name = c_string(path).unwrap();
    // SAFETY: the name is a string that ends with a zero.
    check(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }).unwrap();
}
