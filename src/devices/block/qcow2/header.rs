//! What a qcow2 image says of itself, checked before anything is allocated by its word (QEMU's
//! docs/interop/qcow2.txt). An image may come from anybody.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::error::{Context, Error, Result};

const MAGIC: u32 = 0x5146_49fb;
/// The fields that version 2 has.
const LENGTH: usize = 72;

/// The limits that QEMU has too: an image that claims more would take this much memory at once.
const L1_BYTES_MAX: u64 = 32 << 20;
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;

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
}

impl Header {
    /// Reads and checks the header of an image of `length` bytes.
    pub fn read(file: &File, length: u64) -> Result<Self> {
        let mut bytes = [0; LENGTH + 8];
        let given = usize::try_from(length).unwrap_or(usize::MAX).min(bytes.len());
        file.read_exact_at(&mut bytes[..given], 0).context("read its header")?;
        let long = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        if given < LENGTH || word(0) != MAGIC {
            return Err(Error::config("it is not a qcow2 image: give `raw` as its format, if it is one"));
        }
        let version = word(4);
        let features = if version >= 3 { long(72) } else { 0 };
        check_features(version, word(32), features)?;
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
        let refcounts = u64::from(word(56)) << cluster_bits;
        table("table of reference counts", long(48), refcounts, REFCOUNT_TABLE_BYTES_MAX)?;
        Ok(Self { cluster, version })
    }
}

fn broken(what: impl std::fmt::Display) -> Error {
    Error::config(format!("its header is broken: it tells of {what}"))
}

fn check_features(version: u32, encryption: u32, features: u64) -> Result<()> {
    let refuse = |message: &str| Err(Error::config(message));
    match features {
        _ if !(2..=3).contains(&version) => Err(broken(format!("version {version}"))),
        _ if encryption != 0 => refuse("it is encrypted, which is not supported: `qemu-img convert` it"),
        _ if features & CORRUPT != 0 => refuse("it is marked as corrupt: `qemu-img check -r all` it"),
        _ if features & DIRTY != 0 => {
            refuse("its reference counts are not in order: `qemu-img check -r all` it")
        }
        _ if features & EXTERNAL_DATA != 0 => {
            refuse("its data is in another file, which is not followed: `qemu-img convert` it")
        }
        _ if features & COMPRESSION != 0 => {
            refuse("its compression is not zlib: `qemu-img convert -o compression_type=zlib` it")
        }
        0 => Ok(()),
        _ => refuse("it has features that are not supported: `qemu-img convert` it to one without"),
    }
}
