//! Flushes of one image, from whichever queue they come. One at a time is with the host: it tells of data that
//! it could not write once, to one of those who wait for it at the same time, and drops the data.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::poll::EventFd;

/// What all queues of a disk share. After one flush failed, all fail, until the image is opened anew: the next
/// one would find nothing left to write and call that a success.
#[derive(Default)]
pub struct Flushes {
    state: Mutex<Progress>,
}

#[derive(Default)]
struct Progress {
    /// How many were begun; the last of them is under way.
    begun: u64,
    is_under_way: bool,
    has_failed: bool,
    /// The queues that wait for the end of the flush that is under way, each once.
    waiting: Vec<Arc<EventFd>>,
}

/// What a queue that has a flush is to do.
pub enum Turn {
    /// It goes to the host.
    Begin(Flushing),
    /// A flush that began after this one was asked for is done, and with it this one.
    Done,
    /// An earlier one failed.
    Failed,
    /// It is asked for again when the queue is kicked, with this number.
    Wait(u64),
}

/// A flush that is under way. One that is dropped has failed, because nobody knows what became of it.
pub struct Flushing {
    flushes: Arc<Flushes>,
    is_over: bool,
}

impl Flushes {
    fn state(&self) -> MutexGuard<'_, Progress> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a flush may begin; `asked`: the number of an earlier [`Turn::Wait`] for the same. `kick` is that of
    /// the queue.
    pub fn enter(self: &Arc<Self>, asked: Option<u64>, kick: &Arc<EventFd>) -> Turn {
        let mut state = self.state();
        let done = state.begun - u64::from(state.is_under_way);
        if state.has_failed {
            return Turn::Failed;
        }
        if asked.is_some_and(|asked| done > asked) {
            return Turn::Done;
        }
        if state.is_under_way {
            // A guest may kick as often as it likes meanwhile.
            if !state.waiting.iter().any(|other| Arc::ptr_eq(other, kick)) {
                state.waiting.push(kick.clone());
            }
            return Turn::Wait(asked.unwrap_or(state.begun));
        }
        state.begun += 1;
        state.is_under_way = true;
        Turn::Begin(Flushing { flushes: self.clone(), is_over: false })
    }
}

impl Flushing {
    /// It is over; whether it is the first one that failed.
    pub fn end(mut self, is_good: bool) -> bool {
        self.leave(is_good)
    }

    fn leave(&mut self, is_good: bool) -> bool {
        if std::mem::replace(&mut self.is_over, true) {
            return false;
        }
        let mut state = self.flushes.state();
        state.is_under_way = false;
        let is_first = !is_good && !std::mem::replace(&mut state.has_failed, !is_good);
        for kick in state.waiting.drain(..) {
            // A counter that is full wakes as well.
            let _ = kick.write(1);
        }
        is_first
    }
}

impl Drop for Flushing {
    fn drop(&mut self) {
        self.leave(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kick() -> Arc<EventFd> {
        Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())
    }

    fn begin(turn: Turn) -> Flushing {
        match turn {
            Turn::Begin(flushing) => flushing,
            _ => panic!("it does not begin"),
        }
    }

    fn wait(turn: Turn) -> u64 {
        match turn {
            Turn::Wait(number) => number,
            _ => panic!("it does not wait"),
        }
    }

    #[test]
    fn a_flush_waits_for_one_under_way_and_fails_with_it() {
        for is_dropped in [false, true] {
            let (flushes, a, b) = (Arc::new(Flushes::default()), kick(), kick());
            let first = begin(flushes.enter(None, &a));
            let asked = wait(flushes.enter(None, &b));
            for _ in 0..3 {
                assert_eq!(wait(flushes.enter(Some(asked), &b)), asked);
            }
            assert!(b.read().is_err(), "it is woken too early");
            match is_dropped {
                false => assert!(first.end(false), "it is the first that failed"),
                true => drop(first),
            }
            assert_eq!(b.read().unwrap(), 1, "it is woken once");
            assert!(matches!(flushes.enter(Some(asked), &b), Turn::Failed));
            assert!(matches!(flushes.enter(None, &a), Turn::Failed));
        }
    }

    #[test]
    fn a_flush_is_done_by_one_that_began_after_it_was_asked_for() {
        let (flushes, a, b, c) = (Arc::new(Flushes::default()), kick(), kick(), kick());
        let first = begin(flushes.enter(None, &a));
        let (of_b, of_c) = (wait(flushes.enter(None, &b)), wait(flushes.enter(None, &c)));
        first.end(true);
        // What was written after the first began is not in it.
        let second = begin(flushes.enter(Some(of_b), &b));
        assert_eq!(wait(flushes.enter(Some(of_c), &c)), of_c);
        let of_a = wait(flushes.enter(None, &a));
        second.end(true);
        assert!(matches!(flushes.enter(Some(of_c), &c), Turn::Done));
        begin(flushes.enter(Some(of_a), &a)).end(true);
        assert!(!begin(flushes.enter(None, &a)).end(true));
    }
}
