//! Guests that lie, clients that ask for nothing, and connections without end.

use super::*;

#[test]
fn a_guest_that_lies_loses_its_connection_and_nothing_else() {
    let mut world = World::by_hand();
    let (mut beside, port) = world.connected(99);
    let rw = Packet::new(RW, 7, 0);
    let full = bytes(0..64 << 10);
    for lie in 0..9 {
        let (mut client, host_port) = world.connected(7);
        let packet = Packet { to_port: host_port, ..rw };
        match lie {
            // More than it was allowed.
            0 => (0..16).for_each(|_| world.driver.send(packet, &full)),
            // A length that the packet does not have.
            1 => world.driver.send(Packet { length: 100, ..packet }, b"short"),
            2 => world.driver.send(Packet { length: u32::MAX, ..packet }, b"short"),
            // Operations and kinds that there are not.
            3 => world.driver.send(Packet { op: 0, ..packet }, b""),
            4 => world.driver.send(Packet { op: 8, ..packet }, b""),
            5 => world.driver.send(Packet { kind: 2, ..packet }, b"x"),
            6 => world.driver.send(Packet { kind: 77, ..packet }, b"x"),
            // What comes at the wrong time.
            7 => world.driver.send(Packet { op: RESPONSE, ..packet }, b""),
            _ => world.driver.send(Packet { op: REQUEST, ..packet }, b""),
        }
        loop {
            let (packet, _) = world.driver.receive();
            if packet.op != CREDIT_UPDATE {
                assert_eq!((packet.op, packet.from_port), (RST, host_port), "lie {lie}");
                break;
            }
        }
        // What came after the end was for nobody.
        while world.driver.has_received() {
            assert_eq!(world.driver.receive().0.op, RST);
        }
        let mut rest = Vec::new();
        let _ = client.read_to_end(&mut rest);
        assert!(rest.len() < 16 * full.len() && is_closed(&mut client));
    }
    // For nobody here, and from somebody else: not even refused.
    let stray = Packet::new(RW, 99, port);
    for packet in [
        Packet { to: 3, ..stray },
        Packet { to: 1 << 32 | 2, ..stray },
        Packet { to: u64::MAX, ..stray },
        Packet { from: 4, ..stray },
        Packet { from: 2, to: 3, ..stray },
        // A refusal of what is no connection.
        Packet { op: RST, from_port: 1, ..stray },
    ] {
        world.driver.send(packet, b"stray");
    }
    // What is no packet at all.
    let short = world.driver.guest.allocate(&[0; 43]);
    for chain in [(short, 0), (short, common::driver::WRITE)] {
        world.driver.guest.request(common::vsock::TX, &[chain]);
    }
    // A room that is a lie: nothing more comes, or all that it has buffers for.
    let (mut client, host_port) = world.connected(8);
    let update = Packet { forwarded: 5_000, ..Packet::new(CREDIT_UPDATE, 8, host_port) };
    world.driver.send(update, &[]);
    client.write_all(b"x").unwrap();
    assert_eq!(world.driver.expect(CREDIT_REQUEST).from_port, host_port);
    world.driver.send(Packet { room: u32::MAX, forwarded: 0, ..update }, &[]);
    assert_eq!(world.driver.receive().1, b"x");
    world.driver.send(stray, b"beside");
    assert_eq!(read(&mut beside, 6), b"beside");
    beside.write_all(b"answer").unwrap();
    assert_eq!(world.driver.receive().1, b"answer");
}

#[test]
fn a_line_that_asks_for_no_port_ends_the_connection() {
    let mut world = World::new(TransportKind::Mmio);
    let digits = "1".repeat(5000);
    for text in [
        "CONNECT \n".to_owned(),
        "CONNECT\n".to_owned(),
        "CONNECT x\n".to_owned(),
        "CONNECT -1\n".to_owned(),
        "CONNECT 4294967296\n".to_owned(),
        format!("CONNECT {digits}\n"),
        "GET / HTTP/1.1\r\n".to_owned(),
        "\n".to_owned(),
        "x".repeat(32),
    ] {
        let mut client = world.client(&text);
        assert!(is_closed(&mut client), "{text}");
    }
    // Half a line waits for the other half, and goes when its client does.
    let [mut late, left] = ["CONN", "CONNECT 5"].map(|text| world.client(text));
    wait_for(|| world.connections() == 2);
    drop(left);
    wait_for(|| world.connections() == 1);
    late.write_all(b"ECT 6").unwrap();
    late.write_all(b"7\n").unwrap();
    let request = world.driver.expect(REQUEST);
    assert_eq!(request.to_port, 67);
    // Nobody listens there.
    world.driver.send(request.answer(RST), &[]);
    assert!(is_closed(&mut late));
    // A client that does not wait for the guest.
    let gone = world.client("CONNECT 8\n");
    let request = world.driver.expect(REQUEST);
    drop(gone);
    assert_eq!(world.driver.expect(RST).from_port, request.from_port);
    wait_for(|| world.connections() == 0);
}

#[test]
fn clients_that_say_nothing_keep_nobody_out() {
    const WAITING_MAX: usize = 1024;
    let mut world = World::new(TransportKind::Mmio);
    let mut silent: Vec<_> = (0..WAITING_MAX + 10).map(|_| world.client("")).collect();
    wait_for(|| world.connections() == WAITING_MAX as u64 && world.counted("conns_refused") == 10);
    // The oldest are those that went.
    assert!(silent.drain(..10).all(|mut client| is_closed(&mut client)));
    let (mut client, port) = world.connected(5);
    world.driver.send(Packet::new(RW, 5, port), b"in");
    assert_eq!(read(&mut client, 2), b"in");
    drop(silent);
    wait_for(|| world.connections() == 1);
}

/// The next packet that asks the guest for a connection.
fn next_request(driver: &mut Driver) -> Packet {
    loop {
        let (packet, _) = driver.receive();
        if packet.op == REQUEST {
            return packet;
        }
    }
}

#[test]
fn connections_that_are_opened_and_left_cost_nothing() {
    const ROUNDS: u32 = 100_000;
    /// As many as there can be (`CONNECTIONS_MAX`), and some.
    const ANSWERED: u32 = 16_500;
    let mut world = World::by_hand();
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open();
    // The guest answers some of the clients, and hears of none of their ends.
    for round in 0..ROUNDS {
        let client = world.client("CONNECT 9\n");
        let request = next_request(&mut world.driver);
        if round < ANSWERED {
            world.driver.send(request.answer(RESPONSE), &[]);
            drop(answered(client, request.from_port));
        }
    }
    let (driver, mut left) = (&mut world.driver, 0);
    driver.guest.wait_for(|_| {
        left = open();
        left <= before
    });
    assert!(world.connections() >= 16_383, "{}", world.connections());
    // One more has its place: the oldest of those that were left goes.
    while world.driver.has_received() {
        world.driver.receive();
    }
    let client = world.client("CONNECT 10\n");
    let request = next_request(&mut world.driver);
    world.driver.send(request.answer(RESPONSE), &[]);
    let mut client = answered(client, request.from_port);
    world.driver.send(request.answer(RW), b"alive");
    assert_eq!(read(&mut client, 5), b"alive");
    assert_eq!(world.connections(), 16_384);
}

#[test]
fn a_listener_without_room_delays_its_connection_alone() {
    let mut world = World::new(TransportKind::Pci);
    let listener = UnixListener::bind(world.path(80)).unwrap();
    // As many as the kernel keeps for who does not take them; the next ones would wait.
    let mut waiting = Vec::new();
    while let Ok(stream) = alula::host::socket::connect(&world.path(80)) {
        waiting.push(stream);
    }
    world.driver.send(Packet::new(REQUEST, 1000, 80), &[]);
    // Meanwhile others connect.
    let _other = world.accepted(81);
    let (_client, _) = world.connected(5);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(!world.driver.has_received());
    drop(listener.accept().unwrap());
    assert_eq!(world.driver.expect(RESPONSE).from_port, 80);
    // The guest's own time is over: it refuses, and nothing is left.
    world.driver.send(Packet::new(RST, 1000, 80), &[]);
    wait_for(|| world.connections() == 2);
}

/// A program of the guest that sends as much as it may, to one of the host that does not read.
struct Sender {
    client: UnixStream,
    port: u32,
    sent: usize,
}

impl Sender {
    /// How many bytes it may have sent by now; none: its connection is gone.
    fn ask(&self, world: &mut World) -> Option<(Packet, usize)> {
        // What was told before is out of date.
        while world.driver.has_received() {
            world.driver.receive();
        }
        world.driver.send(Packet::new(CREDIT_REQUEST, 7, self.port), &[]);
        loop {
            match world.driver.receive().0 {
                told if told.from_port != self.port => {}
                told if told.op == RST => return None,
                told => return Some((told, told.forwarded.wrapping_add(told.room) as usize)),
            }
        }
    }

    /// Sends all that it may. How many bytes of it are kept; none: its connection is gone.
    fn fill(&mut self, world: &mut World, all: &[u8]) -> Option<usize> {
        loop {
            let (told, limit) = self.ask(world)?;
            if limit == self.sent {
                return Some(self.sent - told.forwarded as usize);
            }
            let end = limit.min(self.sent + 60_000);
            world.driver.send(Packet::new(RW, 7, self.port), &all[self.sent..end]);
            self.sent = end;
        }
    }

    /// Reads everything that was sent.
    fn read(&mut self, world: &mut World) -> Vec<u8> {
        self.client.set_nonblocking(true).unwrap();
        let (mut read, mut buffer) = (Vec::new(), vec![0; 256 << 10]);
        while read.len() < self.sent {
            match self.client.read(&mut buffer) {
                Ok(count) => read.extend_from_slice(&buffer[..count]),
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "port {}", self.port),
            }
            world.driver.guest.turn();
        }
        read
    }
}

#[test]
fn what_nobody_reads_is_kept_up_to_the_limit_and_not_lost() {
    const ALL: usize = 64 << 20;
    let mut world = World::by_hand();
    let mut senders: Vec<_> = (0..600)
        .map(|_| {
            let (client, port) = world.connected(7);
            Sender { client, port, sent: 0 }
        })
        .collect();
    let (all, mut kept) = (bytes(0..1 << 20), Vec::new());
    for sender in &mut senders {
        kept.push(sender.fill(&mut world, &all).unwrap_or_else(|| panic!("port {} is lost", sender.port)));
    }
    // The first ones have a whole window, the last ones hardly any.
    assert!(kept[0] == 256 << 10 && kept[599] < 16 << 10, "{kept:?}");
    let sum = kept.iter().sum::<usize>();
    assert!((ALL * 3 / 4..ALL).contains(&sum), "{sum} bytes are kept");
    // One that comes now goes on all the same.
    while world.driver.has_received() {
        world.driver.receive();
    }
    let (mut late, port) = world.connected(8);
    world.driver.send(Packet::new(RW, 8, port), b"late");
    assert_eq!(read(&mut late, 4), b"late");
    // Everything that was taken arrives as it was sent, in its order.
    for sender in &mut senders {
        assert!(sender.read(&mut world) == all[..sender.sent], "port {}", sender.port);
    }
    assert_eq!(world.counted("conns_killed"), 0);
}

/// Takes all descriptors that this process may still open, until they are dropped.
struct Fill {
    all: Vec<std::fs::File>,
    limit: u64,
}

impl Fill {
    fn new() -> Self {
        let highest = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64 + 8;
        let mut fill = Self { all: Vec::new(), limit: common::limit_descriptors(0, highest) };
        fill.top_up();
        fill
    }

    fn top_up(&mut self) {
        while let Ok(file) = std::fs::File::open("/dev/null") {
            self.all.push(file);
        }
    }
}

impl Drop for Fill {
    fn drop(&mut self) {
        common::limit_descriptors(0, self.limit);
    }
}

#[test]
fn without_descriptors_connections_are_refused_and_others_stay() {
    let mut world = World::by_hand();
    let (mut beside, port) = world.connected(5);
    let listener = UnixListener::bind(world.path(80)).unwrap();
    let mut fill = Fill::new();
    for round in 1..=3 {
        // There is one for the client's end, and none for ours.
        fill.all.pop();
        let mut client = world.client("CONNECT 6\n");
        fill.top_up();
        world.driver.guest.turn();
        assert!(is_closed(&mut client) && !world.driver.has_received());
        drop(client);
        fill.top_up();
        world.driver.send(Packet::new(REQUEST, 1000, 80), &[]);
        assert_eq!(world.driver.expect(RST).from_port, 80);
        assert_eq!(world.counted("conns_refused"), round);
        world.driver.send(Packet::new(RW, 5, port), b"there");
        assert_eq!(read(&mut beside, 5), b"there");
        beside.write_all(b"here").unwrap();
        assert_eq!(world.driver.receive().1, b"here");
    }
    drop(fill);
    assert_eq!(world.connections(), 1);
    let (mut client, port) = world.connected(6);
    world.driver.send(Packet::new(RW, 6, port), b"again");
    assert_eq!(read(&mut client, 5), b"again");
    world.driver.send(Packet::new(REQUEST, 1000, 80), &[]);
    world.driver.expect(RESPONSE);
    listener.accept().unwrap();
}
