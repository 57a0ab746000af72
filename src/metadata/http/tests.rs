use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::metadata::{Config, store::Store};

fn service(version: Version, imds_compat: bool) -> Service {
    let store = Store::new(10_000);
    let data = json!({
        "latest": { "name": "a b", "count": 7, "list": ["x", { "y": "z" }], "deep": { "er": { "e": "st" } } }
    });
    store.put(data.as_object().unwrap().clone()).unwrap();
    Service {
        config: Config { version, imds_compat, ..Config::on(vec!["eth0".to_owned()]) },
        store: Arc::new(store),
    }
}

const NOW: Duration = Duration::from_secs(100);

/// The answer to a whole request: its status, its head, its body.
fn ask_at(now: Duration, service: &Service, request: &str) -> (u16, String, String) {
    let request = request.replace('\n', "\r\n") + "\r\n\r\n";
    let Progress::Answered { taken, response, .. } =
        answer(service, &Tokens::new([7; 16]), now, request.as_bytes())
    else {
        panic!("not complete: {request}")
    };
    assert_eq!(taken, request.len());
    let response = String::from_utf8(response).unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&format!("\r\nContent-Length: {}", body.len())), "{response}");
    (head.split(' ').nth(1).unwrap().parse().unwrap(), head.to_owned(), body.to_owned())
}

fn ask(service: &Service, request: &str) -> (u16, String) {
    let (status, _, body) = ask_at(NOW, service, request);
    (status, body)
}

#[test]
fn values_are_told_as_text_or_as_json() {
    let service = service(Version::V1, false);
    let json = "\nAccept: application/json";
    for (path, accept, expected) in [
        ("/", "", (200, "latest/")),
        ("/latest/", "", (200, "count\ndeep/\nlist\nname")),
        ("/latest/name", "", (200, "a b")),
        ("/latest/name", "\nAccept: */*", (200, "a b")),
        ("http://169.254.169.254/latest/name?x=1", "", (200, "a b")),
        ("/latest/deep/er", "", (200, "e")),
        ("/latest/list/1/y", "", (200, "z")),
        (
            "/latest/count",
            "",
            (501, "Cannot retrieve value. The value has an unsupported type: /latest/count."),
        ),
        ("/latest/name", json, (200, r#""a b""#)),
        ("/latest/count", "\naccept: text/plain, application/json;q=0.5", (200, "7")),
        ("/latest/deep", json, (200, r#"{"er":{"e":"st"}}"#)),
        ("/nothing/here", json, (404, "Resource not found: /nothing/here.")),
        ("*", "", (400, "Invalid URI.")),
    ] {
        let (status, head, body) = ask_at(NOW, &service, &format!("GET {path} HTTP/1.1\nHost: x{accept}"));
        assert_eq!((status, body.as_str()), expected, "{path}{accept}");
        let is_json = head.contains("\r\nContent-Type: application/json\r\n");
        assert_eq!(is_json, accept.contains("json") && status == 200, "{head}");
    }
    let service = self::service(Version::V1, true);
    let name = ask(&service, &format!("GET /latest/name HTTP/1.1{json}"));
    assert_eq!(name, (200, "a b".to_owned()), "as EC2 does it, nobody is asked");
}

#[test]
fn version_2_answers_only_with_a_token_that_holds() {
    let service = service(Version::V2, false);
    for (ttl, name) in [("1", TTL[0]), ("21600", TTL[1])] {
        let (status, head, token) =
            ask_at(NOW, &service, &format!("PUT /latest/api/token HTTP/1.1\n{name}: {ttl}"));
        assert!(status == 200 && head.contains(&format!("\r\n{}: {ttl}\r\n", TTL[0])), "{head}");
        let end = NOW + Duration::from_secs(ttl.parse().unwrap());
        for header in TOKEN {
            let request = format!("GET /latest/name HTTP/1.1\n{header}: {token}");
            assert_eq!(ask_at(NOW, &service, &request).0, 200, "{header}");
            let (status, _, body) = ask_at(end, &service, &request);
            assert_eq!((status, body.as_str()), (401, "MMDS token not valid."), "it has expired");
        }
        // A token of another interface, whose key is another.
        let other = Tokens::new([8; 16]).issue(60, NOW);
        for wrong in [other.as_str(), "", "x", &token[1..]] {
            let (status, body) = ask(&service, &format!("GET / HTTP/1.1\n{}: {wrong}", TOKEN[0]));
            assert_eq!((status, body.as_str()), (401, "MMDS token not valid."), "{wrong}");
        }
    }
    let (status, body) = ask(&service, "GET / HTTP/1.1");
    assert!(status == 401 && body.starts_with("No MMDS token provided. Use `X-metadata-token` or"), "{body}");
    // Version 1 issues tokens too, and looks at none.
    let service = self::service(Version::V1, false);
    assert_eq!(ask(&service, &format!("PUT /latest/api/token HTTP/1.1\n{}: 9", TTL[0])).0, 200);
    assert_eq!(ask(&service, &format!("GET / HTTP/1.1\n{}: x", TOKEN[0])).0, 200);
}

#[test]
fn requests_for_tokens_say_how_long_and_come_from_here() {
    let service = service(Version::V2, false);
    let ttl = TTL[0];
    for (request, expected) in [
        ("PUT /latest/api/token HTTP/1.1".to_owned(), (400, "Token time to live value not found.")),
        (
            format!("PUT /latest/api/token HTTP/1.1\n{ttl}: 0"),
            (400, "Invalid time to live value provided for token: 0."),
        ),
        (format!("PUT /latest/api/token HTTP/1.1\n{ttl}: 21601"), (400, "Invalid time to live value")),
        (format!("PUT /latest/api/token HTTP/1.1\n{ttl}: -1"), (400, "Invalid time to live value")),
        (
            format!("PUT /latest/api/token HTTP/1.1\n{ttl}: {}", "9".repeat(100)),
            (400, "Invalid time to live value"),
        ),
        (format!("PUT /latest/name HTTP/1.1\n{ttl}: 60"), (404, "Resource not found: /latest/name.")),
        (format!("PUT /latest/api/token HTTP/1.1\n{ttl}: 60\nx-forwarded-for: a"), (400, "Invalid header.")),
        ("POST / HTTP/1.1".to_owned(), (405, "Not allowed HTTP method.")),
        ("DELETE /latest HTTP/1.1".to_owned(), (405, "Not allowed HTTP method.")),
    ] {
        let (status, body) = ask(&service, &request);
        assert!(status == expected.0 && body.starts_with(expected.1), "{request}: {status} {body}");
    }
    assert!(ask_at(NOW, &service, "POST / HTTP/1.1").1.contains("\r\nAllow: GET, PUT\r\n"));
}

#[test]
fn requests_may_be_cut_anywhere_and_follow_each_other() {
    let (service, tokens) = (service(Version::V1, false), Tokens::new([7; 16]));
    let answer = |input: &[u8]| super::answer(&service, &tokens, NOW, input);
    let one =
        b"PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 9\r\nContent-Length: 3\r\n\r\nabc";
    for cut in 0..one.len() {
        assert_eq!(answer(&one[..cut]), Progress::Incomplete, "{cut}");
    }
    let two = [&one[..], b"GET / HTTP/1.0\r\n\r\n"].concat();
    let Progress::Answered { taken, closes, .. } = answer(&two) else { panic!("not complete") };
    assert_eq!((taken, closes), (one.len(), false));
    for (request, expected) in [
        ("GET / HTTP/1.0\r\n\r\n", true),
        ("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", false),
        ("GET / HTTP/1.1\r\nconnection: Close\r\n\r\n", true),
    ] {
        assert!(
            matches!(answer(request.as_bytes()), Progress::Answered { closes, .. } if closes == expected)
        );
    }
}

#[test]
fn what_is_no_request_or_too_long_is_refused_for_good() {
    let (service, tokens) = (service(Version::V1, false), Tokens::new([7; 16]));
    let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(REQUEST_MAX));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(HEADERS_MAX + 1));
    let body = |length: &str| format!("GET / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
    for request in [
        "\0\r\n\r\n",
        "GET\r\n\r\n",
        "GET / HTTP/2.0\r\n\r\n",
        "GET / HTTP/1.1\r\nno header\r\n\r\n",
        &long,
        &many,
        &body("4096"),
        &body("18446744073709551616"),
        &body("-1"),
        &body(""),
        "GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
    ] {
        let Progress::Answered { taken, response, closes } =
            answer(&service, &tokens, NOW, request.as_bytes())
        else {
            panic!("waits for more: {request}")
        };
        assert!(closes && taken == request.len(), "{request}");
        assert!(response.starts_with(b"HTTP/1.1 400 Bad Request\r\n"), "{request}");
    }
}
