//! The guest's watchdog: what becomes of a guest that leaves it alone, and of one that stands still.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::time::Instant;

use alula::arch;
use alula::config::Config;
use alula::machine::Exit;
use common::suspend::{self, Screen, Suspended};
use common::{Folder, Service, run, wait_for};
use serde_json::Value;

/// A guest that feeds its watchdog, stops it, begins it once more, and goes on without it.
const LEAVES_IT: &str = "case=watchdog end=idle";

#[test]
fn a_guest_whose_watchdog_expires_is_ended() {
    // A guest that has halted for good is left to its watchdog.
    for words in [LEAVES_IT, "case=watchdog end=halt"] {
        let ended = run(["run", "--watchdog", "poweroff", "--cmdline", words]);
        assert_eq!(ended.code, Some(124), "{}", ended.text);
        assert!(ended.text.contains("watchdog: ok (new)"), "{}", ended.text);
        assert!(ended.text.contains("alula: the guest's watchdog expired\n"), "{}", ended.text);
    }
}

#[test]
fn a_guest_without_a_watchdog_finds_none() {
    let ended = run(["run", "--cmdline", "case=watchdog"]);
    assert!(ended.text.contains("expected a watchdog, found none"), "{}", ended.text);
}

/// A service whose guest's watchdog does this, and the file of its events.
fn service(action: &str) -> (Service, Folder, impl Fn() -> Vec<Value>) {
    let folder = Folder::new();
    let path = folder.path("events");
    let service = Service::start(&["--events", path.to_str().unwrap()]);
    let machine = format!(r#"{{"vcpu_count": 1, "mem_size_mib": 16, "watchdog": "{action}"}}"#);
    service.client().ok("PUT", "/machine-config", &machine);
    service.boot_source(LEAVES_IT);
    service.client().ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    let events = move || {
        let text = std::fs::read_to_string(&path).unwrap();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    };
    (service, folder, events)
}

#[test]
fn a_guest_whose_watchdog_expires_boots_again_and_learns_why() {
    let (mut service, _folder, events) = service("reset");
    let second = if arch::HAS_CPUID { "has expired before" } else { "new" };
    for how in ["new", second, second] {
        service.process.expect(&format!("watchdog: ok ({how})"));
    }
    let told: Vec<Value> = events();
    let ours = |event: &&Value| ["watchdog_expired", "restarted"].map(Value::from).contains(&event["event"]);
    let told: Vec<_> =
        told.iter().filter(ours).map(|event| [&event["event"], &event["action"], &event["reason"]]).collect();
    let expected = [["watchdog_expired", "reset", ""], ["restarted", "", "watchdog"]].concat();
    let told = told.concat().into_iter().map(|word| word.as_str().unwrap_or_default());
    assert!(told.eq(expected.iter().chain(&expected).copied()), "{:?}", events());
}

#[test]
fn a_watchdog_that_does_nothing_is_told_of_once() {
    let (mut service, _folder, events) = service("none");
    service.process.expect("watchdog: ok (new)");
    let told = || events().iter().filter(|event| event["event"] == "watchdog_expired").count();
    wait_for(|| told() == 1);
    // The guest is not reset, and goes on.
    let mut client = service.client();
    assert_eq!(client.ok("GET", "/", "").json()["state"], "Running");
    assert_eq!(client.ok("GET", "/machine-config", "").json()["watchdog"], "none");
    assert_eq!(told(), 1);
}

#[test]
fn a_guest_that_stands_still_keeps_its_time_also_in_another_machine() {
    let text = r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 16, "watchdog": "reset"}}"#;
    let mut config = Config::parse(text.as_bytes()).unwrap();
    config.firmware_words = Some(LEAVES_IT.to_owned());
    let screen = Screen::default();
    let mut machine = suspend::boot(&config, &screen);
    wait_for(|| screen.text().contains("1 cases, 0 failed"));
    let left = |machine: &alula::machine::Machine| {
        let countdown = machine.watchdog().unwrap().lock();
        (countdown.ends_at(), countdown.left(Instant::now()))
    };
    assert!(left(&machine).0.is_some());
    machine.pause().unwrap();
    let stood = left(&machine);
    assert_eq!(stood.0, None);
    let suspended = Suspended::new(machine);
    let before = Instant::now();
    let machine = suspended.go_on(&screen);
    let end = left(&machine).0.unwrap();
    // The time that has passed since counts only from the moment on in which the guest goes on.
    assert!((before + stood.1..=Instant::now() + stood.1).contains(&end), "{stood:?}");
    assert!(machine.exit().is_none());
    machine.end(Exit::WatchdogExpired);
    assert_eq!(machine.exit(), Some(Exit::WatchdogExpired));
}

#[test]
fn an_action_that_there_is_not_is_refused_with_those_that_there_are() {
    let service = Service::start(&[]);
    let body = r#"{"vcpu_count": 1, "mem_size_mib": 16, "watchdog": "stop"}"#;
    let fault = service.client().request("PUT", "/machine-config", body).fault();
    for word in ["`watchdog`", "`stop`", "reset", "poweroff", "none"] {
        assert!(fault.contains(word), "{fault}");
    }
    let ended = run(["run", "--watchdog", "stop"]);
    assert_eq!(ended.code, Some(153), "{}", ended.text);
    assert!(ended.text.contains("--watchdog stop: expected `reset`, `poweroff` or `none`"), "{}", ended.text);
}
