//! One connection between a program of the host and one of the guest: what is known of it, and the words by
//! which a program of the host asks for one.

use std::ops::Deref;
use std::os::unix::net::UnixStream;

use super::backlog::Backlog;
use super::flow::Flow;
use super::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use crate::descriptors::Named;
use crate::error::Result;
use crate::poll::Interest;
use crate::virtio::{Desk, Watched};

/// The longest line by which a program of the host asks for a port: more would have to be kept while it comes.
pub const GREETING_MAX: usize = 32;

/// What is waited for by every stream.
const WANTED: Interest = Interest::IN.union(Interest::READ_HANG_UP).union(Interest::EDGE_TRIGGERED);

/// The two ports that tell a connection from all others.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct Key {
    /// The host's.
    pub host_port: u32,
    /// The guest's.
    pub guest_port: u32,
}

/// How far a connection is.
pub enum Phase {
    /// The program of the host has not yet said which port it wants; so much it has said.
    Greeting {
        /// What it has said.
        text: [u8; GREETING_MAX],
        /// How many bytes of that.
        length: usize,
    },
    /// The guest is asked.
    Requested,
    /// `main` connects to the program of the host. None: that program has no room for one more client yet, and
    /// is asked again.
    Connecting(Option<crate::errands::Pending>),
    /// Bytes may go.
    Open,
    /// The guest is told that it is over, and it is forgotten.
    Reset,
}

/// The stream of a program of the host, waited for or (while the device is stopped) not.
pub enum Stream {
    /// Not waited for.
    Resting(Named<UnixStream>),
    /// Waited for.
    Watched(Watched<Named<UnixStream>>),
}

impl Stream {
    /// Waits for what comes, and for the end.
    pub fn watch(self, desk: &Desk, token: u32) -> Result<Self> {
        let stream = self.rest();
        Ok(Self::Watched(desk.watch(stream, WANTED, token)?))
    }

    /// Waits no more.
    pub fn rest(self) -> Named<UnixStream> {
        match self {
            Self::Resting(stream) => stream,
            Self::Watched(watched) => watched.into_inner(),
        }
    }

    /// Waits for room, too, or no longer.
    pub fn want_room(&mut self, is_wanted: bool) -> Result<()> {
        let room = if is_wanted { Interest::OUT } else { Interest::empty() };
        match self {
            Self::Resting(_) => Ok(()),
            Self::Watched(watched) => watched.set_interest(WANTED | room),
        }
    }
}

impl Deref for Stream {
    type Target = UnixStream;
    fn deref(&self) -> &UnixStream {
        match self {
            Self::Resting(stream) => stream,
            Self::Watched(watched) => watched,
        }
    }
}

/// What the guest is to be told of a connection, beside its bytes and its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owed {
    /// It is asked for a connection.
    pub request: bool,
    /// Its request is granted.
    pub response: bool,
    /// How much it may send.
    pub credit: bool,
}

/// What the guest hears of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Saying {
    /// A packet without bytes: its operation and flags.
    Packet(u16, u32),
    /// Bytes, if the host's program has sent any.
    Bytes,
}

/// A connection.
pub struct Connection {
    /// Its ports. Without meaning while it is greeted.
    pub key: Key,
    /// How far it is.
    pub phase: Phase,
    /// The stream of the host's program. None: there is none yet, or it is closed.
    pub stream: Option<Stream>,
    /// How much may be sent.
    pub flow: Flow,
    /// What the guest has sent and the host's program has not read.
    pub backlog: Backlog,
    /// What the guest is to be told.
    pub owed: Owed,
    /// It is among those that have something for the guest.
    pub is_queued: bool,
    /// There may be bytes to read.
    pub may_read: bool,
    /// The guest was asked for credit since it gave some last.
    pub has_asked: bool,
    /// The host sends no more: its end is read after its last bytes, and nothing tells of it again.
    pub host_is_ending: bool,
    /// No more bytes come from the host.
    pub host_ended: bool,
    /// The host takes no more bytes.
    pub host_is_deaf: bool,
    /// What the guest has said that it will not do any more: flags of SHUTDOWN.
    pub guest_shut: u32,
    /// What the host's program was told of that.
    pub passed_shut: u32,
    /// What the guest was told that the host will not do any more.
    pub told_shut: u32,
    /// The guest knows of it no more: what is kept is for the host still.
    pub is_detached: bool,
    /// The older, the smaller.
    pub serial: u64,
    /// How often the program of the host had no room for one more client.
    pub tries: u32,
}

impl Connection {
    /// A connection that begins like this.
    pub fn new(key: Key, phase: Phase, stream: Option<Stream>, serial: u64) -> Self {
        Self {
            key,
            phase,
            stream,
            flow: Flow::default(),
            backlog: Backlog::default(),
            owed: Owed::default(),
            is_queued: false,
            may_read: false,
            has_asked: false,
            host_is_ending: false,
            host_ended: false,
            host_is_deaf: false,
            guest_shut: 0,
            passed_shut: 0,
            told_shut: 0,
            is_detached: false,
            serial,
            tries: 0,
        }
    }

    /// Whether bytes may go.
    pub fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open)
    }

    /// Whether a program of the host waits for it to be open.
    pub fn is_waiting(&self) -> bool {
        matches!(self.phase, Phase::Greeting { .. } | Phase::Requested)
    }

    /// Whether the guest waits for it to be open.
    pub fn is_connecting(&self) -> bool {
        matches!(self.phase, Phase::Connecting(_))
    }

    /// Whether bytes of the host's are to be read for the guest.
    pub fn wants_to_read(&self) -> bool {
        let guest_listens = self.guest_shut & SHUTDOWN_RECEIVE == 0;
        self.is_open() && self.may_read && !self.host_ended && guest_listens && !self.is_detached
    }

    /// What the host will not do any more and the guest has not been told: all flags of the SHUTDOWN to be sent.
    pub fn shutdown(&self) -> Option<u32> {
        let send = if self.host_ended { SHUTDOWN_SEND } else { 0 };
        let receive = if self.host_is_deaf { SHUTDOWN_RECEIVE } else { 0 };
        let flags = send | receive;
        (self.is_open() && flags != self.told_shut).then_some(flags)
    }

    /// What the guest is to hear of it next, which then counts as said. None: nothing.
    pub fn say(&mut self) -> Option<Saying> {
        if self.is_detached {
            return None;
        }
        let reads = self.wants_to_read();
        let has_credit = reads && self.flow.credit() > 0;
        if matches!(self.phase, Phase::Reset) {
            return Some(Saying::Packet(op::RST, 0));
        }
        if std::mem::take(&mut self.owed.request) {
            return Some(Saying::Packet(op::REQUEST, 0));
        }
        if std::mem::take(&mut self.owed.response) {
            return Some(Saying::Packet(op::RESPONSE, 0));
        }
        if has_credit {
            return Some(Saying::Bytes);
        }
        if reads && !std::mem::replace(&mut self.has_asked, true) {
            return Some(Saying::Packet(op::CREDIT_REQUEST, 0));
        }
        if let Some(flags) = self.shutdown() {
            self.told_shut = flags;
            return Some(Saying::Packet(op::SHUTDOWN, flags));
        }
        std::mem::take(&mut self.owed.credit).then_some(Saying::Packet(op::CREDIT_UPDATE, 0))
    }

    /// Whether there is something for the guest to hear.
    pub fn has_something(&self) -> bool {
        let may_read = self.wants_to_read() && (self.flow.credit() > 0 || !self.has_asked);
        may_read || self.owed != Owed::default() || self.shutdown().is_some()
    }

    /// Whether the guest will neither send nor receive, and everything that it has sent has gone.
    pub fn is_over(&self) -> bool {
        self.guest_shut == SHUTDOWN_BOTH && self.backlog.is_empty()
    }
}

/// The port that `CONNECT <port>` asks for; the line is without its end.
pub fn port(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    let digits = digits.strip_suffix(b"\r").unwrap_or(digits);
    let is_number = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(digits).ok().filter(|_| is_number)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_asked_for_by_a_number_of_32_bits() {
        for (line, expected) in [
            ("CONNECT 52", Some(52)),
            ("CONNECT 4294967295", Some(u32::MAX)),
            ("CONNECT 00052\r", Some(52)),
            ("CONNECT 4294967296", None),
            ("CONNECT ", None),
            ("CONNECT", None),
            ("CONNECT +5", None),
            ("CONNECT -1", None),
            ("CONNECT 5 ", None),
            ("CONNECT  5", None),
            ("connect 5", None),
            ("GET / HTTP/1.1", None),
            ("", None),
        ] {
            assert_eq!(port(line.as_bytes()), expected, "{line}");
        }
    }
}
