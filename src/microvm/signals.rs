//! The signals that end the process, whatever its main thread does, and the one that says it goes on.
//!
//! Handlers note a signal and wake the main loop, which ends in order. If the loop does not take the signal
//! up in time, or if another one comes, a timer's handler ends the process at once: it restores the
//! terminal, removes the socket's file, and exits with the code that the signal has.
//!
//! Which thread runs a handler makes no difference. The main thread is the kernel's first choice. Once a
//! guest runs, the main thread lets these signals in only while it waits for events: what else it does may
//! take for ever (a file on a file system that does not answer holds it where only SIGKILL reaches it), and
//! meanwhile a vCPU's thread takes them, whose KVM_RUN any signal interrupts. The threads of devices block
//! all signals: a disk can hold them in the same way. Before its guest runs, the process has one thread,
//! and such a file system leaves it to SIGKILL.

use std::ffi::CString;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, Ordering::SeqCst};
use std::time::Duration;

use crate::error::{Context, Result};
use crate::poll::{self, EventFd, Events, Ready};
use crate::terminal;

const ENDING: [i32; 5] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGXCPU];

/// How long the main loop has to take a signal up. What holds it longer may hold it for ever.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long an end in order still has after another signal. Two that come within a moment are one wish: a
/// shell passes on the hang-up of its terminal, which the kernel tells, too.
const GRACE: Duration = Duration::from_millis(100);

/// A signal's number is added to this, as shells do.
const SIGNAL_BASE: u8 = 128;
/// The soft limit of CPU time is used up (Firecracker's code). At the hard limit the kernel kills.
const OUT_OF_CPU_TIME: u8 = 154;

const HELD_UP: &[u8] = b"alula: ended at once: the main thread was held up for 2 s\n";
const INSISTED: &[u8] = b"alula: ended at once by a second signal: what was not yet written out is lost\n";
const WRITING: &[u8] =
    b"alula: the end takes longer: what the guest wrote is still being written out to its \
    disks or its console; another signal ends alula at once, without the rest\n";

/// The ending signal that came, the last one of several; 0: none did.
static CAME: AtomicI32 = AtomicI32::new(0);
/// One more came: the process ends now.
static IS_URGENT: AtomicBool = AtomicBool::new(false);
/// The process is about to end in order.
static IS_ENDING: AtomicBool = AtomicBool::new(false);
/// The process was stopped, and goes on.
static GOES_ON: AtomicBool = AtomicBool::new(false);
/// Wakes the main loop.
static WAKE: OnceLock<EventFd> = OnceLock::new();
/// The socket's file; null: there is none.
static SOCKET: AtomicPtr<Socket> = AtomicPtr::new(ptr::null_mut());

/// The file of a socket: where it is, and its device and inode.
struct Socket {
    path: CString,
    identity: (u64, u64),
}

/// The exit code of a process that this signal ended.
pub fn exit_code(signal: u8) -> u8 {
    match i32::from(signal) {
        libc::SIGXCPU => OUT_OF_CPU_TIME,
        _ => SIGNAL_BASE.saturating_add(signal),
    }
}

/// How it ended, in words.
pub fn words(signal: u8) -> String {
    match i32::from(signal) {
        libc::SIGXCPU => "the soft limit of CPU time (RLIMIT_CPU, `ulimit -S -t`) is used up".to_owned(),
        _ => format!("ended by signal {signal}"),
    }
}

/// Makes a write beyond RLIMIT_FSIZE fail with EFBIG instead of ending the process. The handler does
/// nothing; a program that this process starts has the default again, which it would not if the signal were
/// ignored (execve(2)).
pub fn survive_file_size_limit() {
    extern "C" fn on_signal(_: i32) {}
    handle_unless_ignored(libc::SIGXFSZ, on_signal);
}

/// Ending signals come here instead of ending the process by themselves, unless they were ignored when it
/// was started (nohup(1), a background job of a script), and SIGCONT does, if it is asked for.
pub struct Signals {
    wake: &'static EventFd,
    /// The main thread's mask while it waits: it lets everything in.
    nothing: libc::sigset_t,
}

impl Signals {
    /// Sets up the handlers, and lets in signals that the process was started with blocked: its parent has
    /// blocked them for reasons of its own.
    #[allow(unsafe_code)]
    pub fn take_over() -> Result<Self> {
        let wake = poll::event("signals")?;
        let wake = WAKE.get_or_init(|| wake);
        for signal in ENDING {
            if !handle_unless_ignored(signal, on_ending) {
                // An ignored signal may have reached the handler while that was installed: it is forgotten.
                let _ = CAME.compare_exchange(signal, 0, SeqCst, SeqCst);
            }
        }
        let nothing = set_of(&[]);
        // SAFETY: the call reads a local set and changes this thread's mask.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &nothing, ptr::null_mut()) };
        Ok(Self { wake, nothing })
    }

    /// From here on [`Self::next`] also tells of SIGCONT.
    pub fn tell_of_going_on(&self) {
        handle(libc::SIGCONT, on_going_on, 0, &[]);
    }

    /// From here on this thread takes ending signals only in [`Self::wait`]. Threads of vCPUs must be there
    /// already, to take them otherwise.
    #[allow(unsafe_code)]
    pub fn share(&self) {
        let mut set = set_of(&ENDING);
        // SAFETY: the calls use a local set and change this thread's mask.
        unsafe {
            libc::sigaddset(&mut set, libc::SIGALRM);
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut());
        }
    }

    /// Waits for events, and for signals: those make this readable.
    pub fn wait(&self, events: &Events, timeout: Option<Duration>, ready: &mut Vec<Ready>) -> Result<()> {
        events.wait_masked(timeout, ready, &self.nothing)
    }

    /// The signal that came, if one did.
    pub fn next(&self) -> Option<u8> {
        // Nothing to read: it was read with another signal.
        let _ = self.wake.read();
        match CAME.load(SeqCst) {
            0 if GOES_ON.swap(false, SeqCst) => Some(libc::SIGCONT as u8),
            0 => None,
            signal => u8::try_from(signal).ok(),
        }
    }

    /// The process is about to end, by a signal or not. That may take longer than a signal has to be taken
    /// up; a signal that comes now means that it shall not.
    #[allow(unsafe_code)]
    pub fn begin_end(&self) {
        IS_ENDING.store(true, SeqCst);
        // SAFETY: the call reads a local set and changes this thread's mask.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.nothing, ptr::null_mut()) };
    }

    /// Ends the part of an orderly end that may take long. The steps that are left are short, but a disk that
    /// does not answer, below a log file for example, can hold them up: a signal gets its 2 s again.
    pub fn conclude(&self) {
        IS_ENDING.store(false, SeqCst);
        if CAME.load(SeqCst) != 0 && !IS_URGENT.load(SeqCst) {
            arm(PATIENCE);
        }
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

/// The socket's file, as far as signals are concerned: an end at once removes it. To be dropped after the
/// server, which removes it otherwise.
pub struct SocketFile(());

impl SocketFile {
    /// The socket at `path` is ours, of this device and inode; none: it is gone already.
    pub fn own(path: &Path, identity: Option<(u64, u64)>) -> Result<Self> {
        let path = CString::new(path.as_os_str().as_encoded_bytes()).context("read the socket's path")?;
        if let Some(identity) = identity {
            // Never freed: a handler may be using it.
            SOCKET.store(Box::into_raw(Box::new(Socket { path, identity })), SeqCst);
        }
        Ok(Self(()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        SOCKET.store(ptr::null_mut(), SeqCst);
    }
}

// From here on: what handlers do, in any thread and in the midst of anything. They use atomics and
// async-signal-safe calls (signal-safety(7)), and leave `errno` as it was.

extern "C" fn on_ending(signal: i32) {
    keep_errno(|| {
        let is_first = CAME.compare_exchange(0, signal, SeqCst, SeqCst).is_ok();
        if is_first && !IS_ENDING.load(SeqCst) {
            arm(PATIENCE);
            wake();
        } else if signal != libc::SIGXCPU {
            // The kernel repeats SIGXCPU with every second of CPU time: nobody insists by it.
            CAME.store(signal, SeqCst);
            if !IS_URGENT.swap(true, SeqCst) {
                arm(GRACE);
            }
        }
    });
}

extern "C" fn on_going_on(_: i32) {
    keep_errno(|| {
        GOES_ON.store(true, SeqCst);
        wake();
    });
}

extern "C" fn on_timer(_: i32) {
    keep_errno(|| match (CAME.load(SeqCst), IS_URGENT.load(SeqCst)) {
        // No signal is noted: the one that armed the timer was an ignored one, and was forgotten.
        (0, _) => {}
        (_, false) if IS_ENDING.load(SeqCst) => say(WRITING),
        (signal, is_urgent) => end_at_once(signal, if is_urgent { INSISTED } else { HELD_UP }),
    });
}

#[allow(unsafe_code)]
fn end_at_once(signal: i32, words: &[u8]) {
    // If anything below is held up, SIGALRM kills.
    let kill = action(libc::SIG_DFL, 0, &[]);
    // SAFETY: the call reads a local structure.
    unsafe { libc::sigaction(libc::SIGALRM, &kill, ptr::null_mut()) };
    start_timer(GRACE);
    terminal::restore();
    // SAFETY: it is null or what was leaked by `SocketFile::own`, and never changes.
    if let Some(socket) = unsafe { SOCKET.load(SeqCst).as_ref() } {
        remove(socket);
    }
    say(words);
    let code = u8::try_from(signal).map_or(u8::MAX, exit_code);
    // SAFETY: the call takes a number, and does not return.
    unsafe { libc::_exit(code.into()) };
}

/// Removes the socket's file, unless somebody else has theirs at its path by now.
#[allow(unsafe_code)]
fn remove(Socket { path, identity }: &Socket) {
    // SAFETY: `stat` is plain data of which zeros are valid; the calls use it and a string that ends with a zero.
    unsafe {
        let mut found: libc::stat = std::mem::zeroed();
        if libc::lstat(path.as_ptr(), &mut found) == 0 && (found.st_dev, found.st_ino) == *identity {
            libc::unlink(path.as_ptr());
        }
    }
}

/// Says it on standard error, if that does not wait for its reader.
#[allow(unsafe_code)]
fn say(words: &[u8]) {
    let mut poll = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    // SAFETY: the calls use one local structure, as the count says, and the slice as long as it is.
    unsafe {
        if libc::poll(&mut poll, 1, 0) == 1 {
            libc::write(libc::STDERR_FILENO, words.as_ptr().cast(), words.len());
        }
    }
}

fn wake() {
    if let Some(wake) = WAKE.get() {
        // A counter that is full wakes as well.
        let _ = wake.write(1);
    }
}

/// Has the timer's handler called after this time.
fn arm(after: Duration) {
    // The kernel would stop a background process that restores the terminal (SIGTTOU), and would keep the
    // timer's signal from killing while the handler runs (SA_NODEFER).
    handle(libc::SIGALRM, on_timer, libc::SA_NODEFER, &[libc::SIGTTOU]);
    start_timer(after);
}

#[allow(unsafe_code)]
fn start_timer(after: Duration) {
    let never = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let after = libc::timeval { tv_sec: after.as_secs() as _, tv_usec: after.subsec_micros().into() };
    let timer = libc::itimerval { it_interval: never, it_value: after };
    // SAFETY: the call reads a local structure.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, ptr::null_mut()) };
}

#[allow(unsafe_code)]
fn keep_errno(body: impl FnOnce()) {
    // SAFETY: the pointer is to this thread's own number.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    body();
    // SAFETY: as above.
    unsafe { *errno = before };
}

/// Has `handler` called, with `beside` blocked meanwhile, and calls that it interrupts begun again; returns
/// what was done before.
#[allow(unsafe_code)]
fn handle(signal: i32, handler: extern "C" fn(i32), flags: i32, beside: &[i32]) -> libc::sigaction {
    let handled = action(handler as *const () as usize, flags | libc::SA_RESTART, beside);
    // SAFETY: the structure is plain data of which zeros are valid; the handlers here may be called at any
    // time.
    unsafe {
        let mut before: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, &handled, &mut before);
        before
    }
}

/// Has `handler` called; false: the signal was ignored, and stays so, here and in programs started from here.
#[allow(unsafe_code)]
fn handle_unless_ignored(signal: i32, handler: extern "C" fn(i32)) -> bool {
    let before = handle(signal, handler, 0, &[]);
    let was_ignored = before.sa_sigaction == libc::SIG_IGN;
    if was_ignored {
        // SAFETY: the call reads what it returned.
        unsafe { libc::sigaction(signal, &before, ptr::null_mut()) };
    }
    !was_ignored
}

#[allow(unsafe_code)]
fn action(what: libc::sighandler_t, flags: i32, beside: &[i32]) -> libc::sigaction {
    // SAFETY: the structure is plain data of which zeros are valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = what;
    action.sa_flags = flags;
    action.sa_mask = set_of(beside);
    action
}

#[allow(unsafe_code)]
fn set_of(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: `sigset_t` is plain data that sigemptyset initialises.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in signals {
            libc::sigaddset(&mut set, *signal);
        }
        set
    }
}
