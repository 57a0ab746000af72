//! Does what requests ask, by calls to the microVM, in the words of the API.

use std::time::Instant;

use serde_json::{Value, json};

use super::bodies::{Action, FirecrackerVersion, InstanceInfo, Unplug, VmState};
use super::{API_VERSION, Reply, Request, Response, guest, observe, routes};
use crate::arch;
use crate::config::MachinePatch;
use crate::devices::fixed::FixedDevice;
use crate::devices::keyboard::Keyboard;
use crate::devices::kind::ConfiguredDevice;
use crate::error::Error;
use crate::jobs::Ticket;
use crate::machine::RunState;
use crate::metadata::store::Refused;
use crate::metrics::View;
use crate::microvm::Microvm;

const AFTER_START: &str = "The requested operation is not supported after starting the microVM.";
const BEFORE_START: &str = "The requested operation is not supported before starting the microVM.";

/// A request that is answered when its job is done.
struct Waiting {
    ticket: Ticket,
    /// What the message of a job that failed begins with.
    area: &'static str,
    asked: Asked,
}

/// What is told of a request when it is answered.
struct Asked {
    method: String,
    path: String,
    begun: Instant,
    is_deprecated: bool,
}

impl Asked {
    fn answered(
        method: &str,
        path: &str,
        begun: Instant,
        is_deprecated: bool,
        response: Response,
    ) -> Response {
        observe::served(method, path, &response, begun.elapsed());
        if is_deprecated { Response::Deprecated(Box::new(response)) } else { response }
    }
}

/// Who does what requests ask.
#[derive(Default)]
pub struct Handler {
    waiting: Vec<Waiting>,
}

impl Handler {
    /// Parses a request and does it, or begins to.
    pub fn serve(&mut self, microvm: &mut Microvm, method: &str, path: &str, body: &[u8]) -> Reply {
        let begun = Instant::now();
        let request = routes::route(microvm.config().dialect, method, path, body);
        let is_deprecated = request.as_ref().is_ok_and(Request::is_deprecated);
        let reply = request.and_then(|request| handle(microvm, request));
        let response = match reply.unwrap_or_else(|message| Response::Fault(message).into()) {
            Reply::Now(response) => response,
            Reply::Later { ticket, area } => {
                let (method, path) = (method.to_owned(), path.to_owned());
                let asked = Asked { method, path, begun, is_deprecated };
                self.waiting.push(Waiting { ticket, area, asked });
                return Reply::Later { ticket, area };
            }
        };
        Asked::answered(method, path, begun, is_deprecated, response).into()
    }

    /// How a request is answered whose job has ended so; none: no request waits for it.
    pub fn job_ended(&mut self, ticket: Ticket, result: Result<Option<Value>, Error>) -> Option<Response> {
        let place = self.waiting.iter().position(|waiting| waiting.ticket == ticket)?;
        let Waiting { area, asked, .. } = self.waiting.swap_remove(place);
        let response = match result {
            Ok(None) => Response::Done,
            Ok(Some(value)) => Response::Value(value),
            Err(error) => Response::Fault(fault(area)(error)),
        };
        let Asked { method, path, begun, is_deprecated } = asked;
        Some(Asked::answered(&method, &path, begun, is_deprecated, response))
    }
}

/// Whether a request comes at its time; the error is the fault message.
fn check_time(microvm: &Microvm, request: &Request) -> Result<(), String> {
    use Request::*;
    let has_started = microvm.state().is_some();
    match request {
        // Firecracker's answer to who has none that can come.
        PatchMachineConfig(_) if has_started && !microvm.has_cpus_to_come() => Err(AFTER_START.to_owned()),
        PutMachineConfig(_)
        | PutCpuConfig(_)
        | PutBootSource(_)
        | PutLogger(_)
        | PutMetrics(_)
        | PutSerial(_)
        | PutMetadataConfig(_)
        | LoadSnapshot(_)
        | Action(super::Action::InstanceStart)
            if has_started =>
        {
            Err(AFTER_START.to_owned())
        }
        PutDevice(device) if has_started && !device.kind().many => Err(AFTER_START.to_owned()),
        // A guest that has started without the service will never ask for its metadata.
        Metadata | PutMetadata(_) | PatchMetadata(_)
            if has_started && microvm.config().mmds_config.is_none() =>
        {
            Err(metadata_fault(&Refused::NotInitialized))
        }
        PatchVm(_)
        | PatchDevice(..)
        | DeleteDevice(..)
        | Guest
        | CreateSnapshot(_)
        | NoteWorkingSet(_)
        | Action(
            super::Action::SendCtrlAltDel
            | super::Action::FlushMetrics
            | super::Action::Shutdown
            | super::Action::Reset,
        ) if !has_started => Err(BEFORE_START.to_owned()),
        TellDevice(kind, place) if !has_started && (!place.is_empty() || kind.tells_itself) => {
            Err(BEFORE_START.to_owned())
        }
        _ => Ok(()),
    }
}

/// Does one request; the error is the fault message.
fn handle(microvm: &mut Microvm, request: Request) -> Result<Reply, String> {
    use Request::*;
    check_time(microvm, &request)?;
    let done = match request {
        Instance => return Ok(Response::Value(instance(microvm)).into()),
        Version => {
            let version = FirecrackerVersion { firecracker_version: API_VERSION };
            return Ok(Response::Value(to_value(&version)).into());
        }
        MachineConfig => return Ok(Response::Value(to_value(&microvm.config().machine_config)).into()),
        VmConfig => return Ok(Response::Value(to_value(microvm.config())).into()),
        Events => return Ok(Response::Events.into()),
        Guest => {
            return Ok(match guest::look(microvm) {
                Ok(ticket) => Reply::Later { ticket, area: "Guest error" },
                Err(error) => Response::Value(to_value(&guest::nobody(&error))).into(),
            });
        }
        Metrics => return Ok(Response::Metrics(microvm.count(View::Total)).into()),
        PutLogger(logger) => microvm
            .set_logger(logger)
            .map_err(fault("Logger error: Cannot initialize the logging system due to bad user input")),
        PutMetrics(metrics) => microvm
            .set_metrics(metrics)
            .map_err(fault("Metrics error: Cannot initialize the metrics system due to bad user input")),
        PutSerial(serial) => microvm.set_serial(serial).map_err(fault("Serial config error")),
        PutMachineConfig(machine) => microvm.set_machine(machine).map_err(fault("Machine config error")),
        PatchMachineConfig(patch) => patch_machine(microvm, &patch),
        PutCpuConfig(cpu) => microvm.set_cpu(cpu).map_err(fault("Configure CPU error")),
        PutBootSource(source) => microvm.set_boot_source(source).map_err(fault("Boot source error")),
        Metadata => {
            let data = microvm.metadata().get().unwrap_or_else(|| json!({}));
            return Ok(Response::Value(data).into());
        }
        PutMetadata(data) => return metadata_changed(microvm.metadata().put(data)),
        PatchMetadata(patch) => return metadata_changed(microvm.metadata().patch(patch)),
        // Firecracker's word, of which clients know it.
        PutMetadataConfig(config) => microvm.set_metadata_config(config).map_err(fault("MMMDS config error")),
        PutDevice(device) => put_device(microvm, device),
        PatchDevice(kind, change) => {
            return now_or_later(kind.update_fault, microvm.patch_device(kind, change));
        }
        TellDevice(kind, place) => {
            let area = if place.is_empty() { kind.fault } else { kind.update_fault };
            let told = microvm.tell_device(kind, place).map_err(fault(area))?;
            return Ok(Response::Value(told).into());
        }
        DeleteDevice(kind, id, Unplug { force }) => {
            let agent = guest::agent(microvm);
            return now_or_later(kind.fault, microvm.unplug_device(kind, &id, force, agent));
        }
        Action(action) => act(microvm, action),
        CreateSnapshot(body) => return later("Create snapshot error", microvm.create_snapshot(&body.plan())),
        LoadSnapshot(body) => {
            let loaded = body.plan().and_then(|load| microvm.load_snapshot(&load, "PUT /snapshot/load"));
            loaded.map_err(fault("Load snapshot error"))
        }
        NoteWorkingSet(body) => return later("Working set error", microvm.note_working_set(body.after())),
        PatchVm(VmState::Paused) => microvm.pause("PATCH /vm").map_err(fault("Internal VMM error")),
        PatchVm(VmState::Resumed) => microvm.resume("PATCH /vm").map_err(fault("Internal VMM error")),
    };
    done.map(|()| Response::Done.into())
}

/// Changes CPUs and memory before the start; later, gives the guest CPUs, or asks it to let some go.
fn patch_machine(microvm: &mut Microvm, patch: &MachinePatch) -> Result<(), String> {
    let before = microvm.config().machine_config.vcpu_count;
    microvm.patch_machine(patch).map_err(fault("Machine config error"))?;
    guest::change_cpus(microvm, microvm.config().machine_config.vcpu_count > before);
    Ok(())
}

/// Configures a device before the start; later, gives it to the guest.
fn put_device(microvm: &mut Microvm, device: ConfiguredDevice) -> Result<(), String> {
    let area = device.kind().fault;
    let put = match microvm.state() {
        None => microvm.put_device(device),
        Some(_) => {
            let name = device.name();
            microvm.plug_device(device).inspect(|()| guest::look_for_device(microvm, &name))
        }
    };
    put.map_err(fault(area))
}

/// The answer to a request for which a job has begun, or could not.
fn later(area: &'static str, begun: Result<Ticket, Error>) -> Result<Reply, String> {
    begun.map(|ticket| Reply::Later { ticket, area }).map_err(fault(area))
}

/// The answer to a request that is done, or for which a job has begun.
fn now_or_later(area: &'static str, done: Result<Option<Ticket>, Error>) -> Result<Reply, String> {
    match done.map_err(fault(area))? {
        Some(ticket) => Ok(Reply::Later { ticket, area }),
        None => Ok(Response::Done.into()),
    }
}

fn instance(microvm: &Microvm) -> Value {
    let state = match microvm.state() {
        None => "Not started",
        Some(RunState::Running) => "Running",
        Some(RunState::Paused) => "Paused",
    };
    let id = microvm.id().to_owned();
    to_value(&InstanceInfo { id, state, vmm_version: API_VERSION, app_name: "Firecracker" })
}

fn act(microvm: &mut Microvm, action: Action) -> Result<(), String> {
    match action {
        Action::InstanceStart if microvm.config().boot_source.is_none() => {
            Err("Start microvm error: Cannot start microvm without kernel configuration.".to_owned())
        }
        Action::InstanceStart => microvm.start("InstanceStart").map_err(fault("Start microvm error")),
        Action::SendCtrlAltDel if arch::fixed_place(Keyboard::NAME).is_none() => {
            Err(format!("SendCtrlAltDel does not supported on {}.", arch::NAME))
        }
        Action::SendCtrlAltDel => microvm.send_ctrl_alt_del().map_err(fault("Internal VMM error")),
        // Ours alone: a guest that stands still would see it some day, after whoever asks has given up.
        Action::Shutdown if microvm.state() == Some(RunState::Paused) => {
            Err("the guest is paused, and sees no power button: resume it first (`alula ctl ID resume`), or end it at \
                 once (`alula ctl ID stop --force`)"
                .to_owned())
        }
        Action::Shutdown => microvm.request_shutdown().map_err(fault("Internal VMM error")),
        Action::Reset => microvm.reset("Reset").map_err(fault("Reset error")),
        Action::FlushMetrics => {
            microvm.write_metrics();
            Ok(())
        }
    }
}

fn metadata_fault(refused: &Refused) -> String {
    format!("MMDS error: {refused}")
}

/// The answer to a client that changes the metadata.
fn metadata_changed(result: Result<(), Refused>) -> Result<Reply, String> {
    match result {
        Ok(()) => Ok(Response::Done.into()),
        Err(Refused::TooLarge(message)) => {
            Ok(Response::TooLarge(format!("MMDS limit exceeded error: {message}")).into())
        }
        Err(refused) => Err(metadata_fault(&refused)),
    }
}

fn to_value(section: &impl serde::Serialize) -> Value {
    serde_json::to_value(section).expect("names and numbers are JSON")
}

/// Prefixes an error with the area that the API names.
fn fault(area: &'static str) -> impl Fn(Error) -> String {
    move |error| format!("{area}: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, MachineConfig};

    struct Controller {
        microvm: Microvm,
        handler: Handler,
    }

    impl Controller {
        fn serve(&mut self, method: &str, path: &str, body: &[u8]) -> Response {
            match self.handler.serve(&mut self.microvm, method, path, body) {
                Reply::Now(response) => response,
                Reply::Later { .. } => panic!("`{method} {path}` waits for a job"),
            }
        }
    }

    fn controller() -> Controller {
        let microvm = Microvm::new("test".to_owned(), Config::default());
        Controller { microvm: *microvm, handler: Handler::default() }
    }

    fn fault_of(response: Response) -> String {
        match response {
            Response::Fault(message) => message,
            other => panic!("expected a fault, got {other:?}"),
        }
    }

    #[test]
    fn configuration_is_told_back_as_it_was_given() {
        let mut controller = controller();
        let put = br#"{"vcpu_count": 2, "mem_size_mib": 64}"#;
        assert_eq!(controller.serve("PUT", "/machine-config", put), Response::Done);
        assert_eq!(controller.serve("PATCH", "/machine-config", br#"{"mem_size_mib": 65}"#), Response::Done);
        let expected = json!({
            "vcpu_count": 2, "mem_size_mib": 65, "smt": false, "track_dirty_pages": false, "huge_pages": "None"
        });
        assert_eq!(controller.serve("GET", "/machine-config", b""), Response::Value(expected.clone()));
        let whole = json!({
            "boot-source": { "kernel_image_path": "", "initrd_path": null, "boot_args": null },
            "machine-config": expected, "drives": [], "network-interfaces": [], "pmem": [],
            "balloon": null, "cpu-config": null, "entropy": null, "logger": null, "memory-hotplug": null,
            "metrics": null, "mmds-config": null, "vsock": null
        });
        assert_eq!(controller.serve("GET", "/vm/config", b""), Response::Value(whole));
    }

    #[test]
    fn a_refused_change_changes_nothing() {
        let mut controller = controller();
        let refused = controller.serve("PATCH", "/machine-config", br#"{"vcpu_count": 0}"#);
        assert!(fault_of(refused).starts_with("Machine config error: The number of vCPUs must be greater"));
        let missing = br#"{"kernel_image_path": "/nonexistent/vmlinux"}"#;
        let refused = fault_of(controller.serve("PUT", "/boot-source", missing));
        assert!(
            refused.starts_with("Boot source error: open kernel `/nonexistent/vmlinux`: No such"),
            "{refused}"
        );
        assert_eq!(controller.microvm.config().machine_config, MachineConfig::default());
        assert_eq!(controller.microvm.config().boot_source, None);
    }

    #[test]
    fn a_client_cannot_configure_devices_without_end() {
        let mut controller = controller();
        let mut put = |number: usize| {
            let body = json!({ "iface_id": format!("n{number}"), "user": {} }).to_string();
            controller.serve("PUT", &format!("/network-interfaces/n{number}"), body.as_bytes())
        };
        for number in 0..1000 {
            assert_eq!(put(number), Response::Done, "{number}");
        }
        let refused = fault_of(put(1000));
        assert!(refused.contains("there are 1000 devices already"), "{refused}");
        assert_eq!(put(7), Response::Done, "one that is there can be replaced");
    }

    #[test]
    fn what_needs_a_running_machine_is_refused_before_the_start() {
        let mut controller = controller();
        for (method, path, body) in [
            ("PATCH", "/vm", r#"{"state": "Paused"}"#),
            ("PUT", "/actions", r#"{"action_type": "SendCtrlAltDel"}"#),
            ("PUT", "/actions", r#"{"action_type": "FlushMetrics"}"#),
        ] {
            assert_eq!(fault_of(controller.serve(method, path, body.as_bytes())), BEFORE_START);
        }
        let start = fault_of(controller.serve("PUT", "/actions", br#"{"action_type": "InstanceStart"}"#));
        assert_eq!(start, "Start microvm error: Cannot start microvm without kernel configuration.");
    }

    #[test]
    fn a_request_is_answered_by_how_its_job_ended() {
        let mut handler = Handler::default();
        let mut wait = |ticket, path: &str, is_deprecated| {
            let asked = Asked {
                method: "PUT".to_owned(),
                path: path.to_owned(),
                begun: Instant::now(),
                is_deprecated,
            };
            handler.waiting.push(Waiting { ticket, area: "Job error", asked });
        };
        wait(3, "/a", false);
        wait(4, "/b", true);
        wait(5, "/c", false);
        assert_eq!(handler.job_ended(5, Ok(None)), Some(Response::Done));
        assert_eq!(handler.job_ended(4, Ok(None)), Some(Response::Deprecated(Box::new(Response::Done))));
        let failed = handler.job_ended(3, Err(Error::host("the disk is full")));
        assert_eq!(fault_of(failed.unwrap()), "Job error: the disk is full");
        assert_eq!(handler.job_ended(3, Ok(None)), None, "nobody waits for it");
    }
}
