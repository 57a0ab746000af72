//! What I/O costs: per request and per frame, counted.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;

use crate::counters::{Counters, Debug, own_memory};
use crate::host::network;
use crate::loads::{self, FIRMWARE, Flood, LINUX, Load, Sender, Unit};
use crate::monitor::Monitor;
use crate::table::{Measured, Series, show, show_boot};
use crate::{Folder, Result};

const DISK_SIZE: usize = 128 << 20;

/// A Linux guest: kernel and initramfs.
type Linux = (PathBuf, PathBuf);

/// One machine to measure: what it is, and how it is configured.
struct Case {
    transport: &'static str,
    flags: &'static [&'static str],
    engine: &'static str,
    /// Past the host's page cache: what the disk does takes its time.
    direct: bool,
}

const MMIO: Case = Case { transport: "mmio", flags: &[], engine: "Sync", direct: false };
const PCI: Case = Case { transport: "pci", flags: &["--enable-pci"], ..MMIO };

const CASES: [Case; 5] = [
    MMIO,
    Case { engine: "Async", ..MMIO },
    Case { engine: "Async", direct: true, ..MMIO },
    PCI,
    Case { engine: "Async", ..PCI },
];

/// Measures and prints the loads whose names contain `only`: all of them where it is empty.
pub fn io(ours: &str, other: Option<&str>, linux: Option<Linux>, only: &str) -> Result<()> {
    let loads = if linux.is_some() { &LINUX } else { &FIRMWARE };
    let loads: Vec<&Load> = loads.iter().filter(|load| load.name.contains(only)).collect();
    if loads.is_empty() {
        return Err(format!("no load has `{only}` in its name").into());
    }
    let folder = Folder::new()?;
    network::enter();
    let debug = Debug::mount(&folder.0)?;
    network::add_tap(loads::TAP, &format!("{}/24", loads::HOST));
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/tap0/disable_ipv6", "1");
    loads::serve_guests()?;
    // Not zeros, which some file systems do not store.
    std::fs::write(folder.0.join("disk"), vec![0x5a; DISK_SIZE])?;
    std::fs::write(folder.0.join("firmware"), alula::firmware::IMAGE)?;

    let guest = if linux.is_some() { "a Linux guest" } else { "the firmware guest" };
    for case in CASES {
        // What does not depend on the engine is measured with the first one.
        let is_measured = |load: &&Load| case.engine == "Sync" || load.unit == Unit::Request;
        let loads: Vec<&Load> = loads.iter().copied().filter(is_measured).collect();
        if loads.is_empty() {
            continue;
        }
        println!();
        let direct = if case.direct { ", direct I/O" } else { "" };
        println!(
            "{guest} behind virtio-{}, engine {}{direct}: per request or frame",
            case.transport, case.engine
        );
        let mut series = Vec::new();
        for (name, binary) in [("alula", Some(ours)), ("other", other)] {
            let Some(binary) = binary else { continue };
            let start = || machine(&debug, binary, name == "alula", &folder.0, &case, linux.as_ref());
            let rows = measure(start, &loads);
            match rows.iter().find_map(|row| row.as_ref().err()) {
                Some(error) if rows.iter().all(Result::is_err) => println!("{name}: not measured: {error}"),
                _ => series.push(Series { name, rows }),
            }
        }
        if !series.is_empty() {
            show(&loads, case.engine, &series);
        }
    }
    Ok(())
}

/// A running guest that waits for commands, and what its monitor does.
struct Guest<'a> {
    monitor: Monitor,
    counters: Counters<'a>,
}

/// Starts a guest.
fn machine<'a>(
    debug: &'a Debug,
    binary: &str,
    is_ours: bool,
    folder: &Path,
    case: &Case,
    linux: Option<&Linux>,
) -> Result<Guest<'a>> {
    settle(&folder.join("disk"))?;
    let boot = match linux {
        None => json!({ "kernel_image_path": folder.join("firmware"), "boot_args": "bench" }),
        Some((kernel, initrd)) => json!({
            "kernel_image_path": kernel,
            "initrd_path": initrd,
            "boot_args": "console=ttyS0 panic=-1 quiet reboot=k alula.run=bench",
        }),
    };
    let mut disk = json!({
        "drive_id": "disk",
        "path_on_host": folder.join("disk"),
        "is_root_device": false,
        "io_engine": case.engine,
    });
    if case.direct {
        disk["direct_io"] = true.into();
    }
    let config = [
        ("/boot-source", boot),
        ("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 128 })),
        ("/drives/disk", disk),
        (
            "/network-interfaces/net",
            json!({ "iface_id": "net", "host_dev_name": loads::TAP, "guest_mac": "06:00:ac:10:00:02" }),
        ),
    ];
    let begun = Instant::now();
    let mut monitor = Monitor::start(binary, is_ours, &folder.join("api.socket"), case.flags, &config)?;
    monitor.expect(&["bench: ready"])?;
    let time = begun.elapsed();
    if linux.is_some() && case.engine == "Sync" {
        let name = if is_ours { "alula" } else { "other" };
        match debug.boot(monitor.pid()) {
            Ok(boot) => show_boot(name, case.transport, &boot, time),
            Err(error) => println!("boot, {name}: not measured: {error}"),
        }
    }
    // The first request starts threads and fills what is filled once.
    monitor.command("read 4096 1 10")?;
    let counters = Counters::new(debug, monitor.pid())?;
    Ok(Guest { monitor, counters })
}

/// What is written is on stable storage, and all of it is in the page cache, whoever had the disk before:
/// direct I/O takes there what it writes.
fn settle(disk: &Path) -> Result<()> {
    let mut file = std::fs::File::open(disk)?;
    file.sync_all()?;
    std::io::copy(&mut file, &mut std::io::sink())?;
    Ok(())
}

/// A load that fails costs the guest; those after it have another one.
fn measure<'a>(start: impl Fn() -> Result<Guest<'a>>, loads: &[&Load]) -> Vec<Result<Measured, String>> {
    let mut guest = start();
    let mut rows = Vec::new();
    for load in loads {
        let row = match &mut guest {
            Ok(guest) => median(guest, load).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if row.is_err()
            && let Ok(broken) = guest
        {
            // It has the TAP and the disk.
            drop(broken);
            guest = start();
        }
        rows.push(row);
    }
    rows
}

/// The run in the middle, by its exits: each run carries as many bytes.
fn median(guest: &mut Guest<'_>, load: &Load) -> Result<Measured> {
    let runs: Result<Vec<_>> = (0..load.runs()).map(|_| one(guest, load)).collect();
    let mut runs = runs?;
    runs.sort_by_key(Measured::exits_of_load);
    Ok(runs.swap_remove(runs.len() / 2))
}

fn one(Guest { monitor, counters }: &mut Guest<'_>, load: &Load) -> Result<Measured> {
    let sender = Sender::start(load.flood)?;
    let (out, into) = loads::frames()?;
    let (before, begun) = (counters.read()?, Instant::now());
    let done = monitor.command(load.command)?;
    let (counts, seconds) = (counters.read()?.since(&before), begun.elapsed().as_secs_f64());
    if counts.vcpu_calls["all"] + counts.other_calls["all"] == 0 {
        // Seen once under emulation, where nothing that takes a system call is free.
        return Err("the kernel has not counted one system call".into());
    }
    let (out_after, into_after) = loads::frames()?;
    drop(sender);
    let count = match (load.unit, load.flood) {
        (Unit::Request, _) => done,
        (Unit::FrameOut, _) => out_after - out,
        // What the host sent is not what came in: the TAP loses what is too much.
        (Unit::FrameIn, Flood::None) => into_after - into,
        (Unit::FrameIn, _) => done,
    };
    Ok(Measured { count: count.max(1), seconds, counts, memory_kib: own_memory(monitor.pid())? })
}
