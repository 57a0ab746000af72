//! A template: a snapshot that was read once, and a process that makes a copy of itself for each clone that a client
//! asks for. The copy is the clone's monitor; it shares what was read with the template until one of both writes to it.
//!
//! The process has one thread and serves one socket; no machine of KVM's is made in it, for that would belong to its
//! memory alone. A request waits for what its clone tells by a pipe, so that several clones are made at a time.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use super::server::Server;
use super::snapshot::Made;
use super::{BODY_MAX, Reply, Response, routes};
use crate::config::Config;
use crate::error::{Context, Error, Result};
use crate::jobs::Ticket;
use crate::log;
use crate::microvm::snapshots::{Load, Opened};
use crate::poll::{Events, Interest, Ready};
use crate::sys::process;

/// The most clones that are made at a time. Clients that ask and hang up would make processes without end, each of
/// which may wait for a disk that does not answer.
const BIRTHS_MAX: usize = 32;
/// The most that a clone tells, in bytes: what a pipe takes at once (PIPE_BUF, pipe(7)).
const TOLD_MAX: usize = libc::PIPE_BUF;
/// The first byte of what a clone tells: all is well, or the reason why not follows.
const DONE: u8 = b'+';
const FAILED: u8 = b'-';

/// The signals that end the template; its clones do not end with it.
const ENDING: [i32; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

const SIGNALS: u64 = 0;
/// The first token of the clones that are being made, and the first token of the server.
const BIRTHS: u64 = 1;
const SERVER: u64 = BIRTHS + BIRTHS_MAX as u64;

/// A clone as it is to be.
pub struct Order {
    /// The clone's name.
    pub id: Option<String>,
    /// Where the clone's API is served; None: where the clone is found by its name.
    pub api_sock: Option<PathBuf>,
    /// Where the clone's messages, metrics and console go.
    pub config: Config,
    /// The respects in which the clone is to be other than the saved microVM.
    pub load: Load,
}

/// The ways in which a process ends to be a template.
pub enum Turn {
    /// A signal of this number ended the template.
    Ended(u8),
    /// The process is a copy of the template, and is to be this clone.
    Clone(Box<Newborn>),
}

/// A clone that is to be made of this process.
pub struct Newborn {
    /// The order for the clone, as a client gave it.
    pub order: Order,
    /// The snapshot, as the template has read it.
    pub opened: Opened,
    /// The means to tell the template whether the clone is there.
    pub report: Report,
}

/// A clone's word to its template.
pub struct Report(PipeWriter);

impl Report {
    /// Tells that the clone is there, or why it is not.
    pub fn tell(mut self, outcome: std::result::Result<(), &Error>) {
        let told = match outcome {
            Ok(()) => vec![DONE],
            Err(error) => {
                let mut reason = error.to_string();
                reason.truncate(reason.floor_char_boundary(TOLD_MAX - 1));
                [&[FAILED], reason.as_bytes()].concat()
            }
        };
        // A template that has ended wants to know nothing.
        let _ = self.0.write_all(&told);
    }
}

/// A clone that is being made.
struct Birth {
    ticket: Ticket,
    pid: u32,
    told: PipeReader,
}

impl Birth {
    /// The answer to the request for the clone, once the clone has told something.
    fn conclude(mut self) -> Response {
        let mut told = [0; TOLD_MAX];
        // A report is written by one write(2), and so is read by one read(2).
        let count = self.told.read(&mut told).unwrap_or(0);
        let fault = match told[..count].split_first() {
            Some((&DONE, _)) => return Response::Value(json!(Made { pid: self.pid })),
            Some((_, reason)) => String::from_utf8_lossy(reason).into_owned(),
            None => format!("its process, {}, has ended before it was there", self.pid),
        };
        refuse(&fault)
    }
}

fn refuse(reason: &str) -> Response {
    log::line(format_args!("`PUT /clones` was refused: {reason}"));
    Response::Fault(format!("Clone error: {reason}"))
}

/// The template.
pub struct Template {
    opened: Opened,
    server: Server,
    events: Events,
    signals: File,
    births: [Option<Birth>; BIRTHS_MAX],
    orders: Orders,
}

/// The orders for clones that are not begun yet.
#[derive(Default)]
struct Orders {
    last: Ticket,
    waiting: VecDeque<(Ticket, Order)>,
}

impl Orders {
    fn serve(&mut self, method: &str, path: &str, body: &[u8]) -> Reply {
        match routes::route_of_template(method, path, body).and_then(|body| body.plan()) {
            Ok(order) => {
                self.last += 1;
                self.waiting.push_back((self.last, order));
                Reply::Later { ticket: self.last, area: "Clone error" }
            }
            Err(message) => Response::Fault(message).into(),
        }
    }
}

impl Template {
    /// Serves clones of `opened` at `socket`, where nothing may be yet. From here on the signals that end the process
    /// are taken by [`Self::serve`].
    pub fn new(opened: Opened, socket: &Path) -> Result<Self> {
        // As process 1, a template has its clones for children, and orphans, too, which the kernel gives it.
        let ending = ENDING.into_iter().filter(|signal| !process::is_ignored(*signal));
        let watched: Vec<i32> = ending.chain([libc::SIGCHLD]).collect();
        let signals = process::watch(&watched).context("watch for signals")?;
        let (mut server, events) = (Server::bind(socket, BODY_MAX)?, Events::new()?);
        let signals = File::from(signals);
        events.add(&signals, Interest::IN, SIGNALS)?;
        server.register(&events, SERVER)?;
        let births = [const { None }; BIRTHS_MAX];
        Ok(Self { opened, server, events, signals, births, orders: Orders::default() })
    }

    /// Makes clones until a signal comes. The function returns in each clone, too, which is this process's copy.
    pub fn serve(mut self) -> Result<Turn> {
        let mut ready = Vec::new();
        loop {
            // The wait is a millisecond longer, as epoll rounds down.
            let rest = |at: Instant| at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            self.events.wait(self.server.expires_at().map(rest), &mut ready)?;
            for event in &ready {
                if let Some(signal) = self.handle(*event)? {
                    return Ok(Turn::Ended(signal));
                }
            }
            self.server.expire(Instant::now(), &self.events)?;
            while let Some((ticket, order)) = self.orders.waiting.pop_front() {
                if let Some(report) = self.begin(ticket)? {
                    // The clone keeps the snapshot alone: everything else is the template's.
                    self.server.leave();
                    return Ok(Turn::Clone(Box::new(Newborn { order, opened: self.opened, report })));
                }
            }
        }
    }

    fn handle(&mut self, event: Ready) -> Result<Option<u8>> {
        match event.token {
            SIGNALS => {
                while let Some(signal) = process::next_signal(&self.signals) {
                    if i32::from(signal) != libc::SIGCHLD {
                        return Ok(Some(signal));
                    }
                    while process::reap().is_some() {}
                }
            }
            token @ BIRTHS..SERVER => {
                if let Some(birth) = self.births[(token - BIRTHS) as usize].take() {
                    let ticket = birth.ticket;
                    let response = birth.conclude();
                    self.answer(ticket, &response)?;
                }
            }
            _ => {
                let Self { server, events, orders, .. } = self;
                let mut serve = |method: &str, path: &str, body: &[u8]| orders.serve(method, path, body);
                server.handle(event, events, &mut serve)?;
            }
        }
        Ok(None)
    }

    fn answer(&mut self, ticket: Ticket, response: &Response) -> Result<()> {
        let Self { server, events, orders, .. } = self;
        server.answer(ticket, response, events, &mut |method, path, body| orders.serve(method, path, body))
    }

    /// Begins to make a clone. The function returns twice: in the copy, with the means to tell how that went.
    fn begin(&mut self, ticket: Ticket) -> Result<Option<Report>> {
        match self.copy(ticket) {
            Ok(report) => Ok(report),
            Err(reason) => self.answer(ticket, &refuse(&reason)).map(|()| None),
        }
    }

    fn copy(&mut self, ticket: Ticket) -> std::result::Result<Option<Report>, String> {
        let Some(place) = self.births.iter().position(Option::is_none) else {
            return Err(format!("{BIRTHS_MAX} are being made already: wait until one is there"));
        };
        let cannot = |error: std::io::Error| format!("make a process for it: {error}");
        let (told, report) = std::io::pipe().map_err(cannot)?;
        let Some(pid) = process::copy().map_err(cannot)? else { return Ok(Some(Report(report))) };
        drop(report);
        // A descriptor that is open can be waited for, unless the kernel has no memory left for it.
        let token = BIRTHS + place as u64;
        self.events.add(&told, Interest::IN, token).map_err(|error| error.to_string())?;
        self.births[place] = Some(Birth { ticket, pid, told });
        Ok(None)
    }
}
