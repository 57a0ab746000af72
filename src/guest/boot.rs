//! What boots a guest whose init is the agent: an initial ramdisk with this program, modules, and a folder's files.

use std::fs::{File, OpenOptions};
use std::io::BufWriter;
use std::os::unix::fs::OpenOptionsExt;

use super::cpio::Cpio;
use super::kernel::Kernel;
use super::modules::Module;
use super::tree::Tree;
use crate::agent::init::{BOOT, Boot, FOLDER, MODULES, NAME};
use crate::error::{Context, Error, Result};

/// A folder goes along in the initial ramdisk if it has at most this part of the guest's memory: it is there twice for a
/// moment, packed and unpacked.
const MEMORY_PART: u64 = 4;

/// What the kernel is told beside its usual words.
pub fn words() -> String {
    format!("quiet rdinit=/{FOLDER}/{NAME}")
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
