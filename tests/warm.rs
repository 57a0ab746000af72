//! `alula serve --warm`: what a guest needs of KVM is there before anybody asks for it.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::process::Command;

use common::{Client, Folder, Process, Service, alula, run, wait_for};
use serde_json::{Value, json};

const WORDS: &str = "echo cpus=2 memory=64 case=cpus,memory end=7";
const WARM: &[&str] = &["--warm", "cpus=2,memory=64M"];

/// The vCPU threads of a service: their ids.
fn vcpus(service: &Service) -> BTreeSet<u32> {
    let tasks = fs::read_dir(format!("/proc/{}/task", service.process.child.id())).unwrap();
    let mut found = BTreeSet::new();
    for path in tasks.map(|task| task.unwrap().path()) {
        // A thread may have ended meanwhile.
        if fs::read_to_string(path.join("comm")).is_ok_and(|name| name.starts_with("vcpu")) {
            found.insert(path.file_name().unwrap().to_str().unwrap().parse().unwrap());
        }
    }
    found
}

/// A service that has prepared for a guest like this, and its threads for that.
fn warm(options: &[&str], cpus: usize) -> (Service, BTreeSet<u32>) {
    let service = Service::start(options);
    // A thread names itself after it has begun.
    wait_for(|| vcpus(&service).len() == cpus);
    let threads = vcpus(&service);
    (service, threads)
}

fn configure(service: &Service, cpus: u16, mem_size_mib: u64) {
    let machine = json!({ "vcpu_count": cpus, "mem_size_mib": mem_size_mib });
    service.client().ok("PUT", "/machine-config", &machine.to_string());
    service.boot_source(WORDS);
}

fn start(service: &Service) {
    service.client().ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
}

/// Types the line that the guest waits for; it finds the machine that it was promised, or not.
fn end(mut service: Service, expected: &str) -> String {
    service.process.stdin.as_mut().unwrap().write_all(b"go on\n").unwrap();
    let ended = service.process.end();
    assert_eq!(ended.code, Some(7), "{}", ended.text);
    assert!(ended.text.contains(expected), "{}", ended.text);
    ended.text
}

/// A guest of 2 CPUs and 64 MiB with a disk, saved in a folder.
fn saved() -> (Folder, Value) {
    let folder = Folder::new();
    let disk = folder.write("disk", vec![7; 1 << 20]);
    let mut service = Service::start(&[]);
    configure(&service, 2, 64);
    let mut client = service.client();
    let disk = json!({ "drive_id": "disk", "is_root_device": false, "path_on_host": disk });
    client.ok("PUT", "/drives/disk", &disk.to_string());
    start(&service);
    service.process.expect("alula firmware");
    client.ok("PUT", "/snapshot/create", &json!({ "folder": folder.path("saved") }).to_string());
    let load = json!({ "folder": folder.path("saved"), "resume_vm": true });
    (folder, load)
}

#[test]
fn a_warm_service_starts_and_restores_on_what_it_has_made() {
    let (_folder, load) = saved();
    for options in [WARM, &["--warm", "memory=64,cpus=2", "--enable-pci"]] {
        let (service, threads) = warm(options, 2);
        configure(&service, 2, 64);
        start(&service);
        assert_eq!(vcpus(&service), threads);
        end(service, "2 cases, 0 failed");
    }
    let (service, threads) = warm(WARM, 2);
    service.client().ok("PUT", "/snapshot/load", &load.to_string());
    assert_eq!(vcpus(&service), threads);
    let text = end(service, "2 cases, 0 failed");
    assert!(!text.contains("--warm"), "{text}");
}

#[test]
fn what_was_made_for_another_guest_is_left_with_a_word() {
    let (_folder, load) = saved();
    for (options, cpus, mem_size_mib) in [
        (["--warm", "cpus=1,memory=64M"], 1, 64),
        (["--warm", "cpus=2,memory=128M"], 2, 128),
        (["--warm", "cpus=3,memory=1G"], 3, 1024),
    ] {
        for loads in [false, true] {
            let (service, threads) = warm(&options, cpus);
            if loads {
                service.client().ok("PUT", "/snapshot/load", &load.to_string());
            } else {
                configure(&service, 2, 64);
                start(&service);
            }
            // Nothing of it is left.
            wait_for(|| vcpus(&service).len() == 2);
            assert!(vcpus(&service).is_disjoint(&threads));
            let expected = format!(
                "the guest has 2 CPUs and 64 MiB, and what was prepared (--warm) is for {cpus} and {mem_size_mib}"
            );
            let text = end(service, "2 cases, 0 failed");
            assert!(text.contains(&expected), "{text}");
        }
    }
}

#[test]
fn a_parked_guest_has_all_that_it_needs_to_go_on() {
    let (_folder, mut load) = saved();
    load["resume_vm"] = json!(false);
    for options in [&[][..], WARM] {
        let service = Service::start(options);
        let mut client = service.client();
        client.ok("PUT", "/snapshot/load", &load.to_string());
        wait_for(|| vcpus(&service).len() == 2);
        let threads = vcpus(&service);
        client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
        assert_eq!(vcpus(&service), threads);
        end(service, "2 cases, 0 failed");
    }
}

#[test]
fn a_restore_asks_for_nothing_that_the_state_says() {
    let (folder, _) = saved();
    let trace = folder.path("trace");
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-e", "trace=ioctl,openat", "-o"]).arg(&trace).arg(alula());
    command.args(["run", "--restore"]).arg(folder.path("saved"));
    let mut process = Process::spawn(command);
    process.stdin.as_mut().unwrap().write_all(b"go on\n").unwrap();
    let ended = process.end();
    assert_eq!(ended.code, Some(7), "{}", ended.text);
    let trace = fs::read_to_string(trace).unwrap();
    assert!(trace.contains("/dev/kvm") && trace.contains("KVM_RUN"), "{trace}");
    // What the host's CPUs are, and random bytes for boot tables.
    for needless in ["KVM_GET_SUPPORTED_CPUID", "/dev/urandom"] {
        assert!(!trace.contains(needless), "{trace}");
    }
}

/// The calls by which a service with these options, under strace(1), answers this request for a load.
fn calls_of_a_load(folder: &Folder, load: &Value, options: &[&str]) -> Vec<String> {
    let (trace, socket) = (folder.path("trace"), folder.path("traced.sock"));
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-e", "trace=ioctl,openat,recvfrom", "-o"]).arg(&trace).arg(alula());
    command.args(["serve", "--api-sock"]).arg(&socket).args(options);
    let mut process = Process::spawn(command);
    // The last file that is read ahead says which boot of the host this is.
    wait_for(|| fs::read_to_string(&trace).is_ok_and(|text| text.contains("boot_id")));
    let mut client = Client::connect(&socket);
    client.ok("PUT", "/snapshot/load", &load.to_string());
    client.ok("GET", "/", "");
    process.stdin.as_mut().unwrap().write_all(b"go on\n").unwrap();
    assert_eq!(process.end().code, Some(7));
    let text = fs::read_to_string(&trace).unwrap();
    fs::remove_file(trace).unwrap();
    let calls = text.lines().skip_while(|line| !line.contains("\"PUT /snapshot/load"));
    let calls = calls.skip(1).take_while(|line| !line.contains("\"GET / "));
    calls.map(str::to_owned).collect()
}

#[test]
fn what_no_load_depends_on_is_done_before_the_first() {
    let (folder, load) = saved();
    let own = folder.path("").display().to_string();
    for (options, made) in [(&[][..], "KVM_CREATE_VM"), (WARM, "KVM_CREATE_VCPU")] {
        let calls = calls_of_a_load(&folder, &load, options);
        assert!(
            calls.iter().any(|call| call.contains("KVM_SET_MSRS") || call.contains("KVM_SET_ONE_REG")),
            "{calls:?}"
        );
        let again = calls.iter().find(|call| call.contains("KVM_CREATE_VM,") || call.contains(made));
        assert_eq!(again, None);
        let other = calls.iter().find(|call| call.contains("openat(") && !call.contains(&own));
        assert_eq!(other, None);
    }
}

#[test]
fn after_a_load_that_fails_a_service_is_as_warm_as_before() {
    let (folder, load) = saved();
    let (service, threads) = warm(WARM, 2);
    let mut client = service.client();
    let mut refuse = |body: &Value, expected: &str| {
        let fault = client.request("PUT", "/snapshot/load", &body.to_string()).fault();
        assert!(fault.contains(expected), "{fault}");
    };
    // The shell was not needed yet.
    refuse(&json!({ "folder": "/nonexistent" }), "No such file");
    assert_eq!(vcpus(&service), threads);
    // The shell was used up by a machine that came to nothing.
    fs::rename(folder.path("disk"), folder.path("away")).unwrap();
    refuse(&load, "open disk `disk`");
    wait_for(|| vcpus(&service).len() == 2);
    let others = vcpus(&service);
    assert!(others.is_disjoint(&threads));
    fs::rename(folder.path("away"), folder.path("disk")).unwrap();
    client.ok("PUT", "/snapshot/load", &load.to_string());
    assert_eq!(vcpus(&service), others);
    end(service, "2 cases, 0 failed");
}

#[test]
fn a_warm_guest_that_cannot_be_is_refused_at_once() {
    let folder = Folder::new();
    let socket = folder.path("socket");
    for (warm, code, expected) in [
        ("cpus=0,memory=64M", 1, "prepare for a guest of 0 CPUs and 64 MiB"),
        ("cpus=1,memory=64T", 1, "prepare for a guest of 1 CPUs and 67108864 MiB"),
        ("cpus=1", 153, "--warm cpus=1: expected cpus=N,memory=SIZE, as in cpus=1,memory=128M"),
    ] {
        let ended = run(["serve", "--api-sock", socket.to_str().unwrap(), "--warm", warm]);
        assert_eq!(ended.code, Some(code), "{}", ended.text);
        assert!(ended.text.contains(expected), "{}", ended.text);
        assert!(!socket.exists());
    }
}

// Other architectures have no CPUs that come.
#[cfg(target_arch = "x86_64")]
#[test]
fn what_was_made_is_for_as_many_cpus_as_there_can_be() {
    const WORDS: &str = "echo memory=64 case=memory end=7";
    let machine = |most: u16| json!({ "vcpu_count": 1, "max_vcpus": most, "mem_size_mib": 64 }).to_string();
    let (service, threads) = warm(WARM, 2);
    service.client().ok("PUT", "/machine-config", &machine(2));
    service.boot_source(WORDS);
    start(&service);
    assert_eq!(vcpus(&service), threads);
    // The second CPU, which comes, has the thread that was made for it.
    service.client().ok("PATCH", "/machine-config", r#"{"vcpu_count": 2}"#);
    assert_eq!(vcpus(&service), threads);
    let text = end(service, "1 cases, 0 failed");
    assert!(!text.contains("--warm"), "{text}");

    let (service, threads) = warm(WARM, 2);
    service.client().ok("PUT", "/machine-config", &machine(4));
    service.boot_source(WORDS);
    start(&service);
    wait_for(|| vcpus(&service).is_disjoint(&threads));
    let expected = "the guest has 4 CPUs and 64 MiB, and what was prepared (--warm) is for 2 and 64";
    let text = end(service, "1 cases, 0 failed");
    assert!(text.contains(expected), "{text}");
}
