//! What I/O costs: per request and per frame, counted.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;

use crate::counters::{Counters, Counts, Debug, own_memory};
use crate::host::network;
use crate::loads::{self, FIRMWARE, FULL_SEGMENT, Flood, LINUX, Load, Sender, Unit};
use crate::monitor::Monitor;
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

/// What one load came to.
struct Measured {
    count: u64,
    seconds: f64,
    counts: Counts,
    memory_kib: u64,
}

pub fn io(ours: &str, other: Option<&str>, linux: Option<Linux>) -> Result<()> {
    let folder = Folder::new()?;
    network::enter();
    let debug = Debug::mount(&folder.0)?;
    network::add_tap(loads::TAP, &format!("{}/24", loads::HOST));
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/tap0/disable_ipv6", "1");
    loads::serve_guests()?;
    // Not zeros, which some file systems do not store.
    std::fs::write(folder.0.join("disk"), vec![0x5a; DISK_SIZE])?;
    std::fs::write(folder.0.join("firmware"), alula::firmware::IMAGE)?;

    let loads = if linux.is_some() { &LINUX } else { &FIRMWARE };
    let guest = if linux.is_some() { "a Linux guest" } else { "the firmware guest" };
    for case in CASES {
        // What does not depend on the engine is measured with the first one.
        let loads: Vec<&Load> =
            loads.iter().filter(|load| case.engine == "Sync" || load.unit == Unit::Request).collect();
        println!();
        let direct = if case.direct { ", direct I/O" } else { "" };
        println!(
            "{guest} behind virtio-{}, engine {}{direct}: per request or frame",
            case.transport, case.engine
        );
        let start = |binary, is_ours| machine(binary, is_ours, &folder.0, &case, linux.as_ref());
        let mut series = Vec::new();
        for (name, binary) in [("alula", Some(ours)), ("other", other)] {
            let Some(binary) = binary else { continue };
            match start(binary, name == "alula").and_then(|monitor| measure(&debug, monitor, &loads)) {
                Ok(measured) => series.push((name, measured)),
                Err(error) => println!("{name}: not measured: {error}"),
            }
        }
        if !series.is_empty() {
            show(&loads, &case, &series);
        }
    }
    Ok(())
}

/// A running guest that waits for commands.
fn machine(
    binary: &str,
    is_ours: bool,
    folder: &Path,
    case: &Case,
    linux: Option<&Linux>,
) -> Result<Monitor> {
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
    let monitor = Monitor::start(binary, is_ours, &folder.join("api.socket"), case.flags, &config)?;
    monitor.expect(&["bench: ready"])?;
    Ok(monitor)
}

/// What is written is on stable storage, and all of it is in the page cache, whoever had the disk before:
/// direct I/O takes there what it writes.
fn settle(disk: &Path) -> Result<()> {
    let mut file = std::fs::File::open(disk)?;
    file.sync_all()?;
    std::io::copy(&mut file, &mut std::io::sink())?;
    Ok(())
}

fn measure(debug: &Debug, mut monitor: Monitor, loads: &[&Load]) -> Result<Vec<Measured>> {
    // The first request starts threads and fills what is filled once.
    monitor.command("read 4096 1 10")?;
    let counters = Counters::new(debug, monitor.pid())?;
    loads.iter().map(|load| one(&counters, &mut monitor, load)).collect()
}

fn one(counters: &Counters<'_>, monitor: &mut Monitor, load: &Load) -> Result<Measured> {
    let sender = Sender::start(load.flood)?;
    let (out, into) = loads::frames()?;
    let (before, begun) = (counters.read()?, Instant::now());
    let done = monitor.command(load.command)?;
    let (counts, seconds) = (counters.read()?.since(&before), begun.elapsed().as_secs_f64());
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

impl Measured {
    fn per(&self, count: u64) -> f64 {
        count as f64 / self.count as f64
    }
    fn exits(&self) -> f64 {
        self.per(self.counts.exits["all"])
    }
    /// Of these, those that time brings.
    fn clock_exits(&self) -> f64 {
        self.per(self.counts.clock_exits().min(self.counts.exits["all"]))
    }
    fn vcpu_calls(&self) -> f64 {
        self.per(self.counts.vcpu_calls["all"])
    }
    fn calls(&self) -> f64 {
        self.vcpu_calls() + self.per(self.counts.other_calls["all"])
    }
    fn cpu_us(&self) -> f64 {
        self.per(self.counts.cpu_ns) / 1e3
    }
    /// What is moved, in bytes: as the command says.
    fn bytes(&self, load: &Load) -> f64 {
        let number = |index: usize| load.command.split(' ').nth(index).and_then(|word| word.parse().ok());
        let first: f64 = number(1).unwrap_or(0.0);
        if load.command.starts_with("tcp") { first } else { first * self.count as f64 }
    }
    fn cpu_per_gib(&self, load: &Load) -> f64 {
        self.counts.cpu_ns as f64 / 1e9 / (self.bytes(load) / f64::from(1 << 30))
    }
}

fn show(loads: &[&Load], case: &Case, series: &[(&str, Vec<Measured>)]) {
    println!(
        "{:<28} {:>8} {:>8} {:>8} {:>9} {:>9} {:>8} {:>9} {:>9} {:>8}  bars",
        "", "count", "exits", "of MMIO", "syscalls", "of vCPUs", "CPU us", "CPU s/GiB", "a second", "own KiB"
    );
    for (index, load) in loads.iter().enumerate() {
        for (place, (name, measured)) in series.iter().enumerate() {
            let row = &measured[index];
            let label = if place == 0 { load.name } else { name };
            let bulk = if load.is_bulk { format!("{:.3}", row.cpu_per_gib(load)) } else { String::new() };
            println!(
                "{label:<28} {:>8} {:>8.3} {:>8.3} {:>9.3} {:>9.3} {:>8.2} {bulk:>9} {:>9.0} {:>8}  {}",
                row.count,
                row.exits(),
                row.clock_exits(),
                row.calls(),
                row.vcpu_calls(),
                row.cpu_us(),
                row.count as f64 / row.seconds,
                row.memory_kib,
                bars(load, case, row),
            );
            println!("{:<28} {}", "", kinds(row));
        }
        if let [(_, ours), (_, others)] = series {
            let (ours, others) = (&ours[index], &others[index]);
            let ratio = |value: fn(&Measured) -> f64| value(ours) / value(others);
            println!(
                "{:<28} {:>8} {:>8.2} {:>8} {:>9.2} {:>9} {:>8.2}",
                "  ratio",
                "",
                ratio(Measured::exits),
                "",
                ratio(Measured::calls),
                "",
                ratio(Measured::cpu_us)
            );
        }
        if let Some([mmio, pci, cloud]) = load.peers {
            println!(
                "{:<28} exits of Firecracker 1.17-dev: {mmio} mmio, {pci} pci; of Cloud Hypervisor: {cloud} pci",
                ""
            );
        }
    }
    for (name, measured) in series {
        let memory = measured.iter().map(|row| row.memory_kib);
        let (least, most) = (memory.clone().min().unwrap_or(0), memory.max().unwrap_or(0));
        println!(
            "{name}: own memory {least} to {most} KiB over all depths (bar: it does not grow with the queue)"
        );
    }
}

/// Kinds of exits and of system calls of a unit, as far as they matter.
fn kinds(row: &Measured) -> String {
    let counts = &row.counts;
    let all = [("exits", &counts.exits), ("vCPU calls", &counts.vcpu_calls), ("calls", &counts.other_calls)];
    let mut parts = Vec::new();
    for (what, calls) in all {
        let kinds = calls.iter().filter(|(name, count)| **name != "all" && row.per(**count) >= 0.002);
        let kinds: Vec<_> = kinds.map(|(name, count)| format!("{name} {:.3}", row.per(*count))).collect();
        if !kinds.is_empty() {
            parts.push(format!("{what}: {}", kinds.join(", ")));
        }
    }
    parts.join("; ")
}

/// Each bar beside what it is held against.
fn bars(load: &Load, case: &Case, row: &Measured) -> String {
    let mut text = Vec::new();
    let mut bar = |what: &str, found: f64, max: f64| {
        text.push(format!("{what} <= {max}: {}", if found <= max { "ok" } else { "OVER" }));
    };
    if let Some(max) = load.exits_max {
        bar("exits of the load", row.exits() - row.clock_exits(), max);
    }
    // The bar of requests is io_uring's.
    if let Some(max) = load.syscalls_max.filter(|_| load.unit != Unit::Request || case.engine == "Async") {
        bar("syscalls", row.calls(), max);
    }
    if load.command.starts_with("tcp") {
        let full = row.bytes(load) / FULL_SEGMENT;
        let calls = row.calls() * row.count as f64 / full;
        text.push(format!(
            "(a frame carries {:.1} full-size ones; {calls:.3} syscalls each)",
            full / row.count as f64
        ));
    }
    text.join(", ")
}
