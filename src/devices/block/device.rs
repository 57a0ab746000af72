//! Block devices of the host, asked and told what files are not (linux/fs.h).

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;

/// They answer with a number.
const BLKROGET: u64 = 0x125e;
const BLKSSZGET: u64 = 0x1268;
/// Their argument is a range of bytes.
const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127f;

/// Whether `file` is a block device.
pub fn is_block_device(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// Whether it is a device that cannot be written, which opening it for writing does not tell.
pub fn is_read_only(file: &File) -> bool {
    is_block_device(file) && number(file, BLKROGET).is_ok_and(|answer| answer != 0)
}

/// The smallest piece that a device reads or writes, in bytes.
pub fn block(file: &File) -> Option<u64> {
    is_block_device(file).then(|| number(file, BLKSSZGET).ok()).flatten()
}

/// Whether a device of `end` bytes can take blocks back.
pub fn takes_back(file: &File, end: u64) -> bool {
    // One that can finds fault with the range, a byte that is not there.
    discard(file, end, 1).is_err_and(|error| error.kind() == ErrorKind::InvalidInput)
}

/// Gives a range back; it reads as anything then.
pub fn discard(file: &File, offset: u64, length: u64) -> Result<()> {
    range(file, BLKDISCARD, offset, length)
}

/// Makes a range zeros, if need be by writing them.
pub fn zero(file: &File, offset: u64, length: u64) -> Result<()> {
    range(file, BLKZEROOUT, offset, length)
}

#[allow(unsafe_code)]
fn number(file: &File, request: u64) -> Result<u64> {
    let mut answer: libc::c_int = 0;
    // SAFETY: the call writes to the local number.
    repeat(|| unsafe { libc::ioctl(file.as_raw_fd(), request as _, &mut answer) })?;
    u64::try_from(answer).map_err(Error::other)
}

#[allow(unsafe_code)]
fn range(file: &File, request: u64, offset: u64, length: u64) -> Result<()> {
    let range = [offset, length];
    // SAFETY: the call reads the local range.
    repeat(|| unsafe { libc::ioctl(file.as_raw_fd(), request as _, range.as_ptr()) })
}

/// A system call, again as long as it is interrupted.
pub fn repeat(mut call: impl FnMut() -> i32) -> Result<()> {
    loop {
        match call() {
            0.. => return Ok(()),
            _ => match Error::last_os_error() {
                error if error.kind() == ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}
