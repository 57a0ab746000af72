//! `alula jail`: what a program in it still has, that it costs next to nothing, and that nothing is left of one that
//! could not be made.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "../common/mod.rs"]
mod common;
mod loaded;
mod looked;
mod moments;
mod plugged;
mod refused;
mod site;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::channel;

use common::inject::{Injected, Outcome};
use common::walls::{assert_walled, trespass};
use common::{Client, Ended, Process, network, wait_for};
use looked::Looked;
use site::{Site, end};

/// The user and the group that programs in jails have here.
const UID: u32 = 1234;
const GID: u32 = 1235;
/// The user, and the group, without any rights.
const NOBODY: u32 = 65534;
/// The most private memory that a jail may cost, in KiB.
const MEMORY_MAX_KIB: u64 = 300;
/// The number of guests in jails that are compared with as many outside: ten, if ALULA_TEST_JAILS does not say it.
fn number_of_guests() -> usize {
    std::env::var("ALULA_TEST_JAILS").map_or(10, |count| count.parse().unwrap())
}

fn boot(client: &mut Client, kernel: &Path) {
    boot_to(client, kernel, "case=serial end=idle");
}

/// Boots a guest that does what `words` say.
fn boot_to(client: &mut Client, kernel: &Path, words: &str) {
    client.ok("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 16}"#);
    let boot = serde_json::json!({ "kernel_image_path": kernel, "boot_args": format!("memory=16 {words}") });
    client.ok("PUT", "/boot-source", &boot.to_string());
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    assert_eq!(client.ok("GET", "/", "").json()["state"], "Running");
}

/// The path of a network namespace, which lives as long as this value.
struct Network(PathBuf, #[allow(dead_code, reason = "its end ends the thread")] std::sync::mpsc::Sender<()>);

impl Network {
    fn new() -> Self {
        let (sender, receiver) = channel();
        let (end, ended) = channel();
        std::thread::spawn(move || {
            network::enter();
            let task = std::fs::read_link("/proc/thread-self").unwrap();
            sender.send(Path::new("/proc").join(task).join("ns/net")).unwrap();
            let _ = ended.recv();
        });
        Self(receiver.recv().unwrap(), end)
    }
}

#[test]
fn a_guest_runs_in_a_jail_that_root_made() {
    let site = Site::new();
    site.put_kernel("web");
    let network = Network::new();
    let files = ["kept", "other"].map(|name| File::open(site.folder.write(name, "")).unwrap());
    let kept = network::hand_over(&files[0]);
    network::hand_over(&files[1]);
    let mut command = site.jail("web");
    command.args(site.limits()).arg("--netns").arg(&network.0).env("SECRET", "1");
    command.args(["--resource-limit", "fsize=1048576", "--resource-limit", "no-file=200"]);
    command.args(["--keep-fd", &kept.to_string(), "--", "--api-sock", "/run/api.sock"]);
    let process = Process::spawn(command);
    let mut client = site.client("web");
    boot(&mut client, Path::new("/kernel"));

    let looked = Looked(process.child.id());
    looked.check_shut_in(1);
    assert_eq!(looked.status("Uid"), vec![UID.to_string(); 4]);
    assert_eq!(looked.status("Gid"), vec![GID.to_string(); 4]);
    assert!(looked.status("Groups").is_empty());
    assert_eq!(looked.namespace("net"), std::fs::read_link(&network.0).unwrap());
    let opened = looked.descriptors();
    assert!(opened.contains(&(kept, "kept".to_owned())), "{opened:?}");
    assert!(!opened.iter().any(|(_, name)| name == "other"), "{opened:?}");
    assert_eq!(
        (looked.limit("Max file size"), looked.limit("Max open files")),
        ("1048576".into(), "200".into())
    );
    let path = format!("/{}/web", site.parent);
    for (root, file, value) in &site.groups {
        let group = root.join(&site.parent).join("web");
        assert_eq!(std::fs::read_to_string(group.join(file)).unwrap().trim(), *value, "{file}");
        let processes = std::fs::read_to_string(group.join("cgroup.procs")).unwrap();
        // KVM of some kernels has a thread of the kernel in the group, too, which is no program.
        let is_program = |id: &&str| std::fs::read_link(format!("/proc/{id}/exe")).is_ok();
        let programs: Vec<_> = processes.lines().filter(is_program).collect();
        assert_eq!(programs, [looked.0.to_string()], "{file}: {processes}");
    }
    assert!(looked.read("cgroup").contains(&path), "{}", looked.read("cgroup"));

    // The program is the one outside, under two names: no byte of it is there twice.
    let own = std::fs::metadata(&site.program).unwrap();
    for path in [site.root("web").join("alula"), format!("/proc/{}/exe", looked.0).into()] {
        let found = std::fs::metadata(path).unwrap();
        assert_eq!((found.dev(), found.ino()), (own.dev(), own.ino()));
    }
    let devices = site.root("web").join("dev");
    for name in ["kvm", "net/tun", "urandom"] {
        let node = std::fs::metadata(devices.join(name)).unwrap();
        assert!(
            node.file_type().is_char_device() && node.uid() == UID && node.mode() & 0o777 == 0o600,
            "{name}"
        );
    }
    // The process has opened this one before it became the user.
    assert!(!devices.join("userfaultfd").exists());
    let has_device = opened.iter().any(|(_, name)| name == "userfaultfd");
    assert_eq!(has_device, Path::new("/dev/userfaultfd").exists(), "{opened:?}");
    let listed = assert_listed(0, process.child.id(), "web", "Running");
    // The monitor itself has no /proc that would tell it.
    assert!(listed["memory_bytes"].as_u64() > Some(0) && listed["cpu_us"].as_u64() > Some(0), "{listed}");
    let metrics = client.ok("GET", "/metrics", "").json();
    let started = metrics["api_server"]["process_startup_time_us"].as_u64().unwrap();
    let cpu = metrics["api_server"]["process_startup_time_cpu_us"].as_u64().unwrap();
    assert!(started > 0 && cpu > 0 && started < 100_000_000, "{started} {cpu}");
    break_in(process);
}

/// Asserts that each thread of a guest in a jail has walls, and that they end a process whose thread was broken into.
fn break_in(process: Process) {
    let id = process.child.id();
    assert_walled(id, &["alula", "signals", "vcpu0"]);
    let mut thread = Injected::new(id, "vcpu0");
    thread.is_refused = true;
    for call in ["openat", "connect", "execve"] {
        assert_eq!(trespass(&mut thread, call), Outcome::Signal(libc::SIGSYS), "{call}");
    }
    thread.end(libc::SIGSYS);
    let ended = process.end();
    assert!(ended.code == Some(148) && ended.text.contains("the thread `vcpu0` made"), "{ended:?}");
}

/// Asserts that `alula ctl list` of this user has the guest of a process, whose socket is found from out here.
fn assert_listed(user: u32, process: u32, id: &str, state: &str) -> serde_json::Value {
    // Where the project was built, a user may not look.
    let folder = common::Folder::new();
    let mut command = Command::new(common::for_everybody(&folder));
    command.args(["ctl", "list", "--json"]).uid(user);
    let ended = end(command);
    let guests: Vec<serde_json::Value> = serde_json::from_str(&ended.text).unwrap();
    let guest = guests.iter().find(|guest| guest["pid"] == process);
    let guest = guest.unwrap_or_else(|| panic!("{process}: {}", ended.text));
    assert_eq!((&guest["id"], &guest["state"]), (&id.into(), &state.into()), "{guest}");
    let mut client = Client::connect(Path::new(guest["socket"].as_str().unwrap()));
    assert_eq!(client.ok("GET", "/", "").json()["id"], id);
    // Its name alone does not lead there, and who tries is told what does.
    let mut command = Command::new(common::for_everybody(&folder));
    command.args(["ctl", id, "status"]).env("XDG_RUNTIME_DIR", &folder.0).uid(user);
    let ended = end(command);
    assert!(ended.code == Some(1) && ended.text.contains("reach it by `--api-sock /"), "{}", ended.text);
    guest.clone()
}

#[test]
fn a_jail_in_the_background_tells_its_number() {
    let site = Site::new();
    for (id, options, has_namespace) in [
        ("both", &["--daemonize", "--new-pid-ns"][..], true),
        ("background", &["--daemonize"], false),
        ("first", &["--new-pid-ns"], true),
    ] {
        let mut command = site.jail(id);
        command.args(site.limits()).args(options).args(["--", "--api-sock", "/run/api.sock"]);
        // The tests' own session may be of another PID namespace, and has no number here then: the jail starts in
        // a session of its own.
        let mut session = Command::new("setsid");
        session.arg(command.get_program()).args(command.get_args());
        let mut process = Process::spawn(session);
        let starter = process.child.id().to_string();
        // A program in the foreground keeps the output of who started it.
        wait_for(|| !process.is_running());
        let code = process.child.wait().unwrap().code();
        assert_eq!(code, Some(0), "{id}: {}", process.drain());
        let pid = std::fs::read_to_string(site.root(id).join("alula.pid")).unwrap();
        let looked = Looked(pid.parse().unwrap());
        let mut client = site.client(id);
        assert_eq!(client.ok("GET", "/", "").json()["id"], id);
        assert_listed(0, looked.0, id, "Not started");
        looked.check_shut_in(1);
        let numbers = looked.status("NSpid");
        assert_eq!(numbers.last().unwrap() == "1", has_namespace, "{numbers:?}");
        let session = looked.read("stat").rsplit(") ").next().unwrap().split(' ').nth(3).unwrap().to_owned();
        let is_daemon = options.contains(&"--daemonize");
        assert_eq!(session != starter, is_daemon, "{id}: session {session}");
        let output = std::fs::read_link(format!("/proc/{pid}/fd/1")).unwrap();
        assert_eq!(output.ends_with("null"), is_daemon, "{output:?}");
        network::kill(looked.0);
        wait_for(|| common::ended::is_over(looked.0));
    }
}

/// `alula jail --userns` as a user without rights.
fn as_nobody(program: &Path, site: &Site, id: &str) -> Command {
    let mut command = Command::new(program);
    command.args(["jail", "--id", id, "--userns", "--chroot-base-dir"]).arg(site.base());
    command.uid(NOBODY).gid(NOBODY);
    command
}

#[test]
fn an_ordinary_user_makes_a_jail() {
    let site = Site::new();
    common::open_devices();
    let program = common::for_everybody(&site.folder);
    let mut command = as_nobody(&program, &site, "own");
    command.args(["--uid", "77", "--gid", "78", "--", "--api-sock", "/run/api.sock"]);
    let process = Process::spawn(command);
    let mut client = site.client("own");
    std::fs::write(site.root("own").join("kernel"), alula::firmware::IMAGE).unwrap();
    boot(&mut client, Path::new("/kernel"));
    assert_listed(NOBODY, process.child.id(), "own", "Running");
    let looked = Looked(process.child.id());
    // The mounts are the root, and each of the host's devices.
    let devices = ["kvm", "net/tun", "urandom"];
    let mounted = devices.iter().filter(|name| Path::new("/dev").join(name).exists());
    looked.check_shut_in(1 + mounted.count());
    assert_eq!(looked.read("uid_map").split_whitespace().collect::<Vec<_>>(), ["77", "65534", "1"]);
    assert_eq!(looked.read("gid_map").split_whitespace().collect::<Vec<_>>(), ["78", "65534", "1"]);
    assert_eq!(looked.status("Uid")[0], NOBODY.to_string());
    // This user may not make a second name of the program: the jail has a copy, and the text is shared all the same.
    let [copy, own] =
        [&site.root("own").join("alula"), &program].map(|path| std::fs::metadata(path).unwrap());
    assert_eq!((copy.len(), copy.nlink()), (own.len(), 1));
    assert_eq!(std::fs::metadata(format!("/proc/{}/exe", looked.0)).unwrap().ino(), own.ino());
    drop(process);

    let before = site.everything();
    for (options, expected) in [
        (&["--uid", "0"][..], "--uid 0: with --userns, the program would have all rights"),
        (&["--netns", "/proc/1/ns/net"], "--netns /proc/1/ns/net: "),
        (&["--resource-limit", "no-file=999999999"], "--resource-limit no-file=999999999: set it: "),
        (&["--exec-file", "SCRIPT"], "it needs a loader or an interpreter"),
        (&["--chroot-base-dir", "/proc/jails"], "--chroot-base-dir: make `/proc/jails`: "),
    ] {
        let script = site.folder.path("script");
        if options.contains(&"SCRIPT") {
            std::fs::write(&script, "#!/bin/sh\n").unwrap();
            std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
        }
        let mut command = match options[0] {
            "--chroot-base-dir" => {
                let mut command = Command::new(&program);
                command.args(["jail", "--id", "x", "--userns"]).uid(NOBODY).gid(NOBODY);
                command
            }
            _ => as_nobody(&program, &site, "x"),
        };
        command
            .args(options.iter().map(|word| if *word == "SCRIPT" { script.to_str().unwrap() } else { word }));
        let ended = end(command);
        let _ = std::fs::remove_file(&script);
        assert!(ended.code == Some(1) && ended.text.contains(expected), "{options:?}: {ended:?}");
        // Nothing is left, not even an empty folder of jails by the script's name.
        assert_eq!(site.everything(), before, "{options:?}");
    }
    let mut command = Command::new(&program);
    command.args(["jail", "--id", "x", "--uid", "1", "--gid", "1"]).uid(NOBODY).gid(NOBODY);
    let ended = end(command);
    assert!(ended.code == Some(1) && ended.text.contains("give --userns, or call this as root"), "{ended:?}");
}

#[test]
fn a_jail_that_uses_up_its_memory_ends_alone() {
    const LIMIT: u64 = 48 << 20;
    let site = Site::new();
    let (_, file, _) = &site.groups[1];
    let start = |id: &str| {
        site.put_kernel(id);
        let mut command = site.jail(id);
        command.args(["--cgroup-version", site.version, "--parent-cgroup", &site.parent, "--cgroup"]);
        command.arg(format!("{file}={LIMIT}")).args(["--", "--api-sock", "/run/api.sock"]);
        let process = Process::spawn(command);
        let mut client = site.client(id);
        client.ok("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 128}"#);
        (process, client)
    };
    let run = |client: &mut Client, words: &str| {
        let boot = serde_json::json!({ "kernel_image_path": "/kernel", "boot_args": words });
        client.ok("PUT", "/boot-source", &boot.to_string());
        client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    };
    let (mut modest, mut other) = start("modest");
    run(&mut other, "work=8");
    modest.expect("working");
    let (mut greedy, mut client) = start("greedy");
    run(&mut client, "work=100");
    // The kernel kills the process: it has no memory for last words.
    wait_for(|| !greedy.is_running());
    let status = greedy.child.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL), "{status:?}");
    assert_eq!(other.ok("GET", "/", "").json()["state"], "Running");
    assert!(modest.is_running());
}

#[test]
fn a_limit_of_processes_that_kvm_needs_ends_the_guest_with_words() {
    let site = Site::new();
    // The threads of the process alone: some kernels have KVM start one more, when the guest first runs. Now and then, one
    // of the process's own threads that has just ended still counts when the next one starts: then this is tried again.
    // Other kernels have it start that with the machine, before the process's own: then there is room for it.
    let run = |attempt: usize| {
        let limit = format!("pids.max={}", 3 + attempt / 20);
        let mut command = site.jail(&format!("few{attempt}"));
        command.args(site.limits());
        command.args(["--cgroup", &limit, "--", "run", "--cmdline", "case=serial end=0"]);
        Process::spawn(command).end()
    };
    let has_its_threads = |ended: &Ended| !ended.text.contains("alula: start the thread ");
    let ended = (0..40).map(run).find(has_its_threads).unwrap();
    let is_told = ended.code == Some(123) && ended.text.contains("raise the limit of processes (`pids.max`");
    assert!(is_told || ended.code == Some(0), "{ended:?}");
}

#[test]
fn a_jail_on_another_file_system_has_a_copy() {
    let site = Site::new();
    std::fs::create_dir(site.base()).unwrap();
    common::mount(&site.base(), "tmpfs", "size=128m,mode=755");
    let mut command = site.jail("far");
    command.args(["--", "--api-sock", "/run/api.sock"]);
    let process = Process::spawn(command);
    site.client("far").ok("GET", "/", "");
    let own = std::fs::metadata(&site.program).unwrap();
    let copy = std::fs::metadata(site.root("far").join("alula")).unwrap();
    assert!(copy.dev() != own.dev() && copy.len() == own.len() && copy.mode() & 0o111 != 0);
    // The program that runs is the one outside, not its copy in the jail.
    let runs = std::fs::metadata(format!("/proc/{}/exe", process.child.id())).unwrap();
    assert_eq!((runs.dev(), runs.ino()), (own.dev(), own.ino()));
    drop(process);

    common::mount(&site.base(), "tmpfs", "size=128m,mode=755,nodev");
    let ended = end(site.jail("far"));
    let expected = "its file system is mounted without devices (`nodev`)";
    assert!(ended.code == Some(1) && ended.text.contains(expected), "{ended:?}");
    assert_eq!(std::fs::read_dir(site.base()).unwrap().count(), 0);
}

#[test]
fn a_program_that_its_user_can_write_is_copied() {
    let site = Site::new();
    let program = common::for_everybody(&site.folder);
    std::os::unix::fs::chown(&program, Some(UID), None).unwrap();
    let mut command = site.jail("own");
    command.arg("--exec-file").arg(&program).args(["--", "serve", "--nonesuch"]);
    end(command);
    let [copy, own] =
        [&site.root("own").join("alula"), &program].map(|path| std::fs::metadata(path).unwrap());
    assert!(copy.ino() != own.ino() && own.nlink() == 1 && copy.len() == own.len());
}

/// A block of docs/jail.md, pasted into a shell by this user, whose home is the test's folder.
fn pasted(site: &Site, number: usize, uid: u32) -> Command {
    let block = include_str!("../../docs/jail.md").split("```sh\n").nth(number).unwrap();
    let script = block.split("```").next().unwrap();
    let mut command = Command::new("sh");
    command.args(["-ec", script]).uid(uid).gid(uid).env("HOME", &site.folder.0);
    command.env("PATH", format!("{}:{}", site.folder.0.display(), std::env::var("PATH").unwrap()));
    command
}

#[test]
fn the_examples_of_the_page_do_as_they_say() {
    let site = Site::new();
    common::open_devices();
    common::for_everybody(&site.folder);
    // The first example writes to /srv.
    std::fs::create_dir_all("/srv").unwrap();
    common::mount(Path::new("/srv"), "tmpfs", "size=128m");
    let ended = end(pasted(&site, 1, 0));
    assert!(ended.code == Some(0) && ended.text.contains("web: Not started"), "{ended:?}");
    assert_eq!(std::fs::read_dir("/srv/jailer/alula").unwrap().count(), 0);
    let ended = end(pasted(&site, 2, NOBODY));
    assert!(ended.code == Some(0) && ended.text.contains("8 cases, 0 failed"), "{ended:?}");
    assert_eq!(std::fs::read_dir(site.folder.path("jails/alula")).unwrap().count(), 0);
    // The control group of the first example is gone; others may use its parent.
    let group = site.groups[0].0.join("alula/web");
    assert!(!group.exists(), "{ended:?}");
    let _ = std::fs::remove_dir(group.parent().unwrap());
}

/// Starts a guest, whose root or folder has its kernel and its socket.
fn start_guest(site: &Site, id: &str, is_jailed: bool) -> Process {
    site.put_kernel(id);
    let root = site.root(id);
    let kernel = if is_jailed { "/kernel".into() } else { root.join("kernel") };
    let command = if is_jailed {
        let mut command = site.jail(id);
        command.args(["--", "--api-sock", "/run/api.sock"]);
        command
    } else {
        std::fs::create_dir(root.join("run")).unwrap();
        let mut command = Command::new(&site.program);
        command.args(["serve", "--api-sock"]).arg(root.join("run/api.sock"));
        command
    };
    let process = Process::spawn(command);
    boot(&mut site.client(id), &kernel);
    process
}

#[test]
fn guests_in_jails_share_one_program() {
    let site = Site::new();
    let count = number_of_guests();
    let mut programs = BTreeSet::new();
    let private = [false, true].map(|is_jailed| {
        let ids = (0..count).map(|number| format!("{is_jailed}-{number}"));
        let guests: Vec<_> = ids.map(|id| start_guest(&site, &id, is_jailed)).collect();
        let looked = guests.iter().map(|guest| Looked(guest.child.id()));
        let all =
            looked.inspect(|looked| programs.extend(looked.programs())).map(|looked| looked.private_memory());
        all.sum::<u64>() / count as u64
    });
    assert_eq!(programs.len(), 1, "{programs:?}");
    let [unjailed, jailed] = private;
    assert!(jailed <= unjailed + MEMORY_MAX_KIB, "{unjailed} KiB, in a jail {jailed} KiB");
}
