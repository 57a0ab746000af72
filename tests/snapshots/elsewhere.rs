//! What a restored guest has elsewhere than it was saved with, and what is said where that is wrong.

use std::fs;

use serde_json::{Value, json};

use super::{PAUSE, Saved, fault};
use crate::common::{Folder, Service};

/// A guest that was saved with a socket at this path in a folder, and the body of a request to restore it.
fn saved_with_socket(folder: &Folder, socket: &str) -> Value {
    let mut service = Service::start(&[]);
    let mut client = service.client();
    let vsock = json!({ "guest_cid": 3, "uds_path": folder.path(socket) });
    client.ok("PUT", "/vsock", &vsock.to_string());
    service.boot_source("echo");
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    service.process.expect("alula firmware");
    client.ok("PATCH", "/vm", PAUSE);
    let place = json!({ "folder": folder.path("saved") });
    client.ok("PUT", "/snapshot/create", &place.to_string());
    place
}

#[test]
fn a_socket_is_where_the_user_wants_it_whatever_its_folder() {
    let folder = Folder::new();
    fs::create_dir_all(folder.path("alula/alula-9")).unwrap();
    let saved = saved_with_socket(&folder, "alula/alula-9/first.sock");
    for name in ["alula/alula-9/first.sock", "alula/alula-9/named.sock", "alula/alula-9/vsock"] {
        let path = folder.path(name);
        let mut load = saved.clone();
        if name != "alula/alula-9/first.sock" {
            load["vsock_override"] = json!({ "uds_path": path });
        }
        let service = Service::start(&[]);
        let mut client = service.client();
        client.ok("PUT", "/snapshot/load", &load.to_string());
        let config = client.ok("GET", "/vm/config", "").json();
        assert!(config["vsock"]["uds_path"] == json!(path) && path.exists(), "{name}: {config}");
    }
}

#[test]
fn a_wrong_path_that_was_just_given_is_not_said_to_be_saved() {
    let folder = Folder::new();
    let mut load = saved_with_socket(&folder, "first.sock");
    // The socket that the saved guest has left would be taken over; a file of somebody's is not.
    let _ = fs::remove_file(folder.path("first.sock"));
    fs::write(folder.path("first.sock"), "").unwrap();
    let service = Service::start(&[]);
    let refused = |load: &Value| service.client().request("PUT", "/snapshot/load", &load.to_string()).fault();
    let said = refused(&load);
    let way = "the guest was saved with that; `vsock_override` (`alula run --restore` and `alula clone`: --vsock PATH)";
    assert!(said.contains(way), "{said}");
    load["vsock_override"] = json!({ "uds_path": folder.path("none/v") });
    let said = refused(&load);
    let is_right = said.starts_with("Load snapshot error: `vsock_override`: set up vsock device: ");
    assert!(is_right && !said.contains("was saved with that"), "{said}");

    let saved = Saved::new(&[]);
    saved.service.client().ok("PUT", "/snapshot/create", &saved.create());
    let drive = |path: &str, is_overlay: bool| {
        let drive = json!({ "drive_id": "disk", "path_on_host": saved.path(path), "overlay": is_overlay });
        saved.load(&json!({ "drive_overrides": [drive] }))
    };
    let said = service.client().request("PUT", "/snapshot/load", &drive("none", false)).fault();
    let is_right =
        said.starts_with("Load snapshot error: `drive_overrides` of `disk`: set up disk `disk`: open disk");
    assert!(is_right && !said.contains("was saved with that"), "{said}");
    // The first guest still has its disk. A restore has no option by which a disk is used all the same.
    let said = service.client().request("PUT", "/snapshot/load", &drive("over", true)).fault();
    assert!(said.contains("it is in use by process") && said.ends_with(": stop that first"), "{said}");
    let mut client = service.client();
    fault(
        &mut client,
        "/snapshot/load",
        &saved.load(&json!({})),
        ": stop that first: the guest was saved with",
    );
}
