//! The cost of a jail: CPU time until the monitor in it answers, and private memory of its guest.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::monitor::{connect, request};
use crate::start::{configure, cpu_time, median};
use crate::{Folder, Result};

/// The user and the group of the monitors.
const USER: &str = "1234";
/// The number of guests that run at once.
const GUESTS: usize = 100;

/// How the monitor is started.
#[derive(Clone, Copy)]
enum Way {
    /// The monitor by itself.
    Alone,
    /// The monitor in a jail without a control group.
    Jail,
    /// The monitor in a jail with a control group.
    Group,
}

/// A monitor that listens.
struct Started {
    child: Child,
    client: UnixStream,
    root: PathBuf,
}

pub fn jail(ours: &str, runs: usize) -> Result<()> {
    let own = Folder::new()?;
    let result = measure(ours, &own.0, runs);
    for group in fs::read_dir("/sys/fs/cgroup/pids/alula-bench").into_iter().flatten().flatten() {
        let _ = fs::remove_dir(group.path());
    }
    let _ = fs::remove_dir("/sys/fs/cgroup/pids/alula-bench");
    result
}

fn measure(ours: &str, folder: &Path, runs: usize) -> Result<()> {
    let mut cpu = [const { Vec::new() }; 3];
    for run in 0..runs {
        for (way, values) in [Way::Alone, Way::Jail, Way::Group].into_iter().zip(&mut cpu) {
            let mut started = start(ours, folder, &format!("c{run}"), way)?;
            request(&mut started.client, "GET", "/", "")?;
            values.push(cpu_time(started.child.id())?);
            started.end()?;
        }
    }
    let [alone, jail, group] = cpu.map(|values| median(&values));
    println!("jail: medians of {runs} runs, CPU time until the monitor's first answer, ms");
    println!("{:<44} {alone:>10.2}", "by itself");
    println!("{:<44} {jail:>10.2} {:>+7.2}  <= 0.6 more", "in a jail", jail - alone);
    println!("{:<44} {group:>10.2} {:>+7.2}", "in a jail with a control group", group - alone);
    let [alone, jail] = [memory(ours, folder, Way::Alone)?, memory(ours, folder, Way::Jail)?];
    println!("private memory of each of {GUESTS} guests, KiB");
    println!("{:<44} {alone:>10.0}", "by itself");
    println!("{:<44} {jail:>10.0} {:>+7.0}  <= 300 more", "in a jail", jail - alone);
    Ok(())
}

fn start(ours: &str, folder: &Path, id: &str, way: Way) -> Result<Started> {
    let root = folder.join("jails/alula").join(id).join("root");
    let run = root.join("run");
    fs::create_dir_all(&run)?;
    fs::write(root.join("kernel"), alula::firmware::IMAGE)?;
    let mut command = Command::new(ours);
    match way {
        Way::Alone => command.args(["serve", "--api-sock"]).arg(run.join("a.sock")),
        Way::Jail | Way::Group => {
            command.args(["jail", "--id", id, "--uid", USER, "--gid", USER, "--chroot-base-dir"]);
            command.arg(folder.join("jails"));
            if matches!(way, Way::Group) {
                command.args(["--parent-cgroup", "alula-bench", "--cgroup", "pids.max=64"]);
            }
            command.args(["--", "--api-sock", "/run/a.sock"])
        }
    };
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let client = connect(&mut child, &run.join("a.sock"));
    let client = client.inspect_err(|_| {
        let _ = child.kill();
        let _ = child.wait();
    })?;
    Ok(Started { child, client, root })
}

impl Started {
    fn end(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(fs::remove_dir_all(self.root.parent().ok_or("no jail")?)?)
    }
}

/// The private memory of one guest, in KiB: the mean of as many as [`GUESTS`] at once.
fn memory(ours: &str, folder: &Path, way: Way) -> Result<f64> {
    let mut guests = Vec::new();
    let mut all = || -> Result<f64> {
        for number in 0..GUESTS {
            let mut guest = start(ours, folder, &format!("m{number}"), way)?;
            let kernel = if matches!(way, Way::Alone) { guest.root.join("kernel") } else { "/kernel".into() };
            configure(&mut guest.client, &kernel)?;
            request(&mut guest.client, "PUT", "/actions", r#"{"action_type":"InstanceStart"}"#)?;
            guests.push(guest);
        }
        guests.iter().map(|guest| private(guest.child.id())).sum()
    };
    let sum = all();
    guests.into_iter().try_for_each(Started::end)?;
    Ok(sum? / GUESTS as f64)
}

fn private(pid: u32) -> Result<f64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let lines = rollup.lines().filter(|line| line.starts_with("Private_"));
    lines
        .map(|line| Ok(line.split_whitespace().nth(1).ok_or("smaps_rollup has changed")?.parse::<f64>()?))
        .sum()
}
