//! What a worker tells its loop: what to wait for, at first and while it runs, and what to ask `main` for.

use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Weak};

use super::{Job, Loop, RING};
use crate::errands::{Answer, Errands, Pending};
use crate::error::{Context, Result};
use crate::host::Host;
use crate::poll::{Events, Interest};
use crate::uring::Uring;
use crate::virtio::Queue;

/// What a worker tells the loop to wait for. Descriptors must stay open until the worker is stopped.
pub struct Registrar<'a> {
    desk: Desk,
    waits: &'a mut Vec<RawFd>,
}

impl<'a> Registrar<'a> {
    pub(super) fn new(desk: Desk, waits: &'a mut Vec<RawFd>) -> Self {
        Self { desk, waits }
    }

    /// For what comes up while the worker runs.
    pub fn desk(&self) -> &Desk {
        &self.desk
    }

    /// Calls `handle` with `token` when `fd` is ready for `interest`.
    pub fn add(&mut self, fd: &impl AsRawFd, interest: Interest, token: u32) -> Result<()> {
        self.desk.events.add(fd, interest, self.desk.token(token))?;
        self.waits.push(fd.as_raw_fd());
        Ok(())
    }

    /// As [`Self::add`]; the switch turns that off and on.
    pub fn add_switched(&mut self, fd: &impl AsRawFd, interest: Interest, token: u32) -> Result<Switch> {
        self.add(fd, interest, token)?;
        let token = self.desk.token(token);
        Ok(Switch { events: self.desk.events.clone(), fd: fd.as_raw_fd(), interest, token, is_on: true })
    }

    /// Calls `handle` with `token` once for every kick of `queue` (or for several). The event is
    /// edge-triggered and never read: that would be a system call for each.
    pub fn kick(&mut self, queue: &Queue, token: u32) -> Result<()> {
        self.add(queue.kick(), Interest::IN | Interest::EDGE_TRIGGERED, token)
    }

    /// A ring of the worker's own: calls `handle` with [`RING`] when some of it is complete, and for
    /// kicks of `queue`.
    pub fn ring(&mut self, ring: &mut Uring, queue: &Queue) -> Result<()> {
        self.add(ring.event(), Interest::IN | Interest::EDGE_TRIGGERED, RING)?;
        match ring.watch(queue.kick()).context("use io_uring")? {
            true => Ok(()),
            false => self.kick(queue, RING),
        }
    }
}

/// Whether the loop waits for a descriptor: a worker that could do nothing now need not be told.
pub struct Switch {
    events: Arc<Events>,
    fd: RawFd,
    interest: Interest,
    token: u64,
    is_on: bool,
}

impl Switch {
    /// Waits for it or not. On again, what is there already is an event.
    pub fn set(&mut self, is_on: bool) -> Result<()> {
        if self.is_on != is_on {
            let interest = if is_on { self.interest } else { Interest::EDGE_TRIGGERED };
            self.events.change(&self.fd, interest, self.token)?;
            self.is_on = is_on;
        }
        Ok(())
    }
}

/// What a worker keeps of its loop for what comes up while it runs: descriptors that come and go, and what only
/// `main` may do. A desk is for one start of its worker: a worker that
/// starts again is given another desk.
#[derive(Clone)]
pub struct Desk {
    events: Arc<Events>,
    /// The loop holds its workers, not they it.
    event_loop: Weak<Loop>,
    errands: Arc<Errands>,
    slot: usize,
}

impl Desk {
    pub(super) fn new(events: &Arc<Events>, event_loop: &Arc<Loop>, slot: usize) -> Self {
        let (events, errands) = (events.clone(), event_loop.errands.clone());
        Self { events, event_loop: Arc::downgrade(event_loop), errands, slot }
    }

    fn token(&self, token: u32) -> u64 {
        super::token(self.slot, token)
    }

    /// Calls `handle` with `token` when `fd` is ready for `interest`, until what this returns is dropped. An
    /// event that was ready before that may still come, as may one of a descriptor that had the token before:
    /// the worker finds nothing there. How many descriptors a guest can make a device have is for the device
    /// to limit.
    pub fn watch<T: AsRawFd>(&self, fd: T, interest: Interest, token: u32) -> Result<Watched<T>> {
        let token = self.token(token);
        self.events.add(&fd, interest, token)?;
        let watch = Watch { events: self.events.clone(), fd: fd.as_raw_fd(), interest, token };
        Ok(Watched { watch, fd })
    }

    /// Has `main` do `work`, soon, and calls `handle` with `token` when the answer can be taken from what this
    /// returns. The worker drops that when it is stopped, at the latest. An error: too many errands are under
    /// way, which is the guest's doing.
    pub fn ask(
        &self,
        token: u32,
        work: impl FnOnce(&mut Host) -> Answer + Send + 'static,
    ) -> Result<Pending> {
        let (event_loop, slot) = (self.event_loop.clone(), self.slot);
        self.errands.ask(work, move |answered| {
            if let Some(event_loop) = event_loop.upgrade() {
                event_loop.post(Job::Tell(slot, token, answered));
            }
        })
    }
}

/// A descriptor, or what has one, that a loop waits for as long as it is here.
pub struct Watched<T> {
    // In this order: it leaves the loop, then it is closed, and its number may be another one's.
    watch: Watch,
    fd: T,
}

impl<T> Watched<T> {
    /// What to wait for from now on. With nothing, an error or a hang-up is still told of, once.
    pub fn set_interest(&mut self, interest: Interest) -> Result<()> {
        self.watch.set(interest)
    }

    /// The descriptor alone, which the loop does not wait for any more.
    pub fn into_inner(self) -> T {
        let Self { watch, fd } = self;
        drop(watch);
        fd
    }
}

impl<T> Deref for Watched<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.fd
    }
}

impl<T> DerefMut for Watched<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.fd
    }
}

/// A place in a loop's set.
struct Watch {
    events: Arc<Events>,
    fd: RawFd,
    interest: Interest,
    token: u64,
}

impl Watch {
    fn set(&mut self, interest: Interest) -> Result<()> {
        // Else a hang-up would be told of again and again.
        let interest = if interest.is_empty() { Interest::EDGE_TRIGGERED } else { interest };
        if self.interest != interest {
            self.events.change(&self.fd, interest, self.token)?;
            self.interest = interest;
        }
        Ok(())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // An error: it has left the set by itself.
        let _ = self.events.remove(&self.fd);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;
    use crate::poll::EventFd;

    #[test]
    fn a_descriptor_is_waited_for_until_it_is_given_back() {
        let errands = Errands::new(Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()));
        let event_loop = Loop::new("it", &errands).unwrap();
        let events = Arc::new(Events::new().unwrap());
        let desk = Desk::new(&events, &event_loop, 3);
        let ready = || -> Vec<u64> {
            let mut ready = Vec::new();
            events.wait(Some(Duration::ZERO), &mut ready).unwrap();
            ready.iter().map(|event| event.token).collect()
        };
        let (stream, mut other) = UnixStream::pair().unwrap();
        let mut watched = desk.watch(stream, Interest::IN, 7).unwrap();
        assert!(ready().is_empty());
        other.write_all(b"x").unwrap();
        assert!(ready() == [super::super::token(3, 7)]);
        watched.set_interest(Interest::empty()).unwrap();
        assert!(ready().is_empty());
        drop(other);
        assert_eq!([ready(), ready()].concat().len(), 1, "a hang-up is told of once");
        watched.set_interest(Interest::IN).unwrap();
        assert_eq!(ready().len(), 1);
        let stream = watched.into_inner();
        assert!(ready().is_empty());
        drop(desk.watch(stream, Interest::IN, 8).unwrap());
    }
}
