//! One file of a qcow2 chain, as `imago` reads and writes it. It can open nothing: what an image
//! names is opened by `chain`, or not at all.

use std::fmt;
use std::fs::File;
use std::io::Result;
use std::ops::Deref;
use std::sync::Arc;

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;

use super::header;
use super::medium::Medium;
use super::tables::Tables;
use crate::descriptors::Named;

/// An open file, and the bookkeeping that `imago` keeps with it.
pub struct Layer {
    medium: Arc<Medium>,
    kind: LayerKind,
    writes: CommonStorageHelper,
}

enum LayerKind {
    /// Anything: it is only read, as it is.
    Raw,
    /// A qcow2 image that is only read. `imago` does not see the marks that forbid no more than writing.
    Marked,
    /// A qcow2 image that is written: its tables are held until they may be in the file.
    Writable(Arc<Tables>),
}

/// `imago` asks for it. The tables of an image would be megabytes of text.
impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Layer")
    }
}

impl Layer {
    /// A raw file that is only read.
    pub fn raw(file: Named<File>) -> Self {
        Self::new(Arc::new(Medium::new(file, 0)), LayerKind::Raw)
    }

    /// A qcow2 image that is only read; `is_marked`: as one that must not be written.
    pub fn image(file: Named<File>, is_marked: bool) -> Self {
        // Version 2 has no marks, and other things in their place.
        Self::new(Arc::new(Medium::new(file, 0)), if is_marked { LayerKind::Marked } else { LayerKind::Raw })
    }

    /// A qcow2 image that is written.
    pub fn writable(tables: Arc<Tables>) -> Self {
        Self::new(tables.medium().clone(), LayerKind::Writable(tables))
    }

    fn new(medium: Arc<Medium>, kind: LayerKind) -> Self {
        Self { medium, kind, writes: CommonStorageHelper::default() }
    }
}

impl Deref for Layer {
    type Target = Medium;

    fn deref(&self) -> &Medium {
        &self.medium
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("file")
    }
}

#[allow(unsafe_code)]
impl Storage for Layer {
    fn size(&self) -> Result<u64> {
        self.medium.size()
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, mut offset: u64) -> Result<()> {
        for mut slice in bufv.into_inner() {
            match &self.kind {
                LayerKind::Writable(tables) => tables.read(&mut slice, offset)?,
                _ => self.medium.read(&mut slice, offset)?,
            }
            match self.kind {
                LayerKind::Raw => {}
                LayerKind::Marked => header::hide_marks(&mut slice, offset),
                LayerKind::Writable(_) => self.medium.hide_claims(&mut slice, offset),
            }
            offset += slice.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, mut offset: u64) -> Result<()> {
        for slice in bufv.into_inner() {
            match &self.kind {
                LayerKind::Writable(tables) => tables.take(&slice, offset)?,
                _ => self.medium.write(&slice, offset)?,
            }
            offset += slice.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> Result<()> {
        match &self.kind {
            // A part of a cluster.
            LayerKind::Writable(tables) => tables.take(&vec![0; length as usize], offset),
            _ => self.medium.zero(offset, length),
        }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> Result<()> {
        self.medium.punch(offset, length)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.medium.sync()
    }

    unsafe fn invalidate_cache(&self) -> Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.writes
    }

    fn resize(&self, new_size: u64, _mode: PreallocateMode) -> Result<()> {
        self.medium.resize(new_size)
    }
}
