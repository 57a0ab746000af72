//! `alula template` and `alula clone`: their options and their help.

use std::path::PathBuf;

use lexopt::Arg::{Long, Short, Value};

use super::{Command, Given, id, number, value};
use crate::carry::stored::Location;
use crate::cli::walls;
use crate::walls::Wanted;

const HELP: &str = "\
Read a saved microVM once, and make clones of it for who asks: `alula clone`, or PUT /clones on the socket
(docs/snapshots.md). Each clone is a process of its own, a child of this one's parent, and lives on
when this one ends.

Usage: alula template [OPTIONS] FOLDER
       alula template [OPTIONS] STATE MEMORY

Options:
      --api-sock SOCKET  Where to listen: a path where nothing is yet; needed
  -h, --help             Print this

The exit code is 128 and the number of the signal that ends it (Ctrl-C); 1 on errors, 153 for wrong
arguments.

Examples:
  alula template saved --api-sock t.sock &
  alula clone -n 10 --template t.sock
";

const CLONE_HELP: &str = "\
Have a template make clones of the microVM that it has read (`alula template`). Each has a name, by which
`alula exec`, `alula ctl` and the like find it, and is told with the number of its process in a line.

Usage: alula clone [OPTIONS] --template SOCKET

Options:
      --template SOCKET      The template's socket
  -n, --count N              So many clones, called ID-1, ID-2 and so on [default: one, called ID]
      --id ID                What they are called: letters, digits and hyphens [default: clone]
      --overlay DRIVE=PATH   The disk of this id is only read; what the clone writes goes to a qcow2 image
                             over it, which is made at PATH. May be repeated
      --drive DRIVE=PATH     The disk of this id is at PATH. May be repeated
      --tap INTERFACE=TAP    The network interface of this id is on this TAP interface. May be repeated
      --vsock PATH           Where the vsock socket is to be, by which `alula exec` reaches the guest
      --console PATH         Where the guest's console goes [default: to the template's standard output]
      --paused               They stand still until `alula ctl ID resume`
  -h, --help                 Print this

In the values of --overlay, --drive, --tap, --vsock and --console, {id} is the clone's name, and {n} its number.
Clones cannot share what is written to, nor a socket: give each its own.

The exit code is 0, or 1 when a clone could not be made: those before it are there. 153 for wrong arguments.

Example:
  alula clone -n 10 --template t.sock --id web --overlay root={id}.qcow2 --vsock {id}.vsock
";

/// `alula clone`.
#[derive(Debug)]
pub struct Clones {
    pub template: PathBuf,
    /// The number of clones, each called `id` with its number. None: one, called `id`.
    pub count: Option<u32>,
    pub id: String,
    /// Ids of disks, paths, and whether that of an overlay is meant.
    pub drives: Vec<(String, String, bool)>,
    pub taps: Vec<(String, String)>,
    pub vsock: Option<String>,
    pub console: Option<String>,
    pub are_paused: bool,
}

/// Parses what comes after `alula clone`.
pub fn clone(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let mut template = None;
    let mut clones = Clones {
        template: PathBuf::new(),
        count: None,
        id: "clone".to_owned(),
        drives: Vec::new(),
        taps: Vec::new(),
        vsock: None,
        console: None,
        are_paused: false,
    };
    let mut given = Given::default();
    while let Some(argument) = parser.next()? {
        if !matches!(argument, Long("overlay" | "drive" | "tap")) {
            given.once(&argument)?;
        }
        match argument {
            Long("template") => template = Some(parser.value()?.into()),
            Short('n') | Long("count") => clones.count = Some(value(parser, "--count", count)?),
            Long("id") => clones.id = value(parser, "--id", id)?,
            Long(name @ ("overlay" | "drive")) => {
                let is_overlay = name == "overlay";
                let option = if is_overlay { "--overlay" } else { "--drive" };
                let (drive, path) = value(parser, option, own_pair)?;
                clones.drives.push((drive, path, is_overlay));
            }
            Long("tap") => clones.taps.push(value(parser, "--tap", own_pair)?),
            Long("vsock") => clones.vsock = Some(value(parser, "--vsock", own)?),
            Long("console") => clones.console = Some(value(parser, "--console", own)?),
            Long("paused") => clones.are_paused = true,
            Short('h') | Long("help") => return Ok(Command::Print(CLONE_HELP.to_owned())),
            other => return Err(other.unexpected()),
        }
    }
    clones.template = template.ok_or("--template is missing: the socket of an `alula template`")?;
    Ok(Command::Clone(clones))
}

fn count(text: &str) -> Result<u32, String> {
    match number(text) {
        Ok(0) => Err("expected 1 or more".to_owned()),
        count => count,
    }
}

/// A value in which each clone has words of its own; what else is in braces would be the same for all.
fn own(text: &str) -> Result<String, String> {
    for rest in text.split('{').skip(1) {
        if let Some((word, _)) = rest.split_once('}')
            && !["id", "n"].contains(&word)
        {
            return Err(format!("there is no {{{word}}}: {{id}} is the clone's name, {{n}} its number"));
        }
    }
    Ok(text.to_owned())
}

fn own_pair(text: &str) -> Result<(String, String), String> {
    own(text).and_then(|text| pair(&text))
}

/// Parses an id and a value, `a=b`.
pub fn pair(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(one, other)| !one.is_empty() && !other.is_empty());
    pair.map(|(one, other)| (one.to_owned(), other.to_owned())).ok_or_else(|| "expected ID=VALUE".to_owned())
}

/// `alula template`.
#[derive(Debug)]
pub struct Template {
    pub location: Location,
    pub api_sock: PathBuf,
    /// The walls of each clone.
    pub walls: Wanted,
}

/// Parses what comes after `alula template`.
pub fn template(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let (mut words, mut api_sock, mut given) = (Vec::new(), None, Given::default());
    let mut wanted = Wanted::default();
    while let Some(argument) = parser.next()? {
        if argument != Long("allow") {
            given.once(&argument)?;
        }
        match argument {
            Long("api-sock") => api_sock = Some(parser.value()?.into()),
            Long(name) if let Some(name) = walls::named(name) => walls::take(&mut wanted, name, parser)?,
            Short('h') | Long("help") => return Ok(Command::Print(walls::with_help(HELP))),
            Value(word) => words.push(PathBuf::from(word)),
            other => return Err(other.unexpected()),
        }
    }
    let location = match <[_; 2]>::try_from(words) {
        Ok([state, memory]) => Location::Files { state, memory },
        Err(words) => match <[_; 1]>::try_from(words) {
            Ok([folder]) => Location::Folder(folder),
            Err(_) => return Err("a folder, or a state and its memory, is expected".into()),
        },
    };
    let api_sock = api_sock.ok_or("--api-sock is missing: clones are asked for there")?;
    Ok(Command::Template(Template { location, api_sock, walls: wanted }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_that_would_share_a_path_or_be_none_are_refused() {
        let parsed = |line: &str| clone(&mut lexopt::Parser::from_args(line.split(' ')));
        for (line, expected) in [
            (
                "--overlay root={idd}.qcow2",
                "--overlay root={idd}.qcow2: there is no {idd}: {id} is the clone's",
            ),
            ("--drive a=/{n}/{}", "--drive a=/{n}/{}: there is no {}: "),
            ("--tap eth0=tap{N}", "--tap eth0=tap{N}: there is no {N}: "),
            ("--vsock {name}", "--vsock {name}: there is no {name}"),
            ("--console {id}-{x}", "--console {id}-{x}: there is no {x}"),
            ("-n 0", "--count 0: expected 1 or more"),
            ("-n -1", "--count -1: "),
        ] {
            let error = parsed(&format!("--template t {line}")).expect_err(line).to_string();
            assert!(error.contains(expected), "{line}: {error}");
        }
        let Ok(Command::Clone(clones)) =
            parsed("--template t -n 3 --vsock {id}-{n} --console a{b --tap a=b}c")
        else {
            panic!("all of these are right");
        };
        assert_eq!((clones.count, clones.vsock.as_deref()), (Some(3), Some("{id}-{n}")));
    }
}
