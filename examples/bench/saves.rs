//! This bench measures saves: how long a guest stands still for a live snapshot while it writes, and what a difference
//! of a restored guest costs, which has its own pages and nothing else.

use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use serde_json::{Value, json};

use crate::monitor::{connect, request, spawn};
use crate::restore::{AHEAD, Bench, Guest, spread};
use crate::table::verdict;
use crate::{Folder, Result};

/// The guest writes to 4 MiB, which is what a live snapshot leaves for the moment in which the guest stands still, over and over
/// as fast as it can.
const GUEST: Guest = Guest { memory_mib: 1024, words: "work=4", ready: "working\n", has_passt: false };
const PAUSED: &str = r#"{"state":"Paused"}"#;
const RESUMED: &str = r#"{"state":"Resumed"}"#;
/// The bars on a quiet machine, in ms: of the median pause and of its p99, and of a difference of 1,000 pages.
const PAUSE_MAX: f64 = 3.0;
const PAUSE_P99_MAX: f64 = 10.0;
const DIFFERENCE_MAX: f64 = 5.0;

/// The table of live pauses and of differences, of `runs` each. The folder is on a disk: what is saved is flushed.
pub fn saves(ours: &str, runs: usize) -> Result<()> {
    let bench = Bench::of(ours, &GUEST, Folder::within(Path::new("/var/tmp"))?)?;
    let path = |name: &str| bench.saved.with_file_name(name);
    let (state, memory, live) = (path("diff-state"), path("diff-memory"), path("live"));
    let difference = json!({ "snapshot_type": "Diff", "snapshot_path": state, "mem_file_path": memory });
    let whole = json!({ "snapshot_type": "Full", "folder": live, "live": true });
    let events = path("events");
    let options = ["--events", events.to_str().ok_or("a path that is no text")?];
    let (mut differences, mut pages) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        let mut child = spawn(ours, true, &bench.socket, &options, Stdio::piped())?;
        let saved: Result<()> = (|| {
            let mut client = connect(&mut child, &bench.socket)?;
            request(&mut client, "PUT", "/snapshot/load", &bench.load(true))?;
            std::thread::sleep(AHEAD);
            request(&mut client, "PATCH", "/vm", PAUSED)?;
            let asked = Instant::now();
            request(&mut client, "PUT", "/snapshot/create", &difference.to_string())?;
            differences.push(asked.elapsed().as_secs_f64() * 1e3);
            request(&mut client, "PATCH", "/vm", RESUMED)?;
            request(&mut client, "PUT", "/snapshot/create", &whole.to_string())?;
            // The event of a save is told behind its answer.
            std::thread::sleep(AHEAD);
            Ok(())
        })();
        child.kill()?;
        child.wait()?;
        std::fs::remove_file(&bench.socket)?;
        saved?;
        // A difference needs files of its own.
        [&state, &memory].into_iter().try_for_each(std::fs::remove_file)?;
    }
    let (mut pauses, mut rounds) = (Vec::new(), 0);
    for line in std::fs::read_to_string(&events)?.lines() {
        let event: Value = serde_json::from_str(line)?;
        let number = |name: &str| event[name].as_f64().ok_or(format!("no {name} in {event}"));
        match (event["event"].as_str(), event["kind"].as_str()) {
            (Some("snapshot_created"), Some("Diff")) => pages.push(number("pages")?),
            (Some("snapshot_created"), _) => pauses.push(number("pause_us")? / 1e3),
            (Some("snapshot_failed"), _) => rounds += 1,
            _ => {}
        }
    }
    if pauses.len() != runs || pages.len() != runs || rounds > 0 {
        return Err(format!("of {runs} saves each, {} and {} succeeded", pauses.len(), pages.len()).into());
    }
    println!(
        "saves: 1 CPU, {} MiB, of which 4 are written all the time, ms; medians (least, p99) of {runs}",
        GUEST.memory_mib
    );
    let at = |values: &[f64], part: f64| {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted[((sorted.len() - 1) as f64 * part) as usize]
    };
    println!(
        "{:<34} {}  <= {PAUSE_MAX}, p99 <= {PAUSE_P99_MAX} on a quiet machine: {}",
        "pause of a live snapshot",
        spread(&pauses),
        verdict(at(&pauses, 0.5) <= PAUSE_MAX && at(&pauses, 0.99) <= PAUSE_P99_MAX),
    );
    println!(
        "{:<34} {}  <= {DIFFERENCE_MAX} on a quiet machine: {}",
        format!("a difference, {} pages", at(&pages, 0.5)),
        spread(&differences),
        verdict(at(&differences, 0.5) <= DIFFERENCE_MAX),
    );
    Ok(())
}
