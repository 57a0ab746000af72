//! The pages of a difference put into the memory file before it, without states, as Firecracker's `snapshot-editor` does.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::memory_file::BLOCK;
use crate::descriptors::Named;
use crate::error::{Context, Error, Result};
use crate::host::{Access, Sharing, file};
use crate::sys::descriptor;

/// Writes what `diff` has beside its holes to the same places of `memory`, and returns how many bytes these were. The
/// file is changed in place: after a failure or a crash, doing it again makes it whole.
///
/// # Errors
/// One of the files cannot be opened, or the files differ in size; then nothing has changed. Or one of them cannot be
/// read or written.
pub fn rebase(memory: &Path, diff: &Path) -> Result<u64> {
    let attempt = || format!("put the pages of `{}` into `{}`", diff.display(), memory.display());
    let open = |path: &Path, access| {
        file::open(path, access, Sharing::Refused, "memory of a saved machine", attempt)
    };
    let (from, to) = (open(diff, Access::Read)?, open(memory, Access::ReadWrite)?);
    let length = |file: &Named<File>| file.metadata().map(|metadata| metadata.len()).with_context(attempt);
    let (size, other) = (length(&to)?, length(&from)?);
    if size != other {
        return Err(Error::config(format!(
            "the difference has {other} bytes, and the memory {size}: they are of machines with other memory"
        )))
        .with_context(attempt);
    }
    copy_data(&from, &to).with_context(attempt)
}

fn copy_data(from: &File, to: &File) -> Result<u64> {
    let (mut buffer, mut at, mut count) = (vec![0; BLOCK], 0, 0);
    while let Some((start, end)) = descriptor::next_data(from, at).context("look for its pages")? {
        for place in (start..end).step_by(BLOCK) {
            let bytes = &mut buffer[..(end - place).min(BLOCK as u64) as usize];
            from.read_exact_at(bytes, place).context("read its pages")?;
            to.write_all_at(bytes, place).context("write them")?;
        }
        count += end - start;
        at = end;
    }
    to.sync_all().context("flush them to the disk")?;
    Ok(count)
}
