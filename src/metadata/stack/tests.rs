use serde_json::json;
use smoltcp::iface::SocketHandle;

use super::*;
use crate::metadata::store::Store;
use crate::metadata::{Config as MetadataConfig, Version};

const GUEST: [u8; 6] = [6, 0, 0, 0, 0, 2];
const GUEST_IP: [u8; 4] = [172, 16, 0, 2];

/// The guest's TCP/IP, on the other end of the cable.
struct Guest {
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    now: Duration,
    next_port: u16,
}

fn stack(version: Version) -> Stack {
    let store = Store::new(100_000);
    let data = json!({ "name": "value", "long": "x".repeat(60_000) });
    store.put(data.as_object().unwrap().clone()).unwrap();
    let config = MetadataConfig { version, ..MetadataConfig::on(vec!["eth0".to_owned()]) };
    Stack::new(Arc::new(Service { config, store: Arc::new(store) }), [7; 32])
}

impl Guest {
    fn new() -> Self {
        let mut wire = Wire {
            packet: Vec::new(),
            frames: VecDeque::new(),
            own: GUEST,
            guest: [6, 0, 169, 254, 169, 254],
        };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = 1;
        let mut interface = Interface::new(config, &mut wire, Instant::ZERO);
        let [a, b, c, d] = GUEST_IP;
        interface.update_ip_addrs(|it| it.push(IpCidr::new(Ipv4Addr::new(a, b, c, d).into(), 24)).unwrap());
        interface.routes_mut().add_default_ipv4_route(Ipv4Addr::new(172, 16, 0, 1)).unwrap();
        let sockets = SocketSet::new(Vec::new());
        Self { wire, interface, sockets, now: Duration::from_secs(1), next_port: 40_000 }
    }

    fn connect(&mut self) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 64 << 10]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        self.next_port += 1;
        socket
            .connect(self.interface.context(), (Ipv4Addr::new(169, 254, 169, 254), PORT), self.next_port)
            .unwrap();
        self.sockets.add(socket)
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Carries frames both ways until none come, a millisecond each time.
    fn exchange(&mut self, stack: &mut Stack) {
        for _ in 0..10_000 {
            self.now += Duration::from_millis(1);
            self.interface.poll(instant(self.now), &mut self.wire, &mut self.sockets);
            let sent: Vec<_> = self.wire.frames.drain(..).collect();
            sent.iter().for_each(|frame| stack.take(frame, self.now));
            stack.poll(self.now);
            let mut answered = 0;
            while let Some(frame) = stack.frame() {
                assert_eq!((&frame[..6], frame.len() <= ETHERNET + MTU), (&GUEST[..], true));
                let frame = frame[ETHERNET..].to_vec();
                stack.frame_is_delivered();
                self.wire.packet = frame;
                self.interface.poll(instant(self.now), &mut self.wire, &mut self.sockets);
                answered += 1;
            }
            if sent.is_empty() && answered == 0 && self.wire.frames.is_empty() {
                return;
            }
        }
        panic!("frames without end");
    }

    /// What a connection has received so far.
    fn read(&mut self, handle: SocketHandle) -> String {
        let mut text = Vec::new();
        while let Ok(1..) = self.socket(handle).recv(|bytes| {
            text.extend_from_slice(bytes);
            (bytes.len(), bytes.len())
        }) {}
        String::from_utf8(text).unwrap()
    }

    fn get(&mut self, stack: &mut Stack, path: &str) -> String {
        let handle = self.connect();
        self.exchange(stack);
        self.socket(handle)
            .send_slice(format!("GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n").as_bytes())
            .unwrap();
        self.exchange(stack);
        let text = self.read(handle);
        self.socket(handle).close();
        self.exchange(stack);
        assert!(!self.socket(handle).is_active(), "{:?}", self.socket(handle).state());
        text
    }
}

#[test]
fn a_guest_connects_asks_and_is_answered() {
    let (mut guest, mut stack) = (Guest::new(), stack(Version::V1));
    // More than places for connections: those that have ended make room.
    for _ in 0..3 * CONNECTIONS_MAX {
        let text = guest.get(&mut stack, "/name");
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("\r\n\r\nvalue"), "{text}");
    }
    let text = guest.get(&mut stack, "/long");
    assert!(text.split_once("\r\n\r\n").unwrap().1 == "x".repeat(60_000), "{} bytes", text.len());
}

#[test]
fn a_request_in_a_thousand_segments_and_several_in_one() {
    let (mut guest, mut stack) = (Guest::new(), stack(Version::V1));
    let handle = guest.connect();
    guest.exchange(&mut stack);
    let request = format!("GET /name HTTP/1.1\r\nX-Long: {}\r\n\r\n", "y".repeat(970));
    assert!(request.len() >= 1000);
    for byte in request.as_bytes() {
        guest.socket(handle).send_slice(&[*byte]).unwrap();
        guest.exchange(&mut stack);
    }
    assert!(guest.read(handle).ends_with("\r\n\r\nvalue"));
    let several = "GET /name HTTP/1.1\r\n\r\n".repeat(20);
    guest.socket(handle).send_slice(several.as_bytes()).unwrap();
    guest.exchange(&mut stack);
    assert_eq!(guest.read(handle).matches("\r\n\r\nvalue").count(), 20);
    // One without an end is refused when it is too long, not kept.
    guest.socket(handle).send_slice(&[b'x'; 3 * REQUEST_MAX]).unwrap();
    guest.exchange(&mut stack);
    assert!(guest.read(handle).starts_with("HTTP/1.1 400 "));
    assert!(!guest.socket(handle).may_recv());
}

#[test]
fn the_address_is_told_to_whoever_asks_for_it() {
    let mut stack = stack(Version::V1);
    let question = |asked: [u8; 4]| {
        let who = [&GUEST[..], &GUEST_IP].concat();
        [&[0xff; 6][..], &GUEST, &TYPE_ARP, &ARP_REQUEST, &who, &[0; 6], &asked].concat()
    };
    let address = stack.address();
    let front = |frame: &[u8]| *frame.first_chunk::<FRONT>().unwrap();
    let other = question([172, 16, 0, 1]);
    assert!(!is_for(address, &front(&other)));
    let ours = question(address.octets());
    assert!(is_for(address, &front(&ours)));
    stack.take(&ours, Duration::ZERO);
    let own = [6, 0, 169, 254, 169, 254];
    let expected =
        [&GUEST[..], &own, &TYPE_ARP, &[0, 1, 8, 0, 6, 4, 0, 2], &own, &address.octets(), &GUEST, &GUEST_IP]
            .concat();
    assert_eq!(stack.frame(), Some(&expected[..]));
}

/// A segment to the service, as a driver may leave it: without a checksum of TCP.
fn segment(port: u16, flags: u8) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, PROTOCOL_TCP, 0, 0];
    packet.extend(GUEST_IP);
    packet.extend([169, 254, 169, 254]);
    packet.extend(port.to_be_bytes());
    packet.extend(PORT.to_be_bytes());
    packet.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    [&[6, 0, 169, 254, 169, 254][..], &GUEST, &TYPE_IPV4, &packet].concat()
}

#[test]
fn a_flood_of_half_open_connections_locks_nobody_out() {
    let (mut guest, mut stack) = (Guest::new(), stack(Version::V1));
    let kept = guest.connect();
    guest.exchange(&mut stack);
    for port in 1..20_000 {
        stack.take(&segment(port, FLAG_SYN), guest.now);
        assert!(stack.wire.frames.len() <= FRAMES_MAX && stack.connections.len() <= CONNECTIONS_MAX);
        if port % 5000 == 0 {
            // Between them: a new connection, and one that was there before.
            stack.wire.frames.clear();
            assert!(guest.get(&mut stack, "/name").ends_with("value"), "after {port}");
            guest.socket(kept).send_slice(b"GET /name HTTP/1.1\r\n\r\n").unwrap();
            guest.exchange(&mut stack);
            assert!(guest.read(kept).ends_with("value"), "after {port}");
        }
    }
}

#[test]
fn idle_connections_give_way_the_longest_idle_first() {
    let (mut guest, mut stack) = (Guest::new(), stack(Version::V1));
    let mut connect = |guest: &mut Guest| {
        let handle = guest.connect();
        guest.exchange(&mut stack);
        handle
    };
    let first = connect(&mut guest);
    let more: Vec<_> = (0..CONNECTIONS_MAX).map(|_| connect(&mut guest)).collect();
    assert!(!guest.socket(first).is_active(), "it is told");
    assert!(more.into_iter().all(|one| guest.socket(one).is_active()));
}

#[test]
fn frames_that_make_no_sense_end_nothing() {
    let (mut guest, mut stack) = (Guest::new(), stack(Version::V1));
    let good = segment(9, FLAG_SYN);
    for length in 0..good.len() {
        stack.take(&good[..length], guest.now);
    }
    for at in ETHERNET..good.len() {
        for value in [0, 1, 0x7f, 0xff] {
            let mut frame = good.clone();
            frame[at] = value;
            stack.take(&frame, guest.now);
        }
    }
    while stack.frame().is_some() {
        stack.frame_is_delivered();
    }
    assert!(guest.get(&mut stack, "/name").ends_with("value"));
}

#[test]
fn segments_as_large_as_offloads_make_them_are_understood() {
    let (mut guest, mut stack) = (Guest::new(), stack(Version::V1));
    let handle = guest.connect();
    guest.exchange(&mut stack);
    let body = "z".repeat(3000);
    let request = format!("GET /name HTTP/1.1\r\nContent-Length: 3000\r\n\r\n{body}");
    guest.socket(handle).send_slice(request.as_bytes()).unwrap();
    guest.now += Duration::from_millis(1);
    let Guest { interface, wire, sockets, now, .. } = &mut guest;
    interface.poll(instant(*now), wire, sockets);
    // What TCP has cut, joined again as a device with segmentation would get it.
    let frames: Vec<_> = wire.frames.drain(..).collect();
    assert!(frames.len() >= 2, "{}", frames.len());
    let header = ETHERNET + IPV4 + 20;
    let mut joined = frames[0].clone();
    frames[1..].iter().for_each(|frame| joined.extend_from_slice(&frame[header..]));
    let length = ((joined.len() - ETHERNET) as u16).to_be_bytes();
    joined[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&length);
    assert!(joined.len() > 2 * MTU);
    stack.take(&joined, guest.now);
    guest.exchange(&mut stack);
    assert!(guest.read(handle).ends_with("value"));
}
