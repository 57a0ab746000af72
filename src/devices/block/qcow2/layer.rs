//! One file of a qcow2 chain, as `imago` reads and writes it. It can open nothing: what an image
//! names is opened by `chain`, or not at all.

use std::fmt;
use std::fs::File;
use std::io::{Error, ErrorKind, Result, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;

use crate::devices::block::holes;

/// What is written where no holes can be.
static ZEROS: [u8; 4096] = [0; 4096];

/// An open file, and the bookkeeping that `imago` keeps with it.
#[derive(Debug)]
pub struct Layer {
    file: File,
    /// The file never becomes longer. A damaged table may name a place a million gigabytes away.
    end: u64,
    writes: CommonStorageHelper,
}

impl Layer {
    /// A file that is only read.
    pub fn read_only(file: File) -> Self {
        Self::new(file, 0)
    }

    /// A file that is written up to `end`.
    pub fn new(file: File, end: u64) -> Self {
        Self { file, end, writes: CommonStorageHelper::default() }
    }

    /// Whether it can be written there.
    pub fn check(&self, offset: u64, length: u64) -> Result<()> {
        match offset.checked_add(length).is_some_and(|end| end <= self.end) {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::FileTooLarge,
                format!(
                    "its tables name byte {offset} of the file, which sound ones keep below {}: \
                     `qemu-img check -r all` it",
                    self.end
                ),
            )),
        }
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Reads from byte `offset` on. What is beyond the end of the file reads as zeros, as `imago` asks.
    pub fn read(&self, mut rest: &mut [u8], mut offset: u64) -> Result<()> {
        while !rest.is_empty() {
            match self.file.read_at(rest, offset) {
                Ok(0) => {
                    rest.fill(0);
                    break;
                }
                Ok(count) => {
                    rest = &mut rest[count..];
                    offset += count as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes from byte `offset` on.
    pub fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.check(offset, bytes.len() as u64)?;
        self.file.write_all_at(bytes, offset)
    }

    /// Makes a range zeros; the file then reaches to its end at least.
    pub fn zero(&self, offset: u64, length: u64) -> Result<()> {
        self.check(offset, length)?;
        match holes::zero(&self.file, offset, length, true) {
            // A file system without holes.
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                let end = offset + length;
                let piece = |at: u64| &ZEROS[..ZEROS.len().min((end - at) as usize)];
                let mut pieces = (offset..end).step_by(ZEROS.len());
                pieces.try_for_each(|at| self.file.write_all_at(piece(at), at))
            }
            // A hole does not make a file longer.
            Ok(()) if self.size()? < offset + length => self.file.set_len(offset + length),
            result => result,
        }
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
        (&self.file).seek(SeekFrom::End(0))
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, mut offset: u64) -> Result<()> {
        for mut slice in bufv.into_inner() {
            self.read(&mut slice, offset)?;
            offset += slice.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, mut offset: u64) -> Result<()> {
        for slice in bufv.into_inner() {
            self.write(&slice, offset)?;
            offset += slice.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> Result<()> {
        self.zero(offset, length)
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> Result<()> {
        holes::punch(&self.file, offset, length)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.file.sync_data()
    }

    unsafe fn invalidate_cache(&self) -> Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.writes
    }

    fn resize(&self, new_size: u64, _mode: PreallocateMode) -> Result<()> {
        self.check(new_size, 0)?;
        self.file.set_len(new_size)
    }
}
