//! The gate that every vCPU thread passes before it runs guest code.

use std::time::{Duration, Instant};

use super::locks::{AtomicBool, AtomicU64, Condvar, Mutex, Ordering, PoisonError};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    Closed,
    Open,
    Gone,
}

/// Closed: vCPUs wait (paused). Open: they run. Gone: their threads end.
pub struct Gate {
    state: Mutex<Standing>,
    changed: Condvar,
    /// `state` is `Open`, to be read without the lock between two entries into the guest. In one order
    /// with the vCPUs' `immediate_exit`, hence sequentially consistent.
    open: AtomicBool,
    /// The time for which a vCPU that was kicked rests, in milliseconds.
    rest_ms: AtomicU64,
}

impl Default for Gate {
    fn default() -> Self {
        let (state, open) = (Mutex::new(Standing::Closed), AtomicBool::new(false));
        Self { state, changed: Condvar::new(), open, rest_ms: AtomicU64::new(0) }
    }
}

impl Gate {
    /// Lets vCPUs run, unless they are gone.
    pub fn open(&self) {
        self.set(Standing::Open);
    }

    /// Makes vCPUs wait when they next pass. Who needs them stopped must also kick them.
    pub fn close(&self) {
        self.set(Standing::Closed);
    }

    /// Ends the vCPUs' threads when they next pass; there is no way back.
    pub fn remove(&self) {
        self.set(Standing::Gone);
    }

    /// Whether vCPUs may go on.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }

    /// Waits while the gate is closed; false: it is gone.
    pub fn pass(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while *state == Standing::Closed {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        *state == Standing::Open
    }

    /// From now on a vCPU that was kicked while the gate is open rests for so long before it goes on.
    pub fn have_rest(&self, time: Duration) {
        self.rest_ms.store(time.as_millis() as u64, Ordering::SeqCst);
        // A vCPU that rests looks anew how long it is to rest.
        drop(self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// For how long vCPUs rest.
    pub fn rest_time(&self) -> Duration {
        Duration::from_millis(self.rest_ms.load(Ordering::SeqCst))
    }

    /// Waits for as long as vCPUs are to rest, and not while the gate is closed.
    pub fn rest(&self) {
        if self.rest_time().is_zero() {
            return;
        }
        let begun = Instant::now();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while *state == Standing::Open {
            let left = self.rest_time().saturating_sub(begun.elapsed());
            if left.is_zero() {
                return;
            }
            (state, _) = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn set(&self, to: Standing) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *state != Standing::Gone {
            *state = to;
            self.open.store(to == Standing::Open, Ordering::SeqCst);
            // Whoever wakes takes the lock at once.
            drop(state);
            self.changed.notify_all();
        }
    }
}
