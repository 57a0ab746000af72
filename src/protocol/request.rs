//! A client's request and the agent's greeting: the first frames of a connection, in JSON (docs/agent.md).

use std::os::fd::AsRawFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::sys::process;

/// The version of the protocol.
pub const PROTOCOL: u32 = 1;

/// The client's first frame.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The version of the protocol that the client speaks.
    pub protocol: u32,
    /// The one thing that the client asks for on this connection.
    pub ask: Ask,
}

/// The things that a client can ask for.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Ask {
    /// A program is to run.
    Run(Run),
    /// A file or tree is to be read.
    Read(Read),
    /// A file or tree is to be written.
    Write(Write),
    /// The guest is to be set up.
    Set(Set),
    /// How the guest is.
    Info {},
    /// The guest is to end.
    End {
        /// By a reboot.
        #[serde(default)]
        reboot: bool,
    },
}

/// A program.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Its name or path, and its arguments.
    pub argv: Vec<String>,
    /// `NAME=VALUE`, on top of what the agent sets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// The folder that it starts in; none: its user's home, or `/`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<PathBuf>,
    /// `USER[:GROUP]`, names or numbers; none: who the agent is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The size of the terminal that the program gets; none: the program gets pipes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<Window>,
}

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Its height; 0: unknown.
    pub rows: u16,
    /// Its width; 0: unknown.
    pub columns: u16,
}

impl Window {
    /// That of this terminal, if it is one.
    pub fn of(terminal: &impl AsRawFd) -> Option<Self> {
        process::window(terminal).map(|(rows, columns)| Self { rows, columns })
    }
}

/// A file or tree to send.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Read {
    /// Where it is.
    pub path: PathBuf,
    /// The user in the guest who opens the files: whoever the agent runs as, if this is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// A file or tree to receive.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Write {
    /// Where it goes.
    pub path: PathBuf,
    /// The name that the tree gets if `path` is a folder.
    pub name: String,
    /// Folders on the way that are missing are made.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub parents: bool,
    /// The user in the guest who opens the files: whoever the agent runs as, if this is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Settings of the guest that the host knows better than the guest does.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Set {
    /// The guest's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// The time, in nanoseconds since 1970 UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_ns: Option<u64>,
    /// Random bytes for the kernel's generator, counted as random.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<Vec<u8>>,
    /// An address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Address>,
    /// The numbers of CPUs that are to be online: the guest has been given some of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpus: Vec<u16>,
    /// The numbers of CPUs that are to be offline: the guest is to let them go, and does not hear so by itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpus_off: Vec<u16>,
    /// Devices of its PCI bus have come, or one is to be let go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci: Option<Pci>,
}

/// A request to the guest's kernel about its PCI devices, on bus 0 or in PCIe slots.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pci {
    /// Devices that have come are looked for.
    Rescan,
    /// The device with this number on bus 0 is let go.
    Remove(u8),
    /// The device in the slot with this number is let go.
    Empty(u8),
}

/// An interface's IPv4 address.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Address {
    /// The interface's name, `eth0`.
    pub interface: String,
    /// The address.
    pub address: std::net::Ipv4Addr,
    /// How many bits of it are the network's.
    pub prefix: u8,
    /// The way to other networks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<std::net::Ipv4Addr>,
}

/// The agent's first frame. A client takes what it knows of it: later agents may say more.
#[derive(Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Greeting {
    /// The version of the protocol that the agent speaks.
    pub protocol: u32,
    /// The version of the program.
    #[serde(default)]
    pub agent: String,
    /// The process that runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// How the guest is, when that was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub info: Option<Info>,
}

/// How a guest is.
#[derive(Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Info {
    /// How long it has been up.
    pub uptime_ms: u64,
    /// Its memory.
    pub memory_kib: Memory,
    /// Its addresses, without that of the loopback interface.
    pub addresses: Vec<std::net::IpAddr>,
    /// Its name.
    pub hostname: String,
}

/// How much memory there is.
#[derive(Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "GuestMemory"))]
pub struct Memory {
    /// In all.
    pub total: u64,
    /// For programs that start now, without swapping.
    pub available: u64,
}
