//! Where a guest with a name is found: `alula/ID.sock` in the user's runtime folder.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The folder of control sockets, `$XDG_RUNTIME_DIR/alula`, or `/run/alula` without a user's runtime folder.
pub fn folder() -> PathBuf {
    let base = std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty());
    base.map_or_else(|| PathBuf::from("/run"), PathBuf::from).join("alula")
}

/// The control socket of the guest of this name.
pub fn socket(id: &str) -> PathBuf {
    folder().join(format!("{id}.sock"))
}

/// The same, of one that is there.
pub fn find(id: &str) -> Result<PathBuf> {
    let path = socket(id);
    if path.exists() {
        return Ok(path);
    }
    Err(Error::config(format!(
        "there is no guest `{id}`: `{}` is not there (a guest is found by the --id that it was started with; --api-sock \
         names its socket otherwise){}",
        path.display(),
        others(&folder())
    )))
}

fn others(folder: &Path) -> String {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".sock").map(str::to_owned))
        .take(20)
        .collect();
    names.sort_unstable();
    if names.is_empty() { String::new() } else { format!("; there are: {}", names.join(", ")) }
}
