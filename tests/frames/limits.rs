//! Rate limits hold whatever a guest, a stop or a patch does.

use super::*;

#[test]
fn limits_hold_frames_back_until_they_are_changed() {
    let _alone = enter(0);
    // Two frames, and then nothing for an hour.
    let limit = json!({ "ops": { "size": 2, "refill_time": 3_600_000 } });
    let config = json!({ "rx_rate_limiter": limit, "tx_rate_limiter": limit });
    let (mut guest, wire) = guest(TransportKind::Mmio, config);
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
    let mut guest = Guest::by_hand(TransportKind::Mmio, device, memory);
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
fn a_limit_holds_whatever_a_guest_makes_of_a_frame_meanwhile() {
    const LIMIT: u64 = 200_000;
    let _alone = enter(0);
    network::add_uplink();
    let limit = json!({ "bandwidth": { "size": LIMIT, "refill_time": 3_600_000_000_u64 } });
    for user in [false, true] {
        let mut config = json!({ "tx_rate_limiter": limit });
        let (key, value) = if user { ("user", json!({})) } else { ("host_dev_name", json!("tap0")) };
        config[key] = value;
        let mut guest = Guest::new(TransportKind::Mmio, open(config));
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
        // The frames before the one that must wait are counted when their carrier has taken them: passt in its own
        // time. A pause before that gives back what those are charged that have not gone.
        wait_for(|| counted(&guest, "tx_bytes_count") >= LIMIT - 1500);
        guest.pause();
        let sent = counted(&guest, "tx_bytes_count");
        assert!(sent <= LIMIT, "user {user}: {sent} bytes");
    }
}

#[test]
fn limits_hold_frames_of_passt_back_until_they_are_changed() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    network::enter();
    network::add_uplink();
    let limit = json!({ "ops": { "size": 2, "refill_time": 3_600_000 } });
    let config = json!({ "user": {}, "rx_rate_limiter": limit, "tx_rate_limiter": limit });
    let mut guest = Guest::new(TransportKind::Mmio, open(config));
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
    let mut guest = Guest::new(TransportKind::Mmio, open(config));
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
