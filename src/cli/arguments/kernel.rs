//! `alula kernel`: its options and its help.

use lexopt::Arg::{Long, Short, Value};
use lexopt::ValueExt;

use super::Command;

const HELP: &str = "\
Get a kernel for guests that run commands (`alula run -- COMMAND`).

Usage: alula kernel fetch [--from URL|FILE]...

The newest kernel for virtual machines of this machine's distribution is downloaded by its own apt and
unpacked, with the modules that guests need; nothing is installed. It is put into `kernel-ARCHITECTURE` in
$ALULA_CACHE, or in the user's cache, where `alula run` finds it.

Options:
      --from URL|FILE  This package (.deb) instead. May be repeated, for kernels with several packages
  -h, --help           Print this

The exit code is 0, or 1 when it could not be done, 153 for wrong arguments.
";

/// Parses what comes after `alula kernel`.
pub fn parse(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let (mut from, mut is_fetch) = (Vec::new(), false);
    while let Some(argument) = parser.next()? {
        match argument {
            Value(word) if word == "fetch" && !is_fetch => is_fetch = true,
            Long("from") => from.push(parser.value()?.string()?),
            Short('h') | Long("help") => return Ok(Command::Print(HELP.to_owned())),
            other => return Err(other.unexpected()),
        }
    }
    if is_fetch { Ok(Command::FetchKernel(from)) } else { Err("what to do is missing: `fetch`".into()) }
}
