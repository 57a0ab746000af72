//! A folder of this machine with all that is in it, in one order.

use std::collections::HashSet;
use std::fs::{self, File, Metadata};
use std::hash::{Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::sys::descriptor::attributes;

/// More than any root file system has. A root that was named by mistake, with `/proc` in it, would fill the memory.
const ENTRIES_MAX: usize = 8 << 20;
/// What a file's content is a multiple of on a disk.
const BLOCK: u64 = 4096;

/// One file, folder, link, FIFO, device or socket.
#[derive(Debug)]
pub struct Entry {
    /// Where it is in the folder; the folder itself has an empty one.
    pub name: PathBuf,
    /// What it is.
    pub metadata: Metadata,
}

/// A folder and what it held when it was read.
#[derive(Debug)]
pub struct Tree {
    /// The folder.
    pub folder: PathBuf,
    /// What it holds, each folder before what is in it.
    pub entries: Vec<Entry>,
}

impl Tree {
    /// Reads which files there are.
    pub fn read(folder: &Path) -> Result<Self> {
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
                if entries.len() + names.len() > ENTRIES_MAX {
                    let why = format!("it has more than {ENTRIES_MAX} files and folders");
                    return Err(Error::config(why)).with_context(|| attempt(folder));
                }
                for name in names {
                    let name = entries[next].name.join(name);
                    let place = folder.join(&name);
                    let metadata = place.symlink_metadata().with_context(|| attempt(&place))?;
                    entries.push(Entry { name, metadata });
                }
            }
            next += 1;
        }
        Ok(Self { folder: folder.to_owned(), entries })
    }

    /// The files, each once, whatever names it has.
    fn files(&self) -> impl Iterator<Item = &Entry> {
        let mut seen = HashSet::new();
        self.entries.iter().filter(move |Entry { metadata, .. }| {
            metadata.is_file() && (metadata.nlink() == 1 || seen.insert((metadata.dev(), metadata.ino())))
        })
    }

    /// How many bytes its files have, holes among them.
    pub fn size(&self) -> u64 {
        self.files().fold(0, |sum, file| sum.saturating_add(file.metadata.len()))
    }

    /// How many bytes of a disk its files take without their holes, about: a file system that compresses has them in
    /// less.
    pub fn content(&self) -> u64 {
        let of = |metadata: &Metadata| metadata.len().min(metadata.blocks() * 512).next_multiple_of(BLOCK);
        self.files().map(|file| of(&file.metadata)).sum()
    }

    /// Whether anything in it has an extended attribute (an access list, a capability), for which an initial ramdisk
    /// has no place. SELinux gives a label to every file of a host, which means nothing in a guest.
    pub fn has_attributes(&self) -> bool {
        let is_of_host = |name: &[u8]| name.is_empty() || name == b"security.selinux";
        let has_some = |names: Vec<u8>| !names.split(|byte| *byte == 0).all(is_of_host);
        self.entries
            .iter()
            .any(|Entry { name, .. }| attributes(&self.folder.join(name)).is_some_and(has_some))
    }

    /// Refuses a tree with a file that this user may not read.
    pub fn check_readable(&self) -> Result<()> {
        for Entry { name, .. } in self.files() {
            let place = self.folder.join(name);
            File::open(&place)
                .map_err(|error| crate::paths::cannot_open(&place, &error, false))
                .with_context(|| format!("read `{}`", place.display()))?;
        }
        Ok(())
    }

    /// Hashes all that changes when something in the folder does: names, kinds, sizes, times, and which files they are.
    pub fn feed(&self, into: &mut impl Hasher) {
        for Entry { name, metadata } in &self.entries {
            name.as_os_str().hash(into);
            let times = (metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec());
            (metadata.mode(), metadata.len(), times, metadata.dev(), metadata.ino()).hash(into);
        }
    }
}
