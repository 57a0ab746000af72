//! The API's sockets: a listener and its connections, non-blocking, on the main event loop.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::{Response, http};
use crate::error::{Context, Error, Result};
use crate::event::{Events, Interest, Ready};
use crate::events::Reader;

/// Open connections that are served (Firecracker's limit); one more is told so and let go. Readers of
/// events do not count among them: they stay, and must not lock out who wants something done.
const CONNECTIONS_MAX: usize = 10;
/// Readers of events at once. Each has a descriptor and is written to at every event: without a limit
/// a client that opens more and more would use up both.
const READERS_MAX: usize = 256;
/// Sockets in all, beside the readers': connections that are being let go wait for their client to
/// hang up. A client that does not is cut off for the next.
const SOCKETS_MAX: usize = 32;
/// Requests that one connection may have answered before the others get their turn.
const TURN: usize = 16;
/// How much is read at once.
const CHUNK: usize = 2048;
/// Reads of one connection before the others get their turn: a client whose request comes byte after byte,
/// and never to its end, would keep the main thread to itself.
const READS: usize = 16;

/// Who serves: method, path and body to response.
pub type Service<'a> = dyn FnMut(&str, &str, &[u8]) -> Response + 'a;

/// The listening socket and its connections. Its file is removed when it is dropped.
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    body_max: usize,
    /// Tokens on the event loop: this one for the listener, the next ones for the connections.
    token: u64,
    connections: Vec<Option<Connection>>,
}

impl Server {
    /// How many tokens a server uses.
    pub const TOKENS: u64 = 1 + (SOCKETS_MAX + READERS_MAX) as u64;

    /// Listens at `path`, where nothing may be yet; bodies of more than `body_max` bytes are refused.
    pub fn bind(path: &Path, body_max: usize) -> Result<Self> {
        let listener = UnixListener::bind(path)
            .map_err(|error| cannot_bind(path, &error))
            .with_context(|| format!("listen on API socket `{}`", path.display()))?;
        let server = Self { listener, path: path.to_owned(), body_max, token: 0, connections: Vec::new() };
        server.listener.set_nonblocking(true).context("set up the API socket")?;
        Ok(server)
    }

    /// Puts the listener on `events` with the tokens from `token` on.
    pub fn register(&mut self, events: &Events, token: u64) -> Result<()> {
        self.token = token;
        events.add(&self.listener, Interest::IN, token)
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
            Some(index) => index as usize,
        };
        self.advance(index, events, Some(service))
    }

    /// Goes on with a connection as far as it can without waiting; whether a request was answered.
    fn advance(&mut self, index: usize, events: &Events, service: Option<&mut Service<'_>>) -> Result<bool> {
        let readers = self.readers().count();
        let Some(connection) = self.connections.get_mut(index).and_then(Option::as_mut) else {
            return Ok(false);
        };
        let answered = connection.answered;
        let interest = match (&mut connection.reader, service) {
            (None, Some(service)) => {
                let mut service = |method: &str, path: &str, body: &[u8]| match service(method, path, body) {
                    Response::Events if readers >= READERS_MAX => {
                        Response::Fault(format!("There are {READERS_MAX} readers of events already."))
                    }
                    response => response,
                };
                connection.go_on(self.body_max, &mut service)
            }
            _ => connection.tell(),
        };
        match interest {
            Some(interest) => {
                let answered = connection.answered > answered;
                if interest != connection.interest {
                    events.change(&connection.stream, interest, ready_token(self.token, index))?;
                    connection.interest = interest;
                }
                Ok(answered)
            }
            None => {
                self.connections[index] = None;
                Ok(true)
            }
        }
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
        let open = self.connections.iter().flatten();
        open.filter_map(|connection| connection.reader.as_ref().map(|reader| (connection, reader)))
    }

    /// The places of connections whose requests are served.
    fn served(&self) -> impl Iterator<Item = usize> {
        let is_served = |connection: &Connection| !connection.ending && connection.reader.is_none();
        let places = self.connections.iter().enumerate();
        places.filter(move |(_, place)| place.as_ref().is_some_and(is_served)).map(|(index, _)| index)
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
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.raw_os_error() == Some(libc::EMFILE) => {
                // With no descriptor left the client waits; the next connection that ends lets it in.
                std::thread::sleep(std::time::Duration::from_millis(1));
                return Ok(None);
            }
            // The client went away, or a signal came.
            Err(_) => return Ok(None),
        };
        stream.set_nonblocking(true).context("set up an API connection")?;
        let is_full = self.served().count() >= CONNECTIONS_MAX;
        let index = self.free_place();
        let mut connection = Connection::new(stream);
        if is_full {
            connection.end(&http::error_bytes("503", "Too many open connections"));
        }
        events.add(&connection.stream, connection.interest, ready_token(self.token, index))?;
        self.connections[index] = Some(connection);
        Ok(Some(index))
    }

    fn free_place(&mut self) -> usize {
        if let Some(index) = self.connections.iter().position(Option::is_none) {
            return index;
        }
        if self.connections.len() < SOCKETS_MAX + READERS_MAX {
            self.connections.push(None);
            return self.connections.len() - 1;
        }
        let ending = |place: &Option<Connection>| place.as_ref().is_some_and(|connection| connection.ending);
        self.connections.iter().position(ending).expect("10 of those that are not readers are not ending")
    }
}

fn ready_token(base: u64, index: usize) -> u64 {
    base + 1 + index as u64
}

impl Drop for Server {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Why the address cannot be had, and what to do.
fn cannot_bind(path: &Path, error: &std::io::Error) -> Error {
    let length = path.as_os_str().len();
    let message = match error.kind() {
        ErrorKind::AddrInUse => match UnixStream::connect(path) {
            Ok(_) => "another process serves it: choose another path".to_owned(),
            Err(refused) if refused.kind() == ErrorKind::ConnectionRefused => format!(
                "a socket is left there by a process that has ended: remove it (`rm '{}'`)",
                path.display()
            ),
            Err(_) => "there is something already: remove it or choose another path".to_owned(),
        },
        ErrorKind::NotFound => {
            let folder = path.parent().unwrap_or(path).display();
            format!("there is no folder `{folder}`: create it")
        }
        ErrorKind::InvalidInput => {
            format!(
                "its {length} bytes are too long for a socket (107 at most) or contain a NUL: choose a shorter path"
            )
        }
        _ => error.to_string(),
    };
    Error::config(message)
}

/// One client.
struct Connection {
    stream: UnixStream,
    interest: Interest,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Nothing more is served; when the output is out, what still comes is thrown away.
    ending: bool,
    /// The client hangs up when it has read this far, or was told that we have.
    shut: bool,
    /// This request's client was told to go on with its body.
    continued: bool,
    answered: u64,
    /// It asked for events: nothing else is served any more.
    reader: Option<Reader>,
}

impl Connection {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            interest: Interest::IN,
            input: Vec::new(),
            output: Vec::new(),
            ending: false,
            shut: false,
            continued: false,
            answered: 0,
            reader: None,
        }
    }

    /// The last answer: nothing of what comes after it can be understood.
    fn end(&mut self, answer: &[u8]) {
        self.output.extend_from_slice(answer);
        self.input = Vec::new();
        self.ending = true;
    }

    /// Reads, serves and writes as far as it goes without waiting; says what to wait for. None: the
    /// client is gone.
    fn go_on(&mut self, body_max: usize, service: &mut Service<'_>) -> Option<Interest> {
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
            if self.reader.is_some() {
                return self.tell();
            }
            self.serve_one(body_max, service);
            if self.output.is_empty() {
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
        match http::parse(&self.input, body_max) {
            http::Parsed::Incomplete { expects_continue } => {
                if expects_continue && !self.continued {
                    self.continued = true;
                    self.output = http::continue_bytes();
                }
            }
            http::Parsed::Bad(message) => {
                self.end(&http::error_bytes("400", &message));
            }
            http::Parsed::Request { method, path, body } => {
                let end = body.end;
                let response = service(method, path, &self.input[body]);
                self.output = http::response_bytes(&response);
                self.reader = (response == Response::Events).then(Reader::default);
                self.input.drain(..end);
                self.continued = false;
                self.answered += 1;
            }
        }
    }

    /// Reads some more; false: nothing is there now. None: the client is gone.
    fn fill(&mut self) -> Option<bool> {
        let mut chunk = [0; CHUNK];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return None,
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
    fn tell(&mut self) -> Option<Interest> {
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
        self.listen()
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
    fn a_client_that_never_stops_sending_lets_others_have_their_turn() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut connection = Connection::new(ours);
        let length = 3 * READS * CHUNK;
        let head = format!("PUT /x HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
        theirs.write_all(head.as_bytes()).unwrap();
        theirs.write_all(&vec![b'x'; length]).unwrap();
        let mut served = Vec::new();
        for turn in 1..4 {
            let mut service = |_: &str, _: &str, body: &[u8]| {
                served.push(body.len());
                Response::Done
            };
            assert_eq!(connection.go_on(length, &mut service), Some(Interest::IN));
            assert_eq!(connection.input.len(), turn * READS * CHUNK, "turn {turn}");
        }
        let mut service = |_: &str, _: &str, body: &[u8]| {
            served.push(body.len());
            Response::Done
        };
        connection.go_on(length, &mut service).unwrap();
        assert_eq!(served, [length]);
    }
}
