//! The network device's frames, with the driver's side in this process: several queue pairs, the control
//! queue, the link, limits, what stops and starts leave, and what a frame costs in memory.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "../common/mod.rs"]
mod common;
mod costs;
mod limits;
mod passt;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alula::devices::KINDS;
use alula::host::Host;
use alula::memory;
use alula::metrics::View;
use alula::virtio::VirtioDevice;
use alula::virtio::queue::DESCRIPTORS_PER_TURN;
use common::allocator::{self, Counting};
use common::driver::{self, F_EVENT_IDX, Guest, INDIRECT, NEEDS_RESET, TRANSPORTS, TransportKind, WRITE};
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
const F_STATUS: u64 = 1 << 16;
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
fn guest(kind: TransportKind, more: Value) -> (Guest, Wire) {
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
    let change = kind.parse_patch("", body.to_string().as_bytes()).unwrap();
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
    for kind in [TransportKind::Mmio, TransportKind::Pci] {
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
    let (mut guest, _wire) = guest(TransportKind::Mmio, json!({}));
    guest.start(F_EVENT_IDX);
    // The first request is done when the io thread has started the device.
    let out = outgoing(&mut guest, 1);
    guest.request(TX, &[(out, 0)]);
    common::output("ip", &["link", "del", "tap0"]);
    wait_for(|| !link_is_up(&mut guest));
}

#[test]
fn frames_go_by_every_queue_pair_that_the_driver_uses() {
    let _alone = enter(libc::IFF_MULTI_QUEUE);
    let (mut guest, wire) = guest(TransportKind::Pci, json!({ "queue_pairs": 2, "threads": 2 }));
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
    let (mut guest, wire) = guest(TransportKind::Mmio, json!({}));
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
        let (mut guest, _wire) = guest(TransportKind::Mmio, json!({}));
        guest.start(F_EVENT_IDX | features);
        let mut rooms = rooms(&mut guest, RX, 14, 1600).into_iter();
        // What comes before the device has started is as it was at power-on.
        checksum_is_the_drivers(&mut guest, &mut rooms);
        assert_eq!(checksum_is_the_drivers(&mut guest, &mut rooms), expected, "{features:#x}");
        if expected {
            // The driver takes checksums back, and leaves them to the host again.
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
    let (mut guest, wire) = guest(TransportKind::Mmio, json!({}));
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
        let (mut other, _) = self::guest(TransportKind::Mmio, json!({}));
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
fn what_an_interface_does_is_counted() {
    let _alone = enter(0);
    let (mut guest, wire) = guest(TransportKind::Mmio, json!({}));
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

/// The rounds of [`allocations`]; the first one is to warm the device.
const ROUNDS: u64 = 6;

/// How many allocations `count` calls of `step` make, once warm: how many frames come together decides when the lists
/// that hold them are as long as they ever get, so that is the least of several rounds.
fn allocations(count: u64, mut step: impl FnMut()) -> u64 {
    let mut round = || {
        let before = allocator::allocations();
        (0..count).for_each(|_| step());
        allocator::allocations() - before
    };
    round();
    (1..ROUNDS).map(|_| round()).min().unwrap()
}

/// An ARP request of the guest's for `target`.
fn arp(target: [u8; 4]) -> Vec<u8> {
    let mut frame = [&[0; HEADER][..], &[0xff; 6], &MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &MAC].concat();
    frame.extend([10, 9, 8, 77]);
    frame.extend([0; 6]);
    frame.extend(target);
    frame
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
        let mut guest = Guest::new(TransportKind::Mmio, device);
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
