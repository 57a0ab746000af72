//! The image of a root file system, looked at before a guest boots in vain: its superblock says which file system it is,
//! and whether all of it is there.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::host::{self, Access, Sharing};

/// The file systems that a guest's init mounts, as mount(2) and their modules call them.
pub const KINDS: [&str; 3] = ["ext4", "squashfs", "erofs"];

/// As many bytes as it takes to tell what an image is: the magic number of Btrfs comes last (its superblock is at 64 KiB).
const HEAD: usize = 0x10048;
/// Where ext4 and erofs have their superblocks (Documentation/filesystems/ext4/super.rst, erofs_fs.h).
const SUPERBLOCK: usize = 0x400;
/// An ext4 was not unmounted, and what its journal has is not in its place (INCOMPAT_RECOVER).
const RECOVER: u32 = 0x4;
/// An ext4 counts its blocks with 64 bits (INCOMPAT_64BIT).
const WIDE: u32 = 0x80;
/// An ext4 has blocks of at most 1024 bytes times 2 to the power of this.
const BLOCK_LOG_MAX: u32 = 6;

/// The image's kind in the words of an error, with a way on, if it is no file system of ours; `has` tells whether these
/// bytes are at this place.
fn other(has: impl Fn(usize, &[u8]) -> bool) -> Option<&'static str> {
    Some(match () {
        () if has(0, b"QFI\xfb") => "a qcow2 image: give it as `--disk IMAGE,root,format=qcow2`",
        () if has(0, b"KDMV") => "a VMDK image: convert it (`qemu-img convert -O raw`)",
        () if has(0, b"vhdxfile") => "a VHDX image: convert it (`qemu-img convert -O raw`)",
        () if has(0, b"\x1f\x8b\x08") => "a file of gzip: unpack it",
        () if has(0, b"\xfd7zXZ\0") => "a file of xz: unpack it",
        () if has(0, b"\x28\xb5\x2f\xfd") => "a file of zstd: unpack it",
        () if has(0, b"07070") => "a cpio archive: unpack it into a folder, and give that",
        () if has(0x101, b"ustar") => "a tar archive: unpack it into a folder, and give that",
        () if has(0, b"\x7fELF") => "a program or a kernel: the latter is for `--kernel`",
        () if has(0x202, b"HdrS") => "a kernel: that is for `--kernel`",
        () if has(0, b"XFSB") => "a file system of the kind xfs: copy what is in it",
        () if has(0x400, b"\x10\x20\xf5\xf2") => "a file system of the kind f2fs: copy what is in it",
        () if has(0x8001, b"CD001") => "a file system of the kind iso9660: copy what is in it",
        () if has(0x10040, b"_BHRfS_M") => "a file system of the kind btrfs: copy what is in it",
        () if has(0x200, b"EFI PART") || has(0x1fe, b"\x55\xaa") => {
            "a disk with partitions: give the file system of one of them alone"
        }
        () => return None,
    })
}

/// Which of [`KINDS`] the image at `path` is, by its magic number.
///
/// # Errors
/// The image is none of them, a part of it is missing, or it has to be mended before it can be mounted; `writable`: the
/// guest may do that.
pub fn look(path: &Path, writable: bool) -> Result<&'static str> {
    let attempt = || format!("read root file system `{}`", path.display());
    let file = host::file::open(path, Access::Read, Sharing::Refused, "root file system", attempt)?;
    let size = (&*file).seek(SeekFrom::End(0)).context("find its size").with_context(attempt)?;
    let head = read(&file).with_context(attempt)?;
    judge(&head, size, writable).with_context(attempt)
}

/// The first bytes of the file, with zeros for those that it does not have.
fn read(file: &File) -> std::io::Result<Vec<u8>> {
    let (mut head, mut count) = (vec![0; HEAD], 0);
    while count < head.len() {
        match file.read_at(&mut head[count..], count as u64)? {
            0 => break,
            more => count += more,
        }
    }
    Ok(head)
}

fn judge(head: &[u8], size: u64, writable: bool) -> Result<&'static str> {
    let has = |at: usize, magic: &[u8]| head[at..].starts_with(magic);
    let (kind, wanted) = if has(0, b"hsqs") {
        ("squashfs", u64::from(number(head, 0x28)) | u64::from(number(head, 0x2c)) << 32)
    } else if has(SUPERBLOCK, &[0xe2, 0xe1, 0xf5, 0xe0]) {
        let block = 1u64.checked_shl(head[SUPERBLOCK + 0xc].into()).unwrap_or(u64::MAX);
        ("erofs", u64::from(number(head, SUPERBLOCK + 0x24)).saturating_mul(block))
    } else if has(SUPERBLOCK + 0x38, &[0x53, 0xef]) {
        ("ext4", judge_ext4(&head[SUPERBLOCK..], writable)?)
    } else {
        return Err(no_image(head, size));
    };
    if wanted > size {
        return Err(Error::config(format!(
            "a part of it is missing: its {kind} has {wanted} bytes, and the file {size}: copy or make it anew"
        )));
    }
    Ok(kind)
}

/// The size of the ext4 with this superblock, in bytes.
fn judge_ext4(superblock: &[u8], writable: bool) -> Result<u64> {
    let (block_log, features) = (number(superblock, 0x18), number(superblock, 0x60));
    if block_log > BLOCK_LOG_MAX {
        return Err(Error::config(
            "the superblock of its ext4 is damaged: `e2fsck -f IMAGE` may mend it, or make it anew",
        ));
    }
    // The kernel replays no journal on a disk that cannot be written (ext4_load_journal in fs/ext4/super.c).
    if features & RECOVER != 0 && !writable {
        return Err(Error::config(
            "its ext4 was not unmounted, and nothing can be read before its journal is written back: `e2fsck -p IMAGE` \
             does that, or a guest that may write to it (`--rootfs IMAGE,rw`)",
        ));
    }
    let high = if features & WIDE == 0 { 0 } else { number(superblock, 0x150) };
    let blocks = u64::from(number(superblock, 0x4)) | u64::from(high) << 32;
    Ok(blocks.saturating_mul(1024 << block_log))
}

/// Little-endian, of 32 bits.
fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes are an array of four"))
}

fn no_image(head: &[u8], size: u64) -> Error {
    let what = match other(|at, magic| head[at..].starts_with(magic)) {
        Some(what) => format!("it is {what}"),
        None if size == 0 => "it is empty".to_owned(),
        None if head.iter().all(|byte| *byte == 0) => "it has nothing but zeros at its beginning".to_owned(),
        None => "it has no file system at its beginning".to_owned(),
    };
    Error::config(format!("{what} (a root is an image of {}, or a folder)", KINDS.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image with these bytes at these places.
    fn image(parts: &[(usize, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; HEAD];
        for (at, bytes) in parts {
            head[*at..*at + bytes.len()].copy_from_slice(bytes);
        }
        head
    }

    const EXT4: (usize, &[u8]) = (0x438, b"\x53\xef");
    const EROFS: (usize, &[u8]) = (0x400, b"\xe2\xe1\xf5\xe0");

    fn told(parts: &[(usize, &[u8])], size: u64, writable: bool) -> String {
        judge(&image(parts), size, writable).map_or_else(|error| error.to_string(), str::to_owned)
    }

    #[test]
    fn file_systems_are_known_by_their_magic_numbers() {
        for (magic, kind) in [((0, &b"hsqs"[..]), "squashfs"), (EROFS, "erofs"), (EXT4, "ext4")] {
            assert_eq!(told(&[magic], 0, false), kind);
        }
        for (at, magic, expected) in [
            (
                0,
                &b"QFI\xfb"[..],
                "it is a qcow2 image: give it as `--disk IMAGE,root,format=qcow2` (a root is an ",
            ),
            (0, b"KDMV", "it is a VMDK image: convert it"),
            (0, b"vhdxfile", "it is a VHDX image: convert it"),
            (0, b"\x1f\x8b\x08", "it is a file of gzip: unpack it"),
            (0, b"\xfd7zXZ\0", "it is a file of xz: unpack it"),
            (0, b"\x28\xb5\x2f\xfd", "it is a file of zstd: unpack it"),
            (0, b"070701", "it is a cpio archive: unpack it"),
            (0x101, b"ustar", "it is a tar archive: unpack it"),
            (0, b"\x7fELF", "it is a program or a kernel: "),
            (0x1fe, b"\x55\xaa\xeb\x66HdrS", "it is a kernel: "),
            (0, b"XFSB", "it is a file system of the kind xfs: "),
            (0x400, b"\x10\x20\xf5\xf2", "it is a file system of the kind f2fs: "),
            (0x8001, b"CD001", "it is a file system of the kind iso9660: "),
            (0x10040, b"_BHRfS_M", "it is a file system of the kind btrfs: "),
            (0x200, b"EFI PART", "it is a disk with partitions: "),
            (0x1fe, b"\x55\xaa", "it is a disk with partitions: "),
        ] {
            let said = told(&[(at, magic)], 4096, false);
            assert!(said.starts_with(expected), "{said}");
            assert!(said.ends_with(" (a root is an image of ext4, squashfs, erofs, or a folder)"), "{said}");
        }
        for (size, text, expected) in [
            (0, &b""[..], "it is empty (a root is"),
            (9, b"", "it has nothing but zeros at its beginning (a root"),
            (9, b"#!/bin/sh", "it has no file system at its beginning (a root"),
        ] {
            assert!(told(&[(0, text)], size, true).starts_with(expected), "{expected}");
        }
        let error = look(Path::new("/none"), false).unwrap_err().to_string();
        assert!(error.starts_with("read root file system `/none`: No such file"), "{error}");
    }

    #[test]
    fn an_image_of_which_a_part_is_missing_is_refused() {
        for (parts, size) in [
            (&[(0, &b"hsqs"[..]), (0x28, b"\x01\x10\0\0\x01\0\0\0")][..], (1 << 32) + 4097),
            (&[EROFS, (0x40c, b"\x0c"), (0x424, b"\x05\0\0\0")], 5 * 4096),
            (&[EXT4, (0x404, b"\x07\0\0\0"), (0x418, b"\x02\0\0\0"), (0x550, b"\x01")], 7 * 4096),
            (
                &[EXT4, (0x404, b"\x07\0\0\0"), (0x418, b"\x02\0\0\0"), (0x460, b"\x80"), (0x550, b"\x01")],
                ((1 << 32) + 7) * 4096,
            ),
        ] {
            assert!(KINDS.contains(&&*told(parts, size, false)), "{parts:?}");
            let said = told(parts, size - 1, false);
            let expected = format!("has {size} bytes, and the file {}: copy or make it anew", size - 1);
            assert!(said.starts_with("a part of it is missing: its ") && said.contains(&expected), "{said}");
        }
        let endless = [EROFS, (0x40c, b"\xff"), (0x424, b"\x01")];
        assert!(told(&endless, u64::MAX - 1, false).starts_with("a part of it is missing"));
    }

    #[test]
    fn an_ext4_that_has_to_be_mended_is_refused_unless_a_guest_may() {
        let unclean = [EXT4, (0x460, &b"\x04"[..])];
        let said = told(&unclean, 4096, false);
        assert!(said.contains("was not unmounted") && said.contains("`--rootfs IMAGE,rw`"), "{said}");
        assert_eq!(told(&unclean, 4096, true), "ext4");
        let said = told(&[EXT4, (0x418, b"\x07")], 4096, true);
        assert!(said.starts_with("the superblock of its ext4 is damaged: `e2fsck -f"), "{said}");
    }
}
