//! What is done with the programs of the host.

use std::ffi::OsString;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use super::connection::{GREETING_MAX, Key, Phase, Stream, port};
use super::mux::{FIRST_TOKEN, Mux, WAITING_MAX, spare};
use super::socket;
use crate::descriptors::Named;
use crate::error::{Context, Error, Result};
use crate::host;
use crate::log;
use crate::poll::{self, Interest};
use crate::protocol;
use crate::sys::network;

/// Clients taken in one turn; then other devices of the loop have theirs.
const CLIENTS_PER_TURN: usize = 64;
/// A program of the host that has no room for one more client is asked again after this time.
const RETRY: Duration = Duration::from_millis(20);
/// And so often; nobody in the guest waits longer than these 60 seconds.
const TRIES_MAX: u32 = 3000;
/// The token of the timer for that.
pub const TIMER: u32 = 4;

impl Mux {
    /// Takes the programs of the host that want to connect, some of them.
    pub(super) fn accept(&mut self) -> Result<()> {
        for _ in 0..CLIENTS_PER_TURN {
            match network::accept(&self.listener.as_raw_fd()) {
                Ok(stream) => self.greet(stream)?,
                Err(error)
                    if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.may_accept = false;
                    return Ok(());
                }
                Err(_) => {
                    // There is no descriptor or memory left: who waits is refused, or it would wait for ever.
                    self.spare = None;
                    // The error comes before the kernel looks whether there is anybody.
                    self.may_accept = network::accept(&self.listener.as_raw_fd()).is_ok();
                    self.spare = spare(&self.listener);
                    self.metrics.conns_refused.add(u64::from(self.may_accept));
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// A program of the host has connected, and may have said already which port it wants.
    fn greet(&mut self, stream: UnixStream) -> Result<()> {
        if self.waiting() >= WAITING_MAX
            && let Some(oldest) = self.oldest(|connection| connection.is_waiting())
        {
            self.metrics.conns_refused.add(1);
            self.kill(oldest);
        }
        let nobody = Key { host_port: 0, guest_port: 0 };
        let phase = Phase::Greeting { text: [0; GREETING_MAX], length: 0 };
        match self.add(nobody, phase, Some(Stream::Resting(Named::new("vsock connection", stream)))) {
            Some(index) => self.watch(index),
            None => Ok(()),
        }
    }

    /// Waits for what comes by the stream of a connection. What cannot be waited for is refused.
    fn watch(&mut self, index: u32) -> Result<()> {
        let Self { desk: Some(desk), .. } = self else { return Ok(()) };
        let desk = desk.clone();
        let Some(connection) = self.get(index) else { return Ok(()) };
        let Some(stream) = connection.stream.take() else { return Ok(()) };
        match stream.watch(&desk, FIRST_TOKEN + 2 * index) {
            Ok(stream) => connection.stream = Some(stream),
            Err(error) => {
                log::guest_debug(format_args!("a vsock connection is refused: {error}"));
                self.kill(index);
            }
        }
        Ok(())
    }

    /// Something has happened to the stream of a connection: there are bytes, there is room, or (`ends`) no more
    /// bytes come than there are.
    pub(super) fn ready(&mut self, index: u32, ends: bool) -> Result<()> {
        let Some(connection) = self.get(index) else { return Ok(()) };
        connection.may_read = true;
        connection.host_is_ending |= ends;
        match connection.phase {
            Phase::Greeting { .. } => self.listen(index),
            Phase::Requested => {
                if connection.stream.as_ref().is_some_and(|stream| socket::is_gone(stream)) {
                    self.kill(index);
                }
                Ok(())
            }
            Phase::Open => {
                let has_ended = connection.host_ended;
                if !connection.backlog.is_empty() {
                    self.flush(index)?;
                }
                match has_ended {
                    true => self.look_whether_gone(index),
                    false => self.queue(index),
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Reads which port a program of the host wants, and no byte beyond that line. What is no such line ends the
    /// connection.
    fn listen(&mut self, index: u32) -> Result<()> {
        let Some(connection) = self.get(index) else { return Ok(()) };
        let Phase::Greeting { text, length } = &mut connection.phase else { return Ok(()) };
        let Some(stream) = &connection.stream else { return Ok(()) };
        let line = loop {
            let there = match socket::peek(stream, &mut text[*length..]) {
                Ok(count @ 1..) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // It has left.
                Ok(0) | Err(_) => break None,
            };
            let end = text[*length..*length + there].iter().position(|byte| *byte == b'\n');
            let wanted = *length..*length + end.map_or(there, |end| end + 1);
            match (&**stream).read(&mut text[wanted.clone()]) {
                Ok(count) => *length += count,
                Err(_) => break None,
            }
            match end {
                Some(_) => break Some(&text[..*length - 1]),
                None if *length == GREETING_MAX => break None,
                None => {}
            }
        };
        match line.and_then(port) {
            Some(port) => self.ask_guest(index, port),
            None => self.kill(index),
        }
        Ok(())
    }

    /// Asks the guest for a connection to one of its ports.
    fn ask_guest(&mut self, index: u32, guest_port: u32) {
        let mut key = Key { host_port: self.next_port, guest_port };
        // There are fewer connections than ports.
        while self.find(key).is_some() {
            key.host_port = following(key.host_port);
        }
        self.next_port = following(key.host_port);
        self.name(index, key);
        self.set_phase(index, Phase::Requested);
        if let Some(connection) = self.get(index) {
            connection.owed.request = true;
            self.queue(index);
        }
    }

    /// The guest has granted what a program of the host asked for.
    pub(super) fn open_to_host(&mut self, index: u32) -> Result<()> {
        self.set_phase(index, Phase::Open);
        let Some(connection) = self.get(index) else { return Ok(()) };
        let Some(stream) = &connection.stream else { return Ok(()) };
        let line = format!("OK {}\n", connection.key.host_port);
        // Nothing was written before: there is room.
        match (&**stream).write(line.as_bytes()) {
            Ok(count) if count == line.len() => {
                // It need not have waited for the answer.
                connection.may_read = true;
                self.queue(index);
            }
            _ => self.kill(index),
        }
        Ok(())
    }

    /// Has `main` connect to the program of the host that the guest wants to reach.
    pub(super) fn connect(&mut self, index: u32) -> Result<()> {
        let Some(desk) = self.desk.clone() else { return Ok(()) };
        let Some(connection) = self.get(index) else { return Ok(()) };
        let Key { host_port: port, guest_port } = connection.key;
        connection.tries += 1;
        if connection.tries > TRIES_MAX {
            log::guest_debug(format_args!("nobody takes the guest's connection to port {port}"));
            self.kill(index);
            return Ok(());
        }
        let path = self.path_of(port);
        let work = move |host: &mut host::Host| {
            let connected = host::socket::connect(&path);
            if connected.is_err() && port == protocol::READY_PORT && protocol::is_of_root(guest_port) {
                host.note_agent();
            }
            Ok(connected?.into())
        };
        match desk.ask(FIRST_TOKEN + 2 * index + 1, work) {
            Ok(pending) => {
                self.set_phase(index, Phase::Connecting(Some(pending)));
                Ok(())
            }
            // Others are under way.
            Err(_) => self.ask_later(),
        }
    }

    fn path_of(&self, port: u32) -> PathBuf {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        path.into()
    }

    /// `main` has connected, or has not.
    pub(super) fn connected(&mut self, index: u32) -> Result<()> {
        let Some(connection) = self.get(index) else { return Ok(()) };
        let Phase::Connecting(Some(pending)) = &mut connection.phase else { return Ok(()) };
        match pending.take() {
            None => Ok(()),
            Some(Ok(stream)) => {
                let stream = Named::new("vsock connection", stream.into());
                connection.stream = Some(Stream::Resting(stream));
                connection.owed.response = true;
                self.set_phase(index, Phase::Open);
                self.queue(index);
                self.watch(index)
            }
            Some(Err(error)) if host::socket::is_busy(&error) => {
                self.set_phase(index, Phase::Connecting(None));
                self.ask_later()
            }
            Some(Err(error)) => {
                log::guest_debug(format_args!("the guest is refused a connection: {error}"));
                self.kill(index);
                Ok(())
            }
        }
    }

    /// Has the timer go off for those that are to be asked again.
    fn ask_later(&mut self) -> Result<()> {
        let timer = |error: vmm_sys_util::errno::Error| Error::host(error.to_string());
        if self.timer.is_none()
            && let Some(desk) = &self.desk
        {
            let new = poll::timer("vsock, what is due")?;
            self.timer = Some(desk.watch(new, Interest::IN | Interest::EDGE_TRIGGERED, TIMER)?);
        }
        match &mut self.timer {
            Some(it) => it.reset(RETRY, None).map_err(timer).context("set a timer"),
            None => Ok(()),
        }
    }

    /// Asks those again that had no room for one more client.
    pub(super) fn ask_again(&mut self) -> Result<()> {
        if self.connecting() == 0 {
            return Ok(());
        }
        for index in self.indices() {
            if self.get(index).is_some_and(|it| matches!(it.phase, Phase::Connecting(None))) {
                self.connect(index)?;
            }
        }
        Ok(())
    }
}

fn following(port: u32) -> u32 {
    port.checked_add(1).unwrap_or(super::mux::FIRST_PORT)
}
