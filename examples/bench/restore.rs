//! This bench measures restores and clones in turn with a program that only makes KVM's calls (floor.c).
//!
//! The guest was saved when a byte had been typed that it had not seen: the first thing that a restored one does is
//! to send it back. Each time goes from what is asked to that byte.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::counters::own_memory;
use crate::monitor::{connect, request, send, spawn};
use crate::start::{compile, cpu_time, median};
use crate::template::{self, Machine};
use crate::{Folder, Result};
use crate::{ahead, networks, saves, sizes};

pub const MEMORY_MIB: u32 = 128;
/// The time that a service has to prepare itself before it is asked, as it has with a client that takes its time.
pub const AHEAD: Duration = Duration::from_millis(60);
/// As many clones are started at a time.
pub const AT_A_TIME: usize = 4;

/// A row of the report: its name, how a guest is restored, the floor program's mode for that, and the bars on a quiet
/// machine: in ms, and as a multiple of the floor.
pub struct Row(pub &'static str, pub Way, pub &'static str, pub f64, pub f64);

/// How a guest is restored.
#[derive(Clone, Copy, PartialEq)]
pub enum Way {
    /// `alula run --restore`.
    Run,
    /// A load in `alula serve`.
    Load,
    /// A load in `alula serve --warm`.
    Warm,
    /// A load that leaves the guest paused, which is not measured, and then its resumption.
    Resume,
}

impl Way {
    /// The options of the service that restores in this way.
    fn options(self, memory_mib: u32) -> Vec<String> {
        let warm = || vec!["--warm".to_owned(), format!("cpus=1,memory={memory_mib}M")];
        if self == Self::Warm { warm() } else { Vec::new() }
    }
}

pub const ROWS: [Row; 4] = [
    Row("spawn of `alula run --restore`", Way::Run, "exec", 2.2, 1.35),
    Row("load request to a service", Way::Load, "cold", 1.5, 1.35),
    Row("load request to a warm service", Way::Warm, "warm", 0.6, 1.6),
    Row("resumption of a parked clone", Way::Resume, "parked", 0.3, 1.6),
];

/// A guest that was restored, and what the restore cost.
pub struct Restored {
    pub child: Child,
    pub wall_ms: f64,
    cpu_ms: f64,
    faults: f64,
}

impl Restored {
    /// Takes the byte that `child` is to say, some time after `asked`.
    fn wait(mut child: Child, asked: Instant) -> Result<Self> {
        let mut byte = [0];
        // The pipe stays open and takes what else the guest says.
        let said = child.stdout.as_mut().ok_or("no output")?.read(&mut byte);
        let wall_ms = asked.elapsed().as_secs_f64() * 1e3;
        if said? != 1 {
            return Err(format!("no byte came: {}", child.wait()?).into());
        }
        let (cpu_ms, faults) = (cpu_time(child.id())?, faults(child.id())?);
        Ok(Self { child, wall_ms, cpu_ms, faults })
    }

    pub fn end(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

/// A guest that is saved: its memory, its command line, and what it says last before it waits for a byte.
pub struct Guest {
    pub memory_mib: u32,
    pub words: &'static str,
    pub ready: &'static str,
    /// The guest has a network interface over passt.
    pub has_passt: bool,
}

/// The snapshot that is restored, and the programs that restore it.
pub struct Bench {
    pub ours: String,
    pub saved: PathBuf,
    pub socket: PathBuf,
    memory_mib: u32,
    floor: PathBuf,
    /// The floor's state and memory.
    floors: [PathBuf; 2],
    _folder: Folder,
}

impl Bench {
    /// Builds the floor program, and has both guests saved, each with so much memory.
    pub fn new(ours: &str, memory_mib: u32) -> Result<Self> {
        let guest = Guest { memory_mib, words: "answer", ready: "A\n", has_passt: false };
        Self::of(ours, &guest, Folder::new()?)
    }

    /// Builds the floor program, and has this guest and the floor's saved in `folder`.
    pub fn of(ours: &str, guest: &Guest, folder: Folder) -> Result<Self> {
        if !cfg!(target_arch = "x86_64") {
            return Err("restores are measured on x86_64 alone: the floor program makes its calls".into());
        }
        let path = |name: &str| folder.0.join(name);
        let (source, floor) = (path("floor.c"), path("floor"));
        std::fs::write(&source, include_str!("floor.c"))?;
        compile(&source, &floor)?;
        let floors = [path("floor-state"), path("floor-memory")];
        let memory_mib = guest.memory_mib;
        let status = Command::new(&floor).arg("save").args(&floors).arg(memory_mib.to_string()).status()?;
        if !status.success() {
            return Err(format!("the floor program could not save its guest: {status}").into());
        }
        let (ours, saved, socket) = (ours.to_owned(), path("saved"), path("api.socket"));
        let bench = Self { ours, saved, socket, memory_mib, floor, floors, _folder: folder };
        bench.save(guest)?;
        Ok(bench)
    }

    /// Saves a guest that a byte waits for.
    fn save(&self, guest: &Guest) -> Result<()> {
        let kernel = self.saved.with_file_name("firmware");
        std::fs::write(&kernel, alula::firmware::IMAGE)?;
        let mut child = spawn(&self.ours, true, &self.socket, &[], Stdio::piped())?;
        let done = (|| {
            let mut client = connect(&mut child, &self.socket)?;
            let boot = json!({ "kernel_image_path": kernel, "boot_args": guest.words });
            request(&mut client, "PUT", "/boot-source", &boot.to_string())?;
            let machine = json!({ "vcpu_count": 1, "mem_size_mib": guest.memory_mib });
            request(&mut client, "PUT", "/machine-config", &machine.to_string())?;
            if guest.has_passt {
                let net = json!({ "iface_id": "net", "user": {} });
                request(&mut client, "PUT", "/network-interfaces/net", &net.to_string())?;
            }
            request(&mut client, "PUT", "/actions", r#"{"action_type":"InstanceStart"}"#)?;
            let (output, mut said) = (child.stdout.as_mut().ok_or("no output")?, Vec::new());
            while !said.ends_with(guest.ready.as_bytes()) {
                let mut byte = [0];
                output.read_exact(&mut byte)?;
                said.push(byte[0]);
            }
            request(&mut client, "PATCH", "/vm", r#"{"state":"Paused"}"#)?;
            child.stdin.as_mut().ok_or("no input")?.write_all(b"x")?;
            // The byte is in the serial port, and saved with it, when the monitor had time for it.
            std::thread::sleep(AHEAD);
            request(&mut client, "PUT", "/snapshot/create", &json!({ "folder": self.saved }).to_string())
        })();
        child.kill()?;
        child.wait()?;
        std::fs::remove_file(&self.socket)?;
        done
    }

    /// The floor program's command in this mode.
    pub fn floor(&self, mode: &str) -> Command {
        let mut command = Command::new(&self.floor);
        command.arg(mode).args(&self.floors).arg(self.memory_mib.to_string());
        command
    }

    /// `alula run` that restores.
    fn run(&self) -> Command {
        let mut command = Command::new(&self.ours);
        command.args(["run", "--restore"]).arg(&self.saved);
        command
    }

    /// A load request, after which the guest runs or not.
    pub fn load(&self, resumes: bool) -> String {
        json!({ "folder": self.saved, "resume_vm": resumes }).to_string()
    }

    /// The floor program restores once.
    pub fn one_floor(&self, mode: &str) -> Result<Restored> {
        let spawned = Instant::now();
        let mut command = self.floor(mode);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        if mode == "exec" {
            return Restored::wait(child, spawned);
        }
        std::thread::sleep(AHEAD);
        let asked = Instant::now();
        child.stdin.as_mut().ok_or("no input")?.write_all(b"!")?;
        Restored::wait(child, asked)
    }

    /// Alula restores once.
    pub fn one(&self, way: Way) -> Result<Restored> {
        if way == Way::Run {
            let spawned = Instant::now();
            let mut command = self.run();
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
            return Restored::wait(command.spawn()?, spawned);
        }
        let options = way.options(self.memory_mib);
        let options: Vec<_> = options.iter().map(String::as_str).collect();
        let mut child = spawn(&self.ours, true, &self.socket, &options, Stdio::null())?;
        let mut client = connect(&mut child, &self.socket)?;
        request(&mut client, "GET", "/", "")?;
        std::thread::sleep(AHEAD);
        let (method, path, body) = match way {
            Way::Resume => {
                request(&mut client, "PUT", "/snapshot/load", &self.load(false))?;
                std::thread::sleep(AHEAD);
                ("PATCH", "/vm", r#"{"state":"Resumed"}"#.to_owned())
            }
            _ => ("PUT", "/snapshot/load", self.load(true)),
        };
        let asked = Instant::now();
        send(&mut client, method, path, &body)?;
        let restored = Restored::wait(child, asked)?;
        std::fs::remove_file(&self.socket)?;
        Ok(restored)
    }
}

/// A part of the report of restores.
type Part = (&'static str, fn(&str, Option<&str>, usize) -> Result<()>);

/// The parts, by the names that choose one of them.
const PARTS: [Part; 5] = [
    ("ways", ways),
    ("sizes", |ours, _, runs| sizes::sizes(ours, runs)),
    ("networks", |ours, _, runs| networks::networks(ours, runs)),
    ("ahead", |ours, _, runs| ahead::ahead(ours, runs)),
    ("saves", |ours, _, runs| saves::saves(ours, runs)),
];

/// The report of restores, as medians of `runs`: the part called `only`, or all if that is empty.
pub fn restore(ours: &str, other: Option<&str>, runs: usize, only: &str) -> Result<()> {
    let mut chosen = PARTS.iter().filter(|(name, _)| only.is_empty() || only == *name).peekable();
    if chosen.peek().is_none() {
        return Err(format!("restore has no part `{only}`: ways, sizes, networks, ahead, saves").into());
    }
    chosen.try_for_each(|(_, part)| part(ours, other, runs))
}

/// The tables of restores, as medians of `runs`, with `other` beside them, which takes the same requests.
fn ways(ours: &str, other: Option<&str>, runs: usize) -> Result<()> {
    let bench = Bench::new(ours, MEMORY_MIB)?;
    let peer = other.map(|binary| Bench::new(binary, MEMORY_MIB)).transpose()?;
    let mut times = ROWS.map(|_| [Vec::new(), Vec::new(), Vec::new()]);
    for _ in 0..runs {
        for (Row(_, way, mode, ..), times) in ROWS.iter().zip(&mut times) {
            let others = peer.as_ref().map(|peer| peer.one(*way)).transpose()?;
            let restored = [Some(bench.one(*way)?), Some(bench.one_floor(mode)?), others];
            for (restored, times) in restored.into_iter().zip(times) {
                if let Some(restored) = restored {
                    times.push(restored.wall_ms);
                    restored.end()?;
                }
            }
        }
    }
    println!(
        "restore: 1 CPU, {MEMORY_MIB} MiB, to the guest's byte, ms; medians (least, p99) of {runs} runs"
    );
    println!("{:<34} {:>23} {:>23} {:>6}", "", "alula", "floor", "ratio");
    for (Row(name, _, _, ms_max, ratio_max), [alula, floor, others]) in ROWS.iter().zip(&times) {
        let (ours, least) = (median(alula), median(floor));
        println!(
            "{name:<34} {} {} {:>6.2}  <= {ms_max} on a quiet machine: {}, <= {ratio_max} x floor: {}",
            spread(alula),
            spread(floor),
            ours / least,
            verdict(ours <= *ms_max),
            verdict(ours / least <= *ratio_max),
        );
        if peer.is_some() {
            let ratio = ours / median(others);
            println!("{:<34} {} {:>23} {ratio:>6.2}  of alula's to it", "  other", spread(others), "");
        }
    }
    println!("system calls (KVM's ioctls among them), from the spawn or the request to the byte:");
    for Row(name, way, mode, ..) in &ROWS {
        let (alula, floor) = (count(&bench, Some(*way), mode)?, count(&bench, None, mode)?);
        println!("{name:<34} {:>8} ({:>3}) {:>9} ({:>3})", alula.0, alula.1, floor.0, floor.1);
    }
    Ok(())
}

/// The median, the least, and what 99 of 100 values do not exceed.
pub fn spread(values: &[f64]) -> String {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let p99 = sorted[(sorted.len() * 99).div_ceil(100) - 1];
    format!("{:>6.2} ({:>6.2} {p99:>7.2})", median(values), sorted[0])
}

fn verdict(is_met: bool) -> &'static str {
    if is_met { "ok" } else { "OVER" }
}

/// How many system calls, and how many of them to KVM, one restore makes: ours, or the floor's in this mode.
fn count(bench: &Bench, way: Option<Way>, mode: &str) -> Result<(usize, usize)> {
    let trace = bench.saved.with_file_name("trace");
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o"]).arg(&trace);
    let inner = match way {
        None => bench.floor(mode),
        Some(Way::Run) => bench.run(),
        Some(way) => {
            let mut serve = Command::new(&bench.ours);
            serve.arg("serve").arg("--api-sock").arg(&bench.socket).args(way.options(bench.memory_mib));
            serve
        }
    };
    command.arg(inner.get_program()).args(inner.get_args());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let (mut client, mut begin) = (None, "execve(");
    if let Some(way) = way.filter(|way| *way != Way::Run) {
        let client: &mut UnixStream = client.insert(connect(&mut child, &bench.socket)?);
        request(client, "GET", "/", "")?;
        // A traced process is slower.
        std::thread::sleep(3 * AHEAD);
        begin = r#""PUT /snapshot/load"#;
        if way == Way::Resume {
            request(client, "PUT", "/snapshot/load", &bench.load(false))?;
            std::thread::sleep(3 * AHEAD);
            begin = r#""PATCH /vm"#;
            send(client, "PATCH", "/vm", r#"{"state":"Resumed"}"#)?;
        } else {
            send(client, "PUT", "/snapshot/load", &bench.load(true))?;
        }
    } else if mode != "exec" {
        begin = r#""!", 1)"#;
        std::thread::sleep(3 * AHEAD);
        child.stdin.as_mut().ok_or("no input")?.write_all(b"!")?;
    }
    child.stdout.as_mut().ok_or("no output")?.read_exact(&mut [0])?;
    let text = std::fs::read_to_string(&trace)?;
    let is_call = |line: &&str| line.contains('(') && !line.contains(" resumed>");
    let calls: Vec<&str> = text.lines().skip_while(|line| !line.contains(begin)).collect();
    let end = calls.iter().position(|line| line.contains(r#"write(1, "x""#)).unwrap_or(calls.len());
    let calls = calls[..end].iter().filter(|line| is_call(line));
    let of_kvm = calls.clone().filter(|line| line.contains("ioctl(") && line.contains("KVM_")).count();
    let found = (calls.count(), of_kvm);
    // strace ends with its child, which it started and we may signal.
    let pid = text.split_whitespace().next().ok_or("an empty trace")?;
    Command::new("kill").arg(pid).status()?;
    child.wait()?;
    if client.is_some() {
        let _ = std::fs::remove_file(&bench.socket);
    }
    Ok(found)
}

/// The tables of `number` clones that are there at once, each a process of its own.
pub fn clones(ours: &str, number: usize) -> Result<()> {
    let bench = Bench::new(ours, MEMORY_MIB)?;
    let machine = Machine::new();
    let alula = many(number, &machine, || bench.one(Way::Run))?;
    let floor = many(number, &machine, || bench.one_floor("exec"))?;
    let row = |name: &str, ours: f64, least: f64, bar: &str| {
        println!("{name:<44} {ours:>10.2} {least:>10.2} {:>6.2}  {bar}", ours / least);
    };
    let head = |how: &str| {
        println!("clones: 1 CPU, {MEMORY_MIB} MiB, {number} at once by {how}, {AT_A_TIME} started at a time");
        println!("{:<44} {:>10} {:>10} {:>6}", "", "alula", "floor", "ratio");
    };
    head("exec");
    let bar = ">= 650 on a quiet machine, >= 0.6 x floor";
    row("clones a second", alula.a_second, floor.a_second, bar);
    row("CPU time of one until its byte, ms", alula.cpu_ms, floor.cpu_ms, "<= 1.8");
    row("spawn to the byte, the first tenth, ms", alula.first_ms, floor.first_ms, "");
    row("spawn to the byte, the last tenth, ms", alula.last_ms, floor.last_ms, "within 10% of the first");
    row("page faults of one until then", alula.faults, floor.faults, "");
    row("anonymous memory of the first one, KiB", alula.first_kib, floor.first_kib, "<= 140");
    row("anonymous memory of the last one, KiB", alula.last_kib, floor.last_kib, "within 10% of the first");
    row("whole machine, for each, KiB (it has run)", alula.machine_kib, floor.machine_kib, "");
    let alula = template::ours(&bench, number, &machine, &[])?;
    let bare = template::ours(&bench, number, &machine, &["--no-sandbox"])?;
    let floor = template::floor(&bench, number, &machine)?;
    head("a template");
    let bar = ">= 1000 on a quiet machine, >= 0.55 x floor";
    row("clones a second", alula.a_second, floor.a_second, bar);
    row("CPU time of one until it is idle, ms", alula.cpu_ms, floor.cpu_ms, "");
    row("CPU time of the template for it, ms", alula.template_ms, floor.template_ms, "");
    let both = |figures: &template::Figures| figures.cpu_ms + figures.template_ms;
    row("both together, ms", both(&alula), both(&floor), "<= 1.2");
    row("memory of its own, the first tenth, KiB", alula.first_kib, floor.first_kib, "<= 64");
    row("memory of its own, the last tenth, KiB", alula.last_kib, floor.last_kib, "within 10% of the first");
    row("whole machine, for each, KiB (it has run)", alula.machine_kib, floor.machine_kib, "");
    println!("{:<44} {:>10} {:>10} {:>6}", "the walls of a template's clone", "with", "without", "ratio");
    row("CPU time of it and of the template, ms", both(&alula), both(&bare), "");
    row("memory of its own, KiB", alula.first_kib, bare.first_kib, "");
    Ok(())
}

/// The figures of a run of many clones.
struct Many {
    a_second: f64,
    cpu_ms: f64,
    faults: f64,
    /// Medians of the clones that were there first, and last: of a tenth of all.
    first_ms: f64,
    last_ms: f64,
    first_kib: f64,
    last_kib: f64,
    machine_kib: f64,
}

/// Starts `number` clones, some at a time, and ends them when all are there.
fn many(number: usize, machine: &Machine, start: impl Fn() -> Result<Restored> + Sync) -> Result<Many> {
    let before = machine.settled()?;
    let (left, clones) = (Mutex::new(number), Mutex::new(Vec::with_capacity(number)));
    let one = || -> std::result::Result<(), String> {
        loop {
            {
                let mut left = left.lock().map_err(|_| "another thread failed")?;
                match left.checked_sub(1) {
                    Some(rest) => *left = rest,
                    None => return Ok(()),
                }
            }
            let clone = start().map_err(|error| error.to_string())?;
            clones.lock().map_err(|_| "another thread failed")?.push(clone);
        }
    };
    let begun = Instant::now();
    let started = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_A_TIME).map(|_| scope.spawn(one)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread failed".to_owned())?)
    });
    let a_second = number as f64 / begun.elapsed().as_secs_f64();
    let clones = clones.into_inner().map_err(|_| "a thread failed")?;
    let measured = started.map_err(Into::into).and_then(|()| {
        let machine_kib = (machine.used()? - before) / number as f64;
        let memory = |clone: Option<&Restored>| own_memory(clone.ok_or("no clone")?.child.id());
        let of = |value: fn(&Restored) -> f64| median(&clones.iter().map(value).collect::<Vec<_>>());
        let tenth = number.div_ceil(10);
        let wall =
            |clones: &[Restored]| median(&clones.iter().map(|clone| clone.wall_ms).collect::<Vec<_>>());
        Ok(Many {
            a_second,
            first_ms: wall(&clones[..tenth]),
            last_ms: wall(&clones[number - tenth..]),
            cpu_ms: of(|clone| clone.cpu_ms),
            faults: of(|clone| clone.faults),
            first_kib: memory(clones.first())? as f64,
            last_kib: memory(clones.last())? as f64,
            machine_kib,
        })
    });
    clones.into_iter().try_for_each(Restored::end)?;
    measured
}

/// Page faults of all threads so far, for which no disk was read (proc(5): `minflt`).
fn faults(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"))?;
    // The name before may have anything in it.
    let fields = stat.rsplit_once(')').ok_or("/proc/PID/stat has changed")?.1;
    Ok(fields.split_whitespace().nth(7).ok_or("/proc/PID/stat has changed")?.parse()?)
}
