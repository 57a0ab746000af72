//! Snapshots in jails, which have no /proc: one jail's guest goes on in another, whose memory is a file, or is given by a
//! page-fault handler outside.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;

use serde_json::json;

use crate::common::{Process, faults};
use crate::site::Site;
use crate::{GID, UID, boot};

/// How a page-fault handler works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Gives,
    /// The handler reads faults, and gives nothing.
    Silent,
    /// The handler reads one more fault when told so, and is gone.
    Forgets,
}

/// Saves a guest of the jail `first`, and puts the kernel and the snapshot into those of other jails.
fn save(site: &Site, ids: &[&str]) {
    site.put_kernel("first");
    let mut command = site.jail("first");
    command.args(["--", "--api-sock", "/run/api.sock"]);
    let (_first, mut client) = (Process::spawn(command), site.client("first"));
    boot(&mut client, Path::new("/kernel"));
    // There is no /proc to ask which pages the guest has, nor which boot of the host this is.
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    let paths = json!({ "snapshot_path": "/run/state", "mem_file_path": "/run/memory" });
    client.ok("PUT", "/snapshot/create", &paths.to_string());
    for id in ids {
        site.put_kernel(id);
        for name in ["state", "memory"] {
            let (from, to) = (site.root("first").join("run").join(name), site.root(id).join(name));
            fs::copy(from, &to).unwrap();
            chown(&to, Some(UID), Some(GID)).unwrap();
        }
    }
}

fn load(kind: &str, path: &str, resumes: bool) -> String {
    let memory = json!({ "backend_type": kind, "backend_path": path });
    json!({ "snapshot_path": "/state", "mem_backend": memory, "resume_vm": resumes }).to_string()
}

#[test]
fn a_guest_in_a_jail_is_saved_and_goes_on_in_another() {
    let site = Site::new();
    save(&site, &["second"]);
    let mut command = site.jail("second");
    command.args(["--", "--api-sock", "/run/api.sock"]);
    let (_second, mut client) = (Process::spawn(command), site.client("second"));
    client.ok("PUT", "/snapshot/load", &load("File", "/memory", true));
    assert_eq!(client.ok("GET", "/", "").json()["state"], "Running");
}

/// A page-fault handler of one guest, on a thread of its own.
struct Handler {
    how: How,
    is_over: AtomicBool,
}

impl Handler {
    fn start(site: &Site, id: &str, how: How) -> Arc<Self> {
        let socket = site.root(id).join("run/pages");
        let listener = UnixListener::bind(&socket).unwrap();
        fs::set_permissions(&socket, PermissionsExt::from_mode(0o777)).unwrap();
        let memory = File::open(site.root(id).join("memory")).unwrap();
        let handler = Arc::new(Self { how, is_over: AtomicBool::new(false) });
        let serving = handler.clone();
        thread::spawn(move || serving.serve(&listener, &memory));
        handler
    }

    fn serve(&self, listener: &UnixListener, memory: &File) {
        let (stream, _) = listener.accept().unwrap();
        let (message, faults) = faults::receive(&stream);
        let regions = faults::regions(&message);
        while let Some(address) = faults::next(&faults, &stream) {
            match self.how {
                How::Silent => continue,
                How::Forgets if self.is_over.load(SeqCst) => return,
                _ => {}
            }
            let region = regions.iter().find(|region| address - region.start < region.size).unwrap();
            let start = address & !(region.page - 1);
            let mut page = vec![0; region.page as usize];
            memory.read_exact_at(&mut page, region.offset + (start - region.start)).unwrap();
            // A page that two threads wait for is there already at the second fault.
            let given = faults::copy(&faults, start, &page).map_err(|error| error.raw_os_error());
            assert!(given.is_ok() || given == Err(Some(libc::EEXIST)), "{given:?}");
        }
    }
}

/// Loads the snapshot in a jail, whose program is executed anew or goes on, with a handler that works so.
fn load_with_handler(site: &Site, id: &str, how: How, is_executed: bool) {
    let mut command = site.jail(id);
    if is_executed {
        command.arg("--exec-file").arg(&site.program).args(["--", "serve"]);
    } else {
        command.arg("--");
    }
    command.args(["--api-sock", "/run/api.sock"]);
    let (process, mut client) = (Process::spawn(command), site.client(id));
    // The node is there for another program, which has not opened the device before.
    assert_eq!(site.root(id).join("dev/userfaultfd").exists(), is_executed, "{id}");
    let handler = Handler::start(site, id, how);
    let load = load("Uffd", "/run/pages", how == How::Gives);
    match how {
        How::Gives => {
            client.ok("PUT", "/snapshot/load", &load);
            assert_eq!(client.ok("GET", "/", "").json()["state"], "Running", "{id}");
        }
        How::Silent => {
            let fault = client.request("PUT", "/snapshot/load", &load).fault();
            assert!(fault.contains("has not given a page of the guest's memory for 5 s"), "{fault}");
        }
        How::Forgets => {
            client.ok("PUT", "/snapshot/load", &load);
            handler.is_over.store(true, SeqCst);
            client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
            let ended = process.end();
            let words = "the page-fault handler at `/run/pages` is gone";
            assert!(ended.code == Some(149) && ended.text.contains(words), "{ended:?}");
        }
    }
}

#[test]
fn a_guest_in_a_jail_gets_its_pages_from_a_handler() {
    if !Path::new("/dev/userfaultfd").exists() {
        return println!("skipped: this host has no /dev/userfaultfd");
    }
    let site = Site::new();
    let cases = [
        ("goes-on", How::Gives, false),
        ("executed", How::Gives, true),
        ("silent", How::Silent, false),
        ("forgets", How::Forgets, false),
    ];
    save(&site, &cases.map(|(id, ..)| id));
    let site = &site;
    thread::scope(|scope| {
        for (id, how, is_executed) in cases {
            scope.spawn(move || load_with_handler(site, id, how, is_executed));
        }
    });
}
