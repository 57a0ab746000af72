//! Persistent memory of guests that run: what they write is in the file, where its window is, and what a snapshot keeps.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use alula::arch::layout;
use alula::config::Config;
use alula::devices::KINDS;
use alula::devices::kind::ConfiguredDevice;
use alula::host::Host;
use alula::machine::{Exit, Machine, Places, Prepared, Shell};
use alula::memory::Range;
use alula::platform::Place;
use common::suspend::{Random, Screen, Suspended, boot};
use common::{Folder, Service, run, wait_for};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const LOST: u8 = 149;
/// Where the firmware counts the runs of its case.
const NUMBER: u64 = 0x1000;

/// A file has one writer. One test runs at a time: a program that another one starts would for a moment, as a copy of this
/// process, have the file open, too.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn number_in(path: &Path) -> u32 {
    let mut bytes = [0; 8];
    File::open(path).unwrap().read_exact_at(&mut bytes, NUMBER).unwrap();
    let [number, complement] = [0, 4].map(|at| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()));
    assert!(number == !complement || bytes == [0; 8], "{bytes:x?}");
    number
}

/// A file of so many bytes in the folder.
fn file(folder: &Folder, name: &str, length: u64) -> std::path::PathBuf {
    File::create(folder.path(name)).unwrap().set_len(length).unwrap();
    folder.path(name)
}

fn device(body: &Value) -> ConfiguredDevice {
    KINDS.iter().find(|kind| kind.section == "pmem").unwrap().parse(body.to_string().as_bytes()).unwrap()
}

/// A machine of 64 MiB whose firmware has these words, with persistent memory of these files.
fn config(pci: bool, words: &str, files: &[(&str, &Path)]) -> Config {
    let files: Vec<_> = files.iter().map(|(id, path)| json!({ "id": id, "path_on_host": path })).collect();
    let config = json!({ "machine-config": { "vcpu_count": 1, "mem_size_mib": 64 }, "pmem": files });
    let mut config = Config::parse(config.to_string().as_bytes()).unwrap();
    config.pci = pci;
    config.firmware_words = Some(words.to_owned());
    config
}

/// Where the window of a device is.
fn window(places: &Places, id: &str) -> Range {
    match places[&format!("window of pmem device `{id}`")] {
        Place::Memory { range, gsi: None } => range,
        other => panic!("{other:?}"),
    }
}

fn first_window() -> u64 {
    layout::windows(&layout::memory(64 * MIB)).start
}

/// Lets the machine run to its end, and returns what its case said.
fn end(machine: &Machine, screen: &Screen) -> String {
    wait_for(|| machine.exit().is_some());
    let text = screen.text();
    assert_eq!(machine.exit(), Some(Exit::Code(0)), "{text}");
    text.lines().find(|line| line.starts_with("pmem: ok")).unwrap_or_else(|| panic!("{text}")).to_owned()
}

#[test]
fn what_a_guest_writes_is_in_the_file_and_no_more() {
    let _alone = alone();
    let folder = Folder::new();
    let path = file(&folder, "file", 3 * MIB + 5);
    let option = format!("--pmem={}", path.display());
    let mut runs = 0;
    for pci in [&[][..], &["--enable-pci"]] {
        // Beside other cases too.
        for words in ["case=pmem", "case=memory,pmem"] {
            let ended = run([&["run", &option, "--cmdline", words], pci].concat());
            assert_eq!(ended.code, Some(0), "{}", ended.text);
            assert!(ended.text.contains("pmem: ok (4 MiB at 0x"), "{}", ended.text);
            assert!(ended.text.contains(&format!(", number {runs}, ends with 0x0)")), "{}", ended.text);
            runs += 1;
            assert_eq!(number_in(&path), runs);
        }
    }
    // Nothing of the file but the number has changed.
    let content = fs::read(&path).unwrap();
    assert_eq!(content.len() as u64, 3 * MIB + 5);
    assert_eq!(content.iter().filter(|byte| **byte != 0).count(), 5);
}

#[test]
fn a_guest_cannot_write_to_memory_that_is_read_only() {
    let _alone = alone();
    let folder = Folder::new();
    let path = file(&folder, "file", MIB);
    File::options().write(true).open(&path).unwrap().write_all_at(&[9], NUMBER).unwrap();
    for more in [&[][..], &["--enable-pci"]] {
        // Readers share it.
        let option = format!("--pmem={},ro", path.display());
        let ended = run([&["run", &option, &option, "--cmdline", "case=pmem"], more].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        assert!(ended.text.contains(", number 9, ends with 0x0, read-only)"), "{}", ended.text);
        let told = "the guest wrote to pmem device `pmem0`, which is read-only, at byte 4096: ignored";
        assert!(ended.text.contains(told), "{}", ended.text);
        assert_eq!(fs::read(&path).unwrap().iter().map(|byte| u64::from(*byte)).sum::<u64>(), 9);
    }
}

#[test]
fn windows_are_above_all_memory_and_beside_each_other() {
    let _alone = alone();
    let folder = Folder::new();
    let sizes = [("a", 1), ("b", 2 * MIB + 1), ("c", 6 * MIB)];
    let paths = sizes.map(|(id, length)| (id, file(&folder, id, length)));
    let files = [0, 1, 2].map(|index| (paths[index].0, paths[index].1.as_path()));
    for mib in [64, 3 << 10, 5 << 10] {
        let mut config = config(false, "", &files);
        config.machine_config.mem_size_mib = mib;
        let memory = layout::memory(mib * MIB);
        let possible = layout::windows(&memory);
        assert!(memory.iter().all(|range| range.end() <= possible.start), "{mib} MiB");
        assert!(
            possible.start.is_multiple_of(1 << 30) && possible.start - memory.last().unwrap().end() < 4 << 30
        );
        let machine = Machine::build("it", &config, &mut Host::default(), Prepared::new().unwrap()).unwrap();
        let places = machine.places();
        let start = possible.start;
        assert_eq!(window(&places, "a"), Range { start, size: 2 * MIB });
        assert_eq!(window(&places, "b"), Range { start: start + 2 * MIB, size: 4 * MIB });
        assert_eq!(window(&places, "c"), Range { start: start + 6 * MIB, size: 6 * MIB });
    }
}

#[test]
fn a_restored_guest_finds_its_memory_where_it_was() {
    let _alone = alone();
    let folder = Folder::new();
    let [a, b, c] = [("a", 3), ("b", 3), ("c", 5)].map(|(id, mib)| file(&folder, id, mib * MIB));
    let attach = |machine: &mut Machine, id: &str, path: &Path| {
        let device = device(&json!({ "id": id, "path_on_host": path }));
        machine.attach(&device, &Places::new(), &mut Host::default()).unwrap();
    };
    let mut random = Random::default();
    for pci in [false, true] {
        let config = config(pci, "echo case=pmem", &[("a", &a), ("b", &b)]);
        let screen = Screen::default();
        let mut machine = boot(&config, &screen);
        wait_for(|| screen.text().contains("alula firmware"));
        machine.pause().unwrap();
        machine.detach("pmem device `a`").unwrap();
        assert!(!machine.places().contains_key("window of pmem device `a`"));
        // A device that comes takes the first addresses that are free and enough.
        attach(&mut machine, "d", &a);
        assert_eq!(window(&machine.places(), "d").start, first_window());
        machine.detach("pmem device `d`").unwrap();
        attach(&mut machine, "c", &c);
        // Neither is where a machine that is built of the same devices now would have it.
        let places = machine.places();
        assert_eq!(window(&places, "b"), Range { start: first_window() + 4 * MIB, size: 4 * MIB });
        let there = Range { start: first_window() + 8 * MIB, size: 6 * MIB };
        assert_eq!(window(&places, "c"), there);
        let suspended = Suspended::new(machine);
        let before = number_in(&c);
        for is_ahead in [false, true] {
            let screen = Screen::default();
            let mut machine = match is_ahead {
                false => suspended.build(&suspended.bytes, &screen).unwrap(),
                true => {
                    let shell = Shell::new(Prepared::new().unwrap(), 1, Some(64)).unwrap();
                    suspended.build_on(shell, &folder, &screen)
                }
            };
            assert_eq!(machine.places(), places);
            machine.resume().unwrap();
            std::thread::sleep(std::time::Duration::from_micros(random.below(5000)));
            assert_eq!(machine.type_on_console(b"\n"), 1);
            let said = end(&machine, &screen);
            let number = before + u32::from(is_ahead);
            let expected = format!("pmem: ok (6 MiB at {:#x}, number {number}", there.start);
            assert!(said.starts_with(&expected), "{said}");
        }
        assert_eq!([&a, &b, &c].map(|path| number_in(path)), [0, 0, before + 2]);
    }
}

#[test]
fn a_window_that_cannot_be_is_refused_by_its_name() {
    let _alone = alone();
    let folder = Folder::new();
    let path = file(&folder, "a", 3 * MIB);
    let config = config(false, "", &[("a", &path)]);
    let machine = Machine::build("it", &config, &mut Host::default(), Prepared::new().unwrap()).unwrap();
    let (places, name) = (machine.places(), "window of pmem device `a`");
    drop(machine);
    let build = |place: Place| {
        let mut places = places.clone();
        places.insert(name.to_owned(), place);
        Machine::build_at(&places, "it", &config, &mut Host::default(), Prepared::new().unwrap()).err()
    };
    let at = |start, size| Place::Memory { range: Range { start, size }, gsi: None };
    let first = first_window();
    assert!(build(at(first + 2 * MIB, 4 * MIB)).is_none());
    for (place, expected) in [
        (at(first + MIB, 4 * MIB), "is taken, or cannot be"),
        (at(0, 4 * MIB), "is taken, or cannot be"),
        (at(u64::MAX - 2 * MIB + 1, 4 * MIB), "is taken, or cannot be"),
        (
            at(first, 2 * MIB),
            "the guest knows it with 2097152 bytes of address space, and what is there now needs 4194304",
        ),
        (at(first, 0), "the guest knows it with 0 bytes"),
        (Place::Pci(3), "its window cannot be at PCI device 3"),
        (
            Place::Memory { range: Range { start: first, size: 4 * MIB }, gsi: Some(3) },
            "its window cannot be at",
        ),
    ] {
        let error = build(place).unwrap().to_string();
        assert!(
            error.starts_with("attach pmem device `a`: ") && error.contains(expected),
            "{place:?}: {error}"
        );
    }
    // More than any guest has addresses for, or KVM takes, as far as a file system has such files.
    if File::options().write(true).open(&path).unwrap().set_len(9 << 40).is_ok() {
        let error =
            Machine::build("it", &config, &mut Host::default(), Prepared::new().unwrap()).err().unwrap();
        let error = error.to_string();
        let is_told = error.contains("it takes less") || error.contains("more bytes of addresses");
        assert!(is_told || error.contains("map its"), "{error}");
    }
}

/// A service whose guest has persistent memory and waits for a line before it does what `words` say.
fn service(folder: &Folder, words: &str, extra: &[&str]) -> Service {
    let mut service = Service::start(extra);
    let mut client = service.client();
    client.ok("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 64}"#);
    client.ok("PUT", "/pmem/p", &json!({ "id": "p", "path_on_host": folder.path("file") }).to_string());
    service.boot_source(&format!("echo {words}"));
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    service.process.expect("alula firmware");
    service
}

fn type_line(service: &mut Service) {
    service.process.stdin.as_mut().unwrap().write_all(b"go on\n").unwrap();
}

#[test]
fn a_snapshot_has_the_state_and_not_the_bytes_of_a_file() {
    let _alone = alone();
    let folder = Folder::new();
    let path = file(&folder, "file", 3 * MIB);
    let mark: Vec<u8> = (0..64).map(|index| index ^ 0x5a).collect();
    File::options().write(true).open(&path).unwrap().write_all_at(&mark, 2 * MIB).unwrap();
    let service = service(&folder, "case=pmem", &[]);
    let mut client = service.client();
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    let [state, memory] = ["state", "memory"].map(|name| folder.path(name));
    let body = json!({ "snapshot_path": state, "mem_file_path": memory });
    client.ok("PUT", "/snapshot/create", &body.to_string());
    drop(service);
    for file in [&state, &memory] {
        let bytes = fs::read(file).unwrap();
        assert!(
            !bytes.windows(mark.len()).any(|some| some == mark),
            "{} has the file's bytes",
            file.display()
        );
    }
    assert_eq!(fs::metadata(&memory).unwrap().len(), 64 * MIB);
    let load = json!({
        "snapshot_path": state,
        "mem_backend": { "backend_type": "File", "backend_path": memory },
        "resume_vm": true,
    });
    let load = load.to_string();
    // Another size is another file, whether it needs as many addresses or not.
    for (length, expected) in [
        (3 * MIB + 1, "has 3145729 bytes, and had 3145728 when the guest was saved"),
        (
            5 * MIB,
            "the guest knows it with 4194304 bytes of address space, and what is there now needs 6291456",
        ),
        (0, "it is empty"),
    ] {
        File::options().write(true).open(&path).unwrap().set_len(length).unwrap();
        let service = Service::start(&[]);
        let fault = service.client().request("PUT", "/snapshot/load", &load).fault();
        assert!(fault.contains("pmem device `p`") && fault.contains(expected), "{fault}");
    }
    fs::remove_file(&path).unwrap();
    let service = Service::start(&[]);
    let fault = service.client().request("PUT", "/snapshot/load", &load).fault();
    assert!(fault.contains("No such file"), "{fault}");
    file(&folder, "file", 3 * MIB);
    let mut service = service;
    service.client().ok("PUT", "/snapshot/load", &load);
    type_line(&mut service);
    let ended = service.process.end();
    assert!(ended.text.contains("pmem: ok (4 MiB at 0x") && ended.code == Some(0), "{}", ended.text);
    assert_eq!(number_in(&path), 1);
}

#[test]
fn a_file_that_is_cut_short_ends_its_guest_by_name() {
    let _alone = alone();
    let folder = Folder::new();
    for length in [0, 4096] {
        let path = file(&folder, "file", 3 * MIB);
        let events = folder.path(&format!("events {length}"));
        let mut service = service(&folder, "case=pmem", &["--events", events.to_str().unwrap()]);
        File::options().write(true).open(&path).unwrap().set_len(length).unwrap();
        type_line(&mut service);
        let socket = service.socket.clone();
        let ended = service.process.end();
        let words =
            format!("the guest has lost what it sees of a file: `{}` was made shorter", path.display());
        assert_eq!(ended.code, Some(LOST.into()), "{}", ended.text);
        assert!(ended.text.contains(&words), "{}", ended.text);
        let events = fs::read_to_string(events).unwrap();
        let told: Vec<Value> = events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let [.., failed, last] = told.as_slice() else { panic!("{told:?}") };
        assert!(
            failed["event"] == "failed" && failed["reason"].as_str().unwrap().starts_with(&words),
            "{failed}"
        );
        assert!(last["event"] == "ended" && last["exit_code"] == LOST, "{last}");
        assert!(!socket.exists(), "the socket was left behind");
    }
}

#[test]
fn a_file_system_without_room_ends_its_guest_by_name() {
    let _alone = alone();
    let folder = Folder::new();
    let room = folder.path("room");
    fs::create_dir(&room).unwrap();
    common::mount_tmpfs(&room, 64 << 10);
    let path = file(&folder, "room/sparse", 3 * MIB);
    let mut filler = File::create(room.join("filler")).unwrap();
    std::io::copy(&mut std::io::repeat(1), &mut filler).unwrap_err();
    let ended = run(["run", "--pmem", path.to_str().unwrap(), "--cmdline", "case=pmem"]);
    let words = format!("the guest has lost what it sees of a file: `{}`", path.display());
    assert!(ended.code == Some(LOST.into()) && ended.text.contains(&words), "{}", ended.text);
}

// Other architectures have no exit for a crash.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_crash_after_a_reset_is_told_once_the_file_was_looked_at() {
    let _alone = alone();
    let folder = Folder::new();
    file(&folder, "file", 3 * MIB);
    let mut service = service(&folder, "case=serial end=crash", &[]);
    service.client().ok("PUT", "/actions", r#"{"action_type": "Reset"}"#);
    service.process.expect("alula firmware");
    // The thread of its CPU has the walls of `main` beneath its own.
    type_line(&mut service);
    let ended = service.process.end();
    assert!(ended.code == Some(122) && ended.text.contains("triple fault"), "{}", ended.text);
}
