//! Makes programs for the kernel's filter of system calls (seccomp(2)) out of the lists in `resources/seccomp`.
//!
//! A program is a search tree: the numbers of all calls fall into ranges with one verdict each, and a call is
//! compared with the borders between them, about six of them for a list of fifty. A chain that compares each number
//! would be run from its beginning to its end for most calls, and once for every call that there is when the kernel
//! takes the program. It also translates the program, which takes as long as the program has instructions.
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

/// All numbers of calls that there are, but for x32's, are less.
const CALLS: u32 = 512;

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
    let mut calls = BTreeMap::<u32, Ways>::new();
    for Line { call, conditions } in parse(list, arch)? {
        let number = numbers.get(call).ok_or_else(|| format!("there is no call `{call}` for {arch:?}"))?;
        add(calls.entry(*number).or_default(), conditions);
    }
    let (listed, other) = match others {
        Others::Refused => (ALLOW, TRAP),
        Others::Allowed => (TRAP, ALLOW),
    };
    let mut program = Backwards::default();
    program.tree(&ranges(calls, listed, other));
    program.push(LOAD, NUMBER);
    let calls = program.here();
    program.branch(JUMP_IF_EQUAL, arch.audit(), calls, Target::Verdict(TRAP));
    program.push(LOAD, ARCH);
    program.0.reverse();
    Ok(program.0)
}

/// The ways in which the arguments of a call may be, each with all its conditions.
type Ways = Vec<Vec<Condition>>;

/// Adds a way. Two that look at one argument each, which is the same, become one with the values of both.
fn add(ways: &mut Ways, conditions: Vec<Condition>) {
    if let (Some([last]), [new]) = (ways.last_mut().map(Vec::as_mut_slice), &conditions[..])
        && (last.argument, last.mask) == (new.argument, new.mask)
    {
        return last.values.extend(&new.values);
    }
    ways.push(conditions);
}

/// The answer to a call.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Rule {
    /// This verdict, whatever its arguments are.
    Always(u32),
    /// The first verdict if its arguments are as one of the ways says, else the other one.
    If(Ways, u32, u32),
}

/// The calls from one number up to another, which is not among them, and the answer to them.
#[derive(Clone, Debug)]
struct Range {
    from: u32,
    to: u32,
    rule: Rule,
}

impl Range {
    /// The part that the range has of all searches. The kernel runs a new program once for each call that it knows, which
    /// takes longer than anything else that it does with it: a range counts by its calls. Each counts by something more,
    /// so that the search for a single call does not become long.
    fn weight(&self) -> u32 {
        const EACH: u32 = 4;
        EACH + self.to.min(CALLS).saturating_sub(self.from)
    }
}

fn ranges(calls: BTreeMap<u32, Ways>, listed: u32, other: u32) -> Vec<Range> {
    let mut rules = vec![(0, Rule::Always(other))];
    for (number, ways) in calls {
        let rule = match ways.iter().any(Vec::is_empty) {
            true => Rule::Always(listed),
            false => Rule::If(ways, listed, other),
        };
        rules.extend([(number, rule), (number + 1, Rule::Always(other))]);
    }
    rules.extend([(X32, Rule::Always(TRAP)), (NONE, Rule::Always(ALLOW))]);
    let ends: Vec<_> = rules.iter().skip(1).map(|(from, _)| *from).chain([u32::MAX]).collect();
    let mut ranges = Vec::<Range>::new();
    for ((from, rule), to) in rules.into_iter().zip(ends) {
        match ranges.last_mut() {
            // Of two that begin at one number the former has no calls.
            _ if from == to && from != NONE => {}
            Some(last) if last.rule == rule => last.to = to,
            _ => ranges.push(Range { from, to, rule }),
        }
    }
    ranges
}

/// A place where a program goes on.
#[derive(Clone, Copy, Debug)]
enum Target {
    /// The instruction that has so many to the program's end, itself among them.
    Place(usize),
    /// Any instruction that returns this verdict.
    Verdict(u32),
}

/// A program that is made from its end to its beginning, since all jumps go forwards. A verdict is returned by one
/// instruction for all that come to it, as far as a jump reaches: the kernel's work with a program grows with its length.
#[derive(Debug, Default)]
struct Backwards(Vec<Instruction>);

impl Backwards {
    fn push(&mut self, code: u16, k: u32) {
        self.0.push(Instruction { code, jt: 0, jf: 0, k });
    }

    /// The instruction that was pushed last.
    fn here(&self) -> Target {
        Target::Place(self.0.len())
    }

    /// The number of instructions that a jump to `target` leaves out, if `more` are pushed before the jump is; None: it is
    /// more than a conditional jump can, or there is no such target yet.
    fn distance(&self, target: Target, more: usize) -> Option<u8> {
        let returns = |made: &Instruction, verdict| (made.code, made.k) == (RETURN, verdict);
        let place = match target {
            Target::Place(place) => place,
            Target::Verdict(verdict) => self.0.iter().rposition(|made| returns(made, verdict))? + 1,
        };
        u8::try_from(self.0.len() - place + more).ok()
    }

    /// A target that a conditional jump reaches, and that leads to `target`.
    fn within_reach(&mut self, target: Target, more: usize) -> Target {
        if self.distance(target, more).is_some() {
            return target;
        }
        match target {
            Target::Place(place) => self.push(JUMP, (self.0.len() - place) as u32),
            Target::Verdict(verdict) => self.push(RETURN, verdict),
        }
        self.here()
    }

    /// A comparison, and where the program goes on if it holds and if it fails.
    fn branch(&mut self, code: u16, k: u32, holds: Target, fails: Target) {
        // To bring the second one within reach may take one instruction.
        let fails = self.within_reach(fails, 1);
        let holds = self.within_reach(holds, 0);
        let [jt, jf] =
            [holds, fails].map(|target| self.distance(target, 0).expect("it was brought within reach"));
        self.0.push(Instruction { code, jt, jf, k });
    }

    /// A search among ranges for the number of the call, which was loaded.
    fn tree(&mut self, ranges: &[Range]) -> Target {
        if let [Range { rule, .. }] = ranges {
            return match rule {
                Rule::Always(verdict) => Target::Verdict(*verdict),
                Rule::If(ways, listed, other) => self.arguments(ways, *listed, *other),
            };
        }
        let weight = |ranges: &[Range]| ranges.iter().map(Range::weight).sum::<u32>();
        let balance = |at: &usize| weight(&ranges[..*at]).abs_diff(weight(&ranges[*at..]));
        let (low, high) = ranges.split_at((1..ranges.len()).min_by_key(balance).unwrap_or(1));
        let from = high[0].from;
        let (high, low) = (self.tree(high), self.tree(low));
        self.branch(JUMP_IF_AT_LEAST, from, high, low);
        self.here()
    }

    /// Tries each way in which the arguments of a call may be.
    fn arguments(&mut self, ways: &Ways, listed: u32, other: u32) -> Target {
        let mut otherwise = Target::Verdict(other);
        for way in ways.iter().rev() {
            let mut then = Target::Verdict(listed);
            for Condition { argument, mask, values } in way.iter().rev() {
                let mut not = otherwise;
                for value in values.iter().rev() {
                    self.branch(JUMP_IF_EQUAL, *value, then, not);
                    not = self.here();
                }
                if *mask != u32::MAX {
                    self.push(AND, *mask);
                }
                self.push(LOAD, ARGUMENTS + 8 * argument);
                then = self.here();
            }
            otherwise = self.here();
        }
        otherwise
    }
}
