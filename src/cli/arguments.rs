//! What can be said on the command line, with its help, and the configuration that comes of it.

pub mod agent;
mod cache;
pub mod command;
pub mod cpu;
pub mod ctl;
pub mod exec;
mod jail;
mod kernel;
mod meant;
mod run;
mod serve;
pub mod snapshot;
pub mod template;

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::Arg::{Long, Short, Value};
use lexopt::ValueExt;

use crate::api::{CONFIG_SCHEMA, OPENAPI};
use crate::cli::persona::Persona;
use crate::guest::runtime;
use crate::jail::Jail;

pub use run::Run;
pub use serve::Serve;

const HELP: &str = "\
A microVM monitor: one process runs one virtual machine on Linux KVM.

Usage: alula COMMAND [OPTIONS]

Commands:
  run       Boot a guest, put its console on this terminal and return how it ended
  serve     Wait for requests on a control socket (Firecracker's API)
  jail      Shut one of these, or another program, in before it begins
  ctl       Ask a running microVM something, or tell it to do something
  snapshot  Look at the files of a saved microVM, or merge a difference into them
  cpu       Show what a guest's CPUs are here, or what one host's lack of another's
  template  Make clones of a saved microVM, each in a moment, for who asks
  clone     Have a template make clones
  exec      Run a command in a guest that is up
  cp        Copy files into a guest that is up, or out of it
  wait      Wait until the agent in a guest answers
  kernel    Get a kernel for guests that run commands
  cache     Show the images that folders were packed into for guests, or remove them
  agent     Be the agent in a guest: start programs there for the host
  check     Look for everything wrong with a config file, without starting anything
  schema    Print the schema of the API or of config files, for programs
  firmware  Write the image of the embedded firmware guest to standard output
  help      Print this, or the help of the command that follows
  version   Print the version

`alula COMMAND --help` tells more. -V, --version prints the version.
";

const COMMANDS: &str = "run, serve, jail, ctl, snapshot, cpu, template, clone, exec, cp, wait, kernel, cache, agent, check, schema, firmware, help or version; see `alula --help`";

const FIRMWARE_HELP: &str = "\
Write the image of the embedded firmware guest to standard output.

It is a kernel, for `/boot-source`, that looks at the machine it finds itself in. docs/first-guest.md has the words that it
takes by `boot_args`.

Usage: alula firmware > FILE
";

const SCHEMA_HELP: &str = "\
Print a schema, for programs: code generators, editors.

Usage: alula schema WHICH

Schemas:
  openapi  The API, as an OpenAPI 3 document
  config   Config files, as a JSON Schema
";

const CHECK_HELP: &str = "\
Look for everything wrong with a config file, without starting anything.

Usage: alula check [--json] CONFIG...

Each problem is a line on standard output: file, line and column, the section and the field. What the
configuration names is looked for, and not changed: kernel, initial ramdisk, disks, TAP interfaces, and
the folders that output goes to. Sections that nobody reads are told of; `$schema`, and notes whose name
begins with `_`, are not. `-` is standard input.

Options:
      --json  Print a JSON array of files: `file`, whether it is `ok`, and its `problems`, each with
              `message`, `line` and `column` (where there is a place), and whether it is a `warning`
  -h, --help  Print this

The exit code is 0 if there is none in any of them, 1 if there are some, 153 for wrong arguments.

Examples:
  alula check /etc/alula/*.json
  jq '.drives = []' vm.json | alula check -
";

/// What the user wants.
#[derive(Debug)]
pub enum Command {
    Run(Box<Run>),
    Serve(Box<Serve>),
    Jail(Box<Jail>),
    Ctl(ctl::Ctl),
    Agent(agent::Agent),
    /// Fetch a kernel: out of these packages, or the newest.
    FetchKernel(Vec<String>),
    /// Show the images, or remove them.
    Cache {
        clear: bool,
    },
    Exec(exec::Exec),
    Copy(exec::Copy),
    Wait(exec::Wait),
    Snapshot(snapshot::Snapshot),
    Cpu(cpu::Cpu),
    Template(template::Template),
    Clone(template::Clones),
    /// Look for what is wrong with config files.
    Check(Check),
    Firmware,
    /// Print this text.
    Print(String),
    /// Print this one, which is part of the binary.
    Show(&'static str),
}

/// Parses the arguments, the program's name first; the error is one line for the user.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    let mut arguments = arguments.into_iter();
    match Persona::of(&arguments.next().unwrap_or_default()) {
        Persona::Alula => alula(arguments),
        persona => other(persona, arguments.collect()),
    }
}

/// The command line of another program.
fn other(persona: Persona, mut arguments: Vec<OsString>) -> Result<Command, String> {
    let help = || match persona {
        Persona::Firecracker => serve::help(persona)
            .replace("Usage: alula serve", "Usage: firecracker")
            .replace("alula serve", "firecracker"),
        Persona::Jailer => jail::HELP.replace("alula jail", "jailer"),
        Persona::SnapshotEditor => snapshot::editor_help(),
        Persona::Alula => HELP.to_owned(),
    };
    if let Some(text) = persona.print(&arguments, help) {
        return Ok(Command::Print(text));
    }
    match persona {
        Persona::Firecracker => {
            // What comes after it is not for this program.
            if let Some(end) = arguments.iter().position(|argument| argument == "--") {
                arguments.truncate(end);
            }
            serve::parse(&mut lexopt::Parser::from_args(&arguments), persona).map_err(|error| {
                format!(
                    "{}; see `firecracker --help`",
                    meant::with_word(&error, &arguments, &serve::help(persona))
                )
            })
        }
        Persona::Jailer => jail::parse(&mut lexopt::Parser::from_args(&arguments)).map_err(|error| {
            format!("{}; see `jailer --help`", meant::with_word(&error, &arguments, jail::HELP))
        }),
        Persona::SnapshotEditor => {
            let is_rebase = arguments.first().is_some_and(|word| word == "edit-memory");
            let parsed = snapshot::parse(&mut lexopt::Parser::from_args(&arguments));
            match parsed.map_err(|error| meant::with_word(&error, &arguments, snapshot::HELP)) {
                Ok(command) if is_rebase => Ok(command),
                Ok(_) => {
                    Err("`edit-memory rebase` is what there is; see `snapshot-editor --help`".to_owned())
                }
                Err(error) => Err(format!("{error}; see `snapshot-editor --help`")),
            }
        }
        Persona::Alula => alula(arguments),
    }
}

fn alula(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    let arguments: Vec<_> = arguments.into_iter().collect();
    let mut parser = lexopt::Parser::from_args(&arguments);
    let command = match parser.next().map_err(|error| error.to_string())? {
        Some(Value(command)) => command,
        Some(Short('h') | Long("help")) => return Ok(Command::Print(HELP.to_owned())),
        Some(Short('V') | Long("version")) => {
            return Ok(Command::Print(Persona::Alula.version()));
        }
        Some(other) => {
            return Err(format!("{}: a command comes first; see `alula --help`", other.unexpected()));
        }
        None => {
            return Err(format!("a command is missing: {COMMANDS}"));
        }
    };
    let (parsed, name) = match command.to_str() {
        Some("run") => (run::parse(&mut parser), "run"),
        Some("serve") => (serve::parse(&mut parser, Persona::Alula), "serve"),
        Some("jail") => (jail::parse(&mut parser), "jail"),
        Some("ctl") => (ctl::parse(&mut parser), "ctl"),
        Some("snapshot") => (snapshot::parse(&mut parser), "snapshot"),
        Some("cpu") => (cpu::parse(&mut parser), "cpu"),
        Some("template") => (template::template(&mut parser), "template"),
        Some("clone") => (template::clone(&mut parser), "clone"),
        Some("exec") => (exec::exec(&mut parser), "exec"),
        Some("cp") => (exec::cp(&mut parser), "cp"),
        Some("wait") => (exec::wait(&mut parser), "wait"),
        Some("kernel") => (kernel::parse(&mut parser), "kernel"),
        Some("cache") => (cache::parse(&mut parser), "cache"),
        Some("agent") => (agent::parse(&mut parser), "agent"),
        Some("check") => (check(&mut parser), "check"),
        Some("schema") => (schema(&mut parser), "schema"),
        Some("firmware") => (
            alone(&mut parser, FIRMWARE_HELP.to_owned()).map(|help| help.unwrap_or(Command::Firmware)),
            "firmware",
        ),
        Some("help") => match parser.next() {
            // Of a command: what the command says.
            Ok(Some(Value(command))) => return alula([command, "--help".into()]),
            Ok(None | Some(Short('h') | Long("help"))) => return Ok(Command::Print(HELP.to_owned())),
            _ => return Err("`alula help` takes the name of a command".to_owned()),
        },
        Some("version") => {
            let version = || Command::Print(Persona::Alula.version());
            (alone(&mut parser, HELP.to_owned()).map(|help| help.unwrap_or_else(version)), "version")
        }
        _ => {
            let commands = COMMANDS.split([',', ' ', ';']);
            return Err(format!("{}: {COMMANDS}", meant::no_command(&command, commands)));
        }
    };
    parsed.map_err(|error| {
        let help = || match alula([name.into(), "--help".into()]) {
            Ok(Command::Print(help)) => help,
            _ => String::new(),
        };
        format!("{}; see `alula {name} --help`", meant::with_word(&error, &arguments, &help()))
    })
}

/// What comes after a command without arguments: nothing, or the wish for its help.
fn alone(parser: &mut lexopt::Parser, help: String) -> Result<Option<Command>, lexopt::Error> {
    match parser.next()? {
        None => Ok(None),
        Some(Short('h') | Long("help")) => Ok(Some(Command::Print(help))),
        Some(other) => Err(other.unexpected()),
    }
}

/// `alula check`.
#[derive(Debug, Default)]
pub struct Check {
    /// At least one; `-` is standard input.
    pub files: Vec<PathBuf>,
    pub json: bool,
}

fn check(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let mut check = Check::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Ok(Command::Print(CHECK_HELP.to_owned())),
            Long("json") => check.json = true,
            Value(path) => check.files.push(path.into()),
            other => return Err(other.unexpected()),
        }
    }
    if check.files.is_empty() {
        return Err("a config file is missing".into());
    }
    Ok(Command::Check(check))
}

fn schema(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let Some(argument) = parser.next()? else {
        return Err("one of `openapi` and `config` is expected".into());
    };
    let command = match argument {
        Short('h') | Long("help") => return Ok(Command::Print(SCHEMA_HELP.to_owned())),
        Value(which) if which == "openapi" => Command::Show(OPENAPI),
        Value(which) if which == "config" => Command::Show(CONFIG_SCHEMA),
        Value(which) => {
            return Err(format!("there is no schema {which:?}: expected `openapi` or `config`").into());
        }
        other => return Err(other.unexpected()),
    };
    match parser.next()? {
        None => Ok(command),
        Some(other) => Err(other.unexpected()),
    }
}

/// The options that were given so far, of those that may be given but once.
#[derive(Default)]
struct Given(Vec<String>);

impl Given {
    /// Refuses an option that was given before: which of the two is meant, only the user knows.
    fn once(&mut self, argument: &lexopt::Arg<'_>) -> Result<(), lexopt::Error> {
        let Long(name) = *argument else { return Ok(()) };
        if self.0.iter().any(|other| other == name) {
            return Err(format!("--{name} is given twice: give it once").into());
        }
        self.0.push(name.to_owned());
        Ok(())
    }
}

/// The value of `option`, by `parse`, whose error says what was expected.
pub fn value<T>(
    parser: &mut lexopt::Parser,
    option: &str,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> Result<T, lexopt::Error> {
    let text = parser.value()?.string()?;
    parse(&text).map_err(|expected| format!("{option} {text}: {expected}").into())
}

fn default_id() -> String {
    "anonymous-instance".to_owned()
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    let is_too_large = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.is_empty();
    text.parse().map_err(|_| match is_too_large {
        true => {
            // The largest number of a type is the largest of those of all bits set that the type can be.
            let most = (1..=u64::BITS).rev().map(|bits| u64::MAX >> (u64::BITS - bits));
            let most = most.map(|most| most.to_string()).find(|most| most.parse::<T>().is_ok());
            format!("expected a smaller number, {} at most", most.unwrap_or_default())
        }
        false => "expected a whole number".to_owned(),
    })
}

fn id(text: &str) -> Result<String, String> {
    runtime::check_id(text).map(|()| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::Dialect;

    fn parsed(line: &str) -> Result<Command, String> {
        parse(std::iter::once("alula").chain(line.split_whitespace()).map(OsString::from))
    }

    fn firecracker(line: &str) -> Result<Command, String> {
        parse(std::iter::once("/bin/firecracker").chain(line.split_whitespace()).map(OsString::from))
    }

    #[test]
    fn firecrackers_command_line_is_taken_under_its_name() {
        let line = "--id a-b --api-sock=/s --config-file f --no-api --enable-pci --no-seccomp --start-time-us 1 \
                    --start-time-cpu-us 2 --parent-cpu-time-us 3 --http-api-max-payload-size 9 \
                    --mmds-size-limit 10 -- run anything";
        let Ok(Command::Serve(serve)) = firecracker(line) else { panic!("not a service") };
        assert_eq!(
            (serve.id.as_str(), serve.api_sock, serve.dialect),
            ("a-b", Some("/s".into()), Dialect::Firecracker)
        );
        assert!(serve.no_api && serve.enable_pci && serve.http_api_max_payload_size == 9);
        assert_eq!(serve.mmds_size_limit, Some(10));
        let Ok(Command::Serve(serve)) = firecracker("") else { panic!("not a service") };
        assert_eq!(serve.socket().unwrap(), std::path::Path::new("/run/firecracker.socket"));
        let Ok(Command::Serve(serve)) = firecracker("--id a --module vmm") else { panic!("not a service") };
        assert_eq!(serve.socket().unwrap(), std::path::Path::new("/run/firecracker.socket"));
        for (line, expected) in [
            ("--api-sock /s --version --nonsense", "Firecracker v1.17.0\n\n"),
            ("--help", "Firecracker v1.17.0\n\nWait for requests"),
        ] {
            let Ok(Command::Print(text)) = firecracker(line) else { panic!("{line}") };
            assert!(text.starts_with(expected), "{text}");
        }
        for (line, expected) in [
            ("run", "unexpected argument \"run\"; see `firecracker --help`"),
            ("--api-socket s", "invalid option '--api-socket' (is `--api-sock` meant?); see `firecracker"),
            ("--start-time-us soon", "--start-time-us soon: expected a whole number"),
            ("--metadata", "missing argument for option '--metadata'"),
            ("--seccomp-filter f", "--seccomp-filter is not implemented yet: each thread has"),
            ("--no-seccomp --seccomp-filter=f", "--seccomp-filter is not implemented yet"),
            ("--id a --id=b", "--id is given twice: give it once; see `firecracker --help`"),
            ("-- --version --api-sock", ""),
        ] {
            match firecracker(line) {
                Err(error) => assert!(error.contains(expected), "{line}: {error}"),
                Ok(_) => assert_eq!(expected, "", "{line}"),
            }
        }
    }

    #[test]
    fn options_may_come_in_any_order_and_form() {
        let Ok(Command::Run(run)) = parsed("run --cpus=4 k --memory 1G --cmdline --x --initrd i") else {
            panic!("not a run");
        };
        assert_eq!((run.kernel, run.initrd), (Some("k".into()), Some("i".into())));
        assert_eq!((run.cpus, run.memory_mib, run.cmdline.as_deref()), (Some(4), Some(1024), Some("--x")));
    }

    #[test]
    fn what_is_wrong_is_named_with_a_way_on() {
        for (line, expected) in [
            ("", "a command is missing"),
            ("dance", "there is no command \"dance\""),
            ("--cpus 1", "a command comes first"),
            ("run a b", "unexpected argument \"b\""),
            ("rnu", "there is no command \"rnu\" (is `run` meant?): run, serve"),
            ("run --cpu 1", "invalid option '--cpu' (is `--cpus` meant?); see `alula run --help`"),
            ("run --frobnicate", "invalid option '--frobnicate'; see `alula run --help`"),
            ("run --dsik x", "invalid option '--dsik' (is `--disk` meant?)"),
            ("serve --config x", "invalid option '--config' (is `--config-file` meant?)"),
            ("ctl statsu", "there is no command `statsu` (is `status` meant?)"),
            ("ctl web cpus many", "cpus many: expected a whole number"),
            ("ctl web balloon much", "balloon much: expected a size like 256M or 2G"),
            ("schema x", "there is no schema \"x\": expected `openapi` or `config`"),
            ("run --cpus", "missing argument for option '--cpus'"),
            ("run --cpus 70000", "--cpus 70000: expected a smaller number, 65535 at most"),
            ("run --module banana", "--module banana: there is no such module"),
            ("run --memory much", "--memory much: expected a size like 256M or 2G"),
            ("run --initrd i", "--initrd needs a kernel"),
            (
                "run --watchdog stop",
                "--watchdog stop: expected `reset`, `poweroff` or `none` (an event alone)",
            ),
            ("run --watchdog reset --restore d", "leave out --watchdog"),
            ("run --self-test k", "give no kernel beside it"),
            ("serve --no-api", "--no-api needs --config-file"),
            (
                "serve --warm cpus=1,memory=1G,cpus=2",
                "--warm cpus=1,memory=1G,cpus=2: expected cpus=N,memory=SIZE",
            ),
            (
                "serve --warm memory=1G",
                "expected cpus=N,memory=SIZE, as in cpus=1,memory=128M; see `alula serve",
            ),
            ("serve --warm cpus=1,memory=much", "expected a size like 256M or 2G"),
            ("serve --warm cpus=1,memory=1G --config-file f", "leave it out, or --config-file"),
            ("run --restore d k", "--restore: the guest is what it was when it was saved: leave out KERNEL"),
            ("run --boot-timer --restore d", "leave out --boot-timer"),
            ("run --restore d --cpus 2", "leave out --cpus"),
            ("run --restore d --disk x", "leave out --disk"),
            ("run --restore d -- true", "leave out COMMAND"),
            ("run --rootfs d --", "a command to run in the guest is expected after `--`"),
            ("run k --copy a", "--copy is for a command to run in the guest: give it after `--`"),
            ("run --copy-out a:b -- true", "--copy-out a:b: expected GUEST:HOST, GUEST with a slash before"),
            ("run --timeout x -- true", "--timeout x: expected a time like 30s, 5m or 500ms"),
            (
                "snapshot",
                "one of `inspect`, `verify`, `merge` and `edit-memory` is expected; see `alula snapshot --help`",
            ),
            ("snapshot merge a", "two folders, or a state and its memory twice, are expected"),
            ("snapshot verify", "a folder, or a state and its memory, is expected"),
            ("snapshot inspect a b", "one state, or its folder, is expected"),
            ("ctl --diff pause", "`--diff` is for `snapshot` alone"),
            ("ctl status --force", "`--force` is for `stop` alone"),
            ("ctl list --watch --sweep", "--watch and --sweep do not go together"),
            ("ctl limit d ops=x", "`ops=x`: expected `bandwidth=N`"),
            ("ctl snapshot", "one folder, and `--diff` or not, is expected"),
            ("firmware x", "unexpected argument \"x\"; see `alula firmware --help`"),
            ("version x", "unexpected argument \"x\""),
            ("help dance", "there is no command \"dance\""),
            ("help --x", "takes the name of a command"),
        ] {
            let error = parsed(line).expect_err(line);
            assert!(error.contains(expected), "{line}: {error}");
        }
    }

    #[test]
    fn every_command_has_a_help_by_either_way_to_ask_for_it() {
        let text = |line: &str| match parsed(line) {
            Ok(Command::Print(text)) => text,
            other => panic!("{line}: {other:?}"),
        };
        let commands = HELP.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
        let names: Vec<_> = commands.lines().filter_map(|line| line.split_whitespace().next()).collect();
        assert!(names.len() == 19 && names.iter().all(|name| COMMANDS.contains(name)), "{names:?}");
        for name in names {
            let help = text(&format!("{name} --help"));
            assert_eq!(help, text(&format!("help {name}")), "{name}");
            assert!(help.contains("Usage: alula"), "{name}: {help}");
            assert!(help.lines().all(|line| !line.starts_with('-')), "an option without its indent: {help}");
        }
        assert_eq!(text("help"), HELP);
        assert_eq!(text("version"), text("--version"));
    }
}
