//! `alula jail`, which is the command line of Firecracker's `jailer` too: its options and its help.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use lexopt::Arg::{Long, Short};

use super::{Command, Given, id, number, value};
use crate::jail::cgroup::{self, Cgroups, Setting, Version};
use crate::jail::{Arguments, Jail};

/// The help.
pub const HELP: &str = "\
Shut a program in, as root or by --userns, and become it: a folder as its root, namespaces, control groups, limits,
a user, no environment, and no open file that is not named. docs/jail.md tells more.

Usage: alula jail --id ID --uid N --gid N [OPTIONS] [-- ARGUMENTS...]
       alula jail --id ID --userns [OPTIONS] [-- ARGUMENTS...]

ARGUMENTS are the program's; with this program itself, they may begin with `run` or `serve` [default: serve]. The
program is told `--id ID` too, and when it was started.

Options:
      --id ID              The jail's name, and the guest's: 1 to 64 letters, digits and hyphens
      --exec-file FILE     The program, which is linked statically [default: this one]
      --uid N, --gid N     Its user and group; with --userns their numbers in there [default with --userns:
                           as outside]
      --userns             As an ordinary user: in a user namespace of its own
      --chroot-base-dir DIR
                           Its root is DIR/PROGRAM/ID/root [default: /srv/jailer]
      --netns FILE         Join this network namespace, as in /run/netns/NAME [default: the host's]
      --new-pid-ns         Be process 1 of a PID namespace; this command ends then, and PROGRAM.pid in the root
                           has the number
      --daemonize          Go on in the background, in the same way, with /dev/null for its output
      --cgroup FILE=VALUE  Write this to a file of its control group. May be repeated
      --cgroup-version N   1 or 2 [default: 1 where that has the controllers, else 2]
      --parent-cgroup NAME Its control group is made in this one [default: the program's name]
      --resource-limit fsize=BYTES|no-file=N
                           The largest file, and how many files may be open [default: no-file=2048]. May be
                           repeated
      --keep-fd N          Let the program have this open descriptor, as `fd:N`. May be repeated
  -h, --help               Print this

The exit code is the program's, or 1 when there is no jail, of which nothing is left then; 153 for wrong
arguments.

Examples:
  alula jail --id web --uid 1000 --gid 1000 --cgroup pids.max=64 -- --api-sock /run/web.sock
  alula jail --id test --userns --chroot-base-dir ~/jails -- run
";

const DEFAULT_BASE: &str = "/srv/jailer";
/// The name under which a program has our command line, and not Firecracker's.
const OWN_NAME: &str = "alula";
const REPEATED: [&str; 3] = ["cgroup", "resource-limit", "keep-fd"];

/// Parses what comes after `alula jail`, or `jailer`.
pub fn parse(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let cgroups = Cgroups { version: None, parent: None, settings: Vec::new() };
    let mut jail = Jail {
        id: String::new(),
        program: None,
        base: PathBuf::from(DEFAULT_BASE),
        uid: None,
        gid: None,
        has_user_namespace: false,
        network: None,
        is_daemon: false,
        has_pid_namespace: false,
        cgroups,
        file_size: None,
        descriptors: None,
        kept: Vec::new(),
        arguments: Arguments::default(),
    };
    let (mut given, mut rest) = (Given::default(), Vec::new());
    while !take_rest(parser, &mut rest)
        && let Some(argument) = parser.next()?
    {
        if !matches!(argument, Long(name) if REPEATED.contains(&name)) {
            given.once(&argument)?;
        }
        match argument {
            Long("id") => jail.id = value(parser, "--id", id)?,
            Long("exec-file") => jail.program = Some(parser.value()?.into()),
            Long("uid") => jail.uid = Some(value(parser, "--uid", user)?),
            Long("gid") => jail.gid = Some(value(parser, "--gid", user)?),
            Long("userns") => jail.has_user_namespace = true,
            Long("chroot-base-dir") => jail.base = parser.value()?.into(),
            Long("netns") => jail.network = Some(parser.value()?.into()),
            Long("new-pid-ns") => jail.has_pid_namespace = true,
            Long("daemonize") => jail.is_daemon = true,
            Long("cgroup") => jail.cgroups.settings.push(value(parser, "--cgroup", Setting::parse)?),
            Long("cgroup-version") => {
                jail.cgroups.version = Some(value(parser, "--cgroup-version", version)?)
            }
            Long("parent-cgroup") => {
                jail.cgroups.parent = Some(value(parser, "--parent-cgroup", cgroup::parent)?);
            }
            Long("resource-limit") => value(parser, "--resource-limit", |text| limit(text, &mut jail))?,
            Long("keep-fd") => jail.kept.push(value(parser, "--keep-fd", descriptor)?),
            Short('h') | Long("help") => return Ok(Command::Print(HELP.to_owned())),
            other => return Err(other.unexpected()),
        }
    }
    if jail.id.is_empty() {
        return Err("--id is missing: it names the jail".into());
    }
    for (option, number) in [("--uid", jail.uid), ("--gid", jail.gid)] {
        if number.is_none() && !jail.has_user_namespace {
            return Err(format!(
                "{option} is missing: who the program is (or --userns, as an ordinary user)"
            )
            .into());
        }
    }
    jail.arguments = arguments(jail.program.as_deref(), rest)?;
    Ok(Command::Jail(Box::new(jail)))
}

/// Takes all that follows `--`, if that comes next.
fn take_rest(parser: &mut lexopt::Parser, rest: &mut Vec<OsString>) -> bool {
    let Some(words) = parser.try_raw_args() else { return false };
    let is_end = words.peek().is_some_and(|word| word == "--");
    if is_end {
        rest.extend(words.skip(1));
    }
    is_end
}

/// Firecracker's command line has no commands, and ours has one first: that of `rest`, or the one that serves. The others
/// take no `--id`, which the program of a jail is told.
fn arguments(program: Option<&Path>, mut rest: Vec<OsString>) -> Result<Arguments, String> {
    if program.is_some_and(|program| program.file_name().is_none_or(|name| name != OWN_NAME)) {
        return Ok(Arguments { command: None, takes_times: true, rest });
    }
    let is_command = rest.first().is_some_and(|word| !word.as_encoded_bytes().starts_with(b"-"));
    let command = if is_command { rest.remove(0) } else { "serve".into() };
    let takes_times = command == "serve";
    if !takes_times && command != "run" {
        let command = command.display();
        return Err(format!("-- {command}: a jail is for one guest: `run` or `serve` is what can be in it"));
    }
    Ok(Arguments { command: Some(command), takes_times, rest })
}

/// The largest number means that a user stays the same (setresuid(2)).
fn user(text: &str) -> Result<u32, String> {
    number(text).and_then(|number| match number {
        u32::MAX => Err(format!("expected a smaller number, {} at most", u32::MAX - 1)),
        number => Ok(number),
    })
}

fn version(text: &str) -> Result<Version, String> {
    match text {
        "1" => Ok(Version::V1),
        "2" => Ok(Version::V2),
        _ => Err("expected 1 or 2".to_owned()),
    }
}

fn descriptor(text: &str) -> Result<i32, String> {
    number(text)
        .ok()
        .filter(|fd| *fd > 2)
        .ok_or_else(|| "expected the number of a descriptor above 2".to_owned())
}

fn limit(text: &str, jail: &mut Jail) -> Result<(), String> {
    let expected = || "expected fsize=BYTES or no-file=N".to_owned();
    let (name, limit) = text.split_once('=').ok_or_else(expected)?;
    let place = match name {
        "fsize" => &mut jail.file_size,
        "no-file" => &mut jail.descriptors,
        _ => return Err(expected()),
    };
    *place = Some(number(limit)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jail(line: &str) -> Result<Box<Jail>, String> {
        let mut words = line.split_whitespace();
        let parsed = super::super::parse(words.by_ref().map(OsString::from));
        parsed.map(|command| match command {
            Command::Jail(jail) => jail,
            other => panic!("{line}: {other:?}"),
        })
    }

    #[test]
    fn jailers_command_line_is_taken_under_its_name() {
        let jail = jail(
            "/usr/bin/jailer --id a-b --exec-file /usr/bin/firecracker --uid 1 --gid 2 --chroot-base-dir /b --netns /n \
             --daemonize --new-pid-ns --cgroup cpu.shares=1 --cgroup=pids.max=2 --cgroup-version 2 --parent-cgroup p/q \
             --resource-limit fsize=3 --resource-limit no-file=4 --keep-fd 5 -- --no-api --id c",
        )
        .unwrap();
        assert_eq!((jail.id.as_str(), jail.uid, jail.gid), ("a-b", Some(1), Some(2)));
        assert_eq!((jail.file_size, jail.descriptors, jail.kept), (Some(3), Some(4), vec![5]));
        assert!(jail.is_daemon && jail.has_pid_namespace && !jail.has_user_namespace);
        assert_eq!((jail.cgroups.settings.len(), jail.cgroups.version), (2, Some(Version::V2)));
        let Arguments { command, takes_times, rest } = jail.arguments;
        assert_eq!((command, takes_times, rest.join(" ".as_ref())), (None, true, "--no-api --id c".into()));
    }

    #[test]
    fn our_own_command_line_has_a_command_first() {
        for (line, command, takes_times, rest) in [
            ("alula jail --id a --userns", "serve", true, 0),
            ("alula jail --id a --userns -- --no-api --config-file f", "serve", true, 3),
            ("alula jail --id a --userns -- serve --no-api", "serve", true, 1),
            ("alula jail --id a --userns -- run kernel", "run", false, 1),
            ("jailer --id a --uid 1 --gid 1 --exec-file /bin/alula -- run", "run", false, 0),
        ] {
            let arguments = jail(line).unwrap().arguments;
            assert_eq!(arguments.command, Some(command.into()), "{line}");
            assert_eq!((arguments.takes_times, arguments.rest.len()), (takes_times, rest), "{line}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let long = format!("--id {}", "x".repeat(65));
        for (options, expected) in [
            ("", "--id is missing"),
            ("--id a/b", "--id a/b: expected 1 to 64 letters, digits and hyphens"),
            (&long, "expected 1 to 64 letters, digits and hyphens"),
            ("--id ..", "--id ..: expected 1 to 64 letters"),
            ("--id a", "--uid is missing: who the program is (or --userns, as an ordinary user)"),
            ("--id a --uid 1", "--gid is missing"),
            ("--id a --uid nobody", "--uid nobody: expected a whole number"),
            ("--id a --uid 4294967295", "--uid 4294967295: expected a smaller number"),
            ("--id a --cgroup pids.max", "--cgroup pids.max: expected FILE=VALUE, as in pids.max=64"),
            ("--id a --cgroup ../pids.max=1", "expected FILE=VALUE"),
            ("--id a --parent-cgroup ../x", "expected the name of a group below the root of the hierarchy"),
            ("--id a --cgroup-version 3", "--cgroup-version 3: expected 1 or 2"),
            ("--id a --resource-limit core=1", "expected fsize=BYTES or no-file=N"),
            ("--id a --resource-limit fsize=-1", "--resource-limit fsize=-1: expected a whole number"),
            ("--id a --keep-fd 2", "--keep-fd 2: expected the number of a descriptor above 2"),
            (
                "--id a --userns -- template saved",
                "-- template: a jail is for one guest: `run` or `serve` is what",
            ),
            ("--id a --userns -- version", "-- version: a jail is for one guest"),
            ("--id a --id b", "--id is given twice"),
            ("--id a --deamonize", "invalid option '--deamonize' (is `--daemonize` meant?)"),
            ("--id a --userns serve", "unexpected argument \"serve\""),
        ] {
            for (name, help) in [("alula jail", "alula jail --help"), ("jailer", "jailer --help")] {
                let error = jail(&format!("{name} {options}")).expect_err(options);
                assert!(error.contains(expected) && error.contains(help), "{options}: {error}");
            }
        }
    }
}
