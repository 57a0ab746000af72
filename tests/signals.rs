//! Signals that end the process do so whatever its threads do, and leave nothing behind; those of job
//! control give the terminal to whom it belongs.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::fs::File;
use std::io::{PipeReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use alula::host::listener::Listener;
use alula::microvm::signals::Signals;
use common::terminal::Terminal;
use common::{Client, Folder, Process, alula, wait_for};

const TERM: i32 = libc::SIGTERM;

/// A process that is killed when the test ends.
struct Guarded(Child);

impl Guarded {
    fn id(&self) -> i32 {
        self.0.id() as i32
    }

    /// Waits for the end of the process, and returns its exit code.
    fn end(&mut self) -> Option<i32> {
        let mut status = None;
        wait_for(|| {
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap().code()
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[allow(unsafe_code)]
fn send(process: i32, signal: i32) {
    // SAFETY: the call takes numbers.
    unsafe { libc::kill(process, signal) };
}

/// A set of signals in /proc/PID/status, or in that of a thread of it: `SigBlk`, `ShdPnd`...
fn signals(process: &str, set: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(set)?.strip_prefix(":\t"));
    u64::from_str_radix(line.unwrap(), 16).unwrap()
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Writes to the pipe until there is room for nothing more.
fn fill(pipe: &impl AsRawFd) {
    // By a description of its own, so that the other one goes on waiting for room.
    let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
    let mut pipe = File::options().write(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap();
    for piece in [&[b'x'; 4096][..], b"x"] {
        while pipe.write(piece).is_ok() {}
    }
}

/// What comes up to and with `text`.
fn read_until(pipe: &mut impl Read, text: &str) -> String {
    let (mut seen, mut byte) = (Vec::new(), [0]);
    while !String::from_utf8_lossy(&seen).contains(text) {
        pipe.read_exact(&mut byte).unwrap();
        seen.push(byte[0]);
    }
    String::from_utf8(seen).unwrap()
}

/// Mounts a file system whose server never answers, not even who it is, at `place`, for this thread and what
/// it starts from now on. Whoever looks into it waits until the file returned is closed.
#[allow(unsafe_code)]
fn mount_silent(place: &std::path::Path) -> File {
    let needed = "FUSE is needed: the rights of root, and `modprobe fuse`";
    let server = File::options().read(true).write(true).open("/dev/fuse").expect(needed);
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
    let text = |text: &str| std::ffi::CString::new(text).unwrap();
    let (options, place) = (text(&options), text(place.to_str().unwrap()));
    let (root, kind, none) = (c"/".as_ptr(), c"fuse".as_ptr(), std::ptr::null::<libc::c_char>());
    // SAFETY: the calls take strings that end with a zero, and change this thread's mounts only.
    unsafe {
        assert_eq!(libc::unshare(libc::CLONE_NEWNS), 0, "a mount namespace");
        let private = libc::MS_REC | libc::MS_PRIVATE;
        assert_eq!(libc::mount(none, root, none, private, none.cast()), 0);
        let mounted = libc::mount(kind, place.as_ptr(), kind, 0, options.as_ptr().cast());
        assert_eq!(mounted, 0, "{needed}: {}", std::io::Error::last_os_error());
    }
    server
}

#[test]
fn a_file_system_that_does_not_answer_does_not_hold_signals_up() {
    const HELD_UP: &str = "alula: ended at once: the main thread was held up for 2 s\n";
    const SECOND: &str = "alula: ended at once by a second signal: what was not yet written out is lost\n";
    let folder = Folder::new();
    let (silent, socket, vsock) = (folder.path("silent"), folder.path("s"), folder.path("v"));
    std::fs::create_dir(&silent).unwrap();
    let _server = mount_silent(&silent);
    let disk = folder.write("disk", [0; 4096]);
    // In one of them, somebody else listens at the path when the end comes.
    let cases: [(&[i32], i32, &str, bool); 5] = [
        (&[TERM], 143, HELD_UP, false),
        (&[TERM, TERM], 143, SECOND, false),
        (&[TERM, libc::SIGHUP], 129, SECOND, false),
        (&[libc::SIGXCPU], 154, HELD_UP, false),
        (&[TERM, TERM], 143, SECOND, true),
    ];
    for (sent, code, words, is_replaced) in cases {
        let mut terminal = Terminal::new();
        let before = terminal.modes();
        let (mut errors, its_errors) = std::io::pipe().unwrap();
        let mut command = Command::new(alula());
        command.args(["run", "--cmdline", "case=serial end=idle", "--api-sock"]).arg(&socket);
        command.arg("--vsock").arg(&vsock);
        let process = terminal.with(command.arg("--disk").arg(&disk)).stderr(its_errors).spawn().unwrap();
        drop(command);
        let mut process = Guarded(process);
        terminal.read_until("0 failed");
        wait_for(|| terminal.is_raw());
        let body = serde_json::json!({ "drive_id": "disk0", "path_on_host": silent.join("disk") });
        let body = body.to_string();
        let head = format!("PATCH /drives/disk0 HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
        Client::connect(&socket).send(&(head + &body));
        // Only SIGKILL reaches it there: `D` (proc(5)).
        let pid = process.id();
        wait_for(|| common::ended::state(pid as u32) == Some('D'));
        // So others take signals, but for those that a disk can hold in the same way.
        for thread in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let path = thread.unwrap().path();
            let name = std::fs::read_to_string(path.join("comm")).unwrap();
            let thread = path.strip_prefix("/proc").unwrap().to_str().unwrap().to_owned();
            let takes = signals(&thread, "SigBlk") & bit(TERM) == 0;
            assert_eq!(takes, name == "signals\n", "{name}");
        }
        let other = is_replaced.then(|| {
            std::fs::remove_file(&socket).unwrap();
            UnixListener::bind(&socket).unwrap()
        });
        for signal in sent {
            send(pid, *signal);
            // One that waits would swallow another of its kind, and come in the order of their numbers.
            wait_for(|| {
                common::ended::state(pid as u32) != Some('D')
                    || signals(&pid.to_string(), "ShdPnd") & bit(*signal) == 0
            });
        }
        assert_eq!(process.end(), Some(code), "{sent:?}");
        let mut said = String::new();
        errors.read_to_string(&mut said).unwrap();
        assert_eq!(said, words, "{sent:?}");
        assert_eq!(terminal.modes(), before, "{sent:?}");
        assert_eq!((socket.exists(), vsock.exists()), (other.is_some(), false), "{sent:?}");
    }
}

#[test]
fn what_a_guest_has_flushed_is_there_however_alula_ends() {
    let folder = Folder::new();
    let (socket, events) = (folder.path("s"), folder.path("events"));
    let ends =
        [(TERM, Some(143)), (libc::SIGINT, Some(130)), (libc::SIGHUP, Some(129)), (libc::SIGKILL, None)];
    for (signal, code) in ends {
        for engine in ["sync", "async"] {
            let disk = folder.write("disk", vec![0; 1 << 20]);
            let disk_option = format!("{},engine={engine}", disk.display());
            let mut process = Process::start([
                "run",
                "--disk",
                &disk_option,
                "--api-sock",
                socket.to_str().unwrap(),
                "--events",
                events.to_str().unwrap(),
                "--cmdline",
                "case=block end=idle",
            ]);
            // The guest says so when its flush is answered.
            process.expect("1 cases, 0 failed");
            process.send(signal);
            let ended = process.end();
            assert_eq!(ended.code, code, "{engine}: {}", ended.text);
            let written = std::fs::read(&disk).unwrap();
            assert_eq!(&written[512..516], [0x5a, 0x5b, 0x58, 0x59], "{engine}, signal {signal}");
            let told = std::fs::read_to_string(&events).unwrap();
            let last: serde_json::Value = serde_json::from_str(told.lines().last().unwrap()).unwrap();
            // A process that is killed tells nothing, and leaves its socket to the next one.
            assert_eq!(socket.exists(), code.is_none(), "{engine}, signal {signal}");
            match code {
                Some(code) => {
                    assert_eq!((&last["event"], &last["exit_code"]), (&"ended".into(), &code.into()))
                }
                None => assert_eq!(last["event"], "started", "{told}"),
            }
            std::fs::remove_file(&events).unwrap();
        }
    }
}

/// A guest whose console nobody reads, its errors, and its API's socket.
fn unread(words: &str, folder: &Folder) -> (Guarded, PipeReader, PipeReader) {
    let ((output, console), (errors, its_errors)) = (std::io::pipe().unwrap(), std::io::pipe().unwrap());
    fill(&console);
    let mut command = Command::new(alula());
    command.args(["run", "--cmdline", words, "--api-sock"]).arg(folder.path("s"));
    command.stdin(Stdio::null()).stdout(console).stderr(its_errors);
    (Guarded(command.spawn().unwrap()), output, errors)
}

#[test]
fn an_end_that_has_much_to_write_says_so_and_can_be_cut_short() {
    let folder = Folder::new();
    let (mut process, _output, mut errors) = unread("case=serial end=idle", &folder);
    wait_for(|| folder.path("s").exists());
    let mut client = Client::connect(&folder.path("s"));
    wait_for(|| client.request("GET", "/metrics", "").json()["uart"]["write_count"].as_u64() > Some(0));
    send(process.id(), TERM);
    let said = read_until(&mut errors, "another signal ends alula at once, without the rest\n");
    assert!(said.starts_with("alula: the end takes longer: what the guest wrote is still"), "{said}");
    assert!(!folder.path("s").exists());
    assert!(process.0.try_wait().unwrap().is_none());
    send(process.id(), libc::SIGHUP);
    assert_eq!(process.end(), Some(129));
    let said = read_until(&mut errors, "\n");
    assert!(said.starts_with("alula: ended at once by a second signal"), "{said}");
}

#[test]
fn an_end_that_has_much_to_write_is_cut_short_by_a_first_signal() {
    let folder = Folder::new();
    let (mut process, _output, _errors) = unread("case=serial end=5", &folder);
    // The guest has ended when it is gone.
    wait_for(|| folder.path("s").exists());
    wait_for(|| !folder.path("s").exists());
    send(process.id(), TERM);
    assert_eq!(process.end(), Some(143));
}

#[test]
fn an_end_that_is_only_slow_comes_to_its_end() {
    let folder = Folder::new();
    let (mut process, mut output, mut errors) = unread("case=serial end=idle", &folder);
    wait_for(|| folder.path("s").exists());
    let mut client = Client::connect(&folder.path("s"));
    wait_for(|| client.request("GET", "/metrics", "").json()["uart"]["write_count"].as_u64() > Some(0));
    send(process.id(), TERM);
    read_until(&mut errors, "without the rest\n");
    // The reader reads on after all.
    let mut text = Vec::new();
    output.read_to_end(&mut text).unwrap();
    assert_eq!(process.end(), Some(143));
    let written = text.iter().position(|byte| *byte != b'x').unwrap();
    assert!(b"alula firmware".starts_with(&text[written..]), "{:?}", &text[written..]);
    assert_eq!(read_until(&mut errors, "\n"), "alula: ended by signal 15\n");
}

#[test]
fn a_signal_that_was_ignored_at_the_start_stays_ignored() {
    let mut command = Command::new("sh");
    let script = r#"trap "" HUP INT QUIT; exec "$0" run --cmdline "case=serial end=idle""#;
    command.args(["-c", script]).arg(alula());
    let mut process = Process::spawn(command);
    process.expect("0 failed");
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
        process.send(signal);
    }
    process.send(TERM);
    let ended = process.end();
    assert_eq!(ended.code, Some(128 + TERM), "{}", ended.text);
}

#[test]
fn signals_that_were_blocked_at_the_start_come_in() {
    let folder = Folder::new();
    let socket = folder.path("s");
    let mut command = Command::new(alula());
    command.args(["run", "--cmdline", "case=serial end=spin", "--api-sock"]).arg(&socket);
    // SAFETY: between fork and exec the closure makes system calls alone, with a set of its own.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(|| {
            let mut all = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::sigprocmask(libc::SIG_BLOCK, &all, std::ptr::null_mut());
            Ok(())
        });
    }
    let mut process = Process::spawn(command);
    process.expect("0 failed");
    // A pause takes a signal to the vCPU's thread.
    Client::connect(&socket).ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    process.send(TERM);
    let ended = process.end();
    assert_eq!(ended.code, Some(128 + TERM), "{}", ended.text);
    assert!(ended.text.ends_with("alula: ended by signal 15\n"), "{}", ended.text);
}

#[test]
fn a_program_that_is_started_has_signals_as_usual() {
    let folder = Folder::new();
    let status = folder.path("status");
    let passt =
        folder.write("passt", format!("#!/bin/sh\nexec cat /proc/self/status >{}\n", status.display()));
    std::fs::set_permissions(&passt, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = Command::new(alula());
    command.args(["run", "--net", "user", "--cmdline", "case=serial end=idle"]);
    let path = std::env::var("PATH").unwrap();
    command.env("PATH", format!("{}:{path}", folder.path("").display()));
    let mut process = Process::spawn(command);
    process.expect("0 failed");
    wait_for(|| std::fs::read_to_string(&status).is_ok_and(|text| text.contains("SigCgt:")));
    let text = std::fs::read_to_string(&status).unwrap();
    let set = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(line, 16).unwrap()
    };
    assert_eq!(set("SigBlk:\t"), 0, "{text}");
    for signal in [TERM, libc::SIGHUP, libc::SIGXCPU, libc::SIGALRM, libc::SIGPIPE] {
        assert_eq!(set("SigIgn:\t") & bit(signal), 0, "signal {signal}: {text}");
    }
    process.send(TERM);
    assert_eq!(process.end().code, Some(128 + TERM));
}

/// Set in the process that is to panic: the folder that its socket is in.
const PANICS_IN: &str = "ALULA_TEST_PANICS_IN";

#[test]
fn a_panic_leaves_no_socket_behind() {
    const NAME: &str = "a_panic_leaves_no_socket_behind";
    if let Some(folder) = std::env::var_os(PANICS_IN) {
        let path = std::path::Path::new(&folder).join("s");
        let _signals = Signals::take_over();
        let _listener = Listener::bind("socket", &path).unwrap();
        assert!(path.exists());
        // Nothing of this thread is cleared up before the hook has run, and all of it is left.
        let _ = std::panic::catch_unwind(|| panic!("as it shall"));
        std::process::exit(i32::from(path.exists()));
    }
    let folder = Folder::new();
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args([NAME, "--exact"]).env(PANICS_IN, folder.path("")).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(!folder.path("s").exists());
}

#[test]
fn a_background_job_leaves_its_terminal_alone() {
    let terminal = Terminal::new();
    let folder = Folder::new();
    let socket = folder.path("s");
    let script = r#""$0" serve --api-sock "$1" & read -r line; kill $!; wait $!; exit $?"#;
    let mut shell = Guarded(terminal.shell(script, &[socket.to_str().unwrap()]));
    wait_for(|| socket.exists());
    let mut client = Client::connect(&socket);
    let boot = serde_json::json!({
        "kernel_image_path": folder.firmware(), "boot_args": "case=serial end=idle",
    });
    client.ok("PUT", "/boot-source", &boot.to_string());
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    let state = client.request("GET", "/", "").json()["state"].clone();
    assert_eq!(state, "Running");
    assert!(!terminal.is_raw(), "a background process changed its terminal");
    (&terminal.user).write_all(b"end\n").unwrap();
    assert_eq!(shell.end(), Some(128 + TERM));
}

/// A shell's foreground job with this terminal, which has then been stopped; the shell has changed the
/// terminal's modes and goes on with `script` after a line. Returns the job's process, too.
fn stopped_job(terminal: &mut Terminal, folder: &Folder, script: &str) -> (Guarded, i32) {
    let file = folder.path("pid");
    let job = r#"sh -c 'echo $$ >"$1"; exec "$0" run --cmdline "case=serial echo end=6"' "$0" "$1""#;
    let script = format!("{job}; stty sane -echo; echo; echo it stands; read -r line; {script}");
    let shell = Guarded(terminal.shell(&script, &[file.to_str().unwrap()]));
    terminal.read_until("alula firmware");
    wait_for(|| terminal.is_raw());
    let job = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
    send(job, libc::SIGSTOP);
    terminal.read_until("it stands");
    assert!(!terminal.is_raw());
    (shell, job)
}

#[test]
fn a_job_that_returns_to_the_foreground_has_the_terminal_again() {
    let (mut terminal, folder) = (Terminal::new(), Folder::new());
    let before = terminal.modes();
    let (mut shell, _) = stopped_job(&mut terminal, &folder, "fg; exit $?");
    terminal.user.write_all(b"go on\n").unwrap();
    wait_for(|| terminal.is_raw());
    terminal.user.write_all(b"line\r").unwrap();
    assert_eq!(shell.end(), Some(6));
    assert_eq!(terminal.modes(), before);
}

#[test]
fn a_stopped_job_that_is_ended_leaves_its_terminal_alone() {
    let (mut terminal, folder) = (Terminal::new(), Folder::new());
    // The shell would refuse to exit while it takes the job for a stopped one: `jobs` has it look.
    let (mut shell, job) = stopped_job(&mut terminal, &folder, "jobs; exit 3");
    let before = terminal.modes();
    send(job, TERM);
    // As the `kill` of most shells does. The job must not be stopped anew, for touching the terminal.
    send(job, libc::SIGCONT);
    wait_for(|| common::ended::is_over(job as u32));
    assert_eq!(terminal.modes(), before);
    terminal.user.write_all(b"go on\n").unwrap();
    assert_eq!(shell.end(), Some(3));
}
