//! Everything that a microVM has open has a name.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::collections::BTreeMap;

use common::{Client, Service, network, wait_for};
use serde_json::json;

/// What a process has opened itself, by number, and what that is: what it was started with is not closed
/// when a program starts (FD_CLOEXEC; proc(5) tells flags in octal).
fn opened(pid: u32) -> BTreeMap<i32, String> {
    const CLOEXEC: u32 = 0o2_000_000;
    let folder = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let entry = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        let number: i32 = path.file_name()?.to_str()?.parse().unwrap();
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
        let is_own = u32::from_str_radix(flags.trim(), 8).unwrap() & CLOEXEC != 0;
        let link = std::fs::read_link(&path).ok()?.to_string_lossy().into_owned();
        is_own.then_some((number, link))
    };
    folder.filter_map(entry).collect()
}

/// The names that the service tells of in the next line of its log about them.
fn names(service: &Service, client: &mut Client) -> BTreeMap<i32, String> {
    const MARK: &str = "open descriptors: ";
    let lines = || {
        let log = std::fs::read_to_string(service.folder.path("log")).unwrap();
        let lines = log.lines().filter_map(|line| Some(line.split_once(MARK)?.1.to_owned()));
        lines.collect::<Vec<_>>()
    };
    let before = lines().len();
    client.ok("PUT", "/actions", r#"{"action_type": "FlushMetrics"}"#);
    wait_for(|| lines().len() > before);
    let name = |text: &str| {
        let (number, name) = text.split_once(" is ").unwrap();
        (number.parse().unwrap(), name.to_owned())
    };
    lines().last().unwrap().split("; ").map(name).collect()
}

/// A service that has one of everything, not started.
fn service(folder: &common::Folder, pci: bool) -> Service {
    let path = |name: &str| folder.path(name).to_str().unwrap().to_owned();
    let (metrics, events) = (path("metrics"), path("events"));
    let mut arguments = vec!["--level", "Debug", "--metrics-path", &metrics, "--events", &events];
    if pci {
        arguments.push("--enable-pci");
    }
    let service = Service::start(&arguments);
    let mut client = service.client();
    let log = service.folder.path("log");
    client.ok("PUT", "/logger", &json!({ "log_path": log, "level": "Debug" }).to_string());
    client.ok("PUT", "/machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 64}"#);
    let limit = json!({ "ops": { "size": 1_000_000, "refill_time": 1 } });
    for (id, more) in [
        ("fast", json!({ "io_engine": "Async", "num_queues": 2, "threads": 2, "rate_limiter": limit })),
        ("plain", json!({ "is_read_only": true })),
    ] {
        let mut drive = json!({
            "drive_id": id, "path_on_host": service.folder.write(id, vec![0; 1 << 20]), "is_root_device": false
        });
        drive.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        client.ok("PUT", &format!("/drives/{id}"), &drive.to_string());
    }
    let net = json!({ "iface_id": "n", "host_dev_name": "tap0", "rx_rate_limiter": limit });
    client.ok("PUT", "/network-interfaces/n", &net.to_string());
    client.ok("PUT", "/entropy", &json!({ "rate_limiter": limit }).to_string());
    client.ok("PUT", "/vsock", &json!({ "guest_cid": 3, "uds_path": service.folder.path("v") }).to_string());
    let serial = json!({ "serial_out_path": service.folder.path("serial") });
    client.ok("PUT", "/serial", &serial.to_string());
    service.boot_source("case=block,net end=idle");
    service
}

#[test]
fn everything_that_a_machine_has_open_has_a_name() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    for pci in [false, true] {
        let folder = common::Folder::new();
        let service = service(&folder, pci);
        let (mut client, pid) = (service.client(), service.process.child.id());
        client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
        let serial = service.folder.path("serial");
        // The network's case waits some seconds for a frame that nobody sends, with its device at work.
        wait_for(|| std::fs::read_to_string(&serial).unwrap().contains("net: "));
        for paused in [false, true, false] {
            let state = if paused { "Paused" } else { "Resumed" };
            client.ok("PATCH", "/vm", &json!({ "state": state }).to_string());
            // Workers go on by themselves: what they need may be open a moment later.
            wait_for(|| {
                let names = names(&service, &mut client);
                names.keys().eq(opened(pid).keys())
            });
            let (names, opened) = (names(&service, &mut client), opened(pid));
            let is = |name: &str| {
                let number = names.iter().find(|(_, other)| *other == name);
                let number = number.unwrap_or_else(|| panic!("`{name}` is not open: {names:?}")).0;
                opened[number].clone()
            };
            for (name, expected) in [
                ("disk `fast`", "/fast"),
                ("disk `plain`", "/plain"),
                ("TAP interface `tap0`", "/dev/net/tun"),
                ("serial console", "/serial"),
                ("log", "/log"),
                ("metrics", "/metrics"),
                ("events", "/events"),
                ("KVM", "/dev/kvm"),
                ("virtual machine", "kvm-vm"),
                ("vCPU 1", "kvm-vcpu:1"),
                ("API client", "socket:"),
                ("API socket", "socket:"),
                ("event loop", "[eventpoll]"),
                ("disk `fast`, kick 1", "[eventfd]"),
            ] {
                assert!(is(name).contains(expected), "{name}: {}", is(name));
            }
        }
    }
}
