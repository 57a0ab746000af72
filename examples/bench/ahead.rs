//! This bench measures what a noted working set is worth: the time to the first answer of a guest that looks at many
//! pages of its memory before, from a file that the host has in memory, and from one that is on the disk alone.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use alula::sys::descriptor;
use serde_json::json;

use crate::host::cache::drop_from_memory;
use crate::monitor::{answer, connect, request, send, spawn};
use crate::restore::{AHEAD, Bench, Guest, Way};
use crate::start::median;
use crate::table::verdict;
use crate::{Folder, Result};

/// The guest writes to 192 MiB of its memory, from [`FILLED_FROM`] on, and looks at one page of 64 of that.
const GUEST: Guest =
    Guest { memory_mib: 256, words: "touch=192 case=serial end=idle", ready: "filled\n", has_passt: false };
const TOUCHED: u32 = 192 * 256 / 64;
/// The bytes before the runs in the file of a working set.
const HEAD: usize = 32;
const FILLED_FROM: u64 = 17 << 20;
const FILLED_TO: u64 = 208 << 20;
/// A restore from the disk takes so much longer that fewer of them are measured: one for so many of the others.
const HOT_FOR_COLD: usize = 5;

/// How many times sooner the answer comes from the disk, and how much later it may come from memory.
const SOONER_MIN: f64 = 5.0;
const LATER_MAX: f64 = 1.05;

/// The guest has given its answer by then, wherever its memory is.
const NOTED_AFTER: Duration = Duration::from_secs(1);

/// The table of first answers without a working set, and with one that was noted of a restore from memory, and of one
/// from the disk, as medians of `runs`.
pub fn ahead(ours: &str, runs: usize) -> Result<()> {
    // A file in /tmp may have no disk behind it.
    let saved = Saved::new(Bench::of(ours, &GUEST, Folder::within(Path::new("/var/tmp"))?)?)?;
    let notes = [None, Some(saved.note(false)?), Some(saved.note(true)?)];
    let cold_runs = runs.div_ceil(HOT_FOR_COLD);
    let (mut cold, mut hot) = (notes.each_ref().map(|_| Vec::new()), notes.each_ref().map(|_| Vec::new()));
    for run in 0..runs {
        for (place, note) in notes.iter().enumerate() {
            saved.offer(note.as_deref())?;
            if run < cold_runs {
                saved.forget()?;
                cold[place].push(saved.answer()?);
            }
            saved.remember()?;
            hot[place].push(saved.answer()?);
        }
    }
    let [cold, hot] = [cold, hot].map(|times| times.map(|times| median(&times)));
    println!(
        "first answer after a load request, {TOUCHED} pages touched, ms; medians of {cold_runs} runs from the disk, \
         {runs} from memory"
    );
    println!(
        "{:<34} {:>8} {:>9} {:>7} {:>9} {:>7}",
        "working set", "pages", "disk", "sooner", "memory", "later"
    );
    for (place, name) in
        ["none", "noted of a restore from memory", "noted of one from the disk"].iter().enumerate()
    {
        let pages = notes[place].as_deref().map_or(0, pages_of);
        print!("{name:<34} {pages:>8} {:>9.2}", cold[place]);
        let (sooner, later) = (cold[0] / cold[place], hot[place] / hot[0]);
        match place {
            0 => println!(" {:>7} {:>9.2}", "", hot[0]),
            _ => println!(
                " {sooner:>7.2} {:>9.2} {later:>7.2}  >= {SOONER_MIN}: {}, <= {LATER_MAX}: {}",
                hot[place],
                verdict(sooner >= SOONER_MIN),
                verdict(later <= LATER_MAX)
            ),
        }
    }
    Ok(())
}

/// How many pages a working set has: after a head, runs of pages, of which each has its length in its last four bytes.
fn pages_of(note: &[u8]) -> u32 {
    let runs = note.get(HEAD..).unwrap_or_default().as_chunks::<8>().0;
    runs.iter().map(|[.., a, b, c, d]| u32::from_le_bytes([*a, *b, *c, *d])).sum()
}

/// The snapshot that is restored.
struct Saved {
    bench: Bench,
    memory: PathBuf,
}

impl Saved {
    /// Finds the file of the memory.
    fn new(bench: Bench) -> Result<Self> {
        let paths = bench.saved.read_dir()?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        let is_memory = |path: &PathBuf| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("memory-"))
        };
        let memory = paths.into_iter().find(is_memory).ok_or("there is no memory in the snapshot")?;
        Ok(Self { bench, memory })
    }

    /// Restores the guest once, from the disk or from memory, and has noted what it needed for its answer.
    fn note(&self, is_cold: bool) -> Result<Vec<u8>> {
        self.offer(None)?;
        if is_cold {
            self.forget()?
        } else {
            self.remember()?
        }
        let Bench { ours, socket, .. } = &self.bench;
        let mut child = spawn(ours, true, socket, &[], Stdio::null())?;
        let noted = (|| {
            let mut client = connect(&mut child, socket)?;
            request(&mut client, "PUT", "/snapshot/load", &self.bench.load(false))?;
            let mut noting = connect(&mut child, socket)?;
            let after = json!({ "after_ms": NOTED_AFTER.as_millis() as u64 });
            send(&mut noting, "PUT", "/snapshot/working-set", &after.to_string())?;
            // Of two connections, the one that came first is to be read first.
            std::thread::sleep(AHEAD);
            request(&mut client, "PATCH", "/vm", r#"{"state": "Resumed"}"#)?;
            child.stdout.as_mut().ok_or("no output")?.read_exact(&mut [0])?;
            answer(&mut noting)
        })();
        child.kill()?;
        child.wait()?;
        std::fs::remove_file(socket)?;
        noted?;
        Ok(std::fs::read(self.noted())?)
    }

    /// Where the working set is.
    fn noted(&self) -> PathBuf {
        self.bench.saved.join("working-set")
    }

    /// Leaves this working set where a restore finds it, or none.
    fn offer(&self, note: Option<&[u8]>) -> Result<()> {
        if let Some(note) = note {
            return Ok(std::fs::write(self.noted(), note)?);
        }
        match std::fs::remove_file(self.noted()) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Has the host read all of the memory's file.
    fn remember(&self) -> Result<()> {
        std::io::copy(&mut File::open(&self.memory)?, &mut std::io::sink())?;
        Ok(())
    }

    /// Has the host forget what the guest has filled, all of it.
    fn forget(&self) -> Result<()> {
        let file = File::open(&self.memory)?;
        let length = file.metadata()?.len();
        let deadline = Instant::now() + Duration::from_secs(10);
        let is_left = |place| descriptor::is_in_memory(&file, length, [place]);
        loop {
            drop_from_memory(&self.memory);
            let mut places = (FILLED_FROM..FILLED_TO).step_by(1 << 20);
            if !places.try_fold(false, |left, place| is_left(place).map(|is_left| left || is_left))? {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err("the host keeps the memory's file in memory: is it on a disk?".into());
            }
            std::thread::sleep(AHEAD);
        }
    }

    /// The time from a load request to the guest's byte, in ms.
    fn answer(&self) -> Result<f64> {
        let restored = self.bench.one(Way::Load)?;
        let wall_ms = restored.wall_ms;
        restored.end()?;
        Ok(wall_ms)
    }
}
