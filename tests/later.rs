//! Answers of the API that come when a job is done, while others are served.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use alula::api::{Reply, Response, Server};
use alula::jobs::{Jobs, OPEN_MAX};
use alula::poll::{Events, Interest, Ready};
use common::held::Held;
use common::{Client, Folder, Service, wait_for};
use serde_json::{Value, json};

const JOBS: u64 = 0;
const API: u64 = 1;

/// A loop with a server whose requests for `/job...` take as long as the test likes; others are answered with
/// their path.
struct Loop {
    events: Events,
    server: Server,
    jobs: Jobs<Response>,
    /// Ends the jobs, in the order in which they began.
    ends: Vec<Sender<Response>>,
    folder: Folder,
    is_watched: bool,
}

impl Loop {
    fn new() -> Self {
        let folder = Folder::new();
        let events = Events::new().unwrap();
        let mut server = Server::bind(&folder.path("socket"), 100).unwrap();
        server.register(&events, API).unwrap();
        Self { events, server, jobs: Jobs::default(), ends: Vec::new(), folder, is_watched: false }
    }

    fn client(&self) -> UnixStream {
        let stream = UnixStream::connect(self.folder.path("socket")).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    /// Does what there is to do now; returns how many events there were.
    fn turn(&mut self) -> usize {
        let Self { events, server, jobs, ends, .. } = self;
        let mut ready: Vec<Ready> = Vec::new();
        events.wait(Some(Duration::ZERO), &mut ready).unwrap();
        let mut ended = Vec::new();
        if ready.iter().any(|event| event.token == JOBS) {
            ended = jobs.take_ended();
        }
        let mut service = |_: &str, path: &str, _: &[u8]| {
            if !path.starts_with("/job") {
                return Response::Value(path.into()).into();
            }
            let (sender, end) = channel();
            match jobs.start("job", move || end.recv().unwrap_or(Response::Done)) {
                Ok(ticket) => {
                    ends.push(sender);
                    Reply::Later { ticket, area: "Job error" }
                }
                Err(error) => Response::Fault(error.to_string()).into(),
            }
        };
        for (ticket, response) in ended {
            server.answer(ticket, &response, events, &mut service).unwrap();
        }
        for event in ready.iter().filter(|event| event.token != JOBS) {
            server.handle(*event, events, &mut service).unwrap();
        }
        if !self.is_watched
            && let Some(event) = self.jobs.event()
        {
            self.events.add(event, Interest::IN, JOBS).unwrap();
            self.is_watched = true;
        }
        ready.len()
    }

    /// Until `stream` has been answered with `expected`, whatever else is there.
    fn expect(&mut self, stream: &mut UnixStream, expected: &str) -> String {
        let mut text = String::new();
        wait_for(|| {
            self.turn();
            let mut bytes = [0; 1024];
            let count = stream.read(&mut bytes).unwrap_or(0);
            text += std::str::from_utf8(&bytes[..count]).unwrap();
            text.contains(expected)
        });
        text
    }
}

fn ask(stream: &mut UnixStream, requests: &[&str]) {
    let text: String = requests.iter().map(|path| format!("GET {path} HTTP/1.1\r\n\r\n")).collect();
    stream.write_all(text.as_bytes()).unwrap();
}

fn is_silent(stream: &mut UnixStream) -> bool {
    stream.read(&mut [0]).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
}

#[test]
fn a_client_waits_for_its_job_and_others_do_not() {
    let mut api = Loop::new();
    let [mut slow, mut other] = [api.client(), api.client()];
    // What comes after it on the same connection waits.
    ask(&mut slow, &["/before", "/job", "/after"]);
    api.expect(&mut slow, "\"/before\"");
    ask(&mut other, &["/other"]);
    api.expect(&mut other, "\"/other\"");
    assert!(is_silent(&mut slow));
    while api.turn() > 0 {}
    // However long it takes, and whatever comes meanwhile: the loop has nothing to do.
    ask(&mut slow, &["/later"]);
    assert_eq!(api.turn(), 0, "a client that waits is not read from");
    assert_eq!(api.server.expires_at(), None);
    api.server.expire(Instant::now() + Duration::from_secs(3600), &api.events).unwrap();
    assert!(is_silent(&mut slow));
    api.ends[0].send(Response::Value("done".into())).unwrap();
    let text = api.expect(&mut slow, "\"/later\"");
    let places = ["\"done\"", "\"/after\"", "\"/later\""].map(|answer| text.find(answer).unwrap());
    assert!(places.is_sorted(), "{text}");
}

#[test]
fn a_client_that_goes_away_meanwhile_is_no_problem() {
    let mut api = Loop::new();
    let mut slow = api.client();
    ask(&mut slow, &["/job", "/after"]);
    wait_for(|| api.turn() == 0 && api.ends.len() == 1);
    drop(slow);
    wait_for(|| api.turn() > 0);
    // The API does not hear of that client again, and another one may have its place.
    assert_eq!(api.turn(), 0);
    let mut other = api.client();
    ask(&mut other, &["/job"]);
    wait_for(|| api.turn() == 0 && api.ends.len() == 2);
    api.ends[0].send(Response::Value("for nobody".into())).unwrap();
    wait_for(|| api.turn() > 0);
    assert!(is_silent(&mut other));
    api.ends[1].send(Response::Done).unwrap();
    api.expect(&mut other, "HTTP/1.1 204 ");
    // One that only says that it asks for nothing more waits for its answer.
    let mut half = api.client();
    ask(&mut half, &["/job"]);
    half.shutdown(std::net::Shutdown::Write).unwrap();
    wait_for(|| api.turn() == 0 && api.ends.len() == 3);
    api.ends[2].send(Response::Done).unwrap();
    api.expect(&mut half, "HTTP/1.1 204 ");
}

#[test]
fn many_who_wait_keep_nobody_out() {
    let mut api = Loop::new();
    let mut clients: Vec<_> = (0..OPEN_MAX).map(|_| api.client()).collect();
    for client in &mut clients {
        ask(client, &["/job"]);
    }
    wait_for(|| api.turn() == 0 && api.ends.len() == OPEN_MAX);
    let mut refused = api.client();
    ask(&mut refused, &["/job"]);
    api.expect(&mut refused, "wait until one is answered");
    for _ in 0..20 {
        let mut other = api.client();
        ask(&mut other, &["/other"]);
        api.expect(&mut other, "\"/other\"");
        clients.push(other);
    }
    for (end, client) in std::mem::take(&mut api.ends).iter().zip(&mut clients) {
        assert!(is_silent(client), "a client that waits is not let go for another");
        end.send(Response::Done).unwrap();
        api.expect(client, "HTTP/1.1 204 ");
    }
    let mut next = api.client();
    ask(&mut next, &["/job"]);
    wait_for(|| api.turn() == 0 && api.ends.len() == 1);
}

#[test]
fn a_pause_does_not_wait_for_ever_for_a_disk() {
    let mut service = Service::start(&[]);
    let disk = service.folder.write("disk", vec![0; 1 << 20]);
    service.boot_source("bench");
    let mut client = service.client();
    let body = json!({ "drive_id": "a", "path_on_host": disk, "is_root_device": false });
    client.ok("PUT", "/drives/a", &body.to_string());
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    service.process.expect("bench: ready");
    // A load without an end: its disk has something in flight at any time. The guest gives a load up that stands still
    // for long, and then reads its next line.
    let load = b"read 4096 1 1000000000\n";
    service.process.stdin.as_mut().unwrap().write_all(load).unwrap();
    let mut reads = || client.ok("GET", "/metrics", "").json()["block"]["read_count"].as_u64().unwrap();
    wait_for(|| reads() > 0);
    let held = Held::new(&service.process.child, "io");
    let mut other = service.client();
    let fault = other.request("PATCH", "/vm", r#"{"state": "Paused"}"#).fault();
    assert!(fault.contains("what is in flight at disk `a` has not ended in 10 s"), "{fault}");
    assert_eq!(other.ok("GET", "/", "").json()["state"], "Running");
    drop(held);
    service.process.stdin.as_mut().unwrap().write_all(load).unwrap();
    let before = reads();
    wait_for(|| reads() > before);
    other.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    other.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    let before = reads();
    wait_for(|| reads() > before);
}

#[test]
fn a_disk_that_does_not_answer_holds_up_its_change_alone() {
    let mut service = Service::start(&[]);
    for disk in ["a", "b", "c"] {
        service.folder.write(disk, vec![0; 1 << 20]);
    }
    service.boot_source("bench");
    let disk = |path: &str| json!({ "drive_id": "a", "path_on_host": service.folder.path(path) });
    let mut put = disk("a");
    put["is_root_device"] = json!(false);
    let mut client = service.client();
    client.ok("PUT", "/drives/a", &put.to_string());
    let [b, c] = ["b", "c"].map(|path| disk(path).to_string());
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    service.process.expect("bench: ready");
    // A load without an end: its disk has something in flight at any time.
    service.process.stdin.as_mut().unwrap().write_all(b"read 4096 1 1000000000\n").unwrap();
    let mut other = service.client();
    let mut reads = || {
        let metrics: Value = serde_json::from_str(&other.ok("GET", "/metrics", "").body).unwrap();
        metrics["block"]["read_count"].as_u64().unwrap()
    };
    wait_for(|| reads() > 0);
    let held = Held::new(&service.process.child, "io");
    client.send(&format!("PATCH /drives/a HTTP/1.1\r\nContent-Length: {}\r\n\r\n{b}", b.len()));
    let mut third = service.client();
    let refused = third.request("PATCH", "/drives/a", &c);
    assert!(refused.body.contains("another change of it waits"), "{refused:?}");
    let path = |client: &mut Client| -> Value {
        let config: Value = serde_json::from_str(&client.ok("GET", "/vm/config", "").body).unwrap();
        config["drives"][0]["path_on_host"].clone()
    };
    assert_eq!(path(&mut third), disk("a")["path_on_host"], "it is not changed before it stands still");
    client.stream.set_nonblocking(true).unwrap();
    assert!(is_silent(&mut client.stream));
    client.stream.set_nonblocking(false).unwrap();
    drop(held);
    assert_eq!(client.receive().status(), "204");
    assert_eq!(path(&mut third), disk("b")["path_on_host"]);
    // The disk goes on, and can be changed again.
    let before = reads();
    wait_for(|| reads() > before);
    third.ok("PATCH", "/drives/a", &c);
}
