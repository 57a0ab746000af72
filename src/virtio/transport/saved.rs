//! A device's registers and queues as saved state.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{DRIVER_OK, FEATURES_OK, NEEDS_RESET, Phase, QueueRegisters, Transport};
use crate::error::{Context, Error, Result};
use crate::snapshot::Snapshot;
use crate::virtio::InterruptState;

/// What the guest can see of a device behind any transport.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct State {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
    config_generation: u32,
    interrupts: InterruptState,
    /// The device's own, as it writes it.
    device: Vec<u8>,
}

/// Saved while it is paused, restored before it runs for the first time.
impl Snapshot for Transport {
    type State = State;

    fn save(&self) -> Result<State> {
        let Self {
            name,
            offered: _,
            device,
            metrics: _,
            memory: _,
            loops: _,
            interrupts,
            kicks: _,
            was_restored: _,
            phase,
            paused: _,
            resetting: _,
            is_used: _,
            waiting: _,
            // Saved with its function, where there is one.
            is_master: _,
            this: _,
            status,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            queues,
        } = self;
        if *phase != Phase::Idle {
            return Err(Error::host(format!("save {name}: it runs, pause it first")));
        }
        Ok(State {
            status: *status,
            device_features_select: *device_features_select,
            driver_features_select: *driver_features_select,
            driver_features: *driver_features,
            queue_select: *queue_select,
            queues: queues.clone(),
            config_generation: interrupts.generation().load(Ordering::SeqCst),
            interrupts: interrupts.save(),
            device: device.save_state().with_context(|| format!("save {name}"))?,
        })
    }

    fn restore(&mut self, state: State) -> Result<()> {
        let attempt = format!("restore {}", self.name);
        let fits = state.queues.len() == self.queues.len();
        if !fits || state.driver_features & !self.offered != 0 && state.status & FEATURES_OK != 0 {
            let other = Error::config("the saved state is of a device with other queues or features");
            return Err(other).context(attempt);
        }
        self.is_used = true;
        self.status = state.status;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        self.queues = state.queues;
        self.interrupts.generation().store(state.config_generation, Ordering::SeqCst);
        self.interrupts.restore(state.interrupts).context(attempt.clone())?;
        self.device.restore_state(&state.device).context(attempt.clone())?;
        self.was_restored = true;
        self.show();
        let runs = state.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK;
        let rings = if runs { 0..self.queues.len() } else { 0..0 };
        rings.into_iter().try_for_each(|index| self.ring(index).map(drop)).context(attempt)
    }
}
