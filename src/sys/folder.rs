//! Calls on what is in an open folder, by its name there: whoever can change the path of the folder meanwhile cannot
//! lead them elsewhere.
#![allow(unsafe_code)]

use std::ffi::{CString, OsStr};
use std::io::Result;
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{AsRawFd, OwnedFd};

use super::check;
use super::descriptor::owned;
use super::machine::c_string;

/// Opens what has the relative path `path` in `folder`, with these `libc::O_...` and, if that makes a file, this mode.
/// No part of the path may be a link or lead out of the folder (openat2(2), since Linux 5.6).
///
/// # Errors
/// The kernel's; ELOOP: there is a link.
pub fn open(folder: &impl AsRawFd, path: impl AsRef<OsStr>, flags: i32, mode: u32) -> Result<OwnedFd> {
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

/// Makes a folder (mkdirat(2)); the mode is cut by the process's mask.
///
/// # Errors
/// The kernel's; EEXIST: there is something of that name, maybe a link.
pub fn make_folder(folder: &impl AsRawFd, name: impl AsRef<OsStr>, mode: u32) -> Result<()> {
    let name = c_string(name)?;
    // SAFETY: the call reads a string that ends with a zero.
    check(unsafe { libc::mkdirat(folder.as_raw_fd(), name.as_ptr(), mode) }).map(drop)
}

/// Makes the node of a character device, for its owner to read and write (mknodat(2)).
///
/// # Errors
/// The kernel's; EEXIST: there is something of that name, maybe a link.
pub fn make_device(folder: &impl AsRawFd, name: impl AsRef<OsStr>, device: u64) -> Result<()> {
    let name = c_string(name)?;
    // SAFETY: the call reads a string that ends with a zero.
    check(unsafe { libc::mknodat(folder.as_raw_fd(), name.as_ptr(), libc::S_IFCHR | 0o600, device) })
        .map(drop)
}

/// Gives an open file a further name (linkat(2)), by way of /proc.
///
/// # Errors
/// The kernel's; EXDEV: the folder is on another file system. EPERM: this user may not.
pub fn link(file: &impl AsRawFd, folder: &impl AsRawFd, name: impl AsRef<OsStr>) -> Result<()> {
    let (path, name) = (c_string(format!("/proc/self/fd/{}", file.as_raw_fd()))?, c_string(name)?);
    let to = (folder.as_raw_fd(), name.as_ptr());
    // SAFETY: the call reads two strings that end with a zero.
    check(unsafe { libc::linkat(libc::AT_FDCWD, path.as_ptr(), to.0, to.1, libc::AT_SYMLINK_FOLLOW) })
        .map(drop)
}

/// Removes a name, and an empty folder that has it (unlinkat(2)).
///
/// # Errors
/// The kernel's.
pub fn remove(folder: &impl AsRawFd, name: impl AsRef<OsStr>) -> Result<()> {
    let name: CString = c_string(name)?;
    // SAFETY: the call reads a string that ends with a zero.
    let remove = |flags| check(unsafe { libc::unlinkat(folder.as_raw_fd(), name.as_ptr(), flags) }).map(drop);
    match remove(0) {
        Err(error) if error.raw_os_error() == Some(libc::EISDIR) => remove(libc::AT_REMOVEDIR),
        result => result,
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
    let mut told = MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: the structure is plain data of which zeros are valid, and the call writes to the local one.
    unsafe {
        libc::fstatvfs(file.as_raw_fd(), told.as_mut_ptr()) == 0
            && told.assume_init().f_flag & libc::ST_NODEV != 0
    }
}
