//! A raw image: the disk itself, byte for byte, through the host's page cache or past it.

use std::fs::File;
use std::io::Result;

use super::SECTOR;
use super::bounce::Bounce;
use super::{device, holes};
use crate::descriptors::Named;
use crate::error::{self, Context};
use crate::sys::descriptor;
use crate::virtio::buffers::Buffers;

/// What the host wants of reads and writes past its page cache, in bytes: powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of addresses and lengths in memory.
    pub memory: usize,
    /// Of offsets and lengths in the file.
    pub block: u64,
}

/// Enough for every disk of today.
const COMMON: Alignment = Alignment { memory: 4096, block: 4096 };

/// The file of a raw image.
pub struct Raw {
    file: Named<File>,
    /// The smallest piece that can be read or written.
    block: u64,
    direct: Option<Alignment>,
}

impl Raw {
    /// Through the page cache.
    pub fn new(file: Named<File>) -> Self {
        // The page cache takes any piece, but what is to be given back is to be whole blocks.
        let block = device::block(&file).unwrap_or(SECTOR);
        Self { file, block, direct: None }
    }

    /// Past the page cache.
    pub fn direct(file: Named<File>) -> error::Result<Self> {
        set_direct(&file).context(
            "use it past the page cache (`direct_io`): its file system may not support that, leave it out",
        )?;
        let direct = alignment(&file).unwrap_or(COMMON);
        let block = direct.block.max(SECTOR);
        Ok(Self { file, block, direct: Some(direct) })
    }

    /// The same file, through another descriptor.
    pub fn try_clone(&self) -> Result<Self> {
        Ok(Self { file: self.file.try_clone()?, block: self.block, direct: self.direct })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The smallest piece that can be read or written.
    pub fn block(&self) -> u64 {
        self.block
    }

    /// Whether the host takes these buffers as they are.
    pub fn takes(&self, buffers: &Buffers) -> bool {
        self.direct.is_none_or(|direct| buffers.are_aligned(direct.memory))
    }

    /// Reads from byte `offset` into all of `buffers`.
    pub fn read(&self, buffers: &mut Buffers, mut offset: u64, bounce: &mut Bounce) -> Result<()> {
        if self.takes(buffers) {
            return buffers.read_at(&self.file, offset);
        }
        while !buffers.is_empty() {
            let piece = bounce.piece(buffers.len());
            std::os::unix::fs::FileExt::read_exact_at(&*self.file, piece, offset)?;
            buffers.copy_from(0, piece);
            offset += piece.len() as u64;
            buffers.advance(piece.len());
        }
        Ok(())
    }

    /// Writes all of `buffers` from byte `offset` on.
    pub fn write(&self, buffers: &mut Buffers, mut offset: u64, bounce: &mut Bounce) -> Result<()> {
        if self.takes(buffers) {
            return buffers.write_at(&self.file, offset);
        }
        while !buffers.is_empty() {
            let piece = bounce.piece(buffers.len());
            buffers.read_front(piece);
            std::os::unix::fs::FileExt::write_all_at(&*self.file, piece, offset)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Returns when everything written is on stable storage.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data()
    }

    /// Gives the blocks of a range back.
    pub fn discard(&self, offset: u64, length: u64) -> Result<()> {
        holes::punch(&self.file, offset, length)
    }

    /// Makes a range zeros.
    pub fn zero(&self, offset: u64, length: u64, unmap: bool) -> Result<()> {
        holes::zero(&self.file, offset, length, unmap)
    }
}

fn set_direct(file: &File) -> Result<()> {
    descriptor::set_status(file, descriptor::status(file)? | libc::O_DIRECT)
}

/// What the kernel says (since Linux 6.1).
fn alignment(file: &File) -> Option<Alignment> {
    descriptor::direct_alignment(file).map(|(memory, block)| Alignment {
        // Pieces of a vector are whole sectors, whatever smaller the host would take.
        memory: memory.max(SECTOR as u32) as usize,
        block: block.into(),
    })
}
