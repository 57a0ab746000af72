//! The reset of a machine: the guest boots again in the same process, with what devices have of the host.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use common::{Client, Folder, Process, Service, network, output, run, wait_for};
use serde_json::{Value, json};

const RESET: &str = r#"{"action_type": "Reset"}"#;
/// So often a guest boots before it is known what is kept for later resets.
const SETTLED: usize = 4;
const START: &str = r#"{"action_type": "InstanceStart"}"#;

fn state(client: &mut Client) -> Value {
    client.ok("GET", "/", "").json()["state"].take()
}

/// The events of this kind that a file of them has.
fn events(path: &Path, kind: &str) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    let all = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    all.filter(|event| event["event"] == kind).collect()
}

#[test]
fn a_guest_that_runs_or_is_paused_boots_again() {
    let folder = Folder::new();
    let path = folder.path("events");
    let mut service = Service::start(&["--events", path.to_str().unwrap()]);
    let (mut client, socket) = (service.client(), service.socket.to_str().unwrap().to_owned());
    let disk = service.folder.write("disk", [0; 4096]);
    client.ok(
        "PUT",
        "/drives/d",
        &json!({ "drive_id": "d", "is_root_device": false, "path_on_host": disk }).to_string(),
    );
    service.boot_source("case=serial,block end=idle");
    let before_start = "The requested operation is not supported before starting the microVM.";
    assert_eq!(client.request("PUT", "/actions", RESET).fault(), before_start);
    client.ok("PUT", "/actions", START);
    service.process.expect("2 cases, 0 failed");
    // The guest's write was answered, and nobody has flushed it since.
    let written: Vec<u8> = (0..512).map(|index| index as u8 ^ 0x5a).collect();
    assert!(fs::read(&disk).unwrap()[512..1024] == written);
    fs::write(&disk, [0; 4096]).unwrap();
    for is_paused in [false, true, true, false] {
        if is_paused {
            client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
        }
        let ended = run(["ctl", "--api-sock", &socket, "reset"]);
        assert_eq!((ended.code, ended.text.as_str()), (Some(0), "the guest boots again\n"));
        assert_eq!(state(&mut client), "Running");
        service.process.expect("alula firmware: ");
        service.process.expect("2 cases, 0 failed");
    }
    assert!(fs::read(&disk).unwrap()[512..1024] == written, "the disk is the same one");
    let told = events(&path, "restarted");
    assert!(told.len() == 4 && told.iter().all(|event| event["reason"] == "Reset"), "{told:?}");
    assert_eq!(events(&path, "started").len(), 1);
    assert_eq!(client.ok("GET", "/metrics", "").json()["block_d"]["write_count"], 5, "it goes on counting");
    let said = service.process.drain();
    assert!(!said.contains("alula firmware"), "{said}");
}

#[test]
fn what_is_typed_after_a_reset_is_for_the_new_guest() {
    let mut service = Service::running("case=serial echo end=poweroff");
    service.process.expect("alula firmware: ");
    service.client().ok("PUT", "/actions", RESET);
    service.process.expect("alula firmware: ");
    service.process.stdin.as_mut().unwrap().write_all(b"bye\n").unwrap();
    let ended = service.process.end();
    assert!(ended.code == Some(0) && ended.text.contains("powered off"), "{}", ended.text);
}

/// What a process has open, by what that is, how many mappings it has, and its threads.
fn held(pid: u32) -> (BTreeMap<String, usize>, usize, Vec<String>) {
    let mut open = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let link = fs::read_link(entry.unwrap().path()).unwrap().to_string_lossy().into_owned();
        // Sockets and pipes have numbers of their own.
        *open.entry(link.split(":[").next().unwrap().to_owned()).or_default() += 1;
    }
    let mappings = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines().count();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    // A thread may end between the two looks.
    let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).ok();
    let names = tasks.filter_map(|task| name(task.unwrap()));
    // The kernel's own come and go.
    let mut threads: Vec<String> =
        names.filter(|name| !name.starts_with("iou-") && !name.starts_with("kvm-")).collect();
    threads.sort();
    (open, mappings, threads)
}

/// A service that may make a TAP interface, and has one of each device; not started.
fn full(pci: bool) -> Service {
    let service = Service::start(if pci { &["--enable-pci"] } else { &[] });
    let mut client = service.client();
    let path = |name: &str| service.folder.path(name);
    client.ok(
        "PUT",
        "/machine-config",
        r#"{"vcpu_count": 2, "mem_size_mib": 64, "track_dirty_pages": true}"#,
    );
    for (id, engine) in [("a", "Async"), ("b", "Sync")] {
        let disk = json!({
            "drive_id": id, "path_on_host": service.folder.write(id, vec![0; 1 << 20]), "is_root_device": false,
            "io_engine": engine, "num_queues": 2, "threads": if id == "a" { 2 } else { 0 }
        });
        client.ok("PUT", &format!("/drives/{id}"), &disk.to_string());
    }
    let net = json!({ "iface_id": "n", "host_dev_name": if pci { "pci0" } else { "mmio0" } });
    client.ok("PUT", "/network-interfaces/n", &net.to_string());
    client.ok("PUT", "/mmds/config", r#"{"network_interfaces": ["n"]}"#);
    client.ok("PUT", "/mmds", r#"{"a": "b"}"#);
    client.ok("PUT", "/entropy", "{}");
    client.ok(
        "PUT",
        "/balloon",
        r#"{"amount_mib": 1, "deflate_on_oom": false, "stats_polling_interval_s": 1}"#,
    );
    client.ok("PUT", "/vsock", &json!({ "guest_cid": 3, "uds_path": path("v") }).to_string());
    let pmem = json!({ "id": "p", "path_on_host": service.folder.write("p", vec![0; 2 << 20]) });
    client.ok("PUT", "/pmem/p", &pmem.to_string());
    client.ok("PUT", "/serial", &json!({ "serial_out_path": path("serial") }).to_string());
    service.boot_source("case=serial,block,pmem end=idle");
    service
}

#[test]
fn resets_leave_nothing_and_keep_what_devices_have() {
    network::enter();
    for (pci, last) in [(false, 31), (true, 6)] {
        let service = full(pci);
        let (mut client, pid) = (service.client(), service.process.child.id());
        client.ok("PUT", "/actions", START);
        let serial = service.folder.path("serial");
        let boots = || fs::read_to_string(&serial).unwrap().matches("3 cases, 0 failed").count();
        let tap = || output("ip", &["-o", "link", "show", if pci { "pci0" } else { "mmio0" }]).stdout;
        let vsock = || service.folder.path("v").symlink_metadata().unwrap().ino();
        wait_for(|| boots() == 1);
        // Which path is a disk's by now does not matter: the one that is open is the disk.
        fs::rename(service.folder.path("b"), service.folder.path("c")).unwrap();
        let patch = r#"{"drive_id": "a", "rate_limiter": {"ops": {"size": 100000, "refill_time": 1}}}"#;
        client.ok("PATCH", "/drives/a", patch);
        let (tap_before, vsock_before) = (tap(), vsock());
        let mut before = None;
        for number in 2..=last {
            let program = UnixStream::connect(service.folder.path("v")).unwrap();
            client.ok("PUT", "/actions", RESET);
            drop(program);
            wait_for(|| boots() == number);
            // A paused guest's devices are at rest, and their threads have answered.
            client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
            match &before {
                // The first resets leave what is kept for later ones: stacks of threads, for example.
                _ if number < SETTLED => {}
                None => before = Some(held(pid)),
                Some(before) => assert_eq!(held(pid), *before, "after {number} boots"),
            }
        }
        client.ok("PUT", "/actions", RESET);
        wait_for(|| boots() == last + 1);
        assert!(tap() == tap_before, "the TAP interface is the one that was configured");
        assert_eq!(vsock(), vsock_before, "the socket is the one that others know");
        let config = client.ok("GET", "/vm/config", "").json();
        assert_eq!(config["drives"][0]["rate_limiter"]["ops"]["size"], 100_000);
        assert_eq!(client.ok("GET", "/balloon/statistics", "").json()["target_mib"], 1);
        assert_eq!(client.ok("GET", "/mmds", "").json(), json!({ "a": "b" }));
        // A difference of the guest that boots again is for no snapshot of the one before.
        let folder = service.folder.path("saved");
        client.ok("PUT", "/snapshot/create", &json!({ "folder": folder, "live": true }).to_string());
        client.ok("PUT", "/actions", RESET);
        wait_for(|| boots() == last + 2);
        let diff = service.folder.path("diff");
        client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
        client.ok("PUT", "/snapshot/create", &json!({ "folder": diff, "snapshot_type": "Diff" }).to_string());
        drop(client);
        let Service { process, folder: own, .. } = service;
        drop(process);
        let merge =
            run([&["snapshot", "merge"], &[&folder, &diff].map(|path| path.to_str().unwrap())[..]].concat());
        assert!(merge.code == Some(1) && merge.text.contains("of another microVM"), "{}", merge.text);
        fs::rename(own.path("c"), own.path("b")).unwrap();
        restored(&own, &folder);
    }
}

/// Restores the guest that was saved to `saved`, and resets it: it boots the kernel that its configuration names.
fn restored(own: &Folder, saved: &Path) {
    let socket = own.path("restored.socket");
    let saved = saved.to_str().unwrap();
    let mut guest = Process::start(["run", "--restore", saved, "--api-sock", socket.to_str().unwrap()]);
    wait_for(|| UnixStream::connect(&socket).is_ok());
    let mut client = Client::connect(&socket);
    wait_for(|| state(&mut client) == "Running");
    let is_mapped = |guest: &Process| {
        let maps = fs::read_to_string(format!("/proc/{}/maps", guest.child.id())).unwrap();
        maps.contains(saved)
    };
    assert!(is_mapped(&guest), "its memory is that of the file");
    client.ok("PUT", "/actions", RESET);
    guest.expect("3 cases, 0 failed");
    assert!(!is_mapped(&guest), "its memory is fresh");
}

#[test]
fn a_kernel_that_is_gone_leaves_the_guest_as_it_was() {
    let service = Service::running("case=serial end=idle");
    let mut client = service.client();
    fs::remove_file(service.folder.path("firmware")).unwrap();
    for before in ["Running", "Paused"] {
        let fault = client.request("PUT", "/actions", RESET).fault();
        let expected =
            format!("Reset error: open kernel `{}`: No such", service.folder.path("firmware").display());
        assert!(fault.starts_with(&expected), "{fault}");
        assert_eq!(state(&mut client), before);
        client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    }
    // One that is there again is the one that boots.
    service.folder.firmware();
    client.ok("PUT", "/actions", RESET);
    assert_eq!(state(&mut client), "Running");
}

#[test]
fn what_is_no_kernel_or_initrd_leaves_the_guest_as_it_was() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let initrd = service.folder.write("initrd", "its content means nothing to this guest");
    let source = json!({
        "kernel_image_path": service.folder.firmware(), "initrd_path": initrd, "boot_args": "case=serial end=idle",
    });
    client.ok("PUT", "/boot-source", &source.to_string());
    client.ok("PUT", "/actions", START);
    for (name, content, expected) in [
        ("firmware", &b"words"[..], "`: not a kernel image: expected ELF"),
        ("firmware", b"", "`: the file is empty: a kernel image is needed"),
        ("firmware", b"\x1f\x8b", if alula::arch::NAME == "x86_64" { "unpack it first" } else { "" }),
        ("initrd", b"", "`: it is empty: make it again, or leave it out"),
    ] {
        if expected.is_empty() {
            continue;
        }
        let path = service.folder.path(name);
        let before = fs::read(&path).unwrap();
        fs::write(&path, content).unwrap();
        let fault = client.request("PUT", "/actions", RESET).fault();
        assert!(fault.starts_with("Reset error: load ") && fault.contains(expected), "{name}: {fault}");
        assert_eq!(state(&mut client), "Running");
        fs::write(&path, before).unwrap();
    }
    client.ok("PUT", "/actions", RESET);
    assert_eq!(state(&mut client), "Running");
}

#[test]
fn a_machine_that_cannot_be_built_again_is_told_of_and_ends() {
    let mut service = Service::running("case=serial end=idle");
    service.process.expect("1 cases, 0 failed");
    let mut client = service.client();
    let pid = service.process.child.id();
    let size = |status: &str| {
        let line = status.lines().find(|line| line.starts_with("VmSize:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    };
    // Without the 128 MiB of the guest it fits, and with them it does not.
    let limit = size(&fs::read_to_string(format!("/proc/{pid}/status")).unwrap()) - (64 << 20);
    common::limit(pid, libc::RLIMIT_AS, limit);
    let response = client.request("PUT", "/actions", RESET);
    assert!(response.status().contains("400"), "{response:?}");
    let fault = response.fault();
    assert!(fault.starts_with("Reset error: boot the guest again: ") && fault.contains("memory"), "{fault}");
    let ended = service.process.end();
    assert_eq!(ended.code, Some(1), "{}", ended.text);
    assert!(ended.text.contains("boot the guest again: "), "{}", ended.text);
}

#[test]
fn a_user_network_goes_on_with_the_passt_it_has() {
    network::enter();
    network::add_uplink();
    let folder = Folder::new();
    let socket = folder.path("socket");
    let mut guest = Process::start([
        "run",
        "--net",
        "user",
        "--cmdline",
        "case=serial end=idle",
        "--api-sock",
        socket.to_str().unwrap(),
    ]);
    guest.expect("1 cases, 0 failed");
    let passts = network::passts(guest.child.id());
    assert_eq!(passts.len(), 1);
    for _ in 0..3 {
        Client::connect(&socket).ok("PUT", "/actions", RESET);
        guest.expect("1 cases, 0 failed");
        assert_eq!(network::passts(guest.child.id()), passts);
    }
}

#[test]
fn frames_reach_the_guest_that_boots_again() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    let wire = network::Wire::new("tap0", 0x88b5);
    let folder = Folder::new();
    let socket = folder.path("socket");
    let words = ["--cmdline", "case=net end=idle", "--api-sock", socket.to_str().unwrap()];
    let mut guest = Process::start([&["run", "--net", "tap=tap0"][..], &words].concat());
    for number in 0..3 {
        if number > 0 {
            Client::connect(&socket).ok("PUT", "/actions", RESET);
        }
        network::answer(&wire);
        guest.expect("bytes in)");
    }
}

#[test]
fn a_process_that_is_kept_within_folders_can_reset() {
    let folder = Folder::new();
    let (socket, disk) = (folder.path("socket"), folder.write("disk", [0; 4096]));
    let mut guest = Process::start([
        "run",
        folder.firmware().to_str().unwrap(),
        "--cmdline",
        "case=serial,block end=idle",
        "--disk",
        disk.to_str().unwrap(),
        "--allow",
        folder.path(".").to_str().unwrap(),
        "--api-sock",
        socket.to_str().unwrap(),
    ]);
    for _ in 0..3 {
        guest.expect("2 cases, 0 failed");
        Client::connect(&socket).ok("PUT", "/actions", RESET);
    }
    guest.expect("2 cases, 0 failed");
}
