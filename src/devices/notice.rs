//! The interrupt by which a guest is told that registers have something for it to read.

use crate::error::{Context, Result};
use crate::vm::irq::Line;

/// An interrupt that comes while a kernel boots, and listens to no interrupt yet, is lost: the guest is told again, but a
/// guest that never listens is not interrupted for ever.
pub const REMINDERS: u8 = 60;

/// The interrupt, and how often more it comes for what the guest has not read.
pub struct Notice {
    interrupt: Line,
    reminders: u8,
    /// The name of the things that are told of, for errors.
    what: &'static str,
}

impl Notice {
    /// A guest that has nothing to read, and is told of `what` by `interrupt` when it has.
    pub fn new(interrupt: Line, what: &'static str) -> Self {
        Self { interrupt, reminders: 0, what }
    }

    /// Tells the guest that there is something to read.
    pub fn give(&mut self) -> Result<()> {
        self.reminders = REMINDERS;
        self.raise()
    }

    /// Tells the guest again, which has not read what there is; to be called now and then.
    pub fn repeat(&mut self) -> Result<()> {
        if self.reminders == 0 {
            return Ok(());
        }
        self.reminders -= 1;
        self.raise()
    }

    fn raise(&mut self) -> Result<()> {
        self.interrupt.raise().with_context(|| format!("tell the guest of its {}", self.what))
    }
}
