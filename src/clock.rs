//! The time of day as log lines and events tell it, and the time since the process began.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::sys;

/// When the process began, by the monotonic clock, in nanoseconds; 0: nobody has said.
static BEGUN: AtomicU64 = AtomicU64::new(0);

/// The process begins now: to be called first of all, and by a copy of a process.
pub fn begin() {
    BEGUN.store(monotonic().as_nanos() as u64, Relaxed);
}

/// The time since [`begin`] was called.
pub fn uptime() -> Duration {
    let now = monotonic();
    let begun = BEGUN.compare_exchange(0, now.as_nanos() as u64, Relaxed, Relaxed);
    now.saturating_sub(begun.map_or_else(Duration::from_nanos, |_| now))
}

/// The host's monotonic clock, which is the same for all processes.
pub fn monotonic() -> Duration {
    sys::process::time(libc::CLOCK_MONOTONIC)
}

/// The CPU time that all threads of this process have used.
pub fn cpu_time() -> Duration {
    sys::process::time(libc::CLOCK_PROCESS_CPUTIME_ID)
}

/// A moment in UTC, since 1970-01-01. `{}` prints it to the millisecond by RFC 3339, `{:#}` to the
/// nanosecond and without the zone, as log lines begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Utc(pub Duration);

impl Utc {
    /// Now.
    pub fn now() -> Self {
        // A clock set before 1970 counts as 1970.
        Self(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
    }
}

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        let (year, month, day) = date(seconds / 86400);
        let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.")?;
        match f.alternate() {
            true => write!(f, "{:09}", self.0.subsec_nanos()),
            false => write!(f, "{:03}Z", self.0.subsec_millis()),
        }
    }
}

/// Year, month and day of the Gregorian calendar, so many days after 1970-01-01. Counted from the
/// 1st of March, a leap day is the last of its year, and months are 153 days in every five.
fn date(days: u64) -> (u64, u64, u64) {
    const DAYS_400: u64 = 146_097;
    let days = days + 719_468;
    let (era, of_era) = (days / DAYS_400, days % DAYS_400);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / (DAYS_400 - 1)) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + next, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_told_in_utc() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (1_709_251_200, "2024-03-01T00:00:00.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(Utc(Duration::from_secs(seconds)).to_string(), expected);
        }
        let fine = Utc(Duration::new(1_795_500_000, 123_456_789));
        assert_eq!(format!("{fine:#}"), "2026-11-24T06:00:00.123456789");
    }
}
