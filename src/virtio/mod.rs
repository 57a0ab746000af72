//! Virtio (virtio 1.2): what a device promises its transport, and what it works with.

pub mod buffers;
pub mod chain;
pub mod mmio;
pub mod pci;
pub mod pool;
pub mod queue;
pub mod transport;
pub mod workers;

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::host::Host;
use crate::host::line::UserLine;
use crate::memory::registers::RegisterPage;
use crate::memory::slots::Slots;
use crate::memory::window::View;
use crate::memory::{Memory, Range};
use crate::metrics::Group;
use crate::poll::{EventFd, Interest};
use crate::snapshot::{SaveState, stateless};
use crate::uring::Uring;
use crate::vm::posted::Posted;

pub use chain::Chain;
pub use queue::{Queue, Share};
pub use workers::{Desk, RING, Registrar, Switch, Watched};

/// A device, without its queues: what it is, and how it starts.
///
/// Invariant: a device that is not started touches neither guest memory nor interrupts. Its state, as
/// `Snapshot` has it, is what the guest can see beyond its configuration and its queues.
pub trait VirtioDevice: SaveState + Send {
    /// Its device ID (virtio 1.2, 5).
    fn device_type(&self) -> u32;
    /// Behind PCI, it offers so many vectors for its queues: one for each, or fewer, which the driver's queues
    /// share. Queues that the device mostly works at in the same turn are better off with one.
    fn queue_vectors(&self) -> usize {
        self.queue_sizes().len()
    }
    /// The feature bits of its own device type; the transport adds those of rings and transports.
    fn features(&self) -> u64 {
        0
    }
    /// The feature bits of rings that it can do beside VERSION_1: those that `virtio-queue` can do, if that works at them.
    fn ring_features(&self) -> u64 {
        F_EVENT_IDX | F_INDIRECT_DESC
    }
    /// The largest size of each of its queues: powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// The host memory that the guest is to find at addresses of its own beside its RAM, whether the device runs or not.
    fn view(&self) -> Option<View> {
        None
    }
    /// The machine has given what the device shows, or the memory that the device plugs, these addresses of the guest.
    fn set_window(&mut self, _range: Range) {}
    /// By this the device gives the guest memory there and takes it away, if its configuration has room for such.
    fn set_slots(&mut self, _slots: Arc<dyn Slots>) {}
    /// Whether the configuration changes only when its driver writes to it, and when it is restored, reset, or changed by
    /// the user: what the driver reads of it can then be kept in memory that the driver reads.
    fn has_steady_configuration(&self) -> bool {
        false
    }
    /// The driver reads `data.len()` bytes of device configuration at `offset`. What is beyond its
    /// end is left as it is: zeros.
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
    /// The driver writes device configuration; what cannot be written is ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// The driver is ready: the device takes its queues and gives back its running half, one worker
    /// per group of queues that can run on its own. The caller promises that no worker of an earlier
    /// start is left.
    fn start(&mut self, io: Io) -> Result<Vec<Box<dyn Worker>>>;
    /// The driver reset the device; no worker is left. State that the driver set goes back to how it
    /// was at power-on.
    fn reset(&mut self) {}
    /// The machine has ended, and the device goes into another one, whose guest begins: the device is as it was at power-on,
    /// with all that it has of the host. No worker is left. What the guest has had of it is gone, also where a reset by
    /// the driver leaves that.
    fn power_on(&mut self) {
        self.reset();
    }
    /// The user changes what can be changed of a device in use; `change` is of the type that the device's
    /// kind has for the body of the API's PATCH. The caller promises that no worker is left; they start again
    /// afterwards, on the same queues. Returns whether the driver must look at the configuration again. A
    /// change that is refused changes nothing.
    fn patch(&mut self, _change: &dyn Any, _host: &mut Host) -> Result<bool> {
        Err(Error::config("nothing of it can be changed once the guest runs"))
    }
    /// Whether its configuration is other than when it was saved, of which its driver is to hear: asked once, when a device
    /// that was restored goes on.
    fn take_news(&mut self) -> bool {
        false
    }
    /// The answer to a client of the API that asks about the device beyond its configuration. `what` is one of the
    /// places below the device's path that its kind lists as told.
    fn tell(&self, _what: &str) -> Result<Value> {
        Err(Error::config("there is nothing to tell of it"))
    }
    /// The line to whoever is at the guest's console, if the device is that.
    fn line(&self) -> Option<Arc<UserLine>> {
        None
    }
    /// What it counts, shared with its workers; it goes on through resets.
    fn metrics(&self) -> Option<Arc<dyn Group>> {
        None
    }
}

/// In the place of a device that has gone into another machine: one without queues, of the type that no driver is for
/// (virtio 1.2, 5).
struct Gone;

stateless!(Gone);

impl VirtioDevice for Gone {
    fn device_type(&self) -> u32 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &[]
    }
    fn start(&mut self, _: Io) -> Result<Vec<Box<dyn Worker>>> {
        Ok(Vec::new())
    }
}

/// What a running device works with.
pub struct Io {
    /// Guest memory.
    pub memory: Memory,
    /// The features that the driver accepted.
    pub features: u64,
    /// Its queues, in the order of `queue_sizes`. One that the driver did not set up is never kicked.
    pub queues: Vec<Queue>,
    /// By which it tells the driver that its configuration has changed.
    pub interrupts: Arc<Interrupts>,
}

/// The running half of a device: owns its queues and descriptors, lives on one event loop.
pub trait Worker: Send {
    /// Tells the loop what to wait for: kicks, a tap, a timer. Every queue that is ready has been kicked:
    /// buffers may wait already. For descriptors that come and go later, and for what only `main` may do, the
    /// worker keeps the registrar's [`Desk`].
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()>;
    /// Something registered with `token` is ready. An error is the driver's fault: the device stops
    /// and asks to be reset.
    fn handle(&mut self, token: u32) -> Result<()>;
    /// The same, for a worker that asks what its descriptor is ready for: data, room, or an end.
    fn handle_ready(&mut self, token: u32, _ready: Interest) -> Result<()> {
        self.handle(token)
    }
    /// A ring of its own that it queues operations in and takes them from: the loop hands them over, and
    /// calls `handle` with [`RING`] when some are complete.
    fn ring(&mut self) -> Option<&mut Uring> {
        None
    }
    /// Finishes what is in flight, or gives it back to its queue, tells the driver, and gives the
    /// queues back. Nothing it waits for is on the loop any more. What a device needs of the guest to
    /// finish must not be waited for: the guest may be paused, and a vCPU that resets the device waits for this.
    fn stop(self: Box<Self>) -> Vec<Queue>;
}

/// Feature bits of rings (virtio 1.2, 6).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// Feature bit of rings: both sides say when they want to know of buffers.
pub const F_EVENT_IDX: u64 = 1 << 29;

/// Bits of InterruptStatus and of the ISR (virtio 1.2, 4.2.2 and 4.1.4.5).
const USED_BUFFER: u32 = 1;
const CONFIGURATION_CHANGE: u32 = 2;
/// No vector is given: that interrupt is not sent (4.1.5.1.2).
const NO_VECTOR: u16 = 0xffff;

/// What the guest can see of its interrupts.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
struct InterruptState {
    status: u32,
    /// For configuration changes, then the queues' ones; empty with a line.
    vectors: Vec<u16>,
}

/// How a device interrupts its driver: by one line and a register that says what for (MMIO), or by vectors
/// that the driver deals out to its queues and to changes of the configuration (MSI-X).
pub struct Interrupts {
    words: Words,
    /// Acknowledgements of the driver that the status does not show yet.
    acknowledged: Option<Posted>,
    /// The line, or the events of all vectors.
    events: Vec<Arc<EventFd>>,
    /// With vectors: the one for configuration changes, and the queues' ones.
    vectors: Option<(AtomicU16, Vec<AtomicU16>)>,
    /// Another process interrupts the driver of used buffers, and cannot note that in the status.
    is_shared: AtomicBool,
}

/// The registers that change while a device runs, without the transport's lock.
enum Words {
    /// The status, and the generation of the configuration.
    Own(AtomicU32, AtomicU32),
    /// Both lie in a page that the driver reads.
    Shown(Arc<RegisterPage>),
}

impl Interrupts {
    /// A line that writes to `event`; of the driver's writes to InterruptACK, those that are posted are
    /// found in `acknowledged`. A driver that reads the device's registers from memory finds them in the page `shown`.
    pub fn line(
        event: Arc<EventFd>,
        acknowledged: Option<Posted>,
        shown: Option<Arc<RegisterPage>>,
    ) -> Arc<Self> {
        let words = shown.map_or_else(|| Words::Own(0.into(), 0.into()), Words::Shown);
        Arc::new(Self { words, acknowledged, events: vec![event], vectors: None, is_shared: false.into() })
    }

    /// A vector per event, for a device with so many queues, to which the driver deals them out.
    pub fn vectors(events: Vec<Arc<EventFd>>, queues: usize) -> Arc<Self> {
        let queues = (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect();
        let vectors = Some((AtomicU16::new(NO_VECTOR), queues));
        let words = Words::Own(0.into(), 0.into());
        Arc::new(Self { words, acknowledged: None, events, vectors, is_shared: false.into() })
    }

    /// The page in which the driver finds the device's registers, if it reads them from memory.
    pub(super) fn shown(&self) -> Option<&RegisterPage> {
        match &self.words {
            Words::Own(..) => None,
            Words::Shown(page) => Some(page),
        }
    }

    /// The reasons of the last interrupts, but for what is acknowledged and not settled.
    fn reasons(&self) -> &AtomicU32 {
        match &self.words {
            Words::Own(reasons, _) => reasons,
            Words::Shown(page) => page.word(mmio::INTERRUPT_STATUS),
        }
    }

    /// One more whenever the configuration changes: who read half of it before reads again (2.5.3).
    fn generation(&self) -> &AtomicU32 {
        match &self.words {
            Words::Own(_, generation) => generation,
            Words::Shown(page) => page.word(mmio::CONFIG_GENERATION),
        }
    }

    /// The event by which another process tells the driver from now on, until the device is reset, that buffers of a queue
    /// were used; None: the driver has given the queue no vector. On a line, the driver then always hears that some may
    /// be used: it looks at its queues, and finds nothing, where only the configuration has changed.
    pub fn share(&self, queue: usize) -> Option<&EventFd> {
        self.is_shared.store(true, Ordering::SeqCst);
        let index = self.vectors.as_ref().map_or(0, |(_, queues)| queues[queue].load(Ordering::SeqCst));
        self.events.get(usize::from(index)).map(|event| &**event)
    }

    /// Notes what to tell the driver; a write to the event, if there is one, tells it.
    fn raise(&self, bit: u32, vector: impl FnOnce(&(AtomicU16, Vec<AtomicU16>)) -> u16) -> Option<&EventFd> {
        // Acknowledgements that the driver wrote before are taken first: after the bit is set, they would clear it.
        self.settle();
        self.reasons().fetch_or(bit, Ordering::SeqCst);
        let index = self.vectors.as_ref().map_or(0, vector);
        self.events.get(usize::from(index)).map(|event| &**event)
    }

    /// Buffers of a queue were used: a write to the event, if there is one, tells the driver.
    pub fn used_buffer(&self, queue: usize) -> Option<&EventFd> {
        self.raise(USED_BUFFER, |(_, queues)| queues[queue].load(Ordering::SeqCst))
    }

    /// Whether one interrupt tells of both these queues.
    pub fn are_one(&self, queue: usize, other: usize) -> bool {
        self.vectors.as_ref().is_none_or(|(_, queues)| {
            queues[queue].load(Ordering::SeqCst) == queues[other].load(Ordering::SeqCst)
        })
    }

    /// The device's configuration has changed: tells the driver, if it runs, to look at it.
    pub fn configuration_changed(&self) {
        self.generation().fetch_add(1, Ordering::SeqCst);
        self.configuration_change();
    }

    /// Tells the driver to look at the device's configuration or status.
    fn configuration_change(&self) {
        if let Some(event) = self.raise(CONFIGURATION_CHANGE, |(config, _)| config.load(Ordering::SeqCst)) {
            // A counter that is full has raised it already.
            let _ = event.write(1);
        }
    }

    fn status(&self) -> u32 {
        self.settle();
        let shared = if self.is_shared.load(Ordering::SeqCst) { USED_BUFFER } else { 0 };
        self.reasons().load(Ordering::SeqCst) | shared
    }

    /// The driver reads what for, and acknowledges what it is told by that: in one step, for what comes between
    /// two would be acknowledged by a driver that has not heard of it.
    fn take_status(&self) -> u32 {
        self.settle();
        self.reasons().swap(0, Ordering::SeqCst)
    }

    fn acknowledge(&self, bits: u32) {
        self.settle();
        self.reasons().fetch_and(!bits, Ordering::SeqCst);
    }

    fn settle(&self) {
        if let Some(acknowledged) = &self.acknowledged {
            acknowledged.take(|bits| {
                self.reasons().fetch_and(!bits, Ordering::SeqCst);
            });
        }
    }

    fn config_vector(&self) -> u16 {
        self.vectors.as_ref().map_or(NO_VECTOR, |(config, _)| config.load(Ordering::SeqCst))
    }

    fn queue_vector(&self, queue: u32) -> u16 {
        let queues = self.vectors.iter().flat_map(|(_, queues)| queues);
        queues.into_iter().nth(queue as usize).map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    fn save(&self) -> InterruptState {
        let vectors = self.vectors.iter().flat_map(|(config, queues)| [config].into_iter().chain(queues));
        let vectors = vectors.map(|vector| vector.load(Ordering::SeqCst)).collect();
        InterruptState { status: self.status(), vectors }
    }

    fn restore(&self, state: InterruptState) -> Result<()> {
        let own: Vec<_> =
            self.vectors.iter().flat_map(|(config, queues)| [config].into_iter().chain(queues)).collect();
        if own.len() != state.vectors.len() {
            return Err(Error::config("the saved state is of a device with other interrupts"));
        }
        own.iter()
            .zip(state.vectors)
            .for_each(|(own, saved)| own.store(self.checked(saved), Ordering::SeqCst));
        self.settle();
        self.reasons().store(state.status, Ordering::SeqCst);
        if state.status != 0 && self.vectors.is_none() {
            // The pulse may have been lost with the old line; one too many is harmless.
            let _ = self.events[0].write(1);
        }
        Ok(())
    }

    /// A vector that there is not reads back as none: the driver then knows.
    fn checked(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.events.len() { vector } else { NO_VECTOR }
    }

    fn set_config_vector(&self, vector: u16) {
        if let Some((config, _)) = &self.vectors {
            config.store(self.checked(vector), Ordering::SeqCst);
        }
    }

    fn set_queue_vector(&self, queue: u32, vector: u16) {
        if let Some(place) = self.vectors.as_ref().and_then(|(_, queues)| queues.get(queue as usize)) {
            place.store(self.checked(vector), Ordering::SeqCst);
        }
    }

    /// As at power-on.
    fn reset(&self) {
        self.is_shared.store(false, Ordering::SeqCst);
        self.acknowledge(u32::MAX);
        if let Some((config, queues)) = &self.vectors {
            config.store(NO_VECTOR, Ordering::SeqCst);
            queues.iter().for_each(|queue| queue.store(NO_VECTOR, Ordering::SeqCst));
        }
    }
}
