//! Ports in use: who is at a port and who is not, what goes both ways, and drivers and programs that do not behave.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::consoles::{Offered, counted, guest_of};
use super::*;

/// The control queues of a port: what the guest is told, and what the guest says.
const TOLD: usize = 2;
const SAID: usize = 3;

/// Events of the messages there (virtio 1.3, 5.3.6.2).
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

const F_MULTIPORT: u64 = 2;

/// Says whether nobody looks at the buffers of this queue before a program of the host is at the port, or leaves it.
pub fn is_unseen(device: &ConfiguredDevice, queue: usize) -> bool {
    device.kind().section == "ports" && queue != SAID
}

fn message(id: u32, event: u16, value: u16) -> Vec<u8> {
    [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// Says this of a port, and waits until it was heard.
fn say(guest: &mut Guest, id: u32, event: u16, value: u16) {
    let said = guest.allocate(&message(id, event, value));
    guest.request(SAID, &[(said, 0)]);
}

/// Gives room for messages, so that there is some for as many.
fn listen(guest: &mut Guest, count: u16) {
    while guest.available(TOLD).0.wrapping_sub(guest.used_index(TOLD)) < count {
        let room = guest.allocate(&[0; 32]);
        guest.offer(TOLD, &[(room, WRITE)]);
    }
    guest.kick(TOLD);
}

/// Offers a port the same as a console, of whatever features its driver has accepted.
pub fn offer(guest: &mut Guest, round: u8, path: PathBuf) -> Offered {
    listen(guest, 4);
    for event in [PORT_READY, PORT_OPEN] {
        let said = guest.allocate(&message(0, event, 1));
        guest.offer(SAID, &[(said, 0)]);
    }
    Offered { port: Some(path), ..consoles::offer(guest, round) }
}

/// A program connects, and is given what was offered.
pub fn check(guest: &mut Guest, (round, room): (u8, (u64, u32)), path: &Path) {
    (0..2).for_each(|_| _ = guest.next_used(SAID));
    let mut program = UnixStream::connect(path).unwrap();
    program.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
    let mut said = [0; 5];
    program.read_exact(&mut said).unwrap();
    assert_eq!(said, [round; 5]);
    guest.next_used(TX);
    program.write_all(&[round, 1, 2]).unwrap();
    assert_eq!(guest.next_used(RX).1, 3);
    assert_eq!(guest.bytes((room.0, 3)), [round, 1, 2]);
}

/// A port, and programs of the host that come to it.
struct Port {
    guest: Guest,
    folder: Folder,
}

impl Port {
    fn new(kind: TransportKind) -> Self {
        Self::in_folder(kind, Folder::new())
    }

    fn in_folder(kind: TransportKind, folder: Folder) -> Self {
        let body = json!({ "id": "it", "name": "org.it", "uds_path": folder.path("it") });
        let (guest, _) = guest_of("ports", &body.to_string(), kind);
        Self { guest, folder }
    }

    /// A port whose driver knows it, and of which a program of the guest has it open.
    fn open(kind: TransportKind) -> Self {
        let mut port = Self::new(kind);
        port.guest.start(F_MULTIPORT);
        port.guest.turn();
        listen(&mut port.guest, 8);
        say(&mut port.guest, 0, DEVICE_READY, 1);
        assert_eq!(port.told(), message(0, PORT_ADD, 1));
        say(&mut port.guest, 0, PORT_READY, 1);
        assert_eq!(port.told(), [&message(0, PORT_NAME, 1)[..], b"org.it"].concat());
        say(&mut port.guest, 0, PORT_OPEN, 1);
        port
    }

    /// The next message that the guest is told.
    fn told(&mut self) -> Vec<u8> {
        // Buffers are used in their order, and each is as long.
        let (head, length) = self.guest.next_used(TOLD);
        let place = GuestAddress(Guest::parts(TOLD)[0] + 16 * u64::from(head));
        let address = self.guest.memory.memory().read_obj(place).unwrap();
        let told = self.guest.bytes((address, length));
        listen(&mut self.guest, 8);
        told
    }

    fn connect(&mut self) -> UnixStream {
        let program = UnixStream::connect(self.folder.path("it")).unwrap();
        program.set_nonblocking(true).unwrap();
        self.guest.turn();
        program
    }

    fn send(&mut self, bytes: &[u8]) {
        let bytes = self.guest.allocate(bytes);
        self.guest.offer(TX, &[(bytes, 0)]);
        self.guest.kick(TX);
        self.guest.turn();
    }

    /// The bytes that the guest receives in a buffer of this length; None: there are none.
    fn receive(&mut self, length: usize) -> Option<Vec<u8>> {
        let room = self.guest.allocate(&vec![0; length]);
        self.guest.offer(RX, &[(room, WRITE)]);
        self.guest.kick(RX);
        self.guest.turn();
        self.guest.has_used(RX).then(|| {
            let count = self.guest.next_used(RX).1;
            self.guest.bytes((room.0, count))
        })
    }
}

/// Ends a program's connection. A child that another case begins has the descriptor, too, until it executes its program,
/// so that closing it here would end the connection later.
fn leave(program: UnixStream) {
    program.shutdown(std::net::Shutdown::Both).unwrap();
}

/// All that the program can read now.
fn read_all(program: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let ended = program.read_to_end(&mut all);
    assert!(ended.is_ok() || ended.is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
    all
}

#[test]
fn programs_come_to_a_port_one_after_the_other_and_none_loses() {
    for kind in TRANSPORTS {
        let mut port = Port::open(kind);
        // Without a program, what the guest sends stays where it is.
        port.send(b"first ");
        assert_eq!(port.guest.used_index(TX), 0);
        let mut one = port.connect();
        assert_eq!(port.told(), message(0, PORT_OPEN, 1));
        port.send(b"second");
        assert_eq!((&read_all(&mut one)[..], port.guest.used_index(TX)), (&b"first second"[..], 2));
        // Another one waits, and what it says.
        let mut other = port.connect();
        other.write_all(b"of the other").unwrap();
        one.write_all(b"of the one").unwrap();
        port.guest.turn();
        assert!(!port.guest.has_used(TOLD));
        assert_eq!(port.receive(6).unwrap(), b"of the");
        leave(one);
        port.guest.turn();
        assert!(!port.guest.has_used(TOLD), "not all that it said was read");
        assert_eq!(port.receive(6).unwrap(), b" one");
        assert_eq!(port.receive(100).unwrap(), b"of the other");
        assert_eq!([port.told(), port.told()], [0, 1].map(|is_there| message(0, PORT_OPEN, is_there)));
        port.send(b"answer");
        assert_eq!(read_all(&mut other), b"answer");
        // A program that says no more still hears.
        other.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(port.receive(100), None);
        port.send(b"more");
        assert_eq!((&read_all(&mut other)[..], port.guest.has_used(TOLD)), (&b"more"[..], false));
        leave(other);
        port.guest.turn();
        assert_eq!(port.told(), message(0, PORT_OPEN, 0));
        assert_eq!(counted(&port.guest, "clients_count"), 2);
    }
}

#[test]
fn a_program_waits_until_the_guest_has_the_port_open() {
    let mut port = Port::open(TransportKind::Mmio);
    say(&mut port.guest, 0, PORT_OPEN, 0);
    let mut program = port.connect();
    assert_eq!(port.told(), message(0, PORT_OPEN, 1));
    program.write_all(b"early").unwrap();
    leave(program);
    // A driver throws away what comes for a port that nobody has open.
    assert_eq!(port.receive(100), None);
    assert!(!port.guest.has_used(TOLD), "what it said is not read yet");
    say(&mut port.guest, 0, PORT_OPEN, 1);
    port.guest.turn();
    assert_eq!(port.guest.next_used(RX).1, 5);
    port.receive(1);
    assert_eq!(port.told(), message(0, PORT_OPEN, 0));
    // Of one that says nothing, the guest learns at once.
    say(&mut port.guest, 0, PORT_OPEN, 0);
    leave(port.connect());
    port.guest.turn();
    assert_eq!([port.told(), port.told()], [1, 0].map(|is_there| message(0, PORT_OPEN, is_there)));
}

#[test]
fn a_program_that_does_not_read_holds_its_guest_back() {
    let mut port = Port::open(TransportKind::Pci);
    let one = port.connect();
    let text: Vec<u8> = (0..1 << 20).map(|at: u32| (at % 251) as u8).collect();
    port.send(&text);
    assert_eq!(port.guest.used_index(TX), 0, "all of it is kept somewhere");
    let sent = counted(&port.guest, "tx_bytes_count") as usize;
    assert!(sent > 0 && sent < text.len());
    // The bytes that the program has not taken are for the next one, also where the guest goes on elsewhere.
    leave(one);
    let Port { guest, folder } = port;
    let suspended = guest.suspend();
    let mut port = Port::in_folder(TransportKind::Pci, folder);
    port.guest.take_over(&suspended).unwrap();
    port.guest.resume();
    port.guest.turn();
    assert_eq!([port.told(), port.told()], [1, 0].map(|is_there| message(0, PORT_OPEN, is_there)));
    let mut other = port.connect();
    let mut rest = Vec::new();
    while port.guest.used_index(TX) == 0 {
        rest.extend(read_all(&mut other));
        port.guest.turn();
    }
    rest.extend(read_all(&mut other));
    assert!(rest == text[sent..], "{} of {} bytes", rest.len(), text.len() - sent);
}

#[test]
fn a_driver_that_talks_nonsense_of_ports_is_answered_or_ignored() {
    let mut port = Port::open(TransportKind::Mmio);
    for (id, event, value) in [(1, PORT_READY, 1), (u32::MAX, PORT_OPEN, 1), (0, PORT_ADD, 1), (0, 0xffff, 7)]
    {
        say(&mut port.guest, id, event, value);
    }
    let rooms = [port.guest.allocate(&[0xff; 7]), port.guest.allocate(&[0xff; 64])];
    port.guest.request(SAID, &[(rooms[0], 0)]);
    port.guest.request(SAID, &[(rooms[1], WRITE)]);
    port.guest.request(SAID, &[(rooms[1], 0)]);
    assert_eq!(counted(&port.guest, "control_fails"), 7);
    assert!(!port.guest.has_used(TOLD) && port.guest.status() & NEEDS_RESET == 0);
    // Asked for again and again, the device owes the answer once.
    for _ in 0..100 {
        let again = port.guest.allocate(&message(0, PORT_READY, 1));
        port.guest.offer(SAID, &[(again, 0)]);
        port.guest.kick(SAID);
        port.guest.next_used(SAID);
        while port.guest.has_used(TOLD) {
            assert_eq!(port.told()[8..], *b"org.it");
        }
    }
    // A driver that hears nothing gets nobody new.
    let mut port = Port::new(TransportKind::Mmio);
    port.guest.start(F_MULTIPORT);
    port.guest.turn();
    say(&mut port.guest, 0, PORT_READY, 1);
    let room = port.guest.allocate(&[0; 32]);
    (0..2).for_each(|_| _ = port.guest.offer(TOLD, &[(room, WRITE)]));
    port.guest.kick(TOLD);
    leave(port.connect());
    port.guest.turn();
    let mut next = port.connect();
    next.write_all(b"x").unwrap();
    port.guest.turn();
    assert_eq!((port.guest.used_index(TOLD), counted(&port.guest, "clients_count")), (2, 1));
    // A buffer too small for a message is the driver's fault.
    let small = port.guest.allocate(&[0; 7]);
    port.guest.offer(TOLD, &[(small, WRITE)]);
    port.guest.kick(TOLD);
    port.guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
    // After a reset, the program that waits is there.
    port.guest.start(0);
    port.guest.turn();
    assert_eq!(port.receive(10).unwrap(), b"x");
}

#[test]
fn a_ring_of_a_port_that_breaks_is_found_once_it_is_used() {
    for (queue, features) in [(RX, 0), (TX, 0), (TOLD, F_MULTIPORT)] {
        let mut port = Port::new(TransportKind::Pci);
        port.guest.start(features);
        port.guest.turn();
        let mut program = port.connect();
        program.write_all(b"x").unwrap();
        port.guest.run_away(queue, 100);
        port.guest.kick(queue);
        port.guest.turn();
        if queue == TOLD {
            assert_eq!(port.guest.status() & NEEDS_RESET, 0, "there is nothing to tell");
            say(&mut port.guest, 0, DEVICE_READY, 1);
        }
        port.guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
        // A reset brings it back, and the program is still there.
        port.guest.start(0);
        port.guest.turn();
        assert_eq!(port.receive(10).unwrap(), b"x");
        port.send(b"y");
        assert_eq!(read_all(&mut program), b"y");
    }
}
