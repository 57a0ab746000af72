//! Page faults of guest memory that another process serves: userfaultfd(2), ioctl_userfaultfd(2). Whoever touches a page
//! that is not there waits until that process gives one: the guest, a device's thread, the kernel in a system call, and
//! KVM. Once nobody serves them any more, missing pages are zeros.

use std::fs::File;
use std::io::{Error as IoError, ErrorKind, Result as IoResult};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use vm_memory::GuestMemoryBackend;

use super::mapping::Mapping;
use super::{Region, Regions};
use crate::descriptors::Named;
use crate::error::{Context, Error, Result};

/// Makes a descriptor (USERFAULTFD_IOC_NEW, of the device), tells what it is to do (UFFDIO_API), and has it take the
/// faults of a range and leave them (UFFDIO_REGISTER, UFFDIO_UNREGISTER): linux/userfaultfd.h.
const NEW: u64 = 0xaa00;
const API: u64 = 0xc018_aa3f;
const REGISTER: u64 = 0xc020_aa00;
const UNREGISTER: u64 = 0x8010_aa01;
const API_VERSION: u64 = 0xaa;
/// The feature by which a descriptor's reader is told of pages that are given back: they are zeros afterwards.
const EVENT_REMOVE: u64 = 1 << 3;
/// The mode in which faults of pages that are not there are taken.
const MISSING: u64 = 1;
const DEVICE: &str = "/dev/userfaultfd";

/// The descriptor by which another process serves page faults of this one.
#[derive(Debug)]
pub struct Faults {
    fd: Named<OwnedFd>,
    /// The file in which the kernel tells of the faults under way.
    info: Named<File>,
}

impl Faults {
    /// Makes a descriptor, by which nothing is served yet.
    ///
    /// # Errors
    /// The kernel has no such faults, or this user may not have those of the kernel served, as KVM's are.
    pub fn open() -> Result<Self> {
        const ATTEMPT: &str = "have another program serve page faults of the guest (userfaultfd)";
        // The device needs no privilege but its own, and is not everywhere.
        let made = by_device().or_else(|_| by_call()).map_err(refused).context(ATTEMPT)?;
        call(&made, API, &mut [API_VERSION, EVENT_REMOVE, 0]).map_err(refused).context(ATTEMPT)?;
        let info = format!("/proc/self/fdinfo/{}", made.as_raw_fd());
        let info = File::open(&info).with_context(|| format!("open {info}")).context(ATTEMPT)?;
        let info = Named::new("page faults under way", info);
        Ok(Self { fd: Named::new("page faults of guest memory", made), info })
    }

    /// Has faults of the first `size` bytes of `mapping`, of anonymous memory, wait for who serves them.
    pub(super) fn serve(&self, mapping: &Mapping, size: usize) -> IoResult<()> {
        let start = mapping.start().as_ptr() as u64;
        call(&*self.fd, REGISTER, &mut [start, size as u64, MISSING, 0])
    }

    /// Nobody serves faults of `memory` any more. Who waits for a page has a new one, of zeros.
    pub fn leave(&self, memory: &Regions) {
        for mapping in memory.iter().filter_map(Region::mapping) {
            // A range that is not served is left already.
            let range = &mut [mapping.start().as_ptr() as u64, mapping.size() as u64];
            let _ = call(&*self.fd, UNREGISTER, range);
        }
    }

    /// How many threads wait for a page, at this moment.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn waiting(&self) -> IoResult<u64> {
        let mut text = [0; 256];
        let length = self.info.read_at(&mut text, 0)?;
        let text = String::from_utf8_lossy(&text[..length]);
        let total = text.lines().find_map(|line| line.strip_prefix("total:"));
        total.and_then(|total| total.trim().parse().ok()).ok_or_else(|| ErrorKind::InvalidData.into())
    }
}

impl AsRawFd for Faults {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn refused(error: IoError) -> Error {
    let why = match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "this user may not have faults of the kernel served, as KVM's are: run as root, or let the user open \
             /dev/userfaultfd, or set the sysctl vm.unprivileged_userfaultfd to 1"
        }
        Some(libc::ENOSYS) => "this kernel has no such faults (CONFIG_USERFAULTFD)",
        _ => return Error::host(error.to_string()),
    };
    Err::<(), _>(error).context(why).expect_err("it is an error")
}

fn by_device() -> IoResult<OwnedFd> {
    let device = File::options().read(true).write(true).open(DEVICE)?;
    // SAFETY: the call takes numbers, and returns a descriptor that nobody else has.
    #[allow(unsafe_code)]
    owned(unsafe { libc::ioctl(device.as_raw_fd(), NEW as _, libc::O_CLOEXEC | libc::O_NONBLOCK) })
}

fn by_call() -> IoResult<OwnedFd> {
    // SAFETY: the call takes a number, and returns a descriptor that nobody else has.
    #[allow(unsafe_code)]
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) } as RawFd)
}

#[allow(unsafe_code)]
fn owned(made: RawFd) -> IoResult<OwnedFd> {
    match made {
        // SAFETY: the descriptor was just made and is given away whole.
        0.. => Ok(unsafe { OwnedFd::from_raw_fd(made) }),
        _ => Err(IoError::last_os_error()),
    }
}

/// Makes one of the calls above, whose structure has as many words as its number says.
#[allow(unsafe_code)]
fn call<const WORDS: usize>(fd: &impl AsRawFd, request: u64, words: &mut [u64; WORDS]) -> IoResult<()> {
    debug_assert_eq!(
        request >> 16 & 0x3fff,
        size_of_val(words) as u64,
        "the size that a request's number says"
    );
    // SAFETY: each of these calls reads and writes a structure of so many words of 64 bits, the local ones. All that
    // they change of this process's memory is who gives missing pages, which for guest memory may be anybody.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request as _, words.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(IoError::last_os_error()),
    }
}
