//! The real-time clock of aarch64 machines: an Arm PL031 (Arm DDI 0224), by `vm-superio`.

use serde::{Deserialize, Serialize};
use vm_superio::rtc_pl031::NoEvents;
use vm_superio::{Rtc, RtcState};

use super::fixed::{FixedDevice, Site};
use crate::bus::BusDevice;
use crate::error::Result;
use crate::part::Component;
use crate::platform::node::{TreeNode, phandle};
use crate::platform::{Node, Place};
use crate::snapshot::Snapshot;

/// A PL031; it reads the host's time. Its alarm raises no interrupt: Linux does not ask for one.
pub struct Clock {
    rtc: Rtc<NoEvents>,
}

impl Default for Clock {
    fn default() -> Self {
        Self { rtc: Rtc::new() }
    }
}

impl FixedDevice for Clock {
    const NAME: &'static str = "rtc";

    fn build(_: Place, _: &mut Site<'_>) -> Result<Option<Self>> {
        Ok(Some(Self::default()))
    }
}

/// What is saved of the clock. The time itself goes on with the host's.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct State {
    load: u32,
    /// The guest's time is this many seconds ahead of the host's.
    offset: i64,
    matched: u32,
    mask: u32,
    raw_interrupt: u32,
}

impl Snapshot for Clock {
    type State = State;

    fn save(&self) -> Result<State> {
        let RtcState { lr, offset, mr, imsc, ris } = self.rtc.state();
        Ok(State { load: lr, offset, matched: mr, mask: imsc, raw_interrupt: ris })
    }

    fn restore(&mut self, state: State) -> Result<()> {
        let State { load, offset, matched, mask, raw_interrupt } = state;
        let state = RtcState { lr: load, offset, mr: matched, imsc: mask, ris: raw_interrupt };
        self.rtc = Rtc::from_state(&state, NoEvents);
        Ok(())
    }
}

impl Component for Clock {
    fn nodes(&self, place: Place) -> Vec<Node> {
        let tree = TreeNode::at("rtc", place)
            .texts("compatible", &["arm,pl031", "arm,primecell"])
            .registers(place)
            .cells("clocks", &[phandle::CLOCK])
            .texts("clock-names", &["apb_pclk"]);
        vec![Node::Tree(tree)]
    }
}

impl BusDevice for Clock {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            self.rtc.read(offset as u16, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Ok(data) = data.try_into() {
            self.rtc.write(offset as u16, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u64 = 0x00;
    const MATCH: u64 = 0x04;
    const LOAD: u64 = 0x08;

    fn read(clock: &mut Clock, offset: u64) -> u32 {
        let mut data = [0; 4];
        clock.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_restored_clock_has_the_time_that_the_guest_set() {
        const TIME: u32 = 1_000_000;
        let mut clock = Clock::default();
        clock.write(LOAD, &TIME.to_le_bytes());
        clock.write(MATCH, &7u32.to_le_bytes());
        let state = clock.save().unwrap();
        let mut other = Clock::default();
        assert!(read(&mut other, DATA) > 2 * TIME, "the host's time");
        other.restore(state).unwrap();
        assert_eq!(other.save().unwrap(), state);
        assert!((TIME..2 * TIME).contains(&read(&mut other, DATA)));
        assert_eq!(read(&mut other, MATCH), 7);
        for offset in [i64::MIN, i64::MAX] {
            other.restore(State { offset, ..state }).unwrap();
            read(&mut other, DATA);
        }
    }
}
