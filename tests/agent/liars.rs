//! Guests that lie, that never answer, or whose agent ends: what their commands on the host make of it.

use super::*;

const HELLO: (Type, &[u8]) = (Type::Greeting, br#"{"protocol": 1, "agent": "9"}"#);

fn frames(frames: &[(Type, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    frames.iter().for_each(|(kind, content)| put(&mut bytes, *kind, content));
    bytes
}

/// `alula` with these words; its exit code, and what it says.
fn alula(words: &[&str]) -> (i32, Vec<u8>, String) {
    let output = Command::new(common::alula()).args(words).stdin(Stdio::null()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap(), output.stdout, errors)
}

/// A monitor in whose guest somebody answers each client with these bytes, and then hears it to its end or, if it
/// `leaves`, closes. It ends with the process.
fn monitor(folder: &Folder, bytes: Vec<u8>, leaves: bool) -> String {
    let path = folder.path("vsock");
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let _ = client.read_exact(&mut [0; 11]);
            // A client that has heard enough closes.
            let _ = client.write_all(b"OK 1024\n").and_then(|()| client.write_all(&bytes));
            if !leaves {
                let _ = client.read_to_end(&mut Vec::new());
            }
        }
    });
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_lie_ends_a_command_with_its_reason() {
    let folder = Folder::new();
    for (bytes, told) in [
        (frames(&[(Type::Exited, &[0, 0])]), "does not keep to its protocol: Exited comes before a greeting"),
        (frames(&[(Type::Output, b"x")]), "Output comes before a greeting"),
        (frames(&[(Type::Failed, b"\0no")]), "Failed comes before a greeting"),
        (frames(&[HELLO, HELLO]), "Greeting was not expected"),
        (frames(&[HELLO, (Type::Exited, &[7, 0])]), "Exited was not expected"),
        (frames(&[HELLO, (Type::Taken, &[255; 4])]), "it has taken more input than it was given"),
        (frames(&[HELLO, (Type::Output, &[0; CONTENT_MAX + 1])]), "a frame of type 130 and 65537 bytes"),
        ([frames(&[HELLO]), vec![131, 255, 255, 255]].concat(), "a frame of type 131 and 16777215 bytes"),
        ([frames(&[HELLO]), vec![200, 0, 0, 0]].concat(), "a frame of the unknown type 200"),
        (b"\x81\x01\0\0{".to_vec(), "read the greeting of the agent in the guest: EOF"),
        (b"220 smtp.example.org".to_vec(), "a frame of the unknown type 50"),
    ] {
        let vsock = monitor(&folder, bytes, false);
        let (code, output, errors) = alula(&["exec", "--vsock", &vsock, "true"]);
        assert!(code == 125 && output.is_empty() && errors.contains(told), "{told}: {code} {errors}");
        let file = folder.write("file", "text").to_str().unwrap().to_owned();
        let (code, _, errors) = alula(&["cp", "--vsock", &vsock, &file, ":/tmp/x"]);
        assert!(code == 1 && errors.contains(told), "{told}: {code} {errors}");
        let (code, _, _) = alula(&["wait", "--vsock", &vsock, "--timeout", "20ms"]);
        assert_eq!(code, 124, "{told}");
    }
    // Of two ends the first counts.
    let two = frames(&[HELLO, (Type::Exited, &[0, 3]), (Type::Exited, &[0, 4]), (Type::Output, b"late")]);
    let vsock = monitor(&folder, two, false);
    assert_eq!(alula(&["exec", "--vsock", &vsock, "true"]), (3, vec![], String::new()));
    // The agent is gone in the middle of what it says.
    for bytes in [Vec::new(), b"\x81\xff".to_vec(), frames(&[HELLO]), frames(&[HELLO, (Type::Output, b"")])] {
        let vsock = monitor(&folder, bytes, true);
        let (code, _, errors) = alula(&["exec", "--vsock", &vsock, "true"]);
        assert!(code == 125 && errors.contains("ended before what it was asked did"), "{code} {errors}");
    }
    // What is copied out of a guest stays where it is wanted, and words for a terminal are no terminal's.
    let tar =
        frames(&[HELLO, (Type::Output, b"no tar"), (Type::Errors, b"\x1b[2J"), (Type::Exited, &[0, 1])]);
    let vsock = monitor(&folder, tar, false);
    let to = folder.path("out").to_str().unwrap().to_owned();
    let (code, _, errors) = alula(&["cp", "--vsock", &vsock, ":/x", &to]);
    assert!(code == 1 && errors.contains("in the guest: ") && !errors.contains('\x1b'), "{errors}");
}

#[test]
fn a_guest_that_never_answers_has_a_limit_of_time() {
    let folder = Folder::new();
    for bytes in [Vec::new(), frames(&[HELLO]), frames(&[HELLO, (Type::Output, b"x")])] {
        let vsock = monitor(&folder, bytes.clone(), false);
        let (code, _, errors) = alula(&["exec", "--timeout", "50ms", "--vsock", &vsock, "true"]);
        assert!(code == 124 && errors.contains("the time for the command in the guest was up"), "{errors}");
        let (code, _, errors) = alula(&["wait", "--timeout", "50ms", "--vsock", &vsock]);
        assert!(code == 124 && errors.contains("does not answer yet"), "{errors}");
    }
    // An agent that stands still takes connections all the same.
    let agent = Agent::start();
    let vsock = agent.vsock();
    common::send(&agent.process.child, libc::SIGSTOP);
    assert_eq!(alula(&["wait", "--timeout", "50ms", "--vsock", &vsock]).0, 124);
    assert_eq!(alula(&["exec", "--timeout", "50ms", "--vsock", &vsock, "true"]).0, 124);
    common::send(&agent.process.child, libc::SIGCONT);
    assert_eq!(alula(&["exec", "--vsock", &vsock, "true"]).0, 0);
}

#[test]
fn an_agent_that_ends_takes_its_commands_along() {
    for signal in [libc::SIGKILL, libc::SIGABRT] {
        let agent = Agent::start();
        let vsock = agent.vsock();
        let mut commands: Vec<_> = (0..3)
            .map(|_| Process::start(["exec", "--vsock", &vsock, "sh", "-c", "echo ready; exec sleep 1000"]))
            .collect();
        commands.iter_mut().for_each(|command| drop(command.expect("ready")));
        // The out-of-memory killer's signal, and what a program sends itself that gets no memory.
        common::send(&agent.process.child, signal);
        for command in commands {
            let ended = command.end();
            let told = "the connection to the agent in the guest ended before what it was asked did";
            assert!(ended.code == Some(125) && ended.text.contains(told), "{:?} {}", ended.code, ended.text);
        }
        let (code, _, errors) = alula(&["exec", "--vsock", &vsock, "true"]);
        assert!(code == 125 && errors.contains("no agent listens on vsock port 52"), "{code} {errors}");
    }
}

#[test]
fn output_without_end_waits_for_who_stops_reading() {
    let agent = Agent::start();
    let vsock = agent.vsock();
    let counter = agent.folder.path("count");
    // What is to be 10 GiB tells after each MiB how far it is.
    let script = format!(
        "i=0; while [ $i -lt 10240 ]; do head -c 1048576 /dev/zero; i=$((i+1)); echo $i >{}; done",
        counter.display()
    );
    let mut command = Command::new(common::alula());
    command.args(["exec", "--vsock", &vsock, "sh", "-c", &script]).stdin(Stdio::null());
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = child.stdout.take().unwrap();
    let written = || -> u64 {
        let text = fs::read_to_string(&counter).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    let mut read = 0;
    let mut bytes = vec![0; 1 << 20];
    while written() < 20 {
        read += output.read(&mut bytes).unwrap() as u64;
    }
    // Nobody reads: it stands still, and what is on the way is some buffers' worth.
    let mut before = u64::MAX;
    while before != written() {
        before = written();
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    assert!(before <= read / (1 << 20) + 3, "{before} MiB are written and {read} bytes read");
    assert!(agent.resident_kib() < 2 << 10, "{} KiB", agent.resident_kib());
    let kib = resident_kib(child.id());
    assert!(kib < 2 << 10, "{kib} KiB");
    // Others are served meanwhile, and who reads on gets more.
    assert_eq!(agent.shell("echo beside").answer().output, b"beside\n");
    while written() < before + 5 {
        assert!(output.read(&mut bytes).unwrap() > 0);
    }
    drop(output);
    assert_eq!(child.wait().unwrap().code(), Some(128 + 13));
}

#[test]
fn a_monitor_that_goes_in_the_middle_is_told() {
    let folder = Folder::new();
    let (path, vsock) = (folder.path("api"), folder.path("vsock"));
    // Nobody listens in its guest.
    let guest = UnixListener::bind(&vsock).unwrap();
    std::thread::spawn(move || guest.incoming().for_each(drop));
    let config = json!({"vsock": {"guest_cid": 3, "uds_path": vsock}}).to_string();
    let config = format!("HTTP/1.1 200 \r\nContent-Length: {}\r\n\r\n{config}", config.len());
    let events = "HTTP/1.1 200 \r\n\r\n{\"event\":\"started\"}\n{\"event\":\"guest_ready\"}\n";
    for (answers, command, code, told) in [
        (vec![""], "wait", 1, "wait for the answer to `GET /vm/config`: the monitor hung up"),
        (vec!["HTTP/1.1 2"], "exec", 125, "the monitor hung up"),
        (vec![&config[..config.len() - 1]], "exec", 125, "the monitor hung up"),
        (vec!["HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{]"], "exec", 125, "read the monitor's answer: "),
        (vec!["HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{}"], "exec", 125, "the guest has no vsock device"),
        (vec![&config, ""], "wait", 1, "wait for the answer to `GET /events`: the monitor hung up"),
        (vec![&config, "HTTP/1.1 503 \r\n\r\n"], "wait", 1, "answers `GET /events` with status 503"),
        (vec![&config, events], "wait", 1, "alula: the guest has ended"),
        (vec![&config, &events[..events.len() - 9]], "wait", 1, "alula: the guest has ended"),
    ] {
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let answers: Vec<String> = answers.into_iter().map(str::to_owned).collect();
        let monitor = std::thread::spawn(move || {
            for answer in answers {
                let (mut client, _) = listener.accept().unwrap();
                // First, it is asked whether it answers at all.
                for answer in ["HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{}", &answer] {
                    let mut asked = Vec::new();
                    while !asked.ends_with(b"\r\n\r\n") {
                        let mut byte = [0];
                        client.read_exact(&mut byte).unwrap();
                        asked.push(byte[0]);
                    }
                    client.write_all(answer.as_bytes()).unwrap();
                }
            }
        });
        let api = path.to_str().unwrap();
        let words: &[&str] = if command == "exec" {
            &["exec", "--api-sock", api, "true"]
        } else {
            &["wait", "--api-sock", api]
        };
        let (got, _, errors) = alula(words);
        assert!(got == code && errors.contains(told), "{told}: {got} {errors}");
        monitor.join().unwrap();
    }
}

#[test]
fn who_waits_outlasts_a_socket_at_which_nobody_listens_yet() {
    let folder = Folder::new();
    let (path, next) = (folder.path("api"), folder.path("next"));
    // The file stays.
    drop(UnixListener::bind(&path).unwrap());
    let mut waiting = Command::new(common::alula());
    waiting.args(["wait", "--api-sock", path.to_str().unwrap()]);
    let waiting = waiting.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    // It has most likely tried by then: between two tries it sleeps.
    common::wait_for(|| common::ended::state(waiting.id()) == Some('S'));
    let listener = UnixListener::bind(&next).unwrap();
    fs::rename(&next, &path).unwrap();
    let (mut client, _) = listener.accept().unwrap();
    client.read_exact(&mut [0; 20]).unwrap();
    drop(client);
    let output = waiting.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && errors.contains("the monitor hung up"), "{errors}");
}
