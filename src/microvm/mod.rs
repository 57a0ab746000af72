//! One microVM and who owns it: its configuration before the start, its machine after that, where its metrics
//! go, and the jobs that are done for it. Each operation is a method here, whoever asks for it; `monitor` is
//! the loop of the process's main thread, which runs until the guest, its user or a signal ends the microVM.

pub mod ahead;
pub mod counts;
mod cpus;
pub mod drives;
mod handler;
mod input;
mod live;
mod metrics;
pub mod monitor;
pub mod plugging;
pub mod purpose;
pub mod saving;
pub mod signals;
pub mod snapshots;
mod start;
mod watchdog;
pub mod working_set;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use crate::config::{BootSource, Config, CpuConfig, MachineConfig};
use crate::devices::console;
use crate::devices::kind::{Change, ConfiguredDevice, DeviceKind};
use crate::error::{Context, Error, Result};
use crate::history::{self, Event};
use crate::host::socket_file::OwnFolder;
use crate::host::{Access, Host, Resource, Sharing};
use crate::jobs::{Jobs, Ticket};
use crate::json;
use crate::log;
use crate::machine::{Base, Machine, RunState};
use crate::memory::page_set::PageSet;
use crate::metadata;
use crate::metadata::store::Store;
use crate::metrics::{self as counted, View};
use crate::poll::EventFd;
use ahead::Warm;
use counts::LATENCIES;

/// So long `main` itself waits for a device to stop that is to be changed. Hardly any takes longer; while one
/// does, the API and the console must not stand still.
const CHANGE_TIME: Duration = Duration::from_millis(20);

/// What is left for `main` to do when a job is done. It returns what whoever asked is told, if there is anything.
pub type Finish = Box<dyn FnOnce(&mut Microvm) -> Result<Option<Value>> + Send>;

/// A microVM, from the first request to its end. What is refused changes nothing.
pub struct Microvm {
    id: String,
    config: Config,
    host: Host,
    metrics: Option<metrics::MetricsFile>,
    /// What was made ahead for the machine to be.
    ahead: Option<Base>,
    /// The machine that is expected, if that is known.
    warm: Option<Warm>,
    /// On the heap: with it, this would be large, and each function that it is moved through would have room for it on
    /// the stack, for as long as the guest runs.
    machine: Option<Box<Machine>>,
    /// The page-fault handler of the machine's memory. Dropped after the machine, whose threads may wait for a page.
    handler: Option<handler::Handler>,
    /// The folder that was made for the vsock socket of a restored machine. Dropped after the machine.
    own_folder: Option<OwnFolder>,
    jobs: Jobs<Finish>,
    saving: Option<saving::Saving>,
    taken: saving::Taken,
    /// The folder that the machine was restored from, if it is one of ours.
    origin: Option<working_set::Origin>,
    /// The last job that notes there what the guest needs first.
    noting: Option<Ticket>,
    /// Pages that were written since the last snapshot, as far as the log was asked for a later one that failed;
    /// None: no snapshot since writes are noted.
    unsaved: Option<PageSet>,
    metadata: Arc<Store>,
    /// An agent in the guest has said that it listens.
    has_agent: bool,
    /// The guest is there for one command.
    boots_once: bool,
    /// The request by which the guest was asked to end, since it boots.
    asked_to_end: Option<&'static str>,
    /// How often the machine was reset.
    resets: u64,
    /// Why there is no machine any more.
    end: Option<Error>,
}

/// Before and after its start, and while it is.
impl Microvm {
    /// The microVM that `config` describes, not started yet. On the heap, as every place on the stack that it is moved
    /// through stays in memory for as long as the process runs.
    #[inline(never)]
    pub fn new(id: String, config: Config) -> Box<Self> {
        Box::new(Self {
            id,
            config,
            host: Host::default(),
            metrics: None,
            ahead: None,
            warm: None,
            machine: None,
            handler: None,
            own_folder: None,
            jobs: Jobs::default(),
            saving: None,
            taken: saving::Taken::default(),
            origin: None,
            noting: None,
            unsaved: None,
            metadata: Arc::new(Store::new(metadata::SIZE_MAX)),
            has_agent: false,
            boots_once: false,
            asked_to_end: None,
            resets: 0,
            end: None,
        })
    }

    /// Keeps so many bytes of metadata at most, and begins with those of the file at `path`.
    pub fn keep_metadata(&mut self, size_max: usize, path: Option<&Path>) -> Result<()> {
        self.metadata = Arc::new(Store::new(size_max));
        let Some(path) = path else { return Ok(()) };
        let text = Config::read_called("metadata", path)?;
        let data = serde_json::from_slice(&text).map_err(|error| {
            let (line, column) = (error.line(), error.column());
            Error::config(format!("{} at line {line} column {column}", json::words::tell(&text, &error)))
        });
        let put = |data| self.metadata.put(data).map_err(|refused| Error::config(refused.to_string()));
        data.and_then(put).with_context(|| format!("read metadata `{}`", path.display()))
    }

    /// What its guest can ask for.
    pub fn metadata(&self) -> &Store {
        &self.metadata
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What it is made of.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Gives the machine to be built what it needs of the host and has no path, for `what` (see [`Host::give`]).
    pub fn give(&mut self, what: &str, resource: Resource) {
        self.host.give(what, resource);
    }

    /// Lets disks be shared with others, with a warning.
    pub fn warn_of_sharing(&mut self) {
        self.host.warn_of_sharing();
    }

    /// Opens where the configuration, as it was given, says that messages and metrics go.
    pub fn open_outputs(&mut self) -> Result<()> {
        if let Some(logger) = &self.config.logger {
            log::configure(&self.id, logger)?;
        }
        if let Some(metrics) = &self.config.metrics {
            self.metrics = Some(metrics::MetricsFile::open(metrics.clone())?);
        }
        Ok(())
    }

    /// Everything that is counted.
    pub fn count(&self, view: View) -> Map<String, Value> {
        metrics::collect(self.machine.as_deref(), view)
    }

    /// Writes a line of metrics, if they go anywhere.
    pub fn write_metrics(&mut self) {
        if let Some(output) = &mut self.metrics {
            output.write(&self.id, self.machine.as_deref());
        }
    }

    /// Writes a line of metrics when it is time for one, reminds the guest of what it has not heard, and looks which CPUs it
    /// has let go; to be called about once a second while the machine is there.
    pub fn look_after(&mut self) {
        self.machine.iter().for_each(|machine| machine.remind());
        self.take_gone_cpus();
        if let Some(output) = &mut self.metrics {
            output.flush();
            if output.is_due() {
                self.write_metrics();
            }
        }
    }

    /// The machine, once it has started.
    pub fn machine(&mut self) -> Option<&mut Machine> {
        self.machine.as_deref_mut()
    }

    /// Whether the machine runs; none: it has not started.
    pub fn state(&self) -> Option<RunState> {
        self.machine.as_deref().map(Machine::state)
    }

    /// Whether somebody waits for a page of the guest's memory that its page-fault handler has not given yet.
    pub fn waits_for_page(&self) -> bool {
        self.handler.as_ref().is_some_and(handler::Handler::is_awaited)
    }

    /// Does what the machine wants done; to be called when its `wake_fd` is readable. Returns whether an agent in
    /// the guest has said meanwhile that it listens.
    pub fn attend(&mut self) -> bool {
        if let Some(machine) = &mut self.machine {
            machine.attend(&mut self.host);
        }
        self.take_let_go();
        self.take_gone_cpus();
        let has_called = self.host.take_agent_call();
        // Told once: a guest can have its agent say so again and again.
        if has_called && !std::mem::replace(&mut self.has_agent, true) {
            history::tell(|| Event::GuestReady);
        }
        has_called
    }

    fn started(&mut self) -> Result<&mut Machine> {
        self.machine.as_deref_mut().ok_or_else(not_started)
    }
}

fn not_started() -> Error {
    Error::config("the microVM has not started")
}

/// What it is made of, before it starts.
impl Microvm {
    /// Sets CPUs and memory.
    pub fn set_machine(&mut self, machine: MachineConfig) -> Result<()> {
        self.config.set_machine(machine)
    }

    /// Sets what its CPUs are. Whether the host's CPUs have what is to be changed is known at the start.
    pub fn set_cpu(&mut self, cpu: CpuConfig) -> Result<()> {
        self.config.set_cpu(cpu)
    }

    /// Sets what it boots. The files are opened now: a wrong path is refused where it is named, and what is at
    /// the path now is what boots.
    pub fn set_boot_source(&mut self, source: BootSource) -> Result<()> {
        source.check()?;
        self.host.hold(&source.files(), Access::Read, Sharing::Refused)?;
        self.config.boot_source = Some(source);
        Ok(())
    }

    /// Sets where messages go, from now on.
    pub fn set_logger(&mut self, logger: log::Config) -> Result<()> {
        log::configure(&self.id, &logger)?;
        self.config.logger = Some(self.config.logger.take().unwrap_or_default().changed(&logger));
        Ok(())
    }

    /// Sets where metrics go, once.
    pub fn set_metrics(&mut self, metrics: counted::Config) -> Result<()> {
        if self.metrics.is_some() {
            return Err(Error::config("Reinitialization of metrics not allowed."));
        }
        self.metrics = Some(metrics::MetricsFile::open(metrics.clone())?);
        self.config.metrics = Some(metrics);
        Ok(())
    }

    /// Sets where the serial console writes. The file is opened now, as the kernel is.
    pub fn set_serial(&mut self, serial: console::Config) -> Result<()> {
        self.host.hold_console(serial.serial_out_path.as_deref())?;
        self.config.serial = Some(serial);
        Ok(())
    }

    /// Sets where and how the metadata service answers: on interfaces that there are already.
    pub fn set_metadata_config(&mut self, config: metadata::Config) -> Result<()> {
        config.check()?;
        self.config.check_metadata(&config)?;
        self.config.mmds_config = Some(config);
        Ok(())
    }

    /// Adds a device, or replaces that of its name. What the device needs is opened now, as the kernel is.
    pub fn put_device(&mut self, device: ConfiguredDevice) -> Result<()> {
        device.check()?;
        // A device that is refused must hold no file or interface of the host.
        self.config.check_beside(&device)?;
        device.hold(&mut self.host)?;
        self.config.put(device)
    }
}

/// What can be done to it once it has started.
impl Microvm {
    /// Stops CPUs and devices until [`Microvm::resume`]. `reason`: who wants it.
    pub fn pause(&mut self, reason: &'static str) -> Result<()> {
        let begun = Instant::now();
        if let Some(saving) = &mut self.saving {
            saving.leave_paused();
        }
        let machine = self.started()?;
        let was_running = machine.state() == RunState::Running;
        machine.pause()?;
        note(begun, [&LATENCIES.pause_vm, &LATENCIES.vmm_pause_vm]);
        if was_running {
            history::tell(|| Event::Paused { reason });
        }
        Ok(())
    }

    /// Lets CPUs and devices go on. `reason`: who wants it.
    pub fn resume(&mut self, reason: &'static str) -> Result<()> {
        self.check_not_saving()?;
        self.go_on(reason)
    }

    fn go_on(&mut self, reason: &'static str) -> Result<()> {
        let begun = Instant::now();
        let machine = self.started()?;
        let was_paused = machine.state() == RunState::Paused;
        machine.resume()?;
        note(begun, [&LATENCIES.resume_vm, &LATENCIES.vmm_resume_vm]);
        if was_paused {
            history::tell(|| Event::Resumed { reason });
        }
        Ok(())
    }

    /// Changes what can be changed of a device in use, once what it has in flight is finished. A device that
    /// takes its time for that, because a disk does not answer, has a job wait for it: its ticket is returned.
    pub fn patch_device(&mut self, kind: &'static DeviceKind, change: Change) -> Result<Option<Ticket>> {
        self.check_not_saving()?;
        let (device, _) = self.changed(kind, &change)?;
        let name = device.name();
        let pausing = self.started()?.begin_change(&name)?;
        if pausing.wait_for(CHANGE_TIME) {
            return self.end_change(kind, &change).map(|()| None);
        }
        log::debug(format_args!("{name} is changed when it has finished what it has in flight"));
        let job = self.start_job("change", move || {
            pausing.wait();
            Box::new(move |microvm| microvm.end_change(kind, &change).map(|()| None))
        });
        if job.is_err() {
            self.started()?.end_change(&name);
        }
        job.map(Some)
    }

    /// Tells of a device of which there is one: at an empty `place` its configuration, else what it says itself; of some
    /// kinds, that at an empty place, too.
    pub fn tell_device(&self, kind: &DeviceKind, place: &str) -> Result<Value> {
        let device = self.device(kind, "")?;
        match place {
            "" if !kind.tells_itself => serde_json::to_value(device).context("write its configuration"),
            place => self.machine.as_deref().ok_or_else(not_started)?.tell(&device.name(), place),
        }
    }

    fn device(&self, kind: &DeviceKind, id: &str) -> Result<&ConfiguredDevice> {
        let unknown = || match kind.many {
            true => format!("there is no {}", kind.name(id)),
            // Firecracker's words.
            false => format!("No {} found.", kind.noun),
        };
        self.config.device(kind, id).ok_or_else(|| Error::config(unknown()))
    }

    /// A device as it is configured, and as it will be.
    fn changed(&self, kind: &DeviceKind, change: &Change) -> Result<(ConfiguredDevice, ConfiguredDevice)> {
        let device = self.device(kind, &change.id)?.clone();
        let changed = device.patched(change)?;
        // Before the device has it: a change that is refused changes nothing.
        self.config.check_beside(&changed)?;
        Ok((device, changed))
    }

    /// Makes a change for which its device stands still. What is configured beside the device may be other
    /// than when the change began.
    fn end_change(&mut self, kind: &DeviceKind, change: &Change) -> Result<()> {
        let changed = self.changed(kind, change);
        let machine = self.machine.as_deref_mut().ok_or_else(not_started)?;
        let made = changed.and_then(|(device, changed)| {
            machine.patch_device(&changed, change.patch(), &mut self.host)?;
            self.config.put(changed)?;
            Ok(device)
        });
        // One that was refused before the device had it.
        let device = made.inspect_err(|_| machine.end_change(&kind.name(&change.id)))?;
        history::tell(|| match change.body["path_on_host"].as_str() {
            Some(path) => Event::DiskSwapped { drive_id: change.id.clone(), path: PathBuf::from(path) },
            None => Event::DeviceChanged { device: device.name(), change: change.body.clone() },
        });
        Ok(())
    }

    /// Presses Ctrl-Alt-Del on the guest's keyboard.
    pub fn send_ctrl_alt_del(&mut self) -> Result<()> {
        self.started()?.send_ctrl_alt_del()?;
        self.asked_to_end = Some("SendCtrlAltDel");
        Ok(())
    }

    /// Asks the guest to power off, in the way of its architecture.
    pub fn request_shutdown(&mut self) -> Result<()> {
        self.started()?.request_shutdown()?;
        self.asked_to_end = Some("Shutdown");
        Ok(())
    }
}

/// What takes long.
impl Microvm {
    /// Has `work` done on a thread called `name`, which opens nothing; what `work` returns is then done here.
    /// Whoever asks is told of the end by [`Microvm::finish_jobs`]. An error: too many jobs are open.
    pub fn start_job(
        &mut self,
        name: &str,
        work: impl FnOnce() -> Finish + Send + 'static,
    ) -> Result<Ticket> {
        self.jobs.start(name, work)
    }

    /// Readable when [`Microvm::finish_jobs`] is to be called; none: there was no job yet.
    pub fn jobs_event(&self) -> Option<&EventFd> {
        self.jobs.event()
    }

    /// Does what is left to do of jobs that have ended, and says how they ended.
    pub fn finish_jobs(&mut self) -> Vec<(Ticket, Result<Option<Value>>)> {
        let mut answers = Vec::new();
        for (ticket, finish) in self.jobs.take_ended() {
            let answer = finish(self);
            // One that goes on has not ended.
            if !self.jobs.is_open(ticket) {
                answers.push((ticket, answer));
            }
        }
        answers
    }
}

fn note(begun: Instant, latencies: [&counted::Gauge; 2]) {
    latencies.iter().for_each(|latency| latency.set(begun.elapsed().as_micros() as u64));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_job_is_done_by_its_owner() {
        let mut microvm = Microvm::new("test".to_owned(), Config::default());
        let larger = MachineConfig { mem_size_mib: 77, ..MachineConfig::default() };
        let none = MachineConfig { vcpu_count: 0, ..MachineConfig::default() };
        for (machine, is_done) in [(larger, true), (none, false)] {
            let ticket = microvm
                .start_job("job", move || {
                    Box::new(move |microvm: &mut Microvm| microvm.set_machine(machine).map(|()| None))
                })
                .unwrap();
            let event = microvm.jobs_event().unwrap();
            while event.read().is_err() {
                std::thread::yield_now();
            }
            let ended = microvm.finish_jobs();
            assert!(matches!(&ended[..], [(other, result)] if *other == ticket && result.is_ok() == is_done));
            assert_eq!(microvm.config().machine_config.mem_size_mib, 77);
        }
    }

    #[test]
    fn what_needs_a_machine_is_refused_before_the_start() {
        let mut microvm = Microvm::new("test".to_owned(), Config::default());
        let error = [
            microvm.pause("test"),
            microvm.resume("test"),
            microvm.send_ctrl_alt_del(),
            microvm.request_shutdown(),
            microvm.reset("test"),
        ];
        assert!(error.iter().all(|result| result.as_ref().unwrap_err().to_string().contains("not started")));
        assert_eq!(microvm.state(), None);
    }
}
