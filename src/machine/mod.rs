//! The machine and its run states: built, loaded, running, paused, ended.

use crate::event::EventFd;
use std::fmt;

use crate::config::Config;
use crate::error::Result;
use crate::host::Host;

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It powered itself off (ACPI sleep control, PSCI SYSTEM_OFF).
    PoweredOff,
    /// It asked for a reset (i8042, ACPI reset register, PSCI SYSTEM_RESET).
    Reset,
    /// Every CPU waits with interrupts off: nothing can wake it.
    Halted,
    /// A CPU could not deliver an exception (x86_64).
    TripleFault,
    /// It wrote this code to the exit register.
    Code(u32),
    /// KVM could not go on running it, for this reason.
    Failed(String),
}

impl Exit {
    /// What `alula run` returns (docs/exit-codes.md).
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PoweredOff => 0,
            Self::Code(code) => *code as u8,
            Self::Reset => 120,
            Self::Halted => 121,
            Self::TripleFault => 122,
            Self::Failed(_) => 123,
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::Halted => f.write_str("the guest halted for good: every CPU waits with interrupts off"),
            Self::TripleFault => f.write_str("the guest crashed: triple fault"),
            Self::Code(code) => write!(f, "the guest ended with code {code}"),
            Self::Failed(reason) => write!(f, "the guest could not go on: {reason}"),
        }
    }
}

/// Whether the guest's CPUs may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// They run.
    Running,
    /// None of them does.
    Paused,
}

/// One virtual machine.
pub struct Machine {}

impl Machine {
    /// Wires a machine together from `config`; it has no content yet and does not run.
    pub fn build(_config: &Config, _host: &mut dyn Host, _prepared: Prepared) -> Result<Self> {
        todo!()
    }
    /// Gives it its content: kernel, initrd, boot tables, registers. `Config::boot_source` of `None`
    /// loads the embedded firmware guest.
    pub fn load(&mut self, _config: &Config, _host: &mut dyn Host) -> Result<()> {
        todo!()
    }
    /// Lets the CPUs run: starts a machine just loaded, goes on with a paused one. No effect on a running one.
    pub fn resume(&mut self) -> Result<()> {
        todo!()
    }
    /// Returns when no CPU runs any more. No effect on a paused one.
    pub fn pause(&mut self) -> Result<()> {
        todo!()
    }
    /// Whether it runs.
    pub fn state(&self) -> State {
        todo!()
    }
    /// Readable once the guest has ended.
    pub fn exit_fd(&self) -> &EventFd {
        todo!()
    }
    /// How the guest ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        todo!()
    }
    /// Looks whether every CPU is halted for good; to be called now and then (about once a second).
    pub fn check_halted(&mut self) {
        todo!()
    }
    /// Types `bytes` on the guest's serial console and returns how many there was room for.
    pub fn type_on_console(&mut self, _bytes: &[u8]) -> usize {
        todo!()
    }
    /// Readable when the console has room again after `type_on_console` took fewer bytes than given.
    pub fn console_room_fd(&self) -> &EventFd {
        todo!()
    }
    /// Presses Ctrl-Alt-Del on the guest's keyboard (x86_64 only).
    pub fn send_ctrl_alt_del(&mut self) -> Result<()> {
        todo!()
    }
}

/// What a machine needs that no configuration changes; made ahead, while nobody waits.
pub struct Prepared {}

impl Prepared {
    /// Opens `/dev/kvm` and asks it what it can do.
    pub fn new() -> Result<Self> {
        todo!()
    }
}
