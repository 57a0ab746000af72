//! Saves that are cut off at any moment, and system calls of a save or a load that fail: the old snapshot is there, the
//! new one, or none, and the process goes on.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::common::{Client, Folder, Response, Service, run, wait_for};
use super::{GO_ON, PAUSE, Snapshot, running, running_with, type_line};

/// How often a process is killed while it saves, in each form, if that is told; a merge is killed at all of its calls then.
pub const KILLS: &str = "ALULA_TEST_KILLS";

/// Where a snapshot is saved to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    Folder,
    Paths,
}

impl Form {
    fn body(self, folder: &Folder) -> String {
        match self {
            Self::Folder => json!({ "folder": folder.path("saved") }),
            Self::Paths => {
                json!({ "snapshot_path": folder.path("state"), "mem_file_path": folder.path("memory") })
            }
        }
        .to_string()
    }

    /// Whether there is a snapshot; one that is there must be whole.
    fn is_there(self, folder: &Folder) -> bool {
        let state = folder.path(if self == Self::Folder { "saved/state" } else { "state" });
        if self == Self::Paths && !state.exists() {
            return false;
        }
        let arguments = match self {
            Self::Folder => vec![folder.path("saved")],
            Self::Paths => vec![state, folder.path("memory")],
        };
        let words = ["snapshot", "verify"].map(PathBuf::from);
        let ended = run(words.iter().chain(&arguments));
        assert_eq!(ended.code, Some(0), "{self:?}: {}", ended.text);
        true
    }
}

fn put(path: &str, body: &str) -> String {
    format!("PUT {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

#[test]
fn a_save_that_is_killed_leaves_a_whole_snapshot_or_none() {
    let kills = std::env::var(KILLS).map_or(4, |kills| kills.parse::<u32>().unwrap());
    for form in [Form::Folder, Form::Paths] {
        let (mut gone, mut length) = (0, Duration::ZERO);
        let mut place = None;
        for number in 0..kills {
            let (folder, service) = running(&[]);
            let mut client = service.client();
            client.ok("PATCH", "/vm", PAUSE);
            // Each over what the one before has left.
            let folder = place.get_or_insert(folder);
            let body = form.body(folder);
            if number == 0 || number % 8 == 7 {
                let begun = Instant::now();
                client.ok("PUT", "/snapshot/create", &body);
                length = begun.elapsed();
            }
            client.send(&put("/snapshot/create", &body));
            // All moments of a save, from its first to a little after its last.
            std::thread::sleep(length.mul_f64(f64::from(number * 7 % kills) * 1.2 / f64::from(kills)));
            let mut process = service.process;
            process.child.kill().unwrap();
            process.child.wait().unwrap();
            let is_there = form.is_there(folder);
            assert!(is_there || form == Form::Paths, "the old snapshot is gone");
            gone += u32::from(!is_there);
        }
        println!("{form:?}: {gone} of {kills} kills left none");
        let (_, service) = running(&[]);
        let mut client = service.client();
        client.ok("PATCH", "/vm", PAUSE);
        let folder = place.unwrap();
        client.ok("PUT", "/snapshot/create", &form.body(&folder));
        assert!(form.is_there(&folder));
        let left = fs::read_dir(folder.path(if form == Form::Folder { "saved" } else { "." })).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert!(!left.iter().any(|name| name.ends_with(".alula-new")), "{left:?}");
        assert!(form == Form::Paths || left.len() == 2, "{left:?}");
    }
}

/// A tracer that has one system call of a process fail; the process goes on by itself when this is dropped.
struct Fault {
    tracer: Child,
    told: PathBuf,
}

impl Fault {
    /// The `number`th call that `which` and `more` arguments of strace name, of any of its threads, from now on.
    fn new(service: &Service, which: &str, number: u32, more: &[&str]) -> Self {
        let told = service.folder.path("trace");
        let errors = service.folder.path("tracer");
        let _ = fs::remove_file(&told);
        let tracer = Command::new("strace")
            .args(["-f", "-p", &service.process.child.id().to_string(), "-o", told.to_str().unwrap()])
            .args(["-e", &format!("trace={which}")])
            .args(["-e", &format!("inject={which}:error=EIO:when={number}")])
            .args(more)
            .stderr(Stdio::from(fs::File::create(&errors).unwrap()))
            .spawn()
            .unwrap();
        wait_for(|| fs::read_to_string(&errors).unwrap().contains("attached"));
        Self { tracer, told }
    }

    /// Lets go of the process, and returns the line of the call that has failed, if one has.
    fn end(mut self) -> Option<String> {
        super::common::send(&self.tracer, libc::SIGINT);
        self.tracer.wait().unwrap();
        let told = fs::read_to_string(&self.told).unwrap();
        told.lines().find(|line| line.contains("(INJECTED)")).map(str::to_owned)
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        let _ = self.tracer.kill();
        let _ = self.tracer.wait();
    }
}

/// Asks while the `number`th call `which` fails, of those that `more` leaves; None: there were not so many.
fn ask(
    service: &Service,
    (which, number, more): (&str, u32, &[&str]),
    path: &str,
    body: &str,
) -> Option<(String, Response)> {
    // Connected before.
    let mut client = service.client();
    client.ok("GET", "/", "");
    let fault = Fault::new(service, which, number, more);
    let answer = client.request("PUT", path, body);
    fault.end().map(|line| (line, answer))
}

#[test]
fn a_save_of_which_a_system_call_fails_can_be_tried_again() {
    for form in [Form::Folder, Form::Paths] {
        let (folder, mut service) = running(&[]);
        let mut client = service.client();
        client.ok("PATCH", "/vm", PAUSE);
        let body = form.body(&folder);
        let paths = ["saved/state", "state", "memory"].map(|name| folder.path(&format!("{name}.alula-new")));
        let paths: Vec<_> = paths.iter().flat_map(|path| ["-P", path.to_str().unwrap()]).collect();
        let mut failed = 0;
        for (which, more) in [
            ("fsync", &[][..]),
            ("rename", &[]),
            ("unlink", &[]),
            ("ftruncate", &[]),
            ("pwrite64", &[]),
            ("mkdir", &[]),
            ("flock", &[]),
            ("write", &paths),
        ] {
            for number in 1.. {
                client.ok("PUT", "/snapshot/create", &body);
                let call = (which, number, more);
                let Some((line, answer)) = ask(&service, call, "/snapshot/create", &body) else { break };
                failed += 1;
                check_failed_save(form, &folder, &line, &answer);
            }
        }
        assert!(failed > 10, "only {failed} calls were made to fail");
        client.ok("PUT", "/snapshot/create", &body);
        assert!(form.is_there(&folder));
        client.ok("PATCH", "/vm", GO_ON);
        type_line(&mut service.process);
        let ended = service.process.end();
        assert!(ended.code == Some(0) && ended.text.contains(" cases, 0 failed"), "{}", ended.text);
    }
}

fn check_failed_save(form: Form, folder: &Folder, line: &str, answer: &Response) {
    let there = form.is_there(folder);
    // The old state goes when both new files are whole: only their names are not in their places then.
    let is_late = ["rename(", "fsync("].iter().any(|call| line.contains(call));
    assert!(there || form == Form::Paths && is_late, "{line}: the old snapshot is gone");
    if answer.status() != "204" {
        let fault = answer.fault();
        let path = folder.0.to_str().unwrap();
        assert!(answer.status() == "400" && fault.contains(path), "{line}: {fault}");
        let is_new = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().ends_with(".alula-new");
        let left: Vec<_> = fs::read_dir(&folder.0).unwrap().map(Result::unwrap).filter(is_new).collect();
        assert!(left.is_empty(), "{line}: {left:?}");
    }
}

/// A guest that works on a MiB of its memory, and of which a whole snapshot was saved.
pub struct Written {
    pub folder: Folder,
    service: Service,
    client: Client,
}

impl Written {
    pub fn new() -> Self {
        let (folder, mut service) =
            running_with(&[], "work=1", &json!({ "mem_size_mib": 20, "track_dirty_pages": true }));
        service.process.expect("working");
        let mut client = service.client();
        client.ok("PATCH", "/vm", PAUSE);
        let mut written = Self { folder, service, client };
        written.save("Full", "base");
        written
    }

    fn create(&self, kind: &str, name: &str) -> String {
        json!({ "snapshot_type": kind, "folder": self.folder.path(name) }).to_string()
    }

    pub fn save(&mut self, kind: &str, name: &str) {
        self.client.ok("PUT", "/snapshot/create", &self.create(kind, name));
    }

    /// Has the guest look at a MiB of its memory, and write to each page of it.
    pub fn write(&mut self) {
        self.client.ok("PATCH", "/vm", GO_ON);
        self.service.process.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        self.service.process.expect("passed");
        self.client.ok("PATCH", "/vm", PAUSE);
    }

    /// Sees that the difference in `diff` makes the snapshot before it what the guest is now, which is the next one
    /// before a difference.
    fn check_diff(&mut self) {
        let [base, diff, whole] = ["base", "diff", "whole"].map(|name| self.folder.path(name));
        let told = run([Path::new("snapshot"), Path::new("inspect"), &diff]);
        let told: Value = serde_json::from_str(&told.text).unwrap();
        assert_ne!(told["memory"]["checksums"], 0, "nothing was written");
        let merged = run([Path::new("snapshot"), Path::new("merge"), &base, &diff]);
        assert_eq!(merged.code, Some(0), "{}", merged.text);
        self.save("Full", "whole");
        assert!(is_same(&memory_in(&base), &memory_in(&whole)), "a page is not in the difference");
        fs::remove_dir_all(&base).unwrap();
        fs::remove_dir_all(diff).unwrap();
        fs::rename(whole, base).unwrap();
    }
}

/// Where the memory of the snapshot in this folder is.
pub fn memory_in(folder: &Path) -> PathBuf {
    let told = run([Path::new("snapshot"), Path::new("inspect"), folder]);
    let told: Value = serde_json::from_str(&told.text).unwrap();
    folder.join(told["memory"]["file"].as_str().unwrap())
}

/// Whether two files are alike. They are not read whole: tests of this process count what is allocated.
pub fn is_same(one: &Path, other: &Path) -> bool {
    let [mut one, mut other] = [one, other].map(|path| BufReader::new(fs::File::open(path).unwrap()));
    loop {
        let (left, right) = (one.fill_buf().unwrap(), other.fill_buf().unwrap());
        let length = left.len().min(right.len());
        if left[..length] != right[..length] || length == 0 {
            return left.is_empty() && right.is_empty();
        }
        one.consume(length);
        other.consume(length);
    }
}

#[test]
fn a_diff_of_which_a_system_call_fails_loses_nothing() {
    let mut written = Written::new();
    let (create, diff) = (written.create("Diff", "diff"), written.folder.path("diff"));
    let state = diff.join("state.alula-new");
    let mut failed = 0;
    for (which, more) in [
        ("fsync", &[][..]),
        ("rename", &[]),
        ("ftruncate", &[]),
        ("pwrite64", &[]),
        ("mkdir", &[]),
        ("flock", &[]),
        ("write", &["-P", state.to_str().unwrap()]),
    ] {
        for number in 1.. {
            written.write();
            let Some((line, answer)) =
                ask(&written.service, (which, number, more), "/snapshot/create", &create)
            else {
                written.check_diff();
                break;
            };
            if answer.status() != "204" {
                failed += 1;
                let fault = answer.fault();
                assert!(
                    answer.status() == "400" && fault.contains(diff.to_str().unwrap()),
                    "{line}: {fault}"
                );
                assert!(!diff.exists(), "{line}: a folder was left");
                written.save("Diff", "diff");
            }
            written.check_diff();
        }
    }
    assert!(failed > 5, "only {failed} calls were made to fail");
}

/// How many calls are left out after one that was made to fail. All are tried if this is told.
const ALL: &str = "ALULA_TEST_ALL_CALLS";

#[test]
fn a_load_of_which_a_system_call_fails_can_be_tried_again() {
    let step = if std::env::var_os(ALL).is_some() { 1 } else { 9 };
    let snapshot = Snapshot::new(&["--enable-pci"]);
    let load = snapshot.load(&json!({}));
    let anew = || {
        // The one before was killed, and could not remove it.
        let _ = fs::remove_file(snapshot.path("vsock"));
        Service::start(&[])
    };
    let mut service = anew();
    let (mut refused, mut borne) = (0, 0);
    for which in ["ioctl", "openat", "pread64", "eventfd2"] {
        for number in (1..).step_by(if which == "ioctl" { step } else { step.div_ceil(3) }) {
            let call = (which, number, &[][..]);
            let Some((line, answer)) = ask(&service, call, "/snapshot/load", &load) else { break };
            if answer.status() == "204" {
                // What can be done without is done without.
                borne += 1;
                service = anew();
                continue;
            }
            refused += 1;
            let fault = answer.fault();
            assert!(answer.status() == "400" && fault.contains("Input/output error"), "{line}: {fault}");
            check_nothing_is_left(&mut service.client(), &snapshot.path("vsock"), &line);
        }
        // The last one was not made to fail.
        service = anew();
    }
    println!("{refused} loads were refused, {borne} were done for all that");
    assert!(refused > 10);
    let (line, answer) = ask(&service, ("ioctl", 20, &[]), "/snapshot/load", &load).unwrap();
    assert_eq!(answer.status(), "400", "{line}");
    snapshot.go_on(service);
}

fn check_nothing_is_left(client: &mut Client, vsock: &Path, line: &str) {
    let told: Value = client.ok("GET", "/", "").json();
    assert_eq!(told["state"], "Not started");
    assert!(!vsock.exists(), "{line}: the vsock socket of a machine that is none was left");
}
