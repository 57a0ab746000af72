//! The virtual timer: after a time, and at a value of its counter (Arm ARM, D12.2).

use core::arch::asm;

use super::{TIMER_INTERRUPT, enable_timer_interrupt, gic_v2, read32, timer_fired, write32};

fn has_fired() -> bool {
    read32((&raw const timer_fired) as u64) == TIMER_INTERRUPT
}

fn forget() {
    write32((&raw const timer_fired) as u64, 0);
}

/// Waits for an interrupt, and takes it: WFI ends when one is pending, let in or not.
fn wait_until_interrupted() {
    // SAFETY: what can interrupt is the timer, whose handler changes `timer_fired` alone.
    unsafe { asm!("wfi", "msr daifclr, #2", "isb", "msr daifset, #2") };
}

fn arm_timer(ticks: u64) {
    // SAFETY: the timer is this CPU's own; its interrupt comes by the vectors.
    unsafe { asm!("msr cntv_tval_el0, {}", "msr cntv_ctl_el0, {}", "isb", in(reg) ticks, in(reg) 1u64) };
}

/// Lets the virtual timer interrupt once while the CPU works and once while it waits.
pub fn wait_for_timer() -> Result<&'static str, &'static str> {
    const TICKS: u64 = 10_000;
    const PATIENCE: u32 = 200_000_000;
    enable_timer_interrupt();
    arm_timer(TICKS);
    // SAFETY: what can interrupt is the timer, whose handler changes `timer_fired` alone.
    unsafe { asm!("msr daifclr, #2") };
    let came = (0..PATIENCE).any(|_| has_fired());
    // SAFETY: it only keeps interrupts out.
    unsafe { asm!("msr daifset, #2") };
    if !came {
        return Err("none");
    }
    forget();
    arm_timer(TICKS);
    wait_until_interrupted();
    match (has_fired(), gic_v2()) {
        (false, _) => Err("that WFI was left without it"),
        (true, 0) => Ok("virtual timer by GICv3, at work and from WFI"),
        (true, _) => Ok("virtual timer by GICv2, at work and from WFI"),
    }
}

/// Waits until some 20 ms have passed, and returns the counter then.
pub fn nap() -> Result<u64, &'static str> {
    let counter = || {
        let count: u64;
        // SAFETY: the register can be read here, and nothing changes.
        unsafe { asm!("isb", "mrs {}, cntvct_el0", out(reg) count) };
        count
    };
    let frequency: u64;
    // SAFETY: as above.
    unsafe { asm!("mrs {}, cntfrq_el0", out(reg) frequency) };
    enable_timer_interrupt();
    forget();
    let deadline = counter() + frequency / 50;
    // SAFETY: as in `arm_timer`.
    unsafe { asm!("msr cntv_cval_el0, {}", "msr cntv_ctl_el0, {}", "isb", in(reg) deadline, in(reg) 1u64) };
    while !has_fired() {
        wait_until_interrupted();
    }
    let woken = counter();
    if woken >= deadline { Ok(woken) } else { Err("an interrupt before the deadline") }
}
