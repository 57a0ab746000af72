//! `alula exec`, `alula cp` and `alula wait`: what is asked of the agent in a guest that is up.

use std::fs;
use std::io::{ErrorKind, Seek, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::parent_id;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::arguments::exec::{Copy, Exec, Reach, Wait};
use super::guests;
use super::session::{self, Ends, Outcome, TIMED_OUT};
use crate::api::client::{Client, Heard};
use crate::archive;
use crate::error::{Context, Error, Kind, Result};
use crate::guest::call::{self, Call};
use crate::guest::hearing::Hearing;
use crate::guest::runtime;
use crate::json;
use crate::poll::{Events, Interest};
use crate::protocol::PORT;
use crate::protocol::request::{Ask, Read, Write as WriteTo};
use crate::sys::descriptor;

/// A guest whose monitor tells nothing of its agent is asked again after this time: an agent that was not there is
/// told of, but not one that did not answer.
const AGAIN: Duration = Duration::from_secs(1);
/// The same by a vsock device's socket, whose monitor tells nothing at all.
const AGAIN_UNTOLD: Duration = Duration::from_millis(20);
/// How long a monitor may take to be there: who starts one in the background waits for its guest right after.
const APPEARANCE: Duration = Duration::from_secs(10);
/// How long an agent that has taken the connection may be silent before it is asked again.
const SILENCE: Duration = Duration::from_secs(10);

/// Runs the command in the guest, and returns its exit code.
pub fn exec(exec: Exec) -> u8 {
    let has_input = exec.input;
    let outcome = vsock_of(&exec.reach).and_then(|socket| {
        let stream = connect(&socket)?;
        let run = session::with_terminal(exec.run, exec.terminal);
        let deadline = exec.timeout.map(|time| Instant::now() + time);
        session::attend(stream, run, &Ends { input: exec.input, signals: true, deadline })
    });
    match outcome {
        Ok(outcome) => {
            let (code, words) = outcome.conclude();
            if !has_input && was_given_input() {
                eprintln!("alula: standard input is not passed on without -i");
            }
            if let Some(words) = words.filter(|_| outcome != Outcome::Left) {
                eprintln!("alula: {words}");
            }
            code
        }
        Err(error) => {
            eprintln!("alula: {error}");
            super::FAILED_RUN
        }
    }
}

/// Whether somebody has given this process something to read by its standard input, which nobody has read: there are bytes
/// now in a pipe, or in a file that nobody has begun to read. Not so if the standard input is also that of the process above,
/// as in a shell's loop over lines, of a service or of a job: then it is not meant for this process alone, and is well left
/// to others.
fn was_given_input() -> bool {
    let input = descriptor::standard_input();
    let Ok(own) = input.metadata() else { return false };
    let has_bytes = || {
        if own.file_type().is_fifo() {
            let (events, mut ready) = (Events::new()?, Vec::new());
            events.add(&*input, Interest::IN, 0)?;
            events.wait(Some(Duration::ZERO), &mut ready)?;
            return Ok(ready.iter().any(|ready| ready.events.contains(Interest::IN)));
        }
        let is_new = own.is_file() && (&*input).stream_position().context("find the place in it")? == 0;
        Ok::<_, Error>(is_new && own.len() > 0)
    };
    let above = fs::metadata(format!("/proc/{}/fd/0", parent_id()));
    let is_own = above.is_ok_and(|above| (above.dev(), above.ino()) != (own.dev(), own.ino()));
    is_own && has_bytes().unwrap_or(false)
}

/// The monitor's control socket, if that is how the guest is reached.
pub fn api_of(reach: &Reach) -> Result<Option<PathBuf>> {
    Ok(match reach {
        Reach::Vsock(_) => None,
        Reach::Api(path) => Some(path.clone()),
        Reach::Id(id) => Some(runtime::find(id)?),
    })
}

/// The monitor's control socket as [`api_of`] has it. The error of a name under which no guest is found says where a guest
/// is that calls itself so.
pub fn api_or_place(reach: &Reach) -> Result<Option<PathBuf>> {
    api_of(reach).map_err(|error| match reach {
        Reach::Id(id) => match guests::elsewhere(id) {
            Some(socket) => Error::config(format!(
                "guest `{id}` is not among those that are found by their name, as it is in a jail or was given a socket \
                 of its own: reach it by `--api-sock {}`",
                socket.display()
            )),
            None => error,
        },
        _ => error,
    })
}

/// The socket of the guest's vsock device.
fn vsock_of(reach: &Reach) -> Result<PathBuf> {
    match (api_or_place(reach)?, reach) {
        (None, Reach::Vsock(path)) => Ok(path.clone()),
        (api, _) => ask_for_vsock(Client::connect(&api.unwrap_or_default())?),
    }
}

fn ask_for_vsock(mut client: Client) -> Result<PathBuf> {
    let answer = client.request("GET", "/vm/config", "")?;
    let config: Value = json::from_text(&answer.body).context("read the monitor's answer")?;
    match config["vsock"]["uds_path"].as_str() {
        Some(path) => Ok(PathBuf::from(path)),
        None => Err(Error::config(
            "the guest has no vsock device, by which its agent would be reached: give it one (`--vsock`, `/vsock`)",
        )),
    }
}

fn connect(socket: &Path) -> Result<UnixStream> {
    call::connect(socket, PORT)?.ok_or_else(|| {
        Error::guest(format!(
            "no agent listens on vsock port {PORT} of the guest: it is not up yet (`alula wait`), or there is none in \
             it (`alula agent`)"
        ))
    })
}

/// How a wait for an agent ended.
enum Waited {
    Answers,
    /// The time that the user gave is up; this is what was waited for.
    TimeIsUp(String),
}

/// Waits until the agent answers, and returns the exit code.
pub fn wait(wait: &Wait) -> u8 {
    match wait_for_agent(wait) {
        Ok(Waited::Answers) => 0,
        Ok(Waited::TimeIsUp(why)) => {
            eprintln!("alula: the time is up: {why}");
            TIMED_OUT
        }
        Err(error) => {
            eprintln!("alula: {error}");
            super::FAILED_SERVE
        }
    }
}

/// The vsock device's socket of a guest whose monitor may be about to start: it has until then to be there. The inner
/// error is why it is not.
fn vsock_of_new(reach: &Reach, until: Instant) -> Result<Result<PathBuf>> {
    // A monitor that starts makes the file of its socket, and listens there a moment later.
    let comes = |path: &Path| match UnixStream::connect(path) {
        Ok(_) => true,
        Err(error) => matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused),
    };
    loop {
        let is_late = Instant::now() >= until;
        let absent = match reach {
            Reach::Vsock(path) if path.exists() => return Ok(Ok(path.clone())),
            Reach::Vsock(path) => call::connect(path, PORT).err(),
            _ => match api_of(reach).and_then(|api| Client::connect(&api.unwrap_or_default())) {
                Ok(client) => return ask_for_vsock(client).map(Ok),
                Err(error) => match api_of(reach) {
                    Ok(Some(path)) if !comes(&path) => return Err(error),
                    _ => Some(error),
                },
            },
        };
        if let Some(absent) = absent.filter(|_| is_late) {
            return Ok(Err(absent));
        }
        std::thread::sleep(AGAIN_UNTOLD);
    }
}

/// Waits until the agent answers, or the time is up.
fn wait_for_agent(wait: &Wait) -> Result<Waited> {
    let deadline = wait.timeout.map(|time| Instant::now() + time);
    let within = |time| {
        let rest = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        rest.map_or(time, |rest| rest.min(time))
    };
    let socket = match vsock_of_new(&wait.reach, Instant::now() + within(APPEARANCE))? {
        Ok(socket) => socket,
        Err(absent) if within(APPEARANCE).is_zero() => return Ok(Waited::TimeIsUp(absent.to_string())),
        Err(absent) => return Err(api_or_place(&wait.reach).err().unwrap_or(absent)),
    };
    // What happens from now on is told, so that nothing is missed between the question and the wait.
    let follow = |api: PathBuf| Client::connect(&api)?.follow_if_told("/events");
    let mut told = api_of(&wait.reach)?.map(follow).transpose()?.flatten();
    loop {
        if answers(&socket, within(SILENCE))? {
            return Ok(Waited::Answers);
        }
        let again = Instant::now() + within(if told.is_some() { AGAIN } else { AGAIN_UNTOLD });
        while let rest = again.saturating_duration_since(Instant::now())
            && !rest.is_zero()
        {
            let Some(lines) = &mut told else {
                std::thread::sleep(rest);
                break;
            };
            match lines.next(Some(rest))? {
                Heard::Line(line) if is_ready(&line) => break,
                Heard::Line(_) | Heard::Nothing => {}
                Heard::End => return Err(Error::guest("the guest has ended")),
            }
        }
        if within(Duration::MAX).is_zero() {
            return Ok(Waited::TimeIsUp("the agent in the guest does not answer yet".to_owned()));
        }
    }
}

/// Whether this event says that the agent listens.
fn is_ready(line: &str) -> bool {
    json::from_text::<Value>(line).is_ok_and(|event| event["event"] == "guest_ready")
}

/// Whether there is an agent that answers in this time.
fn answers(socket: &Path, time: Duration) -> Result<bool> {
    match call::connect(socket, PORT) {
        Ok(Some(stream)) => {
            let call = Call::new(stream, Ask::Info {})?;
            Ok(Hearing::new(call, Some(Instant::now() + time))?.finish(|_| Ok(())).is_ok())
        }
        // It boots.
        Ok(None) => Ok(false),
        Err(error) if error.kind() == Kind::Guest => Ok(false),
        Err(error) => Err(error),
    }
}

/// Copies into the guest or out of it.
pub fn copy(copy: &Copy) -> Result<()> {
    let stream = connect(&vsock_of(&copy.reach)?)?;
    let user = copy.user.clone();
    match copy.into_guest {
        true => copy_in(stream, &copy.outside, &copy.inside, false, user),
        false => copy_out(stream, &copy.inside, &copy.outside, user),
    }
}

/// Copies what is at `from` here to `to` in the guest; `parents`: with the folders on the way there.
pub fn copy_in(
    stream: UnixStream,
    from: &Path,
    to: &Path,
    parents: bool,
    user: Option<String>,
) -> Result<()> {
    let attempt = || format!("copy `{}` to `{}` in the guest", from.display(), to.display());
    let real = from.canonicalize().with_context(attempt)?;
    let name = from.file_name().or(real.file_name()).unwrap_or_default().to_string_lossy().into_owned();
    let call = Call::new(stream, Ask::Write(WriteTo { path: to.into(), name, parents, user }))
        .with_context(attempt)?;
    let mut pipe = Given(Hearing::new(call, None).with_context(attempt)?);
    let sent = archive::send(from, &mut pipe, |line| eprintln!("alula: {line}"));
    let Given(mut hearing) = pipe;
    // What the agent says is the reason if it has ended before.
    if hearing.ending.is_none() {
        sent.with_context(attempt)?;
        hearing.call.end_input();
    }
    hearing.finish(|_| Ok(())).map(drop).with_context(attempt)
}

/// The input of a call, to be written to.
struct Given(Hearing);

impl Write for Given {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let Self(hearing) = self;
        while hearing.call.room() == 0 || hearing.call.has_to_send() {
            hearing.step(&mut |_| Ok(())).map_err(std::io::Error::other)?;
            if hearing.ending.is_some() {
                return Err(std::io::ErrorKind::BrokenPipe.into());
            }
        }
        let count = bytes.len().min(hearing.call.room());
        hearing.call.give(&bytes[..count]);
        hearing.call.send();
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Copies what is at `from` in the guest to `to` here.
pub fn copy_out(stream: UnixStream, from: &Path, to: &Path, user: Option<String>) -> Result<()> {
    let attempt = || format!("copy `{}` in the guest to `{}`", from.display(), to.display());
    let call = Call::new(stream, Ask::Read(Read { path: from.into(), user })).with_context(attempt)?;
    let name = from.file_name().unwrap_or_default().to_string_lossy();
    let target = archive::target(to, &name);
    let (reader, mut writer) = std::io::pipe().with_context(attempt)?;
    // The stream is read where it is written to disk; the agent is heard here.
    let received = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| archive::receive(&target, reader, false));
        let heard = Hearing::new(call, None)
            .and_then(|hearing| hearing.finish(|bytes| writer.write_all(bytes).context("pass it on")));
        drop(writer);
        let received =
            receiver.join().unwrap_or_else(|_| Err(Error::host("the thread that writes it ended")));
        match (heard, received) {
            // What could not be written here is why no more was taken.
            (Err(heard), Err(received)) if heard.to_string().starts_with("pass it on") => Err(received),
            (Err(heard), _) => Err(heard),
            (Ok(_), received) => received,
        }
    });
    received.with_context(attempt)
}
