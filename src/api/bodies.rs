//! Bodies of requests and answers that are the API's alone. A body that configures something stands with what
//! it configures, as its section of a config file does: in `config`, or in the file of the device.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::protocol::request::Memory;

/// Body of `PUT /actions`.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "InstanceActionInfo"))]
#[serde(deny_unknown_fields)]
pub struct ActionBody {
    /// What is to be done.
    pub action_type: Action,
}

/// Body of `PATCH /vm`.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Vm"))]
#[serde(deny_unknown_fields)]
pub struct VmBody {
    /// The state to bring it into.
    pub state: VmState,
}

/// What can be done to a microVM.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[allow(missing_docs, reason = "names of the API")]
pub enum Action {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
    /// Ours: asks the guest to power off, in the way of its architecture.
    Shutdown,
    /// Ours: stops the guest at once, as a reset button does, and boots it again.
    Reset,
}

/// Body of `DELETE /drives/{id}` and the like, which need none.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "DeviceRemoval"))]
#[serde(deny_unknown_fields)]
pub struct Unplug {
    /// Tear the device away at once, whether the guest uses it or not.
    #[serde(default)]
    pub force: bool,
}

/// The state to bring a microVM into.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[allow(missing_docs, reason = "names of the API")]
pub enum VmState {
    Paused,
    Resumed,
}

/// The answer to `GET /`.
#[derive(Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct InstanceInfo {
    /// The microVM's name.
    pub id: String,
    /// `Not started`, `Running` or `Paused`.
    pub state: &'static str,
    /// The version of Firecracker's API that is spoken.
    pub vmm_version: &'static str,
    /// Always `Firecracker`: clients look at it.
    pub app_name: &'static str,
}

/// The answer to `GET /guest`.
#[derive(Default, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "GuestInfo"))]
pub struct Guest {
    /// There is an agent in the guest, and it answers. The rest is what it says, which nobody has checked.
    pub agent: bool,
    /// The version of the agent's program.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// How long the guest has been up, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uptime_ms: Option<u64>,
    /// The guest's memory, in KiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_kib: Option<Memory>,
    /// The guest's addresses, without that of the loopback interface.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub addresses: Option<Vec<IpAddr>>,
    /// The guest's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Why no agent answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The answer to `GET /version`.
#[derive(Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct FirecrackerVersion {
    /// The version of Firecracker's API that is spoken.
    pub firecracker_version: &'static str,
}
