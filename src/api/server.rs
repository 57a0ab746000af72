//! The API's sockets: a listener and its connections, non-blocking, on the main event loop.

use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use super::connection::Connection;
use super::{Reply, Response, http};
use crate::error::Result;
use crate::history::Reader;
use crate::host::listener::Listener;
use crate::jobs::Ticket;
use crate::log;
use crate::poll::{Events, Interest, Ready};
use crate::sys::network;

/// Open connections that are served (Firecracker's limit); one more is told so and let go. Readers of
/// events do not count among them: they stay, and must not lock out who wants something done.
const CONNECTIONS_MAX: usize = 10;
/// Readers of events at once. Each has a descriptor and is written to at every event: without a limit
/// a client that opens more and more would use up both.
const READERS_MAX: usize = 256;
/// Sockets in all, beside the readers': connections that are being let go wait for their client to
/// hang up. A client that does not is cut off for the next.
const SOCKETS_MAX: usize = 32;
/// A request that has not come to its end so long after its first byte is given up, and so is an answer that
/// is not read: ten clients that send half of one, or that never read, would keep everybody else out for ever.
const REQUEST_TIME: Duration = Duration::from_secs(30);

/// Who serves: method, path and body to reply.
pub type Service<'a> = dyn FnMut(&str, &str, &[u8]) -> Reply + 'a;

/// The listening socket and its connections. Its file is removed when it is dropped.
pub struct Server {
    listener: Listener,
    body_max: usize,
    /// Tokens on the event loop: this one for the listener, the next ones for the connections.
    token: u64,
    /// On the heap each: a list makes room for four at once, and one client is what most have.
    connections: Vec<Option<Box<Connection>>>,
    /// Counts what clients have done, to tell which of them has been idle longest.
    moves: u64,
}

impl Server {
    /// How many tokens a server uses.
    pub const TOKENS: u64 = 1 + (SOCKETS_MAX + READERS_MAX) as u64;

    /// Listens at `path`, where nothing may be yet; bodies of more than `body_max` bytes are refused.
    pub fn bind(path: &Path, body_max: usize) -> Result<Self> {
        let listener = Listener::bind("API socket", path)?;
        Ok(Self { listener, body_max, token: 0, connections: Vec::new(), moves: 0 })
    }

    /// Puts the listener on `events` with the tokens from `token` on.
    pub fn register(&mut self, events: &Events, token: u64) -> Result<()> {
        self.token = token;
        events.add(&self.listener, Interest::IN, token)
    }

    /// Closes the listener and the connections, which the process that this one is a copy of goes on to serve.
    pub fn leave(self) {
        self.listener.leave();
    }

    /// Handles an event with one of this server's tokens. Returns whether a request was answered.
    pub fn handle(&mut self, ready: Ready, events: &Events, service: &mut Service<'_>) -> Result<bool> {
        let index = match ready.token.checked_sub(self.token + 1) {
            None => {
                self.make_room(events, service)?;
                match self.accept(events)? {
                    Some(index) => index,
                    None => return Ok(false),
                }
            }
            Some(index) => {
                if ready.events.contains(Interest::HANG_UP) {
                    self.let_a_reader_go(index as usize);
                }
                index as usize
            }
        };
        let place = self.connections.get_mut(index);
        if let Some(place) = place
            && ready.events.intersects(Interest::HANG_UP | Interest::ERROR)
            && place.as_ref().is_some_and(|connection| connection.waits_for().is_some())
        {
            // Who went away while its job is done has no answer.
            *place = None;
            return Ok(false);
        }
        self.advance(index, events, Some(service))
    }

    /// Answers the client that waits for this job, if it is still there, and goes on with its next request.
    pub fn answer(
        &mut self,
        ticket: Ticket,
        response: &Response,
        events: &Events,
        service: &mut Service<'_>,
    ) -> Result<()> {
        let waits = |place: &Option<Box<Connection>>| {
            place.as_ref().is_some_and(|connection| connection.waits_for() == Some(ticket))
        };
        let Some(index) = self.connections.iter().position(waits) else { return Ok(()) };
        if let Some(connection) = &mut self.connections[index] {
            connection.answer_waiting(response);
            self.moves += 1;
            connection.moved = self.moves;
        }
        self.advance(index, events, Some(service)).map(drop)
    }

    /// Goes on with a connection as far as it can without waiting; whether a request was answered.
    fn advance(&mut self, index: usize, events: &Events, service: Option<&mut Service<'_>>) -> Result<bool> {
        let readers = self.readers().count();
        let Some(connection) = self.connections.get_mut(index).and_then(Option::as_deref_mut) else {
            return Ok(false);
        };
        let answered = connection.answered;
        let interest = match (&mut connection.reader, service) {
            (None, Some(service)) => {
                let mut service = |method: &str, path: &str, body: &[u8]| match service(method, path, body) {
                    Reply::Now(Response::Events) if readers >= READERS_MAX => {
                        Response::Fault(format!("There are {READERS_MAX} readers of events already.")).into()
                    }
                    reply => reply,
                };
                connection.go_on(self.body_max, &mut service)
            }
            _ => connection.tell(),
        };
        match interest {
            Some(interest) => {
                let answered = connection.answered > answered;
                connection.note_unfinished();
                if answered {
                    self.moves += 1;
                    connection.moved = self.moves;
                }
                let (stream, token) = (&connection.stream, ready_token(self.token, index));
                match connection.interest.replace(interest) {
                    None => events.add(stream, interest, token)?,
                    Some(before) if before != interest => events.change(stream, interest, token)?,
                    Some(_) => {}
                }
                Ok(answered)
            }
            None => {
                self.connections[index] = None;
                log::trace(format_args!("connection {index} of the API is closed"));
                Ok(true)
            }
        }
    }

    /// When a request that has begun, or an answer that waits, will have had its time, unless it ends before.
    pub fn expires_at(&self) -> Option<Instant> {
        let begun = self.connections.iter().flatten().filter_map(|connection| connection.begun);
        begun.min().map(|begun| begun + REQUEST_TIME)
    }

    /// Gives up requests and answers that have had their time at `now`.
    pub fn expire(&mut self, now: Instant, events: &Events) -> Result<()> {
        for index in 0..self.connections.len() {
            let Some(connection) = &mut self.connections[index] else { continue };
            if connection.begun.is_some_and(|begun| now.saturating_duration_since(begun) >= REQUEST_TIME) {
                self.give_up(index, events)?;
            }
        }
        Ok(())
    }

    /// Waits no longer for the rest of a request, or for the reader of an answer.
    fn give_up(&mut self, index: usize, events: &Events) -> Result<()> {
        let Some(connection) = &mut self.connections[index] else { return Ok(()) };
        let time = REQUEST_TIME.as_secs();
        let message = format!("The request did not come to its end within {time} s.");
        log::debug(format_args!("connection {index} of the API: {message}"));
        // Who does not read has what it may still read.
        let is_deaf = !connection.output.is_empty();
        connection.end(if is_deaf { Vec::new() } else { http::error_bytes("408", &message) });
        // Nothing more is served on it.
        self.advance(index, events, Some(&mut |_, _, _| Response::Done.into())).map(drop)
    }

    /// Tells readers of events what they have not read yet, as far as they read now.
    pub fn tell(&mut self, events: &Events) -> Result<()> {
        for index in 0..self.connections.len() {
            if self.connections[index].as_ref().is_some_and(|connection| connection.reader.is_some()) {
                self.advance(index, events, None)?;
            }
        }
        Ok(())
    }

    /// Whether there are readers of events.
    pub fn has_readers(&self) -> bool {
        self.readers().next().is_some()
    }

    /// Whether one of them has not read everything.
    pub fn is_behind(&self) -> bool {
        self.readers().any(|(connection, reader)| !connection.output.is_empty() || reader.is_behind())
    }

    fn readers(&self) -> impl Iterator<Item = (&Connection, &Reader)> {
        let open = self.connections.iter().filter_map(Option::as_deref);
        open.filter_map(|connection| connection.reader.as_ref().map(|reader| (connection, reader)))
    }

    /// The places of connections whose requests are served.
    fn served(&self) -> impl Iterator<Item = usize> {
        let is_served = |connection: &Connection| !connection.ending && connection.reader.is_none();
        let places = self.connections.iter().enumerate();
        places.filter(move |(_, place)| place.as_deref().is_some_and(is_served)).map(|(index, _)| index)
    }

    /// A client that hangs up and comes back, or lets another in, has done so in this order; we may hear of
    /// it in the other. So those that are gone go before a new one is counted.
    fn make_room(&mut self, events: &Events, service: &mut Service<'_>) -> Result<()> {
        let served: Vec<usize> = self.served().collect();
        if served.len() >= CONNECTIONS_MAX {
            for index in served {
                self.advance(index, events, Some(service))?;
            }
        }
        Ok(())
    }

    /// Takes a new connection, if its client still wants it; one too many is told so at once.
    fn accept(&mut self, events: &Events) -> Result<Option<usize>> {
        let stream = match network::accept(&self.listener) {
            Ok(stream) => stream,
            // The client went away, or a signal came.
            Err(error) if GONE.contains(&error.kind()) => return Ok(None),
            Err(_) => {
                // With no descriptor or memory left, here or in the whole system, the client waits: what ends
                // next lets it in. We are told of it again at once, and must not spin.
                std::thread::sleep(Duration::from_millis(1));
                return Ok(None);
            }
        };
        let is_full = self.served().count() >= CONNECTIONS_MAX
            && !self.let_an_idle_one_go()
            && !self.let_a_slow_one_go(events)?;
        let index = self.free_place();
        self.moves += 1;
        let mut connection = Connection::new(stream, self.moves);
        log::trace(format_args!("connection {index} of the API is open"));
        if is_full {
            log::debug(format_args!("{CONNECTIONS_MAX} clients of the API are served: one more is refused"));
            connection.end(http::error_bytes("503", "Too many open connections"));
        }
        self.connections[index] = Some(Box::new(connection));
        Ok(Some(index))
    }

    /// Closes the connection that has been idle longest; false: none is idle.
    fn let_an_idle_one_go(&mut self) -> bool {
        let open = |index: &usize| self.connections[*index].as_deref();
        let idle = self.served().filter(|index| open(index).is_some_and(Connection::is_idle));
        let longest = idle.min_by_key(|index| open(index).map(|connection| connection.moved));
        longest.is_some_and(|index| self.connections[index].take().is_some())
    }

    /// Ends the connection whose client was awaited longest, if that was longer than one request may take: ten
    /// clients that end a request just in time, and begin the next one with it, would keep everybody else out.
    /// False: there is none.
    fn let_a_slow_one_go(&mut self, events: &Events) -> Result<bool> {
        let awaited = |index: &usize| self.connections[*index].as_deref().map(Connection::awaited);
        let longest = self.served().max_by_key(awaited);
        let longest = longest.filter(|index| awaited(index).is_some_and(|time| time >= REQUEST_TIME));
        longest.map_or(Ok(()), |index| self.give_up(index, events))?;
        Ok(longest.is_some())
    }

    /// Closes the connection of a reader of events that has hung up: there is nothing that it could still read.
    fn let_a_reader_go(&mut self, index: usize) {
        if let Some(place) = self.connections.get_mut(index) {
            *place = place.take().filter(|connection| connection.reader.is_none());
        }
    }

    fn free_place(&mut self) -> usize {
        if let Some(index) = self.connections.iter().position(Option::is_none) {
            return index;
        }
        if self.connections.len() < SOCKETS_MAX + READERS_MAX {
            self.connections.push(None);
            return self.connections.len() - 1;
        }
        let ending =
            |place: &Option<Box<Connection>>| place.as_ref().is_some_and(|connection| connection.ending);
        self.connections.iter().position(ending).expect("10 of those that are not readers are not ending")
    }
}

/// How an accept ends that finds nobody.
const GONE: [ErrorKind; 3] = [ErrorKind::WouldBlock, ErrorKind::Interrupted, ErrorKind::ConnectionAborted];

fn ready_token(base: u64, index: usize) -> u64 {
    base + 1 + index as u64
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn clients_that_never_read_are_given_up_after_their_time() {
        let path = std::env::temp_dir().join(format!("alula-server-deaf-{}", std::process::id()));
        let events = Events::new().unwrap();
        let mut server = Server::bind(&path, 100).unwrap();
        server.register(&events, 0).unwrap();
        let mut ready = Vec::new();
        let mut turn = |server: &mut Server| {
            events.wait(Some(Duration::ZERO), &mut ready).unwrap();
            for event in &ready {
                let answer = Response::Value("x".repeat(100_000).into());
                server.handle(*event, &events, &mut |_, _, _| answer.clone().into()).unwrap();
            }
        };
        let deaf = [(); CONNECTIONS_MAX].map(|()| UnixStream::connect(&path).unwrap());
        let request = b"GET /a HTTP/1.1\r\n\r\n";
        deaf.iter().for_each(|mut stream| stream.write_all(&request.repeat(20)).unwrap());
        (0..50).for_each(|_| turn(&mut server));
        assert_eq!(server.served().count(), CONNECTIONS_MAX);
        let mut late = UnixStream::connect(&path).unwrap();
        (0..5).for_each(|_| turn(&mut server));
        let mut answer = String::new();
        late.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        let at = server.expires_at().expect("answers wait to be read");
        server.expire(at - Duration::from_secs(1), &events).unwrap();
        assert_eq!(server.served().count(), CONNECTIONS_MAX, "it is not yet time");
        server.expire(at + REQUEST_TIME, &events).unwrap();
        assert_eq!((server.served().count(), server.expires_at()), (0, None));
        let mut late = UnixStream::connect(&path).unwrap();
        late.write_all(request).unwrap();
        (0..5).for_each(|_| turn(&mut server));
        let mut bytes = [0; 13];
        late.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"HTTP/1.1 200 ");
    }

    #[test]
    fn clients_that_always_have_a_request_under_way_make_room_in_time() {
        let path = std::env::temp_dir().join(format!("alula-server-slow-{}", std::process::id()));
        let events = Events::new().unwrap();
        let mut server = Server::bind(&path, 100).unwrap();
        server.register(&events, 0).unwrap();
        let mut ready = Vec::new();
        let mut turn = |server: &mut Server| {
            for _ in 0..2 * CONNECTIONS_MAX {
                events.wait(Some(Duration::ZERO), &mut ready).unwrap();
                for event in &ready {
                    server.handle(*event, &events, &mut |_, _, _| Response::Done.into()).unwrap();
                }
            }
        };
        let passed = |server: &mut Server, time| {
            for connection in server.connections.iter_mut().flatten() {
                connection.begun = connection.begun.map(|begun| begun - time);
            }
        };
        let answer = |stream: &mut UnixStream| {
            let mut bytes = [0; 13];
            stream.read_exact(&mut bytes).unwrap();
            String::from_utf8(bytes.to_vec()).unwrap()
        };
        let mut slow = [(); CONNECTIONS_MAX].map(|()| UnixStream::connect(&path).unwrap());
        slow.iter_mut().for_each(|stream| stream.write_all(b"GET /a HTTP").unwrap());
        turn(&mut server);
        let begun = server.expires_at().expect("requests have begun");
        passed(&mut server, REQUEST_TIME - Duration::from_secs(1));
        let mut early = UnixStream::connect(&path).unwrap();
        turn(&mut server);
        assert_eq!(answer(&mut early), "HTTP/1.1 503 ");
        // The third of them has been slow all the time, the others have come to rest in between.
        for (index, stream) in slow.iter_mut().enumerate() {
            let rests = index != 3;
            stream.write_all(if rests { b"/1.1\r\n\r\n" } else { b"/1.1\r\n\r\nG" }).unwrap();
        }
        turn(&mut server);
        slow.iter_mut().for_each(|stream| assert_eq!(answer(stream), "HTTP/1.1 204 "));
        assert!(server.expires_at() > Some(begun), "the next request has its own time");
        slow.iter_mut().for_each(|stream| stream.write_all(b"G").unwrap());
        turn(&mut server);
        passed(&mut server, Duration::from_secs(2));
        let mut late = UnixStream::connect(&path).unwrap();
        late.write_all(b"GET /a HTTP/1.1\r\n\r\n").unwrap();
        turn(&mut server);
        assert_eq!(answer(&mut late), "HTTP/1.1 204 ");
    }

    #[test]
    fn half_a_request_is_given_up_after_its_time() {
        let path = std::env::temp_dir().join(format!("alula-server-{}", std::process::id()));
        let events = Events::new().unwrap();
        let mut server = Server::bind(&path, 100).unwrap();
        server.register(&events, 0).unwrap();
        let mut ready = Vec::new();
        let mut turn = |server: &mut Server| {
            events.wait(Some(Duration::ZERO), &mut ready).unwrap();
            for event in &ready {
                server.handle(*event, &events, &mut |_, _, _| Response::Done.into()).unwrap();
            }
        };
        let [mut half, mut idle, mut stream] = [(); 3].map(|()| UnixStream::connect(&path).unwrap());
        (0..5).for_each(|_| turn(&mut server));
        assert_eq!(server.expires_at(), None, "no request has begun");
        half.write_all(b"PUT /a HTTP/1.1\r\nContent-Length: 9\r\n\r\n{").unwrap();
        idle.write_all(b"PUT /a HTTP/1.1\r\n\r\n").unwrap();
        stream.write_all(b"PUT /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n").unwrap();
        (0..5).for_each(|_| turn(&mut server));
        let at = server.expires_at().expect("two requests have begun");
        server.expire(at - Duration::from_secs(1), &events).unwrap();
        assert_eq!(server.expires_at(), Some(at), "it is not yet time");
        server.expire(at + REQUEST_TIME, &events).unwrap();
        assert_eq!(server.expires_at(), None);
        for client in [&mut half, &mut stream] {
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("Connection: close"), "{answer}");
        }
        // One that has asked for nothing stays.
        let mut bytes = [0; 13];
        idle.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"HTTP/1.1 204 ");
        idle.write_all(b"PUT /a HTTP/1.1\r\n\r\n").unwrap();
        turn(&mut server);
        assert_eq!(server.served().count(), 1);
    }
}
