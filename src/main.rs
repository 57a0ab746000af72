//! The `alula` command. It is entered as a C program is: the standard library's runtime would read
//! /proc/self/maps and set up handlers that only tell of an overflown stack, a tenth of a
//! millisecond that every guest's start would pay. What is needed of it is in
//! `sys::process::begin`.
#![no_main]

use std::ffi::{c_char, c_int};

/// The entry from the C library; the arguments come to `std::env::args` by themselves.
#[unsafe(no_mangle)]
#[allow(unsafe_code, reason = "nothing else has this name")]
extern "C" fn main(_: c_int, _: *const *const c_char) -> c_int {
    alula::sys::process::begin();
    alula::cli::main().into()
}
