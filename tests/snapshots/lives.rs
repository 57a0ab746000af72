//! Lives of microVMs, one after the other: nothing of one is left when the next one begins.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::json;

use super::PAUSE;
use super::template::Template;
use crate::common::{Folder, Process, Service, await_child, network, wait_for};

const TERM: i32 = libc::SIGTERM;
/// What a template's memory of its own may grow by while it makes clones: the buffers of its allocator.
const GROWTH_MAX_KIB: u64 = 64;
/// So many lives a template has behind it when its memory is first looked at.
const WARM: usize = 2;

/// How many lives there are; the long series has 2,000.
fn lives() -> usize {
    std::env::var("ALULA_TEST_LIVES").map_or(4, |count| count.parse().unwrap())
}

/// All that a microVM may have made outside of its process: files, interfaces, and processes that have the folder's
/// name on their command line.
fn left(folder: &Path) -> BTreeSet<String> {
    let mut all: BTreeSet<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path().display().to_string()).collect();
    // The interfaces of this thread's network.
    let links = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    all.extend(
        links.lines().filter_map(|line| Some(format!("interface {}", line.split_once(':')?.0.trim()))),
    );
    let name = folder.display().to_string();
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let process = entry.ok()?.path();
        let words = fs::read(process.join("cmdline")).ok()?;
        String::from_utf8_lossy(&words).contains(&name).then(|| process.display().to_string())
    });
    all.extend(processes);
    all
}

/// Descriptors of a process, and its memory that nobody else has, in KiB.
fn holdings(process: u32) -> (usize, u64) {
    let descriptors = fs::read_dir(format!("/proc/{process}/fd")).unwrap().count();
    let rollup = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Anonymous:")).unwrap();
    (descriptors, line.trim().trim_end_matches(" kB").parse().unwrap())
}

/// A service in a folder, with the paths of what it is told to use.
fn service(folder: &Folder, machine: &serde_json::Value) -> Service {
    let service = Service::start(&["--log-path", folder.path("log").to_str().unwrap()]);
    let mut client = service.client();
    for (path, body) in machine.as_object().unwrap() {
        client.ok("PUT", path, &body.to_string());
    }
    service
}

fn end(mut service: Service) {
    service.process.send(TERM);
    let ended = service.process.end();
    assert_eq!(ended.code, Some(128 + TERM), "{}", ended.text);
    assert!(!service.socket.exists());
}

/// Configured, booted, paused, saved, ended; restored in another process, and ended again.
fn live(folder: &Folder) {
    let [state, memory, vsock] = ["state", "memory", "vsock"].map(|name| folder.path(name));
    let machine = json!({
        "/machine-config": { "vcpu_count": 1, "mem_size_mib": 64 },
        "/drives/a": { "drive_id": "a", "path_on_host": folder.path("disk"), "is_root_device": false },
        "/network-interfaces/n": { "iface_id": "n", "host_dev_name": "lives0" },
        "/vsock": { "guest_cid": 3, "uds_path": vsock },
        "/entropy": {},
        "/boot-source": {
            "kernel_image_path": folder.path("firmware"), "boot_args": "case=serial,block end=idle"
        },
    });
    let mut saved = service(folder, &machine);
    let mut client = saved.client();
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    saved.process.expect("2 cases, 0 failed");
    client.ok("PATCH", "/vm", PAUSE);
    let create = json!({ "snapshot_path": state, "mem_file_path": memory });
    client.ok("PUT", "/snapshot/create", &create.to_string());
    drop(client);
    end(saved);
    let restored = service(folder, &json!({}));
    let mut client = restored.client();
    let backend = json!({ "backend_type": "File", "backend_path": memory });
    let load = json!({ "snapshot_path": state, "mem_backend": backend, "resume_vm": true });
    client.ok("PUT", "/snapshot/load", &load.to_string());
    assert_eq!(client.ok("GET", "/", "").json()["state"], "Running");
    drop(client);
    end(restored);
    for file in ["state", "memory", "log"] {
        fs::remove_file(folder.path(file)).unwrap();
    }
}

#[test]
fn of_many_lives_nothing_is_left() {
    network::enter();
    let folder = Folder::new();
    folder.write("disk", vec![0; 1 << 20]);
    folder.firmware();
    let before = left(&folder.0);
    for life in 0..lives() {
        live(&folder);
        assert_eq!(left(&folder.0), before, "life {life}");
    }
}

#[test]
fn guests_of_one_snapshot_have_vsock_sockets_of_their_own() {
    let folder = Folder::new();
    folder.firmware();
    // As a guest that was started for a command has it, whose monitor has a folder of its own at runtime.
    let gone = folder.path("alula/alula-1");
    fs::create_dir_all(&gone).unwrap();
    let machine = json!({
        "/machine-config": { "vcpu_count": 1, "mem_size_mib": 64 },
        "/vsock": { "guest_cid": 3, "uds_path": gone.join("vsock") },
        "/boot-source": { "kernel_image_path": folder.path("firmware"), "boot_args": "case=serial end=idle" },
    });
    let mut saved = service(&folder, &machine);
    let mut client = saved.client();
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    saved.process.expect("1 cases, 0 failed");
    client.ok("PUT", "/snapshot/create", &json!({ "folder": folder.path("saved") }).to_string());
    drop(client);
    end(saved);
    fs::remove_dir_all(&gone).unwrap();
    let restore = |more: &[&str]| {
        let words = ["run", "--restore", folder.path("saved").to_str().unwrap()].map(str::to_owned);
        Process::start(words.iter().map(String::as_str).chain(more.iter().copied()))
    };
    let named = folder.path("named");
    let mut guests = [restore(&[]), restore(&[]), restore(&["--vsock", named.to_str().unwrap()])];
    let own = |process: &Process| folder.path(&format!("alula/alula-{}", process.child.id()));
    wait_for(|| {
        [own(&guests[0]).join("vsock"), own(&guests[1]).join("vsock"), named.clone()]
            .iter()
            .all(|path| path.exists())
    });
    assert!(!own(&guests[2]).exists());
    guests.iter_mut().for_each(|guest| guest.send(TERM));
    for guest in guests {
        let own = own(&guest);
        assert_eq!(guest.end().code, Some(128 + TERM));
        assert!(!own.exists(), "{} is left", own.display());
    }
    assert!(!named.exists());
}

#[test]
fn a_template_of_many_lives_stays_as_it_was() {
    let mut template = Template::new(&[]);
    let mut client = template.client();
    let (process, mut before) = (template.process.child.id(), None);
    for life in 0..lives() {
        let body = template.order("one", &json!({ "resume_vm": true }));
        let clone = template.make(&mut client, &body);
        assert_eq!(await_child(clone).0, Some(0));
        // The file of the clone's socket went with the clone.
        assert!(!template.path("one.sock").exists());
        for file in ["one.console", "one.qcow2"] {
            fs::remove_file(template.path(file)).unwrap();
        }
        // Whatever it answers, the template has done all that came before.
        client.request("GET", "/", "");
        let now = holdings(process);
        if life >= WARM {
            let (descriptors, memory) = *before.get_or_insert(now);
            assert_eq!(now.0, descriptors, "life {life}");
            assert!(now.1 <= memory + GROWTH_MAX_KIB, "life {life}: {memory} KiB, then {} KiB", now.1);
        }
    }
    // Who was waited for must not be ended again.
    template.clones.clear();
}
