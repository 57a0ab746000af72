//! What happens to a microVM, as readers of `GET /events` and of `--events` are told, with the firmware
//! guest on real KVM.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;

use common::{Folder, Process, Service, alula, output, run, wait_for};
use serde_json::{Value, json};

const START: &str = r#"{"action_type": "InstanceStart"}"#;

/// A reader of `GET /events`, as `curl -N` is one.
struct Stream(BufReader<UnixStream>);

impl Stream {
    fn open(service: &Service) -> Self {
        let mut client = service.client();
        client.send("GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let head = client.receive().head;
        assert!(head.starts_with("HTTP/1.1 200 \r\n"), "{head}");
        for line in ["Connection: close", "Content-Type: application/x-ndjson"] {
            assert!(head.contains(&format!("\r\n{line}\r\n")), "{head}");
        }
        assert!(!head.contains("Content-Length"), "{head}");
        Self(BufReader::new(client.stream))
    }

    /// The next event; none: the stream has ended.
    fn next(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.0.read_line(&mut line).unwrap() {
            0 => None,
            _ => Some(serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))),
        }
    }

    /// Reads until an event of this name has come.
    fn until(&mut self, name: &str) -> Vec<Value> {
        let mut seen = Vec::new();
        loop {
            seen.push(self.next().unwrap_or_else(|| panic!("no `{name}` came: {seen:?}")));
            if seen.last().unwrap()["event"] == name {
                return seen;
            }
        }
    }

    fn rest(&mut self) -> Vec<Value> {
        std::iter::from_fn(|| self.next()).collect()
    }
}

fn names(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["event"].as_str().unwrap()).collect()
}

fn parse(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_reader_sees_the_whole_life_of_a_guest() {
    let service = Service::start(&["--id", "vm-1"]);
    let mut early = Stream::open(&service);
    let disk = service.folder.write("disk", [0; 4096]);
    let other = service.folder.write("other", [0; 8192]);
    let mut client = service.client();
    client.ok("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 64}"#);
    client.ok("PATCH", "/machine-config", r#"{"mem_size_mib": 65}"#);
    let drive = json!({ "drive_id": "d", "path_on_host": disk, "is_root_device": false }).to_string();
    client.ok("PUT", "/drives/d", &drive);
    service.boot_source("case=serial echo");
    assert!(client.request("PUT", "/machine-config", "{}").fault().contains("missing field"));
    client.ok("PUT", "/actions", START);
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    client.ok("PATCH", "/drives/d", &json!({ "drive_id": "d", "path_on_host": other }).to_string());
    client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    let seen = early.until("resumed");
    let expected = [
        "configured",
        "configured",
        "configured",
        "configured",
        "api_error",
        "started",
        "paused",
        "disk_swapped",
        "resumed",
    ];
    assert_eq!(names(&seen), expected);
    let what: Vec<_> = seen[..4].iter().map(|event| &event["what"]).collect();
    assert_eq!(what, ["/machine-config", "/machine-config", "/drives/d", "/boot-source"]);
    assert_eq!(seen[4]["request"], "PUT /machine-config");
    assert!(seen[4]["reason"].as_str().unwrap().contains("missing field"), "{}", seen[4]);
    assert_eq!((&seen[5]["reason"], &seen[6]["reason"]), (&json!("InstanceStart"), &json!("PATCH /vm")));
    assert_eq!((&seen[7]["drive_id"], &seen[7]["path"]), (&json!("d"), &json!(other)));
    // Who comes later finds the same.
    let mut late = Stream::open(&service);
    assert_eq!(late.until("resumed"), seen);
    let Service { mut process, .. } = service;
    process.stdin.as_mut().unwrap().write_all(b"x\n").unwrap();
    let ended = process.end();
    let rest = early.rest();
    assert_eq!(late.rest(), rest);
    let last = rest.last().unwrap();
    assert_eq!(last["event"], "ended");
    assert_eq!(last["exit_code"], json!(ended.code));
    let reason = last["reason"].as_str().unwrap();
    assert!(ended.text.contains(&format!("alula: {reason}\n")), "{}", ended.text);
    let mut uptime = 0;
    for event in seen.iter().chain(&rest) {
        assert_eq!(event["id"], "vm-1");
        let now = event["uptime_ms"].as_u64().unwrap();
        assert!(now >= uptime, "{event}");
        uptime = now;
        let time = event["time"].as_str().unwrap();
        assert!(time.len() == "2026-11-24T06:00:00.000Z".len() && time.ends_with('Z'), "{event}");
    }
}

#[test]
fn the_last_event_says_how_the_guest_ended_as_the_exit_code_does() {
    let folder = Folder::new();
    let mut ends = vec![
        ("end=poweroff", "powered_off", 0),
        ("end=reset", "reset", 120),
        ("end=halt", "halted", 121),
        ("end=7", "exited", 7),
    ];
    if common::is_software_kvm() {
        ends.push(("end=fail", "failed", 123));
    }
    if std::env::consts::ARCH == "x86_64" {
        ends.push(("end=crash", "crashed", 122));
    }
    for (words, name, code) in ends {
        let file = folder.path(name);
        let ended =
            run(["run", "--events", file.to_str().unwrap(), "--cmdline", &format!("case=serial {words}")]);
        assert_eq!(ended.code, Some(code), "{}", ended.text);
        let events = parse(&std::fs::read_to_string(&file).unwrap());
        assert_eq!(names(&events), ["configured", "started", name, "ended"]);
        assert_eq!(events[3]["exit_code"], code);
        let reason = events[3]["reason"].as_str().unwrap();
        assert!(ended.text.contains(&format!("alula: {reason}\n")), "{reason}: {}", ended.text);
    }
    let file = folder.path("no-kernel");
    let ended = run(["run", "/nonexistent", "--events", file.to_str().unwrap()]);
    let events = parse(&std::fs::read_to_string(&file).unwrap());
    assert_eq!((ended.code, names(&events)), (Some(125), vec!["configured", "ended"]));
    assert_eq!(events[1]["exit_code"], 125);
    assert!(events[1]["reason"].as_str().unwrap().contains("open kernel `/nonexistent`"), "{}", events[1]);
    let file = folder.path("no-config");
    let ended = run(["run", "--config", "/nonexistent", "--events", file.to_str().unwrap()]);
    let events = parse(&std::fs::read_to_string(&file).unwrap());
    assert_eq!((ended.code, names(&events)), (Some(125), vec!["ended"]));
    assert!(
        events[0]["reason"].as_str().unwrap().contains("read config file `/nonexistent`"),
        "{}",
        events[0]
    );
}

#[test]
fn a_signal_that_ends_the_process_is_the_last_event() {
    let service = Service::running("hello");
    let mut stream = Stream::open(&service);
    stream.until("started");
    let Service { mut process, .. } = service;
    process.send(libc::SIGTERM);
    let rest = stream.rest();
    assert_eq!(names(&rest), ["ended"]);
    assert_eq!(rest[0]["exit_code"], 128 + libc::SIGTERM);
    assert_eq!(rest[0]["reason"], "ended by signal 15");
    assert_eq!(process.end().code, Some(128 + libc::SIGTERM));
}

#[test]
fn a_slow_reader_is_told_how_many_lines_it_lost_and_holds_nobody_up() {
    const REQUESTS: u64 = 3000;
    let service = Service::start(&[]);
    let mut slow = Stream::open(&service);
    let mut keen = Stream::open(&service);
    let mut client = service.client();
    for number in 0..REQUESTS {
        assert_eq!(client.request("GET", &format!("/nothing-{number}"), "").status(), "400");
        let event = keen.next().unwrap();
        assert_eq!(event["request"], format!("GET /nothing-{number}"));
    }
    let (mut next, mut lost) = (0, 0);
    while next < REQUESTS {
        let event = slow.next().unwrap();
        if event["event"] == "lost" {
            let count = event["count"].as_u64().unwrap();
            lost += count;
            next += count;
        } else {
            assert_eq!(event["request"], format!("GET /nothing-{next}"));
            next += 1;
        }
    }
    assert!(lost > 0, "{REQUESTS} events all waited in the socket");
    assert_eq!(next, REQUESTS);
}

#[test]
fn readers_leave_the_connections_to_clients() {
    let service = Service::start(&[]);
    let streams: Vec<_> = (0..40).map(|_| Stream::open(&service)).collect();
    let mut clients: Vec<_> = (0..10).map(|_| service.client()).collect();
    for client in &mut clients {
        client.ok("GET", "/", "");
        client.send("GET / HTTP/1.1\r\n");
    }
    assert_eq!(service.client().receive().status(), "503");
    drop(clients);
    drop(streams);
    // Who hung up is noticed at the latest when there is something to tell.
    wait_for(|| service.client().request("GET", "/nothing", "").status() == "400");
    let open = || std::fs::read_dir(format!("/proc/{}/fd", service.process.child.id())).unwrap().count();
    wait_for(|| open() < 20);
}

#[test]
fn a_reader_that_sends_nothing_more_still_reads() {
    let service = Service::start(&[]);
    let pid = service.process.child.id();
    let sockets = || {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let targets = files.filter_map(|file| std::fs::read_link(file.unwrap().path()).ok());
        targets.filter(|target| target.to_str().unwrap().starts_with("socket:")).count()
    };
    let before = sockets();
    let mut client = service.client();
    client.send("GET /events HTTP/1.1\r\n\r\n");
    client.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.receive().status(), "200");
    let mut streams = [Stream(BufReader::new(client.stream)), Stream::open(&service)];
    streams[1].0.get_ref().shutdown(Shutdown::Write).unwrap();
    for number in 0..20 {
        let request = format!("GET /nothing-{number}");
        assert_eq!(service.client().request("GET", &request[4..], "").status(), "400");
        for stream in &mut streams {
            assert_eq!(stream.next().unwrap()["request"], request);
        }
    }
    // Readers keep nobody awake meanwhile: user and system time in hundredths of a second (proc(5), stat).
    let busy = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum::<u64>()
    };
    let begun = busy();
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(busy() - begun < 5, "it spins");
    // Who hangs up is gone, though there is nothing to tell.
    drop(streams);
    wait_for(|| sockets() == before);
}

#[test]
fn too_many_readers_are_refused_and_told() {
    let service = Service::start(&[]);
    let streams: Vec<_> = (0..256).map(|_| Stream::open(&service)).collect();
    let mut client = service.client();
    assert_eq!(client.request("GET", "/events", "").fault(), "There are 256 readers of events already.");
    client.ok("GET", "/", "");
    drop(streams);
}

#[test]
fn a_fifo_gets_its_lines_when_its_reader_comes() {
    let folder = Folder::new();
    let fifo = folder.path("fifo");
    output("mkfifo", &[fifo.to_str().unwrap()]);
    let mut guest =
        Process::start(["run", "--events", fifo.to_str().unwrap(), "--cmdline", "case=serial echo"]);
    guest.expect("alula firmware");
    let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&fifo).unwrap();
    guest.stdin.as_mut().unwrap().write_all(b"x\n").unwrap();
    let ended = guest.end();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(names(&parse(&text)), ["configured", "started", "exited", "ended"]);
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    // Nobody ever reads: the guest ends as it would.
    let ended = run(["run", "--events", fifo.to_str().unwrap(), "--cmdline", "case=serial"]);
    assert_eq!(ended.code, Some(0), "{}", ended.text);
}

#[test]
fn an_inherited_descriptor_gets_every_line() {
    let folder = Folder::new();
    let file = folder.path("events");
    let mut command = Command::new("sh");
    let script = r#"exec "$0" run --events fd:3 --cmdline case=serial 3>"$1""#;
    command.args(["-c", script]).arg(alula()).arg(&file);
    assert_eq!(Process::spawn(command).end().code, Some(0));
    let events = parse(&std::fs::read_to_string(&file).unwrap());
    assert_eq!(names(&events), ["configured", "started", "exited", "ended"]);
    for (path, expected) in [
        (
            "fd:99",
            "open events file `fd:99` (--events): no descriptor of this number was inherited: start this process \
             with it, and name it by its number there",
        ),
        ("/", "open events file `/` (--events): it is a directory, a file or FIFO is needed"),
        (
            "/nonexistent/x",
            "open events file `/nonexistent/x` (--events): there is no folder `/nonexistent`: create it",
        ),
    ] {
        let ended = run(["run", "--events", path]);
        assert_eq!((ended.code, ended.text.as_str()), (Some(125), format!("alula: {expected}\n").as_str()));
    }
}

#[test]
fn standard_output_as_a_file_gets_the_console_and_every_line() {
    let folder = Folder::new();
    for (index, name) in ["fd:1", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"].into_iter().enumerate() {
        let file = folder.path(&index.to_string());
        let mut command = Command::new("sh");
        // What was in the file before is none of ours.
        let script = r#"exec "$0" run --events "$2" --cmdline case=serial >"$1""#;
        command.args(["-c", script]).arg(alula()).arg(&file).arg(name);
        assert_eq!(Process::spawn(command).end().code, Some(0), "{name}");
        let text = std::fs::read_to_string(&file).unwrap();
        // The guest's words may stand in the line before an event.
        let events: Vec<_> = text.lines().filter_map(|line| Some(&line[line.find("{\"")?..])).collect();
        let events = parse(&events.join("\n"));
        assert_eq!(names(&events), ["configured", "started", "exited", "ended"], "{name}: {text}");
        assert!(text.contains("1 cases, 0 failed"), "{name}: {text}");
    }
}

#[test]
fn a_reader_that_never_reads_does_not_keep_the_process_from_ending() {
    let service = Service::running("hello");
    let mut client = service.client();
    let stuck = Stream::open(&service);
    for number in 0..3000 {
        client.request("GET", &format!("/nothing-{number}"), "");
    }
    let Service { mut process, socket, .. } = service;
    process.send(libc::SIGTERM);
    assert_eq!(process.end().code, Some(128 + libc::SIGTERM));
    assert!(!socket.exists());
    drop(stuck);
}

#[test]
fn a_device_that_a_guest_breaks_is_told_of() {
    let service = Service::start(&[]);
    let disk = service.folder.write("disk", vec![0; 1 << 20]);
    let drive = json!({ "drive_id": "d", "path_on_host": disk, "is_root_device": false }).to_string();
    service.client().ok("PUT", "/drives/d", &drive);
    service.client().ok("PUT", "/entropy", "{}");
    service.boot_source("case=hostile");
    let mut stream = Stream::open(&service);
    service.client().ok("PUT", "/actions", START);
    let seen = stream.until("device_error");
    let error = seen.last().unwrap();
    assert_eq!((&error["device"], &error["needs_reset"]), (&json!("disk `d`"), &json!(true)));
    assert!(!error["reason"].as_str().unwrap().is_empty());
    let rest = stream.rest();
    assert!(names(&rest).contains(&"device_error"), "{rest:?}");
    assert_eq!(
        (&rest.last().unwrap()["event"], &rest.last().unwrap()["exit_code"]),
        (&json!("ended"), &json!(0))
    );
}
