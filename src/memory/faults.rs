//! Page faults of guest memory that another process serves: userfaultfd(2), ioctl_userfaultfd(2). Whoever touches a page
//! that is not there waits until that process gives one: the guest, a device's thread, the kernel in a system call, and
//! KVM. Once nobody serves them any more, missing pages are zeros.

use std::fs::File;
use std::io::{Error as IoError, ErrorKind, Result as IoResult};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use vm_memory::GuestMemoryBackend;

use super::mapping::{Mapping, userfaultfd};
use super::{Region, Regions};
use crate::descriptors::Named;
use crate::error::{Context, Error, Result};

/// The device that makes such descriptors, opened while this process still had the right to.
static DEVICE: OnceLock<Named<File>> = OnceLock::new();

/// Has every descriptor be made by this open device from now on, instead of by the one that is found at its path.
pub fn take_device(device: File) {
    // A process enters one jail at most, so that there is none before this.
    let _ = DEVICE.set(Named::new("device of page faults", device));
}

/// The descriptor by which another process serves page faults of this one.
#[derive(Debug)]
pub struct Faults {
    fd: Named<OwnedFd>,
    /// The file in which the kernel tells of the faults under way; none: this process is in a jail, without /proc.
    info: Option<Named<File>>,
}

impl Faults {
    /// Makes a descriptor, by which nothing is served yet.
    ///
    /// # Errors
    /// The kernel has no such faults, or this user may not have those of the kernel served, as KVM's are.
    pub fn open() -> Result<Self> {
        const ATTEMPT: &str = "have another program serve page faults of the guest (userfaultfd)";
        let made = userfaultfd(DEVICE.get().map(|device| &**device)).map_err(refused).context(ATTEMPT)?;
        let info = format!("/proc/self/fdinfo/{}", made.as_raw_fd());
        let info = match File::open(&info) {
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            opened => Some(opened.with_context(|| format!("open {info}")).context(ATTEMPT)?),
        };
        let info = info.map(|info| Named::new("page faults under way", info));
        Ok(Self { fd: Named::new("page faults of guest memory", made), info })
    }

    /// Has faults of the first `size` bytes of `mapping`, of anonymous memory, wait for who serves them.
    pub(super) fn serve(&self, mapping: &Mapping, size: usize) -> IoResult<()> {
        mapping.have_faults_taken(&*self.fd, size)
    }

    /// Nobody serves faults of `memory` any more. Who waits for a page has a new one, of zeros.
    pub fn leave(&self, memory: &Regions) {
        for mapping in memory.iter().filter_map(Region::mapping) {
            // A range that is not served is left already.
            let _ = mapping.have_faults_left(&*self.fd);
        }
    }

    /// Has who waits for a page of `memory` ask for it again: a fault that its reader has forgotten is then there to be
    /// read once more.
    pub fn ask_again(&self, memory: &Regions) {
        for mapping in memory.iter().filter_map(Region::mapping) {
            // In a range that is not served, nobody waits.
            let _ = mapping.have_faults_asked_again(&*self.fd);
        }
    }

    /// Says whether [`Faults::waiting`] can tell.
    pub fn are_counted(&self) -> bool {
        self.info.is_some()
    }

    /// How many threads wait for a page, at this moment.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn waiting(&self) -> IoResult<u64> {
        let mut text = [0; 256];
        let info = self.info.as_ref().ok_or(ErrorKind::Unsupported)?;
        let length = info.read_at(&mut text, 0)?;
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
