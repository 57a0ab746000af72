//! The command line: what is wrong is said, the terminal is given back, nothing is left behind.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;

use std::process::{Command, Stdio};

use common::terminal::Terminal;
use common::{Ended, Folder, Process, alula, called, run, wait_for};

const X86_64: bool = cfg!(target_arch = "x86_64");

/// Runs a guest that must not start, and returns what was said about it.
fn refused(arguments: &[&str]) -> String {
    let Ended { code, text } = run([&["run"], arguments].concat());
    assert_eq!(code, Some(125), "{arguments:?}: {text}");
    assert!(text.starts_with("alula: ") && text.lines().count() == 1, "{arguments:?}: {text}");
    text
}

fn refused_with(arguments: &[&str], expected: &str) {
    let text = refused(arguments);
    assert!(text.contains(expected), "{arguments:?}: {text}");
}

#[test]
fn help_gives_units_defaults_and_an_example() {
    let help = run(["run", "--help"]);
    assert_eq!(help.code, Some(0));
    for expected in
        ["[default: 128M]", "MiB", "Examples:", "alula run vmlinux --initrd", "docs/exit-codes.md"]
    {
        assert!(help.text.contains(expected), "{}", help.text);
    }
    assert!(run(["serve", "--help"]).text.contains("[default: 51200]"));
    // A release names its commit, too.
    let version = run(["--version"]).text;
    let rest = version.strip_prefix(concat!("alula ", env!("CARGO_PKG_VERSION"))).unwrap();
    assert!(rest == "\n" || rest.starts_with(" (commit ") && rest.ends_with(")\n"), "{version}");
}

#[test]
fn wrong_arguments_are_told_with_a_code_of_their_own() {
    for arguments in [
        &["run", "--cpu", "2"][..],
        &["run", "--memory", "much"],
        &["run", "--cpus", "-1"],
        &["run", "--cpus", "70000"],
        &["run", "--initrd", "x"],
        &["serve", "--id", "a_b"],
        &["serve", "--no-api"],
        &["dance"],
        &[],
    ] {
        let ended = run(arguments);
        assert_eq!(ended.code, Some(153), "{arguments:?}: {}", ended.text);
        assert!(ended.text.contains("--help`\n"), "{}", ended.text);
    }
}

#[test]
fn an_option_that_is_given_twice_is_refused_by_name() {
    let folder = Folder::new();
    let firecracker = called("firecracker", &folder);
    let alula = alula();
    for (program, line, option) in [
        (&alula, "run --cpus 1 --memory 64M --cpus=1", "--cpus"),
        (&alula, "run --entropy --entropy", "--entropy"),
        (&alula, "run --level Info --log-path /dev/null --level Info", "--level"),
        (&alula, "run --config a --config b", "--config"),
        (&alula, "serve --api-sock /nonexistent/a --api-sock /nonexistent/b", "--api-sock"),
        (&alula, "serve --no-seccomp --no-seccomp", "--no-seccomp"),
        (&alula, "ctl --json status --json", "--json"),
        (&firecracker, "--id a --api-sock /nonexistent/a --id b", "--id"),
        (&firecracker, "--start-time-us 1 --start-time-us 1 --no-api", "--start-time-us"),
    ] {
        let mut command = Command::new(program);
        command.args(line.split(' '));
        let ended = Process::spawn(command).end();
        assert_eq!(ended.code, Some(153), "{line}: {}", ended.text);
        let expected = format!("alula: {option} is given twice: give it once; see `");
        assert!(ended.text.starts_with(&expected), "{line}: {}", ended.text);
    }
    // There can be many of these: they are taken, and fail later.
    for line in ["run --disk /nonexistent/a --disk /nonexistent/b", "run --net tap=a%0 --net tap=a%1"] {
        assert_eq!(run(line.split(' ')).code, Some(125), "{line}");
    }
    let ended = run(["schema", "config", "openapi"]);
    assert_eq!(ended.code, Some(153));
    assert!(ended.text.contains("unexpected argument \"openapi\""), "{}", ended.text);
}

#[test]
fn a_kernel_that_is_none_is_refused() {
    let folder = Folder::new();
    // aarch64's kernels may come compressed.
    let gzip = match cfg!(target_arch = "aarch64") {
        true => "unpack it with gzip: the file is damaged or not whole",
        false => "compressed with gzip: unpack it first",
    };
    refused_with(&["/nonexistent/kernel"], "open kernel `/nonexistent/kernel`: No such file");
    refused_with(&["/"], "open kernel `/`: it is a directory, a file or block device is needed");
    for (name, content, expected) in [
        ("empty", vec![], "the file is empty"),
        ("text", b"just some text".to_vec(), "not a kernel image: expected ELF"),
        ("gzip", b"\x1f\x8b\x08\0".to_vec(), gzip),
        ("head", b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0".to_vec(), ""),
    ] {
        let file = folder.write(name, content);
        let text = refused(&[file.to_str().unwrap()]);
        assert!(text.contains(&format!("load kernel `{}`", file.display())), "{text}");
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn a_kernel_for_the_other_architecture_is_named_as_such() {
    let folder = Folder::new();
    let mut image = vec![0; 4096];
    let (name, expected) = if X86_64 {
        image[56..60].copy_from_slice(b"ARM\x64");
        ("Image", "it is a kernel for aarch64, this machine is x86_64")
    } else {
        image[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0");
        ("vmlinux", "it is a kernel for x86_64, this machine is aarch64")
    };
    let file = folder.write(name, image);
    refused_with(&[file.to_str().unwrap()], expected);
}

/// The firmware's kernel image with `bytes` at `offset`.
fn with(offset: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = alula::firmware::IMAGE.to_vec();
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
    image
}

/// Where in `image` the program header of its PVH note is.
fn note_in(image: &[u8]) -> usize {
    let table = u64::from_le_bytes(image[32..40].try_into().unwrap()) as usize;
    (table..).step_by(56).take(image[56].into()).find(|at| image[*at] == 4).expect("there is a PVH note")
}

/// `image`, with PT_NULL in the program header of its PVH note.
fn without_note(mut image: Vec<u8>) -> Vec<u8> {
    let note = note_in(&image);
    image[note] = 0;
    image
}

#[test]
fn a_kernel_that_does_not_fit_is_refused() {
    let folder = Folder::new();
    let whole = alula::firmware::IMAGE;
    let cases: Vec<(&str, Vec<u8>, &str)> = if X86_64 {
        // The first program header: file offset 8, physical address 24, file size 32, memory size 40.
        let header = u64::from_le_bytes(whole[32..40].try_into().unwrap()) as usize;
        let note = note_in(whole);
        vec![
            ("truncated", whole[..whole.len() / 2].to_vec(), "it is truncated"),
            ("cut-header", whole[..40].to_vec(), "truncated"),
            ("beyond", with(header + 24, &(1u64 << 40).to_le_bytes()), "outside guest memory"),
            ("wrapping", with(header + 24, &(u64::MAX - 10).to_le_bytes()), "outside guest memory"),
            ("tables", with(header + 24, &0x7000u64.to_le_bytes()), "overlaps the boot tables"),
            ("huge", with(header + 40, &(1u64 << 40).to_le_bytes()), "outside guest memory"),
            (
                "entry",
                without_note(with(24, &0x10u64.to_le_bytes())),
                "0x10 of its ELF header, for it has no PVH",
            ),
            ("noted", with(note + 32, &(1u64 << 40).to_le_bytes()), "its notes have 1099511627776 bytes"),
            ("many", with(56, &9999u16.to_le_bytes()), "9999 program headers"),
            ("narrow", with(4, &[1]), "not a 64-bit little-endian ELF"),
            ("foreign", with(18, &243u16.to_le_bytes()), "ELF for machine 243"),
        ]
    } else {
        vec![
            ("cut-header", whole[..60].to_vec(), "truncated"),
            ("huge", with(16, &(1u64 << 40).to_le_bytes()), "do not fit"),
            ("wrapping", with(8, &u64::MAX.to_le_bytes()), "do not fit"),
        ]
    };
    for (name, image, expected) in cases {
        let file = folder.write(name, image);
        let text = refused(&[file.to_str().unwrap(), "--memory", "64M"]);
        assert!(text.contains(&format!("load kernel `{}`", file.display())), "{name}: {text}");
        assert!(text.contains(expected), "{name}: {text}");
    }
}

#[test]
fn an_initrd_that_is_missing_or_too_large_is_refused() {
    let folder = Folder::new();
    let kernel = folder.firmware();
    let kernel = kernel.to_str().unwrap();
    let large = folder.path("initrd");
    File::create(&large).unwrap().set_len(100 << 20).unwrap();
    let empty = folder.write("empty", "");
    let empty = empty.to_str().unwrap();
    refused_with(&[kernel, "--initrd", empty], &format!("load initrd `{empty}`: it is empty: make it again"));
    refused_with(&[kernel, "--initrd", "/nonexistent"], "open initrd `/nonexistent`: No such file");
    let large = large.to_str().unwrap();
    refused_with(
        &[kernel, "--initrd", large, "--memory", "64M"],
        &format!("with initrd `{large}`: the initrd of 104857600 bytes does not fit"),
    );
    // Where memory goes on elsewhere, more of it is no help.
    if let [low, _] = alula::arch::layout::memory(5 << 30)[..] {
        File::create(large).unwrap().set_len(low.size).unwrap();
        refused_with(&[kernel, "--initrd", large, "--memory", "5G"], "no initrd can be: make it smaller");
    }
}

#[test]
fn a_command_line_that_does_not_fit_is_refused() {
    let folder = Folder::new();
    let kernel = folder.firmware();
    let long = "x".repeat(2048);
    refused_with(&[kernel.to_str().unwrap(), "--cmdline", &long], "has 2048 bytes, at most 2047 fit");
    let config =
        format!(r#"{{"boot-source": {{"kernel_image_path": {kernel:?}, "boot_args": "a\u0000b"}}}}"#);
    let config = folder.write("vm.json", config);
    refused_with(&["--config", config.to_str().unwrap()], "contains a NUL byte");
}

#[test]
fn memory_and_cpus_that_cannot_be_had_are_refused() {
    refused_with(&["--memory", "0"], "`mem_size_mib`");
    refused_with(&["--memory", "1M"], "at least 2 are needed");
    refused_with(&["--memory", "2000000G"], "of guest memory: give the guest less");
    refused_with(&["--memory", "17179869184G"], "4294967296 MiB are the most");
    refused_with(&["--cpus", "0"], "`vcpu_count`");
    refused_with(&["--cpus", "65535"], "are more than this host's KVM has: at most");
}

#[test]
fn a_console_that_nobody_reads_is_no_error() {
    let mut child = Command::new(alula())
        .args(["run", "--cmdline", "case=serial end=5"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(5));
}

#[test]
fn a_host_without_kvm_is_told_what_to_look_at() {
    let mut command = Command::new(alula());
    command.arg("run");
    // SAFETY: between fork and exec, only system calls with static strings.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(|| {
            let private = libc::MS_REC | libc::MS_PRIVATE;
            let failed = libc::unshare(libc::CLONE_NEWNS) != 0
                || libc::mount(c"".as_ptr(), c"/".as_ptr(), c"".as_ptr(), private, std::ptr::null()) != 0
                || libc::mount(c"t".as_ptr(), c"/dev".as_ptr(), c"tmpfs".as_ptr(), 0, std::ptr::null()) != 0;
            if failed { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    let mut process = Process::spawn(command);
    process.stdin = None;
    let ended = process.end();
    assert_eq!(ended.code, Some(125), "{}", ended.text);
    assert!(ended.text.contains("open /dev/kvm: No such file"), "{}", ended.text);
    assert!(ended.text.contains("is virtualisation on in the firmware"), "{}", ended.text);
}

#[test]
fn a_user_who_may_not_use_kvm_is_told_how_to() {
    let folder = Folder::new();
    let mut command = Command::new(common::for_everybody(&folder));
    command.arg("run").uid(65534).gid(65534);
    let mut process = Process::spawn(command);
    process.stdin = None;
    let ended = process.end();
    assert_eq!(ended.code, Some(125), "{}", ended.text);
    assert!(ended.text.contains("open /dev/kvm: Permission denied"), "{}", ended.text);
    let ways = ["(`sudo usermod -aG ", "`sudo setfacl -m u:"];
    assert_eq!(ways.iter().filter(|way| ended.text.contains(*way)).count(), 1, "{}", ended.text);
}

#[test]
fn the_terminal_is_raw_for_the_guest_and_restored_on_every_way_out() {
    type WayOut = fn(&mut Terminal, &mut std::process::Child);
    let ways: [(&str, WayOut, i32); 4] = [
        ("Ctrl-A X", |terminal, _| terminal.user.write_all(b"\x01x").unwrap(), 130),
        ("the guest's end", |terminal, _| terminal.user.write_all(b"line\r").unwrap(), 6),
        (
            "SIGTERM",
            |_, child| {
                // SAFETY: the process is our child and has not been waited for.
                #[allow(unsafe_code)]
                unsafe {
                    libc::kill(child.id() as i32, libc::SIGTERM);
                }
            },
            128 + libc::SIGTERM,
        ),
        (
            "Ctrl-C is the guest's, Ctrl-A Ctrl-A too",
            |terminal, _| terminal.user.write_all(b"\x03\x01\x01\r").unwrap(),
            6,
        ),
    ];
    for (way, out, code) in ways {
        let mut terminal = Terminal::new();
        let before = terminal.modes();
        assert!(!terminal.is_raw());
        let mut child = terminal.start(&["run", "--cmdline", "case=serial echo end=6"]);
        terminal.read_until("alula firmware");
        wait_for(|| terminal.is_raw());
        out(&mut terminal, &mut child);
        assert_eq!(terminal.code_of(&mut child), Some(code), "{way}");
        assert_eq!(terminal.modes(), before, "{way}");
    }
}

#[test]
fn the_keys_are_told_once_and_listed_when_asked_for() {
    const HINT: &str = "alula: Ctrl-A X leaves, Ctrl-A ? lists the keys";
    for (arguments, is_told) in [(&[][..], true), (&["--quiet"], false), (&["-v"], true)] {
        let mut terminal = Terminal::new();
        let mut command = Command::new(alula());
        command.args(["run", "--cmdline", "case=serial echo end=6"]).args(arguments);
        let messages = terminal.monitor.try_clone().unwrap();
        let mut child = terminal.with(&mut command).stderr(messages).spawn().unwrap();
        drop(command);
        let before = terminal.read_until("alula firmware");
        wait_for(|| terminal.is_raw());
        terminal.user.write_all(b"\x01?").unwrap();
        let keys = terminal.read_until("lists these keys");
        assert!(keys.contains("alula: Ctrl-A X leaves; a guest that was started for this ends"), "{keys}");
        terminal.user.write_all(b"line\r").unwrap();
        assert_eq!(terminal.code_of(&mut child), Some(6));
        // The line is echoed by the guest. What is said last stands behind it, and this after it.
        terminal.monitor_says("the end of this test");
        let after = terminal.read_until("the end of this test");
        let all = [before, keys, after].concat();
        assert_eq!(all.matches(HINT).count(), usize::from(is_told), "{arguments:?}: {all}");
        assert_eq!(all.contains("alula: the guest ended with code 6"), is_told, "{arguments:?}: {all}");
        assert_eq!(all.contains(r#"{"event":"started""#), arguments == ["-v"], "{arguments:?}: {all}");
    }
}

#[test]
fn a_quiet_run_has_its_end_in_its_log_and_its_errors_on_standard_error() {
    let folder = Folder::new();
    let log = folder.path("log");
    let ended =
        run(["run", "--quiet", "--cmdline", "case=serial end=3", "--log-path", log.to_str().unwrap()]);
    assert_eq!(ended.code, Some(3));
    assert!(!ended.text.contains("alula: "), "{}", ended.text);
    let log = std::fs::read_to_string(&log).unwrap();
    assert!(log.contains("the guest ended"), "{log}");
    assert!(refused(&["--quiet", "/nonexistent"]).contains("open kernel `/nonexistent`"));
    let both = run(["run", "-q", "-v"]);
    assert_eq!(both.code, Some(153));
    assert!(both.text.contains("--quiet and --verbose do not go together"), "{}", both.text);
}

#[test]
fn a_kernel_on_a_software_kvm_is_told_at_once_what_to_expect() {
    let folder = Folder::new();
    let kernel = folder.write("vmlinuz", vec![0; 2 << 20]);
    let text = run(["run", kernel.to_str().unwrap()]).text;
    let said = "alula: this host's KVM (kvm_pvm) has no hardware virtualisation and emulates kernel code";
    assert_eq!(text.starts_with(said), common::is_software_kvm(), "{text}");
    assert!(!run(["run", folder.firmware().to_str().unwrap()]).text.contains(said));
}

#[test]
fn the_firmware_is_not_written_to_a_terminal() {
    let mut terminal = Terminal::new();
    let mut child = terminal.start(&["firmware"]);
    assert_eq!(terminal.code_of(&mut child), Some(153));
    let output = Command::new(alula()).arg("firmware").output().unwrap();
    assert!(output.status.success() && output.stdout.len() > 1000);
}

#[test]
fn ctrl_a_x_leaves_a_guest_that_does_not_read() {
    let mut terminal = Terminal::new();
    let mut child = terminal.start(&["run", "--cmdline", "case=serial end=spin"]);
    terminal.read_until("0 failed");
    wait_for(|| terminal.is_raw());
    terminal.user.write_all(&[b'x'; 500]).unwrap();
    terminal.user.write_all(b"\x01x").unwrap();
    assert_eq!(terminal.code_of(&mut child), Some(130));
}

#[test]
fn a_failed_start_leaves_the_terminal_and_the_socket_path_alone() {
    let mut terminal = Terminal::new();
    let folder = Folder::new();
    let socket = folder.path("s");
    let before = terminal.modes();
    let mut child = terminal.start(&["run", "/nonexistent", "--api-sock", socket.to_str().unwrap()]);
    assert_eq!(terminal.code_of(&mut child), Some(125));
    assert_eq!(terminal.modes(), before);
    assert!(!socket.exists());
}

#[test]
fn a_paste_reaches_the_guest_whole() {
    let mut terminal = Terminal::new();
    let mut child = terminal.start(&["run", "--cmdline", "case=serial echo end=6"]);
    terminal.read_until("alula firmware");
    wait_for(|| terminal.is_raw());
    let paste: String = (0..60).map(|number| format!("{number:04} ")).collect();
    terminal.user.write_all(format!("{paste}\r").as_bytes()).unwrap();
    terminal.read_until(&paste);
    assert_eq!(terminal.code_of(&mut child), Some(6));
}

#[test]
fn what_a_guest_never_reads_is_lost_at_a_limit_with_one_line() {
    let mut terminal = Terminal::new();
    let folder = Folder::new();
    let log = folder.path("log");
    let arguments =
        ["run", "--cmdline", "case=serial end=spin", "--log-path", log.to_str().unwrap(), "--level", "Info"];
    let mut child = terminal.start(&arguments);
    terminal.read_until("0 failed");
    wait_for(|| terminal.is_raw());
    for _ in 0..100 {
        terminal.user.write_all(&[b'x'; 1024]).unwrap();
    }
    terminal.user.write_all(b"\x01x").unwrap();
    assert_eq!(terminal.code_of(&mut child), Some(130));
    let log = std::fs::read_to_string(&log).unwrap();
    let said = "the guest does not read its console: what is typed beyond 64 KiB is lost";
    assert_eq!(log.matches(said).count(), 1, "{log}");
}

/// A command whose process has these limits.
fn limited(arguments: &[&str], limits: &'static [(libc::__rlimit_resource_t, u64)]) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(alula());
    command.args(arguments);
    // SAFETY: between fork and exec the closure makes system calls alone.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(move || {
            for (resource, most) in limits {
                let limit = libc::rlimit { rlim_cur: *most, rlim_max: libc::RLIM_INFINITY };
                if libc::setrlimit(*resource, &limit) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    command
}

#[test]
fn a_limit_of_file_sizes_is_an_error_of_what_is_written() {
    const LIMIT: &[(libc::__rlimit_resource_t, u64)] = &[(libc::RLIMIT_FSIZE, 512)];
    let folder = Folder::new();
    let disk = folder.write("disk", vec![0; 1 << 20]);
    // The guest's case writes the disk's second sector.
    for engine in ["sync", "async"] {
        let disk = format!("{},engine={engine}", disk.display());
        let ended =
            Process::spawn(limited(&["run", "--disk", &disk, "--cmdline", "case=block"], LIMIT)).end();
        assert_eq!(ended.code, Some(1), "{engine}: {}", ended.text);
        assert!(ended.text.contains("expected status 0 for a write, found 1"), "{engine}: {}", ended.text);
        assert!(!ended.text.contains("instead of Async"), "{}", ended.text);
    }
    // Console, log, events and metrics go to files that may not grow, and the guest ends as it would.
    let path = |name: &str| folder.path(name).display().to_string();
    let (log, events, metrics) = (path("log"), path("events"), path("metrics"));
    let arguments =
        ["run", "--log-path", &log, "--events", &events, "--metrics-path", &metrics, "--cmdline", "end=7"];
    let mut command = limited(&arguments, LIMIT);
    command.stdout(File::create(folder.path("console")).unwrap()).stderr(Stdio::null()).stdin(Stdio::null());
    assert_eq!(command.status().unwrap().code(), Some(7));
    let size = |name: &str| std::fs::metadata(folder.path(name)).unwrap().len();
    let sizes = ["console", "log", "events", "metrics"].map(size);
    assert!(sizes.iter().all(|size| (1..=512).contains(size)), "{sizes:?}");
    assert!(sizes[1..].contains(&512), "nothing was cut off: {sizes:?}");
}

#[test]
fn a_limit_of_cpu_time_ends_the_process_with_words() {
    const LIMIT: &[(libc::__rlimit_resource_t, u64)] = &[(libc::RLIMIT_CPU, 1)];
    let ended = Process::spawn(limited(&["run", "--cmdline", "case=serial end=spin"], LIMIT)).end();
    assert_eq!(ended.code, Some(154), "{}", ended.text);
    let said = "alula: the soft limit of CPU time (RLIMIT_CPU, `ulimit -S -t`) is used up\n";
    assert!(ended.text.contains(said), "{}", ended.text);
}
