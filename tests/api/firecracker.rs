//! The API as clients of Firecracker know it.

use super::*;

const X86_64: bool = cfg!(target_arch = "x86_64");

/// How a fault begins that a body cannot be read by.
const SERDE: &str = "An error occurred when deserializing the json body of a request: ";

/// A request that is refused: method, path, body, and how the fault begins.
type Refused = (&'static str, &'static str, &'static str, String);

fn refused_machines() -> Vec<Refused> {
    let memory = "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured \
                  page size.";
    vec![
        ("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 0}"#, memory.to_owned()),
        (
            "PUT",
            "/machine-config",
            r#"{"vcpu_count":1,"mem_size_mib":3,"huge_pages":"2M"}"#,
            memory.to_owned(),
        ),
        ("PATCH", "/machine-config", r#"{"mem_size_mib": 0}"#, memory.to_owned()),
        ("PATCH", "/machine-config", "{}", "Empty PATCH request.".to_owned()),
        ("PATCH", "/machine-config", "", "Empty PATCH request.".to_owned()),
        (
            "PATCH",
            "/machine-config",
            r#"{"vcpu_count": 1, "vcpu_count": 2}"#,
            format!("{SERDE}duplicate field `vcpu_count`"),
        ),
        (
            "PUT",
            "/machine-config",
            r#"{"vcpu_count": 256.5}"#,
            format!("{SERDE}invalid type: floating point"),
        ),
        (
            "PUT",
            "/machine-config",
            r#"{"mem_size_mib": 1e40}"#,
            format!("{SERDE}invalid type: floating point"),
        ),
        ("PUT", "/machine-config", r#"{"mem_size_mib": -1}"#, format!("{SERDE}invalid value: integer `-1`")),
    ]
}

fn refused_devices_and_paths() -> Vec<Refused> {
    let id = "API Resource IDs can only contain alphanumeric characters and underscores.";
    vec![
        ("PUT", "/drives/a-b", "{}", id.to_owned()),
        ("PUT", "/network-interfaces/a%20b", "{}", id.to_owned()),
        ("PUT", "/drives/", "{}", "The ID cannot be empty.".to_owned()),
        ("PUT", "/network-interfaces", "{}", "The ID cannot be empty.".to_owned()),
        ("DELETE", "/drives/a", "{}", "Empty Delete request.".to_owned()),
        ("PUT", "/unknown", "", "Empty PUT request.".to_owned()),
        ("PATCH", "/unknown", "", "Empty PATCH request.".to_owned()),
        ("GET", "/unknown", "", "Invalid request method and/or path: GET unknown.".to_owned()),
        ("GET", "/gdb", "", "Invalid request method and/or path: GET gdb.".to_owned()),
        ("PUT", "/gdb", "{}", "Invalid request method and/or path: PUT gdb.".to_owned()),
        ("GET", "/unknown", "{}", "GET request cannot have a body.".to_owned()),
        (
            "GET",
            "/machine-config?x",
            "",
            "Invalid request method and/or path: GET machine-config?x.".to_owned(),
        ),
        (
            "PUT",
            "/machine-config?x",
            "{}",
            "Invalid request method and/or path: PUT machine-config?x.".to_owned(),
        ),
        ("GET", "/drives/a", "", "Invalid request method and/or path: GET drives.".to_owned()),
        ("PATCH", "/actions", "{}", "Invalid request method and/or path: PATCH actions.".to_owned()),
        ("PATCH", "/vm", r#"{"state": "Running"}"#, format!("{SERDE}unknown variant `Running`")),
        ("PUT", "/boot-source", r#"{"kernel_image_path": "/none"}"#, "Boot source error: ".to_owned()),
        ("PUT", "/entropy", r#"{"rate": 1}"#, format!("{SERDE}unknown field `rate`")),
        (
            "PUT",
            "/drives/a",
            r#"{"drive_id": "a", "is_root_device": true, "path_on_host": "/none"}"#,
            "Drive config error: ".to_owned(),
        ),
        (
            "PUT",
            "/network-interfaces/a",
            r#"{"iface_id": "a", "host_dev_name": "lo", "guest_mac": null}"#,
            "Network config error: ".to_owned(),
        ),
        (
            "PUT",
            "/network-interfaces/a",
            r#"{"iface_id": "a", "host_dev_name": "none9", "mtu": 70000}"#,
            format!("{SERDE}invalid value: integer `70000`, expected u16"),
        ),
    ]
}

#[test]
fn faults_are_those_that_clients_know() {
    let folder = common::Folder::new();
    let socket = folder.path("s");
    let mut command = std::process::Command::new(common::called("firecracker", &folder));
    command.arg("--api-sock").arg(&socket);
    let _process = common::Process::spawn(command);
    wait_for(|| UnixStream::connect(&socket).is_ok());
    let mut client = Client::connect(&socket);
    for (method, path, body, expected) in [refused_machines(), refused_devices_and_paths()].concat() {
        let response = client.request(method, path, body);
        assert!(response.fault().starts_with(&expected), "{method} {path} {body}: {response:?}");
        assert!(response.head.contains("\r\nContent-Type: application/json\r\n"), "{response:?}");
    }
    // Names may be of any script.
    let disk = folder.write("disk", [0; 4096]);
    let body = json!({ "drive_id": "плата_1", "is_root_device": false, "path_on_host": disk }).to_string();
    client.ok("PUT", "/drives/плата_1", &body);
}

#[test]
fn called_firecracker_it_has_that_monitors_command_line_and_limits() {
    let folder = common::Folder::new();
    let firecracker = common::called("firecracker", &folder);
    let output = |program: &std::path::Path, arguments: &[&str]| {
        std::process::Command::new(program).args(arguments).output().unwrap()
    };
    let version = output(&firecracker, &["--version"]);
    assert_eq!(
        (version.status.code(), version.stdout.as_slice()),
        (Some(0), &b"Firecracker v1.17.0\n\n"[..])
    );
    assert_eq!(output(&common::called("jailer", &folder), &["--version"]).stdout, b"Jailer v1.17.0\n\n");
    let editor = common::called("snapshot-editor", &folder);
    assert_eq!(output(&editor, &["--version"]).stdout, b"snapshot-editor 1.17.0\n");
    let refused = output(&editor, &["edit-memory"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("`edit-memory rebase --memory-path MEMORY"));
    assert_eq!(output(&firecracker, &["--dance"]).status.code(), Some(153));
    assert_eq!(output(&firecracker, &["--id", "a_b"]).status.code(), Some(153));
    let help = String::from_utf8(output(&firecracker, &["--help"]).stdout).unwrap();
    assert!(
        help.contains("--no-seccomp") && help.contains("--boot-timer") && help.contains("The exit code"),
        "{help}"
    );
    for option in ["--warm", "--events", "--allow", "--seccomp-log", "--no-sandbox"] {
        let refused = output(&firecracker, &[option, "x"]);
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            text.contains(&format!("invalid option '{option}'")) && !text.contains("implemented"),
            "{text}"
        );
        assert!(!help.contains(&format!("{option} ")), "{option}: {help}");
    }
    assert_eq!(output(&firecracker, &["--no-api"]).status.code(), Some(153));
    assert_eq!(output(&firecracker, &["--no-api", "--config-file", "/none"]).status.code(), Some(1));

    let socket = folder.path("s");
    let mut command = std::process::Command::new(&firecracker);
    command.args(["--id", "vm-7", "--no-seccomp", "--start-time-us", "1", "--api-sock"]).arg(&socket);
    let _process = common::Process::spawn(command);
    wait_for(|| UnixStream::connect(&socket).is_ok());
    let mut client = Client::connect(&socket);
    assert_eq!(client.ok("GET", "/", "").json()["id"], "vm-7");
    let fault = client.request("PUT", "/machine-config", r#"{"vcpu_count": 33, "mem_size_mib": 64}"#).fault();
    let expected = "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or \
                    an even number if SMT is enabled.";
    assert!(fault.starts_with(expected), "{fault}");
    client.ok("PUT", "/machine-config", r#"{"vcpu_count": 32, "mem_size_mib": 64}"#);

    let config = json!({
        "boot-source": { "kernel_image_path": folder.firmware(), "boot_args": "case=serial end=9" },
        "machine-config": { "vcpu_count": 33, "mem_size_mib": 16 },
        "drives": [],
    });
    let file = folder.write("vm.json", config.to_string());
    let refused = output(&firecracker, &["--no-api", "--config-file", file.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(1));
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        text.contains("vm.json`: `machine-config`: The number of vCPUs") && text.contains("less than 32")
    );
    // Ourselves, we only have the host's limit.
    let ended = run(["serve", "--no-api", "--config-file", file.to_str().unwrap()]);
    assert_eq!(ended.code, Some(9), "{}", ended.text);
}

#[test]
fn called_firecracker_it_tells_versions_of_saved_states() {
    let folder = common::Folder::new();
    let firecracker = common::called("firecracker", &folder);
    let output =
        |arguments: &[&str]| std::process::Command::new(&firecracker).args(arguments).output().unwrap();
    let version = output(&["--snapshot-version"]);
    assert_eq!((version.status.code(), version.stdout.as_slice()), (Some(0), &b"v1.1.1\n"[..]));
    let disk = folder.write("short", [0; 4096]);
    for (path, expected) in
        [(disk.to_str().unwrap(), "it is no state of a machine"), ("/none", "No such file")]
    {
        let refused = output(&["--describe-snapshot", path]);
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        let expected = format!("read the version of the state of a machine, `{path}`: {expected}");
        assert!(refused.status.code() == Some(1) && text.contains(&expected), "{text}");
    }
}

#[test]
fn called_firecracker_it_is_that_monitor_alone() {
    let folder = common::Folder::new();
    let firecracker = common::called("firecracker", &folder);
    let socket = folder.path("s");
    let mut command = std::process::Command::new(&firecracker);
    command.args(["--id", "vm-8", "--api-sock"]).arg(&socket);
    let mut process = common::Process::spawn(command);
    wait_for(|| UnixStream::connect(&socket).is_ok());
    let mut client = Client::connect(&socket);
    let disk = folder.write("disk", [0; 4096]);
    let drive = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": disk, "format": "raw" });
    let fault = client.request("PUT", "/drives/d", &drive.to_string()).fault();
    assert!(fault.contains("unknown field `format`, expected one of `drive_id`, "), "{fault}");
    let shutdown = r#"{"action_type": "Shutdown"}"#;
    let fault = client.request("PUT", "/actions", shutdown).fault();
    assert!(fault.contains("unknown variant `Shutdown`"), "{fault}");
    for path in ["events", "metrics", "guest"] {
        let fault = client.request("GET", &format!("/{path}"), "").fault();
        assert_eq!(fault, format!("Invalid request method and/or path: GET {path}."));
    }
    // A guest that has halted stays, and may be paused and resumed; the log tells of it.
    let body = json!({ "kernel_image_path": folder.firmware(), "boot_args": "case=serial end=halt" });
    client.ok("PUT", "/boot-source", &body.to_string());
    client.ok("PUT", "/actions", START);
    process.expect("the guest halted for good");
    for state in ["Paused", "Resumed"] {
        client.ok("PATCH", "/vm", &json!({ "state": state }).to_string());
    }
    assert_eq!(client.ok("GET", "/", "").json()["state"], "Running");
    assert!(process.is_running() && socket.exists());
    // What of our own tools asks for events does without.
    let ctl = |words: &[&str]| run([&["ctl", "--api-sock", socket.to_str().unwrap()], words].concat());
    assert!(ctl(&["status"]).text.starts_with("vm-8: Running; 1 CPU"));
    assert!(ctl(&["events"]).text.contains("the monitor knows no `GET /events`"));
    let (stopped, words) =
        (ctl(&["stop", "--force"]), "the guest was ended at once, as if its power had failed\n");
    assert_eq!((stopped.code, stopped.text.as_str()), (Some(0), words));
    assert!(!socket.exists());
    for (more, expected) in [
        (json!({}), "missing field `drives`"),
        (json!({ "drives": [drive] }), "`drives`: unknown field `format`, expected one of"),
    ] {
        let mut config = json!({ "boot-source": body });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let file = folder.write("vm.json", config.to_string());
        let mut command = std::process::Command::new(&firecracker);
        command.args(["--no-api", "--config-file"]).arg(&file);
        let ended = common::Process::spawn(command).end();
        assert_eq!(ended.code, Some(1), "{}", ended.text);
        assert!(ended.text.contains(expected), "{}", ended.text);
    }
}

/// Kata (runtime-rs) asks this of Firecracker for a sandbox, but for its placeholders: the disks and networks of containers
/// come when the containers are there, and go with them.
#[test]
fn containers_of_kata_have_disks_that_come_and_go() {
    network::enter();
    ["tap0", "tap1"].iter().for_each(|tap| network::add_interface(tap, network::TAP));
    let folder = common::Folder::new();
    let socket = folder.path("s");
    let mut command = std::process::Command::new(common::called("firecracker", &folder));
    command.args(["--enable-pci", "--api-sock"]).arg(&socket);
    let mut process = common::Process::spawn(command);
    wait_for(|| UnixStream::connect(&socket).is_ok());
    let mut client = Client::connect(&socket);
    let mut put = |path: &str, body: serde_json::Value| drop(client.ok("PUT", path, &body.to_string()));
    // On aarch64, a guest without an agent is not asked: this one uses no device.
    let words = if X86_64 { "case=slots" } else { "case=serial end=idle" };
    put("/boot-source", json!({ "kernel_image_path": folder.firmware(), "boot_args": words }));
    put("/machine-config", json!({ "mem_size_mib": 64, "vcpu_count": 1 }));
    let drive = |id: &str, is_read_only: bool| {
        let path = folder.write(id, [0; 4096]);
        json!({ "drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": is_read_only })
    };
    put("/drives/rootfs", drive("rootfs", true));
    put("/vsock", json!({ "guest_cid": 3, "uds_path": folder.path("kata.hvsock"), "vsock_id": "root" }));
    let net = |id: &str, tap: &str| json!({ "iface_id": id, "guest_mac": null, "host_dev_name": tap });
    put("/network-interfaces/eth0", net("eth0", "tap0"));
    put("/actions", json!({ "action_type": "InstanceStart" }));
    let mut finds = |count: usize| {
        if X86_64 {
            process.expect(&format!("slots: {count} devices"));
        }
    };
    finds(3);

    let bucket = json!({ "size": 0, "one_time_burst": 0, "refill_time": 0 });
    let mut container = drive("drive1", false);
    container["rate_limiter"] = json!({ "bandwidth": bucket, "ops": bucket });
    for _ in 0..2 {
        client.ok("PUT", "/drives/drive1", &container.to_string());
        finds(4);
        client.ok("PUT", "/network-interfaces/eth1", &net("eth1", "tap1").to_string());
        finds(5);
        for (path, left) in [("/network-interfaces/eth1", 4), ("/drives/drive1", 3)] {
            client.ok("DELETE", path, "");
            finds(left);
        }
        wait_for(|| client.ok("GET", "/vm/config", "").json()["drives"].as_array().unwrap().len() == 1);
    }
    std::fs::remove_file(folder.path("drive1")).unwrap();
    client.ok("PUT", "/network-interfaces/eth1", &net("eth1", "tap1").to_string());
    let fault = client.request("PUT", "/drives/drive1", &container.to_string()).fault();
    assert!(fault.contains("No such file"), "{fault}");
}
