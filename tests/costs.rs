//! What a request costs inside: once a device is warm, its io thread allocates nothing for a request or a
//! frame, and copies next to nothing of it. Lines that begin with `cost:` are for scripts/bench.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use alula::devices::KINDS;
use alula::devices::kind::ConfiguredDevice;
use alula::host::Host;
use common::allocator::{Counting, allocations, is_io_thread};
use common::driver::{DATA, F_EVENT_IDX, F_VERSION_1, Guest, MEMORY, TRANSPORTS, WRITE};
use common::network::{self, Wire};
use common::vsock::{self, CREDIT_REQUEST, CREDIT_UPDATE, Packet, REQUEST, RESPONSE, RW};
use common::{Folder, wait_for};
use serde_json::{Value, json};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};

/// One test at a time: costs are counted of all io threads.
static ALONE: Mutex<()> = Mutex::new(());
static IS_COUNTING: AtomicBool = AtomicBool::new(false);
/// Of the driver's buffers; the rings are before them.
static COPIED_BYTES: AtomicU64 = AtomicU64::new(0);
/// Marks are looked for in what is copied.
static HAS_MARKS: AtomicBool = AtomicBool::new(false);
/// Copies of marks are counted wherever they lie.
static COPIED_MARKS: AtomicU64 = AtomicU64::new(0);
/// Connections carry marks here: what the compiler copies when it moves a structure has next to none of these.
const MARK: u8 = 0xc7;
/// Where the driver's buffers are here.
static BUFFERS: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Whether this is an io thread while costs are counted.
fn counts() -> bool {
    IS_COUNTING.load(Relaxed) && is_io_thread()
}

/// Takes the C library's place: every copy whose length the compiler does not know comes here.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    let is_guest = |at: u64| at.wrapping_sub(BUFFERS.load(Relaxed)) < MEMORY - DATA;
    let is_of_guest = is_guest(to as u64) || is_guest(from as u64);
    let has_marks = HAS_MARKS.load(Relaxed);
    if (is_of_guest || has_marks) && counts() {
        COPIED_BYTES.fetch_add(if is_of_guest { count as u64 } else { 0 }, Relaxed);
        if has_marks {
            // SAFETY: the caller promises so many bytes.
            let marks = (0..count).filter(|at| unsafe { from.add(*at).read() } == MARK).count();
            COPIED_MARKS.fetch_add(marks as u64, Relaxed);
        }
    }
    // Volatile: else the compiler makes a call to this function of it.
    let words = count / 8;
    for index in 0..words {
        // SAFETY: the caller promises both to be as long.
        unsafe {
            let word = from.cast::<u64>().add(index).read_unaligned();
            to.cast::<u64>().add(index).write_unaligned(std::hint::black_box(word));
        }
    }
    for index in words * 8..count {
        // SAFETY: as above.
        unsafe { to.add(index).write_volatile(from.add(index).read()) };
    }
    to
}

/// How often memory was given back to the kernel.
static ADVICE: AtomicU64 = AtomicU64::new(0);

/// Takes the C library's place, and counts.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
unsafe extern "C" fn madvise(start: *mut libc::c_void, size: usize, advice: i32) -> i32 {
    if counts() {
        ADVICE.fetch_add(1, Relaxed);
    }
    // SAFETY: what the caller promises is passed on.
    unsafe { libc::syscall(libc::SYS_madvise, start, size, advice) as i32 }
}

const WARM: u32 = 50;
const ROUNDS: u32 = 100;
/// Requests that are in flight together: as many as the test's rings take, of 3 descriptors each.
const DEPTH: usize = 5;
const IN: u8 = 0;
const OUT: u8 = 1;
const FLUSH: u8 = 4;
const GET_ID: u8 = 8;
const NET_HEADER: usize = 12;
const RX: usize = 0;
const TX: usize = 1;
const ETHER_TYPE: u16 = 0x88b5;

const GIVE_PAGES: &str = "256 pages that lie together";

/// A way that a device is used: buffers of one request, which are used again for each.
struct Path {
    name: &'static str,
    queue: usize,
    /// Of each request in flight.
    requests: Vec<Vec<((u64, u32), u16)>>,
    /// What the device answers each into, by its first queue.
    rooms: Vec<((u64, u32), u16)>,
    /// Bytes that the device may copy for it, beside what the kernel moves: headers and the like.
    copied_max: f64,
}

/// Every device there is, each in every way that it can be configured to work, and what that is called.
fn configurations(folder: &Folder) -> Vec<(String, ConfiguredDevice)> {
    folder.write("disk", vec![0x5a; 1 << 20]);
    folder.write("pmem", vec![0x5a; 1 << 20]);
    let disk = |engine: &str| {
        json!({
            "drive_id": "disk",
            "path_on_host": folder.path("disk"),
            "is_root_device": false,
            "cache_type": "Writeback",
            "io_engine": engine,
        })
    };
    let of = |section: &str| -> Vec<Value> {
        match section {
            "drives" => vec![disk("Sync"), disk("Async")],
            "network-interfaces" => vec![json!({ "iface_id": "net", "host_dev_name": "tap0" })],
            "entropy" => vec![json!({})],
            "vsock" => vec![json!({ "guest_cid": 3, "uds_path": folder.path("vsock") })],
            "balloon" => vec![json!({ "amount_mib": 1, "deflate_on_oom": false })],
            "pmem" => vec![json!({ "id": "pmem", "path_on_host": folder.path("pmem") })],
            "memory-hotplug" => vec![json!({ "total_size_mib": 128 })],
            "console" => vec![json!({})],
            "ports" => vec![json!({ "id": "port", "uds_path": folder.path("port") })],
            // Another process does the work.
            "vhost-user" => Vec::new(),
            other => panic!("teach this test how a device of `{other}` is configured"),
        }
    };
    let parse = |kind: &'static alula::devices::kind::DeviceKind, body: Value| {
        let device = kind.parse(body.to_string().as_bytes()).unwrap();
        device.check().unwrap();
        let engine = body["io_engine"].as_str().map(|engine| format!(", {engine},"));
        (device.name() + &engine.unwrap_or_default(), device)
    };
    KINDS.iter().flat_map(|kind| of(kind.section).into_iter().map(|body| parse(kind, body))).collect()
}

/// Block requests of `size` bytes at a time.
fn block(guest: &mut Guest, name: &'static str, kind: u8, size: usize) -> Path {
    let mut request = |index: usize| {
        let mut header = [0; 16];
        (header[0], header[8]) = (kind, (index * 8) as u8);
        let (header, status) = (guest.allocate(&header), guest.allocate(&[0xff]));
        let data = guest.allocate(&vec![0xa5; size]);
        let flags = if kind == OUT { 0 } else { WRITE };
        match size {
            0 => vec![(header, 0), (status, WRITE)],
            _ => vec![(header, 0), (data, flags), (status, WRITE)],
        }
    };
    // The header; and the id is ours.
    let copied_max = if kind == GET_ID { 36.0 } else { 16.0 };
    Path { name, queue: 0, requests: (0..DEPTH).map(&mut request).collect(), rooms: Vec::new(), copied_max }
}

fn frames(guest: &mut Guest, name: &'static str, queue: usize, size: usize) -> Path {
    let mut request = |_| {
        let mut frame = vec![0; NET_HEADER + size];
        frame[NET_HEADER] = 2;
        frame[NET_HEADER + 6] = 2;
        frame[NET_HEADER + 12..NET_HEADER + 14].copy_from_slice(&ETHER_TYPE.to_be_bytes());
        let room = if queue == RX { vec![0; 2048] } else { frame };
        vec![(guest.allocate(&room), if queue == RX { WRITE } else { 0 })]
    };
    Path {
        name,
        queue,
        requests: (0..DEPTH).map(&mut request).collect(),
        rooms: Vec::new(),
        copied_max: 16.0,
    }
}

/// The ways to use a device. A new device is taught here how: the test fails without.
fn paths(device: &ConfiguredDevice, guest: &mut Guest) -> Vec<Path> {
    match device.kind().section {
        "drives" => vec![
            block(guest, "4 KiB read", IN, 4096),
            block(guest, "4 KiB write", OUT, 4096),
            block(guest, "flush", FLUSH, 0),
            block(guest, "ask for the id", GET_ID, 20),
        ],
        "network-interfaces" => vec![
            frames(guest, "frame of 1514 bytes out", TX, 1514),
            frames(guest, "frame of 60 bytes out", TX, 60),
            frames(guest, "frame of 1514 bytes in", RX, 1514),
            frames(guest, "frame of 60 bytes in", RX, 60),
        ],
        "entropy" => {
            let requests = (0..DEPTH).map(|_| vec![(guest.allocate(&[0; 64]), WRITE)]).collect();
            // Random bytes come from the kernel, and go to the guest.
            vec![Path { name: "64 random bytes", queue: 0, requests, rooms: Vec::new(), copied_max: 64.0 }]
        }
        "vsock" => {
            let packet = |index| Packet::new(RW, index as u32, 1000).bytes();
            let requests = (0..DEPTH).map(|index| vec![(guest.allocate(&packet(index)), 0)]).collect();
            let rooms = (0..DEPTH).map(|_| (guest.allocate(&[0; 64]), WRITE)).collect();
            // A header is read, and one is written.
            vec![Path { name: "packet of no connection", queue: TX, requests, rooms, copied_max: 88.0 }]
        }
        "balloon" => {
            // As Linux gives them: 256 pages that lie together, in the quarter of memory that nothing else is in.
            let pages: Vec<u8> = (768..1024_u32).rev().flat_map(u32::to_le_bytes).collect();
            let requests = (0..DEPTH).map(|_| vec![(guest.allocate(&pages), 0)]).collect();
            vec![Path { name: GIVE_PAGES, queue: 0, requests, rooms: Vec::new(), copied_max: 1024.0 }]
        }
        "pmem" => {
            let flush = guest.allocate(&[0; 4]);
            let requests =
                (0..DEPTH).map(|_| vec![(flush, 0), (guest.allocate(&[0xff; 4]), WRITE)]).collect();
            vec![Path { name: "flush of memory", queue: 0, requests, rooms: Vec::new(), copied_max: 8.0 }]
        }
        "memory-hotplug" => {
            // A question for the state of blocks that may not be plugged.
            let question = guest.allocate(&[&[3][..], &[0; 15], &[1], &[0; 7]].concat());
            let requests =
                (0..DEPTH).map(|_| vec![(question, 0), (guest.allocate(&[0xff; 10]), WRITE)]).collect();
            vec![Path { name: "state of blocks", queue: 0, requests, rooms: Vec::new(), copied_max: 34.0 }]
        }
        "console" => {
            // The screen is in memory: each byte is copied to it.
            let said = guest.allocate(&[b'x'; 16]);
            let requests = (0..DEPTH).map(|_| vec![(said, 0)]).collect();
            vec![Path { name: "16 bytes said", queue: TX, requests, rooms: Vec::new(), copied_max: 16.0 }]
        }
        "ports" => {
            // A message that makes no sense.
            let message = guest.allocate(&[0xff; 8]);
            let requests = (0..DEPTH).map(|_| vec![(message, 0)]).collect();
            vec![Path { name: "message of a port", queue: 3, requests, rooms: Vec::new(), copied_max: 8.0 }]
        }
        other => panic!("teach this test how a device of `{other}` is used"),
    }
}

/// Costs of the device of this guest are counted.
fn count_from_now_on(guest: &Guest) {
    let start = guest.memory.memory().get_host_address(GuestAddress(DATA)).unwrap();
    BUFFERS.store(start as u64, Relaxed);
    IS_COUNTING.store(true, Relaxed);
}

/// Has `path` done once for each request in flight, `wire` sending what is to come in.
fn round(guest: &mut Guest, path: &Path, wire: &Wire) {
    for room in &path.rooms {
        guest.offer(RX, &[*room]);
    }
    for buffers in &path.requests {
        guest.offer(path.queue, buffers);
    }
    guest.kick(path.queue);
    let before = guest.used_index(path.queue);
    let mut left = path.requests.len();
    let incoming = path.queue == RX && path.name.starts_with("frame");
    let size = if path.name.contains("1514") { 1514 } else { 60 };
    let mut frame = [0; 1514];
    (frame[0], frame[6]) = (2, 2);
    frame[12..14].copy_from_slice(&ETHER_TYPE.to_be_bytes());
    while left > 0 {
        if incoming && guest.used_index(path.queue).wrapping_sub(before) < path.requests.len() as u16 {
            wire.send(&frame[..size]);
        }
        guest.next_used(path.queue);
        left -= 1;
    }
    path.rooms.iter().for_each(|_| _ = guest.next_used(RX));
}

#[test]
fn a_warm_device_allocates_nothing_and_copies_only_headers() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    // The host says nothing of its own there.
    std::fs::write("/proc/sys/net/ipv6/conf/tap0/disable_ipv6", "1").unwrap();
    let wire = Wire::new("tap0", ETHER_TYPE);
    let folder = Folder::new();
    println!("cost: per request or frame, inside the io thread: allocations, bytes copied");
    for (name, device) in configurations(&folder) {
        for kind in TRANSPORTS {
            let mut guest = Guest::new(kind, device.open("it", &mut Host::default()).unwrap());
            let features = guest.features() & (F_EVENT_IDX | F_VERSION_1 | 1 << 15);
            count_from_now_on(&guest);
            let before = allocations();
            guest.start(features);
            if device.kind().section == "network-interfaces" {
                wire.settle("tap0");
            }
            let all = paths(&device, &mut guest);
            for path in &all {
                for _ in 0..WARM {
                    round(&mut guest, path, &wire);
                }
            }
            assert!(allocations() > before, "the io thread's start allocates: it is not counted");
            for path in &all {
                // What one way of use has warmed, another may need more of.
                round(&mut guest, path, &wire);
                let count = || (allocations(), COPIED_BYTES.load(Relaxed), ADVICE.load(Relaxed));
                let before = count();
                for _ in 0..ROUNDS {
                    round(&mut guest, path, &wire);
                }
                let after = count();
                let requests = f64::from(ROUNDS) * path.requests.len() as f64;
                let allocated = after.0 - before.0;
                let copied = (after.1 - before.1) as f64 / requests;
                let what = format!("{name} behind {kind:?}: {}", path.name);
                println!("cost: {what:<60} {:>8.3} {copied:>8.1}", allocated as f64 / requests);
                assert_eq!(allocated, 0, "{what}: allocations of {requests} requests");
                assert!(copied <= path.copied_max, "{what}: {copied} bytes are copied");
                let expected = if path.name == GIVE_PAGES { requests as u64 } else { 0 };
                assert_eq!(after.2 - before.2, expected, "{what}: calls of madvise");
            }
            IS_COUNTING.store(false, Relaxed);
            wait_for(|| guest.status() & common::driver::NEEDS_RESET == 0);
        }
    }
}

/// A connection between a program of the host and one of a guest, whose driver is here.
struct Connection {
    driver: vsock::Driver,
    client: UnixStream,
    port: u32,
    /// Bytes that the guest has sent, so many of them the host's program was given, and so many it may have sent.
    sent: usize,
    given: usize,
    limit: usize,
    /// Bytes that the guest has received.
    received: usize,
}

impl Connection {
    fn new(kind: common::driver::TransportKind, folder: &Folder) -> Self {
        let body = json!({ "guest_cid": 3, "uds_path": folder.path("v") });
        let section = KINDS.iter().find(|kind| kind.section == "vsock").unwrap();
        let device = section.parse(body.to_string().as_bytes()).unwrap();
        let guest = Guest::new(kind, device.open("vsock", &mut Host::default()).unwrap());
        count_from_now_on(&guest);
        let mut driver = vsock::Driver::new(guest);
        driver.start(F_EVENT_IDX);
        let mut client = UnixStream::connect(folder.path("v")).unwrap();
        client.write_all(b"CONNECT 7\n").unwrap();
        let port = driver.expect(REQUEST).from_port;
        driver.send(Packet::new(RESPONSE, 7, port), &[]);
        client.read_exact(&mut [0; "OK 1073741824\n".len()]).unwrap();
        Self { driver, client, port, sent: 0, given: 0, limit: 0, received: 0 }
    }

    fn packet(&self, op: u16) -> Packet {
        Packet { forwarded: self.received as u32, ..Packet::new(op, 7, self.port) }
    }

    fn hear(&mut self) -> Vec<u8> {
        let (packet, bytes) = self.driver.receive();
        assert!([RW, CREDIT_UPDATE, CREDIT_REQUEST].contains(&packet.op), "{packet:?}");
        self.given = packet.forwarded as usize;
        self.limit = self.given + packet.room as usize;
        self.received += bytes.len();
        bytes
    }

    /// Sends as much of `bytes` as it may send by now, in one packet; returns how much that was.
    fn send(&mut self, bytes: &[u8]) -> usize {
        while self.driver.has_received() {
            self.hear();
        }
        self.driver.send(self.packet(CREDIT_REQUEST), &[]);
        // Words that were under way tell of no more room than the answer does.
        self.hear();
        let count = bytes.len().min(self.limit - self.sent);
        self.driver.send(self.packet(RW), &bytes[..count]);
        self.sent += count;
        count
    }

    /// Has the guest send `all` to a program that reads it at once.
    fn out(&mut self, all: &[u8]) {
        let (mut left, mut read) = (all, vec![0; all.len()]);
        while !left.is_empty() {
            let count = self.send(left);
            self.client.read_exact(&mut read[..count]).unwrap();
            assert!(read[..count] == left[..count]);
            left = &left[count..];
        }
    }

    /// Has the guest send to a program that does not read, until no more is taken; then the program reads all of it. Returns
    /// how many bytes had to be kept for it.
    fn out_late(&mut self, bytes: &[u8]) -> usize {
        let mut sent = Vec::new();
        loop {
            match self.send(bytes) {
                0 => break,
                count => sent.extend_from_slice(&bytes[..count]),
            }
        }
        let kept = self.sent - self.given;
        let mut read = vec![0; sent.len()];
        self.client.read_exact(&mut read).unwrap();
        assert!(read == sent);
        kept
    }

    /// Has the program of the host send `all`.
    fn come_in(&mut self, all: &[u8]) {
        self.client.write_all(all).unwrap();
        let mut received = Vec::new();
        while received.len() < all.len() {
            let bytes = self.hear();
            received.extend(bytes);
            self.driver.send(self.packet(CREDIT_UPDATE), &[]);
        }
        assert!(received == all);
    }
}

#[test]
fn a_byte_of_a_connection_is_copied_once_at_most() {
    const PACKET: usize = 60_000;
    const ROUNDS: usize = 5;
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let bytes = [MARK; PACKET];
    HAS_MARKS.store(true, Relaxed);
    println!("cost: per byte of a connection, inside the io thread: bytes copied");
    for kind in TRANSPORTS {
        let folder = Folder::new();
        let mut it = Connection::new(kind, &folder);
        // The device takes more and more ahead.
        (0..10).for_each(|_| it.out(&bytes));
        type Way<'a> = &'a dyn Fn(&mut Connection) -> usize;
        let ways: [(&str, f64, Way); 3] = [
            ("to a program that reads", 0.0, &|it| {
                it.out(&bytes);
                PACKET
            }),
            ("kept for a program that reads late", 1.0, &|it| it.out_late(&bytes)),
            ("from a program", 0.0, &|it| {
                it.come_in(&bytes);
                PACKET
            }),
        ];
        for (name, copies, way) in ways {
            way(&mut it);
            let before = COPIED_MARKS.load(Relaxed);
            let moved: usize = (0..ROUNDS).map(|_| way(&mut it)).sum();
            let copied = (COPIED_MARKS.load(Relaxed) - before) as f64 / moved as f64;
            println!("cost: vsock behind {kind:?}: {name:<40} {copied:>8.3}");
            // A few of the bytes that are kept fit into the socket after all, and are not counted as kept.
            assert!(
                moved >= ROUNDS * PACKET && copied <= copies * 1.05 + 0.01,
                "{name}: {copied} copies of each byte"
            );
        }
        IS_COUNTING.store(false, Relaxed);
    }
    HAS_MARKS.store(false, Relaxed);
}
