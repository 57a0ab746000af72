//! The registers of a system call in the context of a signal's handler.

use libc::ucontext_t;

/// The arguments of the call that the thread was interrupted in: x0 to x5.
pub fn arguments(context: &ucontext_t) -> [u64; 6] {
    std::array::from_fn(|index| context.uc_mcontext.regs[index])
}

/// Makes `result` what the call returns.
pub fn set_result(context: &mut ucontext_t, result: i64) {
    context.uc_mcontext.regs[0] = result.cast_unsigned();
}
