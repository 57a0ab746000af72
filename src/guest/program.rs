//! Programs of the host that do what there is no code for here.

use std::ffi::OsString;
use std::io::{ErrorKind, IsTerminal};
use std::os::fd::AsFd;
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

/// Runs a program that takes long, as [`run`] does. A terminal on standard error shows what the program prints meanwhile.
pub fn run_in_sight(command: &mut Command, missing: &str) -> Result<Output> {
    let errors = std::io::stderr();
    if errors.is_terminal()
        && let Ok(terminal) = errors.as_fd().try_clone_to_owned()
    {
        command.stdout(terminal);
    }
    run(command, missing)
}

/// Runs a program, which must succeed; why it does not is told by its own words: the first line that apt calls an error,
/// as more general ones follow, or the last line. `missing` is what to do where there is no such program.
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
    let last = || told.lines().rev().find(|line| !line.trim().is_empty());
    let why = told.lines().find(|line| line.starts_with("E: ")).or_else(last).unwrap_or("it says nothing");
    Err(Error::host(format!("`{name}` failed: {}", crate::log::in_one_line(why))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_fails_says_why_and_one_that_is_missing_what_to_do() {
        let error = run(program("sh").args(["-c", "echo first; echo why >&2; exit 1"]), "").unwrap_err();
        assert_eq!(error.to_string(), "`sh` failed: why");
        let like_apt = "echo 'W: first\nE: why\nE: it failed' >&2; exit 1";
        let error = run(program("sh").args(["-c", like_apt]), "").unwrap_err();
        assert_eq!(error.to_string(), "`sh` failed: E: why");
        let error = run(&mut program("no-such-program"), "install it").unwrap_err().to_string();
        assert_eq!(error, "there is no `no-such-program` on this machine: install it");
    }
}
