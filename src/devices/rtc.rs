//! The real-time clock of aarch64 machines: an Arm PL031 (Arm DDI 0224), by `vm-superio`.

use vm_superio::Rtc;
use vm_superio::rtc_pl031::NoEvents;

use crate::bus::BusDevice;

/// A PL031; it reads the host's time. Its alarm raises no interrupt: Linux does not ask for one.
pub struct Clock {
    rtc: Rtc<NoEvents>,
}

impl Default for Clock {
    fn default() -> Self {
        Self { rtc: Rtc::new() }
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
