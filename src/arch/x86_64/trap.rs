//! The registers of a system call in the context of a signal's handler.

use libc::{REG_R8, REG_R9, REG_R10, REG_RAX, REG_RDI, REG_RDX, REG_RSI, greg_t, ucontext_t};

/// The arguments of the call that the thread was interrupted in (System V ABI, A.2.1).
pub fn arguments(context: &ucontext_t) -> [u64; 6] {
    [REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8, REG_R9]
        .map(|register| context.uc_mcontext.gregs[register as usize] as u64)
}

/// Makes `result` what the call returns.
pub fn set_result(context: &mut ucontext_t, result: i64) {
    context.uc_mcontext.gregs[REG_RAX as usize] = result as greg_t;
}
