//! Files and devices of the host that requests name.

use super::*;

#[test]
fn a_fifo_or_character_device_as_a_file_is_refused_at_once() {
    let mut service = Service::start(&[]);
    let mut client = service.client();
    let fifo = service.folder.path("fifo");
    output("mkfifo", &[fifo.to_str().unwrap()]);
    let kernel = service.folder.firmware();
    let disk = service.folder.write("disk", [0; 4096]);
    let drive = |path: &std::path::Path, read_only: bool| {
        json!({ "drive_id": "d", "is_root_device": false, "path_on_host": path, "is_read_only": read_only })
            .to_string()
    };
    for (path, kind) in [(fifo.as_path(), "a FIFO"), ("/dev/zero".as_ref(), "a character device")] {
        for (resource, body) in [
            ("/boot-source", json!({ "kernel_image_path": path }).to_string()),
            ("/boot-source", json!({ "kernel_image_path": kernel, "initrd_path": path }).to_string()),
            ("/drives/d", drive(path, true)),
            ("/drives/d", drive(path, false)),
        ] {
            let fault = client.request("PUT", resource, &body).fault();
            let expected = format!("`{}`: it is {kind}, a file or block device is needed", path.display());
            assert!(fault.contains(&expected), "{body}: {fault}");
        }
        let path = path.to_str().unwrap();
        for arguments in [vec!["check", path], vec!["serve", "--no-api", "--config-file", path]] {
            let refused = run(arguments);
            let expected = format!("read config file `{path}`: it is {kind}");
            assert!(refused.text.contains(&expected), "{}", refused.text);
        }
    }
    client.ok("PUT", "/drives/d", &drive(&disk, false));
    service.boot_source("hello");
    client.ok("PUT", "/actions", START);
    let patch = json!({ "drive_id": "d", "path_on_host": fifo }).to_string();
    let fault = client.request("PATCH", "/drives/d", &patch).fault();
    assert!(fault.contains("it is a FIFO"), "{fault}");
    service.process.send(libc::SIGTERM);
    service.process.end();
}

#[test]
fn what_was_replaced_or_is_not_needed_is_closed() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let pid = service.process.child.id();
    let folder = service.folder.0.to_string_lossy().into_owned();
    let open = || {
        let links = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let links = links.filter_map(|link| std::fs::read_link(link.unwrap().path()).ok());
        let names = links.filter_map(|link| Some(link.to_str()?.strip_prefix(&folder)?[1..].to_owned()));
        let mut names: Vec<_> = names.filter(|name| name != "api.socket").collect();
        names.sort();
        names
    };
    let kernel = service.folder.firmware();
    for number in 0..5 {
        let path = |name: &str| service.folder.write(&format!("{name}{number}"), alula::firmware::IMAGE);
        let source = json!({
            "kernel_image_path": path("kernel"), "initrd_path": path("initrd"), "boot_args": "hello"
        });
        client.ok("PUT", "/boot-source", &source.to_string());
        for read_only in [true, false] {
            let drive = json!({
                "drive_id": "d", "is_root_device": false, "path_on_host": path("disk"), "is_read_only": read_only
            });
            client.ok("PUT", "/drives/d", &drive.to_string());
        }
        client.ok("PUT", "/serial", &json!({ "serial_out_path": path("serial") }).to_string());
        let expected = ["disk", "initrd", "kernel", "serial"].map(|name| format!("{name}{number}"));
        assert_eq!(open(), expected);
    }
    // A change that is refused changes nothing: not the half of it that could be done.
    let refused = json!({ "kernel_image_path": kernel, "initrd_path": "/none" }).to_string();
    client.request("PUT", "/boot-source", &refused).fault();
    assert_eq!(open(), ["disk4", "initrd4", "kernel4", "serial4"]);
    service.boot_source("hello");
    client.ok("PUT", "/serial", "{}");
    assert_eq!(open(), ["disk4", "firmware"]);
    client.ok("PUT", "/actions", START);
    assert_eq!(open(), ["disk4"]);
}

#[test]
fn a_client_cannot_have_lines_written_to_our_descriptors() {
    /// The descriptor is closed when a program starts, so this process has opened it (proc(5): octal).
    const CLOEXEC: u32 = 0o2_000_000;
    let service = Service::start(&[]);
    let mut client = service.client();
    let drive = json!({
        "drive_id": "d", "is_root_device": false, "path_on_host": service.folder.write("disk", [7; 4096])
    });
    client.ok("PUT", "/drives/d", &drive.to_string());
    let pid = service.process.child.id();
    let is_ours = |number: &String| {
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        u32::from_str_radix(flags.trim(), 8).unwrap() & CLOEXEC != 0
    };
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let open = open.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let ours: Vec<String> = open.filter(is_ours).collect();
    assert!(ours.len() > 4, "a disk, signals, a socket and its client: {ours:?}");
    for number in ours {
        for name in ["fd:", "/dev/fd/", "/proc/self/fd/", "/proc/thread-self/fd/"] {
            let name = format!("{name}{number}");
            for (path, field) in
                [("/logger", "log_path"), ("/metrics", "metrics_path"), ("/serial", "serial_out_path")]
            {
                let fault = client.request("PUT", path, &json!({ field: name }).to_string()).fault();
                assert!(fault.contains("no descriptor of this number was inherited"), "{name}: {fault}");
            }
        }
    }
    assert_eq!(std::fs::read(service.folder.path("disk")).unwrap(), [7; 4096]);
}

#[test]
fn disks_and_interfaces_are_checked_where_they_are_named() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let disk = service.folder.write("disk", [0; 4096]);
    let mut fault =
        |path: &str, body: serde_json::Value| client.request("PUT", path, &body.to_string()).fault();
    let drive = |more: serde_json::Value| {
        let mut body = json!({ "drive_id": "a", "is_root_device": false, "path_on_host": disk });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    for (path, body, expected) in [
        ("/drives/b", drive(json!({})), "The id from the path does not match the id from the body!"),
        ("/drives/a", drive(json!({ "path_on_host": "/none" })), "open disk `a` `/none`: No such file"),
        (
            "/drives/a",
            drive(json!({ "path_on_host": "/dev" })),
            "it is a directory, a file or block device is needed",
        ),
        ("/drives/a", drive(json!({ "path_on_host": null })), "`path_on_host` is missing"),
        ("/drives/a", drive(json!({ "io_engine": "Quick" })), "unknown value `Quick`"),
        ("/drives/a", drive(json!({ "rate_limiter": { "speed": 1 } })), "unknown field `speed`"),
        ("/drives/a", drive(json!({ "cache_type": "Fast" })), "unknown value `Fast`"),
        ("/drives/a-b", drive(json!({ "drive_id": "a-b" })), "can only contain alphanumeric characters"),
        (
            "/network-interfaces/n",
            json!({ "iface_id": "m", "host_dev_name": "tap0" }),
            "The id from the path [n] does not match the id from the body [m]!",
        ),
        (
            "/network-interfaces/n",
            json!({ "iface_id": "n", "host_dev_name": "lo" }),
            "it is not a TAP interface: name one that is",
        ),
        (
            "/network-interfaces/n",
            json!({ "iface_id": "n", "host_dev_name": "lo", "guest_mac": "zz" }),
            "`zz` is not a MAC address",
        ),
        (
            "/network-interfaces/n",
            json!({ "iface_id": "n", "host_dev_name": "lo", "mtu": 10 }),
            "an `mtu` of 10 is too small",
        ),
        (
            "/network-interfaces/n",
            json!({ "iface_id": "n", "host_dev_name": "a-name-that-is-too-long" }),
            "interface names have 1 to 15 characters",
        ),
    ] {
        let fault = fault(path, body.clone());
        assert!(fault.contains(expected), "{path} {body}: {fault}");
    }
}

#[test]
fn two_root_devices_are_refused_and_one_can_be_replaced() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let disk = service.folder.write("disk", [0; 4096]);
    let body = |id: &str| json!({ "drive_id": id, "is_root_device": true, "path_on_host": disk }).to_string();
    client.ok("PUT", "/drives/a", &body("a"));
    client.ok("PUT", "/drives/a", &body("a"));
    let fault = client.request("PUT", "/drives/b", &body("b")).fault();
    assert!(fault.contains("A root block device already exists!"), "{fault}");
    let drives = client.ok("GET", "/vm/config", "").json()["drives"].clone();
    assert_eq!(drives.as_array().unwrap().len(), 1);
    assert_eq!((&drives[0]["drive_id"], &drives[0]["cache_type"]), (&json!("a"), &json!("Unsafe")));
    client.ok("PUT", "/entropy", "{}");
    assert_eq!(client.ok("GET", "/vm/config", "").json()["entropy"], json!({ "rate_limiter": null }));
}

#[test]
fn interfaces_need_a_tap_of_their_own() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    network::add_tap("tap1", "172.16.1.1/24");
    let service = Service::start(&[]);
    let mut client = service.client();
    let put = |client: &mut Client, id: &str, tap: &str, mac: &str| {
        let body = json!({ "iface_id": id, "host_dev_name": tap, "guest_mac": mac }).to_string();
        client.request("PUT", &format!("/network-interfaces/{id}"), &body)
    };
    assert_eq!(put(&mut client, "a", "tap0", "06:00:00:00:00:01").status(), "204");
    let fault = put(&mut client, "b", "tap1", "06:00:00:00:00:01").fault();
    assert!(fault.contains("The MAC address is already in use: 06:00:00:00:00:01"), "{fault}");
    assert_eq!(put(&mut client, "b", "tap1", "06:00:00:00:00:02").status(), "204");
    // Another process wants one of them.
    let other = Service::start(&[]);
    let fault = put(&mut other.client(), "a", "tap0", "06:00:00:00:00:03").fault();
    assert!(
        fault.contains("open TAP interface `tap0`") && fault.contains("another process uses it"),
        "{fault}"
    );
    let fault = put(&mut other.client(), "a", "lo", "06:00:00:00:00:03").fault();
    assert!(fault.contains("it is not a TAP interface"), "{fault}");
}

#[test]
fn one_image_has_one_writer() {
    let folder = common::Folder::new();
    let disk = folder.write("disk", [0; 4096]);
    let disk = disk.to_str().unwrap();
    let mut writer = common::Process::start(["run", "--disk", disk, "--cmdline", "hello"]);
    writer.expect("A");
    let pid = writer.child.id();
    for options in ["", ",ro"] {
        let second = run(["run", "--disk", &format!("{disk}{options}"), "--cmdline", "hello"]);
        assert_eq!(second.code, Some(125), "{}", second.text);
        assert!(second.text.contains(&format!("it is in use by process {pid} (alula)")), "{}", second.text);
    }
    writer.send(libc::SIGTERM);
    writer.end();
    // Readers share it.
    let read_only = format!("{disk},ro");
    let mut reader = common::Process::start(["run", "--disk", &read_only, "--cmdline", "hello"]);
    reader.expect("A");
    let second = run(["run", "--disk", &read_only, "--cmdline", "case=serial"]);
    assert_eq!(second.code, Some(0), "{}", second.text);
    // Empty files are placeholders, which many may share.
    let empty = folder.write("empty", "");
    let mut first = common::Process::start(["run", "--disk", empty.to_str().unwrap(), "--cmdline", "hello"]);
    first.expect("A");
    let second = run(["run", "--disk", empty.to_str().unwrap(), "--cmdline", "case=serial"]);
    assert_eq!(second.code, Some(0), "{}", second.text);
}

#[test]
fn two_disks_over_one_file_are_told_of_each_other() {
    let folder = common::Folder::new();
    let file = folder.write("disk", [0; 4096]);
    let disk = file.to_str().unwrap();
    let events = folder.path("events");
    let two = |first: &str, second: &str| {
        let (first, second) = (format!("{disk}{first}"), format!("{disk}{second}"));
        let _ = std::fs::remove_file(&events);
        let events = events.to_str().unwrap();
        run(["run", "--disk", &first, "--disk", &second, "--cmdline", "case=serial", "--events", events])
    };
    for (first, second) in [("", ""), ("", ",ro"), (",ro", ""), (",lock=off", "")] {
        let refused = two(first, second);
        assert_eq!(refused.code, Some(125), "{}", refused.text);
        let expected = format!(
            "use disk image `{disk}`: it is in use by another disk or pmem device of this microVM: stop that"
        );
        assert!(refused.text.contains(&expected), "{}", refused.text);
    }
    for (first, second, warned) in
        [("", ",lock=off", true), ("", ",ro,lock=off", true), (",ro", ",ro", false)]
    {
        let shared = two(first, second);
        assert_eq!(shared.code, Some(0), "{}", shared.text);
        let warning = "it is in use by another disk or pmem device of this microVM, and used all the same: its content may be damaged";
        assert_eq!(shared.text.contains(warning), warned, "{}", shared.text);
        let told = std::fs::read_to_string(&events).unwrap();
        assert_eq!(told.contains(r#""event":"disk_shared""#), warned, "{told}");
    }
    // Called as Firecracker, which takes no locks, we only say it: within a microVM and between two.
    let mut writer = common::Process::start(["run", "--disk", disk, "--cmdline", "hello"]);
    writer.expect("A");
    let socket = folder.path("s");
    let mut command = std::process::Command::new(common::called("firecracker", &folder));
    command.arg("--api-sock").arg(&socket);
    let mut process = common::Process::spawn(command);
    wait_for(|| UnixStream::connect(&socket).is_ok());
    let mut client = Client::connect(&socket);
    let source = json!({ "kernel_image_path": folder.firmware(), "boot_args": "hello" });
    client.ok("PUT", "/boot-source", &source.to_string());
    for id in ["a", "b"] {
        let drive = json!({ "drive_id": id, "is_root_device": false, "path_on_host": disk });
        client.ok("PUT", &format!("/drives/{id}"), &drive.to_string());
    }
    client.ok("PUT", "/actions", START);
    let user = format!("it is in use by process {} (alula), and used all the same", writer.child.id());
    process.expect(&format!("disk `a` `{disk}`: {user}"));
    process.expect(&format!("disk `b` `{disk}`: {user}"));
}

#[test]
fn an_image_is_replaced_only_by_one_that_can_be_had() {
    let service = Service::start(&[]);
    service.boot_source("hello");
    let mut client = service.client();
    let disk = service.folder.write("disk", [0; 4096]);
    let drive = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": disk });
    let patch = |path: &str| json!({ "drive_id": "d", "path_on_host": path }).to_string();
    client.ok("PUT", "/drives/d", &drive.to_string());
    let early = client.request("PATCH", "/drives/d", &patch("/none")).fault();
    assert!(early.contains("not supported before starting"), "{early}");
    client.ok("PUT", "/actions", START);
    for (body, expected) in [
        (json!({ "drive_id": "d" }).to_string(), "nothing is to be changed: give `path_on_host`"),
        (patch("/none"), "open disk `d` `/none`: No such file"),
        (json!({ "drive_id": "d", "rate_limiter": { "speed": 1 } }).to_string(), "unknown field `speed`"),
    ] {
        let fault = client.request("PATCH", "/drives/d", &body).fault();
        assert!(fault.contains(expected), "{body}: {fault}");
    }
    // The same image again: it may have another size now.
    client.ok("PATCH", "/drives/d", &patch(disk.to_str().unwrap()));
    let other = service.folder.write("other", [0; 8192]);
    client.ok("PATCH", "/drives/d", &patch(other.to_str().unwrap()));
    assert_eq!(client.ok("GET", "/vm/config", "").json()["drives"][0]["path_on_host"], json!(other));
    // The first image is free again, the other one is taken.
    let first = run(["run", "--disk", disk.to_str().unwrap(), "--cmdline", "case=serial"]);
    assert_eq!(first.code, Some(0), "{}", first.text);
    let second = run(["run", "--disk", other.to_str().unwrap(), "--cmdline", "case=serial"]);
    assert!(second.text.contains("it is in use by process"), "{}", second.text);
}

#[test]
fn a_raw_image_that_is_called_qcow2_is_refused_when_it_is_named() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let folder = &service.folder;
    let disk = |name: &str, format: &str| {
        let path = folder.path(name);
        json!({ "drive_id": "d", "is_root_device": false, "path_on_host": path, "format": format })
            .to_string()
    };
    folder.write("raw", [7; 4096]);
    folder.write("empty", "");
    folder.write("old", [&b"QFI\xfb\0\0\0\x01"[..], &[0; 4088]].concat());
    client.ok("PUT", "/drives/d", &disk("raw", "raw"));
    for (name, expected) in [
        ("raw", "it is not a qcow2 image: give `raw` as its format, if it is one"),
        ("empty", "it is not a qcow2 image"),
        ("old", "it is a qcow image of version 1"),
    ] {
        let fault = client.request("PUT", "/drives/d", &disk(name, "qcow2")).fault();
        let said =
            format!("Drive config error: use disk image `{}`: {expected}", folder.path(name).display());
        assert!(fault.starts_with(&said), "{fault}");
    }
    // The disk that was there before is there still.
    let config = client.ok("GET", "/vm/config", "").json();
    assert_eq!(config["drives"][0]["format"], serde_json::Value::Null, "{config}");
    let config = json!({ "boot-source": { "kernel_image_path": folder.firmware() },
        "drives": [serde_json::from_str::<serde_json::Value>(&disk("raw", "qcow2")).unwrap()] });
    let file = folder.write("vm.json", config.to_string());
    let checked = run(["check", file.to_str().unwrap()]);
    assert!(checked.code == Some(1) && checked.text.contains("it is not a qcow2 image"), "{}", checked.text);
}
