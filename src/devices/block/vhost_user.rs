//! A disk whose work another process does in guest memory: the driver's kicks go there, and the driver is interrupted from
//! there. What is left here is the configuration, and to start and stop it.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use virtio_bindings::virtio_ring::{vring_desc, vring_used_elem};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use super::{
    Config, F_BLK_SIZE, F_DISCARD, F_FLUSH, F_MQ, F_RO, F_SEG_MAX, F_WRITE_ZEROES, Patch, QUEUE_SIZE,
};
use crate::devices::block::CacheType;
use crate::devices::kind::DeviceConfig;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::host::vhost_user::{Backend, Piece, REGIONS_MAX, Ring, STOP_TIME};
use crate::log;
use crate::memory::Regions;
use crate::metrics::{Counter, Group};
use crate::poll::Interest;
use crate::snapshot::Snapshot;
use crate::virtio::{F_EVENT_IDX, F_INDIRECT_DESC, Interrupts, Io, Queue, Registrar, VirtioDevice, Worker};

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

/// The only token of a worker: its backend has something to say.
const BACKEND: u32 = 0;

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
pub struct Remote {
    config: Config,
    /// Shared with the worker: only one of both has anything to do at a time.
    backend: Arc<Mutex<Backend>>,
    /// Features that the guest was offered; a backend that comes later must have them, too.
    features: u64,
    /// The driver has had it started since the last reset.
    has_started: bool,
    /// Another backend came after that. Nobody knows which requests the one before has done.
    is_other: bool,
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
        if u64::from(self.num_queues) <= backend.queues() {
            return Ok(());
        }
        let (wanted, there) = (self.num_queues, backend.queues());
        Err(Error::config(format!(
            "`num_queues` is {wanted}, and the vhost-user backend has {there} at most"
        )))
    }
}

impl Remote {
    /// The disk of the backend that `config` names.
    pub fn open(config: &Config, host: &mut Host) -> Result<Self> {
        let backend = Self::meet(config, host)?;
        let allowed = match config.cache_type {
            CacheType::Writeback => PASSED_ON,
            CacheType::Unsafe => PASSED_ON & !F_FLUSH,
        };
        let rings = F_EVENT_IDX | F_INDIRECT_DESC;
        let several = if config.num_queues > 1 { F_MQ } else { 0 };
        Ok(Self {
            features: backend.features() & (allowed | rings | several),
            has_started: false,
            is_other: false,
            space: space(config, &backend),
            backend: Arc::new(Mutex::new(backend)),
            queue_sizes: vec![QUEUE_SIZE; config.num_queues.into()],
            metrics: Arc::default(),
            config: config.clone(),
        })
    }

    fn meet(config: &Config, host: &mut Host) -> Result<Backend> {
        let path = config.socket.as_deref().expect("asked only of a disk that has one");
        let backend = host.backend(&config.whose(), path, CONFIG_SIZE)?;
        config.check_backend(&backend).map(|()| backend)
    }

    /// Reads the configuration again, of another backend at the same place if the one that was there is lost.
    fn read_again(&mut self, patch: &Patch, host: &mut Host) -> Result<()> {
        let new = self.config.patched(patch)?;
        // One that has gone meanwhile is lost from now on.
        let mut backend = lock(&self.backend);
        if backend.look().is_ok() {
            backend.read_config()?;
        } else {
            let met = Self::meet(&new, host)?;
            if self.features & !met.features() != 0 {
                return Err(Error::config(
                    "the vhost-user backend that is there now cannot do what the guest was told: start one that can",
                ));
            }
            *backend = met;
            self.is_other = self.has_started;
        }
        self.space = space(&new, &backend);
        drop(backend);
        self.config = new;
        Ok(())
    }

    /// Has the backend work on the queues that the driver has set up.
    fn begin(&self, io: &Io) -> Result<()> {
        if self.is_other {
            return Err(Error::host(
                "another vhost-user backend is there, and nobody knows which requests the one before has done",
            ));
        }
        let memory = io.memory.memory();
        let pieces = pieces(&memory)?;
        let ready = io.queues.iter().filter(|queue| queue.is_ready());
        let rings = ready.map(|queue| ring(queue, &memory, &io.interrupts)).collect::<Result<Vec<_>>>()?;
        lock(&self.backend).start(io.features, &pieces, &rings)
    }
}

/// The configuration as a guest reads it: its queues are as many as the user has said.
fn space(config: &Config, backend: &Backend) -> Vec<u8> {
    let mut space = backend.config().to_vec();
    space[NUM_QUEUES..][..2].copy_from_slice(&config.num_queues.to_le_bytes());
    space
}

fn lock(backend: &Mutex<Backend>) -> MutexGuard<'_, Backend> {
    backend.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Guest memory as a backend maps it.
fn pieces(memory: &Regions) -> Result<Vec<Piece<'_>>> {
    if memory.iter().count() > REGIONS_MAX {
        let most = format!(
            "guest memory is in more than {REGIONS_MAX} pieces, the most that a vhost-user backend is told"
        );
        return Err(Error::host(most));
    }
    let piece = |region| {
        Piece::of(region).ok_or_else(|| {
            Error::config("guest memory is not shared with anybody: name the disk before the guest starts")
        })
    };
    memory.iter().map(piece).collect()
}

/// A queue as the backend is told of it. A ring that goes over the end of its region may go anywhere in the backend.
fn ring<'q>(queue: &'q Queue, memory: &Regions, interrupts: &'q Interrupts) -> Result<Ring<'q>> {
    let size = usize::from(queue.size());
    // The rings have two fields of 16 bits before, and one after (virtio 1.2, 2.7.6 and 2.7.8).
    let lengths = [
        size_of::<vring_desc>() * size,
        6 + size_of::<u16>() * size,
        6 + size_of::<vring_used_elem>() * size,
    ];
    let places = queue.places();
    if places.iter().zip(lengths).any(|(place, length)| memory.get_slice(*place, length).is_err()) {
        let index = queue.index();
        return Err(Error::guest(format!(
            "the driver set up queue {index} with a ring that is not in one piece"
        )));
    }
    Ok(Ring {
        index: queue.index(),
        size: queue.size(),
        next: queue.position().0,
        places,
        kick: queue.waker(),
        call: interrupts.share(queue.index()).map(|event| event as _),
    })
}

/// A snapshot would not have what the backend has of the disk.
impl Snapshot for Remote {
    type State = ();

    fn save(&self) -> Result<()> {
        Err(Error::config(format!(
            "its memory is shared with the vhost-user backend of {}",
            self.config.whose()
        )))
    }

    fn restore(&mut self, (): ()) -> Result<()> {
        Err(Error::config("the disk of a vhost-user backend cannot be restored"))
    }
}

impl VirtioDevice for Remote {
    fn device_type(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        self.features & !(F_EVENT_IDX | F_INDIRECT_DESC)
    }

    fn ring_features(&self) -> u64 {
        self.features & (F_EVENT_IDX | F_INDIRECT_DESC)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::devices::copy_config(&self.space, offset, data);
    }

    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        self.has_started = true;
        self.begin(&io)?;
        let whose = self.config.whose();
        Ok(vec![Box::new(Running { whose, backend: self.backend.clone(), queues: io.queues })])
    }

    fn reset(&mut self) {
        (self.has_started, self.is_other) = (false, false);
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

/// The running half: it has the queues that the backend works on, and waits for the backend's end.
struct Running {
    whose: String,
    backend: Arc<Mutex<Backend>>,
    queues: Vec<Queue>,
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        registrar.add(&*lock(&self.backend), Interest::IN | Interest::EDGE_TRIGGERED, BACKEND)
    }

    fn handle(&mut self, _: u32) -> Result<()> {
        lock(&self.backend).look()
    }

    fn stop(mut self: Box<Self>) -> Vec<Queue> {
        let (mut backend, until) = (lock(&self.backend), Instant::now() + STOP_TIME);
        for queue in self.queues.iter_mut().filter(|queue| queue.is_ready()) {
            match backend.stop(queue.index(), until) {
                Ok(next) => queue.set_position(next),
                Err(error) => {
                    log::error(format_args!("{}: stop queue {}: {error}", self.whose, queue.index()));
                    break;
                }
            }
        }
        drop(backend);
        self.queues
    }
}
