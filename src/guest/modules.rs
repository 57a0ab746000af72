//! Kernel modules: where they are, what they need, and in which order they are loaded.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};

/// More than any module has: what is larger is none.
const SIZE_MAX: u64 = 64 << 20;

/// The modules of one kernel.
#[derive(Debug, Default)]
pub struct Modules {
    folder: PathBuf,
    /// Where each is, by its name.
    files: HashMap<String, PathBuf>,
    /// Those that are in the kernel itself.
    builtin: Vec<String>,
}

/// The name of the module in this file: `virtio_blk` of `virtio-blk.ko.xz`.
fn name_of(file: &OsStr) -> Option<String> {
    let (name, ending) = file.to_str()?.split_once(".ko")?;
    let is_module = ["", ".xz", ".zst", ".gz"].contains(&ending);
    is_module.then(|| name.replace('-', "_"))
}

impl Modules {
    /// Those in `folder`, as a kernel's package has them (`lib/modules/VERSION`), or all in one folder.
    pub fn in_folder(folder: &Path) -> Result<Self> {
        let attempt = || format!("read the kernel's modules in `{}`", folder.display());
        let builtin = fs::read_to_string(folder.join("modules.builtin")).unwrap_or_default();
        let builtin = builtin.lines().filter_map(|line| name_of(Path::new(line).file_name()?)).collect();
        let mut files = HashMap::new();
        let mut folders = vec![folder.to_owned()];
        while let Some(place) = folders.pop() {
            for entry in fs::read_dir(&place).with_context(attempt)? {
                let entry = entry.with_context(attempt)?;
                // `build` and `source` are links to elsewhere.
                if entry.file_type().with_context(attempt)?.is_dir() {
                    folders.push(entry.path());
                } else if let Some(name) = name_of(&entry.file_name()) {
                    files.insert(name, entry.path());
                }
            }
        }
        Ok(Self { folder: folder.to_owned(), files, builtin })
    }

    /// The files whose names end so, after a dot.
    pub fn files_that_end_in(&self, ending: &str) -> Vec<&Path> {
        let files = self.files.values().map(PathBuf::as_path);
        files.filter(|path| path.extension().is_some_and(|other| other == ending)).collect()
    }

    /// The files of these modules and of all that they need, in the order to load them, each once. What is in the kernel
    /// itself needs no file.
    pub fn closure(&self, wanted: &[&str]) -> Result<Vec<PathBuf>> {
        let (mut order, mut seen) = (Vec::new(), Vec::new());
        for name in wanted {
            self.add(name, None, &mut seen, &mut order)?;
        }
        Ok(order)
    }

    fn add(
        &self,
        name: &str,
        for_whom: Option<&str>,
        seen: &mut Vec<String>,
        order: &mut Vec<PathBuf>,
    ) -> Result<()> {
        if seen.iter().any(|other| other == name) || self.builtin.iter().any(|other| other == name) {
            return Ok(());
        }
        // Before what it needs: modules that need each other would not end.
        seen.push(name.to_owned());
        let Some(path) = self.files.get(name) else {
            let needed = for_whom.map_or_else(String::new, |other| format!(", which `{other}` needs,"));
            return Err(Error::config(format!(
                "module `{name}`{needed} is not in `{}`, and not in the kernel: `alula kernel fetch` gets a kernel with all \
                 modules that a guest needs",
                self.folder.display()
            )));
        };
        for needed in needs(path)? {
            self.add(&needed, Some(name), seen, order)?;
        }
        order.push(path.clone());
        Ok(())
    }
}

/// What the module in this file needs, by its own words: `depends=a,b` among the strings of its section `.modinfo`.
fn needs(path: &Path) -> Result<Vec<String>> {
    let attempt = || format!("read module `{}`", path.display());
    let size = path.metadata().with_context(attempt)?.len();
    if size > SIZE_MAX {
        return Err(Error::config(format!("it has {size} bytes: no module has so many")))
            .with_context(attempt);
    }
    let bytes = fs::read(path).with_context(attempt)?;
    if !bytes.starts_with(b"\x7fELF") {
        return Err(Error::config(
            "it is compressed, and its needs cannot be read: `alula kernel fetch` unpacks those that a guest needs",
        ))
        .with_context(attempt);
    }
    const WORD: &[u8] = b"\0depends=";
    let at = bytes.windows(WORD.len()).position(|window| window == WORD);
    let list = at.map_or(&[][..], |at| &bytes[at + WORD.len()..]);
    let list = list.split(|byte| *byte == 0).next().unwrap_or_default();
    let list = String::from_utf8_lossy(list);
    Ok(list.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str, modules: &[(&str, &str)]) -> Self {
            let path = std::env::temp_dir().join(format!("alula-modules-{name}-{}", std::process::id()));
            fs::create_dir_all(path.join("kernel/net")).unwrap();
            for (file, needs) in modules {
                fs::write(path.join(file), format!("\x7fELF...\0license=GPL\0depends={needs}\0name=x\0"))
                    .unwrap();
            }
            fs::write(path.join("modules.builtin"), "kernel/fs/ext4/ext4.ko\nkernel/lib/crc-16.ko\n")
                .unwrap();
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn what_a_module_needs_comes_before_it_and_once() {
        let folder = Folder::new(
            "order",
            &[
                ("kernel/virtio.ko", "virtio_ring"),
                ("kernel/virtio_ring.ko", ""),
                ("kernel/virtio-mmio.ko", "virtio,virtio_ring,crc-16"),
                ("kernel/net/a.ko", "b,missing"),
                ("kernel/net/b.ko", "a"),
                ("c.ko", "b"),
            ],
        );
        fs::write(folder.0.join("d.ko.xz"), "\u{fd}7zXZ").unwrap();
        let modules = Modules::in_folder(&folder.0).unwrap();
        let names = |wanted: &[&str]| -> Vec<String> {
            let files = modules.closure(wanted).unwrap();
            files.iter().map(|file| name_of(file.file_name().unwrap()).unwrap()).collect()
        };
        assert_eq!(names(&["virtio_mmio", "ext4", "virtio"]), ["virtio_ring", "virtio", "virtio_mmio"]);
        assert!(names(&["ext4", "crc_16"]).is_empty());
        let told = |wanted: &[&str]| modules.closure(wanted).unwrap_err().to_string();
        let missing = told(&["c"]);
        assert!(missing.contains("module `missing`, which `a` needs, is not in `"), "{missing}");
        assert!(told(&["nothing"]).starts_with("module `nothing` is not in `"));
        assert!(
            told(&["d"]).contains("it is compressed, and its needs cannot be read: `alula kernel fetch`")
        );
    }

    #[test]
    fn modules_are_known_by_the_names_of_their_files() {
        for (file, name) in [
            ("virtio-blk.ko", Some("virtio_blk")),
            ("a.ko.xz", Some("a")),
            ("a.ko.zst", Some("a")),
            ("a.ko.bak", None),
            ("modules.order", None),
        ] {
            assert_eq!(name_of(file.as_ref()).as_deref(), name, "{file}");
        }
    }
}
