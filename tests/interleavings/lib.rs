//! The gate of the vCPUs, and the inbox by which a device's queues go to an io thread and come back, in every order in
//! which their threads can take turns: `loom` runs each case once for each of them, and finds a thread that nobody wakes,
//! and memory that two use at once. They are those of `src/vm/gate.rs` and `src/virtio/workers/inbox.rs`, compiled here
//! with loom's locks.

#![cfg(test)]
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod handover;

mod locks {
    pub use std::sync::PoisonError;

    pub use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    pub use loom::sync::{Condvar, Mutex, MutexGuard};
}

#[path = "../../src/vm/gate.rs"]
#[allow(dead_code, unreachable_pub)]
mod gate;

#[path = "../../src/virtio/workers/inbox.rs"]
#[allow(dead_code, unreachable_pub)]
mod inbox;

use gate::Gate;
use locks::{AtomicBool, AtomicU64, Mutex, Ordering};
use loom::sync::Arc;
use loom::thread;
use std::time::Duration;

/// A vCPU, as far as its thread and those that pause it have to do with each other (`src/vm/vcpu.rs`).
struct Vcpu {
    gate: Gate,
    /// The vCPU itself: how often it has entered the guest. Its thread has the lock while it runs.
    fd: Mutex<u64>,
    /// KVM's `immediate_exit`: while it is set, KVM_RUN returns at once. Exchanged, not stored: loom knows sequential
    /// consistency, by which the gate and this are in one order, of no plain store.
    immediate_exit: AtomicBool,
    /// The number of the vCPU's entries that ran guest code.
    ran: AtomicU64,
}

impl Vcpu {
    fn new() -> Arc<Self> {
        let (gate, fd) = (Gate::default(), Mutex::new(0));
        Arc::new(Self { gate, fd, immediate_exit: AtomicBool::new(false), ran: AtomicU64::new(0) })
    }

    /// The vCPU's thread, until the gate is gone.
    fn live(&self) {
        while self.gate.pass() {
            self.run();
        }
    }

    /// Runs until the gate closes. A guest that never leaves by itself: KVM_RUN returns when it is kicked, not before.
    fn run(&self) {
        let mut entries = self.fd.lock().unwrap();
        if !self.gate.is_open() {
            return;
        }
        self.immediate_exit.swap(false, Ordering::SeqCst);
        loop {
            if !self.gate.is_open() {
                self.immediate_exit.swap(true, Ordering::SeqCst);
            }
            *entries += 1;
            while !self.immediate_exit.swap(false, Ordering::SeqCst) {
                self.ran.fetch_add(1, Ordering::SeqCst);
                thread::yield_now();
            }
            if !self.gate.is_open() {
                return;
            }
        }
    }

    /// Pauses it, and looks at it.
    fn pause(&self) {
        self.gate.close();
        self.kick();
        let entries = self.fd.lock().unwrap();
        let ran = self.ran.load(Ordering::SeqCst);
        // Whoever has the lock may take his time.
        thread::yield_now();
        assert_eq!(ran, self.ran.load(Ordering::SeqCst), "it runs while it is paused ({} entries)", *entries);
    }

    fn end(&self) {
        self.gate.remove();
        self.kick();
    }

    fn kick(&self) {
        self.immediate_exit.swap(true, Ordering::SeqCst);
    }
}

#[test]
fn a_vcpu_is_paused_and_ended_in_every_order() {
    loom::model(|| {
        let vcpu = Vcpu::new();
        let running = vcpu.clone();
        let thread = thread::spawn(move || running.live());
        vcpu.gate.open();
        vcpu.pause();
        vcpu.end();
        thread.join().unwrap();
    });
}

/// Orders with so many changes of thread that no thread asked for: what needs more is not tried where three threads have
/// more orders than there is time for.
const PREEMPTIONS: usize = 2;

#[test]
fn a_pause_and_a_resume_by_two_threads_leave_no_vcpu_behind() {
    let mut bounded = loom::model::Builder::new();
    bounded.preemption_bound = Some(PREEMPTIONS);
    bounded.check(|| {
        let vcpu = Vcpu::new();
        let running = vcpu.clone();
        let thread = thread::spawn(move || running.live());
        let opener = vcpu.clone();
        let resumed = thread::spawn(move || opener.gate.open());
        // Whichever is last, the vCPU runs or waits, and ends.
        vcpu.gate.close();
        vcpu.kick();
        resumed.join().unwrap();
        vcpu.end();
        thread.join().unwrap();
    });
}

/// loom's clock stands still: a rest is over when somebody ends it, or never.
#[test]
fn a_vcpu_that_rests_goes_on_when_the_brake_or_the_gate_says_so() {
    const LONG: Duration = Duration::from_secs(100_000);
    for by_gate in [false, true] {
        loom::model(move || {
            let gate = Arc::new(Gate::default());
            gate.open();
            gate.have_rest(LONG);
            let resting = gate.clone();
            let thread = thread::spawn(move || resting.rest());
            match by_gate {
                true => gate.close(),
                false => gate.have_rest(Duration::ZERO),
            }
            thread.join().unwrap();
        });
    }
}
