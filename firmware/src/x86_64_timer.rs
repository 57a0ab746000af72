//! The timer of the local APIC: once after a count, and at a deadline of the time stamp counter (Intel SDM 3A, 11.5.4).

use core::arch::asm;
use core::ptr::{read_volatile, write_volatile};

use super::{
    MSR_SPURIOUS, TIMER_VECTOR, enable_x2apic, features, keep_interrupts_out, let_interrupts_in, mask_pic,
    read_msr, ticks, timer_fired, write_msr,
};

const MSR_LVT_TIMER: u32 = 0x832;
const MSR_TIMER_INITIAL: u32 = 0x838;
const MSR_TIMER_CURRENT: u32 = 0x839;
const MSR_TIMER_DIVIDE: u32 = 0x83e;
const MSR_DEADLINE: u32 = 0x6e0;
/// The timer's mode in which it has a deadline, and the feature that says that there is one (leaf 1 of CPUID, ECX).
const BY_DEADLINE: u64 = 1 << 18;
const HAS_DEADLINE: u32 = 1 << 24;
/// The length of a nap: some 20 ms on the processors of today.
const NAP_TICKS: u64 = 40_000_000;

fn has_fired() -> bool {
    // SAFETY: the interrupt's handler writes this byte.
    unsafe { read_volatile(&raw const timer_fired) == 1 }
}

fn forget() {
    // SAFETY: the timer stands still: its handler does not run now.
    unsafe { write_volatile(&raw mut timer_fired, 0) };
}

fn halt_until_interrupted() {
    // SAFETY: as in `let_interrupts_in`. Between the first two, no interrupt comes.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

fn start(mode: u64) {
    mask_pic();
    enable_x2apic();
    write_msr(MSR_SPURIOUS, 0x1ff);
    write_msr(MSR_LVT_TIMER, mode | TIMER_VECTOR as u64);
}

/// Lets the local APIC's timer interrupt once while the CPU works and once while it halts.
pub fn wait_for_timer() -> Result<&'static str, &'static str> {
    const COUNT: u64 = 200_000;
    const GRACE: u32 = 100_000;
    start(0);
    write_msr(MSR_TIMER_DIVIDE, 0b1011);
    write_msr(MSR_TIMER_INITIAL, COUNT);
    let_interrupts_in();
    while !has_fired() && read_msr(MSR_TIMER_CURRENT) != 0 {}
    let came = (0..GRACE).any(|_| has_fired());
    keep_interrupts_out();
    if !came {
        return Err("none");
    }
    forget();
    write_msr(MSR_TIMER_INITIAL, COUNT);
    halt_until_interrupted();
    if has_fired() { Ok("local APIC, at work and from HLT") } else { Err("that HLT was left without it") }
}

/// Halts until a deadline of the time stamp counter, and returns the counter then.
pub fn nap() -> Result<u64, &'static str> {
    if features()[0] & HAS_DEADLINE == 0 {
        return Err("no timer with a deadline");
    }
    start(BY_DEADLINE);
    forget();
    let deadline = ticks() + NAP_TICKS;
    write_msr(MSR_DEADLINE, deadline);
    // Another interrupt ends a halt, too.
    while !has_fired() {
        halt_until_interrupted();
    }
    let woken = ticks();
    if woken >= deadline { Ok(woken) } else { Err("an interrupt before the deadline") }
}
