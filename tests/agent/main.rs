//! The agent, on this machine over a Unix socket: what its clients see, and what hostile ones can do to it.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod commands;
#[path = "../common/mod.rs"]
mod common;
mod hostile;
mod liars;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use alula::protocol::frame::{CONTENT_MAX, INPUT_WINDOW, Inbox, Type, put};
use common::{Folder, PATIENCE, Process};
use serde_json::{Value, json};

struct Agent {
    folder: Folder,
    process: Process,
}

impl Agent {
    fn start() -> Self {
        let folder = Folder::new();
        let socket = folder.path("agent");
        let process = Process::start(["agent", "--socket", socket.to_str().unwrap()]);
        let agent = Self { folder, process };
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < deadline, "the agent does not listen");
            std::thread::yield_now();
        }
        // After it the connection that was tried is gone.
        assert_eq!(agent.run(&["true"]).answer().exited, [0, 0]);
        agent
    }

    /// A socket that stands for a vsock device's, whose guest the agent is in: `CONNECT 52`, then the agent.
    fn vsock(&self) -> String {
        let (path, agent) = (self.folder.path("vsock"), self.folder.path("agent"));
        let listener = UnixListener::bind(&path).unwrap();
        // The thread ends with the process.
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (mut client, agent) = (client.unwrap(), agent.clone());
                std::thread::spawn(move || {
                    let mut asked = [0; 11];
                    client.read_exact(&mut asked).unwrap();
                    let Ok(stream) = UnixStream::connect(agent) else { return };
                    assert_eq!(&asked, b"CONNECT 52\n");
                    client.write_all(b"OK 1024\n").unwrap();
                    let pass = |from: &UnixStream, to: &UnixStream| {
                        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                        std::thread::spawn(move || {
                            let _ = std::io::copy(&mut from, &mut to);
                            let _ = to.shutdown(std::net::Shutdown::Write);
                        })
                    };
                    let directions = [pass(&client, &stream), pass(&stream, &client)];
                    directions.into_iter().for_each(|direction| direction.join().unwrap());
                });
            }
        });
        path.to_str().unwrap().to_owned()
    }

    fn connect(&self) -> Client {
        let stream = UnixStream::connect(self.folder.path("agent")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client { stream, inbox: Inbox::default() }
    }

    fn ask(&self, ask: Value) -> Client {
        let mut client = self.connect();
        client.send(Type::Request, json!({"protocol": 1, "ask": ask}).to_string().as_bytes());
        client
    }

    fn run(&self, argv: &[&str]) -> Client {
        self.ask(json!({"run": {"argv": argv}}))
    }

    fn shell(&self, script: &str) -> Client {
        self.run(&["sh", "-c", script])
    }

    fn resident_kib(&self) -> u64 {
        resident_kib(self.process.child.id())
    }

    /// Waits until it has no more descriptors than so many.
    fn has_at_most(&self, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.descriptors() > count {
            assert!(Instant::now() < deadline, "{} descriptors, not {count}", self.descriptors());
            std::thread::yield_now();
        }
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.process.child.id())).unwrap().count()
    }
}

fn resident_kib(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

struct Client {
    stream: UnixStream,
    inbox: Inbox,
}

/// What came of a request.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    greeting: Value,
    output: Vec<u8>,
    errors: Vec<u8>,
    taken: usize,
    /// The content of the last frame, `exited` or `failed`.
    exited: Vec<u8>,
    failed: String,
}

impl Client {
    fn send(&mut self, kind: Type, content: &[u8]) {
        let mut frame = Vec::new();
        put(&mut frame, kind, content);
        match self.stream.write_all(&frame) {
            // An agent that has failed answers, and closes the connection before it has read everything.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            written => written.unwrap(),
        }
    }

    /// The next frame; none: the agent has closed the connection.
    fn next(&mut self) -> Option<(Type, Vec<u8>)> {
        let mut bytes = [0; 1 << 16];
        loop {
            if let Some((kind, content)) = self.inbox.pop().unwrap() {
                return Some((kind, content.to_vec()));
            }
            match self.stream.read(&mut bytes) {
                Ok(count) if count > 0 => self.inbox.push(&bytes[..count]),
                // A read with a time-out does not begin again after the end of another case's child (signal(7)).
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // The agent has closed a connection on which something was still on its way to it.
                Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => panic!("{error}"),
                _ => return None,
            }
        }
    }

    fn answer(mut self) -> Answer {
        let mut answer = Answer::default();
        while let Some((kind, content)) = self.next() {
            assert!(answer.exited.is_empty() && answer.failed.is_empty(), "a frame after the last one");
            match kind {
                Type::Greeting => answer.greeting = serde_json::from_slice(&content).unwrap(),
                Type::Output => answer.output.extend(content),
                Type::Errors => answer.errors.extend(content),
                Type::Taken => {
                    answer.taken += u32::from_le_bytes(content.try_into().unwrap()) as usize;
                }
                Type::Exited => answer.exited = content,
                Type::Failed => {
                    answer.failed = format!("{} {}", content[0], String::from_utf8_lossy(&content[1..]));
                }
                kind => panic!("{kind:?}"),
            }
        }
        answer
    }

    /// Waits until `text` has been written.
    fn expect(&mut self, text: &str) {
        let mut seen = String::new();
        while !seen.contains(text) {
            let (kind, content) = self.next().unwrap_or_else(|| panic!("waited for {text}: {seen}"));
            match kind {
                Type::Output => seen += &String::from_utf8_lossy(&content),
                Type::Greeting | Type::Taken => {}
                kind => panic!("{kind:?}: {}", String::from_utf8_lossy(&content)),
            }
        }
    }
}

#[test]
fn a_program_tells_its_output_and_how_it_ended() {
    let agent = Agent::start();
    let before = agent.descriptors();
    let answer = agent.shell("echo hi; echo err >&2; exit 7").answer();
    assert_eq!((&answer.output[..], &answer.errors[..]), (&b"hi\n"[..], &b"err\n"[..]));
    assert_eq!(answer.exited, [0, 7]);
    assert_eq!(answer.greeting["protocol"], 1);
    assert_eq!(answer.greeting["agent"], env!("CARGO_PKG_VERSION"));
    assert!(answer.greeting["pid"].is_u64());
    assert_eq!(agent.shell("kill -9 $$").answer().exited, [1, 9]);
    // A signal's default is as everywhere: a writer without a reader ends by it.
    assert_eq!(agent.shell("trap - PIPE; kill -13 $$").answer().exited, [1, 13]);
    // No signal is blocked: busybox' shell would wait for ever for what it has started in the background.
    let blocked = agent.shell("exec grep SigBlk /proc/self/status").answer().output;
    assert_eq!(String::from_utf8_lossy(&blocked).split_whitespace().last(), Some("0000000000000000"));

    let text = agent.folder.write("text", "no program");
    let script = agent.folder.write("script", "#!/no/shell\n");
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    for (argv, told) in [
        (vec!["/nonexistent"], "1 start `/nonexistent`: No such file or directory"),
        (vec!["no-such-program"], "1 start `no-such-program`: No such file"),
        (
            vec![script.to_str().unwrap()],
            &format!(
                "1 start `{}`: No such file or directory (os error 2): the file is there",
                script.display()
            ),
        ),
        (vec![], "1 no program is named"),
        (vec![text.to_str().unwrap()], "2 start `"),
        (vec!["/"], "2 start `/`: Permission denied"),
    ] {
        let answer = agent.run(&argv).answer();
        assert!(answer.failed.starts_with(told) && answer.exited.is_empty(), "{argv:?}: {answer:?}");
    }
    // What a process leaves behind keeps nobody waiting.
    let answer = agent.shell("sleep 100 & echo $!").answer();
    assert_eq!(answer.exited, [0, 0]);
    let left: i32 = String::from_utf8(answer.output).unwrap().trim().parse().unwrap();
    Command::new("kill").arg(left.to_string()).status().unwrap();
    agent.has_at_most(before);
}

#[test]
fn a_program_finds_the_surroundings_that_were_asked_for() {
    let agent = Agent::start();
    let folder = agent.folder.0.to_str().unwrap();
    let script = "pwd; echo $A.$HOME.$USER; id -u; id -g; grep SigIgn /proc/self/status";
    let run = json!({"run": {"argv": ["sh", "-c", script], "env": ["A=b=c", "HOME=/h", "=x", "NONE"],
        "workdir": folder}});
    let text = String::from_utf8(agent.ask(run).answer().output).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[..2], [folder, &format!("b=c./h.{}", user())], "{text}");
    // The agent ignores SIGPIPE, what it starts does not.
    let ignored = u64::from_str_radix(lines[4].trim_start_matches("SigIgn:\t"), 16).unwrap();
    assert_eq!(ignored & 1 << 12, 0, "{text}");
    let run = json!({"run": {"argv": ["true"], "workdir": "/nonexistent"}});
    assert_eq!(agent.ask(run).answer().failed, "0 there is no folder `/nonexistent` to start in");
    if user() == "root" {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
        let run = json!({"run": {"argv": ["sh", "-c", "id -u; id -g; id -G"], "user": "12345:23456"}});
        assert_eq!(agent.ask(run).answer().output, b"12345\n23456\n23456\n");
        let run = json!({"run": {"argv": ["sh", "-c", "id -u -n"], "user": "nobody"}});
        assert_eq!(agent.ask(run).answer().output, b"nobody\n");
    }
    let run = json!({"run": {"argv": ["true"], "user": "nosuchuser"}});
    assert_eq!(agent.ask(run).answer().failed, "0 there is no user `nosuchuser` in /etc/passwd");
}

fn user() -> String {
    let id = Command::new("id").arg("-un").output().unwrap();
    String::from_utf8(id.stdout).unwrap().trim().to_owned()
}

#[test]
fn bytes_arrive_whole_in_both_directions() {
    const SIZE: usize = 24 << 20;
    let agent = Agent::start();
    let mut client = agent.run(&["cat"]);
    let mut stream = client.stream.try_clone().unwrap();
    let byte = |at: usize| (at * 7 + at / 4096) as u8;
    let (told, window) = std::sync::mpsc::channel::<usize>();
    let writer = std::thread::spawn(move || {
        let (mut sent, mut room) = (0, INPUT_WINDOW);
        while sent < SIZE {
            let count = room.min(CONTENT_MAX).min(SIZE - sent);
            if count == 0 {
                room += window.recv().unwrap();
                continue;
            }
            let content: Vec<u8> = (sent..sent + count).map(byte).collect();
            let mut frame = Vec::new();
            put(&mut frame, Type::Input, &content);
            stream.write_all(&frame).unwrap();
            (sent, room) = (sent + count, room - count);
        }
        stream.write_all(&[Type::InputEnd as u8, 0, 0, 0]).unwrap();
    });
    let mut seen = 0;
    loop {
        match client.next().unwrap() {
            (Type::Taken, content) => {
                let _ = told.send(u32::from_le_bytes(content.try_into().unwrap()) as usize);
            }
            (Type::Output, content) => {
                assert!(content.iter().enumerate().all(|(at, b)| *b == byte(seen + at)), "after {seen}");
                seen += content.len();
            }
            (Type::Exited, content) => break assert_eq!(content, [0, 0]),
            (Type::Greeting, _) => {}
            other => panic!("{other:?}"),
        }
    }
    writer.join().unwrap();
    assert_eq!(seen, SIZE);
}

#[test]
fn signals_do_not_wait_behind_input_that_is_not_read() {
    let agent = Agent::start();
    let mut client = agent.shell("trap 'echo got; exit 3' TERM; echo ready; while :; do sleep 0.01; done");
    client.expect("ready");
    for _ in 0..INPUT_WINDOW / CONTENT_MAX {
        client.send(Type::Input, &[0; CONTENT_MAX]);
    }
    client.send(Type::Signal, &[15]);
    let answer = client.answer();
    assert_eq!((&answer.output[..], &answer.exited[..]), (&b"got\n"[..], &[0, 3][..]));

    // One that closes its input: the rest of it is taken, and goes nowhere.
    let mut client = agent.shell("exec <&-; echo closed; sleep 0.2");
    client.expect("closed");
    client.send(Type::Input, &[0; CONTENT_MAX]);
    client.send(Type::InputEnd, b"");
    let answer = client.answer();
    assert_eq!((answer.taken, &answer.exited[..]), (CONTENT_MAX, &[0, 0][..]));
}

#[test]
fn a_terminal_has_a_size_and_keys() {
    let agent = Agent::start();
    let window = |rows: u16, columns: u16| [rows.to_le_bytes(), columns.to_le_bytes()].concat();
    let script =
        "echo $TERM; stty size; echo ready; while read line; do stty size; echo got $line; done; echo end";
    let run = json!({"argv": ["sh", "-c", script], "terminal": {"rows": 31, "columns": 101}});
    let mut client = agent.ask(json!({"run": run}));
    client.expect("linux\r\n31 101\r\nready");
    client.send(Type::Window, &window(40, 0));
    client.send(Type::Input, b"a\n");
    client.expect("40 101\r\ngot a");
    client.send(Type::Window, &window(0, 0));
    client.send(Type::Input, b"b\n");
    client.expect("40 101\r\ngot b");
    client.send(Type::InputEnd, b"");
    let answer = client.answer();
    assert!(answer.output.ends_with(b"end\r\n"), "{}", String::from_utf8_lossy(&answer.output));
    assert_eq!(answer.exited, [0, 0]);
    // The program is told of a change. The line is for a shell that had not begun to read by then.
    let run = json!({"argv": ["sh", "-c", "trap 'exit 7' WINCH; echo ready; read line; exit 8"],
        "terminal": {"rows": 31, "columns": 101}});
    let mut client = agent.ask(json!({"run": run}));
    client.expect("ready");
    client.send(Type::Window, &window(40, 0));
    client.send(Type::Input, b"a\n");
    assert_eq!(client.answer().exited, [0, 7]);

    // Ctrl-C is a key, and a signal goes to what is in the foreground. A shell that is about to start a program
    // when it comes would wait for that program's end.
    let run = json!({"argv": ["sh", "-c", "echo ready; read line"], "terminal": {"rows": 0, "columns": 0}});
    let mut client = agent.ask(json!({"run": run}));
    client.expect("ready");
    client.send(Type::Input, b"\x03");
    assert_eq!(client.answer().exited, [1, 2]);
    // One that has the terminal open and does not mind keeps nobody waiting.
    let run = json!({"argv": ["sh", "-c", "trap '' HUP; sleep 100 & echo $!"], "terminal": {"rows": 0, "columns": 0}});
    let answer = agent.ask(json!({"run": run})).answer();
    assert_eq!(answer.exited, [0, 0]);
    let left = String::from_utf8(answer.output).unwrap();
    Command::new("kill").arg(left.trim()).status().unwrap();
    // All that was written before the end arrives.
    let script = "i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done";
    let run = json!({"argv": ["sh", "-c", script], "terminal": {"rows": 24, "columns": 80}});
    let answer = agent.ask(json!({"run": run})).answer();
    let tail = String::from_utf8_lossy(&answer.output[answer.output.len().saturating_sub(40)..]);
    assert!(
        tail.ends_with("\r\n19999\r\n"),
        "{tail:?}, {:?} {} {}",
        answer.exited,
        answer.failed,
        answer.greeting
    );
    assert_eq!(answer.output.iter().filter(|byte| **byte == b'\n').count(), 20000);
}

#[test]
fn trees_are_read_and_written() {
    let agent = Agent::start();
    let tree = agent.folder.path("tree");
    fs::create_dir_all(tree.join("a folder")).unwrap();
    fs::write(tree.join("a folder/file"), "text").unwrap();
    symlink("a folder", tree.join("link")).unwrap();
    let answer = agent.ask(json!({"read": {"path": tree}})).answer();
    assert_eq!((&answer.exited[..], answer.errors.len()), (&[0, 0][..], 0));
    let (stream, to) = (answer.output, agent.folder.path("to"));
    fs::create_dir(&to).unwrap();
    let write = |path: &Path, stream: &[u8]| {
        let mut client = agent.ask(json!({"write": {"path": path, "name": "copy"}}));
        client.send(Type::Input, stream);
        client.send(Type::InputEnd, b"");
        client.answer()
    };
    assert_eq!(write(&to, &stream).exited, [0, 0]);
    assert_eq!(fs::read(to.join("copy/link/file")).unwrap(), b"text");
    assert_eq!(write(&to.join("copy/new"), &stream).exited, [0, 0]);
    assert_eq!(fs::read(to.join("copy/new/a folder/file")).unwrap(), b"text");
    for (answer, told) in [
        (write(&to.join("copy/link/file"), &stream), "a folder does not go over what is not a folder"),
        (write(&agent.folder.path("x/y"), &stream), "No such file or directory"),
        (write(&to, b"garbage"), "write `"),
        (agent.ask(json!({"read": {"path": "/nonexistent"}})).answer(), "read `/nonexistent`: No such file"),
    ] {
        let errors = String::from_utf8_lossy(&answer.errors).into_owned();
        assert!(answer.exited == [0, 1] && errors.contains(told), "{errors}");
    }
}

#[test]
fn an_agent_tells_how_its_machine_is() {
    let agent = Agent::start();
    let answer = agent.ask(json!({"info": {}})).answer();
    let info = &answer.greeting["info"];
    assert!(info["uptime_ms"].as_u64().unwrap() > 0, "{info}");
    assert!(info["memory_kib"]["total"].as_u64() >= info["memory_kib"]["available"].as_u64(), "{info}");
    assert!(info["addresses"].is_array() && !info["hostname"].as_str().unwrap().is_empty(), "{info}");
    assert_eq!(answer.exited, [0, 0]);
    let answer = agent
        .ask(json!({"set": {"address": {"interface": "a-name-that-is-too-long",
        "address": "10.0.0.1", "prefix": 24}}}))
        .answer();
    assert!(
        answer.failed.starts_with("0 give `a-name-that-is-too-long` the address 10.0.0.1: "),
        "{answer:?}"
    );
}
