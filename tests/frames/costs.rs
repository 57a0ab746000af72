//! What frames cost, and what happens to those that find no room.

use super::*;

/// A guest of which nothing happens but in its turns, behind the TAP `tap0`, whose address answers it.
fn answered_guest(kind: TransportKind, pairs: u16, features: u64) -> (Guest, Wire) {
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

/// How often a case is tried that a busy host's kernel can keep from showing anything.
const ATTEMPTS: usize = 200;

/// Sends a question to the host: how many buffers of each queue were used in the turn that sent it, and how many
/// interrupts came. A busy host's kernel may put its answer off to a thread, which shows nothing: it is asked again.
fn ask_until_answered_at_once(
    guest: &mut Guest,
    ask: (u64, u32),
    wanted: [bool; 2],
    case: &str,
) -> ([u16; 2], u64) {
    for _ in 0..ATTEMPTS {
        for (queue, wanted) in wanted.into_iter().enumerate() {
            guest.want_interrupt(queue, wanted);
        }
        let before = [RX, TX].map(|queue| guest.used_index(queue));
        guest.interrupts();
        guest.offer(TX, &[(ask, 0)]);
        guest.kick(TX);
        assert!(guest.turn_once());
        let used = [RX, TX].map(|queue| guest.used_index(queue) - before[queue]);
        let interrupts = guest.interrupts();
        if used != [0, 1] {
            // The TAP's event finds it empty, or a frame of the host's own that came meanwhile.
            guest.turn();
            let came = guest.used_index(RX) - before[RX];
            assert!(came > 1 || came == 1 && guest.interrupts() == 0, "{case}: {came}");
            return (used, interrupts);
        }
        guest.wait_for_each_turn(|guest| guest.used_index(RX) != before[RX]);
        rooms(guest, RX, 1, 1600);
        guest.turn();
    }
    panic!("{case}: the host never answered before the turn was over");
}

#[test]
fn a_frame_and_its_answer_are_one_interrupt_or_as_wanted() {
    let flags = [0, libc::IFF_MULTI_QUEUE];
    // Which queues' interrupts the driver wants, and how many come where both have one and where each has its own.
    let cases = [([true; 2], 1, 2), ([false, true], 1, 1), ([true, false], 1, 1), ([false; 2], 0, 0)];
    for (pairs, flags) in [1, 2].into_iter().zip(flags) {
        let _alone = enter(flags);
        common::output("ip", &["addr", "add", "10.9.8.1/24", "dev", "tap0"]);
        for kind in driver::TRANSPORTS {
            let (mut guest, wire) = answered_guest(kind, pairs, F_EVENT_IDX);
            let ask = guest.allocate(&arp([10, 9, 8, 1]));
            for (wanted, shared, own) in cases {
                let expected = if kind == TransportKind::Pci && pairs == 2 { own } else { shared };
                let case = format!("{kind:?}, {pairs} pairs, wanted {wanted:?}");
                let told = ask_until_answered_at_once(&mut guest, ask, wanted, &case);
                assert_eq!(told, ([1, 1], expected), "{case}");
            }
            // Nobody answers this: the driver that waits for it has its interrupt in the same turn.
            let lone = outgoing(&mut guest, 7);
            let mut looks = || {
                guest.want_interrupt(TX, true);
                guest.offer(TX, &[(lone, 0)]);
                guest.kick(TX);
                assert!(guest.turn_once());
                assert_eq!((wire.receive()[20], guest.interrupts()), (7, 1), "{kind:?}, {pairs} pairs");
                counted(&guest, "rx_call_count")
            };
            // Once the device has found no answer, it looks for none until a frame comes: of the host's own, too.
            let quiet =
                (0..ATTEMPTS).any(|_| [looks(), looks(), looks()].windows(2).all(|two| two[0] == two[1]));
            assert!(quiet, "{kind:?}, {pairs} pairs");
        }
    }
}

#[test]
fn a_queue_without_news_interrupts_nobody() {
    let _alone = enter(libc::IFF_MULTI_QUEUE);
    for kind in driver::TRANSPORTS {
        // Without EVENT_IDX, whatever was used is told.
        let (mut guest, wire) = answered_guest(kind, 2, 0);
        guest.interrupts();
        let before = guest.used_index(RX);
        wire.send(&frame(1));
        guest.wait_for_each_turn(|guest| guest.used_index(RX) != before);
        assert_eq!(guest.interrupts(), 1, "{kind:?}");
        // A frame of the host's own, which comes when it likes, is told beside.
        let is_told_once = (0..ATTEMPTS).any(|_| {
            let lone = outgoing(&mut guest, 7);
            guest.offer(TX, &[(lone, 0)]);
            guest.kick(TX);
            guest.turn();
            assert_eq!(wire.receive()[20], 7);
            guest.interrupts() == 1
        });
        assert!(is_told_once, "{kind:?}");
    }
}

#[test]
fn no_frame_allocates_in_either_direction() {
    let _alone = enter(0);
    for features in [0, F_EVENT_IDX | F_MRG_RXBUF, F_EVENT_IDX | F_MRG_RXBUF | F_GUEST_CSUM | F_GUEST_TSO4] {
        let (mut guest, wire) = guest(TransportKind::Mmio, json!({}));
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
        let mut guest = Guest::new(TransportKind::Mmio, device);
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
    let mut guest = Guest::new(TransportKind::Mmio, device);
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
    let mut guest = Guest::new(TransportKind::Mmio, device);
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
    let (mut guest, wire) = guest(TransportKind::Mmio, json!({}));
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
        let (mut guest, wire) = guest(TransportKind::Mmio, json!({}));
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
    let (mut guest, wire) = guest(TransportKind::Mmio, json!({}));
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
    let mut seeds: Vec<_> = (0..8).map(|_| received(&mut guest, RX, &mut rooms)).collect();
    // The kernel's queue before a TAP has no lock (pfifo_fast): two frames of a sender that goes to another CPU between
    // them change places now and then. None is lost, and none comes twice.
    seeds.sort_unstable();
    assert_eq!(seeds, (0..8).collect::<Vec<_>>());
}

#[test]
fn the_longest_chains_leave_little_memory_behind() {
    let _alone = enter(0);
    for features in [0, F_MRG_RXBUF] {
        let (mut guest, wire) = guest(TransportKind::Mmio, json!({}));
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

#[test]
fn a_flood_of_frames_that_are_none_costs_no_memory_and_no_pause() {
    let _alone = enter(0);
    network::add_uplink();
    for user in [false, true] {
        let config = if user { json!({ "user": {} }) } else { json!({ "host_dev_name": "tap0" }) };
        let mut guest = Guest::new(TransportKind::Mmio, open(config));
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
