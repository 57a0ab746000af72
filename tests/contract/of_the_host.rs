//! What the host cannot do, and what it limits.

use super::*;

/// A disk that the guest can use, of this image.
fn disk(host: &Host, image: &str) -> ConfiguredDevice {
    let disk = json!({
        "drive_id": "disk", "path_on_host": host.folder.path(image), "is_root_device": false,
    });
    let kind = KINDS.iter().find(|kind| kind.section == "drives").unwrap();
    kind.parse(disk.to_string().as_bytes()).unwrap()
}

/// Does a block request (virtio 1.2, 5.2.6), and returns its status.
fn transfer(guest: &mut Guest, kind: u8, sector: u64, data: &[u8]) -> u8 {
    let mut header = [0; 16];
    header[0] = kind;
    header[8..].copy_from_slice(&sector.to_le_bytes());
    let header = guest.allocate(&header);
    let data = guest.allocate(data);
    let status = guest.allocate(&[0xff]);
    guest.request(0, &[(header, 0), (data, if kind == 0 { WRITE } else { 0 }), (status, WRITE)]);
    guest.bytes(status)[0]
}

#[test]
fn what_the_host_cannot_do_is_an_error_of_that_request_alone() {
    const IO_ERROR: u8 = 1;
    let host = Host::new();
    let image = host.folder.path("small");
    std::fs::write(&image, [7; 8 * SECTOR]).unwrap();
    for kind in TRANSPORTS {
        let mut guest = host.guest(kind, &disk(&host, "small"));
        guest.start(0);
        assert_eq!(transfer(&mut guest, 0, 6, &[0; SECTOR]), 0);
        // Somebody makes the file shorter: reads beyond its end are short.
        std::fs::File::options().write(true).open(&image).unwrap().set_len(4 * SECTOR as u64).unwrap();
        assert_eq!(transfer(&mut guest, 0, 6, &[0; SECTOR]), IO_ERROR);
        assert_eq!(transfer(&mut guest, 0, 3, &[0; 2 * SECTOR]), IO_ERROR);
        assert_eq!(transfer(&mut guest, 0, 3, &[0; SECTOR]), 0);
        std::fs::File::options().write(true).open(&image).unwrap().set_len(8 * SECTOR as u64).unwrap();
        assert_eq!(transfer(&mut guest, 0, 6, &[0; SECTOR]), 0);
        assert_eq!(guest.status() & NEEDS_RESET, 0);
    }
}

#[test]
fn a_full_host_is_an_error_of_the_write_that_found_it_full() {
    const IO_ERROR: u8 = 1;
    let host = Host::new();
    // 64 KiB of room for a disk of 1 MiB.
    let room = host.folder.path("room");
    std::fs::create_dir(&room).unwrap();
    common::mount_tmpfs(&room, 64 << 10);
    let image = room.join("sparse");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    for kind in TRANSPORTS {
        let mut guest = host.guest(kind, &disk(&host, "room/sparse"));
        guest.start(0);
        let block = [9; 8 * SECTOR];
        let results: Vec<_> = (0..32).map(|index| transfer(&mut guest, 1, 64 * index, &block)).collect();
        assert!(results.contains(&IO_ERROR) && results.iter().all(|code| *code <= IO_ERROR), "{results:?}");
        assert_eq!(results[0], 0);
        // What was written is there, and the disk goes on.
        assert_eq!(transfer(&mut guest, 0, 0, &[0; SECTOR]), 0);
        assert_eq!(guest.status() & NEEDS_RESET, 0);
    }
}

#[test]
fn a_generator_whose_host_has_no_random_bytes_stops_and_says_so() {
    let test = || {
        let kind = KINDS.iter().find(|kind| kind.section == "entropy").unwrap();
        let device = kind.parse(b"{}").unwrap().open("contract", &mut host::Host::default()).unwrap();
        let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
        let mut guest = Guest::by_hand(TransportKind::Mmio, device, memory);
        guest.start(0);
        let room = guest.allocate(&[0; 16]);
        assert_eq!(guest.request(0, &[(room, WRITE)]), 16);
        common::forbid(libc::SYS_getrandom, libc::EPERM);
        guest.offer(0, &[(room, WRITE)]);
        guest.kick(0);
        guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
        let metrics = guest.transport.lock().unwrap().metrics(View::Total);
        assert_eq!((&metrics["entropy_bytes"], &metrics["host_rng_fails"]), (&json!(16), &json!(1)));
        assert_eq!(metrics["event_fails"], 1);
    };
    std::thread::spawn(test).join().unwrap();
}

#[test]
fn a_generator_gives_no_more_than_its_rate_limit_lets_through() {
    const NEVER: u64 = 1 << 40;
    let kind = KINDS.iter().find(|kind| kind.section == "entropy").unwrap();
    for (limits, done) in [
        (json!({ "bandwidth": { "size": 64, "refill_time": NEVER } }), 2),
        (json!({ "ops": { "size": 3, "refill_time": NEVER } }), 3),
        (json!({ "ops": { "size": 1, "refill_time": NEVER, "one_time_burst": 1 } }), 2),
        (json!({ "bandwidth": { "size": 64, "refill_time": 1 }, "ops": { "size": 1, "refill_time": 1 } }), 8),
        (json!({ "bandwidth": { "size": 0, "refill_time": 0 } }), 8),
        (json!(null), 8),
    ] {
        let body = json!({ "rate_limiter": limits }).to_string();
        let device =
            kind.parse(body.as_bytes()).unwrap().open("contract", &mut host::Host::default()).unwrap();
        let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
        let mut guest = Guest::by_hand(TransportKind::Mmio, device, memory);
        guest.start(0);
        for _ in 0..8 {
            let room = guest.allocate(&[0; 32]);
            guest.offer(0, &[(room, WRITE)]);
        }
        guest.kick(0);
        guest.wait_for(|guest| guest.used_index(0) >= done);
        // What is not let through stays where it is, however often the driver asks.
        for _ in 0..3 {
            guest.kick(0);
            guest.turn();
        }
        assert_eq!(guest.used_index(0), done, "{body}");
        let metrics = guest.transport.lock().unwrap().metrics(View::Total);
        assert_eq!(metrics["entropy_bytes"], json!(32 * u64::from(done)), "{body}");
        let throttled = metrics["entropy_rate_limiter_throttled"].as_u64().unwrap() > 0;
        assert!(throttled || done == 8, "{body}: {metrics:?}");
        // A restore fills no bucket.
        let suspended = guest.suspend();
        let device =
            kind.parse(body.as_bytes()).unwrap().open("contract", &mut alula::host::Host::default()).unwrap();
        let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
        let mut guest = Guest::by_hand(TransportKind::Mmio, device, memory);
        guest.take_over(&suspended).unwrap();
        guest.resume();
        guest.kick(0);
        guest.turn();
        assert_eq!(guest.used_index(0), done, "{body}");
    }
}
