//! `alula cpu`: its options and its help.

use std::path::PathBuf;

use lexopt::Arg::{Long, Short, Value};

use super::Command;

const HELP: &str = "\
Show what a guest's CPUs are on this host, or what one host's lack of another's.

Usage: alula cpu dump > FILE
       alula cpu compare [--json] NEEDED [THERE]

Commands:
  dump     Print what a guest's CPU is told that it is, as a body of `PUT /cpu-config`
  compare  Tell which features the CPU of NEEDED has, and that of THERE has not

NEEDED and THERE each are a saved microVM (its folder, or the file of its state) or a file of `dump`, with or without
changes of yours. THERE is this host if it is left out. To have guests that can be restored on each
host of a fleet, compare the hosts' dumps, and switch off what some lack.

Options:
      --json  Print a JSON array of the features that are lacking
  -h, --help  Print this

The exit code is 0 if nothing is lacking, 2 if something is, 1 if a file cannot be read, 153 for wrong arguments.

Examples:
  alula cpu dump > here.json
  alula cpu compare saved
  alula cpu compare saved other-host.json
";

/// A command of `alula cpu`.
#[derive(Debug)]
pub enum Cpu {
    /// Print what a CPU is on this host.
    Dump,
    /// Compare what is needed with what is there; None: with this host.
    Compare { needed: PathBuf, there: Option<PathBuf>, json: bool },
}

pub fn parse(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let (mut words, mut json) = (Vec::new(), false);
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Ok(Command::Print(HELP.to_owned())),
            Long("json") => json = true,
            Value(word) => words.push(word),
            other => return Err(other.unexpected()),
        }
    }
    let command = words.first().and_then(|word| word.to_str());
    match (command, &words[words.len().min(1)..]) {
        (Some("dump"), []) if !json => Ok(Command::Cpu(Cpu::Dump)),
        (Some("dump"), _) => Err("`cpu dump` takes nothing beside".into()),
        (Some("compare"), [needed, there @ ..]) if there.len() <= 1 => {
            let there = there.first().map(PathBuf::from);
            Ok(Command::Cpu(Cpu::Compare { needed: needed.into(), there, json }))
        }
        (Some("compare"), _) => Err("what is needed, and what is there or nothing, is expected".into()),
        _ => Err("one of `dump` and `compare` is expected".into()),
    }
}
