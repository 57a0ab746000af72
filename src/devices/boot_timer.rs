//! The boot timer: a guest that has booted writes 123 there, and the log says how long it took, as
//! Firecracker's does (`--boot-timer`).

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::fixed::{FixedDevice, Site};
use crate::bus::BusDevice;
use crate::clock;
use crate::error::Result;
use crate::history::{self, Event};
use crate::log;
use crate::part::Component;
use crate::platform::Place;
use crate::snapshot::Snapshot;

/// What a guest writes.
const BOOTED: u8 = 123;

/// One register.
pub struct BootTimer {
    // Host
    begun: Instant,
    /// CPU time of this process when the timer was started.
    cpu: Duration,
    // Guest-visible
    state: State,
}

/// What is saved of the timer.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct State {
    /// The log has said that the guest has booted. It says so once: a guest could write for ever.
    is_told: bool,
    /// The time, in microseconds, that the guest took before it was saved.
    time_us: u64,
    /// The CPU time, in microseconds, that was used before the guest was saved.
    cpu_us: u64,
}

impl BootTimer {
    /// The time runs from now on.
    pub fn start() -> Self {
        Self { begun: Instant::now(), cpu: clock::cpu_time(), state: State::default() }
    }

    /// The state with the times as they are now.
    fn now(&self) -> State {
        let (time, cpu) = (self.begun.elapsed(), clock::cpu_time().saturating_sub(self.cpu));
        let State { is_told, time_us, cpu_us } = self.state;
        State {
            is_told,
            time_us: time_us.saturating_add(time.as_micros() as u64),
            cpu_us: cpu_us.saturating_add(cpu.as_micros() as u64),
        }
    }
}

impl FixedDevice for BootTimer {
    const NAME: &'static str = "boot timer";

    fn build(_: Place, site: &mut Site<'_>) -> Result<Option<Self>> {
        Ok(site.boot_timer.take())
    }
}

impl Snapshot for BootTimer {
    type State = State;

    fn save(&self) -> Result<State> {
        Ok(self.now())
    }

    fn restore(&mut self, state: State) -> Result<()> {
        *self = Self { state, ..Self::start() };
        Ok(())
    }
}

impl Component for BootTimer {}

impl BusDevice for BootTimer {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if (offset, data[0]) != (0, BOOTED) || std::mem::replace(&mut self.state.is_told, true) {
            return;
        }
        let State { time_us, cpu_us, .. } = self.now();
        log::info(format_args!(
            "Guest-boot-time = {time_us:>6} us {} ms, {cpu_us:>6} CPU us {} CPU ms",
            time_us / 1000,
            cpu_us / 1000
        ));
        history::tell(|| Event::Booted { time_us, cpu_us });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_write_of_the_right_value_counts() {
        let mut timer = BootTimer::start();
        timer.write(0, &[122]);
        timer.write(1, &[BOOTED]);
        assert!(!timer.state.is_told);
        timer.write(0, &[BOOTED, 0, 0, 0]);
        assert!(timer.state.is_told);
        timer.write(0, &[BOOTED]);
        let mut byte = [1];
        timer.read(0, &mut byte);
        assert_eq!(byte, [0]);
    }

    #[test]
    fn a_restored_timer_goes_on_and_tells_no_second_time() {
        let mut timer = BootTimer::start();
        timer.restore(State { is_told: false, time_us: 5_000_000, cpu_us: 7_000_000 }).unwrap();
        timer.write(0, &[BOOTED]);
        let saved = timer.save().unwrap();
        assert!(saved.is_told && saved.time_us >= 5_000_000 && saved.cpu_us >= 7_000_000, "{saved:?}");
        let mut other = BootTimer::start();
        other.restore(saved).unwrap();
        assert!(other.save().unwrap().is_told);
        other.restore(State { is_told: true, time_us: u64::MAX, cpu_us: u64::MAX }).unwrap();
        assert_eq!(other.save().unwrap().time_us, u64::MAX);
    }
}
