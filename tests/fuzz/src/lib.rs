//! Fuzzing of what guests, clients and files can reach (`scripts/fuzz`). Each module is a target: what it
//! does with its bytes, and what must hold whatever they are. Behind the targets is the guest in memory
//! of the contract tests, its device turned by hand: the same bytes always do the same.
#![allow(clippy::unwrap_used, reason = "a target fails by it")]

pub mod agent;
pub mod arch;
pub mod balloon;
pub mod config;
pub mod device;
pub mod ground;
pub mod host;
pub mod hotplug;
pub mod http;
pub mod kernel;
pub mod metadata;
pub mod passt;
pub mod pci;
pub mod qcow2;
pub mod slots;
pub mod snapshot;
pub mod sockets;
pub mod state;
pub mod vhost_user;

#[path = "../../common/allocator.rs"]
pub mod allocator;
#[path = "../../common/driver/mod.rs"]
pub mod driver;
#[path = "../../common/network.rs"]
pub mod network;
#[path = "../../common/vsock.rs"]
pub mod vsock;

use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// The files of [`arch`] find these as in their own package.
use alula::{error, memory, platform};

/// Far more than anything here takes, on a slow machine under load too: only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for what a device does by itself: asynchronous I/O, a timer.
pub fn wait_for(mut condition: impl FnMut() -> bool) {
    let mut begun = None;
    while !condition() {
        let begun: &Instant = begun.get_or_insert_with(Instant::now);
        assert!(begun.elapsed() < PATIENCE, "waited in vain");
        std::thread::yield_now();
    }
}

/// The output of another program, which must succeed.
pub fn output(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    output
}
