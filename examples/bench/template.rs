//! Clones that a template makes by copying itself, as those of the floor program do (`floor template`).

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Instant;

use serde_json::json;

use crate::monitor::{connect, request_body};
use crate::restore::{AT_A_TIME, Bench};
use crate::start::{cpu_time, median};
use crate::{Folder, Result};

/// The cost of a template's clones.
pub struct Figures {
    /// The number of clones made a second.
    pub a_second: f64,
    /// The CPU time of a clone until it was idle.
    pub cpu_ms: f64,
    /// The CPU time that the template spent on each clone.
    pub template_ms: f64,
    /// The memory that a clone has for itself: without what it shares with the template, and without its guest's. Medians
    /// of the clones that were there first, and last: of a tenth of all.
    pub first_kib: f64,
    pub last_kib: f64,
    /// The memory that the machine has less for each clone.
    pub machine_kib: f64,
}

/// The memory that this process and all that it starts take of the machine, the kernel's for them included: that of a
/// control group (v1) where one can be made, else what the machine has left, which others take of, too.
pub struct Machine {
    group: Option<PathBuf>,
    before: Option<PathBuf>,
}

impl Machine {
    pub fn new() -> Self {
        let root = Path::new("/sys/fs/cgroup/memory");
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let own = own.lines().find_map(|line| Some(line.split_once(":memory:/")?.1.to_owned()));
        let group = root.join(format!("alula-bench-{}", std::process::id()));
        let enter = |group: &Path| std::fs::write(group.join("cgroup.procs"), std::process::id().to_string());
        let made = own.is_some() && std::fs::create_dir(&group).is_ok() && enter(&group).is_ok();
        Self { before: own.map(|own| root.join(own)), group: made.then_some(group) }
    }

    /// A number of KiB that grows as memory is taken: only the difference of two says anything.
    pub fn used(&self) -> Result<f64> {
        let Some(group) = &self.group else {
            let told = std::fs::read_to_string("/proc/meminfo")?;
            let line = told.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
            return Ok(-line.ok_or("no MemAvailable")?.trim().trim_end_matches(" kB").parse::<f64>()?);
        };
        Ok(std::fs::read_to_string(group.join("memory.usage_in_bytes"))?.trim().parse::<f64>()? / 1024.0)
    }

    /// The number of [`Self::used`] when it has come to rest: the kernel gives back what processes had a while after they
    /// have ended.
    pub fn settled(&self) -> Result<f64> {
        const REST_KIB: f64 = 256.0;
        let mut before = self.used()?;
        for _ in 0..50 {
            std::thread::sleep(std::time::Duration::from_millis(100));
            let now = self.used()?;
            if (now - before).abs() < REST_KIB {
                return Ok(now);
            }
            before = now;
        }
        Ok(before)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let (Some(group), Some(before)) = (&self.group, &self.before) {
            let _ = std::fs::write(before.join("cgroup.procs"), std::process::id().to_string());
            // Processes that were killed may not have left the group yet.
            for _ in 0..100 {
                if std::fs::remove_dir(group).is_ok() {
                    return;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    }
}

/// Has `alula template`, with these further options, make `number` clones, asked by some clients at a time, and measures
/// them.
pub fn ours(bench: &Bench, number: usize, machine: &Machine, options: &[&str]) -> Result<Figures> {
    // A file system in memory, as /run is, where sockets of names are.
    let sockets = Folder::within(Path::new("/dev/shm"))?;
    let socket = sockets.0.join("template.socket");
    let mut command = Command::new(&bench.ours);
    command.arg("template").arg(&bench.saved).arg("--api-sock").arg(&socket).args(options);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    connect(&mut child, &socket)?;
    let mut clients = Vec::new();
    for _ in 0..AT_A_TIME {
        clients.push(connect(&mut child, &socket)?);
    }
    let template = child.id();
    let body = |index: usize| {
        // Clones that are killed leave their sockets, and who comes to the same path makes sure first that nobody is there.
        let api_sock = socket.with_file_name(format!("clone-{template}-{index}.socket"));
        json!({ "api_sock": api_sock, "resume_vm": true }).to_string()
    };
    let ask = |clients: &mut Vec<_>| -> Result<Vec<u32>> {
        let one = |(first, client): (usize, &mut _)| -> std::result::Result<Vec<u32>, String> {
            (first..number).step_by(AT_A_TIME).map(|index| pid(client, &body(index))).collect()
        };
        let pids = std::thread::scope(|scope| {
            let threads: Vec<_> =
                clients.iter_mut().enumerate().map(|client| scope.spawn(move || one(client))).collect();
            let pids =
                threads.into_iter().map(|thread| thread.join().map_err(|_| "a thread failed".to_owned())?);
            pids.collect::<std::result::Result<Vec<_>, _>>()
        });
        Ok(pids?.concat())
    };
    measure(&mut child, number, machine, |_, output| {
        let pids = ask(&mut clients)?;
        output.read_exact(&mut vec![0; number])?;
        Ok(pids)
    })
}

fn pid(client: &mut std::os::unix::net::UnixStream, body: &str) -> std::result::Result<u32, String> {
    let answer = request_body(client, "PUT", "/clones", body).map_err(|error| error.to_string())?;
    let answer: serde_json::Value = serde_json::from_str(&answer).map_err(|error| error.to_string())?;
    answer["pid"].as_u64().map(|pid| pid as u32).ok_or_else(|| format!("it has answered {answer}"))
}

/// Has the floor program make `number` clones, each asked for by a byte, and measures them as [`ours`] does: as many at a
/// time. A clone waits for the kernel more than it works, so that whoever asks for all at once gets more of them a second.
pub fn floor(bench: &Bench, number: usize, machine: &Machine) -> Result<Figures> {
    let mut command = bench.floor("template");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    std::thread::sleep(crate::restore::AHEAD);
    let id = child.id();
    measure(&mut child, number, machine, |child, output| {
        let input = child.stdin.as_mut().ok_or("no input")?;
        input.write_all(&vec![b'!'; AT_A_TIME.min(number)])?;
        for there in 0..number {
            output.read_exact(&mut [0])?;
            input.write_all(&vec![b'!'; usize::from(there + AT_A_TIME < number)])?;
        }
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
        Ok(children.split_whitespace().map(str::parse).collect::<std::result::Result<_, _>>()?)
    })
}

/// Has `make` make `number` clones and wait for the byte of each, and returns their figures.
fn measure(
    child: &mut Child,
    number: usize,
    machine: &Machine,
    make: impl FnOnce(&mut Child, &mut ChildStdout) -> Result<Vec<u32>>,
) -> Result<Figures> {
    let (before, spent) = (machine.settled()?, cpu_time(child.id())?);
    let mut output = child.stdout.take().ok_or("no output")?;
    let begun = Instant::now();
    let mut pids = make(child, &mut output)?;
    let a_second = number as f64 / begun.elapsed().as_secs_f64();
    // The numbers of processes grow as clones come.
    pids.sort_unstable();
    let measured = (|| {
        let machine_kib = (machine.used()? - before) / number as f64;
        let template_ms = (cpu_time(child.id())? - spent) / number as f64;
        let cpu = pids.iter().map(|pid| cpu_time(*pid)).collect::<Result<Vec<_>>>()?;
        let own = pids.iter().map(|pid| private_memory(*pid)).collect::<Result<Vec<_>>>()?;
        let tenth = own.len().div_ceil(10);
        let (first_kib, last_kib) = (median(&own[..tenth]), median(&own[own.len() - tenth..]));
        Ok(Figures { a_second, cpu_ms: median(&cpu), template_ms, first_kib, last_kib, machine_kib })
    })();
    child.kill()?;
    child.wait()?;
    for pids in pids.chunks(100) {
        Command::new("kill").arg("-9").args(pids.iter().map(u32::to_string)).status()?;
    }
    measured
}

/// The memory that a process has written to and shares with nobody, in KiB, without its guest's memory.
fn private_memory(pid: u32) -> Result<f64> {
    const GUEST_KIB: u64 = 32 << 10;
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut sum, mut size) = (0, 0);
    for line in smaps.lines() {
        let value = |text: &str| text.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
        if let Some(text) = line.strip_prefix("Size:") {
            size = value(text);
        } else if let Some(text) = line.strip_prefix("Private_Dirty:").filter(|_| size < GUEST_KIB) {
            sum += value(text);
        }
    }
    Ok(sum as f64)
}
