//! `alula exec`, `alula cp` and `alula wait`: their options and their help.

use std::path::PathBuf;
use std::time::Duration;

use lexopt::Arg::{Long, Short, Value};
use lexopt::ValueExt;

use super::{Command, Given, value};
use crate::protocol::request::Run;

const EXEC_HELP: &str = "\
Run a command in a guest that is up, by the agent in it (docs/agent.md).

Usage: alula exec [OPTIONS] ID [--] COMMAND [ARGS...]
       alula exec [OPTIONS] --api-sock SOCKET [--] COMMAND [ARGS...]

Options:
      --api-sock SOCKET  The monitor's control socket, instead of the guest's ID
      --vsock SOCKET     The socket of the guest's vsock device, instead of its ID
  -i, --interactive      Connect standard input; the command's is empty otherwise
  -t, --tty              Give the command a terminal; Ctrl-A X leaves it
      --env NAME[=VALUE] Set a variable; without a value, to what it is here. May be repeated
      --workdir FOLDER   The folder in the guest to start in [default: the user's home]
      --user USER[:GROUP]
                         Who runs it there, by name or number [default: root]
      --timeout TIME     End it after that time: 30s, 5m, 500ms
  -h, --help             Print this

The exit code is the command's; 124 when its time was up, 125 when the guest or the agent in it could
not be reached or ended, 126 when the command cannot be executed, 127 when there is none, 128 + S when
signal S ended it there, 153 for wrong arguments.

Examples:
  alula exec web -- uname -a
  alula exec -it web sh
";

const CP_HELP: &str = "\
Copy files and folders into a guest that is up, or out of it.

Usage: alula cp [OPTIONS] FROM TO

One of FROM and TO is in the guest: ID:PATH, or :PATH with --api-sock or --vsock. What goes to a folder
goes into it. Links stay links, holes stay holes; what is neither a file nor a folder nor a link is left out.

Options:
      --api-sock SOCKET  The monitor's control socket
      --vsock SOCKET     The socket of the guest's vsock device
      --user USER[:GROUP]
                         Who reads or writes in the guest [default: root]
  -h, --help             Print this

The exit code is 0, or 1 when it could not be done, 153 for wrong arguments.

Examples:
  alula cp target/debug/server web:/usr/local/bin
  alula cp --api-sock /tmp/alula.sock :/var/log logs
";

const WAIT_HELP: &str = "\
Wait until the agent in a guest answers. A guest that is being started may take 10 s to have its socket.

Usage: alula wait [OPTIONS] [ID]

Options:
      --api-sock SOCKET  The monitor's control socket, instead of the guest's ID
      --vsock SOCKET     The socket of the guest's vsock device, instead of its ID
      --timeout TIME     Give up after that time: 30s, 5m [default: never]
  -h, --help             Print this

The exit code is 0; 1 when the guest has ended, or is not there after 10 s; 124 when the time was up before; 153
for wrong arguments.
";

/// How a guest is reached.
#[derive(Clone, Debug, PartialEq)]
pub enum Reach {
    /// By its name.
    Id(String),
    /// By its monitor's control socket.
    Api(PathBuf),
    /// By the socket of its vsock device.
    Vsock(PathBuf),
}

/// `alula exec`.
#[derive(Debug)]
pub struct Exec {
    pub reach: Reach,
    pub run: Run,
    pub input: bool,
    pub terminal: bool,
    pub timeout: Option<Duration>,
}

/// `alula cp`.
#[derive(Debug)]
pub struct Copy {
    pub reach: Reach,
    /// In the guest.
    pub inside: PathBuf,
    /// On this machine.
    pub outside: PathBuf,
    pub into_guest: bool,
    pub user: Option<String>,
}

/// `alula wait`.
#[derive(Debug)]
pub struct Wait {
    pub reach: Reach,
    pub timeout: Option<Duration>,
}

/// The options that say how a guest is reached.
#[derive(Default)]
struct Sockets(Option<Reach>);

impl Sockets {
    fn take(&mut self, name: &str, parser: &mut lexopt::Parser) -> Result<(), lexopt::Error> {
        let path = parser.value()?.into();
        let reach = if name == "vsock" { Reach::Vsock(path) } else { Reach::Api(path) };
        if self.0.replace(reach).is_some() {
            return Err("one of --api-sock and --vsock is enough".into());
        }
        Ok(())
    }
}

/// Parses what comes after `alula exec`.
pub fn exec(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let (mut sockets, mut given) = (Sockets::default(), Given::default());
    let (mut run, mut input, mut terminal, mut timeout) = (Run::default(), false, false, None);
    while let Some(argument) = parser.next()? {
        if !matches!(argument, Long("env")) {
            given.once(&argument)?;
        }
        match argument {
            Long(name @ ("api-sock" | "vsock")) => {
                let name = name.to_owned();
                sockets.take(&name, parser)?;
            }
            Short('i') | Long("interactive") => input = true,
            Short('t') | Long("tty") => terminal = true,
            Long("timeout") => timeout = Some(value(parser, "--timeout", time)?),
            Short('h') | Long("help") => return Ok(Command::Print(EXEC_HELP.to_owned())),
            Long(name) if is_of_run(name) => {
                let name = name.to_owned();
                take_of_run(&mut run, &name, parser)?;
            }
            Value(id) if sockets.0.is_none() => sockets.0 = Some(Reach::Id(name_of(&id.string()?)?)),
            Value(program) => {
                run.argv.push(program.string()?);
                for argument in parser.raw_args()? {
                    run.argv.push(argument.string()?);
                }
            }
            other => return Err(other.unexpected()),
        }
    }
    let reach = sockets.0.ok_or("a guest is missing: its ID, --api-sock or --vsock")?;
    if run.argv.is_empty() {
        return Err("a command to run in the guest is missing".into());
    }
    Ok(Command::Exec(Exec { reach, run, input, terminal, timeout }))
}

/// Whether this option says how a command is run.
pub fn is_of_run(name: &str) -> bool {
    ["env", "workdir", "user"].contains(&name)
}

/// Takes such an option.
pub fn take_of_run(run: &mut Run, name: &str, parser: &mut lexopt::Parser) -> Result<(), lexopt::Error> {
    let text = parser.value()?.string()?;
    match name {
        "env" if text.contains('=') => run.env.push(text),
        // One that is not set here is not set there.
        "env" => run.env.extend(std::env::var(&text).ok().map(|value| format!("{text}={value}"))),
        "workdir" => run.workdir = Some(text.into()),
        _ => run.user = Some(text),
    }
    Ok(())
}

/// The name of a guest.
pub fn name_of(id: &str) -> Result<String, lexopt::Error> {
    super::id(id).map_err(|expected| format!("ID {id}: {expected}").into())
}

/// Parses what comes after `alula cp`.
pub fn cp(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let (mut sockets, mut given, mut places, mut user) =
        (Sockets::default(), Given::default(), Vec::<std::ffi::OsString>::new(), None);
    while let Some(argument) = parser.next()? {
        given.once(&argument)?;
        match argument {
            Long(name @ ("api-sock" | "vsock")) => {
                let name = name.to_owned();
                sockets.take(&name, parser)?;
            }
            Long("user") => user = Some(parser.value()?.string()?),
            Short('h') | Long("help") => return Ok(Command::Print(CP_HELP.to_owned())),
            Value(place) if places.len() < 2 => places.push(place),
            other => return Err(other.unexpected()),
        }
    }
    let [from, to] = <[_; 2]>::try_from(places).map_err(|_| "FROM and TO are expected")?;
    // `ID:PATH`; a path of this machine that looks like it is written with a slash before.
    let split = |place: &std::ffi::OsString| {
        let (id, path) = place.to_str()?.split_once(':')?;
        let is_name = id.is_empty() || super::id(id).is_ok();
        is_name.then(|| (id.to_owned(), PathBuf::from(path)))
    };
    let (id, inside, outside, into_guest) = match (split(&from), split(&to)) {
        (Some((id, inside)), None) => (id, inside, to.into(), false),
        (None, Some((id, inside))) => (id, inside, from.into(), true),
        _ => return Err("one of FROM and TO, and not both, is in the guest: ID:PATH".into()),
    };
    let reach = match (sockets.0, id.is_empty()) {
        (Some(reach), true) => reach,
        (None, false) => Reach::Id(id),
        (Some(_), false) => return Err(format!("{id}: with a socket, the path in the guest is :PATH").into()),
        (None, true) => return Err("a guest is missing: ID:PATH, --api-sock or --vsock".into()),
    };
    if inside.as_os_str().is_empty() {
        return Err("the path in the guest is empty".into());
    }
    Ok(Command::Copy(Copy { reach, inside, outside, into_guest, user }))
}

/// Parses what comes after `alula wait`.
pub fn wait(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let (mut sockets, mut given, mut timeout) = (Sockets::default(), Given::default(), None);
    while let Some(argument) = parser.next()? {
        given.once(&argument)?;
        match argument {
            Long(name @ ("api-sock" | "vsock")) => {
                let name = name.to_owned();
                sockets.take(&name, parser)?;
            }
            Long("timeout") => timeout = Some(value(parser, "--timeout", time)?),
            Short('h') | Long("help") => return Ok(Command::Print(WAIT_HELP.to_owned())),
            Value(id) if sockets.0.is_none() => sockets.0 = Some(Reach::Id(name_of(&id.string()?)?)),
            other => return Err(other.unexpected()),
        }
    }
    let reach = sockets.0.ok_or("a guest is missing: its ID, --api-sock or --vsock")?;
    Ok(Command::Wait(Wait { reach, timeout }))
}

/// A time with its unit: `30s`, `5m`, `500ms`; a bare number is seconds.
pub fn time(text: &str) -> Result<Duration, String> {
    let expected = || "expected a time like 30s, 5m or 500ms".to_owned();
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let number: u64 = digits.parse().map_err(|_| expected())?;
    let factor_ms = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(expected()),
    };
    number.checked_mul(factor_ms).map(Duration::from_millis).ok_or_else(expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(
        parse: fn(&mut lexopt::Parser) -> Result<Command, lexopt::Error>,
        line: &str,
    ) -> Result<Command, String> {
        parse(&mut lexopt::Parser::from_args(line.split_whitespace())).map_err(|error| error.to_string())
    }

    #[test]
    fn a_command_is_all_that_comes_after_the_guest() {
        let of = |line: &str| match parsed(exec, line) {
            Ok(Command::Exec(exec)) => exec,
            other => panic!("{line}: {other:?}"),
        };
        let exec = of("-it --env A=b --env C= --user 1:2 web ls -l --env x");
        assert_eq!((exec.reach, exec.input, exec.terminal), (Reach::Id("web".into()), true, true));
        assert_eq!(exec.run.argv, ["ls", "-l", "--env", "x"]);
        assert_eq!((exec.run.env, exec.run.user), (vec!["A=b".into(), "C=".into()], Some("1:2".into())));
        let exec = of("--api-sock s --timeout 5m --workdir /w -- web --");
        assert_eq!((exec.reach, exec.timeout), (Reach::Api("s".into()), Some(Duration::from_secs(300))));
        assert_eq!((exec.run.argv, exec.run.workdir), (vec!["web".into(), "--".into()], Some("/w".into())));
    }

    #[test]
    fn copies_know_which_side_is_the_guest() {
        let of = |line: &str| match parsed(cp, line) {
            Ok(Command::Copy(copy)) => (copy.reach, copy.inside, copy.outside, copy.into_guest),
            other => panic!("{line}: {other:?}"),
        };
        let id = Reach::Id("web".into());
        assert_eq!(of("a web:/b"), (id.clone(), "/b".into(), "a".into(), true));
        assert_eq!(of("web:b:c ./x:y"), (id, "b:c".into(), "./x:y".into(), false));
        assert_eq!(of("--vsock v :/b a"), (Reach::Vsock("v".into()), "/b".into(), "a".into(), false));
    }

    #[test]
    fn what_is_wrong_is_told() {
        for (parse, line, expected) in [
            (exec as fn(&mut lexopt::Parser) -> _, "", "a guest is missing"),
            (exec, "web", "a command to run in the guest is missing"),
            (exec, "we_b ls", "ID we_b: "),
            (exec, "--api-sock a --vsock b ls", "one of --api-sock and --vsock is enough"),
            (exec, "--timeout 5d web ls", "--timeout 5d: expected a time like 30s"),
            (exec, "--timeout 99999999999999999999 web ls", "expected a time"),
            (cp, "a", "FROM and TO are expected"),
            (cp, "a b", "one of FROM and TO, and not both, is in the guest"),
            (cp, "a:b c:d", "one of FROM and TO, and not both"),
            (cp, "--vsock s a:b c", "a: with a socket, the path in the guest is :PATH"),
            (cp, ":b c", "a guest is missing"),
            (cp, "web: c", "the path in the guest is empty"),
            (wait, "", "a guest is missing"),
            (wait, "a b", "unexpected argument \"b\""),
        ] {
            let error = parsed(parse, line).expect_err(line);
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
