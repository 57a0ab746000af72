//! A bare-metal guest that looks at the machine it finds itself in: a table of cases, each of which
//! prints `ok` or what was expected and what was found. The exit code is the number of failed cases.
//!
//! Its command line says what to expect and what to do (`src/firmware.rs` refuses other words):
//! - `cpus=N`, `memory=MIB`: what the machine was given.
//! - `case=NAME,NAME`: only these cases. `block` and `pmem` write to what they look at where they are named, and else
//!   only read: without this word, nothing that the guest was given is changed.
//! - `hello`: print one line at once and idle: what start-up benches wait for.
//! - `answer`: print one line at once, send back the next byte that is typed, and idle: what benches of restores wait for.
//! - `flood`: print without end.
//! - `booted`: tell the boot timer.
//! - `bench`: put the devices under the loads that are typed (bench.rs).
//! - `echo`: before the cases, send back what is typed until a line ends.
//! - `work=MIB`: before the cases, write so much memory again and again, until a line ends (work.rs).
//! - `touch=MIB`: before the cases, fill so much memory, and look at one page of 64 when a byte is typed, before
//!   it is sent back (work.rs): what benches of restores from a disk wait for.
//! - `end=poweroff|reset|halt|crash|fail|idle|spin|N`: how to end, instead of by the number of failed cases.

#![no_std]
#![no_main]

mod bench;
mod cases;
mod compare;
mod console;
mod counters;
mod devices;
mod hostile;
mod hostile_net;
mod hotplug;
mod machine;
mod pmem;
mod sleep;
mod slots;
mod virtio;
mod vsock;
mod watchdog;
mod words;
mod work;

#[cfg(target_arch = "x86_64")]
mod acpi;
#[cfg(target_arch = "x86_64")]
mod cpu_slots;
#[cfg(target_arch = "aarch64")]
#[path = "cpu_power.rs"]
mod cpu_slots;
#[cfg(target_arch = "aarch64")]
mod fdt;

#[cfg(target_arch = "aarch64")]
#[path = "aarch64.rs"]
mod arch;
#[cfg(target_arch = "x86_64")]
#[path = "x86_64.rs"]
mod arch;

use console::say;
use machine::Machine;

/// What a panic of the firmware itself ends with.
const PANIC: u32 = 100;

/// Called by the architecture's entry code on the first CPU; `read_tables` finds out about the machine from what is at
/// the address `tables`.
fn start(command_line: &'static [u8], read_tables: fn(u64) -> Machine, tables: u64) -> ! {
    let words = words::Words(command_line);
    if words.has("hello") {
        say!("A\n");
        arch::idle();
    }
    if words.has("answer") {
        say!("A\n");
        console::send(next_byte());
        arch::idle();
    }
    while words.has("flood") {
        say!("flood\n");
    }
    examine(&words, read_tables, tables)
}

/// Does all that takes the machine to be known. In a frame of its own: one that is to say a line and no more needs little
/// of the stack, for which no page is touched.
#[inline(never)]
fn examine(words: &words::Words, read_tables: fn(u64) -> Machine, tables: u64) -> ! {
    let mut machine = read_tables(tables);
    machine.first_id = machine.id();
    let machine = &machine;
    arch::catch_exceptions();
    // Before it says anything: who reads that may save the guest at once.
    if cases::is_chosen(words, b"identity") {
        arch::expect_identity();
    }
    say!("alula firmware: ", arch::NAME, ", ", machine.protocol, "\n");
    if words.has("booted") {
        arch::write8(arch::BOOT_TIMER, 123);
    }
    if words.has("echo") {
        echo();
    }
    if let Some(mib) = words.value("work").and_then(words::number)
        && !work::work(machine, mib)
    {
        arch::exit(1);
    }
    if let Some(mib) = words.value("touch").and_then(words::number)
        && !work::touch(machine, mib)
    {
        arch::exit(1);
    }
    if words.has("bench") {
        bench::serve(machine);
        arch::exit(0);
    }
    let failed = cases::run(machine, words);
    match words.value("end") {
        None => arch::exit(failed),
        Some(b"poweroff") => arch::power_off(),
        Some(b"reset") => arch::reset(),
        Some(b"halt") => arch::halt(),
        Some(b"crash") => arch::crash(),
        Some(b"fail") => arch::fail(),
        Some(b"idle") => arch::idle(),
        Some(b"spin") => loop {
            core::hint::spin_loop();
        },
        Some(code) => arch::exit(words::number(code).unwrap_or(PANIC.into()) as u32),
    }
}

/// Sends back what is typed, until a line ends.
fn echo() {
    loop {
        let byte = next_byte();
        console::send(byte);
        if byte == b'\n' || byte == b'\r' {
            return;
        }
    }
}

/// Waits until a byte is typed.
fn next_byte() -> u8 {
    loop {
        if let Some(byte) = console::receive() {
            return byte;
        }
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    say!("the firmware panicked\n");
    arch::exit(PANIC)
}

/// The standard library's `core` was built for unwinding and names this; nothing calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
