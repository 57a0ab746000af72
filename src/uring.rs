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

use io_uring::{IoUring, opcode, squeue, types};

use crate::error::{Context, Error, Result};
use crate::event::EventFd;

/// So many operations wait for one submission; a larger batch is handed over in parts. It need not
/// grow with the operations in flight: an entry is free again once it is handed over.
const BATCH: u32 = 64;

/// User data of the ring's own: the loop's descriptor is ready; what waited was given back.
const BESIDE: u64 = u64::MAX;
const CANCELLED: u64 = u64::MAX - 1;

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
    /// The kernel watches the loop's descriptor.
    watches: bool,
    /// It was ready.
    woke: bool,
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
        // An operation that cannot be started completes with its error; the ones after it go on.
        let ring = builder.setup_submit_all().setup_clamp().setup_cqsize(in_flight.max(BATCH)).build(BATCH);
        let ring = match ring {
            // Before Linux 5.18 there was no such flag.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                IoUring::builder().setup_clamp().setup_cqsize(in_flight.max(BATCH)).build(BATCH)?
            }
            result => result?,
        };
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Self { ring, event, in_flight: 0, watches: false, woke: false })
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
        self.ring.completion().disable_eventfd();
        self.woke = false;
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
        loop {
            // We look at the completions next: no need to be told of them.
            self.ring.completion().disable_eventfd();
            let queue = self.ring.submission();
            if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
                return Ok(());
            }
            drop(queue);
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
                CANCELLED => {}
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
        let queue = self.ring.submission();
        let left = !queue.is_empty() || queue.taskrun() || queue.cq_overflow();
        drop(queue);
        left || !self.ring.completion().is_empty()
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
mod tests {
    use super::*;
    use crate::event::{Events, Interest};
    use std::fs::File;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    fn rings(in_flight: u32) -> [Uring; 2] {
        [Uring::new(in_flight).unwrap(), Uring::build(IoUring::builder(), in_flight).unwrap()]
    }

    fn file(content: &[u8]) -> File {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        std::os::unix::fs::FileExt::write_all_at(&file, content, 0).unwrap();
        file
    }

    fn vector(bytes: &mut [u8]) -> libc::iovec {
        libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
    }

    #[allow(unsafe_code)]
    fn push(ring: &mut Uring, operation: Operation, user_data: u64) {
        // SAFETY: the tests keep everything until the completions were taken.
        unsafe { ring.push(operation, user_data) }.unwrap();
    }

    fn all(ring: &mut Uring) -> Vec<(u64, Option<u32>)> {
        let mut done = Vec::new();
        while ring.in_flight() > 0 {
            ring.wait().unwrap();
            while let Some(completion) = ring.next() {
                done.push((completion.user_data, completion.result.ok()));
            }
        }
        done.sort();
        done
    }

    #[test]
    fn more_operations_than_one_batch_complete_with_their_user_data() {
        let content: Vec<u8> = (0..=255).cycle().take(200 * 512).collect();
        let file = file(&content);
        for mut ring in rings(200) {
            let mut buffers = vec![[0; 512]; 200];
            let vectors: Vec<_> = buffers.iter_mut().map(|buffer| vector(buffer)).collect();
            for (index, vectors) in vectors.iter().enumerate() {
                let offset = index as u64 * 512;
                push(
                    &mut ring,
                    Operation::Read { file: file.as_raw_fd(), vectors, count: 1, offset },
                    index as u64,
                );
            }
            assert_eq!(ring.in_flight(), 200);
            let expected: Vec<_> = (0..200).map(|index| (index, Some(512))).collect();
            assert_eq!(all(&mut ring), expected);
            assert!(buffers.concat() == content);
        }
    }

    #[test]
    fn writes_syncs_and_holes_reach_the_file_and_errors_reach_us() {
        for mut ring in rings(8) {
            let mut file = file(&[7; 8192]);
            let mut bytes = [9; 4096];
            let vectors = &vector(&mut bytes);
            let fd = file.as_raw_fd();
            push(&mut ring, Operation::Write { file: fd, vectors, count: 1, offset: 0 }, 1);
            push(&mut ring, Operation::Sync { file: fd }, 2);
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            push(&mut ring, Operation::Allocate { file: fd, mode, offset: 4096, length: 4096 }, 3);
            push(&mut ring, Operation::Sync { file: -1 }, 4);
            assert_eq!(all(&mut ring), [(1, Some(4096)), (2, Some(0)), (3, Some(0)), (4, None)]);
            let mut content = Vec::new();
            file.read_to_end(&mut content).unwrap();
            assert!(content == [[9; 4096], [0; 4096]].concat());
        }
    }

    #[test]
    fn the_event_tells_of_what_completes_after_a_turn_and_a_turn_is_told_of_what_came_in_it() {
        for mut ring in rings(8) {
            let (reader, writer) = UnixStream::pair().unwrap();
            let mut byte = [0];
            let read = |vectors| Operation::Read {
                file: reader.as_raw_fd(),
                vectors,
                count: 1,
                offset: Operation::NO_OFFSET,
            };
            let vectors = &vector(&mut byte);
            push(&mut ring, read(vectors), 1);
            ring.submit().unwrap();
            assert!(ring.next().is_none() && !ring.rearm());
            assert!(ring.event().read().is_err());
            std::io::Write::write_all(&mut &writer, b"x").unwrap();
            while ring.event().read().is_err() {
                std::thread::yield_now();
            }
            ring.submit().unwrap();
            assert_eq!(ring.next().unwrap().result.unwrap(), 1);
            assert!(!ring.rearm());
            // Complete at once: no event, but the end of the turn knows.
            std::io::Write::write_all(&mut &writer, b"y").unwrap();
            push(&mut ring, read(vectors), 2);
            ring.submit().unwrap();
            assert!(ring.rearm());
            assert_eq!(all(&mut ring), [(2, Some(1))]);
        }
    }

    #[test]
    fn a_wait_in_the_ring_ends_by_what_is_complete_and_by_what_is_ready_beside_it() {
        for mut ring in rings(8) {
            let (reader, writer) = UnixStream::pair().unwrap();
            let (events, kick) = (Events::new().unwrap(), EventFd::new(libc::EFD_NONBLOCK).unwrap());
            events.add(&kick, Interest::IN | Interest::EDGE_TRIGGERED, 1).unwrap();
            let mut byte = [0];
            let vectors = &vector(&mut byte);
            let file = reader.as_raw_fd();
            for round in 0..3 {
                push(
                    &mut ring,
                    Operation::Read { file, vectors, count: 1, offset: Operation::NO_OFFSET },
                    round,
                );
                kick.write(1).unwrap();
                ring.wait_beside(events.as_raw_fd()).unwrap();
                assert!(ring.next().is_none() && ring.woke());
                let mut ready = Vec::new();
                events.wait(Some(Duration::ZERO), &mut ready).unwrap();
                assert_eq!(ready.len(), 1);
                std::io::Write::write_all(&mut &writer, b"x").unwrap();
                ring.wait_beside(events.as_raw_fd()).unwrap();
                assert_eq!(ring.next().unwrap().user_data, round);
                assert!(ring.next().is_none() && !ring.woke());
            }
        }
    }

    #[test]
    fn a_batch_takes_what_is_there_and_one_call_though_there_is_less_than_was_asked_for() {
        for mut ring in rings(8) {
            assert!(ring.can_cancel(), "Linux 5.19 is needed");
            let (reader, writer) = UnixStream::pair().unwrap();
            reader.set_nonblocking(true).unwrap();
            for round in 0..3 {
                std::io::Write::write_all(&mut &writer, b"xy").unwrap();
                let mut bytes = [[0]; 4];
                let vectors: Vec<_> = bytes.iter_mut().map(|byte| vector(byte)).collect();
                let file = reader.as_raw_fd();
                for (index, vectors) in vectors.iter().enumerate() {
                    let offset = Operation::NO_OFFSET;
                    push(&mut ring, Operation::Read { file, vectors, count: 1, offset }, index as u64);
                }
                ring.cancel().unwrap();
                ring.submit().unwrap();
                let mut done: Vec<_> = std::iter::from_fn(|| ring.next()).collect();
                done.sort_by_key(|completion| completion.user_data);
                let results: Vec<_> =
                    done.iter().map(|done| done.result.as_ref().map_err(IoError::raw_os_error)).collect();
                let nothing = Err(Some(libc::ECANCELED));
                assert_eq!(results, [Ok(&1), Ok(&1), nothing, nothing], "{round}");
                assert_eq!((ring.in_flight(), bytes), (0, [[b'x'], [b'y'], [0], [0]]));
            }
        }
    }

    /// Lets io_uring_setup(2) fail with `errno` in this thread from now on.
    #[allow(unsafe_code)]
    fn forbid(errno: i32) {
        let statement = |code: u32, k: u32, jf| libc::sock_filter { code: code as u16, jt: 0, jf, k };
        let mut filter = [
            statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
            statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_io_uring_setup as u32, 1),
            statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32, 0),
            statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0),
        ];
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: the calls read the local structures and concern this thread alone.
        unsafe {
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
            assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program), 0);
        }
    }

    #[test]
    fn a_host_that_forbids_it_is_an_error_that_says_so() {
        for (errno, expected) in [
            (libc::EPERM, "this process may not use io_uring: a seccomp filter"),
            (libc::ENOSYS, "this kernel has no io_uring"),
        ] {
            let told = std::thread::spawn(move || {
                forbid(errno);
                Uring::new(8).err().map(|error| error.to_string())
            });
            let told = told.join().unwrap().unwrap();
            assert!(told.contains(expected), "{told}");
        }
    }
}
