//! `alula cache`: its help.

use lexopt::Arg::{Long, Short, Value};

use super::Command;

const HELP: &str = "\
Show the images that `alula run --rootfs FOLDER` has packed folders into, or remove them.

Usage: alula cache [clear]

Each image is a line: its size on the disk, when a guest began to use it, and the folder it was made from.
They are in `images` in $ALULA_CACHE, or in the user's cache. When there is no room for a new one
(`--cache-limit` of `alula run`), those used longest ago are removed. `clear` removes all that no guest uses.

Options:
  -h, --help  Print this

The exit code is 0, or 1 when it could not be done, 153 for wrong arguments.
";

/// Parses what comes after `alula cache`.
pub fn parse(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let mut clear = false;
    while let Some(argument) = parser.next()? {
        match argument {
            Value(word) if word == "clear" && !clear => clear = true,
            Short('h') | Long("help") => return Ok(Command::Print(HELP.to_owned())),
            other => return Err(other.unexpected()),
        }
    }
    Ok(Command::Cache { clear })
}
