//! A disk whose work another process does in guest memory. What is left here is the configuration.

use std::any::Any;
use std::sync::Arc;

use super::{
    Config, F_BLK_SIZE, F_DISCARD, F_FLUSH, F_MQ, F_RO, F_SEG_MAX, F_WRITE_ZEROES, Patch, QUEUE_SIZE,
};
use crate::devices::block::CacheType;
use crate::devices::kind::DeviceConfig;
use crate::devices::remote::Remote;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::host::vhost_user::Backend;
use crate::metrics::{Counter, Group};
use crate::snapshot::Snapshot;
use crate::virtio::{Io, VirtioDevice, Worker};

/// struct virtio_blk_config up to what is told of writing zeros; that is what Firecracker asks for.
const CONFIG_SIZE: usize = 60;
/// Where it says how many queues there are.
const NUM_QUEUES: usize = 34;

const F_SIZE_MAX: u64 = 1 << 1;
const F_GEOMETRY: u64 = 1 << 4;
const F_TOPOLOGY: u64 = 1 << 10;
/// Features that a guest is offered if the backend has them. Not whether writes are cached (CONFIG_WCE), which the guest would have
/// to be able to change.
const PASSED_ON: u64 = F_SIZE_MAX
    | F_SEG_MAX
    | F_GEOMETRY
    | F_RO
    | F_BLK_SIZE
    | F_FLUSH
    | F_TOPOLOGY
    | F_DISCARD
    | F_WRITE_ZEROES;

crate::metrics::metrics! {
    /// Changes of such a disk.
    struct Metrics {
        /// Changes by the user.
        update_count: Counter,
        /// Changes that were refused.
        update_fails: Counter,
    }
}

/// The device.
pub struct Disk {
    config: Config,
    remote: Remote,
    /// The device's configuration as the guest reads it.
    space: Vec<u8>,
    queue_sizes: Vec<u16>,
    metrics: Arc<Metrics>,
}

impl Config {
    /// Whether a disk that has a `socket` makes sense: what is the backend's business cannot be said here.
    pub(super) fn check_remote(&self) -> Result<()> {
        let default = Self { socket: self.socket.clone(), path_on_host: None, ..Self::new("", "") };
        let given = [
            ("path_on_host", self.path_on_host.is_some()),
            ("is_read_only", self.is_read_only),
            ("rate_limiter", self.rate_limiter.is_some()),
            ("io_engine", self.io_engine != default.io_engine),
            ("discard", self.discard.is_some()),
            ("format", self.format != default.format),
            ("backing", self.backing.is_some()),
            ("direct_io", self.direct_io),
            ("threads", self.threads != default.threads),
            ("lock", self.lock != default.lock),
        ];
        match given.iter().find(|(_, is_given)| *is_given) {
            Some((field, _)) => Err(Error::config(format!(
                "`{field}` is given beside `socket`: the program that listens there (vhost-user) has the disk and the \
                 say about that: leave one of both out"
            ))),
            None => Ok(()),
        }
    }

    /// Meets the backend ahead of the start.
    pub(super) fn hold_remote(&self, host: &mut Host) -> Result<()> {
        let path = self.socket.as_deref().expect("asked only of a disk that has one");
        host.hold_backend(&self.whose(), path, CONFIG_SIZE, |backend| self.check_backend(backend))
    }

    /// The name of the disk in errors.
    pub(super) fn whose(&self) -> String {
        format!("disk `{}`", self.drive_id)
    }

    fn check_backend(&self, backend: &Backend) -> Result<()> {
        let (wanted, there) = (self.num_queues, backend.queues().unwrap_or(1));
        if u64::from(wanted) <= there {
            return Ok(());
        }
        Err(Error::config(format!(
            "`num_queues` is {wanted}, and the vhost-user backend has {there} at most"
        )))
    }
}

impl Disk {
    /// The disk of the backend that `config` names.
    pub fn open(config: &Config, host: &mut Host) -> Result<Self> {
        let backend = meet(config, host)?;
        let allowed = match config.cache_type {
            CacheType::Writeback => PASSED_ON,
            CacheType::Unsafe => PASSED_ON & !F_FLUSH,
        };
        let several = if config.num_queues > 1 { F_MQ } else { 0 };
        Ok(Self {
            space: space(config, &backend),
            remote: Remote::new(config.whose(), backend, allowed | several),
            queue_sizes: vec![QUEUE_SIZE; config.num_queues.into()],
            metrics: Arc::default(),
            config: config.clone(),
        })
    }

    /// Reads the configuration again, of another backend at the same place if the one that was there is lost.
    fn read_again(&mut self, patch: &Patch, host: &mut Host) -> Result<()> {
        let new = self.config.patched(patch)?;
        self.remote.read_again(|| meet(&new, host))?;
        self.space = space(&new, &self.remote.backend());
        self.config = new;
        Ok(())
    }
}

fn meet(config: &Config, host: &mut Host) -> Result<Backend> {
    let path = config.socket.as_deref().expect("asked only of a disk that has one");
    let mut backend = host.backend(&config.whose(), path, CONFIG_SIZE)?;
    config.check_backend(&backend)?;
    backend.note_inflight(config.num_queues, QUEUE_SIZE)?;
    Ok(backend)
}

/// The configuration as a guest reads it: its queues are as many as the user has said.
fn space(config: &Config, backend: &Backend) -> Vec<u8> {
    let mut space = backend.config().to_vec();
    space[NUM_QUEUES..][..2].copy_from_slice(&config.num_queues.to_le_bytes());
    space
}

impl Snapshot for Disk {
    type State = ();

    fn save(&self) -> Result<()> {
        self.remote.save()
    }

    fn restore(&mut self, state: ()) -> Result<()> {
        self.remote.restore(state)
    }
}

impl VirtioDevice for Disk {
    fn device_type(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        self.remote.device_features()
    }

    fn ring_features(&self) -> u64 {
        self.remote.ring_features()
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::devices::copy_config(&self.space, offset, data);
    }

    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        self.remote.start(io)
    }

    fn reset(&mut self) {
        self.remote.reset();
    }

    fn patch(&mut self, change: &dyn Any, host: &mut Host) -> Result<bool> {
        let patch = change.downcast_ref().expect("a device is changed by a change of its kind");
        let read = self.read_again(patch, host);
        match read {
            Ok(()) => self.metrics.update_count.add(1),
            Err(_) => self.metrics.update_fails.add(1),
        }
        read.map(|()| true)
    }

    fn metrics(&self) -> Option<Arc<dyn Group>> {
        Some(self.metrics.clone())
    }
}
