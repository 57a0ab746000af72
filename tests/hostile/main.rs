//! Snapshots that are not as they should be, and snapshots whose making is cut off: whatever a state or a memory file
//! says, a load is an error or makes a guest that runs or dies alone.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "../common/mod.rs"]
mod common;
mod crash;
mod handlers;
mod kept;
mod memory;
mod merge;
mod states;

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use common::{Folder, Process, Service};
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: common::allocator::Peaking = common::allocator::Peaking;

const PAUSE: &str = r#"{"state": "Paused"}"#;
const GO_ON: &str = r#"{"state": "Resumed"}"#;

/// A snapshot of a guest with a disk, an entropy device, a vsock device, a port, a watchdog, and where that can be, CPUs to
/// come, which waits for a line. Its first process is gone.
struct Snapshot {
    folder: Folder,
}

impl Snapshot {
    fn new(extra: &[&str]) -> Self {
        let (folder, service) = running(extra);
        Self::of(folder, &service)
    }

    /// The snapshot, in `folder`, of the guest of this service.
    fn of(folder: Folder, service: &Service) -> Self {
        let mut client = service.client();
        client.ok("PATCH", "/vm", PAUSE);
        let body = json!({ "snapshot_path": folder.path("state"), "mem_file_path": folder.path("memory") });
        client.ok("PUT", "/snapshot/create", &body.to_string());
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path(name)
    }

    /// The body of a request that loads it, with `more` fields.
    fn load(&self, more: &Value) -> String {
        let memory = json!({ "backend_type": "File", "backend_path": self.path("memory") });
        let mut body = json!({ "snapshot_path": self.path("state"), "mem_backend": memory });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body.to_string()
    }

    fn refuse(&self, service: &Service, more: &Value, expected: &str) {
        let fault = service.client().request("PUT", "/snapshot/load", &self.load(more)).fault();
        assert!(fault.contains(expected), "{more}: {fault}");
    }

    /// Loads it as it is, and sees that the guest does all that it has to do.
    fn go_on(&self, mut service: Service) {
        service.client().ok("PUT", "/snapshot/load", &self.load(&json!({ "resume_vm": true })));
        type_line(&mut service.process);
        let ended = service.process.end();
        assert!(ended.code == Some(0) && ended.text.contains(" cases, 0 failed"), "{}", ended.text);
    }
}

fn type_line(process: &mut Process) {
    // A process that has ended by itself takes no more.
    let _ = process.stdin.as_mut().unwrap().write_all(b"go on\n");
}

/// A service whose guest waits for a line, and the folder of its files.
fn running(extra: &[&str]) -> (Folder, Service) {
    running_with(extra, "echo", &json!({}))
}

/// A service whose guest has these words, and whose machine `more` is said of.
fn running_with(extra: &[&str], words: &str, more: &Value) -> (Folder, Service) {
    let folder = Folder::new();
    folder.write("disk", vec![7; 1 << 20]);
    let mut service = Service::start(extra);
    let mut client = service.client();
    let mut machine = json!({ "vcpu_count": 2, "mem_size_mib": 64, "watchdog": "reset" });
    if alula::arch::HAS_CPUID {
        machine["max_vcpus"] = json!(3);
    }
    machine.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    client.ok("PUT", "/machine-config", &machine.to_string());
    client.ok("PUT", "/entropy", "{}");
    let port = json!({ "id": "port", "uds_path": folder.path("port") });
    client.ok("PUT", "/ports/port", &port.to_string());
    let vsock = json!({ "guest_cid": 3, "uds_path": folder.path("vsock") });
    client.ok("PUT", "/vsock", &vsock.to_string());
    let disk = json!({ "drive_id": "disk", "is_root_device": false, "path_on_host": folder.path("disk") });
    client.ok("PUT", "/drives/disk", &disk.to_string());
    service.boot_source(words);
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    service.process.expect("alula firmware");
    (folder, service)
}

/// The events of a file of `--events`.
fn events(path: &PathBuf) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
