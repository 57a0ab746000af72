//! `alula exec`, `alula cp` and `alula wait`: what is asked of the agent in a guest that is up.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::arguments::exec::{Copy, Exec, Reach, Wait};
use super::session::{self, Ends, Outcome, TIMED_OUT};
use crate::agent::PORT;
use crate::agent::request::{Ask, Read, Write as WriteTo};
use crate::api::client::Client;
use crate::archive;
use crate::error::{Context, Error, Kind, Result};
use crate::guest::call::{self, Call, Ending, Said};
use crate::guest::runtime;

/// How often a guest is asked whether its agent is there by now.
const AGAIN: Duration = Duration::from_millis(20);

/// Runs the command in the guest, and returns its exit code.
pub fn exec(exec: Exec) -> u8 {
    let outcome = vsock_of(&exec.reach).and_then(|socket| {
        let stream = connect(&socket)?;
        let run = session::with_terminal(exec.run, exec.terminal);
        let deadline = exec.timeout.map(|time| Instant::now() + time);
        session::attend(stream, run, &Ends { input: exec.input, signals: true, deadline })
    });
    match outcome {
        Ok(outcome) => {
            let (code, words) = outcome.conclude();
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

/// The socket of the guest's vsock device.
fn vsock_of(reach: &Reach) -> Result<PathBuf> {
    let api = match reach {
        Reach::Vsock(path) => return Ok(path.clone()),
        Reach::Api(path) => path.clone(),
        Reach::Id(id) => runtime::find(id)?,
    };
    let answer = Client::connect(&api)?.request("GET", "/vm/config", "")?;
    let config: Value = serde_json::from_str(&answer.body).context("read the monitor's answer")?;
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

/// Waits until the agent answers, and returns the exit code.
pub fn wait(wait: &Wait) -> u8 {
    let deadline = wait.timeout.map(|time| Instant::now() + time);
    let result = vsock_of(&wait.reach).and_then(|socket| {
        loop {
            match call::connect(&socket, PORT) {
                Ok(Some(stream)) => {
                    if finish(Call::new(stream, Ask::Info {})?, |_| Ok(())).is_ok() {
                        return Ok(0);
                    }
                }
                // It boots.
                Ok(None) => {}
                Err(error) if error.kind() == Kind::Guest => {}
                Err(error) => return Err(error),
            }
            if deadline.is_some_and(|at| at <= Instant::now()) {
                eprintln!("alula: the agent in the guest does not answer yet, and the time is up");
                return Ok(TIMED_OUT);
            }
            std::thread::sleep(AGAIN);
        }
    });
    result.unwrap_or_else(|error| {
        eprintln!("alula: {error}");
        super::FAILED_SERVE
    })
}

/// Hears a call to its end, which must be a good one; its output goes to `output`. What the agent's process says on
/// standard error is the reason if it fails, and told otherwise.
pub fn finish(mut call: Call, mut output: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let mut errors = Vec::new();
    loop {
        if call.has_to_send() {
            wait_until_ready(&call, true)?;
            call.send();
        }
        wait_until_ready(&call, call.has_to_send())?;
        if let Some(ending) = hear(&mut call, &mut output, &mut errors)? {
            return conclude(ending, &errors);
        }
    }
}

/// So much of what an agent's process says on standard error is kept: a hostile guest's would not end.
const ERRORS_MAX: usize = 16 << 10;

fn hear(
    call: &mut Call,
    output: &mut impl FnMut(&[u8]) -> Result<()>,
    errors: &mut Vec<u8>,
) -> Result<Option<Ending>> {
    let mut ending = None;
    call.hear(|said| {
        match said {
            Said::Output(bytes) => output(bytes)?,
            Said::Errors(bytes) => {
                let room = ERRORS_MAX - errors.len().min(ERRORS_MAX);
                errors.extend_from_slice(&bytes[..bytes.len().min(room)]);
            }
            Said::Ended(how) => ending = Some(how),
            Said::Greeting(_) => {}
        }
        Ok(())
    })?;
    Ok(ending)
}

fn conclude(ending: Ending, errors: &[u8]) -> Result<()> {
    let text = String::from_utf8_lossy(errors);
    let lines = text.lines().map(|line| crate::log::in_one_line(line.trim_start_matches("alula: ")));
    match ending {
        Ending::Exited(0) => {
            lines.for_each(|line| eprintln!("alula: in the guest: {line}"));
            Ok(())
        }
        Ending::Exited(_) if !errors.is_empty() => {
            Err(Error::guest(format!("in the guest: {}", lines.collect::<Vec<_>>().join("; "))))
        }
        Ending::Exited(code) => Err(Error::guest(format!("in the guest: exit code {code}"))),
        Ending::Signaled(signal) => Err(Error::guest(format!("in the guest: ended by signal {signal}"))),
        Ending::NotFound(why) | Ending::NotExecutable(why) | Ending::Failed(why) => {
            Err(Error::guest(format!("in the guest: {why}")))
        }
    }
}

fn wait_until_ready(call: &Call, to_write: bool) -> Result<()> {
    let events = crate::poll::Events::new()?;
    let interest = crate::poll::Interest::IN;
    let interest = if to_write { interest | crate::poll::Interest::OUT } else { interest };
    events.add(call, interest, 0)?;
    events.wait(None, &mut Vec::new())
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
    let mut pipe = Given { call, errors: Vec::new(), ending: None };
    let sent = archive::send(from, &mut pipe, |line| eprintln!("alula: {line}"));
    // What the agent says is the reason if it has ended before.
    if pipe.ending.is_none() {
        sent.with_context(attempt)?;
        pipe.call.end_input();
    }
    let Given { mut call, mut errors, mut ending } = pipe;
    loop {
        if let Some(ending) = ending {
            return conclude(ending, &errors).with_context(attempt);
        }
        wait_until_ready(&call, call.has_to_send()).with_context(attempt)?;
        call.send();
        ending = hear(&mut call, &mut |_| Ok(()), &mut errors).with_context(attempt)?;
    }
}

/// The input of a call, to be written to.
struct Given {
    call: Call,
    errors: Vec<u8>,
    ending: Option<Ending>,
}

impl Write for Given {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let other = |error: Error| std::io::Error::other(error);
        while self.call.room() == 0 || self.call.has_to_send() {
            wait_until_ready(&self.call, self.call.has_to_send()).map_err(other)?;
            self.call.send();
            self.ending = hear(&mut self.call, &mut |_| Ok(()), &mut self.errors).map_err(other)?;
            if self.ending.is_some() {
                return Err(std::io::ErrorKind::BrokenPipe.into());
            }
        }
        let count = bytes.len().min(self.call.room());
        self.call.give(&bytes[..count]);
        self.call.send();
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
        let heard = finish(call, |bytes| writer.write_all(bytes).context("pass it on"));
        drop(writer);
        let received =
            receiver.join().unwrap_or_else(|_| Err(Error::host("the thread that writes it ended")));
        match (heard, received) {
            // What could not be written here is why no more was taken.
            (Err(heard), Err(received)) if heard.to_string().starts_with("pass it on") => Err(received),
            (Err(heard), _) => Err(heard),
            (Ok(()), received) => received,
        }
    });
    received.with_context(attempt)
}
