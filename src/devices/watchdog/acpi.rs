//! The watchdog of x86_64 machines: registers that only the WDAT table gives a meaning to (Microsoft, Hardware Watchdog
//! Timers Design Specification), which `arch/x86_64/wdat.rs` writes. Linux's driver is `wdat_wdt`.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{State as CountdownState, Watchdog};
use crate::bus::BusDevice;
use crate::devices::fixed::{FixedDevice, Site};
use crate::error::Result;
use crate::part::Component;
use crate::platform::node::WatchdogRegisters;
use crate::platform::{Node, Place};
use crate::snapshot::Snapshot;

const IS_ON: u64 = WatchdogRegisters::IS_ON as u64;
const LEFT: u64 = WatchdogRegisters::LEFT as u64;
const LENGTH: u64 = WatchdogRegisters::LENGTH as u64;
const HAS_EXPIRED: u64 = WatchdogRegisters::HAS_EXPIRED as u64;
const RESETS: u64 = WatchdogRegisters::RESETS as u64;

/// The period that counts are of, in milliseconds.
const PERIOD_MS: u32 = 100;
/// The most counts that the table offers, more than a day. A guest can write more than that, and has it.
const COUNTS_MAX: u32 = 1_000_000;
/// A countdown at power-on: a minute.
const COUNTS: u32 = 600;

/// Five 32-bit registers.
pub struct AcpiWatchdog {
    watchdog: Watchdog,
    /// The length of a countdown, as the guest has written it.
    counts: u32,
}

impl AcpiWatchdog {
    /// Registers of this watchdog.
    pub fn new(watchdog: Watchdog) -> Self {
        Self { watchdog, counts: COUNTS }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let countdown = self.watchdog.lock();
        match offset {
            IS_ON => countdown.is_on().into(),
            LEFT => {
                let left = countdown.left(Instant::now()).as_millis().div_ceil(PERIOD_MS.into());
                left.try_into().unwrap_or(u32::MAX)
            }
            LENGTH => self.counts,
            HAS_EXPIRED => countdown.has_expired().into(),
            // The owner says what an expired watchdog does: there is nothing for a guest to choose.
            RESETS => 1,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let mut countdown = self.watchdog.lock();
        match offset {
            IS_ON if value & 1 != 0 => countdown.begin(Instant::now()),
            IS_ON => countdown.stop(),
            LEFT if countdown.is_on() => countdown.begin(Instant::now()),
            LENGTH => {
                self.counts = value;
                countdown.set_length(Duration::from_millis(u64::from(value) * u64::from(PERIOD_MS)));
            }
            HAS_EXPIRED => countdown.forget(),
            _ => {}
        }
    }
}

impl FixedDevice for AcpiWatchdog {
    const NAME: &'static str = "ACPI watchdog";

    fn build(_: Place, site: &mut Site<'_>) -> Result<Option<Self>> {
        Ok(site.watchdog.cloned().map(Self::new))
    }
}

/// The registers as they are saved.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct State {
    countdown: CountdownState,
    counts: u32,
}

impl Snapshot for AcpiWatchdog {
    type State = State;

    fn save(&self) -> Result<State> {
        Ok(State { countdown: self.watchdog.lock().state(), counts: self.counts })
    }

    fn restore(&mut self, State { countdown, counts }: State) -> Result<()> {
        self.watchdog.lock().set_state(countdown);
        self.counts = counts;
        Ok(())
    }
}

impl Component for AcpiWatchdog {
    fn nodes(&self, place: Place) -> Vec<Node> {
        match place {
            Place::Ports { range, .. } => vec![Node::Watchdog(WatchdogRegisters {
                port: range.start as u16,
                period_ms: PERIOD_MS,
                counts: 1..=COUNTS_MAX,
            })],
            _ => Vec::new(),
        }
    }

    fn pause(&mut self, _: std::sync::mpsc::Sender<()>) {
        self.watchdog.lock().pause(Instant::now());
    }

    fn resume(&mut self) {
        self.watchdog.lock().resume(Instant::now());
    }
}

impl BusDevice for AcpiWatchdog {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = if data.len() == 4 { self.read_register(offset) } else { 0 };
        data.fill(0);
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(place, byte)| *place = byte);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Ok(data) = data.try_into() {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(device: &mut AcpiWatchdog, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(device: &mut AcpiWatchdog, offset: u64, value: u32) {
        device.write(offset, &value.to_le_bytes());
    }

    /// A watchdog of a guest that runs.
    fn device() -> AcpiWatchdog {
        let mut device = AcpiWatchdog::new(Watchdog::default());
        device.resume();
        device
    }

    #[test]
    fn a_guest_begins_feeds_and_stops_it() {
        let mut device = device();
        let registers = |device: &mut AcpiWatchdog| {
            [IS_ON, LENGTH, HAS_EXPIRED, RESETS].map(|offset| read(device, offset))
        };
        assert_eq!(registers(&mut device), [0, COUNTS, 0, 1]);
        // Nothing is fed that is not on.
        write(&mut device, LEFT, 1);
        assert_eq!(read(&mut device, IS_ON), 0);
        write(&mut device, LENGTH, 36_000);
        write(&mut device, IS_ON, 1);
        assert_eq!(registers(&mut device), [1, 36_000, 0, 1]);
        let end = device.watchdog.lock().ends_at().unwrap();
        assert!((30_000..=36_000).contains(&read(&mut device, LEFT)));
        write(&mut device, LEFT, 1);
        assert!(device.watchdog.lock().ends_at().unwrap() > end);
        write(&mut device, IS_ON, 0);
        assert_eq!((read(&mut device, IS_ON), device.watchdog.lock().ends_at()), (0, None));
    }

    #[test]
    fn a_guest_learns_that_it_has_let_the_time_pass_and_clears_it() {
        let mut device = device();
        write(&mut device, IS_ON, 1);
        let end = device.watchdog.lock().ends_at().unwrap();
        assert!(device.watchdog.lock().take_end(end));
        assert_eq!([IS_ON, LEFT, HAS_EXPIRED].map(|offset| read(&mut device, offset)), [1, 0, 1]);
        write(&mut device, HAS_EXPIRED, 0);
        assert_eq!(read(&mut device, HAS_EXPIRED), 0);
        assert_eq!(
            read(&mut AcpiWatchdog::new(Watchdog::new(true)), HAS_EXPIRED),
            1,
            "of the machine before"
        );
    }

    #[test]
    fn a_restored_watchdog_goes_on() {
        let mut device = device();
        write(&mut device, LENGTH, 50);
        write(&mut device, IS_ON, 1);
        device.pause(std::sync::mpsc::channel().0);
        let state = device.save().unwrap();
        let mut other = AcpiWatchdog::new(Watchdog::default());
        other.restore(state).unwrap();
        assert_eq!(other.save().unwrap(), state);
        assert_eq!((read(&mut other, IS_ON), read(&mut other, LENGTH)), (1, 50));
        assert_eq!(other.watchdog.lock().ends_at(), None, "it stands still");
        other.resume();
        assert!(other.watchdog.lock().ends_at().unwrap() <= Instant::now() + Duration::from_secs(5));
    }

    // Attack: accesses of any width anywhere, and any value.
    #[test]
    fn a_hostile_guest_gets_nothing_but_zeros() {
        let mut device = device();
        for offset in 0..u64::from(WatchdogRegisters::SIZE) {
            for length in 1..=8 {
                let mut data = vec![0xff; length];
                device.write(offset, &data);
                device.read(offset, &mut data);
                let is_register = length == 4 && offset % 4 == 0;
                assert!(is_register || data.iter().all(|byte| *byte == 0), "{offset} {length}");
            }
        }
        for value in [0, 1, u32::MAX] {
            write(&mut device, LENGTH, value);
            (0..1000).for_each(|round| write(&mut device, IS_ON, round & 1));
            write(&mut device, IS_ON, 1);
            assert!(device.watchdog.lock().ends_at().unwrap() >= Instant::now() + super::super::SHORTEST / 2);
        }
    }
}
