//! A microVM that goes on from files that one was saved to.

use std::fs::File;
use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Value, json};

use vm_memory::GuestAddressSpace;

use super::counts::LATENCIES;
use super::handler::Handler;
use super::{Microvm, note, signals};
use crate::carry::stored::{self, Location, Stored, Sums};
use crate::config::{Config, HugePages};
use crate::descriptors::Named;
use crate::devices::kind::ConfiguredDevice;
use crate::error::{Context, Error, Result};
use crate::history::{self, Event};
use crate::machine::{Machine, Prepared};
use crate::memory::faults::Faults;
use crate::memory::{Piece, Source, lost};
use crate::metadata::Service;

/// What is to be restored, and what is to be other than it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Where the snapshot is.
    pub location: Location,
    /// The path of the memory is that of a socket, where a page-fault handler listens.
    pub is_served: bool,
    /// The guest is to run at once.
    pub resumes: bool,
    /// What is written to its memory is to be noted.
    pub tracks_writes: bool,
    /// The guest's clock is to be put forward by the time of day that has passed since it was saved.
    pub follows_time_of_day: bool,
    /// Of which size the pages of its memory are; None: as before.
    pub huge_pages: Option<HugePages>,
    /// The TAP interfaces of network interfaces, by the ids of these.
    pub interfaces: Vec<(String, String)>,
    /// The path of its vsock socket.
    pub vsock: Option<PathBuf>,
}

impl Load {
    /// The snapshot at `location`, as it was.
    pub fn new(location: Location) -> Self {
        Self {
            location,
            is_served: false,
            resumes: true,
            tracks_writes: false,
            follows_time_of_day: false,
            huge_pages: None,
            interfaces: Vec::new(),
            vsock: None,
        }
    }

    /// The configuration of the machine to be: as it was `saved`, but for what this says, and for what is the
    /// process's that it goes on in, `own`.
    fn config(&self, saved: &Config, own: &Config) -> Result<Config> {
        let mut config = saved.clone();
        config.logger.clone_from(&own.logger);
        config.metrics.clone_from(&own.metrics);
        config.serial.clone_from(&own.serial);
        config.dialect = own.dialect;
        config.machine_config.track_dirty_pages = self.tracks_writes;
        if let Some(huge_pages) = self.huge_pages {
            config.machine_config.huge_pages = huge_pages;
        }
        for (index, (id, tap)) in self.interfaces.iter().enumerate() {
            if self.interfaces[..index].iter().any(|(other, _)| other == id) {
                return Err(Error::config(format!("`network_overrides`: `{id}` is there twice")));
            }
            change(&mut config, "network-interfaces", Some(id), "host_dev_name", json!(tap))
                .with_context(|| format!("`network_overrides` of `{id}`"))?;
        }
        if let Some(path) = &self.vsock {
            change(&mut config, "vsock", None, "uds_path", json!(path)).context("`vsock_override`")?;
        }
        config.check()?;
        Ok(config)
    }
}

/// Makes `field` of the device of a section `value`, of the one called `id` if there can be several.
fn change(config: &mut Config, section: &str, id: Option<&str>, field: &str, value: Value) -> Result<()> {
    let is_it = |device: &&ConfiguredDevice| {
        device.kind().section == section && id.is_none_or(|id| device.id() == id)
    };
    let device = config.devices().find(is_it);
    let device = device.ok_or_else(|| Error::config("the saved machine has no such device"))?;
    let mut told = serde_json::to_value(device).context("write the device's configuration")?;
    told[field] = value;
    let changed = device.kind().parse(told.to_string().as_bytes());
    let changed = changed.map_err(|error| Error::config(error.to_string()))?;
    changed.check()?;
    config.put(changed)
}

impl Microvm {
    /// Makes this microVM, which has no machine yet, the one that was saved.
    ///
    /// # Errors
    /// The snapshot, or what it needs of the host, is not there or not right. This microVM is as it was before.
    pub fn load_snapshot(&mut self, load: &Load, reason: &'static str) -> Result<()> {
        let begun = Instant::now();
        if self.machine.is_some() {
            return Err(Error::config("the microVM has started already"));
        }
        if self.config.says_what_boots() {
            let message = "Loading a microVM snapshot not allowed after configuring boot-specific resources.";
            return Err(Error::config(message));
        }
        let loaded = self.build_saved(load, reason);
        let (machine, config, handler) = loaded.inspect_err(|_| {
            lost::forget();
            self.host.serve_metadata(None);
            self.prepare_again();
        })?;
        self.host.release_all();
        (self.machine, self.config, self.ahead) = (Some(machine), config, None);
        self.handler = handler;
        note(begun, [&LATENCIES.load_snapshot, &LATENCIES.vmm_load_snapshot]);
        self.write_metrics();
        Ok(())
    }

    /// A machine that goes on where the saved one stood, its configuration, and who gives its pages.
    fn build_saved(
        &mut self,
        load: &Load,
        reason: &'static str,
    ) -> Result<(Box<Machine>, Config, Option<Handler>)> {
        let (stored, given) = Given::open(load)?;
        if matches!((&load.location, &stored.sums), (Location::Folder(_), Sums::Diff(_))) {
            return Err(Error::config(
                "it has only the memory that was written since the snapshot before it: merge it into that \
                 (`alula snapshot merge`)",
            ));
        }
        let pieces = stored.pieces();
        let memory = load.location.memory(&stored.memory)?;
        let mut saved = stored.machine;
        if load.follows_time_of_day {
            saved.follow_time_of_day().context("`clock_realtime`")?;
        }
        let config = load.config(&saved.config, &self.config)?;
        saved.config.clone_from(&config);
        let base = self.take_base(&config.machine_config, Prepared::for_saved)?;
        let service = config.mmds_config.clone();
        self.host.serve_metadata(service.map(|config| Service { config, store: self.metadata.clone() }));
        let source = given.source(&pieces);
        let mut machine =
            Machine::build_from(source, &saved.places, &self.id, &config, &mut self.host, base)?;
        lost::watch(&machine.memory().memory(), &memory);
        signals::watch_memory();
        let handler = match given {
            Given::File(_) => None,
            Given::Faults(faults) => Some(Handler::call(&memory, faults, machine.memory())?),
        };
        if stored.origin.boot_id != stored::boot_id()? {
            machine.check_host(&saved)?;
        }
        let restored = machine.restore(&saved);
        // What was restored from pages that have not come says nothing.
        handler.iter().try_for_each(Handler::conclude)?;
        restored?;
        if load.tracks_writes {
            machine.track_writes(true)?;
        }
        // Told first: what the guest does comes after it.
        history::tell(|| Event::Restored { reason });
        if load.resumes {
            machine.resume()?;
            history::tell(|| Event::Resumed { reason });
        } else {
            machine.park()?;
        }
        Ok((machine, config, handler))
    }
}

/// What the memory of a saved machine is had from.
enum Given {
    /// Its file.
    File(Named<File>),
    /// A page-fault handler, by this.
    Faults(Faults),
}

impl Given {
    /// Reads the state, and opens the file of the memory.
    fn open(load: &Load) -> Result<(Stored, Self)> {
        if load.is_served {
            return Ok((load.location.read()?, Self::Faults(Faults::open()?)));
        }
        let (stored, file) = load.location.open(false)?;
        Ok((stored, Self::File(file)))
    }

    fn source<'g>(&'g self, pieces: &'g [Piece]) -> Source<'g> {
        match self {
            Self::File(file) => Source::Private { file, pieces },
            Self::Faults(faults) => Source::Served(faults),
        }
    }
}
