//! The core of an event loop: an epoll set, in which each descriptor is known by a token.

use std::borrow::Cow;
use std::io::ErrorKind;
use std::ops::Deref;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd;
use vmm_sys_util::timerfd::TimerFd;

use crate::descriptors::Named;
use crate::error::{Context, Error, Result};
use crate::sys;

/// A counter that wakes whoever waits for it (eventfd(2)).
#[derive(Debug)]
pub struct EventFd(Named<eventfd::EventFd>);

impl EventFd {
    /// One called "event": see [`event`].
    pub fn new(flags: i32) -> std::io::Result<Self> {
        Ok(Self(Named::new("event", eventfd::EventFd::new(flags)?)))
    }

    /// One that does not block, called `name` among this process's descriptors.
    pub fn called(name: impl Into<Cow<'static, str>>) -> std::io::Result<Self> {
        let made = eventfd::EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self(Named::new(name, made)))
    }

    /// Another descriptor of the same counter, called "event".
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self(Named::new("event", self.0.try_clone()?)))
    }
}

impl Deref for EventFd {
    type Target = eventfd::EventFd;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The same, with an error that says what was attempted.
pub fn event(name: impl Into<Cow<'static, str>>) -> Result<EventFd> {
    EventFd::called(name).context("create an event descriptor")
}

/// A timer that a loop can wait for (timerfd_create(2)).
pub type Timer = Named<TimerFd>;

/// A timer that is not set, called `name` among this process's descriptors.
pub fn timer(name: impl Into<Cow<'static, str>>) -> Result<Timer> {
    let made = TimerFd::new().map_err(|error| Error::host(error.to_string()));
    Ok(Named::new(name, made.context("create a timer")?))
}

/// What a loop waits for on a descriptor: readable, writable.
pub type Interest = EventSet;

/// How many events one wait can return; the next wait returns more.
const EVENTS: usize = 32;

/// Blocks all signals in this thread: other threads take those that are sent to the process. For a thread
/// that may be held by a disk that does not answer, where only SIGKILL reaches it.
pub fn leave_signals_to_others() {
    sys::process::block_all_signals(&[]);
}

/// A set of descriptors to wait for, level-triggered unless `Interest::EDGE_TRIGGERED` is given. The kernel
/// takes a descriptor out of the set when its last copy is closed (epoll(7)).
pub struct Events {
    epoll: Named<Epoll>,
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
        Ok(Self { epoll: Named::new("event loop", Epoll::new().context("create an epoll set")?) })
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
        self.wait_with(timeout, ready, None)
    }

    /// As [`Self::wait`], with the signal mask `mask` while this thread waits, and its own before and after.
    pub fn wait_masked(
        &self,
        timeout: Option<Duration>,
        ready: &mut Vec<Ready>,
        mask: &libc::sigset_t,
    ) -> Result<()> {
        self.wait_with(timeout, ready, Some(mask))
    }

    fn wait_with(
        &self,
        timeout: Option<Duration>,
        ready: &mut Vec<Ready>,
        mask: Option<&libc::sigset_t>,
    ) -> Result<()> {
        ready.clear();
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
        let timeout_ms = timeout.map_or(-1, |timeout| timeout.as_millis().try_into().unwrap_or(i32::MAX));
        let count = match sys::descriptor::wait(self, &mut events, timeout_ms, mask) {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            result => result.context("wait for events")?,
        };
        let read = |event: &libc::epoll_event| Ready {
            token: event.u64,
            events: EventSet::from_bits_truncate(event.events),
        };
        ready.extend(events[..count].iter().map(read));
        Ok(())
    }
}
