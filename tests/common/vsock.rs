//! The guest's side of vsock connections (virtio 1.2, 5.10), packet by packet.

use std::collections::HashMap;

use super::driver::{Guest, Suspended, WRITE};

pub const RX: usize = 0;
pub const TX: usize = 1;
pub const EVENT: usize = 2;
pub const HEADER: usize = 44;
pub const HOST: u64 = 2;
pub const CID: u64 = 3;

pub const REQUEST: u16 = 1;
pub const RESPONSE: u16 = 2;
pub const RST: u16 = 3;
pub const SHUTDOWN: u16 = 4;
pub const RW: u16 = 5;
pub const CREDIT_UPDATE: u16 = 6;
pub const CREDIT_REQUEST: u16 = 7;

pub const SHUT_RECEIVE: u32 = 1;
pub const SHUT_SEND: u32 = 2;

/// The room that a guest says it has, unless it says otherwise.
pub const ROOM: u32 = 256 << 10;
/// Receive buffers, and how long each is, as Linux has them.
const ROOMS: usize = 8;
const ROOM_LENGTH: usize = 4096;
/// Packets in one kick, and how long each is at most.
const SLOTS: usize = 8;
const SLOT_LENGTH: usize = HEADER + (64 << 10);

/// A packet's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    pub from: u64,
    pub to: u64,
    pub from_port: u32,
    pub to_port: u32,
    pub length: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub room: u32,
    pub forwarded: u32,
}

impl Packet {
    /// From the guest's port to a port of the host.
    pub fn new(op: u16, guest_port: u32, host_port: u32) -> Self {
        Self {
            from: CID,
            to: HOST,
            from_port: guest_port,
            to_port: host_port,
            length: 0,
            kind: 1,
            op,
            flags: 0,
            room: ROOM,
            forwarded: 0,
        }
    }

    /// The answer to this one.
    pub fn answer(&self, op: u16) -> Self {
        Self::new(op, self.to_port, self.from_port)
    }

    pub fn bytes(&self) -> Vec<u8> {
        let [from, to] = [self.from, self.to].map(u64::to_le_bytes);
        let [from_port, to_port, length] = [self.from_port, self.to_port, self.length].map(u32::to_le_bytes);
        let [kind, op] = [self.kind, self.op].map(u16::to_le_bytes);
        let [flags, room, forwarded] = [self.flags, self.room, self.forwarded].map(u32::to_le_bytes);
        [&from[..], &to, &from_port, &to_port, &length, &kind, &op, &flags, &room, &forwarded].concat()
    }

    pub fn parse(bytes: &[u8]) -> Self {
        let u64 = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let u32 = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let u16 = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        Self {
            from: u64(0),
            to: u64(8),
            from_port: u32(16),
            to_port: u32(20),
            length: u32(24),
            kind: u16(28),
            op: u16(30),
            flags: u32(32),
            room: u32(36),
            forwarded: u32(40),
        }
    }
}

/// A driver without its guest.
pub struct Left {
    rooms: HashMap<u16, (u64, u32)>,
    slots: Vec<u64>,
    events: HashMap<u16, (u64, u32)>,
}

impl Left {
    /// The same driver, in a machine built anew.
    pub fn moved(self, guest: Guest) -> Driver {
        let Self { rooms, slots, events } = self;
        Driver { guest, rooms, slots, events }
    }
}

/// A driver that keeps its receive queue filled.
pub struct Driver {
    pub guest: Guest,
    rooms: HashMap<u16, (u64, u32)>,
    slots: Vec<u64>,
    events: HashMap<u16, (u64, u32)>,
}

impl Driver {
    /// Of a device that was not started.
    pub fn new(guest: Guest) -> Self {
        Self { guest, rooms: HashMap::new(), slots: Vec::new(), events: HashMap::new() }
    }

    /// From reset to running.
    pub fn start(&mut self, features: u64) {
        self.guest.start(features);
        self.guest.notes.allocated = 0;
        let slot = vec![0; SLOT_LENGTH];
        self.slots = (0..SLOTS).map(|_| self.guest.allocate(&slot).0).collect();
        (self.rooms, self.events) = (HashMap::new(), HashMap::new());
        for _ in 0..ROOMS {
            let room = self.guest.allocate(&[0; ROOM_LENGTH]);
            self.offer_room(room);
        }
        for _ in 0..4 {
            let event = self.guest.allocate(&[0xff; 4]);
            self.offer_event(event);
        }
        self.guest.kick(RX);
        self.guest.kick(EVENT);
    }

    pub fn offer_room(&mut self, room: (u64, u32)) {
        let head = self.guest.offer(RX, &[(room, WRITE)]);
        self.rooms.insert(head, room);
    }

    fn offer_event(&mut self, event: (u64, u32)) {
        let head = self.guest.offer(EVENT, &[(event, WRITE)]);
        self.events.insert(head, event);
    }

    /// Stops the guest for good: what is left of it, and of its driver.
    pub fn suspend(self) -> (Left, Suspended) {
        let Self { guest, rooms, slots, events } = self;
        (Left { rooms, slots, events }, guest.suspend())
    }

    /// Sends packets in one kick, and waits until they were taken.
    pub fn send_all(&mut self, packets: &[(Packet, &[u8])]) {
        for packets in packets.chunks(SLOTS) {
            for (slot, (packet, bytes)) in packets.iter().enumerate() {
                let length =
                    if packet.op == RW && packet.length == 0 { bytes.len() as u32 } else { packet.length };
                let header = Packet { length, ..*packet }.bytes();
                let place = self.slots[slot];
                let all = [&header[..], bytes].concat();
                self.write(place, &all);
                // Header and bytes apart, or not.
                let (header, rest) = ((place, HEADER as u32), (place + HEADER as u64, bytes.len() as u32));
                match (bytes.is_empty(), slot % 2) {
                    (false, 0) => _ = self.guest.offer(TX, &[(header, 0), (rest, 0)]),
                    _ => _ = self.guest.offer(TX, &[((place, all.len() as u32), 0)]),
                }
            }
            self.guest.kick(TX);
            packets.iter().for_each(|_| _ = self.guest.next_used(TX));
        }
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
        self.guest.memory.memory().write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn send(&mut self, packet: Packet, bytes: &[u8]) {
        self.send_all(&[(packet, bytes)]);
    }

    /// Whether a packet has come that nobody has looked at.
    pub fn has_received(&self) -> bool {
        self.guest.has_used(RX)
    }

    /// The next packet, as soon as it comes, and its bytes. Its buffer is given back, with or without a kick.
    pub fn receive(&mut self) -> (Packet, Vec<u8>) {
        let (head, length) = self.guest.next_used(RX);
        let room = self.rooms.remove(&head).unwrap();
        let bytes = self.guest.bytes((room.0, length));
        self.offer_room(room);
        self.guest.kick(RX);
        let packet = Packet::parse(&bytes);
        assert_eq!((packet.from, packet.to), (HOST, CID));
        assert_eq!(packet.length as usize, bytes.len() - HEADER);
        (packet, bytes[HEADER..].to_vec())
    }

    /// The next packet, which has no bytes and this operation.
    pub fn expect(&mut self, op: u16) -> Packet {
        let (packet, bytes) = self.receive();
        assert!(packet.op == op && bytes.is_empty(), "expected operation {op}, got {packet:?}");
        packet
    }

    /// The next event; false: there is none. Its buffer is given back by [`Self::give_event_back`].
    pub fn take_event(&mut self) -> Option<(u64, u32)> {
        self.guest.has_used(EVENT).then(|| {
            let (head, length) = self.guest.next_used(EVENT);
            let event = self.events.remove(&head).unwrap();
            assert_eq!((length, self.guest.bytes(event)), (4, vec![0; 4]), "it is a transport reset");
            event
        })
    }

    pub fn give_event_back(&mut self, event: (u64, u32)) {
        self.write(event.0, &[0xff; 4]);
        self.offer_event(event);
        self.guest.kick(EVENT);
    }
}
