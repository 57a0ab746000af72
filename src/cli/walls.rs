//! The options that say what this process can still do once its guest runs.

use crate::walls::{Filters, Wanted};

const HELP: &str = "
Options for what Alula itself may do (docs/threat-model.md):
      --allow DIR        Files that the API names, and disks, are opened in this folder and below only, and no
                         program is started. May be repeated
      --seccomp-log      Go on when a system call is made that a filter does not allow, and tell of it
      --no-seccomp       Do not filter system calls
      --no-sandbox       Neither filter system calls nor restrict files and ports
";

const NAMES: [&str; 5] = ["allow", "seccomp-log", "no-seccomp", "no-sandbox", "seccomp-filter"];

/// The help of a command with these options in it, after its own.
pub fn with_help(help: &str) -> String {
    help.replacen("\n\nThe exit code", &format!("\n{HELP}\nThe exit code"), 1)
}

/// The option called `name`, if it is one of `NAMES`.
pub fn named(name: &str) -> Option<&'static str> {
    NAMES.into_iter().find(|other| *other == name)
}

/// Takes the option called `name` with its value.
pub fn take(wanted: &mut Wanted, name: &str, parser: &mut lexopt::Parser) -> Result<(), lexopt::Error> {
    match name {
        "allow" => wanted.allowed.push(parser.value()?.into()),
        "seccomp-log" => wanted.filters = Filters::Told,
        "no-seccomp" => wanted.filters = Filters::None,
        "no-sandbox" => (wanted.filters, wanted.no_rules) = (Filters::None, true),
        // A user who gives a filter counts on it: the option is refused, not ignored.
        _ => {
            return Err(
                "--seccomp-filter is not implemented yet: each thread has a filter of Alula's own; leave it out, or \
                        say --no-seccomp"
                    .into(),
            );
        }
    }
    if wanted.no_rules && !wanted.allowed.is_empty() {
        return Err("--allow is part of what --no-sandbox leaves out: give one of them".into());
    }
    Ok(())
}
