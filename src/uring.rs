//! An io_uring (io_uring(7)) for a worker of an event loop: operations are queued, one system call
//! hands over all of them, and what is complete is taken without one.
//!
//! Its use: queue with [`Uring::push`], and take with [`Uring::next`]. In between, a loop either waits in
//! the ring, by [`Uring::wait_beside`], which hands over in the same system call; or it waits elsewhere:
//! then [`Uring::event`] is there edge-triggered and never read, and before each wait [`Uring::submit`]
//! hands over, and [`Uring::rearm`] says whether something is complete already.

use std::io::{Error as IoError, ErrorKind, Result as IoResult};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{Ordering, fence};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::error::{Context, Error, Result};
use crate::event::EventFd;

/// So many operations wait for one submission; a larger batch is handed over in parts. It need not
/// grow with the operations in flight: an entry is free again once it is handed over.
const BATCH: u32 = 64;

/// User data of the ring's own: the loop's descriptor is ready; what waited was given back; an event was
/// written to, or one of others was.
const BESIDE: u64 = u64::MAX;
const CANCELLED: u64 = u64::MAX - 1;
const WATCHED: u64 = u64::MAX - 2;
const SIGNALLED: u64 = u64::MAX - 3;

/// Room for so many completions of those.
const OWN: u32 = 4;

/// What an event's counter is raised by.
static ONE: u64 = 1;

/// What the kernel is asked to do. Offsets and lengths are in bytes; a file without offsets (a TAP)
/// takes [`Operation::NO_OFFSET`].
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the fields are the system calls' parameters")]
pub enum Operation {
    /// Read into `count` vectors from `vectors` on.
    Read { file: RawFd, vectors: *const libc::iovec, count: u32, offset: u64 },
    /// Write `count` vectors from `vectors` on.
    Write { file: RawFd, vectors: *const libc::iovec, count: u32, offset: u64 },
    /// fdatasync(2).
    Sync { file: RawFd },
    /// fallocate(2).
    Allocate { file: RawFd, mode: i32, offset: u64, length: u64 },
}

impl Operation {
    /// The file has no offsets: read or write at its own place.
    pub const NO_OFFSET: u64 = u64::MAX;

    fn entry(self) -> squeue::Entry {
        match self {
            Self::Read { file, vectors, count, offset } => {
                opcode::Readv::new(types::Fd(file), vectors, count).offset(offset).build()
            }
            Self::Write { file, vectors, count, offset } => {
                opcode::Writev::new(types::Fd(file), vectors, count).offset(offset).build()
            }
            Self::Sync { file } => {
                opcode::Fsync::new(types::Fd(file)).flags(types::FsyncFlags::DATASYNC).build()
            }
            Self::Allocate { file, mode, offset, length } => {
                opcode::Fallocate::new(types::Fd(file), length).offset(offset).mode(mode).build()
            }
        }
    }
}

/// An operation that is done.
#[derive(Debug)]
pub struct Completion {
    /// What it was pushed with.
    pub user_data: u64,
    /// What the system call would have returned.
    pub result: IoResult<u32>,
}

/// A ring. It belongs to the thread that made it: the kernel takes submissions from no other.
pub struct Uring {
    ring: IoUring,
    event: EventFd,
    in_flight: usize,
    /// This kernel has what [`Self::watch`] and [`Self::signal`] are made of (Linux 5.17).
    can_signal: bool,
    /// The kernel tells by `event` of what is complete.
    is_armed: bool,
    /// The kernel watches the loop's descriptor.
    watches: bool,
    /// It was ready.
    woke: bool,
    /// The event that [`Self::watch`] was called for, and whether the kernel watches it.
    watched: Option<(RawFd, bool)>,
}

impl Uring {
    /// A ring for at most `in_flight` operations at a time. It takes 4 KiB for submissions and 16
    /// bytes for each operation in flight.
    pub fn new(in_flight: u32) -> Result<Self> {
        // The kernel ends operations whenever we are in it anyway: no interrupt, no call for that alone
        // (Linux 6.0).
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
        // Beside operations, what they are told apart from by user data of ours.
        let completions = in_flight.max(BATCH) + OWN;
        // An operation that cannot be started completes with its error; the ones after it go on.
        let ring = builder.setup_submit_all().setup_clamp().setup_cqsize(completions).build(BATCH);
        let ring = match ring {
            // Before Linux 5.18 there was no such flag.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                IoUring::builder().setup_clamp().setup_cqsize(completions).build(BATCH)?
            }
            result => result?,
        };
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let can_signal = ring.params().is_feature_skip_cqe_on_success();
        Ok(Self {
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

    /// Written to by the kernel when something is complete, except between a [`Self::submit`] and
    /// the [`Self::rearm`] that follows.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// How many operations were pushed and not yet taken back by [`Self::next`].
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether something is queued or in flight.
    pub fn is_busy(&mut self) -> bool {
        self.in_flight > 0 || self.has_queued()
    }

    fn has_queued(&mut self) -> bool {
        matches!(self.watched, Some((_, false))) || !self.ring.submission().is_empty()
    }

    /// Whether nothing is to be done but to wait for the event.
    pub fn is_quiet(&mut self) -> bool {
        !self.is_busy() && (self.is_armed || !self.rearm())
    }

    /// From now on the ring tells when `event` was written to, as of an operation that is complete, but
    /// without a completion to be taken. The event is never read, and stays open as long as the ring.
    /// False: this kernel cannot do that.
    pub fn watch(&mut self, event: &EventFd) -> IoResult<bool> {
        if self.can_signal {
            self.watched = Some((event.as_raw_fd(), false));
            self.watch_again()?;
        }
        Ok(self.can_signal)
    }

    /// The kernel ends what should go on when there is no room to tell.
    fn watch_again(&mut self) -> IoResult<()> {
        if let Some((event, false)) = self.watched {
            let watch = opcode::PollAdd::new(types::Fd(event), libc::POLLIN as u32).multi(true);
            self.watched = Some((event, true));
            #[allow(unsafe_code)]
            // SAFETY: no memory of ours is in it.
            unsafe { self.add(&watch.build().user_data(WATCHED)) }?;
        }
        Ok(())
    }

    /// Queues a write of 1 to an event, which does not block and stays open until it is handed over:
    /// there is no completion of it. False: this kernel cannot do that.
    #[allow(unsafe_code)]
    pub fn signal(&mut self, event: &EventFd) -> IoResult<bool> {
        if self.can_signal {
            let one = (&raw const ONE).cast();
            let write = opcode::Write::new(types::Fd(event.as_raw_fd()), one, size_of_val(&ONE) as u32);
            let write = write.build().flags(squeue::Flags::SKIP_SUCCESS).user_data(SIGNALLED);
            // SAFETY: what is written from is there for ever.
            unsafe { self.add(&write) }?;
        }
        Ok(self.can_signal)
    }

    /// Queues an operation; a batch that is full is handed over first. The caller keeps no more in
    /// flight than the ring was made for.
    ///
    /// # Safety
    /// The vectors and the memory that they name must stay valid, and the file open, until the
    /// completion with this user data was taken.
    #[allow(unsafe_code)]
    pub unsafe fn push(&mut self, operation: Operation, user_data: u64) -> IoResult<()> {
        // SAFETY: the caller promises what the kernel needs of the entry's parameters.
        unsafe { self.add(&operation.entry().user_data(user_data)) }?;
        self.in_flight += 1;
        Ok(())
    }

    /// # Safety
    /// As for [`Self::push`].
    #[allow(unsafe_code)]
    unsafe fn add(&mut self, entry: &squeue::Entry) -> IoResult<()> {
        // SAFETY: as the caller promises.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.submit()?;
        }
        Ok(())
    }

    /// Hands over what is queued, and returns when something can be taken or `beside`, a loop's set of
    /// descriptors, is ready: one system call. [`Self::woke`] tells of the latter when all was taken.
    #[allow(unsafe_code)]
    pub fn wait_beside(&mut self, beside: RawFd) -> IoResult<()> {
        self.disarm();
        self.woke = false;
        self.watch_again()?;
        if !std::mem::replace(&mut self.watches, true) {
            let watch = opcode::PollAdd::new(types::Fd(beside), libc::POLLIN as u32);
            // SAFETY: no memory of ours is in it.
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

    /// Hands over what is queued and lets the kernel finish what it deferred: one system call, or
    /// none when there is neither.
    pub fn submit(&mut self) -> IoResult<()> {
        self.watch_again()?;
        loop {
            // We look at the completions next: no need to be told of them.
            self.disarm();
            let queue = self.ring.submission();
            let (left, overflow) = (!queue.is_empty() || queue.taskrun(), queue.cq_overflow());
            drop(queue);
            // Where there is no room for more completions, those that are there are taken first.
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

    /// Queues the end of all operations before it that wait for something: they complete with
    /// `ECANCELED`, those that were about to be tried again perhaps only by the next one.
    #[allow(unsafe_code)]
    pub fn cancel(&mut self) -> IoResult<()> {
        let entry = opcode::AsyncCancel2::new(types::CancelBuilder::any()).build();
        // SAFETY: no memory of ours is in it.
        unsafe { self.add(&entry.user_data(CANCELLED)) }
    }

    /// Whether this kernel knows of [`Self::cancel`] (Linux 5.19); nothing is in flight.
    pub fn can_cancel(&mut self) -> bool {
        let tried = self.cancel().and_then(|()| self.submit());
        let result = self.ring.completion().next().map(|entry| entry.result());
        tried.is_ok() && result.is_some_and(|result| result != -libc::EINVAL)
    }

    /// Takes a completion, if there is one: no system call.
    #[allow(clippy::should_implement_trait, reason = "more come after a None")]
    pub fn next(&mut self) -> Option<Completion> {
        let entry = loop {
            let entry = self.ring.completion().next()?;
            match entry.user_data() {
                BESIDE => (self.watches, self.woke) = (false, true),
                WATCHED => {
                    let goes_on = cqueue::more(entry.flags());
                    self.watched = self.watched.map(|(event, _)| (event, goes_on));
                }
                // A counter that is full says what it should.
                CANCELLED | SIGNALLED => {}
                _ => break entry,
            }
        };
        self.in_flight -= 1;
        let result = u32::try_from(entry.result()).map_err(|_| IoError::from_raw_os_error(-entry.result()));
        Some(Completion { user_data: entry.user_data(), result })
    }

    /// Ends a turn: from now on the event tells of completions. True: something came meanwhile that
    /// it will not tell of; submit and take it first.
    pub fn rearm(&mut self) -> bool {
        self.ring.completion().enable_eventfd();
        // The kernel posts, then looks at the flag: we set the flag, then look at what is posted.
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

    /// Returns when at least one completion can be taken; nothing in flight: at once.
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

/// The kernel goes on with what is in flight when a ring is closed: memory that it names could be
/// something else by then. Whoever has operations that may never end cancels them first.
impl Drop for Uring {
    fn drop(&mut self) {
        while self.in_flight > 0 && self.wait().is_ok() {
            while self.next().is_some() {}
        }
    }
}

/// What a user can do about a host without io_uring.
fn refused(error: IoError) -> Error {
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let reason = match (error.raw_os_error(), disabled.trim()) {
        (Some(libc::EPERM), "1" | "2") => {
            "this host forbids io_uring (`sysctl kernel.io_uring_disabled` is not 0)".to_owned()
        }
        (Some(libc::EPERM | libc::EACCES), _) => {
            "this process may not use io_uring: a seccomp filter or a security module forbids it".to_owned()
        }
        (Some(libc::ENOSYS), _) => "this kernel has no io_uring: Linux 5.6 or later is needed".to_owned(),
        (Some(libc::ENOMEM), _) => "not enough locked memory for io_uring: raise `ulimit -l`".to_owned(),
        _ => return Err::<(), _>(error).context("set up io_uring").expect_err("it is one"),
    };
    Error::host(reason)
}

#[cfg(test)]
mod tests;
