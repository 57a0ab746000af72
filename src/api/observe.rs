//! What was asked of the API and how that went, for readers of events.

use super::Response;
use crate::devices::kind::{Change, Device};
use crate::events::{self, Event};

/// A request was answered.
pub fn served(method: &str, path: &str, response: &Response) {
    match (method, response) {
        (_, Response::Fault(reason)) => events::tell(|| Event::ApiError {
            request: events::text(format_args!("{method} {path}")),
            reason: events::text(reason),
        }),
        // What else changes says so itself, when it has changed.
        ("PUT", Response::Done) if path != "/actions" => configured(path),
        ("PATCH", Response::Done) if path == "/machine-config" => configured(path),
        _ => {}
    }
}

fn configured(path: &str) {
    events::tell(|| Event::Configured { what: events::text(path) });
}

/// A device in use was changed.
pub fn changed(device: &Device, change: &Change) -> Event {
    match change.body["path_on_host"].as_str() {
        Some(path) => Event::DiskSwapped { drive_id: change.id.clone(), path: path.into() },
        None => Event::DeviceChanged { device: device.name(), change: change.body.clone() },
    }
}
