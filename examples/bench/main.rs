//! The program behind `scripts/bench`: it reports figures of starts, of restores, of I/O
//! and of vsock, and judges none but the one of a soak, whether a monitor grows.

mod ahead;
mod counters;
mod host;
mod io;
mod jail;
mod loads;
mod monitor;
mod networks;
mod restore;
mod saves;
mod sizes;
mod soak;
mod start;
mod table;
mod template;
mod transports;
mod vsock;

use std::sync::atomic::{AtomicU32, Ordering};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let ours = arguments.next().ok_or("the binary to measure is missing")?;
    let what = arguments.next().ok_or("what to measure is missing")?;
    let (mut runs, mut other, mut linux, mut only, mut seed) = (None, None, None, String::new(), None);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} lacks its value"));
        match argument.as_str() {
            "--runs" => runs = Some(value()?.parse()?),
            "--seed" => seed = Some(value()?.parse()?),
            "--vs" => other = Some(value()?),
            "--only" => only = value()?,
            "--linux" => linux = Some((value()?.into(), value()?.into())),
            _ => return Err(format!("unknown argument {argument}").into()),
        }
    }
    match what.as_str() {
        "start" => start::start(&ours, other.as_deref(), runs.unwrap_or(20)),
        "restore" if let Some(linux) = &linux => transports::transports(&ours, linux, runs.unwrap_or(30)),
        "restore" => restore::restore(&ours, other.as_deref(), runs.unwrap_or(100), &only),
        "clones" => restore::clones(&ours, runs.unwrap_or(100)),
        "jail" => jail::jail(&ours, runs.unwrap_or(100)),
        "soak" => soak::soak(&ours, runs.unwrap_or(60), seed),
        "io" => io::io(&ours, other.as_deref(), linux, &only),
        "vsock" => vsock::vsock(&ours, other.as_deref(), &linux.ok_or("--linux is missing")?),
        _ => Err(format!("unknown bench {what}").into()),
    }
}

/// A folder of the bench's own, gone with it.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        Self::within(&std::env::temp_dir())
    }

    /// Makes the folder in the one at `place`.
    fn within(place: &std::path::Path) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = place.join(format!("alula-bench-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        Ok(Self(folder))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
