//! Commands in guests: `alula run -- COMMAND`, `alula exec` and `alula cp`.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;

use alula::guest::call;
use alula::protocol::PORT;
use alula::protocol::frame::{Inbox, Type, put};

use super::*;

/// What `alula run -- COMMAND` gave: its code, standard output and standard error.
fn run_command(options: &[&str], command: &[&str], input: &[u8]) -> (i32, Vec<u8>, String) {
    run_command_by(&asset(KERNELS[0]), options, command, input)
}

/// `run_command` by another kernel than the stock one.
fn run_command_by(kernel: &Path, options: &[&str], command: &[&str], input: &[u8]) -> (i32, Vec<u8>, String) {
    let mut process = Command::new(common::alula());
    process.env("ALULA_KERNEL", kernel).args(["run", "--memory", "256M"]).args(options).arg("--");
    process.args(command).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = process.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // A command that reads none of it may have ended.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    (output.status.code().unwrap(), output.stdout, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Nothing but what is copied there, and codes that are not the command's.
fn what_is_copied_there_runs_and_codes_tell_who_ended_it(busybox: &str) {
    let copy = format!("{busybox}:/deep/down/busybox");
    let program = "/deep/down/busybox";
    let (code, output, errors) =
        run_command(&["--copy", &copy], &[program, "sh", "-c", "echo alone; kill -9 $$"], b"");
    assert!(code == 137 && errors.contains("was ended by signal 9\n"), "{code} {errors}");
    assert_eq!(output, b"alone\n");
    for (options, command, expected, told) in [
        (
            &[][..],
            &["nothing"][..],
            127,
            "alula: in the guest: start `nothing`: No such file or directory (os error 2)\n",
        ),
        (
            &["--copy", &copy, "--timeout", "30s"],
            &[program, "sleep", "1000"],
            124,
            "the time for the command",
        ),
        (
            &["--copy", &copy],
            &[program, "poweroff", "-f"],
            125,
            "alula: the guest powered off before the command in it ended, so its exit code is not known",
        ),
    ] {
        let (code, _, errors) = run_command(options, command, b"");
        assert!(code == expected && errors.contains(told), "{command:?}: {code} {errors}");
    }
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_command_has_a_guest_of_its_own_with_any_root() {
    let folder = Folder::new();
    let image = asset("root.ext4").to_str().unwrap().to_owned();
    let before = std::fs::read(&image).unwrap();
    let busybox = folder.path("busybox").to_str().unwrap().to_owned();
    // An image, which memory lies over.
    let script = "echo hi; echo err >&2; busybox mkdir -p /new/a && cd /new && busybox touch b && busybox ln b c && \
                  busybox ln -s b d && exit 7";
    let new = folder.path("new");
    let copies = [format!("/bin/busybox:{busybox}"), format!("/new:{}", new.display())];
    let options = ["--rootfs", &image, "--copy-out", &copies[0], "--copy-out", &copies[1]];
    let (code, output, errors) = run_command(&options, &["busybox", "sh", "-c", script], b"");
    assert_eq!((code, &output[..], &errors[..]), (7, &b"hi\n"[..], "err\n"));
    assert!(new.join("a").is_dir() && new.join("b").metadata().unwrap().nlink() == 2);
    assert_eq!(new.join("d").read_link().unwrap(), Path::new("b"));
    assert!(std::fs::read(&image).unwrap() == before, "the image was written to");

    // A folder, with the program that came out of the image.
    let root = folder.path("root");
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::copy(&busybox, root.join("bin/busybox")).unwrap();
    std::fs::write(root.join("a file"), "of the folder\n").unwrap();
    let root = root.to_str().unwrap();
    let bytes: Vec<u8> = (0..5 << 20).map(|at: u32| (at ^ at >> 11) as u8).collect();
    let script = "cd /; busybox cat 'a file'; busybox id -u; busybox hostname; busybox cat /proc/1/comm; \
                  cd -; echo $A; exec busybox cat";
    let options =
        ["--env", "A=b", "--workdir", "/proc", "--id", "a-guest", "--enable-pci", "--user", "12:34"];
    let options = [&["--rootfs", root][..], &options].concat();
    let (code, output, errors) = run_command(&options, &["busybox", "sh", "-c", script], &bytes);
    let whole = [b"of the folder\n12\na-guest\ninit\n/proc\nb\n", &bytes[..]].concat();
    assert!(code == 0 && output == whole && errors.is_empty(), "{code}, {} bytes: {errors}", output.len());

    what_is_copied_there_runs_and_codes_tell_who_ended_it(&busybox);

    a_root_that_is_written_to_has_its_own_room(&folder);
}

/// An image of 16 MiB is written to: a command or a copy that it has no room for says so.
fn a_root_that_is_written_to_has_its_own_room(folder: &Folder) {
    let own = folder.path("own.ext4").to_str().unwrap().to_owned();
    std::fs::copy(asset("root.ext4"), &own).unwrap();
    let rootfs = format!("{own},rw");
    let full = "echo kept >/bin/written; busybox dd if=/dev/zero of=/full bs=65536; code=$?; \
                busybox rm /full; exit $code";
    let big = folder.path("big");
    std::fs::write(&big, vec![7; 20 << 20]).unwrap();
    let copy = format!("{}:/big", big.display());
    let no_copy =
        format!("alula: copy `{}` to `/big` in the guest: in the guest: write `/big`: ", big.display());
    for (options, script, code, told, why) in [
        (&[][..], full, 1, "dd: error writing '/full': ", "No space left on device\n"),
        (&["--copy", &copy], "echo in vain", 125, &no_copy, ": No space left on device (os error 28)\n"),
    ] {
        let options = [&["--rootfs", &rootfs][..], options].concat();
        let ended = run_command(&options, &["busybox", "sh", "-c", script], b"");
        let (got, output, errors) = (ended.0, String::from_utf8_lossy(&ended.1), &ended.2);
        assert!(got == code && output.is_empty(), "{script}: {got} {output} {errors}");
        assert!(errors.starts_with(told) && errors.contains(why), "{script}: {errors}");
    }
    // The first command's file is on the disk.
    let written = common::output("debugfs", &["-R", "cat /bin/written", &own]);
    assert_eq!(written.stdout, b"kept\n", "{written:?}");
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_guest_that_cannot_go_on_says_why_at_the_end() {
    let folder = Folder::new();
    let mut image = std::fs::read(asset("root.ext4")).unwrap();
    // The superblock is there, and what it leads to is not.
    image[0x800..0x10000].fill(0xff);
    let damaged = folder.write("damaged", image).to_str().unwrap().to_owned();
    let (code, output, errors) = run_command(&["--rootfs", &damaged], &["true"], b"");
    let last = errors.lines().last().unwrap();
    let begin = "alula: the guest ended before the command in it did (the guest asked for a reset): make /dev/vda the root \
                 file system: mount it as ext4: ";
    assert!(code == 125 && output.is_empty() && last.starts_with(begin), "{code} {errors}");
    // The kernel's own words come before.
    let lines: Vec<_> = errors.lines().collect();
    assert!(lines[..lines.len() - 1].iter().all(|line| line.contains("] EXT4-fs (vda): ")), "{errors}");

    let image = asset("root.ext4").to_str().unwrap().to_owned();
    let script =
        "exec 2>/dev/console; echo before >/dev/console; busybox sleep 1; echo c >/proc/sysrq-trigger";
    let (code, _, errors) = run_command(&["--rootfs", &image], &["busybox", "sh", "-c", script], b"");
    let lines: Vec<_> = errors.lines().collect();
    assert!(code == 125 && lines[0] == "alula: console: before", "{code} {errors}");
    let panic = "Kernel panic - not syncing: ";
    assert!(lines.last().unwrap().contains(panic) && errors.matches(panic).count() == 1, "{errors}");
    let is_register =
        |line: &&&str| ["RAX: ", "RSP: ", "x29: ", "pstate: "].iter().any(|name| line.contains(name));
    assert_eq!(lines.iter().find(is_register), None, "{errors}");
}

// On aarch64, the request is a key, and nobody in a command's guest listens to it.
#[cfg(target_arch = "x86_64")]
#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_guest_that_was_asked_to_stop_says_so_and_not_that_it_failed() {
    let folder = Folder::new();
    let socket = folder.path("s").to_str().unwrap().to_owned();
    let mut guest = Command::new(common::alula());
    guest.env("ALULA_KERNEL", asset(KERNELS[0])).args(["run", "--memory", "256M", "--api-sock", &socket]);
    guest.arg("--rootfs").arg(asset("root.ext4"));
    guest.args(["--", "busybox", "sh", "-c", "echo up; exec busybox sleep 1000"]);
    let mut guest = Process::spawn(guest);
    guest.expect("up");
    let asked = common::run(["ctl", "--api-sock", &socket, "stop"]);
    assert_eq!(asked.code, Some(0), "{}", asked.text);
    let ended = guest.end();
    let begin = "up\nalula: the guest was stopped before the command in it ended: a client of its control socket asked it";
    assert!(ended.code == Some(125) && ended.text.starts_with(begin), "{}", ended.text);
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn the_root_of_a_command_is_the_disk_that_is_called_so() {
    let folder = Folder::new();
    let image = folder.path("own.ext4").to_str().unwrap().to_owned();
    std::fs::copy(asset("root.ext4"), &image).unwrap();
    for (option, device, command, expected) in [
        ("--disk", format!("{image},root,ro"), "echo lost >/written; cat /written", "lost\n"),
        ("--disk", format!("{image},root"), "echo kept >/written", ""),
        ("--pmem", format!("{image},root,ro"), "cat /written", "kept\n"),
    ] {
        let script = format!("exec 2>&1; cat() {{ busybox cat \"$@\"; }}; {command}");
        let (code, output, errors) = run_command(&[option, &device], &["busybox", "sh", "-c", &script], b"");
        let output = String::from_utf8(output).unwrap();
        assert!(code == 0 && output == expected, "{device}: {code} {output} {errors}");
    }
}

#[test]
#[ignore = "a kernel built for a software KVM: scripts/test --long builds it and runs this where there is one"]
fn a_command_by_a_kernel_built_for_a_software_kvm() {
    let kernel = std::env::var_os("ALULA_SOFT_LINUX")
        .expect("ALULA_SOFT_LINUX names the kernel that scripts/soft-linux built");
    let folder = Folder::new();
    let bin = folder.path("root/bin");
    std::fs::create_dir_all(&bin).unwrap();
    std::fs::copy(asset("root-fs/bin/busybox"), bin.join("busybox")).unwrap();
    std::os::unix::fs::symlink("busybox", bin.join("sh")).unwrap();
    let root = folder.path("root");
    let options = ["--rootfs", root.to_str().unwrap()];
    let command = ["sh", "-c", "echo hi; echo err >&2; exit 7"];
    let (code, output, errors) = run_command_by(Path::new(&kernel), &options, &command, b"");
    // Alula says at once that stock kernels do not come up here.
    let (notice, errors) = errors.split_once('\n').unwrap();
    assert!(notice.starts_with("alula: this host's KVM (kvm_pvm)"), "{notice}");
    assert_eq!((code, &output[..], errors), (7, &b"hi\n"[..], "err\n"));
}

fn ten_commands_run_at_once(vsock: &str) {
    let several: Vec<_> = (0..10)
        .map(|number| {
            let vsock = vsock.to_owned();
            std::thread::spawn(move || {
                let script = format!("echo {number}; exit {number}");
                let mut command = Command::new(common::alula());
                command.args(["exec", "--vsock", &vsock, "busybox", "sh", "-c", &script]);
                let output = command.stdin(Stdio::null()).output().unwrap();
                (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
            })
        })
        .collect();
    for (number, thread) in several.into_iter().enumerate() {
        assert_eq!(thread.join().unwrap(), (number as i32, format!("{number}\n")));
    }
}

/// What the agent in the guest `web` says of it is so.
fn is_told_of(told: &serde_json::Value) {
    assert!(told["agent"] == true && told["hostname"] == "web", "{told}");
    assert!(told["version"] == env!("CARGO_PKG_VERSION") && told["uptime_ms"].as_u64() > Some(0), "{told}");
    let memory = &told["memory_kib"];
    assert!(memory["total"].as_u64() > memory["available"].as_u64(), "{told}");
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn a_guest_that_is_up_takes_further_commands_and_files() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    network::add_uplink();
    let folder = Folder::new();
    let vsock = folder.path("vsock").to_str().unwrap().to_owned();
    let (image, events) = (asset("root.ext4"), folder.path("events"));
    let mut guest = Command::new(common::alula());
    guest.env("ALULA_KERNEL", asset(KERNELS[0])).env("XDG_RUNTIME_DIR", &folder.0);
    guest.args(["run", "--memory", "256M", "--vsock", &vsock, "--id", "web", "--net", "tap=tap0"]);
    guest.args(["--net", "user,id=lan"]);
    let data = folder.write("data", []);
    std::fs::File::options().write(true).open(&data).unwrap().set_len(256 << 20).unwrap();
    guest.arg("--disk").arg(&data).arg("--events").arg(&events).arg("--rootfs").arg(&image);
    let stays = "trap 'exit 5' HUP TERM; echo up; while :; do busybox sleep 0.1; done";
    guest.args(["--", "busybox", "sh", "-c", stays]);
    let mut guest = Process::spawn(guest);
    let alula = |words: &[&str]| {
        let mut command = Command::new(common::alula());
        let output =
            command.env("XDG_RUNTIME_DIR", &folder.0).args(words).stdin(Stdio::null()).output().unwrap();
        (output.status.code().unwrap(), output.stdout, String::from_utf8_lossy(&output.stderr).into_owned())
    };
    wait_for(|| folder.path("alula/web.sock").exists());
    assert_eq!(alula(&["wait", "web"]), (0, vec![], String::new()));
    guest.expect("up");
    let (code, told, errors) = alula(&["ctl", "--json", "web", "guest"]);
    assert!(code == 0 && errors.is_empty(), "{code} {errors}");
    is_told_of(&serde_json::from_slice(&told).unwrap());
    ten_commands_run_at_once(&vsock);
    let pattern: Vec<u8> = (0..PERIOD as u32).map(|at| (at.wrapping_mul(0x9e37_79b1) >> 16) as u8).collect();
    let file = folder.write("file", &pattern).to_str().unwrap().to_owned();
    let back = folder.path("back").to_str().unwrap().to_owned();
    assert_eq!(alula(&["cp", &file, "web:/tmp"]), (0, vec![], String::new()));
    assert_eq!(alula(&["cp", "web:/tmp/file", &back]), (0, vec![], String::new()));
    assert!(std::fs::read(&back).unwrap() == pattern);
    // Nothing of all that is left in the guest: the agent, the command, and the one that looks.
    let count = "busybox cat /proc/[0-9]*/cmdline | busybox tr '\\0' ' '";
    let (code, output, errors) = alula(&["exec", "web", "busybox", "sh", "-c", count]);
    let text = String::from_utf8(output).unwrap();
    assert!(code == 0 && !text.contains("send") && !text.contains("receive"), "{text} {errors}");
    // Processes whose parent has left them are the init's to reap; one that has ended has no command line.
    let leave = "for number in 1 2 3 4 5; do (busybox sleep 0.1 & ); done";
    assert_eq!(alula(&["exec", "web", "busybox", "sh", "-c", leave]), (0, vec![], String::new()));
    let zombies = "busybox grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null; busybox pidof sleep; true";
    wait_for(|| {
        let (code, output, errors) = alula(&["exec", "web", "busybox", "sh", "-c", zombies]);
        assert!(code == 0 && errors.is_empty(), "{code} {errors}");
        output.is_empty()
    });
    much_output_arrives_whole(&vsock, &pattern);
    its_agent_sets_what_it_is_told(&vsock);
    a_connection_outlives_pauses(&vsock, &folder.path("alula/web.sock"));
    let saved = folder.path("saved").to_str().unwrap().to_owned();
    let changes = changes_of_link(&vsock);
    assert_eq!(alula(&["ctl", "web", "snapshot", &saved]).0, 0);
    guest.send(libc::SIGTERM);
    assert_eq!(guest.child.wait().unwrap().code(), Some(143));
    // A guest that is gone is not found, and nothing of it is left.
    let (code, _, errors) = alula(&["exec", "web", "true"]);
    assert!(code == 125 && errors.contains("there is no guest `web`"), "{errors}");
    assert!(!folder.path("vsock").exists() && !folder.path("alula/web.sock").exists());
    let events = std::fs::read_to_string(events).unwrap();
    let count =
        |event: &str| events.lines().filter(|line| line.contains(&format!("\"event\":\"{event}\""))).count();
    assert_eq!((count("started"), count("guest_ready"), count("ended")), (1, 1, 1), "{events}");
    its_agent_answers_in_every_generation(&vsock, &saved, &folder.path("api"), changes);
}

/// The length of a pattern, a prime: frames and buffers, all of them powers of two, fall on other places of it each time,
/// so that one which was lost, doubled or late is seen.
const PERIOD: usize = 1_000_003;
/// Repetitions of the pattern that make more than 100 MiB.
const PERIODS: usize = 105;

/// The pattern comes from `/tmp/file` in the guest, again and again, by one command, and is compared as it comes.
fn much_output_arrives_whole(vsock: &str, pattern: &[u8]) {
    let mut big = Command::new(common::alula());
    big.args(["exec", "--vsock", vsock, "busybox", "cat"]).args(vec!["/tmp/file"; PERIODS]);
    let mut big = big.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut output, mut bytes, mut seen) = (big.stdout.take().unwrap(), vec![0; 64 << 10], 0);
    loop {
        // One read goes to the end of a period at most.
        let rest = &pattern[seen % PERIOD..];
        let room = rest.len().min(bytes.len());
        let count = output.read(&mut bytes[..room]).unwrap();
        if count == 0 {
            break;
        }
        assert!(bytes[..count] == rest[..count], "other bytes after {seen}");
        seen += count;
    }
    assert_eq!((big.wait().unwrap().code(), seen), (Some(0), PERIODS * PERIOD));
}

/// The agent's `set` (docs/agent.md) gives the guest a time, a name, random bytes, an address and a gateway.
fn its_agent_sets_what_it_is_told(vsock: &str) {
    let set = json!({
        "hostname": "renamed", "clock_ns": 1_000_000_000_000_000_000_u64, "seed": (1..=32).collect::<Vec<u8>>(),
        "address": {
            "interface": "eth0", "address": "172.16.0.2", "prefix": 24, "gateway": "172.16.0.1",
        },
    });
    let mut stream = call::connect(Path::new(vsock), PORT).unwrap().unwrap();
    stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
    let mut request = Vec::new();
    put(&mut request, Type::Request, json!({ "protocol": 1, "ask": { "set": set } }).to_string().as_bytes());
    stream.write_all(&request).unwrap();
    let (mut answer, mut inbox, mut said) = (Vec::new(), Inbox::default(), Vec::new());
    stream.read_to_end(&mut answer).unwrap();
    inbox.push(&answer);
    while let Some((kind, content)) = inbox.pop().unwrap() {
        said.push((kind, String::from_utf8_lossy(content).into_owned()));
    }
    assert!(said.len() == 2 && said[0].0 == Type::Greeting, "{said:?}");
    assert_eq!(said[1], (Type::Exited, "\0\0".to_owned()));
    let script = "busybox date +%s; busybox hostname; busybox ip -4 addr show eth0; busybox ip route";
    let mut look = Command::new(common::alula());
    look.args(["exec", "--vsock", vsock, "busybox", "sh", "-c", script]).stdin(Stdio::null());
    let text = shared::said(look.output().unwrap());
    let mut lines = text.lines();
    // A clock that was not set shows the host's time, decades later.
    let time: u64 = lines.next().unwrap().parse().unwrap();
    assert!((1_000_000_000..1_000_000_300).contains(&time), "{text}");
    assert_eq!(lines.next(), Some("renamed"));
    for line in ["inet 172.16.0.2/24 ", "default via 172.16.0.1 dev eth0", "172.16.0.0/24 dev eth0"] {
        assert!(text.contains(line), "no `{line}`: {text}");
    }
}

/// A program in the guest that sends back what it is sent, line by line.
struct Echo(Process);

impl Echo {
    fn start(vsock: &str) -> Self {
        Self(Process::start(["exec", "--vsock", vsock, "-i", "--", "busybox", "cat"]))
    }

    /// Sends a line to the guest, which comes back after what `meanwhile` does.
    fn sends(&mut self, line: &str, meanwhile: impl FnOnce()) {
        self.0.stdin.as_mut().unwrap().write_all(format!("{line}\n").as_bytes()).unwrap();
        meanwhile();
        self.0.expect(line);
    }

    fn end(mut self) {
        self.0.stdin = None;
        assert_eq!(self.0.end().code, Some(0));
    }
}

fn a_connection_outlives_pauses(vsock: &str, socket: &Path) {
    let mut client = common::Client::connect(socket);
    let mut echo = Echo::start(vsock);
    for round in 0..20 {
        client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
        let resume = || drop(client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#));
        echo.sends(&format!("round {round}"), resume);
    }
    echo.end();
}

/// How often the second interface of the guest has lost its link or got it, as its kernel has counted.
fn changes_of_link(vsock: &str) -> u32 {
    live::has_run(vsock, "busybox cat /sys/class/net/eth1/carrier_changes").trim().parse().unwrap()
}

/// A guest is restored, saved while it works, and restored from that, in the long series for twenty generations: its agent
/// listens in each, what was connected to the one before has ended, and what was written is there. Its kernel sees that the
/// passt of each is another one.
fn its_agent_answers_in_every_generation(vsock: &str, saved: &str, socket: &Path, mut changes: u32) {
    let generations = if times() > 1 { 20 } else { 2 };
    for generation in 0..generations {
        let mut guest = Process::start(["run", "--restore", saved, "--api-sock", socket.to_str().unwrap()]);
        // The control socket is there before the guest is.
        wait_for(|| std::os::unix::net::UnixStream::connect(vsock).is_ok());
        let mut echo = Echo::start(vsock);
        echo.sends(&format!("generation {generation}"), || ());
        if generation == 0 {
            live::start(vsock);
        }
        changes += 2;
        wait_for(|| changes_of_link(vsock) == changes);
        live::works(vsock);
        let snapshot = json!({ "folder": saved, "live": true }).to_string();
        common::Client::connect(socket).ok("PUT", "/snapshot/create", &snapshot);
        echo.sends("after it was saved", || ());
        live::works(vsock);
        guest.send(libc::SIGTERM);
        assert_eq!(guest.end().code, Some(143));
        assert_eq!(echo.0.end().code, Some(125));
    }
}

const DOCUMENTATION: &str = include_str!("../../docs/test-rigs.md");

/// The words of the runner that the documentation has for cargo.
fn runner() -> Vec<String> {
    let line = DOCUMENTATION.lines().find_map(|line| line.strip_prefix("runner = ")).unwrap();
    // A list of strings is the same in TOML and in JSON.
    serde_json::from_str(line).unwrap()
}

#[test]
fn the_runner_for_cargo_is_one_line() {
    assert_eq!(runner().len(), 4);
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn tests_of_a_rust_project_run_in_a_guest_by_a_runner() {
    common::open_devices();
    let folder = Folder::new();
    common::for_everybody(&folder);
    let words = runner();
    let mut command = Command::new("sh");
    // What cargo does: the runner's words, the test binary, and its arguments. One case succeeds anywhere; the other misses
    // in the guest what it finds here.
    command.args(&words[1..]).arg(std::env::current_exe().unwrap()).args(["--include-ignored", "--exact"]);
    command.args(["commands::the_runner_for_cargo_is_one_line", "a_kernel_alone_needs_no_further_option"]);
    let path = format!("{}:{}", folder.0.display(), std::env::var("PATH").unwrap());
    command.env("PATH", path).env("ALULA_KERNEL", asset(KERNELS[0])).uid(65534).gid(65534);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(101), "{output:?}");
    assert!(text.contains("the_runner_for_cargo_is_one_line ... ok\n"), "{output:?}");
    assert!(text.contains("ALULA_GUEST names the folder that scripts/guest made"), "{output:?}");
    assert!(text.contains("test result: FAILED. 1 passed; 1 failed;"), "{output:?}");
}
