//! Signals: those that end the process, and those of job control, which give the terminal to whom it belongs.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::io::Write;
use std::process::{Child, Command};

use common::terminal::Terminal;
use common::{Client, Folder, Process, alula, wait_for};

const TERM: i32 = libc::SIGTERM;

/// A process that is killed when the test ends.
struct Guarded(Child);

impl Guarded {
    /// Its exit code; waits for the end.
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
