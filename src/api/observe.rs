//! What was asked of the API and how that went: counted, and told to readers of events.

use std::time::Duration;

use super::Response;
use crate::history::{self, Event};
use crate::log;
use crate::microvm::counts;

/// PUT requests that configure nothing: what they do has events of its own, when it is done.
const DEEDS: [&str; 5] =
    ["/actions", "/clones", "/snapshot/create", "/snapshot/load", "/snapshot/working-set"];

/// A request was answered, after this time.
pub fn served(method: &str, path: &str, response: &Response, time: Duration) {
    let is_refused = matches!(response, Response::Fault(_) | Response::TooLarge(_));
    counts::answered(method, path, is_refused, time);
    let outcome = if is_refused { "refused" } else { "done" };
    log::debug(format_args!("`{method} {path}` was {outcome} in {} us", time.as_micros()));
    match (method, response) {
        (_, Response::Fault(reason) | Response::TooLarge(reason)) => history::tell(|| Event::ApiError {
            request: history::text(format_args!("{method} {path}")),
            reason: history::text(reason),
        }),
        ("PUT", Response::Done) if !DEEDS.contains(&path) => configured(path),
        // Other requests that change something have events of their own, too.
        ("PATCH", Response::Done) if ["/machine-config", "/mmds"].contains(&path) => configured(path),
        _ => {}
    }
}

fn configured(path: &str) {
    history::tell(|| Event::Configured { what: history::text(path) });
}
