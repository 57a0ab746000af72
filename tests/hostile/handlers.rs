//! Page-fault handlers: those that give a guest its pages, and those that do not.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use alula::memory::faults::Faults;
use alula::memory::{self, Source};
use alula::sys::descriptor;
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::common::faults::{self, Heard};
use super::common::{self, Folder, Service, wait_for};
use super::{GO_ON, PAUSE, Snapshot, events, type_line};

/// Pages of each region that a handler gives before it is asked: an emulated machine takes longer for all of them than a
/// handler may take for an answer.
const AHEAD: usize = 1024;
const LOST: u8 = 149;
/// The variable that makes a process a handler: how it is to work, its socket, and the file of the memory.
const SERVES: &str = "ALULA_TEST_SERVES";

#[test]
fn a_handler_is_looked_at_from_outside() {
    let Ok(told) = std::env::var(SERVES) else { return };
    let [how, socket, memory] = told.split('|').collect::<Vec<_>>().try_into().unwrap();
    let listener = UnixListener::bind(socket).unwrap();
    if how == "deaf" {
        loop {
            std::thread::park();
        }
    }
    let memory = File::open(memory).unwrap();
    for stream in listener.incoming() {
        let stream = stream.unwrap();
        if how == "hangs up" {
            continue;
        }
        let (message, faults) = faults::receive(&stream);
        let regions = faults::regions(&message);
        let page_of = |address: u64| {
            let is_in =
                |region: &&faults::Region| (region.start..region.start + region.size).contains(&address);
            let region = regions.iter().find(is_in).unwrap();
            let start = address & !(region.page - 1);
            let mut page = vec![0; region.page as usize];
            memory.read_exact_at(&mut page, region.offset + (start - region.start)).unwrap();
            (start, page)
        };
        if how == "ahead" {
            for region in &regions {
                let addresses = (region.start..region.start + region.size).step_by(region.page as usize);
                for address in addresses.take(AHEAD) {
                    let (start, page) = page_of(address);
                    faults::copy(&faults, start, &page).unwrap();
                }
            }
        }
        if how == "removed" {
            follow(&faults, &stream, page_of);
            continue;
        }
        let mut count = 0;
        while let Some(address) = faults::next(&faults, &stream) {
            let (start, mut page) = page_of(address);
            count += 1;
            match how {
                "silent" => continue,
                "late" => std::thread::sleep(Duration::from_millis(if count == 1 { 1500 } else { 1 })),
                "wrong" if count > 20 => page.fill(0),
                _ => {}
            }
            // A page that two CPUs wait for is there already at the second fault.
            let given = faults::copy(&faults, start, &page).map_err(|error| error.raw_os_error());
            assert!(
                given.is_ok() || given == Err(Some(libc::EEXIST)) || given == Err(Some(libc::ESRCH)),
                "{given:?}"
            );
            if how == "twice" {
                let _ = faults::copy(&faults, start, &vec![0xff; page.len()]);
            }
        }
    }
}

/// Gives each page once, and zeros for those that the guest has given up since. A page that is wanted again otherwise is
/// full of ones: a handler that keeps no pages has nothing else for it.
fn follow(faults: &File, stream: &UnixStream, page_of: impl Fn(u64) -> (u64, Vec<u8>)) {
    let (mut given, mut removed) = (BTreeSet::new(), BTreeSet::new());
    while let Some(heard) = faults::next_heard(faults, stream) {
        let address = match heard {
            Heard::Fault(address) => address,
            Heard::Removed(range) => {
                removed.extend(range.step_by(4096));
                continue;
            }
        };
        let (start, mut page) = page_of(address);
        if !given.insert(start) {
            page.fill(0xff);
        }
        let give = || match removed.contains(&start) {
            true => faults::zero(faults, start, page.len() as u64),
            false => faults::copy(faults, start, &page),
        };
        // Who gives up pages is not always done with that when the handler has heard of it: EAGAIN until then.
        while give().is_err_and(|error| error.raw_os_error() == Some(libc::EAGAIN)) {
            std::thread::yield_now();
        }
    }
}

/// A process that is a handler, which ends when this value is dropped.
struct Handler {
    child: Child,
    socket: PathBuf,
}

impl Handler {
    /// Starts a handler that works as `how` says, for the memory of `snapshot`.
    fn start(snapshot: &Snapshot, how: &str) -> Self {
        let socket = snapshot.path(how);
        let told = format!("{how}|{}|{}", socket.display(), snapshot.path("memory").display());
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "handlers::a_handler_is_looked_at_from_outside", "--nocapture"])
            .env(SERVES, told)
            .spawn()
            .unwrap();
        wait_for(|| socket.exists());
        Self { child, socket }
    }

    /// The fields of a load that name this handler.
    fn backend(&self, resumes: bool) -> Value {
        let backend = json!({ "backend_type": "Uffd", "backend_path": self.socket });
        json!({ "mem_backend": backend, "resume_vm": resumes })
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn goes_to_its_end(mut service: Service) {
    type_line(&mut service.process);
    ends_well(service);
}

fn ends_well(service: Service) {
    let ended = service.process.end();
    assert!(ended.code == Some(0) && ended.text.contains(" cases, 0 failed"), "{}", ended.text);
}

#[test]
fn a_guest_gets_its_pages_from_a_handler() {
    let snapshot = Snapshot::new(&[]);
    for how in ["at once", "late", "twice", "ahead"] {
        let handler = Handler::start(&snapshot, how);
        let warm: &[&str] = if how == "at once" { &["--warm", "cpus=2,memory=64M"] } else { &[] };
        let service = Service::start(warm);
        service.client().ok("PUT", "/snapshot/load", &snapshot.load(&handler.backend(true)));
        goes_to_its_end(service);
    }
}

#[test]
fn what_a_balloon_takes_comes_back_from_a_handler_as_zeros() {
    let mut service = Service::start(&[]);
    let mut client = service.client();
    client.ok("PUT", "/balloon", r#"{"amount_mib": 0, "deflate_on_oom": false}"#);
    service.boot_source("echo case=balloon");
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    service.process.expect("alula firmware");
    let snapshot = Snapshot::of(Folder::new(), &service);
    let handler = Handler::start(&snapshot, "removed");
    let service = Service::start(&[]);
    service.client().ok("PUT", "/snapshot/load", &snapshot.load(&handler.backend(true)));
    goes_to_its_end(service);
}

#[test]
fn a_guest_with_a_handler_is_saved_whole() {
    let snapshot = Snapshot::new(&[]);
    let handler = Handler::start(&snapshot, "at once");
    let service = Service::start(&[]);
    let mut client = service.client();
    client.ok("PUT", "/snapshot/load", &snapshot.load(&handler.backend(false)));
    let path = |name: &str| snapshot.path(name);
    let save = |kind: &str, state: &str, memory: &str| {
        let body =
            json!({ "snapshot_type": kind, "snapshot_path": path(state), "mem_file_path": path(memory) });
        service.client().ok("PUT", "/snapshot/create", &body.to_string());
    };
    // A difference has the pages that have come so far: the handler is asked for no more to save it.
    save("Diff", "diff", "diff-memory");
    save("Full", "full", "full-memory");
    let paths = |names: [&str; 4]| names.map(|name| path(name).to_str().unwrap().to_owned());
    let merge = [
        ["snapshot", "merge"].map(str::to_owned).to_vec(),
        paths(["state", "memory", "diff", "diff-memory"]).to_vec(),
    ];
    let before = fs::read(path("memory")).unwrap();
    common::output(
        common::alula().to_str().unwrap(),
        &merge.concat().iter().map(String::as_str).collect::<Vec<_>>(),
    );
    let [full, merged] = ["full-memory", "memory"].map(|name| fs::read(path(name)).unwrap());
    assert!(full == merged, "a difference and the whole are not the same");
    // Only the pages by which a clone knows that it is one have changed.
    let changed = before.chunks(4096).zip(full.chunks(4096)).filter(|(one, other)| one != other).count();
    assert!((1..=2).contains(&changed), "{changed} pages have changed");
    drop(service);
    snapshot.go_on(Service::start(&[]));
}

#[test]
fn a_load_whose_handler_gives_nothing_fails_and_is_tried_again() {
    std::thread::scope(|scope| {
        for how in ["silent", "deaf", "hangs up"] {
            scope.spawn(move || {
                let snapshot = Snapshot::new(&[]);
                fs::write(snapshot.path("file"), "").unwrap();
                let handler = Handler::start(&snapshot, how);
                let service = Service::start(&[]);
                for path in [snapshot.path("file"), snapshot.path("nobody"), "x".repeat(200).into()] {
                    let backend = json!({ "backend_type": "Uffd", "backend_path": path });
                    let expected = format!(
                        "hand the guest's memory to the page-fault handler at `{}`: connect",
                        path.display()
                    );
                    snapshot.refuse(&service, &json!({ "mem_backend": backend }), &expected);
                }
                // A handler that hangs up may do so before the message is sent, or after.
                let expected = match how {
                    "hangs up" => "the page-fault handler at `",
                    _ => "has not given a page of the guest's memory for 5 s: have it read",
                };
                snapshot.refuse(&service, &handler.backend(true), expected);
                let right = Handler::start(&snapshot, "at once");
                service.client().ok("PUT", "/snapshot/load", &snapshot.load(&right.backend(true)));
                goes_to_its_end(service);
            });
        }
    });
}

#[test]
fn a_handler_that_is_gone_ends_its_guest_with_words() {
    let snapshot = Snapshot::new(&[]);
    let mut handler = Handler::start(&snapshot, "at once");
    let told = snapshot.path("events");
    let service = Service::start(&["--events", told.to_str().unwrap()]);
    let mut client = service.client();
    client.ok("PUT", "/snapshot/load", &snapshot.load(&handler.backend(false)));
    handler.child.kill().unwrap();
    client.send(&format!("PATCH /vm HTTP/1.1\r\nContent-Length: {}\r\n\r\n{GO_ON}", GO_ON.len()));
    let (socket, ended) = (service.socket, service.process.end());
    let path = handler.socket.display();
    let words = format!("the guest's memory is lost: the page-fault handler at `{path}` is gone, or");
    assert_eq!(ended.code, Some(LOST.into()), "{}", ended.text);
    assert!(ended.text.contains(&words), "{}", ended.text);
    let told = events(&told);
    let [.., failed, last] = &told[..] else { panic!("{told:?}") };
    assert!(
        failed["event"] == "failed" && failed["reason"].as_str().unwrap().starts_with(&words),
        "{failed}"
    );
    assert!(last["event"] == "ended" && last["exit_code"] == LOST, "{last}");
    assert!(!socket.exists() && !snapshot.path("vsock").exists(), "a socket was left behind");
}

#[test]
fn a_guest_waits_for_a_handler_that_stands_still() {
    let snapshot = Snapshot::new(&[]);
    let handler = Handler::start(&snapshot, "at once");
    let told = snapshot.path("events");
    let mut service = Service::start(&["--events", told.to_str().unwrap()]);
    service.client().ok("PUT", "/snapshot/load", &snapshot.load(&handler.backend(false)));
    common::send(&handler.child, libc::SIGSTOP);
    service.client().ok("PATCH", "/vm", GO_ON);
    // A guest that sleeps until a line comes needs no page before.
    type_line(&mut service.process);
    wait_for(|| events(&told).iter().any(|event| event["event"] == "page_awaited"));
    let awaited = events(&told).into_iter().find(|event| event["event"] == "page_awaited").unwrap();
    assert_eq!(awaited["path"], handler.socket.to_str().unwrap());
    assert_eq!(service.client().ok("GET", "/", "").json()["state"], "Running");
    common::send(&handler.child, libc::SIGCONT);
    ends_well(service);
}

#[test]
fn a_handler_that_gives_wrong_pages_harms_its_guest_alone() {
    let snapshot = Snapshot::new(&[]);
    let handler = Handler::start(&snapshot, "wrong");
    let mut service = Service::start(&[]);
    service.client().ok("PUT", "/snapshot/load", &snapshot.load(&handler.backend(true)));
    type_line(&mut service.process);
    // What wrong pages lead to is the guest's business: it may end, or do anything for ever.
    for _ in 0..20 {
        if !service.process.is_running() {
            // A reset is 0 from a service, and the guest may write any code to its exit register.
            let ended = service.process.end();
            assert!(ended.code.is_some() && ended.text.contains("alula: the guest "), "{ended:?}");
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    service.client().ok("PATCH", "/vm", PAUSE);
}

#[test]
fn a_fault_that_its_reader_forgot_is_there_once_more() {
    let served = Faults::open().unwrap();
    let reader = File::from(descriptor::duplicate(&served).unwrap());
    let memory = memory::map(&[memory::Range { start: 0, size: 2 << 20 }], Source::Served(&served)).unwrap();
    let (_connection, stream) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let guest = memory.clone();
        scope.spawn(move || guest.memory().read_obj::<u8>(GuestAddress(0)).unwrap());
        let first = faults::next(&reader, &stream).unwrap();
        assert_eq!(served.waiting().unwrap(), 1);
        served.ask_again(&memory.memory());
        assert_eq!(faults::next(&reader, &stream), Some(first));
        served.leave(&memory.memory());
    });
}

#[test]
fn who_may_not_have_faults_served_is_told_what_to_do() {
    let told = std::thread::spawn(|| {
        common::forbid(libc::SYS_userfaultfd, libc::EPERM);
        common::forbid(libc::SYS_ioctl, libc::ENOTTY);
        Faults::open().unwrap_err().to_string()
    });
    let told = told.join().unwrap();
    assert!(told.contains("this user may not have faults of the kernel served"), "{told}");
    assert!(told.contains("vm.unprivileged_userfaultfd"), "{told}");
}
