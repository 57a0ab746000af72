//! The self-test and what it is given: nothing of that is changed unless its case is asked for by name, and what cannot
//! be written, or has nothing to read, is no fault.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::io::Write;

use common::{Folder, Process, network, run};
use serde_json::json;

/// Both transports.
const TRANSPORTS: [&[&str]; 2] = [&[], &["--enable-pci"]];

/// Each byte another one than those beside it and those of the next sectors: none of it is what the self-test writes.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + at / 512) as u8).collect()
}

#[test]
fn the_self_test_changes_nothing_that_it_is_given() {
    let folder = Folder::new();
    let content = pattern(1 << 20);
    let [disk, pmem] = ["disk", "pmem"].map(|name| folder.write(name, &content));
    let file = json!({
        "drives": [{ "drive_id": "d", "path_on_host": disk, "is_root_device": false }],
        "pmem": [{ "id": "p", "path_on_host": pmem }],
    });
    let file = folder.write("vm.json", file.to_string());
    let [disk_option, pmem_option] = [&disk, &pmem].map(|path| path.to_str().unwrap());
    let asked = [
        &["--disk", disk_option, "--pmem", pmem_option][..],
        &["--config", file.to_str().unwrap(), "--self-test"],
    ];
    for options in asked {
        for transport in TRANSPORTS {
            let ended = run([&["run"], options, transport].concat());
            assert_eq!(ended.code, Some(0), "{}", ended.text);
            for expected in
                ["\nblock: ok (2048 sectors, only read)", "\npmem: ok (2 MiB at 0x", ", only read)\n"]
            {
                assert!(ended.text.contains(expected), "{}", ended.text);
            }
            for path in [&disk, &pmem] {
                assert!(
                    std::fs::read(path).unwrap() == content,
                    "{options:?}: {} has changed",
                    path.display()
                );
            }
        }
    }
}

#[test]
fn what_is_typed_beforehand_is_no_fault_of_the_guest() {
    let mut process = Process::start(["run", "--cmdline", "case=serial"]);
    process.stdin.as_mut().unwrap().write_all(&[b'x'; 40]).unwrap();
    let ended = process.end();
    assert!(ended.text.contains("serial: ok"), "{}", ended.text);
}

#[test]
fn a_disk_that_cannot_be_written_is_only_read() {
    let folder = Folder::new();
    let content = pattern(1 << 20);
    let disk = folder.write("disk", &content);
    let option = format!("{},ro", disk.display());
    for transport in TRANSPORTS {
        for words in ["", "case=block"] {
            let ended = run([&["run", "--disk", &option, "--cmdline", words], transport].concat());
            assert_eq!(ended.code, Some(0), "{}", ended.text);
            assert!(ended.text.contains("\nblock: ok (2048 sectors, only read)\n"), "{}", ended.text);
        }
    }
    assert!(std::fs::read(disk).unwrap() == content);
}

#[test]
fn small_disks_are_looked_at_as_far_as_they_go() {
    let folder = Folder::new();
    for (length, options, words, expected) in [
        (0, "", "", "block: ok (0 sectors, only read)"),
        (0, ",ro", "", "block: ok (0 sectors, only read)"),
        (0, "", "case=block", "block: ok (0 sectors)"),
        (512, "", "", "block: ok (1 sector, only read)"),
        (512, "", "case=block", "block: ok (1 sector)"),
    ] {
        let disk = folder.write("disk", vec![0; length]);
        let ended = run(["run", "--disk", &format!("{}{options}", disk.display()), "--cmdline", words]);
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        assert!(ended.text.contains(expected), "{expected}: {}", ended.text);
        let writes = std::fs::read(disk).unwrap().iter().any(|byte| *byte != 0);
        assert_eq!(writes, words == "case=block" && length > 0, "{expected}");
    }
}

#[test]
fn an_answer_that_never_comes_is_not_waited_for_forever() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    let wire = network::Wire::new("tap0", 0x88b5);
    let mut guest = Process::start(["run", "--net", "tap=tap0", "--cmdline", "case=net"]);
    // Frames that are no answers come all the time.
    let (other, mut sent) = (wire.receive(), 0);
    while guest.child.try_wait().unwrap().is_none() {
        sent += 1;
        assert!(sent < 60_000, "the guest still waits");
        wire.send(&other);
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let ended = guest.end();
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    let (_, others) =
        ended.text.split_once("net: ok (a frame of 60 bytes out, no answer, frames of others: ").unwrap();
    assert!(!others.starts_with('0'), "{}", ended.text);
}
