//! Cases for the socket device (virtio 1.2, 5.10): connections to programs of the host, packet by packet. Where a case
//! was asked for by name, a test is the other side, which listens at port 80: it sends back the first 5 bytes, sends
//! [`MORE`] bytes after 5 further ones, reads until the guest sends no more, says `rest`, and closes.

// Without `black_box`, the compiler takes a buffer that the device wrote to for unchanged.
use core::hint::black_box;

use crate::console::say;
use crate::machine::Machine;
use crate::virtio::{CONFIG, Device, Queue, read_by_device, written_by_device};
use crate::words::Words;

const HEADER: usize = 44;
const HOST: u64 = 2;
const STREAM: u16 = 1;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;
/// The flag of a shutdown by which the guest's end says that it sends no more.
const SEND: u32 = 2;

/// The port at which the other side listens, and one at which nobody does.
const LISTENER: u32 = 80;
const NOBODY: u32 = 81;
/// The room that the guest says it has, in bytes: less than the other side sends.
const ROOM: usize = 100;
const MORE: usize = 350;

/// A packet of the host's.
struct Packet {
    op: u16,
    /// Bytes of payload.
    length: usize,
    payload: [u8; ROOM],
}

/// A connection, from a port of the guest to a port of the host.
struct Connection {
    device: Device,
    rx: Queue,
    tx: Queue,
    ports: [u32; 2],
    /// How many bytes have come, and how many of them the host was told of.
    received: usize,
    told: usize,
}

impl Connection {
    fn cid(&self) -> u64 {
        u64::from(self.device.read(CONFIG)) | u64::from(self.device.read(CONFIG + 4)) << 32
    }

    /// Sends a packet; false: the device does not take it.
    #[inline(never)]
    fn send(&self, op: u16, flags: u32, payload: &[u8]) -> bool {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(&self.cid().to_le_bytes());
        header[8..16].copy_from_slice(&HOST.to_le_bytes());
        let words = [
            (16, self.ports[0]),
            (20, self.ports[1]),
            (24, payload.len() as u32),
            (28, u32::from(STREAM) | u32::from(op) << 16),
            (32, flags),
            (36, ROOM as u32),
            (40, self.told as u32),
        ];
        for (at, word) in words {
            header[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        match payload.is_empty() {
            true => self.tx.request(&[read_by_device(&header)]),
            false => self.tx.request(&[read_by_device(&header), read_by_device(payload)]),
        }
        .is_some()
    }

    /// Receives the next packet; None: no packet comes, or it is not for this connection.
    #[inline(never)]
    fn receive(&mut self) -> Option<Packet> {
        let mut bytes = [0; HEADER + ROOM];
        let length = self.rx.request(&[written_by_device(&mut bytes)])? as usize;
        let bytes = black_box(&bytes);
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let is_ours =
            [word(0), word(4), word(16), word(20)] == [HOST as u32, 0, self.ports[1], self.ports[0]];
        if !is_ours || word(24) as usize + HEADER != length {
            return None;
        }
        let mut payload = [0; ROOM];
        payload.copy_from_slice(&bytes[HEADER..]);
        let length = length - HEADER;
        self.received += length;
        Some(Packet { op: (word(28) >> 16) as u16, length, payload })
    }

    /// The operation of the next packet; 0: there is none.
    fn next_op(&mut self) -> u16 {
        self.receive().map_or(0, |packet| packet.op)
    }

    /// Connects; false: the host does not answer so.
    fn connect(&mut self) -> bool {
        self.send(REQUEST, 0, &[]) && self.next_op() == RESPONSE
    }

    /// Says `hello`, and hears it again.
    fn is_echoed(&mut self) -> bool {
        self.send(RW, 0, b"hello")
            && self.receive().is_some_and(|packet| {
                packet.op == RW && packet.length == 5 && packet.payload[..5] == *b"hello"
            })
    }

    /// Receives what the other side sends more, never more than there is room for. The host is told of what has come
    /// when it asks.
    fn receives_within_its_room(&mut self) -> bool {
        let (begin, end) = (self.received, self.received + MORE);
        if !self.send(RW, 0, b"more!") {
            return false;
        }
        while self.received < end {
            let before = self.received;
            let Some(packet) = self.receive() else { return false };
            let is_right = match packet.op {
                RW => packet.payload[..packet.length]
                    .iter()
                    .enumerate()
                    .all(|(index, byte)| *byte == (before - begin + index) as u8),
                // A host asks for more credit only when it has used up what it had.
                CREDIT_REQUEST => self.received - self.told == ROOM,
                _ => false,
            };
            if !is_right || self.received - self.told > ROOM {
                return false;
            }
            if packet.op == CREDIT_REQUEST {
                self.told = self.received;
                if !self.send(CREDIT_UPDATE, 0, &[]) {
                    return false;
                }
            }
        }
        self.told = self.received;
        self.send(CREDIT_UPDATE, 0, &[])
    }

    /// Says that no more comes, hears the rest, and the end.
    fn ends_one_way_after_the_other(&mut self) -> bool {
        if !self.send(SHUTDOWN, SEND, &[]) {
            return false;
        }
        let rest = self.receive();
        if !rest.is_some_and(|packet| packet.op == RW && packet.payload[..packet.length] == *b"rest") {
            return false;
        }
        matches!(self.next_op(), SHUTDOWN | RST)
    }
}

/// The device, started: a connection to be, and the queue of events.
fn start(host_port: u32) -> Option<(Connection, Queue)> {
    let device = Device::find(19)?;
    let [rx, tx, events] = device.start::<3>()?;
    let ports = [1024, host_port];
    Some((Connection { device, rx, tx, ports, received: 0, told: 0 }, events))
}

/// Says what was not found; always false.
fn missing(what: &str) -> bool {
    say!("expected ", what, ", found something else");
    false
}

/// A guest that connects where nobody listens is refused. Where this case was asked for, bytes go both ways, each way
/// has its end, and the host sends no more than the guest has room for.
pub fn vsock(_: &Machine, words: &Words) -> bool {
    let Some((mut connection, _)) = start(NOBODY) else {
        return missing("a socket device that starts");
    };
    if !connection.send(REQUEST, 0, &[]) || connection.next_op() != RST {
        return missing("to be refused where nobody listens");
    }
    if words.value("case").is_none() {
        say!("ok (CID ", connection.cid(), ")");
        return true;
    }
    connection.ports = [1025, LISTENER];
    type Step = fn(&mut Connection) -> bool;
    let steps: [(&str, Step); 4] = [
        ("to be connected", Connection::connect),
        ("what was said to come back", Connection::is_echoed),
        ("no more than there is room for", Connection::receives_within_its_room),
        ("one end, and then the other one", Connection::ends_one_way_after_the_other),
    ];
    for (what, step) in steps {
        if !step(&mut connection) {
            return missing(what);
        }
    }
    say!("ok (CID ", connection.cid(), ", ", connection.received, " bytes in)");
    true
}

/// A guest that is restored meanwhile is told so, its connection is gone, and another one can be made.
pub fn restored(_: &Machine, _: &Words) -> bool {
    let Some((mut connection, events)) = start(LISTENER) else {
        return missing("a socket device that starts");
    };
    if !connection.connect() || !connection.is_echoed() {
        return missing("what was said to come back");
    }
    // The word is a line of its own, for a test that reads lines.
    say!("connected\n");
    let mut event = [0xff_u8; 4];
    let count = events.request(&[written_by_device(&mut event)]);
    // VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
    if count != Some(4) || *black_box(&event) != [0; 4] {
        return missing("an event that tells of a reset");
    }
    // A guest has taken the event in only when it gives the buffer back.
    events.offer_chain(&[written_by_device(&mut event)]);
    if !connection.send(RW, 0, b"hello") || connection.next_op() != RST {
        return missing("the connection to be gone");
    }
    (connection.ports[0], connection.received, connection.told) = (1026, 0, 0);
    if !connection.connect() || !connection.is_echoed() {
        return missing("another connection");
    }
    say!("told, and connected again");
    true
}
