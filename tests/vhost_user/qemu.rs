//! Disks of `qemu-storage-daemon`, with the firmware guest and the API.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command};

use super::*;
use common::{Process, Service, run};

const SIZE: usize = 8 << 20;

/// A daemon that exports an image, until it is dropped.
pub struct Daemon(Child);

impl Daemon {
    /// One that listens at `socket` and has `image`.
    pub fn start(folder: &Folder) -> Self {
        let socket = folder.path("backend");
        let _ = std::fs::remove_file(&socket);
        let blockdev = format!("driver=file,node-name=f,filename={}", folder.path("image").display());
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=f,writable=on,num-queues=2,addr.type=unix,addr.path={}",
            socket.display()
        );
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--blockdev", &blockdev, "--export", &export]);
        let child = command.spawn();
        let child = child.expect("qemu-storage-daemon is needed: `apt-get install qemu-system-common`");
        common::wait_for(|| socket.exists());
        Self(child)
    }

    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

pub fn image(place: &Place) -> Vec<u8> {
    let content: Vec<u8> =
        (0..SIZE / 4).flat_map(|word| (word as u32).wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    place.folder.write("image", &content);
    content
}

#[test]
fn a_driver_reads_and_writes_the_image_of_a_daemon() {
    let place = Place::new();
    for kind in TRANSPORTS {
        let mut content = image(&place);
        let mut daemon = Daemon::start(&place.folder);
        let mut guest = place.guest(kind, json!({ "num_queues": 2 }));
        for features in [0, F_EVENT_IDX, F_RINGS] {
            guest.start(features);
            for (queue, sector) in [(0, 0), (1, 9), (0, SIZE / SECTOR - 8)] {
                let range = sector * SECTOR..(sector + 8) * SECTOR;
                assert_eq!(
                    ask(&mut guest, queue, 0, sector as u64, &[0; 8 * SECTOR]),
                    (0, content[range.clone()].to_vec())
                );
                guest.wait_for(|guest| guest.is_interrupted(Some(queue)));
                content[range.clone()].iter_mut().for_each(|byte| *byte = byte.wrapping_add(1));
                assert_eq!(ask(&mut guest, queue, 1, sector as u64, &content[range]).0, 0);
            }
            guest.pause();
            guest.resume();
        }
        patch(&mut guest, json!({ "drive_id": "d" })).unwrap();
        let (head, status) =
            (guest.allocate(&[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), guest.allocate(&[0xff]));
        guest.request(0, &[(head, 0), (status, WRITE)]);
        assert_eq!(guest.bytes(status), [0], "a flush");
        assert!(std::fs::read(place.folder.path("image")).unwrap() == content, "{kind:?}");
        daemon.kill();
        guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
        let _again = Daemon::start(&place.folder);
        patch(&mut guest, json!({ "drive_id": "d" })).unwrap();
        guest.start(0);
        assert_eq!(ask(&mut guest, 0, 0, 0, &[0; SECTOR]), (0, content[..SECTOR].to_vec()));
    }
}

pub const TRANSPORT_WORDS: [&[&str]; 2] = [&[], &["--enable-pci"]];

#[test]
fn the_firmware_guest_has_the_disk_of_a_daemon() {
    let place = Place::new();
    let mut content = image(&place);
    let _daemon = Daemon::start(&place.folder);
    let disk = format!("socket={}", place.folder.path("backend").display());
    for transport in TRANSPORT_WORDS {
        let ended = run([&["run", "--disk", &disk, "--cmdline", "case=block"], transport].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        assert!(ended.text.contains(&format!("block: ok ({} sectors)", SIZE / SECTOR)), "{}", ended.text);
        // What the guest has written (firmware/src/devices.rs).
        (0..SECTOR).for_each(|index| content[SECTOR + index] = index as u8 ^ 0x5a);
        assert!(std::fs::read(place.folder.path("image")).unwrap() == content);
    }
}

#[test]
fn loads_go_on_after_pauses_and_resets_until_the_daemon_dies() {
    let place = Place::new();
    for transport in TRANSPORT_WORDS {
        image(&place);
        let mut daemon = Daemon::start(&place.folder);
        let (socket, events) = (place.folder.path("api"), place.folder.path("events"));
        let _ = std::fs::remove_file(&events);
        let disk = format!("socket={},id=d,queues=2", place.folder.path("backend").display());
        let words = ["run", "--api-sock", socket.to_str().unwrap(), "--events", events.to_str().unwrap()];
        let words = [&words, &["--disk", &disk, "--cmdline", "bench"][..], transport].concat();
        let mut guest = Process::start(words);
        let mut stdin = guest.stdin.take().unwrap();
        guest.expect("bench: ready");
        let mut client = common::Client::connect(&socket);
        for round in 0..3 {
            stdin.write_all(b"write 4096 64 3000\nread 4096 8 3000\n").unwrap();
            guest.expect("done 3000");
            guest.expect("done 3000");
            // With requests in flight, QEMU 7.2's daemon gives up: it leaves its queues before those are done.
            for _ in 0..10 {
                client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
                client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
                client.ok("PATCH", "/drives/d", r#"{"drive_id": "d"}"#);
            }
            if round == 1 {
                client.ok("PUT", "/actions", r#"{"action_type": "Reset"}"#);
                guest.expect("bench: ready");
            }
        }
        client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
        let snapshot =
            json!({ "snapshot_path": place.folder.path("s"), "mem_file_path": place.folder.path("m") });
        let fault = client.request("PUT", "/snapshot/create", &snapshot.to_string()).fault();
        assert!(fault.contains("memory is shared with the vhost-user backend of disk `d`"), "{fault}");
        assert!(!place.folder.path("s").exists() && !place.folder.path("m").exists());
        client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
        assert_eq!(std::fs::metadata(place.folder.path("image")).unwrap().len(), SIZE as u64);
        let told = || std::fs::read_to_string(&events).unwrap();
        assert!(!told().contains("device_error"), "{}", told());
        daemon.kill();
        common::wait_for(|| told().contains("device_error"));
        let told = told();
        let error: Value =
            serde_json::from_str(told.lines().find(|line| line.contains("device_error")).unwrap()).unwrap();
        assert_eq!((&error["device"], &error["needs_reset"]), (&json!("disk `d`"), &json!(true)));
        assert!(error["reason"].as_str().unwrap().contains("is lost"), "{error}");
        assert!(guest.is_running());
    }
}

/// A backend that reads nothing any more: its connections stay, and what is sent to them.
#[test]
fn a_daemon_that_stands_still_holds_up_no_more_than_its_disk() {
    let place = Place::new();
    image(&place);
    let daemon = Daemon::start(&place.folder);
    let socket = place.folder.path("api");
    let disk = format!("socket={},id=d", place.folder.path("backend").display());
    let words = ["run", "--api-sock", socket.to_str().unwrap(), "--disk", &disk, "--cmdline", "bench"];
    let mut guest = Process::start([&words, TRANSPORT_WORDS[1]].concat());
    let mut stdin = guest.stdin.take().unwrap();
    guest.expect("bench: ready");
    let mut use_disk = |guest: &mut Process| {
        stdin.write_all(b"write 4096 8 100\n").unwrap();
        guest.expect("done 100");
    };
    use_disk(&mut guest);
    let mut client = common::Client::connect(&socket);
    common::send(&daemon.0, libc::SIGSTOP);
    let mut is_refused = |expected: &str| {
        let fault = client.request("PATCH", "/drives/d", r#"{"drive_id": "d"}"#).fault();
        assert!(fault.contains(expected), "{fault}");
        for state in ["Paused", "Resumed"] {
            client.ok("PATCH", "/vm", &json!({ "state": state }).to_string());
        }
    };
    // The first one loses the connection that there is, and the kernel makes others for a daemon that does not look.
    is_refused("at GET_FEATURES: it does not answer in time");
    is_refused("at GET_FEATURES: it does not answer in time");
    is_refused("who listens there does not take its clients, and many wait already");
    assert!(guest.is_running());
    common::send(&daemon.0, libc::SIGCONT);
    // The daemon first takes, and loses, those that were made.
    common::wait_for(|| client.request("PATCH", "/drives/d", r#"{"drive_id": "d"}"#).status() == "204");
    client.ok("PUT", "/actions", r#"{"action_type": "Reset"}"#);
    guest.expect("bench: ready");
    use_disk(&mut guest);
}

/// What of a process's memory is files in memory, as the kernel lists it.
fn memory_files(process: u32) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    maps.lines().filter(|line| line.contains("/memfd:")).count()
}

#[test]
fn guest_memory_is_shared_where_a_disk_needs_that_and_nowhere_else() {
    let place = Place::new();
    image(&place);
    place.folder.write("other", [0; SECTOR]);
    let _daemon = Daemon::start(&place.folder);
    let drive = |path: &str, place: &Path| {
        json!({ "drive_id": "d", "is_root_device": false, path: place }).to_string()
    };
    for (path, name, expected) in [("path_on_host", "other", 0), ("socket", "backend", 1)] {
        let service = Service::start(&[]);
        let mut client = service.client();
        client.ok("PUT", "/drives/d", &drive(path, &place.folder.path(name)));
        // A PATCH of the same path is the same connection: a daemon serves one.
        client.ok("PUT", "/drives/d", &drive(path, &place.folder.path(name)));
        if expected > 0 {
            let told = client.ok("GET", "/vm/config", "").json();
            assert_eq!(told["drives"][0]["socket"], json!(place.folder.path(name)));
            service.boot_source("end=idle");
            let hotplug = client.request("PUT", "/hotplug/memory", r#"{"total_size_mib": 1024}"#).fault();
            assert!(hotplug.contains("cannot be shared with the vhost-user backend"), "{hotplug}");
            client.ok(
                "PUT",
                "/machine-config",
                r#"{"vcpu_count": 1, "mem_size_mib": 64, "huge_pages": "2M"}"#,
            );
            let fault = client.request("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#).fault();
            assert!(fault.contains("cannot be of huge pages of 2 MiB: say `None`"), "{fault}");
            client.ok("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 64}"#);
        }
        service.boot_source("end=idle");
        client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
        assert_eq!(memory_files(service.process.child.id()), expected, "{path}");
    }
}
