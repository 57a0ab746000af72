//! One client of the API: what it sends, as requests, and what it is answered.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::chunks::Chunks;
use super::server::Service;
use super::{Reply, Response, http};
use crate::descriptors::Named;
use crate::history::Reader;
use crate::jobs::Ticket;
use crate::log;
use crate::poll::Interest;

/// Requests that one connection may have answered before the others get their turn.
const TURN: usize = 16;
/// How much is read at once.
const CHUNK: usize = 2048;
/// Reads of one connection before the others get their turn: a client whose request comes byte after byte,
/// and never to its end, would keep the main thread to itself.
const READS: usize = 16;

/// How a request wants its answer.
#[derive(Clone, Copy)]
struct Manner {
    /// Without a body (HEAD).
    is_head: bool,
    /// As the last one of the connection.
    closes: bool,
    /// As text, where there is one beside JSON.
    wants_text: bool,
}

/// One client.
pub struct Connection {
    pub stream: Named<UnixStream>,
    /// The events of the connection that the event loop waits for. None: the connection is not on the loop yet. What a
    /// client asks as it connects is served before that, and a client that then leaves needs no place on the loop.
    pub interest: Option<Interest>,
    input: Vec<u8>,
    pub output: Vec<u8>,
    /// Nothing more is served; when the output is out, what still comes is thrown away.
    pub ending: bool,
    /// The client hangs up when it has read this far, or was told that we have.
    shut: bool,
    /// This request's client was told to go on with its body.
    continued: bool,
    /// The body that is coming in chunks.
    chunks: Option<Chunks>,
    /// Since when the client is awaited: to send the rest of a request, or to read its answer.
    pub begun: Option<Instant>,
    /// How long the client was awaited before that, less the time in which it then had nothing under way: one
    /// that has the next request begin where the last one ends has had all this time.
    awaited: Duration,
    /// When it was last awaited.
    rested: Instant,
    /// [`Server::moves`] when it was last answered, or taken in.
    pub moved: u64,
    pub answered: u64,
    /// The job that the client waits for: until it is done nothing more is read.
    waits_for: Option<(Ticket, Manner)>,
    /// The client has said that it sends nothing more.
    is_mute: bool,
    /// The client asked for events: nothing else is served on this connection any more.
    pub reader: Option<Reader>,
}

impl Connection {
    pub fn new(stream: UnixStream, moved: u64) -> Self {
        Self {
            stream: Named::new("API client", stream),
            interest: None,
            input: Vec::new(),
            output: Vec::new(),
            ending: false,
            shut: false,
            continued: false,
            chunks: None,
            begun: None,
            awaited: Duration::ZERO,
            rested: Instant::now(),
            moved,
            answered: 0,
            waits_for: None,
            is_mute: false,
            reader: None,
        }
    }

    /// The last answer: nothing of what comes after it can be understood.
    pub fn end(&mut self, answer: Vec<u8>) {
        self.output.extend(http::last(answer));
        self.input = Vec::new();
        self.chunks = None;
        self.ending = true;
    }

    /// Answers bytes that are no request of the API with 400 and `message`, and ends the connection.
    fn refuse(&mut self, message: &str) {
        log::debug(format_args!("a client of the API was refused: {message}"));
        self.end(http::error_bytes("400", message));
    }

    /// Whether no byte of a request was read, and no answer is owed.
    pub fn is_idle(&self) -> bool {
        self.input.is_empty() && self.output.is_empty() && self.waits_for.is_none()
    }

    /// The job that the client waits for.
    pub fn waits_for(&self) -> Option<Ticket> {
        self.waits_for.map(|(ticket, _)| ticket)
    }

    /// Notes whether a part of a request waits for the rest, or an answer for its reader. A client that waits
    /// for a job has nothing to do meanwhile.
    pub fn note_unfinished(&mut self) {
        let is_served = !self.ending && self.reader.is_none() && self.waits_for.is_none();
        if !is_served || self.is_idle() {
            self.rest();
        } else if self.begun.is_none() {
            let now = Instant::now();
            self.begun = Some(now);
            self.awaited = self.awaited.saturating_sub(now.saturating_duration_since(self.rested));
        }
    }

    /// The client is not awaited any more.
    fn rest(&mut self) {
        if let Some(begun) = self.begun.take() {
            self.rested = Instant::now();
            self.awaited += self.rested.saturating_duration_since(begun);
        }
    }

    /// How long the client was awaited in all.
    pub fn awaited(&self) -> Duration {
        self.awaited + self.begun.map(|begun| begun.elapsed()).unwrap_or_default()
    }

    /// Reads, serves and writes as far as it goes without waiting; says what to wait for. None: the
    /// client is gone.
    pub fn go_on(&mut self, body_max: usize, service: &mut Service<'_>) -> Option<Interest> {
        let turn_end = self.answered + TURN as u64;
        let mut reads = 0;
        loop {
            // A client that does not read its answers is not read from.
            if !self.flush()? || self.answered == turn_end {
                return Some(Interest::OUT);
            }
            if self.ending {
                return self.discard();
            }
            if self.waits_for.is_some() {
                // It is told of all the same that the client hangs up.
                return Some(Interest::empty());
            }
            if self.reader.is_some() {
                return self.tell();
            }
            self.serve_one(body_max, service);
            if self.output.is_empty() && self.waits_for.is_none() {
                // Level-triggered: what is still there is told of again.
                if reads == READS || !self.fill()? {
                    return Some(Interest::IN);
                }
                reads += 1;
            }
        }
    }

    /// Serves the request that is in the input, if it is complete: then there is output.
    fn serve_one(&mut self, body_max: usize, service: &mut Service<'_>) {
        if self.input.is_empty() {
            return;
        }
        let mut put_together = None;
        if let Some(chunks) = &mut self.chunks {
            match chunks.advance(&mut self.input, body_max) {
                Ok(false) => return,
                Ok(true) => put_together = Some(chunks.length()),
                Err(message) => return self.refuse(&message),
            }
            self.chunks = None;
        }
        match http::parse(&self.input, body_max, put_together) {
            http::Parsed::Incomplete { expects_continue } => self.invite(expects_continue),
            http::Parsed::Chunked { head, expects_continue } => {
                self.chunks = Some(Chunks::new(head));
                self.invite(expects_continue);
                if self.output.is_empty() {
                    self.serve_one(body_max, service);
                }
            }
            http::Parsed::Bad(message) => self.refuse(&message),
            http::Parsed::Request { method, path, body, closes, wants_text } => {
                let (end, is_head) = (body.end, method == "HEAD");
                let reply = service(if is_head { "GET" } else { method }, path, &self.input[body]);
                self.input.drain(..end);
                self.continued = false;
                // The time that was measured is that of the request just served.
                self.rest();
                let manner = Manner { is_head, closes, wants_text };
                match reply {
                    Reply::Now(response) => self.answer(&response, manner),
                    Reply::Later { ticket, .. } => self.waits_for = Some((ticket, manner)),
                }
            }
        }
    }

    /// Answers the request that waits for its job; it is written when the connection goes on.
    pub fn answer_waiting(&mut self, response: &Response) {
        if let Some((_, manner)) = self.waits_for.take() {
            self.answer(response, manner);
        }
    }

    fn answer(&mut self, response: &Response, Manner { is_head, closes, wants_text }: Manner) {
        let mut bytes = http::response_bytes(response, wants_text);
        if is_head {
            bytes = http::without_body(bytes);
        }
        self.answered += 1;
        let is_stream = *response == Response::Events;
        // A stream of events says in its head that the connection ends with it.
        if closes && !is_stream || is_head && is_stream {
            return self.end(bytes);
        }
        self.output = bytes;
        self.reader = is_stream.then(Reader::default);
    }

    /// Tells a client that waits with its body to send it, once.
    fn invite(&mut self, expects_continue: bool) {
        if expects_continue && !self.continued {
            self.continued = true;
            self.output = http::continue_bytes();
        }
    }

    /// Reads some more; false: nothing is there now. None: the client is gone.
    fn fill(&mut self) -> Option<bool> {
        let mut chunk = [0; CHUNK];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    self.is_mute = true;
                    return None;
                }
                Ok(count) => {
                    self.input.extend_from_slice(&chunk[..count]);
                    return Some(true);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Some(false),
                Err(_) => return None,
            }
        }
    }

    /// Writes what is to be written; false: the client must read first. None: it is gone.
    fn flush(&mut self) -> Option<bool> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Some(false),
                Err(_) => return None,
            }
        }
        Some(true)
    }

    /// Writes events as far as the client reads; says what to wait for. None: the client is gone.
    pub fn tell(&mut self) -> Option<Interest> {
        loop {
            if !self.flush()? {
                return Some(Interest::OUT);
            }
            let lines = self.reader.as_mut().map(|reader| reader.read(CHUNK)).unwrap_or_default();
            if lines.is_empty() {
                break;
            }
            self.output = lines.into_bytes();
        }
        // A client that sends nothing more still reads. That it hangs up is told without being asked for.
        match self.is_mute {
            true => Some(Interest::empty()),
            false => self.listen().or(self.is_mute.then(Interest::empty)),
        }
    }

    /// Nothing more is expected of the client but that it hangs up.
    fn listen(&mut self) -> Option<Interest> {
        for _ in 0..TURN {
            if !self.fill()? {
                break;
            }
            self.input.clear();
        }
        Some(Interest::IN)
    }

    /// Everything is said: waits for the client to hang up, so that it can read the answer first.
    fn discard(&mut self) -> Option<Interest> {
        if !self.shut {
            self.stream.shutdown(std::net::Shutdown::Write).ok()?;
            self.shut = true;
        }
        self.listen()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_request_is_not_that_of_those_before_it() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut connection = Connection::new(ours, 0);
        let mut service = |_: &str, _: &str, _: &[u8]| Response::Done.into();
        let mut begun = None;
        for rest in ["GET /a HTTP/1.1\r\n", "\r\nGET /b HTTP/1.1\r\n", "\r\nGET /c HTTP/1.1\r\n"] {
            theirs.write_all(rest.as_bytes()).unwrap();
            connection.go_on(100, &mut service).unwrap();
            connection.note_unfinished();
            assert!(connection.begun.is_some() && connection.begun > begun, "{rest}");
            begun = connection.begun;
        }
        theirs.write_all(b"\r\n").unwrap();
        connection.go_on(100, &mut service).unwrap();
        connection.note_unfinished();
        assert_eq!((connection.answered, connection.begun), (3, None));
    }

    #[test]
    fn a_client_that_never_stops_sending_lets_others_have_their_turn() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut connection = Connection::new(ours, 0);
        let length = 3 * READS * CHUNK;
        let head = format!("PUT /x HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
        theirs.write_all(head.as_bytes()).unwrap();
        theirs.write_all(&vec![b'x'; length]).unwrap();
        let mut served = Vec::new();
        for turn in 1..4 {
            let mut service = |_: &str, _: &str, body: &[u8]| {
                served.push(body.len());
                Response::Done.into()
            };
            assert_eq!(connection.go_on(length, &mut service), Some(Interest::IN));
            assert_eq!(connection.input.len(), turn * READS * CHUNK, "turn {turn}");
        }
        let mut service = |_: &str, _: &str, body: &[u8]| {
            served.push(body.len());
            Response::Done.into()
        };
        connection.go_on(length, &mut service).unwrap();
        assert_eq!(served, [length]);
    }
}
