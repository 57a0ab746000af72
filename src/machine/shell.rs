//! The shell of a machine: what can be made before it is known what the machine is to be. Who knows that another
//! machine will be wanted makes its shell while nobody waits; it is kept until it is built on, or dropped.

use std::sync::{Arc, OnceLock};

use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use super::ahead::OpenedAhead;
use super::build::memory_size;
use super::loops::Loops;
use crate::arch::{CpuFeatures, layout};
use crate::bus::Bus;
use crate::config::Config;
use crate::errands::Errands;
use crate::error::{Error, Result};
use crate::memory::{self, Memory, Range, Region, Regions, Source};
use crate::poll::{self, EventFd};
use crate::vm::exit::End;
use crate::vm::gate::Gate;
use crate::vm::vcpu::Surroundings;
use crate::vm::vcpus::Vcpus;
use crate::vm::{Prepared, Vm};

/// KVM's machine with its interrupt controllers and CPUs, whose threads wait at the gate, and the io thread. None
/// of it runs. Fields are dropped in this order: no thread is left, then KVM goes, then memory.
pub struct Shell {
    pub(super) vcpus: Vcpus,
    pub(super) loops: Loops,
    pub(super) surroundings: Arc<Surroundings>,
    pub(super) errands: Arc<Errands>,
    pub(super) wake: Arc<EventFd>,
    pub(super) vm: Vm,
    pub(super) memory: Memory,
}

impl Shell {
    /// A shell for a machine of so many CPUs, and with so much memory, if that is known: a machine with other memory
    /// can be built on it, too, and takes longer. It has all its threads, and what KVM makes for CPUs when they first run.
    ///
    /// # Errors
    /// The host's KVM has not so many CPUs, or the host not so much address space, or no more threads.
    pub fn new(prepared: Prepared, cpus: u16, mem_size_mib: Option<u64>) -> Result<Self> {
        let memory = match mem_size_mib {
            Some(size) => memory::allocate(&layout::memory(memory_size(size)?))?,
            None => Memory::new(Regions::default()),
        };
        let mut shell = Self::around(prepared, Cpus::plain(cpus), memory, &OpenedAhead::default())?;
        shell.loops.make_shared()?;
        shell.loops.start()?;
        shell.vm.foresee_cpu_model(&shell.vcpus.stopped())?;
        shell.vcpus.start_ahead()?;
        Ok(shell)
    }

    /// A shell without threads, around a guest's memory, and what devices show it as memory. KVM takes both first: a change
    /// of them soon after the interrupt controllers are made would wait for these.
    fn around(prepared: Prepared, cpus: Cpus, memory: Memory, ahead: &OpenedAhead) -> Result<Self> {
        let mut vm = Vm::new(prepared, &memory.memory())?;
        ahead.windows().try_for_each(|window| vm.add_window(window).map(drop))?;
        ahead.registers().try_for_each(|(start, page)| vm.add_registers(*start, page).map(drop))?;
        let made = vm.create_vcpus(cpus.count, cpus.features)?;
        let gate = Arc::new(Gate::default());
        let end = End::new(gate.clone())?;
        let (mmio, pio, power) = (Arc::default(), Bus::default(), OnceLock::new());
        let surroundings = Arc::new(Surroundings { mmio, pio, gate, end, power });
        let wake = Arc::new(poll::event("what main looks after")?);
        let errands = Errands::new(wake.clone());
        let (vcpus, loops) = (Vcpus::new(made, &surroundings), Loops::new(&errands));
        Ok(Self { vcpus, loops, surroundings, errands, wake, vm, memory })
    }

    /// The CPUs that it is for.
    pub fn cpus(&self) -> Cpus {
        let count = u16::try_from(self.vcpus.len()).expect("it was made for so many");
        Cpus { count, features: self.vm.cpu_features() }
    }

    /// How much memory it has, in bytes.
    pub fn memory_size(&self) -> u64 {
        self.memory.memory().iter().map(|region| region.range().size).sum()
    }

    /// Gives it memory at `ranges` with the content of `source`: what it has, if that is like it.
    fn set_memory(&mut self, ranges: &[Range], source: Source<'_>) -> Result<()> {
        // The time that it was waiting is no part of a start.
        self.vm.timeline.skip();
        let there: Vec<Range> = self.memory.memory().iter().map(Region::range).collect();
        if there == ranges {
            let memory = memory::refill(&self.memory.memory(), source)?;
            self.memory = memory;
            return Ok(());
        }
        there.into_iter().try_for_each(|range| self.vm.remove_memory(range))?;
        self.memory = memory::map(ranges, source)?;
        let regions = self.memory.memory();
        regions.iter().try_for_each(|region| self.vm.add_memory(region, false).map(drop))?;
        self.vm.timeline.mark("memory");
        Ok(())
    }
}

/// The CPUs of a machine, as far as they cannot be changed once they are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpus {
    /// How many, whether the guest has been given them or not.
    pub count: u16,
    /// The features that KVM initialises the CPUs with.
    pub features: CpuFeatures,
}

impl Cpus {
    /// The CPUs that `config` asks for.
    ///
    /// # Errors
    /// Guests cannot be given a feature.
    pub fn of(config: &Config) -> Result<Self> {
        let features = CpuFeatures::new(&config.cpu_changes().features)?;
        Ok(Self { count: config.machine_config.vcpus_made(), features })
    }

    /// This many CPUs, as KVM prefers them.
    pub fn plain(count: u16) -> Self {
        Self { count, features: CpuFeatures::default() }
    }
}

/// What a machine is built on.
pub enum Base {
    /// KVM alone: the shell is made now.
    Prepared(Box<Prepared>),
    /// A shell that was made ahead.
    Shell(Box<Shell>),
}

impl From<Prepared> for Base {
    fn from(prepared: Prepared) -> Self {
        Self::Prepared(Box::new(prepared))
    }
}

impl From<Shell> for Base {
    fn from(shell: Shell) -> Self {
        Self::Shell(Box::new(shell))
    }
}

impl Base {
    /// The shell of a machine with these CPUs, this memory, and what devices show as memory.
    pub(super) fn shell(
        self,
        cpus: Cpus,
        ranges: &[Range],
        source: Source<'_>,
        ahead: &OpenedAhead,
    ) -> Result<Shell> {
        match self {
            Self::Prepared(prepared) => Shell::around(*prepared, cpus, memory::map(ranges, source)?, ahead),
            Self::Shell(shell) if shell.cpus() != cpus => Err(Error::config(format!(
                "the machine is to have {} CPUs, and its shell was made for {}, or for others: make another one",
                cpus.count,
                shell.cpus().count
            ))),
            Self::Shell(mut shell) => {
                shell.set_memory(ranges, source)?;
                ahead.windows().try_for_each(|window| shell.vm.add_window(window).map(drop))?;
                Ok(*shell)
            }
        }
    }
}
