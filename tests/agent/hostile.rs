//! Clients that do what no client should, and too many of them.

use super::*;

#[test]
fn what_a_hostile_client_sends_ends_its_connection_only() {
    let agent = Agent::start();
    let before = agent.descriptors();
    let cat = json!({"protocol": 1, "ask": {"run": {"argv": ["cat"]}}}).to_string();
    let request = |text: &str| {
        let mut bytes = Vec::new();
        put(&mut bytes, Type::Request, text.as_bytes());
        bytes
    };
    let after = |bytes: &[u8]| [&request(&cat), bytes].concat();
    let input = [&[2, 0, 0, 1][..], &[0; CONTENT_MAX]].concat();
    let other = |ask: &str| request(&format!(r#"{{"protocol": 1, "ask": {ask}}}"#));
    for (bytes, told) in [
        (vec![1, 255, 255, 255], "0 a frame of type 1 and 16777215 bytes"),
        (vec![2, 1, 0, 1], "0 a frame of type 2 and 65537 bytes: it has 0 to 65536"),
        (vec![77, 0, 0, 0], "0 a frame of the unknown type 77"),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "0 a frame of the unknown type 71"),
        (vec![3, 0, 0, 0], "0 a frame before the request was not expected"),
        (vec![4, 1, 0, 0, 9], "0 a frame before the request was not expected"),
        (request(""), "0 read the request: EOF"),
        (request("[[[[[["), "0 read the request: "),
        (request(&"[".repeat(200_000)), "0 read the request: "),
        (request(r#"{"protocol": 2, "ask": {"later": 1}}"#), "0 the client speaks version 2"),
        (other(r#"{"dance": {}}"#), "0 read the request: unknown variant `dance`"),
        (other(r#"{"run": {"argv": ["a"], "size": 99}}"#), "0 read the request: unknown field `size`"),
        (other(r#"{"run": {"argv": ["a\u0000b"]}}"#), "0 start `a\0b`: nul byte"),
        (other(r#"{"run": {"argv": ["true"], "env": ["A\u0000=1"]}}"#), "0 start `true`: nul byte"),
        (after(&request(&cat)), "0 a frame that a client does not send"),
        (after(&[130, 0, 0, 0]), "0 a frame that a client does not send"),
        (after(&[133, 2, 0, 0, 0, 0]), "0 a frame that a client does not send"),
        (after(&[3, 0, 0, 0, 2, 0, 0, 0]), "0 input after its end"),
        (after(&[4, 0, 0, 0]), "0 a frame of type 4 and 0 bytes: it has 1 to 1"),
        (after(&[5, 3, 0, 0]), "0 a frame of type 5 and 3 bytes"),
    ] {
        let mut client = agent.connect();
        client.stream.write_all(&bytes).unwrap();
        let answer = client.answer();
        assert!(answer.failed.starts_with(told), "{:?}: {answer:?}", &bytes[..bytes.len().min(60)]);
    }
    // More input than may be on the way, to one that reads none of it.
    let mut client = agent.run(&["sleep", "100"]);
    for _ in 0..INPUT_WINDOW / CONTENT_MAX + 2 {
        // The agent may have closed the connection already.
        let _ = client.stream.write_all(&input);
    }
    assert!(client.answer().failed.starts_with("0 more input than the window has room for"));
    // Some say nothing, some begin, some do not wait for the end.
    let idle: Vec<_> = (0..150).map(|_| agent.connect()).collect();
    for client in &idle {
        (&client.stream).write_all(&[1, 200, 0]).unwrap();
    }
    for _ in 0..20 {
        drop(agent.shell("yes"));
    }
    assert_eq!(agent.shell("echo alive").answer().output, b"alive\n");
    drop(idle);
    agent.has_at_most(before);
    assert!(agent.resident_kib() < 8 << 10, "{} KiB", agent.resident_kib());
}

#[test]
fn more_clients_than_places_wait_for_theirs() {
    let agent = Agent::start();
    let mut waiting: Vec<_> = (0..210).map(|_| agent.shell("read line; echo $line")).collect();
    waiting.iter_mut().for_each(|client| client.send(Type::Input, b"x\n"));
    for client in waiting {
        assert_eq!(client.answer().output, b"x\n");
    }
}

#[test]
fn a_client_that_stops_reading_or_goes_costs_nothing() {
    let agent = Agent::start();
    let mut client = agent.shell("trap '' PIPE; echo $$; exec yes");
    let (kind, _) = client.next().unwrap();
    assert_eq!(kind, Type::Greeting);
    let (_, content) = client.next().unwrap();
    let text = String::from_utf8_lossy(&content).into_owned();
    let pid = text.lines().next().unwrap().to_owned();
    let before = agent.resident_kib();
    for _ in 0..20 {
        assert_eq!(agent.shell("echo beside").answer().exited, [0, 0]);
    }
    assert!(agent.resident_kib() < before + 1024, "{} KiB, {before} before", agent.resident_kib());
    drop(client);
    let deadline = Instant::now() + PATIENCE;
    while Path::new("/proc").join(&pid).exists() {
        assert!(Instant::now() < deadline, "a hang-up does not reach the process");
        std::thread::yield_now();
    }
}

/// The children of a process, each with its state (proc_pid_stat(5)).
fn children(parent: u32) -> Vec<(u32, char)> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    // A process can go while it is looked at.
    let stats = entries.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
    let parse = |stat: String| {
        let pid = stat.split(' ').next().unwrap().parse().unwrap();
        // Its name, in parentheses, can be anything.
        let mut rest = stat.rsplit_once(") ").unwrap().1.split(' ');
        let state = rest.next().unwrap().chars().next().unwrap();
        (rest.next() == Some(&parent.to_string())).then_some((pid, state))
    };
    stats.filter_map(parse).collect()
}

#[test]
fn processes_that_have_ended_are_reaped_however_they_end() {
    let agent = Agent::start();
    let pid = agent.process.child.id();
    let mut stays = agent.run(&["cat"]);
    stays.send(Type::Input, b"up");
    stays.expect("up");
    // By themselves, by a signal, without a client, and without output to wait for.
    let ended: Vec<_> = (0..20).map(|_| agent.run(&["true"])).collect();
    let killed: Vec<_> = (0..20).map(|_| agent.shell("kill -9 $$")).collect();
    (0..20).for_each(|_| drop(agent.run(&["sleep", "1000"])));
    (0..20).for_each(|_| drop(agent.shell("exec sleep 1000 >&- 2>&-")));
    ended.into_iter().chain(killed).for_each(|client| assert_eq!(client.answer().exited.len(), 2));
    let deadline = Instant::now() + PATIENCE;
    let left = loop {
        let left = children(pid);
        if left.len() == 1 {
            break left;
        }
        assert!(Instant::now() < deadline, "its children: {left:?}");
        std::thread::yield_now();
    };
    assert_ne!(left[0].1, 'Z', "the one that has not ended is there still");
    stays.send(Type::InputEnd, b"");
    assert_eq!(stays.answer().exited, [0, 0]);
}
