//! The schema of the API and of config files, made from the serde types: what is checked in as
//! `resources/openapi.json`, `resources/config.schema.json` and `docs/api.md`, which the tests here keep
//! true. With `ALULA_WRITE_SCHEMA=1` they write the files instead.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::bodies::{ActionBody, FirecrackerVersion, Guest, InstanceInfo, Unplug, VmBody};
use super::examples::EXAMPLES;
use super::routes::route;
use super::snapshot::{CreateSnapshot, LoadSnapshot, Made, MakeClone, NoteWorkingSet};
use super::{API_VERSION, Request};
use crate::config::{BootSource, CpuConfig, MachineConfig, MachinePatch};
use crate::devices::kind::DeviceKind;
use crate::devices::{KINDS, console};
use crate::dialect::Dialect;
use crate::log;
use crate::metadata;
use crate::metrics;

/// What a request is answered when it succeeds.
enum Answer {
    Nothing,
    Json(Schema),
    Lines,
}

struct Operation {
    method: &'static str,
    path: String,
    summary: String,
    body: Option<Schema>,
    answer: Answer,
}

/// The schema of a type, by reference.
fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

fn operations(generator: &mut SchemaGenerator) -> Vec<Operation> {
    let mut list = questions(generator);
    list.extend(changes(generator));
    KINDS.iter().for_each(|kind| list.extend(changes_of(kind, generator)));
    list
}

/// What is asked for by GET.
fn questions(generator: &mut SchemaGenerator) -> Vec<Operation> {
    let get = |path: &str, summary: &str, answer| Operation {
        method: "get",
        path: path.to_owned(),
        summary: summary.to_owned(),
        body: None,
        answer,
    };
    let config = config_told_back(generator);
    vec![
        get("/", "The microVM and its state", Answer::Json(of::<InstanceInfo>(generator))),
        get("/version", "The version of the API", Answer::Json(of::<FirecrackerVersion>(generator))),
        get("/machine-config", "CPUs and memory", Answer::Json(of::<MachineConfig>(generator))),
        get(
            "/vm/config",
            "The whole configuration; `logger` and `metrics` are always null, and `serial` is left out, as in Firecracker",
            Answer::Json(config),
        ),
        get(
            "/guest",
            "What the agent in the guest says of it, after the start",
            Answer::Json(of::<Guest>(generator)),
        ),
        get(
            "/metrics",
            "What the microVM has done since its start; Prometheus' text for who accepts `text/plain`",
            Answer::Json(any_object()),
        ),
        get("/mmds", "The metadata that the guest can ask for", Answer::Json(any_object())),
        get(
            "/events",
            "What has happened, and from then on what happens: a JSON object a line",
            Answer::Lines,
        ),
    ]
}

const BEFORE: &str = "before the start";

fn change(method: &'static str, path: &str, summary: &str, body: Schema) -> Operation {
    let (path, summary) = (path.to_owned(), summary.to_owned());
    Operation { method, path, summary, body: Some(body), answer: Answer::Nothing }
}

/// What is changed by PUT and PATCH, but for devices.
fn changes(generator: &mut SchemaGenerator) -> Vec<Operation> {
    let early = |method, path, what: &str, body| change(method, path, &format!("{what}, {BEFORE}"), body);
    vec![
        early("put", "/machine-config", "Set CPUs and memory", of::<MachineConfig>(generator)),
        early("patch", "/machine-config", "Change some of it", of::<MachinePatch>(generator)),
        early(
            "put",
            "/cpu-config",
            "Set what the CPUs differ in from the host's",
            of::<CpuConfig>(generator),
        ),
        early("put", "/boot-source", "Set what boots", of::<BootSource>(generator)),
        change(
            "put",
            "/logger",
            "Set the log; again, what is to be changed of it",
            of::<log::Config>(generator),
        ),
        change("put", "/metrics", "Set where metrics go, once", of::<metrics::Config>(generator)),
        early("put", "/serial", "Set where the console goes", of::<console::Config>(generator)),
        change("put", "/mmds", "Set the metadata that the guest can ask for", any_object()),
        change("patch", "/mmds", "Change some of it; what is null goes (RFC 7396)", any_object()),
        early(
            "put",
            "/mmds/config",
            "Set where and how the metadata service answers (`V1` is deprecated)",
            of::<metadata::Config>(generator),
        ),
        change(
            "put",
            "/actions",
            "Start the microVM, ask its guest to end, reset it",
            of::<ActionBody>(generator),
        ),
        change("patch", "/vm", "Pause and resume, after the start", of::<VmBody>(generator)),
        change(
            "put",
            "/snapshot/create",
            "Save the microVM, after the start",
            of::<CreateSnapshot>(generator),
        ),
        early("put", "/snapshot/load", "Restore a microVM that was saved", of::<LoadSnapshot>(generator)),
        change(
            "put",
            "/snapshot/working-set",
            "Note beside the snapshot what its guest needs first, after a restore",
            of::<NoteWorkingSet>(generator),
        ),
        Operation {
            answer: Answer::Json(of::<Made>(generator)),
            ..change(
                "put",
                "/clones",
                "Make a clone; of a template's socket (`alula template`)",
                of::<MakeClone>(generator),
            )
        },
    ]
}

/// What is changed of devices of one kind.
fn changes_of(kind: &DeviceKind, generator: &mut SchemaGenerator) -> Vec<Operation> {
    let body = (kind.schema)(generator);
    let path = match kind.many {
        true => format!("/{}/{{id}}", kind.path),
        false => format!("/{}", kind.path),
    };
    let noun = kind.noun;
    let article = if noun.starts_with('e') { "an" } else { "a" };
    let later = if kind.many { ", or add one to a guest that runs" } else { "" };
    let put = format!("Add or replace {article} {noun}, {BEFORE}{later}");
    let mut list = vec![change("put", &path, &put, body)];
    if kind.many {
        let summary = format!("Take {article} {noun} away from a guest that runs");
        list.push(change("delete", &path, &summary, of::<Unplug>(generator)));
    }
    let below = |place: &str| if place.is_empty() { path.clone() } else { format!("{path}/{place}") };
    list.extend((kind.told_schemas)(generator).into_iter().map(|(place, what, schema)| {
        let (path, summary, answer) = (below(place), what.to_owned(), Answer::Json(schema));
        Operation { method: "get", path, summary, body: None, answer }
    }));
    list.extend((kind.patches)(generator).into_iter().map(|(place, what, body)| {
        let summary = what.map_or_else(|| format!("Change {article} {noun} in use"), str::to_owned);
        Operation { method: "patch", path: below(place), summary, body, answer: Answer::Nothing }
    }));
    list
}

fn any_object() -> Schema {
    schemars::json_schema!({ "type": "object" })
}

/// A config file's sections.
fn config_properties(generator: &mut SchemaGenerator) -> Schema {
    let mut sections = Map::new();
    let mut section = |name: &str, schema: Schema| drop(sections.insert(name.to_owned(), schema.into()));
    section("boot-source", generator.subschema_for::<BootSource>());
    section("machine-config", generator.subschema_for::<MachineConfig>());
    section("cpu-config", generator.subschema_for::<CpuConfig>());
    section("logger", generator.subschema_for::<log::Config>());
    section("metrics", generator.subschema_for::<metrics::Config>());
    section("serial", generator.subschema_for::<console::Config>());
    section("mmds-config", generator.subschema_for::<metadata::Config>());
    for kind in KINDS {
        let one = (kind.schema)(generator);
        let list = || schemars::json_schema!({ "type": "array", "items": one.clone() });
        section(kind.section, if kind.many { list() } else { one.clone() });
    }
    schemars::json_schema!({ "type": "object", "properties": sections })
}

/// The configuration as it is told: all sections of Firecracker's, what was not given as null.
fn config_told_back(generator: &mut SchemaGenerator) -> Schema {
    let mut config = config_properties(generator).to_value();
    let sections = config["properties"].as_object_mut().expect("it has sections");
    sections.remove("serial");
    for (section, schema) in sections.iter_mut() {
        if schema["items"].is_null() && !["machine-config", "boot-source"].contains(&section.as_str()) {
            *schema = match schema["type"].is_null() {
                true => json!({ "nullable": true, "allOf": [schema.take()] }),
                false => json!({ "nullable": true, "type": "object" }),
            };
        }
    }
    config.try_into().expect("an object is a schema")
}

/// The name of a request's function in clients that are generated from the schema, like `putMachineConfig`.
fn operation_id(method: &str, path: &str) -> String {
    let words = path.split(['/', '-']).filter(|word| !word.is_empty() && *word != "{id}");
    let capital = |word: &str| word[..1].to_uppercase() + &word[1..];
    let name: String = words.map(capital).collect();
    format!("{method}{}", if name.is_empty() { "Instance" } else { &name })
}

fn example_of(method: &str, path: &str) -> Option<&'static str> {
    EXAMPLES.iter().find(|(of, at, _)| (*of, *at) == (method, path)).map(|(.., body)| *body)
}

fn openapi() -> Value {
    let mut generator = SchemaSettings::openapi3().into_generator();
    let mut paths = Map::new();
    for Operation { method, path, summary, body, answer } in operations(&mut generator) {
        let success = match answer {
            Answer::Nothing => ("204", json!({ "description": "Done" })),
            Answer::Json(schema) => {
                let content = json!({ "application/json": { "schema": schema } });
                ("200", json!({ "description": "What was asked for", "content": content }))
            }
            Answer::Lines => {
                let content = json!({ "application/x-ndjson": { "schema": { "type": "object" } } });
                ("200", json!({ "description": "Until the process ends", "content": content }))
            }
        };
        let fault = json!({ "$ref": "#/components/responses/Fault" });
        let mut operation = json!({ "operationId": operation_id(method, &path), "summary": summary,
                "responses": { success.0: success.1, "400": fault } });
        if path == "/mmds" && method != "get" {
            // This code is for metadata that is too large for its store, and for nothing else.
            operation["responses"]["413"] = operation["responses"]["400"].clone();
        }
        if let Some(schema) = body {
            let content = json!({ "application/json": { "schema": schema } });
            // A body is required if a request without it is refused as empty.
            let without = route(Dialect::Alula, &method.to_uppercase(), &path, b"").err();
            let is_required = without.is_some_and(|fault| fault.starts_with("Empty "));
            let mut content = content;
            if let Some(example) = example_of(method, &path) {
                content["application/json"]["example"] = serde_json::from_str(example).expect("it is JSON");
            }
            operation["requestBody"] = json!({ "required": is_required, "content": content });
        }
        let place = paths.entry(path.clone()).or_insert_with(|| json!({}));
        place[method] = operation;
        if path.ends_with("{id}") {
            place["parameters"] = json!([{
                "name": "id", "in": "path", "required": true, "schema": { "type": "string" },
                "description": "As in the body: letters, digits and underscores"
            }]);
        }
    }
    let fault = json!({
        "type": "object", "required": ["fault_message"],
        "properties": { "fault_message": { "type": "string", "description": "What is wrong, and what to do" } }
    });
    json!({
        "openapi": "3.0.3",
        "info": {
            "title": "Alula", "version": API_VERSION,
            "description": "Firecracker's API as far as Alula has it, and what Alula adds. HTTP/1.1 over a UNIX socket."
        },
        "servers": [{
            "url": "http://localhost",
            "description": "Over the UNIX socket that `--api-sock` names; the name of the host is of no interest"
        }],
        "paths": paths,
        "components": {
            "schemas": generator.take_definitions(true),
            "responses": { "Fault": {
                "description": "Not done", "content": { "application/json": { "schema": fault } }
            } }
        }
    })
}

fn config_schema() -> Value {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    let mut schema = config_properties(&mut generator).to_value();
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema".into();
    schema["title"] = "A microVM's configuration".into();
    schema["required"] = json!(["boot-source"]);
    schema["$defs"] = generator.take_definitions(true).into();
    schema
}

/// The example bodies, for people.
fn examples() -> String {
    let mut text = "\n## Example bodies\n\nEach is one that is taken; `alula ctl put PATH BODY` sends it, and so does curl:\n\n```sh\n\
             curl --unix-socket alula.sock -X PUT http://localhost/vsock -d '{\"guest_cid\": 3, \"uds_path\": \"v.sock\"}'\n```\n\n\
             | request | body |\n|---|---|\n"
        .to_owned();
    for (method, path, body) in EXAMPLES {
        text += &format!("| {} `{path}` | `{body}` |\n", method.to_uppercase());
    }
    text
}

/// The reference for people, made of the OpenAPI document.
fn markdown(api: &Value) -> String {
    let mut text = "\
# API and config file reference

Made from Alula's own types (`resources/openapi.json` is the same for programs, `alula schema openapi`
prints it). Requests go to the control socket as HTTP/1.1 with JSON bodies, GET without one, and DELETE if you like.
What succeeds answers 200 with JSON or 204 with nothing, what does not 400 with `{\"fault_message\": \"...\"}`.
Fields that are not listed are refused, but for those of `Metrics`, `TokenBucket` and what is in the lists of `CpuConfig`,
which are ignored.
Called `firecracker`, it knows only what Firecracker has.

On the wire a few things are meant otherwise than in Firecracker: `Connection: close` and HTTP/1.0 are
answered and closed, HEAD is answered as GET without the body, bodies may come in chunks, and of ten
connections the one that has been idle longest gives way to a new client. Ten clients in the middle of a
request still mean 503, until one of them has been waited for 30 s in all: that one gives way. Half a request is
given up after 30 s with 408, an answer that is not read after as long without a word. Readers of events are
never closed, and may shut their side for sending.

## Requests

| request | what it does | body |
|---|---|---|
"
    .to_owned();
    let name_of = |schema: &Value| {
        let reference = schema["$ref"].as_str().unwrap_or_default();
        reference.rsplit('/').next().unwrap_or_default().to_owned()
    };
    let link = |name: &str| {
        if name.is_empty() { String::new() } else { format!("[{name}](#{})", name.to_lowercase()) }
    };
    for (path, methods) in api["paths"].as_object().into_iter().flatten() {
        for (method, operation) in
            methods.as_object().into_iter().flatten().filter(|(name, _)| *name != "parameters")
        {
            let body = link(&name_of(&operation["requestBody"]["content"]["application/json"]["schema"]));
            let summary = operation["summary"].as_str().unwrap_or_default();
            text += &format!("| {} `{path}` | {summary} | {body} |\n", method.to_uppercase());
        }
    }
    text += &examples();
    text += "\n## Config file\n\nA JSON object; `alula check` looks for everything wrong with one.\n\n| section | what it holds |\n|---|---|\n";
    let config = config_properties(&mut SchemaSettings::openapi3().into_generator()).to_value();
    for (section, schema) in config["properties"].as_object().into_iter().flatten() {
        let what = match schema["items"].is_object() {
            true => format!("a list of {}", link(&name_of(&schema["items"]))),
            false => link(&name_of(schema)),
        };
        text += &format!("| `{section}` | {what} |\n");
    }
    text += "\n## Types\n";
    for (name, schema) in api["components"]["schemas"].as_object().into_iter().flatten() {
        text += &format!("\n### {name}\n\n{}\n", oneline(schema));
        let required: Vec<_> = schema["required"].as_array().into_iter().flatten().collect();
        let fields = schema["properties"].as_object().filter(|fields| !fields.is_empty());
        if fields.is_some() {
            text += "\n| field | type | default | what it is |\n|---|---|---|---|\n";
        }
        for (field, schema) in fields.into_iter().flatten() {
            let default = match (&schema["default"], required.contains(&&json!(field))) {
                (_, true) => "required".to_owned(),
                (Value::Null, _) => String::new(),
                (default, _) => format!("`{default}`"),
            };
            text +=
                &format!("| `{field}` | {} | {default} | {} |\n", type_of(schema, &link), oneline(schema));
        }
    }
    text
}

fn oneline(schema: &Value) -> String {
    let mut text = schema["description"].as_str().unwrap_or_default().replace('\n', " ").replace('|', "\\|");
    let each = |one: &Value| -> Vec<String> {
        let values = one["enum"].as_array().into_iter().flatten();
        values.map(|value| format!("`{value}`")).collect()
    };
    // Values with a description have a schema of their own, those without share one.
    let constants = schema["oneOf"].as_array().into_iter().flatten().flat_map(|one| {
        let values = each(one);
        match one["description"].as_str() {
            Some(description) => vec![format!("{}: {description}", values.join(", "))],
            None => values,
        }
    });
    let plain = each(schema);
    let values: Vec<_> = constants.chain(plain).collect();
    if !values.is_empty() {
        text += &format!("\n\n- {}", values.join("\n- "));
    }
    text
}

fn type_of(schema: &Value, link: &dyn Fn(&str) -> String) -> String {
    if let Some(reference) = schema["$ref"].as_str() {
        return link(reference.rsplit('/').next().unwrap_or_default());
    }
    for several in ["allOf", "anyOf"] {
        if let Some(first) = schema[several].get(0) {
            return type_of(first, link);
        }
    }
    match schema["type"].as_str() {
        Some("array") => format!("list of {}", type_of(&schema["items"], link)),
        Some(name) => name.to_owned(),
        None => String::new(),
    }
}

/// Compares what is checked in with what the types say now.
pub(super) fn check(file: &str, checked_in: &str, now: &str) {
    if std::env::var_os("ALULA_WRITE_SCHEMA").is_some() {
        std::fs::write(format!("{}/{file}", env!("CARGO_MANIFEST_DIR")), now).unwrap();
    } else {
        assert!(
            checked_in == now,
            "{file} is old: write it anew with `ALULA_WRITE_SCHEMA=1 cargo test --lib schema`"
        );
    }
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap() + "\n"
}

#[test]
fn the_schema_that_is_checked_in_is_what_the_types_say() {
    let api = openapi();
    check("resources/openapi.json", include_str!("../../resources/openapi.json"), &pretty(&api));
    let config = pretty(&config_schema());
    check("resources/config.schema.json", include_str!("../../resources/config.schema.json"), &config);
    check("docs/api.md", include_str!("../../docs/api.md"), &markdown(&api));
}

#[test]
fn every_body_has_an_example_that_is_taken() {
    let mut names = std::collections::BTreeSet::new();
    for (path, methods) in openapi()["paths"].as_object().unwrap() {
        for (method, operation) in
            methods.as_object().unwrap().iter().filter(|(name, _)| *name != "parameters")
        {
            let name = operation["operationId"].as_str().unwrap();
            assert!(names.insert(name.to_owned()), "{name} is there twice");
            let has_body = operation["requestBody"]["content"]["application/json"].is_object();
            assert_eq!(has_body, example_of(method, path).is_some(), "{method} {path}");
        }
    }
    for (method, path, body) in EXAMPLES {
        let value: Value = serde_json::from_str(body).unwrap();
        let id = ["drive_id", "iface_id", "id"].iter().find_map(|field| value[*field].as_str());
        let path = path.replace("{id}", id.unwrap_or("a"));
        let refused = match path.as_str() {
            "/clones" => super::routes::route_of_template("PUT", &path, body.as_bytes()).err(),
            _ => match route(Dialect::Alula, &method.to_uppercase(), &path, body.as_bytes()) {
                Ok(Request::PutDevice(device)) => device.check().err().map(|error| error.to_string()),
                Ok(Request::PutCpuConfig(cpu)) => cpu.check().err().map(|error| error.to_string()),
                other => other.err(),
            },
        };
        // An example of one architecture is refused by the other one.
        let is_taken = refused.as_ref().is_none_or(|words| words.ends_with("aarch64 has no CPUID"));
        assert!(is_taken, "{method} {path}: {refused:?}");
    }
}

#[test]
fn every_operation_of_the_schema_is_served() {
    for (path, methods) in openapi()["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys().filter(|name| *name != "parameters") {
            let method = method.to_uppercase();
            let body: &[u8] = if method == "GET" { b"" } else { b"{}" };
            let error =
                route(Dialect::Alula, &method, &path.replace("{id}", "a"), body).err().unwrap_or_default();
            assert!(!error.contains("Invalid request") && !error.contains("not implemented"), "{error}");
        }
    }
}
