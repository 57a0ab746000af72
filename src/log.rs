//! Messages on standard error. What a guest can cause is limited, so that it cannot fill a disk.

use std::fmt::Display;
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// So many lines that guests cause are written in one period; a guest that breaks its rings in a
/// loop would write millions.
const LINES_MAX: u32 = 20;
const PERIOD: Duration = Duration::from_secs(10);

struct Period {
    begun: Option<Instant>,
    lines: u32,
}

static PERIOD_NOW: Mutex<Period> = Mutex::new(Period { begun: None, lines: 0 });

/// Says something about the host or the monitor itself.
pub fn line(message: impl Display) {
    // Nobody to tell if standard error is gone.
    let _ = writeln!(std::io::stderr(), "alula: {message}");
}

/// Says something that a guest caused, unless it causes too much.
pub fn guest_line(message: impl Display) {
    let mut period = PERIOD_NOW.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    if period.begun.is_none_or(|begun| now - begun > PERIOD) {
        *period = Period { begun: Some(now), lines: 0 };
    }
    period.lines += 1;
    match period.lines {
        1..LINES_MAX => line(message),
        LINES_MAX => line(format_args!("{message}; more such lines are left out for {} s", PERIOD.as_secs())),
        _ => {}
    }
}
