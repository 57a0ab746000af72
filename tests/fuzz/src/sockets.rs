//! Connections between programs of the host and of a guest that are both up to the bytes: packets of any kind,
//! clients that say anything, connect and leave, pauses and moves. Whatever they are, every packet is taken, the
//! guest is sent no byte beyond the room that it said it has and packets of none but its own address, nothing is
//! left open, and the device works afterwards.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use arbitrary::{Result, Unstructured};

use crate::driver::{F_EVENT_IDX, Guest, TransportKind, WRITE};
use crate::host::{self, Host, RX, TX};
use crate::vsock::{CID, EVENT, HEADER, HOST, Packet, REQUEST, RST, RW};

const STEPS_MAX: usize = 64;
const CLIENTS_MAX: usize = 8;
/// The guest's ports.
const PORTS: u32 = 4;
/// Where a program of the host listens.
const LISTENER: u32 = 80;
const ROOM: u32 = 1000;

pub fn run(bytes: &[u8]) {
    host::with(|host| {
        let path = format!("{}_{LISTENER}", host::socket().display());
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let device = host.devices.iter().find(|device| device.kind().section == "vsock").unwrap();
        let guest = host.guest(TransportKind::Mmio, device);
        let mut world = World {
            guest: Some(guest),
            listener,
            clients: Vec::new(),
            rooms: HashMap::new(),
            known: Vec::new(),
        };
        world.start();
        let mut bytes = Unstructured::new(bytes);
        for _ in 0..STEPS_MAX {
            if bytes.is_empty() || world.step(host, device, &mut bytes).is_err() {
                break;
            }
        }
        world.clients.clear();
        let mut guest = world.guest.take().unwrap();
        guest.turn();
        guest.start(0);
        host.exercise(device, &mut guest);
        std::fs::remove_file(&path).unwrap();
    });
}

struct World {
    /// There but while it is built anew.
    guest: Option<Guest>,
    listener: UnixListener,
    clients: Vec<UnixStream>,
    /// Receive buffers by the heads of their chains.
    rooms: HashMap<u16, (u64, u32)>,
    /// Ports of the host that the guest has heard of.
    known: Vec<u32>,
}

impl World {
    fn guest(&mut self) -> &mut Guest {
        self.guest.as_mut().expect("it is there between steps")
    }

    fn start(&mut self) {
        self.guest().start(F_EVENT_IDX);
        self.rooms.clear();
        for length in [HEADER + 1, 200, 200, 4096] {
            let room = self.guest().allocate(&vec![0; length]);
            self.offer(room);
        }
        for _ in 0..2 {
            let event = self.guest().allocate(&[0; 4]);
            self.guest().offer(EVENT, &[(event, WRITE)]);
        }
        self.settle();
    }

    fn offer(&mut self, room: (u64, u32)) {
        let head = self.guest().offer(RX, &[(room, WRITE)]);
        self.rooms.insert(head, room);
    }

    /// Lets the device do what it can, and takes what it sends.
    fn settle(&mut self) {
        for queue in [RX, TX, EVENT] {
            self.guest().kick(queue);
        }
        loop {
            self.guest().turn();
            if self.guest().has_used(EVENT) {
                self.guest().next_used(EVENT);
            }
            if !self.guest().has_used(RX) {
                return;
            }
            let (head, length) = self.guest().next_used(RX);
            let room = self.rooms.remove(&head).expect("it was given");
            let packet = Packet::parse(&self.guest().bytes((room.0, length)));
            assert_eq!((packet.from, packet.to), (HOST, CID));
            assert!(length as usize == HEADER + packet.length as usize && packet.length <= ROOM);
            assert!((packet.length > 0) == (packet.op == RW), "{packet:?}");
            if packet.op == REQUEST {
                self.known.push(packet.from_port);
            }
            self.offer(room);
            self.guest().kick(RX);
        }
    }

    fn step(
        &mut self,
        host: &Host,
        device: &alula::devices::kind::ConfiguredDevice,
        bytes: &mut Unstructured<'_>,
    ) -> Result<()> {
        match bytes.arbitrary::<u8>()? % 16 {
            0 | 1 if self.clients.len() < CLIENTS_MAX => {
                let mut client = UnixStream::connect(host::socket()).unwrap();
                client.set_nonblocking(true).unwrap();
                let text = match bytes.arbitrary::<u8>()? {
                    0..0xc0 => format!("CONNECT {}\n", bytes.arbitrary::<u32>()? % PORTS).into_bytes(),
                    count => bytes.bytes(usize::from(count - 0xc0).min(bytes.len()))?.to_vec(),
                };
                let _ = client.write_all(&text);
                self.clients.push(client);
            }
            2 => self.clients.extend(self.listener.accept().map(|(stream, _)| stream)),
            3 | 4 => {
                let count = usize::from(bytes.arbitrary::<u16>()? % 5000);
                if let Some(mut client) = self.client(bytes)? {
                    let _ = client.write(&vec![b'c'; count]);
                }
            }
            5 => {
                if let Some(mut client) = self.client(bytes)? {
                    let _ = client.set_nonblocking(true);
                    let _ = client.read(&mut [0; 3000]);
                }
            }
            6 => {
                let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both]
                    [usize::from(bytes.arbitrary::<u8>()? % 3)];
                if let Some(client) = self.client(bytes)? {
                    let _ = client.shutdown(how);
                }
            }
            7 => drop(self.clients.pop()),
            8 => {
                self.guest().pause();
                self.guest().resume();
            }
            9 if bytes.ratio(1, 4)? => self.move_on(host, device),
            9 => {
                let event = self.guest().allocate(&[0; 4]);
                let (available, size) = self.guest().available(EVENT);
                if available.wrapping_sub(self.guest().used_index(EVENT)) < size {
                    self.guest().offer(EVENT, &[(event, WRITE)]);
                }
            }
            _ => self.send(bytes)?,
        }
        self.settle();
        Ok(())
    }

    fn client(&self, bytes: &mut Unstructured<'_>) -> Result<Option<&UnixStream>> {
        let choice = usize::from(bytes.arbitrary::<u8>()?);
        Ok(self.clients.get(choice % self.clients.len().max(1)))
    }

    /// Another machine goes on from the state of this one.
    fn move_on(&mut self, host: &Host, device: &alula::devices::kind::ConfiguredDevice) {
        self.guest().pause();
        let old = self.guest.take().expect("it is there between steps");
        let (state, notes) = (old.save(), old.notes.clone());
        let mut guest = host.guest_anew(device, old);
        guest.notes = notes;
        guest.pause();
        guest.restore(&state).unwrap();
        assert!(guest.save() == state, "what was restored is not what was saved");
        guest.resume();
        self.guest = Some(guest);
    }

    /// Sends packets in one kick.
    fn send(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        // The driver's memory is used again and again.
        let before = self.guest().notes.allocated;
        for _ in 0..=bytes.arbitrary::<u8>()? % 4 {
            let host_port = match bytes.arbitrary::<u8>()? {
                0..0xa0 if !self.known.is_empty() => {
                    let choice = usize::from(bytes.arbitrary::<u8>()?);
                    self.known[self.known.len() - 1 - choice % self.known.len()]
                }
                0..0xe0 => LISTENER,
                other => other.into(),
            };
            let op = match bytes.arbitrary::<u8>()? {
                choice @ 0..0xf0 => u16::from(choice % 8),
                _ => bytes.arbitrary()?,
            };
            let count = usize::from(bytes.arbitrary::<u16>()? % 3000);
            let mut packet = Packet::new(op, bytes.arbitrary::<u32>()? % PORTS, host_port);
            (packet.length, packet.room) = (if op == RW { count as u32 } else { 0 }, ROOM);
            packet.flags = u32::from(bytes.arbitrary::<u8>()? % 4);
            match bytes.arbitrary::<u8>()? {
                0 => packet.length = bytes.arbitrary()?,
                1 => packet.kind = bytes.arbitrary()?,
                2 => packet.from = bytes.arbitrary()?,
                3 => packet.to = bytes.arbitrary()?,
                4 => packet.forwarded = bytes.arbitrary()?,
                5 => packet.flags = bytes.arbitrary()?,
                _ => {}
            }
            let out = self.guest().allocate(&[packet.bytes(), vec![b'g'; count]].concat());
            self.guest().offer(TX, &[(out, 0)]);
            if op == RST {
                self.known.retain(|port| *port != host_port);
            }
        }
        let count = self.guest().available(TX).0;
        self.guest().kick(TX);
        self.guest().wait_for(|guest| guest.used_index(TX) == count);
        while self.guest().has_used(TX) {
            self.guest().next_used(TX);
        }
        self.guest().notes.allocated = before;
        Ok(())
    }
}
