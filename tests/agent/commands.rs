//! The commands of the host that an agent serves.

use super::common::terminal::Terminal;
use super::*;

/// `alula` with these words, and this on its standard input.
fn alula(words: &[&str], input: &[u8]) -> Output {
    let mut command = Command::new(common::alula());
    command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // A command that reads none of it may have ended.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

/// The exit code of `alula cp`, and its words.
fn copy(vsock: &str, from: &str, to: &str) -> (i32, String) {
    let output = alula(&["cp", "--vsock", vsock, from, to], b"");
    (output.status.code().unwrap(), text(&output.stderr))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn exec_is_the_command_seen_from_the_host() {
    let agent = Agent::start();
    let vsock = agent.vsock();
    let exec = |words: &[&str], input: &[u8]| {
        let output = alula(&[&["exec", "--vsock", &vsock][..], words].concat(), input);
        (output.status.code().unwrap(), output.stdout, text(&output.stderr))
    };
    let (code, output, errors) = exec(&["sh", "-c", "echo hi; echo err >&2; exit 7"], b"");
    assert_eq!((code, &output[..], &errors[..]), (7, &b"hi\n"[..], "err\n"));
    let bytes: Vec<u8> = (0..3 << 20).map(|at: u32| (at ^ at >> 9) as u8).collect();
    let (code, output, errors) = exec(&["-i", "cat"], &bytes);
    assert!(code == 0 && output == bytes && errors.is_empty(), "{code} {} {errors}", output.len());
    // Without -i, there is no input.
    assert_eq!(exec(&["cat"], b"text").1, b"");
    // A terminal's input ends, too, by itself and after some.
    let reads = ["sh", "-c", "tty -s && while read line; do echo got; done; exit 3"];
    for (options, input, got) in [(&["-t"][..], &b""[..], false), (&["-t", "-i"], b"a\n", true)] {
        let (code, output, errors) = exec(&[options, &reads].concat(), input);
        assert_eq!((code, output.ends_with(b"got\r\n")), (3, got), "{options:?}: {errors}");
    }
    let (code, output, _) = exec(&["--env", "A=b c", "--workdir", "/", "sh", "-c", "echo $A; pwd"], b"");
    assert_eq!((code, &output[..]), (0, &b"b c\n/\n"[..]));
    for (words, code, told) in [
        (&["sh", "-c", "kill -9 $$"][..], 137, "alula: the command in the guest was ended by signal 9\n"),
        (&["/nonexistent"], 127, "alula: in the guest: start `/nonexistent`: No such file or directory"),
        (&["/"], 126, "alula: in the guest: start `/`: Permission denied"),
        (
            &["--workdir", "/nonexistent", "ls"],
            125,
            "alula: in the guest: there is no folder `/nonexistent` to start in\n",
        ),
        (
            &["--timeout", "100ms", "sleep", "100"],
            124,
            "alula: the time for the command in the guest was up\n",
        ),
        (&["--timeout", "100ms", "sh", "-c", "trap '' TERM; sleep 100"], 124, "was up\n"),
    ] {
        let (got, output, errors) = exec(words, b"");
        assert!(got == code && errors.contains(told) && output.is_empty(), "{words:?}: {got} {errors}");
    }
    // A regular file as input.
    let file = agent.folder.write("input", &bytes);
    let mut command = Command::new(common::alula());
    command.args(["exec", "--vsock", &vsock, "-i", "md5sum"]).stdin(fs::File::open(&file).unwrap());
    let expected = Command::new("md5sum").stdin(fs::File::open(&file).unwrap()).output().unwrap();
    assert_eq!(command.output().unwrap().stdout, expected.stdout);
    // A reader that has gone ends it.
    let mut child = Command::new(common::alula());
    child.args(["exec", "--vsock", &vsock, "yes"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = child.spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0; 100]).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 13));
    // A signal is the command's.
    let script = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.01; done";
    let mut process = Process::start(["exec", "--vsock", &vsock, "sh", "-c", script]);
    process.expect("ready");
    process.send(libc::SIGTERM);
    assert_eq!(process.child.wait().unwrap().code(), Some(9));
}

#[test]
fn a_program_has_the_terminal_of_its_user() {
    let agent = Agent::start();
    let vsock = agent.vsock();
    let mut terminal = Terminal::new();
    let before = terminal.modes();
    terminal.set_size(31, 101);
    let script = "stty size; trap 'stty size' WINCH; stty -opost; printf 'up\ndown\n'; stty opost
        while :; do sleep 0.1; done";
    let mut child = terminal.start(&["exec", "--vsock", &vsock, "-it", "--", "sh", "-c", script]);
    // Lines are shown as the program's terminal in the guest makes them, and as it leaves them alone.
    assert_eq!(terminal.read_until("down\n"), "31 101\r\nup\ndown\n");
    assert!(terminal.is_raw());
    terminal.set_size(40, 80);
    common::send(&child, libc::SIGWINCH);
    assert_eq!(terminal.read_until("80\r\n"), "40 80\r\n");
    terminal.user.write_all(b"\x01x").unwrap();
    assert_eq!(terminal.code_of(&mut child), Some(130));
    assert_eq!(terminal.modes(), before);
}

/// A pipe with these bytes in it, whose other end is kept, or closed.
fn pipe(bytes: &[u8]) -> (Stdio, std::io::PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(bytes).unwrap();
    (reader.into(), writer)
}

#[test]
fn input_that_is_given_and_not_passed_on_is_told_once() {
    let agent = Agent::start();
    let vsock = agent.vsock();
    let binary = common::alula();
    let exec = |options: &[&str], input: Stdio| {
        let mut command = Command::new(&binary);
        command.args(["exec", "--vsock", &vsock]).args(options).args(["sh", "-c", "cat >/dev/null; echo hi"]);
        let output = command.stdin(input).output().unwrap();
        assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"hi\n"[..]));
        text(&output.stderr)
    };
    let told = "alula: standard input is not passed on without -i\n";
    let (filled, kept) = pipe(b"text");
    assert_eq!(exec(&[], filled), told);
    drop(kept);
    let closed = |bytes: &[u8]| pipe(bytes).0;
    assert_eq!(exec(&[], closed(b"text")), told);
    assert_eq!(exec(&["-i"], closed(b"text")), "");
    let file = agent.folder.write("lines", "a\nb\n");
    assert_eq!(exec(&[], fs::File::open(&file).unwrap().into()), told);
    // Nothing was given: jobs have pipes that say nothing, or the rest of a file that others read.
    let (empty, kept) = pipe(b"");
    assert_eq!(exec(&[], empty), "");
    drop(kept);
    assert_eq!(exec(&[], closed(b"")), "");
    assert_eq!(exec(&[], Stdio::null()), "");
    let mut begun = fs::File::open(&file).unwrap();
    begun.read_exact(&mut [0; 2]).unwrap();
    assert_eq!(exec(&[], begun.into()), "");
    // A loop over lines shares its input with the command in it, which had better leave it alone.
    let script = "while read -r line; do \"$0\" exec --vsock \"$1\" echo \"$line\"; done";
    for input in [closed(b"a\nb\n"), fs::File::open(&file).unwrap().into()] {
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(std::path::absolute(&binary).unwrap()).arg(&vsock);
        let output = command.stdin(input).output().unwrap();
        assert_eq!((&output.stdout[..], text(&output.stderr).as_str()), (&b"a\nb\n"[..], ""));
    }
}

#[test]
fn a_guest_that_cannot_be_reached_is_told_with_a_way_on() {
    let folder = Folder::new();
    let path = folder.path("vsock");
    let vsock = path.to_str().unwrap();
    let told = |words: &[&str]| {
        let mut command = Command::new(common::alula());
        let output = command.args(words).env("XDG_RUNTIME_DIR", &folder.0).output().unwrap();
        (output.status.code().unwrap(), text(&output.stderr))
    };
    let (code, errors) = told(&["exec", "--vsock", vsock, "true"]);
    assert!(code == 125 && errors.contains("No such file or directory"), "{errors}");
    let (code, errors) = told(&["exec", "web", "true"]);
    let line = format!("there is no guest `web`: `{}` is not there", folder.path("alula/web.sock").display());
    assert!(code == 125 && errors.contains(&line), "{errors}");
    // Nobody listens in the guest: its monitor closes the connection.
    let listener = UnixListener::bind(&path).unwrap();
    let monitor = std::thread::spawn(move || {
        for _ in 0..2 {
            listener.accept().unwrap().0.read_exact(&mut [0; 11]).unwrap();
        }
        listener
    });
    let (code, errors) = told(&["exec", "--vsock", vsock, "true"]);
    assert!(
        code == 125 && errors.contains("no agent listens on vsock port 52 of the guest: it is not up yet"),
        "{errors}"
    );
    let (code, errors) = told(&["wait", "--vsock", vsock, "--timeout", "0"]);
    assert!(code == 124 && errors.contains("does not answer yet"), "{errors}");
    drop(monitor.join().unwrap());
    // A guest that is not there when the time is up, however it is reached.
    for reach in [["--vsock", "gone"], ["--api-sock", "gone"]] {
        let (code, errors) = told(&["wait", reach[0], reach[1], "--timeout", "10ms"]);
        assert!(code == 124 && errors.starts_with("alula: the time is up: connect to "), "{errors}");
    }
    let (code, errors) = told(&["wait", "gone", "--timeout", "0"]);
    assert!(code == 124 && errors.starts_with("alula: the time is up: there is no guest `gone`"), "{errors}");
    let agent = Agent::start();
    assert_eq!(told(&["wait", "--vsock", &agent.vsock()]), (0, String::new()));
}

#[test]
fn copies_go_both_ways() {
    let agent = Agent::start();
    let vsock = agent.vsock();
    let cp = |from: &str, to: &str| copy(&vsock, from, to);
    let path = |name: &str| agent.folder.path(name).to_str().unwrap().to_owned();
    let inside = |name: &str| format!(":{}", path(name));
    fs::create_dir_all(path("tree/a b")).unwrap();
    let bytes: Vec<u8> = (0..2 << 20).map(|at: u32| (at ^ at >> 7) as u8).collect();
    fs::write(path("tree/a b/file"), &bytes).unwrap();
    symlink("a b/file", path("tree/link")).unwrap();
    fs::create_dir(path("in")).unwrap();
    assert_eq!(cp(&path("tree"), &inside("in")), (0, String::new()));
    assert_eq!(fs::read(path("in/tree/link")).unwrap(), bytes);
    assert_eq!(cp(&inside("in/tree/link"), &path("out")), (0, String::new()));
    assert_eq!(fs::read(path("out")).unwrap(), bytes);
    assert_eq!(cp(&inside("in/tree"), &path("new")), (0, String::new()));
    assert_eq!(fs::read(path("new/a b/file")).unwrap(), bytes);
    for (from, to, told) in [
        (path("tree"), inside("in/tree/link"), "a folder does not go over what is not a folder"),
        (path("nothing"), inside("in"), "nothing` to `"),
        (inside("nothing"), path("x"), "in the guest: read `"),
        (inside("tree"), path("out"), "a folder does not go over what is not a folder"),
        (inside("tree"), path("no/such"), "No such file or directory"),
        (path("tree"), ":/proc/x".to_owned(), "in the guest: write `/proc/x"),
    ] {
        let (code, errors) = cp(&from, &to);
        assert!(code == 1 && errors.contains(told) && errors.lines().count() == 1, "{from} {to}: {errors}");
    }
    // No room there.
    assert!(cp(&path("tree/a b/file"), ":/dev/full").0 == 1);
}

#[test]
fn what_is_no_file_stays_and_what_has_no_room_is_told() {
    let small = Folder::new();
    common::mount_tmpfs(&small.0, 1 << 20);
    // This thread starts the agent, which so sees the file systems that this thread sees.
    let agent = Agent::start();
    let vsock = agent.vsock();
    let cp = |from: &str, to: &str| copy(&vsock, from, to);
    let path = |name: &str| agent.folder.path(name).to_str().unwrap().to_owned();
    fs::create_dir(path("tree")).unwrap();
    fs::write(path("tree/file"), "text").unwrap();
    fs::hard_link(path("tree/file"), path("tree/same")).unwrap();
    symlink("/nonexistent", path("tree/dangling")).unwrap();
    let hole = fs::File::create(path("tree/hole")).unwrap();
    hole.set_len(1 << 30).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&hole, b"in the middle", 1 << 29).unwrap();
    common::output("mkfifo", &[&path("tree/pipe")]);
    // The numbers of /dev/null; only root can make a device node, as only root mounts what this case has mounted.
    common::output("mknod", &[&path("tree/device"), "c", "1", "3"]);
    let _socket = UnixListener::bind(path("tree/socket")).unwrap();
    // Both ways, through a guest and back.
    for (from, to, place) in
        [(path("tree"), format!(":{}", path("in")), "in"), (format!(":{}", path("in")), path("out"), "out")]
    {
        let (code, errors) = cp(&from, &to);
        assert_eq!(code, 0, "{errors}");
        // What is left out is told where it is.
        let left_out = if place == "in" { 3 } else { 0 };
        assert_eq!(errors.lines().filter(|line| line.contains("is left out")).count(), left_out, "{errors}");
        let name = |name: &str| format!("{}/{name}", path(place));
        assert_eq!(fs::read(name("file")).unwrap(), b"text");
        assert_eq!(fs::read(name("same")).unwrap(), b"text");
        assert_eq!(fs::read_link(name("dangling")).unwrap(), Path::new("/nonexistent"));
        let there = fs::metadata(name("hole")).unwrap();
        assert!(there.len() == 1 << 30 && there.blocks() < 2048, "{} blocks", there.blocks());
        let mut middle = [0; 13];
        std::os::unix::fs::FileExt::read_exact_at(
            &fs::File::open(name("hole")).unwrap(),
            &mut middle,
            1 << 29,
        )
        .unwrap();
        assert_eq!(&middle, b"in the middle");
        assert!(["pipe", "device", "socket"].iter().all(|kind| !Path::new(&name(kind)).exists()));
    }
    // Alone there is nothing to copy: neither out of the guest nor into it.
    for kind in ["pipe", "device", "socket"] {
        let (from, to) = (path(&format!("tree/{kind}")), path("alone"));
        for (from, to, inside) in
            [(from.clone(), format!(":{to}"), ""), (format!(":{from}"), to.clone(), "in the guest: ")]
        {
            let (code, errors) = cp(&from, &to);
            let told = format!(
                "{inside}read `{}`: it is neither a file nor a folder\n",
                path(&format!("tree/{kind}"))
            );
            assert!(code == 1 && errors.ends_with(&told) && errors.lines().count() == 1, "{errors}");
        }
        assert!(!Path::new(&to).exists());
    }
    // A disk that is full, there and here.
    fs::write(path("big"), vec![7; 4 << 20]).unwrap();
    let full = small.path("big").to_str().unwrap().to_owned();
    for (from, to) in [(path("big"), format!(":{full}")), (format!(":{}", path("big")), full.clone())] {
        let (code, errors) = cp(&from, &to);
        assert!(code == 1 && errors.contains("No space left on device"), "{errors}");
        assert!(errors.lines().count() == 1 && errors.contains("big"), "{errors}");
        fs::remove_file(&full).unwrap();
    }
    assert_eq!(agent.shell("echo alive").answer().output, b"alive\n");
}
