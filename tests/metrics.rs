//! The log and the metrics of a microVM, in files and FIFOs, with the firmware guest on real KVM.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use common::{Folder, Service, output, run};
use serde_json::{Value, json};

const START: &str = r#"{"action_type": "InstanceStart"}"#;
const FLUSH: &str = r#"{"action_type": "FlushMetrics"}"#;

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn sum(lines: &[Value], pointer: &str) -> u64 {
    let value = |line: &Value| line.pointer(pointer).and_then(Value::as_u64);
    lines.iter().map(|line| value(line).unwrap_or_else(|| panic!("no {pointer} in {line}"))).sum()
}

/// What the requests and the guest of the test below are counted as.
fn check_counts(lines: &[Value]) {
    for (pointer, expected) in [
        ("/api_server/request_count", 13),
        ("/api_server/request_fails", 3),
        ("/put_api_requests/metrics_count", 3),
        ("/put_api_requests/metrics_fails", 2),
        ("/put_api_requests/drive_count", 1),
        ("/put_api_requests/actions_count", 3),
        ("/put_api_requests/actions_fails", 1),
        ("/patch_api_requests/vm_count", 2),
        ("/get_api_requests/metrics_count", 1),
        ("/block/event_fails", 0),
        ("/block_d/activate_fails", 0),
        ("/logger/missed_metrics_count", 0),
    ] {
        assert_eq!(sum(lines, pointer), expected, "{pointer}");
    }
    for pointer in [
        "/uart/write_count",
        "/uart/read_count",
        "/vcpu/exit_mmio_read",
        "/vcpu/exit_mmio_write",
        "/entropy/entropy_bytes",
        "/entropy/entropy_event_count",
        "/api_server/request_agg/sum_us",
        "/latencies_us/pause_vm",
    ] {
        assert!(sum(lines, pointer) > 0, "{pointer}");
    }
    for pointer in ["/vcpu/exit_io_in", "/vcpu/exit_io_out"] {
        assert_eq!(sum(lines, pointer) > 0, cfg!(target_arch = "x86_64"), "{pointer}");
    }
}

#[test]
fn a_line_of_metrics_says_what_was_done_since_the_last() {
    let started = ["--start-time-us", "1", "--start-time-cpu-us", "0", "--parent-cpu-time-us", "1000000"];
    let service = Service::start(&[&["--id", "vm-1"][..], &started].concat());
    let file = service.folder.path("metrics");
    let mut client = service.client();
    let body = json!({ "metrics_path": file, "emit_id": true, "properties": { "owner": "a" } });
    client.ok("PUT", "/metrics", &body.to_string());
    let again = client.request("PUT", "/metrics", &body.to_string()).fault();
    assert!(again.starts_with("Metrics error: Cannot initialize the metrics system"), "{again}");
    assert!(again.ends_with("Reinitialization of metrics not allowed."), "{again}");
    assert_eq!(client.ok("GET", "/vm/config", "").json()["metrics"], json!(null));
    let disk = service.folder.write("disk", vec![0; 1 << 20]);
    let drive = json!({ "drive_id": "d", "path_on_host": disk, "is_root_device": false });
    client.ok("PUT", "/drives/d", &drive.to_string());
    client.ok("PUT", "/entropy", "{}");
    let early = client.request("PUT", "/actions", FLUSH).fault();
    assert!(early.contains("not supported before starting"), "{early}");
    service.boot_source("case=nobody-there,block,entropy echo");
    client.ok("PUT", "/actions", START);
    client.ok("PUT", "/actions", FLUSH);
    let again = client.request("PUT", "/metrics", &body.to_string()).fault();
    assert!(again.contains("not supported after starting"), "{again}");
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    let total = client.ok("GET", "/metrics", "").json();
    assert_eq!(total["put_api_requests"]["metrics_count"], 3);
    let Service { mut process, folder: _folder, .. } = service;
    process.stdin.as_mut().unwrap().write_all(b"x\n").unwrap();
    let ended = process.end();
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    // One at the start, one when it was asked for, one at the end.
    let lines = lines(&file);
    assert_eq!(lines.len(), 3);
    for line in &lines {
        assert!(line["api_server"]["process_startup_time_us"].as_u64().unwrap() > 0, "{line}");
        assert!(line["api_server"]["process_startup_time_cpu_us"].as_u64().unwrap() > 1_000_000, "{line}");
        assert_eq!((&line["id"], &line["properties"]), (&json!("vm-1"), &json!({ "owner": "a" })));
        assert!(line["utc_timestamp_ms"].as_u64().unwrap() > 1_700_000_000_000);
        for group in ["api_server", "balloon", "mmds", "net", "seccomp", "signals", "vmm", "vsock"] {
            assert!(line[group].is_object(), "{group}");
        }
        assert!(line["process"]["memory"]["anonymous_bytes"].as_u64().unwrap() > 100_000, "{line}");
        assert!(line["process"]["start_us"]["devices"].is_u64(), "{line}");
    }
    check_counts(&lines);
    assert!(lines[2]["process"]["cpu_us"]["vcpu0"].as_u64().unwrap() > 0, "{}", lines[2]);
    let said = ended.text.lines().filter(|line| !line.starts_with("alula: `"));
    let said: usize = said.map(|line| line.len() + 1).sum();
    assert!(said as u64 <= sum(&lines, "/uart/write_count") + 200, "{}", ended.text);
}

#[test]
fn a_cpu_that_could_not_go_on_is_counted() {
    let folder = Folder::new();
    let fail = if common::is_software_kvm() { ("fail", 123, 1) } else { ("fail", 101, 0) };
    for (end, code, expected) in [fail, ("7", 7, 0)] {
        let file = folder.path(end);
        let words = format!("case=serial end={end}");
        let ended = run(["run", "--cmdline", &words, "--metrics-path", file.to_str().unwrap()]);
        assert_eq!(ended.code, Some(code), "{}", ended.text);
        let lines = lines(&file);
        assert_eq!(sum(&lines, "/vcpu/failures"), expected, "{}", lines[lines.len() - 1]);
    }
}

#[test]
fn a_log_file_has_what_happens_in_firecrackers_form() {
    let service = Service::start(&["--id", "vm-1"]);
    let file = service.folder.path("log");
    let mut client = service.client();
    let refused = client.request("PUT", "/logger", r#"{"level": "loud"}"#).fault();
    assert!(refused.contains("unknown level `loud`"), "{refused}");
    let body = json!({ "log_path": file, "level": "info", "show_level": true, "show_log_origin": true });
    client.ok("PUT", "/logger", &body.to_string());
    // Again, it changes what is given: a file without messages, another one, and the level.
    let other = service.folder.path("other");
    client.ok("PUT", "/logger", &json!({ "level": "Off" }).to_string());
    assert_eq!(client.request("PUT", "/drives/not-here", "{}").status(), "400");
    client.ok("PUT", "/logger", &json!({ "level": "info", "log_path": other }).to_string());
    let refused = client.request("PUT", "/logger", r#"{"log_path": "/", "level": "Off"}"#).fault();
    assert!(refused.contains("open log file `/`"), "{refused}");
    assert_eq!(client.request("PUT", "/drives/b-c", "{}").status(), "400");
    client.ok("PUT", "/logger", &json!({ "log_path": file }).to_string());
    service.boot_source("case=serial echo");
    client.ok("PUT", "/actions", START);
    let Service { mut process, folder: _folder, .. } = service;
    process.stdin.as_mut().unwrap().write_all(b"x\n").unwrap();
    assert_eq!(process.end().code, Some(0));
    let text = std::fs::read_to_string(&file).unwrap();
    for expected in [r#"{"event":"started","reason":"InstanceStart"}"#, "the guest ended with code 0"] {
        let line = text.lines().find(|line| line.ends_with(expected));
        let line = line.unwrap_or_else(|| panic!("no `{expected}` in\n{text}"));
        let (time, rest) = line.split_once(' ').unwrap();
        assert_eq!(time.len(), "2026-11-24T06:00:00.123456789".len(), "{line}");
        let (origin, _) = rest.split_once("] ").unwrap();
        let parts: Vec<_> = origin.split(':').collect();
        assert_eq!(parts[..3], ["[vm-1", "main", "INFO"], "{line}");
        assert!(parts[3].starts_with("src/") && parts[4].parse::<u32>().is_ok(), "{line}");
    }
    let other = std::fs::read_to_string(&other).unwrap();
    assert!(!text.contains("/drives/") && !other.contains("not-here"), "{text}\n{other}");
    let line =
        other.lines().find(|line| line.contains("`PUT /drives/b-c` was refused: API Resource IDs")).unwrap();
    assert!(line.contains("[vm-1:main:"), "what was not given again stays: {line}");
}

/// What the log has at `level` of a guest that uses a disk, is paused and resumed, while clients make
/// mistakes.
fn logged(level: &str) -> String {
    let service = Service::start(&["--id", "vm-1"]);
    let file = service.folder.path("log");
    let mut client = service.client();
    let body = json!({ "log_path": file, "level": level, "show_level": true });
    client.ok("PUT", "/logger", &body.to_string());
    let disk = service.folder.write("disk", vec![0; 1 << 20]);
    let drive = json!({ "drive_id": "d", "path_on_host": disk, "is_root_device": false });
    client.ok("PUT", "/drives/d", &drive.to_string());
    assert_eq!(client.request("PUT", "/drives/e", "{}").status(), "400");
    let mut stranger = service.client();
    stranger.send("nonsense\r\n\r\n");
    assert_eq!(stranger.receive().status(), "400");
    service.boot_source("case=block echo");
    client.ok("PUT", "/actions", START);
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    let patch = json!({ "drive_id": "d", "path_on_host": disk });
    client.ok("PATCH", "/drives/d", &patch.to_string());
    let Service { mut process, folder: _folder, .. } = service;
    process.stdin.as_mut().unwrap().write_all(b"x\n").unwrap();
    assert_eq!(process.end().code, Some(0));
    std::fs::read_to_string(&file).unwrap()
}

#[test]
fn debug_tells_what_is_done_and_trace_every_access() {
    const DEBUG: [&str; 16] = [
        "`PUT /drives/d` was done in ",
        "`PUT /drives/e` was refused in ",
        "`PATCH /vm` was done in ",
        "a client of the API was refused: ",
        "opened disk `d` `",
        "opened kernel `",
        "attach disk `d` at 0x",
        "allocated 128 MiB of guest memory for 1 CPUs",
        "the kernel is entered at 0x",
        "built the machine: ",
        "the guest's CPUs and devices run",
        "the guest's CPUs and devices stand still",
        "disk `d` starts: its driver wants features 0x",
        "disk `d` is stopped",
        "disk `d` is reset by its driver",
        "disk `d` stood still and was changed",
    ];
    const TRACE: [&str; 5] = [
        "CPU 0 writes 4 bytes at address 0x",
        "CPU 0 reads ",
        "disk `d`: event 0 is ready",
        "connection 1 of the API is open",
        "connection 2 of the API is closed",
    ];
    for level in ["Info", "Debug", "Trace"] {
        let text = logged(level);
        let has = |tag: &str, message: &str| {
            let mark = format!(":{tag}] {message}");
            text.lines().any(|line| line.contains(&mark))
        };
        for (tag, messages, from) in [("DEBUG", &DEBUG[..], "Debug"), ("TRACE", &TRACE[..], "Trace")] {
            let wanted = level == from || level == "Trace";
            assert_eq!(text.contains(&format!(":{tag}]")), wanted, "{level}: {text}");
            for message in messages {
                assert_eq!(has(tag, message), wanted, "{level}: `{message}`: {text}");
            }
        }
        assert!(
            has("INFO", "{\"event\":\"paused\"") && has("WARN", "`PUT /drives/e` was refused: "),
            "{text}"
        );
    }
}

#[test]
fn a_guest_that_never_rests_fills_no_disk_with_traces() {
    let service = Service::start(&[]);
    let file = service.folder.path("log");
    let mut client = service.client();
    client.ok("PUT", "/logger", &json!({ "log_path": file, "level": "Trace" }).to_string());
    service.boot_source("flood");
    client.ok("PUT", "/actions", START);
    let text = || std::fs::read_to_string(&file).unwrap();
    const LAST: &str = "; more lines of level Trace about what the guest does are left out for 10 s";
    common::wait_for(|| text().contains(LAST));
    // Far more accesses than there may be lines.
    common::wait_for(|| {
        let total = client.ok("GET", "/metrics", "").json();
        let count = |field: &str| total["vcpu"][field].as_u64().unwrap();
        count("exit_io_out") + count("exit_mmio_write") > 20_000
    });
    let text = text();
    let (lines, periods) = (text.matches("] CPU 0 ").count(), text.matches(LAST).count());
    assert!((1000..=1000 * (periods + 1)).contains(&lines), "{lines} lines in {periods} periods");
}

#[test]
fn a_log_of_errors_alone_says_why_a_guest_could_not_start() {
    let folder = Folder::new();
    let log = folder.path("log");
    let arguments = ["run", "/nonexistent", "--log-path", log.to_str().unwrap(), "--level", "Error"];
    assert_eq!(run([&arguments[..], &["--show-level"]].concat()).code, Some(125));
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.contains(":ERROR] start the guest: open kernel `/nonexistent`: No such file"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    std::fs::remove_file(&log).unwrap();
    assert_eq!(run([&["run"][..], &arguments[2..], &["--cmdline", "end=3"]].concat()).code, Some(3));
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "", "how a guest ends is no error");
}

#[test]
fn options_say_where_the_log_and_the_metrics_go() {
    let folder = Folder::new();
    let (log, metrics) = (folder.path("log"), folder.path("metrics"));
    let mut arguments = vec!["run", "--cmdline", "case=serial", "--log-path", log.to_str().unwrap()];
    arguments.extend(["--level", "Debug", "--metrics-path", metrics.to_str().unwrap()]);
    let ended = run(&arguments);
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.contains(" [anonymous-instance:main] {\"event\":\"started\""), "{text}");
    assert!(sum(&lines(&metrics), "/uart/write_count") > 0);
    arguments.extend(["--entropy", "--show-log-origin", "--module", "virtio"]);
    arguments[2] = "case=entropy";
    std::fs::remove_file(&log).unwrap();
    assert_eq!(run(&arguments).code, Some(0));
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.contains("entropy device starts"), "{text}");
    assert!(text.lines().all(|line| line.contains(":src/virtio/")), "{text}");
    for (arguments, code, expected) in [
        (["--level", "loud"], 153, "--level loud: unknown level `loud`"),
        (["--log-path", "/"], 125, "open log file `/` (`log_path`, --log-path): it is a directory"),
        (
            ["--metrics-path", "/none/x"],
            125,
            "open metrics file `/none/x` (`metrics_path`, --metrics-path): there is no folder `/none`: create it",
        ),
    ] {
        let ended = run([&["run"][..], &arguments].concat());
        assert_eq!(ended.code, Some(code), "{}", ended.text);
        assert!(ended.text.contains(expected), "{}", ended.text);
    }
    // A file may say the same.
    let kernel = folder.firmware();
    let config = json!({
        "boot-source": { "kernel_image_path": kernel, "boot_args": "case=serial" },
        "logger": { "log_path": folder.path("log2"), "level": "Info" },
        "metrics": { "metrics_path": folder.path("metrics2") },
        "serial": { "serial_out_path": folder.path("serial") },
    });
    let config = folder.write("config", config.to_string());
    let ended = run(["run", "--config", config.to_str().unwrap()]);
    assert_eq!((ended.code, ended.text.as_str()), (Some(0), "alula: the guest ended with code 0\n"));
    assert!(std::fs::read_to_string(folder.path("log2")).unwrap().contains("started"));
    assert_eq!(lines(&folder.path("metrics2")).len(), 2);
    assert!(std::fs::read_to_string(folder.path("serial")).unwrap().contains("1 cases, 0 failed"));
}

#[test]
fn fifos_without_a_reader_hold_nothing_up_and_what_is_lost_is_counted() {
    let folder = Folder::new();
    let [log, metrics, serial] = ["log", "metrics", "serial"].map(|name| folder.path(name));
    for fifo in [&log, &metrics, &serial] {
        output("mkfifo", &[fifo.to_str().unwrap()]);
    }
    let mut service = Service::start(&[]);
    let mut client = service.client();
    client.ok("PUT", "/logger", &json!({ "log_path": log, "level": "Trace" }).to_string());
    client.ok("PUT", "/metrics", &json!({ "metrics_path": metrics }).to_string());
    client.ok("PUT", "/serial", &json!({ "serial_out_path": serial }).to_string());
    service.boot_source("flood");
    client.ok("PUT", "/actions", START);
    // Far more than a pipe keeps: 64 KiB.
    for _ in 0..40 {
        client.ok("PUT", "/actions", FLUSH);
    }
    for _ in 0..1000 {
        let response = client.request("GET", &format!("/{}", "x".repeat(200)), "");
        assert_eq!(response.status(), "400", "{response:?} {}", service.process.drain());
    }
    let total = loop {
        let total = client.ok("GET", "/metrics", "").json();
        if total["uart"]["missed_write_count"].as_u64().unwrap() > 0 {
            break total;
        }
    };
    assert!(total["logger"]["missed_log_count"].as_u64().unwrap() > 0, "{total}");
    let missed = total["logger"]["missed_metrics_count"].as_u64().unwrap();
    assert!(missed > 0 && missed < 40, "{total}");
    // What was kept are whole lines, and the next line is one again.
    let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&metrics).unwrap();
    let (mut text, mut chunk) = (Vec::new(), vec![0; 1 << 16]);
    while let Ok(count @ 1..) = reader.read(&mut chunk) {
        text.extend_from_slice(&chunk[..count]);
    }
    client.ok("PUT", "/actions", FLUSH);
    let count = reader.read(&mut chunk).unwrap();
    text.extend_from_slice(&chunk[..count]);
    let lines: Vec<Value> =
        String::from_utf8(text).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // One at the start, and on a slow machine one more every minute: none is neither there nor counted.
    let counted = sum(&lines, "/logger/missed_metrics_count");
    assert!(counted >= missed && lines.len() as u64 + counted >= 42, "{counted} of {missed}");
}

#[test]
fn a_serial_console_may_go_to_a_file_and_no_faster_than_told() {
    let service = Service::start(&[]);
    let file = service.folder.path("serial");
    let mut client = service.client();
    let refused = client.request("PUT", "/serial", r#"{"serial_out_path": "/"}"#).fault();
    assert!(refused.starts_with("Serial config error: open serial output `/`"), "{refused}");
    let limit = json!({ "size": 20, "refill_time": 1_000_000_000u64 });
    let body = json!({ "serial_out_path": file, "rate_limiter": limit });
    client.ok("PUT", "/serial", &body.to_string());
    assert_eq!(client.ok("GET", "/vm/config", "").json()["serial"], json!(null));
    service.boot_source("case=serial end=idle");
    client.ok("PUT", "/actions", START);
    common::wait_for(|| {
        let total = client.ok("GET", "/metrics", "").json();
        total["uart"]["rate_limiter_dropped_bytes"].as_u64().unwrap() > 40
    });
    let said = format!("alula firmware: {}", std::env::consts::ARCH);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), said[..20]);
    let refused = client.request("PUT", "/serial", &body.to_string()).fault();
    assert!(refused.contains("not supported after starting"), "{refused}");
}

#[test]
fn a_guest_that_says_that_it_has_booted_is_timed() {
    let folder = Folder::new();
    let (log, events) = (folder.path("log"), folder.path("events"));
    let arguments = ["run", "--cmdline", "case=serial booted", "--events", events.to_str().unwrap()];
    let timed = ["--boot-timer", "--log-path", log.to_str().unwrap()];
    assert_eq!(run([&arguments[..], &timed].concat()).code, Some(0));
    let text = std::fs::read_to_string(&log).unwrap();
    let line =
        text.lines().find(|line| line.contains("] Guest-boot-time = ")).unwrap_or_else(|| panic!("{text}"));
    let words: Vec<_> = line.split_whitespace().collect();
    let [.., time, "us", ms, "ms,", cpu, "CPU", "us", cpu_ms, "CPU", "ms"] = words[..] else {
        panic!("{line}")
    };
    let number = |word: &str| word.parse::<u64>().unwrap();
    assert_eq!((number(ms), number(cpu_ms)), (number(time) / 1000, number(cpu) / 1000));
    let booted = lines(&events).into_iter().find(|event| event["event"] == "booted").unwrap();
    assert_eq!((&booted["time_us"], &booted["cpu_us"]), (&json!(number(time)), &json!(number(cpu))));
    // Without the option there is nothing at that address.
    std::fs::remove_file(&events).unwrap();
    assert_eq!(run(arguments).code, Some(0));
    assert!(lines(&events).iter().all(|event| event["event"] != "booted"));
}
