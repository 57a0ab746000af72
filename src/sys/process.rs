//! Calls about this process and its threads: signals, clocks, the end, the kernel's random numbers; and about the
//! programs that it starts: who they are, their terminals and their end.
#![allow(unsafe_code)]

use std::ffi::OsString;
use std::io::{ErrorKind, Result};
use std::mem::zeroed;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::{process::CommandExt, thread::JoinHandleExt};
use std::process::Command;
use std::ptr::null_mut;
use std::thread::JoinHandle;
use std::time::Duration;

use super::descriptor::owned;
use super::{check, check_count};

/// What the standard library's runtime would do before `main`, as far as it is needed. No other thread may exist yet.
pub fn begin() {
    // SAFETY: the calls take numbers, a static string and three local `pollfd`, as the count says.
    unsafe {
        // Threads allocate next to nothing, and a heap of its own costs each of them memory and a start.
        libc::mallopt(libc::M_ARENA_MAX, 1);
        // A client or a console that is gone is an error to handle, not the end.
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        let mut standard = [0, 1, 2].map(|fd| libc::pollfd { fd, events: 0, revents: 0 });
        libc::poll(standard.as_mut_ptr(), 3, 0);
        for _ in standard.iter().filter(|one| one.revents & libc::POLLNVAL != 0) {
            // Else the first file opened would be taken for standard input, output or error.
            libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        }
    }
}

/// Takes a variable out of the environment, for this process and for the programs that it starts. No other thread may
/// exist yet.
pub fn take_variable(name: &str) -> Option<OsString> {
    let value = std::env::var_os(name)?;
    // SAFETY: nobody else reads the environment meanwhile, as there is no other thread.
    unsafe { std::env::remove_var(name) };
    Some(value)
}

/// What a clock says (clock_gettime(2)): `libc::CLOCK_...`, which there is.
pub fn time(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call only writes to the local structure. A clock that does not exist leaves it as it is.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// How many page faults this process had so far that have ended (getrusage(2)).
pub fn faults() -> u64 {
    // SAFETY: the structure is plain data of which zeros are valid, and the call only writes to it.
    let usage = unsafe {
        let mut usage: libc::rusage = zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    usage.ru_minflt.cast_unsigned() + usage.ru_majflt.cast_unsigned()
}

/// The CPU time that a thread has used so far (pthread_getcpuclockid(3)).
pub fn cpu_time<T>(thread: &JoinHandle<T>) -> Duration {
    let mut clock = 0;
    // SAFETY: the call writes to the local number; the thread has not been joined, so its identifier is valid.
    match unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &raw mut clock) } {
        0 => time(clock),
        _ => Duration::ZERO,
    }
}

/// Makes a copy of this process, and returns its number; None: this is the copy, whose memory is this process's until
/// one of both writes to it. The copy is a child of this process's parent (CLONE_PARENT, clone(2)); only if this is
/// process 1 of a PID namespace, which must not have siblings, it is a child of this process's own.
///
/// The caller has no other thread: the copy would not have it, but the locks that it held, for ever.
///
/// # Errors
/// There are as many processes as there may be, or no memory for another.
pub fn copy() -> Result<Option<u32>> {
    let copy = |flags: libc::c_int| {
        // SAFETY: the call takes numbers. Without CLONE_VM, and without a stack, the copy goes on where the call
        // returns, on a copy of this stack.
        let made = unsafe { libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) };
        check_count(made as isize)
    };
    let made = match copy(libc::CLONE_PARENT) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => copy(0),
        made => made,
    };
    Ok(u32::try_from(made?).ok().filter(|pid| *pid > 0))
}

/// Fills `bytes` with random numbers (getrandom(2)).
///
/// # Errors
/// The kernel's. It has random numbers wherever it lets this process make the call at all.
pub fn random(bytes: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        // SAFETY: the call writes at most the length of the slice to it.
        match check_count(unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) }) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            count => done += count?,
        }
    }
    Ok(())
}

/// Whether a filter of system calls is laid upon this thread (prctl(2)). A filter that does not even let it ask is
/// one.
pub fn is_filtered() -> bool {
    // SAFETY: the call takes numbers.
    unsafe { libc::prctl(libc::PR_GET_SECCOMP) != 0 }
}

/// Puts the memory accesses of all threads of this process in order: what each has done before some moment in this
/// call is seen after it (membarrier(2)).
///
/// # Errors
/// The kernel has no such call.
pub fn order_all_threads() -> Result<()> {
    let barrier = |command: libc::c_int| {
        // SAFETY: the call takes numbers.
        check_count(unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) } as isize)
    };
    barrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)?;
    barrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED).map(drop)
}

/// These signals, as a set.
pub fn signals(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: `sigset_t` is plain data that sigemptyset initialises.
    unsafe {
        let mut set: libc::sigset_t = zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in signals {
            libc::sigaddset(&raw mut set, *signal);
        }
        set
    }
}

/// Makes `set` the signal mask of this thread.
pub fn set_signal_mask(set: &libc::sigset_t) {
    // SAFETY: the call reads the set and changes this thread's mask.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, set, null_mut()) };
}

/// Blocks the signals of `set` in this thread, beside those that are blocked.
pub fn block_signals(set: &libc::sigset_t) {
    // SAFETY: the call reads the set and changes this thread's mask.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, set, null_mut()) };
}

/// Blocks all signals but those of `kept` in this thread: other threads take those that are sent to the process. SIGBUS
/// and SIGSYS stay: they tell the thread of what the thread itself has touched or called, and where they are blocked,
/// the kernel kills without a handler.
pub fn block_all_signals(kept: &[i32]) {
    // SAFETY: `sigset_t` is plain data that sigfillset initialises.
    let all = unsafe {
        let mut all: libc::sigset_t = zeroed();
        libc::sigfillset(&raw mut all);
        for signal in kept.iter().chain(&[libc::SIGBUS, libc::SIGSYS]) {
            libc::sigdelset(&raw mut all, *signal);
        }
        all
    };
    block_signals(&all);
}

// From here on: what a signal handler may call too (signal-safety(7)).

/// What is to be done on a signal, with the signals `beside` blocked meanwhile.
fn action(what: libc::sighandler_t, flags: i32, beside: &[i32]) -> libc::sigaction {
    // SAFETY: the structure is plain data of which zeros are valid.
    let mut action: libc::sigaction = unsafe { zeroed() };
    action.sa_sigaction = what;
    action.sa_flags = flags;
    action.sa_mask = signals(beside);
    action
}

/// Has `handler` called on a signal, with the signals `beside` blocked meanwhile, and calls that it interrupts begun
/// again; returns what was done before. The handler does nothing but what signal-safety(7) allows.
pub fn handle(signal: i32, handler: extern "C" fn(i32), flags: i32, beside: &[i32]) -> libc::sigaction {
    let handled = action(handler as *const () as usize, flags | libc::SA_RESTART, beside);
    // SAFETY: the structure is plain data of which zeros are valid; the calls use local structures.
    unsafe {
        let mut before: libc::sigaction = zeroed();
        libc::sigaction(signal, &raw const handled, &raw mut before);
        before
    }
}

/// Has `handler` called on a signal that an access to memory causes, with the address that was accessed. The handler
/// does nothing but what signal-safety(7) allows.
pub fn handle_fault(signal: i32, handler: extern "C" fn(i32, Fault<'_>)) {
    let handled = action(handler as *const () as usize, libc::SA_SIGINFO, &[]);
    // SAFETY: the call reads a local structure. A handler that is asked for with SA_SIGINFO is called with the signal's
    // number and a pointer to a `siginfo_t` that lives as long as the call: `Fault` is a reference to that.
    unsafe { libc::sigaction(signal, &raw const handled, null_mut()) };
}

/// A signal as the kernel describes it to its handler.
#[repr(transparent)]
pub struct Fault<'s>(&'s libc::siginfo_t);

impl Fault<'_> {
    /// The address whose access has caused the signal; None: somebody has sent it.
    pub fn address(&self) -> Option<usize> {
        // SAFETY: a signal with a positive code comes from the kernel, which tells the address of those that it sends
        // for an access to memory (sigaction(2)).
        (self.0.si_code > 0).then(|| unsafe { self.0.si_addr() } as usize)
    }
}

/// Sends this thread a signal; one that is blocked comes when it is blocked no more.
pub fn raise(signal: i32) {
    // SAFETY: the call takes a number.
    unsafe { libc::raise(signal) };
}

/// The number of this thread (gettid(2)).
pub fn thread_number() -> i32 {
    // SAFETY: the call returns a number.
    unsafe { libc::gettid() }
}

/// Sends a signal to the thread of this process with this number, if there is one (tgkill(2)).
pub fn signal_thread(number: i32, signal: i32) {
    // SAFETY: the call takes numbers.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), number, signal) };
}

/// Whether this is the thread that the process began with.
pub fn is_main_thread() -> bool {
    // SAFETY: the calls return numbers.
    unsafe { libc::gettid() == libc::getpid() }
}

/// Writes what this thread is called, up to a zero, to `name` (PR_GET_NAME, prctl(2)).
pub fn name_thread(name: &mut [u8; 16]) {
    // SAFETY: the call writes at most 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
}

/// Has this thread do nothing any more.
pub fn sleep_for_ever() -> ! {
    loop {
        // SAFETY: the call takes nothing.
        unsafe { libc::pause() };
    }
}

/// Whether a signal is ignored: whoever started this process may have wished so (nohup(1)).
pub fn is_ignored(signal: i32) -> bool {
    // SAFETY: the structure is plain data of which zeros are valid; the call writes it.
    unsafe {
        let mut now: libc::sigaction = zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut now);
        now.sa_sigaction == libc::SIG_IGN
    }
}

/// Has done on a signal what [`handle`] has told of.
pub fn handle_as_before(signal: i32, before: &libc::sigaction) {
    // SAFETY: the call reads what the kernel has returned.
    unsafe { libc::sigaction(signal, before, null_mut()) };
}

/// Has done on a signal what is done where nobody has said anything.
pub fn handle_by_default(signal: i32) {
    let default = action(libc::SIG_DFL, 0, &[]);
    // SAFETY: the call reads a local structure.
    unsafe { libc::sigaction(signal, &raw const default, null_mut()) };
}

/// Has SIGALRM sent to this process after so long, and then again and again after `every` (setitimer(2)). A time of 0:
/// never.
pub fn start_timer(after: Duration, every: Duration) {
    let [after, every] = [after, every]
        .map(|time| libc::timeval { tv_sec: time.as_secs() as _, tv_usec: time.subsec_micros().into() });
    let timer = libc::itimerval { it_interval: every, it_value: after };
    // SAFETY: the call reads a local structure.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, null_mut()) };
}

/// Does something and leaves this thread's `errno` as it was.
pub fn keep_errno(body: impl FnOnce()) {
    // SAFETY: the pointer is to this thread's own number.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    body();
    // SAFETY: as above.
    unsafe { *errno = before };
}

/// Writes to standard error, without a lock; what does not go at once is lost.
pub fn write_error(words: &[u8]) {
    super::descriptor::write(libc::STDERR_FILENO, words);
}

/// Ends the process at once.
pub fn exit_now(code: u8) -> ! {
    // SAFETY: the call takes a number, and does not return.
    unsafe { libc::_exit(code.into()) }
}

/// How a process ended: by itself with a code, or by a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Its exit code.
    Code(u8),
    /// The signal.
    Signal(u8),
}

/// Who a program runs as.
pub struct User {
    /// The user's number.
    pub uid: u32,
    /// The number of the user's group.
    pub gid: u32,
    /// Those of further groups.
    pub groups: Vec<u32>,
}

/// A descriptor that is readable when one of these signals has come. They are blocked for it, which programs that are
/// started do not inherit (`std::process::Command` gives them an empty mask).
pub fn watch(signals: &[i32]) -> Result<OwnedFd> {
    let set = self::signals(signals);
    block_signals(&set);
    // SAFETY: the call reads the set.
    owned(unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) })
}

/// The next signal that came to such a descriptor.
pub fn next_signal(mut watched: impl std::io::Read) -> Option<u8> {
    let mut told = [0; size_of::<libc::signalfd_siginfo>()];
    let count = watched.read(&mut told).ok()?;
    // Its first field is the number (signalfd(2)).
    let number = told[..count].first_chunk().map(|number| u32::from_ne_bytes(*number))?;
    u8::try_from(number).ok()
}

/// The size of the terminal that this is, if it is one: rows and columns.
pub fn window(terminal: &impl AsRawFd) -> Option<(u16, u16)> {
    // SAFETY: the structure is plain data of which zeros are valid, and the call writes it.
    unsafe {
        let mut size: libc::winsize = zeroed();
        check(libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &mut size)).ok()?;
        Some((size.ws_row, size.ws_col))
    }
}

/// A child that has ended, if one has: any that this process is the parent of.
pub fn reap() -> Option<(u32, Exit)> {
    let mut status = 0;
    // SAFETY: the call writes the local number.
    let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
    let pid = u32::try_from(pid).ok().filter(|pid| *pid > 0)?;
    let exit = match libc::WIFSIGNALED(status) {
        true => Exit::Signal(libc::WTERMSIG(status) as u8),
        false => Exit::Code(libc::WEXITSTATUS(status) as u8),
    };
    Some((pid, exit))
}

/// Sends a signal to a process.
///
/// # Errors
/// There is none of this number any more (ESRCH), or this user may not (EPERM).
pub fn signal(process: u32, signal: i32) -> Result<()> {
    // Numbers below 1 are groups of processes, or all.
    let process = libc::pid_t::try_from(process).ok().filter(|process| *process > 0);
    // SAFETY: the call takes numbers.
    check(unsafe { libc::kill(process.ok_or(ErrorKind::InvalidInput)?, signal) }).map(drop)
}

/// A descriptor that can be read once the process has ended (pidfd_open(2)), whoever its parent is and whether that has
/// waited for it.
///
/// # Errors
/// There is no such process.
pub fn end_of(process: u32) -> Result<OwnedFd> {
    // SAFETY: the call takes numbers.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) } as i32)
}

/// Sends a signal to a process group. A group that is gone gets none.
pub fn signal_group(group: u32, signal: u8) {
    // A group of 0 or 1 would be our own, or everybody.
    if let Ok(group) = libc::pid_t::try_from(group)
        && group > 1
    {
        // SAFETY: the call takes numbers.
        unsafe { libc::kill(-group, signal.into()) };
    }
}

/// Sends a signal to every process but this one, if this is process 1.
pub fn signal_all(signal: i32) {
    if std::process::id() == 1 {
        // SAFETY: the call takes numbers.
        unsafe { libc::kill(-1, signal) };
    }
}

/// Both ends of a new pseudoterminal, ours and the program's, which belongs to `owner`.
pub fn terminal(size: (u16, u16), owner: u32) -> Result<(OwnedFd, OwnedFd)> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the call reads a static string.
    let ours = owned(unsafe { libc::open(c"/dev/ptmx".as_ptr(), flags | libc::O_NONBLOCK) })?;
    let unlocked: libc::c_int = 0;
    // SAFETY: the call reads the local number (ioctl_tty(2)).
    check(unsafe { libc::ioctl(ours.as_raw_fd(), libc::TIOCSPTLCK, &unlocked) })?;
    // SAFETY: the call takes flags. The other end needs no path by it: /dev/pts may be another's.
    let theirs = owned(unsafe { libc::ioctl(ours.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    // SAFETY: the call takes numbers.
    check(unsafe { libc::fchown(theirs.as_raw_fd(), owner, libc::gid_t::MAX) })?;
    set_window(&ours, size)?;
    Ok((ours, theirs))
}

/// Tells a terminal's program its size; what is 0 is not known, and stays as it is.
pub fn set_window(terminal: &impl AsRawFd, (rows, columns): (u16, u16)) -> Result<()> {
    // SAFETY: the structure is plain data of which zeros are valid, and the calls read and write it.
    unsafe {
        let mut size: libc::winsize = zeroed();
        check(libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &mut size))?;
        size.ws_row = if rows > 0 { rows } else { size.ws_row };
        size.ws_col = if columns > 0 { columns } else { size.ws_col };
        check(libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size)).map(drop)
    }
}

/// The process group in a terminal's foreground.
pub fn foreground(terminal: &impl AsRawFd) -> Option<u32> {
    // SAFETY: the call takes a number.
    u32::try_from(unsafe { libc::tcgetpgrp(terminal.as_raw_fd()) }).ok()
}

/// The highest number of a signal with a name (signal(7)).
const SIGNALS: i32 = 31;

/// Has the program start in a session of its own, whose terminal its standard input is, if that is said, and as
/// this user.
pub fn prepare(command: &mut Command, user: Option<User>, has_terminal: bool) {
    let enter = move || {
        // SAFETY: the calls take numbers, and the list is as long as is said. This thread is the only one: nobody
        // else can have held a lock when it forked.
        unsafe {
            check(libc::setsid())?;
            // A program inherits what is ignored and blocked: the agent blocks SIGCHLD, for which a shell's `wait` waits, and
            // may have been started with Ctrl-C ignored. The kernel refuses two numbers (KILL, STOP), never ignored.
            (1..=SIGNALS).for_each(|number| _ = libc::signal(number, libc::SIG_DFL));
            set_signal_mask(&signals(&[]));
            if has_terminal {
                check(libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0))?;
            }
            if let Some(User { uid, gid, groups }) = &user {
                check(libc::setgroups(groups.len(), groups.as_ptr()))?;
                check(libc::setgid(*gid))?;
                check(libc::setuid(*uid))?;
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls only, and allocates nothing.
    unsafe { command.pre_exec(enter) };
}

/// Makes files and folders from here on without these bits of their modes (umask(2)), and returns which they were.
pub fn set_umask(bits: u32) -> u32 {
    // SAFETY: the call takes and returns a number.
    unsafe { libc::umask(bits) }
}

/// Who this process is: its user and its group.
pub fn identity() -> (u32, u32) {
    // SAFETY: the calls return numbers.
    unsafe { (libc::geteuid(), libc::getegid()) }
}
