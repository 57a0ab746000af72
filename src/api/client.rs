//! The other side of the control socket: what `alula ctl` asks a running monitor.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};
use crate::host::socket;
use crate::sys::network;

/// An answer with a larger body, or a larger head, is none of ours.
const BODY_MAX: u64 = 16 << 20;
const HEAD_MAX: u64 = 64 << 10;
/// So long a monitor may be at work on one request, on a machine under load.
const PATIENCE: Duration = Duration::from_secs(100);
/// The time that a monitor has to say that it is there, whatever it is asked for then: the kernel takes connections for a
/// process that is stopped, or hangs.
const FIRST_WORD: Duration = Duration::from_secs(10);
/// The file of a socket is there a moment before its process listens (bind(2), listen(2)): who has waited for the file may
/// come in between. A process that has ended is told of so much later.
const BEGINS_TO_LISTEN: Duration = Duration::from_millis(200);

/// The kind of program that a client expects at a socket.
#[derive(Clone, Copy)]
enum Server {
    Monitor,
    Template,
}

/// A connection to a monitor.
pub struct Client {
    stream: BufReader<UnixStream>,
    socket: PathBuf,
    /// How long an answer may take; None: for ever.
    patience: Option<Duration>,
    /// The monitor has answered something, or need not be asked first whether it answers.
    has_spoken: bool,
}

/// What it answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The status of HTTP.
    pub status: u16,
    /// The body; empty if there was none.
    pub body: String,
}

impl Client {
    /// Connects to the monitor that serves the socket at `path`. Before anything else, it has to answer at all.
    pub fn connect(path: &Path) -> Result<Self> {
        Self::connect_to(Server::Monitor, path).map(|client| Self { has_spoken: false, ..client })
    }

    /// Connects to the template that serves the socket at `path`, which has to answer at all, too.
    pub fn connect_to_template(path: &Path) -> Result<Self> {
        Self::connect_to(Server::Template, path).map(|client| Self { has_spoken: false, ..client })
    }

    fn connect_to(server: Server, path: &Path) -> Result<Self> {
        let deadline = Instant::now() + BEGINS_TO_LISTEN;
        let is_too_early = |error: &std::io::Error| {
            error.kind() == ErrorKind::ConnectionRefused && Instant::now() < deadline
        };
        loop {
            match open(path, FIRST_WORD) {
                Err(error) if is_too_early(&error) => std::thread::sleep(Duration::from_millis(5)),
                stream => return Self::over(server, stream, path, PATIENCE),
            }
        }
    }

    /// Connects as [`Self::connect`] does, to a monitor that may take as long as `patience` for each answer.
    pub fn connect_within(path: &Path, patience: Duration) -> Result<Self> {
        Self::over(Server::Monitor, open(path, patience), path, patience)
    }

    fn over(
        server: Server,
        stream: std::io::Result<UnixStream>,
        path: &Path,
        patience: Duration,
    ) -> Result<Self> {
        let what = match server {
            Server::Monitor => "API socket",
            Server::Template => "the template's socket",
        };
        let attempt = || format!("connect to {what} `{}`", path.display());
        let stream = stream.map_err(|error| cannot_connect(server, &error)).with_context(attempt)?;
        let stream = BufReader::new(stream);
        let mut client = Self { stream, socket: path.to_owned(), patience: None, has_spoken: true };
        client.set_patience(Some(patience)).with_context(attempt)?;
        Ok(client)
    }

    fn set_patience(&mut self, patience: Option<Duration>) -> Result<()> {
        self.patience = patience;
        self.stream.get_ref().set_read_timeout(patience).context("limit the time of an answer")
    }

    /// The monitor's process, if it is one that can be seen from here.
    pub fn process(&self) -> Option<u32> {
        network::peer(self.stream.get_ref())
    }

    /// Waits for answers however long they take: large files may have to be written first.
    pub fn wait_for_ever(&mut self) -> Result<()> {
        self.set_patience(None)
    }

    /// Hears that the monitor answers, if it has not said a word yet.
    fn hear_a_word(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.has_spoken, true) {
            return Ok(());
        }
        let patience = self.patience;
        self.set_patience(Some(FIRST_WORD))?;
        self.request("GET", "/", "")?;
        self.set_patience(patience)
    }

    /// Asks for one thing and waits for the answer.
    pub fn request(&mut self, method: &str, path: &str, body: &str) -> Result<Answer> {
        self.hear_a_word()?;
        self.send(method, path, body)?;
        let (status, length) = self.head().map_err(|error| self.no_answer(method, path, &error))?;
        let mut text = Vec::new();
        let length = length.unwrap_or(0);
        // Half an answer is none.
        let read = match length {
            0..=BODY_MAX => self.stream.by_ref().take(length).read_to_end(&mut text),
            _ => Err(std::io::Error::other(format!("it has {length} bytes, {BODY_MAX} at most are read"))),
        };
        let whole = read.and_then(|count| match count as u64 == length {
            true => Ok(()),
            false => Err(ErrorKind::UnexpectedEof.into()),
        });
        whole.map_err(|error| self.no_answer(method, path, &error))?;
        Ok(Answer { status, body: String::from_utf8_lossy(&text).into_owned() })
    }

    /// Asks for a stream of lines.
    pub fn follow(self, path: &str) -> Result<Lines> {
        self.follow_if_told(path)?.ok_or_else(|| {
            Error::config(format!(
                "the monitor knows no `GET {path}`: one that is called `firecracker` has what Firecracker has"
            ))
        })
    }

    /// Asks for a stream of lines. None: the monitor does not have it, as one that is called `firecracker`.
    pub fn follow_if_told(mut self, path: &str) -> Result<Option<Lines>> {
        self.hear_a_word()?;
        self.send("GET", path, "")?;
        match self.head().map_err(|error| self.no_answer("GET", path, &error))? {
            (200, None) => Ok(Some(Lines { stream: self.stream, line: Vec::new() })),
            (400, _) => Ok(None),
            (status, _) => Err(Error::host(format!("the monitor answers `GET {path}` with status {status}"))),
        }
    }

    /// Gives each line of what the monitor tells at `path` to `each`, as it comes, until the monitor ends, or `each` says
    /// that it has had enough of them by `false`.
    pub fn lines(self, path: &str, mut each: impl FnMut(&str) -> Result<bool>) -> Result<()> {
        let mut lines = self.follow(path)?;
        while let Heard::Line(line) = lines.next(None)?
            && each(&line)?
        {}
        Ok(())
    }

    fn send(&mut self, method: &str, path: &str, body: &str) -> Result<()> {
        // What is not visible ASCII would end the line, and start another request.
        if !path.starts_with('/') || !path.bytes().all(|byte| byte.is_ascii_graphic() || byte > 127) {
            return Err(Error::config(format!(
                "`{path}` is no path of the API: it begins with a slash, without spaces"
            )));
        }
        let length = match body.len() {
            0 => String::new(),
            length => format!("Content-Type: application/json\r\nContent-Length: {length}\r\n"),
        };
        let text = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n{body}");
        self.stream.get_mut().write_all(text.as_bytes()).with_context(|| format!("send `{method} {path}`"))
    }

    /// The status, and the length of the body if it has one.
    fn head(&mut self) -> std::io::Result<(u16, Option<u64>)> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let before = head.len();
            self.stream.by_ref().take(HEAD_MAX).read_until(b'\n', &mut head)?;
            if head.len() == before || head.len() as u64 > HEAD_MAX {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        let mut headers = [httparse::EMPTY_HEADER; 16];
        let mut response = httparse::Response::new(&mut headers);
        response.parse(&head).map_err(|error| std::io::Error::new(ErrorKind::InvalidData, error))?;
        let length =
            response.headers.iter().find(|header| header.name.eq_ignore_ascii_case("Content-Length"));
        let length = length.and_then(|header| std::str::from_utf8(header.value).ok()?.parse().ok());
        Ok((response.code.unwrap_or_default(), length))
    }

    fn no_answer(&self, method: &str, path: &str, error: &std::io::Error) -> Error {
        let reason = match (error.kind(), self.patience) {
            (ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset, _) => "the monitor hung up".to_owned(),
            (ErrorKind::WouldBlock, Some(patience)) => {
                let process = self.process();
                let number = process.map(|process| format!(" (process {process})")).unwrap_or_default();
                let pid = process.map_or_else(|| "PID".to_owned(), |process| process.to_string());
                format!(
                    "who serves `{}`{number} has not answered for {} s: it was stopped, and `kill -CONT {pid}` has it go \
                     on, or it is held up: try again, or end it with its guest by `kill -KILL {pid}`",
                    self.socket.display(),
                    patience.as_secs()
                )
            }
            _ => error.to_string(),
        };
        Error::host(format!("wait for the answer to `{method} {path}`: {reason}"))
    }
}

/// A stream of lines.
pub struct Lines {
    stream: BufReader<UnixStream>,
    /// The beginning of the next one.
    line: Vec<u8>,
}

/// How a wait for a line ended.
#[derive(Debug, PartialEq)]
pub enum Heard {
    /// This line, without its end.
    Line(String),
    /// No line came in the time given.
    Nothing,
    /// The monitor has ended.
    End,
}

impl Lines {
    /// Waits for the next line, so long at most.
    pub fn next(&mut self, time: Option<Duration>) -> Result<Heard> {
        // No time at all would mean for ever.
        let time = time.map(|time| time.max(Duration::from_millis(1)));
        self.stream.get_ref().set_read_timeout(time).context("wait for lines")?;
        let room = BODY_MAX - self.line.len() as u64;
        match self.stream.by_ref().take(room).read_until(b'\n', &mut self.line) {
            Ok(0) => Ok(Heard::End),
            Ok(_) => {
                let line = String::from_utf8_lossy(&self.line).trim_end().to_owned();
                self.line.clear();
                Ok(Heard::Line(line))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Heard::Nothing),
            Err(error) => Err(error).context("read a line"),
        }
    }
}

/// Connects to who listens at `path`. Once the kernel keeps no more clients for who takes none, connect(2) would wait for
/// ever, as those that have given up on a process that is stopped are kept, too: it is tried for so long.
fn open(path: &Path, patience: Duration) -> std::io::Result<UnixStream> {
    let begun = Instant::now();
    loop {
        match socket::open(path) {
            Err(error) if error.kind() == ErrorKind::WouldBlock && begun.elapsed() < patience => {
                std::thread::sleep(Duration::from_millis(5));
            }
            stream => return stream.and_then(|stream| stream.set_nonblocking(false).map(|()| stream)),
        }
    }
}

fn cannot_connect(server: Server, error: &std::io::Error) -> Error {
    let text = match (error.kind(), server) {
        (ErrorKind::NotFound, Server::Monitor) => {
            "there is no such socket: `alula serve` or `alula run --api-sock SOCKET` makes one, and it is gone when its \
             guest has ended (`alula ctl list` has those that there are)"
        }
        (ErrorKind::NotFound, Server::Template) => {
            "there is no such socket: `alula template FOLDER --api-sock SOCKET` makes one, and it is gone when that has \
             ended"
        }
        (ErrorKind::ConnectionRefused, Server::Monitor) => {
            "nobody listens there: the process that made it has ended, or it is no API socket (`alula ctl list` has \
             those that there are)"
        }
        (ErrorKind::ConnectionRefused, Server::Template) => {
            "nobody listens there: the template has ended, and `alula template FOLDER --api-sock SOCKET` starts another"
        }
        (ErrorKind::WouldBlock, _) => {
            "who serves it takes no clients, and no more of them can wait: it was stopped, and `kill -CONT PID` has it go \
             on, or it is held up"
        }
        (ErrorKind::PermissionDenied, _) => "this user may not: be its owner, or root",
        _ => return Error::host(error.to_string()),
    };
    Error::host(text)
}
