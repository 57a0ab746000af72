//! A folder of this machine with all that is in it, in one order.

use std::fs::{self, Metadata};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};

/// One file, folder, link, FIFO or device.
#[derive(Debug)]
pub struct Entry {
    /// Where it is in the folder; the folder itself has an empty one.
    pub name: PathBuf,
    /// What it is.
    pub metadata: Metadata,
}

/// What a folder holds, each folder before what is in it. Sockets belong to programs that run here: they are left out.
pub fn entries(folder: &Path) -> Result<Vec<Entry>> {
    let attempt = |path: &Path| format!("read `{}`", path.display());
    let metadata = folder.metadata().with_context(|| attempt(folder))?;
    if !metadata.is_dir() {
        return Err(Error::config(format!("`{}` is not a folder", folder.display())));
    }
    let mut entries = vec![Entry { name: PathBuf::new(), metadata }];
    let mut next = 0;
    // In order of depth: a tree can be deeper than a thread's stack.
    while next < entries.len() {
        if entries[next].metadata.is_dir() {
            let place = folder.join(&entries[next].name);
            let mut names = fs::read_dir(&place)
                .and_then(|list| list.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>, _>>())
                .with_context(|| attempt(&place))?;
            names.sort_unstable();
            for name in names {
                let name = entries[next].name.join(name);
                let place = folder.join(&name);
                let metadata = place.symlink_metadata().with_context(|| attempt(&place))?;
                if !metadata.file_type().is_socket() {
                    entries.push(Entry { name, metadata });
                }
            }
        }
        next += 1;
    }
    Ok(entries)
}
