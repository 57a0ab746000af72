//! `alula cpu`: what a guest's CPUs are on a host, and what another one lacks of that.

use std::path::Path;

use serde_json::Value;

use super::arguments::cpu::Cpu;
use super::put_out;
use crate::arch;
use crate::carry::stored::{Location, Stored};
use crate::config::{Config, CpuConfig};
use crate::error::{Context, Error, Result};
use crate::json;
use crate::platform::CpuChanges;
use crate::vm::state::cpu_of_this_host;

/// The exit code if something is lacking: a script must not take a file that cannot be read, which gives 1, for that.
const LACKING: u8 = 2;

/// Prints, and returns the exit code.
pub fn run(cpu: &Cpu) -> Result<u8> {
    match cpu {
        Cpu::Dump => dump().map(|()| 0),
        Cpu::Compare { needed, there, json } => compare(needed, there.as_deref(), *json),
    }
}

fn dump() -> Result<()> {
    let config = CpuConfig::from(&cpu_of_this_host()?);
    let mut told = serde_json::to_value(&config).context("print what a CPU is")?;
    // Firecracker takes no field that is null.
    told.as_object_mut().into_iter().for_each(|fields| fields.retain(|_, value| !value.is_null()));
    print_json(&told)
}

fn compare(needed: &Path, there: Option<&Path>, json: bool) -> Result<u8> {
    let needed_cpu = read(needed)?;
    let (there_cpu, name) = match there {
        Some(path) => (read(path)?, format!("`{}`", path.display())),
        None => (cpu_of_this_host()?, "this host".to_owned()),
    };
    let lacking = arch::lacking(&needed_cpu, &there_cpu);
    if json {
        print_json(&lacking.clone().into())?;
    } else if lacking.is_empty() {
        put_out(format!("{name} has all that the CPU of `{}` has\n", needed.display()).as_bytes())?;
    } else {
        put_out((lacking.join("\n") + "\n").as_bytes())?;
    }
    Ok(if lacking.is_empty() { 0 } else { LACKING })
}

fn print_json(value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).context("print it")?;
    put_out((text + "\n").as_bytes()).map(drop)
}

/// Whether the changes say of each bit what it becomes.
fn is_whole(changes: &CpuChanges) -> bool {
    let has_all = |mask: u128| mask & u128::from(u64::MAX) == u64::MAX.into();
    let registers = changes.registers.iter().all(|register| has_all(register.mask));
    let is_told = if arch::HAS_CPUID { !changes.cpuid.is_empty() } else { !changes.registers.is_empty() };
    is_told && registers && changes.cpuid.iter().all(|register| register.mask == u32::MAX)
}

/// Reads the whole CPU of a saved microVM, or of a file of changes.
fn read(path: &Path) -> Result<CpuChanges> {
    if path.is_dir() {
        let state = Location::Folder(path.to_owned()).state();
        return Ok(Stored::read(&state, false)?.machine.cpu());
    }
    let is_json = |text: &[u8]| text.trim_ascii_start().first() == Some(&b'{');
    match Config::read_called("CPU config, or saved state,", path) {
        Ok(text) if is_json(&text) => {
            let attempt = || format!("read CPU config `{}`", path.display());
            let config: CpuConfig = serde_json::from_slice(&text)
                .map_err(|error| Error::config(json::words::tell(&text, &error)))
                .with_context(attempt)?;
            config.check().with_context(attempt)?;
            let changes = config.changes();
            if !is_whole(&changes) {
                return Err(Error::config(
                    "it leaves bits as a host has them, and what is compared is a whole CPU: take what `alula cpu dump` \
                     prints, with or without changes",
                ))
                .with_context(attempt);
            }
            Ok(changes)
        }
        _ => Ok(Stored::read(path, false)?.machine.cpu()),
    }
}
