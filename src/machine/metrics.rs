//! What the parts of a machine count, in one object.

use serde_json::{Map, Value};

use super::{Machine, parts};
use crate::metrics::{Group, View};

pub fn collect(machine: &Machine, view: View) -> Map<String, Value> {
    let mut all = Map::new();
    for vcpu in machine.vcpus.iter() {
        parts::add(&mut all, "vcpu", &vcpu.metrics().collect(view));
    }
    machine.parts.metrics(view, &mut all);
    all
}
