//! `alula ctl`: asks a running microVM, and prints the answer for people or as JSON.

use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::arguments::ctl::{Ask, Ctl};
use super::guests::{self, Usage};
use super::table;
use crate::api::client::{Answer, Client, Heard};
use crate::error::{Context, Error, Result};
use crate::json;
use crate::limiter::RateLimiter;
use crate::log::in_one_line;
use crate::sys::descriptor::poll;
use crate::sys::process;

/// A body on standard input of more bytes is refused before it is kept: no monitor takes it.
const STDIN_MAX: u64 = 16 << 20;

/// How often a monitor that tells nothing of its guest's end is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// How long a guest may take to power off.
const STOP_TIME: Duration = Duration::from_secs(60);

/// Asks, and prints the answer.
pub fn run(ctl: &Ctl) -> Result<()> {
    match &ctl.ask {
        Ask::List => return guests::list(ctl.json),
        Ask::Watch => return guests::watch(ctl.json),
        Ask::Sweep => return guests::sweep(),
        _ => {}
    }
    let socket = super::exec::api_or_place(&ctl.reach)?.unwrap_or_default();
    let mut client = Client::connect(&socket)?;
    match &ctl.ask {
        Ask::Status => status(client, ctl.json),
        Ask::Config => show(&ask(&mut client, "GET", "/vm/config", "")?, ctl.json, false),
        Ask::Guest => show(&ask(&mut client, "GET", "/guest", "")?, ctl.json, false),
        Ask::Metrics => show(&ask(&mut client, "GET", "/metrics", "")?, ctl.json, true),
        Ask::Events => client.lines("/events", |line| super::put_out(event(line, ctl.json)?.as_bytes())),
        Ask::Pause => set_state(client, "Paused", ctl.json),
        Ask::Resume => set_state(client, "Resumed", ctl.json),
        Ask::Balloon(size) => balloon(client, *size, ctl.json),
        Ask::Cpus(count) => cpus(client, *count, ctl.json),
        Ask::HotplugMemory(size) => hotplug_memory(client, *size, ctl.json),
        Ask::Snapshot(folder, is_diff) => snapshot(client, folder, *is_diff, ctl.json),
        Ask::Record => record(client, ctl.json),
        Ask::Start => act(&mut client, "InstanceStart", ctl.json, "started"),
        Ask::Shutdown => act(&mut client, "Shutdown", ctl.json, "the guest was asked to power off"),
        Ask::Stop { force } => stop(client, &socket, *force, ctl.json),
        Ask::Reset => reset(client, ctl.json),
        Ask::CtrlAltDel => press_ctrl_alt_del(&mut client, ctl.json),
        Ask::Flush => act(&mut client, "FlushMetrics", ctl.json, "written"),
        Ask::Limit(device, limiter) => limit(client, device, *limiter, ctl.json),
        Ask::Request(method, path, body) => {
            let body = if body == "-" { &text_of_input()? } else { body };
            show(&ask(&mut client, method, path, body)?, ctl.json, false)
        }
        Ask::List | Ask::Watch | Ask::Sweep => unreachable!("these ask no guest that has a name"),
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

/// Asks for something of a part of the guest, which is at `part` of its configuration. A guest without such a part cannot be
/// given it any more: the error says by which `option` it starts with one.
fn ask_of(
    client: &mut Client,
    (part, option): (&str, &str),
    method: &str,
    path: &str,
    body: &str,
) -> Result<String> {
    ask(client, method, path, body).map_err(|error| {
        let config = ask(client, "GET", "/vm/config", "").and_then(|config| parsed(&config));
        match config.is_ok_and(|config| config.pointer(part).is_none_or(Value::is_null)) {
            true => Error::config(format!("{error}: the guest has to be started with `{option}` for that")),
            false => error,
        }
    })
}

pub fn parsed(body: &str) -> Result<Value> {
    json::from_text(body).context("read the monitor's answer")
}

fn status(mut client: Client, json: bool) -> Result<()> {
    let mut instance = parsed(&ask(&mut client, "GET", "/", "")?)?;
    if !instance.is_object() {
        return Err(Error::host("the monitor's answer to `GET /` is no object: it is none of this API"));
    }
    let (process, usage) = (client.process(), Usage::of(&mut client));
    if json {
        instance["pid"] = process.into();
        if let (Some(fields), Some(Value::Object(usage))) =
            (instance.as_object_mut(), usage.map(|usage| usage.json()))
        {
            fields.extend(usage);
        }
        return say(&instance.to_string());
    }
    let config = parsed(&ask(&mut client, "GET", "/vm/config", "")?)?;
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
    say(&format!("{}: {}; {}", text(&instance["id"]), text(&instance["state"]), parts.join(", ")))?;
    let mut costs: Vec<_> = process.map(|process| format!("process {process}")).into_iter().collect();
    if let Some(usage) = usage {
        costs.push(format!("up {}", table::time(Duration::from_millis(usage.uptime_ms))));
        costs.push(format!("{} of the host's memory", table::size(usage.memory_bytes)));
        costs.push(format!("{} of CPU time", table::time(Duration::from_micros(usage.cpu_us))));
    }
    if costs.is_empty() { Ok(()) } else { say(&costs.join(", ")) }
}

fn act(client: &mut Client, action: &str, json: bool, done: &str) -> Result<()> {
    ask(client, "PUT", "/actions", &json!({ "action_type": action }).to_string())?;
    if json { Ok(()) } else { say(done) }
}

/// Resets the machine. What devices have in flight may take long.
fn reset(mut client: Client, json: bool) -> Result<()> {
    client.wait_for_ever()?;
    act(&mut client, "Reset", json, "the guest boots again")
}

fn press_ctrl_alt_del(client: &mut Client, json: bool) -> Result<()> {
    let is_paused = parsed(&ask(client, "GET", "/", "")?)?["state"] == "Paused";
    let done = if is_paused {
        "the keys were pressed; the guest is paused, and sees them when it is resumed"
    } else {
        "the keys were pressed"
    };
    act(client, "SendCtrlAltDel", json, done)
}

/// Has the guest power off, or ends it, and waits until its monitor has ended.
fn stop(mut client: Client, socket: &Path, force: bool, json: bool) -> Result<()> {
    let state = parsed(&ask(&mut client, "GET", "/", "")?)?["state"].take();
    let process = client.process();
    // A monitor that cannot be seen from here is not waited for.
    let end = process.and_then(|process| process::end_of(process).ok());
    // The events are followed before the guest is ended, so that the reason of its end is among them.
    let mut lines = Client::connect(socket)?.follow_if_told("/events")?;
    let is_ended_at_once = force || state == "Not started";
    if is_ended_at_once {
        let process = process.ok_or_else(|| Error::host("its process cannot be seen from here"));
        let ended =
            process.and_then(|process| process::signal(process, libc::SIGTERM).context("end its process"));
        ended.context("end the guest at once")?;
    } else if state == "Paused" {
        return Err(Error::config(
            "the guest is paused, and cannot power off: `alula ctl resume` it first, or `stop --force`",
        ));
    } else {
        // Firecracker has no other way, and not on aarch64.
        let action = if lines.is_some() { "Shutdown" } else { "SendCtrlAltDel" };
        ask(&mut client, "PUT", "/actions", &json!({ "action_type": action }).to_string())?;
    }
    let deadline = Instant::now() + STOP_TIME;
    let mut reason = match state.as_str() {
        Some("Not started") => "the service has ended: it had started no guest".to_owned(),
        _ if force => "the guest was ended at once, as if its power had failed".to_owned(),
        _ => "the guest has ended".to_owned(),
    };
    loop {
        let rest = deadline.saturating_duration_since(Instant::now());
        let heard = match &mut lines {
            Some(lines) => lines.next(Some(rest))?,
            None => ends_soon(socket),
        };
        match heard {
            Heard::Line(line) => {
                let event = parsed(&line)?;
                // A signal would read as a fault, and is what was asked for here.
                if event["event"] == "ended" && !is_ended_at_once {
                    reason = in_one_line(event["reason"].as_str().unwrap_or_default());
                }
            }
            Heard::End => {
                // Its sockets, and what it holds of disks, are there until its process has ended.
                if let Some(end) = &end {
                    poll(end, libc::POLLIN, rest.as_millis() as i32);
                }
                return if json { Ok(()) } else { say(&reason) };
            }
            Heard::Nothing if rest.is_zero() => {
                return Err(Error::guest(format!(
                    "the guest has not powered off within {} s: `alula ctl stop --force` ends it at once",
                    STOP_TIME.as_secs()
                )));
            }
            Heard::Nothing => {}
        }
    }
}

/// Waits a moment for the end of a monitor whose events cannot be followed, and tells whether it came.
fn ends_soon(socket: &Path) -> Heard {
    std::thread::sleep(LOOK);
    if Client::connect_within(socket, LOOK).is_ok() { Heard::Nothing } else { Heard::End }
}

/// Limits a disk, each direction of a network interface, or the flushes of a pmem device, whichever has this name.
fn limit(mut client: Client, device: &str, limiter: RateLimiter, json: bool) -> Result<()> {
    let config = parsed(&ask(&mut client, "GET", "/vm/config", "")?)?;
    let has = |section: &str, id: &str| {
        let devices = config[section].as_array().into_iter().flatten();
        devices.into_iter().any(|other| other[id] == device)
    };
    // A limit that is left out stays as it is; a limiter that is told whole would leave out a limit that is `off`.
    let buckets = [("bandwidth", limiter.bandwidth), ("ops", limiter.ops)];
    let limits: Map<_, _> =
        buckets.into_iter().filter_map(|(name, bucket)| Some((name.to_owned(), json!(bucket?)))).collect();
    let kinds = [
        ("drives", "drive_id", &["rate_limiter"][..]),
        ("network-interfaces", "iface_id", &["rx_rate_limiter", "tx_rate_limiter"]),
        ("pmem", "id", &["rate_limiter"]),
    ];
    let named: Vec<_> = kinds.into_iter().filter(|(section, id, _)| has(section, id)).collect();
    let (section, id, fields) = match named.as_slice() {
        [one] => *one,
        [] => {
            return Err(Error::config(format!(
                "no disk, no network interface and no pmem device of the guest is called `{device}`"
            )));
        }
        _ => {
            return Err(Error::config(format!(
                "devices of several kinds are called `{device}`: say which by `alula ctl patch`"
            )));
        }
    };
    let limits = fields.iter().map(|field| ((*field).to_owned(), json!(limits)));
    let body: Map<_, _> = limits.chain([(id.to_owned(), json!(device))]).collect();
    ask(&mut client, "PATCH", &format!("/{section}/{device}"), &Value::Object(body).to_string())?;
    if json { Ok(()) } else { say("limited from now on") }
}

fn set_state(mut client: Client, state: &str, json: bool) -> Result<()> {
    ask(&mut client, "PATCH", "/vm", &format!(r#"{{"state": "{state}"}}"#))?;
    if json { Ok(()) } else { say(&state.to_lowercase()) }
}

const BALLOON: (&str, &str) = ("/balloon", "--balloon 0");
const CPUS: (&str, &str) = ("/machine-config/max_vcpus", "--max-cpus N");
const HOTPLUG_MEMORY: (&str, &str) = ("/memory-hotplug", "--hotplug-memory SIZE");

/// Sets how much memory the guest is to do without, or says how much it does without.
fn balloon(mut client: Client, amount_mib: Option<u64>, json: bool) -> Result<()> {
    if let Some(amount_mib) = amount_mib {
        let body = json!({ "amount_mib": amount_mib }).to_string();
        ask_of(&mut client, BALLOON, "PATCH", "/balloon", &body)?;
        return if json {
            Ok(())
        } else {
            say(&format!("the guest was asked to do without {amount_mib} MiB"))
        };
    }
    let config = ask_of(&mut client, BALLOON, "GET", "/balloon", "")?;
    let has_statistics =
        parsed(&config)?["stats_polling_interval_s"].as_u64().is_some_and(|interval| interval > 0);
    let told = if has_statistics { ask(&mut client, "GET", "/balloon/statistics", "")? } else { config };
    show(&told, json, false)
}

/// Sets how many CPUs the guest is to have, or says how many it has.
fn cpus(mut client: Client, count: Option<u16>, json: bool) -> Result<()> {
    let Some(count) = count else {
        let machine = parsed(&ask(&mut client, "GET", "/machine-config", "")?)?;
        let counts = ["vcpu_count", "max_vcpus"].map(|name| (name.to_owned(), machine[name].clone()));
        let counts: Map<_, _> = counts.into_iter().filter(|(_, count)| !count.is_null()).collect();
        return show(&Value::Object(counts).to_string(), json, false);
    };
    let body = json!({ "vcpu_count": count }).to_string();
    ask_of(&mut client, CPUS, "PATCH", "/machine-config", &body)?;
    if json {
        return Ok(());
    }
    let machine = parsed(&ask(&mut client, "GET", "/machine-config", "")?)?;
    let has = machine["vcpu_count"].as_u64().unwrap_or(0);
    let cpus = |count: u64| if count == 1 { "1 CPU".to_owned() } else { format!("{count} CPUs") };
    match has.checked_sub(count.into()) {
        Some(excess @ 1..) => say(&format!("the guest was asked to let {} go", cpus(excess))),
        _ => say(&format!("the guest has {}", cpus(has))),
    }
}

/// Sets how much memory the guest is to have plugged, or says how much that is.
fn hotplug_memory(mut client: Client, size_mib: Option<u64>, json: bool) -> Result<()> {
    let Some(size_mib) = size_mib else {
        let told = ask_of(&mut client, HOTPLUG_MEMORY, "GET", "/hotplug/memory", "")?;
        return show(&told, json, false);
    };
    let body = json!({ "requested_size_mib": size_mib }).to_string();
    ask_of(&mut client, HOTPLUG_MEMORY, "PATCH", "/hotplug/memory", &body)?;
    if json { Ok(()) } else { say(&format!("the guest was asked to have {size_mib} MiB plugged")) }
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

fn record(mut client: Client, json: bool) -> Result<()> {
    client.wait_for_ever()?;
    ask(&mut client, "PUT", "/snapshot/working-set", "{}")?;
    if json { Ok(()) } else { say("noted for later restores") }
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

/// The line that is shown of an event.
fn event(line: &str, json: bool) -> Result<String> {
    if json {
        return Ok(format!("{line}\n"));
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
    Ok(format!("{}\n", format!("{time}  {event}  {}", details.join(", ")).trim_end()))
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

fn text_of_input() -> Result<String> {
    String::from_utf8(standard_input()?).map_err(|error| {
        Error::config(format!(
            "standard input is no text in UTF-8 from its byte {} on, and no request is anything else: give the body as JSON",
            error.utf8_error().valid_up_to()
        ))
    })
}

/// The bytes on standard input.
pub fn standard_input() -> Result<Vec<u8>> {
    let mut body = Vec::new();
    let read = std::io::stdin().lock().take(STDIN_MAX + 1).read_to_end(&mut body);
    match read.context("read standard input")? as u64 {
        // A part of it would be another body.
        count if count > STDIN_MAX => Err(Error::config(format!(
            "standard input has more than {STDIN_MAX} bytes: no request is so long"
        ))),
        _ => Ok(body),
    }
}

pub fn say(line: &str) -> Result<()> {
    super::put_out(format!("{line}\n").as_bytes()).map(drop)
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
