//! New clusters. `imago` finds a place for them and notes it in the tables; what they hold goes there
//! without it: the data of a request, and around that what the disk had there before.

use std::io::{Error, ErrorKind, Result};
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use imago::{FormatAccess, Mapping, PreparedDataMapping};

use super::layer::Layer;
use super::tables::Tables;
use crate::virtio::buffers::Buffers;

/// So much is copied at once.
const PIECE: u64 = 64 << 10;

/// One request at a time makes new clusters, and has the room for what is copied. Locked after the
/// image's lock.
#[derive(Default)]
pub struct Growth {
    room: Mutex<Vec<u8>>,
}

/// Where new clusters are for byte `start` of the disk and what follows.
struct NewClusters<'a> {
    layer: &'a Layer,
    offset: u64,
    start: u64,
}

/// What a new cluster gets.
pub enum Data<'a> {
    /// What a guest writes, which is taken away.
    Guest(&'a mut Buffers),
    Zeros,
}

impl Data<'_> {
    fn put(&mut self, layer: &Layer, offset: u64, count: usize) -> Result<()> {
        match self {
            Self::Guest(buffers) => layer.put(buffers, offset, count),
            Self::Zeros => layer.zero(offset, count as u64),
        }
    }
}

impl Growth {
    /// Writes the front of `data`, `count` bytes at most, from byte `offset` of the disk on, where
    /// clusters are not written in place. Returns how many it were: none, if another request made them
    /// meanwhile.
    pub fn write(
        &self,
        access: &FormatAccess<Layer>,
        image: &Writable,
        data: &mut Data<'_>,
        offset: u64,
        count: usize,
    ) -> Result<usize> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        let (mapping, length) = access.get_mapping(offset, count as u64)?;
        let mut part = offset..offset + length;
        let mut is_compressed = false;
        let whole = match mapping {
            Mapping::Raw { writable: true, .. } => return Ok(0),
            // Compressed in this image: what is there cannot be read while a mapping is prepared, and `imago`
            // copies it. Each call frees what was there, which is to be committed before the next one: one call
            // takes all that follows, whatever it is now, where their table is not to be copied as well.
            Mapping::Special { layer, .. } if ptr::eq(layer, access) => {
                is_compressed = true;
                let next = (offset / image.cluster + 1) * image.cluster;
                part.end = match image.tables.has_table(offset)? {
                    true => offset + count as u64,
                    false => part.end.min(next),
                };
                part.clone()
            }
            mapping => {
                let cluster = image.cluster;
                let start = offset / cluster * cluster;
                // A table that is shared with a snapshot is copied first, which may free clusters of others: a
                // second cluster of the same call could bring tables that take their place.
                // Zeros may have a cluster already, which `imago` frees if it does not follow on the one before.
                let is_one = matches!(mapping, Mapping::Zero { explicit: true, .. }) || image.has_snapshots;
                let end = if is_one { start + cluster } else { part.end.next_multiple_of(cluster) };
                start..end.min(access.size())
            }
        };
        let prepared = image.prepare(access, &whole)?;
        let clusters =
            NewClusters { layer: prepared.storage(), offset: prepared.offset(), start: whole.start };
        clusters.layer.check(clusters.offset, prepared.length())?;
        image.tables.release(clusters.offset..clusters.offset + prepared.length())?;
        let whole = whole.start..whole.start + prepared.length();
        let part = part.start..part.end.min(whole.end);
        clusters.surround(access, &whole, &part, &mut room)?;
        let count = (part.end - part.start) as usize;
        data.put(clusters.layer, clusters.at(part.start), count)?;
        if is_compressed {
            image.tables.note_freed();
        }
        access.commit_data_mapping(prepared)?;
        Ok(count)
    }

    /// Puts the tables into the file, while no request makes new clusters; `last`: returns when everything
    /// is on stable storage.
    pub fn commit(&self, access: &FormatAccess<Layer>, image: &Writable, last: bool) -> Result<()> {
        let _alone = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        image.commit(access, last)
    }
}

/// An image that is written.
pub struct Writable {
    pub tables: Arc<Tables>,
    /// Bytes per cluster.
    pub cluster: u64,
    pub has_snapshots: bool,
}

impl Writable {
    fn commit(&self, access: &FormatAccess<Layer>, last: bool) -> Result<()> {
        access.flush()?;
        self.tables.commit(last)
    }

    /// Finds a place for a range of the disk: clusters that the file does not name. Dropped before it is
    /// committed, it gives the clusters back.
    fn prepare<'a>(
        &self,
        access: &'a FormatAccess<Layer>,
        range: &Range<u64>,
    ) -> Result<PreparedDataMapping<'a, Layer>> {
        for _ in 0..TRIES {
            if self.tables.may_allocate() {
                let prepared = access.prepare_data_mapping(range.start, range.end - range.start, true)?;
                if self.tables.may_allocate() {
                    return Ok(prepared);
                }
                self.tables.forget(prepared.offset()..prepared.offset() + prepared.length());
            }
            self.commit(access, false)?;
        }
        Err(Error::other("its tables do not settle: `qemu-img check` it"))
    }
}

/// What was freed before is written at the first, tables that were moved at the second.
const TRIES: usize = 4;

impl NewClusters<'_> {
    /// Where byte `at` of the disk will be.
    fn at(&self, at: u64) -> u64 {
        self.offset + (at - self.start)
    }

    /// Puts what the disk has in `whole` there, around `data`, which is yet to be written.
    fn surround(
        &self,
        access: &FormatAccess<Layer>,
        whole: &Range<u64>,
        data: &Range<u64>,
        room: &mut Vec<u8>,
    ) -> Result<()> {
        if data == whole {
            return Ok(());
        }
        let length = whole.end - whole.start;
        match access.get_mapping(whole.start, length)? {
            (Mapping::Zero { .. }, given) if given == length => self.layer.zero(self.offset, length),
            _ => {
                self.copy(access, whole.start..data.start, room)?;
                self.copy(access, data.end..whole.end, room)
            }
        }
    }

    /// Copies what the disk has in `range`, which is not compressed in this image.
    fn copy(&self, access: &FormatAccess<Layer>, range: Range<u64>, room: &mut Vec<u8>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let (mapping, length) = access.get_mapping(at, (range.end - at).min(PIECE))?;
            room.resize(PIECE as usize, 0);
            let piece = &mut room[..length as usize];
            match mapping {
                _ if length == 0 => return Err(ErrorKind::UnexpectedEof.into()),
                Mapping::Zero { .. } => self.layer.zero(self.at(at), length)?,
                Mapping::Raw { storage, offset, .. } => {
                    storage.read(piece, offset)?;
                    self.layer.write(piece, self.at(at))?;
                }
                // Compressed in an image beneath.
                _ => {
                    access.read(&mut *piece, at)?;
                    self.layer.write(piece, self.at(at))?;
                }
            }
            at += length;
        }
        Ok(())
    }
}
