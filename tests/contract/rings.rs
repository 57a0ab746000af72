//! Rings that are broken, strange or full.

use super::*;

#[test]
fn a_broken_ring_stops_its_device_alone_until_a_reset() {
    let host = Host::new();
    let config = host.config();
    for kind in TRANSPORTS {
        let other = config.devices().find(|device| device.kind().section == "entropy").unwrap();
        for device in config.devices() {
            let mut guest = host.guest(kind, device);
            for queue in (0..guest.queues()).filter(|queue| !ports::is_unseen(device, *queue)) {
                guest.start(0);
                // An index that runs away, in one step: a device that is quick would keep up.
                guest.run_away(queue, 20);
                guest.kick(queue);
                if is_net(device) && queue == RX {
                    host.wire.send(&[0xff; 60]);
                }
                wait_for(|| guest.status() & NEEDS_RESET != 0);
                assert!(guest.is_interrupted(None), "the driver is not told");
                let mut beside = host.guest(kind, other);
                beside.start(0);
                host.exercise(other, &mut beside, 1);
            }
            guest.start(0);
            host.exercise(device, &mut guest, 2);
        }
    }
}

#[test]
fn a_queue_that_the_driver_did_not_set_up_is_left_alone() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        for left_out in 0..guest.queues() {
            assert!(guest.negotiate(F_VERSION_1));
            // The others are not where a ring would be that nobody gave a place.
            for queue in (0..guest.queues()).filter(|queue| *queue != left_out) {
                guest.set_queue(queue, 16, Guest::parts(queue + 8));
            }
            guest.fill(0, 0x1_0000, 0x55);
            guest.set_status(11 | DRIVER_OK);
            kick_all(&mut guest);
            if is_net(device) {
                host.wire.send(&[0xff; 60]);
            }
            // A device that never comes to an end with it is not stopped.
            guest.pause();
            assert!(guest.bytes((0, 0x1_0000)).iter().all(|byte| *byte == 0x55));
            guest.resume();
        }
        guest.start(0);
        if is_net(device) {
            host.wire.discard();
        }
        host.exercise(device, &mut guest, 1);
    });
}

#[test]
fn queues_that_cannot_be_are_refused_at_the_start() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        let [table, available, used] = Guest::parts(0);
        for (size, parts) in [
            (0, [table, available, used]),
            (7, [table, available, used]),
            (0x8000, [table, available, used]),
            (8, [table + 1, available, used]),
            (8, [table, available + 1, used]),
            (8, [table, available, used + 2]),
            (8, [common::driver::MEMORY - 16, available, used]),
            (8, [table, !1, used]),
            (8, [table, available, u64::MAX << 3]),
        ] {
            assert!(guest.negotiate(F_VERSION_1));
            guest.set_queue(0, size, parts);
            guest.set_status(11 | DRIVER_OK);
            wait_for(|| guest.status() & NEEDS_RESET != 0);
        }
        guest.start(0);
        host.exercise(device, &mut guest, 1);
    });
}

#[test]
fn registers_are_for_their_time_only() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        guest.start(0);
        // Neither rings nor features change under a running device.
        let running = guest.read(0x80, 0x20, 4);
        guest.write(0x80, 0x20, 4, 0xdead_0000);
        assert_eq!(guest.read(0x80, 0x20, 4), running);
        guest.write(0x24, 0x08, 4, 0);
        let features = guest.read(0x20, 0x0c, 4);
        guest.write(0x20, 0x0c, 4, !0);
        assert_eq!(guest.read(0x20, 0x0c, 4), features);
        assert_ne!(guest.status() & FEATURES_OK, 0);
        // A queue that there is not.
        guest.write(0x30, 0x16, 2, 500);
        assert_eq!(guest.read(0x34, 0x18, 2), 0);
        guest.write(0x38, 0x18, 2, 8);
        guest.write(0x44, 0x1c, 2, 1);
        assert_eq!(guest.read(0x44, 0x1c, 2), 0);
        // Configuration is readable at any width and place, and nothing but zeros is beyond it.
        for width in [1, 2, 4, 8] {
            for offset in (0..0x400).step_by(width) {
                let mut bytes = [0xaa; 8];
                guest.config(offset as u64, &mut bytes[..width]);
                assert!(offset < 64 || bytes[..width].iter().all(|byte| *byte == 0), "{offset:#x}");
                guest.set_config(offset as u64, &bytes[..width]);
            }
        }
        host.exercise(device, &mut guest, 1);
    });
}

#[test]
fn a_chain_that_goes_nowhere_ends_in_a_reset_or_an_answer() {
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        // (address, length, flags, next) of the first two descriptors.
        for chain in [
            [(0x1000, 16, NEXT, 0), (0, 0, 0, 0)],
            [(0x1000, 16, NEXT, 500), (0, 0, 0, 0)],
            [(1 << 46, 16, NEXT, 1), (1 << 46, 1, WRITE, 0)],
            [(u64::MAX - 3, 64, NEXT, 1), (u64::MAX - 3, 64, WRITE, 0)],
            [(0x1000, u32::MAX, NEXT, 1), (0x1000, u32::MAX, WRITE, 0)],
            [(0x1000, 0, NEXT, 1), (0x1000, 0, WRITE, 0)],
            [(0x1000, 7, 4, 0), (0, 0, 0, 0)],
            [(1 << 46, 64, 4, 0), (0, 0, 0, 0)],
        ] {
            for queue in 0..guest.queues() {
                guest.start(0);
                for (index, (address, length, flags, next)) in chain.into_iter().enumerate() {
                    guest.set_descriptor(queue, index as u16, address, length, flags, next);
                }
                guest.make_available(queue, 0);
                guest.kick(queue);
                if is_net(device) && queue == RX {
                    // Looked at when a frame comes.
                    host.wire.send(&[0xff; 60]);
                }
                if !keeps(device, queue) && !ports::is_unseen(device, queue) {
                    wait_for(|| guest.used_index(queue) == 1 || guest.status() & NEEDS_RESET != 0);
                }
            }
        }
        if is_net(device) {
            host.wire.discard();
        }
        guest.start(0);
        host.exercise(device, &mut guest, 1);
    });
}

#[test]
fn a_chain_longer_than_its_queue_is_the_drivers_fault() {
    const ENTRIES: usize = 65_535;
    Host::new().each(|host, kind, device| {
        let mut guest = host.guest(kind, device);
        let room = guest.allocate(&[0; 16]);
        let table = guest.allocate_table(&vec![(room, WRITE); ENTRIES]);
        // Whether descriptor `index` is the last one of the table's.
        let end = |guest: &Guest, index: usize, is_last: bool| {
            let flags = if is_last { WRITE } else { WRITE | NEXT };
            let place = GuestAddress(table.0 + 16 * index as u64 + 12);
            guest.memory.memory().write_obj(flags, place).unwrap();
        };
        for queue in 0..guest.queues() {
            guest.reset();
            guest.write(0x30, 0x16, 2, queue as u32);
            let max = guest.read(0x34, 0x18, 2) as usize;
            // The ring itself has 16; a table may have room for more than is used of it.
            for (count, is_fault) in [(1, false), (max, false), (max + 1, true), (ENTRIES, true)] {
                guest.start(0);
                end(&guest, count - 1, true);
                guest.set_descriptor(queue, 0, table.0, table.1, INDIRECT, 0);
                guest.make_available(queue, 0);
                guest.kick(queue);
                if is_net(device) && queue == RX {
                    host.wire.send(&[0xff; 60]);
                }
                // One buffer of 16 bytes takes no frame: the frame is lost, or waits for another buffer.
                let is_small = is_net(device) && queue == RX && count == 1;
                // A socket device takes a buffer when it is given, and has nothing for it.
                let is_kept = is_small
                    || ports::is_unseen(device, queue)
                    || !is_net(device) && waits(device, queue) && !is_fault;
                let mut seen = (false, false);
                wait_for(|| {
                    seen = (guest.used_index(queue) == 1, guest.status() & NEEDS_RESET != 0);
                    is_kept || seen != (false, false)
                });
                assert!(is_kept || seen == (!is_fault, is_fault), "{count} in queue {queue}: {seen:?}");
                end(&guest, count - 1, false);
            }
        }
        guest.start(0);
        if is_net(device) {
            host.wire.discard();
        }
        host.exercise(device, &mut guest, 1);
    });
}

#[test]
fn a_turn_handles_no_more_descriptors_than_its_share() {
    let host = Host::new();
    let config = host.config();
    for device in config.devices() {
        let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
        let opened = device.open("contract", &mut host::Host::default()).unwrap();
        let sizes = opened.queue_sizes().to_vec();
        let mut guest = Guest::by_hand(TransportKind::Mmio, opened, memory);
        let room = guest.allocate(&[0; 16]);
        for (queue, max) in sizes.into_iter().enumerate() {
            if waits(device, queue) {
                continue;
            }
            guest.start(F_EVENT_IDX);
            guest.turn();
            let table = guest.allocate_table(&vec![(room, WRITE); max.into()]);
            (0..16).for_each(|_| _ = guest.offer(queue, &[(table, INDIRECT)]));
            guest.kick(queue);
            let (mut done, mut turns) = (0, 0);
            while guest.turn_once() {
                let now = guest.used_index(queue);
                let descriptors = (now - done) * max;
                assert!(descriptors <= DESCRIPTORS_PER_TURN, "{}: {descriptors}", device.name());
                turns += u16::from(now > done);
                done = now;
            }
            assert_eq!(done, 16, "{}: all are done in the end", device.name());
            assert!(turns >= (16 * max).div_ceil(DESCRIPTORS_PER_TURN), "{}: {turns}", device.name());
        }
    }
}

#[test]
fn a_turn_of_a_disk_ends_with_the_request_that_is_large() {
    let host = Host::new();
    let large = 64 << 20;
    std::fs::File::create(host.folder.path("large")).unwrap().set_len(large).unwrap();
    for engine in ["Sync", "Async"] {
        let device = json!({
            "drive_id": "disk", "path_on_host": host.folder.path("large"), "is_root_device": false,
            "io_engine": engine,
        });
        let kind = KINDS.iter().find(|kind| kind.section == "drives").unwrap();
        let device = kind.parse(device.to_string().as_bytes()).unwrap();
        let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
        let opened = device.open("contract", &mut host::Host::default()).unwrap();
        let mut guest = Guest::by_hand(TransportKind::Mmio, opened, memory);
        guest.start(0);
        guest.turn();
        let (header, status) = (guest.allocate(&[0; 16]), guest.allocate(&[0xff]));
        // One piece of memory again and again.
        let room = guest.allocate(&vec![0; 1 << 20]);
        let rooms = vec![(room, WRITE); large as usize >> 20];
        let table = guest.allocate_table(&[&[(header, 0)][..], &rooms, &[(status, WRITE)]].concat());
        (0..3).for_each(|_| _ = guest.offer(0, &[(table, INDIRECT)]));
        guest.kick(0);
        let mut done = 0;
        guest.wait_for_each_turn(|guest| {
            let now = guest.used_index(0);
            assert!(now - done <= 1, "{engine}: {} at once", now - done);
            done = now;
            done == 3
        });
        assert_eq!(guest.bytes(status), [0]);
    }
}
