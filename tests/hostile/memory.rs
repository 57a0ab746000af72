//! Memory files that are not what the state says, and memory that is gone while a guest uses it.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, lchown};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use alula::memory::{self, Piece, Range, Source, lost};
use alula::microvm::signals;
use alula::poll;
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::common::{self, Folder, Service};
use super::{GO_ON, Snapshot, events, type_line};

const LOST: u8 = 149;

fn cut(path: &Path, length: u64) {
    File::options().write(true).open(path).unwrap().set_len(length).unwrap();
}

/// What a process must have said and told whose guest has lost the memory in the file at `path`.
fn check_lost(ended: &common::Ended, path: &Path, told: &[Value]) {
    let words = format!("the guest's memory is lost: its file `{}` was made shorter, or", path.display());
    assert_eq!(ended.code, Some(LOST.into()), "{}", ended.text);
    assert!(ended.text.contains(&words), "{}", ended.text);
    let [.., failed, last] = told else { panic!("{told:?}") };
    assert!(
        failed["event"] == "failed" && failed["reason"].as_str().unwrap().starts_with(&words),
        "{failed}"
    );
    assert!(last["event"] == "ended" && last["exit_code"] == LOST, "{last}");
}

#[test]
fn a_memory_file_that_is_cut_short_ends_its_guest_by_name() {
    let snapshot = Snapshot::new(&[]);
    let (memory, whole) = (snapshot.path("memory"), snapshot.path("whole"));
    fs::copy(&memory, &whole).unwrap();
    for resumes in [false, true] {
        fs::copy(&whole, &memory).unwrap();
        let told = snapshot.path(if resumes { "events 1" } else { "events 2" });
        let mut service = Service::start(&["--events", told.to_str().unwrap()]);
        let mut client = service.client();
        client.ok("PUT", "/snapshot/load", &snapshot.load(&json!({ "resume_vm": resumes })));
        cut(&memory, 0);
        if resumes {
            type_line(&mut service.process);
        } else {
            // The answer may come or not.
            client.send(&format!("PATCH /vm HTTP/1.1\r\nContent-Length: {}\r\n\r\n{GO_ON}", GO_ON.len()));
        }
        let (socket, ended) = (service.socket, service.process.end());
        check_lost(&ended, &memory, &events(&told));
        assert!(!socket.exists() && !snapshot.path("vsock").exists(), "a socket was left behind");
    }
    // What it was damaged by makes no snapshot of zeros either.
    fs::copy(&whole, &memory).unwrap();
    let service = Service::start(&[]);
    let mut client = service.client();
    client.ok("PUT", "/snapshot/load", &snapshot.load(&json!({})));
    cut(&memory, 4096);
    let other = json!({ "snapshot_path": snapshot.path("s"), "mem_file_path": snapshot.path("m") });
    let fault = client.request("PUT", "/snapshot/create", &other.to_string()).fault();
    let expected = format!(
        "read the memory that it was restored from: the guest's memory is lost: its file `{}` was made shorter",
        memory.display()
    );
    assert!(fault.contains(&expected), "{fault}");
}

/// Copies a file; what is zero in it becomes holes.
fn copy_sparsely(from: &Path, to: &Path) {
    let (from, to) = (fs::read(from).unwrap(), File::create(to).unwrap());
    to.set_len(from.len() as u64).unwrap();
    for (index, page) in from.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|byte| *byte != 0))
    {
        to.write_all_at(page, 4096 * index as u64).unwrap();
    }
}

#[test]
fn a_full_tmpfs_under_the_memory_ends_its_guest_by_name() {
    let snapshot = Snapshot::new(&[]);
    let small = snapshot.path("small");
    fs::create_dir(&small).unwrap();
    common::mount_tmpfs(&small, 80 << 20);
    let memory = small.join("memory");
    copy_sparsely(&snapshot.path("memory"), &memory);
    let told = snapshot.path("events");
    let mut service = Service::start(&["--events", told.to_str().unwrap()]);
    let backend = json!({ "backend_type": "File", "backend_path": memory });
    let load = snapshot.load(&json!({ "mem_backend": backend }));
    service.client().ok("PUT", "/snapshot/load", &load);
    // No hole of the memory can be given a page any more.
    let mut filler = File::create(small.join("filler")).unwrap();
    std::io::copy(&mut std::io::repeat(1), &mut filler).unwrap_err();
    service.client().ok("PATCH", "/vm", GO_ON);
    type_line(&mut service.process);
    check_lost(&service.process.end(), &memory, &events(&told));
}

/// Set: this process loses its memory, and another one looks how it ends.
const LOSES: &str = "ALULA_TEST_LOSES_MEMORY";

#[test]
fn a_thread_that_loses_memory_is_looked_at_from_outside() {
    let Ok(path) = std::env::var(LOSES) else { return };
    let size = 2 << 20;
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(size).unwrap();
    let range = Range { start: 0, size };
    let pieces = [Piece { range, position: 0 }];
    let memory = memory::map(&[range], Source::Private { file: &file, pieces: &pieces }).unwrap();
    lost::watch(&memory.memory(), Path::new(&path));
    signals::watch_memory();
    file.set_len(0).unwrap();
    // As a device's thread does, to which no signal comes that is sent to the process.
    let device = std::thread::spawn(move || {
        poll::leave_signals_to_others();
        memory.memory().read_obj::<u64>(GuestAddress(4096)).unwrap()
    });
    panic!("it has read {}", device.join().unwrap());
}

#[test]
fn a_devices_thread_that_finds_memory_lost_ends_the_process() {
    let folder = Folder::new();
    let path = folder.path("memory");
    let ended = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "memory::a_thread_that_loses_memory_is_looked_at_from_outside", "--nocapture"])
        .env(LOSES, &path)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(LOST.into()), "{text}");
    let words = format!("alula: the guest's memory is lost: its file `{}` was made", path.display());
    assert!(text.contains(&words), "{text}");
}

#[test]
fn memory_files_that_are_none_are_refused_and_change_nothing() {
    let snapshot = Snapshot::new(&[]);
    let service = Service::start(&[]);
    let memory = snapshot.path("memory");
    let other = |name: &str| snapshot.path(name);
    fs::copy(&memory, other("short")).unwrap();
    cut(&other("short"), (64 << 20) - 1);
    fs::copy(&memory, other("long")).unwrap();
    cut(&other("long"), (64 << 20) + 4096);
    fs::write(other("empty"), "").unwrap();
    common::output("mkfifo", &[other("fifo").to_str().unwrap()]);
    for (path, expected) in [
        (
            other("short"),
            "it has 67108863 bytes, and the state says 67108864: it was cut short, or belongs to",
        ),
        (
            other("long"),
            "it has 67112960 bytes, and the state says 67108864: it was cut short, or belongs to",
        ),
        (other("empty"), "it has 0 bytes, and the state says 67108864"),
        (other("none"), "No such file"),
        (other("fifo"), "it is a FIFO"),
        (snapshot.folder.path("."), "it is a directory"),
        (other("memory/memory"), "Not a directory"),
    ] {
        let backend = json!({ "backend_type": "File", "backend_path": path });
        snapshot.refuse(&service, &json!({ "mem_backend": backend }), expected);
        assert!(snapshot.load(&json!({})).contains("memory"));
    }
    refuse_overrides(&snapshot, &service);
    // A file that takes the place of the mapped one is nothing to the guest.
    let mut service = service;
    service.client().ok("PUT", "/snapshot/load", &snapshot.load(&json!({})));
    fs::rename(other("long"), &memory).unwrap();
    cut(&memory, 0);
    service.client().ok("PATCH", "/vm", GO_ON);
    type_line(&mut service.process);
    let ended = service.process.end();
    assert!(ended.code == Some(0) && ended.text.contains(" cases, 0 failed"), "{}", ended.text);
}

/// A service of a user without any rights, for files of its own.
fn of_nobody() -> Service {
    let folder = Folder::new();
    fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o777)).unwrap();
    let socket = folder.path("api.socket");
    let mut command = common::as_nobody(&folder, &["serve", "--api-sock", socket.to_str().unwrap()]);
    command.current_dir(&folder.0);
    let process = common::Process::spawn(command);
    common::wait_for(|| UnixStream::connect(&socket).is_ok());
    Service { process, socket, folder }
}

#[test]
fn files_that_this_user_may_not_read_are_refused_by_name() {
    common::open_devices();
    let snapshot = Snapshot::new(&[]);
    let files = fs::read_dir(&snapshot.folder.0).unwrap().map(|entry| entry.unwrap().path());
    for path in files.chain([snapshot.folder.0.clone()]) {
        lchown(path, Some(65534), Some(65534)).unwrap();
    }
    let service = of_nobody();
    for name in ["memory", "state"] {
        let path = snapshot.path(name);
        let allow = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        allow(0);
        let expected = format!("`{}`: Permission denied (os error 13)", path.display());
        snapshot.refuse(&service, &json!({}), &expected);
        allow(0o400);
    }
    snapshot.go_on(service);
}

fn refuse_overrides(snapshot: &Snapshot, service: &Service) {
    let tap = |id: &str, tap: &str| json!({ "iface_id": id, "host_dev_name": tap });
    let vsock = |path: &Path| json!({ "vsock_override": { "uds_path": path } });
    let long = "x".repeat(200);
    for (more, expected) in [
        (json!({ "network_overrides": [tap("net", "tap0")] }), "the saved machine has no such device"),
        (json!({ "network_overrides": [tap("disk", "tap0")] }), "the saved machine has no such device"),
        (json!({ "network_overrides": [tap("", "")] }), "the saved machine has no such device"),
        (vsock(&snapshot.folder.0), "set up vsock"),
        (vsock(&snapshot.path("memory")), "set up vsock"),
        (vsock(&snapshot.path("state")), "set up vsock"),
        (vsock(Path::new(&long)), "vsock"),
        (vsock(Path::new("")), "vsock"),
    ] {
        snapshot.refuse(service, &more, expected);
    }
    assert_eq!(fs::metadata(snapshot.path("memory")).unwrap().len(), 64 << 20);
    assert!(fs::read(snapshot.path("state")).unwrap().starts_with(b"ALULASNP"));
}
