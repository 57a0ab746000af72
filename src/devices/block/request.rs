//! One request of a block device (virtio 1.2, 5.2.6): header, data, status.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::bounce::Bounce;
use super::image::Image;
use super::{Metrics, SECTOR};
use crate::error::Result;
use crate::limiter::Limiter;
use crate::memory::Memory;
use crate::virtio::Chain;
use crate::virtio::buffers::{Buffers, Byte};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// So many bytes in one request: descriptors that name the same memory again and again would make it as
/// long as the disk, and a pause would wait for it. No driver asks for more (EDK II's limit is this).
pub const DATA_MAX: u64 = 1 << 30;
/// So many ranges in one discard or write of zeros: they are looked at before anything is done.
pub const RANGES_MAX: u32 = 16;
/// So many sectors in one range to discard, 1 GiB: a file system takes its time to free them.
pub const DISCARD_SECTORS_MAX: u32 = 2 << 20;
/// So many sectors in one range to be zeros, 64 MiB: a host's disk may have to write them.
pub const ZERO_SECTORS_MAX: u32 = 128 << 10;
/// struct virtio_blk_discard_write_zeroes: sector, sectors, flags.
const RANGE_LENGTH: usize = 16;
const UNMAP: u32 = 1;

/// The length of the answer to GET_ID.
const ID_LENGTH: usize = 20;

/// Status codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    Read,
    Write,
    Flush,
    Discard,
    Zero,
    Id,
}

impl RequestKind {
    /// For log lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::Zero => "write zeroes",
            Self::Id => "tell its name",
        }
    }
}

/// A range of bytes to give back or to make zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub length: u64,
    pub unmap: bool,
}

/// A request on its way; afterwards its memory is used for the next one.
pub struct Request {
    pub head: u16,
    pub kind: RequestKind,
    /// What is left to be read or written, and where on the disk.
    pub data: Buffers,
    pub offset: u64,
    /// What is left to be given back or made zeros, the first one last.
    pub ranges: Vec<Extent>,
    status: Option<Byte>,
    /// How many bytes the guest gets if all is well, the status among them.
    answer: u32,
    /// How many bytes of data it has, for limits and metrics.
    pub length: u64,
    pub begun: Instant,
}

/// What a request's descriptors name, before it is known what they are for.
pub struct Scratch {
    readable: Buffers,
    writable: Buffers,
}

impl Scratch {
    pub fn new(memory: &Memory) -> Self {
        // Most requests have two of each kind at most.
        let buffers = || {
            let mut buffers = Buffers::new(memory.clone());
            buffers.reserve(2);
            buffers
        };
        Self { readable: buffers(), writable: buffers() }
    }
}

impl Request {
    pub fn new(memory: &Memory) -> Self {
        Self {
            head: 0,
            kind: RequestKind::Flush,
            data: Buffers::new(memory.clone()),
            offset: 0,
            ranges: Vec::new(),
            status: None,
            answer: 0,
            length: 0,
            begun: Instant::now(),
        }
    }

    /// Takes what `chain` asks for; Ok(Err): it is refused, and only to be answered.
    pub fn take(&mut self, chain: Chain<'_>, scratch: &mut Scratch, disk: &Disk) -> Result<Result<(), Code>> {
        self.head = chain.head();
        (self.status, self.answer) = (None, 0);
        let Scratch { readable, writable } = scratch;
        Buffers::split(chain, readable, writable)?;
        self.status = writable.take_last();
        let mut header = [0; 16];
        if self.status.is_none() || !readable.read_front(&mut header) {
            return Ok(Err(Code::IoError));
        }
        self.answer = writable.len() as u32 + 1;
        let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
        let may_write = !disk.read_only;
        self.kind = match u32::from_le_bytes(header[..4].try_into().expect("4 bytes")) {
            IN => RequestKind::Read,
            OUT if may_write => RequestKind::Write,
            DISCARD if may_write && disk.image.hole().is_some() => RequestKind::Discard,
            WRITE_ZEROES if may_write && disk.image.hole().is_some() => RequestKind::Zero,
            FLUSH => RequestKind::Flush,
            GET_ID => RequestKind::Id,
            OUT => return Ok(Err(Code::IoError)),
            _ => return Ok(Err(Code::Unsupported)),
        };
        self.data.take(if self.kind == RequestKind::Read || self.kind == RequestKind::Id {
            writable
        } else {
            readable
        });
        self.length = self.data.len() as u64;
        if self.length > DATA_MAX {
            return Ok(Err(Code::IoError));
        }
        Ok(match self.kind {
            RequestKind::Read | RequestKind::Write => {
                let place = place(&disk.image, sector, self.length);
                place.map(|offset| self.offset = offset).ok_or(Code::IoError)
            }
            RequestKind::Discard | RequestKind::Zero => self.take_ranges(&disk.image),
            RequestKind::Flush | RequestKind::Id => Ok(()),
        })
    }

    fn take_ranges(&mut self, image: &Image) -> Result<(), Code> {
        self.ranges.clear();
        let count = self.data.len() / RANGE_LENGTH;
        if count > RANGES_MAX as usize || !self.data.len().is_multiple_of(RANGE_LENGTH) {
            return Err(Code::IoError);
        }
        let max = if self.kind == RequestKind::Zero { ZERO_SECTORS_MAX } else { DISCARD_SECTORS_MAX };
        for _ in 0..count {
            let mut range = [0; RANGE_LENGTH];
            self.data.read_front(&mut range);
            let word = |at: usize| u32::from_le_bytes(range[at..at + 4].try_into().expect("4 bytes"));
            let sector = u64::from_le_bytes(range[..8].try_into().expect("8 bytes"));
            let (sectors, flags) = (word(8), word(12));
            // 5.2.6.2: a discard with `unmap`, or with flags that are reserved.
            if flags & !UNMAP != 0 || flags & UNMAP != 0 && self.kind == RequestKind::Discard {
                return Err(Code::Unsupported);
            }
            let length = u64::from(sectors) * SECTOR;
            let offset = place(image, sector, length).filter(|_| sectors <= max).ok_or(Code::IoError)?;
            if length > 0 {
                self.ranges.push(Extent { offset, length, unmap: flags & UNMAP != 0 });
            }
        }
        self.ranges.reverse();
        Ok(())
    }

    /// How many bytes of the disk are left to be read, written, given back or made zeros.
    pub fn extent(&self) -> u64 {
        match self.kind {
            RequestKind::Discard | RequestKind::Zero => self.ranges.iter().map(|range| range.length).sum(),
            _ => self.data.len() as u64,
        }
    }

    /// Does what is left of it, here and now.
    pub fn perform(&mut self, disk: &Disk, bounce: &mut Bounce) -> std::io::Result<()> {
        let image = &disk.image;
        match self.kind {
            RequestKind::Read => image.read(&mut self.data, self.offset, bounce),
            RequestKind::Write => image.write(&mut self.data, self.offset, bounce),
            RequestKind::Flush => image.flush(disk.durable),
            RequestKind::Discard | RequestKind::Zero => {
                while let Some(Extent { offset, length, unmap }) = self.ranges.pop() {
                    match self.kind {
                        RequestKind::Zero => image.zero(offset, length, unmap)?,
                        _ => image.discard(offset, length)?,
                    }
                }
                Ok(())
            }
            RequestKind::Id => {
                let mut id = [0; ID_LENGTH];
                let count = disk.id.len().min(ID_LENGTH);
                id[..count].copy_from_slice(&disk.id.as_bytes()[..count]);
                self.data.copy_from(0, &id);
                // The driver is told that all of its buffer was written.
                self.data.advance(ID_LENGTH.min(self.data.len()));
                self.data.zero(self.data.len());
                Ok(())
            }
        }
    }

    /// Writes its status; returns how many bytes the guest gets.
    pub fn answer(&self, code: Code) -> u32 {
        let Some(status) = self.status else { return 0 };
        self.data.write_byte(status, code as u8);
        if code == Code::Ok { self.answer } else { 1 }
    }
}

/// What requests are done on; all workers of a device share it.
pub struct Disk {
    pub image: Arc<Image>,
    pub memory: Memory,
    pub id: String,
    pub read_only: bool,
    /// How many queues work on it at the same time.
    pub workers: u16,
    /// A flush is answered when all is on stable storage.
    pub durable: bool,
    /// None: there are no limits.
    pub limiter: Option<Arc<Mutex<Limiter>>>,
    pub metrics: Arc<Metrics>,
}

/// The byte offset of a transfer that lies within the disk, and in whole blocks.
fn place(image: &Image, sector: u64, length: u64) -> Option<u64> {
    let end = sector.checked_add(length / SECTOR)?;
    let offset = sector.checked_mul(SECTOR)?;
    (length | offset).is_multiple_of(image.block()).then_some(offset).filter(|_| end <= image.sectors())
}
