//! The bodies of requests that save a microVM and restore one.

use std::path::PathBuf;
use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Serialize};

use super::template::Order;
use crate::carry::stored::Location;
use crate::config::{Config, HugePages};
use crate::devices::block::Backing;
use crate::devices::console;
use crate::dialect::Dialect;
use crate::error::Result;
use crate::guest::runtime;
use crate::log;
use crate::metrics;
use crate::microvm::drives::Drive;
use crate::microvm::saving::{Kind, Save};
use crate::microvm::snapshots::Load;

/// The fields of `PUT /snapshot/create` that Firecracker has.
pub const CREATE_PUBLISHED: &[&str] = &["snapshot_type", "snapshot_path", "mem_file_path"];
/// The fields of `PUT /snapshot/load` that Firecracker has.
pub const LOAD_PUBLISHED: &[&str] = &[
    "snapshot_path",
    "mem_file_path",
    "mem_backend",
    "enable_diff_snapshots",
    "track_dirty_pages",
    "resume_vm",
    "network_overrides",
    "vsock_override",
    "clock_realtime",
    "huge_pages",
];

/// Body of `PUT /snapshot/create`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "SnapshotCreateParams"))]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// The part of the memory that is saved.
    #[serde(default)]
    snapshot_type: SnapshotType,
    /// The file for the state of the machine. The microVM must be paused.
    snapshot_path: Option<PathBuf>,
    /// The file for its memory.
    mem_file_path: Option<PathBuf>,
    /// Ours, instead of the two paths: a folder for both. A microVM that runs stands still until they are
    /// written, and goes on.
    folder: Option<PathBuf>,
    /// Ours: a microVM that runs goes on while most of it is written, and stands still for a moment.
    #[serde(default)]
    live: bool,
    /// Ours, with `live`: one that writes to its memory faster than the disk takes it is slowed down meanwhile, and not
    /// given up.
    #[serde(default)]
    slow_down: bool,
}

/// The part of the memory that is saved.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
enum SnapshotType {
    /// All of it.
    #[default]
    Full,
    /// With `track_dirty_pages`: the pages written since the last snapshot. Without: those that are not as they were
    /// when the microVM was restored, or started.
    Diff,
}

/// Body of `PUT /snapshot/load`.
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "SnapshotLoadParams"))]
#[serde(deny_unknown_fields)]
pub struct LoadSnapshot {
    /// The file of the state of the machine.
    snapshot_path: Option<PathBuf>,
    /// The file of its memory (deprecated: `mem_backend`).
    mem_file_path: Option<PathBuf>,
    /// Where its memory comes from.
    mem_backend: Option<MemoryBackend>,
    /// Ours, instead of all of these: the folder that both were saved to.
    folder: Option<PathBuf>,
    /// `track_dirty_pages`, as it was called (deprecated).
    enable_diff_snapshots: Option<bool>,
    /// Whether writes of the guest and its devices to memory are noted.
    #[serde(default)]
    track_dirty_pages: bool,
    /// The guest runs at once.
    #[serde(default)]
    resume_vm: bool,
    /// Network interfaces that are to be on other TAP interfaces of the host.
    #[serde(default)]
    network_overrides: Vec<NetworkOverride>,
    /// Where the vsock socket is to be.
    vsock_override: Option<VsockOverride>,
    /// Ours: disks that are to be others.
    #[serde(default)]
    drive_overrides: Vec<DriveOverride>,
    /// The guest's clock (KVM's, x86_64) is put forward by the time of day since it was saved; else it goes on where
    /// it was.
    #[serde(default)]
    clock_realtime: bool,
    /// Of which size the pages of its memory are to be.
    #[serde(default)]
    huge_pages: LoadedPages,
}

/// Body of `PUT /snapshot/working-set`: when it is noted which pages of its memory a restored microVM has touched. The
/// request is answered then.
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "WorkingSetParams"))]
#[serde(deny_unknown_fields)]
pub struct NoteWorkingSet {
    /// The time until the guest is ready, in milliseconds from now, whether it runs or not, at most an hour. Left out: the
    /// guest is ready now.
    #[serde(default)]
    after_ms: u64,
}

impl NoteWorkingSet {
    /// The time from now on.
    pub fn after(&self) -> Duration {
        Duration::from_millis(self.after_ms)
    }
}

/// Body of `PUT /clones`, which a template answers: what process the clone is to be, and what is to be other than it
/// was saved.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "CloneParams"))]
#[serde(deny_unknown_fields)]
pub struct MakeClone {
    /// The clone's name: 1 to 64 letters, digits and hyphens. Without `api_sock`, `alula exec ID`, `alula ctl ID` and
    /// the like find the clone by the name.
    id: Option<String>,
    /// Where the clone's API is served: a path where nothing is yet.
    api_sock: Option<PathBuf>,
    /// Where the clone's messages go; left out: to the template's standard error.
    logger: Option<log::Config>,
    /// Where the clone's metrics go.
    metrics: Option<metrics::Config>,
    /// Where the guest's console goes; left out: to the template's standard output.
    serial: Option<console::Config>,
    /// Whether writes of the guest and its devices to memory are noted.
    #[serde(default)]
    track_dirty_pages: bool,
    /// The guest runs at once.
    #[serde(default)]
    resume_vm: bool,
    /// Network interfaces that are to be on other TAP interfaces of the host.
    #[serde(default)]
    network_overrides: Vec<NetworkOverride>,
    /// Where the vsock socket is to be.
    vsock_override: Option<VsockOverride>,
    /// Ours: disks that are to be others.
    #[serde(default)]
    drive_overrides: Vec<DriveOverride>,
    /// The guest's clock is put forward, as by `/snapshot/load`.
    #[serde(default)]
    clock_realtime: bool,
    /// Of which size the pages of its memory are to be.
    #[serde(default)]
    huge_pages: LoadedPages,
}

/// The answer to `PUT /clones`.
#[derive(Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "CloneInfo"))]
pub struct Made {
    /// The number of the clone's process.
    pub pid: u32,
}

/// Where the memory of a snapshot comes from.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct MemoryBackend {
    /// The kind of file or socket that is at the path.
    backend_type: BackendType,
    /// The path.
    backend_path: PathBuf,
}

/// The kinds of files and sockets that the memory of a snapshot can come from.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
enum BackendType {
    /// A file.
    File,
    /// A program that serves page faults, by its socket.
    Uffd,
}

/// A network interface that is to be on another TAP interface.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct NetworkOverride {
    /// The id of the network interface.
    iface_id: String,
    /// The name of the TAP interface.
    host_dev_name: String,
}

/// Where the vsock socket is to be.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
struct VsockOverride {
    /// The path of the socket.
    uds_path: PathBuf,
}

/// A disk that is to be another one.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct DriveOverride {
    /// The id of the disk.
    drive_id: String,
    /// The file or block device; or with `overlay`, where an image is made.
    path_on_host: PathBuf,
    /// The images beneath a qcow2 image that there is, the next one first. Left out: if the path is another one, those that
    /// the images name themselves, as long as they lie in the folder of the topmost.
    backing: Option<Vec<Backing>>,
    /// A qcow2 image is made at the path, where nothing may be yet: it has what the guest writes, and the disk that was
    /// saved is only read.
    #[serde(default)]
    overlay: bool,
}

/// Of which size the pages of restored memory are.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
enum LoadedPages {
    /// As they were.
    #[default]
    Snapshot,
    /// As the host gives them.
    None,
    /// Transparent huge pages, unless the host's policy is never to give them.
    Transparent,
    /// Huge pages of 2 MiB of the host's pool, which a page-fault handler fills (`mem_backend` of the type `Uffd`).
    #[serde(rename = "2M")]
    Huge2M,
}

impl CreateSnapshot {
    /// The body, if it says where to.
    pub fn whole(self, dialect: Dialect) -> serde_json::Result<Self> {
        if self.slow_down && !self.live {
            return Err(serde_json::Error::custom("`slow_down` is for `live`"));
        }
        match (&self.folder, &self.snapshot_path, &self.mem_file_path) {
            (Some(_), None, None) | (None, Some(_), Some(_)) => Ok(self),
            (Some(_), ..) => Err(too_many("`folder`", "`snapshot_path` and `mem_file_path`")),
            (None, None, None) if dialect == Dialect::Alula => {
                Err(neither("`folder`", "`snapshot_path` and `mem_file_path`"))
            }
            (None, None, _) => Err(serde_json::Error::missing_field("snapshot_path")),
            (None, _, None) => Err(serde_json::Error::missing_field("mem_file_path")),
        }
    }

    /// The request as the microVM takes it: what is to be saved, and where to.
    pub fn plan(self) -> Save {
        Save {
            location: location(self.folder, self.snapshot_path, self.mem_file_path),
            kind: match self.snapshot_type {
                SnapshotType::Full => Kind::Full,
                SnapshotType::Diff => Kind::Diff,
            },
            is_live: self.live,
            slows_down: self.slow_down,
        }
    }
}

impl LoadSnapshot {
    /// The body, if it says where from.
    pub fn whole(self, dialect: Dialect) -> serde_json::Result<Self> {
        let memory = (&self.mem_backend, &self.mem_file_path);
        match (&self.folder, &self.snapshot_path, memory) {
            (Some(_), None, (None, None)) => Ok(self),
            (Some(_), ..) => {
                Err(too_many("`folder`", "`snapshot_path` with `mem_backend` or `mem_file_path`"))
            }
            (None, None, (None, None)) if dialect == Dialect::Alula => {
                Err(neither("`folder`", "`snapshot_path` with `mem_backend`"))
            }
            (None, None, _) => Err(serde_json::Error::missing_field("snapshot_path")),
            // Firecracker's words.
            (_, _, (None, None)) => Err(serde_json::Error::custom(
                "missing field: either `mem_backend` or `mem_file_path` is required",
            )),
            (_, _, (Some(_), Some(_))) => Err(too_many("`mem_backend`", "`mem_file_path`")),
            _ => Ok(self),
        }
    }

    /// Whether a field of old is used.
    pub fn is_deprecated(&self) -> bool {
        self.mem_file_path.is_some() || self.enable_diff_snapshots.is_some()
    }

    /// The snapshot that the request names, and how it is to be restored.
    pub fn plan(self) -> Result<Load> {
        let is_served =
            self.mem_backend.as_ref().is_some_and(|backend| backend.backend_type == BackendType::Uffd);
        let huge_pages = match self.huge_pages {
            LoadedPages::Snapshot => None,
            LoadedPages::None => Some(HugePages::None),
            LoadedPages::Transparent => Some(HugePages::Transparent),
            LoadedPages::Huge2M => Some(HugePages::Huge2M),
        };
        let memory = self.mem_backend.map(|backend| backend.backend_path).or(self.mem_file_path);
        let interfaces = self.network_overrides.into_iter();
        let drives = self.drive_overrides.into_iter();
        Ok(Load {
            location: location(self.folder, self.snapshot_path, memory),
            is_served,
            resumes: self.resume_vm,
            tracks_writes: self.track_dirty_pages || self.enable_diff_snapshots == Some(true),
            follows_time_of_day: self.clock_realtime,
            huge_pages,
            interfaces: interfaces.map(|one| (one.iface_id, one.host_dev_name)).collect(),
            vsock: self.vsock_override.map(|vsock| vsock.uds_path),
            drives: drives
                .map(|one| Drive {
                    id: one.drive_id,
                    path: one.path_on_host,
                    backing: one.backing,
                    is_overlay: one.overlay,
                })
                .collect(),
        })
    }
}

impl MakeClone {
    /// The clone as it is to be made of a template; an error is the fault message.
    pub fn plan(self) -> std::result::Result<Order, String> {
        if let Some(id) = &self.id {
            runtime::check_id(id).map_err(|expected| format!("`id` `{id}`: {expected}"))?;
        }
        if self.id.is_none() && self.api_sock.is_none() {
            return Err("The clone has neither `id` nor `api_sock`: nobody would find it.".to_owned());
        }
        let load = LoadSnapshot {
            track_dirty_pages: self.track_dirty_pages,
            resume_vm: self.resume_vm,
            network_overrides: self.network_overrides,
            vsock_override: self.vsock_override,
            drive_overrides: self.drive_overrides,
            clock_realtime: self.clock_realtime,
            huge_pages: self.huge_pages,
            ..LoadSnapshot::default()
        };
        let mut config = Config::default();
        (config.logger, config.metrics, config.serial) = (self.logger, self.metrics, self.serial);
        let load = load.plan().map_err(|error| error.to_string())?;
        Ok(Order { id: self.id, api_sock: self.api_sock, config, load })
    }
}

fn location(folder: Option<PathBuf>, state: Option<PathBuf>, memory: Option<PathBuf>) -> Location {
    match folder {
        Some(folder) => Location::Folder(folder),
        None => Location::Files { state: state.unwrap_or_default(), memory: memory.unwrap_or_default() },
    }
}

fn neither(one: &str, other: &str) -> serde_json::Error {
    serde_json::Error::custom(format!("missing field: either {one}, or {other}, is needed"))
}

fn too_many(one: &str, other: &str) -> serde_json::Error {
    serde_json::Error::custom(format!("too many fields: either {one} or {other} exclusively is required"))
}
