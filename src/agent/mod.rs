//! The agent in a guest (docs/agent.md): starts programs there for the host, one for each connection, and passes
//! their input and output. One thread and one epoll loop.

mod host;
pub mod init;
mod process;
mod session;

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use crate::error::{Context, Result};
use crate::log;
use crate::poll::{Events, Interest, Ready};
use crate::protocol::{PORT, READY_FROM, READY_PORT};
use crate::sys::{network, process as calls};
use session::{End, LINGERING, Next, Scratch, Session};

/// The most connections that are served at once; others wait in the listener's backlog. Each connection has up
/// to four descriptors, of the 1,024 that a process has.
const SESSIONS_MAX: usize = 200;
/// How long a listener that could not give a connection (the machine is out of something) is left alone.
const REST: Duration = Duration::from_millis(100);

const LISTENER: u64 = 0;
const CHILDREN: u64 = 1;
/// A session's tokens are its number times this, and which of its descriptors it is.
const PARTS: u64 = 4;

/// Whether this process may give files to other users.
pub fn is_root() -> bool {
    calls::identity().0 == 0
}

/// Who listens.
pub struct Listener(OwnedFd);

impl Listener {
    /// At this vsock port, for the host.
    pub fn vsock(port: u32) -> Result<Self> {
        let listener = network::vsock_listen(port).with_context(|| {
            format!("listen on vsock port {port} (it needs vsock in the kernel, and root below 1024)")
        })?;
        if port == PORT {
            // A host that does not want to know refuses.
            let _ = network::vsock_call_host(READY_FROM, READY_PORT);
        }
        Ok(Self(listener))
    }

    /// At a Unix socket, for whoever may connect to it.
    pub fn unix(listener: UnixListener) -> Result<Self> {
        listener.set_nonblocking(true).context("set up the listener")?;
        Ok(Self(listener.into()))
    }
}

/// The agent.
pub struct Agent {
    events: Events,
    listener: Listener,
    /// The listener is waited for.
    listens: bool,
    children: File,
    sessions: HashMap<u64, Session>,
    last: u64,
    /// Those that have more to do.
    busy: Vec<u64>,
    /// Those whose terminals may be silent for good.
    lingering: Vec<u64>,
    scratch: Box<Scratch>,
}

impl Agent {
    /// An agent for those that connect to `listener`.
    pub fn new(listener: Listener) -> Result<Self> {
        let events = Events::new()?;
        let children = calls::watch(&[libc::SIGCHLD]).context("watch for the end of processes")?.into();
        events.add(&listener.0, Interest::IN, LISTENER)?;
        events.add(&children, Interest::IN, CHILDREN)?;
        Ok(Self {
            events,
            listener,
            listens: true,
            children,
            sessions: HashMap::new(),
            last: 0,
            busy: Vec::new(),
            lingering: Vec::new(),
            // An array that is made first and boxed then has its room on the stack, of which every page is touched,
            // in the function that this is made part of: that of every command.
            scratch: vec![0; size_of::<Scratch>()].into_boxed_slice().try_into().expect("it has this size"),
        })
    }

    /// Serves for ever.
    pub fn run(&mut self) -> Result<()> {
        let mut ready = Vec::new();
        loop {
            let waits_for_room = !self.listens && self.sessions.len() < SESSIONS_MAX;
            let timeout = match (self.busy.is_empty(), self.lingering.is_empty(), waits_for_room) {
                (false, ..) => Some(Duration::ZERO),
                (true, false, _) => Some(LINGERING),
                (true, true, true) => Some(REST),
                (true, true, false) => None,
            };
            let rested = !self.listens;
            self.events.wait(timeout, &mut ready)?;
            if rested && self.sessions.len() < SESSIONS_MAX {
                self.events.change(&self.listener.0, Interest::IN, LISTENER)?;
                self.listens = true;
            }
            let mut todo = std::mem::take(&mut self.busy);
            todo.append(&mut self.lingering);
            for event in &ready {
                match event.token {
                    LISTENER => self.accept()?.iter().for_each(|id| todo.push(*id)),
                    CHILDREN => self.reap(&mut todo),
                    token => {
                        self.note(event);
                        todo.push(token / PARTS);
                    }
                }
            }
            todo.sort_unstable();
            todo.dedup();
            todo.into_iter().for_each(|id| self.go_on(id));
        }
    }

    fn accept(&mut self) -> Result<Option<u64>> {
        let accepted = network::vsock_accept(&self.listener.0);
        if self.sessions.len() + 1 >= SESSIONS_MAX || accepted.is_err() {
            let is_gone = |error: &std::io::Error| {
                [ErrorKind::WouldBlock, ErrorKind::ConnectionAborted, ErrorKind::Interrupted]
                    .contains(&error.kind())
            };
            if !accepted.as_ref().is_err_and(is_gone) {
                self.events.change(&self.listener.0, Interest::empty(), LISTENER)?;
                self.listens = false;
            }
        }
        let Ok((stream, cid)) = accepted else { return Ok(None) };
        if cid.is_some_and(|cid| cid != network::VSOCK_HOST_CID) {
            log::line(format_args!(
                "a connection from CID {} was refused: only the host is answered",
                cid.unwrap_or(0)
            ));
            return Ok(None);
        }
        self.last += 1;
        let session = Session::new(stream.into());
        let interest = Interest::IN | Interest::OUT | Interest::READ_HANG_UP | Interest::EDGE_TRIGGERED;
        self.events.add(&session.stream.file, interest, self.last * PARTS)?;
        self.sessions.insert(self.last, session);
        Ok(Some(self.last))
    }

    fn reap(&mut self, todo: &mut Vec<u64>) {
        // How many signals there were does not matter.
        while self.children.read(&mut self.scratch[..]).is_ok() {}
        while let Some((pid, exit)) = calls::reap() {
            let is_it =
                |session: &Session| session.process.as_ref().is_some_and(|process| process.pid == pid);
            if let Some((id, session)) = self.sessions.iter_mut().find(|(_, session)| is_it(session)) {
                session.process_ended(exit);
                todo.push(*id);
            }
        }
    }

    /// Notes what an edge tells. One for a session that is over is for nobody.
    fn note(&mut self, event: &Ready) {
        let Some(session) = self.sessions.get_mut(&(event.token / PARTS)) else { return };
        let part = event.token % PARTS;
        if part == 0 {
            let readable = event
                .events
                .intersects(Interest::IN | Interest::READ_HANG_UP | Interest::HANG_UP | Interest::ERROR);
            session.stream_is_ready(readable);
        } else if let Some(process) = &mut session.process {
            let ends = [&mut process.stdin, &mut process.stdout, &mut process.stderr];
            if let Some(Some(end)) = ends.into_iter().nth(part as usize - 1) {
                end.is_ready = true;
            }
        }
    }

    fn go_on(&mut self, id: u64) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let was_running = session.process.is_some();
        let mut next = session.go_on(&mut self.scratch);
        if let (false, Some(process)) = (was_running, &session.process) {
            let ends = [
                (&process.stdin, Interest::OUT),
                (&process.stdout, Interest::IN),
                (&process.stderr, Interest::IN),
            ];
            let add = |(part, (end, interest)): (u64, (&Option<End>, Interest))| match end {
                Some(end) => {
                    self.events.add(&end.file, interest | Interest::EDGE_TRIGGERED, id * PARTS + part)
                }
                None => Ok(()),
            };
            // The machine is out of something.
            if (1..).zip(ends).try_for_each(add).is_err() {
                session.hang_up();
                next = Next::Ends;
            }
        }
        match next {
            Next::Waits => {}
            Next::Lingers => self.lingering.push(id),
            Next::GoesOn => self.busy.push(id),
            Next::Ends => {
                self.sessions.remove(&id);
            }
        }
    }
}
