//! Block devices of the host: loop devices (loop(4)) over files of the tests.

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// linux/loop.h.
const LOOP_SET_CAPACITY: u64 = 0x4c07;
const LOOP_CONFIGURE: u64 = 0x4c0a;
const LOOP_CTL_GET_FREE: u64 = 0x4c82;
const LO_FLAGS_READ_ONLY: u64 = 1;
const LO_FLAGS_AUTOCLEAR: u64 = 4;
const LO_FLAGS_PARTSCAN: u64 = 8;
/// Words of struct loop_config; the first has the file and the block size, one the flags.
const CONFIG_WORDS: usize = 38;
const FLAGS_WORD: usize = 7;
/// linux/blkpg.h. A partition has start, length and number; its names are left empty.
const BLKPG: u64 = 0x1269;
const BLKPG_ADD_PARTITION: u64 = 1;
const PARTITION_WORDS: usize = 19;

/// A loop device, gone with the last that has it open, at the latest when the test ends.
pub struct BlockDevice {
    pub path: PathBuf,
    device: File,
}

impl BlockDevice {
    /// The whole of a file as a device of blocks of `block` bytes.
    pub fn new(file: &Path, block: u64) -> Self {
        Self::configured(file, block, 0)
    }

    /// The same, which cannot be written.
    pub fn read_only(file: &Path) -> Self {
        Self::configured(file, 512, LO_FLAGS_READ_ONLY)
    }

    /// The same, and the node of a partition of it, from byte `start` on, of `length` bytes.
    pub fn with_partition(file: &Path, start: u64, length: u64) -> (Self, PathBuf) {
        let device = Self::configured(file, 512, LO_FLAGS_PARTSCAN);
        let mut partition = [0_u64; PARTITION_WORDS];
        partition[..3].copy_from_slice(&[start, length, 1]);
        let argument = [BLKPG_ADD_PARTITION, 8 * PARTITION_WORDS as u64, partition.as_ptr() as u64];
        ioctl(&device.device, BLKPG, argument.as_ptr() as u64).unwrap();
        let partition = format!("{}p1", device.path.display());
        (device, partition.into())
    }

    fn configured(file: &Path, block: u64, flags: u64) -> Self {
        let file = File::options().read(true).write(flags & LO_FLAGS_READ_ONLY == 0).open(file).unwrap();
        let mut config = [0_u64; CONFIG_WORDS];
        config[0] = file.as_raw_fd() as u64 | block << 32;
        config[FLAGS_WORD] = (flags | LO_FLAGS_AUTOCLEAR) << 32;
        let needed = "loop devices are needed: the rights of root, and `modprobe loop`";
        let control = File::options().read(true).write(true).open("/dev/loop-control").expect(needed);
        loop {
            let number = ioctl(&control, LOOP_CTL_GET_FREE, 0).expect(needed);
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device =
                File::options().read(true).write(flags & LO_FLAGS_READ_ONLY == 0).open(&path).expect(needed);
            match ioctl(&device, LOOP_CONFIGURE, config.as_ptr() as u64) {
                Ok(_) => return Self { path, device },
                // Another test was faster.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => panic!("{}: {error}", path.display()),
            }
        }
    }

    /// Makes it as large as its file is now.
    pub fn measure_again(&self) {
        ioctl(&self.device, LOOP_SET_CAPACITY, 0).unwrap();
    }
}

#[allow(unsafe_code)]
fn ioctl(file: &File, request: u64, argument: u64) -> Result<i32> {
    // SAFETY: the argument is none, or the address of a structure that the call reads, with what it points to.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request as _, argument) };
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}
