//! What slows a guest down that writes to its memory faster than a disk takes it: its CPUs run for a moment, rest, and so
//! on. A guest sees that as a host with little CPU time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::gate::Gate;
use super::vcpu::Kicker;
use crate::error::{Context, Result};
use crate::poll;

/// For so long CPUs run at a time.
const RUN: Duration = Duration::from_millis(2);
/// For so long they rest between: at each step a guest has a half, a quarter, ... of the time, and at last a hundredth.
const RESTS_MS: [u64; 6] = [2, 6, 14, 30, 62, 198];

/// The CPUs of a machine, which are slowed down more and more, until this is dropped.
pub struct Brake {
    gate: Arc<Gate>,
    kickers: Vec<Kicker>,
    step: usize,
    /// What ends the thread that has the CPUs rest.
    is_over: Option<Arc<AtomicBool>>,
}

impl Brake {
    pub(super) fn new(gate: Arc<Gate>, kickers: Vec<Kicker>) -> Self {
        Self { gate, kickers, step: 0, is_over: None }
    }

    /// Slows the CPUs down by one more step, if there is one. Devices go on.
    ///
    /// # Errors
    /// The host gives no more threads.
    pub fn press(&mut self) -> Result<()> {
        let Some(rest) = RESTS_MS.get(self.step) else { return Ok(()) };
        self.step += 1;
        self.gate.have_rest(Duration::from_millis(*rest));
        if self.is_over.is_none() {
            let (gate, kickers) = (self.gate.clone(), self.kickers.clone());
            let is_over = Arc::new(AtomicBool::new(false));
            let until = is_over.clone();
            let beat = move || {
                poll::leave_signals_to_others();
                while !until.load(Ordering::SeqCst) {
                    // They come out of the guest, and rest by themselves.
                    kickers.iter().for_each(Kicker::kick);
                    std::thread::sleep(gate.rest_time() + RUN);
                }
            };
            let thread = std::thread::Builder::new().name("brake".to_owned()).spawn(beat);
            // It ends by itself, soon after it is told to: nobody waits for it.
            drop(thread.context("start the thread `brake`")?);
            self.is_over = Some(is_over);
        }
        Ok(())
    }

    /// How much of the time the CPUs rest, in percent.
    pub fn percent(&self) -> u64 {
        let rest = self.gate.rest_time().as_millis() as u64;
        100 * rest / (rest + RUN.as_millis() as u64)
    }
}

impl Drop for Brake {
    fn drop(&mut self) {
        if let Some(is_over) = &self.is_over {
            is_over.store(true, Ordering::SeqCst);
            self.gate.have_rest(Duration::ZERO);
        }
    }
}
