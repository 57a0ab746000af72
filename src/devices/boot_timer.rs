//! The boot timer: a guest that has booted writes 123 there, and the log says how long it took, as
//! Firecracker's does (`--boot-timer`).

use std::time::{Duration, Instant};

use super::fixed::{FixedDevice, Site};
use crate::bus::BusDevice;
use crate::clock;
use crate::error::Result;
use crate::events::{self, Event};
use crate::log;
use crate::part::Component;
use crate::platform::Place;

/// What a guest writes.
const BOOTED: u8 = 123;

/// One register.
pub struct BootTimer {
    begun: Instant,
    cpu: Duration,
    /// A guest is told of once: it could write for ever.
    is_told: bool,
}

impl BootTimer {
    /// The time runs from now on.
    pub fn start() -> Self {
        Self { begun: Instant::now(), cpu: clock::cpu_time(), is_told: false }
    }
}

impl FixedDevice for BootTimer {
    const NAME: &'static str = "boot timer";

    fn build(_: Place, site: &mut Site<'_>) -> Result<Option<Self>> {
        Ok(site.boot_timer.take())
    }
}

impl Component for BootTimer {}

impl BusDevice for BootTimer {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if (offset, data[0]) != (0, BOOTED) || std::mem::replace(&mut self.is_told, true) {
            return;
        }
        let cpu_us = (clock::cpu_time() - self.cpu).as_micros() as u64;
        let time_us = self.begun.elapsed().as_micros() as u64;
        log::info(format_args!(
            "Guest-boot-time = {time_us:>6} us {} ms, {cpu_us:>6} CPU us {} CPU ms",
            time_us / 1000,
            cpu_us / 1000
        ));
        events::tell(|| Event::Booted { time_us, cpu_us });
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
        assert!(!timer.is_told);
        timer.write(0, &[BOOTED, 0, 0, 0]);
        assert!(timer.is_told);
        timer.write(0, &[BOOTED]);
        let mut byte = [1];
        timer.read(0, &mut byte);
        assert_eq!(byte, [0]);
    }
}
