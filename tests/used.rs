//! No thread may call what no test uses: each line of the lists in `resources/seccomp` is used by a test, and no thread
//! calls what has no line. strace(1) takes down the calls of other tests (`scripts/test --long`), and what it cannot see is
//! named here.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "../build/filters.rs"]
#[allow(dead_code, reason = "what a list says is enough here")]
mod filters;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use filters::{Arch, LISTS, Line, OWN};

const ARCH: Arch = if cfg!(target_arch = "x86_64") { Arch::X86_64 } else { Arch::Aarch64 };
const COMMON: &str = "common";
/// The threads that do one thing for `main`, by their names.
const JOBS: &[&str] = &["ahead", "change", "guest", "note", "snapshot", "unplug"];
/// The threads that have the walls of `main`.
const AIDES: &[&str] = &["brake", "command", "faults", "signals"];

fn read(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The lines of the lists of what is allowed, with their lists.
fn lines(arch: Arch) -> Vec<(&'static str, String)> {
    let lists = [COMMON, "vcpu", "io", "job", "main"];
    let text = lists.map(|list| (list, read(&format!("resources/seccomp/{list}.list"))));
    let lines = text.iter().flat_map(|(list, text)| text.lines().map(|line| (*list, line.to_owned())));
    lines.filter(|(_, line)| !filters::parse(line, arch).unwrap().is_empty()).collect()
}

/// The list of a thread, by its name; none: it is no thread of a monitor, but for `main`, whose name is its program's.
fn list_of(thread: &str) -> Option<&'static str> {
    match thread {
        "io" => Some("io"),
        name if name.starts_with("io-") => Some("io"),
        name if name.starts_with("vcpu") => Some("vcpu"),
        name if JOBS.contains(&name) => Some("job"),
        name if AIDES.contains(&name) => Some("main"),
        _ => None,
    }
}

/// A call that was taken down: `NUMBER<THREAD> NAME(ARGUMENTS`.
struct Call<'a> {
    number: &'a str,
    thread: &'a str,
    name: &'a str,
    /// As they stand there.
    text: &'a str,
    arguments: Vec<u32>,
}

impl<'a> Call<'a> {
    /// Reads a line. There is no call in one that has the end of a call whose beginning was told, the end of a thread, or
    /// `???`, a call of a thread that was killed before strace(1) could look.
    fn parse(line: &'a str) -> Option<Self> {
        let (number, rest) = line.split_once('<')?;
        let (thread, rest) = rest.split_once("> ")?;
        let (name, text) =
            rest.trim_start().split_once('(').filter(|(name, _)| !name.starts_with(['<', '+', '-', '?']))?;
        let words = text.split([',', ')', ' ']).filter(|word| !word.is_empty()).take(6);
        let arguments = words.map(|word| match word.strip_prefix("0x") {
            // The kernel's filters look at the lower half.
            Some(digits) => u64::from_str_radix(digits, 16).unwrap_or_default() as u32,
            None => word.parse().unwrap_or_default(),
        });
        Some(Self { number, thread, name, text, arguments: arguments.collect() })
    }

    fn is_one_of(&self, line: &Line<'_>) -> bool {
        let argument = |index: u32| self.arguments.get(index as usize).copied().unwrap_or_default();
        line.call == self.name
            && line.conditions.iter().all(|condition| {
                let argument = argument(condition.argument) & condition.mask;
                condition.values.iter().any(|value| [argument, OWN].contains(value))
            })
    }
}

/// The calls that need no line. By most of them a thread begins, which has its name already, and no walls yet. By openat the
/// C library's allocator asks about a thread's own heap that shrinks: a monitor has a single heap (`sys::process::begin`).
const NEED_NO_LINE: &[&str] =
    &["landlock_restrict_self", "mprotect", "openat", "prctl", "sched_getaffinity", "seccomp", "sigaltstack"];

/// The findings about the lines, from the calls of traces.
struct Found<'a> {
    all: &'a [(&'static str, Line<'a>)],
    unused: Vec<&'a (&'static str, Line<'a>)>,
    /// Calls of threads that no line of theirs allows: devices that a test drives by itself have threads without walls.
    without_line: BTreeSet<String>,
    /// The length of the last filter of `main`.
    of_main: usize,
}

impl Found<'_> {
    fn look(&mut self, trace: &str) {
        // Which threads have the last filter of `main`: alone, or beneath their own, of a guest that boots again.
        let (mut mains, mut is_closed) = (BTreeMap::new(), false);
        for call in trace.lines().filter_map(Call::parse) {
            let own = list_of(call.thread);
            // A thread that begins has the filter of `main`, and the program's name, for a few calls.
            let is_main = *mains.get(call.number).unwrap_or(&is_closed);
            if call.name == "seccomp"
                && let Some(length) = call.text.split("len=").nth(1).and_then(|text| text.split(',').next())
            {
                let is_last = length.parse() == Ok(self.of_main);
                mains.insert(call.number, is_last || is_closed && own.is_some());
                is_closed |= is_last && own.is_none();
            }
            let lists = [own.map(|_| COMMON), own, is_main.then_some("main"), is_main.then_some(COMMON)];
            let allows = |(of, line): &(&str, Line<'_>)| lists.contains(&Some(*of)) && call.is_one_of(line);
            self.unused.retain(|line| !allows(line));
            let is_own = |(of, line): &(&str, Line<'_>)| {
                [Some(COMMON), own].contains(&Some(*of)) && call.is_one_of(line)
            };
            if let Some(list) = own.filter(|list| *list != "main")
                && !NEED_NO_LINE.contains(&call.name)
                && !self.all.iter().any(is_own)
            {
                self.without_line.insert(format!("{list}: {}({}", call.name, call.text));
            }
        }
    }
}

/// Lines that are used where strace(1) does not look, each with the test that does so: it traces the process itself, or
/// needs a Linux guest, which runs in a rig.
const BY_OTHERS: &[(&str, &str, &str)] = &[
    ("vcpu", "ioctl 1=0x8004ae98", "a_cpu_that_kvm_does_not_run_ends_its_guest_with_words"),
    (COMMON, "tgkill", "a_thread_that_panics_says_so_and_leaves_no_socket"),
    ("main", "x86_64:rmdir", "a_commands_own_folder_goes_with_it_however_it_ends"),
    ("main", "unlinkat", "a_commands_own_folder_goes_with_it_however_it_ends"),
    ("main", "utimensat", "a_command_has_a_guest_of_its_own_with_any_root"),
    ("main", "x86_64:chmod", "a_command_has_a_guest_of_its_own_with_any_root"),
    ("main", "fchmod ", "a_command_has_a_guest_of_its_own_with_any_root"),
    ("main", "x86_64:symlink", "a_command_has_a_guest_of_its_own_with_any_root"),
    ("main", "linkat", "a_command_has_a_guest_of_its_own_with_any_root"),
    ("main", "pipe2", "a_command_has_a_guest_of_its_own_with_any_root"),
    ("main", "ioctl 1=0x5413", "a_console_and_a_port_by_virtio_are_used"),
];

/// Lines that only another C library or host has a use for, each with the line that the tests use in its place here.
const FALLBACKS: &[(&str, &str, &str)] = &[
    // fstat(3) of glibc: newfstatat up to 2.38, fstat from 2.39 on.
    ("vcpu", "fstat ", "newfstatat"),
    ("main", "fstat ", "newfstatat"),
    // Container runtimes answer clone3 with ENOSYS, for its flags are in memory. Then glibc calls clone.
    ("main", "clone 0&0x10000", "clone3"),
];

/// The lines that are aarch64's alone. strace(1) does not look there: with each goes the line of x86_64 that the same
/// function of the C library or of ours uses, where the tests that run on both show it, or a test that runs there.
const AARCH64: &[(&str, &str, &str)] = &[
    (COMMON, "aarch64:ppoll", "x86_64:poll"),
    (COMMON, "aarch64:getpgid", "x86_64:getpgrp"),
    ("vcpu", "aarch64:ioctl 1=0x4010aeab", "x86_64:ioctl 1=0x8090ae81"),
    ("vcpu", "aarch64:eventfd2", "write_messages"),
    ("vcpu", "aarch64:ioctl 1=0x4010aeac", "switch_on"),
    ("job", "aarch64:unlinkat", "x86_64:unlink "),
    ("job", "aarch64:renameat", "x86_64:rename "),
    ("main", "aarch64:readlinkat", "x86_64:readlink "),
    ("main", "aarch64:mkdirat", "x86_64:mkdir "),
    ("main", "aarch64:fchmodat", "x86_64:chmod "),
    ("main", "aarch64:symlinkat", "x86_64:symlink "),
];

#[test]
fn what_is_known_of_lines_is_of_lines_that_are_there() {
    let lines = lines(Arch::X86_64);
    let has = |lines: &[(&str, String)], list: &str, begin: &str| {
        let found = lines.iter().filter(|(of, line)| *of == list && line.starts_with(begin)).count();
        assert_eq!(found, 1, "{list}: {begin}");
    };
    let tests = ["tests/walls.rs", "tests/linux/commands.rs", "tests/linux/consoles.rs"].map(read).concat();
    for (list, begin, test) in BY_OTHERS {
        has(&lines, list, begin);
        assert!(tests.contains(&format!("fn {test}(")), "{test}: there is no such test");
    }
    for (list, begin, other) in FALLBACKS {
        has(&lines, list, begin);
        has(&lines, list, other);
    }
    // Of one list after the other, each line that is aarch64's alone.
    let there = self::lines(Arch::Aarch64).into_iter().filter(|(_, line)| line.starts_with("aarch64:"));
    let there: Vec<_> = there.collect();
    let firmware = ["firmware/src/aarch64.rs", "firmware/src/aarch64_power.rs"].map(read).concat();
    assert_eq!(there.len(), AARCH64.len(), "{there:#?}");
    for (list, begin, other) in AARCH64 {
        has(&there, list, begin);
        match other.starts_with("x86_64:") {
            true => has(&lines, list, other),
            false => assert!(firmware.contains(&format!("fn {other}(")), "{other}"),
        }
    }
}

#[test]
fn the_page_on_threats_tells_how_many_calls_there_are() {
    let lines = lines(Arch::X86_64);
    let count = |wanted: &[&str]| {
        let of_these = lines.iter().filter(|(list, _)| *list == COMMON || wanted.contains(list));
        let calls = of_these.map(|(_, line)| filters::parse(line, Arch::X86_64).unwrap().remove(0).call);
        calls.collect::<BTreeSet<_>>().len()
    };
    let [vcpu, io, job] = ["vcpu", "io", "job"].map(|list| count(&[list]));
    let main = count(&["io", "job", "main"]);
    let told = format!("{vcpu} calls of `vcpu`, {io} of `io`, {job} of `job`, or {main} of `main`");
    assert!(read("docs/threat-model.md").contains(&told), "docs/threat-model.md does not say: {told}");
}

#[test]
#[ignore = "needs what scripts/traced has taken down of other tests: scripts/test --long"]
fn each_line_that_a_filter_allows_is_used() {
    let folder = std::env::var_os("ALULA_TRACES").expect("ALULA_TRACES names the folder of the traces");
    let (_, parts, others) = LISTS.iter().find(|(name, ..)| *name == "MAIN").unwrap();
    let text: String = parts.iter().map(|part| read(&format!("resources/seccomp/{part}.list"))).collect();
    let main = filters::compile(&text, &read("resources/seccomp/calls"), ARCH, *others).unwrap();
    let lines = lines(ARCH);
    let all: Vec<_> =
        lines.iter().map(|(list, line)| (*list, filters::parse(line, ARCH).unwrap().remove(0))).collect();
    let (unused, without_line) = (all.iter().collect(), BTreeSet::new());
    let mut found = Found { all: &all, unused, without_line, of_main: main.len() };
    for trace in std::fs::read_dir(folder).unwrap() {
        found.look(&String::from_utf8_lossy(&std::fs::read(trace.unwrap().path()).unwrap()));
    }
    println!("{} of {} lines were seen", all.len() - found.unused.len(), all.len());
    let is_known = |list: &str, line: &str| {
        let mut known = BY_OTHERS.iter().chain(FALLBACKS);
        known.any(|(of, begin, _)| *of == list && line.starts_with(begin))
    };
    let is_unused = |index: usize| found.unused.iter().any(|line| std::ptr::eq(*line, &raw const all[index]));
    let unused: Vec<_> = (0..all.len())
        .filter(|index| is_unused(*index))
        .map(|index| &lines[index])
        .filter(|(list, line)| !is_known(list, line))
        .collect();
    assert!(unused.is_empty(), "no test uses, so that no thread need be allowed: {unused:#?}");
    let without_line = found.without_line;
    assert!(without_line.is_empty(), "a thread calls what its list does not allow: {without_line:#?}");
}
