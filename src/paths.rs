//! Why what a user named by its path could not be opened or made, in more words than the kernel's.

use std::io::{Error as IoError, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::Error;

/// Files are opened in some folders only (`--allow`).
static IS_LIMITED: AtomicBool = AtomicBool::new(false);

/// The folder that is this process's root, as it was named before, in a jail.
static ROOT: OnceLock<PathBuf> = OnceLock::new();

/// Notes that `folder`, as it was named before, is the root from here on.
pub fn note_root(folder: PathBuf) {
    let _ = ROOT.set(folder);
}

/// Notes that files are opened in the folders of `--allow` only from here on.
pub fn note_limits() {
    IS_LIMITED.store(true, Ordering::Relaxed);
}

fn beside_limits() -> &'static str {
    if IS_LIMITED.load(Ordering::Relaxed) { ", or it is in no folder of --allow" } else { "" }
}

/// Why the file at `path` could not be opened to be read, or also to be written.
pub fn cannot_open(path: &Path, error: &IoError, write: bool) -> Error {
    let more = match error.kind() {
        ErrorKind::NotFound => why_missing(path),
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem if write && may_read(path) => Some(
            "it can only be read: give it read-only (`is_read_only`, `ro`), or let this user write it"
                .to_owned(),
        ),
        ErrorKind::PermissionDenied => {
            Some(format!("this user may not open it, or not enter its folder{}", beside_limits()))
        }
        _ => None,
    };
    Error::host(match more {
        Some(more) => format!("{error}: {more}"),
        None => error.to_string(),
    })
}

/// Why a file or socket could not be made at `path`.
pub fn cannot_make(path: &Path, error: &IoError) -> Error {
    let folder = folder(path);
    match error.kind() {
        ErrorKind::NotFound if !folder.is_dir() => {
            Error::config(format!("there is no folder `{}`: create it", folder.display()))
        }
        ErrorKind::AlreadyExists => {
            Error::config(format!("{error}: choose another path, or remove what is there"))
        }
        ErrorKind::PermissionDenied if path.exists() => {
            Error::host(format!("{error}: this user may not write it{}", beside_limits()))
        }
        ErrorKind::PermissionDenied => Error::host(format!(
            "{error}: this user may not make files in `{}`{}: choose another path",
            folder.display(),
            beside_limits()
        )),
        _ => Error::host(error.to_string()),
    }
}

/// The folder that `path` is in.
pub fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn why_missing(path: &Path) -> Option<String> {
    if let Ok(target) = path.read_link() {
        return Some(format!("it is a link to `{}`, which is not there", target.display()));
    }
    let is_here = path.is_relative().then(std::env::current_dir).and_then(Result::ok);
    let folder = folder(path);
    let missing = (!folder.is_dir()).then(|| format!("there is no folder `{}`", folder.display()));
    let why = match (missing, is_here) {
        (Some(missing), Some(here)) => Some(format!("{missing} in `{}`", here.display())),
        (None, Some(here)) => Some(format!("it was looked for in `{}`", here.display())),
        (missing, None) => missing,
    };
    let Some(root) = ROOT.get() else { return why };
    let why = why.map(|why| format!("{why}, and ")).unwrap_or_default();
    Some(format!("{why}`/` is the jail's root, which is `{}` outside: put it there", root.display()))
}

/// Whether it is a file that could be opened to be read: nothing that an open would wait for is opened.
fn may_read(path: &Path) -> bool {
    path.is_file() && std::fs::File::open(path).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_leads_nowhere_is_told_with_the_place_where_it_breaks_off() {
        let folder = std::env::temp_dir().join(format!("alula-paths-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let link = folder.join("link");
        std::os::unix::fs::symlink("gone", &link).unwrap();
        let told = |path: &Path| {
            let error = std::fs::File::open(path).unwrap_err();
            cannot_open(path, &error, false).to_string()
        };
        let here = std::env::current_dir().unwrap();
        let here = here.display();
        for (path, expected) in [
            (Path::new("gone"), format!(": it was looked for in `{here}`")),
            (Path::new("gone/x"), format!(": there is no folder `gone` in `{here}`")),
            (&folder.join("gone"), String::new()),
            (&folder.join("gone/x"), format!(": there is no folder `{}`", folder.join("gone").display())),
            (&link, ": it is a link to `gone`, which is not there".to_owned()),
        ] {
            assert_eq!(told(path), format!("No such file or directory (os error 2){expected}"));
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_cannot_be_made_is_told_with_its_folder() {
        let missing = IoError::from(ErrorKind::NotFound);
        let error = cannot_make(Path::new("/none/x"), &missing).to_string();
        assert_eq!(error, "there is no folder `/none`: create it");
        let there = cannot_make(Path::new("/"), &IoError::from_raw_os_error(libc::EEXIST)).to_string();
        assert_eq!(there, "File exists (os error 17): choose another path, or remove what is there");
        let denied = IoError::from_raw_os_error(libc::EACCES);
        let error = cannot_make(Path::new("/none-x"), &denied).to_string();
        assert!(error.ends_with("this user may not make files in `/`: choose another path"), "{error}");
        assert_eq!(folder(Path::new("x")), Path::new("."));
    }
}
