//! x86_64: entry by PVH or the 64-bit Linux boot protocol, CPUs and timer by the local APIC in x2APIC
//! mode (Intel SDM 3A, 11), the ways to end. Integer instructions only.

use core::arch::asm;
use core::ptr::{read_volatile, write_volatile};

use crate::acpi;
use crate::console::{Hex, say};
use crate::machine::{Machine, text_at};

#[path = "x86_64_entry.rs"]
mod entry;
#[path = "x86_64_far.rs"]
mod far;
#[path = "x86_64_identity.rs"]
mod identity;
#[path = "x86_64_timer.rs"]
mod timer;

pub use far::{is_writable, reach};
pub use identity::{expect_identity, has_identity_come};
pub use timer::{nap, wait_for_timer};

pub const NAME: &str = "x86_64";
/// The exit register.
pub const EXIT: u64 = 0xc000_2000;
/// The boot timer, where there is one.
pub const BOOT_TIMER: u64 = 0xc000_0000;
/// Registers of virtio-mmio devices, a page each.
pub const VIRTIO_MMIO: u64 = 0xc010_0000;
/// Configuration space of PCI bus 0.
pub const ECAM: u64 = 0xc100_0000;
const SERIAL: u16 = 0x3f8;
const PVPANIC: u16 = 0x505;
/// What an exception that nobody expects ends with.
const EXCEPTION: u32 = 101;
/// Where secondary CPUs begin, in real mode: below 1 MiB, clear of the boot tables.
const TRAMPOLINE: u64 = 0x8000;
const HUGE_PAGE: u64 = 2 << 20;
/// Present, writable, a page of 2 MiB (Intel SDM 3A, 4.5).
const PRESENT_HUGE_PAGE: u64 = 0x83;
/// Where the GiB of the devices begins.
const DEVICES: u64 = 3 << 30;
const TIMER_VECTOR: usize = 0x40;

const X2APIC_ENABLE: u64 = 0b11 << 10;
const MSR_APIC_BASE: u32 = 0x1b;
const MSR_SPURIOUS: u32 = 0x80f;
const MSR_ICR: u32 = 0x830;

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
    static exceptions: u8;
    fn timer_interrupt();
    fn identity_interrupt();
    static mut pd_high: [u64; 512];
}

#[unsafe(no_mangle)]
static mut timer_fired: u8 = 0;
/// The secondary CPU that was started last and is up; CPUs are started one after the other.
static mut STARTED: u32 = 0;
static mut IDT: [[u64; 2]; GATES] = [[0; 2]; GATES];
const GATES: usize = identity::VECTOR + 1;

#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

// The reasons for unsafe blocks below rely on this: there is no other program here. Addresses below 1 GiB and
// from 3 to 4 GiB are mapped one to one. The loader put its tables where its protocol says. Statics that two
// CPUs share, or code and an interrupt, are single words, which one writes and the other reads, by volatile
// accesses.

#[unsafe(no_mangle)]
extern "C" fn first_cpu(info: u64, protocol: u64) -> ! {
    if protocol == 0 {
        crate::start(command_line(u64_at(info + 24)), read_pvh, info)
    } else {
        crate::start(command_line(u32_at(info + 0x228).into()), read_linux64, info)
    }
}

fn command_line(address: u64) -> &'static [u8] {
    // SAFETY: both protocols name a text that ends with a zero, which nobody writes to later.
    unsafe { text_at(address) }
}

/// Maps the last of the first four GiB one to one: devices are there.
fn map_devices() {
    let first = (&raw mut pd_high).cast::<u64>();
    for page in 0..512 {
        // SAFETY: the table has 512 entries, of which the CPU has used none yet: they map addresses that
        // nothing has looked at.
        unsafe { write_volatile(first.add(page), (DEVICES + page as u64 * HUGE_PAGE) | PRESENT_HUGE_PAGE) };
    }
}

fn u32_at(address: u64) -> u32 {
    // SAFETY: the address is one of memory or of a device, mapped one to one; every value is valid.
    unsafe { read_volatile(address as *const u32) }
}

fn u64_at(address: u64) -> u64 {
    u64::from(u32_at(address)) | u64::from(u32_at(address + 4)) << 32
}

/// `struct hvm_start_info` (Xen's x86/HVM direct boot ABI).
fn read_pvh(info: u64) -> Machine {
    map_devices();
    let mut machine = Machine::new("PVH", "ACPI");
    identity::note_places(&mut machine);
    if u32_at(info) != 0x336e_c578 {
        machine.fault = Some("no PVH start info");
        return machine;
    }
    let (map, entries) = (u64_at(info + 40), u64::from(u32_at(info + 48)));
    for entry in (0..entries).map(|index| map + 24 * index).filter(|entry| u32_at(entry + 16) == 1) {
        machine.add_memory(u64_at(entry), u64_at(entry + 8));
    }
    acpi::read(&mut machine, u64_at(info + 32));
    machine
}

/// The zero page (Documentation/arch/x86/zero-page.rst).
fn read_linux64(params: u64) -> Machine {
    map_devices();
    let mut machine = Machine::new("64-bit Linux boot protocol", "ACPI");
    identity::note_places(&mut machine);
    let entries = u64::from(u32_at(params + 0x1e8) & 0xff);
    for entry in (0..entries).map(|index| params + 0x2d0 + 20 * index).filter(|entry| u32_at(entry + 16) == 1)
    {
        machine.add_memory(u64_at(entry), u64_at(entry + 8));
    }
    acpi::read(&mut machine, u64_at(params + 0x70));
    machine
}

fn write_port(port: u16, value: u8) {
    // SAFETY: a port of the machine's is written, which changes nothing in memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

fn read_port(port: u16) -> u8 {
    let value;
    // SAFETY: a port of the machine's is read, which changes nothing in memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

pub fn write_serial(register: u64, value: u8) {
    write_port(SERIAL + register as u16, value);
}

/// Reads a register of 32 bits among the I/O ports.
pub fn read_port32(port: u16) -> u32 {
    let value;
    // SAFETY: a port of the machine's is read, which changes nothing in memory.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) };
    value
}

/// Writes to a register of 32 bits among the I/O ports.
pub fn write_port32(port: u16, value: u32) {
    // SAFETY: a port of the machine's is written, which changes nothing in memory.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) };
}

pub fn read_serial(register: u64) -> u8 {
    read_port(SERIAL + register as u16)
}

pub fn read_pvpanic() -> u8 {
    read_port(PVPANIC)
}

pub fn write_pvpanic(events: u8) {
    write_port(PVPANIC, events);
}

pub fn read32(address: u64) -> u32 {
    u32_at(address)
}

pub fn write32(address: u64, value: u32) {
    // SAFETY: the address is that of a register, or of memory that the caller has to itself.
    unsafe { write_volatile(address as *mut u32, value) };
}

fn read_msr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the registers named in this file are there on every CPU of 64 bits with an x2APIC.
    unsafe { asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(low) | u64::from(high) << 32
}

fn write_msr(register: u32, value: u64) {
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: the registers are those of the local APIC: memory stays as it is, and interrupts come where a
    // gate is.
    unsafe { asm!("wrmsr", in("ecx") register, in("eax") low, in("edx") high, options(nomem, nostack)) };
}

fn enable_x2apic() {
    write_msr(MSR_APIC_BASE, read_msr(MSR_APIC_BASE) | X2APIC_ENABLE);
}

/// How many looks a CPU has to come up.
pub const CPU_PATIENCE: u32 = 20_000_000;

/// Starts the CPU with this APIC id (INIT, then a start-up interrupt); whether it came up within so many looks.
pub fn start_cpu(id: u32, patience: u32) -> bool {
    const INIT: u64 = 0x4500;
    const STARTUP: u64 = 0x4600 | TRAMPOLINE >> 12;
    // SAFETY: the two symbols are the ends of one piece of code, and the page below 1 MiB where it goes is
    // nobody else's. The CPU that is started uses a stack of its own, and says by `STARTED` alone that it runs.
    unsafe {
        let (from, to) = (&raw const trampoline, &raw const trampoline_end);
        core::ptr::copy_nonoverlapping(from, TRAMPOLINE as *mut u8, to.offset_from(from) as usize);
        enable_x2apic();
        write_volatile(&raw mut STARTED, 0);
        for command in [INIT, STARTUP] {
            write_msr(MSR_ICR, u64::from(id) << 32 | command);
        }
        (0..patience).any(|_| {
            core::hint::spin_loop();
            read_volatile(&raw const STARTED) == id
        })
    }
}

/// What a secondary CPU does: it says who it is (CPUID leaf 0xb), and waits for nothing.
#[unsafe(no_mangle)]
extern "C" fn secondary_cpu() -> ! {
    // SAFETY: CPUs with an x2APIC have this leaf; `STARTED` is written by one CPU at a time, as they are
    // started one after the other.
    unsafe {
        let id = core::arch::x86_64::__cpuid_count(0xb, 0).edx;
        write_volatile(&raw mut STARTED, id);
    }
    crate::counters::take_part();
    halt()
}

/// From here on an exception is told and ends the guest.
pub fn catch_exceptions() {
    // SAFETY: the stubs are 8 bytes each, and keep what the interrupted code has in its registers. The table
    // is a static, and is complete before the CPU is told of it.
    unsafe {
        let stubs = (&raw const exceptions) as u64;
        for vector in 0..32 {
            set_gate(vector, stubs + 8 * vector as u64);
        }
        set_gate(TIMER_VECTOR, timer_interrupt as *const () as u64);
        set_gate(identity::VECTOR, identity_interrupt as *const () as u64);
        let pointer = TablePointer { limit: 16 * GATES as u16 - 1, base: (&raw const IDT) as u64 };
        asm!("lidt [{}]", in(reg) &pointer, options(nostack));
    }
}

/// A 64-bit interrupt gate to our code segment (Intel SDM 3A, 6.14.1).
unsafe fn set_gate(vector: usize, handler: u64) {
    let low = handler & 0xffff | 0x10 << 16 | 0x8e << 40 | (handler >> 16 & 0xffff) << 48;
    // SAFETY: `vector` is below the table's length, and only this CPU uses the table.
    unsafe { (&raw mut IDT).cast::<[u64; 2]>().add(vector).write([low, handler >> 32]) };
}

/// Where to go on after an exception that is expected, and with which stack; 0: none is.
#[unsafe(no_mangle)]
static mut go_on_at: u64 = 0;
#[unsafe(no_mangle)]
static mut go_on_with: u64 = 0;
/// The exception that was expected.
static mut RAISED: u64 = 0;

/// Runs what is at `address` as code, where none can be; the exception that this raises.
fn raised_by_code_at(address: u64) -> u64 {
    // SAFETY: the code at the address cannot be read, so it raises an exception, whose handler goes on at the
    // label with the stack of this place; all registers that a call may change are given as changed, the
    // others are on the stack.
    unsafe {
        asm!(
            "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
            "lea rax, [rip + 2f]",
            "mov [rip + go_on_at], rax",
            "mov [rip + go_on_with], rsp",
            "jmp rdi",
            "2:",
            "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
            in("rdi") address,
            clobber_abi("sysv64"),
        );
        read_volatile(&raw const RAISED)
    }
}

/// IA32_SYSENTER_ESP (0x175), which only SYSENTER uses.
pub fn unused_register() -> u64 {
    read_msr(0x175)
}

/// The features that leaf 1 of CPUID, which every CPU of 64 bits has, tells in ECX and EDX.
pub fn features() -> [u32; 2] {
    let leaf = core::arch::x86_64::__cpuid(1);
    [leaf.ecx, leaf.edx]
}

/// Code outside of memory, which KVM cannot read to do it: each raises an exception, after which the guest
/// goes on. How many, or the one that did not.
pub fn be_refused() -> Result<u64, &'static str> {
    const INVALID_OPCODE: u64 = 6;
    let places = [("code in a device", BOOT_TIMER), ("code where nothing is", EXIT + 0x800)];
    for (what, address) in places {
        let raised = raised_by_code_at(address);
        if raised != INVALID_OPCODE {
            say!("exception ", raised, ": ");
            return Err(what);
        }
    }
    Ok(places.len() as u64)
}

#[unsafe(no_mangle)]
extern "C" fn unexpected(vector: u64, frame: *const u64) -> ! {
    // SAFETY: an exception that is expected interrupted `raised_by_code_at`, which has noted where to go on
    // and with which stack; both are still there.
    unsafe {
        let (at, with) = (read_volatile(&raw const go_on_at), read_volatile(&raw const go_on_with));
        if at != 0 {
            write_volatile(&raw mut go_on_at, 0);
            write_volatile(&raw mut RAISED, vector);
            asm!("mov rsp, {}", "jmp {}", in(reg) with, in(reg) at, options(noreturn));
        }
    }
    // These push an error code below the instruction pointer.
    let has_code = matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30);
    // SAFETY: the stub gives the stack as the CPU left it, with the error code, if there is one, and the
    // instruction pointer on it.
    let rip = unsafe { *frame.add(if has_code { 2 } else { 1 }) };
    say!("exception ", vector, " at ", Hex(rip), "\n");
    exit(EXCEPTION)
}

/// The old interrupt controllers would be heard once interrupts are on.
fn mask_pic() {
    write_port(0x21, 0xff);
    write_port(0xa1, 0xff);
}

fn let_interrupts_in() {
    // SAFETY: what can interrupt has a handler, which changes `timer_fired` at most.
    unsafe { asm!("sti", options(nostack)) };
}

fn keep_interrupts_out() {
    // SAFETY: it only keeps interrupts out.
    unsafe { asm!("cli", options(nostack)) };
}

/// Messages go to the local APICs: there is no frame for them.
pub fn write_messages(_frame: u64) -> Result<(), &'static str> {
    Err("a frame")
}

pub fn exit(code: u32) -> ! {
    write32(EXIT, code);
    halt()
}

/// ACPI sleep control: enable, type 5.
pub fn power_off() -> ! {
    write_port(0x600, 1 << 5 | 5 << 2);
    halt()
}

/// The keyboard controller pulses the reset line.
pub fn reset() -> ! {
    write_port(0x64, 0xfe);
    halt()
}

/// Waits for good: no interrupt is let in.
pub fn halt() -> ! {
    loop {
        // SAFETY: nothing runs on this CPU any more.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// Waits for interrupts that do not come.
pub fn idle() -> ! {
    mask_pic();
    loop {
        // SAFETY: what interrupts comes by a gate that was set, or ends the guest.
        unsafe { asm!("sti", "hlt", options(nomem, nostack)) };
    }
}

/// An exception that cannot be delivered: triple fault.
pub fn crash() -> ! {
    let nothing = TablePointer { limit: 0, base: 0 };
    // SAFETY: the guest is to end by this, and does: there is no gate for the exception.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &nothing, options(noreturn)) }
}

/// Runs the registers of a device as code, which KVM cannot read there.
pub fn fail() -> ! {
    // SAFETY: the guest is to end by this, and does: nothing is there that can be run.
    unsafe { asm!("jmp {}", in(reg) BOOT_TIMER, options(noreturn)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller promises `count` bytes at both places; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") count => _, options(nostack))
    };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller promises `count` bytes; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, in("al") byte as u8, inout("rcx") count => _, options(nostack))
    };
    to
}

/// Orders memory accesses as devices see them: x86 needs only the compiler to be told.
pub fn barrier() {
    core::sync::atomic::compiler_fence(core::sync::atomic::Ordering::SeqCst);
}

/// Orders what was stored before what is loaded after, which x86 does not do by itself.
pub fn full_barrier() {
    // SAFETY: the word on top of the stack stays as it is.
    unsafe { asm!("lock or dword ptr [rsp], 0") };
}

/// How long a device may take: 10 s and more on any processor there is.
pub const PATIENCE_TICKS: u64 = 60_000_000_000;

/// The time stamp counter.
pub fn ticks() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the counter can be read anywhere, and nothing changes.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(low) | u64::from(high) << 32
}

/// The ticks of [`ticks`], read after what was loaded before.
pub fn ticks_in_order() -> u64 {
    // SAFETY: the instruction changes nothing.
    unsafe { asm!("lfence", options(nostack)) };
    ticks()
}

pub fn read8(address: u64) -> u8 {
    // SAFETY: as in `u32_at`.
    unsafe { read_volatile(address as *const u8) }
}

pub fn write8(address: u64, value: u8) {
    // SAFETY: as in `write32`.
    unsafe { write_volatile(address as *mut u8, value) };
}

pub fn read16(address: u64) -> u16 {
    // SAFETY: as in `u32_at`.
    unsafe { read_volatile(address as *const u16) }
}

pub fn write16(address: u64, value: u16) {
    // SAFETY: as in `write32`.
    unsafe { write_volatile(address as *mut u16, value) };
}
