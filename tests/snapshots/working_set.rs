//! What a restored guest needs of its memory first: noted beside its snapshot, and read ahead of later ones.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use alula::sys::descriptor;
use serde_json::{Value, json};

use super::common::cache::drop_from_memory;
use super::common::{Folder, Process, Service, run, wait_for};
use super::{PAUSE, fault};

/// A place in the memory that the guest works on, in bytes from the start of the file.
const WORKED_ON: u64 = 17 << 20;
const NOTE: &str = "/snapshot/working-set";

/// The folder of a snapshot, on a disk, of a guest of 64 MiB that works on 2 of them, from 16 on.
struct Saved(Folder);

impl Saved {
    fn new() -> Self {
        let saved = Self(Folder::on_disk());
        let mut service = Service::start(&[]);
        let mut client = service.client();
        client.ok("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 64}"#);
        service.boot_source("work=2");
        client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
        service.process.expect("working");
        client.ok("PATCH", "/vm", PAUSE);
        client.ok("PUT", "/snapshot/create", &json!({ "folder": saved.folder() }).to_string());
        saved
    }

    fn folder(&self) -> PathBuf {
        self.0.path("saved")
    }

    fn noted(&self) -> PathBuf {
        self.folder().join("working-set")
    }

    fn memory(&self) -> PathBuf {
        let mut paths = fs::read_dir(self.folder()).unwrap().map(|entry| entry.unwrap().path());
        paths.find(|path| path.to_string_lossy().contains("/memory-")).unwrap()
    }

    /// Whether the host has in memory what the guest works on.
    fn is_in_memory(&self) -> bool {
        let memory = File::open(self.memory()).unwrap();
        descriptor::is_in_memory(&memory, 64 << 20, [WORKED_ON]).unwrap()
    }

    /// Has the host forget the memory of the snapshot, which nobody maps.
    fn forget(&self) {
        wait_for(|| {
            drop_from_memory(&self.memory());
            !self.is_in_memory()
        });
    }

    /// A service that has loaded the guest, which runs if that is true.
    fn load(&self, resumes: bool) -> Service {
        let service = Service::start(&[]);
        let load = json!({ "folder": self.folder(), "resume_vm": resumes });
        service.client().ok("PUT", "/snapshot/load", &load.to_string());
        service
    }
}

/// Has the guest work on all of its memory at least once.
fn work(process: &mut Process) {
    for _ in 0..2 {
        process.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        process.expect("passed");
    }
}

#[test]
fn what_a_guest_needs_first_is_read_ahead_of_it() {
    let saved = Saved::new();
    saved.forget();
    // Nobody touches what a guest works on that stands still.
    drop(saved.load(false));
    assert!(!saved.is_in_memory());
    let mut service = saved.load(true);
    work(&mut service.process);
    let mut client = service.client();
    client.ok("PUT", NOTE, "{}");
    let first = fs::read(saved.noted()).unwrap();
    // 2 MiB are 512 pages.
    assert!((512..=16 << 10).contains(&pages_of(&first)), "{} pages", pages_of(&first));
    client.ok("PUT", NOTE, r#"{"after_ms": 1}"#);
    drop(service);
    saved.forget();
    let service = saved.load(false);
    wait_for(|| saved.is_in_memory());
    // The thread that did so has its walls, and has done nothing that they do not allow.
    assert_eq!(service.client().ok("GET", "/", "").json()["state"], "Paused");
    drop(service);
    // The next snapshot has another memory.
    let mut service = saved.load(true);
    work(&mut service.process);
    service.client().ok("PUT", "/snapshot/create", &json!({ "folder": saved.folder() }).to_string());
    assert!(!saved.noted().exists());
}

fn mkfifo(path: &Path) -> bool {
    Command::new("mkfifo").arg(path).status().unwrap().success()
}

/// How many pages are noted.
fn pages_of(noted: &[u8]) -> u32 {
    let (runs, rest) = noted[32..].as_chunks::<8>();
    assert!(rest.is_empty());
    runs.iter().map(|run| u32::from_le_bytes(*run.last_chunk().unwrap())).sum()
}

#[test]
fn what_cannot_be_noted_is_refused() {
    let saved = Saved::new();
    let started = Service::running("end=idle");
    let refused = "Working set error: its memory is not from the folder of a snapshot";
    fault(&mut started.client(), NOTE, "{}", refused);
    let service = Service::start(&[]);
    let mut client = service.client();
    fault(&mut client, NOTE, "{}", "not supported before starting the microVM");
    let backend = json!({ "backend_type": "File", "backend_path": saved.memory() });
    let load = json!({ "snapshot_path": saved.folder().join("state"), "mem_backend": backend });
    client.ok("PUT", "/snapshot/load", &load.to_string());
    fault(&mut client, NOTE, "{}", refused);
    let service = saved.load(false);
    let mut client = service.client();
    fault(&mut client, NOTE, r#"{"after_ms": 3600001}"#, "at most 3600 s");
    fault(&mut client, NOTE, r#"{"after": 1}"#, "unknown field `after`");
    // A folder that is in the way is told of, and nothing is left behind.
    fs::create_dir(saved.noted()).unwrap();
    let there = format!("already at `{}`: remove it first", saved.noted().display());
    fault(&mut client, NOTE, "{}", &there);
    let left = fs::read_dir(saved.folder()).unwrap().count();
    assert_eq!(left, 3, "state, memory and what is in the way");
    fs::remove_dir(saved.noted()).unwrap();
    // Only one is waited for at a time.
    let mut waiting = service.client();
    let body = r#"{"after_ms": 3600000}"#;
    waiting.send(&format!("PUT {NOTE} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
    let tasks = PathBuf::from(format!("/proc/{}/task", service.process.child.id()));
    wait_for(|| {
        let names = fs::read_dir(&tasks).unwrap().flatten().map(|task| task.path().join("comm"));
        names.filter_map(|name| fs::read_to_string(name).ok()).any(|name| name == "note\n")
    });
    fault(&mut client, NOTE, "{}", "is being noted already");
}

#[test]
fn a_working_set_that_is_wrong_does_no_harm() {
    let saved = Saved::new();
    let mut service = saved.load(true);
    work(&mut service.process);
    service.client().ok("PUT", NOTE, "{}");
    drop(service);
    let noted = fs::read(saved.noted()).unwrap();
    let mut of_another = noted.clone();
    of_another[20] ^= 1;
    let check = crc32fast::hash(&of_another[12..]).to_le_bytes();
    of_another[8..12].copy_from_slice(&check);
    let mut damaged = noted.clone();
    damaged[40] ^= 1;
    let longer = [&noted[..], &[0; 1 << 20]].concat();
    let put = |content: &[u8]| fs::write(saved.noted(), content).unwrap();
    let cases: [(&str, &dyn Fn(), &str); 8] = [
        ("of another memory", &|| put(&of_another), ""),
        ("damaged", &|| put(&damaged), "it is damaged: the guest is restored without"),
        ("empty", &|| put(b""), "it is damaged"),
        ("too long", &|| put(&longer), "it is damaged"),
        ("endless", &|| symlink("/dev/zero", saved.noted()).unwrap(), "it is a character device"),
        ("a loop", &|| symlink("working-set", saved.noted()).unwrap(), "symbolic links"),
        ("a folder", &|| fs::create_dir(saved.noted()).unwrap(), "it is a directory"),
        ("a FIFO", &|| assert!(mkfifo(&saved.noted())), "it is a FIFO"),
    ];
    for (name, make, expected) in cases {
        let _ = fs::remove_file(saved.noted()).or_else(|_| fs::remove_dir(saved.noted()));
        make();
        saved.forget();
        let mut process = Process::start(["run", "--restore", saved.folder().to_str().unwrap()]);
        process.stdin.as_mut().unwrap().write_all(b"x\n").unwrap();
        let ended = process.end();
        assert_eq!(ended.code, Some(0), "{name}: {}", ended.text);
        assert!(ended.text.contains("worked"), "{name}: {}", ended.text);
        let told = ended.text.contains("what the guest needs first");
        assert!(told != expected.is_empty() && ended.text.contains(expected), "{name}: {}", ended.text);
    }
}

#[test]
fn a_guest_notes_what_it_needs_when_its_time_is_over() {
    let saved = Saved::new();
    let events = saved.0.path("events");
    let [folder, told] = [saved.folder(), events.clone()].map(|path| path.to_str().unwrap().to_owned());
    let mut process = Process::start(["run", "--restore", &folder, "--record", "1ms", "--events", &told]);
    let noted = || -> Option<Value> {
        let text = fs::read_to_string(&events).ok()?;
        let events = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        events.into_iter().find(|event| event["event"] == "working_set_noted")
    };
    wait_for(|| noted().is_some());
    assert_eq!(noted().unwrap()["pages"], pages_of(&fs::read(saved.noted()).unwrap()));
    process.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    assert_eq!(process.end().code, Some(0));
    let ended = run(["run", "--record", "1s"]);
    assert!(ended.text.contains("--record is for a guest that is restored"), "{}", ended.text);
}
