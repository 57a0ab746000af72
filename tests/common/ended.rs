//! Whether processes that nobody here waits for have ended.

/// Fields of a process's state (proc(5), stat) from the third on, the first after its name. None: there
/// is no such process.
fn fields(process: u32) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    Some(stat.rsplit(") ").next()?.split(' ').map(str::to_string).collect())
}

/// The state of a process's main thread (proc(5), stat). None: there is no such process.
pub fn state(process: u32) -> Option<char> {
    fields(process)?.first()?.chars().next()
}

/// Whether a process has ended, and be it that nobody has waited for it: process 1 of a container need not.
/// A main thread that has ended shows as a zombie while other threads of its process still end, and the
/// process's parent is told of the last one only.
pub fn is_over(process: u32) -> bool {
    /// The number of threads is field 20 of proc(5), and the list begins with field 3.
    const THREADS: usize = 20 - 3;
    let Some(fields) = fields(process) else { return true };
    let threads = fields.get(THREADS).and_then(|count| count.parse().ok()).unwrap_or(0);
    matches!(fields[0].as_str(), "Z" | "X") && threads <= 1
}
