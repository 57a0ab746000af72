//! What a qcow2 image says of itself, checked before anything is allocated by its word (QEMU's
//! docs/interop/qcow2.txt). An image may come from anybody.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::devices::block::device;
use crate::error::{Context, Error, Result};
use crate::host::Access;
use crate::log;

pub const MAGIC: u32 = 0x5146_49fb;
/// The fields that version 2 has, and those of version 3.
pub const LENGTH: usize = 72;
pub const LENGTH_3: usize = 104;

/// The limits that QEMU has too: an image that claims more would take this much memory at once.
const L1_BYTES_MAX: u64 = 32 << 20;
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;

/// Where the features are that a reader must know, and those that a writer who does not know them clears.
const FEATURES: u64 = 72;
pub const AUTOCLEAR: u64 = 88;
pub const AUTOCLEAR_LENGTH: usize = 8;

const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;

/// The fields that decide how much memory the image takes, and whether it can be used at all.
pub struct Header {
    /// Bytes per cluster.
    pub cluster: u64,
    /// Since version 3 a cluster can say that it is zero, and so be given back.
    pub version: u32,
    /// Where the file ends at the latest, in bytes.
    pub end: u64,
    /// Where the table of tables is, and that of reference counts.
    pub links: Range<u64>,
    pub counts: Range<u64>,
    /// Where the blocks of reference counts are, sorted, of an image that is written.
    pub blocks: Vec<u64>,
    /// A reference count has 2^`order` bits.
    pub order: u32,
    /// There are snapshots within it, with which it shares clusters.
    pub has_snapshots: bool,
    /// Features are on that a writer who does not know them clears.
    pub has_autoclear: bool,
    /// What it is marked as, if that forbids to write it.
    pub mark: Option<&'static str>,
}

/// Whether a file that begins with `head` can be a qcow2 image, of which no more is looked at than what other kinds of
/// files have not.
pub fn check_kind(head: &[u8]) -> Result<()> {
    match (head.starts_with(&MAGIC.to_be_bytes()), head.get(4..8)) {
        (true, Some([0, 0, 0, 1])) => Err(Error::config(
            "it is a qcow image of version 1, which is not supported: `qemu-img convert -f qcow -O qcow2` it",
        )),
        (true, Some(_)) => Ok(()),
        _ => Err(not_qcow2()),
    }
}

fn not_qcow2() -> Error {
    Error::config("it is not a qcow2 image: give `raw` as its format, if it is one")
}

impl Header {
    /// Reads and checks the header of an image of `length` bytes.
    pub fn read(file: &File, length: u64, access: Access) -> Result<Self> {
        let mut bytes = [0; LENGTH_3];
        let given = usize::try_from(length).unwrap_or(usize::MAX).min(bytes.len());
        file.read_exact_at(&mut bytes[..given], 0).context("read its header")?;
        let long = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        check_kind(&bytes[..given])?;
        if given < LENGTH {
            return Err(not_qcow2());
        }
        let version = word(4);
        let (features, autoclear) =
            if version >= 3 { (long(FEATURES as usize), long(AUTOCLEAR as usize)) } else { (0, 0) };
        let mark = check_features(version, word(32), features, access)?;
        let cluster_bits = word(20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(broken(format!("clusters of 2^{cluster_bits} bytes")));
        }
        let cluster = 1 << cluster_bits;
        let (size, l1_bytes) = (long(24), u64::from(word(36)) * 8);
        // One entry of the L1 table stands for a cluster full of entries, 8 bytes each.
        let needed = size.div_ceil(cluster).div_ceil(cluster / 8).checked_mul(8);
        if needed.is_none_or(|needed| needed > l1_bytes) {
            return Err(broken(format!("{size} bytes, for which its tables are too small")));
        }
        let table = |name: &str, offset: u64, bytes: u64, max: u64| {
            let inside =
                offset.is_multiple_of(cluster) && offset.checked_add(bytes).is_some_and(|end| end <= length);
            match bytes > max {
                true => Err(broken(format!("a {name} of {bytes} bytes, at most {max} are sane"))),
                false if inside || bytes == 0 => Ok(()),
                false => Err(broken(format!("a {name} that is not within the file"))),
            }
        };
        table("table of clusters", long(40), l1_bytes, L1_BYTES_MAX)?;
        let (refcounts, refcount_bytes) = (long(48), u64::from(word(56)) << cluster_bits);
        table("table of reference counts", refcounts, refcount_bytes, REFCOUNT_TABLE_BYTES_MAX)?;
        let order = if version >= 3 { word(96) } else { 4 };
        let counts = refcounts..refcounts + refcount_bytes;
        let blocks = match access {
            Access::ReadWrite => read_refcounts(file, length, &counts, cluster, order)?,
            Access::Read => Vec::new(),
        };
        // A new cluster for each of the disk's, at most 16 of whose 512 bytes the tables take beside it,
        // and tables that move: nothing else makes the file longer.
        let tables = l1_bytes.saturating_add(refcount_bytes).saturating_mul(2) + MOVES_MAX * cluster;
        let end = length.saturating_add(size).saturating_add(size / 8).saturating_add(tables);
        Ok(Self {
            cluster,
            version,
            end,
            links: long(40)..long(40) + l1_bytes,
            counts,
            blocks,
            order,
            has_snapshots: word(60) > 0,
            has_autoclear: autoclear != 0,
            mark,
        })
    }
}

/// Where the blocks of reference counts are, of which the table at `counts` tells; a count has 2^`order` bits.
fn read_refcounts(
    file: &File,
    length: u64,
    counts: &Range<u64>,
    cluster: u64,
    order: u32,
) -> Result<Vec<u64>> {
    if order > 6 {
        return Err(broken(format!("reference counts of 2^{order} bits")));
    }
    let bytes = counts.end - counts.start;
    let clusters_per_block = (cluster * 8) >> order;
    let mut table = vec![0; bytes as usize];
    file.read_exact_at(&mut table, counts.start).context("read its table of reference counts")?;
    let clusters = match device::is_block_device(file) {
        // How much of it is in use, only the counts tell.
        true => length.div_ceil(cluster).min(bytes / 8 * clusters_per_block),
        false => length.div_ceil(cluster),
    };
    check_refcounts(&table, clusters.div_ceil(clusters_per_block), length, cluster)
}

impl Header {
    /// Says what the image at `path` is marked as.
    pub fn warn(&self, path: &Path) {
        if let Some(mark) = self.mark {
            log::line(format_args!(
                "disk image `{}`: {mark}; it is only read, as it is: `qemu-img check` tells how it is",
                path.display()
            ));
        }
    }
}

/// Clusters for what begins anew in a cluster of its own.
const MOVES_MAX: u64 = 64;

/// Blocks of reference counts for what is not written yet, when the image was left in the middle of that.
const BLOCKS_AHEAD_MAX: u64 = 8;

/// The places of the blocks of reference counts, sorted: each in a place of its own, and hardly more of
/// them than the file's clusters need. Blocks beyond, or one for many, would let an allocation look for a free
/// cluster for hours. Where there is none, nothing is in use, as in an image that was shrunk; but the header
/// is: an allocation without the first block would look for itself without end. A file that goes on beyond what the
/// table can tell of is as a process leaves it that is killed before a larger table is in place: what is there, nothing
/// names.
fn check_refcounts(table: &[u8], needed: u64, length: u64, cluster: u64) -> Result<Vec<u64>> {
    let wrong = |what: &str| {
        Err(Error::config(format!(
            "its table of reference counts has {what}: `qemu-img check -r all` it, or `qemu-img convert` it"
        )))
    };
    let entry = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("8 bytes"));
    let entries = table.chunks_exact(8).map(entry);
    let mut places: Vec<u64> = entries.clone().filter(|place| *place != 0).collect();
    if entries.clone().next().unwrap_or(0) == 0 {
        return wrong("no entry for the image's header");
    }
    if places.len() as u64 > needed + BLOCKS_AHEAD_MAX {
        return wrong("entries for what is beyond the end of the file");
    }
    let inside = |place: &u64| place.is_multiple_of(cluster) && *place < length;
    if !places.iter().all(inside) {
        return wrong("entries that are not within the file");
    }
    places.sort_unstable();
    match places.windows(2).any(|pair| pair[0] == pair[1]) {
        true => wrong("one block for several places"),
        false => Ok(places),
    }
}

/// Hides the marks that forbid writing, in what was read from byte `offset` of a header on: who only reads
/// does without reference counts, and reads of a damaged image what there is.
pub fn hide_marks(bytes: &mut [u8], offset: u64) {
    let at = (FEATURES + 7).checked_sub(offset);
    if let Some(byte) = at.and_then(|at| bytes.get_mut(at as usize)) {
        *byte &= !(DIRTY | CORRUPT) as u8;
    }
}

/// Hides autoclear features in what was read from byte `offset` of a header on.
pub fn hide_autoclear(bytes: &mut [u8], offset: u64) {
    for at in AUTOCLEAR..AUTOCLEAR + AUTOCLEAR_LENGTH as u64 {
        if let Some(byte) = at.checked_sub(offset).and_then(|at| bytes.get_mut(at as usize)) {
            *byte = 0;
        }
    }
}

fn broken(what: impl std::fmt::Display) -> Error {
    Error::config(format!("its header is broken: it tells of {what}"))
}

/// Refuses what cannot be used; returns what an image is marked as that can only be read.
fn check_features(
    version: u32,
    encryption: u32,
    features: u64,
    access: Access,
) -> Result<Option<&'static str>> {
    let refuse = |message: &str| Err(Error::config(message));
    let mark = match features {
        _ if !(2..=3).contains(&version) => return Err(broken(format!("version {version}"))),
        _ if encryption != 0 => {
            return refuse("it is encrypted, which is not supported: `qemu-img convert` it");
        }
        _ if features & EXTERNAL_DATA != 0 => {
            return refuse("its data is in another file, which is not followed: `qemu-img convert` it");
        }
        _ if features & COMPRESSION != 0 => {
            return refuse("its compression is not zlib: `qemu-img convert -o compression_type=zlib` it");
        }
        _ if features & !(DIRTY | CORRUPT) != 0 => {
            return refuse("it has features that are not supported: `qemu-img convert` it to one without");
        }
        _ if features & CORRUPT != 0 => "it is marked as corrupt",
        _ if features & DIRTY != 0 => "its reference counts are not in order",
        _ => return Ok(None),
    };
    match access {
        Access::ReadWrite => refuse(&format!(
            "{mark}: `qemu-img check -r all` it; as it is, it can only be read (`is_read_only`, `ro`)"
        )),
        _ => Ok(Some(mark)),
    }
}
