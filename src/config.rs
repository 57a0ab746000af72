//! Everything a microVM is made of, one serde type per resource: the bodies of the API, the sections
//! of the config file, the answer of `GET /vm/config` and what the command line sets.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

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
}

/// What the guest boots.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel: ELF `vmlinux` or bzImage (x86_64), Image (aarch64).
    pub kernel_image_path: PathBuf,
    /// The initial ramdisk.
    pub initrd_path: Option<PathBuf>,
    /// The kernel's command line.
    pub boot_args: Option<String>,
}

/// CPUs and memory.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct MachineConfig {
    /// How many CPUs.
    pub vcpu_count: u16,
    /// Memory in MiB.
    pub mem_size_mib: u64,
    /// Two CPUs per core.
    pub smt: bool,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self { vcpu_count: 1, mem_size_mib: 128, smt: false }
    }
}
