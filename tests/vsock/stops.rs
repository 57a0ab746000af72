//! Connections of a guest that is saved and restored, paused, or reset.

use super::*;

#[test]
fn a_restored_guest_hears_that_its_connections_are_gone_first() {
    let mut world = World::new(TransportKind::Mmio);
    let listener = UnixListener::bind(world.path(80)).unwrap();
    let mut next_port = 1 << 30;
    for round in 0..100 {
        let (mut client, port) = world.connected(5);
        assert_eq!(port, next_port, "round {round}");
        next_port = port + 1;
        world.driver.send(Packet::new(REQUEST, 1000, 80), &[]);
        world.driver.expect(RESPONSE);
        let mut host = patient(listener.accept().unwrap().0);
        let World { folder, driver, _alone } = world;
        let (driver, suspended) = driver.suspend();
        assert!(is_closed(&mut client) && is_closed(&mut host));
        let mut guest =
            Guest::new(TransportKind::Mmio, device(&folder).open("vsock", &mut Host::default()).unwrap());
        guest.take_over(&suspended).unwrap();
        guest.resume();
        world = World { folder, driver: driver.moved(guest), _alone };
        // A client that is quick, and a guest that still talks to what is gone.
        let mut quick = world.client("CONNECT 6\nhello");
        world.driver.send(Packet::new(RW, 5, port), b"?");
        let mut event = None;
        wait_for(|| {
            event = event.or(world.driver.take_event());
            event.is_some()
        });
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert!(!world.driver.has_received(), "round {round}: it was sent something before it has heard");
        if round % 3 == 0 {
            world.driver.guest.pause();
            world.driver.guest.resume();
        }
        world.driver.give_event_back(event.unwrap());
        let (mut refused, mut request) = (false, None);
        while !refused || request.is_none() {
            match world.driver.receive().0 {
                packet if packet.op == RST => refused = (packet.from_port, packet.to_port) == (port, 5),
                packet => request = Some(packet),
            }
        }
        let request = request.unwrap();
        assert_eq!((request.op, request.from_port, request.to_port), (REQUEST, next_port, 6));
        next_port += 1;
        world.driver.send(request.answer(RESPONSE), &[]);
        quick = answered(quick, request.from_port);
        assert_eq!(world.driver.receive().1, b"hello");
        drop(quick);
        assert!(world.driver.take_event().is_none());
        world.driver.expect(SHUTDOWN);
        world.driver.send(request.answer(RST), &[]);
    }
}

#[test]
fn a_pause_holds_connections_still() {
    for kind in TRANSPORTS {
        let mut world = World::new(kind);
        let (mut client, port) = world.connected(5);
        let mut host = world.accepted(80);
        for round in 0..20_u8 {
            world.driver.guest.pause();
            client.write_all(&[round; 10_000]).unwrap();
            host.write_all(&[round]).unwrap();
            let waiting = world.client("CONNECT 7\n");
            world.driver.guest.resume();
            let (mut of_client, mut of_host, mut request) = (0, 0, None);
            while of_client < 10_000 || of_host < 1 || request.is_none() {
                let (packet, bytes) = world.driver.receive();
                assert!(bytes.iter().all(|byte| *byte == round));
                match (packet.op, packet.from_port == port) {
                    (RW, true) => of_client += bytes.len(),
                    (RW, false) => of_host += bytes.len(),
                    (REQUEST, _) => request = Some(packet),
                    (CREDIT_REQUEST, _) => {}
                    (op, _) => panic!("operation {op}"),
                }
            }
            let told = Packet { forwarded: 10_000 * (u32::from(round) + 1), ..Packet::new(RW, 5, port) };
            world.driver.send(told, &[round; 100]);
            assert_eq!(read(&mut client, 100), [round; 100]);
            world.driver.send(request.unwrap().answer(RST), &[]);
            assert!(is_closed(&mut { waiting }));
        }
        // A reset ends them all.
        world.driver.start(0);
        assert!(is_closed(&mut client) && is_closed(&mut host));
        let (_client, port) = world.connected(5);
        assert_eq!(port, 1 << 30);
    }
}

#[test]
fn no_end_leaves_the_socket_and_a_kill_leaves_it_to_the_next() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = Folder::new();
    let path = folder.path("v");
    let vsock = ["--vsock", path.to_str().unwrap()];
    let guest = |words: &str| Process::start([&["run", "--cmdline", words][..], &vsock].concat());
    for how in ["poweroff", "reset", "halt", "crash", "fail", "5"] {
        let ended = guest(&format!("case=serial end={how}")).end();
        assert!(ended.code.is_some() && ended.text.contains("1 cases, 0 failed"), "{how}: {}", ended.text);
        assert!(!path.exists(), "{how}");
    }
    let mut killed = guest("case=serial end=idle");
    killed.expect("0 failed");
    killed.send(libc::SIGKILL);
    assert_eq!(killed.end().code, None);
    assert!(path.exists());
    let mut next = guest("case=serial end=idle");
    next.expect("0 failed");
    let client = UnixStream::connect(&path).unwrap();
    // A live one is nobody's.
    let other = guest("case=serial end=idle").end();
    assert!(other.text.contains("another process serves it: choose another path"), "{}", other.text);
    drop(client);
    UnixStream::connect(&path).unwrap();
    next.send(libc::SIGTERM);
    assert_eq!(next.end().code, Some(128 + libc::SIGTERM));
    assert!(!path.exists());
}
