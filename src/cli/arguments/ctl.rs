//! `alula ctl`: its options and its help.

use lexopt::Arg::{Long, Short, Value};
use lexopt::ValueExt;

use super::exec::Reach;
use super::{Command, Given, meant, number};
use crate::limiter::{RateLimiter, TokenBucket};
use crate::units::mebibytes;

const HELP: &str = "\
Ask a running microVM something, or tell it to do something, over its control socket.

Usage: alula ctl [OPTIONS] ID COMMAND
       alula ctl [OPTIONS] --api-sock SOCKET COMMAND
       alula ctl list [--watch] [--sweep] [--json]

Commands:
  list               All guests of this user, and what each costs
  status             Whether it runs, what it is made of, and what it costs
  config             Its whole configuration
  guest              What the agent in its guest says: version, uptime, memory, addresses
  metrics            What it has done so far, without what it never did
  events             What has happened to it, and what happens from now on
  pause, resume      Stop its CPUs and devices, let them go on
  balloon [SIZE]     How much memory its guest is to do without, and does; with a SIZE, like 512M: set it
  cpus [N]           How many CPUs its guest has, and can have; with N: give it as many, or ask it to let
                     those go that are too many
  hotplug-memory [SIZE]
                     How much memory its guest has plugged, and is to have; with a SIZE, like 512M: set it
  snapshot FOLDER    Save it, with its memory, to files there; it stands still for a moment, and goes on
  record             Note beside the snapshot what its guest needed first: later restores read that ahead
  start              Start the guest of a service that was configured by requests
  shutdown           Ask the guest to power off: Ctrl-Alt-Del on x86_64, the power key on aarch64
  stop               The same, and wait until it has: the exit code is 1 if it has not after 60 s
  reset              Stop the guest at once, as a reset button does, and boot it again
  ctrl-alt-del       Press these keys on its keyboard: many systems reboot then (x86_64)
  limit DEVICE WORD  Limit a disk, each direction of a network interface, or flushes of a pmem device, from now on
  flush              Write a line of metrics now, where `--metrics-path` says
  get PATH           Any request of the API (docs/api.md), like `get /machine-config`
  put PATH JSON      With this body; `-` reads it from standard input
  patch PATH JSON    The same
  delete PATH [JSON]
                     Without a body, or with this one

Options:
      --api-sock SOCKET  The socket, instead of the guest's ID [default: what the variable ALULA_SOCKET
                         says, or /run/firecracker.socket]
      --json             Print JSON, for programs
      --diff             With `snapshot`: save only what was written to memory since the last one
      --force            With `stop`: end the guest at once, as if its power failed
      --watch            With `list`: show what guests do in every second, until Ctrl-C
      --sweep            With `list`: remove the sockets that guests with a name have left when they were
                         killed, and say which
  -h, --help             Print this

A limit is `bandwidth=10M` (bytes a second, with K, M or G), `ops=500` (requests or frames a second), or both;
`off` instead of a number ends it.

The exit code is 0, or 1 when the microVM cannot be reached or refuses, 153 for wrong arguments.

Examples:
  alula ctl web guest
  alula ctl web limit disk0 bandwidth=20M ops=500
  alula ctl list --watch
  alula ctl --api-sock /tmp/alula.sock status
  alula ctl put /boot-source '{\"kernel_image_path\": \"vmlinux\"}'
";

/// The words that say what is asked for.
const COMMANDS: &str = "list status config guest metrics events pause resume balloon cpus hotplug-memory snapshot record \
    start shutdown stop reset ctrl-alt-del limit flush get put patch delete";

pub fn commands() -> impl Iterator<Item = &'static str> {
    COMMANDS.split(' ')
}

pub fn is_command(word: &str) -> bool {
    commands().any(|command| command == word)
}

/// The socket that is asked when none is named.
const SOCKET_VARIABLE: &str = "ALULA_SOCKET";
const DEFAULT_SOCKET: &str = "/run/firecracker.socket";

/// Commands, and the options that only one of them has.
const EXTRA: &str = "\
snapshot: diff
stop: force
list: watch sweep
";

/// `alula ctl`.
#[derive(Debug)]
pub struct Ctl {
    pub reach: Reach,
    pub json: bool,
    pub ask: Ask,
}

/// What the microVM is asked.
#[derive(Debug, PartialEq)]
pub enum Ask {
    Status,
    Config,
    Guest,
    Metrics,
    Events,
    Pause,
    Resume,
    /// Have the guest do without so many MiB; None: say what it does without.
    Balloon(Option<u64>),
    /// Have the guest have so many CPUs; None: say how many it has.
    Cpus(Option<u16>),
    /// Have the guest plug so many MiB; None: say how much it has plugged.
    HotplugMemory(Option<u64>),
    /// Save to this folder, as a difference if that is true.
    Snapshot(std::path::PathBuf, bool),
    /// Note what its guest has needed of its memory.
    Record,
    Start,
    Shutdown,
    Stop {
        force: bool,
    },
    Reset,
    CtrlAltDel,
    /// Limit this device, from now on.
    Limit(String, RateLimiter),
    Flush,
    List,
    Watch,
    Sweep,
    /// Method, path and body of a request.
    Request(&'static str, String, String),
}

/// Parses what comes after `alula ctl`.
pub fn parse(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let (mut reach, mut json, mut words) = (None, false, Vec::new());
    let (mut given, mut extra) = (Given::default(), None);
    while let Some(argument) = parser.next()? {
        given.once(&argument)?;
        match argument {
            Long("api-sock") => reach = Some(Reach::Api(parser.value()?.into())),
            Long("json") => json = true,
            Long(name)
                if let Some((option, command)) = meant::names(EXTRA).find(|(option, _)| *option == name) =>
            {
                if let Some((other, _)) = extra.replace((option, command)) {
                    return Err(format!("--{other} and --{option} do not go together").into());
                }
            }
            Short('h') | Long("help") => return Ok(Command::Print(HELP.to_owned())),
            Value(word) => words.push(word.string()?),
            other => return Err(other.unexpected()),
        }
    }
    let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
    // A guest that is called like a command is reached by its socket.
    if let [id, command, ..] = *words.as_slice()
        && reach.is_none()
        && !is_command(id)
        && is_command(command)
    {
        reach = Some(Reach::Id(super::exec::name_of(id)?));
        words.remove(0);
    }
    if let Some((option, command)) = extra
        && words.first() != Some(&command)
    {
        return Err(format!("`--{option}` is for `{command}` alone").into());
    }
    let ask = ask(&words, extra.map(|(option, _)| option))?;
    let socket = || std::env::var_os(SOCKET_VARIABLE).filter(|socket| !socket.is_empty());
    let reach = reach.unwrap_or_else(|| Reach::Api(socket().unwrap_or_else(|| DEFAULT_SOCKET.into()).into()));
    Ok(Command::Ctl(Ctl { reach, json, ask }))
}

/// Parses the words of a command, and the one option of [`EXTRA`] that was given with it.
fn ask(words: &[&str], extra: Option<&str>) -> Result<Ask, lexopt::Error> {
    let request = |method, path: &&str, body: &str| Ask::Request(method, (*path).to_owned(), body.to_owned());
    let at = |expected: String| format!("{}: {expected}", words.join(" "));
    Ok(match words {
        ["list"] if extra == Some("watch") => Ask::Watch,
        ["list"] if extra == Some("sweep") => Ask::Sweep,
        ["list"] => Ask::List,
        ["status"] => Ask::Status,
        ["config"] => Ask::Config,
        ["guest"] => Ask::Guest,
        ["metrics"] => Ask::Metrics,
        ["events"] => Ask::Events,
        ["pause"] => Ask::Pause,
        ["resume"] => Ask::Resume,
        ["balloon"] => Ask::Balloon(None),
        ["balloon", size] => Ask::Balloon(Some(mebibytes(size).map_err(at)?)),
        ["cpus"] => Ask::Cpus(None),
        ["cpus", count] => Ask::Cpus(Some(number(count).map_err(at)?)),
        ["hotplug-memory"] => Ask::HotplugMemory(None),
        ["hotplug-memory", size] => Ask::HotplugMemory(Some(mebibytes(size).map_err(at)?)),
        ["snapshot", ""] => {
            return Err("the folder of a snapshot has an empty name: name the one to save it to".into());
        }
        ["snapshot", folder] => Ask::Snapshot(folder.into(), extra.is_some()),
        ["snapshot", ..] => return Err("one folder, and `--diff` or not, is expected".into()),
        ["record"] => Ask::Record,
        ["start"] => Ask::Start,
        ["shutdown"] => Ask::Shutdown,
        ["stop"] => Ask::Stop { force: extra.is_some() },
        ["reset"] => Ask::Reset,
        ["ctrl-alt-del"] => Ask::CtrlAltDel,
        ["limit", device, limits @ ..] => Ask::Limit((*device).to_owned(), rate_limiter(limits)?),
        ["limit"] => return Err("a device, and `bandwidth=` or `ops=`, are expected".into()),
        ["flush"] => Ask::Flush,
        ["get", path] => request("GET", path, ""),
        ["put", path, body] => request("PUT", path, body),
        ["patch", path, body] => request("PATCH", path, body),
        ["delete", path] => request("DELETE", path, ""),
        ["delete", path, body] => request("DELETE", path, body),
        [] => return Err("a command is missing: list, status, config, metrics, events, pause, ...".into()),
        ["put" | "patch", ..] => return Err("a path and a body in JSON are expected".into()),
        ["get" | "delete", ..] => return Err("one path is expected".into()),
        words => return Err(meant::no_ctl_command(words).into()),
    })
}

/// Parses the limits of a device, each a number a second: `bandwidth=10M`, `ops=off`.
fn rate_limiter(words: &[&str]) -> Result<RateLimiter, String> {
    const EXPECTED: &str =
        "expected `bandwidth=N`, with K, M or G, `ops=N`, or both, with `off` for no limit";
    let mut limiter = RateLimiter::default();
    for word in words {
        let (bucket, number) = match word.split_once('=') {
            Some(("bandwidth", number)) => (&mut limiter.bandwidth, number),
            Some(("ops", number)) => (&mut limiter.ops, number),
            _ => return Err(format!("`{word}`: {EXPECTED}")),
        };
        let size = a_second(number).ok_or_else(|| format!("`{word}`: {EXPECTED}"))?;
        // A bucket of 0 is no limit.
        let refill_time = if size == 0 { 0 } else { 1000 };
        if bucket.replace(TokenBucket { size, one_time_burst: None, refill_time }).is_some() {
            return Err(format!("`{word}`: that limit is given twice"));
        }
    }
    if limiter == RateLimiter::default() { Err(EXPECTED.to_owned()) } else { Ok(limiter) }
}

/// A number that is not 0, with its unit; `off` is 0.
fn a_second(text: &str) -> Option<u64> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let factor: u64 = match (digits, unit) {
        ("", "off") => return Some(0),
        (_, "") => 1,
        (_, "K") => 1 << 10,
        (_, "M") => 1 << 20,
        (_, "G") => 1 << 30,
        _ => return None,
    };
    digits.parse().ok().filter(|number: &u64| *number > 0)?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_so_much_a_second() {
        let bucket = |size, refill_time| Some(TokenBucket { size, one_time_burst: None, refill_time });
        for (words, bandwidth, ops) in [
            (&["bandwidth=10M"][..], bucket(10 << 20, 1000), None),
            (&["ops=500", "bandwidth=off"], bucket(0, 0), bucket(500, 1000)),
        ] {
            assert_eq!(rate_limiter(words), Ok(RateLimiter { bandwidth, ops }), "{words:?}");
        }
        for (words, expected) in [
            (&[][..], "expected `bandwidth=N`"),
            (&["fast"], "`fast`: expected"),
            (&["ops=0"], "`ops=0`: expected"),
            (&["ops=1T"], "`ops=1T`: expected"),
            (&["bandwidth=99999999999G"], "expected"),
            (&["ops=1", "ops=2"], "`ops=2`: that limit is given twice"),
        ] {
            let error = rate_limiter(words).unwrap_err();
            assert!(error.contains(expected), "{words:?}: {error}");
        }
    }
}
