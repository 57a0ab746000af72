//! `alula serve`, which is the command line of Firecracker too: its options and its help.

use std::path::PathBuf;

use lexopt::Arg::{Long, Short};

use super::snapshot::Snapshot;
use super::{Command, Given, default_id, id, number, value};
use crate::api::BODY_MAX;
use crate::arch;
use crate::carry::stored;
use crate::cli::outputs::{self, OutputOptions};
use crate::cli::persona::Persona;
use crate::cli::walls;
use crate::config::Config;
use crate::dialect::Dialect;
use crate::error::{Context, Error, Result};
use crate::guest::runtime;
use crate::microvm::ahead::Warm;
use crate::microvm::counts::StartTime;
use crate::units::mebibytes;
use crate::walls::Wanted;

const HELP: &str = "\
Wait for requests on a control socket (Firecracker's API). The guest's serial console is standard input
and output; messages go to standard error.

Usage: alula serve [OPTIONS]

Options:
      --api-sock SOCKET    Where to listen: a path where nothing is yet
                           [default: the place of the guest's --id, or /run/firecracker.socket]
      --config-file FILE   Start the microVM that this JSON file describes at once
      --no-api             Serve no API; needs --config-file
      --enable-pci         Devices on a PCI bus instead of behind virtio-mmio
      --pcie-slots N       aarch64: with --enable-pci, so many PCIe slots (at most 15), in which devices
                           come and go while the guest runs without any help in the guest [default: 0]
      --id ID              The microVM's name: 1 to 64 letters, digits and hyphens. Without --api-sock,
                           `alula exec ID`, `alula ctl ID` and the like find it by the name, unless
                           this is called `firecracker` [default: anonymous-instance]
      --http-api-max-payload-size BYTES
                           The largest request body [default: 51200]
      --start-time-us N, --start-time-cpu-us N, --parent-cpu-time-us N
                           When the caller began to start this process, by the monotonic clock and by
                           CPU time, and its own CPU time: for `process_startup_time_us` in metrics
      --metadata FILE      The metadata that the guest can ask for: an object in this JSON file
      --mmds-size-limit BYTES
                           The most that it may be, as JSON [default: as the largest request body]
      --warm cpus=N,memory=SIZE
                           Make now what a guest of this size needs of KVM: started or restored later, it
                           runs sooner
      --snapshot-version   Print the version of the states of snapshots that this Alula writes and reads
      --describe-snapshot STATE
                           Print the version of this state of a snapshot
  -h, --help               Print this

The exit code is 0 when the guest powered off or reset, else as `alula run` returns it; 1 on errors, 153
for wrong arguments.

Examples:
  alula serve --api-sock /tmp/alula.sock &
  curl --unix-socket /tmp/alula.sock http://localhost/
";

/// Where the API is served if nothing says otherwise: as Firecracker does.
const DEFAULT_SOCKET: &str = "/run/firecracker.socket";
const EXPECTED_WARM: &str = "expected cpus=N,memory=SIZE, as in cpus=1,memory=128M";

/// The options that Firecracker does not have: called by its name, they are unknown ([`Dialect`]).
const OURS: [&str; 6] = ["pcie-slots", "warm", "events", "allow", "seccomp-log", "no-sandbox"];

/// The help, with the options of the outputs and of the walls, as far as they are this program's.
pub fn help(persona: Persona) -> String {
    let help = walls::with_help(&outputs::with_help(HELP));
    if persona != Persona::Firecracker {
        return help;
    }
    let mut is_ours = false;
    let is_theirs = |line: &&str| {
        let text = line.trim_start();
        // An option's description continues in lines with a deeper indent, which belong to the option above them.
        if text.starts_with('-') || line.len() - text.len() < 20 {
            is_ours = OURS
                .iter()
                .any(|option| text.strip_prefix("--").is_some_and(|rest| rest.starts_with(option)));
        }
        !is_ours
    };
    help.lines().filter(is_theirs).flat_map(|line| [line, "\n"]).collect()
}

/// `alula serve`.
#[derive(Debug)]
pub struct Serve {
    /// Where to listen; none: where [`Self::is_named`] says, or at [`DEFAULT_SOCKET`].
    pub api_sock: Option<PathBuf>,
    pub config_file: Option<PathBuf>,
    pub no_api: bool,
    pub enable_pci: bool,
    pub pcie_slots: u8,
    pub outputs: OutputOptions,
    pub walls: Wanted,
    pub id: String,
    /// The user has given the name, by which the guest is to be found.
    pub is_named: bool,
    pub http_api_max_payload_size: usize,
    pub metadata: Option<PathBuf>,
    pub mmds_size_limit: Option<usize>,
    /// For what size of guest all is made ahead.
    pub warm: Option<Warm>,
    /// Whose API is spoken.
    pub dialect: Dialect,
}

/// Parses what comes after `alula serve`, or `firecracker`.
pub fn parse(parser: &mut lexopt::Parser, persona: Persona) -> Result<Command, lexopt::Error> {
    let mut serve = Serve {
        api_sock: None,
        config_file: None,
        no_api: false,
        enable_pci: false,
        pcie_slots: 0,
        outputs: OutputOptions::of(persona),
        walls: Wanted::default(),
        id: default_id(),
        is_named: false,
        http_api_max_payload_size: BODY_MAX,
        metadata: None,
        mmds_size_limit: None,
        warm: None,
        dialect: if persona == Persona::Firecracker { Dialect::Firecracker } else { Dialect::Alula },
    };
    let mut start = StartTime::default();
    let mut given = Given::default();
    while let Some(argument) = parser.next()? {
        if !matches!(argument, Long("allow")) {
            given.once(&argument)?;
        }
        match argument {
            Long(name) if persona == Persona::Firecracker && OURS.contains(&name) => {
                return Err(argument.unexpected());
            }
            Long("api-sock") => serve.api_sock = Some(parser.value()?.into()),
            Long("config-file") => serve.config_file = Some(parser.value()?.into()),
            Long("no-api") => serve.no_api = true,
            Long("enable-pci") => serve.enable_pci = true,
            Long("pcie-slots") => serve.pcie_slots = value(parser, "--pcie-slots", number)?,
            Long("id") => {
                serve.id = value(parser, "--id", id)?;
                // Firecracker's socket is at the same place whatever the name is.
                serve.is_named = serve.dialect == Dialect::Alula;
            }
            Long("http-api-max-payload-size") => {
                serve.http_api_max_payload_size = value(parser, "--http-api-max-payload-size", number)?;
            }
            Short('h') | Long("help") => return Ok(Command::Print(help(persona))),
            // What a jailer says of itself, for the metrics.
            Long("start-time-us") => start.time_us = Some(value(parser, "--start-time-us", number)?),
            Long("start-time-cpu-us") => start.cpu_us = Some(value(parser, "--start-time-cpu-us", number)?),
            Long("parent-cpu-time-us") => start.parent_us = value(parser, "--parent-cpu-time-us", number)?,
            Long("metadata") => serve.metadata = Some(parser.value()?.into()),
            Long("mmds-size-limit") => {
                serve.mmds_size_limit = Some(value(parser, "--mmds-size-limit", number)?);
            }
            Long("warm") => serve.warm = Some(value(parser, "--warm", warm)?),
            Long(name) if let Some(name) = walls::named(name) => {
                walls::take(&mut serve.walls, name, parser)?;
            }
            Long(name) if let Some(name) = OutputOptions::named(name) => serve.outputs.take(name, parser)?,
            Long("snapshot-version") => return Ok(Command::Print(stored::version() + "\n")),
            Long("describe-snapshot") => {
                return Ok(Command::Snapshot(Snapshot::Version(parser.value()?.into())));
            }
            other => return Err(other.unexpected()),
        }
    }
    if serve.no_api && serve.config_file.is_none() {
        return Err("--no-api needs --config-file".into());
    }
    if serve.warm.is_some() && serve.config_file.is_some() {
        return Err("--warm is for a guest that comes later: leave it out, or --config-file".into());
    }
    start.note();
    Ok(Command::Serve(Box::new(serve)))
}

/// `cpus=2,memory=1G`, in either order.
fn warm(text: &str) -> Result<Warm, String> {
    let (mut cpus, mut memory) = (None, None);
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("cpus", count)) if cpus.is_none() => cpus = Some(number(count)?),
            Some(("memory", size)) if memory.is_none() => memory = Some(mebibytes(size)?),
            _ => return Err(EXPECTED_WARM.to_owned()),
        }
    }
    let warm = cpus.zip(memory).map(|(cpus, memory_mib)| Warm { cpus, memory_mib });
    warm.ok_or_else(|| EXPECTED_WARM.to_owned())
}

impl Serve {
    /// Where the API is served.
    pub fn socket(&self) -> Result<PathBuf> {
        match &self.api_sock {
            Some(path) => Ok(path.clone()),
            None if self.is_named => runtime::prepare(&self.id).with_context(|| {
                let id = &self.id;
                format!("serve guest `{id}` by its name (set XDG_RUNTIME_DIR, or give --api-sock)")
            }),
            None => Ok(DEFAULT_SOCKET.into()),
        }
    }

    /// What the config file says, if there is one.
    pub fn config(&self) -> Result<Option<Config>> {
        let Some(path) = &self.config_file else { return Ok(None) };
        let config = Config::from_file_as(self.dialect, path)?;
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
