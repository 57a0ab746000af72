//! A microVM that is saved to files, and one that goes on from them.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Value, json};
use vm_memory::GuestAddressSpace;

use super::counts::LATENCIES;
use super::{Finish, Microvm, note};
use crate::carry::folder::Draft;
use crate::carry::memory_file::{self, Pagemap};
use crate::carry::stored::{self, Location, MemoryFile};
use crate::config::{Config, HugePages};
use crate::devices::kind::ConfiguredDevice;
use crate::error::{Context, Error, Result};
use crate::history::{self, Event};
use crate::jobs::Ticket;
use crate::machine::{Machine, Prepared, RunState};
use crate::memory::{Memory, Source};
use crate::metadata::Service;

/// Who has a machine stand still while it is saved.
const REASON: &str = "snapshot";

/// A snapshot that is being written.
pub(super) struct Saving {
    /// The guest ran before, and is to go on when the snapshot is there.
    pub(super) resumes: bool,
}

/// What is to be restored, and what is to be other than it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Where the snapshot is.
    pub location: Location,
    /// The guest is to run at once.
    pub resumes: bool,
    /// What is written to its memory is to be noted.
    pub tracks_writes: bool,
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
            resumes: true,
            tracks_writes: false,
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
    /// Saves the machine to files at `location`. A guest that runs stands still meanwhile. A job writes, whose ticket is
    /// returned.
    ///
    /// # Errors
    /// The machine cannot be saved now, or nothing can be made there: then nothing was.
    pub fn create_snapshot(&mut self, location: &Location) -> Result<Ticket> {
        let begun = Instant::now();
        self.begin_snapshot(location, begun).inspect_err(|error| {
            history::tell(|| Event::SnapshotFailed { reason: history::text(error) });
        })
    }

    fn begin_snapshot(&mut self, location: &Location, begun: Instant) -> Result<Ticket> {
        self.check_not_saving()?;
        let machine = self.started()?;
        if machine.is_changing() {
            return Err(Error::config("a change of a device waits for what it has in flight: wait for that"));
        }
        let resumes = machine.state() == RunState::Running;
        if resumes && matches!(location, Location::Files { .. }) {
            // As in Firecracker, whose clients see to that themselves.
            return Err(Error::config("the microVM runs: pause it first (`PATCH /vm`)"));
        }
        // All that can be known to fail does so before the guest is disturbed.
        let (draft, pagemap, boot_id) = (location.begin()?, Pagemap::open()?, stored::boot_id()?);
        if resumes {
            self.pause(REASON)?;
        }
        let started = self.save_to(draft, pagemap, boot_id, begun);
        match &started {
            Ok(_) => self.saving = Some(Saving { resumes }),
            Err(_) if resumes => self.resume(REASON)?,
            Err(_) => {}
        }
        started
    }

    /// Takes the machine's state, and has a job write it, with the memory, to `draft`.
    fn save_to(
        &mut self,
        draft: Draft,
        pagemap: Pagemap,
        boot_id: [u8; 16],
        begun: Instant,
    ) -> Result<Ticket> {
        let machine = self.started()?;
        let saved = machine.save()?;
        let size = saved.memory().iter().map(|range| range.size).sum();
        let (saved, memory) = (saved.to_bytes()?, machine.memory().clone());
        let memory_file = MemoryFile { name: draft.memory_name(), size };
        self.start_job("snapshot", move || -> Finish {
            let written = write(draft, saved, &memory_file, &memory, &pagemap, boot_id);
            Box::new(move |microvm| microvm.end_snapshot(written, begun))
        })
    }

    /// The snapshot is there, with so many pages of memory, or could not be written.
    fn end_snapshot(&mut self, written: Result<u64>, begun: Instant) -> Result<Option<Value>> {
        let resumes = self.saving.take().is_some_and(|saving| saving.resumes);
        match &written {
            Ok(pages) => {
                note(begun, [&LATENCIES.full_create_snapshot, &LATENCIES.vmm_full_create_snapshot]);
                let (kind, pages, time_us) = ("Full", *pages, begun.elapsed().as_micros() as u64);
                history::tell(|| Event::SnapshotCreated { kind, pages, time_us });
            }
            Err(error) => history::tell(|| Event::SnapshotFailed { reason: history::text(error) }),
        }
        if resumes {
            self.resume(REASON)?;
        }
        written.map(|_| None)
    }

    /// While a snapshot is being written, nothing may change what it is of.
    pub(super) fn check_not_saving(&self) -> Result<()> {
        match self.saving {
            None => Ok(()),
            Some(_) => {
                Err(Error::config("a snapshot of the microVM is being written: wait until it is done"))
            }
        }
    }

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
        let (machine, config) = loaded.inspect_err(|_| self.host.serve_metadata(None))?;
        self.host.release_all();
        (self.machine, self.config) = (Some(machine), config);
        note(begun, [&LATENCIES.load_snapshot, &LATENCIES.vmm_load_snapshot]);
        self.write_metrics();
        Ok(())
    }

    /// A machine that goes on where the saved one stood, and its configuration.
    fn build_saved(&mut self, load: &Load, reason: &'static str) -> Result<(Machine, Config)> {
        let (stored, file) = load.location.open(false)?;
        let pieces = stored.pieces();
        let mut saved = stored.machine;
        let config = load.config(&saved.config, &self.config)?;
        saved.config.clone_from(&config);
        let prepared = match self.prepared.take() {
            Some(prepared) => prepared,
            None => Prepared::new()?,
        };
        let service = config.mmds_config.clone();
        self.host.serve_metadata(service.map(|config| Service { config, store: self.metadata.clone() }));
        let source = Source::Private { file: &file, pieces: &pieces };
        let mut machine =
            Machine::build_from(source, &saved.places, &self.id, &config, &mut self.host, prepared)?;
        machine.restore(&saved)?;
        if load.tracks_writes {
            machine.track_writes(true)?;
        }
        // Told first: what the guest does comes after it.
        history::tell(|| Event::Restored { reason });
        if load.resumes {
            machine.resume()?;
            history::tell(|| Event::Resumed { reason });
        }
        Ok((machine, config))
    }
}

/// Writes the memory and then the state, and makes both the snapshot that counts; returns how many pages of memory
/// were written.
fn write(
    draft: Draft,
    machine: Vec<u8>,
    memory_file: &MemoryFile,
    memory: &Memory,
    pagemap: &Pagemap,
    boot_id: [u8; 16],
) -> Result<u64> {
    let written = memory_file::write(&memory.memory(), pagemap, draft.memory_file());
    let written = written.context("write the memory of the guest")?;
    draft.keep(&stored::state(machine, memory_file, &written, boot_id)?)?;
    Ok(written.pages)
}
