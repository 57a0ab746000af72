//! The signals that end the process, whatever its main thread does, and the one that says it goes on.
//!
//! Handlers note a signal, whose coming interrupts the wait of the main loop, which ends in order. A signal can come
//! when the loop has looked for signals and does not wait yet, or to another thread: so handlers start a timer that
//! ticks, and each tick interrupts the wait, too. If the loop does not take the signal up in time, or if another one
//! comes, the timer's handler ends the process at once: it restores the terminal, removes the files of the sockets, and
//! exits with the code that the signal has. A panic, in any thread, ends the process at once, too, and removes them.
//!
//! Which thread runs a handler makes no difference. The main thread is the kernel's first choice. Once a
//! guest runs, the main thread lets these signals in only while it waits for events: what else it does may
//! take for ever (a file on a file system that does not answer holds it where only SIGKILL reaches it), and
//! meanwhile the thread `signals` takes them, which does nothing else. All others block them: a disk can hold the
//! threads of devices in the same way, and the walls of a vCPU's thread do not let it remove files. Before its
//! guest runs, the process has no such thread, and such a file system leaves it to SIGKILL.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use crate::error::{Context, Result};
use crate::history::{self, Event};
use crate::host::socket_file;
use crate::log;
use crate::memory::lost;
use crate::poll::{Events, Ready};
use crate::sys::confine::{self, Refused};
use crate::sys::{descriptor, process};
use crate::terminal;
use crate::walls::{self, refusal};

const ENDING: [i32; 5] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGXCPU];

/// The time between two ticks of the timer: so late a signal is taken up that comes just before a wait.
const TICK: Duration = Duration::from_millis(20);
/// How many ticks the main loop has to take a signal up, 2 s. What holds it longer may hold it for ever.
const PATIENCE: u32 = 100;
/// How long an end in order still has after another signal. Two that come within a moment are one wish: a
/// shell passes on the hang-up of its terminal, which the kernel tells, too.
const GRACE: Duration = Duration::from_millis(100);
const GRACE_TICKS: u32 = (GRACE.as_millis() / TICK.as_millis()) as u32;
/// How long the last steps of an end at once may take. They are short, but a machine that has many programs to run may
/// let each wait for its turn longer than [`GRACE`], and a process that is killed tells nobody how it ended.
const LAST_STEPS: Duration = Duration::from_secs(2);

/// A signal's number is added to this, as shells do.
const SIGNAL_BASE: u8 = 128;
/// Guest memory is gone from its file (Firecracker's code for SIGBUS).
pub const MEMORY_LOST: u8 = 149;
/// A system call was made that a filter does not allow (Firecracker's code for SIGSYS).
pub const REFUSED: u8 = 148;
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
/// The terminal has another size.
static IS_RESIZED: AtomicBool = AtomicBool::new(false);
/// The process was stopped, and goes on.
static GOES_ON: AtomicBool = AtomicBool::new(false);
/// A thread panics that may not remove files.
static PANICS: AtomicBool = AtomicBool::new(false);
/// How many ticks of the timer are left until its handler does what is to be done.
static TICKS: AtomicU32 = AtomicU32::new(0);

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

/// Has the process end by [`lost::is_lost`] when it touches guest memory that is gone from its file; for machines whose
/// memory comes from one. The thread's own stack is as sound as ever then, so that the handler needs none of its own,
/// which would be one more system call for each thread.
pub fn watch_memory() {
    process::handle_fault(libc::SIGBUS, on_bus_error);
}

/// Has the main loop end the process for what was noted: memory that is lost, or a system call that was refused. The
/// process is ended all the same if the loop does not turn.
pub fn end_soon() {
    arm(PATIENCE);
}

/// Has a system call that a filter does not allow end a process of one thread, whose signals are not taken over.
pub fn end_when_refused() {
    confine::handle_refused(on_refused);
}

/// Whether the process is about to end in order, which may take as long as what it waits for.
pub fn is_ending() -> bool {
    IS_ENDING.load(SeqCst)
}

/// Ends the process, whose guest has lost its memory: without waiting for threads that may wait for it for ever.
pub fn end_by_lost_memory() -> ! {
    end_at_once(MEMORY_LOST, || ())
}

/// Ending signals come here instead of ending the process by themselves, unless they were ignored when it
/// was started (nohup(1), a background job of a script), and SIGCONT does, if it is asked for.
pub struct Signals {
    /// The main thread's mask while it waits: it lets everything in.
    nothing: libc::sigset_t,
}

impl Signals {
    /// Sets up the handlers and the panic hook, and lets in signals that the process was started with blocked: its
    /// parent has blocked them for reasons of its own.
    pub fn take_over() -> Self {
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if walls::is_enclosed() {
                clean_up_by_others();
                // The library would look for the files of a backtrace.
                return process::write_error(format!("\nthread {panic}\n").as_bytes());
            }
            socket_file::remove_all();
            report(panic);
        }));
        refusal::tell(end_soon);
        confine::handle_refused(on_refused);
        for signal in ENDING {
            if !handle_unless_ignored(signal, on_ending) {
                // An ignored signal may have reached the handler while that was installed: it is forgotten.
                let _ = CAME.compare_exchange(signal, 0, SeqCst, SeqCst);
            }
        }
        let nothing = process::signals(&[]);
        process::set_signal_mask(&nothing);
        Self { nothing }
    }

    /// From here on [`Self::next`] also tells of SIGCONT.
    pub fn tell_of_going_on(&self) {
        process::handle(libc::SIGCONT, on_going_on, 0, &[]);
    }

    /// From here on [`Self::is_resized`] tells of another size of the terminal (SIGWINCH), which this thread learns in
    /// [`Self::wait`] alone. To be called before there are threads that do not block that signal.
    pub fn tell_of_sizes(&self) {
        process::block_signals(&process::signals(&[libc::SIGWINCH]));
        process::handle(libc::SIGWINCH, on_resized, 0, &[]);
    }

    /// Whether the terminal has had another size since this was last asked.
    pub fn is_resized(&self) -> bool {
        IS_RESIZED.swap(false, SeqCst)
    }

    /// From here on this thread takes ending signals only in [`Self::wait`]: another thread is there to take them
    /// otherwise.
    ///
    /// # Errors
    /// The host gives no more threads.
    pub fn share(&self) -> Result<()> {
        let thread = std::thread::Builder::new().name("signals".to_owned());
        // A restored guest that stands still has this thread before `main` lays its own last walls, and a filter is one
        // thread's.
        let enclose = walls::of_aide();
        let wait = || {
            enclose();
            process::sleep_for_ever()
        };
        thread.spawn(wait).context("start the thread `signals`")?;
        let [a, b, c, d, e] = ENDING;
        process::block_signals(&process::signals(&[a, b, c, d, e, libc::SIGALRM]));
        Ok(())
    }

    /// Waits for events, and for signals, which end the wait. Whoever waits looks for signals before
    /// ([`Self::next`]).
    pub fn wait(&self, events: &Events, timeout: Option<Duration>, ready: &mut Vec<Ready>) -> Result<()> {
        events.wait_masked(timeout, ready, &self.nothing)
    }

    /// The signal that came, if one did.
    pub fn next(&self) -> Option<u8> {
        match CAME.load(SeqCst) {
            0 if GOES_ON.swap(false, SeqCst) => Some(libc::SIGCONT as u8),
            0 => None,
            signal => u8::try_from(signal).ok(),
        }
    }

    /// The process is about to end, by a signal or not. That may take longer than a signal has to be taken
    /// up; a signal that comes now means that it shall not.
    pub fn begin_end(&self) {
        IS_ENDING.store(true, SeqCst);
        process::set_signal_mask(&self.nothing);
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

// From here on: what handlers do, in any thread and in the midst of anything. They use atomics and
// async-signal-safe calls (signal-safety(7)), and leave `errno` as it was.

extern "C" fn on_ending(signal: i32) {
    process::keep_errno(|| {
        let is_first = CAME.compare_exchange(0, signal, SeqCst, SeqCst).is_ok();
        if is_first && !IS_ENDING.load(SeqCst) {
            arm(PATIENCE);
        } else if signal != libc::SIGXCPU {
            // The kernel repeats SIGXCPU with every second of CPU time: nobody insists by it.
            CAME.store(signal, SeqCst);
            if !IS_URGENT.swap(true, SeqCst) {
                arm(GRACE_TICKS);
            }
        }
    });
}

extern "C" fn on_resized(_: i32) {
    IS_RESIZED.store(true, SeqCst);
}

extern "C" fn on_going_on(_: i32) {
    process::keep_errno(|| {
        GOES_ON.store(true, SeqCst);
        // The time of a signal that ends the process runs already.
        if CAME.load(SeqCst) == 0 {
            arm(PATIENCE);
        }
    });
}

/// A tick. Most of them only interrupt the main loop's wait; the last one does what is to be done.
extern "C" fn on_timer(_: i32) {
    process::keep_errno(|| {
        // No tick is left: this one was under way when the timer was stopped.
        let Ok(before) = TICKS.fetch_update(SeqCst, SeqCst, |ticks| ticks.checked_sub(1)) else { return };
        let left = before - 1;
        let is_over =
            CAME.load(SeqCst) == 0 && !GOES_ON.load(SeqCst) && !lost::is_lost() && !refusal::is_noted();
        if left == 0 || is_over && TICKS.compare_exchange(left, 0, SeqCst, SeqCst).is_ok() {
            process::start_timer(Duration::ZERO, Duration::ZERO);
            // A signal that another thread has handled meanwhile needs the timer that was just stopped.
            if TICKS.load(SeqCst) != 0 {
                process::start_timer(TICK, TICK);
            }
        }
        if left == 0 {
            on_last_tick();
        }
    });
}

fn on_last_tick() {
    match (CAME.load(SeqCst), IS_URGENT.load(SeqCst)) {
        _ if lost::is_lost() => end_at_once(MEMORY_LOST, say_lost),
        _ if refusal::is_noted() => end_at_once(REFUSED, say_refused),
        _ if PANICS.load(SeqCst) => {
            terminal::restore();
            socket_file::remove_all();
            PANICS.store(false, SeqCst);
        }
        // The process goes on after a stop, and the main loop is held up: that is no reason to end.
        (0, _) => {}
        (_, false) if IS_ENDING.load(SeqCst) => say(WRITING),
        (signal, is_urgent) => {
            let code = u8::try_from(signal).map_or(u8::MAX, exit_code);
            end_at_once(code, || say(if is_urgent { INSISTED } else { HELD_UP }))
        }
    }
}

/// Memory that this thread has touched is not there. The main loop has the time to tell of it that it has to take up a
/// signal; this thread, which cannot go on, may hold a lock that it needs.
extern "C" fn on_bus_error(signal: i32, fault: process::Fault<'_>) {
    let is_ours = fault.address().is_some_and(lost::note_fault);
    if !is_ours {
        // As if there were no handler. The signal comes again when this returns.
        process::handle_by_default(signal);
        return process::raise(signal);
    }
    if process::is_main_thread() {
        end_at_once(MEMORY_LOST, say_lost);
    }
    end_soon();
    process::sleep_for_ever();
}

/// This thread has made a system call that its filter does not allow. The main loop tells of it and ends the process, if
/// it does not do so in time, whoever takes the timer's signal.
extern "C" fn on_refused(signal: i32, refused: &Refused, context: &mut confine::Context) {
    if !refused.is_by_filter() {
        // As if there were no handler. The signal comes again when this returns.
        process::handle_by_default(signal);
        return process::raise(signal);
    }
    let is_first = refusal::note(refused, context);
    if process::is_main_thread() {
        match is_first {
            true => end_at_once(REFUSED, say_refused),
            // The call was refused within what the line above does.
            false => process::exit_now(REFUSED),
        }
    }
    end_soon();
    process::sleep_for_ever();
}

/// Ends the process because of a system call that was refused, after its readers have been told.
pub fn end_by_refusal() -> ! {
    end_at_once(REFUSED, || ())
}

/// A system call is refused exactly where it is made, and the allocator makes none that are: what the last words need
/// can be allocated. A lock that they need is tried, and the timer ends the process if they are held up.
fn say_refused() {
    if has_reader() {
        refusal::say(process::write_error);
    }
    let reason = refusal::words();
    log::aside_in_file(&reason);
    history::tell_at_once(Event::Ended { reason: history::text(&reason), exit_code: REFUSED });
}

/// Has another thread put the terminal and sockets in order, for a thread that panics and may not.
fn clean_up_by_others() {
    const STEP: Duration = Duration::from_millis(1);
    const STEPS: u32 = 100;
    PANICS.store(true, SeqCst);
    arm(1);
    for _ in 0..STEPS {
        if !PANICS.load(SeqCst) {
            return;
        }
        std::thread::sleep(STEP);
    }
}

fn say_lost() {
    if has_reader() {
        process::write_error(b"alula: ");
        lost::say(process::write_error);
        process::write_error(b"\n");
    }
}

fn end_at_once(code: u8, say: impl FnOnce()) -> ! {
    // If anything below is held up, SIGALRM kills.
    process::handle_by_default(libc::SIGALRM);
    process::start_timer(LAST_STEPS, Duration::ZERO);
    terminal::restore();
    socket_file::remove_all();
    say();
    process::exit_now(code);
}

/// Says it on standard error, if that does not wait for its reader.
fn say(words: &[u8]) {
    if has_reader() {
        process::write_error(words);
    }
}

fn has_reader() -> bool {
    descriptor::poll(&libc::STDERR_FILENO, libc::POLLOUT, 0) != 0
}

/// Has the timer tick so often before its handler does what is to be done.
fn arm(ticks: u32) {
    TICKS.store(ticks, SeqCst);
    // The kernel would stop a background process that restores the terminal (SIGTTOU), and would keep the
    // timer's signal from killing while the handler runs (SA_NODEFER).
    process::handle(libc::SIGALRM, on_timer, libc::SA_NODEFER, &[libc::SIGTTOU]);
    process::start_timer(TICK, TICK);
}

/// Has `handler` called; false: the signal was ignored, and stays so, here and in programs started from here.
fn handle_unless_ignored(signal: i32, handler: extern "C" fn(i32)) -> bool {
    let before = process::handle(signal, handler, 0, &[]);
    let was_ignored = before.sa_sigaction == libc::SIG_IGN;
    if was_ignored {
        process::handle_as_before(signal, &before);
    }
    !was_ignored
}
