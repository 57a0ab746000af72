//! The machine that the agent is in: what is set, what is told of it, and its end.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};
use crate::protocol::request::{Info, Memory, Pci, Set};
use crate::sys::{machine, process};

/// How long processes have to end when the guest does.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// How long a kernel has to find a CPU that its guest was given.
const CPU_TIME: Duration = Duration::from_secs(10);

/// Sets what is said.
pub fn set(set: &Set) -> Result<()> {
    let Set { hostname, clock_ns, seed, address, cpus, cpus_off, pci } = set;
    if let Some(name) = hostname {
        machine::set_hostname(name).with_context(|| format!("set the hostname `{name}`"))?;
    }
    if let Some(ns) = clock_ns {
        machine::set_clock(*ns).context("set the clock")?;
    }
    if let Some(seed) = seed {
        machine::add_randomness(seed).context("add random bytes to the kernel's generator")?;
    }
    if let Some(given) = address {
        let attempt = || format!("give `{}` the address {}", given.interface, given.address);
        machine::bring_up(&given.interface, Some((given.address, given.prefix))).with_context(attempt)?;
        if let Some(gateway) = given.gateway {
            machine::set_gateway(gateway).with_context(|| format!("make {gateway} the gateway"))?;
        }
    }
    cpus.iter().try_for_each(|number| switch(*number, "1"))?;
    cpus_off.iter().try_for_each(|number| switch(*number, "0"))?;
    if let Some(pci) = pci {
        let (path, word) = match pci {
            Pci::Rescan => ("/sys/bus/pci/rescan".to_owned(), "1"),
            Pci::Remove(number) => (format!("/sys/bus/pci/devices/0000:00:{number:02x}.0/remove"), "1"),
            Pci::Empty(slot) => (format!("/sys/bus/pci/slots/{slot}/power"), "0"),
        };
        std::fs::write(&path, word).with_context(|| format!("write to `{path}`"))?;
    }
    Ok(())
}

/// Has the CPU with this number be used (`1`) or not (`0`), as soon as the kernel has found it.
fn switch(number: u16, to: &str) -> Result<()> {
    let (path, deadline) = (format!("/sys/devices/system/cpu/cpu{number}/online"), Instant::now() + CPU_TIME);
    while !Path::new(&path).exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::fs::write(&path, to).with_context(|| format!("write to `{path}`"))
}

/// How the guest is.
pub fn info() -> Info {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let uptime = text("/proc/uptime");
    let seconds: f64 = uptime.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0.0);
    let memory = text("/proc/meminfo");
    let line = |name: &str| {
        let number = memory.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        number.trim().trim_end_matches(" kB").parse().unwrap_or(0)
    };
    Info {
        uptime_ms: (seconds * 1000.0) as u64,
        memory_kib: Memory { total: line("MemTotal:"), available: line("MemAvailable:") },
        addresses: machine::addresses(),
        hostname: text("/proc/sys/kernel/hostname").trim().to_owned(),
    }
}

/// Ends the guest. As process 1 this returns only if that fails; beside another init, that one is asked.
pub fn end(reboot: bool) -> Result<()> {
    if std::process::id() != 1 {
        let program = if reboot { "reboot" } else { "poweroff" };
        let mut command = Command::new(program);
        process::prepare(&mut command, None, false);
        let asked = command.status().with_context(|| format!("start `{program}`"))?;
        return match asked.success() {
            true => Ok(()),
            false => Err(Error::guest(format!("`{program}` failed: {asked}"))),
        };
    }
    process::signal_all(libc::SIGTERM);
    let deadline = Instant::now() + LAST_WORDS;
    while has_processes() && Instant::now() < deadline {
        while process::reap().is_some() {}
        std::thread::sleep(Duration::from_millis(5));
    }
    process::signal_all(libc::SIGKILL);
    // The file system is clean then, whether it is on a disk or not.
    let _ = machine::mount("", "/", "", libc::MS_REMOUNT | libc::MS_RDONLY, "");
    machine::end(reboot).context("end the guest")
}

/// Whether there are processes besides this one and the kernel's threads, which have no program.
fn has_processes() -> bool {
    let Ok(list) = std::fs::read_dir("/proc") else { return false };
    list.flatten().any(|entry| {
        let is_number = entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit());
        is_number && entry.file_name() != "1" && entry.path().join("exe").read_link().is_ok()
    })
}
