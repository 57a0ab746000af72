//! A host whose clock is set while a guest runs, which only a machine of the tests' own may have: a rig.

use std::io::Write;
use std::time::Instant;

use alula::clock::Utc;
use alula::sys::machine;

use super::*;

/// The requests that the disk's rate limiter lets through in a second.
const OPS: u64 = 50;
/// The requests that a turn of the disk may do beyond those.
const TURN: u64 = 64;
const DAY: i64 = 86_400;

/// The time of day as it was, which the host has again at the end.
struct Clock {
    begun: Instant,
    was: Duration,
}

impl Clock {
    fn new() -> Self {
        Self { begun: Instant::now(), was: SystemTime::now().duration_since(UNIX_EPOCH).unwrap() }
    }

    /// Sets the clock wrong by so many days.
    fn set(&self, days: i64) {
        let right = (self.was + self.begun.elapsed()).as_nanos() as u64;
        machine::set_clock(right.wrapping_add_signed(days * DAY * 1_000_000_000)).unwrap();
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[test]
#[ignore = "needs a rig, whose clock can be set"]
fn a_guest_goes_on_whatever_the_hosts_clock_is_set_to() {
    if std::env::var_os("ALULA_RIG").is_none() {
        return println!("this machine's clock is not a test's to set");
    }
    let folder = Folder::new();
    let events = folder.path("events");
    let mut service = Service::start(&["--events", events.to_str().unwrap()]);
    let mut client = service.client();
    let disk = json!({ "drive_id": "a", "is_root_device": false, "path_on_host": folder.write("disk", vec![0; 1 << 20]),
        "rate_limiter": { "ops": { "size": OPS, "refill_time": 1000 } } });
    client.ok("PUT", "/drives/a", &disk.to_string());
    service.boot_source("bench");
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    service.process.expect("bench: ready");
    service.process.stdin.as_mut().unwrap().write_all(b"read 4096 1 1000000000\n").unwrap();
    let reads = || service.client().ok("GET", "/metrics", "").json()["block"]["read_count"].as_u64().unwrap();
    // What the limiter lets through at once is over.
    wait_for(|| reads() > 2 * OPS);
    let clock = Clock::new();
    for days in [1000, -1000, 0] {
        clock.set(days);
        let (begun, before) = (Instant::now(), reads());
        wait_for(|| reads() >= before + OPS);
        let count = reads() - before;
        let most = OPS as f64 * (1.0 + begun.elapsed().as_secs_f64()) + TURN as f64;
        assert!(count as f64 <= most, "{days} days: {count}, at most {most}");
        for state in ["Paused", "Resumed"] {
            client.ok("PATCH", "/vm", &json!({ "state": state }).to_string());
        }
        // Times of day are the ones that the host has now.
        let today = Utc::now().to_string()[..10].to_owned();
        wait_for(|| std::fs::read_to_string(&events).unwrap().lines().last().unwrap().contains(&today));
    }
}
