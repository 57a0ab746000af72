//! The half of a device whose work another process does in guest memory: the driver's kicks go there, and the driver is
//! interrupted from there. What is left here is to start and stop it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use virtio_bindings::virtio_ring::{vring_desc, vring_used_elem};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use crate::error::{Error, Result};
use crate::host::vhost_user::{Backend, Piece, REGIONS_MAX, Ring, STOP_TIME};
use crate::log;
use crate::memory::Regions;
use crate::poll::Interest;
use crate::snapshot::Snapshot;
use crate::virtio::{F_EVENT_IDX, F_INDIRECT_DESC, Interrupts, Io, Queue, Registrar, Worker};

/// Features of rings that a guest is offered if the backend has them.
pub const RING_FEATURES: u64 = F_EVENT_IDX | F_INDIRECT_DESC;

/// The only token of a worker: its backend has something to say.
const BACKEND: u32 = 0;

/// A backend, and what it was told of the guest.
pub struct Remote {
    /// The device's name in errors.
    whose: String,
    /// Shared with the worker: only one of both has anything to do at a time.
    backend: Arc<Mutex<Backend>>,
    /// Features that the guest was offered; a backend that comes later must have them, too.
    features: u64,
    /// The driver has had it started since the last reset.
    has_started: bool,
    /// Another backend came after that. Nobody knows which requests the one before has done.
    is_other: bool,
}

impl Remote {
    /// A device of this backend, which offers the guest those of its features that are `allowed`.
    pub fn new(whose: String, backend: Backend, allowed: u64) -> Self {
        let features = backend.features() & allowed;
        let backend = Arc::new(Mutex::new(backend));
        Self { whose, backend, features, has_started: false, is_other: false }
    }

    /// The features of the backend that the guest is offered.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The backend, for as long as the device needs it.
    pub fn backend(&self) -> MutexGuard<'_, Backend> {
        lock(&self.backend)
    }

    /// Reads the configuration again, of another backend, which is `met` at the same place, if the one that was there is
    /// lost.
    ///
    /// # Errors
    /// Nobody is met, or the backend cannot do what the guest was told.
    pub fn read_again(&mut self, met: impl FnOnce() -> Result<Backend>) -> Result<()> {
        // One that has gone meanwhile is lost from now on.
        let mut backend = lock(&self.backend);
        if backend.look().is_ok() {
            return backend.read_config();
        }
        let met = met()?;
        if self.features & !met.features() != 0 {
            return Err(Error::config(
                "the vhost-user backend that is there now cannot do what the guest was told: start one that can",
            ));
        }
        *backend = met;
        self.is_other = self.has_started;
        Ok(())
    }

    /// Has the backend work on the queues that the driver has set up.
    ///
    /// # Errors
    /// The memory or the rings are none that a backend can work in, or the backend is lost, or it is another one.
    pub fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>> {
        self.has_started = true;
        if self.is_other {
            return Err(Error::host(
                "another vhost-user backend is there, and nobody knows which requests the one before has done",
            ));
        }
        let memory = io.memory.memory();
        let pieces = self.pieces(&memory)?;
        let ready = io.queues.iter().filter(|queue| queue.is_ready());
        let rings = ready.map(|queue| ring(queue, &memory, &io.interrupts)).collect::<Result<Vec<_>>>()?;
        let mut backend = lock(&self.backend);
        // A driver may have accepted what is offered without the backend.
        let features = io.features & backend.features();
        backend.start(features, &pieces, &rings)?;
        drop(backend);
        let (whose, backend) = (self.whose.clone(), self.backend.clone());
        Ok(vec![Box::new(Running { whose, backend, queues: io.queues })])
    }

    /// The driver has reset the device.
    pub fn reset(&mut self) {
        (self.has_started, self.is_other) = (false, false);
    }

    /// Guest memory as a backend maps it.
    fn pieces<'m>(&self, memory: &'m Regions) -> Result<Vec<Piece<'m>>> {
        if memory.iter().count() > REGIONS_MAX {
            let most = format!(
                "guest memory is in more than {REGIONS_MAX} pieces, the most that a vhost-user backend is told"
            );
            return Err(Error::host(most));
        }
        let piece = |region| {
            Piece::of(region).ok_or_else(|| {
                let whose = &self.whose;
                Error::config(format!(
                    "guest memory is not shared with anybody: name the {whose} before the guest starts"
                ))
            })
        };
        memory.iter().map(piece).collect()
    }
}

/// A snapshot would not have what the backend has of the device.
impl Snapshot for Remote {
    type State = ();

    fn save(&self) -> Result<()> {
        let whose = &self.whose;
        Err(Error::config(format!("its memory is shared with the vhost-user backend of {whose}")))
    }

    fn restore(&mut self, (): ()) -> Result<()> {
        Err(Error::config("the device of a vhost-user backend cannot be restored"))
    }
}

fn lock(backend: &Mutex<Backend>) -> MutexGuard<'_, Backend> {
    backend.lock().unwrap_or_else(PoisonError::into_inner)
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
