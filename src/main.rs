//! The `alula` command. It is entered as a C program is: the standard library's runtime would read
//! /proc/self/maps and set up handlers that only tell of an overflown stack, a tenth of a
//! millisecond that every guest's start would pay. What is needed of it is here.
#![no_main]

use std::ffi::{c_char, c_int};

/// The entry from the C library; the arguments come to `std::env::args` by themselves.
#[unsafe(no_mangle)]
#[allow(unsafe_code)]
extern "C" fn main(_: c_int, _: *const *const c_char) -> c_int {
    // SAFETY: the calls take numbers and a static string; no other thread exists yet.
    unsafe {
        // Threads allocate next to nothing, and a heap of its own costs each of them memory and a start.
        libc::mallopt(libc::M_ARENA_MAX, 1);
        // A client or a console that is gone is an error to handle, not the end.
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        for fd in 0..3 {
            // Else the first file opened would be taken for standard input, output or error.
            if libc::fcntl(fd, libc::F_GETFD) == -1 {
                libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
            }
        }
    }
    alula::cli::main().into()
}
