//! A qcow2 image with those beneath it, by `imago`. Where a cluster is, or a new one is to be, `imago`
//! says; its data then goes between the file and guest memory without it. Compressed clusters and the
//! tables are its own.

mod chain;
mod growth;
mod header;
mod layer;

use std::fs::File;
use std::io::{ErrorKind, IoSliceMut, Result as IoResult};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::{FormatAccess, Mapping};

use super::config::Config;
use super::holes;
use super::image::measure;
use crate::error::{Context, Result};
use crate::host::Host;
use crate::virtio::buffers::Buffers;
use chain::Chain;
use growth::Growth;
use header::Header;
use layer::Layer;

/// An open image.
pub struct Qcow2 {
    /// Requests on several threads only read the lock; what takes clusters away writes it.
    access: RwLock<FormatAccess<Layer>>,
    growth: Growth,
    /// The topmost file, a second time: `imago` keeps its own.
    file: File,
    header: Header,
}

impl Qcow2 {
    /// The image in `file`, and those beneath it.
    pub fn open(config: &Config, file: File, host: &mut dyn Host) -> Result<Self> {
        let (what, path, access) = config.file();
        let header = Header::read(&file, measure(&file, path)?, access)?;
        let own = file.try_clone().context("duplicate a descriptor")?;
        let chain = Chain::new(&what, host, path, config.backing.as_deref())?;
        let image = chain.open(file, path, access)?;
        Ok(Self { access: RwLock::new(image), growth: Growth::default(), file: own, header })
    }

    /// The same image, as it is in the file now. The caller promises that nothing is in flight.
    pub fn again(&self, config: &Config, host: &mut dyn Host) -> Result<Self> {
        self.flush(false).context("write its tables")?;
        Self::open(config, self.file.try_clone().context("duplicate a descriptor")?, host)
    }

    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<Layer>> {
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, FormatAccess<Layer>> {
        self.access.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The topmost file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.shared().size()
    }

    /// What can be given back at once: a cluster. Version 2 has no way to say that one is zero.
    pub fn hole(&self) -> Option<u64> {
        (self.header.version >= 3).then_some(self.header.cluster)
    }

    /// Where a whole range lies in one piece of one file, if it does; for a write: in a place that is
    /// written without another word in the tables.
    pub fn place(&self, offset: u64, length: u64, write: bool) -> Option<(RawFd, u64)> {
        match self.shared().get_mapping(offset, length) {
            Ok((Mapping::Raw { storage, offset, writable, .. }, given)) if given >= length => {
                let can = !write || writable && storage.check(offset, length).is_ok();
                can.then(|| (storage.file().as_raw_fd(), offset))
            }
            _ => None,
        }
    }

    /// Reads from byte `offset` into all of `buffers`.
    pub fn read(&self, buffers: &mut Buffers, mut offset: u64) -> IoResult<()> {
        let access = self.shared();
        while !buffers.is_empty() {
            let (mapping, length) = access.get_mapping(offset, buffers.len() as u64)?;
            let count = usize::try_from(length).map_or(buffers.len(), |length| length.min(buffers.len()));
            match mapping {
                _ if count == 0 => return Err(ErrorKind::UnexpectedEof.into()),
                Mapping::Raw { storage, offset, .. } => {
                    let left = buffers.len() - count;
                    match buffers.read_some_at(storage.file(), offset, count) {
                        // A last cluster of which only the front was written.
                        Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                            buffers.zero(buffers.len() - left);
                        }
                        result => result?,
                    }
                }
                Mapping::Zero { .. } => buffers.zero(count),
                _ => {
                    access.readv(front(buffers, count).into(), offset)?;
                    buffers.mark_dirty(count);
                    buffers.advance(count);
                }
            }
            offset += count as u64;
        }
        Ok(())
    }

    /// Writes all of `buffers` from byte `offset` on.
    pub fn write(&self, buffers: &mut Buffers, mut offset: u64) -> IoResult<()> {
        let access = self.shared();
        while !buffers.is_empty() {
            let (mapping, length) = access.get_mapping(offset, buffers.len() as u64)?;
            let count = usize::try_from(length).map_or(buffers.len(), |length| length.min(buffers.len()));
            let written = match mapping {
                _ if count == 0 => return Err(ErrorKind::UnexpectedEof.into()),
                Mapping::Raw { storage, offset, writable: true, .. } => {
                    storage.check(offset, count as u64)?;
                    buffers.write_some_at(storage.file(), offset, count)?;
                    count
                }
                _ => self.growth.write(&access, self.header.cluster, buffers, offset, count)?,
            };
            offset += written as u64;
        }
        Ok(())
    }

    /// Writes the tables; `durable`: returns when everything is on stable storage.
    pub fn flush(&self, durable: bool) -> IoResult<()> {
        let access = self.shared();
        access.flush()?;
        if durable { access.sync() } else { Ok(()) }
    }

    /// Gives whole clusters back, to the image and to the host: they read as zeros then.
    pub fn discard(&self, offset: u64, length: u64) -> IoResult<()> {
        let cluster = self.header.cluster;
        let (start, end) = (offset.next_multiple_of(cluster), (offset + length) / cluster * cluster);
        if start >= end {
            return Ok(());
        }
        let mut access = self.alone();
        let mut at = start;
        while at < end {
            let (mapping, length) = access.get_mapping(at, end - at)?;
            if length == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            let place = match mapping {
                Mapping::Raw { offset, writable: true, .. } => Some(offset),
                Mapping::Raw { .. } | Mapping::Special { .. } => None,
                // Nothing to give back.
                _ => {
                    at += length;
                    continue;
                }
            };
            access.discard_to_any(at, length)?;
            // `imago` only notes that the clusters are free.
            let (mapping, freed) = access.get_mapping(at, length)?;
            if let (Some(place), Mapping::Zero { .. }) = (place, mapping) {
                match holes::punch(&self.file, place, freed) {
                    // What is beneath takes nothing back: the image alone has it free.
                    Err(error) if error.kind() == ErrorKind::Unsupported => {}
                    result => result?,
                }
            }
            at += length;
        }
        Ok(())
    }

    /// Makes a range zeros; `unmap`: its clusters may be given back.
    pub fn zero(&self, offset: u64, length: u64, unmap: bool) -> IoResult<()> {
        if unmap {
            self.discard(offset, length)?;
        }
        let access = self.alone();
        let (mut at, end, cluster) = (offset, offset + length, self.header.cluster);
        while at < end {
            let inner = at.is_multiple_of(cluster) && end - at >= cluster;
            let next = if inner { end / cluster * cluster } else { end.min((at / cluster + 1) * cluster) };
            // `imago` looks at the rest of a cluster, and then makes all of it zeros: nothing may be
            // written there meanwhile.
            if inner || !zero_part(&access, at, next - at)? {
                access.write_zeroes(at, next - at)?;
            }
            at = next;
        }
        Ok(())
    }
}

/// Makes a part of a cluster zeros, where its data is; false: it has none of its own, or the host cannot.
fn zero_part(access: &FormatAccess<Layer>, at: u64, length: u64) -> IoResult<bool> {
    let (Mapping::Raw { storage, offset, writable: true, .. }, _) = access.get_mapping(at, length)? else {
        return Ok(false);
    };
    storage.check(offset, length)?;
    match holes::zero(storage.file(), offset, length, false) {
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(false),
        result => result.map(|()| true),
    }
}

/// What is left to do when a worker that wrote here is gone.
impl Drop for Qcow2 {
    fn drop(&mut self) {
        if let Err(error) = self.flush(false) {
            crate::log::line(format_args!("write the tables of a qcow2 image: {error}: `qemu-img check` it"));
        }
    }
}

/// The first `count` bytes of `buffers`.
#[allow(unsafe_code)]
fn front(buffers: &mut Buffers, count: usize) -> Vec<IoSliceMut<'_>> {
    let mut left = count;
    let piece = |vector: &libc::iovec| {
        let length = vector.iov_len.min(left);
        left -= length;
        // SAFETY: the vector is guest memory, mapped as long as the buffers live. It is only accessed
        // by system calls and plain copies; that the guest may write to it as well is its fault.
        (length > 0).then(|| unsafe { std::slice::from_raw_parts_mut(vector.iov_base.cast(), length) })
    };
    buffers.vectors().iter().map_while(piece).map(IoSliceMut::new).collect()
}
