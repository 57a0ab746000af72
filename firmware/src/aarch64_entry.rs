//! The first instructions of each CPU, and what an exception comes to first.

use core::arch::global_asm;

global_asm!(
    r#"
    .section .text.head, "ax"
    .globl image_header
image_header:
    b entry
    nop
    .quad 0                              // text offset
    .quad end_of_image - image_header    // image size
    .quad 0xa                            // little-endian, 4 KiB pages, anywhere
    .quad 0, 0, 0
    .ascii "ARM\x64"
    .word 0

    .text
entry:
    adrp x1, first_stack
    add x1, x1, :lo12:first_stack
    mov sp, x1
    bl allow_fp
    bl first_cpu

secondary_entry:
    adrp x1, secondary_stack
    add x1, x1, :lo12:secondary_stack
    mov sp, x1
    bl allow_fp
    bl secondary_cpu

    .globl staying_entry
staying_entry:
    mov sp, x0                           // the argument of CPU_ON
    bl allow_fp
    bl staying_cpu

allow_fp:
    mov x2, #3 << 20
    msr cpacr_el1, x2
    isb
    ret

    .balign 2048
exception_vectors:
    .rept 5
    .balign 128
    b unexpected_exception
    .endr
    .balign 128
    b timer_interrupt                    // from the current level, with its own stack
    .rept 10
    .balign 128
    b unexpected_exception
    .endr

unexpected_exception:
    stp x0, x1, [sp, #-16]!
    adrp x0, last_exception
    add x0, x0, :lo12:last_exception
    ldr x1, [x0]
    cbz x1, 5f
    mrs x1, esr_el1                      // it was expected: the next instruction
    str x1, [x0]
    mrs x1, elr_el1
    add x1, x1, #4
    msr elr_el1, x1
    ldp x0, x1, [sp], #16
    eret
5:  mrs x0, esr_el1
    mrs x1, elr_el1
    bl unexpected

timer_interrupt:
    stp x0, x1, [sp, #-32]!
    str x2, [sp, #16]
    adrp x2, cpu_interface
    ldr x2, [x2, :lo12:cpu_interface]
    cbnz x2, 1f
    mrs x0, S3_0_C12_C12_0               // ICC_IAR1_EL1
    b 2f
1:  ldr w0, [x2, #0xc]                   // GICC_IAR
2:  msr cntv_ctl_el0, xzr
    isb
    adrp x1, timer_fired
    add x1, x1, :lo12:timer_fired
    str w0, [x1]
    cbnz x2, 3f
    msr S3_0_C12_C12_1, x0               // ICC_EOIR1_EL1
    b 4f
3:  str w0, [x2, #0x10]                  // GICC_EOIR
4:  ldr x2, [sp, #16]
    ldp x0, x1, [sp], #32
    eret

    .section .bss.stacks, "aw", @nobits
    .balign 16
    .skip 16384
first_stack:
    .skip 4096
secondary_stack:
    "#
);
