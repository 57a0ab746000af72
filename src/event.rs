//! The core of an event loop: an epoll set, in which each descriptor is known by a token.

use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::error::{Context, Result};

pub use vmm_sys_util::eventfd::EventFd;

/// What a loop waits for on a descriptor: readable, writable.
pub type Interest = EventSet;

/// How many events one wait can return; the next wait returns more.
const EVENTS: usize = 32;

/// A set of descriptors to wait for, level-triggered unless `Interest::EDGE_TRIGGERED` is given. The kernel
/// takes a descriptor out of the set when its last copy is closed (epoll(7)).
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
    /// What the descriptor is ready for.
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

    /// Changes what `fd` is waited for from now on: nothing, if `interest` is empty.
    pub fn change(&self, fd: &impl AsRawFd, interest: Interest, token: u64) -> Result<()> {
        self.control(ControlOperation::Modify, fd.as_raw_fd(), interest, token)
    }

    /// Takes `fd` out of the set.
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
