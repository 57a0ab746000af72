//! The cases of devices that come to the PCI bus and go: the guest drives each that it finds, and says how many there are.
//! No case of these ends by itself.

use crate::arch;
use crate::console::say;
use crate::machine::Machine;
use crate::virtio::{Device, F_VERSION_1};
use crate::words::Words;

/// The ports of the slots (x86_64): whether devices have come or gone, which are to be let go, which are.
const CAME: u16 = 0x610;
const LEAVING: u16 = 0x614;
const EJECT: u16 = 0x618;

/// How a guest answers that is asked to let a device go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// As it is asked.
    Polite,
    /// Nothing.
    Deaf,
    /// The guest lets every device go, asked or not, all the time.
    Hostile,
}

pub fn polite(_: &Machine, _: &Words) -> bool {
    serve(Manner::Polite)
}

pub fn deaf(_: &Machine, _: &Words) -> bool {
    serve(Manner::Deaf)
}

pub fn hostile(_: &Machine, _: &Words) -> bool {
    serve(Manner::Hostile)
}

fn serve(manner: Manner) -> bool {
    let mut before = None;
    loop {
        if manner == Manner::Hostile {
            [0, 1, u32::MAX].into_iter().for_each(|devices| arch::write_port32(EJECT, devices));
        }
        let has_changed = arch::read_port32(CAME) != 0;
        let count = Device::all_on_pci().count();
        if has_changed || before != Some(count) {
            before = Some(count);
            let idle = Device::all_on_pci().filter(|device| !device.is_driven());
            idle.for_each(|device| {
                if device.negotiate(F_VERSION_1) {
                    device.run();
                }
            });
            say!("slots: ", count, " devices\n");
        }
        let leaving = arch::read_port32(LEAVING);
        if leaving != 0 {
            say!("slots: asked for ", leaving.trailing_zeros(), "\n");
            if manner == Manner::Polite {
                arch::write_port32(EJECT, leaving);
            }
        }
    }
}
