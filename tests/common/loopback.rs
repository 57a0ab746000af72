//! Block devices of the host: loop devices (loop(4)) over files of the tests, and device-mapper's over these.

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

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

/// linux/dm-ioctl.h: numbers of calls, and places in struct dm_ioctl. One target of a table has 40 bytes, then its words.
const DM_DEV_CREATE: u64 = 3;
const DM_DEV_REMOVE: u64 = 4;
const DM_DEV_SUSPEND: u64 = 6;
const DM_TABLE_LOAD: u64 = 9;
const DM_DEFERRED_REMOVE: u32 = 1 << 17;
const DM_HEAD: usize = 312;
const DM_DEVICE: usize = 40;
const DM_NAME: usize = 48;
const DM_TARGET: usize = 40;
const DM_ROOM: usize = 4096;

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

/// A device of device-mapper's, gone when nobody has it open and this is dropped.
pub struct Mapped {
    pub path: PathBuf,
    name: String,
    control: File,
}

impl Mapped {
    /// A device of these targets: how many sectors each has, its name, and what is said to it.
    pub fn new(table: &[(u64, &str, &str)]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("alula-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let needed = "device-mapper is needed: the rights of root, and `modprobe dm-flakey`";
        let control = File::options().read(true).write(true).open("/dev/mapper/control").expect(needed);
        let mut mapped = Self { path: PathBuf::new(), name, control };
        let made = mapped.call(DM_DEV_CREATE, 0, 0, &[]);
        // Major and minor number, as in dev_t of 32 bits.
        let number = u64::from_ne_bytes(made[DM_DEVICE..DM_DEVICE + 8].try_into().unwrap());
        mapped.path = format!("/dev/dm-{}", number & 0xff | number >> 12 & 0xfff00).into();
        mapped.map_to(table);
        super::wait_for(|| mapped.path.exists());
        mapped
    }

    /// From now on it has these targets. What is under way is finished by those that it had.
    pub fn map_to(&self, table: &[(u64, &str, &str)]) {
        let (mut targets, mut start) = (Vec::new(), 0_u64);
        for (sectors, target, words) in table {
            let mut bytes = [0; DM_TARGET].to_vec();
            bytes.extend_from_slice(words.as_bytes());
            bytes.resize((bytes.len() + 1).next_multiple_of(8), 0);
            let length = bytes.len() as u32;
            bytes[..8].copy_from_slice(&start.to_ne_bytes());
            bytes[8..16].copy_from_slice(&sectors.to_ne_bytes());
            bytes[20..24].copy_from_slice(&length.to_ne_bytes());
            bytes[24..24 + target.len()].copy_from_slice(target.as_bytes());
            targets.extend(bytes);
            start += sectors;
        }
        self.call(DM_TABLE_LOAD, 0, table.len() as u32, &targets);
        // Without its flag, this call resumes a device, with the table that was loaded.
        self.call(DM_DEV_SUSPEND, 0, 0, &[]);
    }

    fn call(&self, number: u64, flags: u32, targets: u32, table: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0_u8; DM_ROOM];
        let words = [4, 0, 0, DM_ROOM as u32, DM_HEAD as u32, targets, 0, flags];
        for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&u32::to_ne_bytes(word));
        }
        bytes[DM_NAME..][..self.name.len()].copy_from_slice(self.name.as_bytes());
        bytes[DM_HEAD..][..table.len()].copy_from_slice(table);
        let request = 3 << 30 | (DM_HEAD as u64) << 16 | 0xfd << 8 | number;
        ioctl(&self.control, request, bytes.as_mut_ptr() as u64)
            .unwrap_or_else(|error| panic!("call {number} of device-mapper: {error}"));
        bytes
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        self.call(DM_DEV_REMOVE, DM_DEFERRED_REMOVE, 0, &[]);
    }
}

#[allow(unsafe_code)]
fn ioctl(file: &File, request: u64, argument: u64) -> Result<i32> {
    // SAFETY: the argument is none, or the address of a structure that the call reads or fills, with what it points to.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request as _, argument) };
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}
