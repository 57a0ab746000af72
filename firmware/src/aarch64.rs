//! aarch64: entry as an Image (Documentation/arch/arm64/booting.rst), CPUs by PSCI, the virtual timer
//! by a GICv3 or a GICv2, the ways to end. The MMU and the caches stay off.

use core::arch::asm;

use crate::console::{Hex, say};
use crate::fdt;
use crate::machine::Machine;

#[path = "aarch64_entry.rs"]
mod entry;
#[path = "aarch64_power.rs"]
mod power;
#[path = "aarch64_timer.rs"]
mod timer;

pub use power::{is_off, switch_on, switch_on_nowhere, switch_on_to_stay};
pub use timer::{nap, wait_for_timer};

pub const NAME: &str = "aarch64";
/// The exit register.
pub const EXIT: u64 = 0x0902_0000;
/// The boot timer, where there is one.
pub const BOOT_TIMER: u64 = 0x0905_0000;
/// Registers of virtio-mmio devices, a page each.
pub const VIRTIO_MMIO: u64 = 0x0e00_0000;
/// Configuration space of PCI bus 0.
pub const ECAM: u64 = 0x1000_0000;
const SERIAL: u64 = 0x0900_0000;
const PVPANIC: u64 = 0x0903_0000;
const GIC_DISTRIBUTOR: u64 = 0x0800_0000;
const GIC_REDISTRIBUTOR: u64 = 0x0a00_0000;
/// The virtual timer's private interrupt.
const TIMER_INTERRUPT: u32 = 27;
/// What an exception that nobody expects ends with.
const EXCEPTION: u32 = 101;

/// The interrupts that tell of changes of the generation ID and of the VM clock.
const IDENTITY_INTERRUPTS: [u32; 2] = [34, 35];

const PSCI_CPU_OFF: u64 = 0x8400_0002;
const PSCI_CPU_ON: u64 = 0xc400_0003;
const PSCI_SYSTEM_OFF: u64 = 0x8400_0008;
const PSCI_SYSTEM_RESET: u64 = 0x8400_0009;

unsafe extern "C" {
    static exception_vectors: u8;
    static secondary_entry: u8;
}

/// The interrupt that was taken last.
#[unsafe(no_mangle)]
static mut timer_fired: u32 = 0;
/// Where a GICv2's CPU interface is; 0: it is a GICv3.
#[unsafe(no_mangle)]
static mut cpu_interface: u64 = 0;
/// Not 0: an exception is expected; then what the processor says of it.
#[unsafe(no_mangle)]
static mut last_exception: u64 = 0;
/// The secondary CPU that was started last and is up; CPUs are started one after the other.
static mut STARTED: u32 = u32::MAX;
/// How often secondary CPUs have begun.
static mut BEGUN: u32 = 0;

// The reasons for unsafe blocks below rely on this: there is no other program here. Memory and devices are
// where the machine's layout says, at their physical addresses. Statics that two CPUs share, or code and an
// interrupt, are single words, which one writes and the other reads, by single loads and stores that no cache
// holds.

#[unsafe(no_mangle)]
extern "C" fn first_cpu(tree: u64) -> ! {
    crate::start(fdt::command_line(tree), read_tree, tree)
}

fn read_tree(tree: u64) -> Machine {
    let mut machine = Machine::new("Image", "FDT");
    // SAFETY: no other CPU runs yet, and no interrupt is let in.
    unsafe { cpu_interface = fdt::read(&mut machine, tree) };
    machine
}

// These are one plain load or store each: KVM cannot tell us of an access with several registers or write-back.

pub fn read32(address: u64) -> u32 {
    let value;
    // SAFETY: the address is one of memory or of a device; every value is valid.
    unsafe { asm!("ldr {:w}, [{}]", out(reg) value, in(reg) address, options(nostack)) };
    value
}

pub fn write32(address: u64, value: u32) {
    // SAFETY: the address is that of a register, or of memory that the caller has to itself.
    unsafe { asm!("str {:w}, [{}]", in(reg) value, in(reg) address, options(nostack)) };
}

pub fn read_serial(register: u64) -> u8 {
    read8(SERIAL + register)
}

pub fn write_serial(register: u64, value: u8) {
    write8(SERIAL + register, value);
}

pub fn read_pvpanic() -> u8 {
    read8(PVPANIC)
}

pub fn write_pvpanic(events: u8) {
    write8(PVPANIC, events);
}

/// There are no I/O ports here.
pub fn read_port32(_port: u16) -> u32 {
    0
}

pub fn write_port32(_port: u16, _value: u32) {}

/// Where the memory at `address` can be reached: addresses are physical ones.
pub fn reach(address: u64) -> u64 {
    address
}

/// Whether the last 4 of the 8 bytes at `address` keep what is written; they stay as they were.
pub fn is_writable(address: u64) -> bool {
    const PATTERN: u32 = 0x5aa5_1234;
    let before = read32(address + 4);
    write32(address + 4, PATTERN);
    let found = read32(address + 4);
    write32(address + 4, before);
    found == PATTERN
}

/// A call of the Power State Coordination Interface (Arm DEN 0022).
fn psci(function: u64, arguments: [u64; 3]) -> u64 {
    let result;
    // SAFETY: the call changes no register but those given (Arm DEN 0028, 2.6) and no memory. A CPU that it
    // starts has code and a stack of its own.
    unsafe {
        asm!("hvc #0", inout("x0") function => result, inout("x1") arguments[0] => _,
            inout("x2") arguments[1] => _, inout("x3") arguments[2] => _, options(nostack))
    };
    result
}

/// How many looks a CPU has to come up.
pub const CPU_PATIENCE: u32 = 200_000_000;

/// Starts the CPU with this MPIDR; whether it came up within so many looks.
pub fn start_cpu(id: u32, patience: u32) -> bool {
    if psci(PSCI_CPU_ON, [id.into(), (&raw const secondary_entry) as u64, 0]) != 0 {
        return false;
    }
    (0..patience).any(|_| read32((&raw const STARTED) as u64) == id)
}

/// How often secondary CPUs have begun, one after the other.
pub fn begun() -> u32 {
    read32((&raw const BEGUN) as u64)
}

/// What a secondary CPU does: it says who it is (MPIDR affinities 2 to 0), and turns itself off.
#[unsafe(no_mangle)]
extern "C" fn secondary_cpu() -> ! {
    let id: u64;
    // SAFETY: the register can be read here, and nothing changes.
    unsafe { asm!("mrs {}, mpidr_el1", out(reg) id, options(nomem, nostack)) };
    write32((&raw const STARTED) as u64, id as u32 & 0xff_ffff);
    write32((&raw const BEGUN) as u64, begun() + 1);
    crate::counters::take_part();
    halt()
}

/// From here on an exception is told and ends the guest.
pub fn catch_exceptions() {
    let vectors = (&raw const exception_vectors) as u64;
    // SAFETY: the vectors are aligned as they must be, and keep what the interrupted code has in its
    // registers.
    unsafe { asm!("msr vbar_el1, {}", "isb", in(reg) vectors, options(nostack)) };
}

#[unsafe(no_mangle)]
extern "C" fn unexpected(syndrome: u64, address: u64) -> ! {
    say!("exception ", Hex(syndrome), " at ", Hex(address), "\n");
    exit(EXCEPTION)
}

/// Where a GICv2's CPU interface is; 0: it is a GICv3.
fn gic_v2() -> u64 {
    // SAFETY: the start of the guest writes the variable once, before it lets the first interrupt in.
    unsafe { cpu_interface }
}

/// Lets the virtual timer's interrupt through.
fn enable_timer_interrupt() {
    match gic_v2() {
        0 => enable_by_v3(),
        interface => enable_by_v2(interface),
    }
}

/// The registers of Arm IHI 0048: one group of interrupts.
fn enable_by_v2(interface: u64) {
    write32(GIC_DISTRIBUTOR, 1); // GICD_CTLR
    write32(GIC_DISTRIBUTOR + 0x400 + 24, 0x8080_8080); // GICD_IPRIORITYR6: interrupts 24 to 27
    write32(GIC_DISTRIBUTOR + 0x100, 1 << TIMER_INTERRUPT); // GICD_ISENABLER0
    write32(interface + 4, 0xff); // GICC_PMR
    write32(interface, 1); // GICC_CTLR
}

/// The registers of Arm IHI 0069, affinity routing on.
fn enable_by_v3() {
    let (redistributor, private) = (GIC_REDISTRIBUTOR, GIC_REDISTRIBUTOR + 0x1_0000);
    write32(redistributor + 0x14, read32(redistributor + 0x14) & !2); // GICR_WAKER: not asleep
    while read32(redistributor + 0x14) & 4 != 0 {}
    write32(GIC_DISTRIBUTOR, 0x12); // GICD_CTLR: ARE_NS, EnableGrp1NS
    write32(private + 0x80, 1 << TIMER_INTERRUPT); // GICR_IGROUPR0
    write32(private + 0x400 + 24, 0x8080_8080); // GICR_IPRIORITYR6: interrupts 24 to 27
    write32(private + 0x100, 1 << TIMER_INTERRUPT); // GICR_ISENABLER0
    // SAFETY: the registers are a GICv3's, which is there: what they let through comes by the vectors.
    unsafe {
        asm!(
            "msr S3_0_C12_C12_5, {one}", // ICC_SRE_EL1
            "isb",
            "msr S3_0_C4_C6_0, {lowest}", // ICC_PMR_EL1
            "msr S3_0_C12_C12_7, {one}", // ICC_IGRPEN1_EL1
            "isb",
            one = in(reg) 1u64,
            lowest = in(reg) 0xffu64,
            options(nostack)
        )
    };
}

/// Has the interrupts of a changed identity noted by the distributor: they are edges (GICD_ICFGR). No CPU is
/// interrupted.
pub fn expect_identity() {
    for interrupt in IDENTITY_INTERRUPTS {
        let configuration = GIC_DISTRIBUTOR + 0xc00 + u64::from(interrupt / 16 * 4);
        write32(configuration, read32(configuration) | 2 << (interrupt % 16 * 2));
    }
}

/// Whether these interrupts have come (GICD_ISPENDR).
pub fn has_identity_come() -> bool {
    IDENTITY_INTERRUPTS.into_iter().all(|interrupt| {
        read32(GIC_DISTRIBUTOR + 0x200 + u64::from(interrupt / 32 * 4)) & 1 << (interrupt % 32) != 0
    })
}

/// The frame that takes interrupt messages of a GICv2 raises its interrupts, and only those.
pub fn write_messages(frame: u64) -> Result<(), &'static str> {
    const SET_SPI: u64 = 0x40;
    let kind = read32(frame + 8); // MSI_TYPER
    let (first, count) = (kind >> 16 & 0x3ff, kind & 0x3ff);
    if first < 32 || count == 0 {
        return Err("a frame without interrupts");
    }
    // GICD_ISPENDR and GICD_ICPENDR, a bit for each interrupt.
    let word = |register: u64, interrupt: u32| GIC_DISTRIBUTOR + register + u64::from(interrupt / 32 * 4);
    let is_pending = |interrupt: u32| read32(word(0x200, interrupt)) & 1 << (interrupt % 32) != 0;
    for interrupt in [first, first + count - 1] {
        // GICD_ICFGR: edge-triggered, as messages are.
        let configuration = GIC_DISTRIBUTOR + 0xc00 + u64::from(interrupt / 16 * 4);
        write32(configuration, read32(configuration) | 2 << (interrupt % 16 * 2));
        if is_pending(interrupt) {
            return Err("an interrupt that nobody raised");
        }
        write32(frame + SET_SPI, interrupt);
        let end = ticks() + PATIENCE_TICKS;
        while !is_pending(interrupt) {
            if ticks() > end {
                return Err("no interrupt");
            }
        }
        write32(word(0x280, interrupt), 1 << (interrupt % 32));
        if is_pending(interrupt) {
            return Err("an interrupt that stays");
        }
    }
    for interrupt in [first - 1, first + count, 0, u32::MAX] {
        write32(frame + SET_SPI, interrupt);
    }
    if is_pending(first - 1) { Err("an interrupt of another's") } else { Ok(()) }
}

pub fn exit(code: u32) -> ! {
    write32(EXIT, code);
    halt()
}

pub fn power_off() -> ! {
    psci(PSCI_SYSTEM_OFF, [0; 3]);
    halt()
}

pub fn reset() -> ! {
    psci(PSCI_SYSTEM_RESET, [0; 3]);
    halt()
}

/// This CPU is off for good.
pub fn halt() -> ! {
    loop {
        psci(PSCI_CPU_OFF, [0; 3]);
    }
}

/// Waits for interrupts that do not come.
pub fn idle() -> ! {
    loop {
        // SAFETY: the CPU waits, and nothing changes.
        unsafe { asm!("wfi", options(nomem, nostack)) };
    }
}

/// An undefined instruction.
pub fn crash() -> ! {
    // SAFETY: the guest is to end by this, and does.
    unsafe { asm!("udf #0", options(noreturn)) }
}

/// Does an access and tells the exception that it raised; 1: none.
macro_rules! raised_by {
    ($access:literal, $address:expr) => {
        // SAFETY: an exception that is expected changes `last_exception` alone and goes on with the next
        // instruction. An access that raises none reads or writes 16 bytes of a device, and the registers
        // given.
        unsafe {
            (&raw mut last_exception).write_volatile(1);
            asm!($access, inout(reg) $address => _, out("x10") _, out("x11") _, out("v0") _);
            let raised = (&raw const last_exception).read_volatile();
            (&raw mut last_exception).write_volatile(0);
            raised
        }
    };
}

/// TPIDR_EL1, which is there for software alone.
pub fn unused_register() -> u64 {
    let value;
    // SAFETY: the register is read, which changes nothing.
    unsafe { asm!("mrs {}, tpidr_el1", out(reg) value, options(nomem, nostack)) };
    value
}

/// There is no CPUID.
pub fn features() -> [u32; 2] {
    [0; 2]
}

/// Accesses outside of memory of which the processor tells KVM too little to do them: each raises an external
/// abort, after which the guest goes on. How many, or the one that did not.
pub fn be_refused() -> Result<u64, &'static str> {
    // A data abort from this level, external (Arm ARM, ESR_EL1, whose upper half KVMs fill differently).
    let is_abort = |raised: u64| raised >> 26 & 0x3f == 0x25 && raised & 0x3f == 0x10;
    let mut count = 0;
    for address in [EXIT + 0x800, BOOT_TIMER, GIC_DISTRIBUTOR, 1 << 35] {
        for (what, raised) in [
            ("a load of a pair", raised_by!("ldp x10, x11, [{}]", address)),
            ("a store of a pair", raised_by!("stp x10, x11, [{}]", address)),
            ("a load with write-back", raised_by!("ldr x10, [{}], #8", address)),
            ("a store with write-back", raised_by!("str x10, [{}, #8]!", address)),
            ("a load of a vector register", raised_by!("ldr q0, [{}]", address)),
        ] {
            if !is_abort(raised) {
                say!("address ", Hex(address), ", syndrome ", Hex(raised), ": ");
                return Err(what);
            }
            count += 1;
        }
    }
    Ok(count)
}

/// Reads two registers of a device at once, of which the processor tells KVM too little to do it.
pub fn fail() -> ! {
    // SAFETY: two registers of a device are read into two that are given.
    unsafe { asm!("ldp {}, {}, [{}]", out(reg) _, out(reg) _, in(reg) BOOT_TIMER, options(nostack)) };
    halt()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    for index in 0..count {
        // Volatile: else the compiler makes a call to this function of it.
        // SAFETY: the caller promises `count` bytes at both places.
        unsafe { to.add(index).write_volatile(from.add(index).read()) };
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    for index in 0..count {
        // SAFETY: the caller promises `count` bytes.
        unsafe { to.add(index).write_volatile(byte as u8) };
    }
    to
}

/// Orders memory accesses as devices see them.
pub fn barrier() {
    // SAFETY: it only orders accesses.
    unsafe { asm!("dmb sy", options(nostack)) };
}

/// The same: a barrier there orders everything.
pub fn full_barrier() {
    barrier();
}

/// How long a device may take: 20 s.
pub const PATIENCE_TICKS: u64 = 20_000_000_000;

/// The virtual counter, in nanoseconds.
pub fn ticks() -> u64 {
    let (count, frequency): (u64, u64);
    // SAFETY: both registers can be read here, and nothing changes.
    unsafe { asm!("mrs {}, cntvct_el0", "mrs {}, cntfrq_el0", out(reg) count, out(reg) frequency) };
    count * (1_000_000_000 / frequency.clamp(1, 1_000_000_000))
}

/// The ticks of [`ticks`], read after what was loaded before.
pub fn ticks_in_order() -> u64 {
    // SAFETY: the instruction changes nothing.
    unsafe { asm!("isb", options(nostack)) };
    ticks()
}

pub fn read8(address: u64) -> u8 {
    let value: u32;
    // SAFETY: as in `read32`.
    unsafe { asm!("ldrb {:w}, [{}]", out(reg) value, in(reg) address, options(nostack)) };
    value as u8
}

pub fn write8(address: u64, value: u8) {
    // SAFETY: as in `write32`.
    unsafe { asm!("strb {:w}, [{}]", in(reg) u32::from(value), in(reg) address, options(nostack)) };
}

pub fn read16(address: u64) -> u16 {
    let value: u32;
    // SAFETY: as in `read32`.
    unsafe { asm!("ldrh {:w}, [{}]", out(reg) value, in(reg) address, options(nostack)) };
    value as u16
}

pub fn write16(address: u64, value: u16) {
    // SAFETY: as in `write32`.
    unsafe { asm!("strh {:w}, [{}]", in(reg) u32::from(value), in(reg) address, options(nostack)) };
}
