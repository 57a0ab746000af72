//! One writer or many readers of an image, whatever process they are in.

use std::fs::File;
use std::path::Path;

use crate::error::{Context, Result};
use crate::host::file::locker;
use crate::host::{Access, Sharing};
use crate::sys::descriptor;

/// Locks the image of `what` at `path` (fcntl(2), open file description locks): until the last copy of the
/// descriptor is closed.
pub fn lock(file: &File, access: Access, sharing: Sharing, what: &str, path: &Path) -> Result<()> {
    let Err(error) = descriptor::lock(file, access == Access::ReadWrite) else { return Ok(()) };
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => sharing.judge(what, path, &locker(file)),
        // A file system without locks.
        _ => Err(error).context("lock it"),
    }
}
