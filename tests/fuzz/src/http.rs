//! The API's socket: requests as clients send them. A request is one wherever its bytes are cut; its
//! parts lie in what was sent; what it asks for can be told back.

use alula::api::http::{HEAD_MAX, Parsed, parse, response_bytes};
use alula::api::{BODY_MAX, Request, Response, routes};
use alula::dialect::Dialect;

pub fn run(bytes: &[u8]) {
    let mut rest = bytes;
    // What follows a request is the next one.
    while let Parsed::Request { method, path, body, .. } = parse(rest, BODY_MAX, None) {
        assert!(path.starts_with('/') && !method.is_empty());
        assert!(body.len() <= BODY_MAX && body.start <= HEAD_MAX && body.end <= rest.len());
        check_cuts(rest, body.end);
        match routes::route(Dialect::Alula, method, path, &rest[body.clone()]) {
            Ok(request) => check(request),
            Err(message) => check_response(&Response::Fault(message)),
        }
        rest = &rest[body.end..];
    }
    if let Parsed::Bad(message) = parse(rest, BODY_MAX, None) {
        check_response(&Response::Fault(message));
    }
}

/// Bytes that come one after the other are the same request, complete at its end and not before.
fn check_cuts(bytes: &[u8], end: usize) {
    let step = 1.max(end / 16);
    for cut in (0..end).step_by(step).chain([end - 1]) {
        assert!(matches!(parse(&bytes[..cut], BODY_MAX, None), Parsed::Incomplete { .. }), "cut at {cut}");
    }
    assert!(parse(&bytes[..end], BODY_MAX, None) == parse(bytes, BODY_MAX, None));
}

/// What a device was configured with says the same when it is read again.
fn check(request: Request) {
    if let Request::PutDevice(device) = request {
        let _ = device.check();
        let text = serde_json::to_vec(&device).unwrap();
        let again = device.kind().parse(&text).unwrap();
        assert!(device.replaces(&again) && serde_json::to_vec(&again).unwrap() == text);
    }
}

/// A response has as many bytes as it says.
fn check_response(response: &Response) {
    for wants_text in [true, false] {
        let bytes = response_bytes(response, wants_text);
        let text = std::str::from_utf8(&bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap();
        assert_eq!(length.parse(), Ok(body.len()));
        assert!(wants_text || serde_json::from_str::<serde_json::Value>(body).is_ok());
    }
}
