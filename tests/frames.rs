//! The network device's frames, with the driver's side in this process: several queue pairs, the control
//! queue, the link, limits, what stops and starts leave, and what a frame costs in memory.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alula::devices::KINDS;
use alula::host::Host;
use alula::memory;
use alula::metrics::View;
use alula::virtio::VirtioDevice;
use alula::virtio::queue::DESCRIPTORS_PER_TURN;
use common::allocator::{self, Counting};
use common::driver::{self, F_EVENT_IDX, Guest, INDIRECT, Kind, NEEDS_RESET, WRITE};
use common::network::{self, Wire};
use common::wait_for;
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

const RX: usize = 0;
const TX: usize = 1;
const HEADER: usize = 12;
const ETHER_TYPE: u16 = 0x88b5;
const MAC: [u8; 6] = [6, 0, 0, 0, 0, 2];

const F_GUEST_CSUM: u64 = 1 << 1;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_CTRL_VQ: u64 = 1 << 17;
const F_CTRL_RX: u64 = 1 << 18;
const F_GUEST_ANNOUNCE: u64 = 1 << 21;
const F_MQ: u64 = 1 << 22;
const F_CTRL_MAC_ADDR: u64 = 1 << 23;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test at a time: the io threads of all are counted.
static ALONE: Mutex<()> = Mutex::new(());

/// A network of the test's own, with a TAP of two queues.
fn enter(flags: i32) -> MutexGuard<'static, ()> {
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    network::enter();
    network::add_interface("tap0", network::TAP | flags);
    common::output("ip", &["link", "set", "tap0", "up"]);
    alone
}

fn open(more: Value) -> Box<dyn VirtioDevice> {
    let mut config = json!({ "iface_id": "net", "guest_mac": "06:00:00:00:00:02" });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let kind = KINDS.iter().find(|kind| kind.section == "network-interfaces").unwrap();
    let device = kind.parse(config.to_string().as_bytes()).unwrap();
    device.check().unwrap();
    device.open("frames", &mut Host::default()).unwrap()
}

/// A guest with an interface over `tap0`, which carries frames.
fn guest(kind: Kind, more: Value) -> (Guest, Wire) {
    let mut config = json!({ "host_dev_name": "tap0" });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let device = open(config);
    let wire = Wire::new("tap0", ETHER_TYPE);
    wire.settle("tap0");
    (Guest::new(kind, device), wire)
}

/// A frame for everybody that says who it is.
fn frame(seed: u8) -> [u8; 60] {
    let mut frame = [seed; 60];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&MAC);
    frame[12..14].copy_from_slice(&ETHER_TYPE.to_be_bytes());
    frame
}

/// Puts a frame into guest memory, with its header.
fn outgoing(guest: &mut Guest, seed: u8) -> (u64, u32) {
    guest.allocate(&[&[0; HEADER][..], &frame(seed)].concat())
}

/// Receive buffers, offered.
fn rooms(guest: &mut Guest, queue: usize, count: usize, length: usize) -> Vec<(u64, u32)> {
    let rooms: Vec<_> = (0..count).map(|_| guest.allocate(&vec![0; length])).collect();
    for room in &rooms {
        guest.offer(queue, &[(*room, WRITE)]);
    }
    guest.kick(queue);
    rooms
}

/// Waits for the next received frame of ours: what it says. Buffers are taken in the order of `rooms`.
fn received(guest: &mut Guest, queue: usize, rooms: &mut impl Iterator<Item = (u64, u32)>) -> u8 {
    loop {
        guest.next_used(queue);
        let bytes = guest.bytes(rooms.next().unwrap());
        if bytes[HEADER + 12..HEADER + 14] == ETHER_TYPE.to_be_bytes() {
            assert_eq!(bytes[10..12], [1, 0], "it fills one buffer");
            return bytes[HEADER + 20];
        }
    }
}

/// Sends a command by the control queue, and returns the answer.
fn command(guest: &mut Guest, queue: usize, bytes: &[u8]) -> u8 {
    let (out, ack) = (guest.allocate(bytes), guest.allocate(&[0xff]));
    assert_eq!(guest.request(queue, &[(out, 0), (ack, WRITE)]), 1);
    guest.bytes(ack)[0]
}

/// What an interface counts besides frames, whatever is behind it.
const EVENTS: [&str; 5] =
    ["tx_queue_event_count", "rx_queue_event_count", "rx_tap_event_count", "tx_call_count", "rx_call_count"];

/// What the device counts.
fn counted(guest: &Guest, name: &str) -> u64 {
    guest.transport.lock().unwrap().metrics(View::Total)[name].as_u64().unwrap()
}

fn patch(guest: &mut Guest, body: Value) {
    let kind = KINDS.iter().find(|kind| kind.section == "network-interfaces").unwrap();
    let change = kind.parse_patch(body.to_string().as_bytes()).unwrap();
    guest.pause();
    guest.transport.lock().unwrap().patch(change.patch(), &mut Host::default()).unwrap();
    guest.resume();
}

fn link_is_up(guest: &mut Guest) -> bool {
    let mut status = [0; 2];
    guest.config(6, &mut status);
    status[0] & 1 != 0
}

#[test]
fn a_guest_sees_its_tap_go_down_and_up() {
    let _alone = enter(0);
    for kind in [Kind::Mmio, Kind::Pci] {
        let (mut guest, _wire) = guest(kind, json!({}));
        guest.start(F_EVENT_IDX);
        assert!(link_is_up(&mut guest));
        for (state, is_up) in [("down", false), ("up", true)] {
            common::output("ip", &["link", "set", "tap0", state]);
            wait_for(|| link_is_up(&mut guest) == is_up);
            wait_for(|| guest.is_interrupted(None));
        }
        // While nobody listens: seen at the next start.
        guest.pause();
        common::output("ip", &["link", "set", "tap0", "down"]);
        guest.resume();
        wait_for(|| !link_is_up(&mut guest));
        common::output("ip", &["link", "set", "tap0", "up"]);
        wait_for(|| link_is_up(&mut guest));
    }
    let (mut guest, _wire) = guest(Kind::Mmio, json!({}));
    guest.start(F_EVENT_IDX);
    // Its thread has started it.
    let out = outgoing(&mut guest, 1);
    guest.request(TX, &[(out, 0)]);
    common::output("ip", &["link", "del", "tap0"]);
    wait_for(|| !link_is_up(&mut guest));
}

#[test]
fn frames_go_by_every_queue_pair_that_the_driver_uses() {
    let _alone = enter(libc::IFF_MULTI_QUEUE);
    let (mut guest, wire) = guest(Kind::Pci, json!({ "queue_pairs": 2, "threads": 2 }));
    let features = guest.features();
    assert_ne!(features & F_MQ, 0);
    let mut pairs = [0; 2];
    guest.config(8, &mut pairs);
    assert_eq!(pairs, [2, 0]);
    guest.start(F_MQ | F_CTRL_VQ | F_EVENT_IDX);
    let control = 4;
    for (pairs, ack) in [(0, 1), (3, 1), (2, 0)] {
        assert_eq!(command(&mut guest, control, &[4, 0, pairs, 0]), ack, "{pairs} pairs");
    }
    let [mut first, mut second] = [0, 2].map(|queue| rooms(&mut guest, queue, 12, 1600).into_iter());
    for (seed, queue) in [(1, TX), (2, TX + 2)] {
        let out = outgoing(&mut guest, seed);
        guest.request(queue, &[(out, 0)]);
        assert_eq!(wire.receive()[20], seed);
    }
    // The TAP chooses a queue; both are read.
    wire.send(&frame(3));
    wait_for(|| guest.used_index(0) + guest.used_index(2) > 0);
    // One pair again: everything comes by the first.
    assert_eq!(command(&mut guest, control, &[4, 0, 1, 0]), 0);
    wire.send(&frame(4));
    while received(&mut guest, RX, &mut first) != 4 {}
    let _ = second.next();
}

#[test]
fn the_control_queue_filters_frames_and_changes_the_address() {
    let _alone = enter(0);
    let (mut guest, wire) = guest(Kind::Mmio, json!({}));
    guest.start(F_CTRL_VQ | F_CTRL_RX | F_CTRL_MAC_ADDR);
    let control = 2;
    let new = [6, 0, 0, 0, 0, 9];
    assert_eq!(command(&mut guest, control, &[&[1, 1][..], &new].concat()), 0);
    let mut mac = [0; 6];
    guest.config(0, &mut mac);
    assert_eq!(mac, new);
    // Not promiscuous any more: no frames for others.
    assert_eq!(command(&mut guest, control, &[0, 0, 0]), 0);
    let mut rooms = rooms(&mut guest, RX, 14, 1600).into_iter();
    let to = |mac: [u8; 6], seed: u8| {
        let mut frame = frame(seed);
        frame[..6].copy_from_slice(&mac);
        frame
    };
    for (mac, seed) in [([6, 0, 0, 0, 0, 7], 1), (new, 2), ([6, 0, 0, 0, 0, 8], 3), ([0xff; 6], 4)] {
        wire.send(&to(mac, seed));
    }
    assert_eq!(received(&mut guest, RX, &mut rooms), 2);
    assert_eq!(received(&mut guest, RX, &mut rooms), 4);
    // A reset forgets the address.
    guest.start(0);
    guest.config(0, &mut mac);
    assert_eq!(mac, MAC);
}

/// Whether the checksum of the host's next datagram is left to the driver.
fn checksum_is_the_drivers(guest: &mut Guest, rooms: &mut impl Iterator<Item = (u64, u32)>) -> bool {
    let socket = std::net::UdpSocket::bind("10.9.7.1:0").unwrap();
    socket.set_broadcast(true).unwrap();
    socket.send_to(&[7; 32], "10.9.7.255:777").unwrap();
    loop {
        guest.next_used(RX);
        let bytes = guest.bytes(rooms.next().unwrap());
        let frame = &bytes[HEADER..];
        // UDP over IPv4, to our port.
        if frame[12..14] == [8, 0] && frame[23] == 17 && frame[36..38] == 777_u16.to_be_bytes() {
            return bytes[0] & 1 != 0;
        }
    }
}

#[test]
fn the_tap_leaves_to_the_driver_what_it_takes_and_nothing_else() {
    const F_CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    let _alone = enter(0);
    common::output("ip", &["addr", "add", "10.9.7.1/24", "dev", "tap0"]);
    for (features, expected) in
        [(0, false), (F_GUEST_CSUM | F_CTRL_VQ | F_CTRL_GUEST_OFFLOADS, true), (F_CTRL_VQ, false)]
    {
        let (mut guest, _wire) = guest(Kind::Mmio, json!({}));
        guest.start(F_EVENT_IDX | features);
        let mut rooms = rooms(&mut guest, RX, 14, 1600).into_iter();
        // What comes before the device has started is as it was at power-on.
        checksum_is_the_drivers(&mut guest, &mut rooms);
        assert_eq!(checksum_is_the_drivers(&mut guest, &mut rooms), expected, "{features:#x}");
        if expected {
            // It changes its mind, and back.
            for offloads in [0, F_GUEST_CSUM] {
                let set = [&[5, 0][..], &offloads.to_le_bytes()].concat();
                assert_eq!(command(&mut guest, 2, &set), 0);
                let left = checksum_is_the_drivers(&mut guest, &mut rooms);
                assert_eq!(left, offloads != 0, "{offloads:#x}");
            }
        }
    }
}

#[test]
fn buffers_taken_ahead_are_there_after_every_stop() {
    let _alone = enter(0);
    let features = F_MRG_RXBUF | F_GUEST_CSUM | F_GUEST_TSO4 | F_EVENT_IDX | F_CTRL_VQ | F_GUEST_ANNOUNCE;
    let (mut guest, wire) = guest(Kind::Mmio, json!({}));
    guest.start(features);
    let mut rooms = rooms(&mut guest, RX, 16, 1600).into_iter();
    let mut next = 1;
    for round in 0..3 {
        wire.send(&frame(next));
        assert_eq!(received(&mut guest, RX, &mut rooms), next);
        next += 1;
        if round % 2 == 0 {
            guest.pause();
            wire.send(&frame(next));
            guest.resume();
            assert_eq!(received(&mut guest, RX, &mut rooms), next);
            next += 1;
        }
        // In another machine: the driver is asked to say where it is now.
        let suspended = guest.suspend();
        let (mut other, _) = self::guest(Kind::Mmio, json!({}));
        other.take_over(&suspended).unwrap();
        other.resume();
        guest = other;
        let mut status = [0; 2];
        wait_for(|| {
            guest.config(6, &mut status);
            status[0] == 3
        });
        assert!(guest.is_interrupted(None));
        assert_eq!(command(&mut guest, 2, &[3, 0]), 0);
        guest.config(6, &mut status);
        assert_eq!(status, [1, 0]);
    }
}

#[test]
fn limits_hold_frames_back_until_they_are_changed() {
    let _alone = enter(0);
    // Two frames, and then nothing for an hour.
    let limit = json!({ "ops": { "size": 2, "refill_time": 3_600_000 } });
    let config = json!({ "rx_rate_limiter": limit, "tx_rate_limiter": limit });
    let (mut guest, wire) = guest(Kind::Mmio, config);
    guest.start(F_EVENT_IDX);
    for seed in 1..=3 {
        let out = outgoing(&mut guest, seed);
        guest.offer(TX, &[(out, 0)]);
    }
    guest.kick(TX);
    for seed in 1..=2 {
        guest.next_used(TX);
        assert_eq!(wire.receive()[20], seed);
    }
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert_eq!(guest.used_index(TX), 2, "more frames went than may");
    // Another bucket is no gift.
    let large = json!({ "size": 1_u64 << 40, "refill_time": 1000 });
    patch(&mut guest, json!({ "iface_id": "net", "tx_rate_limiter": { "bandwidth": large } }));
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert_eq!(guest.used_index(TX), 2);
    let none = json!({ "size": 0, "refill_time": 0 });
    patch(&mut guest, json!({ "iface_id": "net", "tx_rate_limiter": { "ops": none } }));
    guest.next_used(TX);
    assert_eq!(wire.receive()[20], 3);
    // The other way: the frame that waits is there after the change.
    let rooms = rooms(&mut guest, RX, 14, 1600);
    (1..=12).for_each(|seed| wire.send(&frame(seed)));
    wait_for(|| guest.used_index(RX) == 2);
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert_eq!(guest.used_index(RX), 2, "more frames came than may");
    assert!(
        counted(&guest, "tx_rate_limiter_throttled") > 0 && counted(&guest, "rx_rate_limiter_throttled") > 0
    );
    patch(&mut guest, json!({ "iface_id": "net", "rx_rate_limiter": { "ops": none } }));
    let mut rooms = rooms.into_iter();
    while received(&mut guest, RX, &mut rooms) != 12 {}
}

#[test]
fn a_driver_that_resets_its_device_gets_no_more_frames_than_may() {
    let _alone = enter(0);
    // Two frames, and then nothing for an hour.
    let limit = json!({ "ops": { "size": 2, "refill_time": 3_600_000 } });
    let device = open(json!({ "host_dev_name": "tap0", "rx_rate_limiter": limit }));
    let wire = Wire::new("tap0", ETHER_TYPE);
    wire.settle("tap0");
    let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
    let mut guest = Guest::by_hand(Kind::Mmio, device, memory);
    (1..=12).for_each(|seed| wire.send(&frame(seed)));
    for _ in 0..6 {
        guest.start(F_EVENT_IDX);
        rooms(&mut guest, RX, 8, 1600);
        guest.turn();
        guest.reset();
    }
    // The one that waited when it was reset for the first time is owed.
    assert_eq!(counted(&guest, "rx_packets_count"), 3);
}

#[test]
fn what_an_interface_does_is_counted() {
    let _alone = enter(0);
    let (mut guest, wire) = guest(Kind::Mmio, json!({}));
    guest.start(F_EVENT_IDX);
    for seed in 1..=3 {
        let out = outgoing(&mut guest, seed);
        guest.request(TX, &[(out, 0)]);
    }
    // Shorter than a header.
    let short = guest.allocate(&[0; 5]);
    guest.request(TX, &[(short, 0)]);
    wire.send(&frame(9));
    wait_for(|| counted(&guest, "no_rx_avail_buffer") > 0);
    rooms(&mut guest, RX, 14, 1600);
    (1..=8).for_each(|seed| wire.send(&frame(seed)));
    wait_for(|| guest.used_index(RX) >= 9);
    guest.pause();
    // Others are the host's own.
    let received = u64::from(guest.used_index(RX));
    let bytes: u64 = (0..received).map(|_| u64::from(guest.next_used(RX).1) - HEADER as u64).sum();
    for (name, expected) in [
        ("tx_packets_count", 3),
        ("tx_bytes_count", 3 * 60),
        ("tx_count", 4),
        ("tx_malformed_frames", 1),
        ("tx_fails", 0),
        ("rx_packets_count", received),
        ("rx_count", received),
        ("rx_bytes_count", bytes),
        ("rx_fails", 0),
        ("tx_rate_limiter_throttled", 0),
        ("rx_rate_limiter_throttled", 0),
    ] {
        assert_eq!(counted(&guest, name), expected, "{name}");
    }
    for name in EVENTS {
        assert!(counted(&guest, name) > 0, "{name}");
    }
    guest.resume();
    common::output("ip", &["link", "set", "tap0", "down"]);
    let out = outgoing(&mut guest, 4);
    guest.request(TX, &[(out, 0)]);
    assert_eq!((counted(&guest, "tx_packets_count"), counted(&guest, "tx_fails")), (3, 1));
}

/// A guest of which nothing happens but in its turns, behind the TAP `tap0`, whose address answers it.
fn answered_guest(kind: Kind, pairs: u16, features: u64) -> (Guest, Wire) {
    let device = open(json!({ "host_dev_name": "tap0", "queue_pairs": pairs }));
    let wire = Wire::new("tap0", ETHER_TYPE);
    wire.settle("tap0");
    let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
    let mut guest = Guest::by_hand(kind, device, memory);
    guest.start(features);
    rooms(&mut guest, RX, 14, 1600);
    guest.turn();
    (guest, wire)
}

#[test]
fn a_frame_and_its_answer_are_one_interrupt_or_as_wanted() {
    let flags = [0, libc::IFF_MULTI_QUEUE];
    // Which queues' interrupts the driver wants, and how many come where both have one and where each has its own.
    let cases = [([true; 2], 1, 2), ([false, true], 1, 1), ([true, false], 1, 1), ([false; 2], 0, 0)];
    for (pairs, flags) in [1, 2].into_iter().zip(flags) {
        let _alone = enter(flags);
        common::output("ip", &["addr", "add", "10.9.8.1/24", "dev", "tap0"]);
        for kind in driver::KINDS {
            let (mut guest, wire) = answered_guest(kind, pairs, F_EVENT_IDX);
            let ask = guest.allocate(&arp([10, 9, 8, 1]));
            for (wanted, shared, own) in cases {
                for (queue, wanted) in wanted.into_iter().enumerate() {
                    guest.want_interrupt(queue, wanted);
                }
                let before = [RX, TX].map(|queue| guest.used_index(queue));
                guest.interrupts();
                guest.offer(TX, &[(ask, 0)]);
                guest.kick(TX);
                assert!(guest.turn_once());
                let used = [RX, TX].map(|queue| guest.used_index(queue) - before[queue]);
                let expected = if kind == Kind::Pci && pairs == 2 { own } else { shared };
                let case = format!("{kind:?}, {pairs} pairs, wanted {wanted:?}");
                assert_eq!((used, guest.interrupts()), ([1, 1], expected), "{case}");
                // The TAP's event finds it empty.
                guest.turn();
                assert_eq!((guest.used_index(RX) - before[RX], guest.interrupts()), (1, 0), "{case}");
            }
            // Nobody answers this: the driver that waits for it has its interrupt in the same turn.
            let lone = outgoing(&mut guest, 7);
            let mut calls = Vec::new();
            for _ in 0..3 {
                guest.want_interrupt(TX, true);
                guest.offer(TX, &[(lone, 0)]);
                guest.kick(TX);
                assert!(guest.turn_once());
                assert_eq!((wire.receive()[20], guest.interrupts()), (7, 1), "{kind:?}, {pairs} pairs");
                calls.push(counted(&guest, "rx_call_count"));
            }
            // Once the device has found no answer, it looks for none until a frame comes.
            assert_eq!(calls[0], calls[2], "{kind:?}, {pairs} pairs: {calls:?}");
        }
    }
}

#[test]
fn a_queue_without_news_interrupts_nobody() {
    let _alone = enter(libc::IFF_MULTI_QUEUE);
    for kind in driver::KINDS {
        // Without EVENT_IDX, whatever was used is told.
        let (mut guest, wire) = answered_guest(kind, 2, 0);
        guest.interrupts();
        let before = guest.used_index(RX);
        wire.send(&frame(1));
        guest.wait_for_each_turn(|guest| guest.used_index(RX) != before);
        assert_eq!(guest.interrupts(), 1, "{kind:?}");
        let lone = outgoing(&mut guest, 7);
        guest.offer(TX, &[(lone, 0)]);
        guest.kick(TX);
        guest.turn();
        assert_eq!((wire.receive()[20], guest.interrupts()), (7, 1), "{kind:?}");
    }
}

/// How many allocations `count` calls of `step` make, once warm.
fn allocations(count: u64, mut step: impl FnMut()) -> u64 {
    (0..count).for_each(|_| step());
    let before = allocator::allocations();
    (0..count).for_each(|_| step());
    allocator::allocations() - before
}

#[test]
fn no_frame_allocates_in_either_direction() {
    let _alone = enter(0);
    for features in [0, F_EVENT_IDX | F_MRG_RXBUF, F_EVENT_IDX | F_MRG_RXBUF | F_GUEST_CSUM | F_GUEST_TSO4] {
        let (mut guest, wire) = guest(Kind::Mmio, json!({}));
        guest.start(features);
        let out: Vec<_> = (0..8).map(|seed| outgoing(&mut guest, seed)).collect();
        let sent = allocations(50, || {
            for out in &out {
                guest.offer(TX, &[(*out, 0)]);
            }
            guest.kick(TX);
            for _ in &out {
                guest.next_used(TX);
            }
        });
        let rooms = rooms(&mut guest, RX, 16, 1600);
        let frame = frame(1);
        let mut next = 0;
        let received = allocations(50, || {
            (0..8).for_each(|_| wire.send(&frame));
            for _ in 0..8 {
                guest.next_used(RX);
                guest.offer(RX, &[(rooms[next % rooms.len()], WRITE)]);
                next += 1;
            }
            guest.kick(RX);
        });
        assert_eq!((sent, received), (0, 0), "{features:#x}");
    }
}

#[test]
fn a_backlog_costs_less_than_half_a_system_call_a_frame() {
    // A driver that takes no segments needs one buffer for a frame, and gets no more.
    for features in [0, F_MRG_RXBUF] {
        let _alone = enter(0);
        let device = open(json!({ "host_dev_name": "tap0" }));
        let metrics = device.metrics().unwrap();
        let counted = |name: &str| metrics.collect(View::Total)[name].as_u64().unwrap();
        let wire = Wire::new("tap0", ETHER_TYPE);
        wire.settle("tap0");
        let mut guest = Guest::new(Kind::Mmio, device);
        guest.start(F_EVENT_IDX | features);
        let out = outgoing(&mut guest, 1);
        for _ in 0..16 {
            guest.offer(TX, &[(out, 0)]);
        }
        guest.kick(TX);
        for _ in 0..16 {
            guest.next_used(TX);
        }
        assert_eq!((counted("tx_packets_count"), counted("tx_bytes_count")), (16, 16 * 60));
        assert!(counted("tx_call_count") <= 8, "{} calls for 16 frames", counted("tx_call_count"));
        guest.pause();
        wire.discard();
        (0..16).for_each(|seed| wire.send(&frame(seed)));
        rooms(&mut guest, RX, 16, 1600);
        let before = counted("rx_call_count");
        guest.resume();
        wait_for(|| guest.used_index(RX) == 16);
        let calls = counted("rx_call_count") - before;
        println!("16 frames: {} calls to send, {calls} to receive", counted("tx_call_count"));
        assert!(calls <= 8, "{calls} calls for 16 frames");
        assert!(counted("rx_bytes_count") >= 16 * 60);
    }
}

#[test]
fn frames_that_find_no_room_wake_nobody_and_come_when_there_is_room() {
    let _alone = enter(0);
    let device = open(json!({ "host_dev_name": "tap0" }));
    let metrics = device.metrics().unwrap();
    let events = || metrics.collect(View::Total)["rx_tap_event_count"].as_u64().unwrap();
    let wire = Wire::new("tap0", ETHER_TYPE);
    wire.settle("tap0");
    let mut guest = Guest::new(Kind::Mmio, device);
    guest.start(F_EVENT_IDX | F_MRG_RXBUF);
    let before = events();
    for seed in 0..50 {
        wire.send(&frame(seed));
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
    assert!(events() - before <= 2, "{} events for nothing", events() - before);
    // The host has some of its own to say.
    let mut next = || loop {
        let room = rooms(&mut guest, RX, 1, 1600)[0];
        guest.next_used(RX);
        let bytes = guest.bytes(room);
        if bytes[HEADER + 12..HEADER + 14] == ETHER_TYPE.to_be_bytes() {
            break bytes[HEADER + 20];
        }
    };
    assert!((0..50).all(|seed| next() == seed));
    // The TAP is empty: it tells again.
    let sender = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        wire.send(&frame(99));
    });
    assert_eq!(next(), 99);
    sender.join().unwrap();
}

#[test]
fn a_frame_larger_than_was_reckoned_with_is_missed_once() {
    let _alone = enter(0);
    common::output("ip", &["link", "set", "tap0", "mtu", "4000"]);
    let device = open(json!({ "host_dev_name": "tap0" }));
    let wire = Wire::new("tap0", ETHER_TYPE);
    wire.settle("tap0");
    let mut guest = Guest::new(Kind::Mmio, device);
    guest.start(F_MRG_RXBUF);
    rooms(&mut guest, RX, 16, 2048);
    let mut large = frame(1).to_vec();
    large.resize(3000, 0xab);
    // Others are the host's own.
    while guest.used_index(RX) < 2 || guest.next_used(RX).1 != 2048 {
        wire.send(&large);
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(guest.next_used(RX).1, 12 + 3000 - 2048);
    assert!(counted(&guest, "rx_fails") >= 1);
    assert!(counted(&guest, "rx_count") > counted(&guest, "rx_packets_count"));
}

#[test]
fn a_driver_that_fills_up_half_empty_rings_does_not_wait_for_ever() {
    let _alone = enter(0);
    let (mut guest, wire) = guest(Kind::Mmio, json!({}));
    guest.start(F_MRG_RXBUF | F_GUEST_CSUM | F_GUEST_TSO4);
    // Together they have room for one large packet, and not for another one after that.
    let mut rooms = rooms(&mut guest, RX, 16, 5000).into_iter();
    for seed in 1..=8 {
        wire.send(&frame(seed));
        while received(&mut guest, RX, &mut rooms) != seed {}
    }
}

#[test]
fn a_frame_longer_than_its_buffer_is_lost_and_not_cut_off() {
    const ROOM: usize = 1600;
    let _alone = enter(0);
    common::output("ip", &["link", "set", "tap0", "mtu", "4000"]);
    // Alone, and in a batch that goes by a ring.
    for batch in [1, 8] {
        let (mut guest, wire) = guest(Kind::Mmio, json!({}));
        guest.start(F_EVENT_IDX);
        let long = |seed: u8, length: usize| {
            let mut frame = frame(seed).to_vec();
            frame.resize(length, seed);
            frame
        };
        guest.pause();
        for seed in 0..batch {
            wire.send(&long(100 + seed, ROOM - HEADER + 1));
            wire.send(&long(100 + seed, 3000));
            wire.send(&long(seed, ROOM - HEADER));
        }
        let rooms = rooms(&mut guest, RX, 14, ROOM);
        guest.resume();
        for seed in 0..batch {
            // Others are the host's own.
            let (length, room) = loop {
                // One that a frame was lost from serves the next one, and the others come back before it.
                let (head, length) = guest.next_used(RX);
                let room = rooms[usize::from(head)];
                if guest.bytes(room)[HEADER + 12..HEADER + 14] == ETHER_TYPE.to_be_bytes() {
                    break (length as usize, room);
                }
            };
            assert_eq!(length, ROOM);
            assert!(guest.bytes(room)[HEADER..] == long(seed, ROOM - HEADER), "{seed} of {batch}");
        }
        wait_for(|| counted(&guest, "rx_fails") == 2 * u64::from(batch));
    }
}

#[test]
fn a_host_that_forbids_rings_carries_frames_one_by_one() {
    let _alone = enter(0);
    let (mut guest, wire) = guest(Kind::Mmio, json!({}));
    // Before the loop's thread is started, which has it from here.
    common::forbid(libc::SYS_io_uring_setup, libc::EPERM);
    guest.start(F_EVENT_IDX | F_MRG_RXBUF);
    for seed in 0..8 {
        let out = outgoing(&mut guest, seed);
        guest.offer(TX, &[(out, 0)]);
    }
    guest.kick(TX);
    for seed in 0..8 {
        guest.next_used(TX);
        assert_eq!(wire.receive()[20], seed);
    }
    let mut rooms = rooms(&mut guest, RX, 16, 1600).into_iter();
    (0..8).for_each(|seed| wire.send(&frame(seed)));
    for seed in 0..8 {
        assert_eq!(received(&mut guest, RX, &mut rooms), seed);
    }
}

#[test]
fn the_longest_chains_leave_little_memory_behind() {
    let _alone = enter(0);
    for features in [0, F_MRG_RXBUF] {
        let (mut guest, wire) = guest(Kind::Mmio, json!({}));
        guest.start(features);
        let out = outgoing(&mut guest, 1);
        guest.request(TX, &[(out, 0)]);
        wire.receive();
        let before = allocator::bytes();
        // A header and 255 pieces of a frame, or 256 pieces of a room that takes it.
        let piece = guest.allocate(&[0xff; 4]);
        let whole = guest.allocate_table(&[&[(out, 0)][..], &[(piece, 0); 255]].concat());
        let room = guest.allocate(&[0; 16]);
        let rooms = guest.allocate_table(&[(room, WRITE); 256]);
        for _ in 0..3 {
            for _ in 0..16 {
                guest.offer(TX, &[(whole, INDIRECT)]);
                guest.offer(RX, &[(rooms, INDIRECT)]);
            }
            guest.kick(RX);
            guest.kick(TX);
            (0..16).for_each(|_| wire.send(&frame(1)));
            for _ in 0..16 {
                guest.next_used(TX);
                assert_eq!(wire.receive().len(), 60 + 255 * 4, "a frame is whole or it is none");
            }
            (0..16).for_each(|_| _ = guest.next_used(RX));
        }
        let grown = allocator::bytes() - before;
        println!("{features:#x}: {grown} bytes more");
        assert!(grown < 512 << 10, "{features:#x}: {grown} bytes");
        assert_eq!(guest.status() & NEEDS_RESET, 0);
    }
}

/// An ARP request of the guest's for `target`.
fn arp(target: [u8; 4]) -> Vec<u8> {
    let mut frame = [&[0; HEADER][..], &[0xff; 6], &MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &MAC].concat();
    frame.extend([10, 9, 8, 77]);
    frame.extend([0; 6]);
    frame.extend(target);
    frame
}

#[test]
fn passt_answers_costs_no_memory_and_its_end_is_the_links() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    network::enter();
    network::add_uplink();
    let mut guest = Guest::new(Kind::Mmio, open(json!({ "user": {} })));
    guest.start(F_EVENT_IDX);
    assert!(link_is_up(&mut guest));
    let rooms = rooms(&mut guest, RX, 8, 1600);
    let out = guest.allocate(&arp([10, 9, 8, 1]));
    let mut next = 0;
    let mut ask = || {
        guest.request(TX, &[(out, 0)]);
        // Others come, too: router advertisements.
        loop {
            let (_, length) = guest.next_used(RX);
            let room = rooms[next % rooms.len()];
            next += 1;
            let mut head = [0; HEADER + 22];
            guest.memory.memory().read_slice(&mut head, GuestAddress(room.0)).unwrap();
            guest.offer(RX, &[(room, WRITE)]);
            guest.kick(RX);
            if head[HEADER + 12..HEADER + 14] == [8, 6] && head[HEADER + 20..] == [0, 2] {
                assert_eq!(length as usize, HEADER + 42);
                break;
            }
        }
    };
    assert_eq!(allocations(100, &mut ask), 0);
    guest.pause();
    for (name, expected) in [
        ("tx_packets_count", 200),
        ("tx_count", 200),
        ("tx_bytes_count", 200 * 42),
        ("rx_packets_count", guest.used_index(RX).into()),
        ("rx_count", guest.used_index(RX).into()),
        ("tx_fails", 0),
    ] {
        assert_eq!(counted(&guest, name), expected, "{name}");
    }
    assert!(counted(&guest, "rx_bytes_count") >= 200 * 42);
    for name in EVENTS {
        assert!(counted(&guest, name) > 0, "{name}");
    }
    guest.resume();
    let mac = std::process::id();
    let passt = network::passts(mac);
    assert_eq!(passt.len(), 1, "one passt for one interface");
    network::kill(passt[0]);
    wait_for(|| !link_is_up(&mut guest));
    assert!(guest.is_interrupted(None));
    // The guest goes on; its frames are lost.
    guest.request(TX, &[(out, 0)]);
    assert_eq!((counted(&guest, "tx_packets_count"), counted(&guest, "tx_fails")), (200, 1));
    drop(guest);
    wait_for(|| network::passts(mac).is_empty());
}

/// A CPU of the guest's that does one thing again and again while the device is at work.
struct Busy {
    is_over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Busy {
    fn new(mut step: impl FnMut() + Send + 'static) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let ends = is_over.clone();
        let run = move || {
            while !ends.load(Ordering::Relaxed) {
                step();
            }
        };
        Self { is_over, thread: Some(std::thread::spawn(run)) }
    }

    /// Makes requests available as fast as they are used; all of them begin with descriptor 0.
    fn flood(guest: &Guest, queue: usize) -> Self {
        let (memory, [_, available, used]) = (guest.memory.clone(), Guest::parts(queue));
        Self::new(move || {
            let memory = memory.memory();
            let used: u16 = memory.load(GuestAddress(used + 2), Ordering::Acquire).unwrap();
            let next = used.wrapping_add(16);
            memory.store(next, GuestAddress(available + 2), Ordering::Release).unwrap();
        })
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

#[test]
fn a_flood_of_frames_that_are_none_costs_no_memory_and_no_pause() {
    let _alone = enter(0);
    network::add_uplink();
    for user in [false, true] {
        let config = if user { json!({ "user": {} }) } else { json!({ "host_dev_name": "tap0" }) };
        let mut guest = Guest::new(Kind::Mmio, open(config));
        guest.start(0);
        // Shorter than a header, in as many pieces as there may be.
        let piece = guest.allocate(&[0; 1]);
        let nothing = guest.allocate(&[]);
        let table = guest.allocate_table(&[&[(piece, 0); 5][..], &[(nothing, 0); 251]].concat());
        guest.set_descriptor(TX, 0, table.0, table.1, INDIRECT, 0);
        let flood = Busy::flood(&guest, TX);
        guest.kick(TX);
        let tell = |guest: &Guest| counted(guest, "tx_malformed_frames");
        // Where the flood is slower than the device, that waits for a kick.
        let go_on = |guest: &mut Guest, count: u64| {
            wait_for(|| {
                guest.kick(TX);
                tell(guest) > count
            });
        };
        go_on(&mut guest, 100);
        let before = allocator::bytes();
        for _ in 0..20 {
            let seen = tell(&guest);
            go_on(&mut guest, seen + 50);
            guest.pause();
            guest.resume();
        }
        let grown = allocator::bytes() - before;
        // A worker is made anew by each resume; its predecessor's memory is gone.
        assert!(grown < 256 << 10, "user {user}: {grown} bytes");
        drop(flood);
        guest.pause();
    }
}

#[test]
fn a_limit_holds_whatever_a_guest_makes_of_a_frame_meanwhile() {
    const LIMIT: u64 = 200_000;
    let _alone = enter(0);
    network::add_uplink();
    let limit = json!({ "bandwidth": { "size": LIMIT, "refill_time": 3_600_000_000_u64 } });
    for user in [false, true] {
        let mut config = json!({ "tx_rate_limiter": limit });
        let (key, value) = if user { ("user", json!({})) } else { ("host_dev_name", json!("tap0")) };
        config[key] = value;
        let mut guest = Guest::new(Kind::Mmio, open(config));
        guest.start(0);
        let out = guest.allocate(&[&[0; HEADER][..], &frame(1), &[0; 1440]].concat());
        (0..16).for_each(|index| guest.set_descriptor(TX, index, out.0, out.1, 0, 0));
        // As long as it is wherever it is looked at.
        let (memory, mut is_long) = (guest.memory.clone(), false);
        let _busy = Busy::new(move || {
            is_long = !is_long;
            let length = if is_long { out.1 } else { HEADER as u32 + 60 };
            for index in 0..16 {
                let place = GuestAddress(Guest::parts(TX)[0] + 16 * index + 8);
                memory.memory().store(length, place, Ordering::Relaxed).unwrap();
            }
        });
        wait_for(|| {
            let (available, size) = guest.available(TX);
            for index in available - guest.used_index(TX)..size {
                guest.make_available(TX, index);
            }
            guest.kick(TX);
            counted(&guest, "tx_rate_limiter_throttled") > 0
        });
        // What goes with the one that must wait is counted after it.
        guest.pause();
        let sent = counted(&guest, "tx_bytes_count");
        assert!((LIMIT - 1500..=LIMIT).contains(&sent), "user {user}: {sent} bytes");
    }
}

#[test]
fn frames_that_are_none_go_back_a_share_at_a_time_over_passt() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    network::enter();
    network::add_uplink();
    let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
    let mut guest = Guest::by_hand(Kind::Mmio, open(json!({ "user": {} })), memory);
    guest.start(F_MRG_RXBUF);
    guest.turn();
    let nothing = guest.allocate(&[]);
    let table = guest.allocate_table(&[(nothing, 0); 256]);
    (0..16).for_each(|_| _ = guest.offer(TX, &[(table, INDIRECT)]));
    guest.kick(TX);
    let mut done = 0;
    while guest.turn_once() {
        let now = guest.used_index(TX);
        assert!((now - done) * 256 <= DESCRIPTORS_PER_TURN, "{} at once", now - done);
        done = now;
    }
    assert_eq!(done, 16);
    // A frame that would need more descriptors than are looked at for it is lost, in a turn that ends.
    let room = guest.allocate(&[0; HEADER]);
    let small = guest.allocate_table(&[&[(room, WRITE)][..], &[(nothing, WRITE); 255]].concat());
    (0..5).for_each(|_| _ = guest.offer(RX, &[(small, INDIRECT)]));
    guest.kick(RX);
    let out = guest.allocate(&arp([10, 9, 8, 1]));
    guest.request(TX, &[(out, 0)]);
    guest.wait_for(|guest| counted(guest, "rx_fails") > 0);
    guest.turn();
    assert_eq!((guest.used_index(RX), guest.status() & NEEDS_RESET), (0, 0));
}

#[test]
fn a_receive_buffer_without_room_for_a_header_breaks_the_device_alone() {
    let _alone = enter(0);
    network::add_uplink();
    for user in [false, true] {
        let config = if user { json!({ "user": {} }) } else { json!({ "host_dev_name": "tap0" }) };
        let device = open(config);
        let wire = Wire::new("tap0", ETHER_TYPE);
        if !user {
            wire.settle("tap0");
        }
        let mut guest = Guest::new(Kind::Mmio, device);
        guest.start(F_EVENT_IDX);
        let room = rooms(&mut guest, RX, 1, HEADER - 1)[0];
        if user {
            let out = guest.allocate(&arp([10, 9, 8, 1]));
            guest.request(TX, &[(out, 0)]);
        } else {
            wire.send(&frame(1));
        }
        guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
        assert!(guest.bytes(room).iter().all(|byte| *byte == 0), "it was written to");
        assert_eq!(guest.used_index(RX), 0);
    }
}

#[test]
fn limits_hold_frames_of_passt_back_until_they_are_changed() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    network::enter();
    network::add_uplink();
    let limit = json!({ "ops": { "size": 2, "refill_time": 3_600_000 } });
    let config = json!({ "user": {}, "rx_rate_limiter": limit, "tx_rate_limiter": limit });
    let mut guest = Guest::new(Kind::Mmio, open(config));
    guest.start(F_EVENT_IDX);
    rooms(&mut guest, RX, 14, 1600);
    let out = guest.allocate(&arp([10, 9, 8, 1]));
    for _ in 0..9 {
        guest.offer(TX, &[(out, 0)]);
    }
    guest.kick(TX);
    let settle = || std::thread::sleep(std::time::Duration::from_millis(30));
    wait_for(|| guest.used_index(TX) == 2);
    settle();
    assert_eq!(guest.used_index(TX), 2, "more frames went than may");
    let none = json!({ "size": 0, "refill_time": 0 });
    patch(&mut guest, json!({ "iface_id": "net", "tx_rate_limiter": { "ops": none } }));
    wait_for(|| guest.used_index(TX) == 9 && guest.used_index(RX) == 2);
    settle();
    assert_eq!(guest.used_index(RX), 2, "more frames came than may");
    assert!(
        counted(&guest, "tx_rate_limiter_throttled") > 0 && counted(&guest, "rx_rate_limiter_throttled") > 0
    );
    patch(&mut guest, json!({ "iface_id": "net", "rx_rate_limiter": { "ops": none } }));
    // An answer to each, whatever else there is.
    wait_for(|| guest.used_index(RX) >= 9);
}

#[test]
fn frames_that_wait_for_passt_over_pauses_are_charged_once() {
    const FRAMES: u16 = 12;
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    network::enter();
    network::add_uplink();
    let limit = |size| json!({ "ops": { "size": size, "refill_time": 3_600_000 } });
    let config = json!({ "user": {}, "rx_rate_limiter": limit(1), "tx_rate_limiter": limit(FRAMES + 3) });
    let mut guest = Guest::new(Kind::Mmio, open(config));
    guest.start(0);
    let pauses = |guest: &mut Guest| {
        for _ in 0..5 {
            guest.pause();
            guest.resume();
        }
    };
    // Of what comes, one may pass, as soon as it has a buffer.
    let out = guest.allocate(&arp([10, 9, 8, 1]));
    guest.request(TX, &[(out, 0)]);
    wait_for(|| counted(&guest, "no_rx_avail_buffer") > 0);
    pauses(&mut guest);
    rooms(&mut guest, RX, 1, 1600);
    wait_for(|| guest.used_index(RX) == 1);
    // A passt that stands still takes some, and the rest waits for it.
    let passt = network::passts(std::process::id())[0].to_string();
    common::output("kill", &["-STOP", &passt]);
    let long = guest.allocate(&[&[0; HEADER][..], &frame(1), &[0; 50_000]].concat());
    (0..FRAMES).for_each(|_| _ = guest.offer(TX, &[(long, 0)]));
    guest.kick(TX);
    wait_for(|| guest.used_index(TX) > 1);
    assert!(guest.used_index(TX) < 1 + FRAMES, "its socket takes all of them");
    pauses(&mut guest);
    common::output("kill", &["-CONT", &passt]);
    wait_for(|| guest.used_index(TX) == 1 + FRAMES);
    assert_eq!(counted(&guest, "tx_rate_limiter_throttled"), 0);
    assert_eq!(counted(&guest, "tx_count"), u64::from(1 + FRAMES));
    // Two more are within the limit.
    (0..3).for_each(|_| _ = guest.offer(TX, &[(out, 0)]));
    guest.kick(TX);
    wait_for(|| guest.used_index(TX) == 3 + FRAMES && counted(&guest, "tx_rate_limiter_throttled") > 0);
    assert_eq!(guest.available(TX).0, 4 + FRAMES);
}

#[test]
fn a_frame_of_passt_waits_in_peace_until_there_is_room_for_all() {
    const TURNS: usize = 100;
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    network::enter();
    network::add_uplink();
    for features in [F_MRG_RXBUF, F_MRG_RXBUF | F_EVENT_IDX] {
        let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
        let mut guest = Guest::by_hand(Kind::Mmio, open(json!({ "user": {} })), memory);
        guest.start(features);
        let small = rooms(&mut guest, RX, 1, HEADER + 8)[0];
        let out = guest.allocate(&arp([10, 9, 8, 1]));
        guest.request(TX, &[(out, 0)]);
        guest.wait_for(|guest| counted(guest, "no_rx_avail_buffer") > 0);
        let turns = (0..TURNS).take_while(|_| guest.turn_once()).count();
        assert!(turns < TURNS, "it looks at the same buffer again and again");
        // It is to be kicked for the next one.
        let (offered, size) = guest.available(RX);
        let [_, _, used] = Guest::parts(RX);
        let memory = guest.memory.memory();
        let flags: u16 = memory.read_obj(GuestAddress(used)).unwrap();
        let event: u16 = memory.read_obj(GuestAddress(used + 4 + 8 * u64::from(size))).unwrap();
        assert_eq!((flags, event), (0, if features & F_EVENT_IDX == 0 { 0 } else { offered }));
        let rest = rooms(&mut guest, RX, 1, 1600)[0];
        let lengths = [(); 2].map(|()| guest.next_used(RX).1);
        assert_eq!(lengths[0], small.1);
        assert_eq!(guest.bytes(small)[10..12], [2, 0], "it fills two buffers");
        assert!(guest.bytes(rest).iter().any(|byte| *byte != 0));
    }
}

#[test]
fn frames_of_passt_that_fit_no_buffer_are_lost_and_counted() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    network::enter();
    network::add_uplink();
    let mut guest = Guest::new(Kind::Mmio, open(json!({ "user": {} })));
    // One buffer for a frame, and none that an answer fits.
    guest.start(F_EVENT_IDX);
    let out = guest.allocate(&arp([10, 9, 8, 1]));
    guest.request(TX, &[(out, 0)]);
    wait_for(|| counted(&guest, "no_rx_avail_buffer") > 0);
    let small = rooms(&mut guest, RX, 1, HEADER + 41);
    wait_for(|| counted(&guest, "rx_fails") > 0);
    assert_eq!(guest.used_index(RX), 0, "a frame was cut off");
    assert!(guest.bytes(small[0]).iter().all(|byte| *byte == 0), "a frame that is lost was written");
    // Longer than frames are, or shorter than their header.
    let long = guest.allocate(&vec![0; 80_000]);
    let short = guest.allocate(&[0; 5]);
    guest.request(TX, &[(long, 0)]);
    guest.request(TX, &[(short, 0)]);
    assert_eq!((counted(&guest, "tx_malformed_frames"), counted(&guest, "tx_packets_count")), (2, 1));
    assert!(link_is_up(&mut guest));
}
