//! What boots a guest whose init is the agent: an initial ramdisk with this program, modules, and a folder's files.

use std::fs::{File, OpenOptions};
use std::io::BufWriter;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::cpio::Cpio;
use super::kernel::Kernel;
use super::modules::Module;
use super::tree::Tree;
use crate::agent::init::{BOOT, Boot, FOLDER, MODULES, NAME};
use crate::error::{Context, Error, Result};
use crate::host::{self, Access, Sharing};

/// A folder goes along in the initial ramdisk if it has at most this part of the guest's memory: it is there twice for a
/// moment, packed and unpacked.
const MEMORY_PART: u64 = 4;

/// What the kernel is told beside its usual words.
pub fn words() -> String {
    format!("quiet rdinit=/{FOLDER}/{NAME}")
}

/// A file system on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// What mount(2) calls it.
    pub kind: &'static str,
    /// The module that it is in.
    pub module: &'static str,
}

/// The file system of the image at `path`, by its magic number; what has none of those (another format of disk images) is
/// taken for ext4.
pub fn file_system(path: &Path) -> Result<FileSystem> {
    let attempt = || format!("read root file system `{}`", path.display());
    let file = host::file::open(path, Access::Read, Sharing::Refused, "root file system", attempt)?;
    let mut head = [0; 0x43a];
    let mut count = 0;
    while count < head.len() {
        match file.read_at(&mut head[count..], count as u64).with_context(attempt)? {
            0 => break,
            more => count += more,
        }
    }
    let of = |kind| FileSystem { kind, module: kind };
    Ok(match &head {
        head if head.starts_with(b"hsqs") => of("squashfs"),
        head if head[0x400..].starts_with(&[0xe2, 0xe1, 0xf5, 0xe0]) => of("erofs"),
        _ => of("ext4"),
    })
}

/// Whether the folder can go along in the memory of a guest that has so much: it is small enough, and a ramdisk holds
/// all there is of it.
pub fn fits(tree: &Tree, memory_mib: u64) -> bool {
    tree.size() <= (memory_mib << 20) / MEMORY_PART && !tree.has_attributes()
}

/// Packs, into a file without a name, this program as the init, the modules that are `wanted` and those that they need, what
/// `boot` says beside them, and what is in a folder, whose files keep their owners or are all root's.
pub fn pack(kernel: &Kernel, wanted: &[&str], mut boot: Boot, tree: Option<(&Tree, bool)>) -> Result<File> {
    let temporary = std::env::temp_dir();
    let attempt = || format!("write the initial ramdisk in `{}`", temporary.display());
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_TMPFILE);
    let file = options.open(&temporary).with_context(attempt)?;
    let mut cpio = Cpio::new(BufWriter::with_capacity(64 << 10, file));
    if let Some((tree, keep_owners)) = tree {
        cpio.tree(tree, keep_owners).with_context(|| format!("pack `{}`", tree.folder.display()))?;
    }
    cpio.folder(FOLDER)?;
    add_own_program(&mut cpio).context("pack this program's own file")?;
    cpio.folder(&format!("{FOLDER}/{MODULES}"))?;
    if let Some(modules) = &kernel.modules {
        let attempt = || format!("find modules for kernel `{}`", kernel.path.display());
        for Module { file_name, content } in modules.closure(wanted).with_context(attempt)? {
            let name = format!("{FOLDER}/{MODULES}/{file_name}");
            cpio.file(&name, 0o644, content.len() as u64, &mut &content[..])?;
            boot.modules.push(file_name);
        }
    }
    let text = serde_json::to_vec(&boot).context("write what the guest's init is to do")?;
    cpio.file(&format!("{FOLDER}/{BOOT}"), 0o644, text.len() as u64, &mut &text[..])?;
    let file =
        cpio.finish()?.into_inner().map_err(|error| Error::host(error.to_string())).with_context(attempt)?;
    Ok(file)
}

fn add_own_program(cpio: &mut Cpio<BufWriter<File>>) -> Result<()> {
    let mut file = File::open("/proc/self/exe").context("open it")?;
    let size = file.metadata().context("read its size")?.len();
    cpio.file(&format!("{FOLDER}/{NAME}"), 0o755, size, &mut file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_known_by_their_magic_numbers() {
        let path = std::env::temp_dir().join(format!("alula-boot-{}", std::process::id()));
        for (at, magic, kind) in [
            (0, &b"hsqs"[..], "squashfs"),
            (0x400, b"\xe2\xe1\xf5\xe0", "erofs"),
            (0x438, b"\x53\xef", "ext4"),
            (0, b"", "ext4"),
        ] {
            let mut image = vec![0; 4096];
            image[at..at + magic.len()].copy_from_slice(magic);
            std::fs::write(&path, image).unwrap();
            assert_eq!(file_system(&path).unwrap().kind, kind);
        }
        std::fs::remove_file(&path).unwrap();
        let error = file_system(&path).unwrap_err().to_string();
        assert!(error.starts_with("read root file system `"), "{error}");
    }
}
