//! A page-fault handler: a program of the host that gives a restored guest the pages of its memory as they are first
//! touched. It is told where the memory is as Firecracker tells it: by one message over its Unix socket, a JSON array of
//! the regions, with the descriptor by which it serves faults (SCM_RIGHTS). The connection stays open for as
//! long as the guest is there, and tells by its end that the handler is gone.
//!
//! A thread that touches a page which a handler does not give waits for ever, and can be any thread of the process: the
//! thread `faults` looks after that.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use super::signals;
use crate::carry::memory_file;
use crate::descriptors::Named;
use crate::error::{Context, Error, Result};
use crate::history::{self, Event};
use crate::host::socket;
use crate::log;
use crate::memory::faults::Faults;
use crate::memory::{Memory, Region, Regions, lost};
use crate::poll::{self, EventFd};
use crate::sys::{descriptor, network, process};
use crate::walls;

/// How long a fault may be open without a page, before a handler that is gone ends its guest, a handler that is there
/// is told of, and a restore fails.
const PATIENCE: Duration = Duration::from_secs(5);
/// The time between two looks at the faults, in milliseconds.
const LOOK_MS: i32 = 500;
/// How often in a row each look asks for open faults, as there may be none at some moment.
const LOOKS: u32 = 8;
/// The most faults that this process has from one look to the next while its guest gets no pages.
const FAULTS_MIN: u64 = 64;

/// A handler, and the thread that looks after it until this value is dropped.
pub(super) struct Handler {
    shared: Arc<Shared>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    faults: Faults,
    memory: Memory,
    socket: Named<UnixStream>,
    path: PathBuf,
    /// The stage of the restore: [`LOADING`], [`LOADED`] or [`GIVEN_UP`].
    stage: AtomicU8,
}

/// The guest has not run yet, and `main` may wait for a page.
const LOADING: u8 = 0;
/// The guest has all that a restore gives, and may run.
const LOADED: u8 = 1;
/// A page that a restore needed has not come.
const GIVEN_UP: u8 = 2;

/// A region of guest memory, in the words of the message.
#[derive(Serialize)]
struct Mapped {
    base_host_virt_addr: u64,
    size: u64,
    /// Where the region lies in the memory file.
    offset: u64,
    /// The size of the region's pages, in bytes.
    page_size: u64,
    /// The size of the region's pages, too, in bytes for all the field's name (deprecated).
    page_size_kib: u64,
}

impl Handler {
    /// Has the program that listens at `path` serve the `faults` of `memory`, nothing of which was touched yet.
    ///
    /// # Errors
    /// Nobody listens there.
    pub(super) fn call(path: &Path, faults: Faults, memory: &Memory) -> Result<Self> {
        let attempt = || format!("hand the guest's memory to the page-fault handler at `{}`", path.display());
        let socket = Named::new("page-fault handler", socket::connect(path).with_context(attempt)?);
        let message = serde_json::to_vec(&mapped(&memory.memory())).with_context(attempt)?;
        network::send_with(&*socket, &message, &[&faults]).with_context(attempt)?;
        let shared = Arc::new(Shared {
            faults,
            memory: memory.clone(),
            socket,
            path: path.to_owned(),
            stage: AtomicU8::new(LOADING),
        });
        let stop = Arc::new(poll::event("end of the page-fault handler")?);
        let (watched, until) = (shared.clone(), stop.clone());
        let thread =
            std::thread::Builder::new().name("faults".to_owned()).spawn(move || watched.watch(&until));
        let thread = thread.context("start the thread `faults`")?;
        Ok(Self { shared, stop, thread: Some(thread) })
    }

    /// Whether somebody waits for a page.
    pub(super) fn is_awaited(&self) -> bool {
        self.shared.is_awaited()
    }

    /// The guest is whole, and may run: from here on it waits for its pages.
    ///
    /// # Errors
    /// A page that was needed has not come: what was read of memory says nothing.
    pub(super) fn conclude(&self) -> Result<()> {
        if self.shared.stage.compare_exchange(LOADING, LOADED, SeqCst, SeqCst).is_ok() {
            return Ok(());
        }
        Err(Error::host(format!(
            "the page-fault handler at `{}` has not given a page of the guest's memory for {} s: have it read the \
             message of its socket, and answer each fault (UFFDIO_COPY, UFFDIO_ZEROPAGE)",
            self.shared.path.display(),
            PATIENCE.as_secs()
        )))
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // A counter that is full wakes as well.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }
}

fn mapped(memory: &Regions) -> Vec<Mapped> {
    let ranges: Vec<_> = memory.iter().map(Region::range).collect();
    let regions = memory.iter().zip(memory_file::offsets(&ranges));
    let mapped = regions.map(|(region, offset)| Mapped {
        base_host_virt_addr: region.as_ptr() as u64,
        size: region.len(),
        offset,
        page_size: region.page_size(),
        page_size_kib: region.page_size(),
    });
    mapped.collect()
}

impl Shared {
    /// Looks at the faults until `stop` is written to, or the guest has lost its memory.
    fn watch(&self, stop: &EventFd) {
        walls::enclose(walls::Kind::Aide);
        // Where KVM holds every other thread in a fault, this one takes the signals that end the process.
        process::set_signal_mask(&process::signals(&[]));
        let (mut count, mut waiting_since, mut is_told) = (process::faults(), None, false);
        while descriptor::poll(stop, libc::POLLIN, LOOK_MS) == 0 {
            let before = std::mem::replace(&mut count, process::faults());
            if !self.is_awaited() || count > before + FAULTS_MIN {
                (waiting_since, is_told) = (None, false);
                continue;
            }
            let since = *waiting_since.get_or_insert_with(Instant::now);
            if since.elapsed() < PATIENCE {
                continue;
            }
            if self.stage.compare_exchange(LOADING, GIVEN_UP, SeqCst, SeqCst).is_ok() {
                // A thread that waits goes on with a page of zeros; `main` finds that the restore has failed.
                return self.faults.leave(&self.memory.memory());
            }
            // A vCPU that waits for its page would hold up an end as long.
            if self.is_gone() || signals::is_ending() {
                lost::note_handler_gone();
                signals::end_soon();
                // If the main loop does not turn, the timer's signal comes to this thread.
                process::sleep_for_ever();
            }
            if !std::mem::replace(&mut is_told, true) {
                let (path, seconds) = (&self.path, PATIENCE.as_secs());
                log::line(format_args!(
                    "the guest waits for a page that the page-fault handler at `{}` has not given for {seconds} s",
                    path.display()
                ));
                history::tell(|| Event::PageAwaited { path: path.clone() });
            }
        }
    }

    /// Whether somebody waits for a page, or the handler has not read that pages are gone, for which a device waits that
    /// gives them back. A thread that is to stop and cannot, because KVM or the kernel needs the page, tries again and
    /// again, and does not wait for some moments.
    ///
    /// In a jail, which has no /proc, only faults are seen that the handler has not read. There, a load that comes to no
    /// end is taken for one that waits, and those whose fault a handler has read that is gone are made to ask again.
    fn is_awaited(&self) -> bool {
        let is_unread = || descriptor::poll(&self.faults, libc::POLLIN, 0) & libc::POLLIN != 0;
        let is_seen = (0..LOOKS).any(|_| self.faults.waiting().is_ok_and(|count| count > 0) || is_unread());
        if is_seen || self.faults.are_counted() {
            return is_seen;
        }
        if self.is_gone() {
            self.faults.ask_again(&self.memory.memory());
        }
        self.stage.load(SeqCst) == LOADING
    }

    fn is_gone(&self) -> bool {
        let events = descriptor::poll(&*self.socket, libc::POLLRDHUP, 0);
        events & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0
    }
}
