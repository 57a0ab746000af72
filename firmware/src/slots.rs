//! The cases of devices that come to the PCI bus and go: the guest drives each that it finds, and says how many there are.
//! No case of these ends by itself.

use core::ptr::{read_volatile, write_volatile};

use crate::arch::{self, read32};
use crate::console::say;
use crate::machine::Machine;
use crate::virtio::{self, Descriptor, Device, F_VERSION_1, NEXT, Queue, SIZE, WRITE};
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

/// How many requests are in flight at a time: each has two descriptors.
const AT_A_TIME: usize = SIZE / 2;
const OUT: u32 = 1;

/// A request that writes one sector.
#[repr(C)]
struct Request {
    kind: u32,
    priority: u32,
    sector: u64,
    data: [u64; 64],
    status: u8,
}

/// Each disk that comes is written to, as fast as it can be, until it is gone; then the guest says what was acknowledged last
/// of each sector: a sector has numbers that count up.
pub fn busy(_: &Machine, _: &Words) -> bool {
    loop {
        let Some(device) = Device::all_on_pci().next() else { continue };
        virtio::forget_rings();
        let Some([queue]) = device.start::<1>() else { continue };
        say!("slots: writes\n");
        let acknowledged = write_until_gone(device, &queue);
        say!("slots: acknowledged");
        acknowledged.into_iter().for_each(|number| say!(" ", number));
        say!("\n");
    }
}

/// The number that was acknowledged last of each sector.
fn write_until_gone(device: Device, queue: &Queue) -> [u64; AT_A_TIME] {
    let mut requests =
        [const { Request { kind: OUT, priority: 0, sector: 0, data: [0; 64], status: 0 } }; AT_A_TIME];
    let mut acknowledged = [0; AT_A_TIME];
    let mut offer = |sector: usize, number: u64| {
        let request = &raw mut requests[sector];
        // SAFETY: the request is one of those above, which outlive all accesses: a device that is gone makes none.
        unsafe {
            write_volatile(&raw mut (*request).sector, sector as u64);
            write_volatile(&raw mut (*request).data, [number; 64]);
        }
        // SAFETY: the same; only an address is taken.
        let status = unsafe { &raw mut (*request).status } as u64;
        let (head, start) = (sector * 2, request as u64);
        let length = (status - start) as u32;
        queue.set_descriptor(head, Descriptor { address: start, length, flags: NEXT, next: head as u16 + 1 });
        queue.set_descriptor(head + 1, Descriptor { address: status, length: 1, flags: WRITE, next: 0 });
        queue.offer(head as u16);
    };
    (0..AT_A_TIME).for_each(|sector| offer(sector, 1));
    let [_, _, used] = queue.parts();
    let (mut seen, mut is_gone) = (0u16, false);
    loop {
        while seen != queue.used_index() {
            arch::barrier();
            let entry = used + 4 + (u64::from(seen) % SIZE as u64) * 8;
            // SAFETY: the entry is one of the ring's.
            let sector = unsafe { read_volatile(entry as *const u32) } as usize / 2 % AT_A_TIME;
            acknowledged[sector] += 1;
            seen = seen.wrapping_add(1);
            if !is_gone {
                offer(sector, acknowledged[sector] + 1);
            }
        }
        if is_gone {
            return acknowledged;
        }
        // The answers that came before the device went are looked at once more.
        is_gone = device.config_space().is_none_or(|config| read32(config) == u32::MAX);
    }
}
