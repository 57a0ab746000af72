//! An event loop's core: which descriptors are waited for, and by which token each is known.

use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::error::{Context, Result};

pub use vmm_sys_util::eventfd::EventFd;

/// What is waited for on a descriptor.
pub type Interest = EventSet;

/// How many events one wait can return; more are returned by the next.
const EVENTS: usize = 32;

/// A set of descriptors to wait for. Level-triggered unless `Interest::EDGE_TRIGGERED` is given.
/// A descriptor that is closed elsewhere leaves the set by itself (the kernel's rule for epoll).
pub struct Events {
    epoll: Epoll,
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

/// One ready descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Ready {
    /// The token given with the descriptor.
    pub token: u64,
    /// What it is ready for.
    pub events: EventSet,
}

impl Events {
    /// An empty set.
    pub fn new() -> Result<Self> {
        Ok(Self { epoll: Epoll::new().context("create an epoll set")? })
    }

    /// Waits for `interest` on `fd`; events carry `token`.
    pub fn add(&self, fd: &impl AsRawFd, interest: Interest, token: u64) -> Result<()> {
        self.control(ControlOperation::Add, fd.as_raw_fd(), interest, token)
    }

    /// Waits for something else from now on, or for nothing (an empty interest).
    pub fn change(&self, fd: &impl AsRawFd, interest: Interest, token: u64) -> Result<()> {
        self.control(ControlOperation::Modify, fd.as_raw_fd(), interest, token)
    }

    /// Waits for nothing more on `fd`.
    pub fn remove(&self, fd: &impl AsRawFd) -> Result<()> {
        self.control(ControlOperation::Delete, fd.as_raw_fd(), EventSet::empty(), 0)
    }

    fn control(&self, operation: ControlOperation, fd: RawFd, interest: Interest, token: u64) -> Result<()> {
        self.epoll.ctl(operation, fd, EpollEvent::new(interest, token)).context("change an epoll set")
    }

    /// Waits until something is ready, or until `timeout` (none: for ever), and puts what is ready
    /// into `ready`. An interrupting signal returns an empty set.
    pub fn wait(&self, timeout: Option<Duration>, ready: &mut Vec<Ready>) -> Result<()> {
        ready.clear();
        let mut events = [EpollEvent::default(); EVENTS];
        let timeout_ms = timeout.map_or(-1, |timeout| timeout.as_millis().try_into().unwrap_or(i32::MAX));
        match self.epoll.wait(timeout_ms, &mut events) {
            Ok(count) => ready.extend(
                events[..count].iter().map(|event| Ready { token: event.data(), events: event.event_set() }),
            ),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("wait for events"),
        }
        Ok(())
    }
}
