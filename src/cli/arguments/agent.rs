//! `alula agent`: its options and its help.

use std::path::PathBuf;

use lexopt::Arg::{Long, Short, Value};
use lexopt::ValueExt;

use super::{Command, Given, number, value};
use crate::protocol::PORT;

const HELP: &str = "\
Be the agent in a guest: start programs there for the host, over vsock (docs/agent.md).

As process 1, under the name `init`, the same binary is also the guest's init.

Usage: alula agent [OPTIONS]

Options:
      --port N       The vsock port to listen on [default: 52]
      --socket PATH  Listen on this Unix socket instead, for whoever may connect to it
  -h, --help         Print this
";

/// What an agent does.
#[derive(Debug)]
pub enum Agent {
    /// Listens on a vsock port.
    Port(u32),
    /// Listens on a Unix socket.
    Socket(PathBuf),
    /// Writes what is there to standard output, as a tar stream.
    Send(PathBuf),
    /// Reads a tar stream from standard input; it goes there, or into it by this name. Folders on the way are
    /// made if that is said.
    Receive(PathBuf, String, bool),
}

/// Parses what comes after `alula agent`.
pub fn parse(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let (mut agent, mut given) = (Agent::Port(PORT), Given::default());
    while let Some(argument) = parser.next()? {
        given.once(&argument)?;
        agent = match argument {
            Long("port") => Agent::Port(value(parser, "--port", number)?),
            Long("socket") => Agent::Socket(parser.value()?.into()),
            Short('h') | Long("help") => return Ok(Command::Print(HELP.to_owned())),
            // How the agent starts itself.
            Value(word) if word == "send" => Agent::Send(parser.value()?.into()),
            Value(word) if word == "receive" => Agent::Receive(
                parser.value()?.into(),
                parser.value()?.string()?,
                parser.value()? == "parents",
            ),
            other => return Err(other.unexpected()),
        };
    }
    Ok(Command::Agent(agent))
}
