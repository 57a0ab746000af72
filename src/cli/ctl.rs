//! `alula ctl`: asks a running microVM, and prints the answer for people or as JSON.

use std::io::{Read, Write};
use std::path::Path;

use serde_json::{Value, json};

use super::arguments::ctl::{Ask, Ctl};
use crate::api::client::{Answer, Client};
use crate::error::{Context, Error, Result};
use crate::json;
use crate::log::in_one_line;

/// A body on standard input of more bytes is refused before it is kept: no monitor takes it.
const STDIN_MAX: u64 = 16 << 20;

/// Asks, and prints the answer.
pub fn run(ctl: &Ctl) -> Result<()> {
    let socket = super::exec::api_of(&ctl.reach)?.unwrap_or_default();
    let mut client = Client::connect(&socket)?;
    match &ctl.ask {
        Ask::Status => status(client, ctl.json),
        Ask::Config => show(&ask(&mut client, "GET", "/vm/config", "")?, ctl.json, false),
        Ask::Guest => show(&ask(&mut client, "GET", "/guest", "")?, ctl.json, false),
        Ask::Metrics => show(&ask(&mut client, "GET", "/metrics", "")?, ctl.json, true),
        Ask::Events => client.lines("/events", |line| event(line, ctl.json)),
        Ask::Pause => set_state(client, "Paused", ctl.json),
        Ask::Resume => set_state(client, "Resumed", ctl.json),
        Ask::Balloon(size) => balloon(client, *size, ctl.json),
        Ask::Snapshot(folder, is_diff) => snapshot(client, folder, *is_diff, ctl.json),
        Ask::Shutdown => {
            ask(&mut client, "PUT", "/actions", r#"{"action_type": "Shutdown"}"#)?;
            if ctl.json { Ok(()) } else { say("the guest was asked to power off") }
        }
        Ask::Request(method, path, body) => {
            let body = if body == "-" { &standard_input()? } else { body };
            show(&ask(&mut client, method, path, body)?, ctl.json, false)
        }
    }
}

/// The body of a good answer; a bad one is an error with the fault's own words.
pub fn ask(client: &mut Client, method: &str, path: &str, body: &str) -> Result<String> {
    let Answer { status, body } = client.request(method, path, body)?;
    if (200..300).contains(&status) {
        return Ok(body);
    }
    let value: Option<Value> = json::from_text(&body).ok();
    let field = |name| value.as_ref().and_then(|value| value[name].as_str().map(str::to_owned));
    let fault = field("fault_message").or_else(|| field("error")).unwrap_or(body);
    Err(Error::config(format!("{method} {path}: {fault}")))
}

pub fn parsed(body: &str) -> Result<Value> {
    json::from_text(body).context("read the monitor's answer")
}

fn status(mut client: Client, json: bool) -> Result<()> {
    let instance = ask(&mut client, "GET", "/", "")?;
    if json {
        return say(&instance);
    }
    let config = parsed(&ask(&mut client, "GET", "/vm/config", "")?)?;
    let instance = parsed(&instance)?;
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let machine = &config["machine-config"];
    let count = |number: &Value, noun: &str| match number.as_u64() {
        Some(1) => format!("1 {noun}"),
        number => format!("{} {noun}s", number.unwrap_or(0)),
    };
    let mut parts =
        vec![count(&machine["vcpu_count"], "CPU"), format!("{} MiB of memory", machine["mem_size_mib"])];
    for kind in crate::devices::KINDS {
        match &config[kind.section] {
            Value::Array(list) if !list.is_empty() => parts.push(count(&list.len().into(), kind.noun)),
            Value::Object(_) => parts.push(kind.noun.to_owned()),
            _ => {}
        }
    }
    let state = text(&instance["state"]).to_lowercase();
    say(&format!("{}: {state}; {}", text(&instance["id"]), parts.join(", ")))
}

fn set_state(mut client: Client, state: &str, json: bool) -> Result<()> {
    ask(&mut client, "PATCH", "/vm", &format!(r#"{{"state": "{state}"}}"#))?;
    if json { Ok(()) } else { say(&state.to_lowercase()) }
}

/// Sets what the guest is to do without, or says what it does.
fn balloon(mut client: Client, amount_mib: Option<u64>, json: bool) -> Result<()> {
    if let Some(amount_mib) = amount_mib {
        let body = json!({ "amount_mib": amount_mib }).to_string();
        ask(&mut client, "PATCH", "/balloon", &body)?;
        return if json {
            Ok(())
        } else {
            say(&format!("the guest was asked to do without {amount_mib} MiB"))
        };
    }
    let config = ask(&mut client, "GET", "/balloon", "")?;
    let has_statistics =
        parsed(&config)?["stats_polling_interval_s"].as_u64().is_some_and(|interval| interval > 0);
    let told = if has_statistics { ask(&mut client, "GET", "/balloon/statistics", "")? } else { config };
    show(&told, json, false)
}

fn snapshot(mut client: Client, folder: &Path, is_diff: bool, json: bool) -> Result<()> {
    // The monitor may be in another folder.
    let folder = std::path::absolute(folder).with_context(|| format!("find `{}`", folder.display()))?;
    let kind = if is_diff { "Diff" } else { "Full" };
    let body = json!({ "folder": folder, "snapshot_type": kind, "live": true }).to_string();
    client.wait_for_ever()?;
    ask(&mut client, "PUT", "/snapshot/create", &body)?;
    if json { Ok(()) } else { say(&format!("saved to `{}`", folder.display())) }
}

/// Prints a body; `sparse`: for people, without zeros.
fn show(body: &str, json: bool, sparse: bool) -> Result<()> {
    match (body, json) {
        ("", true) => Ok(()),
        ("", false) => say("done"),
        (body, true) => say(body),
        (body, false) => say(readable(&parsed(body)?, sparse).trim_end()),
    }
}

fn event(line: &str, json: bool) -> Result<()> {
    if json {
        return say(line);
    }
    let mut value = parsed(line)?;
    let mut take = |name: &str| match value.as_object_mut().and_then(|fields| fields.remove(name)) {
        Some(Value::String(text)) => text,
        other => other.map(|value| value.to_string()).unwrap_or_default(),
    };
    let (time, event) = (take("time"), take("event").replace('_', " "));
    take("id");
    take("uptime_ms");
    let details: Vec<_> = value
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, value)| match value.as_str() {
            Some(text) => format!("{name}: {}", in_one_line(text)),
            None => format!("{name}: {value}"),
        })
        .collect();
    say(format!("{time}  {event}  {}", details.join(", ")).trim_end())
}

/// JSON as indented lines of `name: value`.
fn readable(value: &Value, sparse: bool) -> String {
    let mut text = String::new();
    write_lines(value, 0, sparse, &mut text);
    text
}

fn write_lines(value: &Value, depth: usize, sparse: bool, text: &mut String) {
    let indent = "  ".repeat(depth);
    let line = |text: &mut String, head: &str, value: &Value| match value {
        Value::Object(_) | Value::Array(_) => {
            *text += &format!("{indent}{head}\n");
            write_lines(value, depth + 1, sparse, text);
        }
        Value::String(value) => *text += &format!("{indent}{head} {}\n", in_one_line(value)),
        value => *text += &format!("{indent}{head} {value}\n"),
    };
    match value {
        Value::Object(fields) => {
            let fields = fields.iter().filter(|(_, value)| !sparse || says_something(value));
            fields.for_each(|(name, value)| line(text, &format!("{}:", in_one_line(name)), value));
        }
        Value::Array(list) => list.iter().for_each(|value| line(text, "-", value)),
        value => line(text, "", value),
    }
}

/// Whether there is anything but zeros and nothings in it.
fn says_something(value: &Value) -> bool {
    match value {
        Value::Object(fields) => fields.values().any(says_something),
        Value::Array(list) => list.iter().any(says_something),
        Value::Number(number) => number.as_f64() != Some(0.0),
        value => !value.is_null(),
    }
}

fn standard_input() -> Result<String> {
    let mut body = String::new();
    let read = std::io::stdin().lock().take(STDIN_MAX + 1).read_to_string(&mut body);
    match read.context("read standard input")? as u64 {
        // A part of it would be another body.
        count if count > STDIN_MAX => Err(Error::config(format!(
            "standard input has more than {STDIN_MAX} bytes: no request is so long"
        ))),
        _ => Ok(body),
    }
}

pub fn say(line: &str) -> Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{line}").and_then(|()| output.flush()).context("write to standard output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_lines_for_people() {
        let value = serde_json::json!({
            "a": 1, "b": { "c": "x\u{1b}[2J\ny", "d": null }, "e": [{ "f": true }], "g": { "h": 0 }
        });
        assert_eq!(
            readable(&value, false),
            "a: 1\nb:\n  c: x [2J y\n  d: null\ne:\n  -\n    f: true\ng:\n  h: 0\n"
        );
        assert_eq!(readable(&value, true), "a: 1\nb:\n  c: x [2J y\ne:\n  -\n    f: true\n");
    }
}
