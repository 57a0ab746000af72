//! The kernel of a guest whose init is the agent: where it is found, with its modules.

use std::path::{Path, PathBuf};

use super::modules::Modules;
use crate::error::{Error, Result};

/// What a fetched kernel is called, whatever its format.
pub const NAME: &str = "kernel";

/// A kernel and its modules.
#[derive(Debug)]
pub struct Kernel {
    /// The image.
    pub path: PathBuf,
    /// None: there are none beside it, so what a guest needs has to be in it.
    pub modules: Option<Modules>,
}

/// The folder of what was fetched and made: `$ALULA_CACHE`, or `alula` in the user's cache. Programs that are started with
/// the path, as apt, are in other folders, so that it is absolute.
pub fn cache() -> PathBuf {
    let folder = |name: &str| std::env::var_os(name).filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let path = folder("ALULA_CACHE").unwrap_or_else(|| {
        let home = || folder("HOME").unwrap_or_else(|| "/root".into()).join(".cache");
        folder("XDG_CACHE_HOME").unwrap_or_else(home).join("alula")
    });
    std::path::absolute(&path).unwrap_or(path)
}

/// Why something could not be made in the cache.
pub fn cannot_keep(error: &std::io::Error) -> Error {
    Error::host(format!("{error} (ALULA_CACHE names another folder for what is fetched and made)"))
}

/// The folder that a fetched kernel is in.
pub fn fetched() -> PathBuf {
    cache().join(format!("kernel-{}", std::env::consts::ARCH))
}

/// The kernel that was named, that ALULA_KERNEL names, or that was fetched.
pub fn find(named: Option<&Path>) -> Result<Kernel> {
    let variable = || std::env::var_os("ALULA_KERNEL").filter(|path| !path.is_empty()).map(PathBuf::from);
    let (path, from) = match named
        .map(Path::to_owned)
        .map(|path| (path, ""))
        .or(variable().map(|path| (path, " (of ALULA_KERNEL)")))
    {
        Some(found) => found,
        None => (fetched().join(NAME), ""),
    };
    if !path.is_file() {
        return Err(Error::config(format!(
            "there is no kernel at `{}`{from}: `alula kernel fetch` gets one, --kernel or ALULA_KERNEL names another",
            path.display()
        )));
    }
    let modules = modules_of(&path).map(|folder| Modules::in_folder(&folder)).transpose()?;
    Ok(Kernel { path, modules })
}

/// The folder of the modules of the kernel at `path`: `modules` beside it, or what packages have
/// (`/boot/vmlinuz-VERSION` and `/lib/modules/VERSION`, or both in the latter).
fn modules_of(path: &Path) -> Option<PathBuf> {
    let folder = crate::paths::folder(path);
    let beside = folder.join("modules");
    if beside.is_dir() {
        return Some(beside);
    }
    if folder.join("kernel").is_dir() {
        return Some(folder.to_owned());
    }
    let version = path.file_name()?.to_str()?.split_once('-')?.1;
    [folder.join("lib/modules"), folder.join("../lib/modules"), PathBuf::from("/lib/modules")]
        .into_iter()
        .map(|place| place.join(version))
        .find(|place| place.is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn modules_are_beside_their_kernel_or_where_packages_have_them() {
        let folder = std::env::temp_dir().join(format!("alula-kernel-{}", std::process::id()));
        for place in ["boot", "lib/modules/6.1-a", "own/modules"] {
            fs::create_dir_all(folder.join(place)).unwrap();
        }
        let image = |name: &str| {
            fs::write(folder.join(name), "").unwrap();
            folder.join(name)
        };
        let found = modules_of(&image("boot/vmlinuz-6.1-a")).unwrap();
        assert_eq!(found.canonicalize().unwrap(), folder.join("lib/modules/6.1-a").canonicalize().unwrap());
        assert_eq!(modules_of(&image("own/vmlinux-6.1-a")), Some(folder.join("own/modules")));
        assert_eq!(modules_of(&image("boot/vmlinuz-6.1-b")), None);
        fs::create_dir(folder.join("lib/modules/6.1-a/kernel")).unwrap();
        assert_eq!(modules_of(&image("lib/modules/6.1-a/vmlinuz")), Some(folder.join("lib/modules/6.1-a")));
        assert_eq!(modules_of(&image("boot/vmlinux")), None);
        assert!(find(Some(&folder.join("boot/vmlinux"))).unwrap().modules.is_none());
        let error = find(Some(&folder.join("none"))).unwrap_err().to_string();
        assert!(error.contains("none`: `alula kernel fetch` gets one"), "{error}");
        fs::remove_dir_all(&folder).unwrap();
    }
}
