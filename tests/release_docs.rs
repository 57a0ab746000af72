//! Completions and man pages, as scripts/release-docs makes them of the binary's own help: what shells and groff
//! make of them, and that nothing of the help is missing.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::collections::BTreeSet;
use std::process::Command;

use common::{Folder, alula, output};

/// What a program says, which must have nothing to complain of.
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

/// The lines of a section of a help text, without their indent.
fn section<'h>(help: &'h str, title: &str) -> Vec<&'h str> {
    let lines = help.lines().skip_while(|line| *line != title).skip(1);
    lines.take_while(|line| !line.is_empty()).map(str::trim_start).collect()
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

/// What may follow a command beside its options.
fn words(command: &str) -> BTreeSet<String> {
    let help = help(&[command]);
    let words: Vec<String> = match command {
        "ctl" => {
            let lines = section(&help, "Commands:");
            // `pause, resume      Stop ...`; `put PATH JSON`.
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
        // `Usage: alula kernel fetch [--from ...]`; `[clear]`.
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

/// Everything that scripts/release-docs makes.
fn made() -> Folder {
    let folder = Folder::new();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/release-docs");
    output(script, &[folder.0.to_str().unwrap(), alula().to_str().unwrap()]);
    folder
}

/// What a shell's `script`, after the file of completions was read, says of a command line.
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
    // Outside of a completion, zsh has none of the functions that completions call. It offers what begins
    // like the word by itself.
    let zsh = |line: &[&str]| {
        let script = r#"setopt err_exit no_unset; file=$1; shift; words=("$@"); CURRENT=$#
            compadd() { [[ $1 == -- ]]; shift; (($# == 0)) || print -l -- "$@" }
            _files() { print FILES }
            source "$file""#;
        completed(&["zsh", "-f"], script, &zsh_file, line)
    };
    let commands = commands();
    assert!(commands.len() == 15 && commands.contains(&"run".to_owned()), "{commands:?}");
    let first: BTreeSet<_> =
        commands.iter().cloned().chain(["--help", "--version"].map(str::to_owned)).collect();
    assert_eq!(bash(&["alula", ""]), first);
    assert_eq!(zsh(&["alula", ""]), first);
    assert_eq!(bash(&["alula", "ser"]), set(&["serve"]));
    let mut offered = 0;
    for command in commands.iter().filter(|command| *command != "version") {
        let words = words(command);
        // `alula help` takes none.
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
    // Of `help` and `version` the page of all has everything.
    assert_eq!(pages.len(), 1 + commands().len() - 2);
    for page in pages {
        let name = page.file_name().unwrap().to_str().unwrap().strip_suffix(".1").unwrap().to_owned();
        // Wide, so that nothing is broken over lines: without what a terminal would make bold.
        let arguments = ["-ww", "-man", "-Tascii", "-P-cbou", "-rLL=1000n", page.to_str().unwrap()];
        let text = said("groff", &arguments);
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let command: Vec<&str> = name.split('-').skip(1).collect();
        let help = help(&command);
        let about = help.lines().next().unwrap().split('.').next().unwrap();
        let has = |wanted: &str| lines.contains(&wanted);
        assert!(has(&format!("{name} - {about}")), "{name}: no name: {text}");
        // What is said of a short one stands in the same line.
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
