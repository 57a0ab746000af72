//! Giving blocks back to the host: holes in files (fallocate(2)), discards of block devices.

use std::fs::File;
use std::io::{ErrorKind, Result};

use super::device;
use crate::sys::descriptor::allocate;

/// What a hole is made by; the file keeps its length.
pub const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
/// What zeros are made by that keep their blocks.
pub const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// Whether blocks of it can be given back; asked beyond its end, where nothing is.
pub fn supported(file: &File, end: u64) -> bool {
    match device::is_block_device(file) {
        true => device::takes_back(file, end),
        false => allocate(file, PUNCH, end.next_multiple_of(4096), 4096).is_ok(),
    }
}

/// Gives the blocks of a range back. Of a file, it reads as zeros then; of a device, as anything.
pub fn punch(file: &File, offset: u64, length: u64) -> Result<()> {
    match device::is_block_device(file) {
        true => device::discard(file, offset, length),
        false => allocate(file, PUNCH, offset, length),
    }
}

/// Gives the blocks of a range back, which reads as zeros then, of a file or of a device.
pub fn punch_zeros(file: &File, offset: u64, length: u64) -> Result<()> {
    allocate(file, PUNCH, offset, length)
}

/// Makes a range zeros; `unmap`: its blocks may be given back.
pub fn zero(file: &File, offset: u64, length: u64, unmap: bool) -> Result<()> {
    let mode = if unmap { PUNCH } else { ZERO };
    match allocate(file, mode, offset, length) {
        // A device that cannot without writing them.
        Err(error) if error.kind() == ErrorKind::Unsupported && device::is_block_device(file) => {
            device::zero(file, offset, length)
        }
        // A file system without (tmpfs): a hole, and new blocks in it.
        Err(error) if error.kind() == ErrorKind::Unsupported && !unmap => {
            allocate(file, PUNCH, offset, length)?;
            allocate(file, libc::FALLOC_FL_KEEP_SIZE, offset, length)
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn holes_free_blocks_and_zeros_keep_them() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        file.write_all_at(&[7; 64 << 10], 0).unwrap();
        file.sync_all().unwrap();
        assert!(supported(&file, 64 << 10));
        let blocks = || file.metadata().unwrap().blocks();
        let before = blocks();
        zero(&file, 0, 16 << 10, false).unwrap();
        assert_eq!(blocks(), before);
        punch(&file, 16 << 10, 16 << 10).unwrap();
        zero(&file, 32 << 10, 16 << 10, true).unwrap();
        assert_eq!(blocks(), before - (32 << 10) / 512);
        let mut content = vec![1; 64 << 10];
        file.read_exact_at(&mut content, 0).unwrap();
        assert!(content[..48 << 10].iter().all(|byte| *byte == 0) && content[48 << 10..] == [7; 16 << 10]);
        assert_eq!(file.metadata().unwrap().len(), 64 << 10);
    }
}
