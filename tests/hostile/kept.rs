//! The state files in tests/states: one of each version that was ever written, by a machine of 16 MiB with a PCI bus. Of
//! the versions of aarch64, there are those since they were kept.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use alula::arch;
use alula::carry::state_file::{self, Section};
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

/// The version of the machine's section, and that of what the section holds.
fn version(state: &Path) -> (u16, u16) {
    let (_, sections) = state_file::read(&File::open(state).unwrap(), true).unwrap();
    let machine = sections.iter().find(|section| section.kind == MACHINE).unwrap();
    (machine.version, postcard::take_from_bytes(&machine.bytes).unwrap().0)
}

/// How a load of it, over memory that is all zeros, is answered.
fn answered(folder: &Folder, state: &Path) -> Result<Value, String> {
    let memory = folder.path("zeros");
    File::create(&memory).unwrap().set_len(MEMORY).unwrap();
    let service = Service::start(&[]);
    let body =
        json!({ "snapshot_path": state, "mem_backend": { "backend_type": "File", "backend_path": memory } });
    let answer = service.client().request("PUT", "/snapshot/load", &body.to_string());
    match answer.status() {
        "204" => Ok(service.client().ok("GET", "/", "").json()["state"].clone()),
        _ => Err(answer.fault()),
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
        let answer = answered(&folder, &path);
        println!("{of}: {answer:?}");
        match answer {
            _ if *of == name => {
                seen += 1;
                // A host that it cannot be restored on says what is missing; it has been read by then.
                assert!(
                    answer.as_ref().map_or_else(|error| error.contains("host"), |state| state == "Paused")
                );
                let told: Value =
                    serde_json::from_str(&run([Path::new("snapshot"), Path::new("inspect"), &path]).text)
                        .unwrap();
                assert_eq!(told["memory"]["size"], MEMORY);
            }
            Err(error) if of.starts_with(arch::NAME) => assert!(error.contains("version"), "{of}: {error}"),
            Err(error) => assert!(error.contains("of another architecture"), "{of}: {error}"),
            Ok(_) => panic!("{of} is of another version, and was restored"),
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
        let error = answered(&folder, &folder.path("other")).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}
