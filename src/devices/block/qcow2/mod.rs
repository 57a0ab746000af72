//! A qcow2 image with those beneath it, by `imago`. Where a cluster is, or a new one is to be, `imago`
//! says; its data then goes between the file and guest memory without it. Compressed clusters and the
//! tables are its own.
//!
//! An image is sound, with all that was flushed, after a kill at any instruction and after a power cut that
//! leaves any part of what was written since the last sync. `imago` alone does not keep an order that gives
//! this, so the tables that it writes are held in memory (`tables`), and a commit brings them to the file:
//!
//! 1. New tables, which nothing names yet, and blocks of reference counts, in which no count is lowered
//!    yet; a sync, for these and all data.
//! 2. What names new blocks of reference counts: entries of their table, the header; a sync, if there are any.
//! 3. Entries of the tables that name clusters, each of which is true whether the others are there or not;
//!    a sync, if the commit is a flush, or something is lowered.
//! 4. Counts that are lowered. Lost, they are clusters that nothing uses: `qemu-img check -r leaks`.
//!
//! This holds because a commit never names anew what the file still names: once a cluster was freed,
//! all is committed before the next one is allocated. A flush commits, as a pause and the end do, and 16 MiB
//! of tables. It costs two syncs where new clusters were written, one else. With the cache type `Unsafe` there
//! are no syncs: the order then holds for a kill, not for a power cut. No mark in the header is needed, and
//! versions 2 and 3, with `lazy_refcounts` and without, are the same.

mod chain;
#[cfg(test)]
mod cuts;
mod growth;
mod header;
mod layer;
mod medium;
#[cfg(test)]
mod model;
mod overlay;
mod tables;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{ErrorKind, Result as IoResult};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::{FormatAccess, Mapping};

use super::config::{Backing, CacheType, Config};
use super::image::measure;
use crate::descriptors::Named;
use crate::error::{Context, Result};
use crate::host::{Access, Host};
use crate::virtio::buffers::Buffers;
use chain::Chain;
use growth::{Data, Growth, Writable};
use header::Header;
use layer::Layer;
use medium::Medium;
pub use overlay::Overlay;
use tables::Tables;

/// An open image.
pub struct Qcow2 {
    /// Requests on several threads only read the lock; what takes clusters away writes it.
    access: RwLock<FormatAccess<Layer>>,
    growth: Growth,
    /// The topmost file, a second time: `imago` keeps its own.
    file: Named<File>,
    /// The images beneath it, the next one first.
    beneath: Vec<Backing>,
    /// Bytes per cluster, and the version of the format.
    cluster: u64,
    version: u32,
    /// None: it is only read.
    writable: Option<Writable>,
}

/// Refuses a file that does not begin as a qcow2 image: a wrong format is told where the disk is configured.
///
/// # Errors
/// The file begins otherwise, or cannot be read.
pub fn look(file: &File) -> Result<()> {
    let mut head = [0; 8];
    let count = file.read_at(&mut head, 0).context("read its header")?;
    header::check_kind(&head[..count])
}

impl Qcow2 {
    /// The image in `file`, and those beneath it.
    pub fn open(config: &Config, file: Named<File>, host: &mut Host) -> Result<Self> {
        let (what, path, access) = config.file();
        let header = Header::read(&file, measure(&file, path)?, access)?;
        let own = file.try_clone().context("duplicate a descriptor")?;
        let chain = Chain::new(&what, host, config.lock, path, config.backing.as_deref())?;
        let writable = (access == Access::ReadWrite).then(|| {
            let durable = config.cache_type == CacheType::Writeback;
            let medium = Medium::new(file.try_clone()?, header.end);
            let medium = if header.has_autoclear { medium.with_claims(durable) } else { medium };
            let tables = Arc::new(Tables::new(Arc::new(medium), &header, durable));
            Ok::<_, std::io::Error>(Writable {
                tables,
                cluster: header.cluster,
                has_snapshots: header.has_snapshots,
            })
        });
        let writable = writable.transpose().context("duplicate a descriptor")?;
        let layer = match &writable {
            Some(writable) => Layer::writable(writable.tables.clone()),
            None => {
                header.warn(path);
                Layer::image(file, header.mark.is_some())
            }
        };
        let (image, beneath) = chain.open(layer, path, access)?;
        let Header { cluster, version, .. } = header;
        Ok(Self {
            access: RwLock::new(image),
            growth: Growth::default(),
            file: own,
            beneath,
            cluster,
            version,
            writable,
        })
    }

    /// The same image, as it is in the file now. The caller promises that nothing is in flight.
    pub fn again(&self, config: &Config, host: &mut Host) -> Result<Self> {
        self.write_out().context("write its tables")?;
        Self::open(config, self.file.try_clone().context("duplicate a descriptor")?, host)
    }

    /// Writes the tables for whoever opens the file next, also after a sync that failed.
    fn write_out(&self) -> IoResult<()> {
        if let Some(writable) = &self.writable {
            writable.tables.medium().try_again();
        }
        self.flush(false)
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

    /// The images beneath it, the next one first.
    pub fn beneath(&self) -> &[Backing] {
        &self.beneath
    }

    /// The size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.shared().size()
    }

    /// What can be given back at once: a cluster. Version 2 has no way to say that one is zero.
    pub fn hole(&self) -> Option<u64> {
        (self.version >= 3).then_some(self.cluster)
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
                    access.readv(buffers.front(count).into(), offset)?;
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
                    storage.put(buffers, offset, count)?;
                    count
                }
                _ => {
                    let rest = buffers.len();
                    self.grow(&access, &mut Data::Guest(buffers), offset, rest)?
                }
            };
            offset += written as u64;
        }
        Ok(())
    }

    fn writable(&self) -> IoResult<&Writable> {
        self.writable.as_ref().ok_or_else(|| ErrorKind::ReadOnlyFilesystem.into())
    }

    fn grow(
        &self,
        access: &FormatAccess<Layer>,
        data: &mut Data<'_>,
        offset: u64,
        count: usize,
    ) -> IoResult<usize> {
        self.growth.write(access, self.writable()?, data, offset, count)
    }

    /// Writes the tables; `durable`: returns when everything is on stable storage.
    pub fn flush(&self, durable: bool) -> IoResult<()> {
        match &self.writable {
            Some(writable) => self.growth.commit(&self.shared(), writable, durable),
            None => Ok(()),
        }
    }

    /// Gives whole clusters back, to the image and to the host: they read as zeros then.
    pub fn discard(&self, offset: u64, length: u64) -> IoResult<()> {
        let cluster = self.cluster;
        let (start, end) = (offset.next_multiple_of(cluster), (offset + length) / cluster * cluster);
        let writable = self.writable()?;
        let mut access = self.alone();
        // What takes new tables comes first: afterwards they would have to wait for what is freed.
        for own in [false, true] {
            let mut at = start;
            while at < end {
                let (mapping, length) = access.get_mapping(at, end - at)?;
                if length == 0 {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                let (place, is_own) = match mapping {
                    Mapping::Raw { offset, writable: true, .. } => (Some(offset), true),
                    Mapping::Raw { .. } => (None, false),
                    Mapping::Special { layer, .. } => (None, std::ptr::eq(layer, &*access)),
                    // Nothing to give back.
                    _ => (None, !own),
                };
                if is_own == own {
                    self.discard_piece(writable, &mut access, at, length, place)?;
                }
                at += length;
            }
        }
        Ok(())
    }

    /// Commits, if that must come before the table that tells of byte `at` is changed: where the table itself
    /// needs a new cluster, or as much is held as may be. What is freed alone needs none: one request may free
    /// many thousands of clusters.
    fn make_room(&self, writable: &Writable, access: &FormatAccess<Layer>, at: u64) -> IoResult<()> {
        let tables = &writable.tables;
        if tables.is_full() || !tables.may_allocate() && !tables.has_table(at)? {
            self.growth.commit(access, writable, false)?;
        }
        Ok(())
    }

    /// Gives clusters back of which one table tells; `place`: where they are, if they are this image's alone.
    fn discard_piece(
        &self,
        writable: &Writable,
        access: &mut FormatAccess<Layer>,
        at: u64,
        length: u64,
        place: Option<u64>,
    ) -> IoResult<()> {
        self.make_room(writable, access, at)?;
        let is_compressed = matches!(access.get_mapping(at, length)?, (Mapping::Special { .. }, _));
        if place.is_some() || is_compressed {
            writable.tables.note_freed();
        }
        access.discard_to_any(at, length)?;
        // `imago` only notes that the clusters are free.
        let (mapping, freed) = access.get_mapping(at, length)?;
        if let (Some(place), Mapping::Zero { .. }) = (place, mapping) {
            match writable.tables.medium().punch(place, freed) {
                // What is beneath takes nothing back: the image alone has it free.
                Err(error) if error.kind() == ErrorKind::Unsupported => {}
                result => result?,
            }
        }
        Ok(())
    }

    /// Makes a range zeros; `unmap`: its clusters may be given back.
    pub fn zero(&self, offset: u64, length: u64, unmap: bool) -> IoResult<()> {
        if unmap {
            self.discard(offset, length)?;
        }
        let writable = self.writable()?;
        let access = self.alone();
        let (mut at, end, cluster) = (offset, offset + length, self.cluster);
        while at < end {
            let inner = at.is_multiple_of(cluster) && end - at >= cluster;
            let next = if inner { end / cluster * cluster } else { end.min((at / cluster + 1) * cluster) };
            // What one table tells.
            let (mapping, given) = access.get_mapping(at, next - at)?;
            at += match mapping {
                _ if given == 0 => return Err(ErrorKind::UnexpectedEof.into()),
                Mapping::Zero { .. } => given,
                mapping if inner => {
                    self.make_room(writable, &access, at)?;
                    if let Mapping::Special { .. } = mapping {
                        writable.tables.note_freed();
                    }
                    access.write_zeroes(at, given)?;
                    given
                }
                Mapping::Raw { storage, offset, writable: true, .. } => {
                    match storage.zero_in_place(offset, given) {
                        // The host cannot.
                        Err(error) if error.kind() == ErrorKind::Unsupported => {
                            storage.zero(offset, given)?;
                        }
                        result => result?,
                    }
                    given
                }
                _ => self.grow(&access, &mut Data::Zeros, at, given as usize)? as u64,
            };
        }
        Ok(())
    }
}

/// What is left to do when a worker that wrote here is gone.
impl Drop for Qcow2 {
    fn drop(&mut self) {
        if let Err(error) = self.write_out() {
            crate::log::error(format_args!(
                "write the tables of a qcow2 image: {error}: `qemu-img check` it"
            ));
        }
    }
}
