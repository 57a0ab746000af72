//! How a guest ends, and the one place where its end is noted.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use crate::error::Result;
use crate::history::{self, Event};
use crate::log;
use crate::poll::{self, EventFd};
use crate::vm::gate::Gate;

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It powered itself off (ACPI sleep control, PSCI SYSTEM_OFF).
    PoweredOff,
    /// It asked for a reset (i8042, ACPI reset register, PSCI SYSTEM_RESET).
    Reset,
    /// It panicked (pvpanic), and then asked for a reset.
    PanicReset,
    /// Every CPU waits with interrupts off: nothing can wake it.
    Halted,
    /// A CPU could not deliver an exception (x86_64).
    TripleFault,
    /// The guest let its watchdog expire, which is its end.
    WatchdogExpired,
    /// It wrote this code to the exit register.
    Code(u32),
    /// KVM could not go on running it, for this reason.
    Failed(String),
}

impl Exit {
    /// What `alula run` returns (docs/exit-codes.md). A code of more than 8 bits, which a process cannot
    /// return, is 255: it must not become 0.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PoweredOff => 0,
            Self::Code(code) => u8::try_from(*code).unwrap_or(u8::MAX),
            Self::Reset | Self::PanicReset => 120,
            Self::Halted => 121,
            Self::TripleFault => 122,
            Self::Failed(_) => 123,
            Self::WatchdogExpired => 124,
        }
    }

    /// As readers of events are told.
    pub fn event(&self) -> Event {
        match self {
            Self::PoweredOff => Event::PoweredOff,
            Self::Reset | Self::PanicReset => Event::Reset,
            Self::Halted => Event::Halted,
            Self::TripleFault => Event::Crashed,
            Self::WatchdogExpired => Event::WatchdogExpired { action: "poweroff" },
            Self::Code(code) => Event::Exited { code: *code },
            Self::Failed(reason) => Event::Failed { reason: history::text(reason) },
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::PanicReset => f.write_str("the guest panicked and asked for a reset"),
            Self::Halted => f.write_str("the guest halted for good: no CPU can wake any more"),
            Self::TripleFault => f.write_str("the guest crashed: triple fault"),
            Self::WatchdogExpired => f.write_str("the guest's watchdog expired"),
            Self::Code(code) => write!(f, "the guest ended with code {code}"),
            Self::Failed(reason) => write!(f, "the guest could not go on: {reason}"),
        }
    }
}

/// The guest's end. Whoever sees it first says how; the vCPUs then stop at their gate.
#[derive(Clone)]
pub struct End {
    shared: Arc<Shared>,
}

struct Shared {
    exit: OnceLock<Exit>,
    event: EventFd,
    panicked: AtomicBool,
    gate: Arc<Gate>,
}

impl End {
    /// A guest that has not ended; `gate` is closed when it does.
    pub fn new(gate: Arc<Gate>) -> Result<Self> {
        let event = poll::event("end of the guest")?;
        let (exit, panicked) = (OnceLock::new(), AtomicBool::new(false));
        Ok(Self { shared: Arc::new(Shared { exit, event, panicked, gate }) })
    }

    /// The guest ends; only the first call's reason counts.
    pub fn set(&self, exit: Exit) {
        let exit = match exit {
            Exit::Reset if self.panicked() => Exit::PanicReset,
            exit => exit,
        };
        if self.shared.exit.set(exit).is_ok() {
            self.shared.gate.close();
            self.shared.event.write(1).expect("an event counter at 0 takes 1");
        }
    }

    /// How it ended, if it has.
    pub fn get(&self) -> Option<&Exit> {
        self.shared.exit.get()
    }

    /// The guest's kernel panicked; only the first time counts, and is told: in the log as `message`.
    pub fn panicked_with(&self, message: &str) {
        if !self.shared.panicked.swap(true, Ordering::SeqCst) {
            log::guest_line(message);
            history::tell(|| Event::Panicked);
        }
    }

    /// Notes whether the guest's kernel had panicked when its state was saved, which was told at that time.
    pub fn restore_panicked(&self, panicked: bool) {
        self.shared.panicked.store(panicked, Ordering::SeqCst);
    }

    /// Whether the guest's kernel has panicked, as far as it said so.
    pub fn panicked(&self) -> bool {
        self.shared.panicked.load(Ordering::SeqCst)
    }

    /// Readable once the guest has ended.
    pub fn event(&self) -> &EventFd {
        &self.shared.event
    }
}
