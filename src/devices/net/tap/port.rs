//! Frames between a TAP and guest memory, many in one system call by io_uring, else one by one. A TAP
//! gives one frame to a read: so several are posted, and those that find none are given back.

use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Once;
use std::sync::atomic::AtomicU8;

use crate::host::tap::Tap;
use crate::log;
use crate::sys::vectors::{Room, Vectors};
use crate::uring::{Transfer, Uring};
use crate::virtio::pool::Pool;

/// Frames moved by one system call at most.
pub const BATCH: usize = 32;
/// A batch of so many frames is worth a ring.
const RING_FROM: usize = 4;
/// Where the byte goes by which a frame is longer than its buffer. Nobody reads it.
static BEYOND: AtomicU8 = AtomicU8::new(0);

/// One queue of a TAP. It belongs to the thread of its loop.
pub struct Port {
    tap: Tap,
    ring: Option<Uring>,
    /// The ring was made, or could not be.
    is_tried: bool,
    /// Reads that find no frame can be given back (Linux 5.19); else frames are read one by one.
    can_cancel: bool,
    /// How many bytes each frame of the last batch has; none: it was not moved.
    results: Vec<Option<usize>>,
    /// How many system calls the last batch took.
    calls: u64,
    /// The vectors of a batch of frames, each with one of a byte after it, and which are whose.
    with_beyond: (Room, Vec<Range<usize>>),
}

impl Port {
    /// Over this TAP.
    pub fn new(tap: Tap) -> Self {
        Self {
            tap,
            ring: None,
            is_tried: false,
            can_cancel: false,
            results: Vec::with_capacity(BATCH),
            calls: 0,
            with_beyond: (Room::default(), Vec::with_capacity(BATCH)),
        }
    }

    /// Whether a batch of so many frames goes by the ring. It is made when there is the first one of
    /// some size: an idle guest, one of a thousand clones, needs none. A host that forbids it only
    /// costs speed.
    fn has_ring_for(&mut self, frames: usize) -> bool {
        if !self.is_tried && frames >= RING_FROM {
            self.is_tried = true;
            self.open();
        }
        self.ring.is_some() && frames > 1
    }

    fn open(&mut self) {
        static TOLD: Once = Once::new();
        match Uring::new(BATCH as u32 + 1) {
            Ok(mut ring) => {
                self.can_cancel = ring.can_cancel();
                self.ring = Some(ring);
            }
            Err(error) => TOLD.call_once(|| {
                log::line(format_args!("network frames go one by one, which is slower: {error}"));
            }),
        }
    }

    /// The TAP.
    pub fn tap(&self) -> &Tap {
        &self.tap
    }

    /// How many bytes each frame of the last batch has; none: it was not moved.
    pub fn results(&self) -> &[Option<usize>] {
        &self.results
    }

    /// How many system calls the last batch took.
    pub fn calls(&self) -> u64 {
        self.calls
    }

    /// Reads one frame into each of these ranges of the pool's vectors, as long as there are some. The TAP
    /// cuts off what is longer, and says nothing of it: the caller knows such a frame by its length.
    pub fn read(&mut self, pool: &Pool, frames: &[Range<usize>]) {
        self.read_into(pool.vectors(), frames);
    }

    /// The same for buffers that a frame can fill to the last byte: one that is longer has one more.
    pub fn read_beyond(&mut self, pool: &Pool, frames: &[Range<usize>]) {
        let (mut room, mut ranges) = std::mem::take(&mut self.with_beyond);
        let mut list = room.scatter();
        ranges.clear();
        for range in frames {
            let start = list.count();
            list.add(pool.vectors().range(range.clone()), 0, usize::MAX);
            list.add_byte(&BEYOND);
            ranges.push(start..list.count());
        }
        self.read_into(list.vectors(), &ranges);
        self.with_beyond = (room, ranges);
    }

    fn read_into(&mut self, all: Vectors<'_>, frames: &[Range<usize>]) {
        if self.has_ring_for(frames.len()) && self.can_cancel {
            let file = self.tap.as_raw_fd();
            return self.move_all(Transfer::Read { file, offset: Transfer::NO_OFFSET }, all, frames);
        }
        self.calls = 0;
        self.results.clear();
        for range in frames {
            let moved = all.range(range.clone()).read(&self.tap).ok();
            self.calls += 1;
            self.results.push(moved);
            if moved.is_none() {
                break;
            }
        }
    }

    /// Writes one frame from each of these ranges of the pool's vectors. What the TAP does not take is
    /// lost, as on a wire: it is down, or the driver's header is wrong. A frame goes with all its vectors,
    /// always: more than it takes at once (IOV_MAX) the kernel refuses, where a part of a frame would go as
    /// another frame.
    pub fn write(&mut self, pool: &Pool, frames: &[Range<usize>]) {
        if self.has_ring_for(frames.len()) {
            let file = self.tap.as_raw_fd();
            let transfer = Transfer::Write { file, offset: Transfer::NO_OFFSET };
            return self.move_all(transfer, pool.vectors(), frames);
        }
        self.calls = 0;
        self.results.clear();
        for range in frames {
            self.results.push(pool.vectors().range(range.clone()).write(&self.tap).ok());
            self.calls += 1;
        }
    }

    fn move_all(&mut self, transfer: Transfer, all: Vectors<'_>, frames: &[Range<usize>]) {
        if let Some(ring) = &mut self.ring {
            self.calls = ring.transfer_all(transfer, all, frames, &mut self.results);
        }
    }
}
