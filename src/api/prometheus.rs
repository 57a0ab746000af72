//! Metrics as Prometheus reads them: its text format, version 0.0.4.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Map, Value};

use crate::devices::KINDS;

/// The media type of the text, by which a client knows its format and version.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The lines of each metric, which must stand together.
type Lines = BTreeMap<String, String>;

/// `metrics`, which are groups of numbers, as text: `alula_GROUP_FIELD`, with what one of many devices did as
/// `alula_block_device_FIELD{device="ID"}`, and the time of CPUs as `alula_process_cpu_us{thread="NAME"}`.
pub fn text(metrics: &Map<String, Value>) -> String {
    let mut lines = Lines::new();
    for (group, value) in metrics {
        let of_device = KINDS.iter().filter(|kind| kind.many).find_map(|kind| {
            let id = group.strip_prefix(kind.metrics)?.strip_prefix('_')?;
            Some((format!("alula_{}_device", kind.metrics), id))
        });
        match of_device {
            Some((name, id)) => write(&name, Some(("device", id)), value, &mut lines),
            None => write(&format!("alula_{group}"), None, value, &mut lines),
        }
    }
    lines.into_values().collect()
}

/// Writes what is below `name`, with this label.
fn write(name: &str, label: Option<(&str, &str)>, value: &Value, lines: &mut Lines) {
    match value {
        // The names of threads are no part of a metric's name.
        Value::Object(threads) if name == "alula_process_cpu_us" && label.is_none() => {
            threads.iter().for_each(|(thread, time)| write(name, Some(("thread", thread)), time, lines));
        }
        Value::Object(fields) => {
            fields.iter().for_each(|(field, value)| write(&format!("{name}_{field}"), label, value, lines));
        }
        Value::Number(number) => {
            let name: String =
                name.chars().map(|letter| if is_of_name(letter) { letter } else { '_' }).collect();
            let label =
                label.map_or(String::new(), |(name, value)| format!("{{{name}=\"{}\"}}", escaped(value)));
            let line = lines.entry(name.clone()).or_default();
            // Writing to a text does not fail.
            let _ = writeln!(line, "{name}{label} {number}");
        }
        _ => {}
    }
}

fn is_of_name(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || letter == '_'
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_are_lines_and_the_lines_of_a_metric_stand_together() {
        let metrics = json!({
            "block": { "read_bytes": 3, "read_agg": { "max_us": 1 } }, "block_a": { "read_bytes": 1 },
            "block_b\"\\\n": { "read_bytes": 2 }, "balloon": { "inflate_count": 5 },
            "process": { "cpu_us": { "main": 1, "vcpu 0": 2 }, "uptime_ms": 7 },
            "utc_timestamp_ms": 9, "id": "web", "odd name!": { "x-y": 1 }
        });
        let expected = "\
alula_balloon_inflate_count 5
alula_block_device_read_bytes{device=\"a\"} 1
alula_block_device_read_bytes{device=\"b\\\"\\\\\\n\"} 2
alula_block_read_agg_max_us 1
alula_block_read_bytes 3
alula_odd_name__x_y 1
alula_process_cpu_us{thread=\"main\"} 1
alula_process_cpu_us{thread=\"vcpu 0\"} 2
alula_process_uptime_ms 7
alula_utc_timestamp_ms 9
";
        assert_eq!(text(metrics.as_object().unwrap()), expected);
    }
}
