//! What a guest is there for, which another thread than `main` does with it: `alula run -- COMMAND`.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::error::Result;
use crate::poll::{self, EventFd};

/// What a guest is there for.
pub struct Purpose {
    is_met: AtomicBool,
    ended: EventFd,
    /// How often an agent in the guest has said that it listens.
    calls: Mutex<u64>,
    called: Condvar,
}

impl Purpose {
    /// One that is not met yet.
    pub fn new() -> Result<Self> {
        let ended = poll::event("the command's end")?;
        Ok(Self { is_met: AtomicBool::new(false), ended, calls: Mutex::default(), called: Condvar::new() })
    }

    /// It is met: a guest that ends from now on has done what it was there for.
    pub fn meet(&self) {
        self.is_met.store(true, SeqCst);
    }

    /// Whether it is.
    pub fn is_met(&self) -> bool {
        self.is_met.load(SeqCst)
    }

    /// The guest is not needed any more.
    pub fn end(&self) {
        self.meet();
        // A counter that is full wakes as well.
        let _ = self.ended.write(1);
    }

    /// Readable once the guest is not needed any more.
    pub fn event(&self) -> &EventFd {
        &self.ended
    }

    /// An agent in the guest says that it listens.
    pub fn call(&self) {
        *self.calls.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.called.notify_all();
    }

    /// How often that was said, once it was said more often than `before`, or after this time at the latest.
    pub fn wait_for_call(&self, before: u64, time: Duration) -> u64 {
        let calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.called.wait_timeout_while(calls, time, |calls| *calls <= before);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_an_agent_hears_each_of_its_calls() {
        let purpose = Purpose::new().unwrap();
        assert_eq!(purpose.wait_for_call(0, Duration::ZERO), 0);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| purpose.wait_for_call(0, Duration::MAX));
            purpose.call();
            assert_eq!(waits.join().unwrap(), 1);
        });
        assert_eq!(purpose.wait_for_call(0, Duration::MAX), 1, "it has been said before");
        assert_eq!(purpose.wait_for_call(1, Duration::ZERO), 1);
        assert!(!purpose.is_met());
        purpose.end();
        assert!(purpose.is_met() && purpose.event().read().is_ok());
    }
}
