//! A device behind any transport as a part of its machine.

use std::sync::mpsc::Sender;

use serde_json::Value;

use super::Transport;
use crate::metrics::View;
use crate::part::Component;
use crate::platform::{Node, Place};
use crate::virtio::mmio;

impl Component for Transport {
    /// A device behind PCI is found by its configuration space.
    fn nodes(&self, place: Place) -> Vec<Node> {
        mmio::nodes(place)
    }
    fn metrics(&self, view: View) -> Option<Value> {
        Some(Value::Object(self.metrics(view)))
    }
    fn pause(&mut self, stopped: Sender<()>) {
        self.pause(stopped);
    }
    fn resume(&mut self) {
        self.resume();
    }
}
