//! The persistent memory device without its queue: the file that the guest sees, and where.

use std::any::Any;
use std::io::{Seek, SeekFrom};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Once};

use serde::{Deserialize, Serialize};

use super::worker::Running;
use super::{Config, Patch};
use crate::devices::block::device::is_read_only;
use crate::devices::copy_config;
use crate::devices::kind::DeviceConfig;
use crate::devices::limit::Limit;
use crate::devices::lock::lock;
use crate::error::{Context, Error, Result};
use crate::host::{Access, Host};
use crate::limiter;
use crate::memory::Range;
use crate::memory::window::View;
use crate::metrics::{Counter, Group, metrics};
use crate::snapshot::Snapshot;
use crate::virtio::{Io, Queue, VirtioDevice, Worker};

metrics! {
    /// Counters of the device's work; names as in Firecracker's metrics where it has such.
    pub struct Metrics {
        /// How often there was something to do.
        queue_event_count: Counter,
        /// Flushes done.
        flush_count: Counter,
        /// Flushes that failed.
        flush_fails: Counter,
        /// Requests that make no sense.
        invalid_reqs_count: Counter,
        /// How often flushes had to wait for the rate limit.
        rate_limiter_throttled_events: Counter,
        /// The rate limit lets some through again.
        rate_limiter_event_count: Counter,
    }
}

/// The part that the device and its worker share, however often the worker is started.
pub struct Shared {
    /// The device's name in errors.
    pub name: String,
    /// The file as the guest sees it.
    pub view: View,
    /// A flush has failed. The kernel tells once of data that it could not write, and drops the data: later flushes
    /// would find nothing left to write and call that a success.
    pub has_failed: AtomicBool,
    /// Done once the log says that the host gives no ring.
    pub refused: Once,
    /// The device's counters.
    pub metrics: Arc<Metrics>,
}

/// The device.
pub struct Pmem {
    config: Config,
    shared: Arc<Shared>,
    /// The first of the guest's addresses where it is seen; 0: it has no place yet.
    start: u64,
    /// The limit of flushes. A guest that resets the device has used what it has used.
    limit: Limit,
}

/// The state of the limit, and the size of the file, which the guest's file system counts on.
#[derive(Debug, Deserialize, Serialize)]
pub struct State {
    length: u64,
    limit: limiter::State,
}

impl Pmem {
    /// Opens, locks and maps the file that `config` names.
    pub fn open(config: &Config, host: &mut Host) -> Result<Self> {
        let (what, path, access) = config.file();
        let sharing = host.sharing(config.lock);
        let mut file = host.file(&what, path, access, sharing)?;
        let attempt = || format!("use `{}`", path.display());
        if access == Access::ReadWrite && is_read_only(&file) {
            let reason = "the device cannot be written: `read_only` (`ro`), if it is only to be read";
            return Err(Error::config(reason)).with_context(attempt);
        }
        let length = file.seek(SeekFrom::End(0)).context("find its size").with_context(attempt)?;
        lock(&file, access, sharing, &what, path).with_context(attempt)?;
        let view = View::of_file(file, length, path, config.read_only).with_context(attempt)?;
        let shared = Shared {
            name: what,
            view,
            has_failed: AtomicBool::new(false),
            refused: Once::new(),
            metrics: Arc::default(),
        };
        let limit = Limit::new(config.rate_limiter);
        Ok(Self { config: config.clone(), shared: Arc::new(shared), start: 0, limit })
    }
}

impl Snapshot for Pmem {
    type State = State;

    fn save(&self) -> Result<State> {
        Ok(State { length: self.shared.view.length(), limit: self.limit.save()? })
    }

    fn restore(&mut self, state: State) -> Result<()> {
        let (was, is) = (state.length, self.shared.view.length());
        if was != is {
            return Err(Error::config(format!(
                "`{}` has {is} bytes, and had {was} when the guest was saved: give it the file that it had",
                self.config.path_on_host.display()
            )));
        }
        self.limit.restore(state.limit)
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u32 {
        27
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256]
    }

    fn view(&self) -> Option<View> {
        Some(self.shared.view.clone())
    }

    fn set_window(&mut self, range: Range) {
        self.start = range.start;
    }

    fn has_steady_configuration(&self) -> bool {
        true
    }

    /// struct virtio_pmem_config.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&[self.start, self.shared.view.size()].map(u64::to_le_bytes).concat(), offset, data);
    }

    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        let Io { memory, queues, .. } = io;
        let [queue] = <[Queue; 1]>::try_from(queues).ok().expect("one queue was asked for");
        Ok(vec![Box::new(Running::new(queue, memory, self.shared.clone(), self.limit.clone())?)])
    }

    fn patch(&mut self, change: &dyn Any, _: &mut Host) -> Result<bool> {
        let patch: &Patch = change.downcast_ref().expect("a device is changed by a change of its kind");
        self.config = self.config.patched(patch)?;
        if let Some(limits) = patch.rate_limiter {
            self.limit.patch(limits);
        }
        Ok(false)
    }

    fn metrics(&self) -> Option<Arc<dyn Group>> {
        Some(self.shared.metrics.clone())
    }
}
