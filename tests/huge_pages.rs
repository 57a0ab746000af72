//! Guest memory in huge pages of 2 MiB of the host's pool (hugetlbfs). The cases enlarge the pool of this machine for as
//! long as they need it, and run as root for that.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use alula::memory::{self, Range, Source};
use common::{Client, Folder, Process, Service, faults};
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

const HUGE: u64 = 2 << 20;
const GUEST_MIB: u64 = 64;
const GUEST_PAGES: u64 = (GUEST_MIB << 20) / HUGE;
const RESET: &str = r#"{"action_type": "Reset"}"#;

/// One of the kernel's files on the pool.
fn file_of_pool(name: &str) -> PathBuf {
    PathBuf::from("/sys/kernel/mm/hugepages/hugepages-2048kB").join(name)
}

/// How many pages of the pool nobody has, and nobody has set aside.
fn unused() -> u64 {
    let number = |name| fs::read_to_string(file_of_pool(name)).unwrap().trim().parse::<u64>().unwrap();
    number("free_hugepages") - number("resv_hugepages")
}

/// Pages that a case has put into the pool, which go when this is dropped. One case at a time has any.
struct Pool {
    file: File,
    before: String,
}

impl Pool {
    /// Leaves `pages` in the pool for this case, beside those that others use.
    fn with(pages: u64) -> Self {
        let path = file_of_pool("nr_hugepages");
        let file = File::options().read(true).write(true).open(&path);
        let file = file.unwrap_or_else(|error| panic!("{}: {error}: run this as root", path.display()));
        file.lock().unwrap();
        let before = fs::read_to_string(&path).unwrap().trim().to_owned();
        let pool = Self { file, before };
        let there = unused();
        let wanted = pool.before.parse::<u64>().unwrap() + pages.saturating_sub(there);
        pool.set(&wanted.to_string());
        let unused = unused();
        assert!(unused >= pages, "this machine has {unused} huge pages to give, and {pages} are needed");
        pool
    }

    /// Takes the pages that nobody uses out of the pool, and returns how many are left.
    fn shrink(&self) -> u64 {
        let total = fs::read_to_string(file_of_pool("nr_hugepages")).unwrap().trim().parse::<u64>().unwrap();
        let left = total - unused();
        self.set(&left.to_string());
        assert_eq!(unused(), 0);
        left
    }

    fn set(&self, pages: &str) {
        self.file.write_all_at(pages.as_bytes(), 0).unwrap();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.set(&self.before);
    }
}

/// The body of a guest with pages of a kind.
fn machine(pages: &str) -> String {
    json!({ "vcpu_count": 2, "mem_size_mib": GUEST_MIB, "huge_pages": pages, "track_dirty_pages": true })
        .to_string()
}

/// A guest with huge pages that waits for a line.
fn waiting(extra: &[&str]) -> Service {
    let mut service = Service::start(extra);
    let mut client = service.client();
    client.ok("PUT", "/machine-config", &machine("2M"));
    service.boot_source("echo end=idle");
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    service.process.expect("alula firmware");
    service
}

fn type_line(process: &mut Process) {
    process.stdin.as_mut().unwrap().write_all(b"go on\n").unwrap();
    process.expect(" cases, 0 failed");
}

/// How many huge pages a process has touched.
fn touched(process: &Process) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("HugetlbPages:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024 / HUGE
}

#[test]
fn a_guest_has_all_its_huge_pages_from_its_start() {
    let pool = Pool::with(GUEST_PAGES);
    let there = unused();
    for warm in [&[][..], &["--warm", &format!("cpus=2,memory={GUEST_MIB}M")]] {
        let mut service = waiting(warm);
        assert_eq!(there - unused(), GUEST_PAGES, "{warm:?}");
        type_line(&mut service.process);
        let touched = touched(&service.process);
        assert!((1..=GUEST_PAGES).contains(&touched), "{touched} of {GUEST_PAGES}");
        // A guest that boots again has as many, and no others.
        service.client().ok("PUT", "/actions", RESET);
        service.process.expect("alula firmware");
        assert_eq!(there - unused(), GUEST_PAGES, "{warm:?}, after a reset");
        type_line(&mut service.process);
        service.process.send(libc::SIGTERM);
        assert_eq!(service.process.end().code, Some(143));
        common::wait_for(|| unused() == there);
    }
    drop(pool);
}

#[test]
fn a_pool_without_enough_pages_is_told_and_how_to_fill_it() {
    let pool = Pool::with(0);
    let mut service = Service::start(&[]);
    let mut client = service.client();
    let mib = 2 * unused() + 16;
    let body = json!({ "vcpu_count": 1, "mem_size_mib": mib, "huge_pages": "2M" }).to_string();
    client.ok("PUT", "/machine-config", &body);
    service.boot_source("case=serial end=idle");
    let start = r#"{"action_type": "InstanceStart"}"#;
    let fault = client.request("PUT", "/actions", start).fault();
    let expected = format!(
        "map {mib} MiB of guest memory in huge pages of 2 MiB: have the host keep {} of them for guests (sysctl \
         vm.nr_hugepages): Cannot allocate memory",
        mib / 2
    );
    assert!(fault.contains(&expected), "{fault}");
    client.ok("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 16, "huge_pages": "None"}"#);
    client.ok("PUT", "/actions", start);
    service.process.expect("1 cases, 0 failed");
    drop(pool);
}

#[test]
fn a_pool_too_small_for_a_slot_has_the_guest_try_again_later() {
    const SLOT_PAGES: u64 = (128 << 20) / HUGE;
    let pool = Pool::with(8);
    let mut service = Service::start(&[]);
    let mut client = service.client();
    let machine = r#"{"vcpu_count": 1, "mem_size_mib": 16, "huge_pages": "2M"}"#;
    client.ok("PUT", "/machine-config", machine);
    client.ok("PUT", "/hotplug/memory", r#"{"total_size_mib": 128}"#);
    service.boot_source("case=hotplug end=idle");
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    service.process.expect("hotplug: waits");
    // A pool that is larger than this guest would have enough.
    let mine = pool.shrink();
    client.ok("PATCH", "/hotplug/memory", r#"{"requested_size_mib": 128}"#);
    service.process.expect("hotplug: is to try again later");
    assert_eq!(client.ok("GET", "/hotplug/memory", "").json()["plugged_size_mib"], 0);
    pool.set(&(mine + SLOT_PAGES).to_string());
    service.process.expect("hotplug: 64 blocks of 64");
    client.ok("PATCH", "/hotplug/memory", r#"{"requested_size_mib": 0}"#);
    service.process.expect("1 cases, 0 failed");
    let counted = client.ok("GET", "/metrics", "").json()["memory_hotplug"].clone();
    assert!(counted["plug_fails"].as_u64() > Some(0) && counted["plug_bytes"] == 128 << 20, "{counted}");
    service.process.send(libc::SIGTERM);
    let said = service.process.end().text;
    assert!(said.contains("the guest cannot have 0x8000000 bytes at 0x"), "{said}");
    let expected = " more now: map 128 MiB of guest memory in huge pages of 2 MiB: have the host keep 64 of them for \
                    guests (sysctl vm.nr_hugepages)";
    assert!(said.contains(expected), "{said}");
    common::wait_for(|| unused() == mine + SLOT_PAGES);
    drop(pool);
}

/// Gives whoever connects the pages of a memory file, and returns the sizes of the pages that it was told of.
fn serve(listener: &UnixListener, memory: &File) -> Vec<u64> {
    let (stream, _) = listener.accept().unwrap();
    let (message, given) = faults::receive(&stream);
    let regions = faults::regions(&message);
    while let Some(address) = faults::next(&given, &stream) {
        let is_in = |region: &&faults::Region| (region.start..region.start + region.size).contains(&address);
        let region = regions.iter().find(is_in).unwrap();
        let start = address & !(region.page - 1);
        let mut page = vec![0; region.page as usize];
        memory.read_exact_at(&mut page, region.offset + (start - region.start)).unwrap();
        // A page that two CPUs wait for is there already at the second fault.
        let copied = faults::copy(&given, start, &page).map_err(|error| error.raw_os_error());
        let is_gone = copied == Err(Some(libc::EEXIST)) || copied == Err(Some(libc::ESRCH));
        assert!(copied.is_ok() || is_gone, "{copied:?}");
    }
    regions.iter().map(|region| region.page).collect()
}

#[test]
fn a_guest_with_huge_pages_is_saved_and_goes_on() {
    let pool = Pool::with(2 * GUEST_PAGES);
    let folder = Folder::new();
    let path = |name: &str| folder.path(name).to_str().unwrap().to_owned();
    let mut saved = waiting(&[]);
    let mut client = saved.client();
    let change = |client: &mut Client, state: &str| {
        client.ok("PATCH", "/vm", &json!({ "state": state }).to_string());
    };
    let save = |client: &mut Client, kind: &str, name: &str| {
        let (state, memory) = (path(name), path(&format!("{name}-memory")));
        let body = json!({ "snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory });
        client.ok("PUT", "/snapshot/create", &body.to_string());
        [state, memory]
    };
    change(&mut client, "Paused");
    let first = save(&mut client, "Full", "first");
    change(&mut client, "Resumed");
    type_line(&mut saved.process);
    change(&mut client, "Paused");
    let diff = save(&mut client, "Diff", "diff");
    let whole = save(&mut client, "Full", "whole");

    let load = |backend: &str, memory: &str, pages: &str| {
        let backend = json!({ "backend_type": backend, "backend_path": memory });
        json!({ "snapshot_path": path("first"), "mem_backend": backend, "resume_vm": true, "huge_pages": pages })
            .to_string()
    };
    // A page-fault handler gives huge pages, to who wants the pages of the snapshot and who says their size.
    for pages in ["Snapshot", "2M"] {
        let socket = path(&format!("handler-{pages}"));
        let listener = UnixListener::bind(&socket).unwrap();
        let memory = File::open(path("first-memory")).unwrap();
        let handler = std::thread::spawn(move || serve(&listener, &memory));
        let mut service = Service::start(&[]);
        service.client().ok("PUT", "/snapshot/load", &load("Uffd", &socket, pages));
        type_line(&mut service.process);
        assert!(touched(&service.process) > 0, "{pages}");
        // A guest that boots again has memory of its own, and its handler's connection ends.
        service.client().ok("PUT", "/actions", RESET);
        common::wait_for(|| handler.is_finished());
        assert!(handler.join().unwrap().iter().all(|size| *size == HUGE), "{pages}");
        service.process.expect("alula firmware");
        type_line(&mut service.process);
    }
    drop(saved);
    // A file gives none: who asks for them is refused, who does not gets what there is.
    let mut service = Service::start(&[]);
    let mut client = service.client();
    let refused = client.request("PUT", "/snapshot/load", &load("File", &path("first-memory"), "2M")).fault();
    assert!(refused.contains("memory that is mapped from a file cannot be of huge pages"), "{refused}");
    client.ok("PUT", "/snapshot/load", &load("File", &path("first-memory"), "Snapshot"));
    service.process.expect("the saved guest had huge pages of 2 MiB");
    type_line(&mut service.process);
    assert_eq!(touched(&service.process), 0);
    let config: Value = client.ok("GET", "/machine-config", "").json();
    assert_eq!(config["huge_pages"], "None");

    // The first snapshot with the difference merged into it is the second one.
    let merge = [&["snapshot".to_owned(), "merge".to_owned()][..], &first, &diff].concat();
    let alula = common::alula();
    common::output(alula.to_str().unwrap(), &merge.iter().map(String::as_str).collect::<Vec<_>>());
    let [merged, whole] = [&first[1], &whole[1]].map(|memory| fs::read(memory).unwrap());
    assert!(merged == whole, "a difference and the whole are not the same");
    drop(pool);
}

#[test]
fn memory_in_huge_pages_is_whole_ones_and_stays() {
    let pool = Pool::with(4);
    let ranges = [0, 4 << 30].map(|start| Range { start, size: 2 * HUGE });
    let there = unused();
    let memory = memory::map(&ranges, Source::Huge).unwrap();
    assert_eq!(there - unused(), 4);
    let regions = memory.memory();
    assert!(
        regions
            .iter()
            .all(|region| region.page_size() == HUGE && (region.as_ptr() as u64).is_multiple_of(HUGE))
    );
    let place = GuestAddress((4 << 30) + HUGE + 5);
    regions.write_obj(7_u8, place).unwrap();
    // A page that was given back could be somebody else's when the guest touches it.
    assert_eq!(memory::give_back(&regions, ranges[1]).unwrap(), 0);
    assert_eq!(regions.read_obj::<u8>(place).unwrap(), 7);
    let error = memory::map(&[Range { start: 0, size: HUGE / 2 }], Source::Huge).unwrap_err().to_string();
    assert!(error.contains("is not whole huge pages of 2 MiB"), "{error}");
    let error = Source::Shared.in_huge_pages().unwrap_err().to_string();
    assert!(error.contains("shared with a vhost-user backend"), "{error}");
    drop((regions, memory));
    assert_eq!(unused(), there);
    drop(pool);
}
