//! The half of a device whose work another process does in guest memory: the driver's kicks go there, and the driver is
//! interrupted from there. What is left here is to start and stop it, and to have another process go on where one has
//! ended, if that has noted what it had in flight.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::{vring_desc, vring_used_elem};
use vm_memory::{Address, Bytes, GuestAddressSpace, GuestMemoryBackend};

use crate::errands::Pending;
use crate::error::{Context, Error, Result};
use crate::history::{self, Event};
use crate::host::vhost_user::{Backend, Piece, REGIONS_MAX, Ring, STOP_TIME};
use crate::host::{Host, socket};
use crate::log;
use crate::memory::Regions;
use crate::poll::{self, Interest, Timer};
use crate::snapshot::Snapshot;
use crate::virtio::{Desk, F_EVENT_IDX, F_INDIRECT_DESC, Interrupts, Io, Queue, Registrar, Watched, Worker};

/// Features of rings that a guest is offered if the backend has them.
const RING_FEATURES: u64 = F_EVENT_IDX | F_INDIRECT_DESC;

/// A backend that is lost is looked for so often.
const LOOK_TIME: Duration = Duration::from_secs(1);

/// Tokens of a worker: its backend has something to say; it is time to look for another; `main` has looked.
const BACKEND: u32 = 0;
const LOOK: u32 = 1;
const ANSWER: u32 = 2;

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
    /// A device of this backend, which offers the guest those of its device's features that are `allowed`, and what it has of
    /// rings.
    pub fn new(whose: String, backend: Backend, allowed: u64) -> Self {
        let features = backend.features() & (allowed | RING_FEATURES);
        let backend = Arc::new(Mutex::new(backend));
        Self { whose, backend, features, has_started: false, is_other: false }
    }

    /// The features of the device that the guest is offered.
    pub fn device_features(&self) -> u64 {
        self.features & !RING_FEATURES
    }

    /// The features of its rings that the guest is offered.
    pub fn ring_features(&self) -> u64 {
        self.features & RING_FEATURES
    }

    /// The backend, for as long as the device needs it.
    pub fn backend(&self) -> MutexGuard<'_, Backend> {
        lock(&self.backend)
    }

    /// Reads the configuration again, of another backend, which is `met` at the same place, if the one that was there is
    /// lost.
    ///
    /// # Errors
    /// No backend is met, or the one that is cannot do what the guest was told.
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
        let mut met = met;
        self.is_other = self.has_started && !met.succeed(&mut backend);
        *backend = met;
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
        let mut running = Running {
            whose: self.whose.clone(),
            backend: self.backend.clone(),
            needed: self.features,
            io,
            desk: None,
            watched: None,
            timer: None,
            pending: None,
        };
        // One that was lost while the device stood still is looked for as soon as it runs.
        if !running.waits() {
            running.begin()?;
        }
        Ok(vec![Box::new(running)])
    }

    /// The driver has reset the device.
    pub fn reset(&mut self) {
        (self.has_started, self.is_other) = (false, false);
        let mut backend = lock(&self.backend);
        if backend.is_lost() {
            backend.forget_notes();
        }
    }
}

/// Guest memory as a backend maps it; `whose` is the device's name in errors.
fn pieces<'m>(whose: &str, memory: &'m Regions) -> Result<Vec<Piece<'m>>> {
    if memory.iter().count() > REGIONS_MAX {
        let most = format!(
            "guest memory is in more than {REGIONS_MAX} pieces, the most that a vhost-user backend is told"
        );
        return Err(Error::host(most));
    }
    let piece = |region| {
        Piece::of(region).ok_or_else(|| {
            Error::config(format!(
                "guest memory is not shared with anybody: name the {whose} before the guest starts"
            ))
        })
    };
    memory.iter().map(piece).collect()
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

/// The running half: it has the queues that the backend works on, and waits for the backend's end. One that has noted what
/// it had in flight is waited for, and the driver hears nothing of that.
struct Running {
    whose: String,
    backend: Arc<Mutex<Backend>>,
    /// The features that a backend which comes later must have.
    needed: u64,
    io: Io,
    desk: Option<Desk>,
    watched: Option<Watched<Descriptor>>,
    /// There while a lost backend is looked for.
    timer: Option<Watched<Timer>>,
    /// There while `main` looks.
    pending: Option<Pending>,
}

/// The number of the backend's descriptor, which leaves the loop before it is closed.
struct Descriptor(RawFd);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

impl Running {
    /// Whether the backend is lost, and another one is waited for.
    fn waits(&self) -> bool {
        let backend = lock(&self.backend);
        backend.is_lost() && backend.has_notes()
    }

    /// Has the backend work on the queues that the driver has set up.
    fn begin(&mut self) -> Result<()> {
        let (memory, mut backend) = (self.io.memory.memory(), lock(&self.backend));
        let pieces = pieces(&self.whose, &memory)?;
        let ready = self.io.queues.iter().filter(|queue| queue.is_ready());
        let rings =
            ready.map(|queue| ring(queue, &memory, &self.io.interrupts)).collect::<Result<Vec<_>>>()?;
        // A driver may have accepted what is offered without the backend.
        let features = self.io.features & backend.features();
        backend.start(features, &pieces, &rings)
    }

    fn watch(&mut self, desk: &Desk) -> Result<()> {
        let backend = Descriptor(lock(&self.backend).as_raw_fd());
        self.watched = Some(desk.watch(backend, Interest::IN | Interest::EDGE_TRIGGERED, BACKEND)?);
        Ok(())
    }

    /// Looks for a backend at the place of the one that is lost, from now on.
    fn look_for_another(&mut self, desk: &Desk) -> Result<()> {
        self.watched = None;
        let mut timer = poll::timer(format!("wait for the backend of {}", self.whose))?;
        timer.reset(LOOK_TIME, Some(LOOK_TIME)).context("wait for a backend")?;
        self.timer = Some(desk.watch(timer, Interest::IN | Interest::EDGE_TRIGGERED, LOOK)?);
        Ok(())
    }

    /// The backend is lost: waits for another one that can go on, or else the driver must reset the device.
    fn lose(&mut self, reason: Error) -> Result<()> {
        let Some(desk) = self.desk.clone().filter(|_| self.waits()) else { return Err(reason) };
        log::error(format_args!("{}: {reason}: it waits for another one there", self.whose));
        let (device, reason) = (self.whose.clone(), reason.to_string());
        history::tell(|| Event::DeviceError { device, reason, needs_reset: false });
        self.note_positions();
        self.look_for_another(&desk)
    }

    /// Has each queue be where the backend that is lost has left it, as far as the driver has been told.
    fn note_positions(&mut self) {
        let memory = self.io.memory.memory();
        for queue in self.io.queues.iter_mut().filter(|queue| queue.is_ready()) {
            // The index follows 16 bits of flags (virtio 1.2, 2.7.8).
            let used = memory.read_obj::<u16>(queue.places()[2].unchecked_add(2));
            queue.set_position(used.map_or(0, u16::from_le));
        }
    }

    /// Has the backend that `main` has found go on where the last one was.
    fn go_on(&mut self, stream: UnixStream) -> Result<()> {
        lock(&self.backend).meet_again(stream, self.needed)?;
        self.note_positions();
        self.begin()?;
        // The last one may have taken a kick, and ended before it told of what was done.
        for queue in self.io.queues.iter().filter(|queue| queue.is_ready()) {
            queue.kick_again();
            if let Some(call) = self.io.interrupts.used_buffer(queue.index()) {
                let _ = call.write(1);
            }
        }
        Ok(())
    }
}

impl Worker for Running {
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()> {
        let desk = registrar.desk().clone();
        self.desk = Some(desk.clone());
        if self.waits() { self.look_for_another(&desk) } else { self.watch(&desk) }
    }

    fn handle(&mut self, token: u32) -> Result<()> {
        let Some(desk) = self.desk.clone() else { return Ok(()) };
        match token {
            LOOK if self.waits() && self.pending.is_none() => {
                let path = lock(&self.backend).path().to_owned();
                let look = move |_: &mut Host| Ok(socket::connect(&path)?.into());
                // Where `main` has too much to do, the next time is soon enough.
                self.pending = desk.ask(ANSWER, look).ok();
                Ok(())
            }
            ANSWER => {
                let Some(Ok(stream)) = self.pending.take().and_then(|mut pending| pending.take()) else {
                    return Ok(());
                };
                match self.go_on(UnixStream::from(stream)) {
                    Ok(()) => {
                        self.timer = None;
                        log::guest_line(format_args!(
                            "{}: a backend is there again, and goes on",
                            self.whose
                        ));
                        self.watch(&desk)
                    }
                    Err(_) if self.waits() => Ok(()),
                    Err(error) => Err(error),
                }
            }
            BACKEND if self.watched.is_some() => {
                let looked = lock(&self.backend).look();
                looked.or_else(|error| self.lose(error))
            }
            _ => Ok(()),
        }
    }

    fn stop(mut self: Box<Self>) -> Vec<Queue> {
        (self.watched, self.timer, self.pending) = (None, None, None);
        if self.waits() {
            self.note_positions();
            return self.io.queues;
        }
        let (mut backend, until) = (lock(&self.backend), Instant::now() + STOP_TIME);
        for queue in self.io.queues.iter_mut().filter(|queue| queue.is_ready()) {
            match backend.stop(queue.index(), until) {
                Ok(next) => queue.set_position(next),
                Err(error) => {
                    log::error(format_args!("{}: stop queue {}: {error}", self.whose, queue.index()));
                    break;
                }
            }
        }
        let was_lost = backend.is_lost();
        drop(backend);
        if was_lost && self.waits() {
            self.note_positions();
        }
        self.io.queues
    }
}
