//! The console in use: what is typed and said, terminals of any size, and readers that do not read.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::channel;

use alula::host::console::{Output, StdoutWriter};
use alula::host::line::{TYPED_MAX, UserLine};
use alula::poll;
use alula::sink::has_room;
use alula::sys::descriptor;
use common::terminal::Terminal as Pty;

use super::*;

/// A screen in memory.
#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Screen {
    fn text(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The terminal of the console that was opened last.
#[derive(Default)]
pub struct Terminal {
    screen: Screen,
    line: Mutex<Option<Arc<UserLine>>>,
}

/// The things that were offered: the round, the room for what is received, and where a program comes to the port, if it is one.
pub struct Offered {
    pub round: u8,
    pub room: (u64, u32),
    pub port: Option<PathBuf>,
}

impl Terminal {
    pub fn connect(&self, device: &dyn VirtioDevice) {
        if let Some(line) = device.line() {
            let output = || Ok(Output::other(Box::new(self.screen.clone())));
            line.connect(Arc::new(poll::event("room").unwrap()), output).unwrap();
            *self.line.lock().unwrap() = Some(line);
        }
    }

    pub fn check(&self, guest: &mut Guest, offered: &Offered) {
        let Offered { round, room, port } = offered;
        let (round, room) = (*round, *room);
        if let Some(port) = port {
            return ports::check(guest, (round, room), port);
        }
        guest.next_used(TX);
        assert_eq!(self.screen.text().last_chunk(), Some(&[round; 5]));
        let typed = [round, 1, 2];
        assert_eq!(self.line.lock().unwrap().as_ref().unwrap().type_bytes(&typed), 3);
        assert_eq!(guest.next_used(RX).1, 3);
        assert_eq!(guest.bytes((room.0, 3)), typed);
    }
}

/// Offers what the guest says, and room for what is typed.
pub fn offer(guest: &mut Guest, round: u8) -> Offered {
    let (said, room) = (guest.allocate(&[round; 5]), guest.allocate(&[0; 16]));
    guest.offer(TX, &[(said, 0)]);
    guest.offer(RX, &[(room, WRITE)]);
    Offered { round, room, port: None }
}

/// A guest with one device, which works when it is let, and the device's line, if it is a console.
pub fn guest_of(section: &str, body: &str, kind: TransportKind) -> (Guest, Option<Arc<UserLine>>) {
    let device = KINDS.iter().find(|kind| kind.section == section).unwrap().parse(body.as_bytes()).unwrap();
    let opened = device.open("it", &mut host::Host::default()).unwrap();
    let line = opened.line();
    let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
    (Guest::by_hand(kind, opened, memory), line)
}

fn console(kind: TransportKind, output: Output) -> (Guest, Arc<UserLine>) {
    let (guest, line) = guest_of("console", "{}", kind);
    let line = line.unwrap();
    line.connect(Arc::new(poll::event("room").unwrap()), || Ok(output)).unwrap();
    (guest, line)
}

fn on_screen(kind: TransportKind) -> (Guest, Arc<UserLine>, Screen) {
    let screen = Screen::default();
    let (guest, line) = console(kind, Output::other(Box::new(screen.clone())));
    (guest, line, screen)
}

pub fn counted(guest: &Guest, name: &str) -> u64 {
    guest.transport.lock().unwrap().metrics(View::Total)[name].as_u64().unwrap()
}

#[test]
fn a_terminal_of_another_size_is_told_of() {
    let size = |guest: &mut Guest| {
        let mut bytes = [0; 12];
        guest.config(0, &mut bytes);
        assert_eq!(bytes[4..], [1, 0, 0, 0, 0, 0, 0, 0]);
        [bytes[0], bytes[1], bytes[2], bytes[3]]
    };
    for kind in TRANSPORTS {
        let (mut guest, line, _) = on_screen(kind);
        line.set_size((24, 80));
        let features = guest.features();
        guest.start(features);
        guest.turn();
        // Linux' driver looks at the size when it is told of a change alone.
        assert_eq!((size(&mut guest), guest.interrupts()), ([80, 0, 24, 0], 1));
        line.set_size((300, 1));
        guest.turn();
        assert_eq!((size(&mut guest), guest.interrupts()), ([1, 0, 44, 1], 1));
        // Where the guest goes on, the terminal may be another one.
        let suspended = guest.suspend();
        let (mut guest, line, _) = on_screen(kind);
        guest.take_over(&suspended).unwrap();
        guest.interrupts();
        line.set_size((24, 80));
        guest.resume();
        guest.turn();
        assert!(guest.interrupts() > 2, "two are for the queues");
        // A driver that does not want to know is not told.
        guest.start(0);
        guest.turn();
        guest.interrupts();
        line.set_size((25, 80));
        guest.turn();
        assert_eq!(guest.interrupts(), 0);
    }
}

#[test]
fn what_is_typed_waits_for_the_guest_wherever_it_goes_on() {
    let (mut guest, line, _) = on_screen(TransportKind::Pci);
    let all: Vec<u8> = (0..2 * TYPED_MAX).map(|at| at as u8 ^ (at >> 8) as u8).collect();
    assert_eq!(line.type_bytes(&all), TYPED_MAX, "a guest that never reads makes it no longer");
    guest.start(0);
    guest.turn();
    let room = guest.allocate(&[0; 1000]);
    let received = |guest: &mut Guest| {
        guest.offer(RX, &[(room, WRITE)]);
        guest.kick(RX);
        let count = guest.next_used(RX).1;
        guest.bytes((room.0, count))
    };
    // A buffer without room is given back empty.
    guest.request(RX, &[((room.0, 0), WRITE)]);
    assert!(received(&mut guest) == all[..1000]);
    let suspended = guest.suspend();
    let (mut guest, line, _) = on_screen(TransportKind::Pci);
    guest.take_over(&suspended).unwrap();
    guest.resume();
    assert_eq!(line.type_bytes(&all[TYPED_MAX..]), 1000);
    for at in 1..5 {
        assert!(received(&mut guest) == all[1000 * at..1000 * (at + 1)], "{at}");
    }
    // Keys that were typed for a guest that is gone are gone with it; a reset by a driver leaves them.
    guest.reset();
    assert_eq!(line.typed().len(), 96);
    drop(guest.transport.lock().unwrap().take_device());
    assert!(line.typed().is_empty());
}

#[test]
fn a_request_of_any_length_comes_out_once_in_shares() {
    for stops in [false, true] {
        let screen = Screen::default();
        let new = || console(TransportKind::Mmio, Output::other(Box::new(screen.clone())));
        let (mut guest, _) = new();
        guest.start(0);
        guest.turn();
        // 4 MiB in one request, most of it the same bytes.
        let text: Vec<u8> = (0..1 << 16).map(|at: u32| (at % 251) as u8).collect();
        let piece = guest.allocate(&text);
        let table = guest.allocate_table(&[(piece, 0); 64]);
        guest.offer(TX, &[(table, INDIRECT)]);
        guest.kick(TX);
        let mut turns = 0;
        while guest.used_index(TX) == 0 {
            let before = screen.text().len();
            assert!(guest.turn_once());
            assert!(screen.text().len() - before <= 1 << 16, "a turn is longer");
            turns += 1;
            if stops && turns % 10 == 5 {
                let suspended = guest.suspend();
                guest = new().0;
                guest.take_over(&suspended).unwrap();
                guest.resume();
            }
        }
        let text = text.repeat(64);
        assert!(screen.text() == text, "{} of {} bytes", screen.text().len(), text.len());
        assert!(turns >= 64);
    }
}

#[test]
fn a_screen_that_nobody_reads_costs_a_moment_and_then_text() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let pipe = 64 << 10;
    (&writer).write_all(&vec![b'-'; pipe]).unwrap();
    let writer = StdoutWriter::patient(OwnedFd::from(writer));
    let (mut guest, _line) = console(TransportKind::Mmio, Output::Stdout(writer));
    guest.start(0);
    guest.turn();
    let text = guest.allocate(&[b'a'; 1024]);
    // The pipe is full: the first request is kept, and the next one waits a moment for a reader.
    guest.request(TX, &[(text, 0)]);
    guest.offer(TX, &[(text, 0)]);
    guest.kick(TX);
    (0..10).for_each(|_| _ = guest.turn_once());
    assert_eq!(guest.used_index(TX), 1);
    guest.next_used(TX);
    // Then there is no more waiting, and what there is no room for is lost.
    for _ in 2..100 {
        guest.request(TX, &[(text, 0)]);
    }
    assert_eq!(counted(&guest, "tx_bytes_count"), 100 << 10);
    assert_eq!(counted(&guest, "missed_write_count"), 36 << 10);
    // A reader gets all that was kept, and has its time again.
    let mut read = vec![0; pipe];
    reader.read_exact(&mut read).unwrap();
    guest.turn();
    reader.read_exact(&mut read).unwrap();
    assert!(read.iter().all(|byte| *byte == b'a'));
    guest.turn();
    guest.request(TX, &[(text, 0)]);
    reader.read_exact(&mut read[..1024]).unwrap();
    assert_eq!(counted(&guest, "missed_write_count"), 36 << 10);
}

#[test]
fn a_terminal_with_little_room_holds_nobody_up() {
    let Pty { mut user, monitor } = Pty::new();
    // The terminal is full, and then its user reads a little.
    let flags = descriptor::status(&monitor).unwrap();
    descriptor::set_status(&monitor, flags | libc::O_NONBLOCK).unwrap();
    let monitor = File::from(monitor);
    while (&monitor).write(&[b'-'; 100]).is_ok() {}
    descriptor::set_status(&monitor, flags).unwrap();
    while !has_room(&monitor, 0) {
        user.read_exact(&mut [0; 10]).unwrap();
    }
    // As in a jail, it cannot be opened anew, and blocks who writes more than there is room for.
    let mut output = StdoutWriter::patient(monitor.into());
    let (sender, written) = channel();
    let writer = std::thread::spawn(move || {
        sender.send(output.write(&[b'a'; 60_000]).unwrap()).unwrap();
        drop(output);
    });
    assert_eq!(written.recv_timeout(common::PATIENCE), Ok(60_000), "it waits for its reader");
    // The rest comes once the user reads.
    let mut rest = Vec::new();
    while rest.iter().filter(|byte| **byte == b'a').count() < 60_000 {
        let mut some = [0; 4096];
        let count = user.read(&mut some).unwrap();
        rest.extend_from_slice(&some[..count]);
    }
    writer.join().unwrap();
}
