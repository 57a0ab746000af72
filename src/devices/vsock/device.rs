//! The device: its configuration space, its state, and how it starts.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::metrics::Metrics;
use super::mux::{Mux, Told};
use super::worker::{Home, Running};
use crate::error::{Error, Result};
use crate::host::listener::Listener;
use crate::metrics::Group;
use crate::snapshot::Snapshot;
use crate::virtio::{Io, Queue, VirtioDevice, Worker};

/// Received packets, sent packets, events.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// The device.
pub struct Vsock {
    // Fixed
    cid: u32,
    // Host
    metrics: Arc<Metrics>,
    /// It goes on in another place, where its connections are not: its driver is to be told.
    moved: bool,
    // Host and guest-visible
    home: Home,
}

/// What the guest sees of it beyond its configuration and its queues. Its connections are not saved: what they
/// lead to stays behind.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct State {
    /// The port of the next program of the host.
    next_port: u32,
}

impl Vsock {
    /// The device of the guest with this address, without connections.
    pub fn new(cid: u32, path: PathBuf, listener: Listener) -> Self {
        let metrics = Arc::<Metrics>::default();
        let mux = Mux::new(cid, path, listener, metrics.clone());
        Self { cid, metrics, moved: false, home: Arc::new(Mutex::new(Some(Box::new(mux)))) }
    }

    /// Does something with the connections, which no worker has.
    fn with<T>(&self, act: impl FnOnce(&mut Mux) -> T) -> Option<T> {
        self.home.lock().unwrap_or_else(PoisonError::into_inner).as_deref_mut().map(act)
    }
}

impl Snapshot for Vsock {
    type State = State;

    fn save(&self) -> Result<State> {
        let next_port = self.with(|mux| mux.next_port);
        let next_port = next_port.ok_or_else(|| Error::host("a worker still has the connections"))?;
        Ok(State { next_port })
    }

    fn restore(&mut self, state: State) -> Result<()> {
        let State { next_port } = state;
        self.with(|mux| mux.next_port = next_port);
        self.moved = true;
        Ok(())
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        19
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn has_steady_configuration(&self) -> bool {
        true
    }

    /// struct virtio_vsock_config: guest_cid.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::super::copy_config(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        let queues = <[Queue; 3]>::try_from(io.queues).ok().expect("three queues were asked for");
        if std::mem::take(&mut self.moved) {
            self.with(|mux| mux.told = Told::Owed);
        }
        Ok(vec![Box::new(Running::new(&io.memory, queues, &self.home)?)])
    }

    fn reset(&mut self) {
        self.moved = false;
        self.with(Mux::reset);
    }

    fn metrics(&self) -> Option<Arc<dyn Group>> {
        Some(self.metrics.clone())
    }
}
