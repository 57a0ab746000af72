//! The table of what I/O costs: a row per load and monitor, each bar beside its figure.

use std::time::Duration;

use crate::counters::{Boot, Counts};
use crate::loads::{FULL_SEGMENT, Load, Unit};

/// What one load came to.
pub struct Measured {
    /// Requests, or frames of the TAP.
    pub count: u64,
    pub seconds: f64,
    pub counts: Counts,
    pub memory_kib: u64,
}

/// What one monitor came to: for each load, or why it could not be measured.
pub struct Series {
    pub name: &'static str,
    pub rows: Vec<Result<Measured, String>>,
}

impl Measured {
    fn per(&self, count: u64) -> f64 {
        count as f64 / self.count as f64
    }
    fn exits(&self) -> f64 {
        self.per(self.counts.exits["all"])
    }
    /// All exits of the run but those that time brings.
    pub fn exits_of_load(&self) -> u64 {
        self.counts.exits["all"].saturating_sub(self.counts.clock_exits())
    }
    /// Exits that time brings, by unit.
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
    fn a_second(&self) -> f64 {
        self.count as f64 / self.seconds
    }
    /// What is moved, in bytes: as the command says.
    fn bytes(&self, load: &Load) -> f64 {
        let first = load.number(1).unwrap_or(0) as f64;
        if load.is_tcp() { first } else { first * self.count as f64 }
    }
    fn cpu_per_gib(&self, load: &Load) -> f64 {
        self.counts.cpu_ns as f64 / 1e9 / (self.bytes(load) / f64::from(1 << 30))
    }
    /// How many full-size frames one of the TAP carries, as the guest and the host leave segmentation to
    /// each other.
    fn full_size(&self, load: &Load) -> f64 {
        if load.is_tcp() { self.bytes(load) / FULL_SEGMENT / self.count as f64 } else { 1.0 }
    }
}

/// Exits of a stock guest's boot behind virtio-mmio, on a quiet host: 3414 in Firecracker 1.17-dev.
const BOOT_EXITS_MAX: u64 = 3500;
/// The least part of the mapped memory of that guest which is in huge pages.
const BOOT_HUGE_MIN: f64 = 0.9;

/// Prints what a stock guest's boot came to, which took `time` from the monitor's start to the guest's first
/// word.
pub fn show_boot(name: &str, transport: &str, boot: &Boot, time: Duration) {
    let Boot { exits: kinds, faults, huge_pages, small_pages } = boot;
    let exits = kinds["all"];
    let bar = match transport {
        "mmio" => format!(" <= {BOOT_EXITS_MAX}: {}", verdict(exits <= BOOT_EXITS_MAX)),
        _ => String::new(),
    };
    let huge = (huge_pages * 512) as f64 / (huge_pages * 512 + small_pages).max(1) as f64;
    let of_kind = kinds.iter().filter(|(kind, count)| **kind != "all" && **count > 0);
    let of_kind: Vec<_> = of_kind.map(|(kind, count)| format!("{kind} {count}")).collect();
    let of_kind = of_kind.join(", ");
    println!(
        "boot, {name}: {exits} exits{bar}, of them {of_kind}; page faults {faults}, mapped \
         {huge_pages} pages of 2 MiB, {small_pages} of 4 KiB: huge {huge:.3} >= {BOOT_HUGE_MIN}: {}; {:.2} s",
        verdict(huge >= BOOT_HUGE_MIN),
        time.as_secs_f64()
    );
}

/// Prints the table; `engine` is the disk's.
pub fn show(loads: &[&Load], engine: &str, series: &[Series]) {
    println!(
        "{:<28} {:>8} {:>8} {:>8} {:>9} {:>9} {:>8} {:>9} {:>9} {:>8}  bars",
        "",
        "count",
        "exits",
        "of clock",
        "syscalls",
        "of vCPUs",
        "CPU us",
        "CPU s/GiB",
        "a second",
        "own KiB"
    );
    for (index, load) in loads.iter().enumerate() {
        for (place, Series { name, rows }) in series.iter().enumerate() {
            let label = match (place, *name) {
                (0, "alula") => load.name.to_owned(),
                (0, name) => format!("{}, {name}", load.name),
                (_, name) => format!("  {name}"),
            };
            match &rows[index] {
                Ok(row) => {
                    println!("{label:<28} {}  {}", figures(row, load), bars(load, engine, row));
                    println!("{:<28} {}", "", kinds(row));
                }
                Err(error) => println!("{label:<28} not measured: {error}"),
            }
        }
        if let [ours, others] = series
            && let (Ok(ours), Ok(others)) = (&ours.rows[index], &others.rows[index])
        {
            println!("{:<28} {}", "  ratio", ratios(ours, others, load));
        }
        if let Some([mmio, pci, cloud]) = load.peers {
            println!(
                "{:<28} exits of Firecracker 1.17-dev: {mmio} mmio, {pci} pci; of Cloud Hypervisor: {cloud} pci",
                ""
            );
        }
    }
    for one in series {
        println!("{}: {}", one.name, memory(loads, one));
    }
}

fn figures(row: &Measured, load: &Load) -> String {
    let bulk = if load.is_bulk { format!("{:.3}", row.cpu_per_gib(load)) } else { String::new() };
    format!(
        "{:>8} {:>8.3} {:>8.3} {:>9.3} {:>9.3} {:>8.2} {bulk:>9} {:>9.0} {:>8}",
        row.count,
        row.exits(),
        row.clock_exits(),
        row.calls(),
        row.vcpu_calls(),
        row.cpu_us(),
        row.a_second(),
        row.memory_kib,
    )
}

/// Ours by the other's, below the figures.
fn ratios(ours: &Measured, others: &Measured, load: &Load) -> String {
    let ratio = |ours: f64, others: f64| {
        let (both, found) = (ours > 0.0 && others > 0.0, ours / others);
        if both { format!("{found:.2}") } else { String::new() }
    };
    let of = |value: fn(&Measured) -> f64| ratio(value(ours), value(others));
    let bulk = ratio(ours.cpu_per_gib(load), others.cpu_per_gib(load));
    format!(
        "{:>8} {:>8} {:>8} {:>9} {:>9} {:>8} {:>9} {:>9} {:>8}",
        of(|row| row.count as f64),
        of(Measured::exits),
        of(Measured::clock_exits),
        of(Measured::calls),
        of(Measured::vcpu_calls),
        of(Measured::cpu_us),
        if load.is_bulk { bulk } else { String::new() },
        of(Measured::a_second),
        of(|row| row.memory_kib as f64),
    )
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

pub fn verdict(is_met: bool) -> &'static str {
    if is_met { "ok" } else { "OVER" }
}

/// Each bar beside what it is held against: a request, or a full-size frame.
fn bars(load: &Load, engine: &str, row: &Measured) -> String {
    let full = row.full_size(load);
    let mut text = Vec::new();
    let mut bar = |what: &str, found: f64, max: f64| {
        let found = found / full;
        text.push(format!("{what} {found:.3} <= {max}: {}", verdict(found <= max)));
    };
    if let Some(max) = load.exits_max {
        bar("exits of the load", row.exits() - row.clock_exits(), max);
    }
    if let (Some(max), Some(interrupts)) = (load.interrupts_max, row.counts.interrupts) {
        bar("interrupts", row.per(interrupts), max);
    }
    // The bar of requests is io_uring's.
    if let Some(max) = load.syscalls_max.filter(|_| load.unit != Unit::Request || engine == "Async") {
        bar("syscalls", row.calls(), max);
    }
    if load.is_tcp() {
        text.push(format!(
            "by full-size frame, of which a frame here carries {full:.1}, in the median of {} runs",
            load.runs()
        ));
    }
    text.join(", ")
}

/// A page comes with time, at any depth. (To the byte, tests/allocations.rs counts.)
const PAGE_KIB: u64 = 4;

/// The monitor's own memory after reads of one size, by how many were in flight.
fn memory(loads: &[&Load], series: &Series) -> String {
    let reads = loads.iter().zip(&series.rows).filter(|(load, _)| load.command.starts_with("read 4096 "));
    let measured = reads.filter_map(|(load, row)| Some((load.number(2)?, row.as_ref().ok()?.memory_kib)));
    let (depths, sizes): (Vec<_>, Vec<_>) = measured.unzip();
    let words = |numbers: &[u64]| numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    let (Some(least), Some(most), true) = (sizes.iter().min(), sizes.iter().max(), depths.len() > 1) else {
        return "own memory at several depths: not measured".to_owned();
    };
    format!(
        "own memory with {} reads in flight {} KiB, does not grow with the queue by more than a page: {}",
        words(&depths),
        words(&sizes),
        verdict(most - least <= PAGE_KIB)
    )
}
