//! The invariants that a compiler does not check: layers, one place for `target_arch`, `unsafe` only
//! where it is listed, a map that names every module.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

const UNSAFE: &[&str] = &[
    "src/arch/x86_64/ioctls.rs",
    "src/devices/block/qcow2/layer.rs",
    "src/devices/block/ring.rs",
    "src/kvm.rs",
    "src/main.rs",
    "src/memory/mapping.rs",
    "src/sys/confine.rs",
    "src/sys/descriptor.rs",
    "src/sys/machine.rs",
    "src/sys/network.rs",
    "src/sys/pagemap.rs",
    "src/sys/process.rs",
    "src/sys/program.rs",
    "src/sys/vectors.rs",
    "src/uring.rs",
    "src/virtio/buffers.rs",
    "tests/api/main.rs",
    "tests/api/socket.rs",
    "tests/callers.rs",
    "tests/cli.rs",
    "tests/common/allocator.rs",
    "tests/common/cache.rs",
    "tests/common/faults.rs",
    "tests/common/held.rs",
    "tests/common/inject.rs",
    "tests/common/loopback.rs",
    "tests/common/mod.rs",
    "tests/common/network.rs",
    "tests/common/terminal.rs",
    "tests/costs.rs",
    "tests/fuzz/src/ground.rs",
    "tests/fuzz/src/host.rs",
    "tests/images.rs",
    "tests/interleavings/handover.rs",
    "tests/signals.rs",
];

fn root() -> PathBuf {
    env!("CARGO_MANIFEST_DIR").into()
}

fn files(folder: &Path, found: &mut Vec<(String, String)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
            found.push((name, std::fs::read_to_string(&path).unwrap()));
        }
    }
}

fn sources(folder: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    files(&root().join(folder), &mut found);
    assert!(!found.is_empty());
    found
}

/// A clock that somebody sets makes nothing here come late or early: the time of day is asked for only where it is shown,
/// compared with other times of day, or the guest's own.
#[test]
fn the_time_of_day_is_asked_for_only_where_it_is_shown() {
    const ASKS: &[&str] = &[
        // The clock of a guest that is restored somewhere else.
        "src/arch/x86_64/state.rs",
        // The times at which files of an archive were changed.
        "src/archive.rs",
        // The clock that all others here ask, for messages, events and metrics.
        "src/clock.rs",
        // The ages of images in the cache.
        "src/guest/images.rs",
        // The agent sets the clock of its guest.
        "src/sys/machine.rs",
    ];
    const SHOWS: &[&str] = &["src/history.rs", "src/log.rs", "src/microvm/metrics.rs"];
    let all = sources("src");
    let with = |words: &[&str]| -> Vec<_> {
        let has = |text: &str| words.iter().any(|word| text.contains(word));
        let mut names: Vec<_> = all.iter().filter(|file| has(&file.1)).map(|file| file.0.as_str()).collect();
        names.sort_unstable();
        names
    };
    assert_eq!(with(&["SystemTime", "libc::CLOCK_REALTIME", "gettimeofday"]), ASKS);
    assert_eq!(with(&["Utc::now", "Utc,"]), SHOWS);
}

/// The crates that the binary is made of on an architecture, as cargo finds them without a network: names and licences.
fn crates(architecture: &str) -> BTreeMap<String, String> {
    let platform = format!("{architecture}-unknown-linux-gnu");
    let words =
        ["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", &platform];
    let output = std::process::Command::new(env!("CARGO")).args(words).current_dir(root()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let list = |value: &Value| value.as_array().unwrap().clone();
    let (packages, nodes) = (list(&metadata["packages"]), list(&metadata["resolve"]["nodes"]));
    let (mut todo, mut found) = (vec![metadata["resolve"]["root"].clone()], BTreeMap::new());
    // A crate may be there in several versions.
    let mut seen = Vec::new();
    while let Some(id) = todo.pop() {
        if seen.contains(&id) {
            continue;
        }
        let package = packages.iter().find(|package| package["id"] == id).unwrap();
        let text = |field: &str| package[field].as_str().unwrap_or("none").to_owned();
        found.insert(text("name"), text("license"));
        let node = nodes.iter().find(|node| node["id"] == id).unwrap();
        // What is needed to run: not by tests alone, nor by a build script.
        let needs = |dep: &Value| list(&dep["dep_kinds"]).iter().any(|kind| kind["kind"].is_null());
        todo.extend(list(&node["deps"]).into_iter().filter(needs).map(|dep| dep["pkg"].clone()));
        seen.push(id);
    }
    found.remove("alula");
    found
}

#[test]
fn each_crate_of_the_binary_has_its_reason_and_a_free_licence() {
    const LICENCES: &[&str] =
        &["0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "MIT", "Unicode-3.0", "Unlicense", "Zlib"];
    let list = std::fs::read_to_string(root().join("resources/crates.list")).unwrap();
    let mut listed = BTreeMap::new();
    for line in list.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let [name, licence, reason] = line.split(" | ").collect::<Vec<_>>()[..] else {
            panic!("`{line}`: name, licence and reason are expected");
        };
        assert!(!reason.is_empty() && listed.insert(name.to_owned(), licence.to_owned()).is_none(), "{line}");
        // Each part must be had by one of our licences.
        let is_free = |part: &str| part.split([' ', '/']).any(|word| LICENCES.contains(&word));
        let parts = licence.replace(['(', ')'], "");
        assert!(parts.split(" AND ").all(is_free), "{name} has the licence {licence}");
    }
    let found: BTreeMap<_, _> = ["x86_64", "aarch64"].into_iter().flat_map(crates).collect();
    assert_eq!(found, listed, "resources/crates.list is not what Cargo.lock says");
    // Those that Cargo.toml names have a reason there: a comment above them, or above those that they stand with.
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    for section in
        manifest.split("\n[").filter(|part| part.lines().next().unwrap().ends_with("dependencies]"))
    {
        let first = section.lines().nth(1).unwrap();
        assert!(first.starts_with('#'), "the reason of `{first}` is missing");
    }
}

/// Each test that the pages on reliability and on threats name is there, in the program that they name.
#[test]
fn the_tests_that_pages_name_are_there() {
    let all: Vec<_> = ["src", "tests"].into_iter().flat_map(sources).collect();
    for (page, count_min) in [("docs/reliability.md", 60), ("docs/threat-model.md", 25)] {
        let page = std::fs::read_to_string(root().join(page)).unwrap();
        // A name of a test is a sentence.
        let quoted = page.split('`').skip(1).step_by(2);
        let names: Vec<_> = quoted.filter(|text| text.matches('_').count() >= 3).collect();
        assert!(names.len() >= count_min, "{names:?}");
        for name in names {
            let (program, name) = name.rsplit_once(": ").unwrap_or(("", name));
            let head = format!("fn {name}(");
            let mut files = all.iter().filter(|(_, text)| text.contains(&head)).map(|(file, _)| file);
            assert!(files.any(|file| file.contains(program)), "{program}: {name}: there is no such test");
        }
        // The rows of tables whose last column tells of tests.
        let tables = page.split("\n\n").filter(|text| {
            let head = text.lines().next().unwrap_or_default();
            ["| test |", "| shown by |"].iter().any(|last| head.ends_with(last))
        });
        let rows: Vec<_> = tables.flat_map(|table| table.lines().skip(2)).collect();
        assert!(rows.len() >= 10, "{rows:?}");
        for row in rows {
            let last = row.trim_end_matches('|').rsplit(" | ").next().unwrap();
            assert!(last.contains(": ") && last.contains('`'), "no test: {row}");
        }
    }
}

/// The layers, low to high, as the map in src/lib.rs lists them: a module uses only those before it.
fn layers() -> Vec<String> {
    let map = std::fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let list =
        map.split("//! The modules, low to high").nth(1).unwrap().split("//! Threads:").next().unwrap();
    let mut names: Vec<String> = Vec::new();
    // A module is listed as `[`name`]:`; what is only mentioned has no colon.
    for piece in list.split("[`").skip(1) {
        let (name, rest) = piece.split_once("`]").unwrap();
        if rest.starts_with(':') {
            assert!(!names.iter().any(|other| other == name), "the map lists `{name}` twice");
            names.push(name.to_owned());
        }
    }
    names
}

fn layer_of(file: &str) -> Option<&str> {
    let module = file.strip_prefix("src/")?.split('/').next()?;
    Some(module.strip_suffix(".rs").unwrap_or(module))
}

/// The code of a file, without the unit tests at its end.
fn code(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests").next().unwrap_or(text)
}

#[test]
fn every_module_uses_only_lower_layers() {
    let layers = layers();
    for (file, text) in sources("src") {
        let layer = layer_of(&file).unwrap();
        if ["lib", "main"].contains(&layer) {
            continue;
        }
        let place = |name: &str| layers.iter().position(|other| *other == name);
        let own = place(layer).unwrap_or_else(|| panic!("{file}: src/lib.rs does not list `{layer}`"));
        let code = code(&text).replace("pub(crate)", "");
        for used in code.split("crate::").skip(1) {
            let end = used.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(used.len());
            if let Some(other) = place(&used[..end]) {
                assert!(other <= own, "{file}: the layer `{layer}` uses `{}` above it", layers[other]);
            }
        }
        assert!(!code.contains("crate::{"), "{file}: one `use crate::` per module keeps layers readable");
    }
}

#[test]
fn only_one_file_asks_for_the_architecture() {
    for (file, text) in sources("src") {
        assert!(file == "src/arch/mod.rs" || !text.contains("target_arch"), "{file} asks for target_arch");
    }
}

#[test]
fn unsafe_code_is_only_where_it_is_listed() {
    const FORMS: [&str; 6] =
        ["unsafe {", "unsafe impl", "unsafe fn", "unsafe extern", "unsafe trait", "#[unsafe("];
    let mut found: Vec<String> = [sources("src"), sources("tests")]
        .concat()
        .into_iter()
        .filter(|(file, _)| file != "tests/tidy.rs")
        .filter(|(_, text)| FORMS.iter().any(|form| text.contains(form)))
        .map(|(file, _)| file)
        .collect();
    found.sort();
    assert_eq!(found, UNSAFE, "list a file here only with a reason that outweighs reading its every line");
}

#[test]
fn every_module_in_the_map_exists() {
    for layer in layers() {
        let (file, folder) = (format!("src/{layer}.rs"), format!("src/{layer}/mod.rs"));
        assert!(root().join(file).exists() || root().join(folder).exists(), "there is no module `{layer}`");
    }
}

/// The functions of a file as rustfmt writes them: their first line, and how many lines they have.
fn functions(text: &str) -> Vec<(&str, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let is_function = |line: &str| {
        let mut words = line.trim_start().split(' ').skip_while(|word| {
            word.starts_with("pub") || ["const", "async", "unsafe", "extern", "\"C\""].contains(word)
        });
        words.next() == Some("fn")
    };
    let begins = lines.iter().enumerate().filter(|(_, line)| is_function(line));
    begins
        .map(|(begin, line)| {
            let indent = &line[..line.len() - line.trim_start().len()];
            let is_end = |line: &&str| {
                line.strip_prefix(indent)
                    .is_some_and(|rest| rest == "}" || rest.starts_with(") -> ") && rest.ends_with(';'))
            };
            // One of a trait, or one that ends where it begins.
            let is_short = line.ends_with(';') || line.ends_with('}');
            let length = match is_short {
                true => 1,
                false => 1 + lines[begin..].iter().position(is_end).unwrap_or(0),
            };
            (line.trim_start(), length)
        })
        .collect()
}

#[test]
fn no_file_and_no_function_is_too_long_to_read() {
    let (mut faults, mut seen) = (Vec::new(), 0);
    for (file, text) in [sources("src"), sources("firmware"), sources("tests")].concat() {
        let lines = text.lines().count();
        if lines > 500 {
            faults.push(format!("{file} has {lines} lines"));
        }
        for (function, lines) in functions(&text) {
            seen += 1;
            if lines > 70 {
                faults.push(format!("{file}: `{function}` has {lines} lines"));
            }
        }
    }
    assert!(faults.is_empty(), "look for the second idea in each:\n{}", faults.join("\n"));
    assert!(seen > 1000, "only {seen} functions were found");
}

/// Guests trust the agent with everything: there is little of it to read. Unit tests, comments and empty lines do not count.
#[test]
fn the_agent_has_under_1000_lines_of_code() {
    let is_code = |line: &&str| !(line.trim().is_empty() || line.trim_start().starts_with("//"));
    let lines = |(_, text): &(String, String)| code(text).lines().filter(is_code).count();
    let count: usize = sources("src/agent").iter().map(lines).sum();
    assert!((500..1000).contains(&count), "{count} lines: what of it can another module, or the host, do?");
}

/// The text of a Markdown file between single backquotes, outside of code blocks.
fn quoted(text: &str) -> Vec<&str> {
    text.split("```").step_by(2).flat_map(|prose| prose.split('`').skip(1).step_by(2)).collect()
}

#[test]
fn messages_that_troubleshooting_explains_are_those_of_the_source() {
    // As the compiler reads strings over several lines.
    let join = |text: String| {
        let parts: Vec<&str> = text.split("\\\n").map(str::trim_start).collect();
        text.split("\\\n").take(1).chain(parts.into_iter().skip(1)).collect::<String>()
    };
    let source: String = sources("src").into_iter().map(|(_, text)| join(text)).collect();
    let text = std::fs::read_to_string(root().join("docs/troubleshooting.md")).unwrap();
    let mut seen = 0;
    for row in text.lines().filter(|line| line.starts_with("| ") && !line.contains("(the guest's words)")) {
        let message = row.split(" | ").next().unwrap();
        for piece in quoted(message) {
            assert!(source.contains(piece), "`{piece}` is no message of ours any more");
            seen += 1;
        }
    }
    assert!(seen > 20);
}

#[test]
fn links_in_the_documentation_lead_somewhere() {
    let folder = root().join("docs");
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.push(root().join("README.md"));
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = link.split('#').next().unwrap();
            let leads = link.starts_with("http") || file.parent().unwrap().join(path).exists();
            assert!(leads, "{}: `{link}`", file.display());
        }
    }
}

#[test]
fn every_script_tells_how_it_is_used_and_does_nothing_else() {
    let cache = std::env::temp_dir().join(format!("alula-tidy-{}", std::process::id()));
    for script in std::fs::read_dir(root().join("scripts")).unwrap() {
        let script = script.unwrap().path();
        let name = format!("scripts/{}", script.file_name().unwrap().to_str().unwrap());
        if name == "scripts/lib.sh" {
            continue;
        }
        for option in ["--help", "-h"] {
            let told =
                std::process::Command::new(&script).arg(option).env("ALULA_CACHE", &cache).output().unwrap();
            let text = String::from_utf8_lossy(&told.stdout).into_owned();
            assert!(told.status.success() && told.stderr.is_empty(), "{name}: {told:?}");
            assert!(
                text.starts_with(&format!("Usage: {name}")) && text.lines().count() > 2,
                "{name}: {text}"
            );
        }
    }
    assert!(!cache.exists(), "a script that was asked for its help went on");
}

#[test]
fn a_script_that_is_used_wrongly_says_so_in_words_of_its_own() {
    for (line, expected) in [
        ("rig", "rig: an architecture is missing: x86_64 or aarch64"),
        ("rig mips", "rig: unknown architecture `mips`: x86_64 or aarch64"),
        ("rig x86_64 --cpus", "rig: an option lacks its value; usage: scripts/rig"),
        ("rig x86_64 --frobnicate 1 -- true", "rig: unknown option --frobnicate; usage: scripts/rig"),
        ("rig x86_64 --copy /nonexistent -- true", "rig: --copy /nonexistent: there is no such file"),
        ("demo mips", "demo: unknown architecture `mips`"),
        ("guest mips", "guest: unknown architecture `mips`"),
        ("soft-linux x86_64", "soft-linux: unknown option x86_64; usage: scripts/soft-linux"),
        ("release-docs", "release-docs: a folder is missing; usage: scripts/release-docs"),
        (
            "release-docs /nonexistent /nonexistent/x",
            "release-docs: /nonexistent/x: there is no such program",
        ),
        ("bench", "bench: what to measure is missing; usage: scripts/bench"),
        ("bench restore --runs soon", "bench: restore takes --runs and a number; usage: scripts/bench"),
        ("bench clones many", "bench: clones takes a number; usage: scripts/bench"),
        ("bench soak long", "bench: soak takes seconds, and --seed with a number; usage: scripts/bench"),
        ("bench io --rig", "bench: an option lacks its value; usage: scripts/bench"),
        ("bench io --rig mips", "bench: unknown architecture `mips`"),
        ("bench io --vs /nonexistent", "bench: --vs /nonexistent: there is no such program"),
        ("fuzz soon", "fuzz: usage: scripts/fuzz SECONDS"),
        ("test --frobnicate", "test: unknown option --frobnicate; usage: scripts/test"),
    ] {
        let mut words = line.split(' ');
        let script = root().join("scripts").join(words.next().unwrap());
        let output = std::process::Command::new(script).args(words).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.starts_with(expected), "scripts/{line}: {text}");
        assert!(text.lines().count() == 1 && output.stdout.is_empty(), "scripts/{line}: {output:?}");
    }
}
