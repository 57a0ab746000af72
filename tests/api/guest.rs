//! What is told of a guest by its agent, which can be any program of the guest: here, a program of the host that
//! has taken the place of the guest's vsock socket.

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread::JoinHandle;

use alula::protocol::frame::{CONTENT_MAX, Type, put};
use serde_json::Value;

use super::*;

/// A service whose guest runs and has a vsock device, for which it has no driver.
fn guest_with_vsock() -> (Service, std::path::PathBuf) {
    let service = Service::start(&[]);
    let path = service.folder.path("vsock");
    let device = json!({ "guest_cid": 3, "uds_path": path });
    service.client().ok("PUT", "/vsock", &device.to_string());
    service.boot_source("case=serial echo end=idle");
    service.client().ok("PUT", "/actions", START);
    (service, path)
}

/// One who listens at `path` instead of the device, and answers one client with these bytes; it keeps the
/// connection until the client has closed it.
fn agent(path: &Path, bytes: Vec<u8>) -> JoinHandle<()> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        client.read_exact(&mut [0; 11]).unwrap();
        // A client that has heard enough closes.
        let _ = client.write_all(&bytes);
        let _ = client.read_to_end(&mut Vec::new());
    })
}

fn frames(frames: &[(Type, &[u8])]) -> Vec<u8> {
    let mut bytes = b"OK 1\n".to_vec();
    frames.iter().for_each(|(kind, content)| put(&mut bytes, *kind, content));
    bytes
}

#[test]
fn a_guest_is_told_of_by_its_agent() {
    let service = Service::start(&[]);
    assert!(service.client().request("GET", "/guest", "").fault().contains("not supported before starting"));
    let (service, path) = guest_with_vsock();
    let mut client = service.client();
    let mut told = |bytes: Vec<u8>| {
        let agent = agent(&path, bytes);
        let told = client.ok("GET", "/guest", "").json();
        agent.join().unwrap();
        told
    };
    let greeting = json!({"protocol": 1, "agent": "0.9", "info": {"uptime_ms": 5, "memory_kib": {"total": 9,
        "available": 7}, "addresses": ["10.0.0.2", "fd00::2"], "hostname": "web"}});
    let greeting = greeting.to_string();
    let hello = (Type::Greeting, greeting.as_bytes());
    let expected = json!({"agent": true, "version": "0.9", "uptime_ms": 5, "memory_kib": {"total": 9,
        "available": 7}, "addresses": ["10.0.0.2", "fd00::2"], "hostname": "web"});
    assert_eq!(told(frames(&[hello, (Type::Exited, &[0, 0])])), expected);
    // Two ends are one.
    assert_eq!(told(frames(&[hello, (Type::Exited, &[0, 0]), (Type::Exited, &[0, 9])])), expected);
    // Of what is long, the beginning is told.
    let long = json!({"protocol": 1, "agent": "x".repeat(100_000), "info": {"uptime_ms": 5, "memory_kib":
        {"total": 9, "available": 7}, "addresses": vec!["10.0.0.2"; 10_000], "hostname": "\u{e9}".repeat(9_000)}});
    let long = told(frames(&[(Type::Greeting, long.to_string().as_bytes()), (Type::Exited, &[0, 0])]));
    assert_eq!(long["version"].as_str().unwrap().len(), 256);
    assert_eq!(long["hostname"].as_str().unwrap().len(), 256);
    assert_eq!(long["addresses"].as_array().unwrap().len(), 64);
    let why = |told: Value| {
        assert_eq!(told["agent"], false);
        told["reason"].as_str().unwrap().to_owned()
    };
    for (bytes, reason) in [
        (frames(&[(Type::Exited, &[0, 0])]), "Exited comes before a greeting"),
        (frames(&[hello, hello]), "Greeting was not expected"),
        (frames(&[hello, (Type::Output, &[0; CONTENT_MAX + 1])]), "a frame of type 130 and 65537 bytes"),
        (frames(&[hello, (Type::Exited, &[0, 3])]), "in the guest: exit code 3"),
        (frames(&[hello, (Type::Failed, b"\0no \x1b[2J")]), "in the guest: no"),
        (b"OK 1\n\x81\xff\xff\xff".to_vec(), "a frame of type 129 and 16777215 bytes"),
        (b"OK 1\nSSH-2.0-OpenSSH".to_vec(), "a frame of the unknown type 83"),
        (b"HTTP/1.1 400 Bad Request\r\n".to_vec(), "is no monitor's answer"),
        // The agent never ends what it says, or says nothing.
        (frames(&[hello]), "does not answer, and the time is up"),
        (b"OK 1\n\x81".to_vec(), "does not answer, and the time is up"),
        (Vec::new(), "there was no answer for 3 s"),
    ] {
        let told = why(told(bytes));
        assert!(told.contains(reason), "{told}");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(why(client.ok("GET", "/guest", "").json()).contains("there is no socket"));
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    assert_eq!(why(client.ok("GET", "/guest", "").json()), "the guest is paused");
}

#[test]
fn a_guest_that_never_answers_keeps_nobody_waiting() {
    let (service, _) = guest_with_vsock();
    // More than may be asked at a time; the rest of the API goes on meanwhile.
    let askers: Vec<_> = (0..6)
        .map(|_| {
            let mut client = service.client();
            std::thread::spawn(move || client.ok("GET", "/guest", "").json())
        })
        .collect();
    for _ in 0..20 {
        service.client().ok("GET", "/", "");
    }
    for asker in askers {
        let told = asker.join().unwrap();
        let reason = told["reason"].as_str().unwrap();
        assert!(
            told["agent"] == false
                && (reason.contains("there was no answer for 3 s")
                    || reason.contains("are being done already")),
            "{told}"
        );
    }
    // One who has no vsock device is told at once.
    let other = Service::running("case=serial echo end=idle");
    let told = other.client().ok("GET", "/guest", "").json();
    assert!(told["reason"].as_str().unwrap().contains("has no vsock device"), "{told}");
}
