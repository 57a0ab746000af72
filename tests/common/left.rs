//! Traces of runs of `alula`: files where theirs are, and processes.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::common::{self, Folder};

/// Folders of a run: its environment's name for it, and the folder's own.
const PLACES: [(&str, &str); 3] = [("XDG_RUNTIME_DIR", "run"), ("TMPDIR", "tmp"), ("ALULA_CACHE", "cache")];

/// Makes the places of runs in `folder`.
pub fn make_places(folder: &Folder) {
    PLACES.iter().for_each(|(_, name)| fs::create_dir(folder.path(name)).unwrap());
}

/// `alula` with its places in `folder`, and nothing on its standard input.
pub fn alula(folder: &Folder) -> Command {
    let mut command = Command::new(common::alula());
    command.envs(PLACES.map(|(variable, name)| (variable, folder.path(name))));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Starts all of them at once, and waits for their ends.
pub fn at_once(commands: impl Iterator<Item = Command>) -> Vec<Output> {
    let running: Vec<_> = commands.map(|mut command| command.spawn().unwrap()).collect();
    running.into_iter().map(|child| child.wait_with_output().unwrap()).collect()
}

/// The traces of runs now: files in their places, and processes that have been told of those. Images of folders, which a
/// cache keeps, are no such trace, nor is the folder of sockets.
pub fn left(folder: &Folder) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    PLACES.iter().for_each(|(_, name)| list(&folder.path(name), &mut all));
    let kept = |path: &str| {
        let in_cache = path.strip_prefix(folder.path("cache").to_str().unwrap());
        let is_image = |path: &str| path.ends_with(".ext4") || path.ends_with(".from");
        in_cache.is_some_and(|rest| ["/images", "/images/lock"].contains(&rest) || is_image(rest))
            || Path::new(path) == folder.path("run/alula")
    };
    all.retain(|path| !kept(path));
    let name = folder.0.as_os_str().as_bytes();
    let knows = |path: &Path| {
        let words = ["cmdline", "environ"].map(|file| fs::read(path.join(file)).unwrap_or_default());
        words.iter().any(|words| words.windows(name.len()).any(|part| part == name))
    };
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    all.extend(processes.filter(|path| knows(path)).map(|path| path.display().to_string()));
    all
}

fn list(folder: &Path, all: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            list(&path, all);
        }
        all.insert(path.display().to_string());
    }
}
