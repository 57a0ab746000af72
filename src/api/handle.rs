//! Does what requests ask: holds the configuration before the start and the machine after it.

use std::time::Instant;

use serde_json::Value;

use super::observe::{self, LATENCIES};
use super::{
    API_VERSION, Action, FirecrackerVersion, InstanceInfo, Request, Response, VmState, metrics, routes,
};
use crate::arch;
use crate::config::{BootSource, Config, CpuConfig, MachineConfig};
use crate::devices::console;
use crate::devices::fixed::FixedDevice;
use crate::devices::keyboard::Keyboard;
use crate::devices::kind::{Change, Device, Kind};
use crate::error::{Error, Result};
use crate::events::{self, Event};
use crate::host::{Access, Host, Sharing};
use crate::log;
use crate::machine::{Machine, Prepared, State};
use crate::metrics::{self as counted, View};

const AFTER_START: &str = "The requested operation is not supported after starting the microVM.";
const BEFORE_START: &str = "The requested operation is not supported before starting the microVM.";

/// One microVM under control: from its first request to its end.
pub struct Controller {
    id: String,
    config: Config,
    host: Host,
    metrics: Option<metrics::Output>,
    prepared: Option<Prepared>,
    machine: Option<Machine>,
}

impl Controller {
    /// Controls the microVM that `config` describes, not started yet.
    pub fn new(id: String, config: Config) -> Self {
        Self { id, config, host: Host::default(), metrics: None, prepared: None, machine: None }
    }

    /// Lets disks be shared with others, with a warning.
    pub fn warn_of_sharing(&mut self) {
        self.host.warn_of_sharing();
    }

    /// Opens where the configuration, as it was given, says that messages and metrics go.
    pub fn open_outputs(&mut self) -> Result<()> {
        if let Some(logger) = &self.config.logger {
            log::configure(&self.id, logger)?;
        }
        if let Some(metrics) = &self.config.metrics {
            self.metrics = Some(metrics::Output::open(metrics.clone())?);
        }
        Ok(())
    }

    /// Writes a line of metrics, if they go anywhere.
    pub fn write_metrics(&mut self) {
        if let Some(output) = &mut self.metrics {
            output.write(&self.id, self.machine.as_ref());
        }
    }

    /// Writes a line of metrics when it is time for one; to be called about once a second while the
    /// machine is there.
    pub fn look_at_metrics(&mut self) {
        if let Some(output) = &mut self.metrics {
            output.flush();
            if output.is_due() {
                self.write_metrics();
            }
        }
    }

    /// The machine, once it has started.
    pub fn machine(&mut self) -> Option<&mut Machine> {
        self.machine.as_mut()
    }

    /// Does what the machine wants done; to be called when its `wake_fd` is readable.
    pub fn attend(&mut self) {
        if let Some(machine) = &mut self.machine {
            machine.attend(&mut self.host);
        }
    }

    /// Does what does not depend on the configuration, ahead, while nobody waits. What stands in the
    /// way is told by `start`.
    pub fn prepare(&mut self) {
        if self.prepared.is_none() && self.machine.is_none() {
            self.prepared = Prepared::new().ok();
        }
    }

    /// Builds, loads and starts the machine; without a boot source it runs the firmware guest.
    /// `reason`: who wants it.
    pub fn start(&mut self, reason: &'static str) -> Result<()> {
        let prepared = match self.prepared.take() {
            Some(prepared) => prepared,
            None => Prepared::new()?,
        };
        let mut machine = Machine::build(&self.id, &self.config, &mut self.host, prepared)?;
        machine.load(&self.config, &mut self.host)?;
        self.host.release_all();
        // Told first: what the guest does comes after it.
        events::tell(|| Event::Started { reason });
        machine.resume()?;
        self.machine = Some(machine);
        self.write_metrics();
        Ok(())
    }

    /// Parses a request and does it.
    pub fn serve(&mut self, method: &str, path: &str, body: &[u8]) -> Response {
        let begun = Instant::now();
        let request = routes::route(self.config.dialect, method, path, body);
        let deprecated = request.as_ref().is_ok_and(Request::is_deprecated);
        let response = request.and_then(|request| self.handle(request)).unwrap_or_else(Response::Fault);
        observe::served(method, path, &response, begun.elapsed());
        if deprecated { Response::Deprecated(Box::new(response)) } else { response }
    }

    /// Does one request; the error is the fault message.
    fn handle(&mut self, request: Request) -> Result<Response, String> {
        use Request::*;
        let started = self.machine.is_some();
        match request {
            PutMachineConfig(_)
            | PatchMachineConfig(_)
            | PutCpuConfig(_)
            | PutBootSource(_)
            | PutLogger(_)
            | PutMetrics(_)
            | PutSerial(_)
            | Action(super::Action::InstanceStart)
                if started =>
            {
                return Err(AFTER_START.to_owned());
            }
            PutDevice(ref device) if started => {
                return Err(match device.kind().many {
                    true => self.cannot_hotplug("adding a device to a running microVM"),
                    false => AFTER_START.to_owned(),
                });
            }
            PatchVm(_)
            | PatchDevice(..)
            | DeleteDevice(..)
            | Action(super::Action::SendCtrlAltDel | super::Action::FlushMetrics | super::Action::Shutdown)
                if !started =>
            {
                return Err(BEFORE_START.to_owned());
            }
            _ => {}
        }
        match request {
            Instance => Ok(Response::Value(self.instance())),
            Version => {
                let version = FirecrackerVersion { firecracker_version: API_VERSION };
                Ok(Response::Value(to_value(&version)))
            }
            MachineConfig => Ok(Response::Value(to_value(&self.config.machine_config))),
            VmConfig => Ok(Response::Value(to_value(&self.config))),
            Events => Ok(Response::Events),
            Metrics => {
                Ok(Response::Value(Value::Object(metrics::collect(self.machine.as_ref(), View::Total))))
            }
            PutLogger(logger) => self.set_logger(logger),
            PutMetrics(metrics) => self.set_metrics(metrics),
            PutSerial(serial) => self.set_serial(serial),
            PutMachineConfig(machine) => self.set_machine_config(machine),
            PatchMachineConfig(patch) => self.set_machine_config(self.config.machine_config.patched(&patch)),
            PutCpuConfig(cpu) => self.set_cpu_config(cpu),
            PutBootSource(source) => self.set_boot_source(source),
            PutDevice(device) => self.put_device(device),
            PatchDevice(kind, change) => self.patch_device(kind, change),
            DeleteDevice(..) => Err(self.cannot_hotplug("removing a device from a running microVM")),
            Action(action) => self.act(action),
            PatchVm(state) => self.set_state(state),
        }
    }

    fn instance(&self) -> Value {
        let state = match self.machine.as_ref().map(Machine::state) {
            None => "Not started",
            Some(State::Running) => "Running",
            Some(State::Paused) => "Paused",
        };
        let id = self.id.clone();
        to_value(&InstanceInfo { id, state, vmm_version: API_VERSION, app_name: "Firecracker" })
    }

    fn set_machine_config(&mut self, machine: MachineConfig) -> Result<Response, String> {
        self.config.check_machine(&machine).map_err(fault("Machine config error"))?;
        self.config.machine_config = machine;
        Ok(Response::Done)
    }

    /// Whether the host's CPUs have what is to be changed is known at the start.
    fn set_cpu_config(&mut self, cpu: CpuConfig) -> Result<Response, String> {
        cpu.check().map_err(fault("CPU config error"))?;
        self.config.cpu_config = Some(cpu);
        Ok(Response::Done)
    }

    /// The files are opened now: a wrong path is refused where it is named, and what is at the path
    /// now is what boots.
    fn set_boot_source(&mut self, source: BootSource) -> Result<Response, String> {
        source.check().map_err(fault("Boot source error"))?;
        self.host
            .hold(&source.files(), Access::Read, Sharing::Refused)
            .map_err(fault("Boot source error"))?;
        self.config.boot_source = Some(source);
        Ok(Response::Done)
    }

    fn set_logger(&mut self, logger: log::Config) -> Result<Response, String> {
        const FAULT: &str = "Logger error: Cannot initialize the logging system due to bad user input";
        log::configure(&self.id, &logger).map_err(fault(FAULT))?;
        self.config.logger = Some(self.config.logger.take().unwrap_or_default().changed(&logger));
        Ok(Response::Done)
    }

    fn set_metrics(&mut self, metrics: counted::Config) -> Result<Response, String> {
        const FAULT: &str = "Metrics error: Cannot initialize the metrics system due to bad user input";
        if self.metrics.is_some() {
            return Err(format!("{FAULT}: Reinitialization of metrics not allowed."));
        }
        self.metrics = Some(metrics::Output::open(metrics.clone()).map_err(fault(FAULT))?);
        self.config.metrics = Some(metrics);
        Ok(Response::Done)
    }

    /// The file is opened now, as the kernel is.
    fn set_serial(&mut self, serial: console::Config) -> Result<Response, String> {
        let path = serial.serial_out_path.as_deref();
        self.host.hold_console(path).map_err(fault("Serial config error"))?;
        self.config.serial = Some(serial);
        Ok(Response::Done)
    }

    /// What the device needs is opened now, as the kernel is.
    fn put_device(&mut self, device: Device) -> Result<Response, String> {
        let fault = fault(device.kind().fault);
        device.check().map_err(&fault)?;
        // A device that is refused must hold no file or interface of the host.
        self.config.check_beside(&device).map_err(&fault)?;
        device.hold(&mut self.host).map_err(&fault)?;
        self.config.put(device).map_err(&fault)?;
        Ok(Response::Done)
    }

    fn patch_device(&mut self, kind: &Kind, change: Change) -> Result<Response, String> {
        let fault = fault(kind.fault);
        let device = self.config.device(kind, &change.id);
        let unknown = || Error::config(format!("there is no {}", kind.name(&change.id)));
        let device = device.ok_or_else(unknown).map_err(&fault)?.clone();
        let changed = device.patched(&change).map_err(&fault)?;
        // Before the device has it: a change that is refused changes nothing.
        self.config.check_beside(&changed).map_err(&fault)?;
        let machine = self.machine.as_mut().expect("what needs a machine is refused before the start");
        machine.patch_device(&device.name(), change.patch(), &mut self.host).map_err(&fault)?;
        self.config.put(changed).map_err(&fault)?;
        events::tell(|| observe::changed(&device, &change));
        Ok(Response::Done)
    }

    /// Adding and removing devices while the guest runs needs a bus that knows of it.
    fn cannot_hotplug(&self, what: &str) -> String {
        let reason = if self.config.pci { "" } else { "PCI is not enabled: " };
        format!("{reason}{what} is not implemented yet.")
    }

    fn act(&mut self, action: Action) -> Result<Response, String> {
        match action {
            Action::InstanceStart if self.config.boot_source.is_none() => {
                Err("Start microvm error: Cannot start microvm without kernel configuration.".to_owned())
            }
            Action::InstanceStart => self.start("InstanceStart").map_err(fault("Start microvm error")),
            Action::SendCtrlAltDel if arch::fixed_place(Keyboard::NAME).is_none() => {
                Err(format!("SendCtrlAltDel does not supported on {}.", arch::NAME))
            }
            Action::SendCtrlAltDel => self.started().send_ctrl_alt_del().map_err(fault("Internal VMM error")),
            Action::Shutdown => self.started().request_shutdown().map_err(fault("Internal VMM error")),
            Action::FlushMetrics => {
                self.write_metrics();
                Ok(())
            }
        }
        .map(|()| Response::Done)
    }

    fn set_state(&mut self, state: VmState) -> Result<Response, String> {
        let machine = self.started();
        let (before, begun) = (machine.state(), Instant::now());
        let (result, latency) = match state {
            VmState::Paused => (machine.pause(), [&LATENCIES.pause_vm, &LATENCIES.vmm_pause_vm]),
            VmState::Resumed => (machine.resume(), [&LATENCIES.resume_vm, &LATENCIES.vmm_resume_vm]),
        };
        result.map_err(fault("Internal VMM error"))?;
        latency.iter().for_each(|latency| latency.set(begun.elapsed().as_micros() as u64));
        if machine.state() != before {
            let reason = "PATCH /vm";
            events::tell(|| match state {
                VmState::Paused => Event::Paused { reason },
                VmState::Resumed => Event::Resumed { reason },
            });
        }
        Ok(Response::Done)
    }

    fn started(&mut self) -> &mut Machine {
        self.machine.as_mut().expect("what needs a machine is refused before the start")
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
    use serde_json::json;

    use super::*;

    fn controller() -> Controller {
        Controller::new("test".to_owned(), Config::default())
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
        assert_eq!(controller.config.machine_config, MachineConfig::default());
        assert_eq!(controller.config.boot_source, None);
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
}
