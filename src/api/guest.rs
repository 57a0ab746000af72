//! `GET /guest`: what the agent in the guest says of it.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::bodies::Guest;
use crate::error::{Context, Error, Result};
use crate::guest::call::{Call, reach};
use crate::guest::hearing::Hearing;
use crate::host::socket;
use crate::jobs::Ticket;
use crate::machine::RunState;
use crate::microvm::Microvm;
use crate::protocol::PORT;
use crate::protocol::request::{Ask, Greeting};

/// How long a guest may take for its answer: one that never answers must not keep a job's place for long.
const PATIENCE: Duration = Duration::from_secs(3);
/// The most bytes that are told of each text of a guest, and the most addresses: a guest can say anything, of any
/// length.
const TEXT_MAX: usize = 256;
const ADDRESSES_MAX: usize = 64;

/// Has a job ask the agent. An error: there is none to ask, which [`nobody`] tells.
pub fn look(microvm: &mut Microvm) -> Result<Ticket> {
    let stream = open(microvm)?;
    let work = move || -> crate::microvm::Finish {
        let guest = ask(stream).map_or_else(|error| nobody(&error), told);
        Box::new(move |_| serde_json::to_value(guest).map(Some).context("write what the agent said"))
    };
    microvm.start_job("guest", work)
}

/// A guest in which no agent answers.
pub fn nobody(error: &Error) -> Guest {
    Guest { reason: Some(error.to_string()), ..Guest::default() }
}

/// A connection to the guest's vsock device, as any program of the host has.
fn open(microvm: &Microvm) -> Result<UnixStream> {
    if microvm.state() == Some(RunState::Paused) {
        return Err(Error::guest("the guest is paused"));
    }
    let device = microvm.config().devices().find(|device| device.kind().section == "vsock");
    let config = device.map(serde_json::to_value).transpose().context("read the vsock device's path")?;
    match config.as_ref().and_then(|config| config["uds_path"].as_str()) {
        Some(path) => socket::connect(Path::new(path)),
        None => Err(Error::config("the guest has no vsock device, by which its agent would be reached")),
    }
}

fn ask(stream: UnixStream) -> Result<Greeting> {
    let deadline = Instant::now() + PATIENCE;
    let stream = reach(stream, PORT, PATIENCE)?
        .ok_or_else(|| Error::guest(format!("no agent listens on vsock port {PORT} of the guest")))?;
    Hearing::new(Call::new(stream, Ask::Info {})?, Some(deadline))?.finish(|_| Ok(()))
}

fn told(greeting: Greeting) -> Guest {
    let text = |mut text: String| {
        text.truncate(text.floor_char_boundary(TEXT_MAX));
        text
    };
    let info = greeting.info.unwrap_or_default();
    Guest {
        agent: true,
        version: Some(text(greeting.agent)),
        uptime_ms: Some(info.uptime_ms),
        memory_kib: Some(info.memory_kib),
        addresses: Some(info.addresses.into_iter().take(ADDRESSES_MAX).collect()),
        hostname: Some(text(info.hostname)),
        reason: None,
    }
}
