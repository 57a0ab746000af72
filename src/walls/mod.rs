//! The walls: what is left of the kernel to this process once its guest runs, should somebody break into it. Each
//! thread has a filter of system calls of its kind, which `build/filters.rs` makes of the lists in
//! `resources/seccomp`, rules of Landlock, and no way to gain rights.
//!
//! A new system call gets into a list by one line: in `common.list` if all threads make it, in `vcpu.list`,
//! `io.list` or `job.list` for those threads, else in `main.list`; with the values its arguments have where they say
//! what it does, and with the reason; a test makes it (`tests/used.rs`). `main.list` is also for threads that `main` starts
//! once its guest runs and that have no list of their own. A call that is needed only before the guest runs needs no line.
//!
//! The threads of a guest that boots again, by a reset of its machine, have the filter of `main` beneath their own, and each
//! call of theirs passes both: `main` may do all that any of them may.
//!
//! `main` goes in two steps. Before its guest runs it may start programs (passt), which inherit its filter, so that
//! the first filter, `early.list`, names what is refused. When the gate is first opened, [`close`] lays the other one. A
//! template stays at the first step ([`keep_first`]), and its clones go on from there.

mod landlock;
pub mod refusal;

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use crate::descriptors::Named;
use crate::error::{Context, Error, Result};
use crate::log;
use crate::paths;
use crate::sys::confine::{self, Instruction, Ruleset};
use landlock::Landlock;

/// The filters' programs, and the names of system calls, which build.rs has made.
mod made {
    use super::Instruction;
    include!(concat!(env!("OUT_DIR"), "/filters.rs"));
}

/// The purpose of a thread, which says what the thread may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The thread of a guest's CPU, which runs guest code.
    Vcpu,
    /// A thread that runs devices' workers.
    Io,
    /// A thread that does one thing that takes long, for `main`.
    Job,
    /// A thread that takes signals as `main` does, or looks after a page-fault handler: it may do what `main` may once
    /// the guest runs.
    Aide,
}

/// The fate of a system call that a filter does not allow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Filters {
    /// A call that is not allowed ends the process.
    #[default]
    Strict,
    /// A call that is not allowed is told of, and made.
    Told,
    /// There are no filters.
    None,
}

/// The user's wishes for the walls.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The filters of system calls.
    pub filters: Filters,
    /// No rules of Landlock: `main` opens what its user may open, executes and makes devices as far as it can.
    pub no_rules: bool,
    /// `main` opens files in these folders only; empty: it may open all that its user may.
    pub allowed: Vec<PathBuf>,
    /// A folder that this process has made for itself: `main` opens files in there, too, and removes it when it ends.
    pub own: Option<PathBuf>,
}

/// The parts that the walls of this process are made of.
struct Walls {
    filters: Filters,
    /// The number of this process, by which it may send signals to itself alone.
    process: u32,
    /// The rules for threads that open nothing.
    of_threads: Option<Named<Ruleset>>,
    /// The rules for `main` and who works for it; `is_narrow`: `main` has had them from the beginning.
    of_main: Option<Named<Ruleset>>,
    is_narrow: bool,
}

/// The walls of this process; none: it runs no guest, and has no walls.
static WALLS: OnceLock<Walls> = OnceLock::new();
thread_local! {
    static IS_ENCLOSED: Cell<bool> = const { Cell::new(false) };
}

/// Whether [`enclose`] has laid walls upon this thread.
pub fn is_enclosed() -> bool {
    IS_ENCLOSED.get()
}

/// `main` has its first filter.
static IS_PREPARED: AtomicBool = AtomicBool::new(false);
/// `main` has its last filter, and so has what it starts.
static IS_CLOSED: AtomicBool = AtomicBool::new(false);

/// Makes the walls ready that are laid upon threads from now on, and says which of them this host has not. With
/// folders that are allowed, `main` is kept within them from here on; it still removes its `socket` when it ends. No
/// thread but that of `main` may be there yet.
///
/// # Errors
/// A folder that is to be allowed cannot be opened, or this host cannot keep `main` within it.
pub fn begin(wanted: &Wanted, socket: Option<&Path>) -> Result<()> {
    let filters = match (wanted.filters, confine::check_filters()) {
        (Filters::None, _) => {
            log::info("--no-seccomp: system calls are not filtered");
            Filters::None
        }
        (_, Err(error)) => {
            log::line(format_args!("this kernel has no filters of system calls (seccomp): {error}"));
            Filters::None
        }
        (filters, Ok(())) => filters,
    };
    let landlock = match Landlock::find() {
        _ if wanted.no_rules => {
            log::info("--no-sandbox: files and ports are not restricted");
            None
        }
        Err(error) if wanted.allowed.is_empty() => {
            log::line(format_args!("this kernel has no Landlock, or it is switched off: {error}"));
            None
        }
        Err(error) => {
            return Err(Error::host(format!(
                "--allow needs Landlock, which this kernel does not have, or which is switched off: {error}"
            )));
        }
        Ok(landlock) => Some(landlock),
    };
    if filters != Filters::None || landlock.is_some() {
        confine::gain_no_privileges().context("give up rights to be gained")?;
    }
    let is_narrow = !wanted.allowed.is_empty();
    let socket = socket.map(paths::folder);
    let of_main = landlock.map(|landlock| match is_narrow {
        true => landlock.of_main_within(&wanted.allowed, wanted.own.as_deref(), socket),
        false => landlock.of_main(),
    });
    let walls = Walls {
        filters,
        process: std::process::id(),
        of_threads: landlock.map(Landlock::of_threads).transpose()?.map(|rules| named("threads", rules)),
        of_main: of_main.transpose()?.map(|rules| named("main", rules)),
        is_narrow,
    };
    if is_narrow {
        enter(walls.of_main.as_ref())?;
        paths::note_limits();
    }
    if filters == Filters::Told {
        refusal::learn_address()?;
    }
    let _ = WALLS.set(walls);
    Ok(())
}

fn named(whose: &str, rules: Ruleset) -> Named<Ruleset> {
    Named::new(format!("rules of {whose}"), rules)
}

fn enter(rules: Option<&Named<Ruleset>>) -> Result<()> {
    rules.map_or(Ok(()), |rules| rules.enter().context("keep a thread from files and ports (Landlock)"))
}

/// Lays upon a template what it keeps, and what its clones inherit: no way to gain rights, and the first filter of `main`.
/// Each clone [`begin`]s with the walls that are `wanted`, of which that filter is there already. Where calls that are not
/// allowed are to be made all the same, the filter comes with the clone, which can tell of them. No thread but that of
/// `main` may be there yet.
///
/// # Errors
/// The kernel has no memory for the filter.
pub fn keep_first(wanted: &Wanted) -> Result<()> {
    if wanted.filters != Filters::None || !wanted.no_rules {
        confine::gain_no_privileges().context("give up rights to be gained")?;
    }
    if wanted.filters != Filters::Strict {
        return Ok(());
    }
    // Each clone tells of a kernel that has no filters.
    if confine::check_filters().is_ok() && !IS_PREPARED.swap(true, SeqCst) {
        confine::filter(&made::EARLY).context("lay a filter of system calls upon a template (seccomp)")?;
    }
    Ok(())
}

/// Lays upon `main` the filter that it has before its guest runs, while nobody waits. No effect the second time.
///
/// # Errors
/// The kernel has no memory for the filter.
pub fn prepare() -> Result<()> {
    match WALLS.get() {
        Some(walls) if !IS_CLOSED.load(SeqCst) && !IS_PREPARED.swap(true, SeqCst) => lay(walls, &made::EARLY),
        _ => Ok(()),
    }
}

/// Lays the walls of its kind upon this thread, which has just begun. A thread that can have none ends the process.
pub fn enclose(kind: Kind) {
    let Some(walls) = WALLS.get() else { return };
    let rules = match kind {
        Kind::Vcpu | Kind::Io => &walls.of_threads,
        Kind::Job | Kind::Aide => &walls.of_main,
    };
    let enclosed = enter(rules.as_ref()).and_then(|()| match kind {
        Kind::Vcpu => lay(walls, &made::VCPU),
        Kind::Io => lay(walls, &made::IO),
        Kind::Job => lay(walls, &made::JOB),
        Kind::Aide => lay(walls, &made::MAIN),
    });
    if let Err(error) = enclosed {
        refusal::end_without_walls(&error);
    }
    IS_ENCLOSED.set(true);
}

/// The function that a thread which `main` starts as its aide calls first. A thread that is started once `main` has its
/// last walls has inherited them: were they laid twice, each call of the thread would pass two filters that are the same.
pub fn of_aide() -> impl FnOnce() {
    let inherits = IS_CLOSED.load(SeqCst);
    move || match inherits {
        true => IS_ENCLOSED.set(true),
        false => enclose(Kind::Aide),
    }
}

/// Lays upon `main` the walls that it has from now on, for good: its guest runs, and no program is started any more. No
/// effect the second time.
///
/// # Errors
/// The kernel has no memory for the filter.
pub fn close() -> Result<()> {
    let Some(walls) = WALLS.get() else { return Ok(()) };
    if IS_CLOSED.load(SeqCst) {
        return Ok(());
    }
    if !walls.is_narrow {
        enter(walls.of_main.as_ref())?;
    }
    lay(walls, &made::MAIN)?;
    IS_CLOSED.store(true, SeqCst);
    Ok(())
}

/// Whether `main` may still start a program.
///
/// # Errors
/// `main` may not start the program: why, and what to do.
pub fn check_may_start(program: &str) -> Result<()> {
    let Some(walls) = WALLS.get() else { return Ok(()) };
    let why = match walls.is_narrow {
        true => "with --allow no program is started",
        false if walls.filters == Filters::None && walls.of_main.is_none() => return Ok(()),
        false if IS_CLOSED.load(SeqCst) => "no program is started once the guest has run",
        false => return Ok(()),
    };
    Err(Error::config(format!(
        "start `{program}`: {why}: give the interface a TAP (`host_dev_name`), or the descriptors of one (`fd:N`), \
         or say --no-sandbox"
    )))
}

/// Lays a filter upon this thread. Each length has a function of its own, which is never made part of its caller: the
/// stack of a vCPU's thread would have room for the longest filter of all, and keep that page.
#[inline(never)]
fn lay<const LENGTH: usize>(walls: &Walls, program: &[Instruction; LENGTH]) -> Result<()> {
    if walls.filters == Filters::None {
        return Ok(());
    }
    // The copy is on the stack: the first block of memory that a thread allocates costs more than the filter.
    let mut copy = *program;
    put_own(&mut copy, walls.process);
    match walls.filters {
        Filters::Told => confine::filter(&refusal::told(&copy)),
        _ => confine::filter(&copy),
    }
    .context("lay a filter of system calls upon a thread (seccomp)")
}

/// Puts the number of the process into a program, where arguments are compared with it.
fn put_own(program: &mut [Instruction], process: u32) {
    for instruction in program {
        if (instruction.code, instruction.k) == (made::JUMP_IF_EQUAL, made::OWN) {
            instruction.k = process;
        }
    }
}
