//! What the host has in memory of files.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Has the host forget what it has in memory of the file at `path`, as far as nobody uses it.
#[allow(unsafe_code)]
pub fn drop_from_memory(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    // SAFETY: the call takes numbers.
    let failed = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(failed, 0);
}
