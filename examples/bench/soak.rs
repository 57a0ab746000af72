//! A guest under mixed load for a long time: whether its monitor stays as large as it was.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::counters::own_memory;
use crate::host::network;
use crate::loads;
use crate::monitor::{Monitor, connect_to, request};
use crate::{Folder, Result};

const DISK_SIZE: usize = 32 << 20;
/// The time after which everything has been used that is used at all; of a short run, a third.
const WARM: Duration = Duration::from_secs(300);
/// The most by which the monitor's own memory may grow after [`WARM`].
const GROWTH_MAX_KIB: u64 = 64;

/// Numbers that come in the same order with the same seed (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// The soak's monitor, and where its files are.
struct Soaked<'a> {
    monitor: Monitor,
    folder: &'a Path,
}

impl Soaked<'_> {
    fn ask(&self, method: &str, path: &str, body: &str) -> Result<()> {
        // Each request has a connection of its own, as from a command line.
        let mut client = connect_to(&self.folder.join("soak.sock"))?;
        request(&mut client, method, path, body)
    }

    /// Does one thing, whichever the next number says.
    fn act(&mut self, random: &mut Random) -> Result<()> {
        let (bytes, depth) = (512 << random.below(9), 1 + random.below(32));
        match random.below(10) {
            0..3 => self.monitor.command(&format!("read {bytes} {depth} 500")).map(drop),
            3..6 => self.monitor.command(&format!("write {bytes} {depth} 500")).map(drop),
            6 => self.monitor.command(&format!("send {} {depth} 500", 60 + random.below(1400))).map(drop),
            7 => {
                self.ask("PATCH", "/vm", r#"{"state": "Paused"}"#)?;
                self.ask("PATCH", "/vm", r#"{"state": "Resumed"}"#)
            }
            8 => {
                let name = ["disk", "other"][random.below(2) as usize];
                let body = json!({ "drive_id": "disk", "path_on_host": self.folder.join(name) });
                self.ask("PATCH", "/drives/disk", &body.to_string())
            }
            _ => {
                let paths = ["/", "/metrics", "/vm/config", "/nonesuch"];
                let path = paths[random.below(paths.len() as u64) as usize];
                let result = self.ask("GET", path, "");
                if path == "/nonesuch" { Ok(()) } else { result }
            }
        }
    }
}

/// Has a guest work for so many seconds, and fails if its monitor has grown by then.
pub fn soak(ours: &str, seconds: usize, seed: Option<u64>) -> Result<()> {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_nanos() as u64);
    let seed = seed.unwrap_or_else(now).max(1);
    println!("soak: {seconds} s, again by --seed {seed}");
    let folder = Folder::new()?;
    network::enter();
    network::add_tap(loads::TAP, &format!("{}/24", loads::HOST));
    for name in ["disk", "other"] {
        std::fs::write(folder.0.join(name), vec![0x5a; DISK_SIZE])?;
    }
    std::fs::write(folder.0.join("firmware"), alula::firmware::IMAGE)?;
    let disk = folder.0.join("disk");
    let config = [
        ("/boot-source", json!({ "kernel_image_path": folder.0.join("firmware"), "boot_args": "bench" })),
        ("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 128 })),
        (
            "/drives/disk",
            json!({ "drive_id": "disk", "path_on_host": disk, "is_root_device": false, "io_engine": "Async" }),
        ),
        ("/network-interfaces/net", json!({ "iface_id": "net", "host_dev_name": loads::TAP })),
        ("/entropy", json!({})),
    ];
    let monitor = Monitor::start(ours, true, &folder.0.join("soak.sock"), &[], &config)?;
    monitor.expect(&["bench: ready"])?;
    let mut soaked = Soaked { monitor, folder: &folder.0 };
    let (begun, whole) = (Instant::now(), Duration::from_secs(seconds as u64));
    let warm = WARM.min(whole / 3);
    let (mut random, mut warm_kib, mut count) = (Random(seed), None, 0_u64);
    while begun.elapsed() < whole {
        soaked.act(&mut random).map_err(|error| format!("action {count} of seed {seed}: {error}"))?;
        count += 1;
        if warm_kib.is_none() && begun.elapsed() >= warm {
            warm_kib = Some(own_memory(soaked.monitor.pid())?);
        }
    }
    let (warm_kib, kib) = (warm_kib.unwrap_or_default(), own_memory(soaked.monitor.pid())?);
    println!(
        "soak: {count} actions; memory of its own: {warm_kib} KiB after {} s, {kib} KiB at the end",
        warm.as_secs()
    );
    match kib <= warm_kib + GROWTH_MAX_KIB {
        true => Ok(()),
        false => Err(format!("it has grown by more than {GROWTH_MAX_KIB} KiB").into()),
    }
}
