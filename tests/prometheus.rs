//! Metrics for Prometheus, and the dashboard for Grafana that shows them.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use common::{Service, network, output, wait_for};
use serde_json::{Value, json};

/// The metrics as text.
fn prometheus_text(service: &Service) -> String {
    let mut client = service.client();
    client.send("GET /metrics HTTP/1.1\r\nAccept: text/plain;version=0.0.4;q=0.5,*/*;q=0.1\r\n\r\n");
    let answer = client.receive();
    assert!(answer.head.contains("Content-Type: text/plain; version=0.0.4"), "{answer:?}");
    answer.body
}

/// The expressions of the dashboard's panels, with what Grafana puts into them.
fn expressions() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(include_str!("../resources/grafana-dashboard.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().unwrap());
    let text = targets.map(|target| target["expr"].as_str().unwrap());
    text.map(|text| text.replace("$__rate_interval", "1m").replace("$instance", ".*")).collect()
}

#[test]
fn who_accepts_text_gets_metrics_for_prometheus() {
    let service = Service::start(&["--id", "web"]);
    let disk = service.folder.write("disk", vec![0; 1 << 20]);
    let drive = json!({ "drive_id": "d_1", "path_on_host": disk, "is_root_device": false });
    service.client().ok("PUT", "/drives/d_1", &drive.to_string());
    service.boot_source("end=idle");
    service.client().ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    let text = prometheus_text(&service);
    for line in text.lines() {
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(name.starts_with("alula_") && value.parse::<f64>().is_ok(), "{line}");
    }
    for expected in [
        "alula_put_api_requests_drive_count 1",
        "alula_block_device_read_bytes{device=\"d_1\"} 0",
        "{thread=\"main\"}",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    // What the dashboard shows is there.
    for expression in expressions() {
        let words = expression.split(|letter: char| !(letter.is_ascii_alphanumeric() || letter == '_'));
        for name in words.filter(|word| word.starts_with("alula_")) {
            let is_there = |line: &str| line.split([' ', '{']).next() == Some(name);
            assert!(text.lines().any(is_there), "{name} of {expression}");
        }
    }
    // All others get JSON.
    assert!(service.client().ok("GET", "/metrics", "").json()["process"].is_object());
}

/// Passes connections to a port of this machine on to the socket, as socat would.
fn forward(listener: TcpListener, socket: PathBuf) {
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (Ok(client), Ok(server)) = (client, UnixStream::connect(&socket)) else { return };
            let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
            let (mut from, mut to) = (server, client);
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
        }
    });
}

/// What Prometheus answers to a query; nothing while it cannot be asked.
fn ask_prometheus(query: &str) -> Option<Value> {
    let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let mut stream = TcpStream::connect("127.0.0.1:9090").ok()?;
    write!(stream, "GET /api/v1/query?query={encoded} HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
}

#[test]
#[ignore = "Prometheus is needed: scripts/test fetches it, and says where by ALULA_PROMETHEUS"]
fn prometheus_reads_a_guest_and_answers_what_the_dashboard_asks() {
    let programs =
        PathBuf::from(std::env::var_os("ALULA_PROMETHEUS").expect("the folder of prometheus and promtool"));
    let service = Service::running("case=serial end=idle");
    let mut checker = Command::new(programs.join("promtool"));
    checker.args(["check", "metrics"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut checker = checker.spawn().unwrap();
    checker.stdin.take().unwrap().write_all(prometheus_text(&service).as_bytes()).unwrap();
    let checked = checker.wait_with_output().unwrap();
    // What it says of style (a metric of microseconds, one without help) ends it with 3; a text that cannot be read, with 1.
    assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");

    // Ports of the test's own.
    network::enter();
    output("ip", &["link", "set", "lo", "up"]);
    forward(TcpListener::bind("127.0.0.1:9180").unwrap(), service.socket.clone());
    let config = "global: { scrape_interval: 200ms, scrape_timeout: 200ms }\n\
                  scrape_configs: [{ job_name: alula, static_configs: [{ targets: ['127.0.0.1:9180'] }] }]\n";
    let config = service.folder.write("prometheus.yml", config);
    let mut command = Command::new(programs.join("prometheus"));
    command.arg(format!("--config.file={}", config.display()));
    command.arg(format!("--storage.tsdb.path={}", service.folder.path("data").display()));
    command.args(["--web.listen-address=127.0.0.1:9090", "--log.level=warn"]);
    let mut prometheus = common::Process::spawn(command);
    let has_result =
        |answer: &Value| answer["data"]["result"].as_array().is_some_and(|found| !found.is_empty());
    for expression in expressions() {
        let mut last = None;
        // A rate has a value once there were two readings.
        wait_for(|| {
            assert!(prometheus.is_running(), "Prometheus has ended: {}", prometheus.drain());
            last = ask_prometheus(&expression);
            let answer = last.as_ref();
            assert!(answer.is_none_or(|answer| answer["status"] == "success"), "{expression}: {last:?}");
            last.as_ref().is_some_and(has_result)
        });
    }
    let up = ask_prometheus("up").unwrap();
    assert_eq!(up["data"]["result"][0]["value"][1], "1", "{up}");
}
