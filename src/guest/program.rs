//! Programs of the host that do what there is no code for here.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::process::{Command, Output};

use crate::error::{Error, Result};

/// What downloads and unpacks wherever there is apt.
pub const APT_HELPER: &str = "/usr/lib/apt/apt-helper";

/// The program of this name, also where administrators' programs are, which an ordinary user's `PATH` may lack.
pub fn program(name: &str) -> Command {
    let mut path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
    path.push(":/usr/sbin:/sbin");
    let mut command = Command::new(name);
    // Its messages are read.
    command.env("PATH", path).env("LC_ALL", "C");
    command
}

/// Runs a program, which must succeed; the end of what it says is told if it does not. `missing` is what to do where there
/// is no such program.
pub fn run(command: &mut Command, missing: &str) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::host(format!("there is no `{name}` on this machine: {missing}")),
        _ => Error::host(format!("start `{name}`: {error}")),
    })?;
    if output.status.success() {
        return Ok(output);
    }
    let told = String::from_utf8_lossy(&output.stderr);
    let last = told.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it says nothing");
    Err(Error::host(format!("`{name}` failed: {}", crate::log::in_one_line(last))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_fails_says_why_and_one_that_is_missing_what_to_do() {
        let error = run(program("sh").args(["-c", "echo first; echo why >&2; exit 1"]), "").unwrap_err();
        assert_eq!(error.to_string(), "`sh` failed: why");
        let error = run(&mut program("no-such-program"), "install it").unwrap_err().to_string();
        assert_eq!(error, "there is no `no-such-program` on this machine: install it");
    }
}
