//! The entropy device (virtio 1.2, 5.4): random bytes from the host's `getrandom`.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddressSpace;

use super::kind::{CliOption, DeviceConfig, NotPatchable};
use crate::error::{Context, Result};
use crate::host::Host;
use crate::memory::Memory;
use crate::metrics::{Counter, Group, metrics};
use crate::snapshot::Snapshot;
use crate::virtio::buffers::Buffers;
use crate::virtio::{Io, Queue, Registrar, VirtioDevice, Worker};

/// So much is given at once, whatever is asked for: a request of 4 GiB would keep the host at work
/// for seconds.
const REQUEST_MAX: usize = 64 << 10;
/// How much is asked of the host at once.
const CHUNK: usize = 4096;

/// Body of `PUT /entropy`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "EntropyDevice"))]
#[serde(deny_unknown_fields)]
pub struct Config {}

impl DeviceConfig for Config {
    const SECTION: &'static str = "entropy";
    const MANY: bool = false;
    const NOUN: &'static str = "entropy device";
    const FAULT: &'static str = "Entropy config error";
    const OPTION: CliOption = CliOption { name: "entropy", value: "", help: "A source of random bytes" };
    const EXAMPLE: &'static str = "{}";
    type Patch = NotPatchable;

    fn from_option(_: &str, _: usize) -> Result<Self, String> {
        Ok(Self {})
    }

    fn open(&self, _: &str, _: &mut dyn Host) -> Result<Box<dyn VirtioDevice>> {
        Ok(Box::<Entropy>::default())
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
    }
}

/// The device.
#[derive(Default)]
struct Entropy {
    metrics: Arc<Metrics>,
}

/// It has none.
impl Snapshot for Entropy {
    type State = ();
    fn save(&self) -> Result<()> {
        Ok(())
    }
    fn restore(&mut self, (): ()) -> Result<()> {
        Ok(())
    }
}

impl VirtioDevice for Entropy {
    fn device_type(&self) -> u32 {
        4
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256]
    }
    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        let Io { memory, queues, .. } = io;
        let [queue] = <[Queue; 1]>::try_from(queues).ok().expect("one queue was asked for");
        let buffers = Buffers::new(memory.clone());
        Ok(vec![Box::new(Running { memory, queue, buffers, metrics: self.metrics.clone() })])
    }
    fn metrics(&self) -> Option<Arc<dyn Group>> {
        Some(self.metrics.clone())
    }
}

struct Running {
    memory: Memory,
    queue: Queue,
    buffers: Buffers,
    metrics: Arc<Metrics>,
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        registrar.kick(&self.queue, 0)
    }

    fn handle(&mut self, _token: u32) -> Result<()> {
        let Self { memory, queue, buffers, metrics } = self;
        metrics.entropy_event_count.add(1);
        queue.serve(&memory.memory(), |chain| {
            buffers.clear();
            buffers.add_writable(chain)?;
            let count = fill(buffers).inspect_err(|_| metrics.host_rng_fails.add(1))?;
            metrics.entropy_bytes.add(count.into());
            Ok(count)
        })
    }

    fn stop(self: Box<Self>) -> Vec<Queue> {
        vec![self.queue]
    }
}

fn fill(buffers: &Buffers) -> Result<u32> {
    let count = buffers.len().min(REQUEST_MAX);
    let mut bytes = [0; CHUNK];
    for offset in (0..count).step_by(CHUNK) {
        let chunk = &mut bytes[..CHUNK.min(count - offset)];
        random(chunk)?;
        buffers.copy_from(offset, chunk);
    }
    Ok(count as u32)
}

#[allow(unsafe_code)]
fn random(bytes: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        // SAFETY: the call writes at most the length of the slice to it.
        let count = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(count) {
            Ok(count) => done += count,
            Err(_) => {
                let error = std::io::Error::last_os_error();
                if error.kind() != std::io::ErrorKind::Interrupted {
                    return Err(error).context("get random bytes of the host");
                }
            }
        }
    }
    Ok(())
}
