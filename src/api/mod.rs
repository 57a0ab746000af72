//! The control API: every operation once, as plain data. `http` reads and writes the wire format, `routes` turns
//! a method, path and body (`bodies`) into a `Request`, `handle` has the microVM do it, `observe` tells of it,
//! `server` owns the sockets, and `front` puts them on the main loop. `client` is the other side.

pub mod bodies;
mod chunks;
pub mod client;
mod connection;
#[cfg(test)]
mod examples;
mod front;
mod guest;
mod handle;
pub mod http;
mod observe;
mod prometheus;
#[cfg(test)]
mod published;
pub mod routes;
#[cfg(test)]
mod schema;
mod server;
pub mod snapshot;
pub mod template;

use serde_json::{Map, Value};

use crate::config::{BootSource, CpuConfig, MachineConfig, MachinePatch};
use bodies::{Action, Unplug, VmState};

use crate::devices::console;
use crate::devices::kind::{Change, ConfiguredDevice, DeviceKind};
use crate::jobs::Ticket;
use crate::log;
use crate::metadata;
use crate::metrics as counted;

pub use front::Api;
pub use server::Server;
use snapshot::{CreateSnapshot, LoadSnapshot, NoteWorkingSet};

/// The version of Firecracker's API that is spoken; clients decide by it what they may send.
pub const API_VERSION: &str = "1.17.0";
/// The largest request body, in bytes, unless the command line says otherwise (Firecracker's limit).
/// A client that announces more is refused before anything is read.
pub const BODY_MAX: usize = 51_200;

/// The API as an OpenAPI 3 document, made from the types by the tests in `schema`.
pub const OPENAPI: &str = include_str!("../../resources/openapi.json");
/// Config files as a JSON Schema, made in the same way.
pub const CONFIG_SCHEMA: &str = include_str!("../../resources/config.schema.json");

/// What a client asks for.
pub enum Request {
    /// `GET /`
    Instance,
    /// `GET /version`
    Version,
    /// `GET /machine-config`
    MachineConfig,
    /// `GET /vm/config`
    VmConfig,
    /// `GET /events`
    Events,
    /// `GET /guest`
    Guest,
    /// `GET /metrics`
    Metrics,
    /// `PUT /metrics`
    PutMetrics(counted::Config),
    /// `PUT /logger`
    PutLogger(log::Config),
    /// `PUT /serial`
    PutSerial(console::Config),
    /// `PUT /machine-config`
    PutMachineConfig(MachineConfig),
    /// `PATCH /machine-config`
    PatchMachineConfig(MachinePatch),
    /// `PUT /cpu-config`
    PutCpuConfig(CpuConfig),
    /// `PUT /boot-source`
    PutBootSource(BootSource),
    /// `PUT /{path of its kind}[/{id}]`
    PutDevice(ConfiguredDevice),
    /// `PATCH /{path of its kind}/{id or place}`
    PatchDevice(&'static DeviceKind, Change),
    /// `GET /{path of its kind}[/{place}]`
    TellDevice(&'static DeviceKind, &'static str),
    /// `DELETE /{path of its kind}/{id}`
    DeleteDevice(&'static DeviceKind, String, Unplug),
    /// `GET /mmds`
    Metadata,
    /// `PUT /mmds`
    PutMetadata(Map<String, Value>),
    /// `PATCH /mmds`
    PatchMetadata(Map<String, Value>),
    /// `PUT /mmds/config`
    PutMetadataConfig(metadata::Config),
    /// `PUT /actions`
    Action(Action),
    /// `PATCH /vm`
    PatchVm(VmState),
    /// `PUT /snapshot/create`
    CreateSnapshot(CreateSnapshot),
    /// `PUT /snapshot/load`
    LoadSnapshot(Box<LoadSnapshot>),
    /// `PUT /snapshot/working-set`
    NoteWorkingSet(NoteWorkingSet),
}

impl Request {
    /// The client uses a field that newer clients no longer use: it is told so.
    fn is_deprecated(&self) -> bool {
        match self {
            Self::PutMachineConfig(machine) => machine.cpu_template.is_some(),
            Self::PatchMachineConfig(patch) => patch.cpu_template.is_some(),
            Self::PutDevice(device) => device.is_deprecated(),
            Self::PutMetadataConfig(config) => config.version == metadata::Version::V1,
            Self::LoadSnapshot(load) => load.is_deprecated(),
            _ => false,
        }
    }
}

/// How a request is served.
pub enum Reply {
    /// It is answered.
    Now(Response),
    /// It is answered when a job of the microVM is done; the client's next request waits for that.
    Later {
        /// The job.
        ticket: Ticket,
        /// What the message begins with if it fails.
        area: &'static str,
    },
}

impl From<Response> for Reply {
    fn from(response: Response) -> Self {
        Self::Now(response)
    }
}

/// What a client is answered.
#[derive(Clone, Debug, PartialEq)]
pub enum Response {
    /// Done, nothing to say (204).
    Done,
    /// What was asked for (200).
    Value(Value),
    /// The counters of the microVM (200), as JSON, or as text for a client that asks for text.
    Metrics(Map<String, Value>),
    /// Not done, and why (400).
    Fault(String),
    /// Not done, because it is too much to be kept (413).
    TooLarge(String),
    /// What has happened and what will, a line each, until the process ends (200).
    Events,
    /// The answer to a request with a field of old (`Deprecation` header).
    Deprecated(Box<Response>),
}
