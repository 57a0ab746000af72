//! Guests that many cases share, each case by programs that it starts in the guest (`alula exec`): a boot is what costs
//! time in a rig. A case that fails is named, and the next one has a fresh guest.

use std::panic::AssertUnwindSafe;

use super::*;

/// The disks of a shared guest: their names, formats, engines.
const DISKS: [(&str, &str, &str); 4] = [
    ("raw_sync", "raw", "sync"),
    ("raw_async", "raw", "async"),
    ("qcow2_sync", "qcow2", "sync"),
    ("qcow2_async", "qcow2", "async"),
];

/// A guest that is up, with four disks, a network, a source of random bytes, what metadata it is told, and persistent
/// memory.
pub struct Guest {
    pub process: Process,
    pub folder: Folder,
    /// How many queues each disk has.
    pub queues: u32,
}

impl Guest {
    /// Boots one, in the network that this thread is in, by the line that `start` is, which prints `up`.
    fn boot(start: &str) -> Self {
        let folder = Folder::new();
        let queues = if start.contains("--enable-pci") { 2 } else { 1 };
        let script = folder.write("do", include_str!("../../resources/guest-init"));
        let metadata = json!({ "name": "web1", "long": "x".repeat(40_000), "more": {} }).to_string();
        let metadata = folder.write("metadata.json", metadata);
        let pmem = disks::image(&folder, "pmem", "raw");
        let mut more = format!("--vsock {} --entropy", folder.path("vsock").display());
        for (id, format, engine) in DISKS {
            let disk = disks::image(&folder, id, format);
            let options = format!("id={id},format={format},engine={engine},queues={queues}");
            more += &format!(" --disk {},{options}", disk.display());
        }
        more += &format!(" --metadata {} --pmem {}", metadata.display(), pmem.display());
        more += &format!(" --copy {}:/do", script.display());
        // An emulated machine may need words for the guest's kernel.
        if let Some(words) = std::env::var("ALULA_TEST_CMDLINE").ok().filter(|words| !words.is_empty()) {
            more += &format!(" --cmdline '{words}'");
        }
        for (name, there) in [("vmlinux", KERNELS[0]), ("modules", "modules"), ("web.ext4", "root.ext4")] {
            std::os::unix::fs::symlink(std::path::absolute(asset(there)).unwrap(), folder.path(name))
                .unwrap();
        }
        common::called("alula", &folder);
        std::fs::create_dir(folder.path("run")).unwrap();
        let mut process = Process::spawn(on_host(
            &folder,
            &start.replacen("alula run vmlinux", &format!("exec alula run vmlinux {more}"), 1),
        ));
        process.expect("up\n");
        Self { process, folder, queues }
    }

    /// A program that does `words` of resources/guest-init in the guest; those about a disk, on the one called `disk`.
    pub fn command(&self, disk: &str, words: &[&str]) -> Command {
        let mut command = Command::new(common::alula());
        command.arg("exec").arg("--vsock").arg(self.folder.path("vsock"));
        command.args(["--timeout", "100s", "--env", &format!("SERIAL={disk}"), "--", "busybox", "sh", "/do"]);
        command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Has the guest do `words` (see `command`), and returns the output.
    pub fn does(&self, disk: &str, words: &[&str]) -> String {
        self.told(&words.join(" "), self.command(disk, words).output().unwrap())
    }

    /// Has the guest run a shell script, and returns its output.
    pub fn shell(&self, script: &str) -> String {
        self.told(script, self.run(script, "100s"))
    }

    fn run(&self, script: &str, time: &str) -> std::process::Output {
        let mut command = Command::new(common::alula());
        command.arg("exec").arg("--vsock").arg(self.folder.path("vsock"));
        command.args(["--timeout", time, "--", "busybox", "sh", "-c", script]).stdin(Stdio::null());
        command.output().unwrap()
    }

    /// The output of what the guest did. If it failed, the guest's kernel tells which tasks hang, and where.
    fn told(&self, what: &str, output: std::process::Output) -> String {
        if !output.status.success() {
            let kernel = self.run("echo w >/proc/sysrq-trigger; dmesg | tail -n 80", "30s");
            eprintln!("`{what}` failed; the guest's kernel: {}", String::from_utf8_lossy(&kernel.stdout));
        }
        said(output)
    }

    /// Has the guest run a shell script meanwhile, whose lines are waited for.
    pub fn meanwhile(&self, script: &str) -> Process {
        let mut command = Command::new(common::alula());
        command.arg("exec").arg("--vsock").arg(self.folder.path("vsock"));
        command.args(["--", "busybox", "sh", "-c", script]);
        Process::spawn(command)
    }

    /// A client of the monitor.
    pub fn client(&self) -> common::Client {
        common::Client::connect(&self.folder.path("run/alula/web.sock"))
    }

    /// Runs a shell script on the host, where `alula` finds the guest by its name, `web`.
    pub fn host(&self, script: &str) {
        said(on_host(&self.folder, script).stdin(Stdio::null()).output().unwrap());
    }

    /// Has a disk show a new image, in which nothing is written, and returns that image's path.
    pub fn fresh(&self, disk: &str, format: &str) -> PathBuf {
        let path = disks::image(&self.folder, &format!("{disk}_of_a_case"), format);
        self.show(disk, &path);
        path
    }

    /// Has a disk show another image: the one before is closed, and nothing is kept back of what was written to it.
    pub fn show(&self, disk: &str, image: &Path) {
        let body = json!({ "drive_id": disk, "path_on_host": image });
        self.client().ok("PATCH", &format!("/drives/{disk}"), &body.to_string());
    }

    /// Ends it. Whoever ends the monitor by a signal is told so by its code.
    fn end(mut self) {
        self.process.send(libc::SIGTERM);
        assert_eq!(self.process.end().code, Some(128 + libc::SIGTERM));
    }
}

/// A shell in `folder`, where `alula` is, with a script.
fn on_host(folder: &Folder, script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-e", "-c", script]).current_dir(&folder.0);
    command.env("PATH", format!("{}:{}", folder.0.display(), std::env::var("PATH").unwrap()));
    command.env("XDG_RUNTIME_DIR", folder.path("run")).env_remove("SUDO_USER");
    command
}

/// The output of a program, in the guest or beside it, which must have ended well.
pub fn said(output: std::process::Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}: {text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    text
}

/// A case: its name, and what it does.
type Case = (&'static str, fn(&Guest));

const CASES: &[Case] = &[
    ("a guest grows while it serves, and shrinks", growing::grows_and_shrinks),
    ("four writers on a raw disk by the sync engine", |guest| disks::four_writers(guest, "raw", "sync")),
    ("four writers on a raw disk by the async engine", |guest| disks::four_writers(guest, "raw", "async")),
    ("four writers on a qcow2 disk by the sync engine", |guest| disks::four_writers(guest, "qcow2", "sync")),
    ("four writers on a qcow2 disk by the async engine", |guest| {
        disks::four_writers(guest, "qcow2", "async")
    }),
    ("what is given back of a raw disk is free", |guest| disks::gives_back(guest, "raw", "async")),
    ("what is given back of a qcow2 disk is free", |guest| disks::gives_back(guest, "qcow2", "sync")),
    (ALL_DEVICES, uses_all_devices),
    ("what is written to persistent memory is there", disks::writes_to_pmem),
    ("bulk data crosses a TAP in both directions", networks::bulk),
    ("a disk comes and goes many times in a row", plugging::in_a_row),
    ("a disk comes and goes in a PCIe slot", plugging::slots),
    ("a disk comes and goes while the guest runs", plugging::disks),
    ("a disk comes and goes in few exits", plugging::exits),
    ("a network interface comes and goes while the guest runs", plugging::interfaces),
    ("persistent memory comes and goes while the guest runs", plugging::pmem),
    ("CPUs come and go while the guest runs", plugging::cpus),
    ("a disk that is torn away leaves the guest alive", plugging::torn_away),
];

/// The case in which every device interrupts: the one that is of use where the rig has an older interrupt controller.
const ALL_DEVICES: &str = "disk, network, metadata and entropy together";

/// How a guest of two CPUs is started that does not grow but for more CPUs, where those come.
fn plain(transport: &[&str]) -> String {
    let cpus = if X86_64 { "--cpus 2 --max-cpus 4" } else { "--cpus 2" };
    let script = "busybox --install -s /bin; echo up; while :; do sleep 1000; done";
    let machine = format!("--memory 256M {cpus} --net tap=tap0,mac={MAC} {}", transport.join(" "));
    format!("alula run vmlinux --rootfs web.ext4 --id web {machine} -- busybox sh -c '{script}'")
}

/// Runs all cases in one guest, or in as many as it takes: those that ALULA_TEST_CASES has a word of, where that is set
/// (words with `|` between them).
fn cases_share_a_guest(start: &str) {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    let mut failed = Vec::new();
    let mut guest = None;
    let words = std::env::var("ALULA_TEST_CASES").unwrap_or_default();
    for word in words.split('|') {
        assert!(CASES.iter().any(|(name, _)| name.contains(word)), "no case has `{word}` in its name");
    }
    let is_older = std::env::var("ALULA_GIC").is_ok_and(|version| version == "2");
    let is_meant =
        |name: &str| (!is_older || name == ALL_DEVICES) && words.split('|').any(|word| name.contains(word));
    for (name, case) in CASES.iter().filter(|(name, _)| is_meant(name)) {
        println!("case: {name}");
        let one = guest.take().unwrap_or_else(|| Guest::boot(start));
        // A case that fails takes the guest with it.
        match std::panic::catch_unwind(AssertUnwindSafe(move || {
            case(&one);
            one
        })) {
            Ok(one) => guest = Some(one),
            Err(_) => failed.push(*name),
        }
    }
    guest.into_iter().for_each(Guest::end);
    assert!(failed.is_empty(), "failed: {failed:?}");
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn cases_share_a_guest_behind_virtio_mmio() {
    cases_share_a_guest(&plain(TRANSPORTS[0]));
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn cases_share_a_guest_behind_virtio_pci() {
    // On aarch64, no CPU comes or goes.
    let start = match X86_64 {
        true => growing::start().to_owned(),
        false => plain(&["--enable-pci", "--pcie-slots 2"]),
    };
    cases_share_a_guest(&start);
}

fn uses_all_devices(guest: &Guest) {
    guest.fresh("raw_async", "raw");
    let text = guest.does("raw_async", &["disk-write", "network", "metadata", "entropy"]);
    for said in [
        "disk: read and written, 65536 sectors",
        "network: pinged, 06:00:ac:10:00:02",
        "metadata: web1, 40000 bytes, 48 digits, long more/ name",
        "virtio_rng.0",
    ] {
        assert!(text.contains(said), "no `{said}`: {text}");
    }
    let again = guest.does("raw_async", &["disk-check", "entropy"]);
    assert!(again.contains("disk: read and written, 65536 sectors"), "{again}");
    let random = [&text, &again].map(|text| line_of(text, "0000000").to_owned());
    assert!(random[0].len() > 40 && random[0] != random[1], "{random:?}");
}
