//! The walls: what is left of the kernel to this process once its guest runs, should somebody break into it. Each
//! thread has a filter of system calls of its kind, which `build/filters.rs` makes of the lists in
//! `resources/seccomp`, rules of Landlock, and no way to gain rights.
//!
//! A new system call gets into a list by one line: in `common.list` if all threads make it, in `vcpu.list`,
//! `io.list` or `job.list` for those threads, else in `main.list`; with the values its arguments have where they say
//! what it does, and with the reason. `main.list` is also for threads that `main` starts once its guest runs and that
//! have no list of their own. A call that is needed only before the guest runs needs no line.
//!
//! `main` goes in two steps. Before its guest runs it may start programs (passt), which inherit its filter, so
//! that this one, `early.list`, names what is refused. When the gate is first opened, [`close`] lays the other one.

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

/// The programs, and the names of system calls, which build.rs has made.
mod made {
    use super::Instruction;
    include!(concat!(env!("OUT_DIR"), "/filters.rs"));
}

/// What a thread is there for, which says what it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It runs guest code.
    Vcpu,
    /// It runs devices' workers.
    Io,
    /// It does one thing that takes long, for `main`.
    Job,
    /// It takes signals as `main` does, or looks after a page-fault handler, too: what `main` may do once its guest runs.
    Aide,
}

/// What becomes of a system call that a filter does not allow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Filters {
    /// It ends the process.
    #[default]
    Strict,
    /// It is told of, and made.
    Told,
    /// There are no filters.
    None,
}

/// What the user wants of the walls.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The filters of system calls.
    pub filters: Filters,
    /// No rules of Landlock: `main` opens what its user may open, executes and makes devices as far as it can.
    pub no_rules: bool,
    /// `main` opens files in these folders only; empty: it may open all that its user may.
    pub allowed: Vec<PathBuf>,
}

/// What the walls of this process are made of.
struct Walls {
    filters: Filters,
    /// For threads that open nothing.
    of_threads: Option<Named<Ruleset>>,
    /// For `main` and who works for it; `is_narrow`: `main` has had it from the beginning.
    of_main: Option<Named<Ruleset>>,
    is_narrow: bool,
}

/// None: this process runs no guest, and has none.
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

/// Makes ready what is laid upon threads from now on, and says what this host has none of. With folders that are
/// allowed, `main` is kept within them from here on; it still removes its `socket` when it ends. What is
/// there already must be the thread of `main` alone.
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
        true => landlock.of_main_within(&wanted.allowed, socket),
        false => landlock.of_main(),
    });
    let walls = Walls {
        filters,
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

/// Lays what `main` has before its guest runs upon it, while nobody waits. No effect the second time.
///
/// # Errors
/// The kernel has no memory for it.
pub fn prepare() -> Result<()> {
    match WALLS.get() {
        Some(walls) if !IS_CLOSED.load(SeqCst) && !IS_PREPARED.swap(true, SeqCst) => lay(walls, &made::EARLY),
        _ => Ok(()),
    }
}

/// Lays upon this thread, which has just begun, what its kind has. One without walls ends the process.
pub fn enclose(kind: Kind) {
    let Some(walls) = WALLS.get() else { return };
    let (rules, program): (_, &[Instruction]) = match kind {
        Kind::Vcpu => (&walls.of_threads, &made::VCPU),
        Kind::Io => (&walls.of_threads, &made::IO),
        Kind::Job => (&walls.of_main, &made::JOB),
        Kind::Aide => (&walls.of_main, &made::MAIN),
    };
    if let Err(error) = enter(rules.as_ref()).and_then(|()| lay(walls, program)) {
        refusal::end_without_walls(&error);
    }
    IS_ENCLOSED.set(true);
}

/// Lays upon `main` what it has from now on, for good: its guest runs, and no program is started any more. No effect
/// the second time.
///
/// # Errors
/// The kernel has no memory for it.
pub fn close() -> Result<()> {
    let Some(walls) = WALLS.get() else { return Ok(()) };
    if IS_CLOSED.swap(true, SeqCst) {
        return Ok(());
    }
    if !walls.is_narrow {
        enter(walls.of_main.as_ref())?;
    }
    lay(walls, &made::MAIN)
}

/// Whether `main` may still start a program.
///
/// # Errors
/// It may not: why, and what to do.
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

fn lay(walls: &Walls, program: &[Instruction]) -> Result<()> {
    match walls.filters {
        Filters::None => return Ok(()),
        Filters::Strict => confine::filter(program),
        Filters::Told => confine::filter(&refusal::told(program)),
    }
    .context("lay a filter of system calls upon a thread (seccomp)")
}
