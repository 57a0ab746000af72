//! Block devices of the host, asked and told what files are not (linux/fs.h).

use std::fs::File;
use std::io::{ErrorKind, Result};
use std::os::unix::fs::FileTypeExt;

use crate::sys::descriptor::{DeviceNumber, DeviceRange, change_device, device_number};

/// Whether `file` is a block device.
pub fn is_block_device(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// Whether it is a device that cannot be written, which opening it for writing does not tell.
pub fn is_read_only(file: &File) -> bool {
    is_block_device(file) && device_number(file, DeviceNumber::IsReadOnly).is_ok_and(|answer| answer != 0)
}

/// The smallest piece that a device reads or writes, in bytes.
pub fn block(file: &File) -> Option<u64> {
    is_block_device(file).then(|| device_number(file, DeviceNumber::SectorSize).ok()).flatten()
}

/// Whether a device of `end` bytes can take blocks back.
pub fn takes_back(file: &File, end: u64) -> bool {
    // One that can finds fault with the range, a byte that is not there.
    discard(file, end, 1).is_err_and(|error| error.kind() == ErrorKind::InvalidInput)
}

/// Gives a range back; it reads as anything then.
pub fn discard(file: &File, offset: u64, length: u64) -> Result<()> {
    change_device(file, DeviceRange::Discard, offset, length)
}

/// Makes a range zeros, if need be by writing them.
pub fn zero(file: &File, offset: u64, length: u64) -> Result<()> {
    change_device(file, DeviceRange::Zero, offset, length)
}
