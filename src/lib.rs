//! Alula, a microVM monitor: one process runs one virtual machine on Linux KVM.
//!
//! The modules, low to high; each uses only those before it:
//! - [`error`]: the one error type. [`log`]: messages on standard error. [`timeline`]: what a start is made of.
//! - [`event`]: the core of an event loop. [`host`]: where files come from. [`memory`]: guest memory.
//! - [`platform`]: what boot tables must say, as plain data.
//! - [`arch`]: everything that differs between x86_64 and aarch64, behind one set of names.
//! - [`bus`]: address to device.
//! - [`vm`]: one KVM virtual machine, its vCPUs and their gate, and how a guest ends.
//! - [`pci`]: configuration space, MSI-X, and the root that moves registers on the bus.
//! - [`virtio`]: what a virtio device promises, its registers and queues, and the io thread it lives on.
//! - [`devices`]: the devices.
//! - [`config`]: everything a microVM is made of.
//! - [`firmware`]: the guest of our own that is carried along.
//! - [`machine`]: the machine and its run states: build, then load.
//! - [`api`]: the control socket: every operation once. [`cli`]: the command line and the main loop.

pub mod api;
pub mod arch;
pub mod bus;
pub mod cli;
pub mod config;
pub mod devices;
pub mod error;
pub mod event;
pub mod firmware;
pub mod host;
pub mod log;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod platform;
pub mod timeline;
pub mod virtio;
pub mod vm;
