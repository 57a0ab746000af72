//! The case of CPUs that come and go, aarch64: the guest switches CPUs on and off as it is told by what is typed, and says what
//! PSCI answers. It does not end by itself.
//! - A digit: the CPU with this number is to be switched on, and to stay so.
//! - `o`: the CPUs that stay on switch themselves off.
//! - `s`: the first two CPUs both switch on the third one, again and again.
//! - `b`: the third CPU is to begin where there is nothing.

use core::hint;

use crate::arch;
use crate::console::{self, say};
use crate::machine::Machine;
use crate::words::Words;

/// The order to the CPUs that stay on.
static mut ORDER: u32 = STAY;
const STAY: u32 = 0;
const SWITCH_OFF: u32 = 1;
const STORM: u32 = 2;

/// How many CPUs that stay on have begun, and what the second CPU found in a storm.
static mut STAYING: u32 = 0;
static mut FOUND: u32 = NOTHING;
const NOTHING: u32 = u32::MAX;
const STRANGE: u32 = u32::MAX - 1;

/// How often each of two CPUs tries to switch on the same one.
const TRIES: u32 = 1000;
const THIRD: u64 = 2;
const ALREADY_ON: i64 = -4;

pub fn serve(_: &Machine, _: &Words) -> bool {
    loop {
        match console::receive() {
            Some(digit @ b'0'..=b'9') => switch_on((digit - b'0').into()),
            Some(b'o') => {
                set(&raw mut ORDER, SWITCH_OFF);
                (1..=THIRD).for_each(await_off);
                set(&raw mut ORDER, STAY);
                say!("the others are off\n");
            }
            Some(b's') => say!("storm: ", storm(), "\n"),
            Some(b'b') => say!("CPU 2 begins nowhere: ", answer(arch::switch_on_nowhere(THIRD)), "\n"),
            _ => hint::spin_loop(),
        }
    }
}

/// The work of a CPU that stays on.
pub fn stay() {
    set(&raw mut STAYING, get(&raw const STAYING) + 1);
    while get(&raw const ORDER) != SWITCH_OFF {
        if get(&raw const ORDER) == STORM && get(&raw const FOUND) == NOTHING {
            set(&raw mut FOUND, try_again_and_again());
        }
    }
}

fn switch_on(number: u64) {
    let before = get(&raw const STAYING);
    let code = arch::switch_on_to_stay(number);
    while code == 0 && get(&raw const STAYING) == before {}
    say!("CPU ", number, ": ", answer(code), "\n");
}

fn answer(code: i64) -> &'static str {
    match code {
        0 => "on",
        -2 => "no such CPU",
        -3 => "denied",
        ALREADY_ON => "already on",
        _ => "strange",
    }
}

/// Each time that the third CPU was switched on, the CPU has begun once.
fn storm() -> &'static str {
    let before = arch::begun();
    set(&raw mut FOUND, NOTHING);
    set(&raw mut ORDER, STORM);
    let mine = try_again_and_again();
    while get(&raw const FOUND) == NOTHING {}
    set(&raw mut ORDER, STAY);
    await_off(THIRD);
    let others = get(&raw const FOUND);
    match (mine, others) {
        (STRANGE, _) | (_, STRANGE) => "a strange answer",
        _ if mine + others != arch::begun() - before => "not as often as it was switched on",
        _ => "ok",
    }
}

/// How often the third CPU was switched on.
fn try_again_and_again() -> u32 {
    let mut count = 0;
    for _ in 0..TRIES {
        match arch::switch_on(THIRD) {
            0 => count += 1,
            ALREADY_ON => {}
            _ => return STRANGE,
        }
    }
    count
}

fn await_off(number: u64) {
    while !arch::is_off(number) {}
}

fn get(word: *const u32) -> u32 {
    arch::read32(word as u64)
}

fn set(word: *mut u32, value: u32) {
    arch::write32(word as u64, value);
}
