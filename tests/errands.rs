//! What a worker has `main` do, and the descriptors that come and go while it runs.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::mpsc::{TryRecvError, channel};
use std::sync::{Arc, Mutex};

use alula::errands::Pending;
use alula::error::Result;
use alula::host::socket;
use alula::memory;
use alula::poll::Interest;
use alula::snapshot::Snapshot;
use alula::uring::Uring;
use alula::virtio::{Desk, Io, Queue, RING, Registrar, VirtioDevice, Watched, Worker};
use common::driver::{self, Guest, TransportKind};
use common::{Folder, wait_for};

const KICK: u32 = 0;
const ANSWER: u32 = 1;
const STREAM: u32 = 2;

/// A device that connects to a socket at each kick, says its greeting there, and hangs up when it is answered.
#[derive(Clone)]
struct Caller {
    path: PathBuf,
    /// By io_uring: its loop waits in the ring.
    has_ring: bool,
    /// The worker always has something else to do as well.
    is_busy: bool,
    notes: Arc<Notes>,
}

#[derive(Default)]
struct Notes {
    started: AtomicU32,
    asked: AtomicU32,
    connected: AtomicU32,
    busy_turns: AtomicU32,
    heard: Mutex<Vec<u8>>,
}

impl Snapshot for Caller {
    type State = ();
    fn save(&self) -> Result<()> {
        Ok(())
    }
    fn restore(&mut self, (): ()) -> Result<()> {
        Ok(())
    }
}

impl VirtioDevice for Caller {
    fn device_type(&self) -> u32 {
        4
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }
    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        let call = |queue| -> Box<dyn Worker> {
            let caller = self.clone();
            Box::new(Calling { caller, queue, ring: None, desk: None, pending: None, stream: None })
        };
        Ok(io.queues.into_iter().map(call).collect())
    }
}

struct Calling {
    caller: Caller,
    queue: Queue,
    ring: Option<Uring>,
    desk: Option<Desk>,
    pending: Option<Pending>,
    stream: Option<Watched<UnixStream>>,
}

impl Calling {
    fn kicked(&mut self) -> Result<()> {
        self.caller.notes.busy_turns.fetch_add(1, SeqCst);
        if self.caller.is_busy {
            self.queue.kick_again();
        }
        if self.pending.is_none() && self.stream.is_none() {
            let path = self.caller.path.clone();
            let connect = move |_: &mut alula::host::Host| Ok(socket::connect(&path)?.into());
            self.pending = Some(self.desk.as_ref().unwrap().ask(ANSWER, connect)?);
            self.caller.notes.asked.fetch_add(1, SeqCst);
        }
        Ok(())
    }

    fn answered(&mut self) -> Result<()> {
        if let Some(answer) = self.pending.as_mut().and_then(Pending::take) {
            self.pending = None;
            let stream = UnixStream::from(answer?);
            let desk = self.desk.as_ref().unwrap();
            // First for writing, then for reading.
            self.stream = Some(desk.watch(stream, Interest::OUT, STREAM)?);
            self.caller.notes.connected.fetch_add(1, SeqCst);
        }
        Ok(())
    }

    fn talk(&mut self) -> Result<()> {
        let Some(stream) = &mut self.stream else { return Ok(()) };
        let mut bytes = [0; 16];
        match stream.read(&mut bytes) {
            Ok(count) => {
                self.caller.notes.heard.lock().unwrap().extend(&bytes[..count]);
                self.stream = None;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                stream.write_all(b"hello").unwrap();
                stream.set_interest(Interest::IN)?;
            }
        }
        Ok(())
    }
}

impl Worker for Calling {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        self.caller.notes.started.fetch_add(1, SeqCst);
        self.desk = Some(registrar.desk().clone());
        match self.caller.has_ring {
            true => registrar.ring(self.ring.insert(Uring::new(4)?), &self.queue),
            false => registrar.kick(&self.queue, KICK),
        }
    }
    fn handle(&mut self, token: u32) -> Result<()> {
        match token {
            KICK => self.kicked(),
            RING => {
                while self.ring.as_mut().unwrap().next().is_some() {}
                self.kicked()
            }
            ANSWER => self.answered(),
            _ => self.talk(),
        }
    }
    fn ring(&mut self) -> Option<&mut Uring> {
        self.ring.as_mut()
    }
    fn stop(self: Box<Self>) -> Vec<Queue> {
        vec![self.queue]
    }
}

fn caller(path: &Path, has_ring: bool, is_busy: bool) -> (Caller, Arc<Notes>) {
    let notes = Arc::<Notes>::default();
    (Caller { path: path.to_owned(), has_ring, is_busy, notes: notes.clone() }, notes)
}

fn by_hand(caller: Caller) -> Guest {
    let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
    Guest::by_hand(TransportKind::Mmio, Box::new(caller), memory)
}

/// The next client, as soon as it is there; `guest` goes on meanwhile.
fn accept(listener: &UnixListener, guest: &mut Guest) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    let mut stream = None;
    guest.wait_for(|_| {
        stream = listener.accept().ok().map(|(stream, _)| stream);
        stream.is_some()
    });
    stream.unwrap()
}

#[test]
fn connections_come_and_go_while_a_worker_runs_even_busy() {
    for (has_ring, is_busy) in [(false, false), (true, false), (false, true), (true, true)] {
        let folder = Folder::new();
        let listener = UnixListener::bind(folder.path("socket")).unwrap();
        let (caller, notes) = caller(&folder.path("socket"), has_ring, is_busy);
        let mut guest = Guest::new(TransportKind::Mmio, Box::new(caller));
        guest.start(0);
        for round in 1..=20 {
            guest.kick(0);
            let mut client = accept(&listener, &mut guest);
            let mut greeting = [0; 5];
            client.set_nonblocking(false).unwrap();
            client.read_exact(&mut greeting).unwrap();
            assert_eq!(&greeting, b"hello");
            client.write_all(b"x").unwrap();
            // The worker has hung up, and no longer waits for the connection.
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
            wait_for(|| notes.heard.lock().unwrap().len() == round);
        }
        if is_busy {
            let before = notes.busy_turns.load(SeqCst);
            wait_for(|| notes.busy_turns.load(SeqCst) > before + 100);
        }
        guest.pause();
    }
}

#[test]
fn a_device_that_stops_drops_its_errands() {
    let folder = Folder::new();
    let listener = UnixListener::bind(folder.path("socket")).unwrap();
    listener.set_nonblocking(true).unwrap();
    for (answer, connected) in [("never", 1), ("before the stop", 2), ("before the loop stops it", 1)] {
        for by_reset in [false, true] {
            let (caller, notes) = caller(&folder.path("socket"), false, false);
            let mut guest = by_hand(caller);
            guest.start(0);
            while notes.asked.load(SeqCst) == 0 {
                assert!(guest.turn_once());
            }
            if answer == "before the stop" {
                assert!(guest.do_errands());
            }
            let (sender, stopped) = channel();
            match by_reset {
                true => guest.set_status(0),
                false => guest.transport.lock().unwrap().pause(sender),
            }
            if answer == "before the loop stops it" {
                assert!(guest.do_errands());
            }
            // The loop alone: nobody waits for main.
            while guest.turn_once() {}
            if !by_reset {
                assert_eq!(stopped.try_recv(), Err(TryRecvError::Disconnected));
            }
            match answer {
                "never" => assert!(guest.do_errands()),
                _ => {
                    let (mut client, _) = listener.accept().unwrap();
                    assert_eq!(client.read(&mut [0]).unwrap(), 0, "{answer}: its descriptor is closed");
                }
            }
            assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "{answer}: not done");
            match by_reset {
                true => guest.start(0),
                false => guest.resume(),
            }
            // The next worker asks anew, and has its own answer.
            let _client = accept(&listener, &mut guest);
            guest.wait_for(|_| notes.connected.load(SeqCst) == connected);
            assert_eq!((notes.started.load(SeqCst), notes.asked.load(SeqCst)), (2, 2));
        }
    }
}
