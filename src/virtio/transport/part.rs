//! A device behind any transport as a part of its machine.

use std::sync::mpsc::Sender;

use serde_json::Value;

use super::Transport;
use crate::metrics::View;
use crate::part::Component;

impl Component for Transport {
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
