//! `true` without a C library, which `scripts/bench` builds for the guest: what starting it costs is what the agent, the
//! kernel and the monitor make it cost, and nothing else. A C library asks for all that the CPU can (CPUID on x86_64)
//! before `main`, and each question leaves the guest.

#![no_std]
#![no_main]
#![allow(unsafe_code)]

use core::arch::asm;

/// Where the kernel begins: exit_group(0).
#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    // SAFETY: the call ends the process.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        asm!("syscall", in("rax") 231, in("rdi") 0, options(noreturn));
        #[cfg(target_arch = "aarch64")]
        asm!("svc 0", in("x8") 94, in("x0") 0, options(noreturn));
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
