//! The first code: from what the loader left to 64-bit mode on a stack of our own, for the first CPU by
//! PVH or the 64-bit Linux boot protocol and for the others by their startup IPI; page tables, and the
//! gates of exceptions and interrupts.

use core::arch::global_asm;

const MSR_EOI: u32 = 0x80b;

global_asm!(
    r#"
    .section .note.Xen, "a", @note
    .align 4
    .long 4, 4, 18          # name, description, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_entry

    .section .data.tables, "aw"
    .align 4096
pml4:
    .quad pdpt + 3
    .fill 511, 8, 0
pdpt:
    .quad pd_low + 3, window + 3, 0, pd_high + 3
    .fill 508, 8, 0
pd_low:
    .set page, 0
    .rept 512
    .quad page << 21 | 0x83
    .set page, page + 1
    .endr

    # Filled in when they are needed: what is not in the image is not loaded into every guest.
    .section .bss.tables, "aw", @nobits
    .align 4096
    .globl pd_high
pd_high:
    .skip 4096
    .globl window
window:
    .skip 4096

    .section .rodata.gdt, "a"
    .align 8
gdt:
    .quad 0, 0x00cf9b000000ffff, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
    .word 4 * 8 - 1
    .long gdt, 0

    # Before the code, which begins in the page in which the first one ends: a guest that needs little of it has no page
    # for that.
    .section .bss.stacks, "aw", @nobits
    .align 16
    .skip 4096
secondary_stack:
    .skip 16384 + 384
stack:

    .text
    .code32
pvh_entry:
    cli
    lgdt gdt_pointer
    movl %ebx, %edi
    xorl %esi, %esi
    movl $stack, %esp
    movl $first_64, %ebp
    jmp to_long_mode

secondary_32:
    movl $secondary_stack, %esp
    movl $secondary_64, %ebp

    # esp: the stack, ebp: where to go on
to_long_mode:
    movw $0x18, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0x20, %eax        # PAE
    movl %eax, %cr4
    movl $0xc0000080, %ecx  # EFER
    rdmsr
    orl $0x100, %eax        # LME
    wrmsr
    movl $0x80000011, %eax  # PG, ET, PE
    movl %eax, %cr0
    ljmp $0x10, $in_long_mode
    .code64
in_long_mode:
    movl %ebp, %ebp
    jmp *%rbp
first_64:
    call first_cpu

    .globl linux64_entry
linux64_entry:
    cli
    lgdt gdt_pointer
    movq $pml4, %rax
    movq %rax, %cr3
    movq $stack, %rsp
    movq %rsi, %rdi
    movl $1, %esi
    call first_cpu

secondary_64:
    call secondary_cpu

    .code16
trampoline:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl 0x8000 + (trampoline_gdt_pointer - trampoline)
    movl $0x11, %eax
    movl %eax, %cr0
    ljmpl $0x08, $secondary_32
    .align 4
trampoline_gdt_pointer:
    .word 4 * 8 - 1
    .long gdt
trampoline_end:
    .code64

    .align 8
exceptions:
    .set vector, 0
    .rept 32
    .align 8
    pushq $vector
    jmp exception
    .set vector, vector + 1
    .endr
exception:
    movq (%rsp), %rdi
    movq %rsp, %rsi
    call unexpected

timer_interrupt:
    movb $1, timer_fired
identity_interrupt:
    pushq %rax
    pushq %rcx
    pushq %rdx
    movl ${eoi}, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    popq %rdx
    popq %rcx
    popq %rax
    iretq
    "#,
    eoi = const MSR_EOI,
    options(att_syntax)
);
