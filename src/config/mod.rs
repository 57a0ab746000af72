//! Everything a microVM is made of, one serde type per resource: the bodies of the API, the sections
//! of the config file, the answer of `GET /vm/config` and what the command line sets.

mod cpu;
mod cpu_template;
mod file;
mod machine;
mod mend;
mod saved;

use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};

use crate::arch;
use crate::devices::KINDS;
use crate::devices::console;
use crate::devices::kind::{ConfiguredDevice, DeviceKind};
use crate::devices::net;
use crate::devices::slots::PciSlots;
use crate::devices::virtio_console;
use crate::dialect::Dialect;
use crate::error::{Context, Error, Result};
use crate::log;
use crate::metadata;
use crate::metrics;
use crate::pci;
use crate::platform::CpuChanges;
use crate::sink::{Purpose, Sink};

pub use cpu::CpuConfig;
pub use cpu_template::CpuTemplate;
pub use file::Problem;
pub use machine::{BootSource, HugePages, MachineConfig, MachinePatch, WatchdogAction};

/// More devices than any machine has room for. A client that configures more and more would have us grow, and
/// each is compared with those before it; a file of CONFIG_FILE_MAX has room for tens of thousands.
const DEVICES_MAX: usize = 1000;

const BOOT_SOURCE: &str = "boot-source";
const MACHINE_CONFIG: &str = "machine-config";
const CPU_CONFIG: &str = "cpu-config";
const LOGGER: &str = "logger";
const METRICS: &str = "metrics";
const SERIAL: &str = "serial";
const MMDS_CONFIG: &str = "mmds-config";

/// Sections that are always null when a configuration is told: where messages and metrics go is never
/// told by Firecracker, and the device of the last is not there yet. Its clients look for all of them.
const NOT_TOLD: [&str; 2] = [LOGGER, METRICS];

/// A microVM's whole configuration. As JSON it has the sections of a config file, as Firecracker tells
/// them: all of its own, what is not there as null, and the root drive first. Saved state has it field by field, as they
/// are listed here (`saved.rs`).
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Config {
    /// The guest's kernel; none: the embedded firmware guest.
    pub boot_source: Option<BootSource>,
    /// CPUs and memory.
    pub machine_config: MachineConfig,
    /// Changes of the CPUs against those of the host; none: the CPUs are those that KVM supports.
    pub cpu_config: Option<CpuConfig>,
    /// Where messages go.
    pub logger: Option<log::Config>,
    /// Where metrics go.
    pub metrics: Option<metrics::Config>,
    /// Where the guest's serial console writes.
    pub serial: Option<console::Config>,
    /// The metadata service; none: nobody answers.
    pub mmds_config: Option<metadata::Config>,
    /// There is a register where a guest says that it has booted (`--boot-timer`); not in a file.
    pub boot_timer: bool,
    /// Devices are on a PCI bus instead of behind virtio-mmio (`--enable-pci`); not in a file.
    pub pci: bool,
    /// How many PCIe hotplug slots there are beside that bus (`--pcie-slots`); not in a file, and not in states that are
    /// older or have none.
    #[serde(default, skip_serializing_if = "is_none")]
    pub pcie_slots: u8,
    /// Whose API is spoken; not in a file.
    pub dialect: Dialect,
    /// What the embedded firmware guest is told beyond the machine's size (`alula run --cmdline`);
    /// not in a file.
    pub firmware_words: Option<String>,
    /// The virtio devices, as they were added; no two replace each other.
    #[serde(with = "saved::devices")]
    devices: Vec<ConfiguredDevice>,
}

fn is_none(count: &u8) -> bool {
    *count == 0
}

impl Config {
    /// Whether it makes sense in itself, whatever the host can do.
    pub fn check(&self) -> Result<()> {
        self.check_slots()?;
        self.check_machine(&self.machine_config).context("`machine-config`")?;
        if let Some(source) = &self.boot_source {
            source.check().context("`boot-source`")?;
        }
        if let Some(cpu) = &self.cpu_config {
            cpu.check().context("`cpu-config`")?;
        }
        if let Some(metadata) = &self.mmds_config {
            metadata.check().and_then(|()| self.check_metadata(metadata)).context("`mmds-config`")?;
        }
        self.devices.iter().try_for_each(|device| device.check().with_context(|| device.name()))
    }

    /// Whether the machine can have that many PCIe slots.
    pub fn check_slots(&self) -> Result<()> {
        let refuse =
            |reason| Err(Error::config(reason)).with_context(|| format!("--pcie-slots {}", self.pcie_slots));
        match self.pcie_slots {
            0 => Ok(()),
            _ if arch::fixed_place(PciSlots::NAME).is_some() => refuse(
                "ACPI has a slot for every device of the PCI bus on this architecture: leave it out, --enable-pci is enough"
                    .to_owned(),
            ),
            _ if !self.pci => refuse("the slots are beside a PCI bus: give --enable-pci, too".to_owned()),
            slots if usize::from(slots) > pci::SLOTS_MAX => {
                refuse(format!("a machine has room for {} slots at most", pci::SLOTS_MAX))
            }
            _ => Ok(()),
        }
    }

    /// Whether anything of it says what is to boot, on what machine.
    pub fn says_what_boots(&self) -> bool {
        self.boot_source.is_some()
            || self.machine_config != MachineConfig::default()
            || self.mmds_config.is_some()
            || !self.devices.is_empty()
    }

    /// Whether another process works in the guest's memory.
    pub fn shares_memory(&self) -> bool {
        self.devices.iter().any(ConfiguredDevice::shares_memory)
    }

    /// The kernel's command line for a guest of which somebody at a terminal wants to hear, where none is given.
    pub fn default_command_line(&self) -> &'static str {
        match self.devices.iter().any(|device| device.config::<virtio_console::console::Config>().is_some()) {
            true => arch::DEFAULT_COMMAND_LINE_OF_VIRTIO,
            false => arch::DEFAULT_COMMAND_LINE,
        }
    }

    /// The network interfaces, by their ids.
    pub fn interfaces(&self) -> impl Iterator<Item = &str> {
        self.devices().filter(|device| device.config::<net::Config>().is_some()).map(ConfiguredDevice::id)
    }

    /// Whether the metadata service can answer where `metadata` says.
    pub fn check_metadata(&self, metadata: &metadata::Config) -> Result<()> {
        metadata.check_interfaces(|id| self.interfaces().any(|interface| interface == id))
    }

    /// Has the CPUs and the memory of `machine`. A template of CPUs comes in place of other changes of them.
    pub fn set_machine(&mut self, machine: MachineConfig) -> Result<()> {
        self.check_machine(&machine)?;
        if machine.cpu_template.is_some_and(|template| template != CpuTemplate::None) {
            self.cpu_config = None;
        }
        self.machine_config = machine;
        Ok(())
    }

    /// Changes the CPUs so, instead of by a template.
    pub fn set_cpu(&mut self, cpu: CpuConfig) -> Result<()> {
        cpu.check()?;
        self.machine_config.cpu_template = None;
        self.cpu_config = Some(cpu);
        Ok(())
    }

    /// Whether `machine` makes sense here.
    pub fn check_machine(&self, machine: &MachineConfig) -> Result<()> {
        machine.check(self.dialect)?;
        let fits = |device: &&ConfiguredDevice| device.check_memory(machine.mem_size_mib).is_ok();
        match self.devices.iter().find(|device| !fits(device)) {
            None => Ok(()),
            // Firecracker's words.
            Some(device) => Err(Error::config(format!(
                "The memory size (MiB) is smaller than the previously set {} target size. (`mem_size_mib`, --memory: \
                 {} MiB, `amount_mib`: {} MiB)",
                device.kind().noun,
                machine.mem_size_mib,
                serde_json::to_value(device).unwrap_or_default()["amount_mib"]
            ))),
        }
    }

    /// Whether `device` can be in this machine, beside those that it does not replace.
    pub fn check_beside(&self, device: &ConfiguredDevice) -> Result<()> {
        let mut others = self.devices.iter().filter(|other| !device.replaces(other));
        if others.clone().count() >= DEVICES_MAX {
            return Err(Error::config(format!(
                "there are {DEVICES_MAX} devices already, more than any machine takes"
            )));
        }
        let are_at_odds =
            |one: &ConfiguredDevice, other: &ConfiguredDevice| one.shares_memory() && other.room().is_some();
        if others.clone().any(|other| are_at_odds(device, other) || are_at_odds(other, device)) {
            return Err(Error::config(
                "memory that is plugged (`memory-hotplug`) cannot be shared with the vhost-user backend of a \
                 device (`socket`): leave one of both out",
            ));
        }
        others.try_for_each(|other| device.check_beside(other))?;
        device.check_memory(self.machine_config.mem_size_mib)
    }

    /// Puts a device into the configuration, in the place of one that it replaces.
    pub fn put(&mut self, device: ConfiguredDevice) -> Result<()> {
        self.check_beside(&device)?;
        match self.devices.iter_mut().find(|other| device.replaces(other)) {
            Some(place) => *place = device,
            None => self.devices.push(device),
        }
        Ok(())
    }

    /// The device of `kind` called `id`.
    pub fn device(&self, kind: &DeviceKind, id: &str) -> Option<&ConfiguredDevice> {
        self.devices.iter().find(|device| device.kind() == kind && device.id() == id)
    }

    /// Takes the device out that log lines and errors call `name`.
    pub fn remove(&mut self, name: &str) {
        self.devices.retain(|device| device.name() != name);
    }

    fn devices_of<'a>(&'a self, kind: &'a DeviceKind) -> impl Iterator<Item = &'a ConfiguredDevice> {
        self.devices.iter().filter(move |device| device.kind() == kind)
    }

    /// The virtio devices, in the order the guest finds them: the root device is the first of its kind.
    pub fn devices(&self) -> impl Iterator<Item = &ConfiguredDevice> {
        KINDS.iter().flat_map(|kind| {
            let root = self.devices_of(kind).filter(|device| device.root_words().is_some());
            root.chain(self.devices_of(kind).filter(|device| device.root_words().is_none()))
        })
    }

    /// Looks for everything that it names of the host, and changes nothing: what is not there, or may not be
    /// used by this user.
    pub fn look(&self) -> Vec<Error> {
        let mut wrong = Vec::new();
        if let Some(source) = &self.boot_source {
            wrong.extend(source.look());
        }
        wrong.extend(self.devices().filter_map(|device| device.look().err()));
        let log = self.logger.as_ref().and_then(|logger| logger.log_path.as_deref());
        let metrics = self.metrics.as_ref().map(|metrics| metrics.metrics_path.as_path());
        let serial = self.serial.as_ref().and_then(|serial| serial.serial_out_path.as_deref());
        let outputs = [(Purpose::Log, log), (Purpose::Metrics, metrics), (Purpose::Serial, serial)];
        let outputs = outputs.into_iter().filter_map(|(purpose, path)| Some((purpose, path?)));
        wrong.extend(outputs.filter_map(|(purpose, path)| Sink::look(purpose, path).err()));
        wrong
    }

    /// How the CPUs differ from the host's.
    pub fn cpu_changes(&self) -> CpuChanges {
        match (&self.cpu_config, self.machine_config.cpu_template) {
            (Some(config), _) => config.changes(),
            (None, Some(template)) => template.changes(),
            (None, None) => CpuChanges::default(),
        }
    }

    /// What the command line must say of the root device.
    pub fn root_words(&self) -> Option<String> {
        self.devices.iter().find_map(ConfiguredDevice::root_words)
    }
}

impl Serialize for Config {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut sections = serializer.serialize_map(None)?;
        match &self.boot_source {
            Some(source) => sections.serialize_entry(BOOT_SOURCE, source)?,
            None => sections.serialize_entry(BOOT_SOURCE, &BootSource::default())?,
        }
        sections.serialize_entry(MACHINE_CONFIG, &self.machine_config)?;
        sections.serialize_entry(CPU_CONFIG, &self.cpu_config)?;
        sections.serialize_entry(MMDS_CONFIG, &self.mmds_config)?;
        for name in NOT_TOLD {
            sections.serialize_entry(name, &())?;
        }
        for kind in KINDS {
            let devices: Vec<_> = self.devices().filter(|device| device.kind() == kind).collect();
            // Clients of Firecracker's need not know of what is not there.
            if kind.is_ours && devices.is_empty() {
                continue;
            }
            match devices.as_slice() {
                devices if kind.many => sections.serialize_entry(kind.section, devices)?,
                devices => sections.serialize_entry(kind.section, &devices.first())?,
            }
        }
        sections.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_that_no_machine_has_are_refused() {
        let has_acpi = crate::arch::NAME == "x86_64";
        for (pci, pcie_slots, expected) in [
            (false, 0, None),
            (true, 0, None),
            (true, 15, None),
            (false, 1, Some("--pcie-slots 1: the slots are beside a PCI bus: give --enable-pci")),
            (true, 16, Some("--pcie-slots 16: a machine has room for 15 slots at most")),
        ] {
            let checked = Config { pci, pcie_slots, ..Config::default() }.check();
            let expected =
                if has_acpi && pcie_slots > 0 { Some("ACPI has a slot for every device") } else { expected };
            match (checked, expected) {
                (Ok(()), None) => {}
                (Err(error), Some(expected)) => assert!(error.to_string().contains(expected), "{error}"),
                (checked, _) => panic!("{pci} {pcie_slots}: {checked:?}"),
            }
        }
    }

    #[test]
    fn the_root_device_is_the_first_disk_and_named_on_the_command_line() {
        let config = |root: &str| -> Config {
            let drive = |id: &str, more: &str| {
                format!(r#"{{"drive_id":"{id}","path_on_host":"/{id}","is_root_device":{more}}}"#)
            };
            let text = format!(r#"{{"drives":[{},{}]}}"#, drive("data", "false"), drive("root", root));
            Config::parse(text.as_bytes()).unwrap()
        };
        let names: Vec<_> = config("true").devices().map(|device| device.name()).collect();
        assert_eq!(names, ["disk `root`", "disk `data`"]);
        assert_eq!(config("true").root_words().as_deref(), Some("root=/dev/vda rw"));
        let partition = config(r#"true,"is_read_only":true,"partuuid":"0eaa91a0-01""#);
        assert_eq!(partition.root_words().as_deref(), Some("root=PARTUUID=0eaa91a0-01 ro"));
        assert_eq!(config("false").root_words(), None);
    }
}
