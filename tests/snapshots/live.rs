//! Snapshots of guests that work meanwhile.

use std::cell::Cell;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use serde_json::{Value, json};

use super::common::held::Held;
use super::common::{Client, Folder, Process, Service, mount_tmpfs, run, send, wait_for};
use super::{PAUSE, fault, unique};

/// A guest that writes 2 MiB of its memory all the time, and looks whether it is as it was written.
struct Worker {
    folder: Folder,
    service: Service,
    client: Client,
}

impl Worker {
    fn new(track: bool, extra: &[&str]) -> Self {
        Self::writing(2, track, extra)
    }

    /// A worker whose guest writes `mib` MiB all the time.
    fn writing(mib: u32, track: bool, extra: &[&str]) -> Self {
        let folder = Folder::new();
        // What is mounted here is seen by what is started afterwards.
        fs::create_dir(folder.path("small")).unwrap();
        mount_tmpfs(&folder.path("small"), 64 << 10);
        let events = folder.path("events");
        let service = Service::start(&[extra, &["--events", events.to_str().unwrap()]].concat());
        let mut client = service.client();
        let machine = json!({ "vcpu_count": 2, "mem_size_mib": 64, "track_dirty_pages": track });
        client.ok("PUT", "/machine-config", &machine.to_string());
        client.ok("PUT", "/entropy", "{}");
        service.boot_source(&format!("work={mib}"));
        client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
        let mut worker = Self { folder, service, client };
        worker.service.process.expect("working");
        worker
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path(name)
    }

    fn create(&self, kind: &str, name: &str) -> String {
        json!({ "snapshot_type": kind, "folder": self.path(name), "live": true }).to_string()
    }

    fn save(&mut self, kind: &str, name: &str) {
        let create = self.create(kind, name);
        self.client.ok("PUT", "/snapshot/create", &create);
        self.works();
        let verified = run([Path::new("snapshot"), Path::new("verify"), &self.path(name)]);
        assert_eq!(verified.code, Some(0), "{}", verified.text);
    }

    /// Asserts that the guest runs, and that what it does is right.
    fn works(&mut self) {
        assert_eq!(self.client.ok("GET", "/", "").json()["state"], "Running");
        self.service.process.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        self.service.process.expect("passed");
    }

    fn events(&self, name: &str) -> Vec<Value> {
        let events = fs::read_to_string(self.path("events")).unwrap();
        let events = events.lines().map(|line| serde_json::from_str(line).unwrap());
        events.filter(|event: &Value| event["event"] == name).collect()
    }

    /// The memory of the snapshot in the folder `name`.
    fn memory(&self, name: &str) -> Vec<u8> {
        let paths = fs::read_dir(self.path(name)).unwrap().map(|entry| entry.unwrap().path());
        let memory = paths.into_iter().find(|path| !path.ends_with("state")).unwrap();
        fs::read(memory).unwrap()
    }
}

/// Has it look at its memory once more, and at the rest of its machine.
fn end(mut process: Process) {
    process.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    let ended = process.end();
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    assert!(ended.text.contains("worked") && ended.text.contains(" cases, 0 failed"), "{}", ended.text);
}

#[test]
fn a_guest_that_works_is_saved_and_both_go_on() {
    for extra in [&[][..], &["--enable-pci"]] {
        let mut worker = Worker::new(false, extra);
        // Several times: whether anything is left for the moment in which it stands still is chance.
        for id in ["1", "2", "3", "4"] {
            worker.save("Full", "saved");
            let place = worker.path("saved");
            let again = Process::start(["run", "--restore", place.to_str().unwrap(), "--id", &unique(id)]);
            worker.works();
            end(again);
        }
        let told = worker.events("snapshot_created");
        for created in &told {
            let number = |name: &str| created[name].as_u64().unwrap();
            assert!(created["kind"] == "Full" && number("pages") >= 512, "{created}");
            assert!(0 < number("pause_us") && number("pause_us") < number("time_us"), "{created}");
        }
        assert_eq!(told.len(), 4);
        worker.works();
        end(worker.service.process);
    }
}

#[test]
fn differences_of_a_guest_that_works_come_to_the_whole() {
    for track in [true, false] {
        let mut worker = Worker::new(track, &[]);
        worker.save("Full", "base");
        worker.save("Diff", "1");
        // What could not be saved is in the next one.
        let create = worker.create("Diff", "small/2");
        fault(&mut worker.client, "/snapshot/create", &create, "No space left");
        assert!(!worker.path("small/2").exists(), "a folder was left of what could not be written");
        worker.works();
        worker.save("Diff", "2");
        worker.client.ok("PATCH", "/vm", PAUSE);
        for (kind, name) in [("Diff", "3"), ("Full", "whole")] {
            let create = worker.create(kind, name);
            worker.client.ok("PUT", "/snapshot/create", &create);
        }
        for name in ["1", "2", "3"] {
            let paths = ["base", name].map(|name| worker.path(name));
            let merged = run([&[PathBuf::from("snapshot"), "merge".into()], &paths[..]].concat());
            assert_eq!(merged.code, Some(0), "{}", merged.text);
        }
        let [merged, whole] = ["base", "whole"].map(|name| worker.memory(name));
        let differs = merged.chunks(4096).zip(whole.chunks(4096)).position(|(one, other)| one != other);
        assert_eq!(differs.map(|page| page * 4096), None, "the first byte of a page that differs");
        let kinds: Vec<_> =
            worker.events("snapshot_created").iter().map(|event| event["kind"].clone()).collect();
        assert_eq!(kinds, ["Full", "Diff", "Diff", "Diff", "Full"]);
        assert_eq!(worker.events("snapshot_failed").len(), 1);
        let place = worker.path("base");
        let Worker { folder, service, .. } = worker;
        drop(service);
        end(Process::start(["run", "--restore", place.to_str().unwrap()]));
        drop(folder);
    }
}

#[test]
fn who_pauses_a_guest_that_is_saved_live_finds_it_paused() {
    let mut worker = Worker::new(false, &[]);
    let mut other = worker.service.client();
    let state = worker.path("state");
    let create = json!({ "snapshot_path": state, "mem_file_path": worker.path("memory"), "live": true });
    let create = create.to_string();
    let held = Held::next(&worker.service.process.child, || {
        let request =
            format!("PUT /snapshot/create HTTP/1.1\r\nContent-Length: {}\r\n\r\n{create}", create.len());
        worker.client.send(&request);
    });
    let busy = "a snapshot of the microVM is being written: wait until it is done";
    fault(&mut other, "/snapshot/create", &create, busy);
    assert_eq!(other.ok("GET", "/", "").json()["state"], "Running");
    other.ok("PATCH", "/vm", PAUSE);
    drop(held);
    assert_eq!(worker.client.receive().status(), "204");
    assert_eq!(other.ok("GET", "/", "").json()["state"], "Paused");
    let plain = json!({ "snapshot_path": state, "mem_file_path": worker.path("memory") }).to_string();
    other.ok("PATCH", "/vm", super::GO_ON);
    fault(&mut other, "/snapshot/create", &plain, "pause it first (`PATCH /vm`), or say `live`");
    worker.works();
    end(worker.service.process);
}

/// A tracer that delays each of a process's writes to files, by a number of microseconds, until this value is dropped.
struct Slow(Child);

impl Slow {
    fn new(service: &Service, delay_us: u32) -> Self {
        let mut strace = Command::new("strace");
        strace.args([
            "-f",
            "-q",
            "-e",
            "trace=pwrite64",
            "-e",
            &format!("inject=pwrite64:delay_enter={delay_us}"),
        ]);
        strace.args(["-o", "/dev/null", "-p", &service.process.child.id().to_string()]);
        let traced = strace.spawn().unwrap();
        let status = format!("/proc/{}/status", service.process.child.id());
        wait_for(|| !fs::read_to_string(&status).unwrap().contains("TracerPid:\t0\n"));
        Self(traced)
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        send(&self.0, libc::SIGINT);
        let _ = self.0.wait();
    }
}

#[test]
fn a_guest_that_writes_faster_than_a_disk_is_slowed_down() {
    let mut worker = Worker::writing(24, false, &[]);
    let create = |worker: &Worker, name: &str, more: &Value| {
        let mut body: Value = serde_json::from_str(&worker.create("Full", name)).unwrap();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body.to_string()
    };
    let wrong = create(&worker, "saved", &json!({ "live": false, "slow_down": true }));
    fault(&mut worker.client, "/snapshot/create", &wrong, "`slow_down` is for `live`");
    let slow = Slow::new(&worker.service, 20_000);
    let body = create(&worker, "saved", &json!({ "slow_down": true }));
    worker.client.ok("PUT", "/snapshot/create", &body);
    drop(slow);
    wait_for(|| worker.events("snapshot_created").len() == 1);
    // After the snapshot the guest has all of its CPU time again, and the clone never had less.
    worker.works();
    let place = worker.path("saved");
    end(Process::start(["run", "--restore", place.to_str().unwrap(), "--id", &unique("slowed")]));
    end(worker.service.process);
}

#[test]
fn a_guest_that_writes_faster_than_its_save_is_given_up() {
    // More than a round that is small enough to be the last one.
    let mut worker = Worker::writing(6, false, &[]);
    let mut client = worker.service.client();
    let create = worker.create("Full", "saved");
    let held = Held::next(&worker.service.process.child, || {
        let length = create.len();
        client.send(&format!("PUT /snapshot/create HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{create}"));
    });
    // A round writes from the beginning of the memory to its end. In each of them the guest goes through all that it
    // works on at least once, however long that takes.
    let (place, mut rounds) = (Cell::new(u64::MAX), 0);
    let is_first = |call, [_, _, _, at, ..]: [u64; 6]| call == libc::SYS_pwrite64 && place.replace(at) >= at;
    while held.goes_on_to(is_first) {
        rounds += 1;
        worker.works();
        worker.works();
    }
    drop(held);
    let fault = client.receive().fault();
    let expected = "the guest writes to its memory faster than the disk takes it: 6 MiB were left after 24 rounds: save to a \
                    faster disk, or pause the guest first, or have it slowed down (`slow_down`)";
    assert!(fault.contains(expected), "{fault}");
    assert!(rounds >= 24, "only {rounds} rounds were seen");
    assert!(!worker.path("saved").exists(), "a folder was left of what was given up");
    wait_for(|| !worker.events("snapshot_failed").is_empty());
    let [failed] = &worker.events("snapshot_failed")[..] else { panic!("it is told once") };
    assert!(failed["reason"].as_str().unwrap().contains(expected), "{failed}");
    // The guest goes on, and can be saved otherwise.
    worker.works();
    worker.client.ok("PATCH", "/vm", PAUSE);
    let create = worker.create("Full", "saved");
    worker.client.ok("PUT", "/snapshot/create", &create);
    worker.client.ok("PATCH", "/vm", super::GO_ON);
    worker.works();
    end(worker.service.process);
}
