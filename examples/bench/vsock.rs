//! The cost of vsock, counted: bytes both ways, round trips, connections, and a command by the agent.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use alula::api::client::Client;
use serde_json::{Value, json};

use crate::counters::{Calls, Counters, Counts, Debug, own_memory};
use crate::host::wait_for;
use crate::monitor::Monitor;
use crate::table::verdict;
use crate::{Folder, Result};

/// The host's ports that the guest knows (examples/guest_io.rs).
const SINK: u32 = 5001;
const SOURCE: u32 = 5002;
const PINGER: u32 = 5003;
const KEEPER: u32 = 5004;

const MIB: u64 = 64;
const BLOCK: usize = 64 << 10;
const ROUND_TRIPS: u64 = 2000;
const CONNECTIONS: u64 = 5000;
const COMMANDS: usize = 20;

const READS_MAX: f64 = 24.0;
const KICKS_MAX: f64 = 24.0;
const WRITES_MAX: f64 = 20.0;
const ROUND_TRIP_EXITS_MAX: f64 = 4.5;
const CONNECTION_BYTES_MAX: f64 = 600.0;
const MEMORY_KIB_MAX: f64 = 40.0;
const COMMAND_CALLS_MAX: f64 = 60.0;
const COMMAND_EXITS_MAX: f64 = 45.0;

/// A monitor to measure.
struct Subject<'a> {
    binary: &'a str,
    is_ours: bool,
}

/// A running guest that waits for commands, and the counters of what its monitor does.
struct Guest<'a> {
    monitor: Monitor,
    counters: Counters<'a>,
    folder: &'a Path,
    is_ours: bool,
}

/// Measures a Linux guest (kernel, initramfs) behind both transports. `ours` is the program whose agent is in the
/// guest, and by which commands are given to it, whoever the monitor is.
pub fn vsock(ours: &str, other: Option<&str>, linux: &(PathBuf, PathBuf)) -> Result<()> {
    let folder = Folder::new()?;
    let debug = Debug::mount(&folder.0)?;
    std::fs::write(folder.0.join("disk"), vec![0; 1 << 20])?;
    let gone = serve_guests(&folder.0)?;
    let subjects = [(ours, true)].into_iter().chain(other.map(|binary| (binary, false)));
    for (binary, is_ours) in subjects {
        let subject = Subject { binary, is_ours };
        for (transport, flags) in [("mmio", &[][..]), ("pci", &["--enable-pci"])] {
            let name = if is_ours { "alula" } else { "other" };
            println!("\n{name}, a Linux guest behind virtio-{transport}, 1 CPU:");
            if let Err(error) = measure(&subject, ours, &debug, &folder.0, flags, linux, &gone) {
                println!("not measured: {error}");
            }
        }
    }
    Ok(())
}

fn measure(
    subject: &Subject<'_>,
    client: &str,
    debug: &Debug,
    folder: &Path,
    flags: &[&str],
    linux: &(PathBuf, PathBuf),
    gone: &Receiver<()>,
) -> Result<()> {
    // The guest without vsock ends before the other one starts: one at a time has the disk.
    let without = own_memory(start(subject, debug, folder, flags, linux, false)?.monitor.pid())?;
    let mut guest = start(subject, debug, folder, flags, linux, true)?;
    let memory = own_memory(guest.monitor.pid())? as f64 - without as f64;
    bar("anonymous memory more than without vsock, KiB", memory, Some(MEMORY_KIB_MAX), "");
    streams(&mut guest)?;
    round_trips(&mut guest)?;
    commands(&mut guest, client)?;
    connections(&mut guest, gone)
}

/// Prints a figure, and the bar that it is held against.
fn bar(name: &str, found: f64, max: Option<f64>, more: &str) {
    let max = max.map(|max| format!(" <= {max}: {}", verdict(found <= max))).unwrap_or_default();
    println!("{name:<52} {found:>9.2}{max}{}{more}", if more.is_empty() { "" } else { "; " });
}

fn start<'a>(
    subject: &Subject<'_>,
    debug: &'a Debug,
    folder: &'a Path,
    flags: &[&str],
    (kernel, initrd): &(PathBuf, PathBuf),
    has_vsock: bool,
) -> Result<Guest<'a>> {
    let disk = json!({ "drive_id": "disk", "path_on_host": folder.join("disk"), "is_root_device": false });
    let boot = json!({
        "kernel_image_path": kernel,
        "initrd_path": initrd,
        "boot_args": "console=ttyS0 panic=-1 quiet reboot=k alula.run=bench",
    });
    let mut config = vec![
        ("/boot-source", boot),
        ("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 128 })),
        ("/drives/disk", disk),
    ];
    let socket = folder.join("v");
    let _ = std::fs::remove_file(&socket);
    if has_vsock {
        config.push(("/vsock", json!({ "guest_cid": 3, "uds_path": socket })));
    }
    let (binary, api) = (subject.binary, folder.join("api.socket"));
    let monitor = Monitor::start(binary, subject.is_ours, &api, flags, &config)?;
    monitor.expect(&["bench: ready"])?;
    let counters = Counters::new(debug, monitor.pid())?;
    Ok(Guest { monitor, counters, folder, is_ours: subject.is_ours })
}

impl Guest<'_> {
    /// The kicks that the device of Alula has counted; None: the monitor is another one.
    fn kicks(&self) -> Result<Option<u64>> {
        if !self.is_ours {
            return Ok(None);
        }
        let answer = Client::connect(&self.folder.join("api.socket"))?.request("GET", "/metrics", "")?;
        let metrics: Value = serde_json::from_str(&answer.body)?;
        let of = |name: &str| metrics["vsock"][name].as_u64().ok_or("the metrics have changed");
        Ok(Some(of("rx_queue_event_count")? + of("tx_queue_event_count")?))
    }

    /// Gives the guest a command, and returns its cost: what was counted, kicks, and the time.
    fn cost(&mut self, command: &str) -> Result<(Counts, Option<u64>, Duration)> {
        let kicks = self.kicks()?;
        let (before, begun) = (self.counters.read()?, Instant::now());
        self.monitor.command(command)?;
        let (counts, time) = (self.counters.read()?.since(&before), begun.elapsed());
        if counts.vcpu_calls["all"] + counts.other_calls["all"] == 0 {
            return Err("the kernel has not counted one system call".into());
        }
        let kicks = kicks.zip(self.kicks()?).map(|(before, after)| after - before);
        Ok((counts, kicks, time))
    }
}

fn streams(guest: &mut Guest<'_>) -> Result<()> {
    for (name, command, calls, max) in [
        (
            "host to guest, reads a MiB",
            "vsock-receive",
            &["read", "readv", "recvmsg", "preadv"][..],
            READS_MAX,
        ),
        ("guest to host, writes a MiB", "vsock-send", &["write", "writev", "sendmsg", "pwritev"], WRITES_MAX),
    ] {
        // The first transfer of a kind is not counted: it fills what is filled only once.
        guest.monitor.command(&format!("{command} {}", 1 << 20))?;
        let (counts, kicks, time) = guest.cost(&format!("{command} {}", MIB << 20))?;
        let per = |count: u64| count as f64 / MIB as f64;
        // The calls of the io thread are found, which does nothing else here. A signal to an event is a write, too.
        let found = calls.iter().filter_map(|call| counts.other_calls.get(call)).sum();
        let rate = MIB as f64 / time.as_secs_f64();
        bar(name, per(found), Some(max), &format!("{rate:.0} MiB/s, {}", kinds(&counts, MIB)));
        if let Some(kicks) = kicks {
            bar("  kicks a MiB", per(kicks), (command == "vsock-receive").then_some(KICKS_MAX), "");
        }
    }
    Ok(())
}

fn round_trips(guest: &mut Guest<'_>) -> Result<()> {
    let (counts, ..) = guest.cost(&format!("vsock-echo {ROUND_TRIPS}"))?;
    let found = counts.load_exits() as f64 / ROUND_TRIPS as f64;
    bar("exits of a round trip of one byte", found, Some(ROUND_TRIP_EXITS_MAX), &kinds(&counts, ROUND_TRIPS));
    Ok(())
}

/// Measures commands that only succeed, by the agent in the guest. The bars are held against a program that does
/// nothing else: busybox is linked with a C library, which asks for all that the CPU can before it begins.
fn commands(guest: &mut Guest<'_>, client: &str) -> Result<()> {
    guest.monitor.command("agent")?;
    for (name, words, bars) in [
        ("`true`", &["/bench/true"][..], [Some(COMMAND_CALLS_MAX), Some(COMMAND_EXITS_MAX)]),
        ("`busybox true`", &["/bin/busybox", "true"], [None, None]),
    ] {
        let (calls, exits) = command(guest, client, words)?;
        let sum = (calls.other_calls["all"] + calls.vcpu_calls["all"]) as f64;
        bar(&format!("system calls of {name}"), sum, bars[0], &kinds(&calls, 1));
        bar(&format!("exits of {name}"), exits.load_exits() as f64, bars[1], &kinds(&exits, 1));
    }
    Ok(())
}

/// Measures a command in the guest, from the connection to the exit code: the run with the median of system calls,
/// and that with the median of exits.
fn command(guest: &Guest<'_>, client: &str, words: &[&str]) -> Result<(Counts, Counts)> {
    let mut command = Command::new(client);
    command.args(["exec", "--vsock"]).arg(guest.folder.join("v")).arg("--").args(words);
    command.stdin(Stdio::null()).stderr(Stdio::null());
    let mut run = || Ok::<_, std::io::Error>(command.status()?.success());
    wait_for(|| run().is_ok_and(|is_there| is_there));
    let mut all = Vec::new();
    for _ in 0..COMMANDS {
        let before = guest.counters.read()?;
        if !run()? {
            return Err(format!("`{}` failed in the guest", words.join(" ")).into());
        }
        all.push(guest.counters.read()?.since(&before));
    }
    all.sort_by_key(|counts| counts.other_calls["all"] + counts.vcpu_calls["all"]);
    let calls = all[COMMANDS / 2].clone();
    all.sort_by_key(Counts::load_exits);
    Ok((calls, all.swap_remove(COMMANDS / 2)))
}

/// Measures the memory of connections that are open and idle.
fn connections(guest: &mut Guest<'_>, gone: &Receiver<()>) -> Result<()> {
    let before = own_memory(guest.monitor.pid())?;
    let begun = Instant::now();
    guest.monitor.command(&format!("vsock-open {CONNECTIONS}"))?;
    let time = begun.elapsed();
    let grown = own_memory(guest.monitor.pid())?.saturating_sub(before);
    if gone.try_recv().is_ok() {
        return Err("some connections have ended".into());
    }
    let each = (grown << 10) as f64 / CONNECTIONS as f64;
    let more = format!("{CONNECTIONS} open at once, opened in {:.1} s", time.as_secs_f64());
    bar("bytes of an idle connection, by whole pages", each, Some(CONNECTION_BYTES_MAX), &more);
    // The connections of the next guest are counted from zero: these end first.
    guest.monitor.command("vsock-close")?;
    (0..CONNECTIONS).try_for_each(|_| gone.recv_timeout(Duration::from_secs(100)))?;
    Ok(())
}

/// The counts of each kind of exit and of system call, for each unit.
fn kinds(counts: &Counts, units: u64) -> String {
    let list = |what: &str, calls: &Calls| {
        let per = |count: u64| count as f64 / units as f64;
        let kinds = calls.iter().filter(|(_, count)| per(**count) >= 0.02);
        let kinds: Vec<_> = kinds.map(|(name, count)| format!("{name} {:.2}", per(*count))).collect();
        format!("{what}: {}", kinds.join(", "))
    };
    let Counts { exits, vcpu_calls, other_calls, .. } = counts;
    [list("exits", exits), list("vCPU calls", vcpu_calls), list("calls", other_calls)].join("; ")
}

/// The host's ends of the guests' connections, for as long as the bench runs. Each connection to the keeper that
/// ends is told.
fn serve_guests(folder: &Path) -> Result<Receiver<()>> {
    let listen = |port: u32| UnixListener::bind(folder.join(format!("v_{port}")));
    let serve = |port: u32, serve: fn(UnixStream) -> std::io::Result<()>| -> Result<()> {
        let listener = listen(port)?;
        std::thread::spawn(move || {
            // A stream that fails is one of a guest that has ended in the middle, which is no error.
            listener.incoming().flatten().for_each(|stream| drop(serve(stream)));
        });
        Ok(())
    };
    serve(SINK, |stream| std::io::copy(&mut { stream }, &mut std::io::sink()).map(drop))?;
    serve(SOURCE, |mut stream| {
        let block = vec![0x5a; BLOCK];
        loop {
            stream.write_all(&block)?;
        }
    })?;
    serve(PINGER, |mut stream| {
        loop {
            stream.write_all(&[0x5a])?;
            stream.read_exact(&mut [0])?;
        }
    })?;
    let (sender, gone) = channel();
    let keeper = listen(KEEPER)?;
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        for stream in keeper.incoming().flatten() {
            kept.push(stream);
            if kept.len() as u64 == CONNECTIONS {
                for mut stream in kept.drain(..) {
                    let _ = stream.read(&mut [0]);
                    let _ = sender.send(());
                }
            }
        }
    });
    Ok(gone)
}
