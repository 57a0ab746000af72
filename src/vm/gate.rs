//! The gate that every vCPU thread passes before it runs guest code.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

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
}

impl Default for Gate {
    fn default() -> Self {
        Self { state: Mutex::new(Standing::Closed), changed: Condvar::new(), open: AtomicBool::new(false) }
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
