//! Devices that come into a jail whose guest runs: what they are made of is found there and nowhere else, and a snapshot has
//! them in the next jail as well.

use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;

use serde_json::{Value, json};

use crate::common::{Client, Process};
use crate::site::Site;
use crate::{GID, UID, boot_to};

/// A PCI bus, with a slot where devices come in such.
const BUS: &[&str] = match cfg!(target_arch = "x86_64") {
    true => &["--enable-pci"],
    false => &["--enable-pci", "--pcie-slots", "1"],
};

fn start(site: &Site, id: &str) -> (Process, Client) {
    site.put_kernel(id);
    let mut command = site.jail(id);
    command.args(["--", "--api-sock", "/run/api.sock"]).args(BUS);
    (Process::spawn(command), site.client(id))
}

/// Makes this file in a jail.
fn put(site: &Site, id: &str, name: &str, bytes: &[u8]) {
    let path = site.root(id).join(name);
    fs::write(&path, bytes).unwrap();
    chown(&path, Some(UID), Some(GID)).unwrap();
}

fn disk(path: &Path) -> String {
    json!({ "drive_id": "d", "is_root_device": false, "path_on_host": path }).to_string()
}

fn drives(client: &mut Client) -> Value {
    client.ok("GET", "/vm/config", "").json()["drives"].clone()
}

#[test]
fn a_disk_comes_into_a_jail_and_is_in_its_snapshot() {
    let site = Site::new();
    let (mut first, mut client) = start(&site, "first");
    boot_to(&mut client, Path::new("/kernel"), "case=slots");
    first.expect("slots: 0 devices");
    let outside = site.folder.write("outside", [0; 4096]);
    fs::write(site.root("first").parent().unwrap().join("outside"), [0; 4096]).unwrap();
    for path in [&*outside, Path::new("/../outside"), Path::new("/disk")] {
        let fault = client.request("PUT", "/drives/d", &disk(path)).fault();
        assert!(fault.contains(&format!("`{}`: No such file", path.display())), "{fault}");
    }
    put(&site, "first", "disk", &[0; 4096]);
    client.ok("PUT", "/drives/d", &disk(Path::new("/disk")));
    first.expect("slots: 1 devices");
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    let paths = json!({ "snapshot_path": "/run/state", "mem_file_path": "/run/memory" });
    client.ok("PUT", "/snapshot/create", &paths.to_string());

    let (mut second, mut client) = start(&site, "second");
    for (file, name) in [("run/state", "state"), ("run/memory", "memory"), ("disk", "disk")] {
        put(&site, "second", name, &fs::read(site.root("first").join(file)).unwrap());
    }
    let memory = json!({ "backend_type": "File", "backend_path": "/memory" });
    let load = json!({ "snapshot_path": "/state", "mem_backend": memory, "resume_vm": true });
    client.ok("PUT", "/snapshot/load", &load.to_string());
    assert_eq!(drives(&mut client)[0]["drive_id"], "d");
    client.ok("DELETE", "/drives/d", r#"{"force": true}"#);
    second.expect("slots: 0 devices");
    client.ok("PUT", "/drives/d", &disk(Path::new("/disk")));
    second.expect("slots: 1 devices");
}
