//! The case of CPUs that come and go: the guest starts the second one before it has been given it, starts those that come,
//! and lets go those that it is asked for, and each that it is not. It does not end by itself.

use crate::arch;
use crate::console::say;
use crate::machine::Machine;
use crate::words::Words;

/// The port of the register of news (x86_64).
const NEWS: u16 = 0x640;
const IS_LEAVING: u32 = 1 << 16;
const NOTHING: u32 = u32::MAX;
/// How long a CPU is waited for that should not start.
const SHORT: u32 = 500_000;

pub fn serve(_: &Machine, _: &Words) -> bool {
    say!("CPU 1 ", if arch::start_cpu(1, SHORT) { "starts" } else { "does not start" }, "\n");
    let_go(1);
    loop {
        let news = arch::read_port32(NEWS);
        let number = news & !IS_LEAVING;
        if news == NOTHING {
            continue;
        }
        if news & IS_LEAVING == 0 {
            let has_started = arch::start_cpu(number, arch::CPU_PATIENCE);
            let_go(number);
            say!("CPU ", number, if has_started { " has come\n" } else { " does not start\n" });
            continue;
        }
        arch::write_port32(NEWS, number);
        // The CPU is stopped a moment later.
        while arch::start_cpu(number, SHORT) {}
        say!("CPU ", number, " has gone\n");
    }
}

/// Lets CPUs go that the guest was not asked for.
fn let_go(number: u32) {
    [0, number, 511, 512, u32::MAX].into_iter().for_each(|number| arch::write_port32(NEWS, number));
}
