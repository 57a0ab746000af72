//! CPUs that come and go while the guest runs, aarch64, with a guest that switches CPUs on and off as it is told by what is
//! typed, whether it has been given them or not.

use std::io::Write;

use super::cpus::{count, events, patch, running, threads, to_start};
use super::hold_back::can_hold_back;
use super::*;

const CASE: &str = "cpus=1 case=cpu-slots";

/// Has the guest do what these letters say, which ends with `said`.
fn ask(service: &mut Service, typed: &str, said: &str) {
    type_in(service, typed);
    service.process.expect(said);
}

fn type_in(service: &mut Service, typed: &str) {
    service.process.stdin.as_mut().unwrap().write_all(typed.as_bytes()).unwrap();
}

#[test]
fn a_host_that_cannot_hold_cpus_back_says_so() {
    if can_hold_back() {
        return;
    }
    let service = to_start(CASE, 1);
    let fault = service.client().request("PUT", "/actions", START).fault();
    let expected = "`max_vcpus` (--max-cpus): the host's kernel cannot hold CPUs back from a guest, which takes KVM's SMCCC \
                    filter (since Linux 6.4): leave it out";
    assert!(fault.contains(expected), "{fault}");
}

#[test]
fn a_cpu_can_be_switched_on_while_the_guest_has_it() {
    if !can_hold_back() {
        return;
    }
    let mut service = running(CASE, 3);
    let mut client = service.client();
    for (typed, said) in [("1", "CPU 1: denied"), ("0", "CPU 0: already on"), ("3", "CPU 3: no such CPU")] {
        ask(&mut service, typed, said);
    }
    assert_eq!(threads(&service), 1);
    patch(&mut client, 2);
    for (typed, said) in [("1", "CPU 1: on"), ("1", "CPU 1: already on"), ("2", "CPU 2: denied")] {
        ask(&mut service, typed, said);
    }
    // The guest has the CPU until it switches the CPU off.
    patch(&mut client, 1);
    ask(&mut service, "1", "CPU 1: already on");
    assert_eq!(count(&mut client), 2);
    ask(&mut service, "o", "the others are off");
    wait_for(|| count(&mut client) == 1);
    ask(&mut service, "1", "CPU 1: denied");
    // One that is off goes at once, while the guest stands still, too; it comes again as after a reset.
    patch(&mut client, 3);
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    patch(&mut client, 2);
    assert_eq!(count(&mut client), 2);
    patch(&mut client, 3);
    client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    ask(&mut service, "1", "CPU 1: on");
    // Two CPUs switch on the same one, while all are stopped now and then.
    type_in(&mut service, "s");
    for state in ["Paused", "Resumed"].into_iter().cycle().take(20) {
        client.ok("PATCH", "/vm", &json!({ "state": state }).to_string());
    }
    service.process.expect("storm: ok");
    ask(&mut service, "2", "CPU 2: on");
    ask(&mut service, "o", "the others are off");
    // A CPU that begins where no memory is holds up no other CPU, and can be taken away like any.
    ask(&mut service, "b", "CPU 2 begins nowhere: on");
    ask(&mut service, "2", "CPU 2: already on");
    patch(&mut client, 1);
    wait_for(|| count(&mut client) == 2);
    client.ok("PUT", "/actions", r#"{"action_type": "Reset"}"#);
    assert_eq!(count(&mut client), 1);
    ask(&mut service, "1", "CPU 1: denied");
    let expected = [
        ("cpus_plugged", 2),
        ("cpus_asked_to_go", 1),
        ("cpus_gone", 1),
        ("cpus_plugged", 3),
        ("cpus_asked_to_go", 2),
        ("cpus_gone", 2),
        ("cpus_plugged", 3),
        ("cpus_asked_to_go", 1),
        ("cpus_gone", 2),
        ("cpus_gone", 1),
    ];
    assert_eq!(events(&service, 10), expected.map(|(event, count)| (event.to_owned(), count)));
}

#[test]
fn a_restored_guest_has_its_cpus_on_and_off_as_before() {
    if !can_hold_back() {
        return;
    }
    let mut service = running(CASE, 4);
    let mut client = service.client();
    patch(&mut client, 3);
    ask(&mut service, "1", "CPU 1: on");
    // The guest is asked for two: one that is on, and one that was never on, which goes at once.
    patch(&mut client, 1);
    assert_eq!(count(&mut client), 2);
    // The guest is saved while it runs, and paused; the second one goes on in a machine that was made ahead.
    let folders = [(); 2].map(|()| common::Folder::new());
    client.ok("PUT", "/snapshot/create", &json!({ "folder": folders[0].0, "live": true }).to_string());
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    client.ok("PUT", "/snapshot/create", &json!({ "folder": folders[1].0 }).to_string());
    for (folder, options) in folders.iter().zip([&[][..], &["--warm", "cpus=4,memory=64M"]]) {
        let mut restored = Service::start(options);
        let mut client = restored.client();
        client.ok("PUT", "/snapshot/load", &json!({ "folder": folder.0, "resume_vm": true }).to_string());
        assert_eq!(count(&mut client), 2);
        for (typed, said) in [("1", "CPU 1: already on"), ("2", "CPU 2: denied"), ("o", "the others are off")]
        {
            ask(&mut restored, typed, said);
        }
        wait_for(|| count(&mut client) == 1);
        patch(&mut client, 4);
        for (typed, said) in [("1", "CPU 1: on"), ("s", "storm: ok"), ("3", "CPU 3: on")] {
            ask(&mut restored, typed, said);
        }
    }
}
