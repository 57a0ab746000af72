//! Machines that one process saves to files and another one restores from them, through the API.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "../common/mod.rs"]
mod common;
mod diff;
mod disks;
mod elsewhere;
mod live;
mod lives;
mod networks;
mod replaced;
mod template;
mod working_set;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use common::held::Held;
use common::{Client, Ended, Folder, Process, Service, run};
use serde_json::{Value, json};

const PAUSE: &str = r#"{"state": "Paused"}"#;
const GO_ON: &str = r#"{"state": "Resumed"}"#;
/// A state of an old snapshot, of which its beginning alone is right.
const OLD: &[u8] = b"ALULASNP";

/// A microVM with a disk and an entropy device whose guest waits for a line, saved to files of a folder.
struct Saved {
    folder: Folder,
    service: Service,
}

impl Saved {
    fn new(extra: &[&str]) -> Self {
        Self::with(extra, "echo", true)
    }

    fn with(extra: &[&str], words: &str, has_disk: bool) -> Self {
        let folder = Folder::new();
        folder.write("disk", vec![7; 1 << 20]);
        let mut service = Service::start(extra);
        let mut client = service.client();
        let machine = json!({ "vcpu_count": 2, "mem_size_mib": 64 });
        client.ok("PUT", "/machine-config", &machine.to_string());
        client.ok("PUT", "/entropy", "{}");
        let disk =
            json!({ "drive_id": "disk", "is_root_device": false, "path_on_host": folder.path("disk") });
        if has_disk {
            client.ok("PUT", "/drives/disk", &disk.to_string());
        }
        service.boot_source(words);
        client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
        service.process.expect("alula firmware");
        client.ok("PATCH", "/vm", PAUSE);
        Self { folder, service }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path(name)
    }

    fn create(&self) -> String {
        json!({ "snapshot_path": self.path("state"), "mem_file_path": self.path("memory") }).to_string()
    }

    fn refuse(&self, load: &str, expected: &str) {
        fault(&mut self.service.client(), "/snapshot/load", load, expected);
    }

    fn load(&self, more: &Value) -> String {
        let memory = json!({ "backend_type": "File", "backend_path": self.path("memory") });
        let mut body = json!({ "snapshot_path": self.path("state"), "mem_backend": memory });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body.to_string()
    }
}

/// Types the line that the guest waits for, and returns how it ended.
fn end(mut service: Service) -> Ended {
    service.process.stdin.as_mut().unwrap().write_all(b"go on\n").unwrap();
    let ended = service.process.end();
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    assert!(ended.text.contains("go on") && ended.text.contains(" cases, 0 failed"), "{}", ended.text);
    ended
}

fn fault(client: &mut Client, path: &str, body: &str, expected: &str) {
    let fault = client.request("PUT", path, body).fault();
    assert!(fault.contains(expected), "{path} {body}: {fault}");
}

#[test]
fn a_guest_goes_on_in_another_process_and_in_its_own() {
    for extra in [&[][..], &["--enable-pci"]] {
        let saved = Saved::new(extra);
        let mut client = saved.service.client();
        client.ok("PUT", "/snapshot/create", &saved.create());
        let length = fs::metadata(saved.path("memory")).unwrap().len();
        assert_eq!(length, 64 << 20);
        // A disk has one writer.
        let other = Service::start(&["--id", "other"]);
        let (mut to_other, load) = (other.client(), saved.load(&json!({ "resume_vm": true })));
        fault(
            &mut to_other,
            "/snapshot/load",
            &load,
            "Load snapshot error: set up disk `disk`: use disk image",
        );
        client.ok("PATCH", "/vm", GO_ON);
        let Saved { folder, service } = saved;
        let first = end(service);
        to_other.ok("PUT", "/snapshot/load", &load);
        let config = to_other.ok("GET", "/vm/config", "").json();
        assert_eq!(config["machine-config"]["mem_size_mib"], 64);
        assert_eq!(config["drives"][0]["path_on_host"], json!(folder.path("disk")));
        assert_eq!(to_other.ok("GET", "/", "").json()["state"], "Running");
        let second = end(other);
        let cases =
            |ended: &Ended| ended.text.lines().find(|line| line.contains(" cases, ")).map(str::to_owned);
        assert_eq!(cases(&first), cases(&second));
    }
}

#[test]
fn a_restored_guest_is_saved_and_restored_again() {
    let mut saved = Saved::new(&["--boot-timer"]);
    for generation in 0..3 {
        let mut client = saved.service.client();
        client.ok("PUT", "/snapshot/create", &saved.create());
        let Saved { folder, service } = saved;
        drop(service);
        saved = Saved { folder, service: Service::start(&[]) };
        let mut client = saved.service.client();
        let more = json!({ "track_dirty_pages": true, "clock_realtime": alula::arch::NAME == "x86_64" });
        client.ok("PUT", "/snapshot/load", &saved.load(&more));
        assert_eq!(client.ok("GET", "/", "").json()["state"], "Paused", "{generation}");
    }
    saved.service.client().ok("PATCH", "/vm", GO_ON);
    end(saved.service);
}

/// A service whose guest goes on from the snapshot of `saved`, which has no disk.
fn clone_of(saved: &Saved) -> Service {
    let service = Service::start(&[]);
    service.client().ok("PUT", "/snapshot/load", &saved.load(&json!({ "resume_vm": true })));
    service
}

/// What the guest says of its identity: its ID, the ID that it started with, and the rest.
fn identity(service: Service) -> (String, String, String) {
    let text = end(service).text;
    let said = text.lines().find_map(|line| line.strip_prefix("identity: ok (ID "));
    let said = said.unwrap_or_else(|| panic!("{text}"));
    let (id, rest) = said.split_once(", at first ").unwrap();
    let (first, rest) = rest.split_once(", ").unwrap();
    (id.to_owned(), first.to_owned(), rest.to_owned())
}

#[test]
fn each_clone_has_an_identity_of_its_own_and_is_told_so() {
    let saved = Saved::with(&[], "echo case=identity", false);
    let mut client = saved.service.client();
    client.ok("PUT", "/snapshot/create", &saved.create());
    client.ok("PATCH", "/vm", GO_ON);
    client.ok("PATCH", "/vm", PAUSE);
    client.ok("PATCH", "/vm", GO_ON);
    let clones: Vec<Service> = (0..3).map(|_| clone_of(&saved)).collect();
    // A clone is saved in turn: its clones are of the next generation.
    let mut clone = clones[0].client();
    clone.ok("PATCH", "/vm", PAUSE);
    clone.ok("PUT", "/snapshot/create", &saved.create());
    clone.ok("PATCH", "/vm", GO_ON);
    let next: Vec<Service> = (0..2).map(|_| clone_of(&saved)).collect();
    let (original, first, rest) = identity(saved.service);
    assert_eq!((&original, &*rest), (&first, "generation 0)"), "it has only been paused");
    let mut ids = vec![original.clone()];
    let generations =
        clones.into_iter().map(|clone| (1, clone)).chain(next.into_iter().map(|clone| (2, clone)));
    for (generation, clone) in generations {
        let (id, first, rest) = identity(clone);
        assert_eq!((first, rest), (original.clone(), format!("generation {generation}, told)")));
        ids.push(id);
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 6, "two guests have one ID: {ids:?}");
}

#[test]
fn a_load_that_fails_changes_nothing_and_a_right_one_follows() {
    let saved = Saved::new(&[]);
    saved.service.client().ok("PUT", "/snapshot/create", &saved.create());
    let Saved { folder, service } = saved;
    drop(service);
    let saved = Saved { folder, service: Service::start(&[]) };
    refuse_requests(&saved);
    refuse_files(&saved);
    let (mut client, plain) = (saved.service.client(), saved.load(&json!({})));
    // What is not a resource that boots may be set, and nothing of it was lost.
    client.ok("PUT", "/serial", &json!({ "serial_out_path": saved.path("console") }).to_string());
    fs::remove_file(saved.path("disk")).unwrap();
    saved.refuse(&plain, "open disk `disk`");
    saved.folder.write("disk", vec![7; 1 << 20]);
    client.ok("PUT", "/snapshot/load", &saved.load(&json!({ "resume_vm": true })));
    fault(&mut client, "/snapshot/load", &plain, "not supported after starting the microVM.");
    let mut service = saved.service;
    service.process.stdin.as_mut().unwrap().write_all(b"go on\n").unwrap();
    assert_eq!(service.process.end().code, Some(0));
    let console = fs::read_to_string(saved.folder.path("console")).unwrap();
    assert!(console.contains(" cases, 0 failed"), "{console}");
}

fn refuse_requests(saved: &Saved) {
    if alula::arch::NAME == "aarch64" {
        let refused = "Load snapshot error: `clock_realtime`: KVM keeps no clock for guests of aarch64";
        saved.refuse(&saved.load(&json!({ "clock_realtime": true })), refused);
    }
    let memory = saved.path("memory");
    for (more, expected) in [
        (json!({ "huge_pages": "2M" }), "memory that is mapped from a file cannot be of huge pages of 2 MiB"),
        (
            json!({ "mem_backend": { "backend_type": "Uffd", "backend_path": "/s" } }),
            "hand the guest's memory to the page-fault handler at `/s`: connect",
        ),
        (
            json!({ "network_overrides": [{ "iface_id": "net", "host_dev_name": "tap9" }] }),
            "`network_overrides` of `net`: the saved machine has no such device",
        ),
        (
            json!({ "vsock_override": { "uds_path": "/v" } }),
            "`vsock_override`: the saved machine has no such",
        ),
        (json!({ "snapshot_path": "/nonexistent/s" }), "read the state of a machine, `/nonexistent/s`"),
        (json!({ "snapshot_path": memory }), "it is no state of a machine that Alula saved"),
        (json!({ "snapshot_path": saved.folder.0 }), "it is a directory"),
        (
            json!({ "mem_backend": { "backend_type": "File", "backend_path": saved.path("state") } }),
            "bytes, and the state says 67108864: it was cut short, or belongs to another state",
        ),
        (
            json!({ "mem_backend": { "backend_type": "File", "backend_path": "/dev/zero" } }),
            "it is a character device",
        ),
    ] {
        saved.refuse(&saved.load(&more), expected);
    }
    for (body, expected) in [
        (
            json!({ "snapshot_path": "s" }),
            "missing field: either `mem_backend` or `mem_file_path` is required.",
        ),
        (json!({ "mem_file_path": "m" }), "missing field `snapshot_path`"),
        (json!({}), "missing field: either `folder`, or `snapshot_path` with `mem_backend`, is needed"),
        (json!({ "folder": 7 }), "`folder`: expected a string, found `7`"),
        (json!({ "folder": "" }), "the name of the snapshot's folder (`folder`) is empty"),
        (json!({ "folder": "f", "snapshot_path": "s" }), "too many fields: either `folder` or"),
        (
            json!({ "snapshot_path": "s", "mem_file_path": "m", "mem_backend": { "backend_type": "File", "backend_path": "b" } }),
            "too many fields: either `mem_backend` or `mem_file_path` exclusively is required.",
        ),
        (json!({ "snapshot_path": "s", "mem_file_path": "m", "colour": 1 }), "unknown field `colour`"),
        (json!({ "folder": saved.folder.0 }), "its memory is at a path of its own"),
    ] {
        saved.refuse(&body.to_string(), expected);
    }
}

fn refuse_files(saved: &Saved) {
    let state = fs::read(saved.path("state")).unwrap();
    let plain = saved.load(&json!({}));
    let written = |bytes: &[u8], expected: &str| {
        fs::write(saved.path("state"), bytes).unwrap();
        saved.refuse(&plain, expected);
    };
    written(&state[..state.len() - 1], "it was cut short or is damaged");
    let mut changed = state.clone();
    changed[state.len() / 2] ^= 1;
    written(&changed, "it is damaged: the state of CPUs and devices in it is not as it was written");
    fs::write(saved.path("state"), &state).unwrap();
    fs::rename(saved.path("disk"), saved.path("away")).unwrap();
    saved.refuse(&plain, "open disk `disk`");
    fs::rename(saved.path("away"), saved.path("disk")).unwrap();
}

#[test]
fn a_service_that_was_configured_to_boot_is_not_restored_into() {
    let saved = Saved::new(&[]);
    let message = "Load snapshot error: Loading a microVM snapshot not allowed after configuring \
                   boot-specific resources.";
    for (path, body) in [
        ("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 64 })),
        ("/entropy", json!({})),
        ("/boot-source", json!({ "kernel_image_path": saved.service.folder.firmware() })),
    ] {
        let service = Service::start(&[]);
        let mut client = service.client();
        client.ok("PUT", path, &body.to_string());
        assert_eq!(client.request("PUT", "/snapshot/load", &saved.load(&json!({}))).fault(), message);
    }
    let service = Service::start(&[]);
    fault(
        &mut service.client(),
        "/snapshot/create",
        &saved.create(),
        "The requested operation is not supported before starting the microVM.",
    );
}

#[test]
fn while_a_snapshot_is_written_others_are_served_and_nothing_changes() {
    let folder = Folder::new();
    let events = folder.path("events");
    let saved = Saved::new(&["--events", events.to_str().unwrap()]);
    let (mut client, mut other, create) = (saved.service.client(), saved.service.client(), saved.create());
    fs::write(saved.path("state"), OLD).unwrap();
    let held = Held::next(&saved.service.process.child, || {
        client.send(&format!(
            "PUT /snapshot/create HTTP/1.1\r\nContent-Length: {}\r\n\r\n{create}",
            create.len()
        ));
    });
    assert_eq!(other.ok("GET", "/", "").json()["state"], "Paused");
    let busy = "a snapshot of the microVM is being written: wait until it is done";
    fault(&mut other, "/snapshot/create", &create, &format!("Create snapshot error: {busy}"));
    let disk = json!({ "drive_id": "disk", "path_on_host": saved.path("disk") }).to_string();
    for (path, body) in [("/vm", GO_ON), ("/drives/disk", &*disk)] {
        let refused = other.request("PATCH", path, body).fault();
        assert!(refused.ends_with(busy), "{refused}");
    }
    fault(&mut other, "/actions", r#"{"action_type": "Reset"}"#, &format!("Reset error: {busy}"));
    other.ok("PATCH", "/vm", PAUSE);
    assert_eq!(fs::read(saved.path("state")).unwrap(), OLD, "the old one counts until the new one is whole");
    drop(held);
    assert_eq!(client.receive().status(), "204");
    client.ok("PATCH", "/drives/disk", &disk);
    fault(&mut client, "/snapshot/create", &create.replace("state", "no/state"), "there is no folder");
    client.ok("PATCH", "/vm", GO_ON);
    fault(
        &mut client,
        "/snapshot/create",
        &create,
        "Create snapshot error: the microVM runs: pause it first",
    );
    end(saved.service);
    let events = fs::read_to_string(events).unwrap();
    let told: Vec<Value> = events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let named = |name: &str| told.iter().filter(|event| event["event"] == name).collect::<Vec<_>>();
    let [created] = named("snapshot_created")[..] else { panic!("{events}") };
    assert!(created["kind"] == "Full" && created["pages"].as_u64() > Some(5), "{created}");
    assert!(created["time_us"].as_u64() > Some(0) && created["pause_us"] == 0, "{created}");
    let configured = named("configured");
    assert!(configured.iter().all(|event| event["what"] != "/snapshot/create"), "{configured:?}");
    let failed = named("snapshot_failed");
    assert!(failed.len() >= 3 && failed.iter().all(|event| event["reason"].is_string()), "{events}");
}

#[test]
fn a_full_disk_ends_neither_the_guest_nor_the_old_snapshot() {
    // No file system of this size has room for the memory.
    let folder = Folder::new();
    let small = folder.path("small");
    fs::create_dir(&small).unwrap();
    common::mount_tmpfs(&small, 32 << 10);
    let saved = Saved::new(&[]);
    let mut client = saved.service.client();
    let mut names = Vec::new();
    for (place, state) in [
        (json!({ "folder": small.join("f") }), small.join("f/state")),
        (json!({ "snapshot_path": small.join("s"), "mem_file_path": small.join("m") }), small.join("s")),
    ] {
        fs::create_dir_all(state.parent().unwrap()).unwrap();
        fs::write(&state, OLD).unwrap();
        let place = place.to_string();
        let told = client.request("PUT", "/snapshot/create", &place).fault();
        let (attempt, why) = ("write the memory of the guest to `", "`: write to it: No space left");
        let beside = format!("{attempt}{}/", state.parent().unwrap().display());
        assert!(told.contains(&beside) && told.contains(why), "{told}");
        assert_eq!(fs::read(&state).unwrap(), OLD);
        names.extend(fs::read_dir(state.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name()));
    }
    names.sort();
    assert_eq!(names, ["f", "s", "state"], "nothing is left of what could not be written");
    client.ok("PATCH", "/vm", GO_ON);
    end(saved.service);
}

/// What a guest is called that another run of these tests may have, too, at the same time: the sockets of all guests
/// with names are in one folder.
fn unique(name: &str) -> String {
    format!("{name}-{}", std::process::id())
}

#[test]
fn people_save_to_a_folder_and_go_on_from_it() {
    let saved = Saved::new(&[]);
    let socket = saved.service.socket.to_str().unwrap().to_owned();
    let folder = saved.path("saved");
    let place = folder.to_str().unwrap();
    let ctl = |words: &[&str]| {
        let ended = run([&["ctl", "--api-sock", &socket], words].concat());
        assert_eq!(ended.code, Some(0), "{words:?}: {}", ended.text);
        ended.text
    };
    let state = || ctl(&["status", "--json"]);
    assert!(ctl(&["snapshot", place]).contains("saved to `"));
    assert!(state().contains("Paused"));
    let first: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    ctl(&["resume"]);
    // A guest that runs goes on by itself.
    assert_eq!(ctl(&["snapshot", place, "--json"]), "");
    assert!(state().contains("Running"));
    let second: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(first.len() == 2 && second.len() == 2 && first != second, "{first:?} {second:?}");

    let inspect = |path: &str| -> Value {
        let ended = run(["snapshot", "inspect", path]);
        serde_json::from_str(&ended.text).unwrap_or_else(|error| panic!("{error}: {}", ended.text))
    };
    let told = inspect(place);
    assert_eq!(told, inspect(&format!("{place}/state")));
    assert_eq!((&told["cpus"], &told["memory"]["size"]), (&json!(2), &json!(64 << 20)));
    assert!(told["is_of_this_boot"] == true && told["parts"]["disk `disk`"]["place"].is_string(), "{told}");
    assert_eq!(told["config"]["machine_config"]["vcpu_count"], 2);
    let version = run(["serve", "--snapshot-version"]).text;
    assert_eq!(run(["serve", "--describe-snapshot", &format!("{place}/state")]).text, version);
    let verify = || run(["snapshot", "verify", place]);
    assert!(verify().text.ends_with(": ok, with 64 MiB of memory\n"));

    drop(saved.service);
    let mut process = Process::start(["run", "--restore", place, "--id", &unique("again")]);
    process.stdin.as_mut().unwrap().write_all(b"go on\n").unwrap();
    let ended = process.end();
    assert!(ended.code == Some(0) && ended.text.contains(" cases, 0 failed"), "{}", ended.text);

    let memory = second.iter().find(|name| *name != "state").unwrap();
    let file = File::options().write(true).open(folder.join(memory)).unwrap();
    file.write_all_at(&[1; 8], 5 << 20).unwrap();
    let ended = verify();
    assert!(
        ended.code == Some(1) && ended.text.contains("it is damaged: the MiB at 0x500000"),
        "{}",
        ended.text
    );
    for (arguments, expected) in [
        (
            ["snapshot", "inspect", "/nonexistent"],
            "read the state of a machine, `/nonexistent`: No such file",
        ),
        (["run", "--restore", "/nonexistent"], "restore the guest in `/nonexistent`: read the state"),
    ] {
        let ended = run(arguments);
        assert!(ended.code != Some(0) && ended.text.contains(expected), "{}", ended.text);
    }
}
