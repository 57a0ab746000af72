//! The state files in tests/states: one of each version that was ever written, by a machine of 16 MiB with a PCI bus. Of
//! the versions of aarch64, there are those since they were kept. A host can restore its own CPUs and interrupt
//! controllers alone: what a file says of all else is put into a state of this host, and restored.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use alula::arch;
use alula::carry::state_file::{self, Section};
use alula::machine::SavedMachine;
use serde_json::{Value, json};

use super::PAUSE;
use super::common::{Folder, Service, run};

/// A folder, if set: the state of the present version is written there.
const WRITE: &str = "ALULA_WRITE_STATES";

/// The files and their names: an architecture, the version of the machine's section, and that of what it holds.
const KEPT: &[(&str, &[u8])] = &[
    ("aarch64-1-1", include_bytes!("../states/aarch64-1-1")),
    ("x86_64-1-1", include_bytes!("../states/x86_64-1-1")),
];
/// The first state that was ever kept. Its version is that of those which came after it, though its machine has no VMGenID
/// and no VM clock yet, so that what its machine lacks is what tells it apart.
const FIRST: &[u8] = include_bytes!("../states/x86_64-1-1-first");
const MEMORY: u64 = 16 << 20;
const MACHINE: u16 = 1;

/// A state that this version writes.
fn written_now(folder: &Folder) -> PathBuf {
    let mut service = Service::start(&["--enable-pci"]);
    let mut client = service.client();
    client.ok("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 16}"#);
    client.ok("PUT", "/entropy", "{}");
    service.boot_source("echo case=memory");
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    service.process.expect("alula firmware");
    client.ok("PATCH", "/vm", PAUSE);
    let (state, memory) = (folder.path("now"), folder.path("memory"));
    client.ok(
        "PUT",
        "/snapshot/create",
        &json!({ "snapshot_path": state, "mem_file_path": memory }).to_string(),
    );
    state
}

/// The section of the machine in this file.
fn machine(state: &Path) -> Section {
    let (_, sections) = state_file::read(&File::open(state).unwrap(), true).unwrap();
    sections.into_iter().find(|section| section.kind == MACHINE).unwrap()
}

/// The version of the machine's section, and that of what the section holds.
fn version(state: &Path) -> (u16, u16) {
    let machine = machine(state);
    (machine.version, postcard::take_from_bytes(&machine.bytes).unwrap().0)
}

fn saved(state: &Path) -> SavedMachine {
    SavedMachine::from_bytes(&machine(state).bytes).unwrap()
}

/// The state `now` of this host with all of `kept` that is of no host: what its machine is made of, where the parts are,
/// and what each of them holds.
fn on_this_host(folder: &Folder, now: &Path, kept: &Path) -> PathBuf {
    let (mut here, kept) = (saved(now), saved(kept));
    (here.config, here.places, here.parts) = (kept.config, kept.places, kept.parts);
    with_machine(folder, now, &here)
}

/// The file at `state` with this machine in the place of its own.
fn with_machine(folder: &Folder, state: &Path, saved: &SavedMachine) -> PathBuf {
    let (origin, mut sections) = state_file::read(&File::open(state).unwrap(), true).unwrap();
    let machine = sections.iter_mut().find(|section| section.kind == MACHINE).unwrap();
    machine.bytes = saved.to_bytes().unwrap();
    let path = folder.path("here");
    fs::write(&path, state_file::write(&origin, &sections)).unwrap();
    path
}

/// How a load of it, over memory that is all zeros, is answered.
fn answered(folder: &Folder, state: &Path) -> Result<Service, String> {
    let memory = folder.path("zeros");
    File::create(&memory).unwrap().set_len(MEMORY).unwrap();
    let service = Service::start(&[]);
    let body =
        json!({ "snapshot_path": state, "mem_backend": { "backend_type": "File", "backend_path": memory } });
    let answer = service.client().request("PUT", "/snapshot/load", &body.to_string());
    match answer.status() {
        "204" => {
            let told: Value = service.client().ok("GET", "/", "").json();
            assert_eq!(told["state"], "Paused");
            Ok(service)
        }
        _ => Err(answer.fault()),
    }
}

/// Restores all of a kept state but its CPUs and interrupt controllers, and sees that each part is saved as it was then.
fn assert_parts_go_on(folder: &Folder, now: &Path, kept: &Path) {
    let mixed = on_this_host(folder, now, kept);
    let service = answered(folder, &mixed).unwrap_or_else(|error| panic!("{}: {error}", kept.display()));
    let again = folder.path("again");
    let body = json!({ "snapshot_path": again, "mem_file_path": folder.path("again memory") });
    service.client().ok("PUT", "/snapshot/create", &body.to_string());
    let (before, after) = (saved(&mixed).parts, saved(&again).parts);
    // A restore moves the counters of the VM clock on.
    for (name, bytes) in before.iter().filter(|(name, _)| *name != "VM clock") {
        // The version comes first. An older form lacks the last fields alone.
        let (older, newer) = (&bytes[1..], &after[name][1..]);
        let is_as_it_was = if bytes[0] == after[name][0] { newer == older } else { newer.starts_with(older) };
        assert!(is_as_it_was, "{name}: {bytes:?}, and then {:?}", after[name]);
    }
}

#[test]
fn states_of_this_version_are_restored_and_others_named() {
    let folder = Folder::new();
    let now = written_now(&folder);
    let (section, machine) = version(&now);
    let name = format!("{}-{section}-{machine}", arch::NAME);
    if let Some(states) = std::env::var_os(WRITE) {
        fs::copy(&now, Path::new(&states).join(&name)).unwrap();
    }
    let mut seen = 0;
    for (of, state) in KEPT {
        let path = folder.write(of, state);
        assert!(state.len() < 64 << 10, "{of} is large");
        let answer = answered(&folder, &path).map(drop);
        println!("{of}: {answer:?}");
        match answer {
            _ if *of == name => {
                seen += 1;
                // Another host's CPUs may have what this one's have not, which is said before anything is restored.
                let is_of_hosts = |error: &str| error.contains("this host's");
                assert!(
                    answer.as_ref().map_or_else(|error| is_of_hosts(error), |()| true),
                    "{of}: {answer:?}"
                );
                let told: Value =
                    serde_json::from_str(&run([Path::new("snapshot"), Path::new("inspect"), &path]).text)
                        .unwrap();
                assert_eq!(told["memory"]["size"], MEMORY);
                assert_parts_go_on(&folder, &now, &path);
            }
            Err(error) if of.starts_with(arch::NAME) => assert!(error.contains("version"), "{of}: {error}"),
            Err(error) => assert!(error.contains("of another architecture"), "{of}: {error}"),
            Ok(()) => panic!("{of} is of another version, and was restored"),
        }
    }
    assert_eq!(seen, 1, "make {name}: {WRITE}=tests/states cargo test --test hostile states_of_this_version");
    for (what, expected) in [(0, "section `machine` has version"), (1, "the saved machine has version")] {
        let (origin, mut sections) = state_file::read(&File::open(&now).unwrap(), true).unwrap();
        let is_machine = |section: &&mut Section| section.kind == MACHINE;
        let machine = sections.iter_mut().find(is_machine).unwrap();
        if what == 0 {
            machine.version += 1
        } else {
            machine.bytes[0] += 1
        };
        fs::write(folder.path("other"), state_file::write(&origin, &sections)).unwrap();
        let error = answered(&folder, &folder.path("other")).map(drop).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_state_with_other_parts_is_refused_by_their_names() {
    let folder = Folder::new();
    let now = written_now(&folder);
    let first = folder.write("first", FIRST);
    let refused = |state: &Path| answered(&folder, state).map(drop).unwrap_err();
    let way_out = "restore it with that version, or boot the guest anew and save it with this one";
    if arch::NAME == "x86_64" {
        let error = refused(&on_this_host(&folder, &now, &first));
        let expected =
            "the saved machine lacks a part of this one: VM generation ID: an earlier version of Alula";
        assert!(error.contains(expected) && error.ends_with(way_out), "{error}");
    } else {
        assert!(refused(&first).contains("of another architecture"));
    }
    let mut later = saved(&now);
    later.parts.insert("flux capacitor".to_owned(), vec![1]);
    let error = refused(&with_machine(&folder, &now, &later));
    let expected =
        "the saved machine has a part that this one lacks: flux capacitor: a later version of Alula";
    assert!(error.contains(expected) && error.ends_with(way_out), "{error}");
}
