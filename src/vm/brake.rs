//! The brake for a guest that writes to its memory faster than a disk takes it: its CPUs run for a moment, rest, and so
//! on. A guest sees that as a host with little CPU time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Thread;
use std::time::Duration;

use super::gate::Gate;
use super::vcpu::Kicker;
use crate::error::{Context, Result};
use crate::poll;

/// The time for which CPUs run between two rests.
const RUN: Duration = Duration::from_millis(2);
/// The time for which CPUs rest, at each step: a guest has a half, a quarter, ... of the time, and at last a hundredth.
const RESTS_MS: [u64; 6] = [2, 6, 14, 30, 62, 198];

/// The CPUs of a machine, which are slowed down more and more, until this is dropped. Its owner may be a thread that
/// can start no other: the thread that has the CPUs rest is there from the beginning, and sleeps.
pub struct Brake {
    gate: Arc<Gate>,
    step: usize,
    /// Whether the brake's thread is to end, which it does by itself and soon: nobody waits for it.
    is_over: Arc<AtomicBool>,
    thread: Thread,
}

impl Brake {
    pub(super) fn new(gate: Arc<Gate>, kickers: Vec<Kicker>) -> Result<Self> {
        let is_over = Arc::new(AtomicBool::new(false));
        let (until, rests) = (is_over.clone(), gate.clone());
        let beat = move || {
            poll::leave_signals_to_others();
            while !until.load(Ordering::SeqCst) {
                match rests.rest_time() {
                    Duration::ZERO => std::thread::park(),
                    rest => {
                        // CPUs that are kicked come out of the guest, and rest by themselves.
                        kickers.iter().for_each(Kicker::kick);
                        std::thread::sleep(rest + RUN);
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("brake".to_owned()).spawn(beat);
        let thread = thread.context("start the thread `brake`")?.thread().clone();
        Ok(Self { gate, step: 0, is_over, thread })
    }

    /// Slows the CPUs down by one more step, if there is one. Devices go on.
    pub fn press(&mut self) {
        let Some(rest) = RESTS_MS.get(self.step) else { return };
        self.step += 1;
        self.gate.have_rest(Duration::from_millis(*rest));
        self.thread.unpark();
    }

    /// How much of the time the CPUs rest, in percent.
    pub fn percent(&self) -> u64 {
        let rest = self.gate.rest_time().as_millis() as u64;
        100 * rest / (rest + RUN.as_millis() as u64)
    }
}

impl Drop for Brake {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        self.gate.have_rest(Duration::ZERO);
        self.thread.unpark();
    }
}
