//! `alula snapshot`: what is in the files of a saved microVM.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::arguments::snapshot::Snapshot;
use crate::carry::line::{Line, Place};
use crate::carry::stored::{self, Location, Stored, Sums, boot_id};
use crate::carry::{merge, rebase};
use crate::error::{Context, Result};

/// What to print.
pub fn run(snapshot: &Snapshot) -> Result<String> {
    match snapshot {
        Snapshot::Inspect(path) => inspect(path),
        Snapshot::Version(state) => Ok(stored::version_of(state)? + "\n"),
        Snapshot::Verify(location) => verify(location),
        Snapshot::Merge(base, diff) => merge(base, diff),
        Snapshot::Rebase { memory, diff } => {
            let bytes = rebase::rebase(memory, diff)?;
            Ok(format!("{}: {bytes} bytes were put into it\n", memory.display()))
        }
    }
}

fn inspect(path: &Path) -> Result<String> {
    let folder = Location::Folder(path.to_owned()).state();
    let path = if path.is_dir() { &folder } else { path };
    let told = told(&Stored::read(path, true)?)?;
    Ok(serde_json::to_string_pretty(&told).context("print what the state says")? + "\n")
}

/// What a state says, for people and programs.
fn told(stored: &Stored) -> Result<Value> {
    let Stored { origin, machine, memory, line, sums } = stored;
    let architecture = match origin.architecture {
        62 => json!("x86_64"),
        183 => json!("aarch64"),
        other => json!(other),
    };
    let ranges: Vec<_> =
        machine.memory().iter().map(|range| json!({ "start": range.start, "size": range.size })).collect();
    let part = |(name, state): (&String, &Vec<u8>)| {
        let place = machine.places.get(name).map(ToString::to_string);
        (name.clone(), json!({ "place": place, "state_bytes": state.len() }))
    };
    let parts: Map<_, _> = machine.parts.iter().map(part).collect();
    let config: Value = serde_json::from_str(&machine.config.saved()?).context("read the configuration")?;
    let checksums = match sums {
        Sums::Whole(checksums) => checksums.len(),
        Sums::Diff(blocks) => blocks.len(),
    };
    let boot = u128::from_be_bytes(origin.boot_id);
    Ok(json!({
        "architecture": architecture,
        "host_boot_id": format!("{boot:032x}"),
        "is_of_this_boot": boot_id() == Some(origin.boot_id),
        "cpus": machine.cpus(),
        "memory": { "ranges": ranges, "file": memory.name, "size": memory.size, "checksums": checksums },
        "kind": sums.kind(),
        "snapshot": line.map(|line| place(line.place)),
        "after": line.and_then(after),
        "parts": parts,
        "config": config,
    }))
}

/// The place of a snapshot, as JSON.
fn place(Place { microvm, number }: Place) -> Value {
    json!({ "microvm": format!("{microvm:032x}"), "number": number })
}

/// The snapshots that a difference may be merged into, as JSON; None: the snapshot is a whole one.
fn after(line: Line) -> Option<Value> {
    let after = line.after?;
    Some(json!({ "number": after.number, "restored_from": after.restored_from.map(place) }))
}

fn verify(location: &Location) -> Result<String> {
    let (stored, memory) = location.open(true)?;
    let size = stored.memory.size;
    let verified = stored.sums.verify(&memory, size);
    verified.context("verify the memory of the saved machine")?;
    let kind = if matches!(stored.sums, Sums::Diff(_)) { ", a difference" } else { "" };
    Ok(format!("{}: ok, with {} MiB of memory{kind}\n", location.state().display(), size >> 20))
}

fn merge(base: &Location, diff: &Location) -> Result<String> {
    let size = merge::merge(base, diff)?;
    Ok(format!("{}: merged, with {} MiB of memory\n", base.state().display(), size >> 20))
}
