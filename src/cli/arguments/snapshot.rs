//! `alula snapshot`: its options and its help.

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::Arg::{Long, Short, Value};

use super::{Command, Given};
use crate::carry::stored::Location;
use crate::spelling;

/// The help.
pub const HELP: &str = "\
Look at the files of a saved microVM, and merge them.

Usage: alula snapshot inspect STATE|FOLDER
       alula snapshot verify FOLDER
       alula snapshot verify STATE MEMORY
       alula snapshot merge FOLDER DIFF_FOLDER
       alula snapshot merge STATE MEMORY DIFF_STATE DIFF_MEMORY
       alula snapshot edit-memory rebase --memory-path MEMORY --diff-path DIFF_MEMORY

`inspect` prints what the state says, as JSON: where and of what machine it was made, and how large it is.
`verify` reads all of state and memory, and compares them with the checksums in the state.
`merge` makes a snapshot the later one that a difference was saved of; the difference stays, and is of no more use.
`edit-memory rebase` puts what a difference's memory has beside its holes into a memory file, in place and unchecked, as
Firecracker's `snapshot-editor` does: use it where there are no states, and load the difference's state with that memory.

A microVM is saved by `alula ctl snapshot FOLDER` and goes on by `alula run --restore FOLDER`; STATE and
MEMORY are the two paths of the API's request (docs/snapshots.md).

Options:
  -h, --help            Print this
  --memory-path MEMORY  The memory file to be changed, which no guest may use
  --diff-path FILE      The memory file of the difference

The exit code is 0, or 1 when the files are not there, damaged or not to be merged, 153 for wrong arguments.
";

/// `alula snapshot`.
#[derive(Debug)]
pub enum Snapshot {
    /// Print what the state says, at this path or in this folder.
    Inspect(PathBuf),
    /// Print the version of the state at this path.
    Version(PathBuf),
    /// Read all of it.
    Verify(Location),
    /// Merge into the first the second, a difference.
    Merge(Location, Location),
    /// Put the pages of one memory file into another one.
    Rebase {
        /// The file to be changed.
        memory: PathBuf,
        /// The file that has only some pages.
        diff: PathBuf,
    },
}

/// The help for who has called this program `snapshot-editor`.
pub fn editor_help() -> String {
    "Usage: snapshot-editor edit-memory rebase --memory-path MEMORY --diff-path DIFF_MEMORY\n\n\
     Puts what DIFF_MEMORY has beside its holes into MEMORY, which no guest may use.\n"
        .to_owned()
}

/// Parses what comes after `alula snapshot`.
pub fn parse(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let (mut words, mut given, mut memory, mut diff) = (Vec::new(), Given::default(), None, None);
    while let Some(argument) = parser.next()? {
        given.once(&argument)?;
        match argument {
            Short('h') | Long("help") => return Ok(Command::Print(HELP.to_owned())),
            Value(word) => words.push(word),
            Long("memory-path") => memory = Some(parser.value()?.into()),
            Long("diff-path") => diff = Some(parser.value()?.into()),
            other => return Err(other.unexpected()),
        }
    }
    const EXPECTED: &str = "one of `inspect`, `verify`, `merge` and `edit-memory` is expected";
    let (what, paths) = match words.split_first() {
        Some((what, paths)) => (what.to_str(), paths),
        None => return Err(EXPECTED.into()),
    };
    if what == Some("edit-memory") {
        return match (paths, memory, diff) {
            ([how], Some(memory), Some(diff)) if how == "rebase" => {
                Ok(Command::Snapshot(Snapshot::Rebase { memory, diff }))
            }
            _ => Err("`edit-memory rebase --memory-path MEMORY --diff-path DIFF_MEMORY` is expected".into()),
        };
    }
    if memory.is_some() || diff.is_some() {
        return Err("--memory-path and --diff-path are for `edit-memory rebase`".into());
    }
    let folder = |path: &OsString| Location::Folder(path.into());
    let files =
        |state: &OsString, memory: &OsString| Location::Files { state: state.into(), memory: memory.into() };
    let snapshot = match (what, paths) {
        (Some("inspect"), [path]) => Snapshot::Inspect(path.into()),
        (Some("verify"), [path]) => Snapshot::Verify(folder(path)),
        (Some("verify"), [state, memory]) => Snapshot::Verify(files(state, memory)),
        (Some("merge"), [base, diff]) => Snapshot::Merge(folder(base), folder(diff)),
        (Some("merge"), [state, memory, diff_state, diff_memory]) => {
            Snapshot::Merge(files(state, memory), files(diff_state, diff_memory))
        }
        (Some("merge"), _) => {
            return Err("two folders, or a state and its memory twice, are expected".into());
        }
        (Some("inspect"), _) => return Err("one state, or its folder, is expected".into()),
        (Some("verify"), _) => return Err("a folder, or a state and its memory, is expected".into()),
        _ => {
            let (word, words) = (what.unwrap_or_default(), ["inspect", "verify", "merge", "edit-memory"]);
            let message = format!("there is no command `{word}`");
            return Err(format!("{}: {EXPECTED}", spelling::with_hint(message, word, words)).into());
        }
    };
    Ok(Command::Snapshot(snapshot))
}
