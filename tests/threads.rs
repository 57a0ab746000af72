//! Which thread makes what of the host: `main` alone opens files and sockets and starts threads, and a balloon's gives
//! memory back by one call.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use alula::devices::KINDS;
use alula::host::Host;
use common::driver::{F_EVENT_IDX, Guest, TRANSPORTS};
use common::{Client, Folder, Process, alula, network, wait_for};

/// What any thread may make: what it works with, which leads nowhere, and connections that others make to a
/// socket at which `main` listens.
const OWN: &[&str] = &["io_uring_setup", "eventfd2", "timerfd_create", "epoll_create1", "accept4"];
/// What makes descriptors or threads, beside all that takes a path. Not every architecture has each of them.
const MAKERS: &str = "%file,?openat2,socket,socketpair,connect,bind,listen,?open_tree,?fsopen,?memfd_create,\
                      ?memfd_secret,?pidfd_open,?userfaultfd,?perf_event_open,?bpf,clone,?clone3,?fork,?vfork";

/// What each thread called, by its number; and the number of `main`.
fn calls(trace: &Path) -> (u32, BTreeMap<u32, BTreeSet<String>>) {
    let text = std::fs::read_to_string(trace).unwrap();
    let mut main = None;
    let mut all = BTreeMap::<u32, BTreeSet<String>>::new();
    for line in text.lines() {
        let (thread, call) = line.split_once(' ').unwrap();
        let thread: u32 = thread.parse().unwrap();
        main.get_or_insert(thread);
        // Neither the end of a call whose beginning was told, nor a signal or the thread's end.
        let call = call.trim_start();
        if let Some((name, _)) = call.split_once('(').filter(|_| !call.starts_with(['<', '-', '+'])) {
            all.entry(thread).or_default().insert(name.to_owned());
        }
    }
    (main.unwrap(), all)
}

/// `alula run` with these arguments under strace, which writes to the file `trace`.
fn traced(folder: &Folder, arguments: &[&str]) -> Process {
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "--seccomp-bpf", "-e", &format!("trace={MAKERS},{}", OWN.join(",")), "-o"]);
    command.arg(folder.path("trace")).arg(alula()).args(["run", "--cpus", "2"]).args(arguments);
    Process::spawn(command)
}

/// Whether what was traced in `folder` did what `main` alone may do by `main` alone; returns what others made.
fn check(folder: &Folder) -> BTreeSet<String> {
    let (main, mut all) = calls(&folder.path("trace"));
    let by_main = Vec::from_iter(all.remove(&main).unwrap()).join(" ");
    assert!(["openat", "clone"].iter().all(|call| by_main.contains(call)), "{by_main}");
    let others = BTreeSet::from_iter(all.into_values().flatten());
    let opened: Vec<_> = others.iter().filter(|call| !OWN.contains(&call.as_str())).collect();
    assert!(opened.is_empty(), "another thread than `main` called {opened:?}");
    others
}

#[test]
fn main_alone_opens_files_and_sockets_and_starts_threads() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    let folder = Folder::new();
    for disk in ["a", "b", "other"] {
        folder.write(disk, vec![0; 1 << 20]);
    }
    let disk = |id: &str, more: &str| format!("{},id={id}{more}", folder.path(id).display());
    let (a, b) = (disk("a", ",engine=async,queues=2,threads=2"), disk("b", ""));
    let (socket, vsock) = (folder.path("socket"), folder.path("vsock").display().to_string());
    for transport in [&[][..], &["--enable-pci"]] {
        let api = ["--cmdline", "end=idle", "--api-sock", socket.to_str().unwrap()];
        let devices = ["--disk", &a, "--disk", &b, "--net", "tap=tap0", "--entropy", "--vsock", &vsock];
        let mut process = traced(&folder, &[&api[..], &devices, transport].concat());
        process.expect(", 0 failed");
        let mut client = Client::connect(&socket);
        client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
        client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
        let other = folder.path("other");
        client.ok("PATCH", "/drives/a", &format!(r#"{{"drive_id": "a", "path_on_host": {other:?}}}"#));
        client.ok("PUT", "/actions", r#"{"action_type": "FlushMetrics"}"#);
        let (main, _) = calls(&folder.path("trace"));
        // strace ends with its child, which it started and we may signal.
        assert!(Command::new("kill").arg(main.to_string()).status().unwrap().success());
        process.stdin = None;
        let ended = process.end();
        assert!(ended.text.contains("ended by signal 15"), "{}", ended.text);
        // The ring of a disk is made by its thread: what threads do is seen.
        let others = check(&folder);
        assert!(others.contains("io_uring_setup"), "{others:?}");
    }
}

#[test]
fn a_vcpu_that_kvm_cannot_run_on_opens_nothing() {
    let folder = Folder::new();
    let mut process = traced(&folder, &["--cmdline", "case=refused"]);
    process.stdin = None;
    let ended = process.end();
    assert!(ended.text.contains("KVM could not"), "{}", ended.text);
    check(&folder);
}

/// Set: this process has a balloon that is given pages, and another one takes down what it calls.
const COUNTED: &str = "ALULA_TEST_COUNTED_BALLOON";
/// Files that the counted process looks for, in vain, before and after the pages are given: marks in its trace.
const MARKS: [&str; 2] = ["/the pages are given", "/the pages were given"];
/// How often 256 pages that lie together are given, in the counted process, behind each transport.
const ROUNDS: usize = 10;

#[test]
fn a_balloon_that_another_process_counts_is_given_pages() {
    if std::env::var_os(COUNTED).is_none() {
        return;
    }
    let kind = KINDS.iter().find(|kind| kind.section == "balloon").unwrap();
    let device = kind.parse(br#"{"amount_mib": 1, "deflate_on_oom": false}"#).unwrap();
    for transport in TRANSPORTS {
        let mut guest = Guest::new(transport, device.open("it", &mut Host::default()).unwrap());
        guest.start(F_EVENT_IDX);
        // As Linux gives them, in the quarter of memory that nothing else is in.
        let pages: Vec<u8> = (768..1024_u32).rev().flat_map(u32::to_le_bytes).collect();
        let pages = guest.allocate(&pages);
        let mut give = || {
            guest.want_interrupt(0, true);
            guest.request(0, &[(pages, 0)]);
            wait_for(|| guest.interrupts() > 0);
        };
        give();
        assert!(!std::fs::exists(MARKS[0]).unwrap());
        (0..ROUNDS).for_each(|_| give());
        assert!(!std::fs::exists(MARKS[1]).unwrap());
    }
}

#[test]
fn a_balloon_gives_256_pages_back_by_one_call() {
    let folder = Folder::new();
    let counted = Command::new("strace")
        .args(["-f", "-qq", "-Y", "-e", "signal=none", "-o"])
        .arg(folder.path("trace"))
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "a_balloon_that_another_process_counts_is_given_pages"])
        .env(COUNTED, "yes")
        .output()
        .unwrap();
    assert!(counted.status.success(), "{}", String::from_utf8_lossy(&counted.stdout));
    let trace = std::fs::read_to_string(folder.path("trace")).unwrap();
    let mut counts = BTreeMap::<&str, usize>::new();
    let mut is_counting = false;
    for line in trace.lines() {
        match MARKS.map(|mark| line.contains(mark)) {
            [false, false] => {}
            [begins, _] => is_counting = begins,
        }
        // Of `12<io> madvise(...`, but not the end of a call whose beginning was told.
        let call = line.split_once("<io> ").and_then(|(_, call)| call.trim_start().split_once('('));
        if let Some((name, _)) = call.filter(|(name, _)| is_counting && !name.starts_with('<')) {
            *counts.entry(name).or_default() += 1;
        }
    }
    println!("{counts:?}");
    // The thread waits for the kick and interrupts the guest, which is a write to an event each.
    counts.retain(|name, _| !name.starts_with("epoll_"));
    let all = TRANSPORTS.len() * ROUNDS;
    assert_eq!(counts, BTreeMap::from([("madvise", all), ("write", all)]));
}
