//! Disks of a restored guest that are others than it was saved with.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use alula::devices::block::{Config, Overlay};
use alula::host::Host;
use serde_json::{Value, json};

use super::{Saved, fault};
use crate::common::{Client, Folder, Process, Service, run};

/// Whether a service has this file open.
fn has_open(service: &Service, path: &Path) -> bool {
    let links = fs::read_dir(format!("/proc/{}/fd", service.process.child.id())).unwrap();
    links.flatten().any(|link| fs::read_link(link.path()).is_ok_and(|other| other == path))
}

/// A guest in a folder called `v1`, whose disk is a qcow2 image over `disk`.
fn saved_over_a_base() -> Folder {
    let saved = Saved::new(&[]);
    saved.service.client().ok("PUT", "/snapshot/create", &saved.create());
    let over = json!({ "drive_id": "disk", "path_on_host": saved.path("one.qcow2"), "overlay": true });
    let load = saved.load(&json!({ "drive_overrides": [over] }));
    let Saved { folder, service } = saved;
    drop(service);
    let service = Service::start(&[]);
    service.client().ok("PUT", "/snapshot/load", &load);
    let place = json!({ "folder": folder.path("v1") });
    service.client().ok("PUT", "/snapshot/create", &place.to_string());
    folder
}

/// An image over `base`, at this path.
fn over(base: &Path, path: &Path) {
    let below = Config::new("d", base);
    Overlay::make(&below, path, &mut Host::default()).unwrap().0.keep();
}

fn drive(client: &mut Client) -> Value {
    client.ok("GET", "/vm/config", "").json()["drives"][0].clone()
}

#[test]
fn another_image_is_read_over_its_own_base() {
    let folder = saved_over_a_base();
    let (first, second) = (folder.path("disk"), folder.path("other"));
    fs::write(&second, vec![9; 1 << 20]).unwrap();
    over(&second, &folder.path("two.qcow2"));
    let far = folder.path("far");
    fs::create_dir(&far).unwrap();
    over(&second, &far.join("three.qcow2"));
    let list = |path: &PathBuf| json!([{ "path_on_host": path, "format": "raw" }]);
    let image = |path: &str, more: Value| {
        let mut told = json!({ "drive_id": "disk", "path_on_host": folder.path(path) });
        told.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        told
    };
    let load = |image: &Value| json!({ "folder": folder.path("v1"), "drive_overrides": [image] }).to_string();
    let wrong = "which is another file: have it name what the image names";
    let outside = "outside the image's folder: name it in `backing`";
    let refused = [
        (image("two.qcow2", json!({ "backing": list(&first) })), wrong),
        (image("far/three.qcow2", json!({})), outside),
    ];
    let taken = [
        image("two.qcow2", json!({})),
        image("two.qcow2", json!({ "backing": list(&second) })),
        image("far/three.qcow2", json!({ "backing": list(&second) })),
    ];
    let check = |service: &Service, taken: &Value| {
        assert!(has_open(service, &second) && !has_open(service, &first), "{taken}");
        assert_eq!(drive(&mut service.client())["backing"], taken["backing"], "{taken}");
    };
    // By a restore: each by one of its own.
    for image in &taken {
        let service = Service::start(&[]);
        for (image, expected) in &refused {
            fault(&mut service.client(), "/snapshot/load", &load(image), expected);
        }
        let both = image_with_overlay(image);
        fault(&mut service.client(), "/snapshot/load", &load(&both), "leave one of both out");
        service.client().ok("PUT", "/snapshot/load", &load(image));
        check(&service, image);
    }
    // By a change of a guest that was restored as it was: what is beneath the same image stays.
    let service = Service::start(&[]);
    let mut client = service.client();
    client.ok("PUT", "/snapshot/load", &json!({ "folder": folder.path("v1") }).to_string());
    let same = image("one.qcow2", json!({}));
    client.ok("PATCH", "/drives/disk", &same.to_string());
    assert!(has_open(&service, &first) && drive(&mut client)["backing"] == list(&first));
    for image in &taken {
        for (image, expected) in &refused {
            let fault = client.request("PATCH", "/drives/disk", &image.to_string()).fault();
            assert!(fault.contains(expected), "{image}: {fault}");
        }
        client.ok("PATCH", "/drives/disk", &image.to_string());
        check(&service, image);
    }
}

#[test]
fn what_a_guest_goes_on_from_is_no_disk_of_it() {
    let saved = Saved::new(&["--enable-pci"]);
    saved.service.client().ok("PUT", "/snapshot/create", &saved.create());
    let Saved { folder, service: mut first } = saved;
    // The kernel that a reset boots is in a folder of this process.
    first.process.child.kill().unwrap();
    first.process.child.wait().unwrap();
    fs::hard_link(folder.path("memory"), folder.path("linked")).unwrap();
    let saved = Saved { folder, service: Service::start(&[]) };
    let mut client = saved.service.client();
    let disk = |id: &str, name: &str| json!({ "drive_id": id, "is_root_device": false, "path_on_host": saved.path(name) });
    let refused = |client: &mut Client, method: &str, path: &str, body: &Value| {
        let fault = client.request(method, path, &body.to_string()).fault();
        assert!(
            fault.contains("it is a file of the snapshot itself, the "),
            "{method} {path} {body}: {fault}"
        );
    };
    for name in ["memory", "linked", "state"] {
        let drive = json!({ "drive_id": "disk", "path_on_host": saved.path(name) });
        let load = saved.load(&json!({ "drive_overrides": [drive] }));
        refused(&mut client, "PUT", "/snapshot/load", &serde_json::from_str(&load).unwrap());
    }
    client.ok("PUT", "/snapshot/load", &saved.load(&json!({ "resume_vm": true })));
    for name in ["memory", "linked", "state"] {
        refused(&mut client, "PUT", "/drives/x", &disk("x", name));
        let pmem = json!({ "id": "p", "path_on_host": saved.path(name) });
        refused(&mut client, "PUT", "/pmem/p", &pmem);
        let drive = json!({ "drive_id": "disk", "path_on_host": saved.path(name) });
        refused(&mut client, "PATCH", "/drives/disk", &drive);
    }
    // To be read, it is a file like any other; and so it is to a guest that begins anew.
    let mut read = disk("r", "memory");
    read["is_read_only"] = json!(true);
    client.ok("PUT", "/drives/r", &read.to_string());
    client.ok("DELETE", "/drives/r", r#"{"force": true}"#);
    client.ok("PUT", "/actions", r#"{"action_type": "Reset"}"#);
    client.ok("PUT", "/drives/x", &disk("x", "memory").to_string());
}

#[test]
fn a_snapshot_whose_disk_was_moved_goes_on_with_the_disk_that_is_named() {
    let Saved { folder, service } = Saved::new(&[]);
    let path = |name: &str| folder.path(name).to_str().unwrap().to_owned();
    service.client().ok("PUT", "/snapshot/create", &json!({ "folder": path("saved") }).to_string());
    drop(service);
    fs::rename(path("disk"), path("moved")).unwrap();
    let saved = path("saved");
    let restored = |more: &[&str]| {
        let mut process = Process::start([&["run", "--restore", &saved], more].concat());
        // A guest that never began reads nothing.
        let _ = process.stdin.as_mut().unwrap().write_all(b"go on\n");
        let ended = process.end();
        (ended.code, ended.text)
    };
    let refused = |more: &[&str], expected: &str| {
        let (code, text) = restored(more);
        assert!(code == Some(125) && text.contains(expected), "{more:?}: {text}");
    };
    refused(
        &[],
        "`drive_overrides` (`alula run --restore` and `alula clone`: --drive disk=PATH, or --overlay",
    );
    refused(
        &["--drive", "other=moved"],
        "`drive_overrides` of `other`: the saved machine has no such device",
    );
    let (code, text) = restored(&["--drive", &format!("disk={}", path("moved"))]);
    assert!(code == Some(0) && text.contains(" cases, 0 failed"), "{text}");
    fs::rename(path("moved"), path("disk")).unwrap();
    let overlay = format!("disk={}", path("over.qcow2"));
    let (code, text) = restored(&["--overlay", &overlay]);
    assert!(code == Some(0) && text.contains(" cases, 0 failed"), "{text}");
    refused(
        &["--overlay", &overlay],
        "File exists (os error 17): choose another path, or remove what is there",
    );
    let state = format!("{saved}/state");
    let ended = run(["run", "--restore", &state]);
    assert!(ended.text.contains(&format!("`{state}` is a file: give the folder")), "{}", ended.text);
    let ended = run(["run", "--drive", &overlay]);
    assert!(ended.code == Some(153) && ended.text.contains("(is `--disk` meant?)"), "{}", ended.text);
}

/// An override of a disk that has an overlay made at the image's path.
fn image_with_overlay(image: &Value) -> Value {
    let mut both = image.clone();
    both["overlay"] = json!(true);
    both["backing"] = json!([]);
    both
}
