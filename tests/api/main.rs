//! The control API over its real socket, with the firmware guest on real KVM.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod balloon;
#[path = "../common/mod.rs"]
mod common;
mod config;
#[cfg(target_arch = "aarch64")]
mod cpu_power;
mod cpus;
mod files;
mod firecracker;
mod guest;
#[path = "../common/hold_back.rs"]
mod hold_back;
mod hotplug;
mod metadata;
#[cfg(target_arch = "aarch64")]
mod pcie;
mod plugging;
mod pmem;
mod ports;
mod requests;
mod socket;

use std::io::Read;
use std::os::unix::net::UnixStream;

use common::loopback::BlockDevice;
use common::{Client, Process, Service, network, output, run, wait_for};
use serde_json::json;

const START: &str = r#"{"action_type": "InstanceStart"}"#;

#[test]
fn a_client_boots_pauses_and_resumes_a_guest() {
    let mut service = Service::start(&["--id", "vm-1"]);
    let mut client = service.client();
    let instance = client.ok("GET", "/", "").json();
    assert_eq!((&instance["id"], &instance["state"]), (&json!("vm-1"), &json!("Not started")));
    assert_eq!(client.ok("GET", "/version", "").json(), json!({ "firecracker_version": "1.17.0" }));
    client.ok("PUT", "/machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 64}"#);
    service.boot_source("cpus=2 memory=64 end=idle");
    let start = client.ok("PUT", "/actions", START);
    assert_eq!(start.head, "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n");
    service.process.expect("8 cases, 0 failed");
    for (state, told) in
        [("Paused", "Paused"), ("Paused", "Paused"), ("Resumed", "Running"), ("Resumed", "Running")]
    {
        client.ok("PATCH", "/vm", &json!({ "state": state }).to_string());
        assert_eq!(client.ok("GET", "/", "").json()["state"], told);
    }
    let config = client.ok("GET", "/vm/config", "").json();
    assert_eq!(config["machine-config"]["mem_size_mib"], 64);
    assert_eq!(config["boot-source"]["boot_args"], "cpus=2 memory=64 end=idle");
}

#[test]
fn a_paused_guest_says_nothing_until_it_is_resumed() {
    let mut service = Service::running("case=serial echo end=idle");
    service.process.expect("alula firmware");
    let mut client = service.client();
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    use std::io::Write;
    service.process.stdin.as_mut().unwrap().write_all(b"typed while paused\n").unwrap();
    // Requests are answered one after the other, so time has passed for the main loop.
    for _ in 0..20 {
        client.ok("GET", "/", "");
    }
    assert_eq!(service.process.drain(), "");
    client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    service.process.expect("typed while paused");
}

#[test]
fn a_guest_that_was_run_answers_on_its_socket_too() {
    let folder = common::Folder::new();
    let socket = folder.path("s");
    let mut guest = common::Process::start([
        "run",
        "--id",
        "r",
        "--api-sock",
        socket.to_str().unwrap(),
        "--cmdline",
        "hello",
    ]);
    guest.expect("A");
    let mut client = Client::connect(&socket);
    assert_eq!(client.ok("GET", "/", "").json()["state"], "Running");
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    guest.send(libc::SIGTERM);
    assert_eq!(guest.end().code, Some(128 + libc::SIGTERM));
    assert!(!socket.exists());
}

#[test]
fn what_is_allowed_depends_on_the_start() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let before = "The requested operation is not supported before starting the microVM.";
    let after = "The requested operation is not supported after starting the microVM.";
    let cad = r#"{"action_type": "SendCtrlAltDel"}"#;
    assert_eq!(client.request("PATCH", "/vm", r#"{"state": "Paused"}"#).fault(), before);
    assert_eq!(client.request("PUT", "/actions", cad).fault(), before);
    assert!(client.request("PUT", "/actions", START).fault().contains("without kernel configuration"));
    service.boot_source("hello");
    client.ok("PUT", "/actions", START);
    let boot = json!({ "kernel_image_path": "/none" }).to_string();
    for (method, path, body) in [
        ("PUT", "/actions", START),
        ("PUT", "/boot-source", boot.as_str()),
        ("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 2}"#),
        ("PATCH", "/machine-config", r#"{"vcpu_count": 1}"#),
    ] {
        assert_eq!(client.request(method, path, body).fault(), after, "{method} {path}");
    }
    match std::env::consts::ARCH {
        "x86_64" => drop(client.ok("PUT", "/actions", cad)),
        _ => assert_eq!(
            client.request("PUT", "/actions", cad).fault(),
            "SendCtrlAltDel does not supported on aarch64."
        ),
    }
}

#[test]
fn a_failed_start_can_be_mended_and_tried_again() {
    let mut service = Service::start(&[]);
    let mut client = service.client();
    let not_a_kernel = service.folder.write("text", "this is not a kernel");
    client.ok("PUT", "/boot-source", &json!({ "kernel_image_path": not_a_kernel }).to_string());
    let fault = client.request("PUT", "/actions", START).fault();
    assert!(fault.starts_with("Start microvm error: load kernel `"), "{fault}");
    assert!(fault.contains("not a kernel image"), "{fault}");
    assert_eq!(client.ok("GET", "/", "").json()["state"], "Not started");
    service.boot_source("hello");
    client.ok("PUT", "/actions", START);
    service.process.expect("A");
}

#[test]
fn a_guest_that_floods_its_console_can_be_paused_though_nobody_reads() {
    let folder = common::Folder::new();
    let socket = folder.path("s");
    let mut command = std::process::Command::new(common::alula());
    command.args(["serve", "--api-sock", socket.to_str().unwrap()]);
    // A pipe that is never read from.
    let mut child = command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_for(|| UnixStream::connect(&socket).is_ok());
    let mut client = Client::connect(&socket);
    let body = json!({ "kernel_image_path": folder.firmware(), "boot_args": "flood" });
    client.ok("PUT", "/boot-source", &body.to_string());
    client.ok("PUT", "/actions", START);
    let pipe_is_full = || {
        let mut waiting = 0;
        use std::os::fd::AsRawFd;
        let fd = child.stdout.as_ref().unwrap().as_raw_fd();
        // SAFETY: FIONREAD writes one int.
        #[allow(unsafe_code)]
        unsafe {
            libc::ioctl(fd, libc::FIONREAD, &mut waiting)
        };
        waiting >= 60 << 10
    };
    wait_for(pipe_is_full);
    for state in ["Paused", "Resumed", "Paused"] {
        client.ok("PATCH", "/vm", &json!({ "state": state }).to_string());
    }
    let mut some = [0; 100];
    child.stdout.as_mut().unwrap().read_exact(&mut some).unwrap();
    assert!(some.starts_with(b"flood\n"), "{some:?}");
    child.kill().unwrap();
    child.wait().unwrap();
}
