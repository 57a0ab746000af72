//! Connections between programs of the host, which are here, and programs of a guest, of which the driver's side
//! is here, too.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "../common/mod.rs"]
mod common;
mod firmware;
mod hostile;
mod limits;
mod stops;
mod told;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use alula::devices::KINDS;
use alula::devices::kind::ConfiguredDevice;
use alula::host::Host;
use alula::memory;
use alula::metrics::View;
use alula::protocol::READY_PORT;
use common::allocator::{self, Counting};
use common::driver::{self, F_EVENT_IDX, Guest, TRANSPORTS, TransportKind};
use common::vsock::{
    CREDIT_REQUEST, CREDIT_UPDATE, Driver, Packet, REQUEST, RESPONSE, RST, RW, SHUT_RECEIVE, SHUT_SEND,
    SHUTDOWN,
};
use common::{Folder, PATIENCE, Process, Service, wait_for};
use serde_json::json;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test at a time: the descriptors of all are counted, and what io threads allocate.
static ALONE: Mutex<()> = Mutex::new(());

struct World {
    folder: Folder,
    driver: Driver,
    _alone: MutexGuard<'static, ()>,
}

impl World {
    fn new(kind: TransportKind) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = Folder::new();
        let guest = Guest::new(kind, device(&folder).open("vsock", &mut Host::default()).unwrap());
        Self::of(folder, guest, alone)
    }

    /// The same with a device that works when it is waited for, which takes no time.
    fn by_hand() -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = Folder::new();
        let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
        let opened = device(&folder).open("vsock", &mut Host::default()).unwrap();
        Self::of(folder, Guest::by_hand(TransportKind::Mmio, opened, memory), alone)
    }

    fn of(folder: Folder, guest: Guest, alone: MutexGuard<'static, ()>) -> Self {
        let mut driver = Driver::new(guest);
        driver.start(F_EVENT_IDX);
        Self { folder, driver, _alone: alone }
    }

    fn path(&self, port: u32) -> PathBuf {
        self.folder.path(&format!("v_{port}"))
    }

    /// A program of the host that has connected, and said this.
    fn client(&self, text: &str) -> UnixStream {
        let mut stream = patient(UnixStream::connect(self.folder.path("v")).unwrap());
        stream.write_all(text.as_bytes()).unwrap();
        stream
    }

    /// One that is connected to the guest's `port`, and its own port.
    fn connected(&mut self, port: u32) -> (UnixStream, u32) {
        let client = self.client(&format!("CONNECT {port}\n"));
        let request = self.driver.expect(REQUEST);
        assert_eq!(request.to_port, port);
        self.driver.send(request.answer(RESPONSE), &[]);
        let client = answered(client, request.from_port);
        (client, request.from_port)
    }

    /// One that the guest's port 1000 has connected to, at this port.
    fn accepted(&mut self, port: u32) -> UnixStream {
        let listener = UnixListener::bind(self.path(port)).unwrap();
        self.driver.send(Packet::new(REQUEST, 1000, port), &[]);
        self.driver.expect(RESPONSE);
        std::fs::remove_file(self.path(port)).unwrap();
        patient(listener.accept().unwrap().0)
    }

    fn counted(&self, name: &str) -> u64 {
        self.driver.guest.transport.lock().unwrap().metrics(View::Total)[name].as_u64().unwrap()
    }

    fn connections(&self) -> u64 {
        self.counted("conns_added") - self.counted("conns_removed")
    }
}

fn device(folder: &Folder) -> ConfiguredDevice {
    let config = json!({ "guest_cid": 3, "uds_path": folder.path("v") });
    let kind = KINDS.iter().find(|kind| kind.section == "vsock").unwrap();
    let device = kind.parse(config.to_string().as_bytes()).unwrap();
    device.check().unwrap();
    device
}

/// A stream that fails where a byte does not come, or does not go: the test says where, and ends.
fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// The client, after the line that says that it is connected.
fn answered(client: UnixStream, port: u32) -> UnixStream {
    let mut line = [0; 32];
    let expected = format!("OK {port}\n");
    (&client).read_exact(&mut line[..expected.len()]).unwrap();
    assert_eq!(&line[..expected.len()], expected.as_bytes());
    client
}

fn read(stream: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Whether the other side has closed the stream.
fn is_closed(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(count) => count == 0,
        Err(error) => {
            assert_ne!(error.kind(), ErrorKind::WouldBlock, "the stream stays open");
            error.kind() == ErrorKind::ConnectionReset
        }
    }
}

#[test]
fn a_program_of_the_host_talks_with_one_of_the_guest() {
    for kind in TRANSPORTS {
        let mut world = World::new(kind);
        let mut client = world.client("CONNECT 5000\nhello");
        let request = world.driver.expect(REQUEST);
        assert_eq!((request.to_port, request.from_port), (5000, 1 << 30));
        assert_eq!((request.room, request.forwarded), (4 << 10, 0));
        world.driver.send(request.answer(RESPONSE), &[]);
        client = answered(client, request.from_port);
        let (packet, bytes) = world.driver.receive();
        assert_eq!((packet.op, &bytes[..]), (RW, &b"hello"[..]));
        world.driver.send(request.answer(RW), b"world");
        assert_eq!(read(&mut client, 5), b"world");
        // The next one has another port.
        let (other, port) = world.connected(5000);
        assert_eq!(port, request.from_port + 1);
        drop(client);
        let shutdown = world.driver.expect(SHUTDOWN);
        assert_eq!((shutdown.flags, shutdown.from_port), (SHUT_RECEIVE | SHUT_SEND, 1 << 30));
        assert_eq!(shutdown.forwarded, 5);
        world.driver.send(request.answer(RST), &[]);
        wait_for(|| world.connections() == 1);
        // The guest ends the other one.
        let shut = Packet { flags: SHUT_RECEIVE | SHUT_SEND, ..Packet::new(SHUTDOWN, 5000, port) };
        world.driver.send(shut, &[]);
        world.driver.expect(RST);
        assert!(is_closed(&mut { other }));
        // The device counts it as gone when the guest has been told.
        wait_for(|| world.connections() == 0);
    }
}

#[test]
fn a_program_of_the_guest_talks_with_one_of_the_host() {
    let mut world = World::new(TransportKind::Mmio);
    let mut host = world.accepted(80);
    world.driver.send(Packet::new(RW, 1000, 80), b"GET /");
    assert_eq!(read(&mut host, 5), b"GET /");
    // Half closed, the other way goes on.
    world.driver.send(Packet { flags: SHUT_SEND, ..Packet::new(SHUTDOWN, 1000, 80) }, &[]);
    assert!(is_closed(&mut host));
    host.write_all(b"200").unwrap();
    let (packet, bytes) = world.driver.receive();
    assert_eq!((packet.op, packet.forwarded, &bytes[..]), (RW, 5, &b"200"[..]));
    host.shutdown(Shutdown::Write).unwrap();
    assert_ne!(world.driver.expect(SHUTDOWN).flags & SHUT_SEND, 0);
    drop(host);
    world.driver.send(Packet { flags: SHUT_RECEIVE, ..Packet::new(SHUTDOWN, 1000, 80) }, &[]);
    loop {
        // The guest may be told first that the host is gone.
        match world.driver.receive().0.op {
            SHUTDOWN => {}
            op => break assert_eq!(op, RST),
        }
    }
    wait_for(|| world.connections() == 0);
    // Nobody listens there any more.
    world.driver.send(Packet::new(REQUEST, 1000, 80), &[]);
    assert_eq!(world.driver.expect(RST).from_port, 80);
}

#[test]
fn a_half_close_of_the_host_leaves_the_way_back_open() {
    let mut world = World::new(TransportKind::Pci);
    let (mut client, port) = world.connected(7);
    client.write_all(b"all").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(world.driver.receive().1, b"all");
    assert_eq!(world.driver.expect(SHUTDOWN).flags, SHUT_SEND);
    world.driver.send(Packet::new(RW, 7, port), b"answer");
    assert_eq!(read(&mut client, 6), b"answer");
    // An end that comes together with the last bytes is heard after them.
    let mut ended = Vec::new();
    for how in [Shutdown::Write, Shutdown::Both] {
        let (mut client, _) = world.connected(7);
        world.driver.guest.pause();
        client.write_all(b"last").unwrap();
        client.shutdown(how).unwrap();
        world.driver.guest.resume();
        assert_eq!(world.driver.receive().1, b"last");
        assert_ne!(world.driver.expect(SHUTDOWN).flags & SHUT_SEND, 0);
        // The client stays open: that it was closed would be told, too.
        ended.push(client);
    }
    // The guest will not read: who writes is told.
    let (mut other, port) = world.connected(8);
    world.driver.send(Packet { flags: SHUT_RECEIVE, ..Packet::new(SHUTDOWN, 8, port) }, &[]);
    wait_for(|| other.write_all(b"x").is_err());
    // The host does not read: the guest is told, and may be told something still.
    let (other, port) = world.connected(9);
    other.shutdown(Shutdown::Read).unwrap();
    world.driver.send(Packet::new(RW, 9, port), b"lost");
    assert_eq!(world.driver.expect(SHUTDOWN).flags, SHUT_RECEIVE);
    (&other).write_all(b"still").unwrap();
    assert_eq!(world.driver.receive().1, b"still");
}

/// Byte `at` of a stream.
fn byte(at: usize) -> u8 {
    (at ^ at >> 8 ^ at >> 16) as u8
}

fn bytes(range: std::ops::Range<usize>) -> Vec<u8> {
    range.map(byte).collect()
}

#[test]
fn a_host_that_writes_faster_than_the_guest_reads_loses_nothing() {
    const ALL: usize = 4 << 20;
    let mut world = World::new(TransportKind::Mmio);
    let (mut client, port) = world.connected(7);
    let writer = std::thread::spawn(move || {
        (0..ALL).step_by(64 << 10).for_each(|at| client.write_all(&bytes(at..at + (64 << 10))).unwrap());
        client
    });
    let (mut received, mut told, mut asked) = (0, 0, 0);
    while received < ALL {
        let (packet, bytes) = world.driver.receive();
        match packet.op {
            RW => {
                assert!(received + bytes.len() <= told + common::vsock::ROOM as usize, "more than its room");
                assert!(bytes.iter().enumerate().all(|(at, found)| *found == byte(received + at)));
                received += bytes.len();
            }
            CREDIT_REQUEST => {
                // The guest has read everything, and says so only now.
                assert_eq!(received, told + common::vsock::ROOM as usize);
                told = received;
                asked += 1;
                world
                    .driver
                    .send(Packet { forwarded: told as u32, ..Packet::new(CREDIT_UPDATE, 7, port) }, &[]);
            }
            op => panic!("operation {op}"),
        }
    }
    assert!(asked >= ALL / common::vsock::ROOM as usize - 1, "{asked}");
    drop(writer.join().unwrap());
    // The device needs room to find out whether there are more bytes.
    world.driver.send(Packet { forwarded: ALL as u32, ..Packet::new(CREDIT_UPDATE, 7, port) }, &[]);
    while world.driver.receive().0.op != SHUTDOWN {}
}

#[test]
fn a_guest_that_writes_faster_than_the_host_reads_loses_nothing() {
    const ALL: usize = 4 << 20;
    const PACKET: usize = 60_000;
    let mut world = World::new(TransportKind::Pci);
    let (mut client, port) = world.connected(7);
    let (mut sent, mut read, mut limit) = (0, 0, 0);
    let hear = |world: &mut World, limit: &mut usize| {
        while world.driver.has_received() {
            let (packet, _) = world.driver.receive();
            assert_eq!(packet.op, CREDIT_UPDATE);
            *limit = (packet.forwarded + packet.room) as usize;
        }
    };
    world.driver.send(Packet::new(CREDIT_REQUEST, 7, port), &[]);
    wait_for(|| {
        hear(&mut world, &mut limit);
        limit > 0
    });
    // The guest may send more and more ahead, as the host reads.
    assert_eq!(limit, 4 << 10);
    let mut buffer = vec![0; 50_000];
    while read < ALL {
        // The device tells the guest of room after it has passed bytes on: a program may have read all of them by then.
        wait_for(|| {
            hear(&mut world, &mut limit);
            limit > sent || read < sent
        });
        while sent < ALL.min(limit) {
            let count = PACKET.min(limit - sent).min(ALL - sent);
            world.driver.send(Packet::new(RW, 7, port), &bytes(sent..sent + count));
            sent += count;
        }
        let count = client.read(&mut buffer).unwrap();
        assert!(buffer[..count].iter().enumerate().all(|(at, found)| *found == byte(read + at)));
        read += count;
    }
    // What was sent last is there, though the guest has left before it was read.
    world.driver.send(Packet::new(CREDIT_REQUEST, 7, port), &[]);
    wait_for(|| {
        hear(&mut world, &mut limit);
        limit - sent == 256 << 10
    });
    let count = limit - sent;
    for at in (0..count).step_by(PACKET) {
        let end = (at + PACKET).min(count);
        world.driver.send(Packet::new(RW, 7, port), &bytes(at..end));
    }
    world.driver.send(Packet { flags: SHUT_RECEIVE | SHUT_SEND, ..Packet::new(SHUTDOWN, 7, port) }, &[]);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert!(rest == bytes(0..count), "{} of {count} bytes", rest.len());
    while world.driver.receive().0.op != RST {}
}

#[test]
fn all_packets_of_a_kick_leave_by_one_write_and_arrive_by_one_read() {
    let mut world = World::new(TransportKind::Mmio);
    let ((mut one, first), (mut other, second)) = (world.connected(1), world.connected(2));
    let before = world.counted("tx_call_count");
    let packet = |port: u32, host_port: u32| Packet::new(RW, port, host_port);
    // In turns, by two connections.
    let (a, b) = (packet(1, first), packet(2, second));
    world.driver.send_all(&[(a, b"a1"), (b, b"b1"), (a, b"a2"), (b, b"b2"), (a, b"a3"), (b, b"b3")]);
    assert_eq!((read(&mut one, 6), read(&mut other, 6)), (b"a1a2a3".to_vec(), b"b1b2b3".to_vec()));
    assert_eq!(world.counted("tx_call_count") - before, 2);
    // What ends a stream comes after what was sent before it.
    let shut = Packet { flags: SHUT_SEND, ..Packet::new(SHUTDOWN, 1, first) };
    world.driver.send_all(&[(a, b"last"), (shut, b""), (b, b"more")]);
    let mut rest = Vec::new();
    one.read_to_end(&mut rest).unwrap();
    assert_eq!((rest, read(&mut other, 4)), (b"last".to_vec(), b"more".to_vec()));
    // Eight buffers of 4 KiB each, filled at once.
    world.driver.guest.pause();
    let before = world.counted("rx_call_count");
    other.write_all(&bytes(0..30_000)).unwrap();
    world.driver.guest.resume();
    let mut received = Vec::new();
    while received.len() < 30_000 {
        received.extend(world.driver.receive().1);
    }
    assert!(received == bytes(0..30_000));
    // One more finds out about each connection after the pause.
    let calls = world.counted("rx_call_count") - before;
    assert!(calls <= 3, "{calls} reads for eight buffers");
}

#[test]
fn a_socket_is_made_when_it_is_named_and_goes_at_the_end() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let service = Service::start(&[]);
    let mut client = service.client();
    let path = |name: &str| service.folder.path(name);
    let _live = UnixListener::bind(path("live")).unwrap();
    service.folder.write("file", "");
    let long = "x".repeat(108);
    let body = |cid: &str, name: &str| format!(r#"{{"guest_cid": {cid}, "uds_path": {:?}}}"#, path(name));
    for (cid, name, expected) in [
        ("0", "v", "a `guest_cid` of 0 cannot be"),
        ("1", "v", "a `guest_cid` of 1 cannot be"),
        ("2", "v", "a `guest_cid` of 2 cannot be"),
        ("4294967295", "v", "a `guest_cid` of 4294967295 cannot be"),
        ("4294967296", "v", "`guest_cid`: expected a smaller number"),
        ("3", "live", "another process serves it"),
        ("3", "file", "there is something else already"),
        ("3", "none/v", "there is no folder"),
        ("3", &long, "bytes are too long for a socket"),
    ] {
        let fault = client.request("PUT", "/vsock", &body(cid, name)).fault();
        assert!(fault.contains(expected), "{cid} {name}: {fault}");
    }
    assert!(!path("v").exists());
    for name in ["v", "v", "w"] {
        client.ok("PUT", "/vsock", &body("3", name));
    }
    assert!(path("w").exists() && !path("v").exists());
    let told = client.ok("GET", "/vm/config", "").json();
    assert_eq!((&told["vsock"]["guest_cid"], told["vsock"]["vsock_id"].is_null()), (&json!(3), true));
    service.boot_source("end=idle");
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    assert!(path("w").exists());
    let Service { mut process, folder, .. } = service;
    process.send(libc::SIGTERM);
    process.end();
    assert!(!folder.path("w").exists());
}

#[test]
fn a_packet_allocates_nothing_and_an_idle_connection_is_small() {
    const IDLE: usize = 1000;
    let mut world = World::new(TransportKind::Mmio);
    let (mut client, port) = world.connected(5);
    let mut told = 0_u32;
    let mut rounds = |world: &mut World, count: usize| {
        for _ in 0..count {
            client.write_all(&[1; 3000]).unwrap();
            let mut left = 3000;
            while left > 0 {
                left -= world.driver.receive().1.len();
            }
            told += 3000;
            world.driver.send(Packet { forwarded: told, ..Packet::new(RW, 5, port) }, &[2; 100]);
            read(&mut client, 100);
        }
    };
    rounds(&mut world, 600);
    // The devices of the tests beside this one are counted, too: a packet that allocates does so each time.
    let allocations = |_| {
        let before = allocator::allocations();
        rounds(&mut world, 120);
        allocator::allocations() - before
    };
    assert_eq!((0..5).map(allocations).min(), Some(0), "for 240 packets");
    let before = allocator::bytes();
    let clients: Vec<_> = (0..IDLE).map(|_| world.connected(6)).collect();
    let each = (allocator::bytes() - before) / IDLE as i64;
    assert!(each <= 600, "{each} bytes for each connection");
    drop(clients);
}

#[test]
fn an_agent_tells_by_a_call_of_root_that_it_listens() {
    let mut world = World::by_hand();
    for (guest_port, host_port, is_told) in [
        (51, READY_PORT, true),
        (1023, READY_PORT, true),
        (1024, READY_PORT, false),
        (u32::MAX, READY_PORT, false),
        (51, READY_PORT + 1, false),
    ] {
        world.driver.send(Packet::new(REQUEST, guest_port, host_port), &[]);
        // The connection is refused in any case: nothing is left of it.
        world.driver.expect(RST);
        let has_called = world.driver.guest.host.lock().unwrap().take_agent_call();
        assert_eq!(has_called, is_told, "{guest_port} {host_port}");
    }
    // Who listens at that port of the host has the connection, as by any other port.
    let listener = UnixListener::bind(world.path(READY_PORT)).unwrap();
    world.driver.send(Packet::new(REQUEST, 51, READY_PORT), &[]);
    world.driver.expect(RESPONSE);
    listener.accept().unwrap();
    assert!(!world.driver.guest.host.lock().unwrap().take_agent_call());
}
