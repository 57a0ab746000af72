//! A part of a machine: its name, its place, and what is done with every part alike.
//!
//! A machine is a list of parts, in the order in which they are built. Devices at fixed places and devices
//! that a configuration lists are parts of one kind: whatever goes through a machine goes through that list.

use std::any::Any;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;

use crate::error::Result;
use crate::metrics::View;
use crate::platform::{Node, Place};
use crate::snapshot::SaveState;

/// What a part consists of, as its machine sees it. The defaults are those of a component that boot
/// tables do not name, that counts nothing, and that does nothing between two accesses of the guest. What the
/// guest can change of a component is its state, which every component saves while it is paused, and takes
/// back before the guest runs ([`Snapshot`](crate::snapshot::Snapshot)).
pub trait Component: Any + SaveState + Send {
    /// What boot tables say of the component when it is at `place`.
    fn nodes(&self, _place: Place) -> Vec<Node> {
        Vec::new()
    }
    /// Gives guest memory what the component has there when the guest starts, behind all that a load writes; a
    /// restore does the same by itself.
    fn begin(&mut self) -> Result<()> {
        Ok(())
    }
    /// What the component counts.
    fn metrics(&self, _view: View) -> Option<Value> {
        None
    }
    /// Stops the component until `resume`. The component drops `stopped` once it touches neither guest memory
    /// nor interrupts any more.
    fn pause(&mut self, _stopped: Sender<()>) {}
    /// Lets the component go on.
    fn resume(&mut self) {}
}

/// A part of a machine.
pub struct Part {
    /// What log lines and errors call the part: there is one of this name in a machine.
    pub name: String,
    /// Where the guest finds the part.
    pub place: Place,
    /// The groups of the machine's metrics that what the part counts is added to.
    pub metrics: Vec<String>,
    /// The part itself, shared with the bus that it is on.
    pub component: Arc<Mutex<dyn Component>>,
}

impl Part {
    /// The component, which nobody else uses meanwhile.
    pub fn lock(&self) -> MutexGuard<'_, dyn Component> {
        self.component.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `act` done with the component if it is a `C`; None: it is something else.
    pub fn with<C: Component, R>(&self, act: impl FnOnce(&mut C) -> R) -> Option<R> {
        let component: &mut dyn Any = &mut *self.lock();
        component.downcast_mut().map(act)
    }
}
