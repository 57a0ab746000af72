//! What can be said on the command line, with its help, and the configuration that comes of it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::api::BODY_MAX;
use crate::arch;
use crate::config::{BootSource, Config};
use crate::error::{Error, Result};

/// Firecracker's limit on a microVM's name.
const ID_MAX: usize = 64;

/// A microVM monitor: one process runs one virtual machine on Linux KVM.
#[derive(Parser)]
#[command(name = "alula", version, disable_help_subcommand = true)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    Run(Run),
    Serve(Serve),
    /// Write the image of the embedded firmware guest to standard output
    ///
    /// It boots as a kernel by `alula serve` and by other monitors.
    Firmware,
}

/// Boot a guest, put its console on this terminal and return how it ended
///
/// The exit code is the guest's own (docs/exit-codes.md): 0 powered off, N the code it wrote to the
/// exit register, 120 reset, 121 halted for good, 122 triple fault, 123 the host could not go on
/// running it, 125 it could not be started, 130 left by Ctrl-A X.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  alula run                                   the firmware guest: a self-test of this host\n  alula run vmlinux --initrd initramfs.cpio --cpus 2 --memory 512M"
)]
pub struct Run {
    /// The guest's kernel: vmlinux or bzImage on x86_64, Image on aarch64 [default: the embedded firmware guest]
    pub kernel: Option<PathBuf>,
    /// The initial ramdisk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line [default: the serial console, and an end when it panics]; for the
    /// firmware guest: what it is to do
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// How many CPUs [default: 1]
    #[arg(long, value_name = "N")]
    pub cpus: Option<u16>,
    /// Memory with its unit, M or G (MiB, GiB); a bare number is MiB [default: 128M]
    #[arg(long, value_name = "SIZE", value_parser = mebibytes)]
    pub memory: Option<u64>,
    /// Read the configuration from this JSON file (Firecracker's format); other options override it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Also serve the control API on this socket
    #[arg(long, value_name = "SOCKET")]
    pub api_sock: Option<PathBuf>,
    /// The microVM's name in the API
    #[arg(long, default_value = "anonymous-instance", value_parser = id)]
    pub id: String,
}

/// Wait for requests on a control socket (Firecracker's API)
///
/// The guest's serial console is standard input and output; messages go to standard error. The
/// exit code is 0 when the guest powered off or reset, else as `alula run` returns it; 1 on errors,
/// 153 for wrong arguments.
#[derive(Args)]
#[command(
    after_help = "Example:\n  alula serve --api-sock /tmp/alula.sock &\n  curl --unix-socket /tmp/alula.sock http://localhost/"
)]
pub struct Serve {
    /// Where to listen: a path where nothing is yet
    #[arg(long, value_name = "SOCKET", default_value = "/run/firecracker.socket")]
    pub api_sock: PathBuf,
    /// Start the microVM that this JSON file describes at once
    #[arg(long, value_name = "FILE")]
    pub config_file: Option<PathBuf>,
    /// Serve no API
    #[arg(long, requires = "config_file")]
    pub no_api: bool,
    /// The microVM's name: 1 to 64 letters, digits and hyphens
    #[arg(long, default_value = "anonymous-instance", value_parser = id)]
    pub id: String,
    /// The largest request body, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = BODY_MAX)]
    pub http_api_max_payload_size: usize,
}

impl Run {
    /// What the config file says, and on top of it what the options say.
    pub fn config(&self) -> Result<Config> {
        let mut config = match &self.config {
            Some(path) => Config::from_file(path)?,
            None => Config::default(),
        };
        if let Some(kernel) = &self.kernel {
            config.boot_source = Some(BootSource {
                kernel_image_path: kernel.clone(),
                initrd_path: self.initrd.clone(),
                boot_args: None,
            });
        }
        match &mut config.boot_source {
            Some(source) if self.cmdline.is_some() => source.boot_args = self.cmdline.clone(),
            Some(_) => {}
            None => config.firmware_words = self.cmdline.clone(),
        }
        let machine = &mut config.machine_config;
        machine.vcpu_count = self.cpus.unwrap_or(machine.vcpu_count);
        machine.mem_size_mib = self.memory.unwrap_or(machine.mem_size_mib);
        config.check()?;
        Ok(config)
    }
}

impl Serve {
    /// What the config file says, if there is one.
    pub fn config(&self) -> Result<Option<Config>> {
        let Some(path) = &self.config_file else { return Ok(None) };
        let config = Config::from_file(path)?;
        match config.boot_source {
            Some(_) => Ok(Some(config)),
            None => Err(Error::config(format!(
                "read config file `{}`: `boot-source` is missing: it names the kernel to boot on {}",
                path.display(),
                arch::NAME
            ))),
        }
    }
}

/// A size in MiB: `256M`, `2G`, `256`.
fn mebibytes(text: &str) -> Result<u64, String> {
    let expected = || "expected a size like 256M or 2G".to_owned();
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let number: u64 = digits.parse().map_err(|_| expected())?;
    let factor = match unit.trim_end_matches("iB").trim_end_matches('B') {
        "" | "M" | "m" => 1,
        "G" | "g" => 1024,
        "T" | "t" => 1 << 20,
        _ => return Err(expected()),
    };
    number.checked_mul(factor).ok_or_else(|| "it does not fit 64 bits".to_owned())
}

fn id(text: &str) -> Result<String, String> {
    let fits = (1..=ID_MAX).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    fits.then(|| text.to_owned())
        .ok_or_else(|| format!("1 to {ID_MAX} letters, digits and hyphens are needed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_description_of_the_arguments_is_sound() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn sizes_are_mebibytes_unless_they_say_otherwise() {
        for (text, expected) in [("256M", 256), ("2G", 2048), ("64", 64), ("1GiB", 1024), ("0", 0)] {
            assert_eq!(mebibytes(text), Ok(expected));
        }
        for text in ["", "M", "-1", "1.5G", "12K", "1MM", "99999999999999999999", "99999999999999999G"] {
            assert!(mebibytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_are_letters_digits_and_hyphens() {
        assert!(id("a-1").is_ok());
        for text in ["", "a_b", "a/b", &"x".repeat(65)] {
            assert!(id(text).is_err(), "{text}");
        }
    }
}
