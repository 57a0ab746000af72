//! The metadata service behind the network device, with a guest's TCP/IP on the driver's side of the rings: over a
//! TAP and over passt, behind both transports.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use alula::devices::KINDS;
use alula::host::Host;
use alula::memory;
use alula::metadata::store::Store;
use alula::metadata::{Config, Service, Version};
use alula::virtio::VirtioDevice;
use common::driver::{self, Guest, TransportKind, WRITE};
use common::{network, wait_for};
use serde_json::json;
use smoltcp::iface::{Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::wire::{HardwareAddress, IpCidr};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

const RX: usize = 0;
const TX: usize = 1;
const HEADER: usize = 12;
const ETHERNET: usize = 14;
const F_MRG_RXBUF: u64 = 1 << 15;
const GUEST_MAC: [u8; 6] = [6, 0, 0, 0, 0, 2];
const SERVICE_MAC: [u8; 6] = [6, 0, 169, 254, 169, 254];
const SERVICE: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// A header as a driver with offloads has it: the checksum is partial, the segment is one of TCP over IPv4.
const OFFLOADED: [u8; HEADER] = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];

/// One test at a time: each has the process' network.
static ALONE: Mutex<()> = Mutex::new(());

fn enter() -> MutexGuard<'static, ()> {
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    network::enter();
    network::add_uplink();
    network::add_interface("tap0", network::TAP);
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/tap0/disable_ipv6", "1");
    common::output("ip", &["link", "set", "tap0", "up"]);
    alone
}

fn store() -> Arc<Store> {
    Arc::new(Store::new(100_000))
}

fn filled() -> Arc<Store> {
    let (store, data) = (store(), json!({ "name": "value", "long": "x".repeat(60_000) }));
    store.put(data.as_object().unwrap().clone()).unwrap();
    store
}

/// The interface `net`, beside a service that answers on `interface`.
fn open(carrier: &str, interface: &str, version: Version, store: &Arc<Store>) -> Box<dyn VirtioDevice> {
    let mut config = json!({ "iface_id": "net", "guest_mac": "06:00:00:00:00:02" });
    match carrier {
        "passt" => config["user"] = json!({}),
        tap => config["host_dev_name"] = tap.into(),
    }
    let kind = KINDS.iter().find(|kind| kind.section == "network-interfaces").unwrap();
    let device = kind.parse(config.to_string().as_bytes()).unwrap();
    let mut host = Host::default();
    let config = Config { version, ..Config::on(vec![interface.to_owned()]) };
    host.serve_metadata(Some(Service { config, store: store.clone() }));
    device.open("metadata", &mut host).unwrap()
}

/// How many frames the TAP has had from the guest.
fn frames_on_tap() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = text.lines().find_map(|line| line.trim().strip_prefix("tap0:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The guest's end of the cable: packets, without their Ethernet headers.
#[derive(Default)]
struct Wire {
    come: VecDeque<Vec<u8>>,
    go: Vec<Vec<u8>>,
}

struct Come(Vec<u8>);
struct Go<'a>(&'a mut Vec<Vec<u8>>);

impl RxToken for Come {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Go<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut packet = vec![0; length];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Come;
    type TxToken<'a> = Go<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Come, Go<'_>)> {
        Some((Come(self.come.pop_front()?), Go(&mut self.go)))
    }
    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Go<'_>> {
        Some(Go(&mut self.go))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = 1500;
        // Checksums of TCP are left to the device.
        capabilities.checksum.tcp = Checksum::Rx;
        capabilities
    }
}

/// A guest with TCP/IP behind an interface.
struct Client {
    guest: Guest,
    rooms: Vec<(u64, u32)>,
    room: usize,
    seen: u16,
    out: u64,
    begun: Instant,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    port: u16,
}

impl Client {
    fn new(kind: TransportKind, device: Box<dyn VirtioDevice>, features: u64, rooms: usize) -> Self {
        let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
        let mut guest = Guest::by_hand(kind, device, memory);
        guest.start(features);
        let (out, _) = guest.allocate(&[0; 4096]);
        let rooms: Vec<_> = (0..rooms).map(|_| guest.allocate(&[0; 1600])).collect();
        let mut wire = Wire::default();
        let config = smoltcp::iface::Config::new(HardwareAddress::Ip);
        let mut interface = Interface::new(config, &mut wire, smoltcp::time::Instant::ZERO);
        let own = Ipv4Addr::new(10, 0, 0, 2);
        interface.update_ip_addrs(|addresses| addresses.push(IpCidr::new(own.into(), 24)).unwrap());
        interface.routes_mut().add_default_ipv4_route(Ipv4Addr::new(10, 0, 0, 1)).unwrap();
        let sockets = SocketSet::new(Vec::new());
        let (room, seen, begun, port) = (0, 0, Instant::now(), 40_000);
        let mut client = Self { guest, rooms, room, seen, out, begun, wire, interface, sockets, port };
        client.offer_all();
        client
    }

    fn offer_all(&mut self) {
        for room in &self.rooms {
            self.guest.offer(RX, &[(*room, WRITE)]);
        }
        self.guest.kick(RX);
        self.guest.turn();
    }

    /// Sends a whole frame; a driver leaves work on those of TCP to the device.
    fn send(&mut self, frame: &[u8]) {
        let header = if frame[12..14] == [8, 0] { OFFLOADED } else { [0; HEADER] };
        let bytes = [&header[..], frame].concat();
        self.guest.memory.memory().write_slice(&bytes, GuestAddress(self.out)).unwrap();
        let before = self.guest.used_index(TX);
        // The header on its own, and the rest cut where no header ends.
        let at = |offset: u64, length: usize| ((self.out + offset, length as u32), 0);
        let cut = HEADER as u64 + 20;
        self.guest.offer(TX, &[at(0, HEADER), at(HEADER as u64, 20), at(cut, bytes.len() - cut as usize)]);
        self.guest.kick(TX);
        self.guest.wait_for_each_turn(|guest| guest.used_index(TX) != before);
    }

    /// The frames that have come, whose buffers are offered again.
    fn received(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while self.seen != self.guest.used_index(RX) {
            let entry = Guest::parts(RX)[2] + 4 + 8 * u64::from(self.seen % 16);
            let length: u32 = self.guest.memory.memory().read_obj(GuestAddress(entry + 4)).unwrap();
            let room = self.rooms[self.room];
            self.room = (self.room + 1) % self.rooms.len();
            let bytes = self.guest.bytes((room.0, length));
            assert_eq!(bytes[..HEADER], [&[0; 10][..], &[1, 0]].concat(), "nothing is left to the driver");
            frames.push(bytes[HEADER..].to_vec());
            self.seen = self.seen.wrapping_add(1);
            self.guest.offer(RX, &[(room, WRITE)]);
        }
        self.guest.kick(RX);
        frames
    }

    fn poll(&mut self) {
        let now = smoltcp::time::Instant::from_micros(self.begun.elapsed().as_micros() as i64);
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
    }

    /// Carries packets both ways until `done`.
    fn exchange(&mut self, mut done: impl FnMut(&mut Socket<'static>) -> bool, handle: SocketHandle) {
        wait_for(|| {
            self.poll();
            for packet in std::mem::take(&mut self.wire.go) {
                self.send(&[&SERVICE_MAC[..], &GUEST_MAC, &[8, 0], &packet].concat());
            }
            self.guest.turn();
            for frame in self.received() {
                if frame[..14] == [&GUEST_MAC[..], &SERVICE_MAC, &[8, 0]].concat() {
                    self.wire.come.push_back(frame[ETHERNET..].to_vec());
                }
            }
            self.poll();
            done(self.sockets.get_mut(handle))
        });
    }

    fn connect(&mut self) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 32 << 10]);
        let mut socket = Socket::new(buffer(), buffer());
        self.port += 1;
        socket.connect(self.interface.context(), (SERVICE, 80), self.port).unwrap();
        let handle = self.sockets.add(socket);
        self.exchange(|socket| socket.may_send(), handle);
        handle
    }

    /// Asks by a connection that there is: the status and the body.
    fn ask_by(&mut self, handle: SocketHandle, request: &str) -> (u16, String) {
        let request = format!("{}\r\n\r\n", request.replace('\n', "\r\n"));
        self.sockets.get_mut::<Socket<'_>>(handle).send_slice(request.as_bytes()).unwrap();
        let mut text = String::new();
        let whole = |text: &str| {
            let (head, body) = text.split_once("\r\n\r\n")?;
            let length: usize = head.split("Content-Length: ").nth(1)?.split("\r\n").next()?.parse().ok()?;
            (body.len() == length).then(|| body.to_owned())
        };
        self.exchange(
            |socket| {
                while let Ok(1..) = socket.recv(|bytes| {
                    text.push_str(std::str::from_utf8(bytes).unwrap());
                    (bytes.len(), bytes.len())
                }) {}
                whole(&text).is_some()
            },
            handle,
        );
        (text.split(' ').nth(1).unwrap().parse().unwrap(), whole(&text).unwrap())
    }

    fn ask(&mut self, request: &str) -> (u16, String) {
        let handle = self.connect();
        let answer = self.ask_by(handle, request);
        self.sockets.get_mut::<Socket<'_>>(handle).close();
        answer
    }
}

const GET: &str = "GET /name HTTP/1.1";

fn value() -> (u16, String) {
    (200, "value".to_owned())
}

/// A question for an address by ARP.
fn question(address: Ipv4Addr) -> Vec<u8> {
    let who = [&GUEST_MAC[..], &[10, 0, 0, 2]].concat();
    let asked = [&[0; 6][..], &address.octets()].concat();
    [&[0xff; 6][..], &GUEST_MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &who, &asked].concat()
}

#[test]
fn a_guest_is_told_and_no_frame_of_it_leaves() {
    let _alone = enter();
    for carrier in ["tap0", "passt"] {
        for (kind, features) in driver::TRANSPORTS.into_iter().zip([F_MRG_RXBUF, 0]) {
            let before = frames_on_tap();
            let mut client = Client::new(kind, open(carrier, "net", Version::V1, &filled()), features, 14);
            client.send(&question(SERVICE));
            let answers = client.received();
            let answer = answers.iter().find(|frame| frame[12..14] == [8, 6] && frame[21] == 2).unwrap();
            assert_eq!(answer[22..28], SERVICE_MAC, "{carrier}, {kind:?}");
            assert_eq!(client.ask(GET), value(), "{carrier}, {kind:?}");
            let (status, body) = client.ask("GET /long HTTP/1.1\nConnection: close");
            assert!(status == 200 && body == "x".repeat(60_000), "{} bytes", body.len());
            assert_eq!(frames_on_tap(), before, "{carrier}, {kind:?}");
            // What is for others goes where it went.
            client.send(&question(Ipv4Addr::new(10, 0, 0, 1)));
            assert_eq!(frames_on_tap() - before, u64::from(carrier == "tap0"), "{kind:?}");
        }
    }
}

#[test]
fn on_an_interface_that_is_not_named_nobody_answers() {
    let _alone = enter();
    let before = frames_on_tap();
    let mut client = Client::new(TransportKind::Mmio, open("tap0", "other", Version::V1, &filled()), 0, 14);
    client.send(&question(SERVICE));
    assert_eq!((frames_on_tap() - before, client.received().len()), (1, 0));
}

#[test]
fn a_token_of_another_interface_is_none() {
    let _alone = enter();
    network::add_interface("tap1", network::TAP);
    let store = filled();
    let client =
        |tap: &str| Client::new(TransportKind::Pci, open(tap, "net", Version::V2, &store), F_MRG_RXBUF, 14);
    let (mut one, mut other) = (client("tap0"), client("tap1"));
    let put = "PUT /latest/api/token HTTP/1.1\nX-metadata-token-ttl-seconds: 60";
    let (status, token) = one.ask(put);
    assert_eq!(status, 200);
    let get = format!("{GET}\nX-metadata-token: {token}");
    assert_eq!(one.ask(&get), value());
    assert_eq!(other.ask(&get), (401, "MMDS token not valid.".to_owned()));
    assert_eq!(one.ask(GET).0, 401);
}

#[test]
fn frames_wait_for_the_drivers_buffers() {
    let _alone = enter();
    for (carrier, kind) in [("tap0", TransportKind::Mmio), ("passt", TransportKind::Pci)] {
        let mut client = Client::new(kind, open(carrier, "net", Version::V1, &filled()), F_MRG_RXBUF, 0);
        // More than wait: those are lost.
        for _ in 0..100 {
            client.send(&question(SERVICE));
        }
        assert_eq!(client.guest.used_index(RX), 0);
        client.rooms = (0..14).map(|_| client.guest.allocate(&[0; 1600])).collect();
        client.offer_all();
        client.guest.wait_for_each_turn(|guest| guest.used_index(RX) >= 14);
        assert_eq!(client.ask(GET), value(), "{carrier}");
    }
}

#[test]
fn connections_outlive_a_pause_and_data_a_restore() {
    let _alone = enter();
    for kind in driver::TRANSPORTS {
        let mut client = Client::new(kind, open("tap0", "net", Version::V1, &filled()), F_MRG_RXBUF, 14);
        let handle = client.connect();
        client.guest.pause();
        client.guest.resume();
        assert_eq!(client.ask_by(handle, GET), value(), "{kind:?}");
        client.guest.pause();
        let state = client.guest.save();
        let (memory, notes) = (client.guest.memory.clone(), client.guest.notes.clone());
        drop(client.guest);
        let empty = store();
        let mut guest = Guest::by_hand(kind, open("tap0", "net", Version::V1, &empty), memory);
        guest.notes = notes;
        guest.restore(&state).unwrap();
        guest.resume();
        client.guest = guest;
        assert_eq!(empty.get().unwrap()["name"], "value");
        // The old connection is told that it has ended; a new one is answered.
        client.sockets.get_mut::<Socket<'_>>(handle).send_slice(b"GET /").unwrap();
        client.exchange(|socket| !socket.is_open(), handle);
        assert_eq!(client.ask(GET), value(), "{kind:?}");
        // A reset leaves no connection either.
        client.guest.reset();
    }
}
