//! `alula run`: its options, its help, and the configuration that comes of it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lexopt::Arg::{Long, Short, Value};
use lexopt::ValueExt;

use super::command::{self, Wanted};
use super::exec::time;
use super::template::pair;
use super::{Command, Given, default_id, id, number, value};
use crate::carry::stored::Location;
use crate::cli::outputs::{self, OutputOptions};
use crate::cli::walls;
use crate::config::{BootSource, Config, WatchdogAction};
use crate::devices::kind::{CliOption, ConfiguredDevice, DeviceKind};
use crate::devices::{KINDS, net};
use crate::error::{Context, Error, Result};
use crate::firmware;
use crate::log::Level;
use crate::metadata;
use crate::microvm::drives::Drive;
use crate::microvm::snapshots::Load;
use crate::units::mebibytes;

/// The section of the device that a restored guest can be given another socket for.
const VSOCK: &str = "vsock";

const RUN_HELP_BEFORE_DEVICES: &str = "\
Boot a guest, put its console on this terminal and return how it ended. Ctrl-A X leaves, Ctrl-A ?
lists the keys.

Usage: alula run [OPTIONS] [KERNEL]
       alula run [OPTIONS] [KERNEL] -- COMMAND [ARGS...]
       alula run --restore FOLDER [OPTIONS]

KERNEL is vmlinux or bzImage on x86_64, Image (or Image.gz, Image.zst) on aarch64. Without it, the
embedded firmware guest boots: a self-test of this host, which only reads disks and persistent memory.

With COMMAND, the guest is there for it: its standard input, output and error are connected, its exit code
is returned, and the guest is gone then.

Options:
      --initrd FILE      The initial ramdisk
      --cmdline TEXT     The kernel's command line [default: the serial console, and an end when it
                         panics]; for the firmware guest: what it is to do (docs/first-guest.md)
      --cpus N           How many CPUs [default: 1]
      --max-cpus N       How many it can have: `alula ctl ID cpus` gives it more, or fewer, while it runs
                         (on aarch64 if the host has Linux 6.4) [default: those of --cpus, for good]
      --memory SIZE      Memory with its unit, M or G (MiB, GiB); a bare number is MiB [default: 128M]
";

// Without a backslash at its beginning, which would take the indent away.
const RUN_HELP_AFTER_DEVICES: &str = "      --publish [ADDRESS:]HOST:GUEST[/udp]
                         For the first `--net user`: this port of this host leads to that port of the
                         guest. May be repeated
      --metadata FILE    The guest is told this when it asks 169.254.169.254 by HTTP: an object in a JSON
                         file; on all its network interfaces, unless a config file says which
      --enable-pci       Devices on a PCI bus instead of behind virtio-mmio
      --pcie-slots N     aarch64: with --enable-pci, so many PCIe slots (at most 15), in which devices come
                         and go while the guest runs without any help in the guest [default: 0]
      --watchdog ACTION  The guest has a watchdog, and when it expires this is done: reset (the guest boots
                         again), poweroff (it ends), none; an event tells of it in any case
      --config FILE      Read the configuration from this JSON file (Firecracker's format); other
                         options override it
      --restore FOLDER   Go on with the guest that `alula ctl snapshot FOLDER` has saved there. What it
                         is made of is as it was; --id, --api-sock, --metadata, another socket by --vsock,
                         and the options for those who watch it can be given
      --drive ID=PATH    With --restore: that disk's image is here now. May be repeated
      --overlay ID=PATH  With --restore: make an image for that disk here, over the one that it was saved
                         with, which stays as it is. May be repeated
      --record TIME      With --restore: note in FOLDER, so long after, what the guest has needed of its
                         memory; later restores have it read ahead where it is not in memory yet
      --self-test        Boot the firmware guest, whatever the file says of a kernel: it only reads what it
                         is given, unless `--cmdline case=block` or `case=pmem` has it write
      --api-sock SOCKET  Also serve the control API on this socket
      --id ID            The microVM's name: 1 to 64 letters, digits and hyphens. Without --api-sock, the
                         control API is served on $XDG_RUNTIME_DIR/alula/ID.sock (or /run/alula/ID.sock),
                         where `alula exec ID`, `cp`, `wait` and `ctl` find the guest
                         [default: anonymous-instance, which is not served]
  -q, --quiet            Say nothing but errors: neither how the guest ended nor which keys are for Alula
  -v, --verbose          Say what is being done, as `--level Info` does
  -h, --help             Print this

The exit code is the guest's own (docs/exit-codes.md): 0 powered off, N the code it wrote to the exit
register, 120 reset, 121 halted for good, 122 triple fault, 123 KVM could not go on running it, 124 its
watchdog expired; 125 it could not be started, 130 left by Ctrl-A X, 128 + S ended by signal S, 153 wrong
arguments. With COMMAND it is that of the command; 124 when its time was up, 125 when the guest ended before
it or could not be started, 126 when it cannot be executed, 127 when there is none, 128 + S when signal S
ended it.

Examples:
  # A self-test of this host
  alula run
  # A kernel, its console on this terminal
  alula run vmlinux --initrd initramfs.cpio --cpus 2 --memory 512M
  # A command in a root file system, an image or a folder
  alula run --rootfs debian.ext4 -- cat /etc/os-release
  # A static program of this machine, and nothing else
  alula run --copy target/debug/program -- \"$PWD/target/debug/program\"
  # A shell that may write to the image
  alula run --rootfs debian.ext4,rw -- sh
  # Input and output by pipes
  tar c src | alula run --rootfs build.ext4 --memory 1G -- tar x -C /tmp
  # Files into the guest, and out of it
  alula run --rootfs build.ext4 --copy src:/src --copy-out /src/report:report -- make -C /src
  # A user, a folder, a variable, and a limit of time
  alula run --rootfs debian.ext4 --user www-data --workdir /srv --env DEBUG=1 --timeout 5m -- ./test
  # A network without any right on this host, and a port of it
  alula run --rootfs web.ext4 --net user --publish 8080:80 -- httpd -f
  # A guest with a name, and then more commands, files and questions for it
  alula run --id web --rootfs web.ext4 -- httpd -f &
  alula wait web
  alula exec web -- ps
  alula cp web:/var/log/messages .
  alula ctl web guest
";

/// `alula run`.
#[derive(Debug, Default)]
pub struct Run {
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    pub cmdline: Option<String>,
    pub cpus: Option<u16>,
    pub max_cpus: Option<u16>,
    pub memory_mib: Option<u64>,
    /// Those that the options of `KINDS` add.
    pub devices: Vec<ConfiguredDevice>,
    pub metadata: Option<PathBuf>,
    pub enable_pci: bool,
    pub pcie_slots: u8,
    pub watchdog: Option<WatchdogAction>,
    pub config: Option<PathBuf>,
    pub self_test: bool,
    /// The folder of a saved microVM.
    pub restore: Option<PathBuf>,
    /// The disks of the saved microVM that are to be others.
    pub drives: Vec<Drive>,
    /// When it is noted what the restored guest needs first.
    pub record: Option<Duration>,
    pub api_sock: Option<PathBuf>,
    pub outputs: OutputOptions,
    pub walls: crate::walls::Wanted,
    pub id: String,
    /// The user has given that name.
    pub is_named: bool,
    /// A command for the guest, and what it finds.
    pub wanted: Wanted,
}

/// Parses what comes after `alula run`.
pub fn parse(parser: &mut lexopt::Parser) -> Result<Command, lexopt::Error> {
    let mut run = Run { id: default_id(), ..Run::default() };
    let (mut ports, mut given) = (Vec::new(), Given::default());
    while !run.wanted.take_command(parser)?
        && let Some(argument) = parser.next()?
    {
        if !matches!(argument, Long(name) if may_be_repeated(name)) {
            given.once(&argument)?;
        }
        match argument {
            Long("kernel") if run.kernel.is_none() => run.kernel = Some(parser.value()?.into()),
            Long(name) if let Some(name) = Wanted::named(name) => run.wanted.take(name, parser)?,
            Long("initrd") => run.initrd = Some(parser.value()?.into()),
            Long("cmdline") => run.cmdline = Some(parser.value()?.string()?),
            Long("cpus") => run.cpus = Some(value(parser, "--cpus", number)?),
            Long("max-cpus") => run.max_cpus = Some(value(parser, "--max-cpus", number)?),
            Long("memory") => run.memory_mib = Some(value(parser, "--memory", mebibytes)?),
            Long("metadata") => run.metadata = Some(parser.value()?.into()),
            Long("enable-pci") => run.enable_pci = true,
            Long("pcie-slots") => run.pcie_slots = value(parser, "--pcie-slots", number)?,
            Long("watchdog") => run.watchdog = Some(value(parser, "--watchdog", str::parse)?),
            Long("config") => run.config = Some(parser.value()?.into()),
            Long("restore") => run.restore = Some(parser.value()?.into()),
            Long("drive") => run.drives.push(drive(parser, "--drive")?),
            Long("overlay") => run.drives.push(drive(parser, "--overlay")?),
            Long("record") => run.record = Some(value(parser, "--record", time)?),
            Long("self-test") => run.self_test = true,
            Long("api-sock") => run.api_sock = Some(parser.value()?.into()),
            Long("id") => (run.id, run.is_named) = (value(parser, "--id", id)?, true),
            Short('q') | Long("quiet") => run.outputs.speak(Level::Error)?,
            Short('v') | Long("verbose") => run.outputs.speak(Level::Info)?,
            Short('h') | Long("help") => return Ok(Command::Print(run_help())),
            Long(name) if let Some(name) = walls::named(name) => {
                walls::take(&mut run.walls, name, parser)?;
            }
            Long(name) if let Some(name) = OutputOptions::named(name) => run.outputs.take(name, parser)?,
            Long(name) if let Some(kind) = KINDS.iter().find(|kind| kind.option.name == name) => {
                run.devices.push(device(parser, kind, &run.devices)?);
            }
            Long("publish") => ports.push(value(parser, "--publish", |text| text.parse())?),
            Value(kernel) if run.kernel.is_none() => run.kernel = Some(kernel.into()),
            Value(word) => return Err(misplaced(&word)),
            other => return Err(other.unexpected()),
        }
    }
    run.check(!ports.is_empty())?;
    net::publish(&mut run.devices, &ports)?;
    Ok(Command::Run(Box::new(run)))
}

fn misplaced(word: &OsStr) -> lexopt::Error {
    format!(
        "unexpected argument {word:?}: a kernel was named, and a command to run in the guest goes after `--`"
    )
    .into()
}

fn may_be_repeated(option: &str) -> bool {
    ["publish", "allow", "drive", "overlay"].contains(&option)
        || Wanted::may_be_repeated(option)
        || KINDS.iter().any(|kind| kind.many && kind.option.name == option)
}

/// The device that an option of the table adds to those before it.
fn device(
    parser: &mut lexopt::Parser,
    kind: &DeviceKind,
    before: &[ConfiguredDevice],
) -> Result<ConfiguredDevice, lexopt::Error> {
    let number = before.iter().filter(|device| device.kind() == kind).count();
    let device = match kind.option.value {
        "" => kind.from_option("", number)?,
        _ => value(parser, &format!("--{}", kind.option.name), |text| kind.from_option(text, number))?,
    };
    match before.iter().any(|other| device.replaces(other)) {
        true => Err(format!("--{}: two of them are the {}", kind.option.name, device.name()).into()),
        false => Ok(device),
    }
}

/// The disk of a saved guest that `--drive` or `--overlay` says is another one.
fn drive(parser: &mut lexopt::Parser, option: &str) -> Result<Drive, lexopt::Error> {
    let text = parser.value()?.string()?;
    let (id, path) = pair(&text).map_err(|expected| {
        format!("{option} {text}: {expected}, of a guest that is restored (is `--disk` meant?)")
    })?;
    Ok(Drive { id, path: path.into(), backing: None, is_overlay: option == "--overlay" })
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
    let help = walls::with_help(&outputs::with_help(&(help + RUN_HELP_AFTER_DEVICES)));
    help.replacen("\n\nThe exit code", &format!("\n{}\nThe exit code", command::HELP), 1)
}

impl Run {
    /// The guest is there for a command.
    pub fn has_command(&self) -> bool {
        !self.wanted.run.argv.is_empty()
    }

    /// Refuses what does not go together; `publishes`: --publish is there.
    fn check(&self, publishes: bool) -> Result<(), lexopt::Error> {
        if self.restore.is_some() {
            self.check_restore(publishes)?;
        } else if self.record.is_some() {
            return Err("--record is for a guest that is restored: give --restore, too".into());
        } else if !self.drives.is_empty() {
            return Err("--drive and --overlay are for a guest that is restored (is `--disk` meant?)".into());
        }
        self.wanted.check()?;
        if self.has_command() && (self.initrd.is_some() || self.self_test) {
            return Err(
                "a command needs a guest whose init is the agent: give no --initrd and no --self-test".into(),
            );
        }
        if self.initrd.is_some() && self.kernel.is_none() {
            return Err("--initrd needs a kernel".into());
        }
        if self.self_test && self.kernel.is_some() {
            return Err("--self-test boots the firmware guest: give no kernel beside it".into());
        }
        Ok(())
    }

    /// Refuses what a guest that was saved cannot be given any more.
    fn check_restore(&self, publishes: bool) -> Result<(), String> {
        let device = self.devices.iter().find(|device| device.kind().section != VSOCK);
        let device = device.map(|device| format!("--{}", device.kind().option.name));
        let given = [
            (self.kernel.is_some(), "KERNEL"),
            (self.initrd.is_some(), "--initrd"),
            (self.cmdline.is_some(), "--cmdline"),
            (self.cpus.is_some(), "--cpus"),
            (self.max_cpus.is_some(), "--max-cpus"),
            (self.memory_mib.is_some(), "--memory"),
            (device.is_some(), device.as_deref().unwrap_or_default()),
            (publishes, "--publish"),
            (self.enable_pci, "--enable-pci"),
            (self.pcie_slots > 0, "--pcie-slots"),
            (self.watchdog.is_some(), "--watchdog"),
            (self.config.is_some(), "--config"),
            (self.self_test, "--self-test"),
            (self.outputs.has_boot_timer(), "--boot-timer"),
            (self.has_command(), "COMMAND"),
        ];
        match given.iter().find(|(is_given, _)| *is_given) {
            None => Ok(()),
            Some((_, name)) => {
                Err(format!("--restore: the guest is what it was when it was saved: leave out {name}"))
            }
        }
    }

    /// Makes the request that loads the snapshot in `folder`, with the disks and the vsock socket that options give. A guest
    /// of which is noted what it needs does not run before that has begun.
    pub fn load(&self, folder: &Path) -> Result<Load> {
        let vsock = self.devices.iter().find(|device| device.kind().section == VSOCK);
        let told = vsock.map(serde_json::to_value).transpose().context("read --vsock")?;
        let vsock = told.and_then(|told| told["uds_path"].as_str().map(PathBuf::from));
        Ok(Load {
            resumes: self.record.is_none(),
            drives: self.drives.clone(),
            vsock,
            ..Load::new(Location::Folder(folder.to_owned()))
        })
    }

    /// What the config file says, and on top of it what the options say.
    pub fn config(&self) -> Result<Config> {
        if self.restore.is_some() {
            // What the guest is stands with what was saved.
            let mut config = Config::default();
            self.outputs.configure(&mut config);
            return Ok(config);
        }
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
        match (&config.boot_source, &self.config) {
            // A file says what a guest is: one without a kernel is misspelled, not a self-test.
            (None, Some(path)) if !self.self_test => {
                return Err(Error::config(format!(
                    "read config file `{}`: `boot-source` is missing: it names the kernel to boot (KERNEL here \
                     overrides it, --self-test boots the firmware guest)",
                    path.display()
                )));
            }
            _ if self.self_test => config.boot_source = None,
            _ => {}
        }
        match &mut config.boot_source {
            Some(source) if self.cmdline.is_some() => source.boot_args = self.cmdline.clone(),
            Some(_) => {}
            None => {
                firmware::check_words(self.cmdline.as_deref().unwrap_or_default())?;
                config.firmware_words = self.cmdline.clone();
            }
        }
        // The memory first: devices are checked against it.
        let machine = &mut config.machine_config;
        machine.vcpu_count = self.cpus.unwrap_or(machine.vcpu_count);
        machine.max_vcpus = self.max_cpus.or(machine.max_vcpus);
        machine.mem_size_mib = self.memory_mib.unwrap_or(machine.mem_size_mib);
        machine.watchdog = self.watchdog.or(machine.watchdog);
        for device in &self.devices {
            config.put(device.clone())?;
        }
        // Who runs a guest in a terminal wants to hear of it.
        let line = config.default_command_line();
        if let Some(source) = &mut config.boot_source {
            source.boot_args.get_or_insert_with(|| line.to_owned());
        }
        if self.metadata.is_some() && config.mmds_config.is_none() {
            let interfaces: Vec<_> = config.interfaces().map(str::to_owned).collect();
            if interfaces.is_empty() {
                return Err(Error::config(
                    "--metadata is told over a network interface, and there is none: add --net",
                ));
            }
            config.mmds_config = Some(metadata::Config::on(interfaces));
        }
        (config.pci, config.pcie_slots) = (self.enable_pci, self.pcie_slots);
        self.outputs.configure(&mut config);
        config.check()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    #[test]
    fn a_balloon_is_measured_against_the_memory_that_is_asked_for() {
        let parsed = |line: &str| {
            let words = std::iter::once("alula").chain(line.split_whitespace());
            match super::super::parse(words.map(OsString::from)).unwrap() {
                Command::Run(run) => run.config().map_err(|error| error.to_string()),
                other => panic!("{line}: {other:?}"),
            }
        };
        for line in ["run --memory 1G --balloon 512M", "run --balloon 512M --memory 1G"] {
            assert_eq!(parsed(line).unwrap().machine_config.mem_size_mib, 1024);
        }
        let error = parsed("run --balloon 512M").unwrap_err();
        assert!(error.contains("of a guest with 128 MiB"), "{error}");
    }
}
