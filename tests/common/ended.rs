//! Whether processes that nobody here waits for have ended.

/// The state of a process's main thread (proc(5), stat). None: there is no such process.
pub fn state(process: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}

/// Whether a process has ended, and be it that nobody has waited for it: process 1 of a container need not.
pub fn is_over(process: u32) -> bool {
    matches!(state(process), None | Some('Z' | 'X'))
}
