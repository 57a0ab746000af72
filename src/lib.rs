//! Alula, a microVM monitor: one process runs one virtual machine on Linux KVM.
//!
//! The modules, low to high; each uses only those before it (tests/tidy.rs reads this list):
//! - [`sys`]: system calls that the standard library does not have, each as a safe function.
//! - [`error`]: the one error type. [`paths`]: why a path could not be opened. [`spelling`]: what a misspelled word was
//!   meant to be. [`units`]: sizes as people write them. [`clock`]: the time of day. [`json`]: values as clients write
//!   them. [`dialect`]: whose API is spoken. [`metrics`]: counters. [`process`]: what this process costs.
//!   [`descriptors`]: what is open, by name, and what was inherited. [`terminal`]: the terminal that it was started
//!   from. [`sink`]: where lines for the outside go. [`log`]: messages. [`timeline`]: the steps of a start. [`jail`]:
//!   what shuts a program in before it begins.
//! - [`snapshot`]: state that outlives the process. [`limiter`]: rate limits, which devices charge by
//!   `devices/limit.rs`, a disk in its worker. [`metadata`]: what a guest is told of itself, and the service that tells
//!   it.
//! - [`poll`]: the core of an event loop. [`history`]: what happens to the microVM, for its readers. [`uring`]:
//!   io_uring for an event loop. [`memory`]: guest memory. [`host`]: what a machine needs of the host. [`errands`]:
//!   what io threads have `main` do.
//! - [`archive`]: files and trees as tar streams. [`protocol`]: what the agent in a guest and who asks it say to each
//!   other. [`agent`]: what this program does inside a guest: an init that starts programs for the host.
//! - [`platform`]: what boot tables must say, as plain data. [`part`]: what is done with every part of a machine.
//!   [`bus`]: address to device.
//! - [`kvm`]: what KVM's calls leave to their caller's care, as safe functions.
//! - [`arch`]: everything that differs between x86_64 and aarch64, behind one set of names.
//! - [`walls`]: what is left of the kernel to each thread. [`jobs`]: what `main` has others do.
//! - [`vm`]: one KVM virtual machine, its vCPUs and their gate, and how a guest ends.
//! - [`pci`]: configuration space, MSI-X, and the root that moves registers on the bus (`pci/root.rs`).
//! - [`virtio`]: what a virtio device promises, its registers and queues, and the io threads it lives on.
//! - [`devices`]: the devices.
//! - [`config`]: everything a microVM is made of.
//! - [`firmware`]: the guest of our own that is carried along.
//! - [`machine`]: the machine and its run states: a list of parts, built on a shell, then loaded or restored.
//! - [`carry`]: a machine that leaves its process: files of its state and its memory.
//! - [`microvm`]: one microVM and its owner, with every operation on it once, and the main loop.
//! - [`guest`]: what the host asks of the agent in a guest, and what boots a guest whose init it is.
//! - [`api`]: the control socket. [`cli`]: the command line.
//!
//! Threads: `main` serves the socket, signals and standard input, and alone starts threads and opens the files and
//! sockets of the machine; one per vCPU runs guest code and passes accesses to the buses; `io`, where there are
//! devices, runs their workers (a device can ask for threads of its own). An io thread makes what its workers wait by
//! (rings of io_uring, timers, event descriptors, an epoll set), and lets in who connects where `main` listens; for
//! anything else a worker asks `main` by an errand. What a client asks for and takes long is a job, on a thread that
//! `main` starts with open descriptors; the client is answered when the job is done. `command` is there for `alula run
//! -- COMMAND`: a client of the guest's vsock socket, which it connects to, and of the files that the user has copied
//! in and out, for which it has a thread of its own while it copies out. `faults` looks after the page-fault handler of
//! a guest that has one: who waits for its pages can be any other thread. `ahead` (`microvm/working_set.rs`) asks the
//! kernel for what a restored guest will need of its memory's file, and ends. `brake` has CPUs rest that write faster
//! than a live snapshot is written, if that is asked for. A thread of a moment tries whether somebody still listens at
//! a socket's path (`host/listener.rs`). `main` handles the signals that end the process; while it is held up,
//! `signals` and `faults` do (`microvm/signals.rs`). A thread has the walls of its kind from its beginning; `command`,
//! `brake` and the one of a moment have those of `main`. A vCPU whose lock somebody else holds is paused; a device
//! whose workers gave their queues back is paused. Pause, reset, save and a change by the user all are stop, then maybe
//! start: on the device's loop, for which a vCPU that resets the device waits.
//!
//! A machine is a list of parts ([`part::Part`]: a name, a place, a component), in the order in which they are built:
//! devices at fixed places, the PCI bus, then what the configuration lists. Pause, resume, metrics and boot tables walk
//! that list; what ACPI or FDT say of a component are its own `nodes()`, in the device's file (of virtio devices, in
//! `virtio/mmio.rs`), which `arch` prints (`arch/x86_64/acpi.rs`, `arch/aarch64/fdt.rs`). A device comes by
//! [`machine::Machine::attach`] and goes by `detach`, in a build as later (`machine/attach.rs`, which also chooses the
//! places of configured devices; a restore is given those of the state). Devices that KVM is told of as of memory are open
//! before it has interrupt controllers (`machine/ahead.rs`). While the guest runs, that is `plug` and
//! `unplug` (`machine/plug.rs`): by the slots of the PCI bus (`devices/slots.rs`, `arch/x86_64/slots.rs`), or on aarch64 by the
//! ports of PCIe slots ([`pci::port`]), the guest is
//! told, and says what it has let go, which `microvm/plugging.rs` then takes away. CPUs are all made with the machine, and
//! each has a gate of its own, which is open while the guest has the CPU (`machine/cpus.rs`, `vm/vcpus.rs`); of them,
//! `devices/cpu_slots.rs` and `arch/x86_64/cpu_slots.rs` tell the guest, and `microvm/cpus.rs` does what its owner asks. On
//! aarch64 the guest is not told: the calls by which it switches CPUs on and off come to `vm/power.rs`
//! (`arch/aarch64/psci.rs`), which refuses those of CPUs that it has not been given.
//!
//! A machine's shell ([`machine::Shell`]) is the part of it that needs no configuration but how many CPUs there are,
//! and on aarch64 with which features: KVM's machine with its interrupt controllers and CPUs, and memory if its size is
//! known. A build makes the shell in passing, or takes one that was made ahead, whose CPUs' threads wait at the gate,
//! and whose io thread is there. What a build leaves out, the content of CPUs and memory, a load or a restore gives.
//!
//! A machine that stands still is saved and restored by the same list ([`machine::Machine::save`], `restore`): what a
//! guest can change of a component is the component's own [`snapshot::Snapshot`]. The order of the parts and of KVM's
//! half stands in `machine/saved.rs`; the order of what KVM holds, register by register, in the `state.rs` of each
//! architecture. [`microvm::saving`] takes the state and has a job write it to files ([`carry`]), after the memory,
//! which nobody changes meanwhile; of a guest that goes on, `microvm/live.rs` copies the memory in rounds. In which
//! order files come and go, so that a crash leaves a whole snapshot or none, stands in `carry/folder.rs`, and what they
//! may take the place of in `carry/replaced.rs`; the form of the state's file (header, table, checksums) in
//! `carry/state_file.rs`, and what each of its sections holds in `carry/stored.rs`. Which pages a difference has,
//! [`machine::Tracker`] tells (`machine/regions.rs`: KVM's log, and what devices have noted in `memory/written.rs`), or
//! the kernel (`carry/pages.rs`, by `carry/pagemap.rs`). What a restored guest needs of that memory first can be noted
//! beside it (`carry/working_set.rs`, `microvm/working_set.rs`; [`memory::singly`] has no page come with others
//! meanwhile). A restore
//! ([`microvm::snapshots`]) builds the machine over its memory's file, or over memory that a page-fault handler fills
//! (`microvm/handler.rs` calls it, and gives it the descriptor of [`memory::faults`]), restores it, and only then takes
//! it for its own. A template ([`api::template`]) does once what does not depend on the clone, and copies its process
//! for each clone. By two of the parts, which are in its memory (`devices/generation.rs`, `devices/vmclock.rs`), the
//! guest learns that it is another one now.
//!
//! Where something new goes:
//! - A virtio device: a file in `devices/` that implements [`devices::kind::DeviceConfig`] and
//!   [`virtio::VirtioDevice`], in `devices/mod.rs` its module and its line of `KINDS`, and in `api/examples.rs`
//!   examples of its bodies. The config file, the API, the command line and the machine take all they need from there;
//!   the body of a request, its option, and what is opened for it ahead (`hold`) are in the device's file
//!   (`devices/block/config.rs`, ...). A device that Firecracker has, too: its metrics' names in `microvm/counts.rs`
//!   and `microvm/metrics.rs`; a device that a guest's kernel has as a module: its name in `cli/command.rs`. A device
//!   whose work another process does in guest memory: `shares_memory` of its configuration, by which that memory is mapped
//!   from files, and `devices/remote.rs` (`devices/block/vhost_user.rs`, `devices/vhost_user.rs`, `host/vhost_user.rs`), by which another process also goes on where one has ended. A device
//!   that shows the guest memory of the host: `HAS_WINDOW` of its configuration and [`virtio::VirtioDevice::view`]; the
//!   machine finds the addresses (`machine/windows.rs`) and gives KVM what is there ([`memory::window`]) before it
//!   makes interrupt controllers, if the shell is made in the build. A device that plugs memory into a guest that runs:
//!   `room` of its configuration and [`virtio::VirtioDevice::set_slots`], by which slots come and go
//!   ([`memory::slots`]).
//!   A device that is the guest's console: [`virtio::VirtioDevice::line`], by which `main` types
//!   (`host/line.rs`, `devices/virtio_console`).
//! - A device at a fixed place: a file in `devices/` that implements [`devices::fixed::FixedDevice`], in
//!   `devices/mod.rs` its module and its line of `put_fixed`, and its place in `FIXED` in the `layout.rs` of each
//!   architecture that has the device; of a device that is in guest memory instead of on a bus, in `in_memory`.
//! - An API call: what it does, as a method of [`microvm::Microvm`]; a variant of [`api::Request`], its line in
//!   `api/routes.rs`, its arm in `api/handle.rs`, and its line in `api/schema.rs`, from which the OpenAPI file and
//!   `docs/api.md` are made, and an example of its body in `api/examples.rs`. A body stands with what it configures;
//!   one that configures nothing, in `api/bodies.rs` or, of snapshots and clones, `api/snapshot.rs`. Unknown fields are
//!   refused by serde's `deny_unknown_fields`; those of ours that Firecracker does not know, by [`dialect`].
//! - A word of the command line: the file of its command in `cli/arguments/`, with the text of the help. A new command
//!   is a variant of `Command` in `cli/arguments.rs`, too.
//! - Something that readers of `GET /events` hear of: a variant of [`history::Event`]. Something that is counted: a
//!   field of the `metrics!` of whoever counts it. A system call: a function in `sys/`; one that is made once a guest
//!   runs, a line in a list of `resources/seccomp` (`io.list`, `vcpu.list`, ...), too ([`walls`] says in which).
//!
//! The ways through it, file by file:
//! - An access of the guest to a register: `vm/vcpu.rs` takes it out of KVM, `bus.rs` finds the device; what KVM does
//!   itself are kicks of queues and acknowledged interrupts (`vm/posted.rs`). Of a virtio device, `virtio/mmio.rs` or
//!   `virtio/pci.rs` find the register, and `virtio/transport.rs` does what it means. On x86_64 a guest reads the registers
//!   of virtio-mmio from memory (`memory/registers.rs`), which the transport writes there after each change, of devices
//!   whose configuration changes by nothing else ([`virtio::VirtioDevice::has_steady_configuration`]).
//! - A request in a queue: KVM writes to the queue's event, the loop in `virtio/workers.rs` calls the worker that the
//!   device has started (`devices/block/worker.rs`, `devices/net/tap/mod.rs` with `receive.rs` and `outgoing.rs` beside
//!   it, `devices/vsock/worker.rs`, ...).
//! - A request of an API client: `api/server.rs` and `api/connection.rs` read it, `api/routes.rs` makes an
//!   [`api::Request`] of it, `api/handle.rs` calls `microvm/mod.rs`. Requests of a template go to `api/template.rs`.
//! - A start: `machine/build.rs` wires the parts and has `boot.rs` of the architecture load the kernel. A reset by the
//!   user: `microvm/start.rs` ends the machine and starts one that has its devices (`machine/kept.rs`).
//! - A program in the guest (`alula exec`): `cli/exec.rs` connects, `cli/session.rs` asks by `guest/call.rs`; in the
//!   guest `agent/session.rs` hears it, and `agent/process.rs` starts the program.
//! - What the guest's CPUs are: `config/cpu.rs` reads what is asked for; `arch/x86_64/cpuid.rs` makes CPUID, and
//!   `arch/aarch64/mod.rs` asks KVM for features. What one host lacks of another, `features.rs` of the architecture tells.
//! - A watchdog: the guest writes to the registers in `devices/watchdog/`; the loop in `microvm/monitor.rs` waits no longer
//!   than the countdown (`devices/watchdog.rs`), and `microvm/watchdog.rs` does what is to be done at its end.
//! - An end: `vm/exit.rs` notes it, whoever finds it (`machine/halt.rs` finds guests that have halted);
//!   `microvm/monitor.rs` is told, and `microvm/signals.rs` tells it of signals.
//!
//! Invariants (tests/tidy.rs checks what can be checked): modules use only lower ones; `arch/mod.rs` alone asks for the
//! architecture; `unsafe` is only in listed files of `src` and `tests`; a device without its queues touches neither
//! guest memory nor interrupts; what a guest does ends at most itself or its device.

pub mod agent;
pub mod api;
pub mod arch;
pub mod archive;
pub mod bus;
pub mod carry;
pub mod cli;
pub mod clock;
pub mod config;
pub mod descriptors;
pub mod devices;
pub mod dialect;
pub mod errands;
pub mod error;
pub mod firmware;
pub mod guest;
pub mod history;
pub mod host;
pub mod jail;
pub mod jobs;
pub mod json;
pub mod kvm;
pub mod limiter;
pub mod log;
pub mod machine;
pub mod memory;
pub mod metadata;
pub mod metrics;
pub mod microvm;
pub mod part;
pub mod paths;
pub mod pci;
pub mod platform;
pub mod poll;
pub mod process;
pub mod protocol;
pub mod sink;
pub mod snapshot;
pub mod spelling;
pub mod sys;
pub mod terminal;
pub mod timeline;
pub mod units;
pub mod uring;
pub mod virtio;
pub mod vm;
pub mod walls;
