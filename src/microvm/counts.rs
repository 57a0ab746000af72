//! What was asked of the microVM by the API and how that went, counted.

use std::time::Duration;

use serde_json::{Map, Value};

use crate::clock;
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
        full_create_snapshot: Gauge,
        vmm_full_create_snapshot: Gauge,
        diff_create_snapshot: Gauge,
        vmm_diff_create_snapshot: Gauge,
        load_snapshot: Gauge,
        vmm_load_snapshot: Gauge,
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
    /// Notes how long the start of the process has taken until now.
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

/// Requests that are counted apart: method, how the path begins, and a name, Firecracker's where it has
/// one. One text: a table of pointers would have to be relocated whenever the process starts.
const CLASSES: &str = "\
GET / instance_info
GET /version vmm_version
GET /machine-config machine_cfg
GET /vm vm_cfg
GET /events events
GET /metrics metrics
GET /mmds mmds
GET /balloon balloon
GET /hotplug hotplug_memory
PUT /actions actions
PUT /boot-source boot_source
PUT /drives drive
PUT /logger logger
PUT /machine-config machine_cfg
PUT /cpu-config cpu_cfg
PUT /metrics metrics
PUT /network-interfaces network
PUT /mmds mmds
PUT /vsock vsock
PUT /pmem pmem
PUT /entropy entropy
PUT /serial serial
PUT /snapshot snapshot
PUT /hotplug hotplug_memory
PATCH /drives drive
PATCH /network-interfaces network
PATCH /pmem pmem
PATCH /hotplug hotplug_memory
PATCH /machine-config machine_cfg
PATCH /mmds mmds
PATCH /vm vm
";

fn classes() -> impl Iterator<Item = (&'static str, &'static str, &'static str)> {
    CLASSES.lines().map(|line| {
        let mut words = line.split(' ');
        let mut word = || words.next().expect("a line has three words");
        (word(), word(), word())
    })
}

/// What is counted of one class.
struct Class {
    count: Counter,
    fails: Counter,
    time: Latency,
}

static COUNTED: [Class; 31] =
    [const { Class { count: Counter::new(), fails: Counter::new(), time: Latency::new() } }; 31];

/// A request was answered, after this time.
pub fn answered(method: &str, path: &str, is_refused: bool, time: Duration) {
    REQUESTS.request_count.add(1);
    REQUESTS.request_fails.add(is_refused.into());
    REQUESTS.request_agg.add(time);
    let length = path.bytes().skip(1).position(|byte| byte == b'/').map_or(path.len(), |slash| slash + 1);
    let first = &path[..length];
    let class = COUNTED.iter().zip(classes()).find(|(_, (m, p, _))| *m == method && *p == first);
    if let Some((class, _)) = class {
        class.count.add(1);
        class.fails.add(is_refused.into());
        class.time.add(time);
    }
}

/// What is counted here, by group.
pub fn collect(view: View) -> Map<String, Value> {
    let mut all = Map::new();
    for (class, (method, _, own)) in COUNTED.iter().zip(classes()) {
        let name = format!("{}_api_requests", method.to_ascii_lowercase());
        if let Value::Object(group) = all.entry(name).or_insert_with(|| Value::Object(Map::new())) {
            group.insert(format!("{own}_count"), class.count.collect(view));
            group.insert(format!("{own}_fails"), class.fails.collect(view));
            group.insert(format!("{own}_agg"), class.time.collect(view));
        }
    }
    all.insert("api_server".to_owned(), REQUESTS.collect(view));
    all.insert("latencies_us".to_owned(), LATENCIES.collect(view));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_is_counted() {
        assert_eq!(classes().count(), COUNTED.len());
        assert!(
            classes()
                .all(|(method, path, name)| !method.is_empty() && path.starts_with('/') && !name.is_empty())
        );
    }
}
