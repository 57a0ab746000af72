//! A new image over a disk that is only read from then on: where a clone keeps what it writes.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::header::{LENGTH_3, MAGIC};
use crate::devices::block::SECTOR;
use crate::devices::block::config::{Backing, Config, Format};
use crate::devices::block::image::Image;
use crate::error::{Context, Error, Result};
use crate::host::Host;
use crate::paths;

/// Clusters of 64 KiB, as QEMU makes them.
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// A reference count has 2^4 bits.
const ORDER: u32 = 4;
/// The longest name of an image beneath that QEMU reads.
const NAME_MAX: usize = 1023;
/// The header extension that says what the image beneath is, and the one after which there is none.
const FORMAT_OF_BACKING: u32 = 0xe279_2aca;
const NO_MORE: u32 = 0;

/// A new image, removed when this is dropped, unless it is kept.
pub struct Overlay(Option<PathBuf>);

impl Overlay {
    /// Makes an image at `path`, where nothing may be yet, over the disk `below`, and says what the disk is then.
    ///
    /// # Errors
    /// The disk is read-only, empty, cannot be opened, or somebody writes to it; or no file can be made at the path.
    pub fn make(below: &Config, path: &Path, host: &mut Host) -> Result<(Self, Config)> {
        if below.is_read_only {
            return Err(Error::config(
                "the disk is only read, so that any number of guests can share it: leave `overlay` out",
            ));
        }
        if below.socket.is_some() {
            return Err(Error::config(
                "the disk is a vhost-user backend's (`socket`), and no image: leave `overlay` out",
            ));
        }
        let read = Config { is_read_only: true, discard: None, ..below.clone() };
        let image = Image::open(&read, host)?;
        let size = image.sectors() * SECTOR;
        if size == 0 {
            return Err(Error::config("the disk beneath it is empty"));
        }
        let (_, base, _) = read.file();
        let base = base.canonicalize().with_context(|| format!("find `{}`", base.display()))?;
        let attempt = || format!("make the overlay `{}`", path.display());
        let content = content(&base, below.format, size).with_context(attempt)?;
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let mut file = made.map_err(|error| paths::cannot_make(path, &error)).with_context(attempt)?;
        let overlay = Self(Some(path.to_owned()));
        file.write_all(&content).with_context(attempt)?;
        let beneath = Backing { path_on_host: base, format: below.format };
        let backing = [beneath].into_iter().chain(image.beneath().iter().cloned()).collect();
        let config = Config {
            path_on_host: Some(path.to_owned()),
            format: Format::Qcow2,
            backing: Some(backing),
            direct_io: false,
            ..below.clone()
        };
        Ok((overlay, config))
    }

    /// Keeps the image, which is in use from now on: it is not removed.
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The content of an image in which nothing was written: its header with the name of what is beneath, the table of
/// reference counts, one block of these, and the table of clusters.
fn content(base: &Path, format: Format, size: u64) -> Result<Vec<u8>> {
    let name = base.as_os_str().as_bytes();
    if name.len() > NAME_MAX {
        return Err(Error::config(format!("the path of the disk has more than {NAME_MAX} bytes")));
    }
    // An entry of the table stands for a cluster full of entries, 8 bytes each.
    let entries = size.div_ceil(CLUSTER * CLUSTER / 8);
    let clusters = 3 + (entries * 8).div_ceil(CLUSTER);
    // One block of reference counts, 2 bytes each, is enough for the tables of a disk of 2^50 bytes.
    if clusters > CLUSTER / 2 {
        return Err(Error::config(format!("a disk of {size} bytes is too large for it")));
    }
    let format = if format == Format::Raw { "raw" } else { "qcow2" };
    let mut image = vec![0; (clusters * CLUSTER) as usize];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let words = [MAGIC, 3, 0, 0, name.len() as u32, CLUSTER_BITS];
    words.iter().enumerate().for_each(|(index, word)| put(4 * index, &word.to_be_bytes()));
    put(24, &size.to_be_bytes());
    put(36, &(entries as u32).to_be_bytes());
    put(40, &(3 * CLUSTER).to_be_bytes());
    put(48, &CLUSTER.to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &ORDER.to_be_bytes());
    put(100, &(LENGTH_3 as u32).to_be_bytes());
    put(LENGTH_3, &FORMAT_OF_BACKING.to_be_bytes());
    put(LENGTH_3 + 4, &(format.len() as u32).to_be_bytes());
    put(LENGTH_3 + 8, format.as_bytes());
    put(LENGTH_3 + 16, &NO_MORE.to_be_bytes());
    let at = LENGTH_3 + 24;
    put(8, &(at as u64).to_be_bytes());
    put(at, name);
    put(CLUSTER as usize, &(2 * CLUSTER).to_be_bytes());
    (0..clusters as usize).for_each(|cluster| put(2 * CLUSTER as usize + 2 * cluster, &1_u16.to_be_bytes()));
    Ok(image)
}
