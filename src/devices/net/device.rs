//! The device: what it offers, its configuration space, and how it starts.

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::answers::Answers;
use super::control::{self, Control};
use super::features::{self, has};
use super::metrics::Metrics;
use super::status::Status;
use super::transmit::Transmitter;
use super::{Config, Mac, Patch, stream, tap};
use crate::devices::limit::Limit;
use crate::error::{Context, Error, Result};
use crate::host::Host;
use crate::host::passt::Passt;
use crate::host::tap::Tap;
use crate::limiter;
use crate::metadata::stack::Stack;
use crate::metadata::store::Store;
use crate::metrics::Group;
use crate::snapshot::Snapshot;
use crate::virtio::pool::Unfilled;
use crate::virtio::{Io, Queue, VirtioDevice, Worker};

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// What an interface has if nobody says otherwise.
const MTU: u16 = 1500;
/// Where the low byte of `status` is in the device's configuration, and the bits there.
const STATUS_AT: u64 = 6;
const S_LINK_UP: u8 = 1;
const S_ANNOUNCE: u8 = 2;

/// The device.
pub struct Net {
    // Fixed
    name: String,
    mac: Mac,
    mtu: Option<u16>,
    pairs: u16,
    queue_sizes: Vec<u16>,
    // Host
    carrier: Carrier,
    status: Arc<Status>,
    rx_limit: Limit,
    tx_limit: Limit,
    metrics: Arc<Metrics>,
    /// It goes on in another place: its driver is to tell the network.
    moved: bool,
    /// The metadata service on it, with the guest's connections to it.
    metadata: Option<Arc<Mutex<Stack>>>,
    // Guest-visible
    control: Arc<Control>,
    /// Receive buffers that no frame has filled, of each pair.
    unfilled: Vec<tap::Home>,
}

/// What carries its frames.
enum Carrier {
    Taps { taps: Vec<Tap>, udp_segments: bool },
    Passt(stream::port::Home),
}

/// What the guest sees of it beyond its configuration and its queues.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct State {
    /// The address at power-on: one that nobody gave follows the microVM's name, which may be another one now.
    mac: [u8; 6],
    control: control::State,
    unfilled: Vec<Vec<Unfilled>>,
    rx_limit: limiter::State,
    tx_limit: limiter::State,
    /// What the metadata service tells, as JSON, if it answers here. Its connections are not saved: the guest is
    /// told that they have ended when it goes on with one.
    metadata: Option<String>,
}

impl Net {
    /// An interface over TAP queues, one for each pair.
    pub fn over_taps(config: &Config, mac: Mac, taps: Vec<Tap>) -> Self {
        let status = Arc::new(Status::of(&config.iface_id, &taps[0]));
        let udp_segments = taps[0].has_udp_segments();
        Self::new(config, mac, Carrier::Taps { taps, udp_segments }, status)
    }

    /// An interface over passt.
    pub fn over_passt(config: &Config, mac: Mac, passt: Passt) -> Self {
        let home = Arc::new(Mutex::new(Some(stream::port::Stream::new(passt))));
        Self::new(config, mac, Carrier::Passt(home), Arc::new(Status::up(&config.iface_id)))
    }

    fn new(config: &Config, mac: Mac, carrier: Carrier, status: Arc<Status>) -> Self {
        let pairs = config.queue_pairs();
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * usize::from(pairs)];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        Self {
            name: config.iface_id.clone(),
            mac,
            mtu: config.mtu,
            pairs,
            queue_sizes,
            carrier,
            status,
            rx_limit: Limit::new(config.rx_rate_limiter),
            tx_limit: Limit::new(config.tx_rate_limiter),
            metrics: Arc::default(),
            moved: false,
            metadata: None,
            control: Arc::new(Control::new(control::State::new(mac.0))),
            unfilled: (0..pairs).map(|_| tap::Home::default()).collect(),
        }
    }

    /// Has the metadata service answer on it.
    pub fn answer_by(&mut self, metadata: Stack) {
        self.metadata = Some(Arc::new(Mutex::new(metadata)));
    }

    /// The data that the guest can ask for on it.
    fn metadata_store(&self) -> Option<Arc<Store>> {
        let stack = self.metadata.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        Some(stack.service().store.clone())
    }

    fn taps(&self) -> &[Tap] {
        match &self.carrier {
            Carrier::Taps { taps, .. } => taps,
            Carrier::Passt(_) => &[],
        }
    }
}

impl Snapshot for Net {
    type State = State;
    const VERSION: u16 = 2;

    fn save(&self) -> Result<State> {
        let unfilled = self
            .unfilled
            .iter()
            .map(|unfilled| unfilled.lock().unwrap_or_else(PoisonError::into_inner).clone());
        Ok(State {
            mac: self.mac.0,
            control: self.control.state().clone(),
            unfilled: unfilled.collect(),
            rx_limit: self.rx_limit.save()?,
            tx_limit: self.tx_limit.save()?,
            metadata: self.metadata_store().and_then(|store| store.save()),
        })
    }

    fn restore(&mut self, state: State) -> Result<()> {
        let fits = state.unfilled.iter().all(|unfilled| unfilled.len() <= usize::from(QUEUE_SIZE));
        if !fits || state.unfilled.len() != self.unfilled.len() || !state.control.fits(self.pairs) {
            return Err(Error::config("the saved state is of an interface with other queue pairs"));
        }
        self.mac = Mac::new(state.mac).map_err(Error::config)?;
        self.rx_limit.restore(state.rx_limit).context("what it receives")?;
        self.tx_limit.restore(state.tx_limit).context("what it sends")?;
        if let Some(store) = self.metadata_store() {
            store.restore(state.metadata.as_deref())?;
        }
        self.control = Arc::new(Control::new(state.control));
        self.unfilled = state.unfilled.into_iter().map(|unfilled| Arc::new(Mutex::new(unfilled))).collect();
        self.moved = true;
        if let Carrier::Passt(_) = self.carrier {
            self.status = Arc::new(Status::pulled(&self.name)?);
        }
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        1
    }

    fn features(&self) -> u64 {
        let mtu = if self.mtu.is_some() { features::MTU } else { 0 };
        let several = if self.pairs > 1 { features::MQ } else { 0 };
        let carrier = match self.carrier {
            Carrier::Taps { udp_segments: true, .. } => features::TAP | features::TAP_UDP,
            Carrier::Taps { .. } => features::TAP,
            Carrier::Passt(_) => 0,
        };
        features::MAC | features::STATUS | features::MRG_RXBUF | features::CONTROL | mtu | several | carrier
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// A pair moves frames both ways in one turn, and interrupts once for them where both queues have one vector.
    /// Several pairs are for several CPUs, each of which wants the interrupts of its own queues.
    fn queue_vectors(&self) -> usize {
        if self.pairs == 1 { 1 } else { self.queue_sizes.len() }
    }

    /// struct virtio_net_config: mac, status, max_virtqueue_pairs, mtu.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.control.state().mac());
        // A driver that reads something else has not looked at the link.
        let looks = (offset..).take(data.len()).any(|at| at == STATUS_AT);
        config[6] = if looks && self.status.look() { S_LINK_UP } else { 0 };
        config[6] |= if self.control.is_announcing() { S_ANNOUNCE } else { 0 };
        config[8..10].copy_from_slice(&self.pairs.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        super::super::copy_config(&config, offset, data);
    }

    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        let (features, interrupts) = (io.features, io.interrupts.clone());
        // Without MQ the control queue follows the first pair (virtio 1.3, 5.1.2).
        let pairs = if has(features, features::MQ) { usize::from(self.pairs) } else { 1 };
        self.control.state().apply(self.taps(), features).context("set up the TAP")?;
        if !has(features, features::STATUS) {
            self.status.put_in();
        }
        let mut queues = io.queues.into_iter();
        let mut workers: Vec<Box<dyn Worker>> = Vec::new();
        for pair in 0..pairs {
            let (Some(rx), Some(tx)) = (queues.next(), queues.next()) else { break };
            let start = Start { memory: &io.memory, features, queues: [rx, tx], interrupts: &interrupts };
            workers.push(self.start_pair(pair, start)?);
        }
        // Who did not negotiate commands gets an answer as well: no.
        if let Some(queue) = queues.next() {
            let taps = self.taps().iter().map(Tap::try_clone).collect::<Result<Vec<_>>>()?;
            let control = self.control.clone();
            let running = control::Running::new(io.memory, queue, control, taps, features, self.pairs);
            workers.push(Box::new(running));
        }
        let is_moved = std::mem::take(&mut self.moved);
        if self.status.is_pulled() {
            // The driver can tell the network where it is when it has a link again.
            interrupts.configuration_changed();
        } else if is_moved && has(features, features::GUEST_ANNOUNCE) {
            self.control.set_announcing(true);
            interrupts.configuration_changed();
        }
        Ok(workers)
    }

    fn reset(&mut self) {
        let state = control::State::new(self.mac.0);
        // What stands in the way will do so at the next start, too, and is told there.
        let _ = state.apply(self.taps(), 0);
        *self.control.state() = state;
        self.control.set_announcing(false);
        self.moved = false;
        self.status.put_in();
        self.unfilled
            .iter()
            .for_each(|unfilled| unfilled.lock().unwrap_or_else(PoisonError::into_inner).clear());
        self.metadata.iter().for_each(|stack| stack.lock().unwrap_or_else(PoisonError::into_inner).reset());
    }

    fn metrics(&self) -> Option<Arc<dyn Group>> {
        Some(self.metrics.clone())
    }

    fn patch(&mut self, change: &dyn Any, _: &mut Host) -> Result<bool> {
        let patch: &Patch = change.downcast_ref().expect("a device is changed by a change of its kind");
        for (limit, patch) in
            [(&mut self.rx_limit, patch.rx_rate_limiter), (&mut self.tx_limit, patch.tx_rate_limiter)]
        {
            if let Some(patch) = patch {
                limit.patch(patch);
            }
        }
        Ok(false)
    }
}

/// What a pair starts with.
struct Start<'a> {
    memory: &'a crate::memory::Memory,
    features: u64,
    queues: [Queue; 2],
    interrupts: &'a Arc<crate::virtio::Interrupts>,
}

impl Net {
    fn answers(&self) -> Result<Option<Answers>> {
        self.metadata.as_ref().map(Answers::new).transpose()
    }

    fn start_pair(&self, pair: usize, start: Start<'_>) -> Result<Box<dyn Worker>> {
        match &self.carrier {
            Carrier::Taps { taps, .. } => self.over_tap(pair, taps[pair].try_clone()?, start),
            Carrier::Passt(home) => self.over_stream(home, start),
        }
    }

    fn over_tap(&self, pair: usize, tap: Tap, start: Start<'_>) -> Result<Box<dyn Worker>> {
        let Start { memory, features, queues: [rx, tx], interrupts } = start;
        let mergeable = has(features, features::MRG_RXBUF);
        let (rx_limit, tx_limit) = (self.rx_limit.clone(), self.tx_limit.clone());
        let home = self.unfilled[pair].clone();
        let unfilled = std::mem::take(&mut *home.lock().unwrap_or_else(PoisonError::into_inner));
        let [rx_timer, tx_timer] = [&rx_limit, &tx_limit].map(Limit::timer);
        let metrics = &self.metrics;
        let sizes = (features & features::GUEST_SEGMENTS != 0, self.mtu.unwrap_or(MTU).max(MTU));
        let receiver = tap::receive::Receiver::new(
            memory.clone(),
            rx,
            mergeable,
            sizes,
            &unfilled,
            rx_limit,
            metrics.clone(),
        )?;
        let batch = tap::outgoing::Outgoing::new(memory.clone());
        Ok(Box::new(tap::Running {
            memory: memory.clone(),
            receiver,
            transmitter: Transmitter::new(tx, batch, self.answers()?, tx_limit, metrics.clone()),
            port: tap::port::Port::new(tap),
            tap_events: None,
            is_answered: true,
            link: (pair == 0).then(|| (self.status.clone(), interrupts.clone())),
            home,
            metrics: metrics.clone(),
            rx_timer: rx_timer?,
            tx_timer: tx_timer?,
        }))
    }

    fn over_stream(&self, home: &stream::port::Home, start: Start<'_>) -> Result<Box<dyn Worker>> {
        let Start { memory, features, queues: [rx, tx], interrupts } = start;
        let mergeable = has(features, features::MRG_RXBUF);
        let (rx_limit, tx_limit) = (self.rx_limit.clone(), self.tx_limit.clone());
        let (rx_timer, tx_timer) = (rx_limit.timer()?, tx_limit.timer()?);
        let metrics = &self.metrics;
        let link = (self.status.clone(), interrupts.clone());
        let port = stream::port::Port::take(home, self.name.clone(), link)?;
        let cable = self.status.is_pulled().then(|| {
            let control = has(features, features::GUEST_ANNOUNCE).then(|| self.control.clone());
            stream::cable::Cable::new(self.status.clone(), interrupts.clone(), control)
        });
        let batch = stream::outgoing::Outgoing::new(memory.clone());
        Ok(Box::new(stream::Running {
            memory: memory.clone(),
            receiver: stream::receive::Receiver::new(
                memory.clone(),
                rx,
                mergeable,
                rx_limit,
                metrics.clone(),
            ),
            transmitter: Transmitter::new(tx, batch, self.answers()?, tx_limit, metrics.clone()),
            port,
            home: home.clone(),
            cable: cable.transpose()?,
            metrics: metrics.clone(),
            rx_timer,
            tx_timer,
        }))
    }
}
