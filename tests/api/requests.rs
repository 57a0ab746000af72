//! HTTP on the API's socket: connections, bodies, and clients that do not behave.

use super::*;

#[test]
fn bad_bodies_get_a_fault_that_names_the_field() {
    let service = Service::start(&[]);
    let mut client = service.client();
    let serde = "An error occurred when deserializing the json body of a request: ";
    let foreign = if cfg!(target_arch = "x86_64") { "V1N1" } else { "T2" };
    for (method, path, body, expected) in [
        ("PUT", "/machine-config", r#"{"vcpu_count": 1}"#, format!("{serde}missing field `mem_size_mib`")),
        (
            "PUT",
            "/machine-config",
            r#"{"vcpu_count": "1"}"#,
            format!("{serde}`vcpu_count`: expected a whole number, found the text"),
        ),
        ("PUT", "/machine-config", r#"{"vcpus": 1}"#, format!("{serde}unknown field `vcpus`")),
        ("PUT", "/machine-config", r#"{"vcpu_count": 1"#, format!("{serde}the text ends within an object")),
        ("PUT", "/machine-config", "", "Empty PUT request.".to_owned()),
        (
            "PUT",
            "/actions",
            r#"{"action_type": "Dance"}"#,
            format!("{serde}`action_type`: unknown value `Dance`"),
        ),
        ("GET", "/machine-config", "{}", "GET request cannot have a body.".to_owned()),
        ("PUT", "/teapot/7", "{}", "Invalid request method and/or path: PUT teapot.".to_owned()),
        ("PUT", "/hotplug/memory", "{}", format!("{serde}missing field `total_size_mib`")),
        ("PUT", "/balloon", "{}", format!("{serde}missing field `amount_mib`")),
        (
            "PUT",
            "/machine-config",
            &json!({ "vcpu_count": 1, "mem_size_mib": 8, "cpu_template": foreign }).to_string(),
            format!("Machine config error: `cpu_template`: {} has no", std::env::consts::ARCH),
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
fn what_follows_something_that_is_not_http_is_lost() {
    let service = Service::start(&[]);
    let mut client = service.client();
    // Of pipelined requests, those before the one that is not HTTP are answered.
    client.send("GET / HTTP/1.1\r\n\r\nGARBAGE\r\n\r\nGET / HTTP/1.1\r\n\r\n");
    assert_eq!(client.receive().status(), "200");
    assert_eq!(client.receive().status(), "400");
    assert_eq!(client.receive().head, "");
}
