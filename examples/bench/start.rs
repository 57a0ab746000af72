//! What a start costs: figures of many, as medians.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use alula::config::Config;
use alula::host::Host;
use alula::machine::{Machine, Prepared};

use crate::monitor::{connect, request, spawn};
use crate::{Folder, Result};

/// A figure's name with its unit, and its value in every run.
struct Figure(&'static str, Vec<f64>);

/// The figures measured of one monitor, as many as it can give.
struct Series {
    figures: Vec<Figure>,
    /// The error of the run that failed, after which nothing is measured: what the monitor cannot do.
    cannot: Option<String>,
}

/// The number of starts that are traced: the counts of each are the same but for what the client's pace decides.
const TRACED_RUNS: usize = 5;

pub fn start(ours: &str, other: Option<&str>, runs: usize) -> Result<()> {
    let own = Folder::new()?;
    let folder = own.0.as_path();
    let floor = compile_floor(folder)?;
    let mut floors = [Vec::new(), Vec::new()];
    let kernel = folder.join("firmware");
    std::fs::write(&kernel, alula::firmware::IMAGE)?;

    let other_there = other.map(|binary| (binary, false));
    let monitors: Vec<(&str, bool)> = [(ours, true)].into_iter().chain(other_there).collect();
    let (mut timed, mut counted) = (Series::of(&TIMED, &monitors), Series::of(&COUNTED, &monitors));
    for _ in 0..runs {
        for ((binary, is_ours), series) in monitors.iter().zip(&mut timed) {
            series.add(|figures| one_start(binary, *is_ours, folder, &kernel, figures));
        }
        let (wall, cpu) = one_floor(&floor)?;
        floors[0].push(wall);
        floors[1].push(cpu);
    }
    for _ in 0..TRACED_RUNS {
        for ((binary, is_ours), series) in monitors.iter().zip(&mut counted) {
            series.add(|figures| one_count(binary, *is_ours, folder, &kernel, figures));
        }
    }
    println!("start: 1 CPU, 128 MiB, medians of {runs} runs, of what is counted {TRACED_RUNS}");
    println!("{:<44} {:>10} {:>10} {:>7}", "", "alula", if other.is_some() { "other" } else { "" }, "ratio");
    print_medians(&timed);
    print_medians(&counted);
    for ((binary, _), series) in monitors.iter().zip(&timed).chain(monitors.iter().zip(&counted)) {
        if let Some(error) = &series.cannot {
            println!("{binary} cannot do all of it: {error}");
        }
    }
    println!(
        "{:<44} {:>10.2} / CPU {:.2}",
        "an empty static C program, spawn to output, ms",
        median(&floors[0]),
        median(&floors[1])
    );
    println!("binary: {:.2} MiB", std::fs::metadata(ours)?.len() as f64 / f64::from(1 << 20));
    split(runs)?;
    Ok(())
}

/// A static program that says one byte and waits: what this machine takes for any process at all.
fn compile_floor(folder: &Path) -> Result<PathBuf> {
    let (source, binary) = (folder.join("floor.c"), folder.join("floor"));
    std::fs::write(&source, "#include <unistd.h>\nint main() { write(1, \"x\", 1); pause(); }\n")?;
    compile(&source, &binary)?;
    Ok(binary)
}

/// Builds a static program.
pub fn compile(source: &Path, binary: &Path) -> Result<()> {
    let mut command = Command::new("cc");
    let status = command.args(["-O2", "-static", "-pthread", "-w", "-o"]).args([binary, source]).status()?;
    if status.success() { Ok(()) } else { Err("cc could not build a static program".into()) }
}

/// (wall, CPU) from spawn to the byte, in ms.
fn one_floor(floor: &Path) -> Result<(f64, f64)> {
    let spawned = Instant::now();
    let mut child = Command::new(floor).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    child.stdout.take().ok_or("no output")?.read_exact(&mut [0])?;
    let wall = spawned.elapsed().as_secs_f64() * 1e3;
    let cpu = cpu_time(child.id())?;
    child.kill()?;
    child.wait()?;
    Ok((wall, cpu))
}

const TIMED: [&str; 7] = [
    "spawn to first API answer, ms",
    "CPU time by then, ms",
    "InstanceStart to the guest's first byte, ms",
    "InstanceStart answered, ms",
    "anonymous memory after start, KiB",
    "the binary's own pages in memory, KiB",
    "pause, ms",
];
const COUNTED: [&str; 3] =
    ["system calls to the first API answer", "system calls to the guest's first byte", "of them KVM ioctls"];

impl Series {
    /// Makes one series for each monitor, without a value yet.
    fn of(names: &[&'static str], monitors: &[(&str, bool)]) -> Vec<Self> {
        let figures = || names.iter().map(|name| Figure(name, Vec::new())).collect();
        monitors.iter().map(|_| Self { figures: figures(), cannot: None }).collect()
    }

    /// Has `run` add a value to each figure, unless an earlier run has failed.
    fn add(&mut self, run: impl FnOnce(&mut [Figure]) -> Result<()>) {
        if self.cannot.is_none() {
            self.cannot = run(&mut self.figures).err().map(|error| error.to_string());
        }
    }
}

/// Prints a row for each figure: Alula's median, with that of the other monitor and the ratio beside it.
fn print_medians(series: &[Series]) {
    let medians = |index: usize| series.iter().map(move |one| median_of(&one.figures[index].1));
    for (index, Figure(name, _)) in series[0].figures.iter().enumerate() {
        print!("{name:<44}");
        for median in medians(index) {
            match median {
                Some(median) => print!(" {median:>10.2}"),
                None => print!(" {:>10}", "cannot"),
            }
        }
        match medians(index).collect::<Vec<_>>()[..] {
            [Some(ours), Some(other)] => println!(" {:>7.2}", ours / other),
            _ => println!(),
        }
    }
}

fn median_of(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| median(values))
}

/// One more value of each figure, as far as this monitor comes.
fn one_start(
    binary: &str,
    is_ours: bool,
    folder: &Path,
    kernel: &Path,
    figures: &mut [Figure],
) -> Result<()> {
    let socket = folder.join("api.socket");
    let spawned = Instant::now();
    let mut child = spawn(binary, is_ours, &socket, &[], Stdio::null())?;
    let done = watch(&mut child, spawned, &socket, kernel, figures);
    child.kill()?;
    child.wait()?;
    let _ = std::fs::remove_file(&socket);
    done
}

fn watch(
    child: &mut Child,
    spawned: Instant,
    socket: &Path,
    kernel: &Path,
    figures: &mut [Figure],
) -> Result<()> {
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    let mut figures = figures.iter_mut();
    let mut add = |value| figures.next().expect("there is a name for each").1.push(value);
    let mut client = connect(child, socket)?;
    request(&mut client, "GET", "/", "")?;
    let answered = spawned.elapsed();
    let cpu = cpu_time(child.id())?;
    add(ms(answered));
    add(cpu);
    configure(&mut client, kernel)?;
    // A client that is no bench takes its time, too.
    std::thread::sleep(Duration::from_millis(100));

    let mut stdout = child.stdout.take().ok_or("no output")?;
    let (sender, first_byte) = channel();
    std::thread::spawn(move || {
        let mut byte = [0];
        if stdout.read_exact(&mut byte).is_ok() {
            let _ = sender.send(Instant::now());
        }
        // Keep the pipe open and empty.
        let _ = std::io::copy(&mut stdout, &mut std::io::sink());
    });
    let asked = Instant::now();
    request(&mut client, "PUT", "/actions", r#"{"action_type":"InstanceStart"}"#)?;
    let start_answered = asked.elapsed();
    let first_byte = first_byte.recv_timeout(Duration::from_secs(60));
    let first_byte = first_byte.map_err(|_| "its guest says nothing")? - asked;
    add(ms(first_byte));
    add(ms(start_answered));
    // What the start leaves behind, not what is under way.
    std::thread::sleep(Duration::from_millis(50));
    let (anonymous, file) = memory(child.id())?;
    add(anonymous);
    add(file);
    let asked = Instant::now();
    request(&mut client, "PATCH", "/vm", r#"{"state":"Paused"}"#)?;
    add(ms(asked.elapsed()));
    Ok(())
}

pub fn configure(client: &mut UnixStream, kernel: &Path) -> Result<()> {
    let boot = serde_json::json!({ "kernel_image_path": kernel, "boot_args": "hello" });
    request(client, "PUT", "/boot-source", &boot.to_string())?;
    request(client, "PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":128}"#)
}

/// CPU time of all threads so far, in ms.
pub fn cpu_time(pid: u32) -> Result<f64> {
    let mut nanoseconds = 0.0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let schedstat = std::fs::read_to_string(task?.path().join("schedstat"))?;
        nanoseconds += schedstat.split(' ').next().unwrap_or_default().parse::<f64>()?;
    }
    Ok(nanoseconds / 1e6)
}

/// (anonymous memory, pages of files in memory) in KiB.
fn memory(pid: u32) -> Result<(f64, f64)> {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let field = |name: &str| -> Result<f64> {
        let line =
            rollup.lines().find_map(|line| line.strip_prefix(name)).ok_or("smaps_rollup has changed")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    };
    let anonymous = field("Anonymous:")?;
    Ok((anonymous, field("Rss:")? - anonymous))
}

pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Counts the system calls of one start, from exec to the guest's first byte.
fn one_count(
    binary: &str,
    is_ours: bool,
    folder: &Path,
    kernel: &Path,
    figures: &mut [Figure],
) -> Result<()> {
    let (socket, trace) = (folder.join("api.socket"), folder.join("trace"));
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o"]).arg(&trace);
    if is_ours {
        command.args([binary, "serve"]);
    } else {
        // strace gives a program no other name than its file's.
        let named = folder.join("firecracker");
        let _ = std::fs::remove_file(&named);
        std::os::unix::fs::symlink(std::fs::canonicalize(binary)?, &named)?;
        command.arg(named);
    }
    command.arg("--api-sock").arg(&socket);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let traced = one_traced(&mut child, &socket, kernel);
    // The trace is read as far as it is written at the guest's first byte.
    let text = std::fs::read_to_string(&trace)?;
    // strace ends with its child, which it started and we may signal.
    let pid = text.split_whitespace().next().ok_or("an empty trace")?;
    Command::new("kill").args(["-KILL", pid]).status()?;
    child.wait()?;
    let _ = std::fs::remove_file(&socket);
    traced?;
    let calls: Vec<&str> = text.lines().filter(|line| line.contains('(')).collect();
    let answer = calls.iter().position(|line| line.contains("HTTP/1.1 200")).ok_or("it has not answered")?;
    let ioctls = calls.iter().filter(|line| line.contains("ioctl(") && line.contains("KVM_")).count();
    for (figure, count) in figures.iter_mut().zip([answer + 1, calls.len(), ioctls]) {
        figure.1.push(count as f64);
    }
    Ok(())
}

/// Starts a guest, and waits for its first byte.
fn one_traced(child: &mut Child, socket: &Path, kernel: &Path) -> Result<()> {
    let mut client = connect(child, socket)?;
    request(&mut client, "GET", "/", "")?;
    configure(&mut client, kernel)?;
    std::thread::sleep(Duration::from_millis(200));
    request(&mut client, "PUT", "/actions", r#"{"action_type":"InstanceStart"}"#)?;
    Ok(child.stdout.take().ok_or("no output")?.read_exact(&mut [0])?)
}

/// A console that tells when the guest's first byte comes.
struct Notifier(std::sync::mpsc::Sender<Instant>);

impl Write for Notifier {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.send(Instant::now());
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What a start is made of, measured inside the library.
fn split(runs: usize) -> Result<()> {
    let mut steps: Vec<(&'static str, Vec<f64>)> = Vec::new();
    let mut add = |index: usize, name: &'static str, duration: Duration| {
        if steps.len() == index {
            steps.push((name, Vec::new()));
        }
        steps[index].1.push(duration.as_secs_f64() * 1e3);
    };
    for _ in 0..runs {
        let (sender, first_byte) = channel();
        let mut host = Host::default();
        host.give_console(Box::new(Notifier(sender)));
        let mut config = Config::default();
        config.firmware_words = Some("hello".to_owned());
        let prepared = Prepared::new()?;
        let begun = Instant::now();
        let mut machine = Machine::build("bench", &config, &mut host, prepared)?;
        machine.load(&config, &mut host)?;
        let loaded = Instant::now();
        machine.resume()?;
        let first_byte = first_byte.recv_timeout(Duration::from_secs(60))?;
        let marks = machine.timeline().steps();
        for (index, (name, duration)) in marks.iter().enumerate() {
            add(index, name, *duration);
        }
        add(marks.len(), "first run, to the first byte", first_byte - loaded);
        add(marks.len() + 1, "all but what is done ahead", first_byte - begun);
        drop(machine);
        // The teardown of a virtual machine goes on for a while.
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("the start, step by step (the first two are done ahead), ms:");
    for (name, values) in &steps {
        println!("  {name:<42} {:>10.3}", median(values));
    }
    Ok(())
}
