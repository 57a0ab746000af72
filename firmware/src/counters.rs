//! The case of two CPUs that read their counters in turns: what one has read, the other, which reads later, must not read
//! less. For as long as a test wants, which saves and restores the guest meanwhile.

use core::ptr::{read_volatile, write_volatile};

use crate::arch;
use crate::console::{self, say};
use crate::machine::Machine;
use crate::virtio::wait_for;
use crate::words::Words;

/// The number of times that both CPUs read before a byte that was typed is answered.
const TURNS: u32 = 16;

const NOBODY: u64 = 0;
const FIRST: u64 = 1;
const SECOND: u64 = 2;
/// The CPU whose turn it is, which alone writes these three until it gives the turn to the other one: [`NOBODY`] where
/// this case does not run.
static mut TURN: u64 = NOBODY;
/// The counter that was read last, and by how much the one before was larger at worst.
static mut COUNTER: u64 = 0;
static mut BACK: u64 = 0;

fn turn() -> u64 {
    // SAFETY: the word is written by whoever has the turn, in one piece.
    unsafe { read_volatile(&raw const TURN) }
}

fn give_turn(to: u64) {
    arch::full_barrier();
    // SAFETY: this CPU has the turn.
    unsafe { write_volatile(&raw mut TURN, to) };
}

/// Reads this CPU's counter after the one that the other CPU has read.
fn read() {
    arch::full_barrier();
    // SAFETY: this CPU has the turn.
    unsafe {
        let before = read_volatile(&raw const COUNTER);
        let now = arch::ticks_in_order();
        let back = before.saturating_sub(now).max(read_volatile(&raw const BACK));
        write_volatile(&raw mut BACK, back);
        write_volatile(&raw mut COUNTER, now);
    }
}

/// Has a secondary CPU do its part of the case, until the first one wants no more; nothing where the case does not run.
pub fn take_part() {
    while turn() != NOBODY {
        if turn() == SECOND {
            read();
            give_turn(FIRST);
        }
        core::hint::spin_loop();
    }
}

pub fn counters(machine: &Machine, _: &Words) -> bool {
    give_turn(FIRST);
    if !machine.other_cpus().next().is_some_and(|id| arch::start_cpu(id, arch::CPU_PATIENCE)) {
        say!("expected another CPU that starts, found none");
        return false;
    }
    // The word is a line of its own, for a test that reads lines.
    say!("counting\n");
    let (mut turns, mut answer_at) = (0u32, None);
    loop {
        read();
        turns += 1;
        match console::receive() {
            Some(b'\n' | b'\r') => break,
            Some(_) => answer_at = Some(turns + TURNS),
            None => {}
        }
        if answer_at.is_some_and(|at| turns >= at) {
            answer_at = None;
            say!("counted\n");
        }
        give_turn(SECOND);
        if !wait_for(|| turn() == FIRST) {
            say!("expected the other CPU to take its turn, found it silent");
            return false;
        }
    }
    give_turn(NOBODY);
    // SAFETY: the other CPU is done.
    let back = unsafe { read_volatile(&raw const BACK) };
    if back > 0 {
        say!("expected counters that go on from CPU to CPU, found one back by ", back);
        return false;
    }
    say!("ok (", turns, " turns)");
    true
}
