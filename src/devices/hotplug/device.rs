//! The memory hotplug device without its queue: its configuration space, and the answer to GET requests.

use std::any::Any;
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use super::blocks::{Layout, Shared, State};
use super::worker::Running;
use super::{Config, Patch};
use crate::devices::copy_config;
use crate::devices::kind::DeviceConfig;
use crate::error::{Context, Error, Result};
use crate::host::Host;
use crate::memory::Range;
use crate::memory::slots::Slots;
use crate::metrics::{Counter, Group, Latency, metrics};
use crate::snapshot::Snapshot;
use crate::virtio::{Io, Queue, VirtioDevice, Worker};

/// The driver promises to touch no block that is unplugged, not even to read it (virtio 1.2, 5.15.3).
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

metrics! {
    /// The counters of the device's work; names as in Firecracker's metrics.
    pub struct Metrics {
        /// Kicks of its queue.
        queue_event_count: Counter,
        /// Requests that are none, or have no room for an answer.
        queue_event_fails: Counter,
        /// How long requests to plug took.
        plug_agg: Latency,
        /// Requests to plug.
        plug_count: Counter,
        /// Bytes plugged.
        plug_bytes: Counter,
        /// Requests to plug that were refused, or could not be done now.
        plug_fails: Counter,
        /// How long requests to unplug took.
        unplug_agg: Latency,
        /// Requests to unplug.
        unplug_count: Counter,
        /// Bytes unplugged.
        unplug_bytes: Counter,
        /// Requests to unplug that were refused.
        unplug_fails: Counter,
        /// Times that the host did not take unplugged memory back.
        unplug_discard_fails: Counter,
        /// How long requests to unplug everything took.
        unplug_all_agg: Latency,
        /// Requests to unplug everything.
        unplug_all_count: Counter,
        /// Requests to unplug everything that were refused.
        unplug_all_fails: Counter,
        /// How long requests for the state of blocks took.
        state_agg: Latency,
        /// Requests for the state of blocks.
        state_count: Counter,
        /// Requests for the state of blocks that were refused.
        state_fails: Counter,
    }
}

/// The answer to `GET /hotplug/memory`.
#[derive(Clone, Copy, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "MemoryHotplugStatus"))]
pub struct Status {
    /// The memory that can be plugged at most, in MiB.
    pub total_size_mib: u64,
    /// The smallest piece that the guest plugs, in MiB.
    pub block_size_mib: u64,
    /// The smallest piece that the guest finds or does not find, in MiB.
    pub slot_size_mib: u64,
    /// The memory that the guest has plugged, in MiB.
    pub plugged_size_mib: u64,
    /// The memory that the guest is to have plugged, in MiB.
    pub requested_size_mib: u64,
}

/// The device.
pub struct Hotplug {
    config: Config,
    layout: Layout,
    state: Shared,
    /// By whom memory comes and goes; None: no machine has the device.
    slots: Option<Arc<dyn Slots>>,
    metrics: Arc<Metrics>,
}

impl Hotplug {
    /// A device at power-on.
    pub fn new(config: Config, metrics: Arc<Metrics>) -> Self {
        let layout = Layout::new(&config);
        Self { config, layout, state: Shared::new(State::new(&layout)), slots: None, metrics }
    }
}

impl Snapshot for Hotplug {
    type State = State;

    fn save(&self) -> Result<State> {
        Ok(self.state.lock().clone())
    }

    /// The machine was built with the slots that its saved memory has.
    fn restore(&mut self, state: State) -> Result<()> {
        state.check(&self.layout)?;
        if let Some(slots) = &self.slots {
            let all = 0..self.layout.total / self.layout.block;
            let there = slots.list(self.layout.range());
            for blocks in self.layout.slots(&all) {
                let slot = self.layout.addresses(&blocks);
                match (state.count(&blocks), there.contains(&slot)) {
                    // KVM did not give the slot up when the last of it was unplugged.
                    (0, true) => slots.remove(slot)?,
                    (1.., false) => {
                        return Err(Error::config(format!(
                            "the saved memory lacks {slot}, which is plugged"
                        )));
                    }
                    _ => {}
                }
            }
        }
        *self.state.lock() = state;
        Ok(())
    }
}

impl VirtioDevice for Hotplug {
    fn device_type(&self) -> u32 {
        24
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256]
    }

    fn set_window(&mut self, range: Range) {
        self.layout.start = range.start;
    }

    fn set_slots(&mut self, slots: Arc<dyn Slots>) {
        self.slots = Some(slots);
    }

    /// struct virtio_mem_config; the second word is a node number, which is of no use without the feature of PXM.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Layout { start, total, block, .. } = self.layout;
        let state = self.state.lock();
        let fields = [block, 0, start, total, state.usable, state.plugged(&self.layout), state.requested];
        copy_config(&fields.map(u64::to_le_bytes).concat(), offset, data);
    }

    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        self.state.lock().is_driven = true;
        let Io { memory, queues, .. } = io;
        let [queue] = <[Queue; 1]>::try_from(queues).ok().expect("one queue was asked for");
        let (layout, state) = (self.layout, self.state.clone());
        Ok(vec![Box::new(Running::new(
            memory,
            queue,
            layout,
            state,
            self.slots.clone(),
            self.metrics.clone(),
        ))])
    }

    /// The blocks stay as they are: a kernel that is started over another one asks for their state (5.15.5).
    fn reset(&mut self) {
        self.state.lock().is_driven = false;
    }

    /// Nothing is plugged in a machine that is switched on; what was requested stays so.
    fn power_on(&mut self) {
        let (mut state, requested) = (State::new(&self.layout), self.state.lock().requested);
        if requested > 0 {
            state.request(requested, &self.layout);
        }
        // The slots are those of a machine that has ended.
        (self.state, self.slots) = (Shared::new(state), None);
    }

    fn patch(&mut self, change: &dyn Any, _: &mut Host) -> Result<bool> {
        let patch: &Patch = change.downcast_ref().expect("a device is changed by a change of its kind");
        self.config = self.config.patched(patch)?;
        let mut state = self.state.lock();
        if !state.is_driven {
            return Err(Error::config(
                "Device is not active (the guest has no driver for it, virtio_mem, or has not come to it)",
            ));
        }
        state.request(patch.requested_size_mib << 20, &self.layout);
        Ok(true)
    }

    fn tell(&self, _: &str) -> Result<Value> {
        let Config { total_size_mib, block_size_mib, slot_size_mib } = self.config;
        let state = self.state.lock();
        let [plugged_size_mib, requested_size_mib] =
            [state.plugged(&self.layout), state.requested].map(|bytes| bytes >> 20);
        let status =
            Status { total_size_mib, block_size_mib, slot_size_mib, plugged_size_mib, requested_size_mib };
        serde_json::to_value(status).context("write an answer")
    }

    fn metrics(&self) -> Option<Arc<dyn Group>> {
        Some(self.metrics.clone())
    }
}
