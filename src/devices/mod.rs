//! The devices: those at fixed places, and those that a configuration lists, each in a file of its own.

pub mod block;
pub mod console;
pub mod entropy;
pub mod exit;
pub mod keyboard;
pub mod net;
pub mod power;
pub mod rtc;

use crate::error::{Context, Error, Result};
use crate::host::Host;
use crate::virtio::VirtioDevice;

/// A virtio device as configured.
pub enum Device<'a> {
    /// A disk.
    Block(&'a block::Config),
    /// A network interface.
    Net(&'a net::Config),
    /// A source of random bytes.
    Entropy(&'a entropy::Config),
}

impl Device<'_> {
    /// What log lines and errors call it.
    pub fn name(&self) -> String {
        match self {
            Self::Block(config) => format!("disk `{}`", config.drive_id),
            Self::Net(config) => format!("network interface `{}`", config.iface_id),
            Self::Entropy(_) => "entropy device".to_owned(),
        }
    }

    /// On how many threads of its own it is to run; 0: on the one that all share.
    pub fn threads(&self) -> usize {
        0
    }

    /// Opens what it needs of the host; `id` is the microVM's.
    pub fn open(&self, id: &str, host: &mut dyn Host) -> Result<Box<dyn VirtioDevice>> {
        match self {
            Self::Block(config) => config.open(host),
            Self::Net(config) => config.open(id, host),
            Self::Entropy(config) => Ok(config.open()),
        }
        .with_context(|| format!("set up {}", self.name()))
    }
}

/// The part of `config` that is read at `offset`; beyond its end there are zeros.
fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    let count = rest.len().min(data.len());
    data[..count].copy_from_slice(&rest[..count]);
}

/// Whether `id` can name a resource of the API.
fn check_id(id: &str) -> Result<()> {
    if id.is_empty() {
        return Err(Error::config("The ID cannot be empty."));
    }
    if !id.chars().all(|character| character.is_alphanumeric() || character == '_') {
        return Err(Error::config(
            "API Resource IDs can only contain alphanumeric characters and underscores.",
        ));
    }
    Ok(())
}
