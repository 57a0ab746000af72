//! What can be said on the command line, with its help, and the configuration that comes of it.

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::Arg::{Long, Short, Value};
use lexopt::ValueExt;

use crate::api::BODY_MAX;
use crate::arch;
use crate::cli::persona::Persona;
use crate::config::{BootSource, Config, MachineConfig};
use crate::devices::KINDS;
use crate::devices::kind::{CliOption, Device, Kind};
use crate::error::{Context, Error, Result};
use crate::log;

/// Firecracker's limit on a microVM's name.
const ID_MAX: usize = 64;

const HELP: &str = "\
A microVM monitor: one process runs one virtual machine on Linux KVM.

Usage: alula COMMAND [OPTIONS]

Commands:
  run       Boot a guest, put its console on this terminal and return how it ended
  serve     Wait for requests on a control socket (Firecracker's API)
  firmware  Write the image of the embedded firmware guest to standard output

`alula COMMAND --help` tells more. -V, --version prints the version.
";

const RUN_HELP_BEFORE_DEVICES: &str = "\
Boot a guest, put its console on this terminal and return how it ended. Ctrl-A X leaves.

Usage: alula run [OPTIONS] [KERNEL]

KERNEL is vmlinux or bzImage on x86_64, Image on aarch64. Without it, the embedded firmware guest
boots: a self-test of this host.

Options:
      --initrd FILE      The initial ramdisk
      --cmdline TEXT     The kernel's command line [default: the serial console, and an end when it
                         panics]; for the firmware guest: what it is to do
      --cpus N           How many CPUs [default: 1]
      --memory SIZE      Memory with its unit, M or G (MiB, GiB); a bare number is MiB [default: 128M]
";

const RUN_HELP_AFTER_DEVICES: &str =
    "      --enable-pci       Devices on a PCI bus instead of behind virtio-mmio
      --config FILE      Read the configuration from this JSON file (Firecracker's format); other
                         options override it
      --api-sock SOCKET  Also serve the control API on this socket
      --events PATH      Write what happens to the guest there, a JSON object a line: a file, a FIFO, or
                         `fd:N`, an inherited descriptor
      --id ID            The microVM's name in the API: 1 to 64 letters, digits and hyphens
                         [default: anonymous-instance]
  -h, --help             Print this

The exit code is the guest's own (docs/exit-codes.md): 0 powered off, N the code it wrote to the exit
register, 120 reset, 121 halted for good, 122 triple fault, 123 KVM could not go on running it; 125 it
could not be started, 130 left by Ctrl-A X, 153 wrong arguments.

Examples:
  alula run
  alula run vmlinux --initrd initramfs.cpio --cpus 2 --memory 512M
";

const SERVE_HELP: &str = "\
Wait for requests on a control socket (Firecracker's API). The guest's serial console is standard input
and output; messages go to standard error.

Usage: alula serve [OPTIONS]

Options:
      --api-sock SOCKET    Where to listen: a path where nothing is yet
                           [default: /run/firecracker.socket]
      --config-file FILE   Start the microVM that this JSON file describes at once
      --no-api             Serve no API; needs --config-file
      --enable-pci         Devices on a PCI bus instead of behind virtio-mmio
      --events PATH        Write what happens to the guest there, a JSON object a line: a file, a FIFO, or
                           `fd:N`, an inherited descriptor
      --id ID              The microVM's name: 1 to 64 letters, digits and hyphens
                           [default: anonymous-instance]
      --http-api-max-payload-size BYTES
                           The largest request body [default: 51200]
      --no-seccomp, --seccomp-filter FILE, --start-time-us N, --start-time-cpu-us N,
      --parent-cpu-time-us N, --mmds-size-limit N
                           Accepted, without effect yet
  -h, --help               Print this

The exit code is 0 when the guest powered off or reset, else as `alula run` returns it; 1 on errors, 153
for wrong arguments.

Example:
  alula serve --api-sock /tmp/alula.sock &
  curl --unix-socket /tmp/alula.sock http://localhost/
";

/// What the user wants.
#[derive(Debug)]
pub enum Command {
    Run(Run),
    Serve(Serve),
    Firmware,
    /// Print this text.
    Print(String),
}

/// `alula run`.
#[derive(Debug)]
pub struct Run {
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    pub cmdline: Option<String>,
    pub cpus: Option<u16>,
    pub memory_mib: Option<u64>,
    /// Those that the options of `KINDS` add.
    pub devices: Vec<Device>,
    pub enable_pci: bool,
    pub config: Option<PathBuf>,
    pub api_sock: Option<PathBuf>,
    pub events: Option<PathBuf>,
    pub id: String,
}

/// `alula serve`.
#[derive(Debug)]
pub struct Serve {
    pub api_sock: PathBuf,
    pub config_file: Option<PathBuf>,
    pub no_api: bool,
    pub enable_pci: bool,
    pub events: Option<PathBuf>,
    pub id: String,
    pub http_api_max_payload_size: usize,
    /// No microVM may have more CPUs.
    pub vcpus_max: Option<u16>,
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
        Persona::Firecracker => SERVE_HELP
            .replace("Usage: alula serve", "Usage: firecracker")
            .replace("alula serve", "firecracker"),
        _ => "Only --version is implemented yet.\n".to_owned(),
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
            serve(&mut lexopt::Parser::from_args(arguments), persona)
                .map_err(|error| format!("{error}; see `firecracker --help`"))
        }
        _ => Err("only --version is implemented yet under this name: what this program does comes later"
            .to_owned()),
    }
}

fn alula(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    let mut parser = lexopt::Parser::from_args(arguments);
    let command = match parser.next().map_err(|error| error.to_string())? {
        Some(Value(command)) => command,
        Some(Short('h') | Long("help")) => return Ok(Command::Print(HELP.to_owned())),
        Some(Short('V') | Long("version")) => {
            return Ok(Command::Print(Persona::Alula.version()));
        }
        Some(other) => {
            return Err(format!("{}: a command comes first; see `alula --help`", other.unexpected()));
        }
        None => return Err("a command is missing: run, serve or firmware; see `alula --help`".to_owned()),
    };
    let (parsed, name) = match command.to_str() {
        Some("run") => (run(&mut parser), "run"),
        Some("serve") => (serve(&mut parser, Persona::Alula), "serve"),
        Some("firmware") => match parser.next() {
            Ok(None) => return Ok(Command::Firmware),
            _ => return Err("`alula firmware` takes no arguments".to_owned()),
        },
        _ => {
            return Err(format!(
                "there is no command {command:?}: run, serve or firmware; see `alula --help`"
            ));
        }
    };
    parsed.map_err(|error| format!("{error}; see `alula {name} --help`"))
}

fn run(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let mut run = Run {
        kernel: None,
        initrd: None,
        cmdline: None,
        cpus: None,
        memory_mib: None,
        devices: Vec::new(),
        enable_pci: false,
        config: None,
        api_sock: None,
        events: None,
        id: default_id(),
    };
    while let Some(argument) = parser.next()? {
        match argument {
            Long("initrd") => run.initrd = Some(parser.value()?.into()),
            Long("cmdline") => run.cmdline = Some(parser.value()?.string()?),
            Long("cpus") => run.cpus = Some(value(parser, "--cpus", number)?),
            Long("memory") => run.memory_mib = Some(value(parser, "--memory", mebibytes)?),
            Long("enable-pci") => run.enable_pci = true,
            Long("config") => run.config = Some(parser.value()?.into()),
            Long("api-sock") => run.api_sock = Some(parser.value()?.into()),
            Long("events") => run.events = Some(parser.value()?.into()),
            Long("id") => run.id = value(parser, "--id", id)?,
            Short('h') | Long("help") => return Ok(Command::Print(run_help())),
            Long(name) if let Some(kind) = KINDS.iter().find(|kind| kind.option.name == name) => {
                let device = device(parser, kind, &run.devices)?;
                run.devices.push(device);
            }
            Value(kernel) if run.kernel.is_none() => run.kernel = Some(kernel.into()),
            other => return Err(other.unexpected()),
        }
    }
    if run.initrd.is_some() && run.kernel.is_none() {
        return Err("--initrd needs a kernel".into());
    }
    Ok(Command::Run(run))
}

/// The device that an option of the table adds to those before it.
fn device(parser: &mut lexopt::Parser, kind: &Kind, before: &[Device]) -> Result<Device, lexopt::Error> {
    let number = before.iter().filter(|device| device.kind() == kind).count();
    match kind.option.value {
        "" => Ok(kind.from_option("", number)?),
        _ => value(parser, &format!("--{}", kind.option.name), |text| kind.from_option(text, number)),
    }
}

fn run_help() -> String {
    /// Where descriptions begin.
    const COLUMN: usize = 25;
    let mut help = RUN_HELP_BEFORE_DEVICES.to_owned();
    for CliOption { name, value, help: description } in KINDS.iter().map(|kind| kind.option) {
        let option = format!("      --{name} {value}");
        let first =
            if option.trim_end().len() < COLUMN - 1 { format!("{option:COLUMN$}") } else { option + "\n" };
        help += &first;
        for (number, line) in description.lines().enumerate() {
            let indent = if number == 0 && !first.ends_with('\n') { 0 } else { COLUMN };
            help += &format!("{:indent$}{line}\n", "");
        }
    }
    help + RUN_HELP_AFTER_DEVICES
}

fn serve(parser: &mut lexopt::Parser, persona: Persona) -> Result<Command, lexopt::Error> {
    let mut serve = Serve {
        api_sock: "/run/firecracker.socket".into(),
        config_file: None,
        no_api: false,
        enable_pci: false,
        events: None,
        id: default_id(),
        http_api_max_payload_size: BODY_MAX,
        vcpus_max: (persona == Persona::Firecracker).then_some(MachineConfig::FIRECRACKERS_VCPUS_MAX),
    };
    let (mut custom_filter, mut no_seccomp) = (false, false);
    while let Some(argument) = parser.next()? {
        match argument {
            Long("api-sock") => serve.api_sock = parser.value()?.into(),
            Long("config-file") => serve.config_file = Some(parser.value()?.into()),
            Long("no-api") => serve.no_api = true,
            Long("enable-pci") => serve.enable_pci = true,
            Long("events") => serve.events = Some(parser.value()?.into()),
            Long("id") => serve.id = value(parser, "--id", id)?,
            Long("http-api-max-payload-size") => {
                serve.http_api_max_payload_size = value(parser, "--http-api-max-payload-size", number)?;
            }
            Short('h') | Long("help") => return Ok(Command::Print(SERVE_HELP.to_owned())),
            // What a jailer says of itself, and sizes of what is not there yet: numbers nobody needs.
            Long("start-time-us") => drop(value(parser, "--start-time-us", number::<u64>)?),
            Long("start-time-cpu-us") => drop(value(parser, "--start-time-cpu-us", number::<u64>)?),
            Long("parent-cpu-time-us") => drop(value(parser, "--parent-cpu-time-us", number::<u64>)?),
            Long("mmds-size-limit") => drop(value(parser, "--mmds-size-limit", number::<u64>)?),
            Long("no-seccomp") => no_seccomp = true,
            Long("seccomp-filter") => {
                parser.value()?;
                custom_filter = true;
            }
            Long(
                name @ ("metadata" | "log-path" | "level" | "module" | "show-level" | "show-log-origin"
                | "metrics-path" | "boot-timer" | "snapshot-version" | "describe-snapshot"),
            ) => return Err(format!("--{name} is not implemented yet: leave it out").into()),
            other => return Err(other.unexpected()),
        }
    }
    if no_seccomp && custom_filter {
        return Err("--no-seccomp and --seccomp-filter cannot both be given".into());
    }
    if custom_filter {
        log::line("--seccomp-filter has no effect: no filter is set up yet");
    }
    if serve.no_api && serve.config_file.is_none() {
        return Err("--no-api needs --config-file".into());
    }
    Ok(Command::Serve(serve))
}

/// The value of `option`, by `parse`, whose error says what was expected.
fn value<T>(
    parser: &mut lexopt::Parser,
    option: &str,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<T, lexopt::Error> {
    let text = parser.value()?.string()?;
    parse(&text).map_err(|expected| format!("{option} {text}: {expected}").into())
}

impl Run {
    /// What the config file says, and on top of it what the options say.
    pub fn config(&self) -> Result<Config> {
        let mut config = match &self.config {
            Some(path) => Config::from_file(path)?,
            None => Config::default(),
        };
        if let Some(kernel) = &self.kernel {
            config.boot_source = Some(BootSource {
                kernel_image_path: kernel.clone(),
                initrd_path: self.initrd.clone(),
                boot_args: None,
            });
        }
        match &mut config.boot_source {
            Some(source) if self.cmdline.is_some() => source.boot_args = self.cmdline.clone(),
            // Who runs a guest in a terminal wants to hear of it.
            Some(source) => {
                source.boot_args.get_or_insert_with(|| arch::DEFAULT_COMMAND_LINE.to_owned());
            }
            None => config.firmware_words = self.cmdline.clone(),
        }
        for device in &self.devices {
            config.put(device.clone())?;
        }
        config.pci = self.enable_pci;
        let machine = &mut config.machine_config;
        machine.vcpu_count = self.cpus.unwrap_or(machine.vcpu_count);
        machine.mem_size_mib = self.memory_mib.unwrap_or(machine.mem_size_mib);
        config.check()?;
        Ok(config)
    }
}

impl Serve {
    /// What the config file says, if there is one.
    pub fn config(&self) -> Result<Option<Config>> {
        let Some(path) = &self.config_file else { return Ok(None) };
        let mut config = Config::from_file(path)?;
        config.vcpus_max = self.vcpus_max;
        config.check().with_context(|| format!("read config file `{}`", path.display()))?;
        match config.boot_source {
            Some(_) => Ok(Some(config)),
            None => Err(Error::config(format!(
                "read config file `{}`: `boot-source` is missing: it names the kernel to boot on {}",
                path.display(),
                arch::NAME
            ))),
        }
    }
}

fn default_id() -> String {
    "anonymous-instance".to_owned()
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error| format!("expected a number: {error}"))
}

/// A size in MiB: `256M`, `2G`, `256`.
fn mebibytes(text: &str) -> Result<u64, String> {
    let expected = || "expected a size like 256M or 2G".to_owned();
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let number: u64 = digits.parse().map_err(|_| expected())?;
    let factor = match unit.trim_end_matches("iB").trim_end_matches('B') {
        "" | "M" | "m" => 1,
        "G" | "g" => 1024,
        "T" | "t" => 1 << 20,
        _ => return Err(expected()),
    };
    number.checked_mul(factor).ok_or_else(|| "it does not fit 64 bits".to_owned())
}

fn id(text: &str) -> Result<String, String> {
    let fits = (1..=ID_MAX).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    fits.then(|| text.to_owned()).ok_or_else(|| format!("expected 1 to {ID_MAX} letters, digits and hyphens"))
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!((serve.id.as_str(), serve.api_sock, serve.vcpus_max), ("a-b", "/s".into(), Some(32)));
        assert!(serve.no_api && serve.enable_pci && serve.http_api_max_payload_size == 9);
        let Ok(Command::Serve(serve)) = firecracker("") else { panic!("not a service") };
        assert_eq!(serve.api_sock, PathBuf::from("/run/firecracker.socket"));
        for (line, expected) in [
            ("--api-sock /s --version --nonsense", "Firecracker v1.17.0\n\n"),
            ("--help", "Firecracker v1.17.0\n\nWait for requests"),
        ] {
            let Ok(Command::Print(text)) = firecracker(line) else { panic!("{line}") };
            assert!(text.starts_with(expected), "{text}");
        }
        for (line, expected) in [
            ("run", "unexpected argument \"run\"; see `firecracker --help`"),
            ("--start-time-us soon", "--start-time-us soon: expected a number"),
            ("--metadata m", "--metadata is not implemented yet"),
            ("--no-seccomp --seccomp-filter f", "cannot both be given"),
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
            ("run --cpu 1", "invalid option '--cpu'; see `alula run --help`"),
            ("run --cpus", "missing argument for option '--cpus'"),
            ("run --cpus 70000", "--cpus 70000: expected a number: number too large"),
            ("run --memory much", "--memory much: expected a size like 256M or 2G"),
            ("run --initrd i", "--initrd needs a kernel"),
            ("serve --no-api", "--no-api needs --config-file"),
            ("firmware x", "takes no arguments"),
        ] {
            let error = parsed(line).expect_err(line);
            assert!(error.contains(expected), "{line}: {error}");
        }
    }

    #[test]
    fn sizes_are_mebibytes_unless_they_say_otherwise() {
        for (text, expected) in [("256M", 256), ("2G", 2048), ("64", 64), ("1GiB", 1024), ("0", 0)] {
            assert_eq!(mebibytes(text), Ok(expected));
        }
        for text in ["", "M", "-1", "1.5G", "12K", "1MM", "99999999999999999999", "99999999999999999G"] {
            assert!(mebibytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_are_letters_digits_and_hyphens() {
        assert!(id("a-1").is_ok());
        for text in ["", "a_b", "a/b", &"x".repeat(65)] {
            assert!(id(text).is_err(), "{text}");
        }
    }
}
