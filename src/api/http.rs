//! HTTP/1.1 as far as the API needs it (RFC 9112): a request's bytes in, a response's bytes out.

use std::ops::Range;

use serde_json::json;

use super::{Response, prometheus};

/// Names the API that is spoken, for clients that ask who answers.
const SERVER: &str = "Firecracker API";
/// A request head of more bytes or headers is refused: it would have to be kept while it comes in.
pub const HEAD_MAX: usize = 16 << 10;
const HEADERS_MAX: usize = 64;

/// What the bytes received so far amount to.
#[derive(Debug, PartialEq)]
pub enum Parsed<'a> {
    /// Not yet a request; the client wants to be told to go on before it sends the body.
    Incomplete {
        /// `Expect: 100-continue` was sent, and the head is complete.
        expects_continue: bool,
    },
    /// One whole request.
    Request {
        /// The method, as sent.
        method: &'a str,
        /// The path with its query, without scheme and authority.
        path: &'a str,
        /// Where the body is.
        body: Range<usize>,
        /// The connection ends with the answer (RFC 9112, 9.3).
        closes: bool,
        /// The client accepts text, and does not name JSON.
        wants_text: bool,
    },
    /// The head of a request whose body comes in chunks ([`super::chunks`]).
    Chunked {
        /// Where the first chunk begins.
        head: usize,
        /// As in `Incomplete`.
        expects_continue: bool,
    },
    /// Not HTTP, or more than is allowed: after this nothing can be made of what follows.
    Bad(String),
}

/// Looks at `input`, which begins where a request begins. `put_together` is the length of a body that came in
/// chunks and lies behind the head now.
pub fn parse(input: &[u8], body_max: usize, put_together: Option<usize>) -> Parsed<'_> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    // The parser would skip empty lines before the request line.
    if matches!(input.first(), Some(b'\r' | b'\n')) {
        return bad("Invalid request line: it is empty.");
    }
    let head = match request.parse(input) {
        Ok(httparse::Status::Complete(head)) if head <= HEAD_MAX => head,
        Ok(httparse::Status::Partial) if input.len() <= HEAD_MAX => {
            return Parsed::Incomplete { expects_continue: false };
        }
        Ok(_) | Err(httparse::Error::TooManyHeaders) => {
            return bad(&format!(
                "The request head is larger than {HEAD_MAX} bytes or {HEADERS_MAX} headers."
            ));
        }
        Err(error) => return bad(&format!("Invalid HTTP request: {error}.")),
    };
    let is_old = request.version == Some(0);
    let Framing { length, is_chunked, expects_continue, closes, wants_text } =
        match framing(request.headers, is_old) {
            Ok(framing) => framing,
            Err(message) => return bad(message),
        };
    let length = match put_together {
        None if is_chunked => {
            let expects_continue = expects_continue && input.len() == head;
            return Parsed::Chunked { head, expects_continue };
        }
        None => length,
        Some(length) => length as u64,
    };
    // However large a limit the user has set: where the body would end must be a number.
    let end = usize::try_from(length).ok().and_then(|length| head.checked_add(length));
    let (Some(end), true) = (end, length <= body_max as u64) else {
        return bad(&too_large(length, body_max));
    };
    let body = head..end;
    if input.len() < body.end {
        return Parsed::Incomplete { expects_continue: expects_continue && input.len() == head };
    }
    let (method, target) = (request.method.expect("complete"), request.path.expect("complete"));
    match path(target) {
        Some(path) => Parsed::Request { method, path, body, closes, wants_text },
        None => bad("Invalid URI: an absolute path is needed."),
    }
}

fn bad(message: &str) -> Parsed<'static> {
    Parsed::Bad(message.to_owned())
}

/// Why a body of `length` bytes is refused.
pub fn too_large(length: u64, body_max: usize) -> String {
    format!(
        "Request payload with size {length} is larger than the limit of {body_max} allowed by server.\n\
         All previous unanswered requests will be dropped."
    )
}

/// The headers of a request that concern its body, its connection and its answer.
#[derive(Default)]
struct Framing {
    length: u64,
    is_chunked: bool,
    /// The client waits for a 100.
    expects_continue: bool,
    closes: bool,
    wants_text: bool,
}

/// `is_old`: of HTTP/1.0, whose connections end with an answer unless the client says otherwise.
fn framing(headers: &[httparse::Header<'_>], is_old: bool) -> Result<Framing, &'static str> {
    let mut framing = Framing { closes: is_old, ..Default::default() };
    let mut length = None;
    for header in headers {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        let mut words = header.value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
        let mut says = |word: &[u8]| words.any(|one| one.eq_ignore_ascii_case(word));
        if is("Content-Length") {
            let text = std::str::from_utf8(header.value).unwrap_or_default().trim();
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let value = if digits { text.parse::<u64>().ok() } else { None };
            let value = value.ok_or("Invalid Content-Length header.")?;
            if length.is_some_and(|other| other != value) {
                return Err("Two different Content-Length headers.");
            }
            length = Some(value);
        } else if is("Transfer-Encoding") {
            if framing.is_chunked || !header.value.trim_ascii().eq_ignore_ascii_case(b"chunked") {
                return Err("Only `chunked` is supported as Transfer-Encoding.");
            }
            framing.is_chunked = true;
        } else if is("Expect") {
            // A client of HTTP/1.0 knows no 100 (RFC 9110, 10.1.1).
            framing.expects_continue = !is_old && says(b"100-continue");
        } else if is("Accept") {
            // Media types have parameters, like the weight (RFC 9110, 12.5.1), which are of no interest here.
            let types = || {
                words
                    .clone()
                    .map(|one| one.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii())
            };
            let accepts = |wanted: &[u8]| types().any(|one| one.eq_ignore_ascii_case(wanted));
            framing.wants_text = accepts(b"text/plain") && !accepts(b"application/json");
        } else if is("Connection") {
            framing.closes = if is_old { !says(b"keep-alive") } else { framing.closes || says(b"close") };
        }
    }
    // Somebody between the client and us may have gone by the other one (RFC 9112, 6.3).
    if framing.is_chunked && (length.is_some() || is_old) {
        return Err("A chunked request has no Content-Length and is of HTTP/1.1.");
    }
    framing.length = length.unwrap_or(0);
    Ok(framing)
}

/// The path of a request target in origin or absolute form (RFC 9112, 3.2).
fn path(target: &str) -> Option<&str> {
    if target.starts_with('/') {
        return Some(target);
    }
    let rest = target.strip_prefix("http://")?;
    Some(rest.find('/').map_or("/", |slash| &rest[slash..]))
}

/// Tells a client that waits with its body to send it.
pub fn continue_bytes() -> Vec<u8> {
    head("100").into_bytes()
}

/// A response on the wire, for a client that wants text or JSON where there are both. There is no reason phrase, and
/// nothing about a body where there is none.
pub fn response_bytes(response: &Response, wants_text: bool) -> Vec<u8> {
    match response {
        Response::Metrics(metrics) if wants_text => {
            with_body_of(prometheus::CONTENT_TYPE, "200", &prometheus::text(metrics))
        }
        Response::Metrics(metrics) => with_body("200", &json!(metrics).to_string()),
        Response::Done => head("204").into_bytes(),
        Response::Value(value) => with_body("200", &value.to_string()),
        Response::Fault(message) => with_body("400", &fault(message)),
        Response::TooLarge(message) => with_body("413", &fault(message)),
        // The body ends with the connection (RFC 9112, 6.3).
        Response::Events => format!(
            "HTTP/1.1 200 \r\nServer: {SERVER}\r\nConnection: close\r\nContent-Type: application/x-ndjson\r\n\r\n"
        )
        .into_bytes(),
        Response::Deprecated(response) => {
            let mut bytes = response_bytes(response, wants_text);
            let common = head("204").len() - 2;
            bytes.splice(common..common, *b"Deprecation: true\r\n");
            bytes
        }
    }
}

fn fault(message: &str) -> String {
    json!({ "fault_message": message }).to_string()
}

/// The same response as the last one of a connection.
pub fn last(mut response: Vec<u8>) -> Vec<u8> {
    const STAYS: &[u8] = b"Connection: keep-alive";
    if let Some(at) = response.windows(STAYS.len()).position(|bytes| bytes == STAYS) {
        response.splice(at..at + STAYS.len(), *b"Connection: close");
    }
    response
}

/// The same response without its body: to HEAD.
pub fn without_body(mut response: Vec<u8>) -> Vec<u8> {
    if let Some(at) = response.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
        response.truncate(at + 4);
    }
    response
}

/// The answer to what is not a request: in the server's own words, which are not JSON-escaped.
pub fn error_bytes(status: &str, message: &str) -> Vec<u8> {
    with_body(status, &format!("{{ \"error\": \"{message}\" }}"))
}

fn with_body(status: &str, body: &str) -> Vec<u8> {
    with_body_of("application/json", status, body)
}

fn with_body_of(kind: &str, status: &str, body: &str) -> Vec<u8> {
    let mut head = head(status);
    head.truncate(head.len() - 2);
    let length = body.len();
    format!("{head}Content-Type: {kind}\r\nContent-Length: {length}\r\n\r\n{body}").into_bytes()
}

fn head(status: &str) -> String {
    format!("HTTP/1.1 {status} \r\nServer: {SERVER}\r\nConnection: keep-alive\r\n\r\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Parsed<'_> {
        parse(text.as_bytes(), 100, None)
    }

    #[test]
    fn a_request_is_whole_when_its_body_is() {
        let text = "PUT http://localhost/actions HTTP/1.1\r\nHost: x\r\ncontent-length: 2\r\n\r\n{}GET";
        let body = text.len() - 5..text.len() - 3;
        for end in 1..body.end {
            assert_eq!(request(&text[..end]), Parsed::Incomplete { expects_continue: false }, "{end}");
        }
        assert_eq!(
            request(text),
            Parsed::Request { method: "PUT", path: "/actions", body, closes: false, wants_text: false }
        );
    }

    #[test]
    fn who_waits_for_a_100_is_told_once() {
        let text = "PUT /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n";
        assert_eq!(request(text), Parsed::Incomplete { expects_continue: true });
        assert_eq!(request(&format!("{text}{{")), Parsed::Incomplete { expects_continue: false });
        let old = text.replace("HTTP/1.1", "HTTP/1.0");
        assert_eq!(request(&old), Parsed::Incomplete { expects_continue: false });
    }

    #[test]
    fn a_limit_beyond_all_numbers_has_no_length_overflow() {
        for length in [u64::MAX, u64::MAX - 1, u64::MAX - 40] {
            let text = format!("PUT /a HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
            assert!(matches!(parse(text.as_bytes(), usize::MAX, None), Parsed::Bad(_)), "{length}");
        }
    }

    #[test]
    fn what_is_not_http_is_bad() {
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(HEAD_MAX));
        let endless = format!("GET / HTTP/1.1\r\nA: {}", "x".repeat(HEAD_MAX));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(HEADERS_MAX + 1));
        for text in [
            "\r\nGET / HTTP/1.1\r\n\r\n",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            "hello\r\n\r\n",
            "PUT / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
            "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "PUT / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            "PUT / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
            "PUT / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
            "PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "GET actions HTTP/1.1\r\n\r\n",
            &long,
            &endless,
            &many,
        ] {
            assert!(matches!(request(text), Parsed::Bad(_)), "{text}: {:?}", request(text));
        }
        assert_eq!(
            request("PUT / HTTP/1.1\r\nContent-Length: 101\r\n\r\n"),
            Parsed::Bad(
                "Request payload with size 101 is larger than the limit of 100 allowed by server.\nAll previous \
                 unanswered requests will be dropped."
                    .to_owned()
            )
        );
    }

    #[test]
    fn metrics_are_text_for_who_accepts_it_and_not_json() {
        let prometheus =
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.1";
        for (accept, expected) in [
            ("text/plain", true),
            (prometheus, true),
            ("TEXT/PLAIN ; q=1", true),
            ("*/*", false),
            ("text/html", false),
            ("application/json", false),
            ("application/json, text/plain, */*", false),
            ("text/plainer", false),
        ] {
            match request(&format!("GET /metrics HTTP/1.1\r\nAccept: {accept}\r\n\r\n")) {
                Parsed::Request { wants_text, .. } => assert_eq!(wants_text, expected, "{accept}"),
                other => panic!("{accept}: {other:?}"),
            }
        }
        let metrics = Response::Metrics([("a".to_owned(), json!({ "b": 1 }))].into_iter().collect());
        let answer = |wants_text| String::from_utf8(response_bytes(&metrics, wants_text)).unwrap();
        assert!(answer(false).ends_with("application/json\r\nContent-Length: 13\r\n\r\n{\"a\":{\"b\":1}}"));
        let text = answer(true);
        assert!(text.contains("\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{text}");
        assert!(text.ends_with("Content-Length: 12\r\n\r\nalula_a_b 1\n"), "{text}");
    }

    #[test]
    fn a_connection_lasts_as_long_as_its_client_says() {
        for (head, expected) in [
            ("HTTP/1.1", false),
            ("HTTP/1.1\r\nConnection: close", true),
            ("HTTP/1.1\r\nconnection: Upgrade, CLOSE", true),
            ("HTTP/1.1\r\nConnection: keep-alive", false),
            ("HTTP/1.1\r\nConnection: closed", false),
            ("HTTP/1.0", true),
            ("HTTP/1.0\r\nConnection: Keep-Alive", false),
            ("HTTP/1.0\r\nConnection: close", true),
        ] {
            match request(&format!("GET / {head}\r\n\r\n")) {
                Parsed::Request { closes, .. } => assert_eq!(closes, expected, "{head}"),
                other => panic!("{head}: {other:?}"),
            }
        }
        let answer = last(response_bytes(&Response::Done, false));
        assert_eq!(answer, b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: close\r\n\r\n");
    }

    #[test]
    fn a_chunked_head_says_where_its_chunks_begin() {
        let head = "PUT /a HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n";
        let expected = Parsed::Chunked { head: head.len(), expects_continue: false };
        assert_eq!(request(&format!("{head}2\r\n{{}}\r\n0\r\n\r\n")), expected);
        let body = head.len()..head.len() + 2;
        assert_eq!(
            parse(format!("{head}{{}}").as_bytes(), 100, Some(2)),
            Parsed::Request { method: "PUT", path: "/a", body, closes: false, wants_text: false }
        );
    }

    #[test]
    fn responses_are_as_on_the_peers_wire() {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let common = "Server: Firecracker API\r\nConnection: keep-alive\r\n";
        assert_eq!(text(response_bytes(&Response::Done, false)), format!("HTTP/1.1 204 \r\n{common}\r\n"));
        let deprecated = Response::Deprecated(Box::new(Response::Done));
        let expected = format!("HTTP/1.1 204 \r\n{common}Deprecation: true\r\n\r\n");
        assert_eq!(text(response_bytes(&deprecated, true)), expected);
        let deprecated = Response::Deprecated(Box::new(Response::Fault("no".to_owned())));
        assert!(
            text(response_bytes(&deprecated, true)).contains("alive\r\nDeprecation: true\r\nContent-Type: ")
        );
        assert_eq!(
            text(response_bytes(&Response::Fault("no".to_owned()), true)),
            format!(
                "HTTP/1.1 400 \r\n{common}Content-Type: application/json\r\nContent-Length: 22\r\n\r\n\
                 {{\"fault_message\":\"no\"}}"
            )
        );
    }
}
