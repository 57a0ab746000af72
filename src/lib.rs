//! Alula, a microVM monitor: one process runs one virtual machine on Linux KVM.
//!
//! The modules, low to high; each uses only those before it:
//! - [`error`]: the one error type.
//! - [`event`]: the core of an event loop. [`host`]: where files come from.
//! - [`config`]: everything a microVM is made of.
//! - [`machine`]: the machine and its run states.

pub mod config;
pub mod error;
pub mod event;
pub mod host;
pub mod machine;
