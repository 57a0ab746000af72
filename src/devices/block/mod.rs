//! The block device (virtio 1.2, 5.2) over a file or block device of the host.

mod bounce;
mod config;
pub(super) mod device;
mod flushes;
mod holes;
mod image;
mod qcow2;
mod raw;
mod request;
mod ring;
mod vhost_user;
mod worker;

use std::any::Any;
use std::sync::{Arc, Mutex, Once, PoisonError};

use serde::{Deserialize, Serialize};

use super::kind::DeviceConfig;
use crate::error::Result;
use crate::host::Host;
use crate::limiter::{self, Limiter};
use crate::log;
use crate::metrics::{Counter, Group, Latency};
use crate::snapshot::Snapshot;
use crate::virtio::{Io, VirtioDevice, Worker};
pub use config::{Backing, CacheType, Config, Format, IoEngine, Patch, QUEUES_MAX};
use image::Image;
pub use qcow2::Overlay;
use worker::Running;

/// Requests are counted in sectors of this size, whatever the disk's own is.
pub const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 256;
/// A request has a header and a status beside its data.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

crate::metrics::metrics! {
    /// What a disk did.
    pub struct Metrics {
        /// Reads done.
        read_count: Counter,
        /// Writes done.
        write_count: Counter,
        /// Flushes done.
        flush_count: Counter,
        /// Discards done.
        discard_count: Counter,
        /// Writes of zeros done.
        write_zeroes_count: Counter,
        /// Bytes read.
        read_bytes: Counter,
        /// Bytes written.
        write_bytes: Counter,
        /// How often there was something to do.
        queue_event_count: Counter,
        /// Requests that the host could not do.
        execute_fails: Counter,
        /// Requests that make no sense.
        invalid_reqs_count: Counter,
        /// Requests that had to wait for the rate limit.
        rate_limiter_throttled_events: Counter,
        /// Changes by the user.
        update_count: Counter,
        /// Changes that were refused.
        update_fails: Counter,
        /// How long reads took.
        read_agg: Latency,
        /// How long writes took.
        write_agg: Latency,
    }
}

/// The device.
pub struct Block {
    config: Config,
    queue_sizes: Vec<u16>,
    image: Arc<Image>,
    limiter: Arc<Mutex<Limiter>>,
    metrics: Arc<Metrics>,
    /// It was said that the host forbids the engine.
    refused: Arc<Once>,
    /// The size in sectors that the disk had when it was saved, if it has another one, of which its driver has not heard.
    unheard: Option<u64>,
}

impl Block {
    fn open(config: &Config, host: &mut Host) -> Result<Self> {
        Ok(Self {
            queue_sizes: vec![QUEUE_SIZE; config.num_queues.into()],
            image: Arc::new(Image::open(config, host)?),
            limiter: Arc::new(Mutex::new(Limiter::new(config.rate_limiter.unwrap_or_default()))),
            metrics: Arc::default(),
            refused: Arc::new(Once::new()),
            unheard: None,
            config: config.clone(),
        })
    }

    /// Says in the log that the restored disk has so many sectors, and had so many when it was saved.
    fn tell_of_size(&self, is: u64, was: u64) {
        let (what, path, _) = self.config.file();
        let told = format!(
            "{what} is `{}` of {}, and had {} when the guest was saved: the guest is told",
            path.display(),
            size(is),
            size(was)
        );
        match is < was {
            true => log::line(format_args!(
                "{told}; what a file system of the guest has beyond that is lost to it"
            )),
            false => log::info(told),
        }
    }

    /// Whether a flush of the guest's reaches stable storage.
    fn durable(&self) -> bool {
        self.config.cache_type == CacheType::Writeback
    }

    /// Another image, or the same one with another size; other limits. Returns whether the image is
    /// another.
    fn change(&mut self, patch: &Patch, host: &mut Host) -> Result<bool> {
        let has_image = patch.path_on_host.is_some();
        let new = self.config.patched(patch)?;
        if has_image {
            let image = self.image.again(&new, host).unwrap_or_else(|| Image::open(&new, host))?;
            self.image = Arc::new(image);
        }
        if let Some(limits) = patch.rate_limiter {
            self.limiter.lock().unwrap_or_else(PoisonError::into_inner).patch(limits);
        }
        self.config = new;
        Ok(has_image)
    }
}

/// A size in sectors as people write it.
fn size(sectors: u64) -> String {
    const MIB: u64 = (1 << 20) / SECTOR;
    match sectors.is_multiple_of(MIB) {
        true => format!("{} MiB", sectors / MIB),
        false => format!("{} bytes", sectors.saturating_mul(SECTOR)),
    }
}

/// The limit's state, and the size that the guest was told: all else that the guest sees is in the configuration
/// and the image.
#[derive(Deserialize, Serialize)]
pub struct State {
    limit: limiter::State,
    /// The size in sectors; None: the state is of a version that did not save it.
    sectors: Option<u64>,
}

impl Snapshot for Block {
    type State = State;
    const VERSION: u16 = 2;
    const OLDER: &'static [(u16, &'static [u8])] = &[(1, &[0])];

    fn save(&self) -> Result<State> {
        let limit = self.limiter.lock().unwrap_or_else(PoisonError::into_inner).save()?;
        Ok(State { limit, sectors: Some(self.unheard.unwrap_or(self.image.sectors())) })
    }

    fn restore(&mut self, state: State) -> Result<()> {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner).restore(state.limit)?;
        let is = self.image.sectors();
        if let Some(was) = state.sectors.filter(|was| *was != is) {
            self.unheard = Some(was);
            self.tell_of_size(is, was);
        }
        Ok(())
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        2
    }

    /// What an image can do does not change with the image: one that is swapped in and can do less
    /// answers that a request is not supported.
    fn features(&self) -> u64 {
        let bit = |on, bit| if on { bit } else { 0 };
        let hole = self.image.hole().is_some();
        F_SEG_MAX
            | F_BLK_SIZE
            | bit(self.config.is_read_only, F_RO)
            | bit(self.durable() || self.image.is_cached(), F_FLUSH)
            | bit(self.config.num_queues > 1, F_MQ)
            | bit(hole, F_DISCARD | F_WRITE_ZEROES)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn has_steady_configuration(&self) -> bool {
        true
    }

    /// struct virtio_blk_config.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        let block = self.image.block();
        put(0, &self.image.sectors().to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &(block as u32).to_le_bytes());
        put(34, &self.config.num_queues.to_le_bytes());
        if let Some(hole) = self.image.hole() {
            put(36, &request::DISCARD_SECTORS_MAX.to_le_bytes());
            put(40, &request::RANGES_MAX.to_le_bytes());
            put(44, &((hole / SECTOR) as u32).to_le_bytes());
            put(48, &request::ZERO_SECTORS_MAX.to_le_bytes());
            put(52, &request::RANGES_MAX.to_le_bytes());
            put(56, &[1]);
        }
        super::copy_config(&config, offset, data);
    }

    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        let disk = Arc::new(request::Disk {
            image: self.image.clone(),
            memory: io.memory,
            id: self.config.drive_id.clone(),
            read_only: self.config.is_read_only,
            workers: self.config.num_queues,
            durable: self.durable(),
            limiter: self.config.rate_limiter.is_some().then(|| self.limiter.clone()),
            metrics: self.metrics.clone(),
        });
        let wants_ring = self.config.io_engine == IoEngine::Async;
        let worker = |queue| -> Box<dyn Worker> {
            Box::new(Running::new(queue, disk.clone(), wants_ring, self.refused.clone()))
        };
        Ok(io.queues.into_iter().map(worker).collect())
    }

    fn patch(&mut self, change: &dyn Any, host: &mut Host) -> Result<bool> {
        let patch = change.downcast_ref().expect("a device is changed by a change of its kind");
        let changed = self.change(patch, host);
        match changed {
            Ok(_) => self.metrics.update_count.add(1),
            Err(_) => self.metrics.update_fails.add(1),
        }
        changed
    }

    fn take_news(&mut self) -> bool {
        self.unheard.take().is_some()
    }

    fn metrics(&self) -> Option<Arc<dyn Group>> {
        Some(self.metrics.clone())
    }
}
