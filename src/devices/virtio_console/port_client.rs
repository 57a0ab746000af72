//! The host's end of a port: the socket that programs connect to, and the one of them that is let in.

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use super::control::Talk;
use crate::descriptors::Named;
use crate::error::Result;
use crate::host::listener::Listener;
use crate::log;
use crate::poll::Interest;
use crate::sys::vectors::Gather;
use crate::sys::{descriptor, network};
use crate::virtio::buffers::Buffers;
use crate::virtio::{Desk, Watched};

/// Events which tell that whoever had the other end has closed it, both ways.
const GONE: Interest = Interest::HANG_UP.union(Interest::ERROR);
/// Events that are waited for: each change is told once.
const ALL: Interest =
    Interest::IN.union(Interest::OUT).union(Interest::READ_HANG_UP).union(Interest::EDGE_TRIGGERED);

/// All that a port has of the host, and how far it is with its guest: at home with the device, or with its worker.
pub struct Port {
    pub name: String,
    pub listener: Listener,
    pub client: Option<Client>,
    pub talk: Talk,
    /// How many bytes of the first request that the guest sends are gone already.
    pub gone: u64,
}

impl Port {
    /// A port that nobody is at.
    pub fn new(name: String, listener: Listener) -> Self {
        Self { name, listener, client: None, talk: Talk::default(), gone: 0 }
    }

    /// Lets the next program in, if nobody is there and the guest knows that the last one has left. The others wait: the
    /// kernel keeps a limited number of them. Returns whether there is one.
    pub fn accept(&mut self, desk: &Desk, token: u32) -> Result<bool> {
        if self.client.is_some() || self.talk.told_open {
            return Ok(false);
        }
        match network::accept(&self.listener.as_raw_fd()) {
            Ok(stream) => {
                let stream = Named::new("port, a program", stream);
                self.client = Some(Client::new(Stream::Resting(stream)));
                self.watch(desk, token)?;
                Ok(self.client.is_some())
            }
            // Nobody waits, or the host has no descriptor left: the next one to come is an event again.
            Err(_) => Ok(false),
        }
    }

    /// Waits for what comes by the stream of the program that is there. One that cannot be waited for is refused.
    pub fn watch(&mut self, desk: &Desk, token: u32) -> Result<()> {
        let Some(Client { stream: Stream::Resting(stream), .. }) = self.client.take_if(|it| it.is_resting())
        else {
            return Ok(());
        };
        match desk.watch(stream, ALL, token) {
            Ok(stream) => self.client = Some(Client::new(Stream::Watched(stream))),
            Err(error) => {
                log::guest_debug(format_args!("port `{}`: a program is refused: {error}", self.name))
            }
        }
        Ok(())
    }

    /// The worker stops: nothing is on its loop any more.
    pub fn rest(&mut self) {
        if let Some(client) = self.client.take() {
            self.client = Some(client.rest());
        }
    }

    /// Lets the program go that has left and from which no more is to be read.
    pub fn let_go(&mut self) {
        if self.client.as_mut().is_some_and(Client::is_over) {
            self.client = None;
        }
    }
}

/// The stream of a program.
pub enum Stream {
    /// A stream that no loop waits for.
    Resting(Named<UnixStream>),
    /// A stream that a loop waits for.
    Watched(Watched<Named<UnixStream>>),
}

/// A program that is at the port.
pub struct Client {
    stream: Stream,
    /// There may be something to read.
    is_readable: bool,
    /// There may be room for what the guest sends.
    is_writable: bool,
    /// The program sends no more.
    has_ended: bool,
    /// The program has closed its end.
    is_gone: bool,
}

impl Client {
    /// A program that nothing is known of yet.
    fn new(stream: Stream) -> Self {
        Self { stream, is_readable: true, is_writable: true, has_ended: false, is_gone: false }
    }

    fn is_resting(&self) -> bool {
        matches!(self.stream, Stream::Resting(_))
    }

    fn rest(self) -> Self {
        let stream = match self.stream {
            Stream::Watched(stream) => Stream::Resting(stream.into_inner()),
            resting => resting,
        };
        Self { stream, ..self }
    }

    fn stream(&self) -> &UnixStream {
        match &self.stream {
            Stream::Resting(stream) => stream,
            Stream::Watched(stream) => stream,
        }
    }

    /// Something has happened to the stream. That it is gone may have been told of the program before.
    pub fn note(&mut self, ready: Interest) {
        (self.is_readable, self.is_writable) = (true, true);
        if ready.intersects(GONE) {
            self.is_gone = descriptor::poll(self.stream(), 0, 0) & (libc::POLLHUP | libc::POLLERR) != 0;
        }
    }

    /// Says whether there may be something to read.
    pub fn may_read(&self) -> bool {
        self.is_readable && !self.has_ended
    }

    /// Reads into `buffers`, which are not empty, and returns how many bytes; None: there are none now, or none any more.
    pub fn read(&mut self, buffers: &Buffers) -> Option<usize> {
        while self.may_read() {
            match buffers.vectors().read(self.stream()) {
                Ok(0) => self.has_ended = true,
                Ok(count) => {
                    buffers.mark_dirty(count);
                    return Some(count);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.is_readable = false,
                Err(_) => (self.is_gone, self.has_ended) = (true, true),
            }
        }
        None
    }

    /// Writes what is in the list, as far as there is room, and returns how many bytes. A program that takes no more has
    /// no room.
    pub fn write(&mut self, list: &mut Gather<'_>) -> usize {
        while self.is_writable && !list.is_empty() {
            match list.send(self.stream()) {
                Ok((count, _)) => return count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.is_writable = false,
            }
        }
        0
    }

    /// Says whether the program has left, and all that it sent was read: bytes that a guest has not read yet keep the
    /// program here.
    fn is_over(&mut self) -> bool {
        if self.is_gone && !self.has_ended {
            let peeked = network::receive(self.stream(), &mut [0], libc::MSG_PEEK | libc::MSG_DONTWAIT);
            self.has_ended = match peeked {
                Ok(count) => count == 0,
                Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
            };
        }
        self.is_gone && self.has_ended
    }
}

/// Where the port is while no worker has it.
pub type Home = Arc<Mutex<Option<Box<Port>>>>;
