//! A vCPU and its thread: runs guest code, hands exits to the buses, stops at the gate.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{
    KVM_EXIT_HYPERCALL, KVM_MP_STATE_RUNNABLE, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::arch;
use crate::bus::{Bus, Shared as SharedDevice};
use crate::descriptors::Name;
use crate::error::{Context, Error, Result};
use crate::kvm::ImmediateExit;
use crate::log;
use crate::memory::lost;
use crate::metrics::{Counter, metrics};
use crate::platform::Place;
use crate::sys::process;
use crate::vm::exit::{End, Exit};
use crate::vm::gate::Gate;
use crate::vm::power::Power;
use crate::walls;

/// What every vCPU works with.
pub struct Surroundings {
    /// Memory-mapped registers.
    pub mmio: Arc<Bus>,
    /// I/O ports (x86_64).
    pub pio: Bus,
    /// The gate they pass before they run.
    pub gate: Arc<Gate>,
    /// Where a vCPU notes the guest's end.
    pub end: End,
    /// The power of the CPUs, if this process switches it; not set: KVM does.
    pub power: OnceLock<Power>,
}

impl Surroundings {
    /// Puts a device's registers at `place`.
    pub fn attach(&self, place: Place, device: SharedDevice) -> Result<()> {
        match place {
            Place::Ports { range, .. } => self.pio.attach(range, device),
            Place::Registers { range, .. } => self.mmio.attach(range, device),
            Place::Pci(_) => Err(Error::host("registers of PCI devices are where the guest puts them")),
            Place::Memory { .. } | Place::Calls => Err(Error::host("what is there has no registers")),
        }
    }
}

/// A vCPU. Its thread holds the lock of `fd` while guest code runs: who can take it knows it is stopped.
pub struct Vcpu {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// The part of a vCPU that its thread shares with others.
pub(super) struct Shared {
    _name: Name,
    pub(super) fd: Mutex<VcpuFd>,
    immediate_exit: ImmediateExit,
    /// Open while the guest has this CPU: no other runs, whatever the guest does to start it.
    pub(super) given: Gate,
    /// Open while the CPU is switched on, if this process switches it; else always.
    pub(super) on: Gate,
    /// The number of the vCPU's thread; 0: it has none yet.
    thread: AtomicI32,
    metrics: Metrics,
}

impl Shared {
    fn may_run(&self, surroundings: &Surroundings) -> bool {
        surroundings.gate.is_open() && self.given.is_open() && self.on.is_open()
    }

    /// Waits while the CPU may not run; false: it is gone.
    fn pass(&self, surroundings: &Surroundings) -> bool {
        self.given.pass() && self.on.pass() && surroundings.gate.pass()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handle by which a thread that does not own a vCPU makes it look at the gate.
#[derive(Clone)]
pub struct Kicker(Arc<Shared>);

impl Kicker {
    /// Makes the vCPU look at the gate soon.
    pub fn kick(&self) {
        self.0.immediate_exit.set(1);
        let thread = self.0.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // Another thread may have the number of one that is gone: the signal's handler does nothing there, either.
            process::signal_thread(thread, kick_signal());
        }
    }
}

metrics! {
    /// How often a vCPU came out of the guest, and for what; names as in Firecracker's metrics. Each
    /// vCPU has its own, so that they do not share a cache line.
    pub struct Metrics {
        /// It read an I/O port.
        exit_io_in: Counter,
        /// It wrote an I/O port.
        exit_io_out: Counter,
        /// It read memory-mapped registers.
        exit_mmio_read: Counter,
        /// It wrote memory-mapped registers.
        exit_mmio_write: Counter,
        /// It was interrupted, by a kick or another signal.
        exit_interrupted: Counter,
        /// It could not go on.
        failures: Counter,
    }
}

/// The signal that makes KVM_RUN return. Its handler does nothing: the interrupted call is all we want.
fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// Makes kicks harmless to the process; once, before the first vCPU runs.
pub fn register_kick() -> Result<()> {
    extern "C" fn on_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(kick_signal(), on_kick).context("install the signal that stops vCPUs")
}

impl Vcpu {
    /// Owns `fd`, the vCPU with this number, which the guest has; it does not run before `start`.
    pub fn new(index: usize, mut fd: VcpuFd) -> Self {
        let [given, on] = [Gate::default(), Gate::default()];
        given.open();
        on.open();
        let name = Name::new(&fd, format!("vCPU {index}"));
        let immediate_exit = ImmediateExit::of(&mut fd);
        Self {
            shared: Arc::new(Shared {
                _name: name,
                fd: Mutex::new(fd),
                immediate_exit,
                given,
                on,
                thread: AtomicI32::new(0),
                metrics: Metrics::new(),
            }),
            thread: None,
        }
    }

    /// Starts the vCPU's thread, which waits at the gate. No effect when it has one.
    pub fn start(&mut self, index: usize, surroundings: &Arc<Surroundings>) -> Result<()> {
        self.spawn(index, surroundings, None)
    }

    /// The same for a vCPU that has not run yet, whether it has its state or not. Its thread first enters KVM once, which returns at once: what KVM
    /// makes for a vCPU when it first runs, for its thread and for the machine, is there then. `done` is dropped
    /// after that.
    pub fn start_ahead(
        &mut self,
        index: usize,
        surroundings: &Arc<Surroundings>,
        done: Sender<()>,
    ) -> Result<()> {
        self.spawn(index, surroundings, Some(done))
    }

    fn spawn(
        &mut self,
        index: usize,
        surroundings: &Arc<Surroundings>,
        rehearsed: Option<Sender<()>>,
    ) -> Result<()> {
        if self.thread.is_none() {
            let (shared, surroundings) = (self.shared.clone(), surroundings.clone());
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || {
                    // A thread that takes a signal that ends the process would have to remove files.
                    process::block_all_signals(&[kick_signal()]);
                    walls::enclose(walls::Kind::Vcpu);
                    shared.thread.store(process::thread_number(), Ordering::SeqCst);
                    if let Some(rehearsed) = rehearsed {
                        rehearse(&shared);
                        drop(rehearsed);
                    }
                    let mut stood_still = false;
                    while shared.pass(&surroundings) {
                        run(&shared, &surroundings, index, stood_still);
                        stood_still = true;
                    }
                })
                .with_context(|| {
                    format!("start the thread of vCPU {index} (`ulimit -u` and `pids.max` of a control group bound them)")
                })?;
            self.thread = Some(thread);
        }
        Ok(())
    }

    /// The part that its thread shares with others.
    pub(super) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// A handle by which another thread kicks the vCPU.
    pub(super) fn kicker(&self) -> Kicker {
        Kicker(self.shared.clone())
    }

    /// Whether the vCPU has a thread.
    pub(super) fn has_thread(&self) -> bool {
        self.thread.is_some()
    }

    /// Has the guest have it, or not. One that is taken from the guest must also be kicked.
    pub(super) fn set_given(&self, is_given: bool) {
        if is_given { self.shared.given.open() } else { self.shared.given.close() }
    }

    /// True if the guest has it.
    pub fn is_given(&self) -> bool {
        self.shared.given.is_open()
    }

    /// Has its thread end once the gate is removed.
    pub(super) fn remove(&self) {
        self.shared.given.remove();
        self.shared.on.remove();
    }

    /// Why it came out of the guest.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Makes the vCPU look at the gate soon.
    pub fn kick(&self) {
        self.shared.immediate_exit.set(1);
        if let Some(thread) = &self.thread {
            // A thread that is gone needs no kick.
            let _ = thread.kill(kick_signal());
        }
    }

    /// The stopped vCPU; waits until it is. The gate must be closed and the vCPU kicked.
    pub fn stopped(&self) -> MutexGuard<'_, VcpuFd> {
        self.shared.lock()
    }

    /// CPU time that the vCPU's thread has used so far, in nanoseconds.
    pub fn cpu_time_ns(&self) -> u64 {
        let time = self.thread.as_ref().map_or(Duration::ZERO, process::cpu_time);
        time.as_nanos() as u64
    }

    /// Waits for the thread to end; the gate must have been removed and the vCPU kicked.
    pub fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }
}

/// Enters KVM, where that can be done without any state, and comes back before any guest code runs.
fn rehearse(shared: &Shared) {
    if arch::ENTERS_WITHOUT_STATE {
        let mut fd = shared.lock();
        shared.immediate_exit.set(1);
        // EINTR. What else KVM may say, it says again when the guest is to run.
        let _ = fd.run();
    }
}

/// Runs guest code until the gate closes. KVM finishes an I/O instruction only in the KVM_RUN after
/// its exit, so the vCPU is stopped when KVM_RUN was interrupted, not when an exit was handled.
/// `stood_still`: the guest ran before, and the gate was closed since.
fn run(shared: &Shared, surroundings: &Surroundings, index: usize, stood_still: bool) {
    let mut fd = shared.lock();
    // A pause between the gate and this lock has found the vCPU stopped. Even a KVM_RUN that returns at once
    // would be in the way of who saves the machine: KVM refuses to read a GIC (EBUSY) meanwhile. No instruction
    // is unfinished here, for the last KVM_RUN was interrupted.
    if !shared.may_run(surroundings) {
        return;
    }
    if stood_still {
        tell_that_it_stood_still(&fd, index);
    }
    // Undoes the kick that stopped it. A pause that comes now closes the gate before it kicks: either
    // the gate is seen closed below, or the kick comes after this.
    shared.immediate_exit.set(0);
    let (mut not_run, mut left_at) = (0, None);
    loop {
        if !shared.may_run(surroundings) {
            shared.immediate_exit.set(1);
        }
        match enter(&mut fd, index, &mut left_at) {
            Ok(VcpuExit::MmioRead(address, data)) => {
                shared.metrics.exit_mmio_read.add(1);
                trace(index, "reads", data.len(), "address", address);
                surroundings.mmio.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                shared.metrics.exit_mmio_write.add(1);
                trace(index, "writes", data.len(), "address", address);
                surroundings.mmio.write(address, data);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                shared.metrics.exit_io_in.add(1);
                trace(index, "reads", data.len(), "port", port.into());
                surroundings.pio.read(port.into(), data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                shared.metrics.exit_io_out.add(1);
                trace(index, "writes", data.len(), "port", port.into());
                surroundings.pio.write(port.into(), data);
            }
            // EAGAIN: a secondary CPU that has just been woken by its start-up interrupt.
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {
                shared.metrics.exit_interrupted.add(1);
                if !shared.may_run(surroundings) {
                    return;
                }
                if error.errno() == libc::EAGAIN {
                    shared.immediate_exit.set(0);
                    match look_at_cpu_that_is_not_run(&fd, index, &mut not_run) {
                        Some(reason) => return end(shared, surroundings, Exit::Failed(reason)),
                        None => continue,
                    }
                }
                // A signal that stops the process, a debugger, the freezer of a control group or of a
                // host that sleeps: each interrupts KVM_RUN, and holds this thread until it is over.
                tell_that_it_stood_still(&fd, index);
                surroundings.gate.rest();
                shared.immediate_exit.set(0);
            }
            Ok(VcpuExit::InternalError | VcpuExit::Unsupported(_) | VcpuExit::Hypercall(_)) => {
                if let Err(reason) = answer(&mut fd, surroundings, index) {
                    return end(shared, surroundings, Exit::Failed(reason));
                }
            }
            other => return end(shared, surroundings, last_exit(other, index)),
        }
        not_run = 0;
    }
}

/// A guest whose CPU was left alone for so long while an exit was handled has stood still: a signal that stops the process
/// then interrupts no KVM_RUN, and a console may wait for who reads it. Watchdogs of a guest wait for seconds.
const ALONE_MIN: Duration = Duration::from_millis(500);

/// Runs guest code, which was left at `left_at` before: the time of a clock that is read without a system call.
fn enter<'f>(
    fd: &'f mut VcpuFd,
    index: usize,
    left_at: &mut Option<Duration>,
) -> std::result::Result<VcpuExit<'f>, kvm_ioctls::Error> {
    let now = || process::time(libc::CLOCK_MONOTONIC_COARSE);
    if left_at.is_some_and(|left_at| now().saturating_sub(left_at) >= ALONE_MIN) {
        tell_that_it_stood_still(fd, index);
    }
    let exit = fd.run();
    *left_at = Some(now());
    exit
}

/// The number of times in a row that KVM may refuse to run a CPU (EAGAIN) before the CPU is looked at; from the fourth on
/// they are 1 ms apart. KVM also refuses a CPU for which it may not start a thread of the kernel.
const NOT_RUN_MAX: u32 = 1000;

/// KVM has not run a CPU, once more than the `times` in a row before; returns why, if that will not change. A CPU that waits to be started is
/// not run once for each event that comes to it, and may have one that stays.
fn look_at_cpu_that_is_not_run(fd: &VcpuFd, index: usize, times: &mut u32) -> Option<String> {
    *times += 1;
    if *times > 3 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let is_time = times.is_multiple_of(NOT_RUN_MAX);
    let has_started = is_time && fd.get_mp_state().is_ok_and(|state| state.mp_state == KVM_MP_STATE_RUNNABLE);
    has_started.then(|| {
        format!(
            "KVM_RUN on CPU {index} gives no result, {times} times in a row: the kernel may not start a thread that it \
             needs for the guest: raise the limit of processes (`pids.max` of the control group, or RLIMIT_NPROC)"
        )
    })
}

/// Answers a call by which the guest switches CPUs on and off, or refuses an instruction that KVM could not do; the error
/// says why the guest cannot go on.
fn answer(fd: &mut VcpuFd, surroundings: &Surroundings, index: usize) -> Result<(), String> {
    match (surroundings.power.get(), fd.get_kvm_run().exit_reason) {
        (Some(power), KVM_EXIT_HYPERCALL) => power
            .answer(fd, index)
            .map_err(|error| format!("answer its call to switch a CPU on or off, by CPU {index}: {error}")),
        _ => arch::refuse_instruction(fd, index).map(log::guest_line),
    }
}

/// How the guest ended, after an exit that nothing can be done about.
fn last_exit(exit: std::result::Result<VcpuExit<'_>, kvm_ioctls::Error>, index: usize) -> Exit {
    match exit {
        Ok(VcpuExit::Shutdown) => Exit::TripleFault,
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Exit::PoweredOff,
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => Exit::Reset,
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => {
            Exit::Failed("it reported its own crash to KVM".to_owned())
        }
        Ok(VcpuExit::FailEntry(reason, _)) => Exit::Failed(format!(
            "the processor refused to enter the guest on CPU {index} (reason {reason:#x})"
        )),
        Ok(unknown) => Exit::Failed(format!("KVM_RUN on CPU {index} returned {unknown:?}")),
        Err(error) => {
            lost::look_at_run(&error.into());
            Exit::Failed(format!("KVM_RUN on CPU {index}: {error}"))
        }
    }
}

/// Tells of an access of the guest's to registers.
fn trace(index: usize, what: &str, length: usize, space: &str, address: u64) {
    log::guest_trace(format_args!("CPU {index} {what} {length} bytes at {space} {address:#x}"));
}

/// The guest ends by this vCPU, which is in no state to be entered again, not even to be interrupted.
fn end(shared: &Shared, surroundings: &Surroundings, exit: Exit) {
    if matches!(exit, Exit::Failed(_)) {
        shared.metrics.failures.add(1);
    }
    if matches!(exit, Exit::Failed(_) | Exit::TripleFault) {
        lost::look_at_file();
    }
    surroundings.end.set(exit);
}

/// A guest that finds its clock far ahead would blame its own CPUs for it.
fn tell_that_it_stood_still(fd: &VcpuFd, index: usize) {
    if let Err(error) = arch::tell_that_it_stood_still(fd) {
        log::line(format_args!("tell CPU {index} of the guest that it stood still: {error}"));
    }
}
