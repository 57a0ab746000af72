//! Devices that come and go while the guest runs, with a guest that drives what it finds and lets go what it is asked
//! for, or does not.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::common::Folder;
use super::*;

const X86_64: bool = cfg!(target_arch = "x86_64");
pub const FORCE: &str = r#"{"force": true}"#;

pub fn drive(id: &str, path: &Path) -> String {
    json!({ "drive_id": id, "is_root_device": false, "path_on_host": path }).to_string()
}

/// A PCI bus; where devices come in PCIe slots, the first one does, and the others come on the bus.
pub const BUS: &[&str] = if X86_64 { &["--enable-pci"] } else { &["--enable-pci", "--pcie-slots", "1"] };

/// A service whose guest does `case` and has a disk `first` on a PCI bus.
pub fn running(case: &str) -> Service {
    let mut service = Service::start(BUS);
    let first = service.folder.write("first", [0; 4096]);
    let mut client = service.client();
    client.ok("PUT", "/drives/first", &drive("first", &first));
    service.boot_source(&format!("case={case}"));
    client.ok("PUT", "/actions", START);
    service.process.expect("slots: 1 devices");
    service
}

pub fn plug(service: &Service, id: &str) -> PathBuf {
    let path = service.folder.write(id, [0; 4096]);
    service.client().ok("PUT", &format!("/drives/{id}"), &drive(id, &path));
    path
}

/// The ids of a section's devices.
fn ids(client: &mut Client, section: &str, field: &str) -> Vec<String> {
    let config = client.ok("GET", "/vm/config", "").json();
    let devices = config[section].as_array().unwrap();
    devices.iter().map(|device| device[field].as_str().unwrap().to_owned()).collect()
}

pub fn drives(client: &mut Client) -> Vec<String> {
    ids(client, "drives", "drive_id")
}

/// Takes a device away that the guest uses.
pub fn take(service: &Service, path: &str) {
    let mut client = service.client();
    if X86_64 {
        client.ok("DELETE", path, "");
    } else {
        let fault = client.request("DELETE", path, "").fault();
        assert!(fault.contains("is in use, and the guest cannot be asked"), "{fault}");
        client.ok("DELETE", path, FORCE);
    }
}

/// The request that loads the snapshot in `folder` and has its guest go on.
pub fn load(folder: &Folder) -> String {
    let load = json!({
        "snapshot_path": folder.path("state"),
        "mem_backend": { "backend_type": "File", "backend_path": folder.path("memory") },
        "resume_vm": true,
    });
    load.to_string()
}

/// How many of the process's descriptors are this file.
pub fn count_open(service: &Service, path: &Path) -> usize {
    let files = std::fs::read_dir(format!("/proc/{}/fd", service.process.child.id())).unwrap();
    files.flatten().filter(|file| std::fs::read_link(file.path()).is_ok_and(|to| to == path)).count()
}

/// The next of the events that are about devices which come or go.
pub struct Events(BufReader<UnixStream>);

impl Events {
    pub fn of(service: &Service) -> Self {
        let mut client = service.client();
        client.send("GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n");
        client.receive();
        Self(BufReader::new(client.stream))
    }

    pub fn expect(&mut self, event: &str, device: &str) -> Value {
        loop {
            let mut line = String::new();
            assert!(self.0.read_line(&mut line).unwrap() > 0, "no {event} of {device} came");
            let found: Value = serde_json::from_str(&line).unwrap();
            if ["device_plugged", "device_asked_to_go", "device_gone"]
                .contains(&found["event"].as_str().unwrap())
            {
                assert_eq!((&found["event"], &found["device"]), (&json!(event), &json!(device)));
                return found;
            }
        }
    }
}

#[test]
fn devices_come_and_go_while_the_guest_runs() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    let mut service = running("slots");
    let (mut client, mut events) = (service.client(), Events::of(&service));
    let second = plug(&service, "second");
    service.process.expect("slots: 2 devices");
    events.expect("device_plugged", "disk `second`");
    assert_eq!(drives(&mut client), ["first", "second"]);
    let limit =
        json!({ "drive_id": "second", "rate_limiter": { "ops": { "size": 100, "refill_time": 10 } } });
    client.ok("PATCH", "/drives/second", &limit.to_string());
    assert!(client.ok("GET", "/metrics", "").json()["block_second"].is_object());
    let interface = json!({ "iface_id": "n", "host_dev_name": "tap0" }).to_string();
    client.ok("PUT", "/network-interfaces/n", &interface);
    service.process.expect("slots: 3 devices");
    assert_eq!(ids(&mut client, "network-interfaces", "iface_id"), ["n"]);
    let file = service.folder.write("file", vec![0; 2 << 20]);
    client.ok("PUT", "/pmem/p", &json!({ "id": "p", "path_on_host": file }).to_string());
    service.process.expect("slots: 4 devices");
    assert_eq!(ids(&mut client, "pmem", "id"), ["p"]);
    for device in ["network interface `n`", "pmem device `p`"] {
        events.expect("device_plugged", device);
    }
    let reason = if X86_64 { "guest" } else { "DELETE" };
    let devices = [
        ("/network-interfaces/n", "network interface `n`", 3),
        ("/drives/second", "disk `second`", 2),
        ("/pmem/p", "pmem device `p`", 1),
    ];
    for (path, name, left) in devices {
        take(&service, path);
        service.process.expect(&format!("slots: {left} devices"));
        if X86_64 {
            events.expect("device_asked_to_go", name);
        }
        assert_eq!(events.expect("device_gone", name)["reason"], reason);
        let fault = client.request("DELETE", path, "").fault();
        assert!(fault.ends_with(&format!(" config error: Device not found: there is no {name}")), "{fault}");
    }
    assert_eq!((count_open(&service, &second), count_open(&service, &file)), (0, 0));
    assert_eq!(drives(&mut client), ["first"]);
    // Each can come again.
    client.ok("PUT", "/network-interfaces/n", &interface);
    service.process.expect("slots: 2 devices");
}

/// The way round a user network that comes too late.
const BY_TAP: &str = "no program is started once the guest has run: give the interface a TAP (`host_dev_name`), or the \
                      descriptors of one (`fd:N`)";

/// An interface that the guest has already.
const NET_TWICE: &str = r#"{"iface_id": "n", "host_dev_name": "tap0"}"#;
/// A port that the guest has already, and the words for that: ports have no PATCH that would change it.
const PORT_TWICE: &str = r#"{"id": "port", "uds_path": "other"}"#;
const IS_THERE: &str = "Device ID in use: the guest has port `port`: take it away first (DELETE)";

#[test]
fn what_cannot_come_or_go_is_refused_and_changes_nothing() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    let service = Service::start(&["--enable-pci"]);
    let first = service.folder.write("first", [0; 4096]);
    let mut client = service.client();
    let root = json!({ "drive_id": "first", "is_root_device": true, "path_on_host": first });
    client.ok("PUT", "/drives/first", &root.to_string());
    client.ok("PUT", "/network-interfaces/n", NET_TWICE);
    client.ok("PUT", "/mmds/config", r#"{"network_interfaces": ["n"]}"#);
    let port = json!({ "id": "port", "uds_path": service.folder.path("port") });
    client.ok("PUT", "/ports/port", &port.to_string());
    let early = client.request("DELETE", "/drives/first", "").fault();
    assert_eq!(early, "The requested operation is not supported before starting the microVM.");
    service.boot_source("hello");
    client.ok("PUT", "/actions", START);
    let before = client.ok("GET", "/vm/config", "").json();
    let other = service.folder.write("other", [0; 4096]);
    let sealed = BlockDevice::read_only(&other);
    let second_root = json!({ "drive_id": "r", "is_root_device": true, "path_on_host": other }).to_string();
    let none = drive("d", Path::new("/nonexistent"));
    let net = |name: &str| json!({ "iface_id": "m", "host_dev_name": name }).to_string();
    for (method, path, body, expected) in [
        (
            "PUT",
            "/drives/first",
            &*drive("first", &other),
            "Device ID in use: the guest has disk `first`: change",
        ),
        ("PUT", "/ports/port", PORT_TWICE, IS_THERE),
        ("PUT", "/network-interfaces/n", NET_TWICE, "Device ID in use: the guest has network interface `n`"),
        ("PUT", "/drives/r", &second_root, "a guest that runs has booted already: no"),
        (
            "PUT",
            "/drives/s",
            r#"{ "drive_id": "s", "is_root_device": false, "socket": "/nonexistent" }"#,
            "needs memory that is shared with it from the start",
        ),
        ("PUT", "/drives/d", &none, "`/nonexistent`: No such file"),
        ("PUT", "/drives/d", &drive("d", &first), "is in use"),
        ("PUT", "/drives/d", &drive("d", &sealed.path), "the device cannot be written: `is_read_only`"),
        ("PUT", "/network-interfaces/m", &net("tap0"), "tap0"),
        ("PUT", "/network-interfaces/u", r#"{"iface_id": "u", "user": {}}"#, BY_TAP),
        ("PUT", "/entropy", "{}", "not supported after starting"),
        (
            "DELETE",
            "/drives/first",
            FORCE,
            "Cannot unplug root device: the guest has booted from disk `first`",
        ),
        ("DELETE", "/drives/d", "", "Drive config error: Device not found: there is no disk `d`"),
        ("DELETE", "/network-interfaces/n", FORCE, "is where the guest asks for its metadata"),
        ("DELETE", "/network-interfaces/n", r#"{"forced": true}"#, "unknown field `forced`"),
        ("DELETE", "/entropy", "", "Invalid request method and/or path: DELETE entropy."),
    ] {
        let fault = client.request(method, path, body).fault();
        assert!(fault.contains(expected), "{method} {path} {body}: {fault}");
        assert_eq!(client.ok("GET", "/vm/config", "").json(), before, "{method} {path} {body}");
    }
    // The bridge, the disk, the interface, the port, and 28 more.
    let body = |id: &str| json!({ "drive_id": id, "is_root_device": false, "is_read_only": true, "path_on_host": other });
    for number in 0..28 {
        let id = format!("d{number}");
        client.ok("PUT", &format!("/drives/{id}"), &body(&id).to_string());
    }
    let fault = client.request("PUT", "/drives/full", &body("full").to_string()).fault();
    assert!(fault.contains("the PCI bus has no free place: there can be 31 devices on it"), "{fault}");
    client.ok("DELETE", "/drives/d7", "");
    client.ok("PUT", "/drives/full", &body("full").to_string());
}

#[test]
fn a_guest_that_never_answers_keeps_its_device_and_holds_up_nobody() {
    let mut service = running("slots-deaf");
    let (mut client, mut events) = (service.client(), Events::of(&service));
    let path = plug(&service, "second");
    service.process.expect("slots: 2 devices");
    events.expect("device_plugged", "disk `second`");
    if X86_64 {
        for _ in 0..2 {
            client.ok("DELETE", "/drives/second", "");
            service.process.expect("slots: asked for 2");
            events.expect("device_asked_to_go", "disk `second`");
        }
    }
    assert_eq!(drives(&mut client), ["first", "second"]);
    assert_eq!(count_open(&service, &path), 1);
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    client.ok("DELETE", "/drives/second", FORCE);
    service.process.expect("slots: 1 devices");
    assert_eq!(events.expect("device_gone", "disk `second`")["reason"], "DELETE");
    assert_eq!(count_open(&service, &path), 0);
    // A reset ends the wait for a guest that does not answer.
    plug(&service, "third");
    service.process.expect("slots: 2 devices");
    events.expect("device_plugged", "disk `third`");
    if X86_64 {
        client.ok("DELETE", "/drives/third", "");
        events.expect("device_asked_to_go", "disk `third`");
        client.ok("PUT", "/actions", r#"{"action_type": "Reset"}"#);
        assert_eq!(events.expect("device_gone", "disk `third`")["reason"], "reset");
        service.process.expect("slots: 1 devices");
    }
}

#[test]
fn a_device_that_nobody_drives_goes_at_once() {
    let service = Service::start(&["--enable-pci"]);
    service.boot_source("case=serial end=idle");
    let mut client = service.client();
    client.ok("PUT", "/actions", START);
    let path = plug(&service, "d");
    assert_eq!(count_open(&service, &path), 1);
    client.ok("DELETE", "/drives/d", "");
    assert_eq!(count_open(&service, &path), 0);
    assert!(drives(&mut client).is_empty());
    // In a guest that stands still, too.
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    plug(&service, "d");
    client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    client.ok("DELETE", "/drives/d", "");
    assert!(drives(&mut client).is_empty());
}

// Other architectures have no register for it.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_guest_that_lets_everything_go_loses_what_was_asked_for() {
    let mut service = running("slots-hostile");
    let mut client = service.client();
    for round in 0..10 {
        plug(&service, "second");
        service.process.expect("slots: 2 devices");
        assert_eq!(drives(&mut client), ["first", "second"], "{round}");
        client.ok("DELETE", "/drives/second", "");
        service.process.expect("slots: 1 devices");
        wait_for(|| drives(&mut client) == ["first"]);
    }
}

#[test]
fn what_came_and_went_is_in_a_snapshot_and_in_a_reset() {
    let mut service = running("slots");
    let mut client = service.client();
    for (id, count) in [("a", 2), ("b", 3)] {
        plug(&service, id);
        service.process.expect(&format!("slots: {count} devices"));
    }
    client.ok("DELETE", "/drives/a", FORCE);
    service.process.expect("slots: 2 devices");
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    let files = json!({ "snapshot_path": "state", "mem_file_path": "memory" }).to_string();
    client.ok("PUT", "/snapshot/create", &files);
    let saved = client.ok("GET", "/vm/config", "").json();
    client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    client.ok("PUT", "/actions", r#"{"action_type": "Reset"}"#);
    service.process.expect("slots: 2 devices");
    assert_eq!(drives(&mut client), ["first", "b"]);
    let Service { mut process, folder, .. } = service;
    process.send(libc::SIGTERM);
    process.end();

    let mut other = Service::start(&["--enable-pci"]);
    let mut client = other.client();
    client.ok("PUT", "/snapshot/load", &load(&folder));
    assert_eq!(client.ok("GET", "/vm/config", "").json()["drives"], saved["drives"]);
    // The guest finds its devices where they were: nothing has come or gone. One comes in the place that was left.
    plug(&other, "c");
    assert!(other.process.expect("slots: 3 devices").contains("slots: 3 devices"));
    take(&other, "/drives/b");
    other.process.expect("slots: 2 devices");
    wait_for(|| drives(&mut client) == ["first", "c"]);
}

/// However a disk does its work, by whichever pace, it goes at once, and what the guest was told is written is so.
#[test]
fn what_was_acknowledged_of_a_torn_disk_is_in_its_file() {
    let mut service = Service::start(BUS);
    service.boot_source("case=slots-busy");
    let mut client = service.client();
    client.ok("PUT", "/actions", START);
    let image = service.folder.write("d", [0; 4096]);
    let slow = json!({ "ops": { "size": 3, "refill_time": 3_600_000 } });
    for more in [
        json!({ "io_engine": "Sync" }),
        json!({ "io_engine": "Async" }),
        json!({ "io_engine": "Sync", "rate_limiter": slow }),
        json!({ "io_engine": "Async", "rate_limiter": slow }),
    ] {
        std::fs::write(&image, [0; 4096]).unwrap();
        let mut body = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": image });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        client.ok("PUT", "/drives/d", &body.to_string());
        service.process.expect("slots: writes");
        let enough = if more["rate_limiter"].is_null() { 100 } else { 3 };
        wait_for(|| {
            client.ok("GET", "/metrics", "").json()["block_d"]["write_count"].as_u64().unwrap() >= enough
        });
        client.ok("DELETE", "/drives/d", FORCE);
        let said = service.process.expect("slots: acknowledged");
        let numbers = said.split_once("acknowledged ").unwrap().1.split_whitespace();
        let numbers: Vec<u64> = numbers.map(|number| number.parse().unwrap()).collect();
        assert!(numbers.len() == 4 && numbers.iter().sum::<u64>() >= enough, "{more}: {said}");
        let written = std::fs::read(&image).unwrap();
        for (number, sector) in numbers.into_iter().zip(written.chunks(512)) {
            // A request that was in flight has no answer, whether it is written or not.
            let found = u64::from_le_bytes(sector[..8].try_into().unwrap());
            assert!((number..=number + 1).contains(&found), "{more}: {found}, {said}");
            assert!(sector.chunks(8).all(|bytes| bytes == &sector[..8]), "{more}: a part of a sector");
        }
        assert_eq!(count_open(&service, &image), 0);
    }
    assert_eq!(client.ok("GET", "/", "").json()["state"], "Running");
}

/// A process that was not started here, but is a child of this one, and ends with the test.
struct Ending(u32);

impl Drop for Ending {
    fn drop(&mut self) {
        common::send_to(self.0, libc::SIGKILL);
        common::await_child(self.0);
    }
}

#[test]
fn a_clone_of_a_template_has_what_came() {
    let mut service = running("slots");
    let mut client = service.client();
    let second = plug(&service, "second");
    service.process.expect("slots: 2 devices");
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    let saved = service.folder.path("saved");
    client.ok("PUT", "/snapshot/create", &json!({ "folder": saved }).to_string());
    let Service { mut process, folder, .. } = service;
    process.send(libc::SIGTERM);
    process.end();

    let socket = folder.path("template");
    let words = ["template", saved.to_str().unwrap(), "--api-sock", socket.to_str().unwrap()];
    let _template = Process::start(words);
    wait_for(|| socket.exists());
    let copy = folder.write("copy", [1; 4096]);
    let body = json!({
        "id": "one",
        "api_sock": folder.path("one"),
        "serial": { "serial_out_path": folder.path("console") },
        "drive_overrides": [{ "drive_id": "second", "path_on_host": copy }],
        "resume_vm": true,
    });
    let clone = Client::connect(&socket).ok("PUT", "/clones", &body.to_string()).json();
    let _clone = Ending(clone["pid"].as_u64().unwrap() as u32);
    let mut client = Client::connect(&folder.path("one"));
    assert_eq!(drives(&mut client), ["first", "second"]);
    let says = |text: &str| {
        wait_for(|| std::fs::read_to_string(folder.path("console")).is_ok_and(|said| said.contains(text)));
    };
    // One device goes, and another one comes in its place.
    client.ok("DELETE", "/drives/second", FORCE);
    says("slots: 1 devices");
    client.ok("PUT", "/drives/second", &drive("second", &second));
    says("slots: 2 devices");
    assert_eq!(drives(&mut client), ["first", "second"]);
}

#[test]
fn a_thousand_devices_that_came_and_went_leave_nothing() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    let service = Service::start(BUS);
    service.boot_source("case=serial end=idle");
    let mut client = service.client();
    client.ok("PUT", "/actions", START);
    let path = service.folder.write("d", [0; 4096]);
    let drive =
        json!({ "drive_id": "d", "is_root_device": false, "path_on_host": path, "threads": 1 }).to_string();
    let net = json!({ "iface_id": "n", "host_dev_name": "tap0" }).to_string();
    let process = service.process.child.id();
    let count = |what: &str| std::fs::read_dir(format!("/proc/{process}/{what}")).unwrap().count();
    let own = || {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap()
    };
    let mut round = || {
        client.ok("PUT", "/drives/d", &drive);
        client.ok("PUT", "/network-interfaces/n", &net);
        client.ok("DELETE", "/drives/d", "");
        client.ok("DELETE", "/network-interfaces/n", FORCE);
    };
    // What is made once, like the events that were kept, is made by then.
    (0..100).for_each(|_| round());
    let before = [count("fd"), count("task"), own()];
    (0..400).for_each(|_| round());
    // A thread ends a moment after it was told to.
    wait_for(|| count("fd") <= before[0] && count("task") <= before[1]);
    assert!(own() < before[2] + 256, "{before:?}, then {}", own());
}

#[test]
fn slots_are_refused_where_no_machine_has_them() {
    for (words, expected) in [
        (
            &["--pcie-slots", "1"][..],
            if X86_64 { "ACPI has a slot for every device" } else { "give --enable-pci" },
        ),
        (
            &["--enable-pci", "--pcie-slots", "16"],
            if X86_64 { "leave it out" } else { "room for 15 slots at most" },
        ),
    ] {
        for command in ["run", "serve"] {
            let ended = common::run([&[command][..], words].concat());
            assert!(
                ended.code == Some(125) || ended.code == Some(1),
                "{command}: {:?} {}",
                ended.code,
                ended.text
            );
            let option = words[words.len() - 2..].join(" ");
            assert!(ended.text.contains(&format!("{option}: ")), "{command}: {}", ended.text);
            assert!(ended.text.contains(expected), "{command}: {}", ended.text);
        }
    }
}
