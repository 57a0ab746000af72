//! The guest's watchdog: a countdown that the guest begins, and begins anew as long as it is well. Once the countdown
//! is over, `main` does what the configuration says (`microvm/watchdog.rs`). The registers are those that Linux has
//! drivers for: `acpi.rs` on x86_64, `sp805.rs` on aarch64.
//!
//! Nothing that a guest writes sets a timer: `main`, which looks at a running guest once a second, reads then when the
//! countdown will be over, and waits no longer than that. A countdown is therefore never shorter than [`SHORTEST`].

pub mod acpi;
pub mod sp805;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The shortest countdown, whatever the guest writes. A guest that is over in no time would have `main` reset it, or
/// tell of it, without end; and `main` must not miss one between two looks.
pub const SHORTEST: Duration = Duration::from_secs(1);
/// A countdown that nobody has set.
const DEFAULT: Duration = Duration::from_secs(60);
/// A process that finds the end of a countdown so late did not run: it was stopped, or its host stood still. Its
/// guest did not run either.
const LATE_MAX: Duration = Duration::from_secs(1);

/// The countdown, as the guest's registers and `main` share it.
#[derive(Clone, Default)]
pub struct Watchdog(Arc<Mutex<Countdown>>);

impl Watchdog {
    /// A watchdog that does not count. `has_expired`: that of the machine before this one, which was reset, had.
    pub fn new(has_expired: bool) -> Self {
        let state = State { has_expired, ..State::default() };
        Self(Arc::new(Mutex::new(Countdown { since: None, state })))
    }

    /// The countdown, which nobody else uses meanwhile.
    pub fn lock(&self) -> MutexGuard<'_, Countdown> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Time that counts down while the guest runs.
#[derive(Default)]
pub struct Countdown {
    /// When the guest began to run, or the countdown while it ran; none: the guest stands still.
    since: Option<Instant>,
    state: State,
}

/// The countdown of a guest that stands still, as it is saved.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct State {
    length: Duration,
    phase: Phase,
    has_expired: bool,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
enum Phase {
    Stopped,
    /// The countdown goes on: this was left at the time of [`Countdown::since`].
    Counts(Duration),
    /// The guest has let the time pass, and not begun anew.
    Over,
}

impl Default for State {
    fn default() -> Self {
        Self { length: DEFAULT, phase: Phase::Stopped, has_expired: false }
    }
}

impl Countdown {
    /// The next countdown is as long as this, or as [`SHORTEST`].
    pub fn set_length(&mut self, length: Duration) {
        self.state.length = length.max(SHORTEST);
    }

    /// Begins, or begins anew.
    pub fn begin(&mut self, now: Instant) {
        self.go_on_with(self.state.length, now);
    }

    fn go_on_with(&mut self, left: Duration, now: Instant) {
        self.state.phase = Phase::Counts(left);
        self.since = self.since.map(|_| now);
    }

    /// Ends without anybody being told.
    pub fn stop(&mut self) {
        self.state.phase = Phase::Stopped;
    }

    /// Says whether the guest has begun the countdown, and not stopped it.
    pub fn is_on(&self) -> bool {
        self.state.phase != Phase::Stopped
    }

    /// How much is left of it.
    pub fn left(&self, now: Instant) -> Duration {
        let passed = self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        match self.state.phase {
            Phase::Stopped => self.state.length,
            Phase::Counts(left) => left.saturating_sub(passed),
            Phase::Over => Duration::ZERO,
        }
    }

    /// When it will be over; none: not at all, as things are.
    pub fn ends_at(&self) -> Option<Instant> {
        match self.state.phase {
            Phase::Counts(left) => self.since?.checked_add(left),
            Phase::Stopped | Phase::Over => None,
        }
    }

    /// Says whether the countdown is over at last: true once. One that is found over too late ([`LATE_MAX`]) begins anew instead.
    pub fn take_end(&mut self, now: Instant) -> bool {
        let Some(end) = self.ends_at().filter(|end| *end <= now) else { return false };
        if now - end > LATE_MAX {
            self.begin(now);
            return false;
        }
        (self.state.phase, self.state.has_expired) = (Phase::Over, true);
        true
    }

    /// Has it be over once more, a little later.
    pub fn end_again(&mut self, now: Instant) {
        self.go_on_with(SHORTEST, now);
    }

    /// Says whether the countdown was ever over, as far as the guest has not had that forgotten.
    pub fn has_expired(&self) -> bool {
        self.state.has_expired
    }

    /// Forgets that it was over.
    pub fn forget(&mut self) {
        self.state.has_expired = false;
    }

    /// The guest stands still from now on.
    pub fn pause(&mut self, now: Instant) {
        if let Phase::Counts(_) = self.state.phase {
            self.state.phase = Phase::Counts(self.left(now));
        }
        self.since = None;
    }

    /// The guest runs from now on.
    pub fn resume(&mut self, now: Instant) {
        self.pause(now);
        self.since = Some(now);
    }

    /// The state of a guest that stands still.
    fn state(&self) -> State {
        self.state
    }

    /// Takes the state of a guest that stood still.
    fn set_state(&mut self, state: State) {
        self.state = state;
        self.set_length(state.length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A countdown of so many seconds, which has just begun in a guest that runs.
    fn countdown(seconds: u32, now: Instant) -> Countdown {
        let mut countdown = Countdown::default();
        countdown.resume(now);
        countdown.set_length(seconds * SECOND);
        countdown.begin(now);
        countdown
    }

    #[test]
    fn a_countdown_is_over_once_and_not_if_it_begins_anew() {
        let start = Instant::now();
        let mut countdown = countdown(10, start);
        assert_eq!(countdown.ends_at(), Some(start + 10 * SECOND));
        assert!(!countdown.take_end(start + 9 * SECOND));
        countdown.begin(start + 9 * SECOND);
        assert!(!countdown.take_end(start + 18 * SECOND) && !countdown.has_expired());
        assert!(countdown.take_end(start + 19 * SECOND) && countdown.has_expired());
        assert!(!countdown.take_end(start + 100 * SECOND) && countdown.ends_at().is_none());
        assert!(countdown.is_on() && countdown.left(start + 100 * SECOND).is_zero());
        // A guest that has come back is watched again.
        countdown.begin(start + 100 * SECOND);
        assert!(countdown.take_end(start + 110 * SECOND));
        countdown.forget();
        countdown.begin(start + 200 * SECOND);
        countdown.stop();
        assert!(!countdown.take_end(start + 210 * SECOND) && !countdown.has_expired() && !countdown.is_on());
    }

    #[test]
    fn a_paused_guest_has_all_the_time_that_was_left() {
        let start = Instant::now();
        let mut countdown = countdown(10, start);
        for pause in [4, 5] {
            countdown.pause(start + pause * SECOND);
            assert_eq!(countdown.left(start + 1000 * SECOND), 6 * SECOND);
        }
        assert!(countdown.ends_at().is_none() && !countdown.take_end(start + 1000 * SECOND));
        let state = countdown.state();
        for resume in [2000, 2001] {
            countdown.resume(start + resume * SECOND);
        }
        assert_eq!(countdown.ends_at(), Some(start + 2006 * SECOND));
        assert!(countdown.take_end(start + 2006 * SECOND));
        // In another process.
        let mut other = Countdown::default();
        other.set_state(state);
        assert_eq!((other.state(), other.ends_at()), (state, None));
        other.resume(start);
        assert_eq!(other.ends_at(), Some(start + 6 * SECOND));
    }

    #[test]
    fn who_finds_the_end_too_late_gives_the_guest_its_time_again() {
        let start = Instant::now();
        let mut countdown = countdown(10, start);
        let late = start + 10 * SECOND + LATE_MAX + Duration::from_nanos(1);
        assert!(!countdown.take_end(late));
        assert_eq!(countdown.ends_at(), Some(late + 10 * SECOND));
        assert!(countdown.take_end(late + 10 * SECOND + LATE_MAX));
        countdown.end_again(late);
        assert_eq!(countdown.ends_at(), Some(late + SHORTEST));
    }

    #[test]
    fn no_length_and_no_state_is_too_much() {
        let start = Instant::now();
        let mut countdown = countdown(0, start);
        assert_eq!(countdown.ends_at(), Some(start + SHORTEST));
        for length in [Duration::ZERO, Duration::MAX] {
            for phase in [Phase::Stopped, Phase::Counts(length), Phase::Over] {
                countdown.set_state(State { length, phase, has_expired: true });
                countdown.resume(start);
                countdown.take_end(start + SECOND);
                countdown.begin(start + SECOND);
                countdown.pause(start + SECOND);
                assert!(countdown.left(start) >= SHORTEST, "{length:?} {phase:?}");
            }
        }
    }
}
