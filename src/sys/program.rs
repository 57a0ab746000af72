//! The memory of this program itself: its code, its heap, and the stack of its first thread.
#![allow(unsafe_code)]

use std::ptr::without_provenance_mut;

use super::process::is_main_thread;

unsafe extern "C" {
    /// The program's first byte in memory, and the first one behind its code: the linker says where they are (ld(1)).
    static __executable_start: u8;
    static etext: u8;
}

/// The mask of the address of a page.
fn pages() -> usize {
    // SAFETY: the call takes a number.
    !(unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize - 1)
}

/// Has the kernel map the program's code and constants, all at once (MADV_POPULATE_READ, madvise(2), Linux 5.14). Of what
/// runs for the first time, it would map a few pages at each fault, while somebody waits. The pages are those of the
/// program's file, which all processes share.
pub fn map_code() {
    // SAFETY: the addresses of both are taken, and nothing is read there; the call changes no byte of that memory. Without
    // it, all is as before: an error means nothing.
    unsafe {
        let start = (&raw const __executable_start).addr() & pages();
        let end = (&raw const etext).addr();
        libc::madvise(without_provenance_mut(start), end - start, libc::MADV_POPULATE_READ);
    }
}

/// Gives the host back the pages that deeper calls of the thread `main` have left below the part of its stack that is in
/// use (madvise(2)), and those of its heap that hold nothing (malloc_trim(3)). Other threads' stacks are left alone: what
/// lies below them may be in use. This is never made part of its caller, whose frame may be larger than `IN_USE`: the
/// caller's own variables would be given back.
#[inline(never)]
pub fn give_back_unused() {
    // The kernel keeps 1 MiB free below the stack of `main`; IN_USE: this function's frame, and those that it calls.
    const DEPTH: usize = 256 << 10;
    const IN_USE: usize = 1 << 10;
    if is_main_thread() {
        let frame = 0_u8;
        // SAFETY: the calls take numbers; in that part of the stack are only frames of functions that have returned.
        unsafe {
            let start = (((&raw const frame).addr() - IN_USE) & pages()) - DEPTH;
            libc::madvise(without_provenance_mut(start), DEPTH, libc::MADV_DONTNEED);
            libc::malloc_trim(0);
        }
    }
}
