//! The steps of a start, and how long each of them took.

use std::fmt;
use std::time::{Duration, Instant};

/// Steps in the order in which they were done, each with its duration.
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
    /// Ends the step that began at the last mark.
    pub fn mark(&mut self, step: &'static str) {
        let now = Instant::now();
        self.steps.push((step, now - self.last));
        self.last = now;
    }

    /// The time since the last mark belongs to no step.
    pub fn skip(&mut self) {
        self.last = Instant::now();
    }

    /// The steps done so far.
    pub fn steps(&self) -> &[(&'static str, Duration)] {
        &self.steps
    }
}

/// As the log has it.
impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (step, time)) in self.steps.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{step} {} us", time.as_micros())?;
        }
        Ok(())
    }
}
