//! `alula snapshot`: its options and its help.

use std::path::PathBuf;

use lexopt::Arg::{Long, Short, Value};

use super::{Command, Given};
use crate::carry::stored::Location;

const HELP: &str = "\
Look at the files of a saved microVM.

Usage: alula snapshot inspect STATE|FOLDER
       alula snapshot verify FOLDER
       alula snapshot verify STATE MEMORY

`inspect` prints what the state says, as JSON: where and of what machine it was made, and how large it is.
`verify` reads all of state and memory, and compares them with the checksums in the state.

A microVM is saved by `alula ctl snapshot FOLDER` and goes on by `alula run --restore FOLDER`; STATE and
MEMORY are the two paths of the API's request (docs/snapshots.md).

Options:
  -h, --help  Print this

The exit code is 0, or 1 when the files are not there or damaged, 153 for wrong arguments.
";

/// `alula snapshot`.
#[derive(Debug)]
pub enum Snapshot {
    /// Print what the state says, at this path or in this folder.
    Inspect(PathBuf),
    /// Read all of it.
    Verify(Location),
}

/// Parses what comes after `alula snapshot`.
pub fn parse(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let (mut words, mut given) = (Vec::new(), Given::default());
    while let Some(argument) = parser.next()? {
        given.once(&argument)?;
        match argument {
            Short('h') | Long("help") => return Ok(Command::Print(HELP.to_owned())),
            Value(word) => words.push(word),
            other => return Err(other.unexpected()),
        }
    }
    let (what, paths) = match words.split_first() {
        Some((what, paths)) => (what.to_str(), paths),
        None => return Err("one of `inspect` and `verify` is expected".into()),
    };
    let snapshot = match (what, paths) {
        (Some("inspect"), [path]) => Snapshot::Inspect(path.into()),
        (Some("verify"), [folder]) => Snapshot::Verify(Location::Folder(folder.into())),
        (Some("verify"), [state, memory]) => {
            Snapshot::Verify(Location::Files { state: state.into(), memory: memory.into() })
        }
        (Some("inspect"), _) => return Err("one state, or its folder, is expected".into()),
        (Some("verify"), _) => return Err("a folder, or a state and its memory, is expected".into()),
        _ => return Err("one of `inspect` and `verify` is expected".into()),
    };
    Ok(Command::Snapshot(snapshot))
}
