//! The inbox of a loop: what it is asked to do, by whoever has something to do for it, while it waits or works.

use super::locks::{AtomicBool, Mutex, MutexGuard, Ordering, PoisonError};

/// The counter that a loop waits for among other events, and by which it is woken.
pub(super) trait Wake {
    /// Ends the loop's wait, now or when it next begins.
    fn wake(&self);

    /// The loop looks: it may wait again.
    fn hush(&self);
}

/// The taker of jobs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// There is none so far.
    Alone,
    /// The loop.
    Attended,
    /// The loop has its last job, or has ended: nobody takes more.
    Over,
}

struct State<J> {
    jobs: Vec<J>,
    standing: Standing,
}

pub(super) struct Inbox<J, W> {
    state: Mutex<State<J>>,
    /// Something is in the inbox: looked at after each event that is handled.
    has_jobs: AtomicBool,
    pub(super) wake: W,
}

impl<J, W: Wake> Inbox<J, W> {
    pub(super) fn new(wake: W) -> Self {
        let state = State { jobs: Vec::new(), standing: Standing::Alone };
        Self { state: Mutex::new(state), has_jobs: AtomicBool::new(false), wake }
    }

    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on somebody takes jobs.
    pub(super) fn attend(&self) {
        let mut state = self.lock();
        if state.standing == Standing::Alone {
            state.standing = Standing::Attended;
        }
    }

    /// Leaves a job; false: nobody is there to take it.
    pub(super) fn post(&self, job: J) -> bool {
        let mut state = self.lock();
        let is_there = state.standing == Standing::Attended;
        if is_there {
            self.put(&mut state, job);
        }
        is_there
    }

    /// Leaves the last job of all: who comes later finds nobody.
    pub(super) fn post_last(&self, job: J) {
        let mut state = self.lock();
        if state.standing == Standing::Attended {
            state.standing = Standing::Over;
            self.put(&mut state, job);
        }
    }

    fn put(&self, state: &mut State<J>, job: J) {
        state.jobs.push(job);
        self.has_jobs.store(true, Ordering::Release);
        self.wake.wake();
    }

    /// Says whether there may be jobs, without a lock.
    pub(super) fn has_jobs(&self) -> bool {
        self.has_jobs.load(Ordering::Acquire)
    }

    /// Takes the jobs that are there.
    pub(super) fn take(&self) -> Vec<J> {
        let mut state = self.lock();
        // With the lock, as a job comes: else that of a job that came in between would be left behind, and wake the
        // loop again and again for nothing.
        self.wake.hush();
        self.has_jobs.store(false, Ordering::Relaxed);
        std::mem::take(&mut state.jobs)
    }

    /// Has no more jobs taken, and returns those that are left.
    pub(super) fn close(&self) -> Vec<J> {
        let mut state = self.lock();
        state.standing = Standing::Over;
        std::mem::take(&mut state.jobs)
    }

    /// Looks at the jobs that are there and at the counter, while nobody changes them.
    #[cfg(test)]
    pub(super) fn look<R>(&self, look: impl FnOnce(&[J], &W) -> R) -> R {
        look(&self.lock().jobs, &self.wake)
    }
}
