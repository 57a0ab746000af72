//! Virtio (virtio 1.2): what a device promises its transport, and what it works with.

pub mod buffers;
pub mod mmio;
pub mod queue;
pub mod transport;
pub mod workers;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::Result;
use crate::event::EventFd;
use crate::memory::Memory;

pub use queue::{Chain, Queue};
pub use workers::Registrar;

/// A device, without its queues: what it is, and how it starts.
///
/// Invariant: a device that is not started touches neither guest memory nor interrupts.
pub trait VirtioDevice: Send {
    /// Its device ID (virtio 1.2, 5).
    fn device_type(&self) -> u32;
    /// The feature bits of its own device type; the transport adds those of rings and transports.
    fn features(&self) -> u64 {
        0
    }
    /// The largest size of each of its queues: powers of two.
    fn queue_sizes(&self) -> &[u16];
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
}

/// What a running device works with.
pub struct Io {
    /// Guest memory.
    pub memory: Memory,
    /// The features that the driver accepted.
    pub features: u64,
    /// Its queues, in the order of `queue_sizes`. One that the driver did not set up is never kicked.
    pub queues: Vec<Queue>,
}

/// The running half of a device: owns its queues and descriptors, lives on one event loop.
pub trait Worker: Send {
    /// Tells the loop what to wait for: kicks, a tap, a timer. Buffers may wait already: a kick that
    /// came before is still there.
    fn register(&mut self, registrar: &mut Registrar<'_>) -> Result<()>;
    /// Something registered with `token` is ready. An error is the driver's fault: the device stops
    /// and asks to be reset.
    fn handle(&mut self, token: u32) -> Result<()>;
}

/// A device's interrupt as MMIO has it: one line, and a register that says what for.
pub struct Line {
    status: AtomicU32,
    event: EventFd,
}

/// Bits of InterruptStatus (virtio 1.2, 4.2.2).
const USED_BUFFER: u32 = 1;
const CONFIGURATION_CHANGE: u32 = 2;

impl Line {
    /// A line that writes to `event`.
    pub fn new(event: EventFd) -> Arc<Self> {
        Arc::new(Self { status: AtomicU32::new(0), event })
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        // A counter that is full has raised it already.
        let _ = self.event.write(1);
    }

    /// Tells the driver that buffers were used.
    pub fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the driver to look at the device's configuration or status.
    pub fn configuration_change(&self) {
        self.raise(CONFIGURATION_CHANGE);
    }

    fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }
}
