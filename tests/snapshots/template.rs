//! Templates, and the clones that they make: processes of their own from one snapshot.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use super::{PAUSE, Saved};
use crate::common::inject::{Injected, Outcome};
use crate::common::walls::{assert_walled, trespass};
use crate::common::{self, Client, Folder, Process, alula, await_child, wait_for};

const GO_ON: &str = super::GO_ON;
/// How many clones of one template are there at once, if that is told.
const CLONES: &str = "ALULA_TEST_CLONES";
/// How many clones are asked for at a time: fewer than a template works on.
const AT_ONCE: usize = 8;

/// A template of a guest that has read its line already, and goes on to its end by itself.
pub struct Template {
    pub folder: Folder,
    pub process: Process,
    pub clones: Vec<u32>,
}

impl Template {
    /// Saves a guest, and starts a template of it, by the command `before` where one is given.
    pub fn new(before: &[&str]) -> Self {
        Self::of("echo case=identity,block", before, &[])
    }

    /// As [`Self::new`], of a guest with these words, and with these options.
    fn of(words: &str, before: &[&str], options: &[&str]) -> Self {
        let mut saved = Saved::with(&[], words, true);
        saved.service.process.stdin.as_mut().unwrap().write_all(b"go on\n").unwrap();
        // The line is in the guest's UART before the service lets in another client after this request.
        saved.service.client().ok("GET", "/", "");
        saved.service.client().ok(
            "PUT",
            "/snapshot/create",
            &json!({ "folder": saved.path("saved") }).to_string(),
        );
        let Saved { folder, service } = saved;
        // The saved guest ends, as a disk has one writer.
        drop(service);
        let alula = std::path::absolute(alula()).unwrap();
        let mut command = match before {
            [] => Command::new(alula),
            [program, arguments @ ..] => {
                let mut command = Command::new(program);
                command.args(arguments).arg(alula);
                command
            }
        };
        command.args(["template", "saved", "--api-sock", "t.sock"]).args(options).current_dir(&folder.0);
        command.env("XDG_RUNTIME_DIR", &folder.0);
        let process = Process::spawn(command);
        wait_for(|| folder.path("t.sock").exists());
        Self { folder, process, clones: Vec::new() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path(name)
    }

    /// The body of a request for a clone with a disk and a console of its own.
    pub fn order(&self, id: &str, more: &Value) -> String {
        let mut body = json!({
            "id": id,
            "api_sock": format!("{id}.sock"),
            "serial": { "serial_out_path": format!("{id}.console") },
            "drive_overrides": [{ "drive_id": "disk", "path_on_host": format!("{id}.qcow2"), "overlay": true }],
        });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body.to_string()
    }

    pub fn make(&mut self, client: &mut Client, body: &str) -> u32 {
        let pid = client.ok("PUT", "/clones", body).json()["pid"].as_u64().unwrap() as u32;
        self.clones.push(pid);
        pid
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.path("t.sock"))
    }
}

impl Drop for Template {
    fn drop(&mut self) {
        // Clones that are not children of this process any more were waited for.
        for pid in self.clones.iter().filter(|pid| parent(**pid) == Some(std::process::id())) {
            common::send_to(*pid, libc::SIGKILL);
            await_child(*pid);
        }
    }
}

/// The parent of a process; None: there is no such process.
fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

/// The open files of a process that only one process may have: its sockets, and what tells it of signals.
fn own(pid: u32) -> BTreeSet<String> {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = links.flatten().filter_map(|link| fs::read_link(link.path()).ok());
    let names = links.map(|link| link.to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("socket:") || name.contains("signalfd")).collect()
}

/// Asks for so many clones, several at a time, and returns the clients, and the clones' names and processes.
fn made_at_once(template: &Template, count: usize) -> (Vec<Client>, Vec<(String, u32)>) {
    let (mut clients, mut clones) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        let ask = |first: usize| {
            let ids = (first..count).step_by(AT_ONCE).map(|number| format!("c{number}"));
            let orders: Vec<_> = ids.map(|id| (template.order(&id, &json!({})), id)).collect();
            let mut client = template.client();
            scope.spawn(move || {
                let made = orders.into_iter().map(|(order, id)| {
                    let answer = client.ok("PUT", "/clones", &order).json();
                    (id, answer["pid"].as_u64().unwrap() as u32)
                });
                let made: Vec<_> = made.collect();
                (client, made)
            })
        };
        let asking: Vec<_> = (0..AT_ONCE).map(ask).collect();
        for asked in asking {
            let (client, made) = asked.join().unwrap();
            clients.push(client);
            clones.extend(made);
        }
    });
    (clients, clones)
}

#[test]
fn ten_clones_of_a_template_are_ten_guests() {
    let count = std::env::var(CLONES).map_or(10, |count| count.parse::<usize>().unwrap());
    let mut template = Template::new(&[]);
    // One more, which is killed.
    let (_clients, mut clones) = made_at_once(&template, count + 1);
    template.clones.extend(clones.iter().map(|(_, pid)| *pid));
    assert!(clones.iter().all(|(_, pid)| parent(*pid) == Some(std::process::id())));
    let of_template = own(template.process.child.id());
    assert!(of_template.len() >= 4, "a signalfd, a listener, clients: {of_template:?}");
    for (_, pid) in &clones {
        let shared: Vec<_> = own(*pid).intersection(&of_template).cloned().collect();
        assert!(shared.is_empty(), "{shared:?}");
    }
    // The other clones go on without one of them, and without the template.
    let (_, killed) = clones.remove(4);
    common::send_to(killed, libc::SIGKILL);
    assert_eq!(await_child(killed), (None, libc::SIGKILL));
    template.process.send(libc::SIGTERM);
    assert_eq!(template.process.child.wait().unwrap().code(), Some(128 + libc::SIGTERM));
    assert!(!template.path("t.sock").exists());
    for (id, _) in &clones {
        let mut client = Client::connect(&template.path(&format!("{id}.sock")));
        assert_eq!(client.ok("GET", "/", "").json()["id"], **id);
        client.ok("PATCH", "/vm", GO_ON);
    }
    let mut identities = BTreeSet::new();
    for (id, pid) in &clones {
        let console = template.path(&format!("{id}.console"));
        assert_eq!(await_child(*pid).0, Some(0), "{:?}", fs::read_to_string(&console));
        let console = fs::read_to_string(console).unwrap();
        assert!(console.contains("2 cases, 0 failed"), "{console}");
        let identity = console.lines().find(|line| line.contains("identity: ok (ID ")).unwrap();
        identities.insert(identity.split_once("(ID ").unwrap().1.split(',').next().unwrap().to_owned());
        let overlay = fs::metadata(template.path(&format!("{id}.qcow2"))).unwrap().len();
        assert!(overlay > 4 << 16, "what the guest wrote is in its overlay, of {overlay} bytes");
    }
    assert_eq!(identities.len(), count, "{identities:?}");
    assert!(fs::read(template.path("disk")).unwrap() == vec![7; 1 << 20]);
}

/// Ends a template that refused clones: what stood in their way was told once by the template and the clones, whose
/// standard error is the same.
fn assert_faults_were_told_once(template: &mut Template) {
    let mut ended = std::mem::replace(&mut template.process, Process::start(["--version"]));
    ended.send(libc::SIGTERM);
    let text = ended.end().text;
    for said in ["there is something else already", "it is a directory", "`drive_overrides` of `other`"] {
        assert_eq!(text.matches(said).count(), 1, "{said}: {text}");
    }
}

#[test]
fn a_template_goes_on_after_a_clone_that_cannot_be_made() {
    // Whoever starts a template with SIGHUP ignored does not want it to end with a terminal.
    let mut template = Template::new(&["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"]);
    template.process.send(libc::SIGHUP);
    let mut client = template.client();
    template.folder.write("there", "a file of somebody's");
    let memory = fs::read_dir(template.path("saved")).unwrap().flatten();
    let memory = memory.map(|entry| entry.path()).find(|path| !path.ends_with("state")).unwrap();
    let disk = |path: &str, overlay| json!({ "drive_overrides": [{ "drive_id": "disk", "path_on_host": path, "overlay": overlay }] });
    let order = template.order("first", &json!({}));
    let first = template.make(&mut client, &order);
    for (more, expected) in [
        (json!({ "api_sock": "first.sock" }), "another process serves it: choose another path"),
        (json!({ "api_sock": "there" }), "there is something else already"),
        (json!({ "api_sock": "none/a.sock" }), "there is no folder `none`"),
        (json!({ "id": "a_b" }), "`id` `a_b`: expected 1 to 64 letters"),
        (json!({ "id": null, "api_sock": null }), "neither `id` nor `api_sock`"),
        (json!({ "id": 7 }), "`id`: expected a string, found `7`"),
        (json!({ "folder": "saved" }), "unknown field `folder`"),
        (json!({ "huge_pages": "2M" }), "memory that is mapped from a file cannot be of huge pages of 2 MiB"),
        (
            json!({ "network_overrides": [{ "iface_id": "n", "host_dev_name": "tap9" }] }),
            "`network_overrides` of `n`: the saved machine has no such device",
        ),
        (json!({ "vsock_override": { "uds_path": "v" } }), "`vsock_override`: the saved machine has no such"),
        (json!({ "logger": { "log_path": "none/log" } }), "none/log"),
        (json!({ "serial": { "serial_out_path": "fd:3" } }), "fd:3"),
        (
            disk("there", true),
            "make the overlay `there`: File exists (os error 17): choose another path, or remove",
        ),
        (disk("none/a.qcow2", true), "there is no folder `none`"),
        (disk("saved", false), "it is a directory"),
        (disk("first.qcow2", false), "it is in use by process"),
        (disk(memory.to_str().unwrap(), false), "is a file of the snapshot itself"),
        (
            json!({ "drive_overrides": [
                { "drive_id": "disk", "path_on_host": "a" }, { "drive_id": "disk", "path_on_host": "b" }
            ] }),
            "`drive_overrides`: `disk` is there twice",
        ),
        (
            json!({ "drive_overrides": [{ "drive_id": "other", "path_on_host": "a" }] }),
            "`drive_overrides` of `other`: the saved machine has no such device",
        ),
    ] {
        let body = template.order("bad", &more);
        let fault = client.request("PUT", "/clones", &body).fault();
        assert!(fault.contains(expected), "{body}: {fault}");
        for left in ["bad.sock", "bad.qcow2"] {
            assert!(!template.path(left).exists(), "{body} has left `{left}`");
        }
    }
    for (method, path, body) in [("GET", "/", ""), ("PUT", "/clones", ""), ("PUT", "/vm", "{}")] {
        assert_eq!(client.request(method, path, body).status(), "400", "{method} {path}");
    }
    assert_eq!(fs::read_to_string(template.path("there")).unwrap(), "a file of somebody's");
    // The refused clones have changed nothing in the template: a right one follows.
    let order = template.order("last", &json!({ "resume_vm": true }));
    let last = template.make(&mut client, &order);
    assert_eq!(await_child(last).0, Some(0));
    common::send_to(first, libc::SIGTERM);
    assert_eq!(await_child(first).0, Some(128 + libc::SIGTERM));
    assert_faults_were_told_once(&mut template);
    // A microVM's own socket makes no clones.
    let service = common::Service::start(&[]);
    let fault = service.client().request("PUT", "/clones", "{}").fault();
    assert!(fault.contains("A template is asked for clones"), "{fault}");
}

#[test]
fn clones_are_asked_for_by_a_command_and_found_by_name() {
    let mut template = Template::new(&[]);
    let command = |arguments: &[&str]| {
        let mut command = Command::new(std::path::absolute(alula()).unwrap());
        command.args(arguments).current_dir(&template.folder.0).env("XDG_RUNTIME_DIR", &template.folder.0);
        Process::spawn(command).end()
    };
    let words = ["clone", "-n", "2", "--template", "t.sock", "--id", "web", "--paused"];
    let own = ["--overlay", "disk={id}.qcow2", "--console", "console-{n}"];
    let made = command(&[&words[..], &own].concat());
    let pids: Vec<u32> = made.text.lines().filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
    assert_eq!((made.code, pids.len()), (Some(0), 2), "{}", made.text);
    assert_eq!(made.text, format!("web-1: process {}\nweb-2: process {}\n", pids[0], pids[1]));
    let status = command(&["ctl", "web-2", "status"]);
    assert!(status.text.starts_with("web-2: Paused; 2 CPUs"), "{}", status.text);
    // A clone by a name that is taken is refused, and the clone that has it stays.
    let again = command(&["clone", "--template", "t.sock", "--id", "web-1", "--overlay", "disk=x.qcow2"]);
    assert_eq!(again.code, Some(1));
    assert!(again.text.contains("make clone `web-1`: PUT /clones: Clone error: "), "{}", again.text);
    for (number, pid) in pids.iter().enumerate() {
        let id = format!("web-{}", number + 1);
        assert_eq!(command(&["ctl", &id, "resume"]).code, Some(0));
        assert_eq!(await_child(*pid).0, Some(0));
        assert!(template.path(&format!("{id}.qcow2")).exists());
        assert!(template.path(&format!("console-{}", number + 1)).exists());
    }
    template.process.send(libc::SIGINT);
    assert_eq!(template.process.child.wait().unwrap().code(), Some(128 + libc::SIGINT));
}

#[test]
fn clones_of_process_1_are_its_children_and_are_reaped() {
    let mut template = Template::new(&["unshare", "--pid", "--fork"]);
    let mut client = template.client();
    let first = children(template.process.child.id());
    assert_eq!(first.len(), 1, "unshare has one child, the template");
    for number in 0..2 {
        let body = template.order(&format!("c{number}"), &json!({ "resume_vm": number == 0 }));
        client.ok("PUT", "/clones", &body);
        if number == 0 {
            // The first clone's guest ends, and the template waits for the clone.
            wait_for(|| children(first[0]).is_empty());
        }
    }
    let clones = children(first[0]);
    assert_eq!(clones.len(), 1);
    common::send_to(first[0], libc::SIGTERM);
    assert_eq!(template.process.child.wait().unwrap().code(), Some(128 + libc::SIGTERM));
    // The kernel ends a PID namespace with its first process.
    wait_for(|| parent(clones[0]).is_none());
}

/// The children of a process, those that have ended and were not waited for among them.
fn children(pid: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter(|other| parent(*other) == Some(pid)).collect()
}

#[test]
fn a_disk_of_a_restored_guest_can_be_another_one() {
    let saved = Saved::with(&[], "echo case=block,cpus", true);
    saved.service.client().ok("PUT", "/snapshot/create", &saved.create());
    let Saved { folder, mut service } = saved;
    service.client().ok("PATCH", "/vm", PAUSE);
    // The guest that was saved still has its disk: nobody else may read it, even.
    let other = common::Service::start(&[]);
    let saved = Saved { folder, service: other };
    let drive = |path: &str, overlay: bool| {
        let path = saved.path(path);
        let drive = json!({ "drive_id": "disk", "path_on_host": path, "overlay": overlay });
        saved.load(&json!({ "drive_overrides": [drive], "resume_vm": true }))
    };
    saved.refuse(&drive("over.qcow2", true), "it is in use by process");
    assert!(!saved.path("over.qcow2").exists());
    fs::copy(saved.path("disk"), saved.path("copy")).unwrap();
    let mut client = saved.service.client();
    client.ok("PUT", "/snapshot/load", &drive("copy", false));
    let config = client.ok("GET", "/vm/config", "").json();
    assert_eq!(config["drives"][0]["path_on_host"], json!(saved.path("copy")));
    service.process.send(libc::SIGKILL);
    let Saved { folder, service: other } = saved;
    super::end(other);
    let is_written = fs::read(folder.path("copy")).unwrap() != vec![7; 1 << 20];
    assert!(is_written, "the guest has written to its disk");
    // Each restored guest can have an overlay of its own over the saved disk.
    let mut load = json!({
        "snapshot_path": folder.path("state"),
        "mem_file_path": folder.path("memory"),
        "resume_vm": true,
    });
    for name in ["one.qcow2", "two.qcow2"] {
        load["drive_overrides"] =
            json!([{ "drive_id": "disk", "path_on_host": folder.path(name), "overlay": true }]);
        let service = common::Service::start(&[]);
        service.client().ok("PUT", "/snapshot/load", &load.to_string());
        let config = service.client().ok("GET", "/vm/config", "").json();
        assert_eq!(
            config["drives"][0]["backing"],
            json!([{ "path_on_host": folder.path("disk"), "format": "raw" }])
        );
        super::end(service);
    }
    assert!(fs::read(folder.path("disk")).unwrap() == vec![7; 1 << 20]);
}

/// The number of filters that each system call of a thread passes (proc(5)).
fn filters(process: u32, name: &str) -> u32 {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    // Another thread may just have ended.
    let mut threads = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
    let thread = threads.find(|status| status.starts_with(&format!("Name:\t{name}\n"))).unwrap();
    let line = thread.lines().find_map(|line| line.strip_prefix("Seccomp_filters:\t"));
    line.unwrap().parse().unwrap()
}

#[test]
fn a_template_keeps_its_first_walls_and_its_clones_get_the_last() {
    let mut template = Template::of("echo case=identity end=idle", &[], &[]);
    let pid = template.process.child.id();
    let order = template.order("a", &json!({}));
    let clone = template.make(&mut template.client(), &order);
    let threads = ["alula", "io", "signals", "vcpu0", "vcpu1"];
    // The one filter of a template is that of `main` before its guest runs, and each of its clones has it from there.
    for (process, threads, of_main) in [(pid, &threads[..1], 1), (clone, &threads, 1), (clone, &threads, 2)] {
        if of_main == 2 {
            Client::connect(&template.path("a.sock")).ok("PATCH", "/vm", GO_ON);
            let console = || fs::read_to_string(template.path("a.console")).unwrap_or_default();
            wait_for(|| console().contains(", 0 failed"));
        }
        assert_walled(process, threads);
        assert_eq!(filters(process, "alula"), of_main);
        // A thread that takes no part in running the guest lays its last walls while `main` goes on.
        for thread in &threads[1..] {
            wait_for(|| filters(process, thread) == 2);
        }
    }
    for (process, call) in [(clone, "execve"), (pid, "ptrace")] {
        let mut thread = Injected::new(process, "main");
        thread.is_refused = true;
        assert_eq!(trespass(&mut thread, call), Outcome::Signal(libc::SIGSYS), "{call}");
        thread.end(libc::SIGSYS);
    }
    assert_eq!(await_child(template.clones.remove(0)), (Some(148), 0));
    // The guest, which was told of its new identity, waited meanwhile.
    let console = fs::read_to_string(template.path("a.console")).unwrap();
    assert!(!console.contains("exception"), "{console}");
    let socket = template.path("t.sock");
    template.process.expect("the thread `main` made the system call `ptrace` (");
    assert_eq!(template.process.child.wait().unwrap().code(), Some(148));
    assert!(!socket.exists());
}

#[test]
fn clones_have_the_walls_that_their_template_was_given() {
    let mut bare = Template::of("echo case=identity end=idle", &[], &["--no-sandbox"]);
    let order = bare.order("a", &json!({ "resume_vm": true }));
    let clone = bare.make(&mut bare.client(), &order);
    let console = || fs::read_to_string(bare.path("a.console")).unwrap_or_default();
    wait_for(|| console().contains(", 0 failed"));
    for (process, thread) in [(bare.process.child.id(), "alula"), (clone, "alula"), (clone, "vcpu0")] {
        assert_eq!(filters(process, thread), 0, "{thread} of {process}");
    }

    let mut narrow = Template::of("echo case=identity end=idle", &[], &["--allow", "."]);
    let other = Folder::new();
    let outside = other.path("a.qcow2");
    let drive = json!([{ "drive_id": "disk", "path_on_host": outside, "overlay": true }]);
    let order = narrow.order("a", &json!({ "drive_overrides": drive }));
    let fault = narrow.client().request("PUT", "/clones", &order).fault();
    assert!(fault.contains("in no folder of --allow") && !outside.exists(), "{fault}");
    let order = narrow.order("b", &json!({}));
    narrow.make(&mut narrow.client(), &order);
}
