//! One connection: its frames, and the process that it started. Everything is tried when its descriptor is known
//! to be ready, which an edge of epoll tells, and in rounds whose number a constant bounds.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use super::host;
use super::process::{self, Refusal, Started};
use crate::error::{Error, Result};
use crate::protocol::frame::{CONTENT_MAX, Failure, HEAD, INPUT_WINDOW, Inbox, Type, head, put};
use crate::protocol::request::{Ask, Greeting, PROTOCOL, Request};
use crate::sys::process::{self as calls, Exit};

/// The most rounds for one connection before others have their turn: no client keeps the loop.
const ROUNDS: usize = 16;
/// How long after its last output the terminal of a program that has ended counts as read. Output reaches the
/// agent's end by work of the kernel's, a moment after it was written. EIO tells the agent that there is no more,
/// but not while a program that was left behind has the terminal open.
pub const LINGERING: Duration = Duration::from_millis(50);
/// The key that ends a terminal's input (termios(3), VEOF).
const END_OF_FILE: u8 = 4;

/// Room for one read: a frame's head and its content.
pub type Scratch = [u8; HEAD + CONTENT_MAX];

/// A descriptor, and whether it may be ready.
pub struct End {
    pub file: File,
    pub is_ready: bool,
}

impl End {
    fn new(file: File) -> Self {
        Self { file, is_ready: true }
    }

    /// Makes `call`, and gives what the call returned; None: the call would have waited.
    fn attempt<T>(
        &mut self,
        mut call: impl FnMut(&mut File) -> std::io::Result<T>,
    ) -> Option<std::io::Result<T>> {
        if !self.is_ready {
            return None;
        }
        loop {
            match call(&mut self.file) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.is_ready = false;
                    return None;
                }
                result => return Some(result),
            }
        }
    }
}

/// What a process has open, and how it ended.
pub struct Process {
    pub pid: u32,
    has_terminal: bool,
    pub stdin: Option<End>,
    pub stdout: Option<End>,
    pub stderr: Option<End>,
    /// Input that it has not read.
    pending: Vec<u8>,
    /// No more of it comes.
    input_ended: bool,
    /// The last byte of `pending` is the key by which a terminal's input ends, which the client has not sent.
    has_end_key: bool,
    /// Input that was taken, and the client has not been told.
    taken: u32,
    exit: Option<Exit>,
    /// It has ended, and its terminal has been silent since then.
    silent_since: Option<Instant>,
}

/// What becomes of a session.
#[derive(Debug, PartialEq)]
pub enum Next {
    /// It waits for one of its descriptors.
    Waits,
    /// It waits for one of its descriptors, or for [`LINGERING`] to pass.
    Lingers,
    /// There is more to do at once.
    GoesOn,
    /// It is over.
    Ends,
}

/// A connection.
pub struct Session {
    pub stream: End,
    is_writable: bool,
    inbox: Inbox,
    outbox: Vec<u8>,
    sent: usize,
    /// What was asked has been answered: the connection ends when that is out.
    is_over: bool,
    pub process: Option<Process>,
}

impl Session {
    pub fn new(stream: File) -> Self {
        Self {
            stream: End::new(stream),
            is_writable: true,
            inbox: Inbox::default(),
            outbox: Vec::new(),
            sent: 0,
            is_over: false,
            process: None,
        }
    }

    /// The stream became ready.
    pub fn stream_is_ready(&mut self, readable: bool) {
        self.stream.is_ready |= readable;
        // What is said to a client that has gone fails, which ends the session.
        self.is_writable = true;
    }

    /// The process has ended: what it has written last is read before its exit is told.
    pub fn process_ended(&mut self, exit: Exit) {
        if let Some(process) = &mut self.process {
            process.exit = Some(exit);
            for end in [&mut process.stdout, &mut process.stderr].into_iter().flatten() {
                end.is_ready = true;
            }
        }
    }

    /// Does what there is to do.
    pub fn go_on(&mut self, scratch: &mut Scratch) -> Next {
        for _ in 0..ROUNDS {
            // In this order: room for what comes is made first.
            let moved =
                [self.send(), self.receive(scratch), self.feed(), self.collect(scratch), Ok(self.conclude())];
            let mut any = false;
            for moved in moved {
                match moved {
                    Ok(moved) => any |= moved,
                    Err(error) => {
                        self.refuse(Failure::Other, &error.to_string());
                        any = true;
                    }
                }
            }
            if self.is_over && self.outbox.is_empty() {
                return Next::Ends;
            }
            if !any {
                let lingers = self.process.as_ref().is_some_and(|process| process.silent_since.is_some());
                return if lingers { Next::Lingers } else { Next::Waits };
            }
        }
        Next::GoesOn
    }

    /// The client has gone, or is sent away: its process loses its terminal, so to say.
    pub fn hang_up(&mut self) {
        self.is_over = true;
        (self.outbox, self.sent) = (Vec::new(), 0);
        if let Some(Process { pid, exit: None, .. }) = self.process {
            calls::signal_group(pid, libc::SIGHUP as u8);
        }
    }

    fn send(&mut self) -> Result<bool> {
        if self.outbox.is_empty() || !self.is_writable {
            return Ok(false);
        }
        match self.stream.file.write(&self.outbox[self.sent..]) {
            Ok(count) => {
                self.sent += count;
                if self.sent == self.outbox.len() {
                    (self.outbox, self.sent) = (Vec::new(), 0);
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.is_writable = false,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => self.hang_up(),
        }
        Ok(self.is_writable)
    }

    fn receive(&mut self, scratch: &mut Scratch) -> Result<bool> {
        if self.is_over {
            return Ok(false);
        }
        let Some(read) = self.stream.attempt(|stream| stream.read(scratch)) else { return Ok(false) };
        let count = match read {
            Ok(count) if count > 0 => count,
            _ => {
                self.hang_up();
                return Ok(true);
            }
        };
        let mut inbox = std::mem::take(&mut self.inbox);
        inbox.push(&scratch[..count]);
        while let Some((kind, content)) = inbox.pop()?
            && !self.is_over
        {
            self.take(kind, content)?;
        }
        inbox.shrink();
        self.inbox = inbox;
        Ok(true)
    }

    fn take(&mut self, kind: Type, content: &[u8]) -> Result<()> {
        let refused = |what: &str| Err(Error::guest(format!("{what} was not expected here")));
        let Some(process) = &mut self.process else {
            return match kind {
                Type::Request => self.begin(content),
                _ => refused("a frame before the request"),
            };
        };
        match (kind, content) {
            (Type::Input, _) if process.input_ended => return refused("input after its end"),
            (Type::Input, bytes) => {
                if process.pending.len() + process.taken as usize + bytes.len() > INPUT_WINDOW {
                    return refused("more input than the window has room for");
                }
                match process.stdin {
                    Some(_) => process.pending.extend_from_slice(bytes),
                    // The process reads no more, and the client has not heard of it yet.
                    None => process.taken += bytes.len() as u32,
                }
            }
            (Type::InputEnd, _) if !process.input_ended => {
                process.input_ended = true;
                if process.has_terminal {
                    process.pending.push(END_OF_FILE);
                    process.has_end_key = true;
                }
            }
            (Type::InputEnd, _) => {}
            (Type::Signal, [signal]) if process.exit.is_none() => {
                let terminal = process.stdout.as_ref().filter(|_| process.has_terminal);
                let foreground = terminal.and_then(|end| calls::foreground(&end.file));
                calls::signal_group(foreground.filter(|group| *group > 1).unwrap_or(process.pid), *signal);
            }
            (Type::Window, [a, b, c, d]) => {
                let size = (u16::from_le_bytes([*a, *b]), u16::from_le_bytes([*c, *d]));
                if let Some(end) = process.stdout.as_ref().filter(|_| process.has_terminal) {
                    // A terminal that is gone has no size.
                    let _ = calls::set_window(&end.file, size);
                }
            }
            (Type::Signal, _) => {}
            _ => return refused("a frame that a client does not send"),
        }
        Ok(())
    }

    fn begin(&mut self, content: &[u8]) -> Result<()> {
        let mut greeting = Greeting {
            protocol: PROTOCOL,
            agent: env!("CARGO_PKG_VERSION").to_owned(),
            ..Greeting::default()
        };
        /// What every version has.
        #[derive(serde::Deserialize)]
        struct Version {
            protocol: u32,
        }
        let parsed = match serde_json::from_slice(content) {
            Ok(Version { protocol: PROTOCOL }) => serde_json::from_slice(content)
                .map_err(|error| (Failure::Other, format!("read the request: {error}"))),
            Ok(Version { protocol }) => Err((
                Failure::Other,
                format!(
                    "the client speaks version {protocol} of the protocol, this agent version {PROTOCOL}"
                ),
            )),
            Err(error) => Err((Failure::Other, format!("read the request: {error}"))),
        };
        let mut is_over = false;
        let done = parsed.and_then(|Request { ask, .. }| {
            let has_terminal = matches!(&ask, Ask::Run(run) if run.terminal.is_some());
            match start(ask, &mut greeting)? {
                Some(started) => {
                    greeting.pid = Some(started.pid);
                    self.process = Some(Process::new(started, has_terminal));
                }
                None => is_over = true,
            }
            Ok(())
        });
        let greeting = serde_json::to_vec(&greeting).expect("it is plain data");
        put(&mut self.outbox, Type::Greeting, &greeting);
        match done {
            Ok(()) if is_over => {
                put(&mut self.outbox, Type::Exited, &[0, 0]);
                self.is_over = true;
            }
            Ok(()) => {}
            Err((failure, why)) => self.refuse(failure, &why),
        }
        Ok(())
    }

    /// Ends the connection after saying why.
    fn refuse(&mut self, failure: Failure, why: &str) {
        if self.is_over {
            return;
        }
        let mut content = vec![failure as u8];
        content.extend_from_slice(&why.as_bytes()[..why.len().min(CONTENT_MAX - 1)]);
        let mut rest = std::mem::take(&mut self.outbox);
        let sent = self.sent;
        self.hang_up();
        put(&mut rest, Type::Failed, &content);
        (self.outbox, self.sent) = (rest, sent);
    }

    /// Passes input on.
    fn feed(&mut self) -> Result<bool> {
        let Some(process) = &mut self.process else { return Ok(false) };
        let Some(stdin) = &mut process.stdin else { return Ok(false) };
        if process.pending.is_empty() {
            // A terminal stays: its end is a key.
            if process.input_ended && !process.has_terminal {
                process.stdin = None;
            }
            return Ok(false);
        }
        let pending = &process.pending;
        let Some(written) = stdin.attempt(|file| file.write(pending)) else { return Ok(false) };
        let count = written.unwrap_or_else(|_| {
            // It reads no more.
            process.stdin = None;
            process.pending.len()
        });
        let sent = process.pending.len() - usize::from(process.has_end_key);
        process.pending.drain(..count);
        process.has_end_key &= !process.pending.is_empty();
        process.taken += count.min(sent) as u32;
        Ok(true)
    }

    /// Takes output, when what was there before is out.
    fn collect(&mut self, scratch: &mut Scratch) -> Result<bool> {
        let Some(process) = &mut self.process else { return Ok(false) };
        if !self.outbox.is_empty() || self.is_over {
            return Ok(false);
        }
        if process.taken > 0 {
            put(&mut self.outbox, Type::Taken, &std::mem::take(&mut process.taken).to_le_bytes());
        }
        for (end, kind) in [(&mut process.stdout, Type::Output), (&mut process.stderr, Type::Errors)] {
            let Some(open) = end else { continue };
            let mut read = |open: &mut End| open.attempt(|file| file.read(&mut scratch[HEAD..]));
            // A terminal whose last program has gone says EIO. Linux waits for output on its way, looks whether there
            // is any, and then whether the last program has gone (n_tty_read): what a program writes between the two
            // and ends is there at the next read.
            let result = match read(open) {
                Some(Err(_)) if process.has_terminal => read(open),
                result => result,
            };
            match result {
                Some(Ok(0) | Err(_)) => *end = None,
                Some(Ok(count)) => {
                    process.silent_since = None;
                    scratch[..HEAD].copy_from_slice(&head(kind, count));
                    self.outbox.extend_from_slice(&scratch[..HEAD + count]);
                }
                None => {}
            }
        }
        Ok(!self.outbox.is_empty())
    }

    /// Tells the exit once all output is told; true: it was.
    fn conclude(&mut self) -> bool {
        let Some(process) = &mut self.process else { return false };
        let Some(exit) = process.exit.filter(|_| self.outbox.is_empty() && !self.is_over) else {
            return false;
        };
        if [&process.stdout, &process.stderr].into_iter().flatten().any(|end| end.is_ready) {
            return false;
        }
        if process.has_terminal && process.stdout.is_some() {
            let since = *process.silent_since.get_or_insert_with(Instant::now);
            if since.elapsed() < LINGERING {
                return false;
            }
        }
        let content = match exit {
            Exit::Code(code) => [0, code],
            Exit::Signal(signal) => [1, signal],
        };
        put(&mut self.outbox, Type::Exited, &content);
        self.is_over = true;
        true
    }
}

impl Process {
    fn new(started: Started, has_terminal: bool) -> Self {
        let Started { pid, stdin, stdout, stderr } = started;
        let [stdin, stdout, stderr] = [stdin, stdout, stderr].map(|file| file.map(End::new));
        Self {
            pid,
            has_terminal,
            stdin,
            stdout,
            stderr,
            pending: Vec::new(),
            input_ended: false,
            has_end_key: false,
            taken: 0,
            exit: None,
            silent_since: None,
        }
    }
}

/// Does what is asked; a process that was started for it, if there is one.
fn start(ask: Ask, greeting: &mut Greeting) -> Result<Option<Started>, Refusal> {
    let other = |why: String| (Failure::Other, why);
    match ask {
        Ask::Run(run) => process::start(&run).map(Some),
        Ask::Read(read) => {
            process::start_own(&[Path::new("send"), &read.path], read.user.as_deref()).map(Some)
        }
        Ask::Write(write) => {
            let parents = if write.parents { "parents" } else { "no-parents" };
            let words = [Path::new("receive"), &write.path, Path::new(&write.name), Path::new(parents)];
            process::start_own(&words, write.user.as_deref()).map(Some)
        }
        Ask::Set(set) => host::set(&set).map(|()| None).map_err(|error| other(error.to_string())),
        Ask::Info {} => {
            greeting.info = Some(host::info());
            Ok(None)
        }
        Ask::End { reboot } => host::end(reboot).map(|()| None).map_err(|error| other(error.to_string())),
    }
}
