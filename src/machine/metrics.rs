//! What the parts of a machine count, in one object.

use std::sync::PoisonError;

use serde_json::{Map, Value};

use super::Machine;
use crate::metrics::{Group, View, add_up};

pub fn collect(machine: &Machine, view: View) -> Map<String, Value> {
    let mut all = Map::new();
    for vcpu in &machine.vcpus {
        add(&mut all, "vcpu", vcpu.metrics().collect(view));
    }
    let console = machine.console.lock().unwrap_or_else(PoisonError::into_inner).metrics.clone();
    add(&mut all, "uart", console.collect(view));
    if let Some(keyboard) = &machine.keyboard {
        let keyboard = keyboard.lock().unwrap_or_else(PoisonError::into_inner);
        add(&mut all, "i8042", keyboard.metrics.collect(view));
    }
    for device in &machine.devices {
        let own = Value::Object(device.lock().metrics(view));
        if device.kind.many {
            all.insert(format!("{}_{}", device.kind.metrics, device.id), own.clone());
        }
        add(&mut all, device.kind.metrics, own);
    }
    all
}

/// Adds what one of them counts to what all of them count.
fn add(all: &mut Map<String, Value>, name: &str, part: Value) {
    let sum = all.entry(name).or_insert_with(|| Value::Object(Map::new()));
    if let (Value::Object(sum), Value::Object(part)) = (sum, part) {
        add_up(sum, &part);
    }
}
