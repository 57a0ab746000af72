//! The balloon device without its queues: its configuration space, and the answers to GET requests.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::statistics::Statistics;
use super::worker::{Running, Work};
use super::{Config, HINTING_STATUS, Patch};
use crate::devices::copy_config;
use crate::error::{Context, Error, Result};
use crate::host::Host;
use crate::metrics::{Counter, Group, metrics};
use crate::snapshot::Snapshot;
use crate::virtio::{Io, VirtioDevice, Worker};

/// Feature bits (virtio 1.2, 5.5.3).
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_FREE_PAGE_HINT: u64 = 1 << 3;
const F_REPORTING: u64 = 1 << 5;

/// Pages of the balloon have this size, whatever those of the guest and of the host have (5.5.6).
pub const PAGE: u64 = 4096;
const PAGES_PER_MIB: u32 = 256;

/// Where the driver says how many pages it has given (5.5.4).
const ACTUAL: std::ops::Range<u64> = 4..8;

metrics! {
    /// The counters of the balloon's work; names as in Firecracker's metrics.
    pub struct Metrics {
        /// Kicks of the queue by which pages are given.
        inflate_count: Counter,
        /// Kicks of the queue by which pages are taken back.
        deflate_count: Counter,
        /// Kicks of the queue of statistics.
        stats_updates_count: Counter,
        /// Statistics with a tag that is unknown.
        stats_update_fails: Counter,
        /// Pieces of memory that the guest reported as free.
        free_page_report_count: Counter,
        /// Bytes that the guest reported as free and that went back to the host.
        free_page_report_freed: Counter,
        /// Times that the host did not take some of the memory that the guest reported as free.
        free_page_report_fails: Counter,
        /// Pieces of memory that the guest said were free when it was asked.
        free_page_hint_count: Counter,
        /// Bytes that the guest said were free when it was asked, and that went back to the host.
        free_page_hint_freed: Counter,
        /// Times that the host did not take some of the memory that the guest said was free when it was asked.
        free_page_hint_fails: Counter,
    }
}

/// The command of free page hinting by which the guest may use its pages again (virtio 1.2, 5.5.6.3); the guest says 0
/// when it has told of all its free pages. Greater numbers ask the guest to tell of them.
pub const DONE: u32 = 1;

/// The answer to `GET /balloon/hinting/status`.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "BalloonHintingStatus"))]
pub struct Status {
    /// The last request to the guest: 0: none yet; 1: to use its pages again; else to tell of its free pages, by a
    /// number that is another one each time.
    pub host_cmd: u32,
    /// The number of the request for which the guest tells its free pages; 0: the guest has told of all.
    pub guest_cmd: Option<u32>,
}

/// The state of the device beyond its configuration: what the guest can see, and what the guest has told.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct State {
    /// A driver has been ready for the device since its last reset.
    is_driven: bool,
    /// The number of pages that the driver says it has given.
    actual: u32,
    /// The last number by which the guest was asked for free pages.
    last_cmd: u32,
    /// The guest may use its pages again once it has told of all.
    pub acknowledges: bool,
    /// How far the guest is with telling of its free pages.
    pub hinting: Status,
    /// The statistics that the guest told last.
    pub statistics: Statistics,
}

/// The state as the device shares it with its worker.
#[derive(Clone, Default)]
pub struct Shared(Arc<Mutex<State>>);

impl Shared {
    /// The state, locked: nobody else changes it meanwhile. Whoever holds the lock waits for nothing.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The balloon device, without its queues.
pub struct Balloon {
    config: Config,
    metrics: Arc<Metrics>,
    state: Shared,
}

impl Balloon {
    /// A device at power-on.
    pub fn new(config: Config, metrics: Arc<Metrics>) -> Self {
        Self { config, metrics, state: Shared::default() }
    }

    /// The purposes of the device's queues, in the order in which QEMU and Firecracker number those that are there
    /// (5.5.2).
    fn work(&self) -> impl Iterator<Item = Work> {
        let Config { stats_polling_interval_s, free_page_hinting, free_page_reporting, .. } = self.config;
        let optional = [
            (stats_polling_interval_s > 0, Work::Statistics),
            (free_page_hinting, Work::Hinting),
            (free_page_reporting, Work::Reporting),
        ];
        let optional = optional.into_iter().filter_map(|(is_there, work)| is_there.then_some(work));
        [Work::Inflate, Work::Deflate].into_iter().chain(optional)
    }

    fn target(&self) -> u32 {
        self.config.amount_mib.saturating_mul(PAGES_PER_MIB)
    }

    fn statistics(&self) -> Result<Value> {
        if self.config.stats_polling_interval_s == 0 {
            return Err(Error::config("Received stats query when stats are disabled."));
        }
        let State { actual, statistics, .. } = *self.state.lock();
        let mut answer = Map::new();
        for (name, pages) in [("target", self.target()), ("actual", actual)] {
            answer.insert(format!("{name}_pages"), pages.into());
            answer.insert(format!("{name}_mib"), (pages / PAGES_PER_MIB).into());
        }
        statistics.tell(&mut answer);
        Ok(Value::Object(answer))
    }
}

impl Snapshot for Balloon {
    type State = State;

    fn save(&self) -> Result<State> {
        Ok(self.state.lock().clone())
    }

    fn restore(&mut self, state: State) -> Result<()> {
        *self.state.lock() = state;
        Ok(())
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        5
    }

    fn features(&self) -> u64 {
        let Config {
            deflate_on_oom, stats_polling_interval_s, free_page_hinting, free_page_reporting, ..
        } = self.config;
        let offered = [
            (stats_polling_interval_s > 0, F_STATS_VQ),
            (deflate_on_oom, F_DEFLATE_ON_OOM),
            (free_page_hinting, F_FREE_PAGE_HINT),
            (free_page_reporting, F_REPORTING),
        ];
        offered.iter().filter(|(is_there, _)| *is_there).map(|(_, bit)| bit).sum()
    }

    fn queue_sizes(&self) -> &[u16] {
        const SIZES: [u16; 5] = [256; 5];
        &SIZES[..self.work().count()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock();
        let fields = [self.target(), state.actual, state.hinting.host_cmd];
        copy_config(&fields.map(u32::to_le_bytes).concat(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock();
        let mut actual = state.actual.to_le_bytes();
        for (place, byte) in (offset..).zip(data).filter(|(place, _)| ACTUAL.contains(place)) {
            actual[(place - ACTUAL.start) as usize] = *byte;
        }
        state.actual = u32::from_le_bytes(actual);
    }

    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        self.state.lock().is_driven = true;
        let work = self.work().collect();
        let interval = self.config.stats_polling_interval_s;
        Ok(vec![Box::new(Running::new(io, work, interval, self.state.clone(), self.metrics.clone())?)])
    }

    fn reset(&mut self) {
        // The driver has its pages back, and tells anew whatever is to be known.
        *self.state.lock() = State::default();
    }

    fn patch(&mut self, change: &dyn Any, _: &mut Host) -> Result<bool> {
        let patch: &Patch = change.downcast_ref().expect("a device is changed by a change of its kind");
        let config = super::DeviceConfig::patched(&self.config, patch)?;
        let mut state = self.state.lock();
        if !state.is_driven {
            return Err(Error::config(
                "Device not activated yet. (the guest has no driver for it, or has not come to it)",
            ));
        }
        match patch {
            Patch::Amount(_) | Patch::Interval(_) => {}
            Patch::Start(start) => {
                // The commands 0 and 1 are no numbers of requests (5.5.6.3).
                state.last_cmd = state.last_cmd.wrapping_add(1).max(DONE + 1);
                state.acknowledges = start.acknowledge_on_stop.unwrap_or(true);
                state.hinting.host_cmd = state.last_cmd;
            }
            Patch::Stop => state.hinting.host_cmd = DONE,
        }
        drop(state);
        self.config = config;
        Ok(!matches!(patch, Patch::Interval(_)))
    }

    fn tell(&self, what: &str) -> Result<Value> {
        match what {
            HINTING_STATUS => {
                self.config.check_hinting()?;
                serde_json::to_value(self.state.lock().hinting).context("write an answer")
            }
            _ => self.statistics(),
        }
    }

    fn metrics(&self) -> Option<Arc<dyn Group>> {
        Some(self.metrics.clone())
    }
}
