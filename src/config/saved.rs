//! A configuration as saved state: whole, with what no config file says. It is written as JSON, for many types
//! in it can only be read from a format that describes itself.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

use super::Config;
use crate::devices::KINDS;
use crate::error::{Context, Error, Result};
use crate::json;

/// A device by the section of its kind.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct SavedDevice {
    section: String,
    config: Box<RawValue>,
}

/// The list of devices, each as [`SavedDevice`].
pub mod devices {
    use serde::de::Error as _;
    use serde::ser::Error as _;

    use super::*;
    use crate::devices::kind::ConfiguredDevice;

    pub fn serialize<S: Serializer>(devices: &[ConfiguredDevice], serializer: S) -> Result<S::Ok, S::Error> {
        let saved = |device: &ConfiguredDevice| {
            let config = serde_json::value::to_raw_value(device)?;
            Ok(SavedDevice { section: device.kind().section.to_owned(), config })
        };
        let saved: serde_json::Result<Vec<_>> = devices.iter().map(saved).collect();
        saved.map_err(S::Error::custom)?.serialize(serializer)
    }

    pub fn deserialize<'a, D: Deserializer<'a>>(deserializer: D) -> Result<Vec<ConfiguredDevice>, D::Error> {
        let read = |SavedDevice { section, config }: SavedDevice| {
            let kind = KINDS.iter().find(|kind| kind.section == section);
            let kind =
                kind.ok_or_else(|| D::Error::custom(format_args!("`{section}` is no kind of devices")))?;
            kind.parse(config.get().as_bytes()).map_err(D::Error::custom)
        };
        Vec::deserialize(deserializer)?.into_iter().map(read).collect()
    }
}

/// A configuration field by field, as serde derives it; the configuration itself is written as a config file has it.
struct Whole<T>(T);

impl Serialize for Whole<&Config> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // The function that is derived, not the trait's.
        Config::serialize(self.0, serializer)
    }
}

impl<'a> Deserialize<'a> for Whole<Config> {
    fn deserialize<D: Deserializer<'a>>(deserializer: D) -> Result<Self, D::Error> {
        Config::deserialize(deserializer).map(Self)
    }
}

impl Config {
    /// The whole configuration as a text, which [`Config::from_saved`] reads.
    pub fn saved(&self) -> Result<String> {
        serde_json::to_string(&Whole(self)).context("write the configuration")
    }

    /// The configuration that [`Config::saved`] wrote. It is checked as one that somebody gives.
    pub fn from_saved(text: &str) -> Result<Self> {
        Self::read_saved(text).context("read the saved configuration")
    }

    fn read_saved(text: &str) -> Result<Self> {
        let read = json::from_text(text).map_err(|error| Error::config(error.to_string()));
        let Whole(mut config) = read?;
        for device in std::mem::take(&mut config.devices) {
            if config.device(device.kind(), device.id()).is_some() {
                return Err(Error::config(format!("{} is there twice", device.name())));
            }
            config.put(device)?;
        }
        config.check()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use schemars::SchemaGenerator;
    use serde_json::{Map, Value};

    use super::super::{BootSource, CpuConfig, MachineConfig};
    use super::*;
    use crate::devices::console;
    use crate::devices::kind::DeviceKind;
    use crate::dialect::Dialect;
    use crate::{log, metadata, metrics};

    /// Every field of every type is something else than what it is by itself, as far as they go together.
    fn config() -> Config {
        let bucket = |size: u64| format!(r#"{{"size": {size}, "one_time_burst": 3, "refill_time": 7}}"#);
        let limits = format!(r#"{{"bandwidth": {}, "ops": {}}}"#, bucket(5), bucket(6));
        let cpuid = match crate::arch::HAS_CPUID {
            true => {
                r#"[{"leaf": "0x1", "subleaf": "0x2", "flags": 3,
                "modifiers": [{"register": "ecx", "bitmap": "0b1x0"}]}]"#
            }
            false => "[]",
        };
        let registers = r#"[{"addr": "0x10", "bitmap": "0b1x0"}]"#;
        let (msrs, others) = if crate::arch::HAS_CPUID { (registers, "[]") } else { ("[]", registers) };
        let text = format!(
            r#"{{
            "boot-source": {{"kernel_image_path": "k", "initrd_path": "i", "boot_args": "quiet"}},
            "machine-config": {{"vcpu_count": 4, {max}"mem_size_mib": 64, "smt": {smt}, "huge_pages": "Never",
                "watchdog": "none", "cpu_template": "{template}"}},
            "cpu-config": {{"cpuid_modifiers": {cpuid}, "kvm_capabilities": ["!56"], "msr_modifiers": {msrs},
                "reg_modifiers": {others}, "vcpu_features": []}},
            "logger": {{"log_path": "l", "level": "Debug", "show_level": true, "show_log_origin": true,
                "module": "virtio"}},
            "metrics": {{"metrics_path": "m", "emit_id": true, "properties": {{"a": "b"}}}},
            "serial": {{"serial_out_path": "s", "rate_limiter": {bucket}}},
            "drives": [
                {{"drive_id": "data", "path_on_host": "/d", "is_root_device": false, "cache_type": "Writeback",
                  "io_engine": "Async", "num_queues": 3, "threads": 2, "direct_io": true, "discard": true,
                  "rate_limiter": {limits}}},
                {{"drive_id": "root", "path_on_host": "/r", "is_root_device": true, "is_read_only": true,
                  "partuuid": "0eaa91a0-01", "format": "qcow2", "lock": false,
                  "backing": [{{"path_on_host": "/b", "format": "qcow2"}}]}}
            ],
            "network-interfaces": [
                {{"iface_id": "net", "host_dev_name": "tap0", "guest_mac": "06:00:ac:10:00:02", "mtu": 1400,
                  "queue_pairs": 2, "threads": 2, "rx_rate_limiter": {limits}, "tx_rate_limiter": {limits}}},
                {{"iface_id": "user", "user": {{"publish": ["8080:80"], "loopback": true}}}}
            ],
            "mmds-config": {{"network_interfaces": ["net"], "version": "V2", "ipv4_address": "169.254.1.1",
                "imds_compat": true}},
            "vsock": {{"guest_cid": 4, "uds_path": "/v", "vsock_id": "v"}},
            "entropy": {{"rate_limiter": {limits}}},
            "pmem": [
                {{"id": "p", "path_on_host": "/p", "read_only": true, "rate_limiter": {limits}, "lock": false}}
            ],
            "balloon": {{"amount_mib": 5, "deflate_on_oom": true, "stats_polling_interval_s": 6,
                "free_page_hinting": true, "free_page_reporting": true}},
            "memory-hotplug": {{"total_size_mib": 1024, "block_size_mib": 4, "slot_size_mib": 256}},
            "console": {{"rate_limiter": {bucket}}},
            "ports": [{{"id": "a", "name": "org.a", "uds_path": "/a"}}]
        }}"#,
            smt = crate::arch::HAS_SMT,
            max = if crate::arch::HAS_CPUID { r#""max_vcpus": 8, "# } else { "" },
            template = if crate::arch::HAS_CPUID { "T2" } else { "V1N1" },
            bucket = bucket(4),
        );
        let mut config = Config::parse(text.as_bytes()).unwrap();
        (config.boot_timer, config.pci, config.dialect) = (true, true, Dialect::Alula);
        config.firmware_words = Some("case=memory".to_owned());
        config.pcie_slots = if crate::arch::NAME == "aarch64" { 2 } else { 0 };
        config
    }

    /// The kinds of devices that a machine that is saved can have: what another process has of one is in no snapshot.
    fn saved_kinds() -> impl Iterator<Item = &'static DeviceKind> {
        KINDS.iter().filter(|kind| kind.section != "vhost-user")
    }

    /// The names of all fields that any type of a configuration has, but for those that cannot be given yet.
    fn fields() -> BTreeSet<String> {
        let generator = &mut SchemaGenerator::default();
        generator.subschema_for::<BootSource>();
        generator.subschema_for::<MachineConfig>();
        generator.subschema_for::<CpuConfig>();
        generator.subschema_for::<log::Config>();
        generator.subschema_for::<metrics::Config>();
        generator.subschema_for::<console::Config>();
        generator.subschema_for::<metadata::Config>();
        saved_kinds().for_each(|kind| drop((kind.schema)(generator)));
        let types = generator.take_definitions(true);
        let fields = types.values().filter_map(|one| one["properties"].as_object()).flat_map(Map::keys);
        let only_x86_64 = ["smt", "max_vcpus", "leaf", "subleaf", "flags", "modifiers", "register"];
        let cannot = |field: &str| {
            // The disk is what the guest boots from here, and a guest boots from one device.
            ["track_dirty_pages", "socket", "index", "root_device"].contains(&field)
                || !crate::arch::HAS_CPUID && only_x86_64.contains(&field)
        };
        fields.filter(|field| !cannot(field)).cloned().collect()
    }

    /// Notes the fields of `value` that say something else than their default.
    fn note_said(value: &Value, said: &mut BTreeSet<String>) {
        match value {
            Value::Object(map) => {
                for (name, value) in map {
                    // A disk is locked by itself.
                    if !matches!(value, Value::Null | Value::Bool(false)) || name == "lock" {
                        said.insert(name.clone());
                    }
                    note_said(value, said);
                }
            }
            Value::Array(list) => list.iter().for_each(|value| note_said(value, said)),
            _ => {}
        }
    }

    #[test]
    fn a_configuration_comes_back_whole() {
        let config = config();
        let text = config.saved().unwrap();
        let other = Config::from_saved(&text).unwrap();
        assert_eq!(format!("{other:?}"), format!("{config:?}"));
        assert_eq!(other.saved().unwrap(), text);
        let config = Config { dialect: Dialect::Firecracker, devices: Vec::new(), ..Config::default() };
        let other = Config::from_saved(&config.saved().unwrap()).unwrap();
        assert_eq!(format!("{other:?}"), format!("{config:?}"));
        let mut said = BTreeSet::new();
        note_said(&serde_json::from_str(&text).unwrap(), &mut said);
        let silent: Vec<_> = fields().into_iter().filter(|field| !said.contains(field)).collect();
        assert!(silent.is_empty(), "teach this test a value of {silent:?}");
        for kind in saved_kinds() {
            assert!(text.contains(kind.section), "teach this test a configuration with `{}`", kind.section);
        }
    }

    #[test]
    fn a_saved_configuration_is_checked_as_a_given_one() {
        let text = config().saved().unwrap();
        for (from, to, expected) in [
            (r#""pci":true"#, r#""pci":1"#, "invalid type: integer `1`"),
            (r#""pci":true,"#, "", "missing field `pci`"),
            (r#""pci":true"#, r#""pci":true,"speed":1"#, "unknown field `speed`"),
            (r#""vcpu_count":4"#, r#""vcpu_count":0"#, "`machine-config`: The number of vCPUs"),
            (r#""section":"entropy""#, r#""section":"toaster""#, "`toaster` is no kind of devices"),
            (r#""drive_id":"root""#, r#""drive_id":"data""#, "disk `data` is there twice"),
            (r#""is_root_device":false"#, r#""is_root_device":true"#, "A root block device already exists"),
            (
                r#""network_interfaces":["net"]"#,
                r#""network_interfaces":["x"]"#,
                "existing network interface: `x`",
            ),
            (r#""queue_pairs":2"#, r#""queue_pairs":0"#, "0 `queue_pairs` cannot be"),
            (r#""amount_mib":5"#, r#""amount_mib":65"#, "Amount of pages requested is too large."),
        ] {
            assert!(text.contains(from), "{from}: {text}");
            let error = Config::from_saved(&text.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.starts_with("read the saved configuration: "), "{error}");
            assert!(error.contains(expected), "{to}: {error}");
        }
    }
}
