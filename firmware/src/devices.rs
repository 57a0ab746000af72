//! A case per virtio device: it does what its driver asks, and says what it cannot do.

// What the device wrote, the compiler believes unchanged without it.
use core::hint::black_box;

use crate::arch;
use crate::cases::is_chosen;
use crate::console::say;
use crate::machine::Machine;
use crate::virtio::{
    CONFIG, Device, F_VERSION_1, INTERRUPT_STATUS, Queue, read_by_device, wait_for, written_by_device,
};
use crate::words::Words;

const SECTOR: usize = 512;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
/// The feature of a disk that cannot be written.
const F_RO: u32 = 1 << 5;

/// What was written, byte by byte.
fn pattern(index: usize) -> u8 {
    index as u8 ^ 0x5a
}

/// The status that a disk answers to a request; none: it does not.
#[inline(never)]
fn ask(queue: &Queue, kind: u32, sector: u64, data: &mut [u8]) -> Option<u8> {
    let (mut header, mut status) = ([0; 16], [0xff]);
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    let body = if kind == OUT { read_by_device(data) } else { written_by_device(data) };
    let all = [read_by_device(&header), body, written_by_device(&mut status)];
    match data.is_empty() {
        true => queue.request(&[all[0], all[2]]),
        false => queue.request(&all),
    }?;
    Some(black_box(&status)[0])
}

/// A disk keeps what is written, says what it cannot do, and goes on. Only where this case was asked for by name is
/// anything written: else the disk may be one that somebody needs, and what is read twice has to be the same.
pub fn block(_: &Machine, words: &Words) -> bool {
    let Some(device) = Device::find(2) else {
        say!("expected a disk, found none");
        return false;
    };
    let Some([queue]) = device.start::<1>() else {
        say!("expected a disk that starts, found none");
        return false;
    };
    let sectors = u64::from(device.read(CONFIG)) | u64::from(device.read(CONFIG + 4)) << 32;
    let writes = is_chosen(words, b"block") && !device.offers(F_RO);
    let place = sectors.saturating_sub(1).min(1);
    let mut kept = None;
    // (what, type, sector, bytes of data, expected status)
    let steps: [(&str, u32, u64, usize, u8); 9] = [
        ("a write", OUT, place, SECTOR, 0),
        ("a flush", FLUSH, 0, 0, 0),
        ("a read", IN, place, SECTOR, 0),
        ("an unknown request", 99, 0, 0, 2),
        ("a read beyond the end", IN, sectors, SECTOR, 1),
        ("a read that wraps around", IN, u64::MAX, SECTOR, 1),
        ("a write beyond the end", OUT, sectors, SECTOR, 1),
        ("a part of a sector", IN, 0, 100, 1),
        ("a second read", IN, place, SECTOR, 0),
    ];
    for (step, (what, kind, sector, length, expected)) in steps.into_iter().enumerate() {
        let is_empty = sectors == 0 && length == SECTOR && expected == 0;
        if kind == OUT && !writes || is_empty {
            continue;
        }
        // Another one before each read: what a device left as it was does not pass for the same data twice.
        let mut data = [step as u8; SECTOR];
        if kind == OUT {
            data.iter_mut().enumerate().for_each(|(index, byte)| *byte = pattern(index));
            kept.get_or_insert(data);
        }
        let found = ask(&queue, kind, sector, &mut data[..length]);
        if found != Some(expected) {
            say!("expected status ", u64::from(expected), " for ", what, ", found ");
            match found {
                Some(status) => say!(u64::from(status)),
                None => say!("no answer"),
            }
            return false;
        }
        let data = *black_box(&data);
        if kind == IN && expected == 0 && *kept.get_or_insert(data) != data {
            say!("expected what was there before, found something else after ", what);
            return false;
        }
    }
    say!("ok (", sectors, if sectors == 1 { " sector" } else { " sectors" });
    say!(if writes { ")" } else { ", only read)" });
    true
}

/// Two requests for random bytes give different ones.
pub fn entropy(_: &Machine, _: &Words) -> bool {
    let device = Device::find(4);
    let queue = device.and_then(|device| device.start::<1>());
    let (Some(device), Some([queue])) = (device, queue) else {
        say!("expected a source of random bytes that starts, found none");
        return false;
    };
    let mut bytes = [[0; 32]; 2];
    for bytes in &mut bytes {
        let count = queue.request(&[written_by_device(bytes)]);
        if count != Some(32) {
            say!("expected 32 bytes, found ", count.unwrap_or(0));
            return false;
        }
        // Its acknowledgement is looked at when the next one comes.
        if !device.acknowledge() {
            say!("expected an interrupt, found none");
            return false;
        }
    }
    // A guest that is restored right here gets one more, which is gone once it is acknowledged, too.
    if device.is_interrupting() && device.acknowledge() && device.is_interrupting() {
        say!("expected no interrupt once it was acknowledged, found one");
        return false;
    }
    let [first, second] = black_box(&bytes);
    if first == second || *first == [0; 32] {
        say!("expected different bytes, found the same");
        return false;
    }
    say!("ok (32 bytes, twice)");
    true
}

/// A page that is given to the host is another one afterwards, and one that is taken back keeps what is written to it.
pub fn balloon(_: &Machine, _: &Words) -> bool {
    #[repr(align(4096))]
    struct Pages(#[allow(dead_code)] [u8; 2 * 4096]);
    static mut PAGES: Pages = Pages([0; 2 * 4096]);
    let Some([inflate, deflate]) = Device::find(5).and_then(|device| device.start::<2>()) else {
        say!("expected a balloon that starts, found none");
        return false;
    };
    // SAFETY: one CPU runs the cases, and this one once.
    let pages = unsafe { &mut *(&raw mut PAGES).cast::<[u8; 2 * 4096]>() };
    pages.fill(0x5a);
    let number = (pages.as_ptr() as u64 / 4096) as u32;
    let asked = number.to_le_bytes();
    for (what, queue) in [("given", inflate), ("taken back", deflate)] {
        if queue.request(&[read_by_device(&asked)]) != Some(0) {
            say!("expected a page to be ", what, ", found no answer");
            return false;
        }
        let found = black_box(&mut *pages);
        let expected = if what == "given" { 0 } else { 0xa5 };
        let as_expected = |(index, byte): (usize, &u8)| *byte == if index < 4096 { expected } else { 0x5a };
        if !found.iter().enumerate().all(as_expected) {
            say!("expected one page alone to be another one once it was ", what, ", found something else");
            return false;
        }
        found[..4096].fill(0xa5);
    }
    say!("ok (page ", number, ")");
    true
}

/// A frame goes out, and where this case was asked for, it is told whether one came in: where the other side is a test,
/// which answers what it gets. No other network does: both frames have the EtherType for local experiments.
pub fn net(_: &Machine, words: &Words) -> bool {
    const HEADER: usize = 12;
    const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];
    /// How long an answer may take: 2.5 s and more on any processor there is, however many other frames come.
    const ANSWER_TICKS: u64 = arch::PATIENCE_TICKS / 4;
    let Some(device) = Device::find(1) else {
        say!("expected a network interface, found none");
        return false;
    };
    let Some([rx, tx]) = device.start::<2>() else {
        say!("expected a network interface that starts, found none");
        return false;
    };
    let mut frame = [0; HEADER + 60];
    frame[HEADER..HEADER + 6].fill(0xff);
    for index in 0..6 {
        let word = device.read(CONFIG + index as u64 / 4 * 4);
        frame[HEADER + 6 + index] = (word >> (8 * (index % 4))) as u8;
    }
    frame[HEADER + 12..HEADER + 14].copy_from_slice(&ETHER_TYPE);
    frame[HEADER + 14..HEADER + 19].copy_from_slice(b"hello");
    if tx.request(&[read_by_device(&frame)]).is_none() {
        say!("expected a frame to be sent, found it waiting");
        return false;
    }
    if words.value("case").is_none() {
        say!("ok (a frame of ", frame.len() - HEADER, " bytes out)");
        return true;
    }
    let (mut received, mut others) = ([0; HEADER + 1514], 0u32);
    let end = arch::ticks() + ANSWER_TICKS;
    while arch::ticks() < end
        && let Some(length) = rx.request_until(end, &[written_by_device(&mut received)])
    {
        let received = black_box(&received);
        if received[HEADER + 12..HEADER + 14] == ETHER_TYPE && received[HEADER + 14..HEADER + 19] == *b"world"
        {
            say!("ok (a frame of ", length as usize - HEADER, " bytes in)");
            return true;
        }
        others += 1;
    }
    // The device has a buffer yet, which is ours no longer once this ends.
    if !device.reset() {
        say!("expected an interface that can be reset, found it running");
        return false;
    }
    say!("ok (a frame of ", frame.len() - HEADER, " bytes out, no answer, frames of others: ", others, ")");
    true
}

/// A guest that is restored meanwhile over another network sees its link go down, by an interrupt where it can look for
/// one, and come back.
pub fn net_restored(_: &Machine, _: &Words) -> bool {
    const F_STATUS: u64 = 1 << 16;
    const CONFIGURATION_CHANGE: u32 = 2;
    let Some(device) = Device::find(1) else {
        say!("expected a network interface, found none");
        return false;
    };
    let is_up = || device.read(CONFIG + 4) >> 16 & 1 != 0;
    // No queue is needed to look.
    let is_there = device.negotiate(F_VERSION_1 | F_STATUS);
    device.run();
    if !is_there || !is_up() {
        say!("expected a network interface with a link, found none");
        return false;
    }
    // The word is a line of its own, for a test that reads lines, and saves the guest some time after it.
    say!("has a link\n");
    while is_up() {
        core::hint::spin_loop();
    }
    let is_told = device.config_space().is_some()
        || wait_for(|| device.read(INTERRUPT_STATUS) & CONFIGURATION_CHANGE != 0);
    if !is_told || !wait_for(is_up) {
        say!(
            "expected to be told, and a link that comes back, found ",
            if is_told { "none" } else { "no word" }
        );
        return false;
    }
    say!("ok (down, and up again)");
    true
}
