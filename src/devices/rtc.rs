//! The real-time clock of aarch64 machines: an Arm PL031 (Arm DDI 0224), by `vm-superio`.

use vm_superio::Rtc;
use vm_superio::rtc_pl031::NoEvents;

use super::fixed::{FixedDevice, Site};
use crate::bus::BusDevice;
use crate::error::Result;
use crate::part::Component;
use crate::platform::node::{TreeNode, phandle};
use crate::platform::{Node, Place};

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
