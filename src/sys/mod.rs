//! System calls that the standard library does not have, each as a safe function: a function touches no memory but
//! what its caller lends to it. The names are those of the manual's calls in plain words, the pages are named in
//! brackets.

pub mod confine;
pub mod descriptor;
pub mod machine;
pub mod network;
pub mod pagemap;
pub mod process;
pub mod program;
pub mod vectors;

use std::io::{Error, Result};

/// The answer of a system call, of which a negative one is an error.
fn check(answer: i32) -> Result<i32> {
    if answer < 0 { Err(Error::last_os_error()) } else { Ok(answer) }
}

/// The same for an answer that is a count of bytes.
fn check_count(answer: isize) -> Result<usize> {
    usize::try_from(answer).map_err(|_| Error::last_os_error())
}
