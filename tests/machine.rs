//! A machine inside this process: what it leaves behind, who starts its threads, how it is watched. The
//! tests here count what the process has, so they take turns.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use alula::config::Config;
use alula::host::Local;
use alula::machine::{Machine, Prepared};
use alula::metrics::View;

use common::Folder;

fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A machine with a disk, an entropy device and two CPUs, loaded with the firmware guest, whose console
/// goes to `folder`.
fn machine(folder: &Folder, pci: bool, words: &str) -> Machine {
    let disk = folder.write("disk", vec![0; 1 << 20]);
    let text = format!(
        r#"{{"machine-config": {{"vcpu_count": 2, "mem_size_mib": 64}}, "entropy": {{}},
            "drives": [{{"drive_id": "disk", "path_on_host": {disk:?}, "is_root_device": false}}]}}"#
    );
    let mut config = Config::parse(text.as_bytes()).unwrap();
    config.pci = pci;
    config.firmware_words = Some(words.to_owned());
    let mut host = Local::default();
    host.hold_console(Some(&folder.path("console"))).unwrap();
    let mut machine = Machine::build("test", &config, &mut host, Prepared::new().unwrap()).unwrap();
    machine.load(&config, &mut host).unwrap();
    machine
}

fn wait_for_console(folder: &Folder, text: &str) {
    let said = || fs::read_to_string(folder.path("console")).unwrap();
    common::wait_for(|| said().contains(text));
}

fn threads() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    // A thread may end between the two looks.
    let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).ok();
    let mut threads: Vec<_> = tasks.filter_map(|task| name(task.unwrap())).collect();
    threads.iter_mut().for_each(|name| name.truncate(name.trim_end().len()));
    threads
}

/// Of this process: open descriptors, address space in KiB, threads.
fn costs() -> [usize; 3] {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    let size = size.trim().trim_end_matches(" kB").parse().unwrap();
    [fs::read_dir("/proc/self/fd").unwrap().count(), size, threads().len()]
}

#[test]
fn machines_that_are_dropped_leave_nothing_behind() {
    let _turn = turn();
    let folder = Folder::new();
    let build_and_drop = |pci| {
        let mut machine = machine(&folder, pci, "case=block,entropy end=idle");
        machine.resume().unwrap();
        wait_for_console(&folder, "2 cases, 0 failed");
        drop(machine);
        fs::remove_file(folder.path("console")).unwrap();
    };
    for pci in [false, true] {
        // The first machines leave what the process keeps for the next ones: the allocator's arenas.
        (0..3).for_each(|_| build_and_drop(pci));
        let before = costs();
        (0..10).for_each(|_| build_and_drop(pci));
        let after = costs();
        assert_eq!((before[0], before[2]), (after[0], after[2]), "descriptors and threads (PCI: {pci})");
        // One machine's memory has 64 MiB, and a thread's stack 2.
        assert!(after[1] < before[1] + (32 << 10), "{before:?} to {after:?} (PCI: {pci})");
    }
}

#[test]
fn devices_have_their_thread_before_a_cpu_runs() {
    let _turn = turn();
    let folder = Folder::new();
    // This guest looks at no device, so no vCPU has a reason to start a thread for one.
    let mut machine = machine(&folder, true, "case=memory end=idle");
    assert!(!threads().contains(&"io".to_owned()), "{:?}", threads());
    machine.resume().unwrap();
    wait_for_console(&folder, "1 cases, 0 failed");
    // A thread names itself after it has begun.
    common::wait_for(|| threads().contains(&"io".to_owned()));
}

#[test]
fn an_idle_guests_devices_are_not_stopped_to_look_at_its_cpus() {
    let _turn = turn();
    let folder = Folder::new();
    // The guest reuses the memory of its rings before it idles: a device that is started again on them
    // finds them broken.
    let mut machine = machine(&folder, false, "case=block,entropy end=idle");
    machine.resume().unwrap();
    wait_for_console(&folder, "2 cases, 0 failed");
    let fails = |machine: &Machine| {
        let metrics = machine.metrics(View::Total);
        ["block_disk", "entropy"].map(|device| metrics[device]["event_fails"].as_u64().unwrap())
    };
    let before = fails(&machine);
    for _ in 0..200 {
        machine.check_halted().unwrap();
        assert_eq!(machine.exit(), None);
        std::thread::yield_now();
    }
    assert_eq!(fails(&machine), before);
}
