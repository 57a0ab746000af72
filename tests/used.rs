//! What no test uses, no thread may call: each line of the lists in `resources/seccomp` is used by a test. strace(1) takes
//! down the calls of other tests (`scripts/test --long`), and what it cannot see is named here.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "../build/filters.rs"]
#[allow(dead_code, reason = "what a list says is enough here")]
mod filters;

use std::collections::BTreeMap;
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
fn lines() -> Vec<(&'static str, String)> {
    let lists = [COMMON, "vcpu", "io", "job", "main"];
    let text = lists.map(|list| (list, read(&format!("resources/seccomp/{list}.list"))));
    let lines = text.iter().flat_map(|(list, text)| text.lines().map(|line| (*list, line.to_owned())));
    lines.filter(|(_, line)| !filters::parse(line, ARCH).unwrap().is_empty()).collect()
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
    /// None: the line has the end of a call whose beginning was told, or the end of a thread.
    fn parse(line: &'a str) -> Option<Self> {
        let (number, rest) = line.split_once('<')?;
        let (thread, rest) = rest.split_once("> ")?;
        let (name, text) =
            rest.trim_start().split_once('(').filter(|(name, _)| !name.starts_with(['<', '+', '-']))?;
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

/// Finds the lines that the calls of a trace use.
fn look(trace: &str, lines: &mut Vec<(&str, Line<'_>)>, length_of_main: usize) {
    // The threads `main` that have their last filter.
    let (mut mains, mut is_closed) = (BTreeMap::new(), false);
    for call in trace.lines().filter_map(Call::parse) {
        // A thread that begins has the filter of `main`, and the program's name, for a few calls.
        let is_main = *mains.get(call.number).unwrap_or(&is_closed);
        if call.name == "seccomp"
            && let Some(length) = call.text.split("len=").nth(1).and_then(|text| text.split(',').next())
        {
            let is_last = length.parse() == Ok(length_of_main);
            is_closed |= is_last && list_of(call.thread).is_none();
            mains.insert(call.number, is_last);
        }
        if let Some(list) = list_of(call.thread).or(is_main.then_some("main")) {
            lines.retain(|(of, line)| ![COMMON, list].contains(of) || !call.is_one_of(line));
        }
    }
}

/// Lines that are used where strace(1) does not look, each with the test that does so: it traces the process itself, or
/// needs a Linux guest, which runs in a rig.
const BY_OTHERS: &[(&str, &str, &str)] = &[
    (COMMON, "tgkill", "a_thread_that_panics_says_so_and_leaves_no_socket"),
    ("main", "x86_64:rmdir", "a_commands_own_folder_goes_with_it_however_it_ends"),
    ("main", "utimensat", "a_command_has_a_guest_of_its_own_with_any_root"),
    ("main", "x86_64:chmod", "a_command_has_a_guest_of_its_own_with_any_root"),
    ("main", "pipe2", "a_command_has_a_guest_of_its_own_with_any_root"),
];

/// Lines that no test has been seen to use so far: each waits for a test that does, or for its end. Some are what another
/// C library or an older kernel would have in place of a call that was seen.
const UNSEEN: &[(&str, &str)] = &[
    ("common", "ppoll"),
    ("vcpu", "ioctl 1=0x8004ae98"),
    ("vcpu", "ioctl 1=0x4020ae76"),
    ("vcpu", "ioctl 1=0x4008ae6a"),
    ("vcpu", "ioctl 1=0x4008ae61"),
    ("vcpu", "ioctl 1=0x4020aea5"),
    ("vcpu", "fstat "),
    ("io", "lseek"),
    ("io", "fsync"),
    ("io", "ftruncate"),
    ("io", "fstat "),
    ("io", "newfstatat"),
    ("io", "fstatfs"),
    ("io", "setsockopt"),
    ("io", "getsockopt"),
    ("io", "ioctl 1=0x5421"),
    ("io", "ioctl 1=0x4040ae79"),
    ("io", "ioctl 1=0x4020ae76"),
    ("io", "ioctl 1=0x4008ae6a"),
    ("io", "ioctl 1=0x4008ae61"),
    ("io", "ioctl 1=0x4020aea5"),
    ("job", "read "),
    ("job", "pwritev"),
    ("job", "writev"),
    ("job", "fdatasync"),
    ("job", "fallocate"),
    ("job", "fstat "),
    ("job", "fstatfs"),
    ("job", "unlinkat"),
    ("job", "getrandom"),
    ("job", "sched_yield"),
    ("job", "newfstatat"),
    ("main", "x86_64:access"),
    ("main", "mkdirat"),
    ("main", "llistxattr"),
    ("main", "ioctl 1=0x125e"),
    ("main", "memfd_create"),
    ("main", "fchmod "),
    ("main", "x86_64:symlink"),
    ("main", "linkat"),
    ("main", "listen"),
    ("main", "ioctl 1=0x5413"),
    ("main", "clone 0&0x10000"),
];

#[test]
#[cfg(target_arch = "x86_64")]
fn what_is_known_of_lines_is_of_lines_that_are_there() {
    let lines = lines();
    let tests = read("tests/walls.rs") + &read("tests/linux/commands.rs");
    for (.., test) in BY_OTHERS {
        assert!(tests.contains(&format!("fn {test}(")), "{test}: there is no such test");
    }
    let all = BY_OTHERS
        .iter()
        .map(|(list, line, _)| (list, line))
        .chain(UNSEEN.iter().map(|(list, line)| (list, line)));
    for (list, begin) in all {
        let found = lines.iter().filter(|(of, line)| of == list && line.starts_with(*begin)).count();
        assert_eq!(found, 1, "{list}: {begin}");
    }
}

#[test]
#[ignore = "needs what scripts/traced has taken down of other tests: scripts/test --long"]
fn each_line_that_a_filter_allows_is_used() {
    let folder = std::env::var_os("ALULA_TRACES").expect("ALULA_TRACES names the folder of the traces");
    let (_, parts, others) = LISTS.iter().find(|(name, ..)| *name == "MAIN").unwrap();
    let text: String = parts.iter().map(|part| read(&format!("resources/seccomp/{part}.list"))).collect();
    let main = filters::compile(&text, &read("resources/seccomp/calls"), ARCH, *others).unwrap();
    let lines = lines();
    let mut left: Vec<_> =
        lines.iter().map(|(list, line)| (*list, filters::parse(line, ARCH).unwrap().remove(0))).collect();
    let count = left.len();
    for trace in std::fs::read_dir(folder).unwrap() {
        let trace = std::fs::read(trace.unwrap().path()).unwrap();
        look(&String::from_utf8_lossy(&trace), &mut left, main.len());
    }
    println!("{} of {count} lines were seen", count - left.len());
    let is_unused =
        |list: &str, line: &str| left.contains(&(list, filters::parse(line, ARCH).unwrap().remove(0)));
    let known = |list: &str, line: &str| {
        let elsewhere = BY_OTHERS.iter().any(|(of, begin, _)| *of == list && line.starts_with(begin));
        elsewhere || UNSEEN.iter().any(|(of, begin)| *of == list && line.starts_with(begin))
    };
    let unused: Vec<_> =
        lines.iter().filter(|(list, line)| is_unused(list, line) && !known(list, line)).collect();
    assert!(unused.is_empty(), "no test uses, so that no thread need be allowed: {unused:#?}");
}
