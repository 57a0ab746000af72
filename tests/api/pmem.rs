//! Persistent memory, as clients ask for it.

use serde_json::Value;

use super::*;

fn body(id: &str, path: &std::path::Path, more: &[(&str, Value)]) -> String {
    let mut body = json!({ "id": id, "path_on_host": path });
    more.iter().for_each(|(field, value)| body[*field] = value.clone());
    body.to_string()
}

#[test]
fn persistent_memory_is_told_back_and_its_limits_are_changed() {
    let service = Service::start(&[]);
    let path = service.folder.write("file", [0; 4096]);
    let mut client = service.client();
    let limits = json!({
        "ops": { "size": 5, "one_time_burst": null, "refill_time": 100 }, "bandwidth": null
    });
    client.ok("PUT", "/pmem/p", &body("p", &path, &[]));
    // Another one replaces it.
    client.ok(
        "PUT",
        "/pmem/p",
        &body("p", &path, &[("read_only", true.into()), ("rate_limiter", limits.clone())]),
    );
    let told = json!([{
        "id": "p", "path_on_host": path, "root_device": false, "read_only": true, "rate_limiter": limits,
    }]);
    assert_eq!(client.ok("GET", "/vm/config", "").json()["pmem"], told);
    let patch = r#"{"id": "p", "rate_limiter": {"ops": {"size": 7, "refill_time": 100}}}"#;
    let fault = client.request("PATCH", "/pmem/p", patch).fault();
    assert!(fault.contains("not supported before starting"), "{fault}");
    service.boot_source("case=pmem end=idle");
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    let mut service = service;
    service.process.expect("1 cases, 0 failed");
    client.ok("PATCH", "/pmem/p", patch);
    // As in Firecracker, a change of nothing is none.
    client.ok("PATCH", "/pmem/p", r#"{"id": "p"}"#);
    let limiter = client.ok("GET", "/vm/config", "").json()["pmem"][0]["rate_limiter"].clone();
    assert_eq!(limiter["ops"]["size"], 7);
    let metrics = client.ok("GET", "/metrics", "").json();
    for group in ["pmem", "pmem_p"] {
        assert_eq!(metrics[group]["flush_count"], 2, "{metrics}");
        assert_eq!(metrics[group]["invalid_reqs_count"], 1);
    }
    assert_eq!(metrics["patch_api_requests"]["pmem_count"], 3);
    for (method, path, body, expected) in [
        ("PATCH", "/pmem/q", r#"{"id": "q"}"#, "Pmem config error: "),
        ("PATCH", "/pmem/p", r#"{"id": "q"}"#, "The id from the path does not match the id from the body!"),
        ("PATCH", "/pmem/p", r#"{"id": "p", "path_on_host": "x"}"#, "An error occurred when deserializing"),
        ("PUT", "/pmem/r", r#"{"id": "r", "path_on_host": "x"}"#, "Pmem config error: PCI is not enabled"),
        ("DELETE", "/pmem/p", "", "Pmem config error: PCI is not enabled"),
        ("GET", "/pmem/p", "", "Invalid request method and/or path: GET pmem."),
    ] {
        let fault = client.request(method, path, body).fault();
        assert!(fault.starts_with(expected), "{method} {path}: {fault}");
    }
}

#[test]
fn persistent_memory_that_cannot_be_is_refused_when_it_is_named() {
    for extra in [&[][..], &["--enable-pci"]] {
        let service = Service::start(extra);
        let folder = &service.folder;
        let path = folder.write("file", [0; 4096]);
        common::output("mkfifo", &[folder.path("fifo").to_str().unwrap()]);
        folder.write("empty", []);
        let mut client = service.client();
        for (name, expected) in [
            ("empty", "it is empty: give it the size that the guest is to see"),
            ("fifo", "it is a FIFO, a file or block device is needed"),
            (".", "it is a directory, a file or block device is needed"),
            ("none", "No such file"),
        ] {
            let fault = client.request("PUT", "/pmem/p", &body("p", &folder.path(name), &[])).fault();
            assert!(fault.starts_with("Pmem config error: ") && fault.contains(expected), "{fault}");
        }
        for (path, body, expected) in [
            ("/pmem/p", r#"{"id": "p"}"#.to_owned(), "missing field `path_on_host`"),
            ("/pmem/p", body("q", &path, &[]), "The id from the path does not match the id from the body!"),
            ("/pmem/p", body("p", &path, &[("size", 1.into())]), "unknown field `size`"),
            (
                "/pmem/p",
                body("p", &path, &[("root_device", 1.into())]),
                "`root_device`: expected true or false",
            ),
            ("/pmem/a-b", body("a-b", &path, &[]), "API Resource IDs can only contain"),
            ("/pmem/", body("p", &path, &[]), "The ID cannot be empty."),
            ("/pmem/p", body("p", std::path::Path::new(""), &[]), "`path_on_host` is missing"),
        ] {
            let fault = client.request("PUT", path, &body).fault();
            assert!(fault.contains(expected), "{body}: {fault}");
        }
        // Nothing of that is left.
        assert_eq!(client.ok("GET", "/vm/config", "").json()["pmem"], json!([]));
        // A guest boots from one device.
        let root = [("root_device", true.into())];
        client.ok("PUT", "/pmem/p", &body("p", &path, &root));
        client.ok("PUT", "/pmem/p", &body("p", &path, &root));
        let fault = client.request("PUT", "/pmem/q", &body("q", &path, &root)).fault();
        assert!(fault.starts_with("Pmem config error: A root pmem device already exist"), "{fault}");
        let disk = json!({ "drive_id": "d", "path_on_host": path, "is_root_device": true }).to_string();
        let fault = client.request("PUT", "/drives/d", &disk).fault();
        assert!(fault.starts_with("Drive config error: A root block device already exists!"), "{fault}");
        // Two that write to one file are found at the start, as with disks, and named.
        client.ok("PUT", "/pmem/q", &body("q", &path, &[]));
        service.boot_source("case=pmem");
        let fault = client.request("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#).fault();
        assert!(fault.contains("set up pmem device `q`") && fault.contains("it is in use by"), "{fault}");
    }
}

#[test]
fn a_root_stays_and_its_file_and_name_are_taken() {
    let service = Service::start(&["--enable-pci"]);
    let [path, other] = ["file", "other"].map(|name| service.folder.write(name, [0; 4096]));
    let mut client = service.client();
    client.ok("PUT", "/pmem/root", &body("root", &path, &[("root_device", true.into())]));
    service.boot_source("hello");
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    let before = client.ok("GET", "/vm/config", "").json();
    let used = "it is in use by another disk or pmem device of this microVM";
    let disk = json!({ "drive_id": "d", "path_on_host": path, "is_root_device": false }).to_string();
    for (method, path, body, expected) in [
        (
            "DELETE",
            "/pmem/root",
            r#"{"force": true}"#,
            "Cannot unplug root device: the guest has booted from pmem device `root`",
        ),
        (
            "PUT",
            "/pmem/root",
            &*body("root", &other, &[]),
            "Device ID in use: the guest has pmem device `root`: change it (PATCH), or take it away first (DELETE)",
        ),
        ("PUT", "/pmem/p", &body("p", &path, &[]), used),
        ("PUT", "/pmem/p", &body("p", &path, &[("read_only", true.into())]), used),
        ("PUT", "/drives/d", &disk, used),
        ("DELETE", "/pmem/p", "", "Device not found: there is no pmem device `p`"),
        ("DELETE", "/network-interfaces/p", "", "Device not found: there is no network interface `p`"),
    ] {
        let fault = client.request(method, path, body).fault();
        assert!(fault.contains(expected), "{method} {path}: {fault}");
        assert_eq!(client.ok("GET", "/vm/config", "").json(), before, "{method} {path}");
    }
}
