//! Kernel modules: where they are, what they need, and in which order they are loaded.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use super::program::{APT_HELPER, program, run};
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

/// How modules are compressed: the ending of their files, the program that unpacks them, and the Debian package that
/// the program is in.
const PACKERS: &str = "\
xz xz xz-utils
zst zstd zstd
gz gzip gzip
";

/// The program that unpacks files with this ending, and its package.
fn packer(ending: &str) -> Option<(&'static str, &'static str)> {
    PACKERS.lines().find_map(|line| line.strip_prefix(ending)?.strip_prefix(' ')?.split_once(' '))
}

/// A module as a guest loads it.
#[derive(Debug)]
pub struct Module {
    /// The name of its file, were it not compressed.
    pub file_name: String,
    /// The file's content, unpacked.
    pub content: Vec<u8>,
}

/// The name of the module in this file: `virtio_blk` of `virtio-blk.ko.xz`.
fn name_of(file: &OsStr) -> Option<String> {
    let (name, ending) = file.to_str()?.split_once(".ko")?;
    let is_module =
        ending.is_empty() || ending.strip_prefix('.').is_some_and(|ending| packer(ending).is_some());
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

    /// These modules and all that they need, in the order to load them, each once. What is in the kernel itself needs no
    /// file.
    pub fn closure(&self, wanted: &[&str]) -> Result<Vec<Module>> {
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
        order: &mut Vec<Module>,
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
        let content = read(path).with_context(|| format!("read module `{}`", path.display()))?;
        for needed in needs(&content) {
            self.add(&needed, Some(name), seen, order)?;
        }
        let file_name = path.file_name().unwrap_or_default().to_string_lossy();
        let (stem, _) = file_name.split_once(".ko").unwrap_or((&file_name, ""));
        order.push(Module { file_name: format!("{stem}.ko"), content });
        Ok(())
    }
}

/// The module in this file, unpacked.
fn read(path: &Path) -> Result<Vec<u8>> {
    let size = path.metadata().context("look at its size")?.len();
    if size > SIZE_MAX {
        return Err(Error::config(format!("it has {size} bytes: no module has so many")));
    }
    let ending = path.extension().unwrap_or_default();
    let content = match packer(&ending.to_string_lossy()) {
        Some((name, package)) => {
            let missing = format!("install {package}");
            let unpacked = run(program(name).arg("-dcq").arg(path), &missing);
            // A machine with apt need not have it.
            let by_apt = || run(program(APT_HELPER).arg("cat-file").arg(path), "");
            unpacked.or_else(|error| by_apt().map_err(|_| error))?.stdout
        }
        None => fs::read(path).context("read it")?,
    };
    if content.starts_with(b"\x7fELF") { Ok(content) } else { Err(Error::config("it is not an ELF file")) }
}

/// What a module needs, by its own words: `depends=a,b` among the strings of its section `.modinfo`.
fn needs(content: &[u8]) -> Vec<String> {
    const WORD: &[u8] = b"\0depends=";
    let at = content.windows(WORD.len()).position(|window| window == WORD);
    let list = at.map_or(&[][..], |at| &content[at + WORD.len()..]);
    let list = list.split(|byte| *byte == 0).next().unwrap_or_default();
    let list = String::from_utf8_lossy(list);
    list.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

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
        fs::write(folder.0.join("e.ko"), "\u{fd}7zXZ").unwrap();
        let modules = Modules::in_folder(&folder.0).unwrap();
        let names = |wanted: &[&str]| -> Vec<String> {
            let closure = modules.closure(wanted).unwrap();
            closure.iter().map(|module| name_of(module.file_name.as_ref()).unwrap()).collect()
        };
        assert_eq!(names(&["virtio_mmio", "ext4", "virtio"]), ["virtio_ring", "virtio", "virtio_mmio"]);
        assert!(names(&["ext4", "crc_16"]).is_empty());
        let told = |wanted: &[&str]| modules.closure(wanted).unwrap_err().to_string();
        let missing = told(&["c"]);
        assert!(missing.contains("module `missing`, which `a` needs, is not in `"), "{missing}");
        assert!(told(&["nothing"]).starts_with("module `nothing` is not in `"));
        assert!(told(&["e"]).ends_with("e.ko`: it is not an ELF file"));
    }

    #[test]
    fn compressed_modules_are_unpacked_to_know_what_they_need() {
        let folder = Folder::new("packed", &[("a.ko", "b-1"), ("b-1.ko", "c"), ("c.ko", "d"), ("d.ko", "")]);
        for (packer, name) in [("xz", "a"), ("zstd", "b-1"), ("gzip", "c")] {
            let path = folder.0.join(format!("{name}.ko"));
            let packed = Command::new(packer).arg(&path).status();
            assert!(packed.expect("xz, zstd and gzip, which scripts/test installs").success());
            // zstd leaves what it has packed.
            let _ = fs::remove_file(path);
        }
        let closure = Modules::in_folder(&folder.0).unwrap().closure(&["a"]).unwrap();
        let names: Vec<_> = closure.iter().map(|module| &module.file_name[..]).collect();
        assert_eq!(names, ["d.ko", "c.ko", "b-1.ko", "a.ko"]);
        assert!(closure.iter().all(|module| module.content.starts_with(b"\x7fELF...\0license")));
        fs::write(folder.0.join("e.ko.xz"), "\u{fd}7zXZ").unwrap();
        let broken = Modules::in_folder(&folder.0).unwrap().closure(&["e"]).unwrap_err().to_string();
        assert!(broken.contains("e.ko.xz`: `xz` failed: xz: "), "{broken}");
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
