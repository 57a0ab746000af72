//! Initial ramdisks: cpio archives in the format `newc` (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::tree::{Entry, Tree};
use crate::error::{Context, Error, Result};

/// A file's size is a number of 8 hexadecimal digits.
const SIZE_MAX: u64 = u32::MAX as u64;
const FOLDER: u32 = libc::S_IFDIR | 0o755;

/// An archive that is being written.
pub struct Cpio<W: Write> {
    out: W,
    written: u64,
    /// Files with several names are found by their number.
    inode: u32,
}

/// What is said of an entry beside its name and content.
#[derive(Clone, Copy, Default)]
struct Head {
    inode: u32,
    mode: u32,
    owner: (u32, u32),
    links: u32,
    mtime: u32,
    device: (u32, u32),
}

impl<W: Write> Cpio<W> {
    /// An empty one.
    pub fn new(out: W) -> Self {
        Self { out, written: 0, inode: 0 }
    }

    /// A folder of root's.
    pub fn folder(&mut self, name: &str) -> Result<()> {
        self.inode += 1;
        let head = Head { inode: self.inode, mode: FOLDER, links: 2, ..Head::default() };
        self.entry(head, name.as_bytes(), 0, &mut std::io::empty())
    }

    /// A file of root's, with these permissions, `size` bytes from `content`.
    pub fn file(&mut self, name: &str, permissions: u32, size: u64, content: &mut impl Read) -> Result<()> {
        self.inode += 1;
        let mode = libc::S_IFREG | permissions;
        let head = Head { inode: self.inode, mode, links: 1, ..Head::default() };
        self.entry(head, name.as_bytes(), size, content)
    }

    /// A folder of this machine with all that is in it, as the archive's root. `keep_owners`: else all is root's.
    pub fn tree(&mut self, Tree { folder, entries }: &Tree, keep_owners: bool) -> Result<()> {
        let mut linked: HashMap<(u64, u64), (u32, u32)> = HashMap::new();
        for Entry { metadata, .. } in entries {
            if metadata.is_file() && metadata.nlink() > 1 {
                linked.entry((metadata.dev(), metadata.ino())).or_default().1 += 1;
            }
        }
        for Entry { name, metadata } in entries {
            self.inode += 1;
            let mut head = Head {
                inode: self.inode,
                mode: metadata.mode(),
                owner: if keep_owners { (metadata.uid(), metadata.gid()) } else { (0, 0) },
                links: 1,
                // Times before 1970, or after 2106, have no number here.
                mtime: metadata.mtime().try_into().unwrap_or(0),
                device: (libc::major(metadata.rdev()), libc::minor(metadata.rdev())),
            };
            let place = folder.join(name);
            let attempt = || format!("pack `{}`", place.display());
            if metadata.is_symlink() {
                let target = place.read_link().with_context(attempt)?;
                let bytes = target.as_os_str().as_bytes();
                self.entry(head, name.as_os_str().as_bytes(), bytes.len() as u64, &mut &*bytes)
                    .with_context(attempt)?;
                continue;
            }
            let (mut size, mut is_here) = (if metadata.is_file() { metadata.len() } else { 0 }, true);
            if let Some((inode, left)) = linked.get_mut(&(metadata.dev(), metadata.ino())) {
                // The content comes with the last name.
                *inode = if *inode == 0 { head.inode } else { *inode };
                *left -= 1;
                (head.inode, head.links) = (*inode, metadata.nlink() as u32);
                is_here = *left == 0;
                size = if is_here { size } else { 0 };
            }
            let name = if name.as_os_str().is_empty() { Path::new(".") } else { name };
            let name = name.as_os_str().as_bytes();
            if metadata.is_file() && is_here {
                let mut file = File::open(&place).with_context(attempt)?;
                self.entry(head, name, size, &mut file).with_context(attempt)?;
            } else {
                self.entry(head, name, size, &mut std::io::empty()).with_context(attempt)?;
            }
        }
        Ok(())
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Result<W> {
        let end = Head { links: 1, ..Head::default() };
        self.entry(end, b"TRAILER!!!", 0, &mut std::io::empty())?;
        self.out.flush().context("write the initial ramdisk")?;
        Ok(self.out)
    }

    fn entry(&mut self, head: Head, name: &[u8], size: u64, content: &mut impl Read) -> Result<()> {
        if size > SIZE_MAX {
            return Err(Error::config(format!(
                "it has {size} bytes: a file in an initial ramdisk has at most {SIZE_MAX}"
            )));
        }
        let Head { inode, mode, owner, links, mtime, device } = head;
        let fields = [inode, mode, owner.0, owner.1, links, mtime, size as u32, 0, 0, device.0, device.1];
        let mut text = String::from("070701");
        for field in fields.into_iter().chain([name.len() as u32 + 1, 0]) {
            text += &format!("{field:08X}");
        }
        self.put(text.as_bytes())?;
        self.put(name)?;
        self.put(&[0])?;
        self.pad()?;
        let copied = std::io::copy(&mut content.take(size), &mut self.out).context("copy its content")?;
        self.written += copied;
        if copied != size {
            return Err(Error::host("it has become shorter while it was read"));
        }
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes).context("write the initial ramdisk")
    }

    /// Heads and contents begin at multiples of 4.
    fn pad(&mut self) -> Result<()> {
        let rest = self.written.next_multiple_of(4) - self.written;
        self.put(&[0; 3][..rest as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::process::{Command, Stdio};

    #[test]
    fn another_program_unpacks_what_is_packed() {
        let folder = std::env::temp_dir().join(format!("alula-cpio-{}", std::process::id()));
        let from = folder.join("from");
        fs::create_dir_all(from.join("a folder/deep")).unwrap();
        fs::write(from.join("a folder/file"), "12345").unwrap();
        fs::set_permissions(from.join("a folder/file"), Permissions::from_mode(0o4751)).unwrap();
        fs::hard_link(from.join("a folder/file"), from.join("again")).unwrap();
        symlink("a folder/file", from.join("link")).unwrap();
        fs::write(from.join("empty"), "").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(from.join("socket")).unwrap();

        let mut cpio = Cpio::new(Vec::new());
        cpio.tree(&Tree::read(&from).unwrap(), false).unwrap();
        cpio.folder(".alula").unwrap();
        cpio.file(".alula/init", 0o755, 3, &mut &b"abc"[..]).unwrap();
        let bytes = cpio.finish().unwrap();
        let to = folder.join("to");
        fs::create_dir(&to).unwrap();
        let mut unpack = Command::new("cpio");
        unpack
            .args(["-i", "-m", "--quiet", "--no-absolute-filenames"])
            .current_dir(&to)
            .stdin(Stdio::piped());
        let mut unpack = unpack.spawn().expect("cpio, which scripts/guest needs, too");
        unpack.stdin.take().unwrap().write_all(&bytes).unwrap();
        assert!(unpack.wait().unwrap().success());
        let metadata = |name: &str| to.join(name).symlink_metadata().unwrap();
        assert_eq!(fs::read(to.join("link")).unwrap(), b"12345");
        assert_eq!(fs::read(to.join("again")).unwrap(), b"12345");
        assert_eq!(metadata("again").ino(), metadata("a folder/file").ino());
        assert_eq!(metadata("again").mode() & 0o7777, 0o4751);
        assert_eq!(metadata("again").mtime(), from.join("again").metadata().unwrap().mtime());
        assert_eq!(fs::read(to.join(".alula/init")).unwrap(), b"abc");
        assert!(metadata("a folder/deep").is_dir() && metadata("empty").len() == 0);
        assert_eq!(metadata("socket").mode() & libc::S_IFMT, libc::S_IFSOCK);
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_cannot_be_packed_is_told() {
        let mut cpio = Cpio::new(std::io::sink());
        let error = cpio.file("x", 0o644, 5, &mut &b"1234"[..]).unwrap_err().to_string();
        assert_eq!(error, "it has become shorter while it was read");
        let error = cpio.file("x", 0o644, 1 << 32, &mut std::io::empty()).unwrap_err().to_string();
        assert!(error.contains("at most 4294967295"), "{error}");
        let error = Tree::read(Path::new("/nonexistent")).unwrap_err().to_string();
        assert!(error.starts_with("read `/nonexistent`: No such file"), "{error}");
        let error = Tree::read(Path::new("/dev/null")).unwrap_err().to_string();
        assert_eq!(error, "`/dev/null` is not a folder");
    }
}
