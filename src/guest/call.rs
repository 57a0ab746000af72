//! One thing asked of an agent, seen from the host. The agent is the guest's, and can lie: what it sends is checked, and
//! bounded by what a frame holds.

use std::io::{Error as IoError, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};
use crate::protocol::frame::{CONTENT_MAX, HEAD, INPUT_WINDOW, Inbox, Type, put};
use crate::protocol::request::{Ask, Greeting, PROTOCOL, Request, Window};

/// How long a guest may take to say whether somebody listens in it: one that boots says nothing until it has its
/// driver.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an agent that has taken the connection may be silent. It greets before it does anything: one that is
/// silent was stopped, or is no agent, and who asks it would wait for ever.
const SILENCE: Duration = Duration::from_secs(30);
/// The monitor's answer is a word and a number; a longer one is not a monitor's.
const ANSWER_MAX: usize = 32;

/// How what was asked for ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// A program's exit code; 0 for what is no program.
    Exited(u8),
    /// The signal that ended a program.
    Signaled(u8),
    /// There is no such program.
    NotFound(String),
    /// There is one, and it cannot be executed.
    NotExecutable(String),
    /// It could not be done.
    Failed(String),
}

/// What an agent says.
#[derive(Debug)]
pub enum Said<'a> {
    /// It has begun.
    Greeting(Greeting),
    /// Standard output.
    Output(&'a [u8]),
    /// Standard error.
    Errors(&'a [u8]),
    /// It is over.
    Ended(Ending),
}

/// Connects to a port of the guest, by the Unix socket of its vsock device. None: nobody listens there, yet. An error of
/// the guest's: it does not answer.
pub fn connect(socket: &Path, port: u32) -> Result<Option<UnixStream>> {
    let attempt = || format!("connect to port {port} of the guest by vsock socket `{}`", socket.display());
    UnixStream::connect(socket)
        .map_err(|error| Error::host(error.to_string()))
        .and_then(|stream| reach(stream, port, PATIENCE))
        .with_context(attempt)
}

/// The same by a stream that is connected to that socket; the guest has so long to answer.
pub fn reach(stream: UnixStream, port: u32, patience: Duration) -> Result<Option<UnixStream>> {
    stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_read_timeout(Some(patience)))
        .context("set up the connection")?;
    // A monitor that has closed it already says so by the read.
    let _ = (&stream).write_all(format!("CONNECT {port}\n").as_bytes());
    let mut answer = Vec::new();
    // Byte by byte: what comes after the line is the agent's.
    while !answer.ends_with(b"\n") && answer.len() < ANSWER_MAX {
        let mut byte = [0];
        match (&stream).read(&mut byte) {
            Ok(1) => answer.push(byte[0]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let seconds = patience.as_secs();
                return Err(Error::guest(format!(
                    "there was no answer for {seconds} s: the guest is paused, or has no driver for vsock, or is not up yet"
                )));
            }
            Ok(_) | Err(_) => return Ok(None),
        }
    }
    if !answer.starts_with(b"OK ") {
        let told = String::from_utf8_lossy(&answer);
        return Err(Error::host(format!("`{}` is no monitor's answer", told.trim())));
    }
    Ok(Some(stream))
}

/// A connection to an agent, with what was asked on it.
pub struct Call {
    stream: UnixStream,
    inbox: Inbox,
    outbox: Vec<u8>,
    sent: usize,
    /// So many bytes of input the agent takes now.
    room: usize,
    is_begun: bool,
    greets_by: Instant,
}

impl AsRawFd for Call {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl Call {
    /// Asks the agent at the other end of `stream`.
    pub fn new(stream: UnixStream, ask: Ask) -> Result<Self> {
        stream.set_nonblocking(true).context("set up the connection to the agent")?;
        let request =
            serde_json::to_vec(&Request { protocol: PROTOCOL, ask }).context("write the request")?;
        if request.len() > crate::protocol::frame::REQUEST_MAX {
            return Err(Error::config(format!(
                "arguments and environment have {} bytes: an agent takes {}",
                request.len(),
                crate::protocol::frame::REQUEST_MAX
            )));
        }
        let mut outbox = Vec::new();
        put(&mut outbox, Type::Request, &request);
        Ok(Self {
            stream,
            inbox: Inbox::default(),
            outbox,
            sent: 0,
            room: INPUT_WINDOW,
            is_begun: false,
            greets_by: Instant::now() + SILENCE,
        })
    }

    /// By when the agent must have greeted; none: it has.
    pub fn greets_by(&self) -> Option<Instant> {
        (!self.is_begun).then_some(self.greets_by)
    }

    /// Whether the agent may still be waited for. An error: it should have greeted.
    pub fn check_silence(&self) -> Result<()> {
        match self.greets_by() {
            Some(by) if by <= Instant::now() => Err(Error::guest(format!(
                "the agent in the guest has taken the connection and said nothing for {} s: is the guest paused, or \
                 the agent stopped?",
                SILENCE.as_secs()
            ))),
            _ => Ok(()),
        }
    }

    /// So many bytes of input can be given now.
    pub fn room(&self) -> usize {
        self.room.min(CONTENT_MAX)
    }

    /// Gives input, at most as much as there is room for.
    pub fn give(&mut self, bytes: &[u8]) {
        self.room -= bytes.len();
        put(&mut self.outbox, Type::Input, bytes);
    }

    /// The input has ended.
    pub fn end_input(&mut self) {
        put(&mut self.outbox, Type::InputEnd, b"");
    }

    /// Sends a signal.
    pub fn signal(&mut self, signal: u8) {
        put(&mut self.outbox, Type::Signal, &[signal]);
    }

    /// The terminal has another size.
    pub fn resize(&mut self, Window { rows, columns }: Window) {
        put(&mut self.outbox, Type::Window, &[rows.to_le_bytes(), columns.to_le_bytes()].concat());
    }

    /// Something waits to be sent.
    pub fn has_to_send(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Sends what waits, as far as there is room for it. What fails is told by [`Self::hear`], after what the agent
    /// has said before.
    pub fn send(&mut self) {
        while self.sent < self.outbox.len() {
            match (&self.stream).write(&self.outbox[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.sent = self.outbox.len(),
            }
        }
        (self.outbox, self.sent) = (Vec::new(), 0);
    }

    /// Reads once, if there is something, and tells `each` what the agent has said. After its end nothing more is told.
    pub fn hear(&mut self, mut each: impl FnMut(Said<'_>) -> Result<()>) -> Result<()> {
        let mut bytes = vec![0; HEAD + CONTENT_MAX];
        let count = match (&self.stream).read(&mut bytes) {
            Ok(0) => return Err(gone(None)),
            Ok(count) => count,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(());
            }
            Err(error) => return Err(gone(Some(error))),
        };
        self.inbox.push(&bytes[..count]);
        while let Some((kind, content)) = self.inbox.pop().context("read what the agent in the guest says")? {
            let said = match (kind, content) {
                (Type::Greeting, _) if !self.is_begun => {
                    self.is_begun = true;
                    Said::Greeting(greeting(content)?)
                }
                (Type::Failed, [what, why @ ..]) if self.is_begun => Said::Ended(failed(*what, why)),
                (Type::Output, _) if self.is_begun => Said::Output(content),
                (Type::Errors, _) if self.is_begun => Said::Errors(content),
                (Type::Exited, [0, code]) if self.is_begun => Said::Ended(Ending::Exited(*code)),
                (Type::Exited, [1, signal]) if self.is_begun => Said::Ended(Ending::Signaled(*signal)),
                (Type::Taken, [a, b, c, d]) if self.is_begun => {
                    let taken = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
                    if taken > INPUT_WINDOW - self.room {
                        return Err(lie("it has taken more input than it was given"));
                    }
                    self.room += taken;
                    continue;
                }
                (kind, _) if !self.is_begun => return Err(lie(&format!("{kind:?} comes before a greeting"))),
                (kind, _) => return Err(lie(&format!("{kind:?} was not expected"))),
            };
            let is_end = matches!(said, Said::Ended(_));
            each(said)?;
            if is_end {
                return Ok(());
            }
        }
        self.inbox.shrink();
        Ok(())
    }
}

fn gone(error: Option<IoError>) -> Error {
    let why = error.map_or_else(String::new, |error| format!(": {error}"));
    Error::guest(format!("the connection to the agent in the guest ended before what it was asked did{why}"))
}

fn lie(what: &str) -> Error {
    Error::guest(format!("the agent in the guest does not keep to its protocol: {what}"))
}

fn greeting(content: &[u8]) -> Result<Greeting> {
    let greeting: Greeting =
        serde_json::from_slice(content).context("read the greeting of the agent in the guest")?;
    match greeting.protocol {
        PROTOCOL => Ok(greeting),
        other => Err(Error::guest(format!(
            "the agent in the guest speaks version {other} of its protocol, and this program version {PROTOCOL}: \
             use the same program in both"
        ))),
    }
}

fn failed(what: u8, why: &[u8]) -> Ending {
    let why = crate::log::in_one_line(String::from_utf8_lossy(why));
    match what {
        1 => Ending::NotFound(why),
        2 => Ending::NotExecutable(why),
        _ => Ending::Failed(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of it when an agent sends this and closes: what it said, and the error.
    fn heard(frames: &[(Type, &[u8])]) -> (Vec<String>, String) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut call = Call::new(ours, Ask::Info {}).unwrap();
        call.give(&[0; 100]);
        let mut bytes = Vec::new();
        frames.iter().for_each(|(kind, content)| put(&mut bytes, *kind, content));
        theirs.write_all(&bytes).unwrap();
        drop(theirs);
        let mut said = Vec::new();
        loop {
            call.send();
            let mut is_over = false;
            let result = call.hear(|what| {
                is_over |= matches!(what, Said::Ended(_));
                said.push(format!("{what:?}"));
                Ok(())
            });
            match result {
                Err(error) => return (said, error.to_string()),
                Ok(()) if is_over => return (said, String::new()),
                Ok(()) => {}
            }
        }
    }

    #[test]
    fn an_agent_that_lies_is_told_from_one_that_does_its_work() {
        const HELLO: (Type, &[u8]) = (Type::Greeting, br#"{"protocol": 1, "agent": "9", "later": [1]}"#);
        let (said, error) =
            heard(&[HELLO, (Type::Output, b"a"), (Type::Taken, &[100, 0, 0, 0]), (Type::Exited, &[0, 7])]);
        assert_eq!(said[1..], ["Output([97])", "Ended(Exited(7))"]);
        assert_eq!(error, "");
        // What comes after the end is not looked at.
        let (said, error) = heard(&[HELLO, (Type::Exited, &[1, 9]), (Type::Exited, &[0, 0])]);
        assert_eq!((said.len(), &said[1][..], &error[..]), (2, "Ended(Signaled(9))", ""));
        let (said, _) = heard(&[HELLO, (Type::Failed, b"\x01no \x1b[2J")]);
        assert_eq!(said[1], r#"Ended(NotFound("no  [2J"))"#);
        for (frames, told) in [
            (vec![], "the connection to the agent in the guest ended before what it was asked did"),
            (vec![HELLO, (Type::Output, b"a")], "ended before what it was asked did"),
            (vec![(Type::Exited, &[0, 0][..])], "Exited comes before a greeting"),
            (vec![(Type::Output, b"a")], "Output comes before a greeting"),
            (vec![HELLO, HELLO], "Greeting was not expected"),
            (vec![HELLO, (Type::Exited, &[2, 0])], "Exited was not expected"),
            (vec![HELLO, (Type::Taken, &[101, 0, 0, 0])], "it has taken more input than it was given"),
            (vec![HELLO, (Type::Request, b"{}")], "Request was not expected"),
            (vec![HELLO, (Type::Output, &[0; CONTENT_MAX + 1])], "a frame of type 130 and 65537 bytes"),
            (vec![(Type::Greeting, br#"{"protocol": 2}"#)], "speaks version 2 of its protocol"),
            (vec![(Type::Greeting, b"hello")], "read the greeting of the agent in the guest: "),
        ] {
            let (_, error) = heard(&frames);
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn an_agent_that_never_greets_is_not_waited_for_for_ever() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut call = Call::new(ours, Ask::Info {}).unwrap();
        assert!(call.greets_by().unwrap() > Instant::now());
        call.check_silence().unwrap();
        call.greets_by = Instant::now();
        let error = call.check_silence().unwrap_err().to_string();
        assert!(error.contains("said nothing for 30 s: is the guest paused"), "{error}");
        // One that has greeted may take its time.
        let mut bytes = Vec::new();
        put(&mut bytes, Type::Greeting, br#"{"protocol": 1, "agent": "9"}"#);
        theirs.write_all(&bytes).unwrap();
        call.hear(|_| Ok(())).unwrap();
        assert_eq!(call.greets_by(), None);
        call.check_silence().unwrap();
    }

    #[test]
    fn a_monitor_is_asked_for_a_port_and_may_have_nobody_there() {
        let path = std::env::temp_dir().join(format!("alula-call-{}", std::process::id()));
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let told = |answer: &'static [u8]| {
            std::thread::scope(|scope| {
                let monitor = scope.spawn(|| {
                    let (mut stream, _) = listener.accept().unwrap();
                    let mut asked = [0; 11];
                    stream.read_exact(&mut asked).unwrap();
                    stream.write_all(answer).unwrap();
                    asked
                });
                let connected = connect(&path, 52);
                assert_eq!(&monitor.join().unwrap(), b"CONNECT 52\n");
                connected
            })
        };
        let mut stream = told(b"OK 1073741824\nfirst").unwrap().unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "first");
        assert!(told(b"").unwrap().is_none());
        assert!(told(b"OK 1").unwrap().is_none());
        let error = told(b"HTTP/1.1 400 Bad Request\r\nand so on").unwrap_err().to_string();
        assert!(error.ends_with("`HTTP/1.1 400 Bad Request` is no monitor's answer"), "{error}");
        std::fs::remove_file(&path).unwrap();
        assert!(connect(&path, 52).unwrap_err().to_string().contains("No such file"));
    }
}
