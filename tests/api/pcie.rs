//! PCIe slots, which guests of aarch64 can have, with a guest that drives what it finds in them and hears of nothing.

use super::plugging::{Events, FORCE, count_open, drive, drives, load, plug};
use super::*;

/// A service with two slots whose guest does what `words` say.
fn running(words: &str) -> Service {
    let service = Service::start(&["--enable-pci", "--pcie-slots", "2"]);
    service.boot_source(words);
    service
}

#[test]
fn a_driven_disk_in_a_slot_goes_by_force_alone() {
    let mut service = running("case=slots");
    let mut client = service.client();
    // No agent answers at the socket.
    let vsock = json!({ "guest_cid": 3, "uds_path": service.folder.path("vsock") }).to_string();
    client.ok("PUT", "/vsock", &vsock);
    client.ok("PUT", "/actions", START);
    service.process.expect("slots: 1 devices");
    let mut events = Events::of(&service);
    let images = ["a", "b"].map(|id| plug(&service, id));
    service.process.expect("slots: 3 devices");
    for name in ["disk `a`", "disk `b`"] {
        events.expect("device_plugged", name);
    }
    for (id, slot) in [("a", 1), ("b", 2)] {
        let path = format!("/drives/{id}");
        let fault = client.request("DELETE", &path, "").fault();
        for expected in [
            &format!("disk `{id}` is in use"),
            &format!("(`echo 0 > /sys/bus/pci/slots/{slot}/power`) and try again"),
            r#"tear the device away (`{"force": true}`)"#,
            "has no driver for vsock",
        ] {
            assert!(fault.contains(expected), "no `{expected}`: {fault}");
        }
        events.expect("device_asked_to_go", &format!("disk `{id}`"));
    }
    assert_eq!(drives(&mut client), ["a", "b"]);
    // A guest that stands still is not asked.
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    let fault = client.request("DELETE", "/drives/a", "").fault();
    assert!(fault.contains("disk `a` is in use, and the guest"), "{fault}");
    client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    for (id, image, left) in [("a", &images[0], 2), ("b", &images[1], 1)] {
        client.ok("DELETE", &format!("/drives/{id}"), FORCE);
        service.process.expect(&format!("slots: {left} devices"));
        assert_eq!(events.expect("device_gone", &format!("disk `{id}`"))["reason"], "DELETE");
        assert_eq!(count_open(&service, image), 0);
    }
    assert!(drives(&mut client).is_empty());
    // The slots are free again.
    for id in ["a", "b"] {
        client.ok("PUT", &format!("/drives/{id}"), &drive(id, &service.folder.path(id)));
    }
    service.process.expect("slots: 3 devices");
}

#[test]
fn what_came_in_a_slot_is_in_a_snapshot_and_in_a_reset() {
    let service = running("case=serial end=idle");
    let mut client = service.client();
    client.ok("PUT", "/actions", START);
    // Two in slots, one on the bus.
    let images = ["a", "b", "c"].map(|id| plug(&service, id));
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    let files = json!({ "snapshot_path": "state", "mem_file_path": "memory" }).to_string();
    client.ok("PUT", "/snapshot/create", &files);
    client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    client.ok("PUT", "/actions", r#"{"action_type": "Reset"}"#);
    assert_eq!(drives(&mut client), ["a", "b", "c"]);
    client.ok("DELETE", "/drives/a", "");
    plug(&service, "d");
    assert_eq!(drives(&mut client), ["b", "c", "d"]);
    let Service { mut process, folder, .. } = service;
    process.send(libc::SIGTERM);
    process.end();

    let other = Service::start(&[]);
    let mut client = other.client();
    client.ok("PUT", "/snapshot/load", &load(&folder));
    for (id, image) in ["a", "b", "c"].into_iter().zip(images) {
        assert_eq!(count_open(&other, &image), 1);
        client.ok("DELETE", &format!("/drives/{id}"), "");
        assert_eq!(count_open(&other, &image), 0);
    }
    plug(&other, "d");
    assert_eq!(drives(&mut client), ["d"]);
}
