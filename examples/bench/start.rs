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

/// A figure's name, its unit, and its value in every run.
struct Figure(&'static str, &'static str, Vec<f64>);

pub fn start(ours: &str, other: Option<&str>, runs: usize) -> Result<()> {
    let own = Folder::new()?;
    let folder = own.0.as_path();
    let floor = compile_floor(folder)?;
    let mut floors = [Vec::new(), Vec::new()];
    let kernel = folder.join("firmware");
    std::fs::write(&kernel, alula::firmware::IMAGE)?;

    let mut own_figures = figures();
    let mut others = other.map(|binary| (binary, figures(), None));
    for _ in 0..runs {
        one_start(ours, true, folder, &kernel, &mut own_figures)?;
        if let Some((binary, figures, cannot @ None)) = &mut others {
            *cannot = one_start(binary, false, folder, &kernel, figures).err();
        }
        let (wall, cpu) = one_floor(&floor)?;
        floors[0].push(wall);
        floors[1].push(cpu);
    }
    println!("start: 1 CPU, 128 MiB, medians of {runs} runs");
    println!("{:<44} {:>10} {:>10} {:>7}", "", "alula", if other.is_some() { "other" } else { "" }, "ratio");
    for (index, Figure(name, unit, values)) in own_figures.iter().enumerate() {
        let ours = median(values);
        print!("{:<44} {ours:>10.2}", format!("{name}, {unit}"));
        match others.as_ref().map(|(_, figures, _)| figures[index].2.as_slice()) {
            None => println!(),
            Some([]) => println!(" {:>10}", "cannot"),
            Some(values) => println!(" {:>10.2} {:>7.2}", median(values), ours / median(values)),
        }
    }
    if let Some((binary, _, Some(error))) = &others {
        println!("{binary} cannot do all of it: {error}");
    }
    println!(
        "{:<44} {:>10.2} / CPU {:.2}",
        "an empty static C program, spawn to output, ms",
        median(&floors[0]),
        median(&floors[1])
    );
    println!("binary: {:.2} MiB", std::fs::metadata(ours)?.len() as f64 / f64::from(1 << 20));
    syscalls(ours, folder, &kernel)?;
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

fn figures() -> Vec<Figure> {
    [
        ("spawn to first API answer", "ms"),
        ("CPU time by then", "ms"),
        ("InstanceStart to the guest's first byte", "ms"),
        ("InstanceStart answered", "ms"),
        ("anonymous memory after start", "KiB"),
        ("the binary's own pages in memory", "KiB"),
        ("pause", "ms"),
    ]
    .map(|(name, unit)| Figure(name, unit, Vec::new()))
    .into()
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
    let mut add = |value| figures.next().expect("there is a name for each").2.push(value);
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

fn configure(client: &mut UnixStream, kernel: &Path) -> Result<()> {
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

/// Counts system calls of one start, from exec to the guest's first byte.
fn syscalls(binary: &str, folder: &Path, kernel: &Path) -> Result<()> {
    let (socket, trace) = (folder.join("api.socket"), folder.join("trace"));
    let mut child = Command::new("strace")
        .args(["-f", "-qq", "-o"])
        .arg(&trace)
        .args([binary, "serve", "--api-sock"])
        .arg(&socket)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut client = connect(&mut child, &socket)?;
    request(&mut client, "GET", "/", "")?;
    configure(&mut client, kernel)?;
    std::thread::sleep(Duration::from_millis(200));
    request(&mut client, "PUT", "/actions", r#"{"action_type":"InstanceStart"}"#)?;
    child.stdout.take().ok_or("no output")?.read_exact(&mut [0])?;
    let text = std::fs::read_to_string(&trace)?;
    let calls: Vec<&str> = text.lines().filter(|line| line.contains('(')).collect();
    let answer = calls.iter().position(|line| line.contains("HTTP/1.1 200")).unwrap_or(0) + 1;
    let ioctls = calls.iter().filter(|line| line.contains("ioctl(") && line.contains("KVM_")).count();
    println!(
        "system calls: {answer} to the first answer, {} to the first byte, {ioctls} of them KVM ioctls",
        calls.len()
    );
    // strace ends with its child, which it started and we may signal.
    let pid = text.split_whitespace().next().ok_or("an empty trace")?;
    Command::new("kill").arg(pid).status()?;
    child.wait()?;
    Ok(())
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
