//! A microVM that goes on from files that one was saved to.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};

use vm_memory::GuestAddressSpace;

use super::counts::LATENCIES;
use super::drives::{self, Drive};
use super::handler::Handler;
use super::saving::Taken;
use super::working_set::{self, Origin};
use super::{Microvm, note, signals};
use crate::carry::line::Place;
use crate::carry::stored::{self, Location, Stored, Sums};
use crate::carry::working_set::WorkingSet;
use crate::config::{Config, HugePages};
use crate::descriptors::Named;
use crate::devices::block::Overlay;
use crate::devices::kind::ConfiguredDevice;
use crate::error::{Context, Error, Result};
use crate::history::{self, Event};
use crate::host::file;
use crate::host::socket_file::OwnFolder;
use crate::log;
use crate::machine::{Cpus, Machine, OpenKvm};
use crate::memory::faults::Faults;
use crate::memory::{Piece, Source, lost};
use crate::metadata::Service;
use crate::sys::program;

/// A snapshot that was read and checked, with all that can be done of a restore before it is asked for.
pub struct Opened {
    stored: Stored,
    pieces: Vec<Piece>,
    memory: Given,
    /// The paths of the state and of the memory.
    paths: [PathBuf; 2],
    /// The two files themselves, by what each of them is, whatever is put in their place later.
    files: Vec<(&'static str, (u64, u64))>,
    /// The folder that both are in, if it is one of ours, and what was noted there of what the guest needs first.
    origin: Option<Origin>,
    working_set: Option<WorkingSet>,
    /// The snapshot was saved on this host, since the host's last boot.
    is_of_this_boot: bool,
    kvm: Option<OpenKvm>,
}

impl Opened {
    /// Reads the state at `location`, and opens the memory, which a page-fault handler gives if it `is_served`.
    ///
    /// # Errors
    /// The state or the memory is not there, or not right; or they are those of a difference.
    pub fn open(location: &Location, is_served: bool) -> Result<Self> {
        let (stored, memory) = if is_served {
            (location.read()?, Given::Faults(Faults::open()?))
        } else {
            let (stored, file) = location.open(false)?;
            (stored, Given::File(file))
        };
        if matches!((location, &stored.sums), (Location::Folder(_), Sums::Diff(_))) {
            return Err(Error::config(format!(
                "`{}` is the state of a difference, which has only the memory that was written since the snapshot before it: \
                 merge it into that (`alula snapshot merge`)",
                location.state().display()
            )));
        }
        let paths = [location.state(), location.memory(&stored.memory)?];
        let state = std::fs::metadata(&paths[0]).context("look at the state")?;
        let mut files = vec![("state", (state.dev(), state.ino()))];
        if let Given::File(file) = &memory {
            files.push(("memory", file::identity(file)?));
        }
        let is_of_this_boot = stored::boot_id() == Some(stored.origin.boot_id);
        let origin = Origin::of(location, &stored).filter(|_| !is_served);
        let working_set = origin.as_ref().and_then(|origin| origin.working_set(stored.memory.size));
        let pieces = stored.pieces();
        Ok(Self { pieces, stored, memory, paths, files, origin, working_set, is_of_this_boot, kvm: None })
    }

    /// Opens KVM, too.
    ///
    /// # Errors
    /// This host has no KVM, or this user may not use it.
    pub fn with_kvm(self) -> Result<Self> {
        Ok(Self { kvm: Some(OpenKvm::new()?), ..self })
    }
}

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
    /// Of which size the pages of its memory are; None: as before, if where they come from has such.
    pub huge_pages: Option<HugePages>,
    /// The TAP interfaces of network interfaces, by the ids of these.
    pub interfaces: Vec<(String, String)>,
    /// The path of its vsock socket.
    pub vsock: Option<PathBuf>,
    /// The disks that are to be others than those that were saved.
    pub drives: Vec<Drive>,
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
            drives: Vec::new(),
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
        let pages = &mut config.machine_config.huge_pages;
        match self.huge_pages {
            Some(huge_pages) => *pages = huge_pages,
            None if *pages == HugePages::Huge2M && !self.is_served => {
                // The request leaves the size of the pages open, and the guest does not see it.
                log::line(format_args!(
                    "the saved guest had huge pages of 2 MiB, and its memory's file is not mapped in them: it has \
                     pages of the host's size (a page-fault handler would give huge ones)"
                ));
                *pages = HugePages::None;
            }
            None => {}
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
    change_device(config, section, id, |told| {
        told[field] = value;
        Ok(())
    })
}

/// Has `change` change what a configuration file would say of the device of a section, of the one called `id` if there
/// can be several.
pub(super) fn change_device<T>(
    config: &mut Config,
    section: &str,
    id: Option<&str>,
    change: impl FnOnce(&mut Value) -> Result<T>,
) -> Result<T> {
    let is_it = |device: &&ConfiguredDevice| {
        device.kind().section == section && id.is_none_or(|id| device.id() == id)
    };
    let device = config.devices().find(is_it);
    let device = device.ok_or_else(|| Error::config("the saved machine has no such device"))?;
    let mut told = serde_json::to_value(device).context("write the device's configuration")?;
    let made = change(&mut told)?;
    let changed = device.kind().parse(told.to_string().as_bytes());
    let changed = changed.map_err(|error| Error::config(error.to_string()))?;
    changed.check()?;
    config.put(changed).map(|()| made)
}

impl Microvm {
    /// Makes this microVM, which has no machine yet, the one that was saved.
    ///
    /// # Errors
    /// The snapshot, or what it needs of the host, is not there or not right. This microVM is as it was before.
    pub fn load_snapshot(&mut self, load: &Load, reason: &'static str) -> Result<()> {
        self.load_from(|| Opened::open(&load.location, load.is_served), load, reason)
    }

    /// Does what [`Self::load_snapshot`] does, with a snapshot that `open` gives.
    pub fn load_from(
        &mut self,
        open: impl FnOnce() -> Result<Opened>,
        load: &Load,
        reason: &'static str,
    ) -> Result<()> {
        let begun = Instant::now();
        if self.machine.is_some() {
            return Err(Error::config("the microVM has started already"));
        }
        if self.config.says_what_boots() {
            let message = "Loading a microVM snapshot not allowed after configuring boot-specific resources.";
            return Err(Error::config(message));
        }
        let loaded = open().and_then(|opened| self.build_saved(opened, load, reason));
        self.host.end_restore();
        let Restored { machine, config, handler, place, origin, own_folder } = loaded.inspect_err(|_| {
            lost::forget();
            self.host.serve_metadata(None);
            self.host.forget_origin();
            self.prepare_again();
        })?;
        self.host.release_all();
        (self.machine, self.config, self.ahead) = (Some(machine), config, None);
        (self.handler, self.taken, self.origin) = (handler, Taken::from(place), origin);
        self.own_folder = own_folder;
        note(begun, [&LATENCIES.load_snapshot, &LATENCIES.vmm_load_snapshot]);
        self.write_metrics();
        // Reading a state is the deepest that `main` ever gets, and takes the most of its heap: each clone would keep some
        // 32 KiB for that.
        program::give_back_unused();
        Ok(())
    }

    /// Builds a machine that goes on where the saved one stood.
    fn build_saved(&mut self, opened: Opened, load: &Load, reason: &'static str) -> Result<Restored> {
        let Opened { stored, pieces, memory, paths, files, origin, working_set, is_of_this_boot, kvm } =
            opened;
        self.host.begin_restore(files);
        if let (Given::File(file), Some(set)) = (&memory, working_set) {
            working_set::read_ahead(set, file, stored.memory.size);
        }
        let place = stored.line.map(|line| line.place);
        let mut saved = stored.machine;
        if load.follows_time_of_day {
            saved.follow_time_of_day().context("`clock_realtime`")?;
        }
        let mut config = load.config(&saved.config, &self.config)?;
        // A path that the request gives is where the socket is to be, whatever it looks like.
        let own_folder = if load.vsock.is_none() { give_own_folder(&mut config)? } else { None };
        let overlays = drives::replace(&mut config, &load.drives, &mut self.host)?;
        saved.config.clone_from(&config);
        let prepare = || kvm.map_or_else(OpenKvm::new, Ok)?.prepare();
        let base = self.take_base(Cpus::of(&config)?, config.machine_config.mem_size_mib, prepare)?;
        let service = config.mmds_config.clone();
        self.host.serve_metadata(service.map(|config| Service { config, store: self.metadata.clone() }));
        let source = memory.source(&pieces);
        let (places, plugged) = (&saved.places, saved.plugged());
        let built = Machine::build_from(source, places, plugged, &self.id, &config, &mut self.host, base);
        let mut machine = built.map_err(|error| with_way_out(error, &config, load))?;
        lost::watch(&machine.memory().memory(), &paths[1]);
        signals::watch_memory();
        let handler = match memory {
            Given::File(_) => None,
            Given::Faults(faults) => Some(Handler::call(&paths[1], faults, machine.memory())?),
        };
        if !is_of_this_boot {
            machine.check_host(&saved)?;
        }
        let restored = machine.restore(&saved);
        // If pages have not come, how the restore ended says nothing: the handler's fault is told first.
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
        overlays.into_iter().for_each(Overlay::keep);
        Ok(Restored { machine, config, handler, place, origin, own_folder })
    }
}

/// The error of a machine that could not be built, with what gives the device that failed another place; or, of a device
/// that was given another one already, by which field that was.
fn with_way_out(error: Error, config: &Config, load: &Load) -> Error {
    let has_failed = |device: &&ConfiguredDevice| error.message() == format!("set up {}", device.name());
    let Some(device) = config.devices().find(has_failed) else { return error };
    let id = device.id();
    let (field, is_given, way) = match device.kind().section {
        "drives" => (
            format!("`drive_overrides` of `{id}`"),
            load.drives.iter().any(|drive| drive.id == id),
            format!(
                "`drive_overrides` (`alula run --restore` and `alula clone`: --drive {id}=PATH, or --overlay {id}=PATH for an \
                 image over it) gives the disk another path"
            ),
        ),
        "network-interfaces" => (
            format!("`network_overrides` of `{id}`"),
            load.interfaces.iter().any(|(interface, _)| interface == id),
            // An interface of passt is on no TAP interface.
            match serde_json::to_value(device).is_ok_and(|told| told["user"].is_object()) {
                true => "a restore gives it no other ports: free those that it publishes".to_owned(),
                false => format!(
                    "`network_overrides` (`/snapshot/load`, and `alula clone`: --tap {id}=NAME) gives it another TAP \
                     interface"
                ),
            },
        ),
        "vsock" => (
            "`vsock_override`".to_owned(),
            load.vsock.is_some(),
            "`vsock_override` (`alula run --restore` and `alula clone`: --vsock PATH) gives it another socket"
                .to_owned(),
        ),
        _ => return error,
    };
    match is_given {
        true => Error::new(error.kind(), format!("{field}: {error}")),
        false => Error::new(error.kind(), format!("{error}: the guest was saved with that; {way}")),
    }
}

/// Has a vsock socket that was in a folder of the saved process's own be in one of this process: the folder of the other
/// process went with it, or is that of another guest.
fn give_own_folder(config: &mut Config) -> Result<Option<OwnFolder>> {
    let Some(vsock) = config.devices().find(|device| device.kind().section == "vsock") else {
        return Ok(None);
    };
    let told = serde_json::to_value(vsock).context("read the vsock device's path")?;
    let path = PathBuf::from(told["uds_path"].as_str().unwrap_or_default());
    if !OwnFolder::is_of(&path) {
        return Ok(None);
    }
    let base = path.ancestors().nth(2).unwrap_or(Path::new("/"));
    let made = OwnFolder::make(base).or_else(|_| OwnFolder::make(&std::env::temp_dir()));
    let folder =
        made.with_context(|| format!("make a folder in `{}` for the vsock socket", base.display()))?;
    change(config, "vsock", None, "uds_path", json!(folder.socket()))?;
    Ok(Some(folder))
}

/// A machine that was restored.
struct Restored {
    machine: Box<Machine>,
    config: Config,
    /// The page-fault handler that gives the machine's pages, if no file does. Dropped after the machine.
    handler: Option<Handler>,
    /// The place of the snapshot that the machine was restored from, if its state says so.
    place: Option<Place>,
    /// The folder of that snapshot, if it is one of ours.
    origin: Option<Origin>,
    /// The folder that was made for its vsock socket.
    own_folder: Option<OwnFolder>,
}

/// The source of a saved machine's memory.
enum Given {
    /// The file of the memory.
    File(Named<File>),
    /// A page-fault handler, which serves these faults.
    Faults(Faults),
}

impl Given {
    fn source<'g>(&'g self, pieces: &'g [Piece]) -> Source<'g> {
        match self {
            Self::File(file) => Source::Private { file, pieces },
            Self::Faults(faults) => Source::Served(faults),
        }
    }
}
