//! The walls: what each thread has, what becomes of one that does what it may not, and what a host may lack.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::Command;

use alula::host::listener::Listener;
use alula::microvm::signals::Signals;
use alula::poll::leave_signals_to_others;
use alula::walls::{Kind, Wanted, begin, enclose, refusal};
use common::inject::{Injected, Outcome};
use common::walls::{assert_walled, trespass, walls};
use common::{Client, Folder, Process, Service, forbid, network, run, wait_for};
use serde_json::{Value, json};

const START: &str = r#"{"action_type": "InstanceStart"}"#;

/// A guest that does nothing, with an io thread.
fn idle(arguments: &[&str]) -> Process {
    let words = ["run", "--entropy", "--cmdline", "end=idle"];
    let mut process = Process::start([&words[..], arguments].concat());
    process.expect(", 0 failed");
    process
}

/// The number that the kernel has for a call here.
fn number(call: &str) -> &'static str {
    let table = include_str!("../resources/seccomp/calls").lines();
    let mut words = table.map(|line| line.split_whitespace().collect::<Vec<_>>());
    let column = if cfg!(target_arch = "x86_64") { 1 } else { 2 };
    words.find(|words| words.first() == Some(&call)).unwrap()[column]
}

fn last_event(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap();
    serde_json::from_str(text.lines().last().unwrap_or_else(|| panic!("no event"))).unwrap()
}

#[test]
fn every_thread_of_a_guest_that_runs_has_a_filter() {
    let folder = Folder::new();
    let disk =
        format!("{},engine=async,threads=2,queues=2", folder.write("disk", vec![0; 1 << 20]).display());
    let vsock = folder.path("vsock").display().to_string();
    let mut process = Process::start(
        ["run", "--cpus", "2", "--cmdline", "end=idle", "--entropy", "--disk", &disk, "--vsock", &vsock]
            .iter(),
    );
    process.expect(", 0 failed");
    let id = process.child.id();
    assert_walled(id, &["alula", "io", "io-0", "io-1", "signals", "vcpu0", "vcpu1"]);
}

#[test]
fn a_service_has_filters_before_its_first_guest_and_after() {
    for (extra, before) in
        [(&[][..], &["alula"][..]), (&["--warm", "cpus=1,memory=128M"], &["alula", "io", "vcpu0"])]
    {
        let service = Service::start(extra);
        let id = service.process.child.id();
        assert_walled(id, before);
        service.boot_source("end=idle");
        let mut client = service.client();
        client.ok("PUT", "/entropy", "{}");
        client.ok("PUT", "/actions", START);
        assert_walled(id, &["alula", "io", "signals", "vcpu0"]);
    }
}

#[test]
fn a_thread_that_does_what_it_may_not_ends_the_process() {
    let folder = Folder::new();
    for (name, call) in [
        ("vcpu0", "openat"),
        ("vcpu0", "socket"),
        ("vcpu0", "execve"),
        ("io", "openat"),
        ("io", "socket"),
        ("io", "execve"),
        ("signals", "execve"),
        ("main", "socket"),
        ("main", "execve"),
        ("vcpu0", "tgkill"),
        ("io", "tgkill"),
        ("main", "tgkill"),
        ("main", "kill"),
        ("io", "ioctl"),
    ] {
        let (events, log, socket) = (folder.path("events"), folder.path("log"), folder.path("socket"));
        let [e, l, s] = [&events, &log, &socket].map(|path| path.to_str().unwrap());
        let process = idle(&["--events", e, "--log-path", l, "--api-sock", s]);
        let mut thread = Injected::new(process.child.id(), name);
        thread.is_refused = true;
        assert_eq!(trespass(&mut thread, call), Outcome::Signal(libc::SIGSYS), "{name}: {call}");
        thread.end(libc::SIGSYS);
        let ended = process.end();
        assert_eq!(ended.code, Some(148), "{name}: {call}: {ended:?}");
        let words = format!("the thread `{name}` made the system call `{call}` ({})", number(call));
        let event = last_event(&events);
        let meaning = match call {
            "ioctl" => "command 0x5412, which",
            "socket" => "family 0x2, which",
            "tgkill" => "signal 0x6, which",
            _ => ", which its filter does not allow",
        };
        assert!(ended.text.contains(meaning), "{name}: {call}: {ended:?}");
        let told = [ended.text, std::fs::read_to_string(&log).unwrap(), event["reason"].to_string()];
        assert!(told.iter().all(|text| text.contains(&words)), "{name}: {call}: {told:?}");
        assert_eq!((&event["event"], &event["exit_code"]), (&"ended".into(), &148.into()), "{name}");
        assert!(!socket.exists(), "{name}: {call}");
        for path in [events, log] {
            std::fs::remove_file(path).unwrap();
        }
    }
}

/// Until its guest runs, `main` may start programs: of what it may not, the thread `main` alone is asked.
#[test]
fn main_is_refused_calls_before_its_guest_runs() {
    let folder = Folder::new();
    let events = folder.path("events");
    for call in ["ptrace", "bpf"] {
        let service = Service::start(&["--events", events.to_str().unwrap()]);
        let id = service.process.child.id();
        assert_walled(id, &["alula"]);
        let mut thread = Injected::new(id, "main");
        thread.is_refused = true;
        assert_eq!(trespass(&mut thread, call), Outcome::Signal(libc::SIGSYS), "{call}");
        thread.end(libc::SIGSYS);
        let Service { process, socket, folder: _folder } = service;
        let ended = process.end();
        let words = format!("the thread `main` made the system call `{call}` ({}), which", number(call));
        assert!(ended.code == Some(148) && ended.text.contains(&words), "{ended:?}");
        assert!(last_event(&events)["reason"].to_string().contains(&words) && !socket.exists(), "{call}");
        std::fs::remove_file(&events).unwrap();
    }
}

/// A job that waits for an agent which never answers, in a guest whose vsock socket is somebody else's.
#[test]
fn a_job_that_does_what_it_may_not_ends_the_process() {
    for call in ["openat", "socket", "execve"] {
        let folder = Folder::new();
        let [events, socket, vsock] = ["events", "socket", "vsock"].map(|name| folder.path(name));
        let [e, s, v] = [&events, &socket, &vsock].map(|path| path.to_str().unwrap());
        let process = idle(&["--events", e, "--api-sock", s, "--vsock", v]);
        std::fs::remove_file(&vsock).unwrap();
        let silent = std::os::unix::net::UnixListener::bind(&vsock).unwrap();
        let mut client = Client::connect(&socket);
        client.send("GET /guest HTTP/1.1\r\n\r\n");
        let _asked = silent.accept().unwrap();
        let id = process.child.id();
        wait_for(|| walls(id).iter().any(|(name, seccomp, _)| name == "guest" && seccomp == "2"));
        let mut thread = Injected::new(id, "guest");
        thread.is_refused = true;
        assert_eq!(trespass(&mut thread, call), Outcome::Signal(libc::SIGSYS), "{call}");
        thread.end(libc::SIGSYS);
        let ended = process.end();
        let words = format!("the thread `guest` made the system call `{call}` ({})", number(call));
        assert!(ended.code == Some(148) && ended.text.contains(&words), "{ended:?}");
        assert!(last_event(&events)["reason"].to_string().contains(&words), "{call}");
    }
}

#[test]
fn an_ordinary_user_has_walls_around_a_disk_and_a_user_network() {
    common::open_devices();
    network::enter();
    network::add_uplink();
    let folder = Folder::new();
    let disk = folder.write("disk", vec![0; 1 << 20]);
    std::os::unix::fs::chown(&disk, Some(65534), Some(65534)).unwrap();
    let disk = format!("{}", disk.display());
    let words = ["run", "--disk", &disk, "--net", "user", "--cmdline", "case=block end=idle"];
    let mut process = Process::spawn(common::as_nobody(&folder, &words));
    process.expect(", 0 failed");
    let id = process.child.id();
    assert_walled(id, &["alula", "io", "signals", "vcpu0"]);
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    assert!(status.contains("Uid:\t65534\t65534\t65534\t65534\n"), "{status}");
    // The program that carries its frames has the filter that `main` had when it was started, and no more rights.
    wait_for(|| network::passts(id).len() == 1);
    let passt = std::fs::read_to_string(format!("/proc/{}/status", network::passts(id)[0])).unwrap();
    assert!(passt.contains("NoNewPrivs:\t1\n"), "{passt}");
}

/// `main` can hang on a thread that is refused a call, or on a lock of that thread: another one ends the process then.
#[test]
fn a_thread_that_is_refused_ends_a_process_whose_main_is_held_up() {
    let process = idle(&[]);
    let main = Injected::new(process.child.id(), "main");
    let mut thread = Injected::new(process.child.id(), "io");
    thread.is_refused = true;
    assert_eq!(trespass(&mut thread, "openat"), Outcome::Signal(libc::SIGSYS));
    thread.end(libc::SIGSYS);
    let ended = process.end();
    assert_eq!(ended.code, Some(148), "{ended:?}");
    // The thread `main` has ended with its process: nothing is left to be let go.
    std::mem::forget(main);
}

#[test]
fn a_guest_that_is_loaded_and_stands_still_has_its_walls() {
    let folder = Folder::new();
    let [state, memory] = ["state", "memory"].map(|name| folder.path(name).display().to_string());
    let service = Service::start(&[]);
    service.boot_source("end=idle");
    let mut client = service.client();
    client.ok("PUT", "/entropy", "{}");
    client.ok("PUT", "/actions", START);
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    let create = json!({ "snapshot_path": state, "mem_file_path": memory });
    client.ok("PUT", "/snapshot/create", &create.to_string());
    let clone = Service::start(&[]);
    let backend = json!({ "backend_type": "File", "backend_path": memory });
    let load = json!({ "snapshot_path": state, "mem_backend": backend });
    clone.client().ok("PUT", "/snapshot/load", &load.to_string());
    let id = clone.process.child.id();
    assert_walled(id, &["alula", "io", "signals", "vcpu0"]);
    for name in ["io", "signals", "vcpu0"] {
        let mut thread = Injected::new(id, name);
        thread.is_refused = true;
        assert_eq!(trespass(&mut thread, "socket"), Outcome::Signal(libc::SIGSYS), "{name}");
    }
}

#[test]
fn without_filters_rules_keep_threads_from_files_and_ports() {
    let refused = Outcome::Returned(-i64::from(libc::EACCES));
    let process = idle(&["--no-seccomp"]);
    for (name, call, is_refused) in [
        ("vcpu0", "openat", true),
        ("vcpu0", "execve", true),
        ("io", "openat", true),
        ("io", "execve", true),
        ("main", "execve", true),
        ("main", "mknodat", true),
        ("main", "openat", false),
    ] {
        let outcome = trespass(&mut Injected::new(process.child.id(), name), call);
        assert_eq!(outcome == refused, is_refused, "{name}: {call}: {outcome:?}");
    }
    // Who has rules laid upon him mounts nothing (landlock(7)).
    let outcome = trespass(&mut Injected::new(process.child.id(), "main"), "mount");
    assert_eq!(outcome, Outcome::Returned(-i64::from(libc::EPERM)));
    // Landlock restricts ports from version 4 on (Linux 6.7): before, the call finds that nobody listens there.
    let nobody = Outcome::Returned(-i64::from(libc::ECONNREFUSED));
    for name in ["vcpu0", "io", "main"] {
        let outcome = trespass(&mut Injected::new(process.child.id(), name), "connect");
        assert!(outcome == refused || outcome == nobody && landlock_version() < 4, "{name}: {outcome:?}");
    }
    let process = idle(&["--no-sandbox"]);
    for name in ["vcpu0", "io", "main"] {
        let outcome = trespass(&mut Injected::new(process.child.id(), name), "openat");
        assert!(matches!(outcome, Outcome::Returned(0..)), "{name}: {outcome:?}");
    }
}

fn landlock_version() -> u32 {
    alula::sys::confine::landlock_version().unwrap_or(0)
}

#[test]
fn what_would_be_refused_is_told_and_done_if_that_is_wanted() {
    let mut process = idle(&["--seccomp-log"]);
    let mut thread = Injected::new(process.child.id(), "io");
    thread.is_refused = true;
    assert_eq!(trespass(&mut thread, "socket"), Outcome::Signal(libc::SIGSYS));
    thread.end(libc::SIGSYS);
    process.expect("--seccomp-log: the thread `io` makes the system call `socket`");
    assert!(process.is_running());
}

/// The variable of a process that has walls laid upon a thread of its own: what the thread does then.
const DOES: &str = "ALULA_TEST_DOES";

/// Has another process of this test enclose a thread that does `what`: returns its exit status, and what it said.
fn apart(test: &str, what: &str) -> (std::process::ExitStatus, String) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(DOES, what)
        .output()
        .unwrap();
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Lays walls upon a thread, which does `work` then.
fn enclosed(kind: Kind, work: impl FnOnce() + Send + 'static) -> ! {
    let signals = Signals::take_over();
    begin(&Wanted::default(), None).unwrap();
    std::thread::Builder::new()
        .name("walled".to_owned())
        .spawn(move || {
            leave_signals_to_others();
            enclose(kind);
            work();
        })
        .unwrap();
    signals.share().unwrap();
    // The thread ends the process, or this one does when a call is refused: nobody runs the main loop.
    wait_for(refusal::is_noted);
    eprintln!("{}", refusal::words());
    std::process::exit(7);
}

#[test]
fn a_thread_for_a_job_neither_connects_nor_executes() {
    const NAME: &str = "a_thread_for_a_job_neither_connects_nor_executes";
    if let Some(what) = std::env::var_os(DOES) {
        enclosed(Kind::Job, move || {
            let connect = || drop(std::net::TcpStream::connect("127.0.0.1:1"));
            let execute = || drop(CommandExt::exec(&mut Command::new("/bin/true")));
            if what == "socket" { connect() } else { execute() }
        });
    }
    for call in ["socket", "execve"] {
        let (status, text) = apart(NAME, call);
        assert_eq!(status.code(), Some(7), "{call}: {text}");
        assert!(text.contains(&format!("the thread `walled` made the system call `{call}`")), "{text}");
    }
}

#[test]
fn a_thread_that_panics_says_so_and_leaves_no_socket() {
    const NAME: &str = "a_thread_that_panics_says_so_and_leaves_no_socket";
    if let Some(folder) = std::env::var_os(DOES) {
        std::mem::forget(Listener::bind("socket", &Path::new(&folder).join("s")).unwrap());
        enclosed(Kind::Vcpu, move || {
            // The panic ends the process, as in the program itself, where a panic does not unwind.
            let _ = std::panic::catch_unwind(|| panic!("as it shall"));
            std::process::abort();
        });
    }
    let folder = Folder::new();
    let (status, text) = apart(NAME, folder.0.to_str().unwrap());
    assert_eq!(status.signal(), Some(libc::SIGABRT), "{status:?}: {text}");
    assert!(text.contains("as it shall") && text.contains("tests/walls.rs"), "{text}");
    assert!(!folder.path("s").exists());
}

#[test]
fn what_is_not_in_an_allowed_folder_is_not_opened() {
    let (allowed, other) = (Folder::new(), Folder::new());
    let (inside, outside) = (allowed.write("disk", [0; 4096]), other.write("disk", [0; 4096]));
    let allow = ["--allow", allowed.0.to_str().unwrap()];
    let ended = run(["run", allow[0], allow[1], "--disk", inside.to_str().unwrap()]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let ended = run(["run", allow[0], allow[1], "--disk", outside.to_str().unwrap()]);
    assert_eq!(ended.code, Some(125), "{ended:?}");
    assert!(ended.text.contains("or it is in no folder of --allow"), "{ended:?}");
    // A link that leads out of the folder is no way out.
    let link = allowed.path("link");
    std::os::unix::fs::symlink(&outside, &link).unwrap();
    assert_eq!(run(["run", allow[0], allow[1], "--disk", link.to_str().unwrap()]).code, Some(125));
    let ended = run(["run", allow[0], allow[1], "--net", "user"]);
    assert!(ended.text.contains("with --allow no program is started"), "{ended:?}");
    let ended = run(["run", "--allow", "/nonexistent"]);
    assert!(ended.text.contains("allow `/nonexistent` (--allow): "), "{ended:?}");

    let service = Service::start(&["--allow", allowed.0.to_str().unwrap()]);
    let disk =
        |path: &Path| json!({ "drive_id": "a", "path_on_host": path, "is_root_device": false }).to_string();
    let mut client = service.client();
    let fault = client.request("PUT", "/drives/a", &disk(&outside)).fault();
    assert!(fault.contains("in no folder of --allow"), "{fault}");
    client.ok("PUT", "/drives/a", &disk(&inside));
    let kernel = json!({ "kernel_image_path": allowed.firmware(), "boot_args": "end=idle" }).to_string();
    client.ok("PUT", "/boot-source", &kernel);
    client.ok("PUT", "/actions", START);
    let body = json!({ "drive_id": "a", "path_on_host": outside }).to_string();
    let fault = client.request("PATCH", "/drives/a", &body).fault();
    assert!(fault.contains("in no folder of --allow"), "{fault}");
    let socket = service.socket.clone();
    let mut process = service.process;
    process.send(libc::SIGTERM);
    process.end();
    assert!(!socket.exists());
}

#[test]
fn a_commands_own_folder_goes_with_it_however_it_ends() {
    let folder = Folder::new();
    let kernel = folder.firmware();
    let own = folder.path("run/alula");
    std::fs::create_dir_all(&own).unwrap();
    let folders = || std::fs::read_dir(&own).unwrap().count();
    for (allowed, is_refused, code) in [(None, false, 143), (Some(&kernel), false, 143), (None, true, 148)] {
        let mut command = Command::new(common::alula());
        command.env("XDG_RUNTIME_DIR", folder.path("run")).args(["run", "--cmdline", "end=idle"]);
        allowed.into_iter().for_each(|path| _ = command.arg("--allow").arg(path));
        command.arg(&kernel).args(["--", "true"]);
        let mut process = Process::spawn(command);
        let id = process.child.id();
        wait_for(|| walls(id).iter().filter(|thread| thread.0 == "vcpu0" && thread.1 == "2").count() == 1);
        wait_for(|| walls(id).iter().all(|thread| thread.1 == "2"));
        assert_eq!(folders(), 1);
        if is_refused {
            let mut thread = Injected::new(id, "io");
            thread.is_refused = true;
            assert_eq!(trespass(&mut thread, "openat"), Outcome::Signal(libc::SIGSYS));
            thread.end(libc::SIGSYS);
        } else {
            process.send(libc::SIGTERM);
        }
        let ended = process.end();
        assert_eq!(ended.code, Some(code), "{ended:?}");
        assert_eq!(folders(), 0, "{code}");
    }
}

#[test]
fn a_kernel_without_walls_is_told_of_and_used() {
    let cases: [(libc::c_long, i32, &str); 3] = [
        (
            libc::SYS_landlock_create_ruleset,
            libc::ENOSYS,
            "this kernel has no Landlock, or it is switched off",
        ),
        (libc::SYS_landlock_create_ruleset, libc::EOPNOTSUPP, "this kernel has no Landlock"),
        (libc::SYS_seccomp, libc::ENOSYS, "this kernel has no filters of system calls (seccomp)"),
    ];
    for (call, errno, words) in cases {
        let ended = std::thread::scope(|scope| {
            let lacking = scope.spawn(|| {
                forbid(call, errno);
                (run(["run"]), run(["run", "--allow", "/tmp"]))
            });
            lacking.join().unwrap()
        });
        assert_eq!(ended.0.code, Some(0), "{ended:?}");
        assert_eq!(ended.0.text.matches(words).count(), 1, "{ended:?}");
        let is_needed = call == libc::SYS_landlock_create_ruleset;
        assert_eq!(ended.1.text.contains("--allow needs Landlock"), is_needed, "{ended:?}");
    }
}

#[test]
fn options_that_leave_walls_out_are_in_the_log() {
    let folder = Folder::new();
    for (option, words) in [
        ("--no-seccomp", "--no-seccomp: system calls are not filtered"),
        ("--no-sandbox", "--no-sandbox: files and ports are not restricted"),
    ] {
        let log = folder.path("log");
        let ended = run(["run", option, "--log-path", log.to_str().unwrap()]);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert!(std::fs::read_to_string(&log).unwrap().contains(words), "{option}");
        std::fs::remove_file(log).unwrap();
    }
    let ended = run(["run", "--no-sandbox", "--allow", "/tmp"]);
    assert_eq!(ended.code, Some(153), "{ended:?}");
    let ended = run(["run", "--seccomp-filter", "/tmp/f"]);
    assert!(ended.code == Some(153) && ended.text.contains("is not implemented yet"), "{ended:?}");
}

/// KVM may refuse to run a CPU again and again, where it may start no thread. strace(1) plays it.
#[test]
#[cfg(target_arch = "x86_64")]
fn a_cpu_that_kvm_does_not_run_ends_its_guest_with_words() {
    let mut process = Process::start(["run", "--cmdline", "end=spin"]);
    process.expect(", 0 failed");
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.child.id())).unwrap();
    let cpu = tasks
        .map(|task| task.unwrap().path())
        .find(|task| std::fs::read_to_string(task.join("comm")).unwrap() == "vcpu0\n");
    let cpu = cpu.unwrap();
    // The first call tells the guest that its CPU stood still while strace came; a thousand that run it follow.
    let inject = "inject=ioctl:error=EAGAIN:when=1..1001";
    let mut strace = Command::new("strace");
    strace
        .args(["-qq", "-o", "/dev/null", "-e", "trace=ioctl", "-e", inject, "-p"])
        .arg(cpu.file_name().unwrap());
    let mut strace = strace.spawn().unwrap();
    let ended = process.end();
    assert_eq!(ended.code, Some(123), "{}", ended.text);
    assert!(ended.text.contains("raise the limit of processes (`pids.max`"), "{}", ended.text);
    strace.wait().unwrap();
}
