//! The `alula` command.

fn main() {}
