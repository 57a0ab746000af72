//! Frames between a TAP and guest memory, many in one system call by io_uring, else one by one. A TAP
//! gives one frame to a read: so several are posted, and those that find none are given back.

use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Once;
use std::sync::atomic::AtomicU8;

use crate::host::tap::Tap;
use crate::log;
use crate::uring::{Operation, Uring};
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
    with_beyond: (Vec<libc::iovec>, Vec<Range<usize>>),
}

// SAFETY: the vectors point into guest memory, as those of `Buffers` do, and to a byte that is there for
// ever; they are used only by the calls that fill them.
#[allow(unsafe_code)]
unsafe impl Send for Port {}

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
            with_beyond: (Vec::new(), Vec::with_capacity(BATCH)),
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
        let (mut vectors, mut ranges) = std::mem::take(&mut self.with_beyond);
        vectors.clear();
        ranges.clear();
        for range in frames {
            let start = vectors.len();
            vectors.extend_from_slice(&pool.vectors()[range.clone()]);
            vectors.push(libc::iovec { iov_base: BEYOND.as_ptr().cast(), iov_len: 1 });
            ranges.push(start..vectors.len());
        }
        self.read_into(&vectors, &ranges);
        self.with_beyond = (vectors, ranges);
    }

    fn read_into(&mut self, all: &[libc::iovec], frames: &[Range<usize>]) {
        self.calls = 0;
        self.results.clear();
        if self.has_ring_for(frames.len()) && self.can_cancel {
            return self.read_batch(all, frames);
        }
        for vectors in frames {
            let moved = self.read_one(all, vectors);
            self.calls += 1;
            self.results.push(moved);
            if moved.is_none() {
                break;
            }
        }
    }

    /// Writes one frame from each of these ranges of the pool's vectors. What the TAP does not take is
    /// lost, as on a wire: it is down, or the driver's header is wrong.
    pub fn write(&mut self, pool: &Pool, frames: &[Range<usize>]) {
        self.calls = 0;
        self.results.clear();
        if self.has_ring_for(frames.len()) {
            return self.write_batch(pool.vectors(), frames);
        }
        for vectors in frames {
            let moved = self.write_one(pool.vectors(), vectors);
            self.calls += 1;
            self.results.push(moved);
        }
    }

    fn read_batch(&mut self, all: &[libc::iovec], frames: &[Range<usize>]) {
        let (Some(ring), file) = (&mut self.ring, self.tap.as_raw_fd()) else { return };
        for (index, range) in frames.iter().enumerate() {
            let (vectors, count) = kernel(all, range);
            push(ring, Operation::Read { file, vectors, count, offset: Operation::NO_OFFSET }, index);
        }
        // By the same system call.
        let _ = ring.cancel();
        self.complete(frames.len());
    }

    fn write_batch(&mut self, all: &[libc::iovec], frames: &[Range<usize>]) {
        let (Some(ring), file) = (&mut self.ring, self.tap.as_raw_fd()) else { return };
        for (index, range) in frames.iter().enumerate() {
            let (vectors, count) = kernel(all, range);
            push(ring, Operation::Write { file, vectors, count, offset: Operation::NO_OFFSET }, index);
        }
        self.complete(frames.len());
    }

    /// Takes the results of a batch. Nothing may be left in flight: what waits is given back. A frame that
    /// comes at that moment may have a read tried again after that, which finds that another has got it
    /// and waits: so that is repeated.
    fn complete(&mut self, frames: usize) {
        let Some(ring) = &mut self.ring else { return };
        self.results.resize(frames, None);
        while ring.in_flight() > 0 {
            // The kernel takes what is queued sooner or later.
            let _ = ring.submit();
            self.calls += 1;
            while let Some(completion) = ring.next() {
                if let Some(place) = self.results.get_mut(completion.user_data as usize) {
                    *place = completion.result.ok().map(|count| count as usize);
                }
            }
            if ring.in_flight() > 0 {
                let _ = ring.cancel();
            }
        }
    }

    #[allow(unsafe_code)]
    fn read_one(&self, all: &[libc::iovec], vectors: &Range<usize>) -> Option<usize> {
        let (vectors, count) = kernel(all, vectors);
        // SAFETY: the vectors lie in guest memory (see `Buffers`) or are `BEYOND`; the call writes to them.
        let count = unsafe { libc::readv(self.tap.as_raw_fd(), vectors, count as i32) };
        usize::try_from(count).ok()
    }

    #[allow(unsafe_code)]
    fn write_one(&self, all: &[libc::iovec], vectors: &Range<usize>) -> Option<usize> {
        let (vectors, count) = kernel(all, vectors);
        // SAFETY: the vectors lie in guest memory (see `Buffers`); the call reads them.
        let count = unsafe { libc::writev(self.tap.as_raw_fd(), vectors, count as i32) };
        usize::try_from(count).ok()
    }
}

/// A range of vectors as the kernel wants it. All of them, always: more than it takes at once
/// (IOV_MAX) it refuses, where a part of a frame would go as another frame.
fn kernel(all: &[libc::iovec], range: &Range<usize>) -> (*const libc::iovec, u32) {
    let vectors = &all[range.clone()];
    (vectors.as_ptr(), vectors.len() as u32)
}

#[allow(unsafe_code)]
fn push(ring: &mut Uring, operation: Operation, index: usize) {
    // SAFETY: the vectors lie in guest memory (or are `BEYOND`) and in a list that is borrowed until
    // `complete` has taken the completions of all that was pushed; the TAP is open for as long as the ring.
    let pushed = unsafe { ring.push(operation, index as u64) };
    // An operation that was not taken has no result, as a frame that was not moved.
    drop(pushed);
}
