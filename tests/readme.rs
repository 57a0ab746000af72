//! The README: its examples of the control socket, as a newcomer types them, what it says is not there yet, and
//! its figures, as far as they need no clock.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use common::{Client, Folder, Process, Service, alula, called, wait_for};
use serde_json::json;

const README: &str = include_str!("../README.md");

/// The rows of the table with this head, as cells.
fn table(head: &str) -> Vec<Vec<&'static str>> {
    let lines = README.lines().skip_while(|line| !line.starts_with(head)).skip(2);
    let rows = lines.take_while(|line| line.starts_with('|'));
    let rows: Vec<Vec<_>> =
        rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect()).collect();
    assert!(!rows.is_empty(), "there is no table `{head}`");
    rows
}

/// The block of shell that contains `text`.
fn example(text: &str) -> String {
    let blocks = README.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    blocks.into_iter().find(|block| block.contains(text)).unwrap().to_owned()
}

#[test]
fn curl_drives_a_guest_as_the_readme_says() {
    let folder = Folder::new();
    called("alula", &folder);
    // The guest speaks beside the others: what it says must not come between their words.
    let script = example("alula serve --api-sock").replace("< /dev/null &", "< /dev/null > guest &")
        + &example("alula ctl --api-sock alula.sock status");
    let path = format!("{}:{}", folder.0.display(), std::env::var("PATH").unwrap());
    let output = Command::new("bash")
        .args(["-e", "-c", &script])
        .current_dir(&folder.0)
        .env("PATH", path)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    for expected in [
        r#""state":"Paused""#,
        "anonymous-instance: Running; 2 CPUs, 128 MiB of memory",
        "\npaused\n",
        " started ",
        " resumed ",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    assert!(output.status.success() && !text.contains("fault_message"), "{text}");
}

#[test]
fn a_link_is_firecracker_as_the_readme_says() {
    let (programs, here) = (Folder::new(), Folder::new());
    called("alula", &programs);
    let block = example("ln -s");
    let (link, start) = block.split_once('\n').unwrap();
    assert!(start.starts_with("./firecracker --api-sock "), "{block}");
    let path = format!("{}:{}", programs.0.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new("sh");
    command.args(["-e", "-c", &format!("{link}\n./firecracker --version")]).current_dir(&here.0);
    let output = command.env("PATH", path).output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && text.starts_with("Firecracker v1.17.0"), "{text}");
}

#[test]
fn the_client_in_python_drives_a_guest() {
    let service = Service::start(&[]);
    let client = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/client.py");
    let mut command = Command::new("python3");
    // Without what this user has installed beside the standard library.
    command.args(["-I", client]).arg(&service.socket).arg(service.folder.firmware());
    let output = command.arg("cpus=2 memory=128 end=idle").output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    for expected in [
        "PUT /vsock: Vsock config error: ",
        "a `guest_cid` of 1 cannot be",
        "\nPaused\n",
        "'main': ",
        "\nstarted\n",
        "\npaused\nresumed\n",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    assert!(output.status.success(), "{text}");
}

/// Where Firecracker's API begins.
const PATHS: [&str; 18] = [
    "/actions",
    "/balloon",
    "/boot-source",
    "/cpu-config",
    "/drives",
    "/entropy",
    "/hotplug",
    "/logger",
    "/machine-config",
    "/metrics",
    "/mmds",
    "/network-interfaces",
    "/pmem",
    "/serial",
    "/snapshot",
    "/version",
    "/vm",
    "/vsock",
];

/// The options of its command line.
const OPTIONS: [&str; 18] = [
    "--api-sock",
    "--boot-timer",
    "--config-file",
    "--describe-snapshot",
    "--enable-pci",
    "--id",
    "--level",
    "--log-path",
    "--metadata",
    "--metrics-path",
    "--mmds-size-limit",
    "--module",
    "--no-api",
    "--no-seccomp",
    "--seccomp-filter",
    "--show-level",
    "--show-log-origin",
    "--snapshot-version",
];

/// What is refused because it is not there yet: of a service, by its path.
fn is_path_refused(client: &mut Client, path: &str) -> bool {
    let answers = ["GET", "PUT", "PATCH"].map(|method| client.request(method, path, "{}"));
    answers.iter().any(|answer| answer.body.contains("is not implemented yet"))
}

#[test]
fn what_is_not_there_yet_is_what_is_refused() {
    let rows = table("| not yet |");
    let quoted = |cell: &'static str| cell.split('`').skip(1).step_by(2);
    let names = |happens: &str| -> BTreeSet<&str> {
        rows.iter().filter(|row| row[1].starts_with(happens)).flat_map(|row| quoted(row[0])).collect()
    };
    let mut refused = names("refused");
    assert_eq!(names("under this name"), BTreeSet::from(["snapshot-editor", "edit-memory rebase"]));

    let service = Service::start(&[]);
    let mut client = service.client();
    for path in PATHS {
        assert_eq!(is_path_refused(&mut client, path), refused.remove(path), "{path}");
    }
    let folder = Folder::new();
    let firecracker = called("firecracker", &folder);
    for option in OPTIONS {
        let output = Command::new(&firecracker).args([option, "x", "--nonsense"]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let is_refused = text.contains(&format!("{option} is not implemented yet"));
        assert_eq!(is_refused, refused.remove(option), "{option}: {text}");
    }
    assert_eq!(refused, BTreeSet::new(), "nothing here looks for these");
    let editor = called("snapshot-editor", &folder);
    let status = |option: &str| Command::new(&editor).arg(option).output().unwrap().status.success();
    assert!(status("--version") && status("--help") && !status("--id"));
}

/// The numbers in the row of the README's figures that begins so.
fn figures(begin: &str) -> Vec<f64> {
    let rows = table("| figure |");
    let row = rows.iter().find(|row| row[0].starts_with(begin)).unwrap_or_else(|| panic!("no `{begin}`"));
    row[1].split(' ').filter_map(|word| word.parse().ok()).collect()
}

/// A service whose firmware guest has written its first byte, started by `program` with `arguments` before the
/// service's own, and its client.
fn started(folder: &Folder, program: &str, arguments: &[&str]) -> (Process, Client) {
    let socket = folder.path("api.socket");
    let mut command = Command::new(program);
    command.args(arguments).args(["serve", "--api-sock"]).arg(&socket);
    let mut process = Process::spawn(command);
    let mut stream = None;
    wait_for(|| {
        stream = UnixStream::connect(&socket).ok();
        stream.is_some()
    });
    let mut client = Client { stream: stream.unwrap() };
    client.ok("GET", "/", "");
    let boot = json!({ "kernel_image_path": folder.firmware(), "boot_args": "hello" });
    client.ok("PUT", "/boot-source", &boot.to_string());
    client.ok("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 128}"#);
    client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    process.expect("A");
    (process, client)
}

#[test]
#[ignore = "figures are those of a release: scripts/test names it in ALULA"]
fn the_figures_are_true() {
    /// A figure may be so much better or worse than it says.
    const OFF_MAX: f64 = 0.1;
    let assert_true = |what: &str, figure: f64, found: f64| {
        let off = (found - figure).abs() / figure;
        assert!(off <= OFF_MAX, "{what}: the README says {figure}, found {found}");
    };
    let binary = alula();
    let bytes = std::fs::metadata(&binary).unwrap().len() as f64;
    assert_true("the binary, MiB", figures("the binary")[0], bytes / f64::from(1 << 20));

    let folder = Folder::new();
    let (process, _client) = started(&folder, binary.to_str().unwrap(), &[]);
    let memory = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", process.child.id())).unwrap();
    let anonymous = memory.lines().find_map(|line| line.strip_prefix("Anonymous:")).unwrap();
    let anonymous = anonymous.trim().trim_end_matches(" kB").parse().unwrap();
    assert_true("anonymous memory, KiB", figures("anonymous memory")[0], anonymous);
    drop(process);

    // How the monitor and its client take turns differs from run to run: a request that is there when the last one has
    // been answered needs no look in vain and no wait. The median of several runs is what a start takes.
    let runs = std::array::from_fn::<_, 9, _>(|_| calls_of_a_start(&binary));
    let median = |which: fn(&(usize, usize)) -> usize| {
        let mut counts = runs.each_ref().map(which);
        counts.sort_unstable();
        counts[counts.len() / 2] as f64
    };
    let [answer, byte] = figures("system calls")[..] else { panic!("two figures of system calls") };
    assert_true("system calls to the first answer", answer, median(|run| run.0));
    assert_true("system calls to the first byte", byte, median(|run| run.1));
}

/// How many system calls come before the first answer of the API, and how many a start takes. Threads run side by side,
/// so that a start's are those of the vCPU's thread before the first byte of the guest, and those of the other threads
/// before the API answers again.
fn calls_of_a_start(binary: &Path) -> (usize, usize) {
    let folder = Folder::new();
    let trace = folder.path("trace");
    let arguments = ["-f", "-qq", "-o", trace.to_str().unwrap(), binary.to_str().unwrap()];
    let (mut process, mut client) = started(&folder, "strace", &arguments);
    client.ok("GET", "/", "");
    let text = std::fs::read_to_string(&trace).unwrap();
    // The line on which strace goes on with a call that waited is no call of its own.
    let calls: Vec<_> =
        text.lines().filter(|line| line.contains('(') && !line.contains(" resumed>")).collect();
    let is_answer = |line: &&str| line.contains("HTTP/1.1 200");
    let answer = calls.iter().position(is_answer).unwrap() + 1;
    let again = calls.iter().rposition(is_answer).unwrap() + 1;
    let byte = calls.iter().position(|line| line.contains("write(") && line.contains("\"A\"")).unwrap() + 1;
    let thread = |line: &str| line.split_whitespace().next().unwrap().to_owned();
    let vcpu = thread(calls[byte - 1]);
    let of_a_start = calls[..again]
        .iter()
        .enumerate()
        .filter(|(place, line)| *place < byte || thread(line) != vcpu)
        .count();
    // strace ends with its child, which it started and we may signal.
    assert!(Command::new("kill").arg(thread(&text)).status().unwrap().success());
    process.stdin = None;
    process.end();
    (answer, of_a_start)
}

const TEST_RIGS: &str = include_str!("../docs/test-rigs.md");

/// The block of docs/test-rigs.md in this language.
fn block(language: &str) -> &'static str {
    let begin = format!("```{language}\n");
    TEST_RIGS.split_once(&begin).and_then(|(_, rest)| rest.split_once("```")).unwrap().0
}

/// What comes of words of docs/test-rigs.md in a folder where nothing is that they name: its code and its errors. No wish is
/// granted; but one that is not understood has a code of its own.
fn tried_in(folder: &Folder, words: &[&str]) -> (Option<i32>, String) {
    let path = format!("{}:{}", folder.0.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).current_dir(&folder.0).env("PATH", path).env("ALULA_CACHE", &folder.0);
    let output = command.env_remove("ALULA_KERNEL").stdin(std::process::Stdio::null()).output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn every_command_of_the_test_rigs_page_is_understood() {
    let folder = Folder::new();
    called("alula", &folder);
    let no_kernel = "alula: there is no kernel at ";
    let is_without_kernel = |words: &[&str]| {
        let (code, errors) = tried_in(&folder, words);
        assert!(code == Some(125) && errors.contains(no_kernel), "{words:?}: {code:?} {errors}");
    };
    // The first example, and the job of a CI.
    let indented = TEST_RIGS.lines().filter_map(|line| line.strip_prefix("    alula "));
    let steps = block("yaml").lines().filter_map(|line| line.trim().strip_prefix("- run: alula "));
    let lines: Vec<_> = indented.chain(steps).map(|line| format!("alula {line}")).collect();
    assert_eq!(lines.len(), 2);
    lines.iter().for_each(|line| is_without_kernel(&["sh", "-c", line]));
    // Cargo's runner.
    let runner = block("toml").lines().find_map(|line| line.strip_prefix("runner = ")).unwrap();
    let runner: Vec<String> = serde_json::from_str(runner).unwrap();
    let runner: Vec<_> = runner.iter().map(String::as_str).chain(["/bin/true", "--nocapture"]).collect();
    is_without_kernel(&runner);
    // What pytest is to start: lists of strings.
    let python = block("python").replace('\n', " ");
    let lists: Vec<Vec<String>> = python
        .split("[\"alula\"")
        .skip(1)
        .map(|rest| serde_json::from_str(&format!("[\"alula\"{}]", rest.split(']').next().unwrap())).unwrap())
        .collect();
    assert_eq!(lists.len(), 3);
    for list in lists {
        let mut words: Vec<_> = list.iter().map(String::as_str).collect();
        if words.ends_with(&["--"]) {
            words.push("uname");
        }
        let (code, errors) = tried_in(&folder, &words);
        let is_there =
            errors.contains(no_kernel) || errors.contains("by vsock socket `/tmp/guest.vsock`: No such");
        assert!(code != Some(153) && is_there, "{words:?}: {code:?} {errors}");
    }
    // Make runs what its rule says.
    folder.write("Makefile", block("make"));
    folder.write("image.ext4", "");
    std::fs::create_dir(folder.path("build")).unwrap();
    let (code, errors) = tried_in(&folder, &["make", "check"]);
    assert!(code == Some(2) && errors.contains(no_kernel), "{code:?} {errors}");
}
