//! One writer or many readers of an image, whatever process they are in.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::host::Access;

/// Locks an image (fcntl(2), open file description locks): until the last copy of the descriptor is
/// closed.
#[allow(unsafe_code)]
pub fn lock(file: &File, access: Access) -> Result<()> {
    let kind = if access == Access::ReadWrite { libc::F_WRLCK } else { libc::F_RDLCK };
    let lock =
        libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the call reads the local structure.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => {
            let holder = holder(file).unwrap_or_else(|| "another process".to_owned());
            Err(Error::config(format!("it is in use by {holder}: stop that, or share it read-only")))
        }
        // A file system without locks.
        _ => Err(error).context("lock it"),
    }
}

/// Another process that has the same file open.
fn holder(file: &File) -> Option<String> {
    let wanted = file.metadata().ok()?;
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let Ok(pid) = process.file_name().to_string_lossy().parse::<u32>() else { continue };
        let descriptors = std::fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        let same = |path: &Path| {
            std::fs::metadata(path)
                .is_ok_and(|other| (other.dev(), other.ino()) == (wanted.dev(), wanted.ino()))
        };
        if pid != std::process::id() && descriptors.into_iter().any(|descriptor| same(&descriptor.path())) {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("process {pid} ({})", name.trim()));
        }
    }
    None
}
