//! What a disk is made of: a raw file or block device, locked against a second writer.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::SECTOR;
use crate::error::{Context, Error, Result};
use crate::host::Access;
use crate::log;
use crate::virtio::buffers::Buffers;

/// An open disk image. The lock belongs to the open file description: it is there until the last
/// copy of the descriptor is closed.
pub struct Image {
    file: File,
    sectors: u64,
}

impl Image {
    /// Takes `file`, which was opened at `path`, for a disk.
    pub fn new(file: File, path: &Path, access: Access) -> Result<Self> {
        let attempt = || format!("use disk image `{}`", path.display());
        let image = Self::measured(file, path)?;
        // Orchestrators put empty files where a disk will be swapped in later; many may share one.
        if image.sectors > 0 {
            lock(&image.file, access).with_context(attempt)?;
        }
        Ok(image)
    }

    /// The same image, if that is what is at `path`, with the size that it has now.
    pub fn again(&self, path: &Path) -> Option<Result<Self>> {
        let (own, other) = (self.file.metadata().ok()?, std::fs::metadata(path).ok()?);
        let same = (own.dev(), own.ino()) == (other.dev(), other.ino());
        // An empty one is not locked yet.
        (same && self.sectors > 0).then(|| {
            let file = self.file.try_clone().context("duplicate a disk's descriptor")?;
            Self::measured(file, path)
        })
    }

    fn measured(mut file: File, path: &Path) -> Result<Self> {
        let bytes = file
            .seek(SeekFrom::End(0))
            .with_context(|| format!("find the size of disk image `{}`", path.display()))?;
        if bytes % SECTOR != 0 {
            log::line(format_args!(
                "disk image `{}` has {bytes} bytes, not a multiple of {SECTOR}: the last {} are not seen by the guest",
                path.display(),
                bytes % SECTOR
            ));
        }
        Ok(Self { file, sectors: bytes / SECTOR })
    }

    /// How large it is.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Reads from byte `offset` into `buffers`, all of it, which are then empty.
    pub fn read(&self, buffers: &mut Buffers, offset: u64) -> std::io::Result<()> {
        buffers.read_at(&self.file, offset)
    }

    /// Writes all of `buffers`, which are then empty, from byte `offset` on.
    pub fn write(&self, buffers: &mut Buffers, offset: u64) -> std::io::Result<()> {
        buffers.write_at(&self.file, offset)
    }

    /// Returns when everything written is on stable storage.
    pub fn flush(&self) -> std::io::Result<()> {
        self.file.sync_data()
    }
}

/// One writer or many readers, whatever process they are in (fcntl(2), open file description locks).
#[allow(unsafe_code)]
fn lock(file: &File, access: Access) -> Result<()> {
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
