//! The machine and its run states: built, loaded, running, paused, ended.

mod ahead;
mod attach;
mod build;
mod command_line;
mod cpus;
mod halt;
mod kept;
mod loops;
mod metrics;
mod parts;
mod plug;
mod regions;
mod saved;
mod shell;
mod windows;

use std::any::Any;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Map, Value};

use crate::config::{BootSource, Config, HugePages};
use crate::devices::console::Console;
use crate::devices::fixed::FixedDevice;
use crate::devices::gpio::Gpio;
use crate::devices::keyboard::Keyboard;
use crate::devices::kind::ConfiguredDevice;
use crate::devices::watchdog::Watchdog;
use crate::errands::Errands;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::host::line::UserLine;
use crate::log;
use crate::memory::{Memory, Range, Source};
use crate::metrics::View;
use crate::pci::root::Root;
use crate::platform::Platform;
use crate::poll::EventFd;
use crate::timeline::Timeline;
use crate::virtio::transport::Transport;
use crate::vm::Vm;
use crate::vm::vcpu::Surroundings;
use crate::vm::vcpus::Vcpus;
use crate::walls;
use loops::Loops;
use parts::Parts;
use regions::Slots;

pub use crate::vm::brake::Brake;
pub use crate::vm::exit::Exit;
pub use crate::vm::{OpenKvm, Prepared};
pub use kept::Kept;
pub use parts::{Pausing, Places};
pub use plug::Leaving;
pub use regions::{Hold, Tracker};
pub use saved::SavedMachine;
pub use shell::{Base, Cpus, Shell};

/// The time that what devices have in flight may take when the machine is to stand still. A disk on a file system that
/// does not answer would hold `main`, and with it the API, for ever.
const PAUSE_TIME: Duration = Duration::from_secs(10);

/// Whether the guest's CPUs may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// They run.
    Running,
    /// None of them does.
    Paused,
}

/// One virtual machine. Fields are dropped in this order: no thread is left, then KVM goes, then memory.
pub struct Machine {
    /// The name of the microVM.
    id: String,
    /// What it is made of, as it is now.
    config: Config,
    state: RunState,
    /// The gate was open once.
    has_run: bool,
    vcpus: Vcpus,
    loops: Loops,
    surroundings: Arc<Surroundings>,
    parts: Parts,
    /// The line to the guest's virtio console, if there is one.
    line: Option<Arc<UserLine>>,
    /// Written to when `main` is to look after the machine.
    wake: Arc<EventFd>,
    errands: Arc<Errands>,
    platform: Platform,
    /// Devices that are being changed.
    changing: Vec<String>,
    /// The PCI bus, if there is one.
    root: Option<Arc<Mutex<Root>>>,
    /// The number of the place from which on a device looks for a free one.
    next_place: usize,
    halt: halt::Watch,
    /// A guest whose CPUs have all halted for good is told of and left alone, as in Firecracker.
    stays_when_halted: bool,
    timeline: Timeline,
    /// Of which size the pages of memory are that is added later.
    huge_pages: HugePages,
    /// What is written to guest memory is noted.
    tracks_writes: bool,
    /// Memory that comes and goes; None: no device plugs any.
    slots: Option<Arc<Slots>>,
    /// The guest's watchdog, if there is one.
    watchdog: Option<Watchdog>,
    vm: Arc<Vm>,
    memory: Memory,
}

impl Machine {
    /// Wires a machine together from `config`; it has no content yet and does not run. It is on the heap, as places on
    /// the stack that it is moved through stay in memory. `id` is its
    /// name: addresses of its interfaces are derived from it. `base` is what it is built on: KVM alone
    /// ([`Prepared`]), or a [`Shell`] that was made ahead for as many CPUs.
    pub fn build(id: &str, config: &Config, host: &mut Host, base: impl Into<Base>) -> Result<Box<Self>> {
        Self::build_at(&Places::new(), id, config, host, base)
    }

    /// The same, with every part that `places` names in the place that it gives: [`Machine::places`] of a
    /// machine that was, for one whose devices stay where its guest knows them.
    pub fn build_at(
        places: &Places,
        id: &str,
        config: &Config,
        host: &mut Host,
        base: impl Into<Base>,
    ) -> Result<Box<Self>> {
        Self::build_from(Source::Anonymous, places, &[], id, config, host, base)
    }

    /// Builds a machine as [`Machine::build_at`] does, with the content of `source` in its memory, and with the memory that
    /// was `plugged`, slot by slot ([`SavedMachine::plugged`]).
    pub fn build_from(
        source: Source<'_>,
        places: &Places,
        plugged: &[Range],
        id: &str,
        config: &Config,
        host: &mut Host,
        base: impl Into<Base>,
    ) -> Result<Box<Self>> {
        build::build((source, plugged), Kept::default(), places, id, config, host, base.into())
    }

    /// Wires a machine together as [`Machine::build`] does, after one of the same configuration: it has the devices that
    /// were `kept` of that.
    pub fn build_after(
        kept: Kept,
        id: &str,
        config: &Config,
        host: &mut Host,
        base: impl Into<Base>,
    ) -> Result<Box<Self>> {
        build::build((Source::Anonymous, &[]), kept, &Places::new(), id, config, host, base.into())
    }

    /// Where its parts are.
    pub fn places(&self) -> Places {
        self.parts.places()
    }

    /// Gives it its first content: what its CPUs are, kernel, initrd, boot tables, registers. A `boot_source` of none
    /// loads the embedded firmware guest. [`Machine::restore`] gives it another machine's.
    pub fn load(&mut self, config: &Config, host: &mut Host) -> Result<()> {
        build::load(self, config, host)
    }

    /// Opens what the guest boots from ahead of a build, and refuses what can be seen to be no kernel or initrd.
    pub fn hold_boot_files(source: &BootSource, host: &mut Host) -> Result<()> {
        build::hold_boot_files(source, host)
    }

    /// Lets the CPUs run: starts a machine just loaded, goes on with a paused one. No effect on a
    /// running one.
    pub fn resume(&mut self) -> Result<()> {
        if self.surroundings.end.get().is_some() {
            return Err(Error::guest("resume the guest: it has ended"));
        }
        self.loops.start()?;
        self.vcpus.start()?;
        if self.state == RunState::Paused {
            self.parts.resume(&self.changing);
            self.has_run = true;
            self.surroundings.gate.open();
            self.state = RunState::Running;
            // The guest need not wait for the walls: `main` takes nothing from the guest before they are closed.
            walls::close()?;
            log::debug("the guest's CPUs and devices run");
        }
        Ok(())
    }

    /// Does all of [`Machine::resume`] that can be done before, for a machine that has not run yet: threads are there,
    /// and what KVM makes for CPUs when they first run.
    pub fn park(&mut self) -> Result<()> {
        self.loops.start()?;
        self.vcpus.start_ahead()
    }

    /// Returns when no CPU runs any more, and no device works. No effect on a paused machine.
    ///
    /// # Errors
    /// A device has something in flight that the host does not end in `PAUSE_TIME`: the machine goes on as before.
    pub fn pause(&mut self) -> Result<()> {
        self.vcpus.stop();
        if let Err(error) = self.parts.pause(PAUSE_TIME) {
            if self.state == RunState::Running {
                self.parts.resume(&self.changing);
                self.surroundings.gate.open();
            }
            return Err(error);
        }
        self.state = RunState::Paused;
        log::debug("the guest's CPUs and devices stand still");
        Ok(())
    }

    /// What its start is made of, up to the first entry into the guest.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Guest memory, as it is now.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// What its parts count, by part: `vcpu`, `uart`, `block_{id}`, and `block` for all disks together.
    pub fn metrics(&self, view: View) -> Map<String, Value> {
        metrics::collect(self, view)
    }

    /// Whether it runs.
    pub fn state(&self) -> RunState {
        self.state
    }

    /// Readable once the guest has ended.
    pub fn exit_fd(&self) -> &EventFd {
        self.surroundings.end.event()
    }

    /// How the guest ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        self.surroundings.end.get().cloned()
    }

    /// Whether the guest's kernel has panicked, as far as it said so (pvpanic): it may go on for all that.
    pub fn panicked(&self) -> bool {
        self.surroundings.end.panicked()
    }

    /// The guest's watchdog, if it has one.
    pub fn watchdog(&self) -> Option<&Watchdog> {
        self.watchdog.as_ref()
    }

    /// Ends the guest in this way, if it has not ended.
    pub fn end(&self, exit: Exit) {
        self.surroundings.end.set(exit);
    }

    /// Looks whether every CPU is halted for good, and ends the guest if so; to be called now and
    /// then, about once a second. Costs next to nothing while any CPU does anything.
    pub fn check_halted(&mut self) -> Result<()> {
        halt::check(self)
    }

    /// Types `bytes` on the guest's console, the virtio console or else the serial port, and returns how many there was
    /// room for.
    pub fn type_on_console(&mut self, bytes: &[u8]) -> usize {
        if let Some(line) = &self.line {
            return line.type_bytes(bytes);
        }
        self.parts.with(Console::NAME, |console: &mut Console| console.type_bytes(bytes)).unwrap_or(0)
    }

    /// Whether the guest has a console that knows of the terminal's size.
    pub fn has_sized_console(&self) -> bool {
        self.line.is_some()
    }

    /// The terminal that the guest's console is on has so many rows and columns; 0: it is not known.
    pub fn set_console_size(&self, size: (u16, u16)) {
        self.line.iter().for_each(|line| line.set_size(size));
    }

    /// Writes what the serial console keeps for a slow reader, as far as it reads now; to be called now and then.
    pub fn flush_console(&mut self) {
        self.parts.with(Console::NAME, Console::flush);
    }

    /// Readable when `main` is to call [`Machine::attend`].
    pub fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    /// Does some of what devices ask `main` for. That, or that the console has room again after
    /// `type_on_console` took fewer bytes than given, is what [`Machine::wake_fd`] tells of.
    pub fn attend(&mut self, host: &mut Host) {
        // Nothing written: another look may have taken the count away.
        let _ = self.wake.read();
        self.errands.turn(host);
    }

    /// Tells a device to stop that is to be changed ([`Machine::patch_device`]), and keeps it from going on,
    /// whatever becomes of the machine, until it is changed or [`Machine::end_change`] is called.
    pub fn begin_change(&mut self, name: &str) -> Result<Pausing> {
        let part = self.parts.get(name)?;
        if self.changing.iter().any(|other| other == name) {
            return Err(Error::config("another change of it waits for what it has in flight: wait for that"));
        }
        let pausing = parts::begin_pause(std::slice::from_ref(part));
        self.changing.push(name.to_owned());
        Ok(pausing)
    }

    /// Changes what can be changed of a device in use, as [`VirtioDevice::patch`] says: the device is stopped,
    /// changed, and goes on where it was. By the `change`, its configuration becomes `changed`.
    ///
    /// [`VirtioDevice::patch`]: crate::virtio::VirtioDevice::patch
    pub fn patch_device(
        &mut self,
        changed: &ConfiguredDevice,
        change: &dyn Any,
        host: &mut Host,
    ) -> Result<()> {
        let name = &changed.name();
        self.config.check_beside(changed)?;
        let part = self.parts.get(name)?;
        parts::pause(std::slice::from_ref(part));
        let result = part.with(|device: &mut Transport| device.patch(change, host));
        let outcome = if matches!(result, Some(Ok(()))) { "was changed" } else { "stays as it was" };
        log::debug(format_args!("{name} stood still and {outcome}"));
        self.end_change(name);
        result.unwrap_or_else(|| Err(Error::config(format!("{name} cannot be changed"))))?;
        self.config.put(changed.clone())
    }

    /// The answer of a device that a configuration lists to who asks for `what`, as [`VirtioDevice::tell`] says.
    ///
    /// [`VirtioDevice::tell`]: crate::virtio::VirtioDevice::tell
    pub fn tell(&self, name: &str, what: &str) -> Result<Value> {
        let told = self.parts.get(name)?.with(|device: &mut Transport| device.tell(what));
        told.unwrap_or_else(|| Err(Error::config(format!("{name} tells nothing"))))
    }

    /// Whether a device is being changed.
    pub fn is_changing(&self) -> bool {
        !self.changing.is_empty()
    }

    /// Lets a device go on where it was, changed or not.
    pub fn end_change(&mut self, name: &str) {
        self.changing.retain(|other| other != name);
        if self.state == RunState::Running
            && let Ok(part) = self.parts.get(name)
        {
            part.lock().resume();
        }
    }

    /// Asks the guest to shut down, by what the machine has for it: Ctrl-Alt-Del on x86_64, the power
    /// key on aarch64. What comes of it is the guest's own business.
    pub fn request_shutdown(&mut self) -> Result<()> {
        match self.parts.with(Gpio::NAME, Gpio::press_power_key) {
            Some(()) => Ok(()),
            None => self.send_ctrl_alt_del(),
        }
    }

    /// Presses Ctrl-Alt-Del on the guest's keyboard (x86_64 only).
    pub fn send_ctrl_alt_del(&mut self) -> Result<()> {
        let pressed = self.parts.with(Keyboard::NAME, Keyboard::press_ctrl_alt_del);
        pressed.ok_or_else(|| Error::config("this machine has no keyboard"))
    }
}
