//! Threads of other processes, held up at a moment of the test's choice.

use std::io::Error;
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

    /// The main thread of such a process as it is about to make a system call that `is_meant`, by the call's number and its
    /// arguments; `begin` has the process begin what it does. To be dropped by the same thread.
    #[allow(unsafe_code)]
    pub fn at_call(child: &Child, begin: impl FnOnce(), is_meant: impl Fn(i64, [u64; 6]) -> bool) -> Self {
        let (main, mut status) = (child.id() as i32, 0);
        // SAFETY: the calls take numbers and local variables, as large as they are told.
        unsafe {
            for request in [libc::PTRACE_SEIZE, libc::PTRACE_INTERRUPT] {
                let options = if request == libc::PTRACE_SEIZE { libc::PTRACE_O_TRACESYSGOOD } else { 0 };
                assert_eq!(libc::ptrace(request, main, 0, options), 0, "{}", Error::last_os_error());
            }
            begin();
            let mut told: libc::ptrace_syscall_info = std::mem::zeroed();
            let size = size_of_val(&told);
            loop {
                assert_eq!(libc::waitpid(main, &mut status, libc::__WALL), main);
                assert!(libc::WIFSTOPPED(status), "it ended without such a call: {status:#x}");
                let signal = libc::WSTOPSIG(status);
                let is_call = signal == libc::SIGTRAP | 0x80;
                if is_call {
                    libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, main, size, &raw mut told);
                    let entry = told.u.entry;
                    if told.op == libc::PTRACE_SYSCALL_INFO_ENTRY && is_meant(entry.nr as i64, entry.args) {
                        return Self(main);
                    }
                }
                // A stop that the tracer asked for is no signal of the process's.
                let passed = if is_call || status >> 16 != 0 { 0 } else { signal };
                assert_eq!(
                    libc::ptrace(libc::PTRACE_SYSCALL, main, 0, passed),
                    0,
                    "{}",
                    Error::last_os_error()
                );
            }
        }
    }
}

impl Held {
    /// Lets the thread go on until it is about to make a system call that `is_meant`, by the call's number and its
    /// arguments. Returns whether it is: it may have ended before. Calls that it returns from are not looked at.
    #[allow(unsafe_code)]
    pub fn goes_on_to(&self, is_meant: impl Fn(i64, [u64; 6]) -> bool) -> bool {
        let mut status = 0;
        // SAFETY: the calls take numbers and local variables, as large as they are told.
        unsafe {
            let mut told: libc::ptrace_syscall_info = std::mem::zeroed();
            let size = size_of_val(&told);
            // Without this, the kernel does not tell which call it is.
            libc::ptrace(libc::PTRACE_SETOPTIONS, self.0, 0, libc::PTRACE_O_TRACESYSGOOD);
            loop {
                if libc::ptrace(libc::PTRACE_SYSCALL, self.0, 0, 0) != 0
                    || libc::waitpid(self.0, &mut status, libc::__WALL) != self.0
                    || !libc::WIFSTOPPED(status)
                {
                    return false;
                }
                libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, self.0, size, &raw mut told);
                let entry = told.u.entry;
                if told.op == libc::PTRACE_SYSCALL_INFO_ENTRY && is_meant(entry.nr as i64, entry.args) {
                    return true;
                }
            }
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
