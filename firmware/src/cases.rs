//! The table of cases.

use crate::arch;
use crate::console::{self, Hex, say};
use crate::counters;
use crate::cpu_slots;
use crate::devices;
use crate::hostile;
use crate::hostile_net;
use crate::hotplug;
use crate::machine::Machine;
use crate::pmem;
use crate::sleep;
use crate::slots;
use crate::virtio::{self, Device};
use crate::vsock;
use crate::watchdog;
use crate::words::{Words, number};

/// A case prints what it found in parentheses, or what was expected and what was found.
type Case = fn(&Machine, &Words) -> bool;

const CASES: [(&str, Case); 8] = [
    ("memory", memory),
    ("tables", tables),
    ("cpus", cpus),
    ("timer", timer),
    ("serial", serial),
    ("exit-register", exit_register),
    ("nobody-there", nobody_there),
    ("identity", identity),
];

/// Cases for a virtio device of a type: run where there is one, and where they are asked for by name.
const DEVICE_CASES: [(&str, u32, Case); 6] = [
    ("block", 2, devices::block),
    ("net", 1, devices::net),
    ("entropy", 4, devices::entropy),
    ("vsock", 19, vsock::vsock),
    ("balloon", 5, devices::balloon),
    ("pmem", 27, pmem::pmem),
];

/// Cases that run only where they are asked for by name.
const CHOSEN_CASES: [(&str, Case); 16] = [
    ("hostile", hostile::run),
    ("hostile-net", hostile_net::run),
    ("pvpanic", pvpanic),
    ("refused", refused),
    ("features", features),
    ("vsock-restored", vsock::restored),
    ("net-restored", devices::net_restored),
    ("hotplug", hotplug::hotplug),
    ("slots", slots::polite),
    ("slots-deaf", slots::deaf),
    ("slots-hostile", slots::hostile),
    ("slots-busy", slots::busy),
    ("watchdog", watchdog::watchdog),
    ("cpu-slots", cpu_slots::serve),
    ("sleep", sleep::sleep),
    ("counters", counters::counters),
];

/// Whether the command line asks for this case by its name.
pub fn is_chosen(words: &Words, name: &[u8]) -> bool {
    words.value("case").is_some_and(|chosen| chosen.split(|byte| *byte == b',').any(|word| word == name))
}

/// Runs the cases that the command line names, or all but the chosen ones; returns how many failed.
pub fn run(machine: &Machine, words: &Words) -> u32 {
    let (mut ran, mut failed) = (0u32, 0u32);
    let chosen = words.value("case");
    let is_wanted = |kind: u32| chosen.is_some() || Device::find(kind).is_some();
    let devices = DEVICE_CASES.into_iter().filter(|(_, kind, _)| is_wanted(*kind));
    let messages = [("messages", messages as Case)].into_iter().filter(|_| machine.message_frame.is_some());
    let chosen_only = CHOSEN_CASES.into_iter().filter(|_| chosen.is_some());
    let alone = |(name, case)| (name, None, case);
    let all = CASES.into_iter().chain(messages).map(alone);
    let all = all.chain(devices.map(|(name, kind, case)| (name, Some(kind), case)));
    for (name, device, case) in all.chain(chosen_only.map(alone)) {
        if chosen.is_some() && !is_chosen(words, name.as_bytes()) {
            continue;
        }
        say!(name, ": ");
        ran += 1;
        virtio::forget_rings();
        let passed = case(machine, words);
        // A device that is not reset would go on to look at rings whose memory the next case uses.
        let is_reset = device.and_then(Device::find).is_none_or(Device::reset);
        if passed && !is_reset {
            say!(", expected the device to be reset in the end, found it running");
        }
        if passed && is_reset {
            say!("\n");
        } else {
            failed += 1;
            say!(": FAILED\n");
        }
    }
    if ran == 0 {
        say!("there is no such case\n");
        return 1;
    }
    say!(ran, " cases, ", failed, " failed\n");
    failed
}

/// Memory is as large as said, and its last byte in every range can be written and read.
fn memory(machine: &Machine, words: &Words) -> bool {
    let mut total = 0;
    for (start, size) in machine.memory() {
        total += size;
        let last = start + size - 8;
        if !arch::is_writable(last) {
            say!("expected memory at ", Hex(last), ", found none");
            return false;
        }
    }
    // The first MiB has holes on PCs: what a memory map leaves out there is not missing.
    let found = total.div_ceil(1 << 20);
    if let Some(expected) = words.value("memory").and_then(number)
        && expected != found
    {
        say!("expected ", expected, " MiB, found ", found);
        return false;
    }
    say!("ok (", found, " MiB:");
    for (start, size) in machine.memory() {
        say!(" ", Hex(*start), "-", Hex(start + size - 1));
    }
    say!(")");
    true
}

/// The boot tables are whole and list as many CPUs as said.
fn tables(machine: &Machine, words: &Words) -> bool {
    if let Some(fault) = machine.fault {
        say!("expected sound ", machine.tables, ", found: ", fault);
        return false;
    }
    if let Some(expected) = words.value("cpus").and_then(number)
        && expected != machine.cpus
    {
        say!("expected ", expected, " CPUs listed, found ", machine.cpus);
        return false;
    }
    say!("ok (", machine.tables, ", ", machine.cpus, if machine.cpus == 1 { " CPU)" } else { " CPUs)" });
    true
}

/// Every CPU listed comes up and says who it is.
fn cpus(machine: &Machine, _: &Words) -> bool {
    let started =
        1 + machine.other_cpus().filter(|id| arch::start_cpu(*id, arch::CPU_PATIENCE)).count() as u64;
    if started != machine.cpus {
        say!("expected ", machine.cpus, " CPUs to start, found ", started);
        return false;
    }
    say!("ok (", started, " started)");
    true
}

/// The timer's interrupt wakes the CPU.
fn timer(_: &Machine, _: &Words) -> bool {
    match arch::wait_for_timer() {
        Ok(how) => say!("ok (", how, ")"),
        Err(found) => {
            say!("expected an interrupt, found ", found);
            return false;
        }
    }
    true
}

/// A frame for interrupt messages (aarch64 with a GICv2) raises the interrupts it has.
fn messages(machine: &Machine, _: &Words) -> bool {
    match machine.message_frame.map_or(Err("no frame"), arch::write_messages) {
        Ok(()) => say!("ok"),
        Err(found) => {
            say!("expected interrupts by messages, found ", found);
            return false;
        }
    }
    true
}

/// In loopback, the UART sends every byte back.
fn serial(_: &Machine, _: &Words) -> bool {
    console::set_loopback(true);
    // Bytes that somebody has typed before are not for this case; in loopback no more of them come.
    const FIFO: u8 = 64;
    (0..FIFO).take_while(|_| console::receive().is_some()).for_each(drop);
    let mut wrong = None;
    for byte in [0x00, 0x55, 0xaa, 0xff] {
        console::send(byte);
        let found = console::receive();
        if found != Some(byte) {
            wrong = Some((byte, found));
            break;
        }
    }
    console::set_loopback(false);
    match wrong {
        None => say!("ok (4 bytes echoed)"),
        Some((expected, Some(found))) => {
            say!("expected ", Hex(expected.into()), ", found ", Hex(found.into()))
        }
        Some((expected, None)) => say!("expected ", Hex(expected.into()), ", found nothing"),
    }
    wrong.is_none()
}

/// The monitor is told of a panic, and the guest goes on.
fn pvpanic(_: &Machine, _: &Words) -> bool {
    const PANICKED_OR_CRASH_LOADED: u8 = 3;
    let found = arch::read_pvpanic();
    if found != PANICKED_OR_CRASH_LOADED {
        say!("expected events ", Hex(PANICKED_OR_CRASH_LOADED.into()), ", found ", Hex(found.into()));
        return false;
    }
    arch::write_pvpanic(1);
    arch::write_pvpanic(2);
    say!("ok");
    true
}

/// The case for instructions that KVM cannot carry out: each raises an exception, and the guest goes on. (A KVM
/// that emulates all code of kernels ends the guest.)
fn refused(_: &Machine, _: &Words) -> bool {
    match arch::be_refused() {
        Ok(count) => say!("ok (", count, " exceptions)"),
        Err(what) => {
            say!("expected an exception, found none of the right kind for ", what);
            return false;
        }
    }
    true
}

/// The guest tells how its CPU was configured, for who changed it: a register that only an operating system would use,
/// and the CPU's features (x86_64: leaf 1 of CPUID, in ECX and EDX; aarch64 has no such leaf).
fn features(_: &Machine, _: &Words) -> bool {
    let [ecx, edx] = arch::features();
    say!(
        "ok (register ",
        Hex(arch::unused_register()),
        ", ecx ",
        Hex(ecx.into()),
        ", edx ",
        Hex(edx.into()),
        ")"
    );
    true
}

/// The exit register is where the layout says: it identifies itself.
fn exit_register(_: &Machine, _: &Words) -> bool {
    let (expected, found) = (u64::from(u32::from_be_bytes(*b"ALUX")), arch::read32(arch::EXIT).into());
    if expected != found {
        say!("expected ", Hex(expected), ", found ", Hex(found));
        return false;
    }
    say!("ok (", Hex(arch::EXIT), ")");
    true
}

/// The machine has an ID, and a VM clock whose counters move on together: which ID, which one it was when the guest
/// started, how often the guest was restored, and whether an interrupt has told so, is told for who compares. (The
/// interrupt is let in only where this case was asked for by name.)
fn identity(machine: &Machine, _: &Words) -> bool {
    const MAGIC: u32 = u32::from_le_bytes(*b"VCLK");
    const PATIENCE: u32 = 1_000_000;
    let field = |offset: u64| arch::read32(machine.vm_clock + offset);
    let wide = |offset: u64| u64::from(field(offset)) | u64::from(field(offset + 4)) << 32;
    if (field(0), field(8) & 0xffff) != (MAGIC, 1) {
        say!("expected a VM clock of version 1, found ", Hex(field(0).into()), " ", Hex(field(8).into()));
        return false;
    }
    // The protocol of the page: what was read while the sequence number stood still at an even one is true.
    let read = |_| {
        let sequence = field(12);
        arch::full_barrier();
        let found = (wide(16), wide(0x68));
        arch::full_barrier();
        (sequence & 1 == 0 && field(12) == sequence).then_some(found)
    };
    let Some((disruptions, generations)) = (0..PATIENCE).find_map(read) else {
        say!("expected a VM clock that can be read, found ", field(12));
        return false;
    };
    if disruptions != generations {
        say!("expected equal counters, found ", disruptions, " and ", generations);
        return false;
    }
    let id = machine.id();
    if id == [0; 4] {
        say!("expected an ID, found zeros");
        return false;
    }
    say!("ok (ID");
    id.iter().for_each(|word| say!(" ", Hex((*word).into())));
    say!(", at first");
    machine.first_id.iter().for_each(|word| say!(" ", Hex((*word).into())));
    say!(", generation ", generations, if arch::has_identity_come() { ", told)" } else { ")" });
    true
}

/// Where no device is, reads give all ones and writes are lost.
fn nobody_there(_: &Machine, _: &Words) -> bool {
    let nobody = arch::EXIT + 0x800;
    arch::write32(nobody, 7);
    let found = arch::read32(nobody);
    if found != u32::MAX {
        say!("expected all ones, found ", Hex(found.into()));
        return false;
    }
    say!("ok");
    true
}
