//! Ports that come and go while the guest runs.

use super::plugging::{FORCE, running, take};
use super::*;

#[test]
fn a_port_comes_to_a_guest_that_runs_and_goes() {
    let mut service = running("slots");
    let mut client = service.client();
    let socket = service.folder.path("port");
    let port = json!({ "id": "p", "uds_path": socket }).to_string();
    for path in ["/ports/p", "/ports/p"] {
        client.ok("PUT", path, &port);
        service.process.expect("slots: 2 devices");
        assert_eq!(client.ok("GET", "/vm/config", "").json()["ports"][0]["id"], "p");
        drop(UnixStream::connect(&socket).unwrap());
        take(&service, path);
        service.process.expect("slots: 1 devices");
        assert!(!socket.exists());
    }
    // One whose path is taken, and then one that is torn away.
    let other = service.folder.write("taken", "");
    let taken = json!({ "id": "p", "uds_path": other }).to_string();
    let fault = client.request("PUT", "/ports/p", &taken).fault();
    assert!(fault.contains(other.to_str().unwrap()), "{fault}");
    client.ok("PUT", "/ports/p", &port);
    service.process.expect("slots: 2 devices");
    client.ok("DELETE", "/ports/p", FORCE);
    service.process.expect("slots: 1 devices");
    assert!(!socket.exists() && other.exists());
}
