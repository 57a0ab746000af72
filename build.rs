//! Builds the firmware guest for the architecture that the monitor is built for, with the same
//! compiler: its standard library's `core` is all it needs, so no bare-metal target must be installed.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "build/filters.rs"]
mod filters;

use filters::Arch;

fn main() {
    let variable = |name: &str| env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let arch = variable("CARGO_CFG_TARGET_ARCH");
    let out = PathBuf::from(variable("OUT_DIR"));
    let linked = out.join("firmware.elf");
    println!("cargo::rerun-if-changed=firmware");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build/filters.rs");
    println!("cargo::rerun-if-changed=resources/seccomp");
    name_commit(&variable("PROFILE"));
    fs::write(out.join("filters.rs"), walls(&arch)).expect("the build folder can be written to");
    if arch == "x86_64" && variable("HOST") == variable("TARGET") && knows_packed_relocations() {
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
        // Each segment begins a page: the linker would have them share pages of the file, and relocated data, to all of
        // which a process writes as it starts, would begin within a page and so touch one more.
        println!("cargo::rustc-link-arg-bins=-Wl,-z,separate-loadable-segments");
    }
    if arch == "x86_64" && variable("HOST") == variable("TARGET") && variable("PROFILE") == "release" {
        arrange_sections(&out);
    }

    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args(["--crate-name=firmware", "--crate-type=bin", "--edition=2024", "firmware/src/main.rs"]);
    rustc.args(["--target", &variable("TARGET")]).arg("-o").arg(&linked);
    // Made part of its callers is only what makes them smaller: each page of the image is one of every guest's.
    rustc.args(["-Copt-level=s", "-Cllvm-args=-inline-threshold=0"]);
    rustc.args(["-Clto=fat", "-Cpanic=abort", "-Ccodegen-units=1", "-Cstrip=symbols"]);
    rustc.args(["-Crelocation-model=static", "-Cno-redzone=yes", "-Cforce-unwind-tables=no"]);
    // Nobody saves vector registers there, and software KVMs do not emulate them; with the caches
    // off, arm64 takes no unaligned access.
    rustc.arg(match arch.as_str() {
        "x86_64" => "-Ctarget-feature=-sse2,-sse,+crt-static",
        _ => "-Ctarget-feature=+strict-align,+crt-static",
    });
    rustc.args(["-Clink-args=-nostartfiles -nostdlib -static -Wl,--build-id=none -Wl,-z,max-page-size=4096"]);
    rustc.arg(format!("-Clink-arg=-Wl,-T,firmware/{arch}.ld"));
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg(format!("-Clinker={linker}"));
    }
    let output = rustc.output().expect("the compiler that builds this can be run");
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "build the firmware guest:\n{messages}");

    let elf = fs::read(&linked).expect("the linker's output is there");
    let image = if arch == "aarch64" { flatten(&elf) } else { elf };
    fs::write(out.join("firmware.bin"), image).expect("the build folder can be written to");
}

/// Has a release's `alula version` name the commit that it is built from, if git knows one. Other builds do not: each
/// commit would have all of it compiled anew.
fn name_commit(profile: &str) {
    let git = |arguments: &[&str]| {
        let output =
            Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    // A copy of the sources within a checkout of something else has nothing of its commits: the prefix of the
    // checkout itself is empty.
    if profile != "release" || git(&["rev-parse", "--show-prefix"]).as_deref() != Some("") {
        return;
    }
    // Each commit and each change of branch is a line of this file.
    if let Some(log) =
        git(&["rev-parse", "--git-path", "logs/HEAD"]).filter(|log| fs::exists(log).unwrap_or(false))
    {
        println!("cargo::rerun-if-changed={log}");
    }
    if let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) {
        println!("cargo::rustc-env=ALULA_COMMIT={commit}");
    }
}

/// Has the linker leave out what tells of stack frames: 280 KiB, a fourteenth of the binary. Nobody unwinds there: a
/// panic aborts, and a backtrace in a static binary without names is empty with these tables, too. With
/// RUST_BACKTRACE set, the message of a panic is the last that is said: looking for the first frame aborts as the
/// panic would have next. The tables of the standard library and of the C library are left out as well, which a flag
/// of the compiler would not do.
///
/// And has it put large data that a start does not touch behind all other, or, where the data has a value from the
/// beginning, on a page before: what a start touches then lies on five pages fewer.
fn arrange_sections(out: &Path) {
    // A script that only inserts is read beside the linker's own (GNU ld's and LLVM's both).
    let unwinding = "*(.eh_frame) *(.eh_frame_hdr) *(.gcc_except_table .gcc_except_table.*)";
    // The caches of symbols of a backtrace, which comes with the end of the process.
    let untouched_values = "*(.data.*14MAPPINGS_CACHE*)";
    // Of the first one, which is larger than all others, a start touches what is first; then come two that a start touches,
    // and a path, of which it touches as much as there is.
    let untouched = "*pthread_keys.o(.bss) *libc-tls.o(.bss) *cxa_atexit.o(.bss) *(.bss.*4lost4PATH*) *res_libc.o(.bss) \
        *register-atfork.o(.bss) *(.bss.*7refusal4TOLD*) *(.bss.*4lost7WINDOWS*)";
    let script = out.join("sections.ld");
    let text = format!(
        "SECTIONS {{ /DISCARD/ : {{ {unwinding} }} }} INSERT AFTER .rodata;\n\
         SECTIONS {{ .data.cold : {{ {untouched_values} . = ALIGN(4096); }} }} INSERT BEFORE .data;\n\
         SECTIONS {{ .bss.cold (NOLOAD) : {{ {untouched} }} }} INSERT AFTER .bss;\n"
    );
    fs::write(&script, text).expect("the build folder can be written to");
    println!("cargo::rustc-link-arg-bins=-Wl,--no-eh-frame-hdr,-T,{}", script.display());
}

/// The filters of system calls, each as an array of instructions, and the names of calls by their numbers.
fn walls(arch: &str) -> String {
    let (_, arch) =
        Arch::ALL.into_iter().find(|(name, _)| *name == arch).expect("an architecture that is known");
    let read = |name: &str| {
        fs::read_to_string(format!("resources/seccomp/{name}"))
            .unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    let table = read("calls");
    let mut code = String::new();
    for (name, lists, others) in filters::LISTS {
        let list: String = lists.iter().map(|list| read(&format!("{list}.list"))).collect();
        let program =
            filters::compile(&list, &table, arch, *others).unwrap_or_else(|error| panic!("{name}: {error}"));
        code += &format!("pub static {name}: [Instruction; {}] = [\n", program.len());
        for filters::Instruction { code: what, jt, jf, k } in program {
            code += &format!("Instruction {{ code: {what}, jt: {jt}, jf: {jf}, k: {k} }},\n");
        }
        code += "];\n";
    }
    let numbers = filters::numbers(&table, arch).expect("the lists were read");
    let mut names = vec![""; numbers.values().max().map_or(0, |last| *last as usize + 1)];
    numbers.iter().for_each(|(name, number)| names[*number as usize] = *name);
    code + &format!(
        "pub const NAMES: &str = {:?};\npub const SET: u32 = {};\n\
         pub const OWN: u32 = {};\npub const JUMP_IF_EQUAL: u16 = {};\n",
        names.join(" "),
        arch.audit(),
        filters::OWN,
        filters::JUMP_IF_EQUAL,
    )
}

/// Whether the C library applies packed relocations (DT_RELR, since glibc 2.36): they are a thirtieth of the
/// size of those that name an address each, and are what a position-independent program reads first of all. A
/// static program that is linked with an older library would not apply them.
fn knows_packed_relocations() -> bool {
    let Ok(output) = Command::new("getconf").arg("GNU_LIBC_VERSION").output() else { return false };
    let said = String::from_utf8_lossy(&output.stdout);
    let version = said.trim().strip_prefix("glibc ").and_then(|version| version.split_once('.'));
    let numbers = version.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    numbers.is_some_and(|numbers: (u32, u32)| numbers >= (2, 36))
}

/// An arm64 Image is what its segments look like in memory; its header is the first code.
fn flatten(elf: &[u8]) -> Vec<u8> {
    let u64_at = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().expect("8 bytes")) as usize;
    let u16_at = |at: usize| u16::from_le_bytes([elf[at], elf[at + 1]]) as usize;
    let (table, size, count) = (u64_at(32), u16_at(54), u16_at(56));
    let headers = (0..count).map(|index| table + index * size).filter(|at| elf[*at] == 1);
    let mut image = Vec::new();
    let start = headers.clone().map(|at| u64_at(at + 24)).min().expect("there is code");
    for at in headers {
        let (offset, address, length) = (u64_at(at + 8), u64_at(at + 24) - start, u64_at(at + 32));
        image.resize(image.len().max(address + length), 0);
        image[address..address + length].copy_from_slice(&elf[offset..offset + length]);
    }
    image
}
