//! Everything a microVM is made of, one serde type per resource: the bodies of the API, the sections
//! of the config file, the answer of `GET /vm/config` and what the command line sets.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::devices::{Device, block, entropy, net};
use crate::error::{Context, Error, Result};

/// A config file of more bytes is refused before it is read into memory.
const CONFIG_FILE_MAX: u64 = 1 << 20;

/// The sections of a config file that other monitors know and this one does not have yet: asked for,
/// they are refused, so that no guest starts without a device that its owner counts on.
const NOT_IMPLEMENTED: [&str; 10] = [
    "vsock",
    "balloon",
    "logger",
    "metrics",
    "mmds-config",
    "cpu-config",
    "pmem",
    "memory-hotplug",
    "serial",
    "mmds",
];

/// A microVM's whole configuration.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Config {
    /// The guest's kernel; none: the embedded firmware guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_source: Option<BootSource>,
    /// CPUs and memory.
    #[serde(default)]
    pub machine_config: MachineConfig,
    /// Disks.
    #[serde(default)]
    pub drives: Vec<block::Config>,
    /// Network interfaces.
    #[serde(default)]
    pub network_interfaces: Vec<net::Config>,
    /// A source of random bytes for the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<entropy::Config>,
    /// Devices are on a PCI bus instead of behind virtio-mmio (`--enable-pci`).
    #[serde(skip)]
    pub pci: bool,
    /// What the embedded firmware guest is told beyond the machine's size (`alula run --cmdline`).
    #[serde(skip)]
    pub firmware_words: Option<String>,
    /// Everything else that a config file says.
    #[serde(flatten, skip_serializing)]
    pub others: BTreeMap<String, Value>,
}

impl Config {
    /// Reads and checks a config file.
    pub fn from_file(path: &Path) -> Result<Self> {
        let attempt = || format!("read config file `{}`", path.display());
        let length = std::fs::metadata(path).with_context(attempt)?.len();
        if length > CONFIG_FILE_MAX {
            return Err(Error::config(format!("its {length} bytes are more than {CONFIG_FILE_MAX}")))
                .with_context(attempt);
        }
        let text = std::fs::read(path).with_context(attempt)?;
        let config: Self = serde_json::from_slice(&text)
            .map_err(|error| Error::config(error.to_string()))
            .with_context(attempt)?;
        config.check().with_context(attempt)?;
        Ok(config)
    }

    /// Whether it makes sense in itself, whatever the host can do.
    pub fn check(&self) -> Result<()> {
        // Empty sections ask for nothing; Firecracker's own files always have `"drives": []`.
        let asks = |value: &Value| match value {
            Value::Null => false,
            Value::Array(items) => !items.is_empty(),
            _ => true,
        };
        if let Some(section) = NOT_IMPLEMENTED.iter().find(|name| self.others.get(**name).is_some_and(asks)) {
            return Err(Error::config(format!("`{section}` is not implemented yet: remove it")));
        }
        self.machine_config.check().context("`machine-config`")?;
        if let Some(source) = &self.boot_source {
            source.check().context("`boot-source`")?;
        }
        for drive in &self.drives {
            drive.check().with_context(|| format!("disk `{}`", drive.drive_id))?;
        }
        for interface in &self.network_interfaces {
            interface.check().with_context(|| format!("network interface `{}`", interface.iface_id))?;
        }
        self.check_uniqueness()
    }

    fn check_uniqueness(&self) -> Result<()> {
        if let Some(id) = repeated(self.drives.iter().map(|drive| &drive.drive_id)) {
            return Err(Error::config(format!("two disks are called `{id}`: each needs a name of its own")));
        }
        if self.drives.iter().filter(|drive| drive.is_root_device).count() > 1 {
            return Err(Error::config("A root block device already exists! (`is_root_device`)"));
        }
        if let Some(id) = repeated(self.network_interfaces.iter().map(|interface| &interface.iface_id)) {
            return Err(Error::config(format!("two network interfaces are called `{id}`")));
        }
        if let Some(mac) =
            repeated(self.network_interfaces.iter().filter_map(|interface| interface.guest_mac))
        {
            return Err(Error::config(format!("The MAC address is already in use: {mac}")));
        }
        Ok(())
    }

    /// Puts a disk into the configuration, in the place of one with the same name.
    pub fn put_drive(&mut self, drive: block::Config) -> Result<()> {
        let mut new = self.clone();
        match new.drives.iter_mut().find(|other| other.drive_id == drive.drive_id) {
            Some(place) => *place = drive,
            None => new.drives.push(drive),
        }
        new.check_uniqueness()?;
        *self = new;
        Ok(())
    }

    /// Puts a network interface into the configuration, in the place of one with the same name.
    pub fn put_network_interface(&mut self, interface: net::Config) -> Result<()> {
        let mut new = self.clone();
        match new.network_interfaces.iter_mut().find(|other| other.iface_id == interface.iface_id) {
            Some(place) => *place = interface,
            None => new.network_interfaces.push(interface),
        }
        new.check_uniqueness()?;
        *self = new;
        Ok(())
    }

    /// The virtio devices, in the order the guest finds them: the root device is its first disk.
    pub fn devices(&self) -> impl Iterator<Item = Device<'_>> {
        let root = self.drives.iter().filter(|drive| drive.is_root_device);
        let others = self.drives.iter().filter(|drive| !drive.is_root_device);
        root.chain(others)
            .map(Device::Block)
            .chain(self.network_interfaces.iter().map(Device::Net))
            .chain(self.entropy.iter().map(Device::Entropy))
    }

    /// What the command line must say of the root device.
    pub fn root_words(&self) -> Option<String> {
        let root = self.drives.iter().find(|drive| drive.is_root_device)?;
        let device = match &root.partuuid {
            Some(partuuid) => format!("PARTUUID={partuuid}"),
            None => "/dev/vda".to_owned(),
        };
        Some(format!("root={device} {}", if root.is_read_only { "ro" } else { "rw" }))
    }
}

fn repeated<T: PartialEq>(names: impl Iterator<Item = T>) -> Option<T> {
    let mut seen = Vec::new();
    for name in names {
        if seen.contains(&name) {
            return Some(name);
        }
        seen.push(name);
    }
    None
}

/// What the guest boots.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel: ELF `vmlinux` or bzImage (x86_64), Image (aarch64).
    pub kernel_image_path: PathBuf,
    /// The initial ramdisk.
    pub initrd_path: Option<PathBuf>,
    /// The kernel's command line; none: `arch::DEFAULT_COMMAND_LINE`.
    pub boot_args: Option<String>,
}

impl BootSource {
    /// Longest command line that both architectures' Linux takes: COMMAND_LINE_SIZE without the NUL.
    pub const BOOT_ARGS_MAX: usize = 2047;

    /// Whether it makes sense in itself; the files are looked at when they are opened.
    pub fn check(&self) -> Result<()> {
        let line = self.boot_args.as_deref().unwrap_or_default();
        if line.len() > Self::BOOT_ARGS_MAX {
            return Err(Error::config(format!(
                "the kernel command line (`boot_args`, --cmdline) has {} bytes, at most {} fit",
                line.len(),
                Self::BOOT_ARGS_MAX
            )));
        }
        if line.contains('\0') {
            return Err(Error::config(
                "the kernel command line (`boot_args`, --cmdline) contains a NUL byte: remove it",
            ));
        }
        Ok(())
    }
}

/// CPUs and memory. A body must say how many CPUs and how much memory; the rest has defaults.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// How many CPUs.
    pub vcpu_count: u16,
    /// Memory in MiB.
    pub mem_size_mib: u64,
    /// Two CPUs per core (x86_64).
    #[serde(default)]
    pub smt: bool,
    /// Note which pages the guest dirties.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// A named set of CPU features.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// What backs guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
}

/// Firecracker's static CPU templates.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "names of the API")]
pub enum CpuTemplate {
    C3,
    T2,
    T2S,
    T2CL,
    T2A,
    V1N1,
    None,
}

/// What backs guest memory.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub enum HugePages {
    /// The host's ordinary pages.
    #[default]
    None,
    /// Transparent huge pages.
    Transparent,
    /// hugetlbfs pages of 2 MiB.
    #[serde(rename = "2M")]
    Huge2M,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            track_dirty_pages: false,
            cpu_template: None,
            huge_pages: HugePages::None,
        }
    }
}

impl MachineConfig {
    /// Whether it makes sense in itself, whatever the host can do.
    pub fn check(&self) -> Result<()> {
        let cpus = self.vcpu_count;
        if cpus == 0 || self.smt && cpus > 1 && !cpus.is_multiple_of(2) {
            return Err(Error::config(
                "The number of vCPUs must be greater than 0 and must be 1 or an even number if SMT is enabled \
                 (`vcpu_count`, --cpus).",
            ));
        }
        if self.mem_size_mib == 0 {
            return Err(Error::config(
                "The memory size (MiB) is either 0, or not a multiple of the configured page size \
                 (`mem_size_mib`, --memory).",
            ));
        }
        if self.smt && !crate::arch::HAS_SMT {
            return Err(Error::config(
                "Enabling simultaneous multithreading is not supported on aarch64 (`smt`).",
            ));
        }
        let not_yet = |field| Err(Error::config(format!("`{field}` is not implemented yet: leave it out")));
        match self {
            Self { track_dirty_pages: true, .. } => not_yet("track_dirty_pages"),
            Self { cpu_template: Some(template), .. } if *template != CpuTemplate::None => {
                not_yet("cpu_template")
            }
            Self { huge_pages, .. } if *huge_pages != HugePages::None => not_yet("huge_pages"),
            _ => Ok(()),
        }
    }

    /// This configuration with the fields of `patch` changed; serde's message when they do not fit.
    pub fn patched(&self, patch: &Map<String, Value>) -> Result<Self, serde_json::Error> {
        let mut fields = serde_json::to_value(self)?;
        let fields_map = fields.as_object_mut().expect("a struct is an object");
        // A null is a field left out, as for every optional field.
        let given = patch.iter().filter(|(_, value)| !value.is_null());
        fields_map.extend(given.map(|(name, value)| (name.clone(), value.clone())));
        serde_json::from_value(fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(text: &str) -> Result<MachineConfig, String> {
        let machine: MachineConfig = serde_json::from_str(text).map_err(|error| error.to_string())?;
        machine.check().map_err(|error| error.to_string())?;
        Ok(machine)
    }

    #[test]
    fn cpus_and_memory_must_be_given_and_make_sense() {
        assert_eq!(machine(r#"{"vcpu_count":1,"mem_size_mib":128}"#), Ok(MachineConfig::default()));
        for (text, expected) in [
            (r#"{"mem_size_mib":128}"#, "missing field `vcpu_count`"),
            (r#"{"vcpu_count":1}"#, "missing field `mem_size_mib`"),
            (r#"{"vcpu_count":0,"mem_size_mib":1}"#, "number of vCPUs must be greater than 0"),
            (r#"{"vcpu_count":70000,"mem_size_mib":1}"#, "invalid value: integer `70000`"),
            (r#"{"vcpu_count":1,"mem_size_mib":0}"#, "memory size (MiB) is either 0"),
            (r#"{"vcpu_count":1,"mem_size_mib":-1}"#, "invalid value: integer `-1`"),
            (r#"{"vcpu_count":"1","mem_size_mib":1}"#, "invalid type: string"),
            (r#"{"vcpu_count":1,"mem_size_mib":1,"speed":9}"#, "unknown field `speed`"),
            (r#"{"vcpu_count":1,"mem_size_mib":2,"huge_pages":"2M"}"#, "`huge_pages` is not implemented yet"),
            (r#"{"vcpu_count":1,"mem_size_mib":2,"huge_pages":"1G"}"#, "unknown variant `1G`"),
            (r#"{"vcpu_count":1,"mem_size_mib":2,"cpu_template":"T2"}"#, "`cpu_template` is not implemented"),
            (r#"{"vcpu_count":1,"mem_size_mib":2,"track_dirty_pages":true}"#, "`track_dirty_pages` is not"),
        ] {
            let error = machine(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn a_patch_changes_what_it_names() {
        let patch = |text: &str| {
            let fields: Map<String, Value> = serde_json::from_str(text).unwrap();
            MachineConfig::default().patched(&fields)
        };
        let patched = patch(r#"{"mem_size_mib": 256, "smt": null}"#).unwrap();
        assert_eq!(patched, MachineConfig { mem_size_mib: 256, ..Default::default() });
        assert!(patch(r#"{"vcpus": 2}"#).unwrap_err().to_string().contains("unknown field `vcpus`"));
    }

    #[test]
    fn a_config_file_with_a_device_we_lack_is_refused_and_foreign_keys_are_not() {
        let check = |text: &str| serde_json::from_str::<Config>(text).unwrap().check();
        check(r#"{"pmem": [], "x-owner": {"a": 1}, "vsock": null}"#).unwrap();
        let error = check(r#"{"pmem": [{"id": "root"}]}"#).unwrap_err();
        assert_eq!(error.to_string(), "`pmem` is not implemented yet: remove it");
    }

    #[test]
    fn the_root_device_is_the_first_disk_and_named_on_the_command_line() {
        let config = |root: &str| -> Config {
            let drive = |id: &str, more: &str| {
                format!(r#"{{"drive_id":"{id}","path_on_host":"/{id}","is_root_device":{more}}}"#)
            };
            let text = format!(r#"{{"drives":[{},{}]}}"#, drive("data", "false"), drive("root", root));
            serde_json::from_str(&text).unwrap()
        };
        let names: Vec<_> = config("true").devices().map(|device| device.name()).collect();
        assert_eq!(names, ["disk `root`", "disk `data`"]);
        assert_eq!(config("true").root_words().as_deref(), Some("root=/dev/vda rw"));
        let partition = config(r#"true,"is_read_only":true,"partuuid":"0eaa91a0-01""#);
        assert_eq!(partition.root_words().as_deref(), Some("root=PARTUUID=0eaa91a0-01 ro"));
        assert_eq!(config("false").root_words(), None);
    }

    #[test]
    fn a_command_line_that_does_not_fit_is_refused() {
        let check = |line: String| {
            BootSource { kernel_image_path: "k".into(), initrd_path: None, boot_args: Some(line) }.check()
        };
        check("x".repeat(2047)).unwrap();
        assert!(check("x".repeat(2048)).unwrap_err().to_string().contains("at most 2047 fit"));
        assert!(check("a\0b".to_owned()).unwrap_err().to_string().contains("NUL"));
    }
}
