//! Method, path and body to `Request`, with Firecracker's messages for what does not fit.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{Action, Request, VmState};
use crate::devices::{block, net};

/// First path tokens of Firecracker's API that are not served yet: refused as such, not as unknown.
const NOT_IMPLEMENTED: [&str; 13] = [
    "balloon",
    "cpu-config",
    "drives",
    "hotplug",
    "logger",
    "metrics",
    "mmds",
    "network-interfaces",
    "pmem",
    "serial",
    "snapshot",
    "vsock",
    "gdb",
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ActionBody {
    action_type: Action,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VmBody {
    state: VmState,
}

/// The request, or the fault message for the client.
pub fn route(method: &str, path: &str, body: &[u8]) -> Result<Request, String> {
    match (method, body.is_empty()) {
        ("GET", false) => return Err("GET request cannot have a body.".to_owned()),
        ("PUT", true) => return Err("Empty PUT request.".to_owned()),
        ("PATCH", true) => return Err("Empty PATCH request.".to_owned()),
        _ => {}
    }
    let tokens: Vec<&str> = path.trim_matches('/').split('/').collect();
    Ok(match (method, tokens.as_slice()) {
        ("GET", [""]) => Request::Instance,
        ("GET", ["version"]) => Request::Version,
        ("GET", ["machine-config"]) => Request::MachineConfig,
        ("GET", ["vm", "config"]) => Request::VmConfig,
        ("PUT", ["machine-config"]) => Request::PutMachineConfig(parse(body)?),
        ("PATCH", ["machine-config"]) => {
            let fields: Map<String, Value> = parse(body)?;
            if fields.is_empty() {
                return Err("Empty PATCH request.".to_owned());
            }
            Request::PatchMachineConfig(fields)
        }
        ("PUT", ["boot-source"]) => Request::PutBootSource(parse(body)?),
        ("PUT", ["drives", id]) => {
            let drive: block::Config = parse(body)?;
            if drive.drive_id != *id {
                return Err("The id from the path does not match the id from the body!".to_owned());
            }
            Request::PutDrive(drive)
        }
        ("PATCH", ["drives", id]) => {
            let patch: block::Patch = parse(body)?;
            if patch.drive_id != *id {
                return Err("The id from the path does not match the id from the body!".to_owned());
            }
            Request::PatchDrive(patch)
        }
        ("PUT", ["network-interfaces", id]) => {
            let interface: net::Config = parse(body)?;
            if interface.iface_id != *id {
                let other = interface.iface_id;
                return Err(format!(
                    "The id from the path [{id}] does not match the id from the body [{other}]!"
                ));
            }
            Request::PutNetworkInterface(interface)
        }
        ("PUT", ["drives" | "network-interfaces"]) => return Err("The ID cannot be empty.".to_owned()),
        ("PUT", ["entropy"]) => Request::PutEntropy(parse(body)?),
        ("PUT", ["actions"]) => Request::Action(parse::<ActionBody>(body)?.action_type),
        ("PATCH", ["vm"]) => Request::PatchVm(parse::<VmBody>(body)?.state),
        ("GET" | "PUT" | "PATCH" | "DELETE", [first, ..]) if NOT_IMPLEMENTED.contains(first) => {
            return Err(format!("`{method} {path}` is not implemented yet."));
        }
        (_, [first, ..]) => return Err(format!("Invalid request method and/or path: {method} {first}.")),
        (_, []) => unreachable!("a split has at least one piece"),
    })
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(deserializing)
}

/// The fault for a body that serde refuses.
pub fn deserializing(error: serde_json::Error) -> String {
    format!("An error occurred when deserializing the json body of a request: {error}.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_find_their_operation() {
        assert_eq!(route("GET", "/", b""), Ok(Request::Instance));
        assert_eq!(route("GET", "/vm/config", b""), Ok(Request::VmConfig));
        let pause = route("PATCH", "/vm", br#"{"state":"Paused"}"#);
        assert_eq!(pause, Ok(Request::PatchVm(VmState::Paused)));
        let start = route("PUT", "/actions", br#"{"action_type":"InstanceStart"}"#);
        assert_eq!(start, Ok(Request::Action(Action::InstanceStart)));
    }

    #[test]
    fn what_does_not_fit_gets_firecrackers_message() {
        let invalid = "Invalid request method and/or path:";
        let json = "An error occurred when deserializing the json body of a request:";
        for (method, path, body, expected) in [
            ("GET", "/machine-config", "{}", "GET request cannot have a body.".to_owned()),
            ("PUT", "/machine-config", "", "Empty PUT request.".to_owned()),
            ("PATCH", "/vm", "", "Empty PATCH request.".to_owned()),
            ("PATCH", "/machine-config", "{}", "Empty PATCH request.".to_owned()),
            ("PUT", "/nothing", "{}", format!("{invalid} PUT nothing.")),
            ("GET", "/machine-config?x", "", format!("{invalid} GET machine-config?x.")),
            ("POST", "/actions", "{}", format!("{invalid} POST actions.")),
            ("DELETE", "/", "", format!("{invalid} DELETE .")),
            ("PUT", "/actions", "{", format!("{json} EOF while parsing an object at line 1 column 1.")),
            ("DELETE", "/drives/root", "", "`DELETE /drives/root` is not implemented yet.".to_owned()),
            ("PUT", "/drives/", "{}", "The ID cannot be empty.".to_owned()),
        ] {
            assert_eq!(route(method, path, body.as_bytes()), Err(expected));
        }
        for (body, expected) in [
            (r#"{"kernel_image_path":"k","colour":1}"#, "unknown field `colour`"),
            (r#"{"kernel_image_path":7}"#, "invalid type: integer `7`"),
            (r#"{"kernel_image_path":"a","kernel_image_path":"b"}"#, "duplicate field `kernel_image_path`"),
            ("[[[[", "invalid length 0, expected struct BootSource"),
        ] {
            let error = route("PUT", "/boot-source", body.as_bytes()).unwrap_err();
            assert!(error.starts_with(json), "{error}");
            assert!(error.contains(expected) || body == "[[[[", "{error}");
        }
    }
}
