//! `alula ctl` and `alula check`: what people type.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::io::{Read, Write};
use std::process::Command;

use common::{Folder, Process, Service, run};
use serde_json::{Value, json};

fn ctl(service: &Service, words: &[&str]) -> (Option<i32>, String) {
    let socket = service.socket.to_str().unwrap();
    let ended = run([&["ctl", "--api-sock", socket], words].concat());
    (ended.code, ended.text)
}

#[test]
fn flushes_are_limited_of_the_pmem_device_that_is_meant() {
    let service = Service::start(&[]);
    let mut client = service.client();
    for id in ["p", "both"] {
        let path = service.folder.write(id, [0; 4096]);
        client.ok("PUT", &format!("/pmem/{id}"), &json!({ "id": id, "path_on_host": path }).to_string());
    }
    let disk = service.folder.write("disk", [0; 4096]);
    let drive = json!({ "drive_id": "both", "is_root_device": false, "path_on_host": disk }).to_string();
    client.ok("PUT", "/drives/both", &drive);
    service.boot_source("case=serial end=idle");
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    let (code, text) = ctl(&service, &["limit", "p", "ops=5"]);
    assert!(code == Some(0) && text.contains("limited from now on"), "{text}");
    let told = client.ok("GET", "/vm/config", "").json()["pmem"].clone();
    assert_eq!(
        (&told[0]["rate_limiter"]["ops"]["size"], &told[1]["rate_limiter"]),
        (&json!(5), &Value::Null)
    );
    let (code, text) = ctl(&service, &["limit", "both", "ops=5"]);
    assert!(code == Some(1) && text.contains("devices of several kinds are called `both`"), "{text}");
}

#[test]
fn a_guest_is_looked_at_paused_and_resumed() {
    let service = Service::start(&["--id", "vm-1"]);
    let ok = |words: &[&str], expected: &str| {
        let (code, text) = ctl(&service, words);
        assert_eq!(code, Some(0), "{words:?}: {text}");
        assert!(text.contains(expected), "{words:?}: {text}");
    };
    ok(&["status"], "vm-1: Not started; 1 CPU, 128 MiB of memory");
    let disk = service.folder.write("disk", [0; 4096]);
    let drive = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": disk }).to_string();
    ok(&["put", "/drives/d", &drive], "done");
    ok(&["put", "/machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 64}"#], "done");
    ok(&["patch", "/machine-config", r#"{"mem_size_mib": 65}"#], "done");
    let kernel =
        json!({ "kernel_image_path": service.folder.firmware(), "boot_args": "case=serial end=idle" });
    ok(&["put", "/boot-source", &kernel.to_string()], "done");
    ok(&["start"], "started");
    ok(&["status"], "vm-1: Running; 2 CPUs, 65 MiB of memory, 1 disk\n");
    ok(&["status"], &format!("\nprocess {}, up ", service.process.child.id()));
    ok(&["limit", "d", "bandwidth=10M", "ops=500"], "limited from now on");
    ok(&["limit", "d", "ops=off"], "limited from now on");
    let limited = r#"{"bandwidth":{"size":10485760,"one_time_burst":null,"refill_time":1000},"ops":null}"#;
    let config = service.client().ok("GET", "/vm/config", "").json();
    assert_eq!(config["drives"][0]["rate_limiter"], serde_json::from_str::<Value>(limited).unwrap());
    ok(&["flush"], "written");
    if cfg!(target_arch = "x86_64") {
        ok(&["ctrl-alt-del"], "the keys were pressed");
    }
    ok(&["pause"], "paused");
    ok(&["status"], "vm-1: Paused");
    ok(&["resume"], "resumed");
    ok(&["config"], "machine-config:\n  huge_pages: None\n");
    ok(&["get", "/machine-config"], "vcpu_count: 2");
    ok(&["metrics"], "api_server:\n");

    let json_of = |words: &[&str]| -> Value {
        let (code, text) = ctl(&service, &[words, &["--json"]].concat());
        assert_eq!(code, Some(0), "{text}");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    };
    let status = json_of(&["status"]);
    assert_eq!((&status["state"], &status["pid"]), (&json!("Running"), &json!(service.process.child.id())));
    assert!(status["cpu_us"].as_u64() > Some(0) && status["memory_bytes"].as_u64() > Some(0), "{status}");
    assert_eq!(json_of(&["config"])["drives"][0]["drive_id"], "d");
    assert!(json_of(&["metrics"])["api_server"].is_object());
    assert_eq!(ctl(&service, &["pause", "--json"]), (Some(0), String::new()));
}

#[test]
fn a_service_with_a_name_is_found_by_it() {
    let folder = Folder::new();
    let alula = |words: &[&str]| {
        let mut command = Command::new(common::alula());
        command.args(words).env("XDG_RUNTIME_DIR", &folder.0);
        command
    };
    let mut service = Process::spawn(alula(&["serve", "--id", "web"]));
    common::wait_for(|| folder.path("alula/web.sock").exists());
    let told = |words: &[&str]| {
        let output = alula(words).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    common::wait_for(|| told(&["ctl", "web", "status"]).0 == 0);
    assert!(told(&["ctl", "web", "status"]).1.contains("web: Not started"));
    let (code, said) = told(&["serve", "--id", "web"]);
    assert!(code == 1 && said.contains("web.sock") && said.contains("another process serves it"), "{said}");
    service.send(libc::SIGTERM);
    service.end();
    assert!(!folder.path("alula/web.sock").exists());
    // A folder that cannot be made: the user hears what to give instead.
    std::fs::remove_dir(folder.path("alula")).unwrap();
    folder.write("alula", "a file");
    let (code, said) = told(&["serve", "--id", "web"]);
    assert!(code == 1 && said.contains("(set XDG_RUNTIME_DIR, or give --api-sock)"), "{said}");
}

#[test]
fn what_is_refused_is_said_with_the_faults_words() {
    let service = Service::start(&[]);
    for (words, code, expected) in [
        (&["pause"][..], 1, "alula: PATCH /vm: The requested operation is not supported before starting"),
        (
            &["put", "/machine-config", "{"],
            1,
            "alula: PUT /machine-config: An error occurred when deserializing",
        ),
        (&["get", "/nothing"], 1, "alula: GET /nothing: Invalid request method and/or path: GET nothing."),
        (&["get", "nothing"], 1, "`nothing` is no path of the API: it begins with a slash"),
        (&["get", "/ HTTP/1.1\r\n\r\nGET /"], 1, "is no path of the API"),
        (&["delete", "/machine-config"], 1, "Invalid request method and/or path: DELETE machine-config."),
        (
            &["dance"],
            153,
            "there is no command `dance`: if a guest is called so, what to ask it is missing, as in `alula ctl dance status`",
        ),
        (&["snapshot", ""], 153, "the folder of a snapshot has an empty name: name the one to save it to"),
        (
            &["limit", "d", "ops=5"],
            1,
            "no disk, no network interface and no pmem device of the guest is called `d`",
        ),
        (&["put", "/vm"], 153, "a path and a body in JSON are expected; see `alula ctl --help`"),
        (&[], 153, "a command is missing"),
    ] {
        let (ended, text) = ctl(&service, words);
        assert_eq!(ended, Some(code), "{words:?}: {text}");
        assert!(text.contains(expected), "{words:?}: {text}");
    }
}

#[test]
fn half_a_body_is_none_in_either_direction() {
    let folder = Folder::new();
    let socket = folder.path("socket");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    // Valid as far as it goes, and more was promised.
    let answer = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}";
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 1000]).unwrap();
        stream.write_all(answer.as_bytes()).unwrap();
    });
    let ended = run(["ctl", "--api-sock", socket.to_str().unwrap(), "get", "/vm/config", "--json"]);
    assert_eq!(ended.code, Some(1), "{}", ended.text);
    assert!(ended.text.contains("the monitor hung up"), "{}", ended.text);
    server.join().unwrap();
    let service = Service::start(&[]);
    let socket = service.socket.to_str().unwrap();
    let mut process = Process::start(["ctl", "--api-sock", socket, "put", "/machine-config", "-"]);
    let mut stdin = process.stdin.take().unwrap();
    let body = [&b"{}"[..], &vec![b' '; 17 << 20]].concat();
    // Standard input is not read to its end.
    let _ = stdin.write_all(&body);
    drop(stdin);
    let ended = process.end();
    assert_eq!(ended.code, Some(1), "{}", ended.text);
    assert!(ended.text.contains("standard input has more than 16777216 bytes"), "{}", ended.text);
}

#[test]
fn events_are_told_as_they_come_until_the_guest_ends() {
    let mut service = Service::start(&["--id", "e"]);
    let socket = service.socket.to_str().unwrap().to_owned();
    let mut people = Process::start(["ctl", "--api-sock", &socket, "events"]);
    let mut programs = Process::start(["ctl", "--api-sock", &socket, "--json", "events"]);
    service.boot_source("case=serial echo end=poweroff");
    people.expect("configured  what: /boot-source");
    service.client().ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    people.expect("started  reason: ");
    let line = programs.expect(r#""event":"started""#);
    assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["id"], "e");
    service.process.stdin.as_mut().unwrap().write_all(b"bye\n").unwrap();
    people.expect("powered off");
    assert_eq!(people.end().code, Some(0));
    assert_eq!(programs.end().code, Some(0));
}

#[test]
fn a_guest_is_asked_for_what_it_has_not_and_to_power_off() {
    let service = Service::running("case=serial end=idle");
    for (words, option) in [
        (&["balloon", "1M"][..], "--balloon 0"),
        (&["balloon"], "--balloon 0"),
        (&["cpus", "2"], "--max-cpus N"),
        (&["hotplug-memory", "1G"], "--hotplug-memory SIZE"),
        (&["hotplug-memory"], "--hotplug-memory SIZE"),
    ] {
        let (code, text) = ctl(&service, words);
        let expected = format!(": the guest has to be started with `{option}` for that\n");
        assert!(code == Some(1) && text.ends_with(&expected), "{words:?}: {text}");
    }
    let (code, text) = ctl(&service, &["shutdown"]);
    assert_eq!((code, text.as_str()), (Some(0), "the guest was asked to power off\n"));
}

#[test]
fn a_guest_is_stopped_and_waited_for() {
    // The guest powers off when it is told to by its console, which takes a while.
    let mut service = Service::running("case=serial echo end=poweroff");
    let mut stop = Process::start(["ctl", "--api-sock", service.socket.to_str().unwrap(), "stop"]);
    let mut client = service.client();
    let actions = |metrics: &Value| metrics["put_api_requests"]["actions_count"].as_u64();
    common::wait_for(|| actions(&client.ok("GET", "/metrics", "").json()) == Some(2));
    assert!(stop.is_running(), "the guest has not ended yet");
    service.process.stdin.as_mut().unwrap().write_all(b"bye\n").unwrap();
    stop.expect("powered off");
    assert_eq!(stop.end().code, Some(0));

    let mut service = Service::running("case=serial end=idle");
    service.client().ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    let (code, text) = ctl(&service, &["stop"]);
    assert!(code == Some(1) && text.contains("the guest is paused, and cannot power off"), "{text}");
    let (code, text) = ctl(&service, &["shutdown"]);
    assert!(
        code == Some(1) && text.contains("the guest is paused, and sees no power button: resume"),
        "{text}"
    );
    if cfg!(target_arch = "x86_64") {
        let (code, text) = ctl(&service, &["ctrl-alt-del"]);
        assert!(code == Some(0) && text.ends_with("paused, and sees them when it is resumed\n"), "{text}");
    }
    let ended = "the guest was ended at once, as if its power had failed\n";
    assert_eq!(ctl(&service, &["stop", "--force"]), (Some(0), ended.to_owned()));
    assert!(!service.process.is_running() && !service.socket.exists());
    let mut unstarted = Service::start(&[]);
    let ended = "the service has ended: it had started no guest\n";
    assert_eq!(ctl(&unstarted, &["stop"]), (Some(0), ended.to_owned()));
    assert!(!unstarted.process.is_running());
}

#[test]
fn all_guests_of_a_user_are_listed_and_what_is_left_is_swept() {
    let folder = Folder::new();
    common::called("alula", &folder);
    // The script runs in a PID namespace of its own, whose processes are all that it finds, and end with the shell.
    let script = r#"cd "$1"; mkdir run; export XDG_RUNTIME_DIR="$1/run" PATH="$1:$PATH"
        alula serve --id web < /dev/null > web.log 2>&1 &
        alula serve --id left < /dev/null > left.log 2>&1 & left=$!
        alula serve --api-sock own.sock < /dev/null > own.log 2>&1 &
        for tried in $(seq 1000); do
            ALULA_SOCKET=own.sock alula ctl status && alula ctl web status && alula ctl left status && break
        done > /dev/null 2>&1
        kill -9 $left; wait $left
        for words in "" --json --sweep ""; do alula ctl list $words; echo "=== $?"; done
        alula ctl list --watch | grep -m 2 NAME"#;
    let mut command = Command::new("unshare");
    let output =
        command.args(["-p", "-f", "--mount-proc", "sh", "-c", script, "sh"]).arg(&folder.0).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    let parts: Vec<_> = text.split("=== 0\n").collect();
    let [list, json, swept, again, watched] = parts[..] else { panic!("{text}{told}") };
    let socket = |name: &str| folder.path(name).display().to_string();
    let places = ["run/alula/web.sock", "run/alula/left.sock", "own.sock"].map(socket);
    // The list may have lines of other users' services, too.
    let line = |list: &str, place: &str| list.lines().find(|line| line.ends_with(place)).map(str::to_owned);
    let [web, left, own] =
        [0, 1, 2].map(|index: usize| line(list, &places[index]).unwrap_or_else(|| panic!("{list}")));
    assert!(web.starts_with("web ") && web.contains("  Not started  ") && web.contains("iB"), "{list}");
    assert!(left.starts_with("left ") && left.contains("  Ended  "), "{list}");
    assert!(own.starts_with("anonymous-instance "), "{list}");
    assert!(list.contains("have ended and left") || list.contains("has ended and left its socket"), "{list}");
    let guests: Vec<Value> = serde_json::from_str(json).unwrap();
    let guest = |place: &str| guests.iter().find(|guest| guest["socket"] == place).unwrap();
    assert!(guest(&places[0])["pid"].as_u64() > Some(1) && guest(&places[2])["uptime_ms"].is_u64(), "{json}");
    assert_eq!(guest(&places[1])["state"], "Ended");
    assert!(swept.contains(&format!("removed `{}`", places[1])) && !swept.contains("web"), "{swept}");
    assert_eq!(line(again, &places[1]), None);
    assert!(line(again, &places[0]).is_some() && line(again, &places[2]).is_some(), "{again}");
    assert_eq!(watched.lines().filter(|line| line.contains("EXITS/s")).count(), 2, "{watched}{told}");
}

#[test]
fn a_body_may_come_from_standard_input() {
    let service = Service::start(&[]);
    let socket = service.socket.to_str().unwrap();
    let mut process = Process::start(["ctl", "--api-sock", socket, "put", "/machine-config", "-"]);
    let mut stdin = process.stdin.take().unwrap();
    stdin.write_all(br#"{"vcpu_count": 3, "mem_size_mib": 77}"#).unwrap();
    drop(stdin);
    process.expect("done");
    assert_eq!(process.end().code, Some(0));
    for (words, expected) in [
        (
            &["ctl", "--api-sock", socket, "put", "/machine-config", "-"][..],
            "alula: standard input is no text in UTF-8 from its byte 1 on",
        ),
        (&["check", "-"], "(standard input):1:2: "),
    ] {
        let mut process = Process::start(words.iter().copied());
        process.stdin.take().unwrap().write_all(b"{\xff}").unwrap();
        let ended = process.end();
        assert!(ended.code == Some(1) && ended.text.contains(expected), "{}", ended.text);
    }
    assert_eq!(service.client().ok("GET", "/machine-config", "").json()["mem_size_mib"], 77);
}

#[test]
fn the_schemas_are_printed_for_programs() {
    let schema = |which: &str| -> Value {
        let ended = run(["schema", which]);
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        serde_json::from_str(&ended.text).unwrap()
    };
    let api = schema("openapi");
    assert!(api["openapi"].as_str().unwrap().starts_with("3.0"));
    assert_eq!(api["paths"]["/drives/{id}"]["put"]["responses"]["204"]["description"], "Done");
    assert_eq!(api["components"]["schemas"]["MachineConfiguration"]["additionalProperties"], false);
    assert_eq!(schema("config")["properties"]["drives"]["items"]["$ref"], "#/$defs/Drive");
    assert_eq!(run(["schema"]).code, Some(153));
}

#[test]
fn a_config_file_is_checked_whole_and_nothing_starts() {
    let folder = Folder::new();
    let check = |text: &str| {
        let file = folder.write("vm.json", text);
        let ended = run(["check", file.to_str().unwrap()]);
        (ended.code, ended.text.replace(file.to_str().unwrap(), "vm.json"))
    };
    let kernel = folder.firmware();
    let good = format!(
        r#"{{"$schema": "s", "_note": 1, "boot-source": {{"kernel_image_path": {kernel:?}}}, "comment": "ours"}}"#
    );
    let (code, text) = check(&good);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(text, "vm.json: `comment` is no section of a config file: nobody reads it\nvm.json: ok\n");
    let (code, text) = check(
        r#"{
  "machine-config": {"vcpu_count": "two", "mem_size_mib": 64},
  "drives": [
    {"drive_id": "a", "is_root_device": true, "path": "x"},
    {"drive_id": "b", "is_root_device": true, "path_on_host": "x", "socket": "s"}
  ],
  "drive": []
}"#,
    );
    assert_eq!(code, Some(1), "{text}");
    for expected in [
        "vm.json: `drive` is no section of a config file: nobody reads it (is `drives` meant?)",
        "vm.json:2:40: `machine-config`: `vcpu_count`: expected a whole number, found the text \"two\"",
        "vm.json:4:52: `drives`: unknown field `path`",
        "vm.json:4:5: disk `a`: `path_on_host` is missing",
        "vm.json:5:5: disk `b`: `path_on_host` is given beside `socket`",
        "vm.json: disk `b`: find the vhost-user backend of disk `b` at `s`: there is no socket",
        "vm.json: `boot-source` is missing",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    assert_eq!(text.lines().count(), 7, "{text}");
    let (code, text) = check("{\n  \"drives\": [,]\n}");
    assert_eq!(
        (code, text.as_str()),
        (
            Some(1),
            "vm.json:2:14: expected a value: an object, a list, a string, a number, true, false or null\n"
        )
    );
    let missing = run(["check", "/nonexistent.json"]);
    assert_eq!(missing.code, Some(1));
    assert!(missing.text.contains("read config file `/nonexistent.json`: No such file"), "{}", missing.text);
    assert_eq!(run(["check"]).code, Some(153));
}

/// What `alula check` says of a file with this text, without the file's name.
fn checked(folder: &Folder, text: &str) -> (Option<i32>, Vec<String>) {
    let file = folder.write("vm.json", text);
    let ended = run(["check", file.to_str().unwrap()]);
    let name = format!("{}:", file.display());
    (ended.code, ended.text.lines().map(|line| line.replace(&name, "").trim().to_owned()).collect())
}

/// Each expected text is in a line of its own, and there are no more lines.
fn assert_told(lines: &[String], expected: &[&str]) {
    for text in expected {
        assert!(lines.iter().any(|line| line.contains(text)), "{text}: {lines:#?}");
    }
    assert_eq!(lines.len(), expected.len(), "{lines:#?}");
}

#[test]
fn everything_wrong_with_one_resource_is_told_at_once() {
    let folder = Folder::new();
    let kernel = folder.firmware();
    let foreign = if cfg!(target_arch = "x86_64") { "V1N1" } else { "T2" };
    let text = format!(
        r#"{{
  "boot-source": {{"kernel_image_path": {kernel:?}, "boot_arg": "x", "initrd": 1}},
  "machine-config": {{"vcpu_count": 0, "speed": 3,
    "mem_size_mib": "much", "cpu_template": {foreign:?}}},
  "drives": [{{"drive_id": "a", "is_root_device": 7, "cache_type": "Unsafe", "cache_type": "Unsafe", "num_queues": 99,
    "path_on_host": "/none", "rate_limiter": {{"bandwith": 1}}}}],
  "logger": {{"level": "loud", "show_level": 1}},
  "network-interfaces": [{{"host_dev_name": "none", "user": {{}}, "mtu": 1, "guest_mac": "x"}}]
}}"#
    );
    let (code, lines) = checked(&folder, &text);
    assert_eq!(code, Some(1), "{lines:#?}");
    let expected = [
        "`boot-source`: unknown field `boot_arg`",
        "`boot-source`: unknown field `initrd`",
        "(`vcpu_count`, --cpus)",
        "`machine-config`: unknown field `speed`",
        "`machine-config`: `mem_size_mib`: expected a whole number, found the text \"much\"",
        "`cpu_template`: ",
        "`is_root_device`: expected true or false, found `7`",
        "`drives`: duplicate field `cache_type`",
        "`num_queues` is 99",
        "`drives`: unknown field `bandwith`",
        "`logger`: `level`: unknown level `loud`",
        "`logger`: `show_level`: expected true or false",
        "missing field `iface_id`",
        "`host_dev_name` and `user` exclude each other",
        "an `mtu` of 1 is too small",
        "`network-interfaces`: `guest_mac`",
    ];
    assert_told(&lines, &expected);
}

#[test]
fn what_a_config_file_names_is_looked_for_and_not_changed() {
    let folder = Folder::new();
    let (kernel, disk) = (folder.firmware(), folder.write("disk", vec![0; 512]));
    let path = |name: &str| folder.path(name).display().to_string();
    let config = |kernel: &str, disk: &str, tap: &str, log: &str| {
        serde_json::json!({
            "boot-source": { "kernel_image_path": kernel, "initrd_path": kernel },
            "drives": [{ "drive_id": "d", "is_root_device": false, "path_on_host": disk }],
            "network-interfaces": [{ "iface_id": "n", "host_dev_name": tap }],
            "logger": { "log_path": log },
            "metrics": { "metrics_path": log },
            "serial": { "serial_out_path": log },
        })
        .to_string()
    };
    let (code, lines) =
        checked(&folder, &config(kernel.to_str().unwrap(), disk.to_str().unwrap(), "fd:3", &path("new log")));
    assert_eq!(code, Some(0), "{lines:#?}");
    assert!(!folder.path("new log").exists(), "a log was created");
    let (code, lines) = checked(&folder, &config(&path("none"), &path("none"), "alula%d", &path("no/log")));
    assert_eq!(code, Some(1), "{lines:#?}");
    assert_told(
        &lines,
        &[
            "open kernel `",
            "open initrd `",
            "disk `d`: open disk `d` `",
            "network interface `n`: look for TAP interface `alula%d` (`host_dev_name`): ",
            "open log file `",
            "open metrics file `",
            "open serial output `",
        ],
    );
    assert!(lines.iter().filter(|line| line.ends_with("/no`: create it")).count() == 3, "{lines:#?}");
    let here = folder.0.to_str().unwrap();
    let (_, lines) = checked(&folder, &config(here, here, "fd:3", here));
    assert!(lines.iter().filter(|line| line.contains("it is a directory")).count() == 6, "{lines:#?}");
}

#[test]
fn a_config_file_without_a_kernel_is_no_self_test() {
    let folder = Folder::new();
    let file = folder.write("vm.json", r#"{"boot_source": {}, "machine-config": null, "_note": 1}"#);
    let file = file.to_str().unwrap();
    let ended = run(["run", "--config", file]);
    assert_eq!(ended.code, Some(125), "{}", ended.text);
    for expected in
        ["`boot_source` is no section of a config file", "`boot-source` is missing", "--self-test"]
    {
        assert!(ended.text.contains(expected), "{expected}: {}", ended.text);
    }
    assert!(!ended.text.contains("_note"), "{}", ended.text);
    let ended = run(["run", "--config", file, "--self-test", "--cmdline", "case=serial end=7"]);
    assert_eq!(ended.code, Some(7), "{}", ended.text);
    assert_eq!(run(["run", "--config", file, "--self-test", "vmlinux"]).code, Some(153));
}
