//! Makes programs for the kernel's filter of system calls (seccomp(2)) out of the lists in `resources/seccomp`.
//!
//! A program is a search tree: the numbers of all calls fall into ranges with one verdict each, and a call is
//! compared with the borders between them, about six of them for a list of fifty. A chain that compares each number
//! would be run from its beginning to its end for most calls, and once for every call that there is when the kernel
//! takes the program.
//!
//! A line of a list is `[ARCH:]CALL [CONDITION...] # REASON`. A condition is `N=VALUE[|VALUE...]`, argument N is one
//! of these values, or `N&MASK=VALUE`; all of a line's must hold, and of several lines of one call any one. Values are
//! numbers, `0x` before those of base 16, or `OWN`, the number of the process that the program is for. Of an argument the
//! lower 32 bits are looked at: the kernel looks at no others of flags, of an ioctl's command, and of a process's number.

use std::collections::BTreeMap;

/// An instruction, as `sock_filter` in linux/filter.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    pub code: u16,
    pub jt: u8,
    pub jf: u8,
    pub k: u32,
}

/// The processor that a program is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    X86_64,
    Aarch64,
}

impl Arch {
    /// Both architectures, with the names that cargo has for them.
    pub const ALL: [(&'static str, Arch); 2] = [("x86_64", Self::X86_64), ("aarch64", Self::Aarch64)];

    /// The number of the architecture: AUDIT_ARCH_... (linux/audit.h).
    pub fn audit(self) -> u32 {
        match self {
            Self::X86_64 => 0xc000_003e,
            Self::Aarch64 => 0xc000_00b7,
        }
    }
}

/// The programs, the lists that each is made of, and the verdict on all other calls. `main` passes its own on to
/// threads that it starts later, whose filters come on top of it.
pub const LISTS: &[(&str, &[&str], Others)] = &[
    ("VCPU", &["common", "vcpu"], Others::Refused),
    ("IO", &["common", "io"], Others::Refused),
    ("JOB", &["common", "job"], Others::Refused),
    ("MAIN", &["common", "io", "job", "main"], Others::Refused),
    ("EARLY", &["early"], Others::Allowed),
];

/// The verdict on the calls that no line of a list names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Others {
    /// Calls without a line are refused: the list is of what is allowed.
    Refused,
    /// Calls without a line are allowed: the list is of what is refused.
    Allowed,
}

/// The codes of instructions: BPF_LD | BPF_W | BPF_ABS, and so on (linux/bpf_common.h).
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
pub const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;

/// The verdicts: SECCOMP_RET_ALLOW and SECCOMP_RET_TRAP (linux/seccomp.h).
const ALLOW: u32 = 0x7fff_0000;
const TRAP: u32 = 0x0003_0000;

/// Where the kernel keeps what a program may look at: `struct seccomp_data` (linux/seccomp.h).
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

/// From this number on, calls are those of x32, another set of calls of x86_64.
const X32: u32 = 0x4000_0000;

/// No call, -1: whoever traces the process has the kernel leave a call out, as strace(1) does when it injects a fault.
const NONE: u32 = u32::MAX;

/// The value that stands for `OWN` in a program until the number of the process is put in its place: no process has this
/// number.
pub const OWN: u32 = u32::MAX - 1;

/// The numbers of system calls, from `resources/seccomp/calls`.
pub fn numbers(table: &str, arch: Arch) -> Result<BTreeMap<&str, u32>, String> {
    let mut numbers = BTreeMap::new();
    for line in table.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()) {
        let [name, x86_64, aarch64] = line.split_whitespace().collect::<Vec<_>>()[..] else {
            return Err(format!("`{line}`: a name and two numbers are expected"));
        };
        let number = if arch == Arch::X86_64 { x86_64 } else { aarch64 };
        if number != "-" {
            numbers.insert(name, self::number(number)?);
        }
    }
    Ok(numbers)
}

fn number(text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|error| format!("`{text}`: {error}"))
}

/// A condition on one argument of a system call: the values for which its line holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    pub argument: u32,
    pub mask: u32,
    /// The values, any one of which the argument, with the mask applied, must have.
    pub values: Vec<u32>,
}

/// A call, and what one line says of its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    pub call: &'a str,
    pub conditions: Vec<Condition>,
}

/// The lines of a list that are for this architecture.
pub fn parse(list: &str, arch: Arch) -> Result<Vec<Line<'_>>, String> {
    let mut lines = Vec::new();
    for line in list.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()) {
        let (what, reason) =
            line.split_once('#').ok_or_else(|| format!("`{line}`: the reason is missing"))?;
        let mut words = what.split_whitespace();
        let call = words.next().filter(|_| !reason.trim().is_empty());
        let call = call.ok_or_else(|| format!("`{line}`: a call and its reason are expected"))?;
        let call = match call.split_once(':') {
            None => call,
            Some((name, call)) => match Arch::ALL.iter().find(|(known, _)| *known == name) {
                Some((_, of)) if *of == arch => call,
                Some(_) => continue,
                None => return Err(format!("`{line}`: `{name}` is no architecture")),
            },
        };
        let conditions = words.map(condition).collect::<Result<_, _>>();
        lines.push(Line { call, conditions: conditions.map_err(|error| format!("`{line}`: {error}"))? });
    }
    Ok(lines)
}

fn condition(word: &str) -> Result<Condition, String> {
    let (left, values) = word.split_once('=').ok_or("a condition has a `=`")?;
    let (argument, mask) = match left.split_once('&') {
        Some((argument, mask)) => (number(argument)?, number(mask)?),
        None => (number(left)?, u32::MAX),
    };
    let value = |text: &str| match text {
        "OWN" => Ok(OWN),
        text => number(text).and_then(|value| match value {
            OWN => Err(format!("`{text}` stands for `OWN`")),
            value => Ok(value),
        }),
    };
    let values = values.split('|').map(value).collect::<Result<_, _>>()?;
    match argument {
        0..6 => Ok(Condition { argument, mask, values }),
        _ => Err("a call has the arguments 0 to 5".to_owned()),
    }
}

/// Makes the program of a list.
pub fn compile(list: &str, table: &str, arch: Arch, others: Others) -> Result<Vec<Instruction>, String> {
    let numbers = numbers(table, arch)?;
    let mut calls = BTreeMap::<u32, Vec<Vec<Condition>>>::new();
    for Line { call, conditions } in parse(list, arch)? {
        let number = numbers.get(call).ok_or_else(|| format!("there is no call `{call}` for {arch:?}"))?;
        calls.entry(*number).or_default().push(conditions);
    }
    let (listed, other) = match others {
        Others::Refused => (ALLOW, TRAP),
        Others::Allowed => (TRAP, ALLOW),
    };
    let tree = tree(&ranges(&calls, listed, other)?);
    let mut program = vec![
        statement(LOAD, ARCH),
        Instruction { jt: 1, ..statement(JUMP_IF_EQUAL, arch.audit()) },
        statement(RETURN, TRAP),
        statement(LOAD, NUMBER),
    ];
    program.extend(tree);
    Ok(program)
}

fn statement(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

/// The ranges of the numbers of calls: where each begins, and what is done with its calls.
type Ranges = Vec<(u32, Vec<Instruction>)>;

fn ranges(calls: &BTreeMap<u32, Vec<Vec<Condition>>>, listed: u32, other: u32) -> Result<Ranges, String> {
    let default = vec![statement(RETURN, other)];
    let mut ranges: Ranges = vec![(0, default.clone())];
    for (number, ways) in calls {
        let verdict = match ways.iter().any(Vec::is_empty) {
            true => vec![statement(RETURN, listed)],
            false => arguments(ways, listed, other)?,
        };
        ranges.push((*number, verdict));
        ranges.push((number + 1, default.clone()));
    }
    ranges.push((X32, vec![statement(RETURN, TRAP)]));
    ranges.push((NONE, vec![statement(RETURN, ALLOW)]));
    // Of two ranges that begin at one number the former is empty; neighbours with one verdict are one range.
    let mut whole = Ranges::new();
    for (index, range) in ranges.iter().enumerate() {
        let is_empty = ranges.get(index + 1).is_some_and(|next| next.0 == range.0);
        if !is_empty && whole.last().is_none_or(|last| last.1 != range.1) {
            whole.push(range.clone());
        }
    }
    Ok(whole)
}

/// A search among borders. The loaded number is in the accumulator.
fn tree(ranges: &[(u32, Vec<Instruction>)]) -> Vec<Instruction> {
    if let [(_, verdict)] = ranges {
        return verdict.clone();
    }
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let (border, low, high) = (high[0].0, tree(low), tree(high));
    let mut program = match u8::try_from(low.len()) {
        Ok(jt) => vec![Instruction { jt, ..statement(JUMP_IF_AT_LEAST, border) }],
        // A conditional jump does not reach so far.
        Err(_) => vec![
            Instruction { jf: 1, ..statement(JUMP_IF_AT_LEAST, border) },
            statement(JUMP, low.len() as u32),
        ],
    };
    program.extend(low);
    program.extend(high);
    program
}

/// Tries each way in which the arguments of a call may be.
fn arguments(ways: &[Vec<Condition>], listed: u32, other: u32) -> Result<Vec<Instruction>, String> {
    let mut program = Vec::new();
    for way in ways {
        let mut checks = Vec::new();
        // The conditions go from the last to the first, so that it is known how far it is to the end of the way.
        let mut rest = vec![statement(RETURN, listed)];
        for condition in way.iter().rev() {
            let mut check = vec![statement(LOAD, ARGUMENTS + 8 * condition.argument)];
            if condition.mask != u32::MAX {
                check.push(statement(AND, condition.mask));
            }
            let last = condition.values.len() - 1;
            for (index, value) in condition.values.iter().enumerate() {
                let (found, not) = match index == last {
                    true => (0, rest.len()),
                    false => (last - index, 0),
                };
                let [jt, jf] = [found, not].map(u8::try_from);
                let far = "a line has too many values: make two of it";
                check.push(Instruction {
                    jt: jt.map_err(|_| far)?,
                    jf: jf.map_err(|_| far)?,
                    ..statement(JUMP_IF_EQUAL, *value)
                });
            }
            check.append(&mut rest);
            rest = check;
        }
        checks.append(&mut rest);
        program.extend(checks);
    }
    program.push(statement(RETURN, other));
    Ok(program)
}
