//! What can be said on the command line, with its help, and the configuration that comes of it.

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::Arg::{Long, Short, Value};
use lexopt::ValueExt;

use crate::api::BODY_MAX;
use crate::arch;
use crate::config::{BootSource, Config};
use crate::devices::{block, entropy, net};
use crate::error::{Error, Result};

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

const RUN_HELP: &str = "\
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
      --disk PATH[,ro][,root][,id=ID]
                         A disk from a raw image or block device; `ro`: read-only, `root`: the guest
                         boots from it. Flushed data is on stable storage. May be repeated
      --net tap=NAME[,mac=MAC][,id=ID]
                         A network interface over a TAP interface of this host. May be repeated
      --entropy          A source of random bytes
      --enable-pci       Devices on a PCI bus instead of behind virtio-mmio
      --config FILE      Read the configuration from this JSON file (Firecracker's format); other
                         options override it
      --api-sock SOCKET  Also serve the control API on this socket
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
      --id ID              The microVM's name: 1 to 64 letters, digits and hyphens
                           [default: anonymous-instance]
      --http-api-max-payload-size BYTES
                           The largest request body [default: 51200]
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
    pub disks: Vec<block::Config>,
    pub interfaces: Vec<net::Config>,
    pub entropy: bool,
    pub enable_pci: bool,
    pub config: Option<PathBuf>,
    pub api_sock: Option<PathBuf>,
    pub id: String,
}

/// `alula serve`.
#[derive(Debug)]
pub struct Serve {
    pub api_sock: PathBuf,
    pub config_file: Option<PathBuf>,
    pub no_api: bool,
    pub enable_pci: bool,
    pub id: String,
    pub http_api_max_payload_size: usize,
}

/// Parses the arguments after the program's name; the error is one line for the user.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    let mut parser = lexopt::Parser::from_args(arguments);
    let command = match parser.next().map_err(|error| error.to_string())? {
        Some(Value(command)) => command,
        Some(Short('h') | Long("help")) => return Ok(Command::Print(HELP.to_owned())),
        Some(Short('V') | Long("version")) => {
            return Ok(Command::Print(concat!("alula ", env!("CARGO_PKG_VERSION"), "\n").to_owned()));
        }
        Some(other) => {
            return Err(format!("{}: a command comes first; see `alula --help`", other.unexpected()));
        }
        None => return Err("a command is missing: run, serve or firmware; see `alula --help`".to_owned()),
    };
    let (parsed, name) = match command.to_str() {
        Some("run") => (run(&mut parser), "run"),
        Some("serve") => (serve(&mut parser), "serve"),
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
        disks: Vec::new(),
        interfaces: Vec::new(),
        entropy: false,
        enable_pci: false,
        config: None,
        api_sock: None,
        id: default_id(),
    };
    while let Some(argument) = parser.next()? {
        match argument {
            Long("initrd") => run.initrd = Some(parser.value()?.into()),
            Long("cmdline") => run.cmdline = Some(parser.value()?.string()?),
            Long("cpus") => run.cpus = Some(value(parser, "--cpus", number)?),
            Long("memory") => run.memory_mib = Some(value(parser, "--memory", mebibytes)?),
            Long("disk") => {
                let number = run.disks.len();
                run.disks.push(value(parser, "--disk", |text| disk(text, number))?);
            }
            Long("net") => {
                let number = run.interfaces.len();
                run.interfaces.push(value(parser, "--net", |text| interface(text, number))?);
            }
            Long("entropy") => run.entropy = true,
            Long("enable-pci") => run.enable_pci = true,
            Long("config") => run.config = Some(parser.value()?.into()),
            Long("api-sock") => run.api_sock = Some(parser.value()?.into()),
            Long("id") => run.id = value(parser, "--id", id)?,
            Short('h') | Long("help") => return Ok(Command::Print(RUN_HELP.to_owned())),
            Value(kernel) if run.kernel.is_none() => run.kernel = Some(kernel.into()),
            other => return Err(other.unexpected()),
        }
    }
    if run.initrd.is_some() && run.kernel.is_none() {
        return Err("--initrd needs a kernel".into());
    }
    Ok(Command::Run(run))
}

fn serve(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let mut serve = Serve {
        api_sock: "/run/firecracker.socket".into(),
        config_file: None,
        no_api: false,
        enable_pci: false,
        id: default_id(),
        http_api_max_payload_size: BODY_MAX,
    };
    while let Some(argument) = parser.next()? {
        match argument {
            Long("api-sock") => serve.api_sock = parser.value()?.into(),
            Long("config-file") => serve.config_file = Some(parser.value()?.into()),
            Long("no-api") => serve.no_api = true,
            Long("enable-pci") => serve.enable_pci = true,
            Long("id") => serve.id = value(parser, "--id", id)?,
            Long("http-api-max-payload-size") => {
                serve.http_api_max_payload_size = value(parser, "--http-api-max-payload-size", number)?;
            }
            Short('h') | Long("help") => return Ok(Command::Print(SERVE_HELP.to_owned())),
            other => return Err(other.unexpected()),
        }
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
            Some(_) => {}
            None => config.firmware_words = self.cmdline.clone(),
        }
        for disk in &self.disks {
            config.put_drive(disk.clone())?;
        }
        for interface in &self.interfaces {
            config.put_network_interface(interface.clone())?;
        }
        config.pci = self.enable_pci;
        if self.entropy {
            config.entropy = Some(entropy::Config {});
        }
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
        let config = Config::from_file(path)?;
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

/// `PATH[,ro][,root][,id=ID]`
fn disk(text: &str, number: usize) -> Result<block::Config, String> {
    let mut parts = text.split(',');
    let mut disk = block::Config {
        drive_id: format!("disk{number}"),
        path_on_host: parts.next().filter(|path| !path.is_empty()).map(PathBuf::from),
        is_root_device: false,
        partuuid: None,
        is_read_only: false,
        cache_type: block::CacheType::Writeback,
        io_engine: block::IoEngine::Sync,
        rate_limiter: None,
        socket: None,
    };
    for part in parts {
        match part.split_once('=') {
            None if part == "ro" => disk.is_read_only = true,
            None if part == "root" => disk.is_root_device = true,
            Some(("id", id)) => disk.drive_id = id.to_owned(),
            _ => return Err(format!("`{part}` is unknown: expected PATH[,ro][,root][,id=ID]")),
        }
    }
    disk.check().map_err(|error| error.to_string())?;
    Ok(disk)
}

/// `tap=NAME[,mac=MAC][,id=ID]`
fn interface(text: &str, number: usize) -> Result<net::Config, String> {
    let mut interface = net::Config {
        iface_id: format!("net{number}"),
        host_dev_name: String::new(),
        guest_mac: None,
        mtu: None,
        rx_rate_limiter: None,
        tx_rate_limiter: None,
    };
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("tap", name)) => interface.host_dev_name = name.to_owned(),
            Some(("mac", mac)) => interface.guest_mac = Some(mac.parse()?),
            Some(("id", id)) => interface.iface_id = id.to_owned(),
            _ => return Err(format!("`{part}` is unknown: expected tap=NAME[,mac=MAC][,id=ID]")),
        }
    }
    if interface.host_dev_name.is_empty() {
        return Err("expected tap=NAME[,mac=MAC][,id=ID]".to_owned());
    }
    interface.check().map_err(|error| error.to_string())?;
    Ok(interface)
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
        parse(line.split_whitespace().map(OsString::from))
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
