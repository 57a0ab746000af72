//! `alula ctl`: its options and its help.

use lexopt::Arg::{Long, Short, Value};
use lexopt::ValueExt;

use super::exec::Reach;
use super::{Command, Given};
use crate::spelling;
use crate::units::mebibytes;

const HELP: &str = "\
Ask a running microVM something, or tell it to do something, over its control socket.

Usage: alula ctl [--json] ID COMMAND
       alula ctl [--api-sock SOCKET] [--json] COMMAND

Commands:
  status             Whether it runs, and what it is made of
  config             Its whole configuration
  guest              What the agent in its guest says: version, uptime, memory, addresses
  metrics            What it has done so far, without what it never did
  events             What has happened to it, and what happens from now on
  pause, resume      Stop its CPUs and devices, let them go on
  balloon [SIZE]     How much memory its guest is to do without, and does; with a SIZE, like 512M: set it
  snapshot FOLDER    Save it, with its memory, to files there; it stands still for a moment, and goes on
  shutdown           Ask the guest to power off: Ctrl-Alt-Del on x86_64, the power key on aarch64
  get PATH           Any request of the API (docs/api.md), like `get /machine-config`
  put PATH JSON      With this body; `-` reads it from standard input
  patch PATH JSON    The same
  delete PATH        Without a body

Options:
      --api-sock SOCKET  The socket, instead of the guest's ID [default: /run/firecracker.socket]
      --json             Print JSON, for programs
      --diff             With `snapshot`: save only what was written to memory since the last one
  -h, --help             Print this

The exit code is 0, or 1 when the microVM cannot be reached or refuses, 153 for wrong arguments.

Examples:
  alula ctl web guest
  alula ctl --api-sock /tmp/alula.sock status
  alula ctl put /boot-source '{\"kernel_image_path\": \"vmlinux\"}'
";

const COMMANDS: [&str; 14] = [
    "status", "config", "guest", "metrics", "events", "pause", "resume", "balloon", "snapshot", "shutdown",
    "get", "put", "patch", "delete",
];

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
    /// Save to this folder, as a difference if that is true.
    Snapshot(std::path::PathBuf, bool),
    Shutdown,
    /// Method, path and body of a request.
    Request(&'static str, String, String),
}

/// Parses what comes after `alula ctl`.
pub fn parse(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let (mut reach, mut json, mut is_diff, mut words) = (None, false, false, Vec::new());
    let mut given = Given::default();
    while let Some(argument) = parser.next()? {
        given.once(&argument)?;
        match argument {
            Long("api-sock") => reach = Some(Reach::Api(parser.value()?.into())),
            Long("json") => json = true,
            Long("diff") => is_diff = true,
            Short('h') | Long("help") => return Ok(Command::Print(HELP.to_owned())),
            Value(word) => words.push(word.string()?),
            other => return Err(other.unexpected()),
        }
    }
    let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
    // A guest that is called like a command is reached by its socket.
    if let [id, command, ..] = *words.as_slice()
        && reach.is_none()
        && !COMMANDS.contains(&id)
        && COMMANDS.contains(&command)
    {
        reach = Some(Reach::Id(super::exec::name_of(id)?));
        words.remove(0);
    }
    let request = |method, path: &&str, body: &str| Ask::Request(method, (*path).to_owned(), body.to_owned());
    let ask = match words.as_slice() {
        ["status"] => Ask::Status,
        ["config"] => Ask::Config,
        ["guest"] => Ask::Guest,
        ["metrics"] => Ask::Metrics,
        ["events"] => Ask::Events,
        ["pause"] => Ask::Pause,
        ["resume"] => Ask::Resume,
        ["balloon"] => Ask::Balloon(None),
        ["balloon", size] => Ask::Balloon(Some(mebibytes(size)?)),
        ["snapshot", folder] => Ask::Snapshot(folder.into(), is_diff),
        ["snapshot", ..] => return Err("one folder, and `--diff` or not, is expected".into()),
        ["shutdown"] => Ask::Shutdown,
        ["get", path] => request("GET", path, ""),
        ["put", path, body] => request("PUT", path, body),
        ["patch", path, body] => request("PATCH", path, body),
        ["delete", path] => request("DELETE", path, ""),
        [] => return Err("a command is missing: status, config, metrics, events, pause, ...".into()),
        ["put" | "patch", ..] => return Err("a path and a body in JSON are expected".into()),
        ["get" | "delete", ..] => return Err("one path is expected".into()),
        [word, ..] => {
            let message = format!("there is no command `{word}`, or it has too many words");
            return Err(spelling::with_hint(message, word, COMMANDS).into());
        }
    };
    if is_diff && !matches!(ask, Ask::Snapshot(..)) {
        return Err("`--diff` is for `snapshot FOLDER` alone".into());
    }
    let reach = reach.unwrap_or_else(|| Reach::Api("/run/firecracker.socket".into()));
    Ok(Command::Ctl(Ctl { reach, json, ask }))
}
