//! Clones of a Linux guest, made by a template: each with an identity, a network and a disk of its own, as
//! docs/snapshots.md has it.

use std::collections::BTreeSet;

use super::*;

/// The clones of the normal run; the long series has ten.
const CLONES: usize = 2;

/// A user's shell, with a folder for what is running.
pub struct User {
    pub folder: Folder,
}

impl User {
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(common::alula());
        command.args(words).current_dir(&self.folder.0).env("XDG_RUNTIME_DIR", &self.folder.0);
        command.env("ALULA_KERNEL", asset(KERNELS[0]));
        command
    }

    pub fn says(&self, words: &[&str]) -> String {
        shared::said(self.command(words).stdin(Stdio::null()).output().unwrap())
    }

    /// Has the guest called `id` run a shell script.
    pub fn shell(&self, id: &str, script: &str) -> String {
        self.says(&["exec", id, "--timeout", "100s", "--", "busybox", "sh", "-c", script])
    }

    /// Makes clones of the snapshot in `saved` by a template, which are called `web-1` and so on.
    pub fn clones(&self, count: usize, overrides: &[&str]) -> Clones {
        let mut template = Process::spawn(self.command(&["template", "saved", "--api-sock", "t.sock"]));
        wait_for(|| std::os::unix::net::UnixStream::connect(self.folder.path("t.sock")).is_ok());
        let count = count.to_string();
        let words = ["clone", "-n", &count, "--template", "t.sock", "--id", "web", "--console", "{id}.log"];
        let made = self.says(&[&words[..], &["--vsock", "{id}.vsock"], overrides].concat());
        template.send(libc::SIGTERM);
        // Clones have its standard output, too, whose end would be theirs.
        assert_eq!(template.child.wait().unwrap().code(), Some(128 + libc::SIGTERM));
        let pids: Vec<u32> =
            made.lines().map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
        assert_eq!(pids.len().to_string(), count, "{made}");
        Clones(pids)
    }

    /// Has the guest called `id` have so many CPUs, where they come and go.
    pub fn has_cpus(&self, id: &str, count: u32) {
        if hold_back::can_hold_back() {
            self.says(&["ctl", id, "cpus", &count.to_string()]);
            self.shell(id, &format!("until [ $(busybox nproc) = {count} ]; do busybox usleep 10000; done"));
        }
    }
}

/// The processes of clones, which end with this.
pub struct Clones(pub Vec<u32>);

impl Clones {
    /// Ends them in order.
    pub fn end(mut self) {
        while let Some(pid) = self.0.pop() {
            common::send_to(pid, libc::SIGTERM);
            assert_eq!(common::await_child(pid).0, Some(128 + libc::SIGTERM));
        }
    }
}

impl Drop for Clones {
    fn drop(&mut self) {
        for pid in &self.0 {
            common::send_to(*pid, libc::SIGKILL);
            common::await_child(*pid);
        }
    }
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn clones_have_identities_networks_and_disks_of_their_own() {
    let count = if times() > 1 { 10 } else { CLONES };
    network::enter();
    for number in 0..=count {
        network::add_tap(&format!("tap{number}"), &format!("172.16.{number}.1/24"));
    }
    let user = User { folder: Folder::new() };
    let disk = disks::image(&user.folder, "data", "raw");
    let root = asset("root.ext4");
    let mut first = Process::spawn({
        let disk = format!("{},id=data", disk.display());
        let words = ["run", "--rootfs", root.to_str().unwrap(), "--disk", &disk, "--net", "tap=tap0"];
        let script = "busybox --install -s /bin; echo up; while :; do sleep 1000; done";
        let cpus: &[&str] = if hold_back::can_hold_back() { &["--max-cpus", "3"] } else { &[] };
        let more = ["--vsock", "v.sock", "--id", "first", "--", "busybox", "sh", "-c", script];
        user.command(&[&words[..], cpus, &more].concat())
    });
    first.expect("up\n");
    user.has_cpus("first", 2);
    user.says(&["ctl", "first", "snapshot", "saved"]);
    first.send(libc::SIGTERM);
    assert_eq!(first.end().code, Some(128 + libc::SIGTERM));

    let clones = user.clones(count, &["--overlay", "data={id}.qcow2", "--tap", "net0=tap{n}"]);

    let mut identities = BTreeSet::new();
    for number in 1..=count {
        let script = format!(
            "ip addr flush dev eth0; ip addr add 172.16.{number}.2/24 dev eth0; ip link set eth0 up
            ping -c 1 -W 10 172.16.{number}.1 >/dev/null && cat /proc/sys/kernel/random/uuid
            echo clone {number} | dd of=/dev/vdb conv=fsync 2>/dev/null; sync"
        );
        let identity = user.shell(&format!("web-{number}"), &script);
        assert_eq!(identity.trim().len(), 36, "{identity}");
        identities.insert(identity);
    }
    assert_eq!(identities.len(), count);
    // A guest that was saved can have more CPUs, and fewer.
    user.has_cpus("web-1", 3);
    user.has_cpus("web-1", 1);
    for number in 1..=count {
        let head = user.shell(&format!("web-{number}"), "head -n 1 /dev/vdb");
        assert_eq!(head, format!("clone {number}\n"));
    }
    clones.end();
    // The clones wrote to their overlays.
    let bytes = std::fs::read(&disk).unwrap();
    assert!(!bytes.starts_with(b"clone"));
}
