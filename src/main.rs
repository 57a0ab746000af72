//! The `alula` command.

fn main() -> std::process::ExitCode {
    alula::cli::main()
}
