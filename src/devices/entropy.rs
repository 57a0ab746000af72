//! The entropy device (virtio 1.2, 5.4): random bytes from the host's `getrandom`.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddressSpace;

use super::kind::{CliOption, DeviceConfig, NotPatchable};
use super::limit::{self, Limit};
use crate::error::{Context, Result};
use crate::host::Host;
use crate::limiter::{self, RateLimiter};
use crate::memory::Memory;
use crate::metrics::{Counter, Group, metrics};
use crate::poll::{Interest, Timer};
use crate::snapshot::Snapshot;
use crate::sys::process;
use crate::virtio::buffers::Buffers;
use crate::virtio::{Io, Queue, Registrar, VirtioDevice, Worker};

/// So much is given at once, whatever is asked for: a request of 4 GiB would keep the host at work
/// for seconds.
const REQUEST_MAX: usize = 64 << 10;
/// How much is asked of the host at once.
const CHUNK: usize = 4096;

const KICK: u32 = 0;
const TIMER: u32 = 1;

/// Body of `PUT /entropy`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "EntropyDevice"))]
#[serde(deny_unknown_fields, expecting = "struct EntropyDeviceConfig")]
pub struct Config {
    /// Limits of what it gives: bytes, and requests.
    pub rate_limiter: Option<RateLimiter>,
}

impl DeviceConfig for Config {
    const SECTION: &'static str = "entropy";
    const MANY: bool = false;
    const NOUN: &'static str = "entropy device";
    const FAULT: &'static str = "Entropy config error";
    const OPTION: CliOption = CliOption { name: "entropy", value: "", help: "A source of random bytes" };
    const EXAMPLE: &'static str = "{}";
    const PUBLISHED: &'static [&'static str] = &["rate_limiter"];
    type Patch = NotPatchable;

    fn from_option(_: &str, _: usize) -> Result<Self, String> {
        Ok(Self::default())
    }

    fn open(&self, _: &str, _: &mut Host) -> Result<Box<dyn VirtioDevice>> {
        let limit = Limit::new(self.rate_limiter);
        Ok(Box::new(Entropy { limit, metrics: Arc::default() }))
    }
}

metrics! {
    /// What it gave; names as in Firecracker's metrics.
    struct Metrics {
        /// Kicks of its queue.
        entropy_event_count: Counter,
        /// Bytes given.
        entropy_bytes: Counter,
        /// The host gave none.
        host_rng_fails: Counter,
        /// Requests that had to wait for the rate limit.
        entropy_rate_limiter_throttled: Counter,
        /// The rate limit lets some through again.
        rate_limiter_event_count: Counter,
    }
}

/// The device.
struct Entropy {
    /// What the guest has used of it is used, whatever its driver does.
    limit: Limit,
    metrics: Arc<Metrics>,
}

/// What the limit lets through.
impl Snapshot for Entropy {
    type State = limiter::State;

    fn save(&self) -> Result<limiter::State> {
        self.limit.save()
    }

    fn restore(&mut self, state: limiter::State) -> Result<()> {
        self.limit.restore(state)
    }
}

impl VirtioDevice for Entropy {
    fn device_type(&self) -> u32 {
        4
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256]
    }
    fn has_steady_configuration(&self) -> bool {
        true
    }
    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        let Io { memory, queues, .. } = io;
        let [queue] = <[Queue; 1]>::try_from(queues).ok().expect("one queue was asked for");
        let buffers = Buffers::new(memory.clone());
        let (limit, timer, metrics) = (self.limit.clone(), self.limit.timer()?, self.metrics.clone());
        Ok(vec![Box::new(Running { memory, queue, buffers, limit, timer, metrics })])
    }
    fn metrics(&self) -> Option<Arc<dyn Group>> {
        Some(self.metrics.clone())
    }
}

struct Running {
    memory: Memory,
    queue: Queue,
    buffers: Buffers,
    limit: Limit,
    timer: Option<Timer>,
    metrics: Arc<Metrics>,
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        if let Some(timer) = &self.timer {
            registrar.add(timer, Interest::IN | Interest::EDGE_TRIGGERED, TIMER)?;
        }
        registrar.kick(&self.queue, KICK)
    }

    fn handle(&mut self, token: u32) -> Result<()> {
        let Self { memory, queue, buffers, limit, timer, metrics } = self;
        match token {
            TIMER => metrics.rate_limiter_event_count.add(1),
            _ => metrics.entropy_event_count.add(1),
        }
        let mut wait = None;
        queue.serve(&memory.memory(), |chain| {
            buffers.clear();
            buffers.add_writable(chain)?;
            let count = buffers.len().min(REQUEST_MAX);
            if let Err(time) = limit.take(count) {
                metrics.entropy_rate_limiter_throttled.add(1);
                wait = Some(time);
                return Ok(None);
            }
            fill(buffers, count).inspect_err(|_| metrics.host_rng_fails.add(1))?;
            metrics.entropy_bytes.add(count as u64);
            Ok(Some(count as u32))
        })?;
        limit::set(timer, wait)
    }

    fn stop(self: Box<Self>) -> Vec<Queue> {
        vec![self.queue]
    }
}

fn fill(buffers: &Buffers, count: usize) -> Result<()> {
    let mut bytes = [0; CHUNK];
    for offset in (0..count).step_by(CHUNK) {
        let chunk = &mut bytes[..CHUNK.min(count - offset)];
        process::random(chunk).context("get random bytes of the host")?;
        buffers.copy_from(offset, chunk);
    }
    Ok(())
}
