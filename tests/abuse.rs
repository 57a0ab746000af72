//! The control socket under load and abuse: each request gets the answer it deserves, nothing leaks, the
//! guest is undisturbed, the next client is served.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::time::Duration;

use common::{Client, Service, wait_for};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

const STEADY: &str = "case=serial echo end=idle";

/// Descriptors and anonymous memory (KiB) of the service.
fn holdings(service: &Service) -> (usize, u64) {
    let pid = service.process.child.id();
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let anonymous = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    (descriptors, anonymous.trim().trim_end_matches(" kB").parse().unwrap())
}

/// The guest still answers on its console.
fn assert_undisturbed(service: &mut Service) {
    service.process.stdin.as_mut().unwrap().write_all(b"still here\n").unwrap();
    service.process.expect("still here");
    assert_eq!(service.client().ok("GET", "/", "").json()["state"], "Running");
}

#[test]
fn ten_thousand_requests_and_eight_clients_at_once_leave_nothing_behind() {
    let mut service = Service::running(STEADY);
    service.process.expect("alula firmware");
    let mut client = service.client();
    let mut some = |count: usize| {
        for round in 0..count {
            match round % 4 {
                0 => drop(client.ok("GET", "/vm/config", "")),
                1 => drop(client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#)),
                2 => drop(client.request("PUT", "/machine-config", r#"{"vcpu_count": 1}"#).fault()),
                _ => drop(client.request("PUT", &format!("/drives/{round}"), "{}").fault()),
            }
        }
    };
    some(2_000);
    let before = holdings(&service);
    some(10_000);
    let socket = &service.socket;
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(move || {
                for _ in 0..20 {
                    let mut client = Client::connect(socket);
                    (0..10).for_each(|_| drop(client.ok("GET", "/machine-config", "")));
                }
            });
        }
    });
    // A connection that is gone is noticed when its turn comes.
    wait_for(|| holdings(&service).0 <= before.0);
    let after = holdings(&service);
    assert!(after.1 <= before.1 + 256, "{} KiB of memory, before {} KiB", after.1, before.1);
    assert_undisturbed(&mut service);
}

#[test]
fn a_slow_sender_gets_its_answer_and_holds_nobody_up() {
    let mut service = Service::running(STEADY);
    let mut slow = service.client();
    let body = r#"{"state": "Paused"}"#;
    let request = format!("PATCH /vm HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    for byte in request.as_bytes().chunks(1) {
        slow.stream.write_all(byte).unwrap();
        service.client().ok("GET", "/", "");
    }
    assert_eq!(slow.receive().status(), "204");
    slow.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    assert_undisturbed(&mut service);
}

#[test]
fn messages_that_nobody_reads_hold_up_neither_clients_nor_signals() {
    use std::process::{Command, Stdio};
    let folder = common::Folder::new();
    let socket = folder.path("s");
    let mut command = Command::new(common::alula());
    command.args(["serve", "--api-sock", socket.to_str().unwrap()]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    wait_for(|| std::os::unix::net::UnixStream::connect(&socket).is_ok());
    let mut client = Client::connect(&socket);
    // Words that would begin a line of their own, and clear the screen.
    client.request("PUT", "/actions", r#"{"\nalula: it \u001b[2J": 1}"#).fault();
    // More than a pipe takes.
    let path = format!("/{}", "x".repeat(400));
    (0..300).for_each(|_| drop(client.request("GET", &path, "").fault()));
    let lost = client.ok("GET", "/metrics", "").json()["logger"]["missed_log_count"].as_u64().unwrap();
    assert!(lost > 0, "the pipe took it all");
    common::send(&child, libc::SIGTERM);
    wait_for(|| child.try_wait().unwrap().is_some());
    assert_eq!(child.wait().unwrap().code(), Some(128 + libc::SIGTERM));
    assert!(!socket.exists());
    let mut messages = String::new();
    child.stderr.take().unwrap().read_to_string(&mut messages).unwrap();
    assert_eq!(messages.lines().count() as u64, 301 - lost);
    assert!(messages.contains("unknown field ` alula: it  [2J`"), "{}", messages.lines().next().unwrap());
}

#[test]
fn a_reader_of_events_with_no_descriptor_left_ends_no_guest() {
    let mut service = Service::running(STEADY);
    let (mut reader, mut client) = (service.client(), service.client());
    for one in [&mut reader, &mut client] {
        one.ok("GET", "/", "");
    }
    let enough = common::limit_descriptors(service.process.child.id(), 0);
    reader.send("GET /events HTTP/1.1\r\n\r\n");
    assert_eq!(reader.receive().status(), "200");
    let mut lines = BufReader::new(reader.stream).lines();
    let mut expect = |text: &str| assert!(lines.any(|line| line.unwrap().contains(text)), "{text}");
    expect("started");
    for state in ["Paused", "Resumed"] {
        client.ok("PATCH", "/vm", &json!({ "state": state }).to_string());
        expect(&state.to_lowercase());
    }
    common::limit_descriptors(service.process.child.id(), enough);
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    ["paused", "resumed"].into_iter().for_each(expect);
    assert_undisturbed(&mut service);
}

#[test]
fn a_body_of_100_mb_is_refused_unread() {
    let mut service = Service::running(STEADY);
    let before = holdings(&service);
    let mut client = service.client();
    client.send("PUT /boot-source HTTP/1.1\r\nContent-Length: 104857600\r\n\r\n");
    // The client goes on sending, as clients do that do not look for an answer.
    client.stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let chunk = vec![b' '; 1 << 20];
    let sent = (0..100).take_while(|_| client.stream.write_all(&chunk).is_ok()).count();
    let response = client.receive();
    assert_eq!(response.status(), "400", "after {sent} MiB: {response:?}");
    assert!(response.body.contains("size 104857600 is larger than the limit of 51200"), "{response:?}");
    let after = holdings(&service);
    assert!(after.1 <= before.1 + 256, "{after:?}, before {before:?}");
    assert_undisturbed(&mut service);
}

#[test]
fn bodies_that_are_none_get_a_fault() {
    let mut service = Service::running(STEADY);
    let serde = "An error occurred when deserializing the json body of a request: ";
    let deep = "[".repeat(20_000);
    let deep_field = format!(r#"{{"state": {}}}"#, "[".repeat(20_000));
    let cases: [(&[u8], &str); 12] = [
        (deep.as_bytes(), ""),
        (deep_field.as_bytes(), ""),
        (br#"{"state": "Paused", "state": "Resumed"}"#, "duplicate field `state`"),
        (br#"{"state": 1e999}"#, ""),
        (br#"{"state": 99999999999999999999999999}"#, ""),
        (b"{\"state\": \"\xff\xfe\"}", ""),
        (b"\xff", "expected a value"),
        (b"\0", "expected a value"),
        (br#"{"state": "\ud800"}"#, ""),
        (br#"{"state": "Paused"} {}"#, "there is more text"),
        (b"null", "an object, found null"),
        (b"                                        ", "the text ends where a value is expected"),
    ];
    for (body, expected) in cases {
        let mut client = service.client();
        client.send(&format!("PATCH /vm HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len()));
        client.stream.write_all(body).unwrap();
        let fault = client.receive().fault();
        let shown = String::from_utf8_lossy(&body[..body.len().min(40)]);
        assert!(fault.starts_with(serde) && fault.contains(expected), "{shown}: {fault}");
        client.ok("GET", "/", "");
    }
    assert_undisturbed(&mut service);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn garbage_ends_at_most_its_own_connection(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        thread_local!(static SERVICE: Service = Service::start(&[]));
        SERVICE.with(|service| {
            let mut client = service.client();
            // The service may have hung up in the middle.
            let _ = client.stream.write_all(&bytes);
            let _ = client.stream.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            let _ = client.stream.read_to_end(&mut answer);
            assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400 "), "{answer:?}");
            service.client().ok("GET", "/", "");
        });
    }
}

/// A value for a schema: one that fits, or one that does not.
fn value_for(schema: &Value, api: &Value) -> BoxedStrategy<Value> {
    let wild = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(|number| serde_json::Number::from_f64(number).map_or(Value::Null, Value::from)),
        "\\PC{0,20}".prop_map(Value::from),
        Just(json!([])),
        Just(json!({ "x": [{}] })),
    ];
    prop_oneof![9 => fitting(schema, api), 1 => wild].boxed()
}

fn fitting(schema: &Value, api: &Value) -> BoxedStrategy<Value> {
    if let Some(name) = schema["$ref"].as_str() {
        return fitting(api.pointer(name.trim_start_matches('#')).unwrap(), api);
    }
    for several in ["allOf", "anyOf", "oneOf"] {
        if let Some(list) = schema[several].as_array() {
            let each: Vec<_> = list.iter().map(|one| fitting(one, api)).collect();
            return proptest::strategy::Union::new(each).boxed();
        }
    }
    if let Some(values) = schema["enum"].as_array() {
        return prop::sample::select(values.clone()).boxed();
    }
    match schema["type"].as_str() {
        Some("object") => {
            let required = schema["required"].as_array().cloned().unwrap_or_default();
            let fields = schema["properties"].as_object().cloned().unwrap_or_default();
            let fields: Vec<_> = fields
                .into_iter()
                .map(|(name, schema)| {
                    // Now and then a field that must be there is not.
                    let weight = if required.contains(&json!(name)) { 30 } else { 1 };
                    let value = value_for(&schema, api).prop_map(move |value| Some((name.clone(), value)));
                    prop_oneof![weight => value, 1 => Just(None)]
                })
                .collect();
            fields.prop_map(|fields| Value::from(fields.into_iter().flatten().collect::<Map<_, _>>())).boxed()
        }
        Some("array") => {
            let items = value_for(&schema["items"], api);
            prop::collection::vec(items, 0..3).prop_map(Value::from).boxed()
        }
        Some("integer") => {
            let most = schema["maximum"].as_u64().unwrap_or(u64::MAX);
            prop_oneof![(0..=most.min(64)), (0..=most)].prop_map(Value::from).boxed()
        }
        Some("boolean") => any::<bool>().prop_map(Value::from).boxed(),
        // Files that are there and files that are not, and names that are good for an id.
        Some("string") => prop_oneof![
            Just("a".into()),
            Just("/dev/null".into()),
            Just("/nonexistent/file".into()),
            "\\PC{0,9}"
        ]
        .prop_map(Value::String)
        .boxed(),
        _ => Just(Value::Null).boxed(),
    }
}

/// Any request with a body that the schema knows, with a body made from its schema.
fn request() -> BoxedStrategy<(String, String, Value)> {
    let api: Value = serde_json::from_str(alula::api::OPENAPI).unwrap();
    let mut requests = Vec::new();
    for (path, methods) in api["paths"].as_object().unwrap() {
        for (method, operation) in
            methods.as_object().unwrap().iter().filter(|(name, _)| *name != "parameters")
        {
            let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
            let (method, path) = (method.to_uppercase(), path.replace("{id}", "a"));
            if !schema.is_null() {
                let body = value_for(schema, &api);
                requests.push(body.prop_map(move |body| (method.clone(), path.clone(), body)).boxed());
            }
        }
    }
    proptest::strategy::Union::new(requests).boxed()
}

/// The answer has a shape that the schema documents.
fn assert_documented(client: &mut Client, (method, path, body): &(String, String, Value)) {
    let response = client.request(method, path, &body.to_string());
    match response.status() {
        "204" => assert_eq!(response.body, ""),
        "400" => {
            let fault = response.json();
            assert!(
                fault["fault_message"].is_string() && fault.as_object().unwrap().len() == 1,
                "{response:?}"
            );
        }
        _ => panic!("{method} {path} {body}: {response:?}"),
    }
    for path in ["/", "/version", "/machine-config", "/vm/config", "/metrics"] {
        assert!(client.ok("GET", path, "").json().is_object());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn bodies_made_from_the_schema_get_documented_answers(
        requests in prop::collection::vec(request(), 1..60), starts_first in any::<bool>()
    ) {
        let service = if starts_first { Service::running("hello") } else { Service::start(&[]) };
        let mut client = service.client();
        for request in &requests {
            // A request with a `path` to one of these resources would write a file where the test runs.
            let writes = ["/logger", "/metrics", "/serial"].contains(&request.1.as_str());
            if writes && request.2.to_string().contains("path") {
                continue;
            }
            assert_documented(&mut client, request);
        }
    }
}
