//! The resources that every microVM has: what it boots, CPUs and memory.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::CpuTemplate;
use crate::dialect::Dialect;
use crate::error::{Error, Result};
use crate::host::{Access, Host, Sharing};
use crate::json;
use crate::platform::node::CpuRegisters;

/// No guest has more memory, in MiB: x86_64 and aarch64 have 2^52 physical addresses at most. A size beyond that would
/// overflow where it is counted in bytes.
const MEMORY_MAX_MIB: u64 = 1 << 32;

/// What the guest boots.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "BootSource"))]
#[serde(deny_unknown_fields, expecting = "struct BootSourceConfig")]
pub struct BootSource {
    /// The kernel: ELF `vmlinux` or bzImage (x86_64), Image, compressed or not (aarch64).
    #[serde(deserialize_with = "json::path")]
    pub kernel_image_path: PathBuf,
    /// The initial ramdisk.
    #[serde(default, deserialize_with = "json::path_or_null")]
    pub initrd_path: Option<PathBuf>,
    /// The kernel's command line; none: Firecracker's, for a guest that says nothing and
    /// reboots when it panics.
    pub boot_args: Option<String>,
}

impl BootSource {
    /// One that makes sense in itself, as JSON.
    pub(super) const EXAMPLE: &'static str = r#"{"kernel_image_path": "vmlinux"}"#;

    /// Its files, by name.
    pub fn files(&self) -> [(&'static str, Option<&Path>); 2] {
        [("kernel", Some(&self.kernel_image_path)), ("initrd", self.initrd_path.as_deref())]
    }

    /// What stands in the way of opening its files.
    pub(super) fn look(&self) -> impl Iterator<Item = Error> {
        let hold = |file| Host::default().hold(&[file], Access::Read, Sharing::Refused).err();
        self.files().into_iter().filter_map(hold)
    }

    /// Longest command line that both architectures' Linux takes: COMMAND_LINE_SIZE without the NUL.
    pub const BOOT_ARGS_MAX: usize = 2047;

    /// Firecracker's command line for who gives none: a guest that says nothing and reboots when it panics.
    pub const DEFAULT_BOOT_ARGS: &str =
        "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce";

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
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "MachineConfiguration"))]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// How many CPUs.
    #[serde(deserialize_with = "json::cpus")]
    pub vcpu_count: u16,
    /// How many CPUs it can have while it runs: with this, `vcpu_count` can be changed then, up to so many (on aarch64
    /// where the host has Linux 6.4 or newer).
    #[serde(default, deserialize_with = "json::cpus_or_null", skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u16>,
    /// Memory in MiB.
    #[serde(deserialize_with = "json::size")]
    pub mem_size_mib: u64,
    /// Two CPUs per core (x86_64).
    #[serde(default, deserialize_with = "json::or_default")]
    pub smt: bool,
    /// Note which pages the guest and its devices write: a `Diff` snapshot then has what was written since the
    /// snapshot before it.
    #[serde(default, deserialize_with = "json::or_default")]
    pub track_dirty_pages: bool,
    /// A named set of changes of what the CPUs show of themselves, instead of those of `/cpu-config`. The one of both
    /// that is given last counts.
    #[serde(default, skip_serializing_if = "is_no_template")]
    pub cpu_template: Option<CpuTemplate>,
    /// What backs guest memory.
    #[serde(default, deserialize_with = "json::or_default")]
    pub huge_pages: HugePages,
    /// Ours: what is done when the guest lets its watchdog expire; none: the guest has no watchdog.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<WatchdogAction>,
}

fn is_no_template(template: &Option<CpuTemplate>) -> bool {
    matches!(template, None | Some(CpuTemplate::None))
}

/// Which pages guest memory has. Huge pages make a guest faster, as it takes fewer faults; the first
/// byte that it touches of one takes 2 MiB of the host.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum HugePages {
    /// Those that the host's policy on transparent huge pages gives.
    #[default]
    None,
    /// Transparent huge pages, unless the host's policy is never to give them.
    Transparent,
    /// Huge pages of 2 MiB of the host's pool (hugetlbfs), all of which the guest has from its start on
    /// (`sysctl vm.nr_hugepages`). A balloon gives none of them back, and a snapshot is restored into them by a
    /// page-fault handler only.
    #[serde(rename = "2M")]
    Huge2M,
    /// Small pages whatever the host's policy is, for many small guests on one host.
    Never,
}

/// The action that is taken when the guest lets its watchdog expire, in the words of QEMU and libvirt. Readers of events
/// are told of it in any case.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum WatchdogAction {
    /// The machine is reset: the guest boots again.
    #[serde(rename = "reset")]
    Reset,
    /// The guest ends.
    #[serde(rename = "poweroff")]
    Poweroff,
    /// Nothing: the guest goes on.
    #[serde(rename = "none")]
    Tell,
}

impl WatchdogAction {
    const ALL: [Self; 3] = [Self::Reset, Self::Poweroff, Self::Tell];

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Poweroff => "poweroff",
            Self::Tell => "none",
        }
    }
}

impl FromStr for WatchdogAction {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|action| action.name() == text);
        found.ok_or_else(|| "expected `reset`, `poweroff` or `none` (an event alone)".to_owned())
    }
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            max_vcpus: None,
            mem_size_mib: 128,
            smt: false,
            track_dirty_pages: false,
            cpu_template: None,
            huge_pages: HugePages::None,
            watchdog: None,
        }
    }
}

impl MachineConfig {
    /// One that makes sense in itself, as JSON.
    pub(super) const EXAMPLE: &'static str = r#"{"vcpu_count": 1, "mem_size_mib": 128}"#;

    /// The fields that Firecracker knows, of a change, too.
    pub const PUBLISHED: &[&str] =
        &["vcpu_count", "mem_size_mib", "smt", "cpu_template", "track_dirty_pages", "huge_pages"];

    /// Whether it makes sense in itself and in the API that is spoken, whatever the host can do.
    pub fn check(&self, dialect: Dialect) -> Result<()> {
        let (cpus, vcpus_max) = (self.vcpu_count, dialect.vcpus_max());
        let too_many = vcpus_max.is_some_and(|most| cpus > most);
        if cpus == 0 || too_many || self.smt && cpus > 1 && !cpus.is_multiple_of(2) {
            let most = vcpus_max.map_or(String::new(), |most| format!(", less than {most}"));
            return Err(Error::config(format!(
                "The number of vCPUs must be greater than 0{most} and must be 1 or an even number if SMT is \
                 enabled. (`vcpu_count`, --cpus)"
            )));
        }
        self.check_max_vcpus(dialect)?;
        if dialect == Dialect::Firecracker && self.huge_pages == HugePages::Never {
            return Err(Error::config(
                "unknown variant `Never`, expected one of `None`, `Transparent`, `2M` (`huge_pages`)",
            ));
        }
        if dialect == Dialect::Firecracker && self.watchdog.is_some() {
            return Err(Error::config("unknown field `watchdog`: Firecracker has no watchdog"));
        }
        let page_mib = match self.huge_pages {
            HugePages::None | HugePages::Never => 1,
            HugePages::Transparent | HugePages::Huge2M => 2,
        };
        if self.mem_size_mib > MEMORY_MAX_MIB {
            return Err(Error::config(format!(
                "The memory size is more than any machine has. (`mem_size_mib`, --memory: {} MiB, where {MEMORY_MAX_MIB} MiB \
                 are the most)",
                self.mem_size_mib
            )));
        }
        if self.mem_size_mib == 0 || !self.mem_size_mib.is_multiple_of(page_mib) {
            // Firecracker's words.
            return Err(Error::config(format!(
                "The memory size (MiB) is either 0, or not a multiple of the configured page size. \
                 (`mem_size_mib`, --memory: {} MiB, where a multiple of {page_mib} MiB is expected)",
                self.mem_size_mib
            )));
        }
        if self.smt && !crate::arch::HAS_SMT {
            return Err(Error::config(
                "Enabling simultaneous multithreading is not supported on aarch64. (`smt`)",
            ));
        }
        self.cpu_template.map_or(Ok(()), CpuTemplate::check)
    }

    /// Refuses a `max_vcpus` of more CPUs than there can be, or of fewer than the guest begins with.
    fn check_max_vcpus(&self, dialect: Dialect) -> Result<()> {
        let (cpus, Some(most)) = (self.vcpu_count, self.max_vcpus) else { return Ok(()) };
        if dialect == Dialect::Firecracker {
            let published = Self::PUBLISHED.join("`, `");
            return Err(Error::config(format!("unknown field `max_vcpus`, expected one of `{published}`")));
        }
        let refuse = |reason: String| Err(Error::config(format!("`max_vcpus` (--max-cpus): {reason}")));
        match most {
            0 => refuse("a guest has one CPU at least: give 1 or more, or leave it out".to_owned()),
            _ if most < cpus => refuse(format!(
                "the guest can have at most {most} CPUs, and {cpus} (`vcpu_count`, --cpus) are more: ask for no more, or \
                 start it with more that can come"
            )),
            _ if most > CpuRegisters::CPUS_MAX => refuse(format!(
                "{most} CPUs are too many: at most {} where some can come while the guest runs",
                CpuRegisters::CPUS_MAX
            )),
            _ if self.smt && most > 1 && !most.is_multiple_of(2) => {
                refuse(format!("{most} CPUs cannot be two per core (`smt`): give an even number"))
            }
            _ => Ok(()),
        }
    }

    /// How many CPUs the machine has, whether the guest has been given them or not.
    pub fn vcpus_made(&self) -> u16 {
        self.max_vcpus.unwrap_or(self.vcpu_count)
    }

    /// This configuration with what `patch` names changed.
    pub fn patched(&self, patch: &MachinePatch) -> Self {
        Self {
            vcpu_count: patch.vcpu_count.unwrap_or(self.vcpu_count),
            max_vcpus: patch.max_vcpus.or(self.max_vcpus),
            mem_size_mib: patch.mem_size_mib.unwrap_or(self.mem_size_mib),
            smt: patch.smt.unwrap_or(self.smt),
            track_dirty_pages: patch.track_dirty_pages.unwrap_or(self.track_dirty_pages),
            cpu_template: patch.cpu_template.or(self.cpu_template),
            huge_pages: patch.huge_pages.unwrap_or(self.huge_pages),
            watchdog: patch.watchdog.or(self.watchdog),
        }
    }
}

/// Body of `PATCH /machine-config`: what is to be changed of it.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "PartialMachineConfiguration"))]
#[serde(deny_unknown_fields, expecting = "struct MachineConfigUpdate")]
#[allow(missing_docs, reason = "as in `MachineConfig`")]
pub struct MachinePatch {
    #[serde(default, deserialize_with = "json::cpus_or_null")]
    pub vcpu_count: Option<u16>,
    #[serde(default, deserialize_with = "json::cpus_or_null")]
    pub max_vcpus: Option<u16>,
    #[serde(default, deserialize_with = "json::size_or_null")]
    pub mem_size_mib: Option<u64>,
    pub smt: Option<bool>,
    pub track_dirty_pages: Option<bool>,
    pub cpu_template: Option<CpuTemplate>,
    pub huge_pages: Option<HugePages>,
    pub watchdog: Option<WatchdogAction>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch;

    fn machine(text: &str) -> Result<MachineConfig, String> {
        let machine: MachineConfig = serde_json::from_str(text).map_err(|error| error.to_string())?;
        machine.check(Dialect::Alula).map_err(|error| error.to_string())?;
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
            (
                r#"{"vcpu_count":1,"mem_size_mib":0}"#,
                "--memory: 0 MiB, where a multiple of 1 MiB is expected)",
            ),
            (r#"{"vcpu_count":1,"mem_size_mib":4294967297}"#, "4294967296 MiB are the most"),
            (r#"{"vcpu_count":1,"mem_size_mib":-1}"#, "invalid value: integer `-1`"),
            (r#"{"vcpu_count":"1","mem_size_mib":1}"#, "invalid type: string"),
            (r#"{"vcpu_count":1,"mem_size_mib":1,"speed":9}"#, "unknown field `speed`"),
            (
                r#"{"vcpu_count":1,"mem_size_mib":3,"huge_pages":"2M"}"#,
                "not a multiple of the configured page",
            ),
            (r#"{"vcpu_count":1,"mem_size_mib":3,"huge_pages":"Transparent"}"#, "not a multiple of the"),
            (r#"{"vcpu_count":1,"mem_size_mib":2,"huge_pages":"1G"}"#, "unknown variant `1G`"),
            (r#"{"vcpu_count":1,"mem_size_mib":2,"watchdog":"stop"}"#, "unknown variant `stop`"),
            (
                if crate::arch::HAS_CPUID {
                    r#"{"vcpu_count":1,"mem_size_mib":2,"cpu_template":"V1N1"}"#
                } else {
                    r#"{"vcpu_count":1,"mem_size_mib":2,"cpu_template":"T2"}"#
                },
                "`cpu_template`: ",
            ),
        ] {
            let error = machine(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn never_and_a_watchdog_are_no_words_of_firecrackers() {
        let machine = |pages: &str, mib: u64| -> MachineConfig {
            let text = format!(r#"{{"vcpu_count":1,"mem_size_mib":{mib},"huge_pages":"{pages}"}}"#);
            serde_json::from_str(&text).unwrap()
        };
        for (pages, mib) in [("None", 3), ("Never", 3), ("Transparent", 2), ("2M", 2)] {
            machine(pages, mib).check(Dialect::Alula).unwrap();
        }
        machine("Transparent", 2).check(Dialect::Firecracker).unwrap();
        let watched = MachineConfig { watchdog: Some(WatchdogAction::Reset), ..MachineConfig::default() };
        watched.check(Dialect::Alula).unwrap();
        let error = watched.check(Dialect::Firecracker).unwrap_err().to_string();
        assert!(error.starts_with("unknown field `watchdog`"), "{error}");
        let error = machine("Never", 2).check(Dialect::Firecracker).unwrap_err().to_string();
        assert!(error.starts_with("unknown variant `Never`"), "{error}");
    }

    #[test]
    fn a_patch_changes_what_it_names() {
        let patch: MachinePatch = serde_json::from_str(r#"{"mem_size_mib": 256, "smt": null}"#).unwrap();
        let patched = MachineConfig::default().patched(&patch);
        assert_eq!(patched, MachineConfig { mem_size_mib: 256, ..Default::default() });
    }

    #[test]
    fn cpus_that_can_come_are_no_fewer_than_there_are_at_first() {
        let machine = |cpus: u16, most: u16, more: &str| {
            machine(&format!(r#"{{"vcpu_count":{cpus},"max_vcpus":{most},"mem_size_mib":1{more}}}"#))
        };
        assert_eq!(machine(1, 512, "").unwrap().vcpus_made(), 512);
        let of_smt = (2, 5, r#","smt":true"#, "5 CPUs cannot be two per core");
        let refused = [
            (3, 2, "", "at most 2 CPUs, and 3 (`vcpu_count`, --cpus) are more"),
            (1, 0, "", "a guest has one CPU at least: give 1 or more"),
            (1, 513, "", "513 CPUs are too many: at most 512"),
        ];
        if arch::HAS_SMT {
            assert_eq!(machine(4, 4, r#","smt":true"#).unwrap().vcpus_made(), 4);
        }
        for (cpus, most, more, expected) in refused.into_iter().chain(arch::HAS_SMT.then_some(of_smt)) {
            let error = machine(cpus, most, more).unwrap_err();
            assert!(error.starts_with("`max_vcpus` (--max-cpus): ") && error.contains(expected), "{error}");
        }
        let config = MachineConfig { max_vcpus: Some(2), ..MachineConfig::default() };
        let error = config.check(Dialect::Firecracker).unwrap_err().to_string();
        assert!(error.starts_with("unknown field `max_vcpus`, expected one of `vcpu_count`"), "{error}");
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
