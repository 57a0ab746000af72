//! The programs that filter system calls say what their lists say: for every call, whatever its arguments are, the same
//! as those that the crate `seccompiler` makes of the same lists.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "../build/filters.rs"]
mod filters;

use std::collections::BTreeMap;
use std::path::Path;

use filters::{Arch, Condition, Instruction, LISTS, Line, Others};
use seccompiler::{BpfProgram, TargetArch, compile_from_json};
use serde_json::{Value, json};

const ALLOW: u32 = 0x7fff_0000;
const TRAP: u32 = 0x0003_0000;
const ROUNDS: usize = 200;

fn read(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/seccomp").join(name);
    std::fs::read_to_string(path).unwrap()
}

/// The data of a system call that a filter may look at (seccomp(2)).
#[derive(Clone, Copy, Debug)]
struct Call {
    number: u32,
    arch: u32,
    arguments: [u64; 6],
}

impl Call {
    fn word(&self, at: u32) -> u32 {
        match at {
            0 => self.number,
            4 => self.arch,
            8 | 12 => 0,
            _ => {
                let argument = self.arguments[(at as usize - 16) / 8];
                (argument >> (at % 8 * 8)) as u32
            }
        }
    }
}

/// Runs a filter's program (linux/filter.h) for a call: returns its answer, and how many instructions that takes.
fn run(program: &[Instruction], call: &Call) -> (u32, usize) {
    let (mut at, mut value, mut steps) = (0, 0_u32, 0);
    loop {
        let Instruction { code, jt, jf, k } = program[at];
        (at, steps) = (at + 1, steps + 1);
        let is_so = match code {
            0x20 => {
                value = call.word(k);
                continue;
            }
            0x54 => {
                value &= k;
                continue;
            }
            0x05 => {
                at += k as usize;
                continue;
            }
            0x06 => return (k, steps),
            0x15 => value == k,
            0x25 => value > k,
            0x35 => value >= k,
            0x45 => value & k != 0,
            other => panic!("instruction {other:#x}"),
        };
        at += usize::from(if is_so { jt } else { jf });
    }
}

/// A list's lines in the JSON of `seccompiler`, which has names of calls of its own.
fn in_json(lines: &[Line<'_>], others: Others) -> String {
    let mut rules = Vec::new();
    let is_always = |call: &str| lines.iter().any(|line| line.call == call && line.conditions.is_empty());
    for Line { call, conditions } in
        lines.iter().filter(|line| line.conditions.is_empty() || !is_always(line.call))
    {
        // `seccompiler` needs a rule for each choice of values.
        let mut choices: Vec<Vec<Value>> = vec![Vec::new()];
        for Condition { argument, mask, values } in conditions {
            let op = if *mask == u32::MAX { json!("eq") } else { json!({ "masked_eq": mask }) };
            let one = |value| json!({ "index": argument, "type": "dword", "op": op, "val": value });
            let more = |choice: &Vec<Value>| {
                values.iter().map(|value| [choice.clone(), vec![one(value)]].concat()).collect::<Vec<_>>()
            };
            choices = choices.iter().flat_map(more).collect();
        }
        rules.extend(choices.into_iter().map(|args| match args.is_empty() {
            true => json!({ "syscall": call }),
            false => json!({ "syscall": call, "args": args }),
        }));
    }
    let (listed, other) = if others == Others::Refused { ("allow", "trap") } else { ("trap", "allow") };
    json!({ "it": { "mismatch_action": other, "match_action": listed, "filter": rules } }).to_string()
}

fn by_seccompiler(lines: &[Line<'_>], others: Others, arch: Arch) -> Vec<Instruction> {
    let target = if arch == Arch::X86_64 { TargetArch::x86_64 } else { TargetArch::aarch64 };
    let made = compile_from_json(in_json(lines, others).as_bytes(), target).unwrap();
    let program: &BpfProgram = &made["it"];
    program.iter().map(|it| Instruction { code: it.code, jt: it.jt, jf: it.jf, k: it.k }).collect()
}

/// Numbers that come in the same order with every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Arguments near what the lines of a call say: a value of theirs, with or without other bits, or anything.
fn arguments(random: &mut Random, values: &[u32]) -> [u64; 6] {
    std::array::from_fn(|_| {
        let (kind, noise) = (random.next() % 4, random.next());
        match values.get(noise as usize % values.len().max(1)) {
            Some(value) if kind == 0 => u64::from(*value),
            Some(value) if kind == 1 => u64::from(*value) | noise << 32,
            Some(value) if kind == 2 => u64::from(*value) ^ 1 << (noise % 32),
            _ => noise,
        }
    })
}

/// Calls `check` with the program of every list for every architecture.
fn all(mut check: impl FnMut(&str, Arch, &str, Others, &[Instruction])) {
    let table = read("calls");
    for (name, parts, others) in LISTS {
        let text: String = parts.iter().map(|part| read(&format!("{part}.list"))).collect();
        for (_, arch) in Arch::ALL {
            check(name, arch, &text, *others, &filters::compile(&text, &table, arch, *others).unwrap());
        }
    }
}

#[test]
fn the_trees_say_what_seccompiler_says() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    all(|name, arch, text, others, program| {
        let lines = filters::parse(text, arch).unwrap();
        let other = by_seccompiler(&lines, others, arch);
        let table = read("calls");
        let numbers = filters::numbers(&table, arch).unwrap();
        let mut values = BTreeMap::<u32, Vec<u32>>::new();
        for line in &lines {
            let all = line.conditions.iter().flat_map(|condition| condition.values.clone());
            values.entry(numbers[line.call]).or_default().extend(all);
        }
        let last = numbers.values().max().unwrap() + 100;
        let (mut allowed, mut steps_max) = (0, 0);
        for number in (0..last).chain([0x3fff_ffff]) {
            let none = Vec::new();
            let values = values.get(&number).unwrap_or(&none);
            for _ in 0..if values.is_empty() { 2 } else { ROUNDS } {
                let call = Call { number, arch: arch.audit(), arguments: arguments(&mut random, values) };
                let (verdict, steps) = run(program, &call);
                assert_eq!(verdict, run(&other, &call).0, "{name} {arch:?}: {call:?}");
                allowed += u32::from(verdict == ALLOW);
                steps_max = steps_max.max(steps);
            }
        }
        let named: std::collections::BTreeSet<_> = lines.iter().map(|line| line.call).collect();
        println!(
            "{name} for {arch:?}: {} calls, {} instructions, {} by seccompiler, at most {steps_max} are run",
            named.len(),
            program.len(),
            other.len()
        );
        assert!(allowed > 100, "{name}: hardly anything is allowed: {allowed}");
    });
}

#[test]
fn calls_of_other_architectures_and_of_x32_are_refused() {
    const I386: u32 = 0x4000_0003;
    all(|name, arch, _, _, program| {
        let other = Arch::ALL.map(|(_, arch)| arch).into_iter().find(|other| *other != arch).unwrap();
        for number in 0..600 {
            for (number, arch) in [
                (number, other.audit()),
                (number, I386),
                (0x4000_0000 + number, arch.audit()),
                (u32::MAX - 1 - number, arch.audit()),
            ] {
                let call = Call { number, arch, arguments: [0; 6] };
                assert_eq!(run(program, &call).0, TRAP, "{name}: {call:?}");
            }
        }
    });
}

/// A thread that is started once the guest runs, as those of a guest that boots again are, has the filter of `main`
/// beneath its own.
#[test]
fn main_may_do_what_threads_may_that_it_starts_later() {
    let table = read("calls");
    all(|name, arch, _, _, program| {
        if name != "MAIN" {
            return;
        }
        let numbers = filters::numbers(&table, arch).unwrap();
        for list in ["common", "vcpu", "io", "job"].map(|list| read(&format!("{list}.list"))) {
            for Line { call, conditions } in filters::parse(&list, arch).unwrap() {
                let choices = conditions.iter().map(|condition| condition.values.len()).max().unwrap_or(1);
                for choice in 0..choices {
                    let mut arguments = [0; 6];
                    for Condition { argument, values, .. } in &conditions {
                        arguments[*argument as usize] = u64::from(values[choice % values.len()]);
                    }
                    let call = Call { number: numbers[call], arch: arch.audit(), arguments };
                    assert_eq!(run(program, &call).0, ALLOW, "{arch:?}: {call:?}");
                }
            }
        }
    });
}

#[test]
fn signals_go_to_the_process_itself_alone() {
    const PROCESS: u32 = 1234;
    all(|name, arch, text, others, program| {
        if others == Others::Allowed {
            assert!(!text.contains("OWN"), "{name}: passt inherits this filter");
            return;
        }
        let table = read("calls");
        let numbers = filters::numbers(&table, arch).unwrap();
        let mut program = program.to_vec();
        for it in &mut program {
            if (it.code, it.k) == (filters::JUMP_IF_EQUAL, filters::OWN) {
                it.k = PROCESS;
            }
        }
        for (call, number) in &numbers {
            let call_of = |process: u32, signal: u64| Call {
                number: *number,
                arch: arch.audit(),
                arguments: [process.into(), 7, signal, 0, 0, 0],
            };
            match *call {
                "tgkill" => {
                    for (process, signal) in [PROCESS, PROCESS + 1, 0, 1, filters::OWN, u32::MAX]
                        .into_iter()
                        .flat_map(|process| (1..=64).map(move |signal| (process, signal)))
                    {
                        // The signals are those of abort(3), and of `main` the one that stops a vCPU.
                        let is_needed = signal == 6 || name == "MAIN" && signal == 34;
                        let expected = if process == PROCESS && is_needed { ALLOW } else { TRAP };
                        let call = call_of(process, signal);
                        assert_eq!(run(&program, &call).0, expected, "{name}: {call:?}");
                    }
                }
                "kill" | "tkill" | "rt_sigqueueinfo" | "rt_tgsigqueueinfo" | "pidfd_send_signal" => {
                    assert_eq!(run(&program, &call_of(PROCESS, 9)).0, TRAP, "{name}: {call}");
                }
                _ => {}
            }
        }
    });
}

#[test]
fn a_call_that_a_tracer_has_left_out_is_none() {
    all(|name, arch, _, _, program| {
        let call = Call { number: u32::MAX, arch: arch.audit(), arguments: [0; 6] };
        assert_eq!(run(program, &call).0, ALLOW, "{name}");
    });
}

#[test]
fn a_list_that_is_wrong_is_refused_when_alula_is_built() {
    let table = read("calls");
    for (line, expected) in [
        ("read", "the reason is missing"),
        ("read #", "a call and its reason are expected"),
        ("# only a comment\nreed # a", "there is no call `reed`"),
        ("mips:read # a", "`mips` is no architecture"),
        ("ioctl 1 # a", "a condition has a `=`"),
        ("ioctl 6=1 # a", "a call has the arguments 0 to 5"),
        ("ioctl 1=0xzz # a", "`0xzz`"),
        ("ioctl 1=1|2|x # a", "`x`"),
        ("mmap 2&=4 # a", "``"),
        ("tgkill 0=0xfffffffe # a", "`0xfffffffe` stands for `OWN`"),
    ] {
        let error = filters::compile(line, &table, Arch::X86_64, Others::Refused).unwrap_err();
        assert!(error.contains(expected), "{line}: {error}");
    }
    // aarch64 has no call `open`: a line with it is refused there, but for one that is marked as x86_64's.
    let error = filters::compile("open # a", &table, Arch::Aarch64, Others::Refused).unwrap_err();
    assert!(error.contains("there is no call `open` for Aarch64"), "{error}");
    filters::compile("x86_64:open # a", &table, Arch::Aarch64, Others::Refused).unwrap();
}

#[test]
fn only_what_is_listed_opens_connects_or_executes() {
    let table = read("calls");
    let never =
        ["execve", "execveat", "ptrace", "mount", "bpf", "setns", "unshare", "init_module", "mknodat"];
    let paths =
        ["openat", "openat2", "unlinkat", "renameat", "connect", "bind", "socket", "chdir", "fchmodat"];
    all(|name, arch, _, _, program| {
        let numbers = filters::numbers(&table, arch).unwrap();
        let is_allowed = |call: &str| {
            let call = Call { number: numbers[call], arch: arch.audit(), arguments: [0; 6] };
            run(program, &call).0 == ALLOW
        };
        for call in never {
            let expected = name == "EARLY"
                && ["execve", "execveat", "mount", "setns", "unshare", "mknodat"].contains(&call);
            assert_eq!(is_allowed(call), expected, "{name}: {call}");
        }
        if ["VCPU", "IO"].contains(&name) {
            for call in paths {
                assert!(!is_allowed(call), "{name}: {call}");
            }
        }
        // Memory that is written is never executed.
        for protection in 0..8 {
            let call = Call {
                number: numbers["mmap"],
                arch: arch.audit(),
                arguments: [0, 4096, protection, 0x22, 0, 0],
            };
            if name != "EARLY" && protection & 4 != 0 {
                assert_eq!(run(program, &call).0, TRAP, "{name}: protection {protection}");
            }
        }
    });
}
