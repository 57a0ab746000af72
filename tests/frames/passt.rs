//! Frames over passt's stream.

use super::*;

#[test]
fn passt_answers_costs_no_memory_and_its_end_is_the_links() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    network::enter();
    network::add_uplink();
    let mut guest = Guest::new(TransportKind::Mmio, open(json!({ "user": {} })));
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
    assert_eq!(allocations(40, &mut ask), 0);
    let asked = 40 * ROUNDS;
    guest.pause();
    for (name, expected) in [
        ("tx_packets_count", asked),
        ("tx_count", asked),
        ("tx_bytes_count", asked * 42),
        ("rx_packets_count", guest.used_index(RX).into()),
        ("rx_count", guest.used_index(RX).into()),
        ("tx_fails", 0),
    ] {
        assert_eq!(counted(&guest, name), expected, "{name}");
    }
    assert!(counted(&guest, "rx_bytes_count") >= asked * 42);
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
    assert_eq!((counted(&guest, "tx_packets_count"), counted(&guest, "tx_fails")), (asked, 1));
    drop(guest);
    wait_for(|| network::passts(mac).is_empty());
}

#[test]
fn frames_that_are_none_go_back_a_share_at_a_time_over_passt() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    network::enter();
    network::add_uplink();
    let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
    let mut guest = Guest::by_hand(TransportKind::Mmio, open(json!({ "user": {} })), memory);
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
fn a_frame_of_passt_waits_in_peace_until_there_is_room_for_all() {
    const TURNS: usize = 100;
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    network::enter();
    network::add_uplink();
    for features in [F_MRG_RXBUF, F_MRG_RXBUF | F_EVENT_IDX] {
        let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
        let mut guest = Guest::by_hand(TransportKind::Mmio, open(json!({ "user": {} })), memory);
        guest.start(features);
        let small = rooms(&mut guest, RX, 1, HEADER + 8)[0];
        let out = guest.allocate(&arp([10, 9, 8, 1]));
        guest.request(TX, &[(out, 0)]);
        guest.wait_for(|guest| counted(guest, "no_rx_avail_buffer") > 0);
        let turns = (0..TURNS).take_while(|_| guest.turn_once()).count();
        assert!(turns < TURNS, "it looks at the same buffer again and again");
        // The device is to be kicked for the next buffer.
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
    let mut guest = Guest::new(TransportKind::Mmio, open(json!({ "user": {} })));
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

/// A guest whose interface is over a passt of its own, turned by hand.
fn by_hand(kind: TransportKind) -> Guest {
    let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
    Guest::by_hand(kind, open(json!({ "user": {} })), memory)
}

/// The status that the driver reads.
fn status(guest: &mut Guest) -> u8 {
    let mut status = [0];
    guest.config(6, &mut status);
    status[0]
}

/// Whether there is an interrupt for a change of the configuration; none is left.
fn takes_change(guest: &mut Guest) -> bool {
    let is_told = guest.is_interrupted(None);
    guest.interrupts();
    if guest.kind() == TransportKind::Mmio {
        guest.write(0x64, 0, 4, 3);
    }
    is_told
}

/// Another machine, with a passt of its own, in which the guest goes on.
fn go_on(kind: TransportKind, suspended: &driver::Suspended) -> Guest {
    let mut guest = by_hand(kind);
    guest.take_over(suspended).unwrap();
    guest.resume();
    guest.turn();
    guest
}

const LINK_UP: u8 = 1;

#[test]
fn a_restored_guest_sees_its_link_go_down_and_come_back() {
    const ANNOUNCE: u8 = 2;
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    network::enter();
    network::add_uplink();
    for kind in TRANSPORTS {
        let mut guest = by_hand(kind);
        guest.start(F_EVENT_IDX | F_STATUS | F_CTRL_VQ | F_GUEST_ANNOUNCE);
        guest.turn();
        assert_eq!(status(&mut guest), LINK_UP);
        let out = guest.allocate(&arp([10, 9, 8, 1]));
        // Another generation before the driver has looked, and one when it has.
        for looks in [false, true] {
            takes_change(&mut guest);
            guest = go_on(kind, &guest.suspend());
            assert!(takes_change(&mut guest), "{kind:?}: the driver is not told");
            assert!(!looks || status(&mut guest) == 0, "{kind:?}");
        }
        guest = go_on(kind, &guest.suspend());
        // Pauses put off nothing, and frames go meanwhile.
        guest.pause();
        guest.resume();
        guest.request(TX, &[(out, 0)]);
        guest.turn();
        assert!(takes_change(&mut guest), "{kind:?}: the driver is not told");
        assert_eq!(status(&mut guest), 0, "{kind:?}");
        guest.pause();
        guest.resume();
        guest.wait_for(|guest| status(guest) != 0);
        assert!(takes_change(&mut guest), "{kind:?}: the driver is not told");
        assert_eq!(status(&mut guest), LINK_UP | ANNOUNCE);
        assert_eq!(command(&mut guest, 2, &[3, 0]), 0);
        assert_eq!(counted(&guest, "tx_packets_count"), 1);
        takes_change(&mut guest);
        guest.pause();
        guest.resume();
        guest.turn();
        assert_eq!((status(&mut guest), takes_change(&mut guest)), (LINK_UP, false), "{kind:?}: once more");
    }
}

#[test]
fn a_restored_guest_has_the_link_that_there_is() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    network::enter();
    network::add_uplink();
    for kind in TRANSPORTS {
        // A driver that knows nothing of links is not told of one.
        let mut guest = by_hand(kind);
        guest.start(F_EVENT_IDX);
        guest.turn();
        takes_change(&mut guest);
        guest = go_on(kind, &guest.suspend());
        assert!(!takes_change(&mut guest), "{kind:?}: of what is it told?");
        assert_eq!(status(&mut guest), LINK_UP, "{kind:?}");
        // One that begins anew finds its link, whatever the one before has seen.
        guest.start(F_EVENT_IDX | F_STATUS);
        guest.turn();
        let suspended = guest.suspend();
        guest = go_on(kind, &suspended);
        guest.start(F_EVENT_IDX | F_STATUS);
        guest.turn();
        assert_eq!(status(&mut guest), LINK_UP, "{kind:?}");
        // A passt that has ended meanwhile does not come back.
        guest = go_on(kind, &suspended);
        let passts = network::passts(std::process::id());
        passts.iter().for_each(|passt| network::kill(*passt));
        wait_for(|| passts.iter().all(|passt| common::ended::is_over(*passt)));
        guest.turn();
        takes_change(&mut guest);
        assert_eq!(status(&mut guest), 0, "{kind:?}");
        guest.wait_for(takes_change);
        assert_eq!(status(&mut guest), 0, "{kind:?}");
    }
}
