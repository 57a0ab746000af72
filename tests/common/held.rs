//! Threads of other processes, held up at a moment of the test's choice.

use std::path::PathBuf;
use std::process::Child;

/// A thread of another process that stands still for as long as this is here, as one does whose disk does not
/// answer.
pub struct Held(i32);

impl Held {
    /// The thread called `name` of a process that the test has started. To be dropped by the same thread.
    #[allow(unsafe_code)]
    pub fn new(child: &Child, name: &str) -> Self {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
        let is_it =
            |task: &PathBuf| std::fs::read_to_string(task.join("comm")).is_ok_and(|it| it.trim() == name);
        let task = tasks.map(|task| task.unwrap().path()).find(is_it).expect("there is such a thread");
        let thread: i32 = task.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let mut status = 0;
        // SAFETY: the calls take numbers, and the last one a local variable.
        unsafe {
            for request in [libc::PTRACE_SEIZE, libc::PTRACE_INTERRUPT] {
                assert_eq!(libc::ptrace(request, thread, 0, 0), 0, "{}", std::io::Error::last_os_error());
            }
            assert_eq!(libc::waitpid(thread, &mut status, libc::__WALL), thread);
        }
        Self(thread)
    }

    /// The next thread that the main thread of such a process starts, before it has done anything; `ask` has it
    /// start one.
    #[allow(unsafe_code)]
    pub fn next(child: &Child, ask: impl FnOnce()) -> Self {
        let (main, mut status, mut thread) = (child.id() as i32, 0, 0_u64);
        let failed = || std::io::Error::last_os_error();
        // SAFETY: the call takes numbers.
        let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, main, 0, libc::PTRACE_O_TRACECLONE) };
        assert_eq!(seized, 0, "{}", failed());
        ask();
        // SAFETY: the calls take numbers and local variables.
        unsafe {
            assert_eq!(libc::waitpid(main, &mut status, libc::__WALL), main);
            assert_eq!(status >> 8, libc::SIGTRAP | libc::PTRACE_EVENT_CLONE << 8, "it started a thread");
            assert_eq!(libc::ptrace(libc::PTRACE_GETEVENTMSG, main, 0, &mut thread), 0, "{}", failed());
            let thread = thread as i32;
            assert_eq!(libc::waitpid(thread, &mut status, libc::__WALL), thread);
            assert_eq!(libc::ptrace(libc::PTRACE_DETACH, main, 0, 0), 0, "{}", failed());
            Self(thread)
        }
    }
}

impl Drop for Held {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: the call takes numbers.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, 0, 0) };
    }
}
