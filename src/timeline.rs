//! What a start is made of: when each of its steps was done.

use std::time::{Duration, Instant};

/// Steps and how long each took, in the order they were done.
pub struct Timeline {
    last: Instant,
    steps: Vec<(&'static str, Duration)>,
}

impl Default for Timeline {
    fn default() -> Self {
        Self { last: Instant::now(), steps: Vec::with_capacity(8) }
    }
}

impl Timeline {
    /// The step that began at the last mark is done.
    pub fn mark(&mut self, step: &'static str) {
        let now = Instant::now();
        self.steps.push((step, now - self.last));
        self.last = now;
    }

    /// Time that passes before this belongs to no step.
    pub fn skip(&mut self) {
        self.last = Instant::now();
    }

    /// The steps done so far.
    pub fn steps(&self) -> &[(&'static str, Duration)] {
        &self.steps
    }
}
