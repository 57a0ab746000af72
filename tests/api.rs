//! The control API over its real socket, with the firmware guest on real KVM.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::io::Read;
use std::os::unix::net::UnixStream;

use common::{Client, Service, network, output, run, wait_for};
use serde_json::json;

const START: &str = r#"{"action_type": "InstanceStart"}"#;

#[test]
fn a_client_boots_pauses_and_resumes_a_guest() {
    let mut service = Service::start(&["--id", "vm-1"]);
    let mut client = service.client();
    let instance = client.ok("GET", "/", "").json();
    assert_eq!((&instance["id"], &instance["state"]), (&json!("vm-1"), &json!("Not started")));
    assert_eq!(client.ok("GET", "/version", "").json(), json!({ "firecracker_version": "1.17.0" }));
    client.ok("PUT", "/machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 64}"#);
    service.boot_source("cpus=2 memory=64 end=idle");
    let start = client.ok("PUT", "/actions", START);
    assert_eq!(start.head, "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n");
    service.process.expect("7 cases, 0 failed");
    for (state, told) in
        [("Paused", "Paused"), ("Paused", "Paused"), ("Resumed", "Running"), ("Resumed", "Running")]
    {
        client.ok("PATCH", "/vm", &json!({ "state": state }).to_string());
        assert_eq!(client.ok("GET", "/", "").json()["state"], told);
    }
    let config = client.ok("GET", "/vm/config", "").json();
    assert_eq!(config["machine-config"]["mem_size_mib"], 64);
    assert_eq!(config["boot-source"]["boot_args"], "cpus=2 memory=64 end=idle");
}

#[test]
fn a_paused_guest_says_nothing_until_it_is_resumed() {
    let mut service = Service::running("case=serial echo end=idle");
    service.process.expect("alula firmware");
    let mut client = service.client();
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    use std::io::Write;
    service.process.stdin.as_mut().unwrap().write_all(b"typed while paused\n").unwrap();
    // Requests are answered one after the other, so time has passed for the main loop.
    for _ in 0..20 {
        client.ok("GET", "/", "");
    }
    assert_eq!(service.process.drain(), "");
    client.ok("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    service.process.expect("typed while paused");
}

#[test]
fn a_guest_that_was_run_answers_on_its_socket_too() {
    let folder = common::Folder::new();
    let socket = folder.path("s");
    let mut guest = common::Process::start([
        "run",
        "--id",
        "r",
        "--api-sock",
        socket.to_str().unwrap(),
        "--cmdline",
        "hello",
    ]);
    guest.expect("A");
    let mut client = Client::connect(&socket);
    assert_eq!(client.ok("GET", "/", "").json()["state"], "Running");
    client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
    guest.send(libc::SIGTERM);
    assert_eq!(guest.end().code, Some(128 + libc::SIGTERM));
    assert!(!socket.exists());
}

#[test]
fn what_is_allowed_depends_on_the_start() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let before = "The requested operation is not supported before starting the microVM.";
    let after = "The requested operation is not supported after starting the microVM.";
    let cad = r#"{"action_type": "SendCtrlAltDel"}"#;
    assert_eq!(client.request("PATCH", "/vm", r#"{"state": "Paused"}"#).fault(), before);
    assert_eq!(client.request("PUT", "/actions", cad).fault(), before);
    assert!(client.request("PUT", "/actions", START).fault().contains("without kernel configuration"));
    service.boot_source("hello");
    client.ok("PUT", "/actions", START);
    let boot = json!({ "kernel_image_path": "/none" }).to_string();
    for (method, path, body) in [
        ("PUT", "/actions", START),
        ("PUT", "/boot-source", boot.as_str()),
        ("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 2}"#),
        ("PATCH", "/machine-config", r#"{"vcpu_count": 1}"#),
    ] {
        assert_eq!(client.request(method, path, body).fault(), after, "{method} {path}");
    }
    match std::env::consts::ARCH {
        "x86_64" => drop(client.ok("PUT", "/actions", cad)),
        _ => assert_eq!(
            client.request("PUT", "/actions", cad).fault(),
            "SendCtrlAltDel does not supported on aarch64."
        ),
    }
}

#[test]
fn bad_bodies_get_a_fault_that_names_the_field() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let serde = "An error occurred when deserializing the json body of a request: ";
    for (method, path, body, expected) in [
        ("PUT", "/machine-config", r#"{"vcpu_count": 1}"#, format!("{serde}missing field `mem_size_mib`")),
        ("PUT", "/machine-config", r#"{"vcpu_count": "1"}"#, format!("{serde}invalid type: string \"1\"")),
        ("PUT", "/machine-config", r#"{"vcpus": 1}"#, format!("{serde}unknown field `vcpus`")),
        ("PUT", "/machine-config", r#"{"vcpu_count": 1"#, format!("{serde}EOF while parsing")),
        ("PUT", "/machine-config", "", "Empty PUT request.".to_owned()),
        ("PUT", "/actions", r#"{"action_type": "Dance"}"#, format!("{serde}unknown variant `Dance`")),
        ("GET", "/machine-config", "{}", "GET request cannot have a body.".to_owned()),
        ("PUT", "/teapot/7", "{}", "Invalid request method and/or path: PUT teapot.".to_owned()),
        ("PUT", "/balloon", "{}", "`PUT /balloon` is not implemented yet.".to_owned()),
        (
            "PUT",
            "/machine-config",
            r#"{"vcpu_count": 1, "mem_size_mib": 8, "huge_pages": "2M"}"#,
            "Machine config error: `huge_pages` is not implemented yet".to_owned(),
        ),
        (
            "PUT",
            "/boot-source",
            r#"{"kernel_image_path": "/dev"}"#,
            "Boot source error: open kernel `/dev`: it is a directory".to_owned(),
        ),
    ] {
        let response = client.request(method, path, body);
        assert!(response.fault().starts_with(&expected), "{method} {path} {body}: {response:?}");
        assert!(response.head.contains("Content-Type: application/json"), "{response:?}");
    }
    client.ok("GET", "/", "");
}

#[test]
fn an_oversized_body_is_refused_before_it_is_sent() {
    let service = Service::start(&[]);
    let mut client = service.client();
    client.send("PUT /boot-source HTTP/1.1\r\nContent-Length: 51201\r\n\r\n");
    let response = client.receive();
    assert_eq!(
        (response.status(), response.body.as_str()),
        (
            "400",
            "{ \"error\": \"Request payload with size 51201 is larger than the limit of 51200 allowed by server.\n\
             All previous unanswered requests will be dropped.\" }"
        )
    );
    // The connection is of no use any more; the service is.
    assert_eq!(client.receive().head, "");
    let body = format!(r#"{{"kernel_image_path": "/none", "boot_args": "{}"}}"#, "x".repeat(51_000));
    assert!(service.client().request("PUT", "/boot-source", &body).fault().contains("at most 2047 fit"));
    let small = Service::start(&["--http-api-max-payload-size", "8"]);
    let response = small.client().request("PATCH", "/vm", r#"{"state": "Paused"}"#);
    assert!(response.body.contains("larger than the limit of 8 allowed"), "{response:?}");
}

#[test]
fn what_is_not_http_is_refused_and_the_next_client_is_served() {
    let service = Service::start(&[]);
    for garbage in [
        "\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "PUT /actions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n\r\n",
        "\0\0\0\0",
    ] {
        let mut client = service.client();
        client.send(garbage);
        let response = client.receive();
        assert_eq!(response.status(), "400", "{garbage:?}");
        assert!(response.body.starts_with("{ \"error\": \""), "{response:?}");
        service.client().ok("GET", "/", "");
    }
}

#[test]
fn a_client_that_goes_away_in_the_middle_does_not_hold_up_the_next() {
    let service = Service::start(&[]);
    for part in ["", "PU", "PUT /actions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{\"act"] {
        let mut client = service.client();
        client.send(part);
        drop(client);
        service.client().ok("GET", "/", "");
        // One that stays and says no more holds up nobody either.
        let mut silent = service.client();
        silent.send(part);
        service.client().ok("GET", "/", "");
    }
}

#[test]
fn one_connection_carries_many_requests_even_sent_at_once() {
    let service = Service::start(&[]);
    let mut client = service.client();
    client.send(&"GET / HTTP/1.1\r\n\r\n".repeat(100));
    for _ in 0..100 {
        assert_eq!(client.receive().json()["state"], "Not started");
    }
    client.send("PUT /machine-config HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 36\r\n\r\n");
    assert_eq!(client.receive().status(), "100");
    client.send(r#"{"vcpu_count":1,"mem_size_mib":  77}"#);
    assert_eq!(client.receive().status(), "204");
    let absolute = client.ok("GET", "http://localhost/machine-config", "");
    assert_eq!(absolute.json()["mem_size_mib"], 77);
}

#[test]
fn ten_busy_clients_are_served_and_two_more_are_told_so() {
    let service = Service::start(&[]);
    let (half, rest) = ("GET / HTTP/1.1\r\nHost: ", "localhost\r\n\r\n");
    let mut clients: Vec<Client> = (0..10).map(|_| service.client()).collect();
    for client in &mut clients {
        client.ok("GET", "/", "");
        client.send(half);
    }
    for _ in 0..2 {
        let mut client = service.client();
        let response = client.receive();
        assert_eq!(
            (response.status(), response.body.as_str()),
            ("503", "{ \"error\": \"Too many open connections\" }")
        );
        assert!(response.head.contains("Connection: close"), "{response:?}");
        assert_eq!(client.receive().head, "");
    }
    // None of the ten has lost anything.
    for client in &mut clients {
        client.send(rest);
        assert_eq!(client.receive().status(), "200");
        client.send(half);
    }
    // One that hangs up makes room at once.
    for _ in 0..100 {
        clients.pop();
        // At once, but that a program that another test starts has copies of our sockets for a moment.
        wait_for(|| {
            let mut client = service.client();
            let is_served = client.request("GET", "/", "").status() == "200";
            if is_served {
                client.send(half);
                clients.push(client);
            }
            is_served
        });
        clients.rotate_right(1);
    }
}

#[test]
fn of_idle_clients_the_one_idle_longest_gives_way() {
    let service = Service::start(&[]);
    let mut clients: Vec<Client> = (0..10).map(|_| service.client()).collect();
    for client in &mut clients {
        client.ok("GET", "/", "");
    }
    // The first one is busy, the third was served last.
    clients[0].send("GET / HTTP/1.1\r\n");
    clients[2].ok("GET", "/", "");
    let reader = Client::connect(&service.socket);
    let mut reader = reader;
    reader.send("GET /events HTTP/1.1\r\n\r\n");
    let more: Vec<_> = (0..8)
        .map(|_| {
            let mut client = service.client();
            client.ok("GET", "/", "");
            client
        })
        .collect();
    // The reader needs no place of theirs, but had one until it asked: so nine have given way.
    for index in [1, 3, 4, 5, 6, 7, 8, 9] {
        assert_eq!(clients[index].receive().head, "", "{index}");
    }
    clients[0].send("\r\n");
    assert_eq!(clients[0].receive().status(), "200");
    drop(more);
}

#[test]
fn a_connection_lasts_as_its_header_says() {
    let service = Service::start(&[]);
    for request in [
        "GET /version HTTP/1.1\r\nConnection: close\r\n\r\n",
        "GET /version HTTP/1.0\r\n\r\n",
        "HEAD /version HTTP/1.1\r\nConnection: close\r\n\r\n",
    ] {
        let mut client = service.client();
        client.send(request);
        let mut answer = String::new();
        use std::io::Read;
        client.stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("Connection: close\r\n"), "{answer}");
        assert_eq!(answer.ends_with('}'), !request.starts_with("HEAD"), "{answer}");
    }
    // The answer to HEAD has no body, and the next one follows at once.
    let mut client = service.client();
    client.send(
        "HEAD /machine-config HTTP/1.1\r\n\r\nHEAD /nothing HTTP/1.1\r\n\r\nHEAD /events HTTP/1.1\r\n\r\n",
    );
    let mut answers = String::new();
    use std::io::Read;
    client.stream.read_to_string(&mut answers).unwrap();
    let statuses: Vec<_> = answers.lines().filter(|line| line.starts_with("HTTP/1.1 ")).collect();
    assert_eq!(statuses, ["HTTP/1.1 200 ", "HTTP/1.1 400 ", "HTTP/1.1 200 "], "{answers}");
    assert!(!answers.contains('{'), "{answers}");
}

#[test]
fn a_body_may_come_in_chunks() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let head = "PUT /machine-config HTTP/1.1\r\nTransfer-Encoding: chunked\r\n";
    client.send(&format!(
        "{head}\r\n11\r\n{{\"vcpu_count\": 1,\r\n15\r\n\"mem_size_mib\": 77  }}\r\n0\r\n\r\n"
    ));
    assert_eq!(client.receive().status(), "204");
    assert_eq!(client.ok("GET", "/machine-config", "").json()["mem_size_mib"], 77);
    client.send(&format!("{head}Expect: 100-continue\r\n\r\n"));
    assert_eq!(client.receive().status(), "100");
    for byte in "24\r\n{\"vcpu_count\":1,\"mem_size_mib\":  78}\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n".bytes() {
        client.send(std::str::from_utf8(&[byte]).unwrap());
    }
    assert_eq!(client.receive().status(), "204");
    assert_eq!(client.receive().json()["state"], "Not started");
    assert_eq!(client.ok("GET", "/machine-config", "").json()["mem_size_mib"], 78);
    client.send(&format!("{head}\r\nc801\r\n"));
    let response = client.receive();
    assert!(response.body.contains("size 51201 is larger than the limit of 51200"), "{response:?}");
    assert_eq!(client.receive().head, "");
}

#[test]
fn a_client_that_never_reads_does_not_hold_up_the_others() {
    let service = Service::start(&[]);
    let mut deaf = service.client();
    deaf.stream.set_nonblocking(true).unwrap();
    let request = b"GET /vm/config HTTP/1.1\r\n\r\n".repeat(1000);
    use std::io::Write;
    // Until neither side takes more.
    let mut sent = 0;
    wait_for(|| {
        sent += deaf.stream.write(&request).unwrap_or(0);
        let full = deaf.stream.write(b"G").is_err();
        service.client().ok("GET", "/", "");
        full || sent > 8 << 20
    });
    assert!(sent < 8 << 20, "the service reads without end from a client that does not read");
    service.client().ok("GET", "/", "");
}

#[test]
fn the_socket_is_gone_when_the_guest_has_ended() {
    for (words, code) in
        [("case=serial end=7", 7), ("case=serial end=poweroff", 0), ("case=serial end=reset", 0)]
    {
        let service = Service::running(words);
        let Service { process, socket, folder } = service;
        let ended = process.end();
        assert_eq!(ended.code, Some(code), "{}", ended.text);
        assert!(!socket.exists(), "{words}");
        drop(folder);
    }
}

#[test]
fn a_signal_ends_the_service_and_removes_its_socket() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        let mut service = Service::running("hello");
        service.process.send(signal);
        let Service { process, socket, folder } = service;
        assert_eq!(process.end().code, Some(128 + signal));
        assert!(!socket.exists());
        drop(folder);
    }
}

#[test]
fn a_signal_at_the_start_leaves_no_socket_behind() {
    let folder = common::Folder::new();
    // Each comes at another moment after the socket is there, most of them before anything else is.
    for number in 0..60 {
        let socket = folder.path(&number.to_string());
        let mut process = common::Process::start(["serve", "--api-sock", socket.to_str().unwrap()]);
        while !socket.exists() {
            assert!(process.is_running());
            std::thread::yield_now();
        }
        process.send(libc::SIGTERM);
        let ended = process.end();
        assert_eq!(ended.code, Some(128 + libc::SIGTERM), "{number}: {}", ended.text);
        assert!(!socket.exists(), "{number}");
    }
}

#[test]
#[allow(unsafe_code)]
fn a_socket_path_of_somebody_who_hangs_is_refused_too() {
    use std::os::fd::AsRawFd;
    let folder = common::Folder::new();
    let socket = folder.path("s");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    // SAFETY: the call takes numbers. One client may wait, the next one does so in its connect.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    let _waiting = UnixStream::connect(&socket).unwrap();
    let ended = run(["serve", "--api-sock", socket.to_str().unwrap()]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.text.contains("another process serves it: choose another path"), "{}", ended.text);
    assert!(socket.exists());
}

#[test]
fn a_socket_path_that_is_taken_is_refused_with_advice() {
    let service = Service::start(&[]);
    let socket = service.socket.to_str().unwrap();
    let second = run(["serve", "--api-sock", socket]);
    assert_eq!(second.code, Some(1));
    assert!(second.text.contains("another process serves it: choose another path"), "{}", second.text);
    service.client().ok("GET", "/", "");

    // One that was left by a process that was killed.
    let mut killed = Service::start(&[]);
    killed.process.send(libc::SIGKILL);
    wait_for(|| UnixStream::connect(&killed.socket).is_err());
    let path = killed.socket.to_str().unwrap();
    let next = run(["serve", "--api-sock", path]);
    assert_eq!(next.code, Some(1));
    assert!(next.text.contains(&format!("has ended: remove it (`rm '{path}'`)")), "{}", next.text);
    assert!(killed.socket.exists(), "it is not ours to remove");

    let file = service.folder.write("file", "");
    let next = run(["serve", "--api-sock", file.to_str().unwrap()]);
    assert_eq!(next.code, Some(1));
    assert!(file.exists());

    let long = format!("/tmp/{}", "x".repeat(200));
    let next = run(["serve", "--api-sock", &long]);
    assert!(next.text.contains("too long for a socket"), "{}", next.text);
    let missing = run(["serve", "--api-sock", "/nonexistent/folder/s"]);
    assert!(missing.text.contains("there is no folder `/nonexistent/folder`: create it"), "{}", missing.text);
}

#[test]
fn a_config_file_starts_its_guest_at_once_with_and_without_an_api() {
    let folder = common::Folder::new();
    let config = json!({
        "boot-source": { "kernel_image_path": folder.firmware(), "boot_args": "case=serial end=9" },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 16 },
        "drives": [],
    });
    let file = folder.write("vm.json", config.to_string());
    let file = file.to_str().unwrap();
    let ended = run(["serve", "--no-api", "--config-file", file]);
    assert_eq!(ended.code, Some(9), "{}", ended.text);
    let socket = folder.path("s");
    let ended = run(["serve", "--api-sock", socket.to_str().unwrap(), "--config-file", file]);
    assert_eq!(ended.code, Some(9), "{}", ended.text);
    assert!(!socket.exists());
    let ended = run(["run", "--config", file, "--cmdline", "case=serial end=4"]);
    assert_eq!(ended.code, Some(4), "{}", ended.text);
}

#[test]
fn config_files_that_make_no_sense_are_refused() {
    let folder = common::Folder::new();
    let kernel = folder.firmware();
    let kernel = kernel.to_str().unwrap();
    let boot = format!(r#""boot-source": {{"kernel_image_path": "{kernel}"}}"#);
    for (text, expected) in [
        (String::new(), "EOF while parsing"),
        ("{".to_owned(), "EOF while parsing an object"),
        ("{}".to_owned(), "`boot-source` is missing"),
        (format!(r#"{{{boot}, "pmem": [{{"id": "a"}}]}}"#), "`pmem` is not implemented yet"),
        (format!(r#"{{{boot}, "drives": [{{"drive_id": "a"}}]}}"#), "missing field `is_root_device`"),
        (format!(r#"{{{boot}, "machine-config": {{"vcpu_count": 1}}}}"#), "missing field `mem_size_mib`"),
        (
            format!(r#"{{{boot}, "machine-config": {{"vcpu_count": 0, "mem_size_mib": 8}}}}"#),
            "number of vCPUs must be greater than 0",
        ),
        (
            r#"{"boot-source": {"kernel_image_path": "/none"}}"#.to_owned(),
            "open kernel `/none`: No such file",
        ),
    ] {
        let file = folder.write("vm.json", &text);
        let ended = run(["serve", "--no-api", "--config-file", file.to_str().unwrap()]);
        assert_eq!(ended.code, Some(1), "{text}: {}", ended.text);
        assert!(ended.text.contains(expected), "{text}: {}", ended.text);
    }
    let missing = run(["serve", "--no-api", "--config-file", "/nonexistent.json"]);
    assert!(missing.text.contains("read config file `/nonexistent.json`: No such file"), "{}", missing.text);
}

#[test]
fn a_failed_start_can_be_mended_and_tried_again() {
    let mut service = Service::start(&[]);
    let mut client = service.client();
    let not_a_kernel = service.folder.write("text", "this is not a kernel");
    client.ok("PUT", "/boot-source", &json!({ "kernel_image_path": not_a_kernel }).to_string());
    let fault = client.request("PUT", "/actions", START).fault();
    assert!(fault.starts_with("Start microvm error: load kernel `"), "{fault}");
    assert!(fault.contains("not a kernel image"), "{fault}");
    assert_eq!(client.ok("GET", "/", "").json()["state"], "Not started");
    service.boot_source("hello");
    client.ok("PUT", "/actions", START);
    service.process.expect("A");
}

#[test]
fn a_guest_that_floods_its_console_can_be_paused_though_nobody_reads() {
    let folder = common::Folder::new();
    let socket = folder.path("s");
    let mut command = std::process::Command::new(common::alula());
    command.args(["serve", "--api-sock", socket.to_str().unwrap()]);
    // A pipe that is never read from.
    let mut child = command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_for(|| UnixStream::connect(&socket).is_ok());
    let mut client = Client::connect(&socket);
    let body = json!({ "kernel_image_path": folder.firmware(), "boot_args": "flood" });
    client.ok("PUT", "/boot-source", &body.to_string());
    client.ok("PUT", "/actions", START);
    let pipe_is_full = || {
        let mut waiting = 0;
        use std::os::fd::AsRawFd;
        let fd = child.stdout.as_ref().unwrap().as_raw_fd();
        // SAFETY: FIONREAD writes one int.
        #[allow(unsafe_code)]
        unsafe {
            libc::ioctl(fd, libc::FIONREAD, &mut waiting)
        };
        waiting >= 60 << 10
    };
    wait_for(pipe_is_full);
    for state in ["Paused", "Resumed", "Paused"] {
        client.ok("PATCH", "/vm", &json!({ "state": state }).to_string());
    }
    let mut some = [0; 100];
    child.stdout.as_mut().unwrap().read_exact(&mut some).unwrap();
    assert!(some.starts_with(b"flood\n"), "{some:?}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_fifo_or_character_device_as_a_file_is_refused_at_once() {
    let mut service = Service::start(&[]);
    let mut client = service.client();
    let fifo = service.folder.path("fifo");
    output("mkfifo", &[fifo.to_str().unwrap()]);
    let kernel = service.folder.firmware();
    let disk = service.folder.write("disk", [0; 4096]);
    let drive = |path: &std::path::Path, read_only: bool| {
        json!({ "drive_id": "d", "is_root_device": false, "path_on_host": path, "is_read_only": read_only })
            .to_string()
    };
    for (path, kind) in [(fifo.as_path(), "a FIFO"), ("/dev/zero".as_ref(), "a character device")] {
        for (resource, body) in [
            ("/boot-source", json!({ "kernel_image_path": path }).to_string()),
            ("/boot-source", json!({ "kernel_image_path": kernel, "initrd_path": path }).to_string()),
            ("/drives/d", drive(path, true)),
            ("/drives/d", drive(path, false)),
        ] {
            let fault = client.request("PUT", resource, &body).fault();
            let expected = format!("`{}`: it is {kind}, a file or block device is needed", path.display());
            assert!(fault.contains(&expected), "{body}: {fault}");
        }
        let path = path.to_str().unwrap();
        for arguments in [vec!["check", path], vec!["serve", "--no-api", "--config-file", path]] {
            let refused = run(arguments);
            let expected = format!("read config file `{path}`: it is {kind}");
            assert!(refused.text.contains(&expected), "{}", refused.text);
        }
    }
    client.ok("PUT", "/drives/d", &drive(&disk, false));
    service.boot_source("hello");
    client.ok("PUT", "/actions", START);
    let patch = json!({ "drive_id": "d", "path_on_host": fifo }).to_string();
    let fault = client.request("PATCH", "/drives/d", &patch).fault();
    assert!(fault.contains("it is a FIFO"), "{fault}");
    service.process.send(libc::SIGTERM);
    service.process.end();
}

#[test]
fn what_was_replaced_or_is_not_needed_is_closed() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let pid = service.process.child.id();
    let folder = service.folder.0.to_string_lossy().into_owned();
    let open = || {
        let links = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let links = links.filter_map(|link| std::fs::read_link(link.unwrap().path()).ok());
        let names = links.filter_map(|link| Some(link.to_str()?.strip_prefix(&folder)?[1..].to_owned()));
        let mut names: Vec<_> = names.filter(|name| name != "api.socket").collect();
        names.sort();
        names
    };
    let kernel = service.folder.firmware();
    for number in 0..5 {
        let path = |name: &str| service.folder.write(&format!("{name}{number}"), alula::firmware::IMAGE);
        let source = json!({
            "kernel_image_path": path("kernel"), "initrd_path": path("initrd"), "boot_args": "hello"
        });
        client.ok("PUT", "/boot-source", &source.to_string());
        for read_only in [true, false] {
            let drive = json!({
                "drive_id": "d", "is_root_device": false, "path_on_host": path("disk"), "is_read_only": read_only
            });
            client.ok("PUT", "/drives/d", &drive.to_string());
        }
        client.ok("PUT", "/serial", &json!({ "serial_out_path": path("serial") }).to_string());
        let expected = ["disk", "initrd", "kernel", "serial"].map(|name| format!("{name}{number}"));
        assert_eq!(open(), expected);
    }
    // A change that is refused changes nothing: not the half of it that could be done.
    let refused = json!({ "kernel_image_path": kernel, "initrd_path": "/none" }).to_string();
    client.request("PUT", "/boot-source", &refused).fault();
    assert_eq!(open(), ["disk4", "initrd4", "kernel4", "serial4"]);
    service.boot_source("hello");
    client.ok("PUT", "/serial", "{}");
    assert_eq!(open(), ["disk4", "firmware"]);
    client.ok("PUT", "/actions", START);
    assert_eq!(open(), ["disk4"]);
}

#[test]
fn a_client_cannot_have_lines_written_to_our_descriptors() {
    /// The descriptor is closed when a program starts, so this process has opened it (proc(5): octal).
    const CLOEXEC: u32 = 0o2_000_000;
    let service = Service::start(&[]);
    let mut client = service.client();
    let drive = json!({
        "drive_id": "d", "is_root_device": false, "path_on_host": service.folder.write("disk", [7; 4096])
    });
    client.ok("PUT", "/drives/d", &drive.to_string());
    let pid = service.process.child.id();
    let is_ours = |number: &String| {
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        u32::from_str_radix(flags.trim(), 8).unwrap() & CLOEXEC != 0
    };
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let open = open.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let ours: Vec<String> = open.filter(is_ours).collect();
    assert!(ours.len() > 4, "a disk, signals, a socket and its client: {ours:?}");
    for number in ours {
        for name in ["fd:", "/dev/fd/", "/proc/self/fd/", "/proc/thread-self/fd/"] {
            let name = format!("{name}{number}");
            for (path, field) in
                [("/logger", "log_path"), ("/metrics", "metrics_path"), ("/serial", "serial_out_path")]
            {
                let fault = client.request("PUT", path, &json!({ field: name }).to_string()).fault();
                assert!(fault.contains("no descriptor of this number was inherited"), "{name}: {fault}");
            }
        }
    }
    assert_eq!(std::fs::read(service.folder.path("disk")).unwrap(), [7; 4096]);
}

#[test]
fn disks_and_interfaces_are_checked_where_they_are_named() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let disk = service.folder.write("disk", [0; 4096]);
    let mut fault =
        |path: &str, body: serde_json::Value| client.request("PUT", path, &body.to_string()).fault();
    let drive = |more: serde_json::Value| {
        let mut body = json!({ "drive_id": "a", "is_root_device": false, "path_on_host": disk });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    for (path, body, expected) in [
        ("/drives/b", drive(json!({})), "The id from the path does not match the id from the body!"),
        ("/drives/a", drive(json!({ "path_on_host": "/none" })), "open disk `a` `/none`: No such file"),
        (
            "/drives/a",
            drive(json!({ "path_on_host": "/dev" })),
            "it is a directory, a file or block device is needed",
        ),
        ("/drives/a", drive(json!({ "path_on_host": null })), "`path_on_host` is missing"),
        ("/drives/a", drive(json!({ "io_engine": "Quick" })), "unknown variant `Quick`"),
        ("/drives/a", drive(json!({ "rate_limiter": { "speed": 1 } })), "unknown field `speed`"),
        ("/drives/a", drive(json!({ "cache_type": "Fast" })), "unknown variant `Fast`"),
        ("/drives/a-b", drive(json!({ "drive_id": "a-b" })), "can only contain alphanumeric characters"),
        (
            "/network-interfaces/n",
            json!({ "iface_id": "m", "host_dev_name": "tap0" }),
            "The id from the path [n] does not match the id from the body [m]!",
        ),
        (
            "/network-interfaces/n",
            json!({ "iface_id": "n", "host_dev_name": "lo" }),
            "it is not a TAP interface: name one that is",
        ),
        (
            "/network-interfaces/n",
            json!({ "iface_id": "n", "host_dev_name": "lo", "guest_mac": "zz" }),
            "`zz` is not a MAC address",
        ),
        (
            "/network-interfaces/n",
            json!({ "iface_id": "n", "host_dev_name": "lo", "mtu": 10 }),
            "an `mtu` of 10 is too small",
        ),
        (
            "/network-interfaces/n",
            json!({ "iface_id": "n", "host_dev_name": "a-name-that-is-too-long" }),
            "interface names have 1 to 15 characters",
        ),
    ] {
        let fault = fault(path, body.clone());
        assert!(fault.contains(expected), "{path} {body}: {fault}");
    }
}

#[test]
fn two_root_devices_are_refused_and_one_can_be_replaced() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let disk = service.folder.write("disk", [0; 4096]);
    let body = |id: &str| json!({ "drive_id": id, "is_root_device": true, "path_on_host": disk }).to_string();
    client.ok("PUT", "/drives/a", &body("a"));
    client.ok("PUT", "/drives/a", &body("a"));
    let fault = client.request("PUT", "/drives/b", &body("b")).fault();
    assert!(fault.contains("A root block device already exists!"), "{fault}");
    let drives = client.ok("GET", "/vm/config", "").json()["drives"].clone();
    assert_eq!(drives.as_array().unwrap().len(), 1);
    assert_eq!((&drives[0]["drive_id"], &drives[0]["cache_type"]), (&json!("a"), &json!("Unsafe")));
    client.ok("PUT", "/entropy", "{}");
    assert_eq!(client.ok("GET", "/vm/config", "").json()["entropy"], json!({ "rate_limiter": null }));
}

#[test]
fn interfaces_need_a_tap_of_their_own() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    network::add_tap("tap1", "172.16.1.1/24");
    let service = Service::start(&[]);
    let mut client = service.client();
    let put = |client: &mut Client, id: &str, tap: &str, mac: &str| {
        let body = json!({ "iface_id": id, "host_dev_name": tap, "guest_mac": mac }).to_string();
        client.request("PUT", &format!("/network-interfaces/{id}"), &body)
    };
    assert_eq!(put(&mut client, "a", "tap0", "06:00:00:00:00:01").status(), "204");
    let fault = put(&mut client, "b", "tap1", "06:00:00:00:00:01").fault();
    assert!(fault.contains("The MAC address is already in use: 06:00:00:00:00:01"), "{fault}");
    assert_eq!(put(&mut client, "b", "tap1", "06:00:00:00:00:02").status(), "204");
    // Another process wants one of them.
    let other = Service::start(&[]);
    let fault = put(&mut other.client(), "a", "tap0", "06:00:00:00:00:03").fault();
    assert!(
        fault.contains("open TAP interface `tap0`") && fault.contains("another process uses it"),
        "{fault}"
    );
    let fault = put(&mut other.client(), "a", "lo", "06:00:00:00:00:03").fault();
    assert!(fault.contains("it is not a TAP interface"), "{fault}");
}

#[test]
fn a_running_microvm_keeps_the_devices_it_started_with() {
    network::enter();
    network::add_tap("tap0", "172.16.0.1/24");
    for (arguments, add, remove) in [
        (&[][..], "PCI is not enabled: adding a device", "PCI is not enabled: removing a device"),
        (
            &["--enable-pci"],
            "adding a device to a running microVM is not implemented yet.",
            "removing a device from a running microVM is not implemented yet.",
        ),
    ] {
        let service = Service::start(arguments);
        service.boot_source("hello");
        let mut client = service.client();
        let interface = json!({ "iface_id": "n", "host_dev_name": "tap0" }).to_string();
        client.ok("PUT", "/network-interfaces/n", &interface);
        let early = client.request("DELETE", "/network-interfaces/n", "").fault();
        assert!(early.contains("not supported before starting"), "{early}");
        client.ok("PUT", "/actions", START);
        let disk = service.folder.write("disk", [0; 4096]);
        let drive = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": disk }).to_string();
        for (path, body) in [("/drives/d", &drive), ("/network-interfaces/n", &interface)] {
            let fault = client.request("PUT", path, body).fault();
            assert!(fault.starts_with(add), "{fault}");
            let fault = client.request("DELETE", path, "").fault();
            assert!(fault.starts_with(remove), "{fault}");
        }
        assert!(client.request("PUT", "/entropy", "{}").fault().contains("not supported after starting"));
        // With the name alone there is nothing to change, and nothing wrong.
        client.ok("PATCH", "/network-interfaces/n", r#"{"iface_id": "n"}"#);
        for (path, body, expected) in [
            ("/network-interfaces/n", r#"{"iface_id": "m"}"#, "The id from the path [n] does not match"),
            ("/network-interfaces/n", r#"{"iface_id": "n", "mtu": 1500}"#, "unknown field `mtu`"),
            (
                "/network-interfaces/x",
                r#"{"iface_id": "x"}"#,
                "Network config error: there is no network interface `x`",
            ),
            ("/drives/x", r#"{"drive_id": "x"}"#, "Drive config error: there is no disk `x`"),
            ("/entropy", "{}", "Invalid request method and/or path: PATCH entropy."),
        ] {
            let fault = client.request("PATCH", path, body).fault();
            assert!(fault.contains(expected), "{path} {body}: {fault}");
        }
    }
}

#[test]
fn a_put_says_everything_and_a_patch_what_it_names() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let whole = |cpus: u16, mib: u64| {
        json!({
            "vcpu_count": cpus, "mem_size_mib": mib, "smt": false, "track_dirty_pages": false, "huge_pages": "None"
        })
    };
    assert_eq!(client.ok("GET", "/machine-config", "").json(), whole(1, 128));
    for (method, body, expected) in [
        ("PUT", r#"{"vcpu_count": 2, "mem_size_mib": 64, "cpu_template": "None"}"#, whole(2, 64)),
        ("PUT", r#"{"vcpu_count": 1, "mem_size_mib": 64, "smt": false}"#, whole(1, 64)),
        ("PATCH", r#"{"mem_size_mib": 65}"#, whole(1, 65)),
        ("PATCH", r#"{"vcpu_count": 4, "smt": null}"#, whole(4, 65)),
        ("PATCH", r#"{"cpu_template": "None"}"#, whole(4, 65)),
    ] {
        let response = client.ok(method, "/machine-config", body);
        assert_eq!(response.head.contains("Deprecation: true\r\n"), body.contains("cpu_template"), "{body}");
        assert_eq!(client.ok("GET", "/machine-config", "").json(), expected, "{method} {body}");
    }
    let disk = service.folder.write("disk", [0; 4096]);
    let put = |client: &mut Client, more: serde_json::Value| {
        let mut body = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": disk });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        client.ok("PUT", "/drives/d", &body.to_string());
        client.ok("GET", "/vm/config", "").json()["drives"][0].clone()
    };
    let drive =
        put(&mut client, json!({ "is_read_only": true, "cache_type": "Writeback", "partuuid": "1-2" }));
    assert_eq!(
        (&drive["is_read_only"], &drive["cache_type"], &drive["partuuid"]),
        (&json!(true), &json!("Writeback"), &json!("1-2"))
    );
    let drive = put(&mut client, json!({ "partuuid": null, "rate_limiter": null, "socket": null }));
    assert_eq!(
        (&drive["is_read_only"], &drive["cache_type"], &drive["io_engine"], &drive["partuuid"]),
        (&json!(false), &json!("Unsafe"), &json!("Sync"), &json!(null))
    );
}

/// How a fault begins that a body cannot be read by.
const SERDE: &str = "An error occurred when deserializing the json body of a request: ";

/// A request that is refused: method, path, body, and how the fault begins.
type Refused = (&'static str, &'static str, &'static str, String);

fn refused_machines() -> Vec<Refused> {
    let memory = "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured \
                  page size.";
    vec![
        ("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 0}"#, memory.to_owned()),
        (
            "PUT",
            "/machine-config",
            r#"{"vcpu_count":1,"mem_size_mib":3,"huge_pages":"2M"}"#,
            memory.to_owned(),
        ),
        ("PATCH", "/machine-config", r#"{"mem_size_mib": 0}"#, memory.to_owned()),
        ("PATCH", "/machine-config", "{}", "Empty PATCH request.".to_owned()),
        ("PATCH", "/machine-config", "", "Empty PATCH request.".to_owned()),
        (
            "PATCH",
            "/machine-config",
            r#"{"vcpu_count": 1, "vcpu_count": 2}"#,
            format!("{SERDE}duplicate field `vcpu_count`"),
        ),
        (
            "PUT",
            "/machine-config",
            r#"{"vcpu_count": 256.5}"#,
            format!("{SERDE}invalid type: floating point"),
        ),
        (
            "PUT",
            "/machine-config",
            r#"{"mem_size_mib": 1e40}"#,
            format!("{SERDE}invalid type: floating point"),
        ),
        ("PUT", "/machine-config", r#"{"mem_size_mib": -1}"#, format!("{SERDE}invalid value: integer `-1`")),
    ]
}

fn refused_devices_and_paths() -> Vec<Refused> {
    let id = "API Resource IDs can only contain alphanumeric characters and underscores.";
    vec![
        ("PUT", "/drives/a-b", "{}", id.to_owned()),
        ("PUT", "/network-interfaces/a%20b", "{}", id.to_owned()),
        ("PUT", "/drives/", "{}", "The ID cannot be empty.".to_owned()),
        ("PUT", "/network-interfaces", "{}", "The ID cannot be empty.".to_owned()),
        ("DELETE", "/drives/a", "{}", "Empty Delete request.".to_owned()),
        ("PUT", "/unknown", "", "Empty PUT request.".to_owned()),
        ("PATCH", "/unknown", "", "Empty PATCH request.".to_owned()),
        ("GET", "/unknown", "", "Invalid request method and/or path: GET unknown.".to_owned()),
        ("GET", "/unknown", "{}", "GET request cannot have a body.".to_owned()),
        (
            "GET",
            "/machine-config?x",
            "",
            "Invalid request method and/or path: GET machine-config?x.".to_owned(),
        ),
        (
            "PUT",
            "/machine-config?x",
            "{}",
            "Invalid request method and/or path: PUT machine-config?x.".to_owned(),
        ),
        ("GET", "/drives/a", "", "Invalid request method and/or path: GET drives.".to_owned()),
        ("PATCH", "/actions", "{}", "Invalid request method and/or path: PATCH actions.".to_owned()),
        ("PATCH", "/vm", r#"{"state": "Running"}"#, format!("{SERDE}unknown variant `Running`")),
        ("PUT", "/boot-source", r#"{"kernel_image_path": "/none"}"#, "Boot source error: ".to_owned()),
        ("PUT", "/entropy", r#"{"rate": 1}"#, format!("{SERDE}unknown field `rate`")),
        (
            "PUT",
            "/drives/a",
            r#"{"drive_id": "a", "is_root_device": true, "path_on_host": "/none"}"#,
            "Drive config error: ".to_owned(),
        ),
        (
            "PUT",
            "/network-interfaces/a",
            r#"{"iface_id": "a", "host_dev_name": "lo", "guest_mac": null}"#,
            "Network config error: ".to_owned(),
        ),
        (
            "PUT",
            "/network-interfaces/a",
            r#"{"iface_id": "a", "host_dev_name": "none9", "mtu": 70000}"#,
            format!("{SERDE}invalid value: integer `70000`, expected u16"),
        ),
    ]
}

#[test]
fn faults_are_those_that_clients_know() {
    let service = Service::start(&[]);
    let mut client = service.client();
    for (method, path, body, expected) in [refused_machines(), refused_devices_and_paths()].concat() {
        let response = client.request(method, path, body);
        assert!(response.fault().starts_with(&expected), "{method} {path} {body}: {response:?}");
        assert!(response.head.contains("\r\nContent-Type: application/json\r\n"), "{response:?}");
    }
    // Names may be of any script.
    let disk = service.folder.write("disk", [0; 4096]);
    let body = json!({ "drive_id": "плата_1", "is_root_device": false, "path_on_host": disk }).to_string();
    client.ok("PUT", "/drives/плата_1", &body);
}

#[test]
fn metadata_is_put_changed_and_limited() {
    let folder = common::Folder::new();
    let file = folder.write("metadata.json", r#"{ "a": { "b": 1 } }"#);
    let service = Service::start(&["--metadata", file.to_str().unwrap(), "--mmds-size-limit", "60"]);
    let mut client = service.client();
    let get = || service.client().ok("GET", "/mmds", "").json();
    assert_eq!(get(), json!({ "a": { "b": 1 } }));
    client.ok("PATCH", "/mmds", r#"{"a": {"b": null, "c": "x"}, "d": [1]}"#);
    assert_eq!(get(), json!({ "a": { "c": "x" }, "d": [1] }));
    client.ok("PUT", "/mmds", r#"{"a": 1, "a": 2}"#);
    assert_eq!(get(), json!({ "a": 2 }), "the last one wins");
    // Neither what is no object nor what is too large changes anything.
    for body in ["[]", "7", "null", r#""x""#, "{"] {
        for method in ["PUT", "PATCH"] {
            let fault = client.request(method, "/mmds", body).fault();
            assert!(fault.starts_with("An error occurred when deserializing the json body"), "{fault}");
        }
    }
    for method in ["PUT", "PATCH"] {
        let large = json!({ "large": "x".repeat(60) }).to_string();
        let response = client.request(method, "/mmds", &large);
        let fault = response.json()["fault_message"].as_str().unwrap().to_owned();
        assert_eq!(response.status(), "413");
        assert!(fault.starts_with("MMDS limit exceeded error: The MMDS data store has "), "{fault}");
    }
    assert_eq!(get(), json!({ "a": 2 }));
    let metrics = client.ok("GET", "/metrics", "").json();
    assert_eq!(metrics["put_api_requests"]["mmds_fails"], 6);
    assert_eq!(metrics["mmds"]["connections_created"], 0);
}

#[test]
fn the_metadata_service_answers_on_interfaces_that_exist() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let put = |client: &mut Client, body: &str| client.request("PUT", "/mmds/config", body);
    let fault = client.request("PATCH", "/mmds", "{}").fault();
    assert_eq!(fault, "MMDS error: The MMDS data store is not initialized.");
    assert_eq!(client.ok("GET", "/mmds", "").json(), json!({}));
    let error = "MMMDS config error: The list of network interface IDs";
    let fault = put(&mut client, r#"{"network_interfaces": ["a"]}"#).fault();
    assert!(fault.starts_with(&format!("{error} provided contains at least one ID")), "{fault}");
    client.ok("PUT", "/network-interfaces/a", r#"{"iface_id": "a", "user": {}}"#);
    let fault = put(&mut client, r#"{"network_interfaces": []}"#).fault();
    assert!(fault.starts_with(&format!("{error} that allow forwarding MMDS requests is empty")), "{fault}");
    let fault = put(&mut client, r#"{"network_interfaces": ["a"], "ipv4_address": "8.8.8.8"}"#).fault();
    assert!(fault.contains("The MMDS IPv4 address is not link local"), "{fault}");
    assert_eq!(client.ok("GET", "/vm/config", "").json()["mmds-config"], json!(null));
    let v1 = put(&mut client, r#"{"network_interfaces": ["a"]}"#);
    assert!(v1.status() == "204" && v1.head.contains("\r\nDeprecation: true"), "{v1:?}");
    let v2 = put(&mut client, r#"{"network_interfaces": ["a"], "version": "V2"}"#);
    assert!(v2.status() == "204" && !v2.head.contains("Deprecation"), "{v2:?}");
    let expected = json!({
        "version": "V2", "network_interfaces": ["a"], "ipv4_address": "169.254.169.254", "imds_compat": false
    });
    assert_eq!(client.ok("GET", "/vm/config", "").json()["mmds-config"], expected);
    drop(service);

    // After the start, of a microVM without the service: nobody will ask.
    let service = Service::running("hello");
    let mut client = service.client();
    for method in ["GET", "PUT", "PATCH"] {
        let fault = client.request(method, "/mmds", if method == "GET" { "" } else { "{}" }).fault();
        assert_eq!(fault, "MMDS error: The MMDS data store is not initialized.");
    }
    let fault = put(&mut client, r#"{"network_interfaces": ["a"]}"#).fault();
    assert_eq!(fault, "The requested operation is not supported after starting the microVM.");
}

#[test]
fn metadata_files_that_make_no_sense_are_refused() {
    let folder = common::Folder::new();
    let kernel = folder.firmware();
    let (kernel, long) = (kernel.to_str().unwrap(), json!({ "a": "x".repeat(51_200) }).to_string());
    for (text, expected) in
        [("[]", "invalid type: sequence"), ("{", "EOF while parsing"), (&long, "may have 51200")]
    {
        let file = folder.write("metadata.json", text);
        let ended = run(["run", kernel, "--net", "user", "--metadata", file.to_str().unwrap()]);
        assert!(ended.code == Some(125) && ended.text.contains(expected), "{text}: {}", ended.text);
        assert!(ended.text.contains("read metadata `"), "{}", ended.text);
    }
    let file = folder.write("metadata.json", "{}");
    let ended = run(["run", kernel, "--metadata", file.to_str().unwrap()]);
    assert!(ended.text.contains("there is none: add --net"), "{}", ended.text);
    let boot = format!(r#""boot-source": {{"kernel_image_path": "{kernel}"}}"#);
    let config =
        folder.write("vm.json", format!(r#"{{{boot}, "mmds-config": {{"network_interfaces": ["a"]}}}}"#));
    let ended = run(["check", config.to_str().unwrap()]);
    assert!(ended.text.contains("`mmds-config`: The list of network interface IDs"), "{}", ended.text);
}

#[test]
fn what_does_not_exist_yet_says_so() {
    let service = Service::start(&[]);
    let mut client = service.client();
    for (method, path) in [
        ("GET", "/balloon"),
        ("PUT", "/balloon"),
        ("PATCH", "/balloon"),
        ("GET", "/balloon/statistics"),
        ("PATCH", "/balloon/statistics"),
        ("PATCH", "/balloon/hinting/start"),
        ("PUT", "/pmem/p"),
        ("DELETE", "/pmem/p"),
        ("PUT", "/hotplug/memory"),
        ("GET", "/hotplug/memory"),
        ("PUT", "/snapshot/create"),
        ("PUT", "/snapshot/load"),
    ] {
        let body = if ["GET", "DELETE"].contains(&method) { "" } else { "{}" };
        let fault = client.request(method, path, body).fault();
        assert_eq!(fault, format!("`{method} {path}` is not implemented yet."));
    }
}

/// Bit 13 of ECX in leaf 1: CMPXCHG16B. A KVM that emulates all code of kernels gives back some bits of the
/// host's whatever it is told, but this one.
const CX16: u64 = 1 << 13;

#[test]
fn a_guests_cpus_are_changed_as_their_configuration_says() {
    let features = |service: &mut Service| {
        let text = service.process.expect("edx ");
        let hex = text.split("ecx 0x").nth(1).unwrap().split(',').next().unwrap();
        u64::from_str_radix(hex, 16).unwrap()
    };
    let start = |modifiers: &str| {
        let service = Service::start(&[]);
        let mut client = service.client();
        let body = format!(r#"{{"cpuid_modifiers": {modifiers}}}"#);
        let put = client.request("PUT", "/cpu-config", &body);
        if cfg!(not(target_arch = "x86_64")) && modifiers != "[]" {
            let expected = "CPU config error: `cpuid_modifiers`: aarch64 has no CPUID";
            assert_eq!(put.fault(), expected);
            return None;
        }
        assert_eq!(put.status(), "204", "{}", put.body);
        let told = client.ok("GET", "/vm/config", "").json();
        assert!(told["cpu-config"]["cpuid_modifiers"].is_array(), "{told}");
        service.boot_source("case=features end=idle");
        let started = client.request("PUT", "/actions", START);
        Some((service, started))
    };
    let change = |leaf: &str| {
        let bits = format!("0b0{}", "x".repeat(13));
        let register = format!(r#"{{"register": "ecx", "bitmap": "{bits}"}}"#);
        format!(r#"[{{"leaf": "{leaf}", "subleaf": "0x0", "flags": 0, "modifiers": [{register}]}}]"#)
    };
    let (mut as_is, started) = start("[]").unwrap();
    assert_eq!(started.status(), "204", "{}", started.body);
    if let Some((mut changed, started)) = start(&change("0x1")) {
        assert_eq!(started.status(), "204", "{}", started.body);
        let (before, after) = (features(&mut as_is), features(&mut changed));
        assert_eq!((before & CX16, before & !CX16), (CX16, after), "{before:#x} {after:#x}");
        let after_start = changed.client().request("PUT", "/cpu-config", "{}").fault();
        assert!(after_start.contains("not supported after starting the microVM"), "{after_start}");
        let (_, refused) = start(&change("0x7fff")).unwrap();
        let expected =
            "change leaf 0x7fff, subleaf 0x0 of CPUID (`cpuid_modifiers`): this host's KVM does not";
        assert!(refused.fault().contains(expected), "{}", refused.body);
    }
}

#[test]
fn a_config_file_has_the_changes_of_cpus_or_names_their_file() {
    let folder = common::Folder::new();
    let check = |cpu: &str| {
        let boot = json!({ "kernel_image_path": folder.firmware() });
        let file = folder.write("vm.json", format!(r#"{{"boot-source": {boot}, "cpu-config": {cpu}}}"#));
        let ended = run(["check", file.to_str().unwrap()]);
        (ended.code, ended.text)
    };
    let template = folder.write("cpu.json", r#"{"cpuid_modifiers": [], "msr_modifiers": []}"#);
    let wrong = folder.write("wrong.json", "{\n\"cpuid\": []}");
    for cpu in ["{}".to_owned(), "null".to_owned(), json!(template).to_string()] {
        let (code, text) = check(&cpu);
        assert_eq!(code, Some(0), "{cpu}: {text}");
    }
    for (cpu, expected) in [
        ("[]".to_owned(), "`cpu-config`: invalid length 0"),
        (r#""/nonexistent/cpu.json""#.to_owned(), "read CPU config `/nonexistent/cpu.json`: No such file"),
        (json!(wrong).to_string(), "wrong.json`: `cpu-config`: unknown field `cpuid`"),
        (r#"{"msr_modifiers": [{"addr": "0x1", "bitmap": "0b1"}]}"#.to_owned(), "`msr_modifiers` is not"),
    ] {
        let (code, text) = check(&cpu);
        assert!(code == Some(1) && text.contains(expected), "{cpu}: {code:?} {text}");
    }
}

#[test]
fn what_follows_something_that_is_not_http_is_lost() {
    let service = Service::start(&[]);
    let mut client = service.client();
    // Of pipelined requests, those before the one that is not HTTP are answered.
    client.send("GET / HTTP/1.1\r\n\r\nGARBAGE\r\n\r\nGET / HTTP/1.1\r\n\r\n");
    assert_eq!(client.receive().status(), "200");
    assert_eq!(client.receive().status(), "400");
    assert_eq!(client.receive().head, "");
}

#[test]
fn called_firecracker_it_has_that_monitors_command_line_and_limits() {
    let folder = common::Folder::new();
    let firecracker = common::called("firecracker", &folder);
    let output = |program: &std::path::Path, arguments: &[&str]| {
        std::process::Command::new(program).args(arguments).output().unwrap()
    };
    let version = output(&firecracker, &["--version"]);
    assert_eq!(
        (version.status.code(), version.stdout.as_slice()),
        (Some(0), &b"Firecracker v1.17.0\n\n"[..])
    );
    assert_eq!(output(&common::called("jailer", &folder), &["--version"]).stdout, b"Jailer v1.17.0\n\n");
    let editor = common::called("snapshot-editor", &folder);
    assert_eq!(output(&editor, &["--version"]).stdout, b"snapshot-editor 1.17.0\n");
    let refused = output(&editor, &["edit-memory"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("only --version is implemented yet"));
    assert_eq!(output(&firecracker, &["--dance"]).status.code(), Some(153));
    assert_eq!(output(&firecracker, &["--id", "a_b"]).status.code(), Some(153));
    assert_eq!(output(&firecracker, &["--no-api"]).status.code(), Some(153));
    assert_eq!(output(&firecracker, &["--no-api", "--config-file", "/none"]).status.code(), Some(1));

    let socket = folder.path("s");
    let mut command = std::process::Command::new(&firecracker);
    command.args(["--id", "vm-7", "--no-seccomp", "--start-time-us", "1", "--api-sock"]).arg(&socket);
    let _process = common::Process::spawn(command);
    wait_for(|| UnixStream::connect(&socket).is_ok());
    let mut client = Client::connect(&socket);
    assert_eq!(client.ok("GET", "/", "").json()["id"], "vm-7");
    let fault = client.request("PUT", "/machine-config", r#"{"vcpu_count": 33, "mem_size_mib": 64}"#).fault();
    let expected = "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or \
                    an even number if SMT is enabled.";
    assert!(fault.starts_with(expected), "{fault}");
    client.ok("PUT", "/machine-config", r#"{"vcpu_count": 32, "mem_size_mib": 64}"#);

    let config = json!({
        "boot-source": { "kernel_image_path": folder.firmware(), "boot_args": "case=serial end=9" },
        "machine-config": { "vcpu_count": 33, "mem_size_mib": 16 },
        "drives": [],
    });
    let file = folder.write("vm.json", config.to_string());
    let refused = output(&firecracker, &["--no-api", "--config-file", file.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(1));
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        text.contains("vm.json`: `machine-config`: The number of vCPUs") && text.contains("less than 32")
    );
    // Ourselves, we only have the host's limit.
    let ended = run(["serve", "--no-api", "--config-file", file.to_str().unwrap()]);
    assert_eq!(ended.code, Some(9), "{}", ended.text);
}

#[test]
fn one_image_has_one_writer() {
    let folder = common::Folder::new();
    let disk = folder.write("disk", [0; 4096]);
    let disk = disk.to_str().unwrap();
    let mut writer = common::Process::start(["run", "--disk", disk, "--cmdline", "hello"]);
    writer.expect("A");
    let pid = writer.child.id();
    for options in ["", ",ro"] {
        let second = run(["run", "--disk", &format!("{disk}{options}"), "--cmdline", "hello"]);
        assert_eq!(second.code, Some(125), "{}", second.text);
        assert!(second.text.contains(&format!("it is in use by process {pid} (alula)")), "{}", second.text);
    }
    writer.send(libc::SIGTERM);
    writer.end();
    // Readers share it.
    let read_only = format!("{disk},ro");
    let mut reader = common::Process::start(["run", "--disk", &read_only, "--cmdline", "hello"]);
    reader.expect("A");
    let second = run(["run", "--disk", &read_only, "--cmdline", "case=serial"]);
    assert_eq!(second.code, Some(0), "{}", second.text);
    // Empty files are placeholders, which many may share.
    let empty = folder.write("empty", "");
    let mut first = common::Process::start(["run", "--disk", empty.to_str().unwrap(), "--cmdline", "hello"]);
    first.expect("A");
    let second = run(["run", "--disk", empty.to_str().unwrap(), "--cmdline", "case=serial"]);
    assert_eq!(second.code, Some(0), "{}", second.text);
}

#[test]
fn two_disks_over_one_file_are_told_of_each_other() {
    let folder = common::Folder::new();
    let file = folder.write("disk", [0; 4096]);
    let disk = file.to_str().unwrap();
    let events = folder.path("events");
    let two = |first: &str, second: &str| {
        let (first, second) = (format!("{disk}{first}"), format!("{disk}{second}"));
        let _ = std::fs::remove_file(&events);
        let events = events.to_str().unwrap();
        run(["run", "--disk", &first, "--disk", &second, "--cmdline", "case=serial", "--events", events])
    };
    for (first, second) in [("", ""), ("", ",ro"), (",ro", ""), (",lock=off", "")] {
        let refused = two(first, second);
        assert_eq!(refused.code, Some(125), "{}", refused.text);
        let expected =
            format!("use disk image `{disk}`: it is in use by another disk of this microVM: stop that");
        assert!(refused.text.contains(&expected), "{}", refused.text);
    }
    for (first, second, warned) in
        [("", ",lock=off", true), ("", ",ro,lock=off", true), (",ro", ",ro", false)]
    {
        let shared = two(first, second);
        assert_eq!(shared.code, Some(0), "{}", shared.text);
        let warning =
            "it is in use by another disk of this microVM, and used all the same: its content may be damaged";
        assert_eq!(shared.text.contains(warning), warned, "{}", shared.text);
        let told = std::fs::read_to_string(&events).unwrap();
        assert_eq!(told.contains(r#""event":"disk_shared""#), warned, "{told}");
    }
    // Called as Firecracker, which takes no locks, we only say it: within a microVM and between two.
    let mut writer = common::Process::start(["run", "--disk", disk, "--cmdline", "hello"]);
    writer.expect("A");
    let socket = folder.path("s");
    let mut command = std::process::Command::new(common::called("firecracker", &folder));
    command.arg("--api-sock").arg(&socket);
    let mut process = common::Process::spawn(command);
    wait_for(|| UnixStream::connect(&socket).is_ok());
    let mut client = Client::connect(&socket);
    let source = json!({ "kernel_image_path": folder.firmware(), "boot_args": "hello" });
    client.ok("PUT", "/boot-source", &source.to_string());
    for id in ["a", "b"] {
        let drive = json!({ "drive_id": id, "is_root_device": false, "path_on_host": disk });
        client.ok("PUT", &format!("/drives/{id}"), &drive.to_string());
    }
    client.ok("PUT", "/actions", START);
    let user = format!("it is in use by process {} (alula), and used all the same", writer.child.id());
    process.expect(&format!("disk `a` `{disk}`: {user}"));
    process.expect(&format!("disk `b` `{disk}`: {user}"));
}

#[test]
fn an_image_is_replaced_only_by_one_that_can_be_had() {
    let service = Service::start(&[]);
    service.boot_source("hello");
    let mut client = service.client();
    let disk = service.folder.write("disk", [0; 4096]);
    let drive = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": disk });
    let patch = |path: &str| json!({ "drive_id": "d", "path_on_host": path }).to_string();
    client.ok("PUT", "/drives/d", &drive.to_string());
    let early = client.request("PATCH", "/drives/d", &patch("/none")).fault();
    assert!(early.contains("not supported before starting"), "{early}");
    client.ok("PUT", "/actions", START);
    for (body, expected) in [
        (json!({ "drive_id": "d" }).to_string(), "nothing is to be changed: give `path_on_host`"),
        (patch("/none"), "open disk `d` `/none`: No such file"),
        (json!({ "drive_id": "d", "rate_limiter": { "speed": 1 } }).to_string(), "unknown field `speed`"),
    ] {
        let fault = client.request("PATCH", "/drives/d", &body).fault();
        assert!(fault.contains(expected), "{body}: {fault}");
    }
    // The same image again: it may have another size now.
    client.ok("PATCH", "/drives/d", &patch(disk.to_str().unwrap()));
    let other = service.folder.write("other", [0; 8192]);
    client.ok("PATCH", "/drives/d", &patch(other.to_str().unwrap()));
    assert_eq!(client.ok("GET", "/vm/config", "").json()["drives"][0]["path_on_host"], json!(other));
    // The first image is free again, the other one is taken.
    let first = run(["run", "--disk", disk.to_str().unwrap(), "--cmdline", "case=serial"]);
    assert_eq!(first.code, Some(0), "{}", first.text);
    let second = run(["run", "--disk", other.to_str().unwrap(), "--cmdline", "case=serial"]);
    assert!(second.text.contains("it is in use by process"), "{}", second.text);
}

#[test]
fn called_firecracker_it_is_that_monitor_alone() {
    let folder = common::Folder::new();
    let firecracker = common::called("firecracker", &folder);
    let socket = folder.path("s");
    let mut command = std::process::Command::new(&firecracker);
    command.args(["--id", "vm-8", "--api-sock"]).arg(&socket);
    let mut process = common::Process::spawn(command);
    wait_for(|| UnixStream::connect(&socket).is_ok());
    let mut client = Client::connect(&socket);
    let disk = folder.write("disk", [0; 4096]);
    let drive = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": disk, "format": "raw" });
    let fault = client.request("PUT", "/drives/d", &drive.to_string()).fault();
    assert!(fault.contains("unknown field `format`, expected one of `drive_id`, "), "{fault}");
    let shutdown = r#"{"action_type": "Shutdown"}"#;
    let fault = client.request("PUT", "/actions", shutdown).fault();
    assert!(fault.contains("unknown variant `Shutdown`"), "{fault}");
    // A guest that has halted stays, and may be paused and resumed; its readers of events know.
    let mut reader = Client::connect(&socket);
    reader.send("GET /events HTTP/1.1\r\n\r\n");
    let body = json!({ "kernel_image_path": folder.firmware(), "boot_args": "case=serial end=halt" });
    client.ok("PUT", "/boot-source", &body.to_string());
    client.ok("PUT", "/actions", START);
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(&reader.stream));
    assert!(lines.any(|line| line.unwrap().contains(r#""event":"halted""#)));
    for state in ["Paused", "Resumed"] {
        client.ok("PATCH", "/vm", &json!({ "state": state }).to_string());
    }
    assert_eq!(client.ok("GET", "/", "").json()["state"], "Running");
    assert!(process.is_running() && socket.exists());
    for (more, expected) in [
        (json!({}), "missing field `drives`"),
        (json!({ "drives": [drive] }), "`drives`: unknown field `format`, expected one of"),
    ] {
        let mut config = json!({ "boot-source": body });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let file = folder.write("vm.json", config.to_string());
        let mut command = std::process::Command::new(&firecracker);
        command.args(["--no-api", "--config-file"]).arg(&file);
        let ended = common::Process::spawn(command).end();
        assert_eq!(ended.code, Some(1), "{}", ended.text);
        assert!(ended.text.contains(expected), "{}", ended.text);
    }
}

#[test]
fn the_configuration_is_told_whole_with_the_root_drive_first() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let disk = service.folder.write("disk", [0; 4096]);
    let put = |client: &mut Client, id: &str, more: serde_json::Value| {
        let mut body = json!({ "drive_id": id, "is_root_device": false, "path_on_host": disk });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        client.ok("PUT", &format!("/drives/{id}"), &body.to_string());
    };
    let bucket = |size: u64| json!({ "size": size, "refill_time": 5 });
    let limits = json!({ "bandwidth": bucket(7), "ops": bucket(0) });
    put(&mut client, "data", json!({ "rate_limiter": limits, "is_read_only": null, "io_engine": null }));
    put(&mut client, "root", json!({ "is_root_device": true, "partuuid": "1-2" }));
    let drives = client.ok("GET", "/vm/config/", "").json()["drives"].clone();
    let drive = |id: &str, is_root: bool, partuuid: Option<&str>, rate_limiter: serde_json::Value| {
        json!({
            "drive_id": id, "partuuid": partuuid, "is_root_device": is_root, "cache_type": "Unsafe",
            "is_read_only": false, "path_on_host": disk, "rate_limiter": rate_limiter, "io_engine": "Sync",
            "socket": null
        })
    };
    let told = json!({ "bandwidth": { "size": 7, "one_time_burst": null, "refill_time": 5 }, "ops": null });
    let expected = json!([drive("root", true, Some("1-2"), json!(null)), drive("data", false, None, told)]);
    assert_eq!(drives, expected);
    assert_eq!(client.ok("GET", "/version/more", "").json()["firecracker_version"], "1.17.0");
}
