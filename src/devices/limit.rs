//! A rate limit of a device or of one direction of it: one for all workers that it limits.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::limiter::{Limiter, RateLimiter, State};
use crate::poll::{self, Timer};
use crate::snapshot::Snapshot;

/// A limit that several workers share.
#[derive(Clone)]
pub struct Limit {
    limiter: Arc<Mutex<Limiter>>,
    /// As it was when the worker started: who is not limited need not look.
    is_limited: bool,
}

impl Limit {
    /// A new one, of which nothing is used up.
    pub fn new(config: Option<RateLimiter>) -> Self {
        let limiter = Limiter::new(config.unwrap_or_default());
        let is_limited = limiter.is_limited();
        Self { limiter: Arc::new(Mutex::new(limiter)), is_limited }
    }

    /// Changes what `patch` names. Workers that have a copy are started anew.
    pub fn patch(&mut self, patch: RateLimiter) {
        let mut limiter = self.limiter.lock().unwrap_or_else(PoisonError::into_inner);
        limiter.patch(patch);
        self.is_limited = limiter.is_limited();
    }

    /// Whether there is a limit at all.
    pub fn is_limited(&self) -> bool {
        self.is_limited
    }

    /// The timer of a worker that it limits; none without a limit.
    pub fn timer(&self) -> Result<Option<Timer>> {
        self.is_limited.then(|| poll::timer("limit of a device")).transpose()
    }

    /// A frame or request of so many bytes is to pass: now, or after so long.
    pub fn take(&self, bytes: usize) -> std::result::Result<(), Duration> {
        if !self.is_limited {
            return Ok(());
        }
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner).take(bytes as u64)
    }

    /// A frame or request of so many bytes has passed that should have waited.
    pub fn owe(&self, bytes: usize) {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner).owe(bytes as u64);
    }

    /// A frame or request of so many bytes that was let through is not done: it will ask again.
    pub fn refund(&self, bytes: usize) {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner).refund(bytes as u64);
    }

    /// How long until what should have waited is paid back; none: nothing is owed.
    pub fn debt(&self) -> Option<Duration> {
        if !self.is_limited {
            return None;
        }
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner).debt()
    }
}

impl Snapshot for Limit {
    type State = State;

    fn save(&self) -> Result<State> {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner).save()
    }

    fn restore(&mut self, state: State) -> Result<()> {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner).restore(state)
    }
}

/// Lets a timer go off after `wait`, if there is something to wait for. It is never read: setting it anew
/// makes the next edge.
pub fn set(timer: &mut Option<Timer>, wait: Option<Duration>) -> Result<()> {
    // A timer of 0 never goes off.
    match (timer, wait.map(|wait| wait.max(Duration::from_micros(1)))) {
        (Some(timer), Some(wait)) => {
            timer.reset(wait, None).map_err(|error| Error::host(error.to_string())).context("set a timer")
        }
        _ => Ok(()),
    }
}
