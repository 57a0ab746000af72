//! The watchdog of aarch64 machines: an Arm SP805 (Arm DDI 0270). Linux's driver is `sp805_wdt`. Of the two that Arm's
//! machines have, this one counts by a clock that the device tree names; the SBSA's counts by the host's counter, and a
//! guest that is restored on another host could have less time left, or more.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{State as CountdownState, Watchdog};
use crate::bus::BusDevice;
use crate::devices::fixed::{FixedDevice, Site};
use crate::error::Result;
use crate::part::Component;
use crate::platform::node::{TreeNode, phandle};
use crate::platform::{Node, Place};
use crate::snapshot::Snapshot;

const LOAD: u64 = 0x000;
const VALUE: u64 = 0x004;
const CONTROL: u64 = 0x008;
const CLEAR: u64 = 0x00c;
const RAW_STATUS: u64 = 0x010;
const MASKED_STATUS: u64 = 0x014;
const LOCK: u64 = 0xc00;
/// The peripheral's and PrimeCell's identification, a byte in each of the last eight words.
const IDENTIFICATION: u64 = 0xfe0;
const IDENTIFIERS: [u8; 8] = [0x05, 0x18, 0x14, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

/// Control: count, and interrupt at the end; reset at the end after that. An interrupt alone is nobody's: the device
/// has no line for it, and Linux asks for none.
const ENABLED: u32 = 0b11;
/// Written to the lock, it lets other registers be written.
const KEY: u32 = 0x1acc_e551;
/// Nanoseconds of three ticks of the clock ([`phandle::CLOCK`], 24 MHz).
const THREE_TICKS_NS: u64 = 125;

/// A countdown of two rounds: at the end of the first one the interrupt is there, at the end of the second one the
/// watchdog expires.
pub struct Sp805 {
    watchdog: Watchdog,
    registers: Registers,
}

/// The values that the guest has written.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
struct Registers {
    load: u32,
    control: u32,
    is_locked: bool,
}

impl Sp805 {
    /// Registers of this watchdog.
    pub fn new(watchdog: Watchdog) -> Self {
        Self { watchdog, registers: Registers { load: u32::MAX, control: 0, is_locked: false } }
    }

    /// How many ticks are left of both rounds.
    fn ticks_left(&self) -> u64 {
        let left = self.watchdog.lock().left(Instant::now()).as_nanos();
        u64::try_from(left * 3 / u128::from(THREE_TICKS_NS)).unwrap_or(u64::MAX)
    }

    fn is_in_second_round(&self) -> bool {
        self.is_enabled() && self.ticks_left() <= self.registers.load.into()
    }

    fn is_enabled(&self) -> bool {
        self.registers.control & ENABLED == ENABLED
    }

    fn value(&self) -> u32 {
        let load = u64::from(self.registers.load);
        match (self.is_enabled(), self.ticks_left()) {
            (true, left) if left <= load => left as u32,
            (true, left) => (left - load).min(load) as u32,
            (false, _) => self.registers.load,
        }
    }

    /// The count begins with the load again.
    fn reload(&self) {
        let ticks = 2 * u64::from(self.registers.load);
        let mut countdown = self.watchdog.lock();
        countdown.set_length(Duration::from_nanos(ticks * THREE_TICKS_NS / 3));
        if self.is_enabled() {
            countdown.begin(Instant::now());
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            LOAD => self.registers.load,
            VALUE => self.value(),
            CONTROL => self.registers.control,
            RAW_STATUS | MASKED_STATUS => self.is_in_second_round().into(),
            LOCK => self.registers.is_locked.into(),
            IDENTIFICATION.. => IDENTIFIERS[(offset - IDENTIFICATION) as usize / 4].into(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            LOCK => self.registers.is_locked = value != KEY,
            _ if self.registers.is_locked => {}
            LOAD => {
                self.registers.load = value;
                self.reload();
            }
            CONTROL => {
                let was_enabled = self.is_enabled();
                self.registers.control = value & ENABLED;
                match self.is_enabled() {
                    true if was_enabled => {}
                    true => self.reload(),
                    false => self.watchdog.lock().stop(),
                }
            }
            CLEAR => self.reload(),
            _ => {}
        }
    }
}

impl FixedDevice for Sp805 {
    const NAME: &'static str = "watchdog";

    fn build(_: Place, site: &mut Site<'_>) -> Result<Option<Self>> {
        Ok(site.watchdog.cloned().map(Self::new))
    }
}

/// The watchdog as it is saved.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct State {
    countdown: CountdownState,
    registers: Registers,
}

impl Snapshot for Sp805 {
    type State = State;

    fn save(&self) -> Result<State> {
        Ok(State { countdown: self.watchdog.lock().state(), registers: self.registers })
    }

    fn restore(&mut self, State { countdown, registers }: State) -> Result<()> {
        self.watchdog.lock().set_state(countdown);
        self.registers = registers;
        Ok(())
    }
}

impl Component for Sp805 {
    fn nodes(&self, place: Place) -> Vec<Node> {
        let tree = TreeNode::at("watchdog", place)
            .texts("compatible", &["arm,sp805", "arm,primecell"])
            .registers(place)
            .cells("clocks", &[phandle::CLOCK, phandle::CLOCK])
            .texts("clock-names", &["wdog_clk", "apb_pclk"]);
        vec![Node::Tree(tree)]
    }

    fn pause(&mut self, _: std::sync::mpsc::Sender<()>) {
        self.watchdog.lock().pause(Instant::now());
    }

    fn resume(&mut self) {
        self.watchdog.lock().resume(Instant::now());
    }
}

impl BusDevice for Sp805 {
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

    fn read(device: &mut Sp805, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(device: &mut Sp805, offset: u64, value: u32) {
        device.write(offset, &value.to_le_bytes());
    }

    /// A watchdog of a guest that runs.
    fn device() -> Sp805 {
        let mut device = Sp805::new(Watchdog::default());
        device.resume();
        device
    }

    fn ends_in(device: &Sp805) -> Option<Duration> {
        device.watchdog.lock().ends_at().map(|end| end - Instant::now())
    }

    #[test]
    fn linux_finds_what_it_looks_for_and_gets_two_rounds() {
        let mut device = device();
        let byte =
            |device: &mut Sp805, offset: u64, index: u64| read(device, offset + 4 * index) << (8 * index);
        let id = |device: &mut Sp805, offset| (0..4).map(|index| byte(device, offset, index)).sum::<u32>();
        assert_eq!((id(&mut device, 0xfe0), id(&mut device, 0xff0)), (0x0014_1805, 0xb105_f00d));
        // Linux' order, for 100 s.
        let load = 12_000_000 * 100 - 1;
        for (offset, value) in [(LOCK, KEY), (LOAD, load), (CLEAR, 1), (CONTROL, 3), (LOCK, 1)] {
            write(&mut device, offset, value);
        }
        assert_eq!(
            [LOAD, CONTROL, RAW_STATUS, LOCK].map(|offset| read(&mut device, offset)),
            [load, 3, 0, 1]
        );
        assert!((50..100).contains(&ends_in(&device).unwrap().as_secs()));
        assert!((1..=load).contains(&read(&mut device, VALUE)));
        // While it is locked, nothing else is written.
        for (offset, value) in [(LOAD, 1), (CONTROL, 0)] {
            write(&mut device, offset, value);
        }
        assert_eq!([LOAD, CONTROL].map(|offset| read(&mut device, offset)), [load, 3]);
        for (offset, value) in [(LOCK, KEY), (CONTROL, 0), (LOAD, 0), (LOCK, 1)] {
            write(&mut device, offset, value);
        }
        assert_eq!((ends_in(&device), read(&mut device, LOCK)), (None, 1));
    }

    #[test]
    fn the_second_round_shows_and_a_reload_is_the_first_one() {
        let mut device = device();
        write(&mut device, LOAD, 24_000_000 * 10);
        assert_eq!(read(&mut device, VALUE), 24_000_000 * 10);
        write(&mut device, CONTROL, 1);
        assert_eq!(ends_in(&device), None, "an interrupt alone");
        write(&mut device, CONTROL, 3);
        let begin = device.watchdog.lock().ends_at().unwrap() - Duration::from_secs(20);
        // The guest has used half of it, and a little more.
        device.watchdog.lock().pause(begin + Duration::from_secs(15));
        assert_eq!(
            [RAW_STATUS, MASKED_STATUS, VALUE].map(|it| read(&mut device, it)),
            [1, 1, 24_000_000 * 5]
        );
        device.resume();
        write(&mut device, CLEAR, 0);
        assert!(read(&mut device, RAW_STATUS) == 0 && ends_in(&device).unwrap().as_secs() >= 10);
        // Linux then writes the value that is there, which is no reload.
        device.watchdog.lock().pause(begin + Duration::from_secs(15));
        let left = device.watchdog.lock().left(begin);
        write(&mut device, CONTROL, 3);
        assert_eq!(device.watchdog.lock().left(begin), left);
    }

    #[test]
    fn a_restored_watchdog_goes_on() {
        let mut device = device();
        for (offset, value) in [(LOAD, 24_000_000 * 3), (CONTROL, 3), (LOCK, 1)] {
            write(&mut device, offset, value);
        }
        device.pause(std::sync::mpsc::channel().0);
        let state = device.save().unwrap();
        let mut other = Sp805::new(Watchdog::default());
        other.restore(state).unwrap();
        assert_eq!((other.save().unwrap(), ends_in(&other)), (state, None));
        other.resume();
        assert!(ends_in(&other).unwrap() <= Duration::from_secs(6) && read(&mut other, LOCK) == 1);
    }

    // Attack: accesses of any width anywhere, and any value.
    #[test]
    fn a_hostile_guest_gets_no_more_than_the_shortest_time() {
        let mut device = device();
        for offset in (0..0x18).chain(0xbf8..0xc08).chain(0xfd8..0xff8) {
            for length in 1..=8 {
                let mut data = vec![0xff; length];
                device.write(offset, &data);
                device.read(offset, &mut data);
                assert!(length == 4 || data.iter().all(|byte| *byte == 0), "{offset} {length}");
            }
        }
        write(&mut device, LOCK, KEY);
        for load in [0, 1, u32::MAX] {
            write(&mut device, LOAD, load);
            (0..1000).for_each(|round| write(&mut device, CONTROL, round));
            write(&mut device, CONTROL, 3);
            assert!(ends_in(&device).unwrap() >= super::super::SHORTEST / 2);
            read(&mut device, VALUE);
        }
    }
}
