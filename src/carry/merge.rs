//! A difference that is merged into the snapshot before it, which becomes the later of the two.

use super::diff;
use super::line::Line;
use super::memory_file::MemoryFile;
use super::stored::{self, Location, Stored, Sums};
use crate::error::{Context, Error, Result};

/// Makes the snapshot at `base` the one of which the difference at `of` was saved: of its memory, the pages of the
/// difference are replaced; its state is the difference's. It takes the place of the old one as a snapshot that is
/// saved there does. Returns how many bytes of memory it has.
///
/// # Errors
/// One of the two is not there, is damaged, or they do not belong together; nothing has changed then. Or a file
/// cannot be written.
pub fn merge(base: &Location, of: &Location) -> Result<u64> {
    // A merge that a crash has cut off may have left what it merged under other names.
    base.finish_left()?;
    // A wrong name is told of before anything is made there.
    let there = Stored::read(&base.state(), false)?;
    // A snapshot in a folder stays one, though its files are named.
    let base = &base.of_its_form(&there.memory);
    // From here on nobody else saves there.
    let draft = base.begin()?;
    let ((before, memory), (later, pages)) = (base.open(true)?, of.open(true)?);
    let attempt = || format!("merge `{}` into `{}`", of.state().display(), base.state().display());
    let (checksums, blocks) = match (&before.sums, &later.sums) {
        (Sums::Whole(checksums), Sums::Diff(blocks)) => (checksums, blocks),
        (Sums::Diff(_), _) => {
            let message = "the one that is to be merged into is a difference itself: merge it into the snapshot \
                           before it first";
            return Err(Error::config(message)).with_context(attempt);
        }
        _ => {
            return Err(Error::config("the one that is to be merged is no difference")).with_context(attempt);
        }
    };
    if before.machine.memory() != later.machine.memory() {
        return Err(Error::config("they are of machines with other memory")).with_context(attempt);
    }
    if let Some((line, base)) = later.line.zip(before.line) {
        line.check_follows(base.place).with_context(attempt)?;
    }
    let size = before.memory.size;
    let written = diff::merge((&memory, checksums), (&pages, blocks), size, draft.memory_file());
    let written = written.with_context(attempt)?;
    draft.memory_file().sync_all().context("flush it to the disk").with_context(attempt)?;
    let memory = MemoryFile { name: draft.memory_name(), size };
    let machine = later.machine.to_bytes()?;
    // The merged snapshot is the later one now, and a whole one.
    let line = later.line.map(|line| Line { after: None, ..line });
    let sums = Sums::Whole(written.checksums);
    draft.keep(&stored::state(machine, &memory, &sums, later.origin.boot_id, line.as_ref())?)?;
    Ok(size)
}
