//! Method, path and body to `Request`, with Firecracker's messages for what does not fit.

use serde::de::DeserializeOwned;

use super::Request;
use super::bodies::{Action, ActionBody, Unplug, VmBody};
use super::snapshot::{self, CreateSnapshot, LoadSnapshot, MakeClone};
use crate::config::{MachineConfig, MachinePatch};
use crate::devices::kind::DeviceKind;
use crate::devices::{self, KINDS};
use crate::dialect::Dialect;
use crate::json;

const NO_TEMPLATE: &str = "A template is asked for clones, not a microVM: `alula template`.";

/// The request, or the fault message for the client.
pub fn route(dialect: Dialect, method: &str, path: &str, body: &[u8]) -> Result<Request, String> {
    let body = Body { bytes: body, dialect };
    let path = path.trim_matches('/');
    check_body(dialect, method, path, body.bytes.is_empty())?;
    if let Some((kind, rest)) = kind_of(path).filter(|(kind, _)| kind.is_known_in(dialect)) {
        return device(kind, method, rest, body);
    }
    let tokens: Vec<&str> = path.split('/').collect();
    Ok(match (method, tokens.as_slice()) {
        ("GET", [""]) => Request::Instance,
        // What follows a path of one word is ignored, as Firecracker does.
        ("GET", ["version", ..]) => Request::Version,
        ("GET", ["machine-config", ..]) => Request::MachineConfig,
        ("GET", ["vm", "config"]) => Request::VmConfig,
        ("GET", ["events"]) if dialect != Dialect::Firecracker => Request::Events,
        ("GET", ["guest"]) if dialect != Dialect::Firecracker => Request::Guest,
        ("GET", ["metrics"]) if dialect != Dialect::Firecracker => Request::Metrics,
        ("PUT", ["metrics", ..]) => Request::PutMetrics(body.parse()?),
        ("PUT", ["logger", ..]) => Request::PutLogger(body.parse()?),
        ("PUT", ["serial", ..]) => Request::PutSerial(body.parse()?),
        ("PUT", ["machine-config", ..]) => {
            Request::PutMachineConfig(body.parse_of(MachineConfig::PUBLISHED)?)
        }
        ("PATCH", ["machine-config", ..]) => {
            let patch: MachinePatch = body.parse_of(MachineConfig::PUBLISHED)?;
            if patch == MachinePatch::default() {
                return Err("Empty PATCH request.".to_owned());
            }
            Request::PatchMachineConfig(patch)
        }
        ("GET", ["mmds"]) => Request::Metadata,
        ("PUT", ["mmds"]) => Request::PutMetadata(body.parse()?),
        ("PATCH", ["mmds"]) => Request::PatchMetadata(body.parse()?),
        ("PUT", ["mmds", "config"]) => Request::PutMetadataConfig(body.parse()?),
        ("PUT", ["cpu-config", ..]) => Request::PutCpuConfig(body.parse()?),
        ("PUT", ["boot-source", ..]) => Request::PutBootSource(body.parse()?),
        ("PUT", ["actions", ..]) => match body.parse::<ActionBody>()?.action_type {
            // Ours; the words are those of serde.
            action @ (Action::Shutdown | Action::Reset) if dialect == Dialect::Firecracker => {
                let known = &["FlushMetrics", "InstanceStart", "SendCtrlAltDel"];
                let name = format!("{action:?}");
                return Err(body.refuse(&serde::de::Error::unknown_variant(&name, known)));
            }
            action => Request::Action(action),
        },
        ("PUT", ["snapshot", "create"]) => {
            let asked: CreateSnapshot = body.parse_of(snapshot::CREATE_PUBLISHED)?;
            Request::CreateSnapshot(asked.whole(dialect).map_err(|error| body.refuse(&error))?)
        }
        ("PUT", ["snapshot", "load"]) => {
            let asked: LoadSnapshot = body.parse_of(snapshot::LOAD_PUBLISHED)?;
            Request::LoadSnapshot(Box::new(asked.whole(dialect).map_err(|error| body.refuse(&error))?))
        }
        ("PUT", ["snapshot", "working-set"]) if dialect != Dialect::Firecracker => {
            Request::NoteWorkingSet(body.parse()?)
        }
        ("PUT", ["clones"]) if dialect != Dialect::Firecracker => return Err(NO_TEMPLATE.to_owned()),
        ("PATCH", ["vm", ..]) => Request::PatchVm(body.parse::<VmBody>()?.state),
        _ => return Err(invalid(method, path)),
    })
}

/// Whether a request of this method has a body if it must, and none if it must not.
fn check_body(dialect: Dialect, method: &str, path: &str, is_empty: bool) -> Result<(), String> {
    Err(match (method, is_empty) {
        ("GET", false) => "GET request cannot have a body.".to_owned(),
        ("PUT", true) => "Empty PUT request.".to_owned(),
        ("PATCH", true) if needs_body(path) => "Empty PATCH request.".to_owned(),
        // Firecracker's words, which say the contrary of what they mean.
        ("DELETE", false) if dialect == Dialect::Firecracker => "Empty Delete request.".to_owned(),
        ("DELETE", false) if !kind_of(path).is_some_and(|(kind, _)| kind.many) => {
            "DELETE request cannot have a body.".to_owned()
        }
        _ => return Ok(()),
    })
}

/// The kind of devices that a path is for, and the rest of the path.
fn kind_of(path: &str) -> Option<(&'static DeviceKind, &str)> {
    KINDS.iter().find_map(|kind| match path.strip_prefix(kind.path)? {
        "" => Some((kind, "")),
        rest => rest.strip_prefix('/').map(|rest| (kind, rest)),
    })
}

fn needs_body(path: &str) -> bool {
    kind_of(path).is_none_or(|(kind, place)| kind.many || (kind.patch_needs_body)(place))
}

/// A request for a device of `kind`; `rest` is the rest of the path: an id, or the place of something of the device.
fn device(kind: &'static DeviceKind, method: &str, rest: &str, body: Body<'_>) -> Result<Request, String> {
    let (id, place) = if kind.many { (rest, "") } else { ("", rest) };
    if kind.many && (id.is_empty() || id.contains('/')) {
        return Err(match (method, id.is_empty()) {
            ("PUT" | "PATCH" | "DELETE", true) => "The ID cannot be empty.".to_owned(),
            _ => invalid(method, kind.path),
        });
    }
    if kind.many {
        devices::check_id(id).map_err(|error| error.to_string())?;
    }
    let same_id = |other: &str| match other == id {
        true => Ok(()),
        false => Err((kind.id_mismatch)(id, other)),
    };
    match method {
        "GET" if let Some(place) = kind.told.iter().find(|told| **told == place) => {
            Ok(Request::TellDevice(kind, place))
        }
        // A kind of device without ids has a path of one word, and what follows that is ignored, as in Firecracker.
        "PUT" => {
            let device = kind.parse_as(body.dialect, body.bytes).map_err(|error| body.refuse(&error))?;
            same_id(device.id())?;
            Ok(Request::PutDevice(device))
        }
        "PATCH" if kind.patchable => {
            let change = kind.parse_patch_as(body.dialect, place, body.bytes);
            let change = change.map_err(|error| body.refuse(&error))?;
            same_id(&change.id)?;
            Ok(Request::PatchDevice(kind, change))
        }
        "DELETE" if kind.many => {
            let unplug = if body.bytes.is_empty() { Unplug::default() } else { body.parse()? };
            Ok(Request::DeleteDevice(kind, id.to_owned(), unplug))
        }
        _ => Err(invalid(method, kind.path)),
    }
}

fn invalid(method: &str, path: &str) -> String {
    let first = path.split('/').next().unwrap_or_default();
    format!("Invalid request method and/or path: {method} {first}.")
}

/// The clone that a template's client asks for, or the fault message for the client.
pub fn route_of_template(method: &str, path: &str, body: &[u8]) -> Result<MakeClone, String> {
    match (method, path.trim_matches('/')) {
        ("PUT", "clones") if !body.is_empty() => Body { bytes: body, dialect: Dialect::Alula }.parse(),
        ("PUT", "clones") => Err("Empty PUT request.".to_owned()),
        (method, path) => Err(invalid(method, path) + " A template answers `PUT /clones` alone."),
    }
}

/// The body of a request, and whose words its client knows.
#[derive(Clone, Copy)]
struct Body<'a> {
    bytes: &'a [u8],
    dialect: Dialect,
}

impl Body<'_> {
    fn parse<T: DeserializeOwned>(self) -> Result<T, String> {
        serde_json::from_slice(self.bytes).map_err(|error| self.refuse(&error))
    }

    /// Reads the body as [`Self::parse`] does; Firecracker's API has those of its fields that are `published`.
    fn parse_of<T: DeserializeOwned>(self, published: &'static [&'static str]) -> Result<T, String> {
        self.dialect.check_fields(self.bytes, published).map_err(|error| self.refuse(&error))?;
        self.parse()
    }

    /// The fault for a body that serde refuses. Firecracker's clients look for serde's own words.
    fn refuse(self, error: &serde_json::Error) -> String {
        let what = match (self.dialect, error.line()) {
            (Dialect::Firecracker, _) => error.to_string(),
            (Dialect::Alula, 0) => json::words::tell(self.bytes, error),
            (Dialect::Alula, line) => {
                format!("{} at line {line} column {}", json::words::tell(self.bytes, error), error.column())
            }
        };
        format!("An error occurred when deserializing the json body of a request: {what}.")
    }
}

#[cfg(test)]
mod tests {
    use super::super::bodies::VmState;
    use super::*;

    fn route(method: &str, path: &str, body: &[u8]) -> Result<Request, String> {
        super::route(Dialect::Alula, method, path, body)
    }

    #[test]
    fn requests_find_their_operation() {
        assert!(matches!(route("GET", "/", b""), Ok(Request::Instance)));
        assert!(matches!(route("GET", "/vm/config", b""), Ok(Request::VmConfig)));
        let pause = route("PATCH", "/vm", br#"{"state":"Paused"}"#);
        assert!(matches!(pause, Ok(Request::PatchVm(VmState::Paused))));
        let start = route("PUT", "/actions", br#"{"action_type":"InstanceStart"}"#);
        assert!(matches!(start, Ok(Request::Action(Action::InstanceStart))));
    }

    #[test]
    fn every_kind_of_device_has_its_requests() {
        for kind in KINDS {
            let device = kind.parse(kind.example.as_bytes()).unwrap();
            let path = match kind.many {
                true => format!("/{}/{}", kind.path, device.id()),
                false => format!("/{}", kind.path),
            };
            let put = route("PUT", &path, kind.example.as_bytes());
            assert!(matches!(put, Ok(Request::PutDevice(found)) if found.replaces(&device)), "{path}");
            let delete = route("DELETE", &path, b"");
            let first = kind.path.split('/').next().unwrap();
            let expected = format!("Invalid request method and/or path: DELETE {first}.");
            match kind.many {
                true => assert!(matches!(delete, Ok(Request::DeleteDevice(..)))),
                false => assert_eq!(delete.err(), Some(expected)),
            }
            let beyond = route("PUT", &format!("{path}/more"), kind.example.as_bytes()).err();
            let expected = format!("Invalid request method and/or path: PUT {first}.");
            assert_eq!(beyond, kind.many.then_some(expected));
        }
    }

    #[test]
    fn what_a_device_tells_and_changes_has_places_of_its_own() {
        for place in ["", "/statistics", "/hinting/status"] {
            let told = route("GET", &format!("/balloon{place}"), b"");
            assert!(matches!(told, Ok(Request::TellDevice(_, found)) if found == place.trim_matches('/')));
        }
        let changed = |place: &str, body: &str| match route("PATCH", place, body.as_bytes()) {
            Ok(Request::PatchDevice(_, change)) => Ok(change.body),
            Ok(_) => panic!("{place} is no change"),
            Err(fault) => Err(fault),
        };
        let amount = serde_json::json!({ "amount_mib": 1 });
        assert_eq!(changed("/balloon", r#"{"amount_mib": 1}"#), Ok(amount));
        for (place, body) in [("start", ""), ("start", "{}"), ("stop", ""), ("stop", "{}")] {
            let place = format!("hinting/{place}");
            let body_told = if body.is_empty() { serde_json::Value::Null } else { serde_json::json!({}) };
            assert_eq!(
                changed(&format!("/balloon/{place}"), body),
                Ok(serde_json::json!({ place: body_told }))
            );
        }
        for place in ["/balloon", "/balloon/statistics", "/balloon/hinting", "/drives/hinting/start"] {
            assert_eq!(changed(place, ""), Err("Empty PATCH request.".to_owned()));
        }
        let invalid = |method: &str, path: &str| route(method, path, b"").err().unwrap();
        for path in ["/balloon/hinting", "/balloon/nothing"] {
            assert_eq!(invalid("GET", path), "Invalid request method and/or path: GET balloon.");
        }
        assert_eq!(invalid("GET", "/entropy"), "Invalid request method and/or path: GET entropy.");
    }

    #[test]
    fn what_does_not_fit_gets_firecrackers_message() {
        let invalid = "Invalid request method and/or path:";
        let json = "An error occurred when deserializing the json body of a request:";
        for (method, path, body, expected) in [
            ("GET", "/machine-config", "{}", "GET request cannot have a body.".to_owned()),
            ("PUT", "/machine-config", "", "Empty PUT request.".to_owned()),
            ("PATCH", "/vm", "", "Empty PATCH request.".to_owned()),
            ("PUT", "/unknown", "", "Empty PUT request.".to_owned()),
            ("DELETE", "/vsock", "{}", "DELETE request cannot have a body.".to_owned()),
            ("DELETE", "/drives", "", "The ID cannot be empty.".to_owned()),
            ("DELETE", "/machine-config", "", format!("{invalid} DELETE machine-config.")),
            ("PATCH", "/machine-config", r#"{"smt":null}"#, "Empty PATCH request.".to_owned()),
            ("PATCH", "/machine-config", "{}", "Empty PATCH request.".to_owned()),
            ("PUT", "/nothing", "{}", format!("{invalid} PUT nothing.")),
            ("GET", "/machine-config?x", "", format!("{invalid} GET machine-config?x.")),
            ("POST", "/actions", "{}", format!("{invalid} POST actions.")),
            ("DELETE", "/", "", format!("{invalid} DELETE .")),
            (
                "PUT",
                "/actions",
                "{",
                format!("{json} the text ends within an object: a `}}` is missing at line 1 column 1."),
            ),
            ("DELETE", "/hotplug/memory", "", format!("{invalid} DELETE hotplug.")),
            ("GET", "/hotplug", "", format!("{invalid} GET hotplug.")),
            ("PUT", "/drives/", "{}", "The ID cannot be empty.".to_owned()),
        ] {
            assert_eq!(route(method, path, body.as_bytes()).err(), Some(expected));
        }
        let told = super::route(Dialect::Firecracker, "DELETE", "/drives/a", b"{}");
        assert_eq!(told.err().as_deref(), Some("Empty Delete request."));
        for (body, expected) in [
            (r#"{"kernel_image_path":"k","colour":1}"#, "unknown field `colour`"),
            (r#"{"kernel_image_path":7}"#, "`kernel_image_path`: expected a string, found `7` at line 1"),
            (
                r#"{"kernel_image_path":"k","initrd_path":[]}"#,
                "`initrd_path`: expected a string, found a list at",
            ),
            (r#"{"kernel_image_path":"a","kernel_image_path":"b"}"#, "duplicate field `kernel_image_path`"),
            ("[]", "expected an object, found a list at"),
            ("7", "request: expected an object, found `7` at"),
        ] {
            let error = route("PUT", "/boot-source", body.as_bytes()).err().unwrap();
            assert!(error.starts_with(json), "{error}");
            assert!(error.contains(expected), "{error}");
        }
    }
}
