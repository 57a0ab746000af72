//! A guest in memory, without CPUs: the driver's side of one virtio device, behind either transport
//! (virtio 1.2, 2.7, 4.1, 4.2).

mod rings;
mod shown;
pub mod vm;

use std::sync::mpsc::{TryRecvError, channel};
use std::sync::{Arc, Mutex};

use alula::bus::BusDevice;
use alula::errands::Errands;
use alula::error::Result;
use alula::host::Host;
use alula::memory::{self, Memory, Range};
use alula::pci::msix::Msix;
use alula::pci::root::Function;
use alula::poll::EventFd;
use alula::snapshot::SaveState;
use alula::virtio::pci::{Bar, Pci};
use alula::virtio::transport::Transport;
use alula::virtio::workers::{ByHand, Loop};
use alula::virtio::{Interrupts, VirtioDevice};
pub use vm::vm;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// Guest memory: one ring per 64 KiB from the start on, then data.
pub const MEMORY: u64 = 4 << 20;
pub const DATA: u64 = 2 << 20;
const RING: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;

pub const ACKNOWLEDGE: u32 = 1;
pub const DRIVER: u32 = 2;
pub const DRIVER_OK: u32 = 4;
pub const FEATURES_OK: u32 = 8;
pub const NEEDS_RESET: u32 = 64;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_VERSION_1: u64 = 1 << 32;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
/// What a queue has for a vector if the driver gives it one that there is not.
const NO_VECTOR: u32 = 0xffff;

/// Which transport a device is behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransportKind {
    Mmio,
    Pci,
}

pub const TRANSPORTS: [TransportKind; 2] = [TransportKind::Mmio, TransportKind::Pci];

/// How the device's registers are reached.
enum Registers {
    Mmio(shown::Shown),
    Pci(Bar, Box<Pci>),
}

/// The driver's notes of one queue.
#[derive(Clone, Copy, Default)]
struct Ring {
    size: u16,
    /// Descriptors handed out so far; never one twice within a ring's worth.
    descriptors: u16,
    available: u16,
    seen: u16,
}

/// What the driver remembers.
#[derive(Clone)]
pub struct Notes {
    rings: Vec<Ring>,
    /// Data given out so far.
    pub allocated: u64,
}

/// Where the device's running half lives.
enum Io {
    Thread(Arc<Loop>, Arc<Errands>),
    /// Nothing happens but in `Guest::turn`.
    ByHand(ByHand),
}

/// So many turns are enough for whatever a device has to do, unless it feeds itself.
const TURNS_MAX: usize = 1000;

/// A guest with one device.
pub struct Guest {
    pub memory: Memory,
    pub transport: Arc<Mutex<Transport>>,
    pub notes: Notes,
    pub host: Mutex<Host>,
    io: Io,
    registers: Registers,
    /// The line, or all vectors.
    signals: Vec<Arc<EventFd>>,
}

fn event() -> Arc<EventFd> {
    Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap())
}

fn transport(
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    event_loop: Arc<Loop>,
    interrupts: Arc<Interrupts>,
) -> Arc<Mutex<Transport>> {
    let kicks = device.queue_sizes().iter().map(|_| event()).collect();
    Transport::new("it".to_owned(), device, memory, vec![event_loop], interrupts, kicks)
}

/// A device behind PCI, as this device of the bus.
pub fn function(
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    event_loop: Arc<Loop>,
    number: u32,
) -> (Arc<Mutex<Transport>>, Pci) {
    let vectors = (0..=device.queue_vectors()).map(|_| event()).collect();
    function_of(device, memory, event_loop, number, vectors)
}

fn function_of(
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    event_loop: Arc<Loop>,
    number: u32,
    vectors: Vec<Arc<EventFd>>,
) -> (Arc<Mutex<Transport>>, Pci) {
    let interrupts = Interrupts::vectors(vectors.clone(), device.queue_sizes().len());
    let msix = Arc::new(Mutex::new(Msix::new(vm(), number << 3, vectors).unwrap()));
    let transport = transport(device, memory, event_loop, interrupts.clone());
    let function = Pci::new(transport.clone(), interrupts, msix, 0xc000_0000);
    (transport, function)
}

impl Guest {
    /// A machine built anew with `device` in it, and memory full of zeros.
    pub fn new(kind: TransportKind, device: Box<dyn VirtioDevice>) -> Self {
        let memory = memory::allocate(&[Range { start: 0, size: MEMORY }]).unwrap();
        let errands = Errands::new(event());
        let event_loop = Loop::new("io", &errands).unwrap();
        event_loop.start().unwrap();
        Self::build(kind, device, memory, Io::Thread(event_loop, errands))
    }

    /// The same over a memory that there is, and without a thread: the device works when something here
    /// waits for it or lets it (`turn`).
    pub fn by_hand(kind: TransportKind, device: Box<dyn VirtioDevice>, memory: Memory) -> Self {
        Self::build(kind, device, memory, Io::ByHand(ByHand::new().unwrap()))
    }

    fn build(kind: TransportKind, device: Box<dyn VirtioDevice>, memory: Memory, io: Io) -> Self {
        let event_loop = match &io {
            Io::Thread(event_loop, _) => event_loop.clone(),
            Io::ByHand(by_hand) => by_hand.event_loop(),
        };
        let notes = Notes { rings: vec![Ring::default(); device.queue_sizes().len()], allocated: 0 };
        let lines = if kind == TransportKind::Mmio { 1 } else { 1 + device.queue_vectors() };
        let mut events: Vec<_> = (0..lines).map(|_| event()).collect();
        let signals = events.clone();
        let (transport, registers) = match kind {
            TransportKind::Mmio => {
                let (interrupts, page) = shown::line(&*device, events.remove(0));
                let transport = transport(device, memory.clone(), event_loop, interrupts);
                (transport.clone(), Registers::Mmio(shown::Shown::new(transport, page)))
            }
            TransportKind::Pci => {
                let (transport, function) = function_of(device, memory.clone(), event_loop, 1, events);
                (transport, Registers::Pci(function.registers(), Box::new(function)))
            }
        };
        Self { memory, transport, notes, host: Mutex::default(), io, registers, signals }
    }

    pub fn kind(&self) -> TransportKind {
        match self.registers {
            Registers::Mmio(_) => TransportKind::Mmio,
            Registers::Pci(..) => TransportKind::Pci,
        }
    }

    pub fn queues(&self) -> usize {
        self.notes.rings.len()
    }

    /// Lets the device do what it has to do now, and does what it asks `main` for; one with a thread needs
    /// nobody's leave for the rest.
    pub fn turn(&mut self) {
        match &mut self.io {
            Io::ByHand(_) => drop((0..TURNS_MAX).find(|_| !(self.turn_once() | self.do_errands()))),
            Io::Thread(..) => drop(self.do_errands()),
        }
    }

    /// One turn of `main`; false: the device asks for nothing.
    pub fn do_errands(&self) -> bool {
        match &self.io {
            Io::ByHand(by_hand) => by_hand.errands().turn(&mut self.host.lock().unwrap()),
            Io::Thread(_, errands) => errands.turn(&mut self.host.lock().unwrap()),
        }
    }

    /// The same once: what its loop does between two looks at what there is. False: there was nothing.
    pub fn turn_once(&mut self) -> bool {
        match &mut self.io {
            Io::ByHand(by_hand) => by_hand.turn().unwrap(),
            Io::Thread(..) => panic!("its thread turns it"),
        }
    }

    /// Looks at `condition` after each turn, as long as it takes.
    pub fn wait_for_each_turn(&mut self, mut condition: impl FnMut(&mut Self) -> bool) {
        super::wait_for(|| {
            while self.turn_once() {
                if condition(self) {
                    return true;
                }
            }
            condition(self)
        });
    }

    pub fn wait_for(&mut self, mut condition: impl FnMut(&mut Self) -> bool) {
        super::wait_for(|| {
            self.turn();
            condition(self)
        });
    }

    /// How many chains of a queue were made available in all, and the ring's size; 0: there is none.
    pub fn available(&self, queue: usize) -> (u16, u16) {
        let ring = self.notes.rings[queue];
        (ring.available, ring.size)
    }

    /// The registers, for accesses of any width at any place.
    pub fn registers(&mut self) -> &mut dyn BusDevice {
        match &mut self.registers {
            Registers::Mmio(device) => device,
            Registers::Pci(device, _) => device,
        }
    }

    /// Reads a register of 32 bits (MMIO) or of `width` bytes (PCI).
    pub fn read(&mut self, mmio: u64, pci: u64, width: usize) -> u32 {
        let mut data = [0; 4];
        match &mut self.registers {
            Registers::Mmio(device) => device.read(mmio, &mut data),
            Registers::Pci(device, _) => device.read(pci, &mut data[..width]),
        }
        u32::from_le_bytes(data)
    }

    /// Writes such a register.
    pub fn write(&mut self, mmio: u64, pci: u64, width: usize, value: u32) {
        let data = value.to_le_bytes();
        match &mut self.registers {
            Registers::Mmio(device) => device.write(mmio, &data),
            Registers::Pci(device, _) => device.write(pci, &data[..width]),
        }
    }

    pub fn status(&mut self) -> u32 {
        self.read(0x70, 0x14, 1)
    }

    pub fn set_status(&mut self, status: u32) {
        self.write(0x70, 0x14, 1, status);
    }

    /// Device configuration.
    pub fn config(&mut self, offset: u64, data: &mut [u8]) {
        match &mut self.registers {
            Registers::Mmio(device) => device.read(0x100 + offset, data),
            Registers::Pci(device, _) => device.read(0x1000 + offset, data),
        }
    }

    pub fn set_config(&mut self, offset: u64, data: &[u8]) {
        match &mut self.registers {
            Registers::Mmio(device) => device.write(0x100 + offset, data),
            Registers::Pci(device, _) => device.write(0x1000 + offset, data),
        }
    }

    /// What the device offers.
    pub fn features(&mut self) -> u64 {
        let mut features = 0;
        for half in 0..2 {
            self.write(0x14, 0x00, 4, half);
            features |= u64::from(self.read(0x10, 0x04, 4)) << (32 * half);
        }
        features
    }

    /// Resets the device: one with a thread has stopped when the write returns.
    pub fn reset(&mut self) {
        self.set_status(0);
        match self.io {
            Io::Thread(..) => {
                assert_eq!(self.status(), 0, "the write of 0 returned before the reset was done")
            }
            Io::ByHand(_) => self.wait_for(|guest| guest.status() == 0),
        }
        self.notes.rings.fill(Ring::default());
    }

    /// Up to FEATURES_OK with `features`; false: it does not accept them.
    pub fn negotiate(&mut self, features: u64) -> bool {
        self.reset();
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        for half in 0..2 {
            self.write(0x24, 0x08, 4, half);
            self.write(0x20, 0x0c, 4, (features >> (32 * half)) as u32);
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.status() & FEATURES_OK != 0
    }

    /// Sets up a queue of `size` entries with its rings at `table`, `available` and `used`.
    pub fn set_queue(&mut self, queue: usize, size: u16, [table, available, used]: [u64; 3]) {
        self.write(0x30, 0x16, 2, queue as u32);
        self.write(0x38, 0x18, 2, size.into());
        for (mmio, pci, address) in [(0x80, 0x20, table), (0x90, 0x28, available), (0xa0, 0x30, used)] {
            self.write(mmio, pci, 4, address as u32);
            self.write(mmio + 4, pci + 4, 4, (address >> 32) as u32);
        }
        if let Registers::Pci(..) = self.registers {
            // The queue's vector, or one for all queues where there are not so many; and that of configuration
            // changes.
            self.write(0, 0x1a, 2, queue as u32 + 1);
            if self.read(0, 0x1a, 2) == NO_VECTOR {
                self.write(0, 0x1a, 2, 1);
            }
            self.write(0, 0x10, 2, 0);
        }
        self.write(0x44, 0x1c, 2, 1);
        self.notes.rings[queue] = Ring { size, ..Ring::default() };
    }

    /// Where the parts of a queue's ring are.
    pub fn parts(queue: usize) -> [u64; 3] {
        let start = RING * queue as u64;
        [start, start + AVAILABLE, start + USED]
    }

    /// From reset to running, with these features (beside VERSION_1) and queues of up to 16 entries.
    pub fn start(&mut self, features: u64) {
        assert!(self.negotiate(features | F_VERSION_1), "the device does not accept what it offered");
        for queue in 0..self.queues() {
            self.write(0x30, 0x16, 2, queue as u32);
            let max = self.read(0x34, 0x18, 2);
            self.fill(RING * queue as u64, RING, 0);
            self.set_queue(queue, max.min(16) as u16, Self::parts(queue));
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Whether a queue's interrupt (or with none: that of configuration changes) is waiting.
    pub fn is_interrupted(&mut self, queue: Option<usize>) -> bool {
        if let (Some(queue), TransportKind::Pci) = (queue, self.kind()) {
            self.write(0, 0x16, 2, queue as u32);
        }
        let vector = queue.map_or(0, |_| self.read(0, 0x1a, 2));
        match &mut self.registers {
            Registers::Mmio(_) => self.read(0x60, 0, 4) & if queue.is_some() { 1 } else { 2 } != 0,
            Registers::Pci(device, _) => {
                let mut pending = [0; 8];
                device.read(0x3800, &mut pending);
                u64::from_le_bytes(pending) & 1 << vector != 0
            }
        }
    }

    /// How often the device has interrupted since this was last asked, by whatever vector; nothing is pending
    /// after that.
    pub fn interrupts(&self) -> u64 {
        self.signals.iter().map(|signal| signal.read().unwrap_or(0)).sum()
    }

    /// With EVENT_IDX: the driver wants to be interrupted for the next request that the device uses, or not.
    pub fn want_interrupt(&self, queue: usize, is_wanted: bool) {
        let (next, size) = (self.used_index(queue), self.notes.rings[queue].size);
        let event = if is_wanted { next } else { next.wrapping_sub(1) };
        self.store(event, Self::parts(queue)[1] + 4 + 2 * u64::from(size));
    }

    /// Stops the device and waits until it is.
    pub fn pause(&mut self) {
        let (sender, stopped) = channel();
        self.transport.lock().unwrap().pause(sender);
        match self.io {
            Io::Thread(..) => drop(stopped.recv()),
            Io::ByHand(_) => self.wait_for(|_| stopped.try_recv() == Err(TryRecvError::Disconnected)),
        }
    }

    pub fn resume(&self) {
        self.transport.lock().unwrap().resume();
    }

    /// The device's state and its function's; it is paused.
    pub fn save(&self) -> Vec<Vec<u8>> {
        let transport = self.transport.lock().unwrap().save_state().unwrap();
        match &self.registers {
            Registers::Mmio(_) => vec![transport],
            Registers::Pci(_, function) => vec![transport, function.save_state().unwrap()],
        }
    }

    pub fn restore(&mut self, state: &[Vec<u8>]) -> Result<()> {
        self.transport.lock().unwrap().restore_state(&state[0])?;
        match &mut self.registers {
            Registers::Mmio(_) => Ok(()),
            Registers::Pci(_, function) => {
                function.restore_state(&state[1])?;
                function.connect();
                Ok(())
            }
        }
    }

    /// Stops for good, letting go of everything of the host's.
    pub fn suspend(mut self) -> Suspended {
        self.pause();
        let mut memory = vec![0; MEMORY as usize];
        self.memory.memory().read_slice(&mut memory, GuestAddress(0)).unwrap();
        Suspended { state: self.save(), memory, notes: self.notes.clone() }
    }

    /// Goes on where another one stopped, once it is resumed; this was just built.
    pub fn take_over(&mut self, suspended: &Suspended) -> Result<()> {
        self.memory.memory().write_slice(&suspended.memory, GuestAddress(0)).unwrap();
        self.notes = suspended.notes.clone();
        self.restore(&suspended.state)
    }

    /// Gives the function bus mastering, or takes it away; false: the device is not behind PCI.
    pub fn set_bus_master(&mut self, is_master: bool) -> bool {
        let command = if is_master { 6_u16 } else { 2 };
        self.function().map(|function| function.write_config(4, &command.to_le_bytes())).is_some()
    }

    /// Configuration space of the function, for PCI.
    pub fn function(&mut self) -> Option<&mut dyn Function> {
        match &mut self.registers {
            Registers::Mmio(_) => None,
            Registers::Pci(_, function) => Some(&mut **function),
        }
    }
}

/// What is left of a guest that was suspended.
pub struct Suspended {
    pub state: Vec<Vec<u8>>,
    memory: Vec<u8>,
    notes: Notes,
}

impl Drop for Guest {
    fn drop(&mut self) {
        // A test that has failed does not wait for what may be the reason.
        if let Io::Thread(event_loop, _) = &self.io
            && !std::thread::panicking()
        {
            event_loop.end();
        }
    }
}
