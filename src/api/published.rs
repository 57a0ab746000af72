//! Every property of every body that Firecracker's published schema has, for what we have of it: each is
//! done, refused by name, or taken as null, and none is unknown. What is not in this table is ours, and
//! unknown to who is called by Firecracker's name.

use serde_json::{Map, Value, json};

use super::Request;
use super::routes::route;
use super::schema::check;
use super::snapshot;
use crate::arch;
use crate::dialect::Dialect;

/// What becomes of a value.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Becomes {
    /// It is what was asked for.
    Done,
    /// Its type has no such value.
    Refused,
}
use Becomes::{Done, Refused};

/// A body: how it is sent, and its properties.
struct Body {
    method: &'static str,
    path: &'static str,
    /// What must be there, as JSON.
    required: &'static str,
    /// The body is this property of the one that is sent.
    within: &'static str,
    /// A property, a value of it as JSON, what becomes of that, and what of null.
    properties: &'static [(&'static str, &'static str, Becomes, Becomes)],
}

const LIMITER: &str = r#"{"bandwidth": {"size": 1, "refill_time": 1}, "ops": null}"#;
const BUCKET: &str = r#"{"size": 1, "refill_time": 1, "one_time_burst": 1}"#;
const DRIVE: &str = r#"{"drive_id": "a", "is_root_device": false, "path_on_host": "/a"}"#;
const REGISTERS: &str = r#"[{"addr": "0x10", "bitmap": "0b1"}]"#;
/// The outcome of registers that only one architecture has.
const HAS_MSRS: Becomes = if arch::HAS_CPUID { Done } else { Refused };
const HAS_REGISTERS: Becomes = if arch::HAS_CPUID { Refused } else { Done };
const PMEM: &str = r#"{"id": "a", "path_on_host": "/a"}"#;
const INTERFACE: &str = r#"{"iface_id": "a", "host_dev_name": "tap0"}"#;

const fn body(
    method: &'static str,
    path: &'static str,
    required: &'static str,
    properties: &'static [(&'static str, &'static str, Becomes, Becomes)],
) -> Body {
    Body { method, path, required, within: "", properties }
}

const MACHINE: &[(&str, &str, Becomes, Becomes)] = &[
    ("vcpu_count", "2", Done, Refused),
    ("mem_size_mib", "256", Done, Refused),
    ("smt", "false", Done, Done),
    ("track_dirty_pages", "true", Done, Done),
    ("cpu_template", if crate::arch::HAS_CPUID { r#""T2""# } else { r#""V1N1""# }, Done, Done),
    ("cpu_template", r#""None""#, Done, Done),
    ("huge_pages", r#""2M""#, Done, Done),
    ("huge_pages", r#""Transparent""#, Done, Done),
];

const BODIES: &[Body] = &[
    body(
        "PUT",
        "/boot-source",
        r#"{"kernel_image_path": "/k"}"#,
        &[
            ("kernel_image_path", r#""/l""#, Done, Refused),
            ("initrd_path", r#""/i""#, Done, Done),
            ("boot_args", r#""quiet""#, Done, Done),
        ],
    ),
    body("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 128}"#, MACHINE),
    body(
        "PUT",
        "/mmds/config",
        r#"{"network_interfaces": ["a"]}"#,
        &[
            ("version", r#""V2""#, Done, Done),
            ("network_interfaces", r#"["b", "c"]"#, Done, Refused),
            ("ipv4_address", r#""169.254.170.2""#, Done, Done),
            ("imds_compat", "true", Done, Done),
        ],
    ),
    body(
        "PUT",
        "/cpu-config",
        "{}",
        &[
            ("kvm_capabilities", r#"["!56"]"#, Done, Done),
            ("cpuid_modifiers", "[]", Done, Done),
            ("msr_modifiers", REGISTERS, HAS_MSRS, Done),
            ("reg_modifiers", REGISTERS, HAS_REGISTERS, Done),
            ("vcpu_features", r#"[{"index": 0, "bitmap": "0b1xxxx"}]"#, HAS_REGISTERS, Done),
        ],
    ),
    body(
        "PUT",
        "/drives/a",
        DRIVE,
        &[
            ("drive_id", r#""a""#, Done, Refused),
            ("partuuid", r#""0eaa91a0-01""#, Done, Done),
            ("is_root_device", "true", Done, Refused),
            ("cache_type", r#""Writeback""#, Done, Refused),
            ("is_read_only", "true", Done, Done),
            ("path_on_host", r#""/b""#, Done, Refused),
            ("rate_limiter", LIMITER, Done, Done),
            ("io_engine", r#""Async""#, Done, Done),
            ("socket", r#""/s""#, Done, Done),
            ("discard", "true", Done, Done),
        ],
    ),
    body(
        "PATCH",
        "/drives/a",
        r#"{"drive_id": "a"}"#,
        &[
            ("drive_id", r#""a""#, Done, Refused),
            ("path_on_host", r#""/b""#, Done, Done),
            ("rate_limiter", LIMITER, Done, Done),
        ],
    ),
    body(
        "PUT",
        "/network-interfaces/a",
        INTERFACE,
        &[
            ("iface_id", r#""a""#, Done, Refused),
            ("host_dev_name", r#""tap1""#, Done, Refused),
            ("guest_mac", r#""06:00:ac:10:00:02""#, Done, Done),
            ("mtu", "1500", Done, Done),
            ("rx_rate_limiter", LIMITER, Done, Done),
            ("tx_rate_limiter", LIMITER, Done, Done),
        ],
    ),
    body(
        "PATCH",
        "/network-interfaces/a",
        r#"{"iface_id": "a"}"#,
        &[
            ("iface_id", r#""a""#, Done, Refused),
            ("rx_rate_limiter", LIMITER, Done, Done),
            ("tx_rate_limiter", LIMITER, Done, Done),
        ],
    ),
    body(
        "PUT",
        "/pmem/a",
        PMEM,
        &[
            ("id", r#""a""#, Done, Refused),
            ("path_on_host", r#""/b""#, Done, Refused),
            ("root_device", "true", Done, Refused),
            ("read_only", "true", Done, Refused),
            ("rate_limiter", LIMITER, Done, Done),
        ],
    ),
    body(
        "PATCH",
        "/pmem/a",
        r#"{"id": "a"}"#,
        &[("id", r#""a""#, Done, Refused), ("rate_limiter", LIMITER, Done, Done)],
    ),
    body("PUT", "/entropy", "{}", &[("rate_limiter", LIMITER, Done, Done)]),
    body(
        "PUT",
        "/balloon",
        r#"{"amount_mib": 1, "deflate_on_oom": true}"#,
        &[
            ("amount_mib", "2", Done, Refused),
            ("deflate_on_oom", "false", Done, Refused),
            ("stats_polling_interval_s", "1", Done, Refused),
            ("free_page_hinting", "true", Done, Refused),
            ("free_page_reporting", "true", Done, Refused),
        ],
    ),
    body("PATCH", "/balloon", r#"{"amount_mib": 1}"#, &[("amount_mib", "2", Done, Refused)]),
    body(
        "PATCH",
        "/balloon/statistics",
        r#"{"stats_polling_interval_s": 1}"#,
        &[("stats_polling_interval_s", "2", Done, Refused)],
    ),
    body("PATCH", "/balloon/hinting/start", "{}", &[("acknowledge_on_stop", "false", Done, Done)]),
    body(
        "PUT",
        "/hotplug/memory",
        r#"{"total_size_mib": 1024}"#,
        &[
            ("total_size_mib", "2048", Done, Refused),
            ("slot_size_mib", "256", Done, Refused),
            ("block_size_mib", "4", Done, Refused),
        ],
    ),
    body(
        "PATCH",
        "/hotplug/memory",
        r#"{"requested_size_mib": 128}"#,
        &[("requested_size_mib", "256", Done, Refused)],
    ),
    Body { within: "rate_limiter", ..body("PUT", "/entropy", "{}", LIMITERS) },
    Body { within: "rate_limiter", ..body("PUT", "/drives/a", DRIVE, LIMITERS) },
    Body { within: "rate_limiter", ..body("PUT", "/pmem/a", PMEM, LIMITERS) },
    Body { within: "rate_limiter", ..body("PATCH", "/pmem/a", r#"{"id": "a"}"#, LIMITERS) },
    Body { within: "rx_rate_limiter", ..body("PUT", "/network-interfaces/a", INTERFACE, LIMITERS) },
    Body { within: "rate_limiter", ..body("PATCH", "/drives/a", r#"{"drive_id": "a"}"#, LIMITERS) },
    body(
        "PUT",
        "/serial",
        "{}",
        &[("serial_out_path", r#""/c""#, Done, Done), ("rate_limiter", BUCKET, Done, Done)],
    ),
    Body {
        within: "rate_limiter",
        ..body(
            "PUT",
            "/serial",
            r#"{"rate_limiter": {"size": 1, "refill_time": 1}}"#,
            &[
                ("size", "2", Done, Refused),
                ("refill_time", "2", Done, Refused),
                ("one_time_burst", "2", Done, Done),
            ],
        )
    },
    body(
        "PUT",
        "/logger",
        "{}",
        &[
            ("level", r#""Info""#, Done, Done),
            ("log_path", r#""/l""#, Done, Done),
            ("show_level", "true", Done, Done),
            ("show_log_origin", "true", Done, Done),
            ("module", r#""api""#, Done, Done),
        ],
    ),
    body(
        "PUT",
        "/metrics",
        r#"{"metrics_path": "/m"}"#,
        &[
            ("metrics_path", r#""/n""#, Done, Refused),
            ("emit_id", "true", Done, Done),
            ("properties", r#"{"a": "b"}"#, Done, Done),
        ],
    ),
    body(
        "PUT",
        "/actions",
        r#"{"action_type": "InstanceStart"}"#,
        &[
            ("action_type", r#""FlushMetrics""#, Done, Refused),
            ("action_type", r#""SendCtrlAltDel""#, Done, Refused),
        ],
    ),
    body("PATCH", "/vm", r#"{"state": "Paused"}"#, &[("state", r#""Resumed""#, Done, Refused)]),
];

const LIMITERS: &[(&str, &str, Becomes, Becomes)] =
    &[("bandwidth", BUCKET, Done, Done), ("ops", BUCKET, Done, Done)];

/// What becomes of a request before anything of the host is looked at.
fn becomes(dialect: Dialect, method: &str, path: &str, body: &Value) -> Result<(), String> {
    match route(dialect, method, path, body.to_string().as_bytes())? {
        Request::PutDevice(device) => device.check(),
        Request::PutBootSource(source) => source.check(),
        Request::PutCpuConfig(cpu) => cpu.check(),
        Request::PutMachineConfig(machine) => machine.check(dialect),
        _ => Ok(()),
    }
    .map_err(|error| error.to_string())
}

impl Body {
    /// With this value of a property.
    fn with(&self, property: &str, value: Value) -> Value {
        let mut body: Value = serde_json::from_str(self.required).unwrap();
        if property == "socket" && !value.is_null() {
            // A disk is an image or somebody else's.
            body["path_on_host"] = Value::Null;
        }
        let place = if self.within.is_empty() { &mut body } else { &mut body[self.within] };
        if place.is_null() {
            *place = json!({});
        }
        place[property] = value;
        body
    }
}

#[test]
fn every_published_property_is_there_and_null_where_it_can_be() {
    for body in BODIES {
        let Body { method, path, properties, .. } = body;
        for (property, value, given, null) in *properties {
            let value = serde_json::from_str(value).unwrap();
            for (value, expected) in [(value, given), (Value::Null, null)] {
                let sent = body.with(property, value);
                for dialect in [Dialect::Alula, Dialect::Firecracker] {
                    let result = becomes(dialect, method, path, &sent);
                    let holds = match (expected, &result) {
                        (Done, Ok(())) => true,
                        (Refused, Err(error)) => !error.contains("unknown field"),
                        _ => false,
                    };
                    assert!(holds, "{dialect:?} {method} {path} {sent}: {expected:?}, but {result:?}");
                }
            }
        }
    }
}

/// The names of the fields that the schema has for the body of a request.
fn fields(api: &Value, method: &str, path: &str) -> Vec<String> {
    let place = match path.strip_suffix("/a") {
        Some(path) => format!("{path}/{{id}}"),
        None => path.to_owned(),
    };
    let content = &api["paths"][place][method.to_lowercase()]["requestBody"]["content"]["application/json"];
    let name = content["schema"]["$ref"].as_str().unwrap().rsplit('/').next().unwrap();
    let properties: &Map<String, Value> =
        api["components"]["schemas"][name]["properties"].as_object().unwrap();
    properties.keys().cloned().collect()
}

/// A table of what Firecracker's requests have and how it stands here.
fn standing() -> String {
    let api: Value = serde_json::from_str(super::OPENAPI).unwrap();
    let mut text = "| request | the same | more than Firecracker has |\n|---|---|---|\n".to_owned();
    let list = |names: &[String]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let mut row = |method: &str, path: &str, same: &[String]| {
        let more: Vec<_> =
            fields(&api, method, path).into_iter().filter(|field| !same.contains(field)).collect();
        let path = path.strip_suffix("/a").map_or(path.to_owned(), |path| format!("{path}/{{id}}"));
        text += &format!("| {method} `{path}` | {} | {} |\n", list(same), list(&more));
    };
    for body in BODIES.iter().filter(|body| body.within.is_empty()) {
        let mut same = Vec::new();
        for (property, ..) in body.properties {
            if !same.iter().any(|name| name == property) {
                same.push((*property).to_owned());
            }
        }
        row(body.method, body.path, &same);
    }
    for (path, published) in
        [("/snapshot/create", snapshot::CREATE_PUBLISHED), ("/snapshot/load", snapshot::LOAD_PUBLISHED)]
    {
        let same: Vec<_> = published.iter().map(|name| (*name).to_owned()).collect();
        row("PUT", path, &same);
    }
    text
}

#[test]
fn the_page_on_firecracker_says_what_there_is() {
    const MARK: &str = "<!-- The table is made by the tests of src/api/published.rs. -->\n\n";
    const PAGE: &str = include_str!("../../docs/firecracker.md");
    let (before, after) = PAGE.split_once(MARK).unwrap();
    let rest = after.split_once("\n\n").unwrap().1;
    check("docs/firecracker.md", PAGE, &format!("{before}{MARK}{}\n{rest}", standing()));
}

#[test]
fn fields_that_are_not_published_are_ours_alone() {
    let api: Value = serde_json::from_str(super::OPENAPI).unwrap();
    let mut ours = Vec::new();
    for body in BODIES.iter().filter(|body| body.within.is_empty()) {
        for field in fields(&api, body.method, body.path) {
            if body.properties.iter().any(|(property, ..)| *property == field) {
                continue;
            }
            ours.push(field.clone());
            // As an unknown one would be, in the same words.
            for value in [json!(1), json!([]), Value::Null] {
                let sent = body.with(&field, value);
                let error = becomes(Dialect::Firecracker, body.method, body.path, &sent).unwrap_err();
                let expected = format!("unknown field `{field}`, expected one of `");
                assert!(error.contains(&expected), "{sent}: {error}");
                assert!(ours.iter().all(|field| !error.contains(&format!("of `{field}`"))), "{error}");
                let error = becomes(Dialect::Alula, body.method, body.path, &sent).err();
                assert!(!error.unwrap_or_default().contains("unknown field"), "{sent}");
            }
        }
    }
    for field in ["format", "backing", "direct_io", "num_queues", "threads", "user", "queue_pairs"] {
        assert!(ours.iter().any(|other| other == field), "{field}: {ours:?}");
    }
    for action in ["Shutdown", "Reset"] {
        let body = json!({ "action_type": action });
        assert_eq!(becomes(Dialect::Alula, "PUT", "/actions", &body), Ok(()));
        let error = becomes(Dialect::Firecracker, "PUT", "/actions", &body).unwrap_err();
        let expected = format!(
            "unknown variant `{action}`, expected one of `FlushMetrics`, `InstanceStart`, `SendCtrlAltDel`"
        );
        assert!(error.contains(&expected), "{error}");
    }
}

#[test]
fn a_list_is_no_struct_with_defaults() {
    for body in BODIES.iter().filter(|body| body.path != "/metrics") {
        let mut sent: Value = serde_json::from_str(body.required).unwrap();
        match body.within {
            "" => sent = json!([]),
            within => sent[within] = json!([]),
        }
        let error = becomes(Dialect::Firecracker, body.method, body.path, &sent).unwrap_err();
        assert!(error.contains("invalid length 0, expected struct "), "{sent}: {error}");
    }
}

#[test]
fn types_are_called_as_serde_calls_them() {
    for (method, path, sent, expected) in [
        ("PUT", "/machine-config", r#"{"vcpu_count": "1"}"#, "invalid type: string \"1\", expected u8 at"),
        ("PUT", "/machine-config", r#"{"vcpu_count": -1}"#, "invalid value: integer `-1`, expected u8 at"),
        ("PUT", "/machine-config", r#"{"vcpu_count": 70000}"#, "invalid value: integer `70000`, expected u8"),
        ("PATCH", "/machine-config", r#"{"vcpu_count": 1.5}"#, "floating point `1.5`, expected u8 at"),
        ("PUT", "/machine-config", r#"{"mem_size_mib": true}"#, "boolean `true`, expected usize at"),
        ("PATCH", "/machine-config", r#"{"mem_size_mib": {}}"#, "invalid type: map, expected usize at"),
        ("PATCH", "/machine-config", "7", "integer `7`, expected struct MachineConfigUpdate at"),
        ("PUT", "/boot-source", r#"{"kernel_image_path": null}"#, "invalid type: null, expected a string"),
        ("PUT", "/boot-source", "7", "integer `7`, expected struct BootSourceConfig at"),
        ("PUT", "/entropy", r#"{"rate_limiter": 7}"#, "integer `7`, expected struct RateLimiterConfig at"),
        ("PUT", "/metrics", r#"{"metrics_path": "/m", "properties": {"a": 1}}"#, "expected a string"),
    ] {
        let error = route(Dialect::Firecracker, method, path, sent.as_bytes()).err().unwrap();
        assert!(error.contains(expected), "{sent}: {error}");
    }
    let metrics = br#"{"metrics_path": "/m", "colour": 7}"#;
    assert!(
        route(Dialect::Firecracker, "PUT", "/metrics", metrics).is_ok(),
        "unknown fields are ignored here"
    );
}
