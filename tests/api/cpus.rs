//! CPUs that come and go while the guest runs; on x86_64, with a guest that tries to start those that it has not been given,
//! and lets go all, asked or not.

use std::io::{BufRead, BufReader};

use super::*;

pub fn patch(client: &mut Client, count: u16) {
    client.ok("PATCH", "/machine-config", &json!({ "vcpu_count": count }).to_string());
}

pub fn count(client: &mut Client) -> u64 {
    client.ok("GET", "/machine-config", "").json()["vcpu_count"].as_u64().unwrap()
}

/// A service whose guest has one of `most` CPUs, and does `case`.
pub fn running(case: &str, most: u16) -> Service {
    let service = to_start(case, most);
    service.client().ok("PUT", "/actions", START);
    service
}

/// A service whose guest is to start.
pub fn to_start(case: &str, most: u16) -> Service {
    let service = Service::start(&[]);
    let machine = json!({ "vcpu_count": 1, "max_vcpus": most, "mem_size_mib": 64 });
    service.client().ok("PUT", "/machine-config", &machine.to_string());
    service.boot_source(case);
    service
}

/// The first `count` events of CPUs: each with how many the guest has, or is to have.
pub fn events(service: &Service, count: usize) -> Vec<(String, u64)> {
    let mut client = service.client();
    client.send("GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n");
    client.receive();
    let lines = BufReader::new(client.stream).lines();
    let events = lines.map(|line| serde_json::from_str::<serde_json::Value>(&line.unwrap()).unwrap());
    let events =
        events.map(|event| (event["event"].as_str().unwrap().to_owned(), event["vcpu_count"].as_u64()));
    let of_cpus = events.filter(|(event, _)| event.starts_with("cpus_"));
    of_cpus.map(|(event, cpus)| (event, cpus.unwrap())).take(count).collect()
}

/// The threads of the process that run CPUs.
pub fn threads(service: &Service) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", service.process.child.id())).unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names.filter(|name| name.starts_with("vcpu")).count()
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_cpu_runs_from_when_it_is_given_to_when_it_is_let_go() {
    let mut service = running("cpus=1 case=cpu-slots", 3);
    let mut client = service.client();
    service.process.expect("CPU 1 does not start");
    assert_eq!(threads(&service), 1);
    // The guest has let go what it was not asked for.
    assert_eq!(count(&mut client), 1);
    for (to, come) in [(2, 1), (3, 2)] {
        patch(&mut client, to);
        assert_eq!(count(&mut client), u64::from(to));
        service.process.expect(&format!("CPU {come} has come"));
    }
    patch(&mut client, 3);
    for (to, gone) in [(2, 2), (1, 1)] {
        patch(&mut client, to);
        service.process.expect(&format!("CPU {gone} has gone"));
        wait_for(|| count(&mut client) == u64::from(to));
    }
    // One comes and goes while the guest stands still.
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    patch(&mut client, 2);
    assert_eq!(count(&mut client), 2);
    client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    service.process.expect("CPU 1 has come");
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    patch(&mut client, 1);
    assert_eq!(count(&mut client), 2);
    client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    service.process.expect("CPU 1 has gone");
    wait_for(|| count(&mut client) == 1);
    let expected = [
        ("cpus_plugged", 2),
        ("cpus_plugged", 3),
        ("cpus_asked_to_go", 2),
        ("cpus_gone", 2),
        ("cpus_asked_to_go", 1),
        ("cpus_gone", 1),
        ("cpus_plugged", 2),
        ("cpus_asked_to_go", 1),
        ("cpus_gone", 1),
    ];
    assert_eq!(events(&service, 9), expected.map(|(event, count)| (event.to_owned(), count)));
}

#[test]
fn how_many_cpus_cannot_be_is_refused_and_changes_nothing() {
    if !hold_back::can_hold_back() {
        return;
    }
    let service = running("hello", 3);
    let mut client = service.client();
    let before = client.ok("GET", "/machine-config", "").json();
    for (body, expected) in [
        (
            r#"{"vcpu_count": 4}"#,
            "Machine config error: `max_vcpus` (--max-cpus): the guest can have at most 3 CPUs, and 4",
        ),
        (r#"{"vcpu_count": 0}"#, "must be greater than 0"),
        (
            r#"{"vcpu_count": 2, "mem_size_mib": 128}"#,
            "once the guest has started, `vcpu_count` alone can be changed",
        ),
        (r#"{"mem_size_mib": 128}"#, "`vcpu_count` alone can be changed"),
        (r#"{"max_vcpus": 8}"#, "`vcpu_count` alone can be changed"),
        (r#"{"vcpu_count": "2"}"#, "`vcpu_count`"),
    ] {
        let fault = client.request("PATCH", "/machine-config", body).fault();
        assert!(fault.contains(expected), "{body}: {fault}");
        assert_eq!(client.ok("GET", "/machine-config", "").json(), before, "{body}");
    }
    assert_eq!(threads(&service), 1);
    let told = |words: &[&str]| {
        run([&["ctl", "--api-sock", service.socket.to_str().unwrap(), "cpus"], words].concat()).text
    };
    assert_eq!(told(&[]).trim(), "max_vcpus: 3\nvcpu_count: 1");
    assert_eq!(told(&["2"]).trim(), "the guest has 2 CPUs");
    // This guest hears of nothing: it keeps what it has until it is reset. One that was never switched on has gone.
    let (answer, left) = match cfg!(target_arch = "x86_64") {
        true => ("the guest was asked to let 1 CPU go", 2),
        false => ("the guest has 1 CPU", 1),
    };
    assert_eq!(told(&["1"]).trim(), answer);
    assert_eq!(count(&mut client), left);
    client.ok("PUT", "/actions", r#"{"action_type": "Reset"}"#);
    assert_eq!(count(&mut client), 1);
    // A thread names itself after it has begun.
    wait_for(|| threads(&service) == 1);
    let expected = [("cpus_plugged", 2), ("cpus_asked_to_go", 1), ("cpus_gone", 1)];
    assert_eq!(events(&service, 3), expected.map(|(event, count)| (event.to_owned(), count)));
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_restored_guest_has_its_cpus_and_gets_more() {
    let mut service = running("cpus=1 case=cpu-slots", 3);
    let mut client = service.client();
    service.process.expect("CPU 1 does not start");
    patch(&mut client, 2);
    service.process.expect("CPU 1 has come");
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    let folder = common::Folder::new();
    let body = json!({ "folder": folder.0 }).to_string();
    client.ok("PUT", "/snapshot/create", &body);
    let mut restored = Service::start(&[]);
    let mut client = restored.client();
    client.ok("PUT", "/snapshot/load", &json!({ "folder": folder.0, "resume_vm": true }).to_string());
    assert_eq!(count(&mut client), 2);
    wait_for(|| threads(&restored) == 2);
    patch(&mut client, 3);
    restored.process.expect("CPU 2 has come");
    patch(&mut client, 1);
    for number in [1, 2] {
        restored.process.expect(&format!("CPU {number} has gone"));
    }
    wait_for(|| count(&mut client) == 1);
}
