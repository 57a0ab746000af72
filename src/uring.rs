//! An io_uring (io_uring(7)) for a worker of an event loop: operations are queued, one system call
//! submits all of them to the kernel, and completions are taken without a system call.
//!
//! A worker queues operations with [`Uring::push`] and [`Uring::transfer`], and takes completions with
//! [`Uring::next`]. Between the two, its loop waits in one of two ways:
//! - in the ring, by [`Uring::wait_beside`], which submits in the same system call;
//! - in its epoll set, where [`Uring::event`] is watched edge-triggered and never read. Before each wait,
//!   [`Uring::submit`] submits, and [`Uring::rearm`] says whether a completion is there already.

use std::io::{Error as IoError, ErrorKind, Result as IoResult};
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{Ordering, fence};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::descriptors::Name;
use crate::error::{Context, Error, Result};
use crate::poll::EventFd;
use crate::sys::process::is_filtered;
use crate::sys::vectors::Vectors;

/// The size of the submission queue, in entries; a larger batch is submitted in parts. The queue need not
/// grow with the number of operations in flight: an entry is free again once it is submitted.
const BATCH: u32 = 64;

/// User data of the completion that says: the loop's epoll set is ready ([`Uring::wait_beside`]).
const BESIDE: u64 = u64::MAX;
/// User data of the completion of a cancellation ([`Uring::cancel`]).
const CANCELLED: u64 = u64::MAX - 1;
/// User data of the completions that say: the watched event was written to ([`Uring::watch`]).
const WATCHED: u64 = u64::MAX - 2;
/// User data of a write to an event ([`Uring::signal`]); the kernel posts it only when the write failed.
const SIGNALLED: u64 = u64::MAX - 3;

/// How many completions with the user data above can be there at once.
const OWN: u32 = 4;

/// The number that a write to an event adds to the event's counter.
static ONE: u64 = 1;

/// A task for the kernel that names no memory. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the fields are the system calls' parameters")]
pub enum Operation {
    /// fdatasync(2).
    Sync { file: RawFd },
    /// fallocate(2).
    Allocate { file: RawFd, mode: i32, offset: u64, length: u64 },
}

impl Operation {
    fn entry(self) -> squeue::Entry {
        match self {
            Self::Sync { file } => {
                opcode::Fsync::new(types::Fd(file)).flags(types::FsyncFlags::DATASYNC).build()
            }
            Self::Allocate { file, mode, offset, length } => {
                opcode::Fallocate::new(types::Fd(file), length).offset(offset).mode(mode).build()
            }
        }
    }
}

/// Bytes that the kernel is asked to move between a file, from `offset` on, and memory.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the fields are the system calls' parameters")]
pub enum Transfer {
    /// preadv(2).
    Read { file: RawFd, offset: u64 },
    /// pwritev(2).
    Write { file: RawFd, offset: u64 },
}

impl Transfer {
    /// The offset for a file that has no offsets, such as a TAP.
    pub const NO_OFFSET: u64 = u64::MAX;

    fn entry(self, vectors: Vectors<'_>) -> squeue::Entry {
        let (vectors, count) = (vectors.raw().as_ptr(), vectors.count() as u32);
        match self {
            Self::Read { file, offset } => {
                opcode::Readv::new(types::Fd(file), vectors, count).offset(offset).build()
            }
            Self::Write { file, offset } => {
                opcode::Writev::new(types::Fd(file), vectors, count).offset(offset).build()
            }
        }
    }
}

/// The result of an operation.
#[derive(Debug)]
pub struct Completion {
    /// The user data that the operation was pushed with.
    pub user_data: u64,
    /// What the system call of this operation would have returned.
    pub result: IoResult<u32>,
}

/// A ring. It belongs to the thread that made it: the kernel takes submissions from no other.
pub struct Uring {
    _name: Name,
    ring: IoUring,
    event: EventFd,
    in_flight: usize,
    /// The kernel has what [`Self::watch`] and [`Self::signal`] need (Linux 5.17).
    can_signal: bool,
    /// The kernel writes to `event` at each completion.
    is_armed: bool,
    /// The kernel polls the descriptor of [`Self::wait_beside`].
    watches: bool,
    /// The descriptor of [`Self::wait_beside`] was ready.
    woke: bool,
    /// The event that [`Self::watch`] was called for, and whether the kernel's poll of it still goes on.
    watched: Option<(RawFd, bool)>,
}

impl Uring {
    /// A ring for at most `in_flight` operations at a time. It takes 4 KiB for submissions and 16
    /// bytes for each operation in flight.
    pub fn new(in_flight: u32) -> Result<Self> {
        // The kernel completes operations during system calls that this thread makes anyway, and neither
        // interrupts the thread for it nor needs a call of its own (Linux 6.0).
        let mut cooperative = IoUring::builder();
        cooperative.setup_single_issuer().setup_coop_taskrun().setup_taskrun_flag();
        match Self::build(cooperative, in_flight) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                Self::build(IoUring::builder(), in_flight)
            }
            result => result,
        }
        .map_err(refused)
    }

    fn build(mut builder: io_uring::Builder, in_flight: u32) -> IoResult<Self> {
        // The completion queue has room for the operations and for the ring's own completions.
        let completions = in_flight.max(BATCH) + OWN;
        // With `submit_all`, an operation that cannot be started completes with its error, and the operations
        // after it are started all the same.
        let ring = builder.setup_submit_all().setup_clamp().setup_cqsize(completions).build(BATCH);
        let ring = match ring {
            // Linux before 5.18 does not know `submit_all`.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                IoUring::builder().setup_clamp().setup_cqsize(completions).build(BATCH)?
            }
            result => result?,
        };
        let name = Name::new(&ring, "io_uring");
        let event = EventFd::called("io_uring, completions")?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let can_signal = ring.params().is_feature_skip_cqe_on_success();
        Ok(Self {
            _name: name,
            ring,
            event,
            in_flight: 0,
            can_signal,
            is_armed: true,
            watches: false,
            woke: false,
            watched: None,
        })
    }

    /// The event that the kernel writes to at each completion, except between a [`Self::submit`] and the
    /// [`Self::rearm`] that follows.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// How many operations were pushed and not yet taken back by [`Self::next`].
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether an operation is queued or in flight.
    pub fn is_busy(&mut self) -> bool {
        self.in_flight > 0 || self.has_queued()
    }

    fn has_queued(&mut self) -> bool {
        matches!(self.watched, Some((_, false))) || !self.ring.submission().is_empty()
    }

    /// Whether nothing is queued, in flight or complete, so that the loop can wait for the event.
    pub fn is_quiet(&mut self) -> bool {
        !self.is_busy() && (self.is_armed || !self.rearm())
    }

    /// From now on a write to `event` ends a wait in the ring, or is told by [`Self::event`], as a completed
    /// operation is; [`Self::next`] gives no completion for it. The caller never reads the event, and keeps
    /// it open as long as the ring. Returns false if the kernel cannot do that.
    pub fn watch(&mut self, event: &EventFd) -> IoResult<bool> {
        if self.can_signal {
            self.watched = Some((event.as_raw_fd(), false));
            self.watch_again()?;
        }
        Ok(self.can_signal)
    }

    /// Arms the poll of the watched event again: the kernel ends a multishot poll when the completion queue
    /// has overflowed.
    fn watch_again(&mut self) -> IoResult<()> {
        if let Some((event, false)) = self.watched {
            let watch = opcode::PollAdd::new(types::Fd(event), libc::POLLIN as u32).multi(true);
            self.watched = Some((event, true));
            #[allow(unsafe_code)]
            // SAFETY: the entry of a poll names no memory.
            unsafe { self.add(&watch.build().user_data(WATCHED)) }?;
        }
        Ok(())
    }

    /// Queues a write of 1 to `event`; [`Self::next`] gives no completion for it. The caller keeps the event,
    /// which is non-blocking, open until the write is submitted. Returns false if the kernel cannot do that.
    #[allow(unsafe_code)]
    pub fn signal(&mut self, event: &EventFd) -> IoResult<bool> {
        if self.can_signal {
            let one = (&raw const ONE).cast();
            let write = opcode::Write::new(types::Fd(event.as_raw_fd()), one, size_of_val(&ONE) as u32);
            let write = write.build().flags(squeue::Flags::SKIP_SUCCESS).user_data(SIGNALLED);
            // SAFETY: the write reads a static variable.
            unsafe { self.add(&write) }?;
        }
        Ok(self.can_signal)
    }

    /// Queues an operation; a submission queue that is full is submitted first. The caller keeps no more
    /// operations in flight than the ring was made for, and the file open until the operation is complete.
    #[allow(unsafe_code)]
    pub fn push(&mut self, operation: Operation, user_data: u64) -> IoResult<()> {
        // SAFETY: the entry of a sync or an allocation names no memory.
        unsafe { self.add(&operation.entry().user_data(user_data)) }?;
        self.in_flight += 1;
        Ok(())
    }

    /// Queues a transfer, as [`Self::push`] does an operation.
    ///
    /// # Safety
    /// The vectors and the memory that they name must stay valid until the completion with this user data was
    /// taken.
    #[allow(unsafe_code)]
    pub unsafe fn transfer(
        &mut self,
        transfer: Transfer,
        vectors: Vectors<'_>,
        user_data: u64,
    ) -> IoResult<()> {
        // SAFETY: the caller promises what the kernel needs of the entry's parameters.
        unsafe { self.add(&transfer.entry(vectors).user_data(user_data)) }?;
        self.in_flight += 1;
        Ok(())
    }

    /// Moves each of `parts` of `vectors` by a transfer of its own, and returns when all are complete: how many system
    /// calls that took. `results` has how many bytes each part moved; none: it was not moved. Reads that find nothing
    /// to read are given back at once, which the kernel must be able to ([`Self::can_cancel`]). Nothing else is in
    /// flight.
    #[allow(unsafe_code)]
    pub fn transfer_all(
        &mut self,
        transfer: Transfer,
        vectors: Vectors<'_>,
        parts: &[Range<usize>],
        results: &mut Vec<Option<usize>>,
    ) -> u64 {
        debug_assert_eq!(self.in_flight, 0, "what else is in flight would be taken for a part");
        results.clear();
        results.resize(parts.len(), None);
        for (index, part) in parts.iter().enumerate() {
            // SAFETY: the vectors are borrowed until the completions of all were taken, below. One that was not queued
            // has no result, as one that was not moved.
            let _ = unsafe { self.transfer(transfer, vectors.range(part.clone()), index as u64) };
        }
        if matches!(transfer, Transfer::Read { .. }) {
            // The cancellation goes by the same system call.
            let _ = self.cancel();
        }
        let mut calls = 0;
        while self.in_flight > 0 {
            // The kernel takes what is queued sooner or later.
            let _ = self.submit();
            calls += 1;
            while let Some(completion) = self.next() {
                if let Some(place) = results.get_mut(completion.user_data as usize) {
                    *place = completion.result.ok().map(|count| count as usize);
                }
            }
            // A frame that comes at this moment may have a read tried again after that, which finds that another has
            // got it and waits: that is given back, too.
            if self.in_flight > 0 {
                let _ = self.cancel();
            }
        }
        calls
    }

    /// # Safety
    /// As for [`Self::transfer`].
    #[allow(unsafe_code)]
    unsafe fn add(&mut self, entry: &squeue::Entry) -> IoResult<()> {
        // SAFETY: as the caller promises.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.submit()?;
        }
        Ok(())
    }

    /// Submits what is queued, and returns when a completion can be taken or `beside`, the descriptor of a
    /// loop's epoll set, is ready: one system call. Once all completions are taken, [`Self::woke`] says
    /// whether `beside` is ready.
    #[allow(unsafe_code)]
    pub fn wait_beside(&mut self, beside: RawFd) -> IoResult<()> {
        self.disarm();
        self.woke = false;
        self.watch_again()?;
        if !std::mem::replace(&mut self.watches, true) {
            let watch = opcode::PollAdd::new(types::Fd(beside), libc::POLLIN as u32);
            // SAFETY: the entry of a poll names no memory.
            unsafe { self.add(&watch.build().user_data(BESIDE)) }?;
        }
        match self.ring.submit_and_wait(1) {
            Err(error) if error.kind() != ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether the descriptor of the last [`Self::wait_beside`] is ready.
    pub fn woke(&self) -> bool {
        self.woke
    }

    /// Submits what is queued and lets the kernel finish work that it deferred: one system call, or none when
    /// there is neither.
    pub fn submit(&mut self) -> IoResult<()> {
        self.watch_again()?;
        loop {
            // The caller looks at the completions next: the kernel need not write to the event for them.
            self.disarm();
            let queue = self.ring.submission();
            let (left, overflow) = (!queue.is_empty() || queue.taskrun(), queue.cq_overflow());
            drop(queue);
            // Completions that overflowed come into the queue only once the caller has emptied it.
            let has_room = overflow && self.ring.completion().is_empty();
            if !left && !has_room {
                return Ok(());
            }
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Queues the cancellation of all operations that wait in the kernel (for a frame, for example): they
    /// complete with `ECANCELED`. An operation that the kernel is just trying again may miss it; the next
    /// cancellation takes it.
    #[allow(unsafe_code)]
    pub fn cancel(&mut self) -> IoResult<()> {
        let entry = opcode::AsyncCancel2::new(types::CancelBuilder::any()).build();
        // SAFETY: the entry of a cancellation names no memory.
        unsafe { self.add(&entry.user_data(CANCELLED)) }
    }

    /// Whether the kernel can do [`Self::cancel`] (Linux 5.19). To be called while nothing is in flight.
    pub fn can_cancel(&mut self) -> bool {
        let tried = self.cancel().and_then(|()| self.submit());
        let result = self.ring.completion().next().map(|entry| entry.result());
        tried.is_ok() && result.is_some_and(|result| result != -libc::EINVAL)
    }

    /// Takes a completion, if there is one, without a system call.
    #[allow(clippy::should_implement_trait, reason = "an iterator ends at a None, completions do not")]
    pub fn next(&mut self) -> Option<Completion> {
        let entry = loop {
            let entry = self.ring.completion().next()?;
            match entry.user_data() {
                BESIDE => (self.watches, self.woke) = (false, true),
                WATCHED => {
                    let goes_on = cqueue::more(entry.flags());
                    self.watched = self.watched.map(|(event, _)| (event, goes_on));
                }
                // A write to an event fails only when the event's counter is full: its reader is woken anyway.
                CANCELLED | SIGNALLED => {}
                _ => break entry,
            }
        };
        self.in_flight -= 1;
        let result = u32::try_from(entry.result()).map_err(|_| IoError::from_raw_os_error(-entry.result()));
        Some(Completion { user_data: entry.user_data(), result })
    }

    /// Ends a turn: from now on the kernel writes to the event at each completion. Returns true if a
    /// completion came before that, of which the event will not tell: the caller submits and takes it first.
    pub fn rearm(&mut self) -> bool {
        self.ring.completion().enable_eventfd();
        // The kernel posts a completion, then reads the flag. The flag is set here first, then the queue is
        // read: with a full fence between the two, at least one side sees what the other did.
        fence(Ordering::SeqCst);
        let left = self.has_queued();
        let queue = self.ring.submission();
        let left = left || queue.taskrun() || queue.cq_overflow();
        drop(queue);
        self.is_armed = !left && self.ring.completion().is_empty();
        !self.is_armed
    }

    fn disarm(&mut self) {
        self.ring.completion().disable_eventfd();
        self.is_armed = false;
    }

    /// Returns when at least one completion can be taken, or at once when nothing is in flight.
    pub fn wait(&mut self) -> IoResult<()> {
        while self.in_flight > 0 && self.ring.completion().is_empty() {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

/// The kernel goes on with operations in flight when a ring is closed, and the memory that they name could
/// be used for something else by then: so a ring that is dropped waits for them. The owner of operations
/// that may never end cancels them first.
impl Drop for Uring {
    fn drop(&mut self) {
        while self.in_flight > 0 && self.wait().is_ok() {
            while self.next().is_some() {}
        }
    }
}

/// The error for a host that gives no io_uring, with what a user can do about it. The thread that tells is one
/// that opens no file, so it does not look at the sysctl itself: a filter gives the same error, and where there
/// is none, it is the sysctl.
fn refused(error: IoError) -> Error {
    let reason = match error.raw_os_error() {
        Some(libc::EPERM) if !is_filtered() => {
            "this host forbids io_uring (`sysctl kernel.io_uring_disabled` is not 0)"
        }
        Some(libc::EPERM) => {
            "this process may not use io_uring: a seccomp filter, a security module or \
             `sysctl kernel.io_uring_disabled` forbids it"
        }
        Some(libc::EACCES) => {
            "this process may not use io_uring: a seccomp filter or a security module forbids it"
        }
        Some(libc::ENOSYS) => "this kernel has no io_uring: Linux 5.6 or later is needed",
        Some(libc::ENOMEM) => "not enough locked memory for io_uring: raise `ulimit -l`",
        _ => return Err::<(), _>(error).context("set up io_uring").expect_err("it is one"),
    };
    Error::host(reason)
}

/// The memory that a test lends to a ring.
#[cfg(test)]
#[allow(unsafe_code)]
fn lent(vectors: &[libc::iovec]) -> Vectors<'_> {
    // SAFETY: the tests keep everything, and look at nothing, until the completions were taken.
    unsafe { Vectors::new(vectors) }
}

/// [`Uring::transfer`] for the tests.
#[cfg(test)]
#[allow(unsafe_code)]
fn transfer(ring: &mut Uring, transfer: Transfer, vectors: &[libc::iovec], user_data: u64) {
    // SAFETY: as of `lent`.
    unsafe { ring.transfer(transfer, lent(vectors), user_data) }.unwrap();
}

#[cfg(test)]
mod tests;
