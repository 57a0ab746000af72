//! What a disk is made of: a raw file, a block device, or a chain of qcow2 images.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use super::bounce::Bounce;
use super::config::{Backing, Config, Format};
use super::flushes::Flushes;
use super::qcow2::Qcow2;
use super::raw::Raw;
use super::{SECTOR, device, holes};
use crate::devices::lock::lock;
use crate::error::{Context, Error, Result};
use crate::host::file::is_same_device;
use crate::host::{Access, Host};
use crate::log;
use crate::virtio::buffers::Buffers;

/// Smaller holes than this free nothing in any file system of today.
const HOLE: u64 = 4096;

enum Content {
    Raw(Raw),
    Qcow2(Qcow2),
}

/// An open disk image, locked against a second writer.
pub struct Image {
    content: Content,
    sectors: u64,
    block: u64,
    /// The smallest range that can be given back to the host; none: nothing can.
    hole: Option<u64>,
    flushes: Arc<Flushes>,
}

impl Image {
    /// The image that `config` names.
    pub fn open(config: &Config, host: &mut Host) -> Result<Self> {
        let (what, path, access) = config.file();
        let sharing = host.sharing(config.lock);
        let file = host.file(&what, path, access, sharing)?;
        let attempt = || format!("use disk image `{}`", path.display());
        if access == Access::ReadWrite && device::is_read_only(&file) {
            let reason = "the device cannot be written: `is_read_only` (`ro`), if it is only to be read";
            return Err(Error::config(reason)).with_context(attempt);
        }
        let length = measure(&file, path)?;
        if config.format == Format::Raw {
            warn_of_container(&file, path);
        }
        // Orchestrators put empty files where a disk will be swapped in later; many may share one.
        if length > 0 {
            lock(&file, access, sharing, &what, path).with_context(attempt)?;
        }
        let content = match config.format {
            Format::Qcow2 => Qcow2::open(config, file, host).map(Content::Qcow2),
            Format::Raw if config.direct_io && length > 0 => Raw::direct(file).map(Content::Raw),
            Format::Raw => Ok(Content::Raw(Raw::new(file))),
        };
        Self::measured(content.with_context(attempt)?, config)
    }

    /// The same image, if that is what `config` names, with the size that it has now.
    pub fn again(&self, config: &Config, host: &mut Host) -> Option<Result<Self>> {
        let (_, path, _) = config.file();
        let (own, other) = (self.file().metadata().ok()?, std::fs::metadata(path).ok()?);
        let same = (own.dev(), own.ino()) == (other.dev(), other.ino()) || is_same_device(self.file(), path);
        // An empty one is not locked yet.
        (same && self.sectors > 0).then(|| {
            let attempt = || format!("use disk image `{}` again", path.display());
            let content = match &self.content {
                Content::Raw(raw) => raw.try_clone().context("duplicate a descriptor").map(Content::Raw),
                Content::Qcow2(image) => image.again(config, host).map(Content::Qcow2),
            };
            Self::measured(content.with_context(attempt)?, config)
        })
    }

    fn measured(content: Content, config: &Config) -> Result<Self> {
        let (_, path, access) = config.file();
        let (bytes, block, hole) = match &content {
            Content::Raw(raw) => {
                let bytes = measure(raw.file(), path)?;
                let can = config.discard != Some(false)
                    && access == Access::ReadWrite
                    && holes::supported(raw.file(), bytes);
                (bytes, raw.block(), can.then(|| raw.block().max(HOLE)))
            }
            Content::Qcow2(image) => {
                let can = config.discard != Some(false) && access == Access::ReadWrite;
                (image.size(), SECTOR, image.hole().filter(|_| can))
            }
        };
        if config.discard == Some(true) && hole.is_none() && bytes > 0 {
            return Err(Error::config(format!(
                "use disk image `{}`: blocks of it cannot be given back (`discard`): leave that out, or put it \
                 on a file system with holes",
                path.display()
            )));
        }
        if bytes % block != 0 {
            log::line(format_args!(
                "disk image `{}` has {bytes} bytes, not a multiple of {block}: the last {} are not seen by the guest",
                path.display(),
                bytes % block
            ));
        }
        Ok(Self { content, sectors: bytes / block * (block / SECTOR), block, hole, flushes: Arc::default() })
    }

    fn file(&self) -> &File {
        match &self.content {
            Content::Raw(raw) => raw.file(),
            Content::Qcow2(image) => image.file(),
        }
    }

    /// The images beneath it, the next one first.
    pub fn beneath(&self) -> &[Backing] {
        match &self.content {
            Content::Raw(_) => &[],
            Content::Qcow2(image) => image.beneath(),
        }
    }

    /// How large it is.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// The smallest piece that can be read or written, in bytes.
    pub fn block(&self) -> u64 {
        self.block
    }

    /// The smallest range that can be given back to the host, in bytes; none: nothing can.
    pub fn hole(&self) -> Option<u64> {
        self.hole
    }

    /// Whether what was written is lost with us if it is never flushed.
    pub fn is_cached(&self) -> bool {
        matches!(self.content, Content::Qcow2(_))
    }

    /// The file of a raw image.
    pub fn raw(&self) -> Option<&Raw> {
        match &self.content {
            Content::Raw(raw) => Some(raw),
            Content::Qcow2(_) => None,
        }
    }

    /// Where the kernel can read or write all of `buffers` itself: a descriptor, and an offset there.
    /// It stays so until a range is given back or made zeros: the caller waits for what is in flight
    /// before that.
    pub fn place(&self, buffers: &Buffers, offset: u64, write: bool) -> Option<(RawFd, u64)> {
        match &self.content {
            Content::Raw(raw) => raw.takes(buffers).then(|| (raw.file().as_raw_fd(), offset)),
            Content::Qcow2(image) => image.place(offset, buffers.len() as u64, write),
        }
    }

    /// Reads from byte `offset` into `buffers`, all of it, which are then empty.
    pub fn read(&self, buffers: &mut Buffers, offset: u64, bounce: &mut Bounce) -> std::io::Result<()> {
        match &self.content {
            Content::Raw(raw) => raw.read(buffers, offset, bounce),
            Content::Qcow2(image) => image.read(buffers, offset),
        }
    }

    /// Writes all of `buffers`, which are then empty, from byte `offset` on.
    pub fn write(&self, buffers: &mut Buffers, offset: u64, bounce: &mut Bounce) -> std::io::Result<()> {
        match &self.content {
            Content::Raw(raw) => raw.write(buffers, offset, bounce),
            Content::Qcow2(image) => image.write(buffers, offset),
        }
    }

    /// Hands everything written to the host; `durable`: returns when it is on stable storage. A flush of the
    /// guest's is the caller's turn ([`Self::flushes`]).
    pub fn flush(&self, durable: bool) -> std::io::Result<()> {
        match &self.content {
            Content::Raw(raw) if durable => raw.sync(),
            Content::Raw(_) => Ok(()),
            Content::Qcow2(image) => image.flush(durable),
        }
    }

    /// Whose turn it is to flush, among the queues of the disk.
    pub fn flushes(&self) -> &Arc<Flushes> {
        &self.flushes
    }

    /// Gives the blocks of a range back.
    pub fn discard(&self, offset: u64, length: u64) -> std::io::Result<()> {
        match &self.content {
            Content::Raw(raw) => raw.discard(offset, length),
            Content::Qcow2(image) => image.discard(offset, length),
        }
    }

    /// Makes a range zeros; `unmap`: its blocks may be given back.
    pub fn zero(&self, offset: u64, length: u64, unmap: bool) -> std::io::Result<()> {
        match &self.content {
            Content::Raw(raw) => raw.zero(offset, length, unmap),
            Content::Qcow2(image) => image.zero(offset, length, unmap),
        }
    }
}

/// How many bytes a file or a block device has.
pub fn measure(mut file: &File, path: &Path) -> Result<u64> {
    file.seek(SeekFrom::End(0)).with_context(|| format!("find the size of disk image `{}`", path.display()))
}

/// The kind of a file whose first bytes are `head`, and what to do with it. None: the bytes are those of no other kind of
/// image, and of no compressed one.
fn container(head: &[u8]) -> Option<&'static str> {
    Some(match head {
        [b'Q', b'F', b'I', 0xfb, ..] => {
            "a qcow2 image: if it is one, say `format=qcow2` (`\"format\": \"qcow2\"`)"
        }
        [b'K', b'D', b'M', b'V', ..] => "a VMDK image: if it is one, convert it (`qemu-img convert -O raw`)",
        b"vhdxfile" => "a VHDX image: if it is one, convert it (`qemu-img convert -O raw`)",
        [0x1f, 0x8b, 8, ..] => "a file of gzip: if it is one, unpack it",
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => "a file of xz: if it is one, unpack it",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "a file of zstd: if it is one, unpack it",
        _ => return None,
    })
}

/// Says so if a raw image looks like one that is not: the guest would see the container instead of a disk. No
/// more than that, as a guest may write whatever it likes there.
fn warn_of_container(file: &File, path: &Path) {
    let mut head = [0; 8];
    let count = file.read_at(&mut head, 0).unwrap_or(0);
    if let Some(what) = container(&head[..count]) {
        log::line(format_args!(
            "disk image `{}` is used as a raw one, and begins like {what}",
            path.display()
        ));
    }
}
