//! One HTTP request of a guest and its answer (RFC 9112), as EC2's service and Firecracker's give them.

use std::time::Duration;

use serde_json::Value;

use super::tokens::{TTL_MAX, Tokens};
use super::{METRICS, Service, Version};

/// A request with its body that is longer is refused: all of it is kept while it comes, of each connection.
pub const REQUEST_MAX: usize = 4096;
const HEADERS_MAX: usize = 32;

const TOKEN_PATH: &str = "/latest/api/token";
/// Ours and EC2's name of each header.
const TOKEN: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
const TTL: [&str; 2] = ["X-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token-ttl-seconds"];

/// What the bytes of a connection amount to.
#[derive(Debug, PartialEq)]
pub enum Progress {
    /// More has to come.
    Incomplete,
    /// A request was answered.
    Answered {
        /// So many bytes it had.
        taken: usize,
        /// What to send.
        response: Vec<u8>,
        /// The connection ends with it.
        closes: bool,
    },
}

/// An answer to be.
struct Reply {
    status: &'static str,
    is_json: bool,
    /// With its line end.
    header: String,
    body: String,
}

impl Reply {
    fn text(status: &'static str, body: impl Into<String>) -> Self {
        Self { status, is_json: false, header: String::new(), body: body.into() }
    }

    fn bad(body: impl Into<String>) -> Self {
        Self::text("400 Bad Request", body)
    }

    fn not_found(path: &str) -> Self {
        Self::text("404 Not Found", format!("Resource not found: {path}."))
    }

    fn bytes(&self, closes: bool) -> Vec<u8> {
        let Self { status, is_json, header, body } = self;
        let kind = if *is_json { "application/json" } else { "text/plain" };
        let connection = if closes { "close" } else { "keep-alive" };
        let length = body.len();
        format!(
            "HTTP/1.1 {status}\r\nServer: alula\r\nConnection: {connection}\r\nContent-Type: {kind}\r\n\
             {header}Content-Length: {length}\r\n\r\n{body}"
        )
        .into_bytes()
    }
}

/// Looks at what a guest has sent, and answers its first request if that is complete. `now` is the time by which
/// `tokens` expire.
pub fn answer(service: &Service, tokens: &Tokens, now: Duration, input: &[u8]) -> Progress {
    let refuse = |body: &str| {
        let response = Reply::bad(body).bytes(true);
        Progress::Answered { taken: input.len(), response, closes: true }
    };
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let head = match request.parse(input) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) if input.len() < REQUEST_MAX => return Progress::Incomplete,
        Ok(httparse::Status::Partial) => return refuse("The request is too long."),
        Err(_) => return refuse("Invalid request."),
    };
    let (Some(method), Some(target)) = (request.method, request.path) else {
        return refuse("Invalid request.");
    };
    let headers = Headers(request.headers);
    if headers.get(&["Transfer-Encoding"]).is_some() {
        return refuse("Invalid request: its body comes in chunks.");
    }
    let length = match headers.get(&["Content-Length"]).map(number) {
        None => 0,
        Some(Some(length)) if length <= (REQUEST_MAX - head.min(REQUEST_MAX)) as u64 => length as usize,
        Some(_) => return refuse("The request is too long, or its Content-Length is no number."),
    };
    if input.len() < head + length {
        return Progress::Incomplete;
    }
    let says = |word: &[u8]| headers.get(&["Connection"]).is_some_and(|it| it.eq_ignore_ascii_case(word));
    let closes = if request.version == Some(0) { !says(b"keep-alive") } else { says(b"close") };
    let reply = match path(target) {
        None => Reply::bad("Invalid URI."),
        Some(path) => match method {
            "GET" => get(service, tokens, now, path, &headers),
            "PUT" => put(tokens, now, path, &headers),
            _ => Reply {
                header: "Allow: GET, PUT\r\n".to_owned(),
                ..Reply::text("405 Method Not Allowed", "Not allowed HTTP method.")
            },
        },
    };
    Progress::Answered { taken: head + length, response: reply.bytes(closes), closes }
}

/// The path of a target in origin or absolute form, without its query.
fn path(target: &str) -> Option<&str> {
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |slash| &rest[slash..]),
        None => target,
    };
    let path = path.split('?').next().unwrap_or_default();
    path.starts_with('/').then_some(path)
}

fn number(text: &[u8]) -> Option<u64> {
    let is_number = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    is_number.then(|| std::str::from_utf8(text).ok()?.parse().ok()).flatten()
}

struct Headers<'a, 'h>(&'a [httparse::Header<'h>]);

impl Headers<'_, '_> {
    /// The value of the first header that has one of these names.
    fn get(&self, names: &[&str]) -> Option<&[u8]> {
        let is_one =
            |header: &&httparse::Header<'_>| names.iter().any(|it| header.name.eq_ignore_ascii_case(it));
        self.0.iter().find(is_one).map(|header| header.value.trim_ascii())
    }
}

fn get(service: &Service, tokens: &Tokens, now: Duration, path: &str, headers: &Headers<'_, '_>) -> Reply {
    let token = headers.get(&TOKEN);
    let is_valid = token.is_some_and(|token| tokens.is_valid(token, now));
    let is_needed = service.config.version == Version::V2;
    match token {
        None if is_needed => {
            METRICS.rx_no_token.add(1);
            return Reply::text(
                "401 Unauthorized",
                format!(
                    "No MMDS token provided. Use `{}` or `{}` header to specify the session token.",
                    TOKEN[0], TOKEN[1]
                ),
            );
        }
        Some(_) if !is_valid => {
            METRICS.rx_invalid_token.add(1);
            if is_needed {
                return Reply::text("401 Unauthorized", "MMDS token not valid.");
            }
        }
        _ => {}
    }
    let wants_json = headers.get(&["Accept"]).is_some_and(|accepted| {
        let mut kinds =
            accepted.split(|byte| *byte == b',').filter_map(|one| one.split(|it| *it == b';').next());
        kinds.any(|kind| kind.trim_ascii().eq_ignore_ascii_case(b"application/json"))
    });
    let is_json = wants_json && !service.config.imds_compat;
    let found =
        service.store.look_up(path, |value| if is_json { Some(value.to_string()) } else { text(value) });
    match found {
        Some(Some(body)) => Reply { is_json, ..Reply::text("200 OK", body) },
        Some(None) => Reply::text(
            "501 Not Implemented",
            format!("Cannot retrieve value. The value has an unsupported type: {path}."),
        ),
        None => Reply::not_found(path),
    }
}

/// A value as EC2 tells it: a text as it is, an object by the names in it, of which those of objects end with a
/// slash. None: there is no such form for it.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Object(fields) => {
            let name = |(name, value): (&String, &Value)| {
                if value.is_object() { format!("{name}/") } else { name.clone() }
            };
            Some(fields.iter().map(name).collect::<Vec<_>>().join("\n"))
        }
        _ => None,
    }
}

/// Issues a token.
fn put(tokens: &Tokens, now: Duration, path: &str, headers: &Headers<'_, '_>) -> Reply {
    // A proxy that was made to send a PUT says so; the data is for this guest alone.
    if headers.get(&["X-Forwarded-For"]).is_some() {
        return Reply::bad("Invalid header. Reason: X-Forwarded-For is not allowed.");
    }
    if path.trim_end_matches('/') != TOKEN_PATH {
        return Reply::not_found(path);
    }
    let Some(ttl) = headers.get(&TTL) else {
        return Reply::bad(format!(
            "Token time to live value not found. Use `{}` or `{}` header to specify the token's lifetime.",
            TTL[0], TTL[1]
        ));
    };
    match number(ttl).filter(|ttl| (1..=TTL_MAX).contains(ttl)) {
        Some(ttl) => Reply {
            header: format!("{}: {ttl}\r\n", TTL[0]),
            ..Reply::text("200 OK", tokens.issue(ttl, now))
        },
        None => Reply::bad(format!(
            "Invalid time to live value provided for token: {}. Please provide a value between 1 and {TTL_MAX}.",
            String::from_utf8_lossy(ttl)
        )),
    }
}

#[cfg(test)]
mod tests;
