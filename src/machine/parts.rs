//! The parts of a machine, and what is done with all of them, in the order in which they were built.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use serde_json::{Map, Value};

use crate::arch;
use crate::error::{Context, Error, Result};
use crate::metrics::{View, add_up};
use crate::part::{Component, Part};
use crate::platform::{Node, Place};

/// Where the parts of a machine are, by their names.
pub type Places = BTreeMap<String, Place>;

/// A machine's list of parts. When the list is dropped, its parts are dropped in their order.
#[derive(Default)]
pub struct Parts(pub Vec<Part>);

impl Parts {
    /// The part of this name.
    pub fn get(&self, name: &str) -> Result<&Part> {
        let part = self.0.iter().find(|part| part.name == name);
        part.ok_or_else(|| Error::config(format!("there is no {name}")))
    }

    /// Has `act` done with the part of this name, which is a `C`; None: this machine has no such part.
    pub fn with<C: Component, R>(&self, name: &str, act: impl FnOnce(&mut C) -> R) -> Option<R> {
        self.get(name).ok()?.with(act)
    }

    /// Where the parts are.
    pub fn places(&self) -> Places {
        self.0.iter().map(|part| (part.name.clone(), part.place)).collect()
    }

    /// An error if a part is elsewhere than `places` says.
    pub fn check_places(&self, places: &Places) -> Result<()> {
        for Part { name, place, .. } in &self.0 {
            if let Some(other) = places.get(name)
                && other != place
            {
                return Err(Error::config(format!(
                    "{name} was at {other}, and is at {place} in this version"
                )));
            }
        }
        Ok(())
    }

    /// Gives guest memory what the parts have there when the guest starts.
    pub fn begin(&self) -> Result<()> {
        self.0.iter().try_for_each(|part| part.lock().begin().with_context(|| format!("begin {}", part.name)))
    }

    /// Stops all parts, which then touch neither guest memory nor interrupts. That takes as long as what they have in
    /// flight, but no longer than `time`: then all are to go on ([`Self::resume`]).
    ///
    /// # Errors
    /// These parts have not stopped in that time.
    pub fn pause(&self, time: Duration) -> Result<()> {
        if begin_pause(&self.0).wait_for(time) {
            return Ok(());
        }
        let is_busy = |part: &&Part| !begin_pause(std::slice::from_ref(part)).wait_for(Duration::ZERO);
        let busy: Vec<_> = self.0.iter().filter(is_busy).map(|part| part.name.as_str()).collect();
        match busy.is_empty() {
            true => Ok(()),
            false => Err(Error::host(format!(
                "what is in flight at {} has not ended in {} s: the host does not answer it, so the guest goes on: \
                 look after that host's file or network, and try again",
                busy.join(", "),
                time.as_secs()
            ))),
        }
    }

    /// Lets all parts go on, but not those of these names.
    pub fn resume(&self, but: &[String]) {
        let resumed = self.0.iter().filter(|part| !but.contains(&part.name));
        resumed.for_each(|part| part.lock().resume());
    }

    /// What the boot tables of this architecture say of the parts.
    pub fn nodes(&self) -> Vec<Node> {
        // Few parts have more than one.
        let mut all = Vec::with_capacity(self.0.len() + 4);
        for part in &self.0 {
            all.extend(part.lock().nodes(part.place).into_iter().filter(arch::prints));
        }
        all
    }

    /// Adds what the parts count to `all`, by the names of their groups.
    pub fn metrics(&self, view: View, all: &mut Map<String, Value>) {
        for part in self.0.iter().filter(|part| !part.metrics.is_empty()) {
            let Some(counted) = part.lock().metrics(view) else { continue };
            part.metrics.iter().for_each(|group| add(all, group, &counted));
        }
    }
}

/// Parts that were told to stop. Once they have stopped, they touch neither guest memory nor interrupts.
#[must_use = "the parts may still be at work"]
pub struct Pausing(Receiver<()>);

impl Pausing {
    /// Returns when the parts have stopped.
    pub fn wait(self) {
        // An error: the last of the parts has dropped its sender.
        let _ = self.0.recv();
    }

    /// The same, but not for longer than `time`: whether the parts have stopped.
    pub fn wait_for(&self, time: Duration) -> bool {
        self.0.recv_timeout(time) == Err(RecvTimeoutError::Disconnected)
    }
}

/// Tells these parts to stop.
pub fn begin_pause(parts: &[Part]) -> Pausing {
    let (sender, stopped) = channel();
    for part in parts {
        part.lock().pause(sender.clone());
    }
    Pausing(stopped)
}

/// Returns when these parts have stopped.
pub fn pause(parts: &[Part]) {
    begin_pause(parts).wait();
}

/// Adds what one part counts to what all parts of a group count.
pub fn add(all: &mut Map<String, Value>, group: &str, counted: &Value) {
    let sum = all.entry(group).or_insert_with(|| Value::Object(Map::new()));
    if let (Value::Object(sum), Value::Object(counted)) = (sum, counted) {
        add_up(sum, counted);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::snapshot::SaveState;

    macro_rules! stateless {
        ($part:ty) => {
            impl SaveState for $part {
                fn save_state(&self) -> Result<Vec<u8>> {
                    Ok(Vec::new())
                }
                fn restore_state(&mut self, _: &[u8]) -> Result<()> {
                    Ok(())
                }
            }
        };
    }

    /// A part that has stopped when its host lets it.
    #[derive(Default)]
    struct Slow(Vec<std::sync::mpsc::Sender<()>>);

    stateless!(Slow);

    impl Component for Slow {
        fn pause(&mut self, stopped: std::sync::mpsc::Sender<()>) {
            self.0.push(stopped);
        }

        fn resume(&mut self) {
            self.0.clear();
        }
    }

    /// A part that stops at once.
    struct Quick;

    stateless!(Quick);

    impl Component for Quick {}

    #[test]
    fn parts_that_do_not_stop_in_time_are_named() {
        let part = |name: &str, component: Arc<Mutex<dyn Component>>| Part {
            name: name.to_owned(),
            place: Place::Pci(3),
            metrics: Vec::new(),
            component,
        };
        let parts = Parts(vec![
            part("disk `a`", Arc::new(Mutex::new(Slow::default()))),
            part("disk `b`", Arc::new(Mutex::new(Quick))),
            part("disk `c`", Arc::new(Mutex::new(Slow::default()))),
        ]);
        let error = parts.pause(Duration::from_millis(1)).unwrap_err().to_string();
        assert!(error.starts_with("what is in flight at disk `a`, disk `c` has not ended"), "{error}");
        // One stops while the others are waited for.
        let release = |index: usize| parts.0[index].lock().resume();
        release(0);
        let error = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| parts.pause(Duration::from_millis(50)));
            waiting.join().unwrap().unwrap_err().to_string()
        });
        assert!(error.contains("disk `a`, disk `c`"), "{error}");
        release(0);
        release(2);
        assert!(Parts(parts.0.into_iter().skip(1).take(1).collect()).pause(Duration::from_secs(100)).is_ok());
    }
}
