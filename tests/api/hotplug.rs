//! Memory hotplug, as clients ask for it, with a guest that does what is requested.

use super::*;

const PATH: &str = "/hotplug/memory";
const CONFIG: &str = r#"{"total_size_mib": 512}"#;
const BEFORE: &str = "The requested operation is not supported before starting the microVM.";
const AFTER: &str = "The requested operation is not supported after starting the microVM.";

fn requested(mib: u64) -> String {
    json!({ "requested_size_mib": mib }).to_string()
}

/// Waits until so much is plugged.
fn wait_until_plugged(client: &mut Client, mib: u64) {
    wait_for(|| client.ok("GET", PATH, "").json()["plugged_size_mib"] == mib);
}

/// The memory that a process has of its own, in MiB.
fn own(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
}

#[test]
fn memory_that_can_be_plugged_is_told_back() {
    let service = Service::start(&[]);
    let mut client = service.client();
    for (method, body) in [("GET", ""), ("PATCH", &*requested(0))] {
        assert_eq!(client.request(method, PATH, body).fault(), BEFORE, "{method}");
    }
    assert_eq!(client.ok("GET", "/vm/config", "").json()["memory-hotplug"], json!(null));
    client.ok("PUT", PATH, CONFIG);
    let told = json!({ "total_size_mib": 512, "block_size_mib": 2, "slot_size_mib": 128 });
    assert_eq!(client.ok("GET", "/vm/config", "").json()["memory-hotplug"], told);
    for (body, expected) in [
        (r#"{"total_size_mib": 100}"#, "Total size must not be lower than slot size (128 MiB)"),
        (r#"{"total_size_mib": 256, "block_size_mib": 3}"#, "Block size must be a power of 2"),
        (r#"{"total_size_mib": 4294967295}"#, "Total size must be a multiple of slot size (128 MiB)"),
        (r#"{"total_size_mib": 4294967168}"#, "33554431 slots, and a guest at most 4096"),
    ] {
        let fault = client.request("PUT", PATH, body).fault();
        assert!(fault.starts_with("Memory hotplug config error: ") && fault.contains(expected), "{fault}");
    }
    let fault = client.request("PUT", PATH, r#"{"slot_size_mib": 128}"#).fault();
    assert!(fault.contains("missing field `total_size_mib`"), "{fault}");
    // The refused requests have changed nothing.
    assert_eq!(client.ok("GET", "/vm/config", "").json()["memory-hotplug"], told);
    let counted = client.ok("GET", "/metrics", "").json();
    let puts = &counted["put_api_requests"];
    assert_eq!((&puts["hotplug_memory_count"], &puts["hotplug_memory_fails"]), (&json!(6), &json!(5)));
}

#[test]
fn a_guest_that_does_not_drive_memory_hotplug_is_not_asked() {
    let mut service = Service::start(&[]);
    let mut client = service.client();
    client.ok("PUT", PATH, CONFIG);
    service.boot_source("case=serial end=idle");
    client.ok("PUT", "/actions", START);
    service.process.expect("1 cases, 0 failed");
    let told = json!({
        "total_size_mib": 512, "block_size_mib": 2, "slot_size_mib": 128, "plugged_size_mib": 0,
        "requested_size_mib": 0,
    });
    assert_eq!(client.ok("GET", PATH, "").json(), told);
    for (size, expected) in [
        (128, "Device is not active"),
        (513, "Size 537919488 is invalid: it must be a multiple of block size and less than the total size"),
        (1024, "(`requested_size_mib`: 1024, with blocks of 2 MiB and 512 MiB in all)"),
    ] {
        let fault = client.request("PATCH", PATH, &requested(size)).fault();
        assert!(fault.starts_with("Memory hotplug update error: ") && fault.contains(expected), "{fault}");
    }
    assert_eq!(client.request("PUT", PATH, CONFIG).fault(), AFTER);
    assert_eq!(client.ok("GET", PATH, "").json(), told);
}

#[test]
fn plugged_memory_comes_goes_and_is_in_snapshots() {
    let mut service = Service::start(&[]);
    let mut client = service.client();
    // Where the host's policy gives huge pages, a guest that touches a byte of each block has all of it.
    client.ok("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 128, "huge_pages": "Never"}"#);
    client.ok("PUT", PATH, CONFIG);
    service.boot_source("case=hotplug end=idle");
    client.ok("PUT", "/actions", START);
    service.process.expect("hotplug: waits");
    let before = own(service.process.child.id());
    client.ok("PATCH", PATH, &requested(300));
    service.process.expect("hotplug: 150 blocks of 150");
    wait_until_plugged(&mut client, 300);
    // What the guest unplugs is the host's again, and only two of three slots are left.
    client.ok("PATCH", PATH, &requested(132));
    service.process.expect("hotplug: 66 blocks of 66");
    let told = run(["ctl", "--api-sock", service.socket.to_str().unwrap(), "hotplug-memory"]);
    assert!(told.text.contains("132"), "{}", told.text);
    let after = own(service.process.child.id());
    assert!(after <= before + 8, "{after} MiB, {before} before");
    let folder = service.folder.path("saved");
    let diff = json!({ "folder": folder, "snapshot_type": "Diff", "live": true }).to_string();
    let fault = client.request("PUT", "/snapshot/create", &diff).fault();
    assert!(fault.contains("(`/hotplug/memory`): save all of it (`Full`)"), "{fault}");
    // A guest that goes on meanwhile is saved as one that stands still.
    client.ok("PUT", "/snapshot/create", &json!({ "folder": folder, "live": true }).to_string());
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    let [state, memory] = ["state", "memory"].map(|name| service.folder.path(name));
    let files = json!({ "snapshot_path": state, "mem_file_path": memory });
    client.ok("PUT", "/snapshot/create", &files.to_string());
    assert_eq!(std::fs::metadata(&memory).unwrap().len(), (128 + 256) << 20);
    client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    client.ok("PATCH", PATH, &requested(0));
    service.process.expect("1 cases, 0 failed");
    let counted = client.ok("GET", "/metrics", "").json()["memory_hotplug"].clone();
    assert_eq!((&counted["plug_count"], &counted["unplug_count"]), (&json!(150), &json!(150)));
    assert_eq!(counted["plug_bytes"], 300 << 20);
    for fails in ["plug_fails", "unplug_fails", "unplug_discard_fails", "queue_event_fails", "event_fails"] {
        assert_eq!(counted[fails], 0, "{counted}");
    }
    let whole = json!({ "folder": folder, "resume_vm": true });
    let backend = json!({ "backend_type": "File", "backend_path": memory });
    let files = json!({ "snapshot_path": state, "mem_backend": backend, "resume_vm": true });
    for load in [whole.clone(), files] {
        let mut clone = Service::start(&[]);
        let mut client = clone.client();
        client.ok("PUT", "/snapshot/load", &load.to_string());
        wait_until_plugged(&mut client, 132);
        client.ok("PATCH", PATH, &requested(2));
        clone.process.expect("hotplug: 1 blocks of 1");
        if load != whole {
            continue;
        }
        // A clone is saved and restored as the first one is, with other memory than it came with.
        client.ok("PATCH", PATH, &requested(260));
        clone.process.expect("hotplug: 130 blocks of 130");
        let again = clone.folder.path("again");
        client.ok("PUT", "/snapshot/create", &json!({ "folder": again, "live": true }).to_string());
        client.ok("PATCH", PATH, &requested(0));
        clone.process.expect("1 cases, 0 failed");
        let mut second = Service::start(&[]);
        let mut client = second.client();
        client.ok("PUT", "/snapshot/load", &json!({ "folder": again, "resume_vm": true }).to_string());
        wait_until_plugged(&mut client, 260);
        client.ok("PATCH", PATH, &requested(0));
        second.process.expect("1 cases, 0 failed");
    }
}

/// The most time on a processor, in nanoseconds, that the monitor may take to plug 1 GiB: block by block, as drivers ask.
const GIBIBYTE_MAX: u64 = 20_000_000;

/// The time on a processor that the threads of a process have had, but for its guest's CPUs, in nanoseconds.
fn time_of_monitor(process: u32) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let time = |thread: std::fs::DirEntry| {
        let read = |file: &str| std::fs::read_to_string(thread.path().join(file)).unwrap();
        let is_cpu = read("comm").starts_with("vcpu");
        if is_cpu { 0 } else { read("schedstat").split(' ').next().unwrap().parse::<u64>().unwrap() }
    };
    threads.map(|thread| time(thread.unwrap())).sum()
}

#[test]
fn a_gibibyte_is_plugged_in_little_time_of_the_monitor() {
    let mut service = Service::start(&[]);
    let mut client = service.client();
    // Where the host's policy gives huge pages, a guest that touches a byte of each block has all of it.
    client.ok("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 128, "huge_pages": "Never"}"#);
    client.ok("PUT", PATH, r#"{"total_size_mib": 1024}"#);
    service.boot_source("case=hotplug end=idle");
    client.ok("PUT", "/actions", START);
    service.process.expect("hotplug: waits");
    let process = service.process.child.id();
    let mut plug = || {
        let before = time_of_monitor(process);
        client.ok("PATCH", PATH, &requested(1024));
        service.process.expect("hotplug: 512 blocks of 512");
        let taken = time_of_monitor(process) - before;
        println!("1 GiB is plugged in {} us of the monitor", taken / 1000);
        assert_eq!(client.ok("GET", PATH, "").json()["plugged_size_mib"], 1024);
        // One block stays: a guest that is to have none ends.
        client.ok("PATCH", PATH, &requested(2));
        service.process.expect("hotplug: 1 blocks of 1");
        taken
    };
    // Other programs of this machine may cost one of the rounds time.
    let taken = (0..3).map(|_| plug()).min().unwrap();
    // An emulated machine is slow.
    assert!(taken > 0 && (std::env::var_os("ALULA_RIG").is_some() || taken < GIBIBYTE_MAX), "{taken} ns");
}

#[test]
fn readers_of_events_hear_of_memory_that_was_requested() {
    let mut service = Service::start(&[]);
    let mut client = service.client();
    client.ok("PUT", PATH, CONFIG);
    service.boot_source("case=hotplug end=poweroff");
    client.ok("PUT", "/actions", START);
    service.process.expect("hotplug: waits");
    let reader = UnixStream::connect(&service.socket).unwrap();
    use std::io::Write;
    (&reader).write_all(b"GET /events HTTP/1.1\r\n\r\n").unwrap();
    for (size, blocks) in [(256, "128 blocks of 128"), (0, "ok")] {
        client.ok("PATCH", PATH, &requested(size));
        service.process.expect(blocks);
    }
    let mut told = String::new();
    (&reader).read_to_string(&mut told).unwrap();
    let place = |text: &str| told.find(text).unwrap_or_else(|| panic!("no `{text}` in {told}"));
    let device = r#""device_changed","device":"memory hotplug device","change":{"requested_size_mib":"#;
    let order = [
        place(&format!("{device}256}}")),
        place(r#""memory_resized","plugged_mib":256"#),
        place(&format!("{device}0}}")),
        place(r#""memory_resized","plugged_mib":0"#),
    ];
    assert!(order.is_sorted(), "{told}");
    assert_eq!(told.matches("memory_resized").count(), 2, "{told}");
}
