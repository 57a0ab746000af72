//! What was asked of the API and how that went: counted, and told to readers of events.

use std::time::Duration;

use serde_json::{Map, Value};

use super::Response;
use crate::clock;
use crate::devices::kind::{Change, Device};
use crate::events::{self, Event};
use crate::metrics::{Counter, Gauge, Group, Latency, View, metrics};

metrics! {
    /// All requests; names as in Firecracker's metrics where it has such.
    pub struct Requests {
        /// From the parent's start of the process to its first instruction, as the parent told.
        process_startup_time_us: Gauge,
        /// The CPU time of that.
        process_startup_time_cpu_us: Gauge,
        /// Requests answered.
        request_count: Counter,
        /// Requests refused.
        request_fails: Counter,
        /// How long an answer took.
        request_agg: Latency,
    }
}

metrics! {
    /// How long the last of each took, in microseconds. Firecracker tells apart how long its API and its
    /// machine took; here one thread is both.
    #[allow(missing_docs, reason = "names of the API's metrics")]
    pub struct Latencies {
        pause_vm: Gauge,
        resume_vm: Gauge,
        vmm_pause_vm: Gauge,
        vmm_resume_vm: Gauge,
    }
}

/// Counted for the whole process, as it has one API.
pub static REQUESTS: Requests = Requests::new();
/// As above.
pub static LATENCIES: Latencies = Latencies::new();

/// When the process was started, as its parent says (microseconds).
#[derive(Debug, Default)]
pub struct StartTime {
    /// By the monotonic clock.
    pub time_us: Option<u64>,
    /// By the CPU time of what became this process.
    pub cpu_us: Option<u64>,
    /// The CPU time that its parent spent on it.
    pub parent_us: u64,
}

impl StartTime {
    /// Notes how long that took, until now.
    pub fn note(&self) {
        let us = |time: Duration| time.as_micros() as u64;
        if let Some(start) = self.time_us {
            REQUESTS.process_startup_time_us.set(us(clock::monotonic()).saturating_sub(start));
        }
        if let Some(start) = self.cpu_us {
            let own = us(clock::cpu_time()).saturating_sub(start);
            REQUESTS.process_startup_time_cpu_us.set(own.saturating_add(self.parent_us));
        }
    }
}

/// Requests of one method to paths that begin with one word.
struct Class {
    method: &'static str,
    path: &'static str,
    name: &'static str,
    count: Counter,
    fails: Counter,
    time: Latency,
}

const fn class(method: &'static str, path: &'static str, name: &'static str) -> Class {
    Class { method, path, name, count: Counter::new(), fails: Counter::new(), time: Latency::new() }
}

/// Firecracker's names, and ours for what it does not count.
static CLASSES: [Class; 26] = [
    class("GET", "", "instance_info"),
    class("GET", "version", "vmm_version"),
    class("GET", "machine-config", "machine_cfg"),
    class("GET", "vm", "vm_cfg"),
    class("GET", "events", "events"),
    class("GET", "metrics", "metrics"),
    class("GET", "mmds", "mmds"),
    class("GET", "balloon", "balloon"),
    class("PUT", "actions", "actions"),
    class("PUT", "boot-source", "boot_source"),
    class("PUT", "drives", "drive"),
    class("PUT", "logger", "logger"),
    class("PUT", "machine-config", "machine_cfg"),
    class("PUT", "cpu-config", "cpu_cfg"),
    class("PUT", "metrics", "metrics"),
    class("PUT", "network-interfaces", "network"),
    class("PUT", "mmds", "mmds"),
    class("PUT", "vsock", "vsock"),
    class("PUT", "entropy", "entropy"),
    class("PUT", "serial", "serial"),
    class("PUT", "snapshot", "snapshot"),
    class("PATCH", "drives", "drive"),
    class("PATCH", "network-interfaces", "network"),
    class("PATCH", "machine-config", "machine_cfg"),
    class("PATCH", "mmds", "mmds"),
    class("PATCH", "vm", "vm"),
];

/// A request was answered, after so long.
pub fn served(method: &str, path: &str, response: &Response, time: Duration) {
    let fails = u64::from(matches!(response, Response::Fault(_)));
    REQUESTS.request_count.add(1);
    REQUESTS.request_fails.add(fails);
    REQUESTS.request_agg.add(time);
    let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    if let Some(class) = CLASSES.iter().find(|class| class.path == first && class.method == method) {
        class.count.add(1);
        class.fails.add(fails);
        class.time.add(time);
    }
    tell(method, path, response);
}

fn tell(method: &str, path: &str, response: &Response) {
    match (method, response) {
        (_, Response::Fault(reason)) => events::tell(|| Event::ApiError {
            request: events::text(format_args!("{method} {path}")),
            reason: events::text(reason),
        }),
        // What else changes says so itself, when it has changed.
        ("PUT", Response::Done) if path != "/actions" => configured(path),
        ("PATCH", Response::Done) if path == "/machine-config" => configured(path),
        _ => {}
    }
}

fn configured(path: &str) {
    events::tell(|| Event::Configured { what: events::text(path) });
}

/// A device in use was changed.
pub fn changed(device: &Device, change: &Change) -> Event {
    match change.body["path_on_host"].as_str() {
        Some(path) => Event::DiskSwapped { drive_id: change.id.clone(), path: path.into() },
        None => Event::DeviceChanged { device: device.name(), change: change.body.clone() },
    }
}

/// What is counted here, by group.
pub fn collect(view: View) -> Map<String, Value> {
    let mut all = Map::new();
    for class in &CLASSES {
        let name = format!("{}_api_requests", class.method.to_ascii_lowercase());
        if let Value::Object(group) = all.entry(name).or_insert_with(|| Value::Object(Map::new())) {
            let name = class.name;
            group.insert(format!("{name}_count"), class.count.collect(view));
            group.insert(format!("{name}_fails"), class.fails.collect(view));
            group.insert(format!("{name}_agg"), class.time.collect(view));
        }
    }
    all.insert("api_server".to_owned(), REQUESTS.collect(view));
    all.insert("latencies_us".to_owned(), LATENCIES.collect(view));
    all
}
