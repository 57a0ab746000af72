//! The file that pages of a region come from, and what it holds for them.

use std::fs::File;
use std::io::Result as IoResult;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;

use super::mapping::{Mapping, Pages, memory_file};
use super::{Piece, Range};
use crate::descriptors::Named;
use crate::error::{Context, Result};

/// The file behind a region, and which parts of the region it has the content of.
#[derive(Debug)]
pub struct Backing {
    file: Named<File>,
    /// Those of this region alone.
    pieces: Vec<Piece>,
    pages: Pages,
}

impl Backing {
    /// A file of zeros without a name, that another process can map, too.
    pub(super) fn shared(range: Range) -> Result<Self> {
        let attempt = || format!("map {} MiB of guest memory in a file", range.size >> 20);
        let file = memory_file(range.size).with_context(attempt)?;
        let file = Named::new(format!("guest memory at {:#x}", range.start), file);
        Ok(Self { file, pieces: vec![Piece { range, position: 0 }], pages: Pages::OfFile })
    }

    /// The pieces of `file` that are for `range`; what is written to them is this process's own.
    pub(super) fn private(range: Range, file: &File, pieces: &[Piece]) -> Result<Self> {
        let file = file.try_clone().context("keep the file of guest memory open")?;
        let file = Named::new(format!("file of guest memory at {:#x}", range.start), file);
        let pieces = pieces.iter().filter(|piece| range.contains(piece.range)).copied().collect();
        Ok(Self { file, pieces, pages: Pages::Private })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Which parts of its region it has, and where.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The file, and how long it must be at least, in bytes.
    pub(super) fn extent(&self) -> (RawFd, u64) {
        let ends = self.pieces.iter().map(|Piece { range, position }| position + range.size);
        (self.file.as_raw_fd(), ends.max().unwrap_or(0))
    }

    /// Shows the pieces in the mapping of the region at `range`.
    pub(super) fn show(&self, range: Range, mapping: &Mapping) -> Result<()> {
        for Piece { range: piece, position } in &self.pieces {
            let offset = (piece.start - range.start) as usize;
            mapping
                .show(offset, piece.size as usize, &self.file, *position, self.pages)
                .with_context(|| format!("map {piece} of guest memory from its file"))?;
        }
        Ok(())
    }

    /// The file, if another process can map it for the same pages, from its beginning.
    pub(super) fn shared_file(&self) -> Option<&File> {
        (self.pages == Pages::OfFile).then_some(&*self.file)
    }

    /// Fills `bytes` with what the file holds for the guest's addresses from `start` on. What it has nothing for is
    /// left as it is.
    ///
    /// # Errors
    /// The file cannot be read, or was made shorter.
    pub fn read(&self, start: u64, bytes: &mut [u8]) -> IoResult<()> {
        let end = start + bytes.len() as u64;
        for Piece { range, position } in &self.pieces {
            let (from, to) = (range.start.max(start), range.end().min(end));
            if from < to {
                let part = &mut bytes[(from - start) as usize..(to - start) as usize];
                // Nobody may take what is gone from the file for zeros.
                self.file.read_exact_at(part, position + (from - range.start))?;
            }
        }
        Ok(())
    }
}
