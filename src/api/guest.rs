//! Questions of the API to the agent in the guest: how the guest is (`GET /guest`), and to look after its PCI bus and its
//! CPUs.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::bodies::Guest;
use crate::error::{Context, Error, Result};
use crate::guest::call::{Call, reach};
use crate::guest::hearing::Hearing;
use crate::host::socket;
use crate::jobs::Ticket;
use crate::log;
use crate::machine::RunState;
use crate::microvm::Microvm;
use crate::microvm::plugging::Agent;
use crate::pci;
use crate::protocol::PORT;
use crate::protocol::request::{Ask, Greeting, Pci, Set};

/// How long a guest may take for its answer: one that never answers must not keep a job's place for long.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a guest may take to look for a device, or to let one go: its driver writes out what it has.
const RELEASE_TIME: Duration = Duration::from_secs(30);
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

/// Has the agent in a guest that does not hear of it by itself look for a device that has come. Nobody waits for that:
/// without an agent, the guest looks when it likes. A device in a slot needs nobody.
pub fn look_for_device(microvm: &mut Microvm, name: &str) {
    if microvm.machine().is_some_and(|machine| machine.is_in_slot(name)) {
        return;
    }
    if let Ok(stream) = open_deaf(microvm) {
        have_set(microvm, stream, Set { pci: Some(Pci::Rescan), ..Set::default() });
    }
}

/// Has the agent in a guest that was given CPUs (`has_more`) bring them up, and switch off those that it is to let go, if
/// the guest does not hear of that by itself. Nobody waits for that: without an agent, the guest does so when it likes.
pub fn change_cpus(microvm: &mut Microvm, has_more: bool) {
    let Some(machine) = microvm.machine() else { return };
    let cpus_off = machine.unheard_cpus();
    let cpus = machine.given_cpus().skip(1).filter(|number| !cpus_off.contains(number)).collect();
    if !has_more && cpus_off.is_empty() {
        return;
    }
    if let Ok(stream) = open(microvm) {
        have_set(microvm, stream, Set { cpus, cpus_off, ..Set::default() });
    }
}

/// Has a job have the agent set what is said, for whom nobody waits.
fn have_set(microvm: &mut Microvm, stream: UnixStream, what: Set) {
    let work = move || -> crate::microvm::Finish {
        let done = set(stream, what);
        Box::new(move |_| done.map(|()| None))
    };
    if let Err(error) = microvm.start_job("guest", work) {
        log::debug(format_args!("the agent in the guest is not asked: {error}"));
    }
}

/// The agent in a guest that cannot be asked otherwise to let a device go.
pub fn agent(microvm: &mut Microvm) -> Option<Agent> {
    let stream = open_deaf(microvm).ok()?;
    let release = |place| match pci::slot_of(place) {
        Some(slot) => Pci::Empty(slot as u8),
        None => Pci::Remove(place as u8),
    };
    let release = move |place| Set { pci: Some(release(place)), ..Set::default() };
    Some(Box::new(move |place| set(stream, release(place))))
}

/// A connection to a guest that does not hear by itself of devices that come and go.
fn open_deaf(microvm: &mut Microvm) -> Result<UnixStream> {
    match microvm.machine() {
        Some(machine) if !machine.hears_of_devices() => open(microvm),
        _ => Err(Error::guest("the guest hears by itself")),
    }
}

fn set(stream: UnixStream, what: Set) -> Result<()> {
    set_within(RELEASE_TIME, stream, what)
}

fn set_within(time: Duration, stream: UnixStream, what: Set) -> Result<()> {
    let deadline = Instant::now() + time;
    let stream = reach(stream, PORT, PATIENCE)?
        .ok_or_else(|| Error::guest(format!("no agent listens on vsock port {PORT} of the guest")))?;
    Hearing::new(Call::new(stream, Ask::Set(what))?, Some(deadline))?.finish(|_| Ok(())).map(drop)
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::protocol::frame::{Type, put};

    /// The words for an agent that is to let a device go, has a quarter of a second for that, and answers with these bytes.
    fn asked(bytes: &[u8]) -> String {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                theirs.read_exact(&mut [0; 11]).unwrap();
                theirs.write_all(bytes).unwrap();
                // The connection stays until the caller has had enough of it.
                let _ = theirs.read_to_end(&mut Vec::new());
            });
            let release = Set { pci: Some(Pci::Remove(5)), ..Set::default() };
            set_within(Duration::from_millis(250), ours, release).unwrap_err().to_string()
        })
    }

    #[test]
    fn an_agent_that_never_answers_is_asked_for_so_long() {
        assert!(asked(b"").contains("there was no answer for 3 s"));
        let mut greeting = b"OK 1\n".to_vec();
        put(&mut greeting, Type::Greeting, br#"{"protocol": 1, "agent": "9"}"#);
        for silent in [b"OK 1\n", &greeting[..]] {
            let error = asked(silent);
            assert!(error.contains("does not answer, and the time is up"), "{error}");
        }
    }
}
