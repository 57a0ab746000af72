//! The command line: arguments to a microVM, its console on the terminal, its end to an exit code.

mod agent;
mod arguments;
mod cache;
mod check;
mod command;
mod console;
mod cpu;
mod ctl;
mod exec;
mod guests;
mod outputs;
mod persona;
mod readiness;
mod session;
mod snapshot;
mod table;
mod template;
mod walls;

use std::ffi::OsString;
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};

use crate::agent::init;
use crate::api::Api;
use crate::arch;
use crate::clock;
use crate::config::Config;
use crate::dialect::Dialect;
use crate::error::{Context, Error, Result};
use crate::firmware;
use crate::guest::{fetch, runtime};
use crate::history::{self, Event, Feed};
use crate::jail::{self, Inside, Jail};
use crate::log::{self, Level};
use crate::machine::Exit;
use crate::memory::faults::take_device;
use crate::microvm::Microvm;
use crate::microvm::monitor::{Ending, Front, Monitor, Outcome};
use crate::microvm::signals::{self, Signals};
use crate::terminal;
use crate::vm::open_device;
use crate::walls::begin;
use arguments::{Command, Run, Serve};
use readiness::Readiness;

/// The monitor itself could not do what was asked (`alula run`): not a code of the guest's.
const FAILED_RUN: u8 = 125;
/// The user left the guest with Ctrl-A X.
const LEFT: u8 = 130;
/// The same failure for `alula serve`, where Firecracker's users expect 1.
const FAILED_SERVE: u8 = 1;
/// Wrong arguments (Firecracker's code).
const WRONG_ARGUMENTS: u8 = 153;

/// Runs the command that the process was started with, and returns its exit code.
pub fn main() -> u8 {
    clock::begin();
    signals::survive_file_size_limit();
    if init::is_init(&std::env::args_os().next().unwrap_or_default()) {
        return apart(|| told(init::run()));
    }
    obey(std::env::args_os().collect())
}

/// Runs a command, and returns the process's exit code.
fn obey(line: Vec<OsString>) -> u8 {
    let command = match apart(|| arguments::parse(line)) {
        Ok(command) => command,
        Err(message) => {
            eprintln!("alula: {message}");
            return WRONG_ARGUMENTS;
        }
    };
    match command {
        Command::Run(arguments) => apart(|| {
            let is_served = arguments.api_sock.is_some() || arguments.is_named;
            let feed = arguments.outputs.open_feed(&arguments.id, is_served);
            finish(feed, FAILED_RUN, |feed| run(*arguments, feed))
        }),
        Command::Serve(arguments) => apart(|| {
            let feed = arguments.outputs.open_feed(&arguments.id, !arguments.no_api);
            finish(feed, FAILED_SERVE, |feed| serve(&arguments, feed))
        }),
        Command::Jail(jail) => match apart(|| enter(&jail)) {
            Ok(Some(Inside { line, faults })) => {
                drop(jail);
                faults.into_iter().for_each(take_device);
                obey(line)
            }
            Ok(None) => 0,
            Err(code) => code,
        },
        Command::Ctl(arguments) => apart(|| told(ctl::run(&arguments))),
        Command::Exec(arguments) => apart(|| exec::exec(arguments)),
        Command::Copy(arguments) => apart(|| told(exec::copy(&arguments))),
        Command::FetchKernel(from) => apart(|| fetch_kernel(&from)),
        Command::Wait(arguments) => apart(|| exec::wait(&arguments)),
        Command::Cache { clear: false } => print(cache::show().as_bytes()),
        Command::Cache { clear: true } => match cache::clear() {
            Ok(text) => print(text.as_bytes()),
            Err(error) => told(Err(error)),
        },
        Command::Agent(arguments) => apart(|| told(agent::run(arguments))),
        Command::Snapshot(arguments) => apart(|| match snapshot::run(&arguments) {
            Ok(text) => print(text.as_bytes()),
            Err(error) => told(Err(error)),
        }),
        Command::Cpu(arguments) => apart(|| told_code(cpu::run(&arguments))),
        Command::Template(arguments) => apart(|| template::run(&arguments)),
        Command::Clone(arguments) => apart(|| told(template::clone(&arguments))),
        Command::Check(arguments) => apart(|| told_code(check::run(&arguments))),
        Command::Print(text) => print(text.as_bytes()),
        Command::Show(text) => print(text.as_bytes()),
        Command::Firmware if std::io::stdout().is_terminal() => {
            eprintln!("alula: the image is binary, and standard output a terminal: `alula firmware > FILE`");
            WRONG_ARGUMENTS
        }
        Command::Firmware => print(firmware::IMAGE),
    }
}

/// Does one command in a stack frame of its own. The compiler would make one function of them all, whose frame has
/// room for what any of them needs: a running machine would keep those pages on its stack.
#[inline(never)]
fn apart<T>(command: impl FnOnce() -> T) -> T {
    command()
}

/// Enters a jail, or says why that could not be, and returns the process's exit code.
fn enter(jail: &Jail) -> std::result::Result<Option<Inside>, u8> {
    let mut code = FAILED_SERVE;
    let check = |line| {
        arguments::parse(line).map(drop).map_err(|message| {
            code = WRONG_ARGUMENTS;
            Error::config(message)
        })
    };
    let entered = look_for_kvm(jail).and_then(|()| jail::enter(jail, check));
    entered.map_err(|error| {
        eprintln!("alula: {error}");
        code
    })
}

/// Looks whether the monitor in a jail could open KVM, while nothing is made that would be left behind. Of a jail that root
/// makes, the device is the jail's own.
fn look_for_kvm(jail: &Jail) -> Result<()> {
    match jail.has_user_namespace && jail.program.is_none() {
        true => open_device().map(drop).context("--userns: the guest in the jail needs KVM"),
        false => Ok(()),
    }
}

fn fetch_kernel(from: &[String]) -> u8 {
    match fetch::fetch(from, |step| eprintln!("alula: {step}")).context("fetch a kernel") {
        Ok(path) => print(format!("{}\n", path.display()).as_bytes()),
        Err(error) => told(Err(error)),
    }
}

/// Says what stood in the way, if anything did.
fn told(result: Result<()>) -> u8 {
    match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("alula: {error}");
            FAILED_SERVE
        }
    }
}

/// Says what stood in the way of a command that has exit codes of its own, if anything did.
fn told_code(result: Result<u8>) -> u8 {
    result.unwrap_or_else(|error| told(Err(error)))
}

fn print(bytes: &[u8]) -> u8 {
    told(put_out(bytes).map(drop))
}

/// Writes to standard output, and tells whether anybody reads it still. Who has read enough of it, as `head` has, goes, and
/// nothing has failed then.
fn put_out(bytes: &[u8]) -> Result<bool> {
    let mut output = std::io::stdout().lock();
    match output.write_all(bytes).and_then(|()| output.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        written => written.map(|()| true).context("write to standard output"),
    }
}

/// How a service ends: a guest that reboots is started anew by its orchestrator, so both are fine.
fn served(exit: &Exit) -> u8 {
    match exit {
        Exit::Reset | Exit::PanicReset => 0,
        exit => exit.exit_code(),
    }
}

/// How an outcome ends the process; `failed` is the code of errors, `code` that of a guest's end.
fn conclude(outcome: &Result<Outcome>, failed: u8, code: impl Fn(&Exit) -> u8) -> Ending {
    let (reason, code) = match outcome {
        Ok(Outcome::Ended(exit) | Outcome::Obeyed(exit, _)) => (exit.to_string(), code(exit)),
        Ok(Outcome::Left) => ("you left the guest".to_owned(), LEFT),
        // Who knows more of it says that.
        Ok(Outcome::Done) => (String::new(), 0),
        Ok(Outcome::Signal(signal)) => (signals::words(*signal), signals::exit_code(*signal)),
        Err(error) => (error.to_string(), failed),
    };
    let level = match outcome {
        Err(_) | Ok(Outcome::Ended(Exit::Failed(_)) | Outcome::Obeyed(Exit::Failed(_), _)) => Level::Error,
        Ok(_) => Level::Info,
    };
    Ending { reason, level, code }
}

/// Does what `body` does, says in one line how it ended, and returns it as an exit code. What fails
/// before the monitor has `feed` is told here.
fn finish(
    feed: Result<Option<Feed>>,
    failed: u8,
    body: impl FnOnce(&mut Option<Feed>) -> Result<Ending>,
) -> u8 {
    let ending = feed.and_then(|mut feed| {
        body(&mut feed).inspect_err(|error| {
            if let Some(mut feed) = feed {
                let reason = history::text(error);
                history::tell(|| Event::Ended { reason, exit_code: failed });
                feed.tell();
            }
        })
    });
    let Ending { reason, level, code } = ending.unwrap_or_else(|error| conclude(&Err(error), failed, |_| 0));
    // A command in the guest has said for itself what there is to say.
    if !reason.is_empty() {
        log::end(level, &reason);
    }
    code
}

/// Serves at `path`.
fn listen(path: &Path, body_max: usize) -> Result<Box<dyn Front>> {
    Ok(Box::new(Api::bind(path, body_max)?))
}

/// Serves at the socket that `run` was told, or where its guest is found by its name, and returns the path, too. A place
/// for named guests is not everybody's: without one, the guest runs all the same.
fn listen_for(arguments: &Run) -> Result<Option<(PathBuf, Box<dyn Front>)>> {
    let id = &arguments.id;
    let path = match &arguments.api_sock {
        Some(path) => return Ok(Some((path.clone(), listen(path, crate::api::BODY_MAX)?))),
        None if !arguments.is_named => return Ok(None),
        None => runtime::prepare(id),
    };
    match path {
        Ok(path) => {
            let attempt =
                || format!("serve guest `{id}` by its name, which no other guest that runs may have");
            let front = listen(&path, crate::api::BODY_MAX).with_context(attempt)?;
            Ok(Some((path, front)))
        }
        Err(error) => {
            log::line(format_args!(
                "guest `{id}` is not found by its name (set XDG_RUNTIME_DIR, or give --api-sock): {error}"
            ));
            Ok(None)
        }
    }
}

fn run(mut arguments: Run, feed: &mut Option<Feed>) -> Result<Ending> {
    let mut prepared = match arguments.has_command() {
        true => Some(command::prepare(&mut arguments)?),
        false => None,
    };
    let config = match &prepared {
        Some(prepared) => prepared.config.clone(),
        None => arguments.config()?,
    };
    let signals = Signals::take_over();
    let (socket, server) = listen_for(&arguments)?.unzip();
    let mut microvm = Microvm::new(arguments.id.clone(), config);
    microvm.keep_metadata(crate::metadata::SIZE_MAX, arguments.metadata.as_deref())?;
    microvm.open_outputs()?;
    history::tell(|| Event::Configured { what: "command line".to_owned() });
    warn_of_software_kvm(microvm.config());
    begin(&arguments.walls, socket.as_deref())?;
    let mut monitor = Monitor::new(signals, server, feed.take())?;
    let mut command = None;
    if let Some(prepared) = &mut prepared {
        prepared.resources().for_each(|(what, resource)| microvm.give(what, resource));
        let (purpose, begin) = prepared.attend()?;
        monitor.wait_for(purpose)?;
        microvm.boot_once();
        command = Some(begin);
    }
    let start = |microvm: &mut Microvm| {
        match &arguments.restore {
            None => microvm.start("command line").context("start the guest")?,
            Some(folder) => microvm
                .load_snapshot(&arguments.load(folder)?, "command line")
                .with_context(|| format!("restore the guest in `{}`", folder.display()))?,
        }
        if let Some(after) = arguments.record {
            microvm.note_working_set(after).context("--record")?;
            microvm.resume("command line")?;
        }
        command.map_or(Ok(()), |begin| begin())
    };
    let ending = monitor.run(microvm, start, |outcome| match &prepared {
        Some(prepared) => conclude_command(outcome, prepared),
        None => conclude(outcome, FAILED_RUN, Exit::exit_code),
    });
    // The command's terminal is the other thread's.
    terminal::restore();
    if arguments.outputs.is_quiet() && ending.level != Level::Error {
        // On standard error, whoever is quiet wants nothing of this level; a log file has it.
        log::info(&ending.reason);
        return Ok(Ending { reason: String::new(), ..ending });
    }
    Ok(ending)
}

/// Tells who boots a kernel that is no firmware guest what they can expect of a KVM that emulates it.
fn warn_of_software_kvm(config: &Config) {
    /// A Linux has more bytes than this, and our own guest less.
    const LINUX_MIN: u64 = 1 << 20;
    let Some(source) = config.boot_source.as_ref().filter(|_| arch::is_software_kvm()) else { return };
    let kernel = &source.kernel_image_path;
    if kernel.metadata().is_ok_and(|file| file.is_file() && file.len() >= LINUX_MIN) {
        log::line(format_args!(
            "this host's KVM (kvm_pvm) has no hardware virtualisation and emulates kernel code instruction by \
             instruction: unless `{}` was built for it, it will not come up, and may be silent for minutes \
             before it ends (docs/troubleshooting.md)",
            kernel.display()
        ));
    }
}

/// The same for a guest that was there for a command: one that has ended before it has failed.
fn conclude_command(outcome: &Result<Outcome>, prepared: &command::Prepared) -> Ending {
    let mut ending = match (outcome, prepared.outcome()) {
        (Ok(Outcome::Done), Some(Ok(how))) => {
            let (code, words) = how.conclude();
            return Ending { reason: words.unwrap_or_default(), level: Level::Info, code };
        }
        (Ok(Outcome::Done), Some(Err(error))) => conclude(&Err(error), FAILED_RUN, |_| FAILED_RUN),
        _ => conclude(outcome, FAILED_RUN, |_| FAILED_RUN),
    };
    let tail = prepared.tail();
    match outcome {
        Ok(Outcome::Ended(exit)) => ending.reason = ended_early(exit, tail.reason.as_deref()),
        Ok(Outcome::Obeyed(exit, action)) => ending.reason = stopped(exit, action),
        _ => {}
    }
    if !matches!(outcome, Ok(Outcome::Signal(_) | Outcome::Left | Outcome::Obeyed(..))) {
        tail.lines.iter().for_each(|line| eprintln!("alula: console: {line}"));
    }
    ending
}

/// The end of a guest whose command had not ended, which is a failure of the command's whatever the guest meant by it;
/// `why` is what its init or its kernel has said of that.
fn ended_early(exit: &Exit, why: Option<&str>) -> String {
    match (exit, why) {
        (Exit::PoweredOff, None) => {
            "the guest powered off before the command in it ended, so its exit code is not known: let \
                             the command end, and the guest powers off by itself"
                .to_owned()
        }
        (exit, None) => format!("the guest ended before the command in it did: {exit}"),
        (exit, Some(why)) => format!("the guest ended before the command in it did ({exit}): {why}"),
    }
}

/// The end of a guest that a client has asked to end: nothing has failed.
fn stopped(exit: &Exit, action: &str) -> String {
    let by = match action {
        "Shutdown" => "`alula ctl stop` or `shutdown`",
        _ => "`alula ctl ctrl-alt-del`",
    };
    format!(
        "the guest was stopped before the command in it ended: a client of its control socket asked it to end ({by}, \
         {action}); {exit}"
    )
}

fn serve(arguments: &Serve, feed: &mut Option<Feed>) -> Result<Ending> {
    let readiness = Readiness::expected();
    let (signals, server, microvm) = apart(|| begin_to_serve(arguments))?;
    let mut monitor = Monitor::new(signals, server, feed.take())?;
    let start = |microvm: &mut Microvm| {
        match (&arguments.config_file, arguments.warm) {
            (Some(_), _) => microvm.start("config file").context("start the guest")?,
            (None, Some(warm)) => microvm.keep_warm(warm)?,
            (None, None) => {}
        }
        readiness.tell();
        Ok(())
    };
    Ok(monitor.run(microvm, start, |outcome| conclude(outcome, FAILED_SERVE, served)))
}

/// The parts that a service makes before it waits for requests: its signals, its socket, and a microVM.
type Begun = (Signals, Option<Box<dyn Front>>, Box<Microvm>);

fn begin_to_serve(arguments: &Serve) -> Result<Begun> {
    let config = arguments.config()?;
    let signals = Signals::take_over();
    let socket = if arguments.no_api { None } else { Some(arguments.socket()?) };
    let server = match &socket {
        None => None,
        Some(path) => {
            let front = listen(path, arguments.http_api_max_payload_size);
            let is_default = arguments.api_sock.is_none() && !arguments.is_named;
            Some(if is_default {
                front.context("serve where --api-sock names no other place")?
            } else {
                front?
            })
        }
    };
    let mut config = config.unwrap_or_default();
    (config.pci, config.pcie_slots) = (arguments.enable_pci, arguments.pcie_slots);
    config.check_slots()?;
    config.dialect = arguments.dialect;
    arguments.outputs.configure(&mut config);
    let mut microvm = Microvm::new(arguments.id.clone(), config);
    if arguments.dialect == Dialect::Firecracker {
        microvm.warn_of_sharing();
    }
    let size_max = arguments.mmds_size_limit.unwrap_or(arguments.http_api_max_payload_size);
    microvm.keep_metadata(size_max, arguments.metadata.as_deref())?;
    microvm.open_outputs()?;
    if let Some(path) = &arguments.config_file {
        history::tell(|| Event::Configured { what: history::text(path.display()) });
    }
    begin(&arguments.walls, socket.as_deref())?;
    Ok((signals, server, microvm))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_ended_before_its_command_is_told_by_how_it_ended() {
        let powered_off = ended_early(&Exit::PoweredOff, None);
        assert!(
            powered_off.starts_with("the guest powered off before the command in it ended, so "),
            "{powered_off}"
        );
        let reset = ended_early(&Exit::PanicReset, None);
        assert!(
            reset.ends_with("before the command in it did: the guest panicked and asked for a reset"),
            "{reset}"
        );
        let asked = stopped(&Exit::Reset, "Shutdown");
        assert!(
            asked.starts_with(
                "the guest was stopped before the command in it ended: a client of its control socket "
            ) && asked.ends_with("(`alula ctl stop` or `shutdown`, Shutdown); the guest asked for a reset"),
            "{asked}"
        );
        let explained = ended_early(&Exit::Reset, Some("mount it: Invalid argument"));
        assert!(
            explained.ends_with("did (the guest asked for a reset): mount it: Invalid argument"),
            "{explained}"
        );
    }
}
