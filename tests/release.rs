//! The files that are published of a version. Completions and man pages, as scripts/release-docs makes them of the
//! binary's own help: what shells and groff make of them, and that nothing of the help is missing. Packages, as
//! scripts/release makes them: unpacked, what is in them runs.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;

use common::{Folder, PATIENCE, Process, alula, output};
use serde_json::json;

/// The output of a program, which must succeed and have nothing to complain of.
fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} is needed: {error}"));
    let complaints = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && complaints.is_empty(), "{program} {arguments:?}: {complaints}");
    String::from_utf8(output.stdout).unwrap()
}

fn help(arguments: &[&str]) -> String {
    said(alula().to_str().unwrap(), &[arguments, &["--help"]].concat())
}

/// The lines of a section of a help text that begin what they are about, without their indent.
fn section<'h>(help: &'h str, title: &str) -> Vec<&'h str> {
    let lines = help.lines().skip_while(|line| *line != title).skip(1);
    let lines = lines.take_while(|line| !line.is_empty()).map(|line| line.strip_prefix("  ").unwrap_or(line));
    lines.filter(|line| !line.starts_with(' ')).collect()
}

fn commands() -> Vec<String> {
    let help = help(&[]);
    let commands = section(&help, "Commands:");
    commands.iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
}

/// The lines of a help text that begin an option, without what is said of it.
fn option_lines(help: &str) -> Vec<&str> {
    let lines = help.lines().filter(|line| line.starts_with("  ") && line.trim_start().starts_with('-'));
    lines.map(|line| line.trim_start().split("  ").next().unwrap()).collect()
}

fn options(command: &str) -> BTreeSet<String> {
    let help = help(&[command]);
    let words = option_lines(&help).into_iter().flat_map(|line| line.split([' ', ',']));
    let long = words.filter(|word| word.starts_with("--")).map(str::to_owned);
    long.chain(["--help".to_owned()]).collect()
}

/// The words that may follow a command beside its options.
fn words(command: &str) -> BTreeSet<String> {
    let help = help(&[command]);
    let words: Vec<String> = match command {
        "ctl" => {
            let lines = section(&help, "Commands:");
            // Lines are like `pause, resume      Stop ...` and `put PATH JSON`.
            let names = lines.iter().map(|line| line.split("  ").next().unwrap());
            names
                .flat_map(|names| names.split(", "))
                .map(|name| name.split(' ').next().unwrap().to_owned())
                .collect()
        }
        "schema" => {
            section(&help, "Schemas:").iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
        }
        "help" => commands(),
        // Lines are like `Usage: alula kernel fetch [--from ...]`, and the word may be optional: `[clear]`.
        "snapshot" | "cache" | "kernel" => {
            let usage = help.lines().filter_map(|line| line.split_once(&format!("alula {command} ")));
            let usage = usage.filter(|(before, _)| matches!(before.trim(), "Usage:" | ""));
            let word = |(_, after): (&str, &str)| {
                after.split(' ').next().unwrap().trim_matches(['[', ']']).to_owned()
            };
            usage.map(word).collect()
        }
        _ => Vec::new(),
    };
    words.into_iter().collect()
}

/// A folder with everything that scripts/release-docs makes.
fn made() -> Folder {
    let folder = Folder::new();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/release-docs");
    output(script, &[folder.0.to_str().unwrap(), alula().to_str().unwrap()]);
    folder
}

/// The words that a shell's `script`, which reads the file of completions, offers for a command line.
fn completed(shell: &[&str], script: &str, file: &str, line: &[&str]) -> BTreeSet<String> {
    let arguments = [&shell[1..], &["-c", script, shell[0], file], line].concat();
    let text = said(shell[0], &arguments);
    text.split_whitespace().map(str::to_owned).collect()
}

fn set(words: &[&str]) -> BTreeSet<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[test]
fn completions_offer_every_command_option_and_word() {
    let folder = made();
    let path = |name: &str| folder.path("completions").join(name).to_str().unwrap().to_owned();
    let (bash_file, zsh_file) = (path("alula.bash"), path("_alula"));
    let bash = |line: &[&str]| {
        let script = r#"set -eu; source "$1"; shift; complete -p alula >/dev/null
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _alula
            ((${#COMPREPLY[@]} == 0)) || printf '%s\n' "${COMPREPLY[@]}""#;
        completed(&["bash", "--norc"], script, &bash_file, line)
    };
    // Outside of a completion, zsh has none of the functions that completions call. Within one, zsh itself picks the
    // words that begin like the one typed.
    let zsh = |line: &[&str]| {
        let script = r#"setopt err_exit no_unset; file=$1; shift; words=("$@"); CURRENT=$#
            compadd() { [[ $1 == -- ]]; shift; (($# == 0)) || print -l -- "$@" }
            _files() { print FILES }
            source "$file""#;
        completed(&["zsh", "-f"], script, &zsh_file, line)
    };
    let commands = commands();
    assert!(commands.len() == 19 && commands.contains(&"run".to_owned()), "{commands:?}");
    let first: BTreeSet<_> =
        commands.iter().cloned().chain(["--help", "--version"].map(str::to_owned)).collect();
    assert_eq!(bash(&["alula", ""]), first);
    assert_eq!(zsh(&["alula", ""]), first);
    assert_eq!(bash(&["alula", "ser"]), set(&["serve"]));
    let mut offered = 0;
    for command in commands.iter().filter(|command| *command != "version") {
        let words = words(command);
        // `alula help` takes no options.
        let options = if command == "help" { BTreeSet::new() } else { options(command) };
        offered += options.len() + words.len();
        assert_eq!(bash(&["alula", command, "--"]), options, "{command}");
        assert_eq!(zsh(&["alula", command, "--"]), options.union(&words).cloned().collect(), "{command}");
        if !words.is_empty() {
            let all: BTreeSet<_> = options.union(&words).cloned().collect();
            assert_eq!(bash(&["alula", command, ""]), all, "{command}");
            assert!(zsh(&["alula", command, ""]).contains("FILES"), "{command}");
        }
    }
    assert!(offered > 60, "{offered}");
    assert_eq!(bash(&["alula", "run", "--me"]), set(&["--memory", "--metadata", "--metrics-path"]));
    let file = folder.write("vmlinux-6.1", "");
    let begin = file.to_str().unwrap().strip_suffix("6.1").unwrap();
    assert_eq!(bash(&["alula", "run", begin]), set(&[file.to_str().unwrap()]), "kernels are files");
}

#[test]
fn completions_of_fish_are_whole_lines_of_what_there_is() {
    let folder = made();
    let text = std::fs::read_to_string(folder.path("completions").join("alula.fish")).unwrap();
    let (mut top, mut below) = (BTreeSet::new(), BTreeSet::new());
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("# fish completion for alula"));
    for line in lines {
        let rest = line.strip_prefix("complete -c alula -n ").unwrap_or_else(|| panic!("{line}"));
        if let Some(rest) = rest.strip_prefix("__fish_use_subcommand -a ") {
            let (command, about) = rest.split_once(" -d '").unwrap();
            let about = about.strip_suffix('\'').unwrap().replace("\\'", "");
            assert!(about.len() > 5 && !about.contains('\''), "{line}");
            top.insert(command.to_owned());
        } else {
            let rest = rest.strip_prefix("'__fish_seen_subcommand_from ").unwrap();
            let (command, word) = rest.split_once("' -").unwrap();
            let word = match word.split_once(' ').unwrap() {
                ("l", option) => format!("--{option}"),
                ("a", word) => word.to_owned(),
                other => panic!("{other:?}"),
            };
            below.insert((command.to_owned(), word));
        }
    }
    let commands = commands();
    assert_eq!(top, commands.iter().cloned().collect());
    let of = |command: &String| {
        let options = if command == "help" { BTreeSet::new() } else { options(command) };
        let all: Vec<_> = options.into_iter().chain(words(command)).collect();
        all.into_iter().map(|word| (command.clone(), word)).collect::<Vec<_>>()
    };
    let expected = commands.iter().filter(|command| *command != "version").flat_map(of);
    assert_eq!(below, expected.collect());
}

#[test]
fn man_pages_have_every_line_of_the_help_and_no_fault() {
    let folder = made();
    let mut pages: Vec<_> =
        std::fs::read_dir(folder.path("man")).unwrap().map(|page| page.unwrap().path()).collect();
    pages.sort();
    // `help` and `version` have no pages of their own: the page of `alula` has everything of them.
    assert_eq!(pages.len(), 1 + commands().len() - 2);
    for page in pages {
        let name = page.file_name().unwrap().to_str().unwrap().strip_suffix(".1").unwrap().to_owned();
        // The page is wide, so that nothing is broken over lines, and has nothing that a terminal would make bold.
        let arguments = ["-ww", "-man", "-Tascii", "-P-cbou", "-rLL=1000n", page.to_str().unwrap()];
        let text = said("groff", &arguments);
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let command: Vec<&str> = name.split('-').skip(1).collect();
        let help = help(&command);
        let about = help.lines().next().unwrap().split('.').next().unwrap();
        let has = |wanted: &str| lines.contains(&wanted);
        assert!(has(&format!("{name} - {about}")), "{name}: no name: {text}");
        // The text of a short option stands in the option's line.
        let begins = |wanted: &str| {
            lines.iter().any(|line| {
                line.strip_prefix(wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
            })
        };
        let named = [section(&help, "Commands:"), section(&help, "Schemas:")].concat();
        let named = named.iter().map(|line| line.split("  ").next().unwrap());
        for line in option_lines(&help).into_iter().chain(named) {
            assert!(begins(line), "{name}: `{line}`: {text}");
        }
        for line in section(&help, "Examples:") {
            assert!(has(line), "{name}: the example `{line}`: {text}");
        }
        let flat = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let flat_page = flat(&text);
        for paragraph in help
            .split("\n\n")
            .filter(|paragraph| !paragraph.contains("\n ") && !paragraph.starts_with("Usage"))
        {
            assert!(flat_page.contains(&flat(paragraph)), "{name}: `{paragraph}`: {text}");
        }
        for word in ["NAME", "SYNOPSIS", "DESCRIPTION"] {
            assert!(has(word), "{name}: {word}: {text}");
        }
    }
}

/// Has scripts/release pack `folder`/binary in `folder`/NAME, and returns the sums of what it has made.
fn released(folder: &Folder, name: &str) -> String {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/release");
    let binary = format!("{}={}", std::env::consts::ARCH, folder.path("binary").display());
    output(script, &[env!("CARGO_PKG_VERSION"), folder.path(name).to_str().unwrap(), &binary]);
    std::fs::read_to_string(folder.path(name).join("SHA256SUMS")).unwrap()
}

/// A script in a file that can be executed.
fn script(folder: &Folder, name: &str, lines: &str) {
    let file = folder.write(name, format!("#!/bin/sh\n{lines}\n"));
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// The command of the unit in a package, for this guest: `%i`. The files that it names are in `folder` instead.
fn command_of_the_unit(folder: &Folder, guest: &str) -> Command {
    let unit = std::fs::read_to_string(folder.path("root/usr/lib/systemd/system/alula@.service")).unwrap();
    let line = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let place = |word: &str| match word.strip_prefix('/') {
        Some(path) => folder.path("root").join(path).to_str().unwrap().replace("%i", guest),
        None => word.replace("%i", guest),
    };
    let words: Vec<_> = line.split(' ').map(place).collect();
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    command
}

/// Starts guests as the unit would, beside a service manager, and a passt that notes its environment.
fn run_the_unit(folder: &Folder) {
    std::fs::create_dir_all(folder.path("root/run/alula")).unwrap();
    let manager = UnixDatagram::bind(folder.path("manager")).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    script(folder, "passt", "env > \"$0.environment\"; eval \"exec cat <&$4\" > /dev/null");
    let start = |guest: &str, kernel: &Path| {
        let config = json!({
            "boot-source": { "kernel_image_path": kernel, "boot_args": "hello end=idle" },
            "network-interfaces": [{ "iface_id": "n", "user": {} }],
        });
        folder.write(&format!("root/etc/alula/{guest}.json"), config.to_string());
        let mut command = command_of_the_unit(folder, guest);
        let path = format!("{}:{}", folder.0.display(), std::env::var("PATH").unwrap());
        command.env("NOTIFY_SOCKET", folder.path("manager")).env("PATH", path);
        Process::spawn(command)
    };
    let failed = start("broken", &folder.path("none")).end();
    assert!(failed.code == Some(1) && failed.text.contains("none"), "{failed:?}");
    let mut service = start("web-1", &folder.firmware());
    let mut bytes = [0; 100];
    let count = manager.recv(&mut bytes).unwrap();
    assert_eq!(&bytes[..count], b"READY=1");
    service.expect("A");
    let program = folder.path("root/usr/bin/alula");
    let socket = folder.path("root/run/alula/web-1.sock");
    let told = said(program.to_str().unwrap(), &["ctl", "--api-sock", socket.to_str().unwrap(), "status"]);
    assert!(told.starts_with("web-1: Running; 1 CPU"), "{told}");
    service.send(libc::SIGTERM);
    service.end();
    manager.set_nonblocking(true).unwrap();
    assert!(manager.recv(&mut bytes).is_err(), "one of the two told that it was ready, once");
    let environment = std::fs::read_to_string(folder.path("passt.environment")).unwrap();
    assert!(environment.contains("PATH=") && !environment.contains("NOTIFY_SOCKET"), "{environment}");
}

#[test]
fn a_package_is_unpacked_and_what_is_in_it_runs() {
    let folder = Folder::new();
    // The binary is small without what is for debuggers.
    output("strip", &["-o", folder.path("binary").to_str().unwrap(), alula().to_str().unwrap()]);
    let sums = released(&folder, "packages");
    assert_eq!(sums, released(&folder, "again"), "the same is made twice");
    let mut checked = Command::new("sha256sum");
    checked.args(["--check", "SHA256SUMS"]).current_dir(folder.path("packages"));
    let checked = checked.output().unwrap();
    let (arch, version) = (std::env::consts::ARCH, env!("CARGO_PKG_VERSION"));
    let debian_arch = if arch == "x86_64" { "amd64" } else { "arm64" };
    let (name, package) = (format!("alula-{version}-{arch}"), format!("alula_{version}_{debian_arch}.deb"));
    let expected = format!("{name}.tar.gz: OK\n{package}: OK\n");
    assert!(checked.status.success() && checked.stdout == expected.as_bytes(), "{checked:?}");

    let package = folder.path("packages").join(package);
    let package = package.to_str().unwrap();
    assert_eq!(said("dpkg-deb", &["--field", package, "Version", "Architecture"]).lines().count(), 2);
    let listed = said("dpkg-deb", &["--contents", package]);
    assert!(listed.lines().all(|line| line.contains(" root/root ")), "{listed}");
    output("dpkg", &["-x", package, folder.path("root").to_str().unwrap()]);
    for file in [
        "usr/bin/alula",
        "usr/share/man/man1/alula.1.gz",
        "usr/share/bash-completion/completions/alula",
        "usr/share/zsh/vendor-completions/_alula",
        "usr/share/fish/vendor_completions.d/alula.fish",
        "usr/share/doc/alula/copyright",
        "usr/share/doc/alula/changelog.gz",
        "etc/alula",
    ] {
        assert!(folder.path("root").join(file).exists(), "{file}");
    }
    let page = folder.path("root/usr/share/man/man1/alula-serve.1.gz");
    assert!(said("gzip", &["-dc", page.to_str().unwrap()]).contains(".TH "));
    run_the_unit(&folder);

    let tarball = folder.path("packages").join(format!("{name}.tar.gz"));
    let listed = said("tar", &["-tzf", tarball.to_str().unwrap()]);
    for file in ["alula", "alula@.service", "man/alula.1", "completions/alula.fish", "LICENSE"] {
        assert!(listed.lines().any(|line| line == format!("{name}/{file}")), "{file}: {listed}");
    }
}

#[test]
fn a_release_is_of_the_version_that_it_says() {
    let folder = Folder::new();
    let (arch, ours) = (std::env::consts::ARCH, env!("CARGO_PKG_VERSION"));
    script(&folder, "other", "echo alula 9.9.9");
    for (version, binary, expected) in [
        ("9.9.9", "other", format!("this is version {ours}, not 9.9.9")),
        (ours, "other", format!("is of version 9.9.9, not {ours}")),
        (ours, "none", "there is no such program".to_owned()),
        (ours, "/bin/true", "/bin/true needs the C library of its machine".to_owned()),
    ] {
        let binary = format!("{arch}={}", folder.path(binary).display());
        let release = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/release");
        let mut command = Command::new(release);
        let output = command.arg(version).arg(folder.path("out")).arg(&binary).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && errors.contains(&expected), "{version} {binary:?}: {errors}");
        assert!(!folder.path("out").exists());
    }
}
