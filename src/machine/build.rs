//! The only recipe for a machine: wire the parts together, then load content into them.

use std::fs::File;
use std::io::{Cursor, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use super::ahead::OpenedAhead;
use super::attach::pci_bus;
use super::command_line::command_line;
use super::kept::Kept;
use super::parts::{Parts, Places};
use super::shell::{Base, Cpus, Shell};
use super::{Machine, RunState, cpus, halt};
use crate::arch::{self, layout};
use crate::config::{BootSource, Config, HugePages, MachineConfig};
use crate::descriptors::Named;
use crate::devices::boot_timer::BootTimer;
use crate::devices::fixed::Site;
use crate::devices::put_fixed;
use crate::devices::watchdog::Watchdog;
use crate::dialect::Dialect;
use crate::error::{Context, Error, Result};
use crate::firmware;
use crate::host::{Access, Host, Sharing};
use crate::log;
use crate::memory::{Memory, Range, Region, Source};
use crate::platform::Platform;

/// The list of parts has room for this many beside the configured ones: a list that grows is copied, and each copy may
/// touch one more page of memory.
const FIXED_PARTS: usize = 8;
/// Less than the boot tables, a kernel and its FDT need.
const MEMORY_MIN: u64 = 2 << 20;

pub fn build(
    (source, plugged): (Source<'_>, &[Range]),
    kept: Kept,
    places: &Places,
    id: &str,
    config: &Config,
    host: &mut Host,
    base: Base,
) -> Result<Box<Machine>> {
    let (boot_timer, machine) = (config.boot_timer.then(BootTimer::start), &config.machine_config);
    let watchdog = machine.watchdog.map(|_| Watchdog::new(kept.watchdog_has_expired));
    let ram = layout::memory(memory_size(machine.mem_size_mib)?);
    let ahead = OpenedAhead::open(kept, id, config, places, (&ram, &base), host)?;
    let source = if config.shares_memory() { source.to_share()? } else { source };
    let source = machine.huge_pages.source(source)?;
    let shell = base.shell(Cpus::of(config)?, &[&ram, plugged].concat(), source, &ahead)?;
    let Shell { mut vcpus, loops, surroundings, errands, wake, mut vm, memory } = shell;
    take_memory(machine, &memory);
    let mut platform = platform(config, ram);
    vm.complete(&mut platform)?;
    let (timeline, vm) = (std::mem::take(&mut vm.timeline), Arc::new(vm));

    let mut site = Site {
        vm: &vm,
        memory: &memory,
        surroundings: &surroundings,
        host,
        serial: config.serial.as_ref(),
        room: &wake,
        boot_timer,
        watchdog: watchdog.as_ref(),
        message_frame: platform.message_frame(),
        parts: Vec::with_capacity(FIXED_PARTS + config.devices().count()),
    };
    put_fixed(&mut site)?;
    let mut parts = site.parts;
    cpus::put_slots(machine, &vm, &surroundings, &wake, &mut vcpus, &mut parts)?;
    let root = config.pci.then(|| pci_bus(config, &vm, &surroundings, &wake, &mut parts)).transpose()?;
    let parts = Parts(parts);
    parts.check_places(places)?;
    let mut machine = Box::new(Machine {
        id: id.to_owned(),
        config: config.clone(),
        state: RunState::Paused,
        has_run: false,
        vcpus,
        loops,
        surroundings,
        parts,
        line: None,
        errands,
        wake,
        platform,
        changing: Vec::new(),
        root,
        next_place: 0,
        halt: halt::Watch::default(),
        stays_when_halted: config.dialect == Dialect::Firecracker,
        timeline,
        huge_pages: machine.huge_pages,
        tracks_writes: false,
        slots: None,
        watchdog,
        vm,
        memory,
    });
    machine.attach_all(config, ahead, host)?;
    machine.timeline.mark("devices");
    Ok(machine)
}

/// Has the memory be of pages as they were configured.
fn take_memory(machine: &MachineConfig, memory: &Memory) {
    memory.memory().iter().for_each(|region| machine.huge_pages.choose(region));
    let (size, count) = (machine.mem_size_mib, machine.vcpu_count);
    log::debug(format_args!("allocated {size} MiB of guest memory for {count} CPUs"));
}

/// What boot tables say of the machine before it has any part.
fn platform(config: &Config, memory: Vec<Range>) -> Platform {
    Platform {
        cpus: config.machine_config.vcpus_made(),
        smt: config.machine_config.smt,
        memory,
        command_line: command_line(config),
        initrd: None,
        random_seed: [0; 32],
        nodes: Vec::new(),
        pci: config.pci,
        gic: None,
    }
}

/// How many bytes of memory the guest is to have.
pub fn memory_size(mem_size_mib: u64) -> Result<u64> {
    let size = mem_size_mib.checked_mul(1 << 20).filter(|size| *size >= MEMORY_MIN);
    size.ok_or_else(|| {
        Error::config(format!(
            "{mem_size_mib} MiB of memory (`mem_size_mib`, --memory): at least {} are needed, and the size in bytes \
             must fit 64 bits",
            MEMORY_MIN >> 20
        ))
    })
}

impl HugePages {
    /// Memory with the content of `source` in such pages.
    pub(super) fn source(self, source: Source<'_>) -> Result<Source<'_>> {
        match self {
            Self::Huge2M => source.in_huge_pages(),
            Self::None | Self::Transparent | Self::Never => Ok(source),
        }
    }

    /// Tells the host, whose pages come when they are touched; KVM maps them as they come: this is before both.
    pub(super) fn choose(self, region: &Region) {
        let wanted = match self {
            Self::Transparent => true,
            Self::Never => false,
            Self::None | Self::Huge2M => return,
        };
        match region.ask_for_huge_pages(wanted) {
            Err(error) if wanted => {
                log::line(format_args!("ask for transparent huge pages: {error}: the guest has small ones"));
            }
            // A kernel that has none gives none.
            _ => {}
        }
    }
}

pub fn load(machine: &mut Machine, config: &Config, host: &mut Host) -> Result<()> {
    let memory = &*machine.memory.memory();
    let platform = &mut machine.platform;
    let vcpus = machine.vcpus.stopped();
    // CPUs that are restored are what they were instead.
    machine.vm.settle_cpus(&vcpus, platform.smt, &config.cpu_changes())?;
    platform.nodes = machine.parts.nodes();
    platform.random_seed = host.random_seed()?;
    let entry = match &config.boot_source {
        None => {
            let mut kernel = Cursor::new(firmware::IMAGE);
            arch::load(memory, &mut kernel, None::<&mut File>, platform).context("load the firmware guest")?
        }
        Some(source) => {
            let mut kernel =
                host.file("kernel", &source.kernel_image_path, Access::Read, Sharing::Refused)?;
            let mut initrd = match &source.initrd_path {
                Some(path) => Some(open_initrd(path, host)?),
                None => None,
            };
            let initrd_name = match &source.initrd_path {
                Some(path) => format!(" with initrd `{}`", path.display()),
                None => String::new(),
            };
            arch::load(memory, &mut *kernel, initrd.as_deref_mut(), platform).with_context(|| {
                format!("load kernel `{}`{initrd_name}", source.kernel_image_path.display())
            })?
        }
    };
    machine.parts.begin()?;
    log::debug(format_args!(
        "the kernel is entered at {:#x} with `{}`",
        entry.address, platform.command_line
    ));
    arch::boot(&vcpus, &entry).context("set up the CPUs")?;
    drop(vcpus);
    machine.timeline.mark("kernel and registers");
    log::debug(format_args!("built the machine: {}", machine.timeline));
    Ok(())
}

/// Opens what `source` names ahead of a build, and refuses what can be seen to boot nothing.
pub fn hold_boot_files(source: &BootSource, host: &mut Host) -> Result<()> {
    host.hold(&source.files(), Access::Read, Sharing::Refused)?;
    let path = &source.kernel_image_path;
    host.hold_if("kernel", path, Access::Read, Sharing::Refused, |mut kernel| {
        let checked = arch::check_kernel(&mut kernel).map(drop);
        checked.with_context(|| format!("load kernel `{}`", path.display()))
    })?;
    source.initrd_path.iter().try_for_each(|path| {
        host.hold_if("initrd", path, Access::Read, Sharing::Refused, |initrd| check_initrd(initrd, path))
    })
}

/// The initrd at `path`.
fn open_initrd(path: &Path, host: &mut Host) -> Result<Named<File>> {
    let file = host.file("initrd", path, Access::Read, Sharing::Refused)?;
    check_initrd(&file, path).map(|()| file)
}

/// Refuses an initrd of 0 bytes, the rest of a download or a build that failed: it would be a guest without a root file
/// system that does not say why.
fn check_initrd(mut file: &File, path: &Path) -> Result<()> {
    let attempt = || format!("load initrd `{}`", path.display());
    match file.seek(SeekFrom::End(0)).with_context(attempt)? {
        0 => Err(Error::config("it is empty: make it again, or leave it out")).with_context(attempt),
        _ => Ok(()),
    }
}
