//! The gate under stress: whatever the moment a pause or a resume comes, nothing is lost.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use alula::config::Config;
use alula::host::Host;
use alula::machine::{Machine, Prepared};

/// A console that counts bytes.
struct Counted(Arc<AtomicU64>);

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn spin(iterations: u32) {
    for _ in 0..iterations {
        std::hint::spin_loop();
    }
}

#[test]
fn a_guest_goes_on_after_every_resume_and_stands_still_in_every_pause() {
    common::in_steps(|step| {
        let count = Arc::new(AtomicU64::new(0));
        let mut config = Config::default();
        config.firmware_words = Some("flood".to_owned());
        let mut host = Host::default();
        host.give_console(Box::new(Counted(count.clone())));
        let mut machine = Machine::build("test", &config, &mut host, Prepared::new().unwrap()).unwrap();
        machine.load(&config, &mut host).unwrap();
        for round in 0..50 {
            step(format!("round {round}"));
            // Many in a row, a little later each time, so that pauses and resumes meet the vCPU at every
            // step of its way through the gate.
            for delay in 0..200 {
                machine.resume().unwrap();
                spin(delay * 20);
                machine.pause().unwrap();
            }
            let before = count.load(Ordering::SeqCst);
            std::thread::yield_now();
            assert_eq!(count.load(Ordering::SeqCst), before, "round {round}: it ran while it was paused");
            machine.resume().unwrap();
            step(format!("round {round}: it goes on"));
            while count.load(Ordering::SeqCst) == before {
                std::thread::yield_now();
            }
        }
    });
}
