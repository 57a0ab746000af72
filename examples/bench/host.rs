//! The bench's hold on the host, by the tests' means: the network of its guests, and the files that are in memory.

#![allow(clippy::unwrap_used, dead_code, reason = "the tests' means are the tests'")]

#[path = "../../tests/common/cache.rs"]
pub mod cache;
#[path = "../../tests/common/network.rs"]
pub mod network;

use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// Only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(100);

pub fn wait_for(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn output(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    output
}
