//! One writer or many readers of an image, whatever process they are in.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::error::{Context, Result};
use crate::host::file::locker;
use crate::host::{Access, Sharing};

/// Locks the image of `what` at `path` (fcntl(2), open file description locks): until the last copy of the
/// descriptor is closed.
#[allow(unsafe_code)]
pub fn lock(file: &File, access: Access, sharing: Sharing, what: &str, path: &Path) -> Result<()> {
    let kind = if access == Access::ReadWrite { libc::F_WRLCK } else { libc::F_RDLCK };
    let lock =
        libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the call reads the local structure.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => sharing.judge(what, path, &locker(file)),
        // A file system without locks.
        _ => Err(error).context("lock it"),
    }
}
