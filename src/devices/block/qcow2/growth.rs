//! New clusters. `imago` finds a place for them and notes it in the tables; what they hold goes there
//! without it: the data of a request, and around that what the disk had there before.

use std::io::{ErrorKind, Result};
use std::ops::Range;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use imago::{FormatAccess, Mapping};

use super::layer::Layer;
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
struct Place<'a> {
    layer: &'a Layer,
    offset: u64,
    start: u64,
}

impl Growth {
    /// Writes the front of `buffers`, `count` bytes at most, from byte `offset` of the disk on, where
    /// clusters of `cluster` bytes are not written in place. Returns how many it were: none, if another
    /// request made them meanwhile.
    pub fn write(
        &self,
        access: &FormatAccess<Layer>,
        cluster: u64,
        buffers: &mut Buffers,
        offset: u64,
        count: usize,
    ) -> Result<usize> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        let (mapping, length) = access.get_mapping(offset, count as u64)?;
        let data = offset..offset + length;
        let whole = match mapping {
            Mapping::Raw { writable: true, .. } => return Ok(0),
            // Compressed in this image: what is there cannot be read while a mapping is prepared.
            Mapping::Special { layer, .. } if ptr::eq(layer, access) => data.clone(),
            _ => offset / cluster * cluster..data.end.next_multiple_of(cluster).min(access.size()),
        };
        // Dropped before it is committed, it gives the clusters back.
        let prepared = access.prepare_data_mapping(whole.start, whole.end - whole.start, true)?;
        let place = Place { layer: prepared.storage(), offset: prepared.offset(), start: whole.start };
        place.layer.check(place.offset, prepared.length())?;
        let whole = whole.start..whole.start + prepared.length();
        let data = data.start..data.end.min(whole.end);
        place.surround(access, &whole, &data, &mut room)?;
        let count = (data.end - data.start) as usize;
        buffers.write_some_at(place.layer.file(), place.at(data.start), count)?;
        access.commit_data_mapping(prepared)?;
        Ok(count)
    }
}

impl Place<'_> {
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
