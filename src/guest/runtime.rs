//! Where a guest with a name is found: `alula/ID.sock` in the user's runtime folder, or the system's.

use std::fs::DirBuilder;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::sys::descriptor;

/// Firecracker's limit on a microVM's name.
const ID_MAX: usize = 64;

/// Whether a microVM can have this name; the error says what was expected.
pub fn check_id(id: &str) -> Result<(), String> {
    let is_right = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    match (1..=ID_MAX).contains(&id.len()) && id.bytes().all(is_right) {
        true => Ok(()),
        false => Err(format!("expected 1 to {ID_MAX} letters, digits and hyphens")),
    }
}

/// Where guests without a user are: services of the system.
const SYSTEM: &str = "/run/alula";

/// The folder of control sockets, `$XDG_RUNTIME_DIR/alula`, or `/run/alula` without a user's runtime folder.
pub fn folder() -> PathBuf {
    let base = std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty());
    base.map_or_else(|| PathBuf::from(SYSTEM), |base| PathBuf::from(base).join("alula"))
}

/// The folders in which guests are looked for: this user's own, then the one of services of the system.
pub fn folders() -> Vec<PathBuf> {
    let mut folders = vec![folder(), PathBuf::from(SYSTEM)];
    folders.dedup();
    folders
}

/// The control socket of the guest of this name whose monitor has no user's runtime folder, in the monitor's own root.
pub fn of_system(id: &str) -> PathBuf {
    socket_in(Path::new(SYSTEM), id)
}

fn socket_in(folder: &Path, id: &str) -> PathBuf {
    folder.join(format!("{id}.sock"))
}

/// The control socket of the guest of this name, if it is there.
pub fn look(id: &str) -> Option<PathBuf> {
    folders().iter().map(|folder| socket_in(folder, id)).find(|path| path.exists())
}

/// The control socket of a guest of this name that is to be made: its folder is there afterwards. Whoever listens there
/// takes over what a monitor that was killed has left ([`crate::host::listener::Listener::bind`]).
pub fn prepare(id: &str) -> Result<PathBuf> {
    let path = socket_in(&folder(), id);
    prepare_at(&path).map(|()| path)
}

fn prepare_at(path: &Path) -> Result<()> {
    let folder = crate::paths::folder(path);
    // Its owner's alone: whoever reaches a guest's socket can do anything with the guest.
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.with_context(|| format!("make the folder `{}` for the sockets of guests", folder.display()))?;
    let writable = descriptor::check_writable(folder);
    writable.with_context(|| format!("make a socket in the folder of guests `{}`", folder.display()))
}

/// The control socket of the guest of this name, which is there.
pub fn find(id: &str) -> Result<PathBuf> {
    if let Some(path) = look(id) {
        return Ok(path);
    }
    let path = socket_in(&folder(), id);
    let (way, others) = (
        "(a guest is found by the --id that it was started with; --api-sock names its socket otherwise)",
        others(&folders()),
    );
    Err(Error::config(match folders().iter().find(|folder| is_closed(folder)) {
        Some(closed) => {
            let closed = closed.display();
            let own = if path.starts_with(SYSTEM) { "" } else { " of this user's" };
            format!(
                "there is no guest `{id}`{own} that is found by its name; guests of root are in `{closed}`, where this \
                 user cannot look: ask for one as root (`sudo`), or by a socket that this user may use (--api-sock){others}"
            )
        }
        None => format!("there is no guest `{id}`: `{}` is not there {way}{others}", path.display()),
    }))
}

/// Whether the folder is there and somebody else's, who lets nobody look.
fn is_closed(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
}

fn others(folders: &[PathBuf]) -> String {
    let mut names: Vec<String> = folders
        .iter()
        .flat_map(std::fs::read_dir)
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".sock").map(str::to_owned))
        .take(20)
        .collect();
    names.sort_unstable();
    if names.is_empty() { String::new() } else { format!("; there are: {}", names.join(", ")) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::host::listener::Listener;

    #[test]
    fn names_are_letters_digits_and_hyphens() {
        check_id("a-1").unwrap();
        for text in ["", "a_b", "a/b", &"x".repeat(65)] {
            assert!(check_id(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_place_is_made_and_what_was_left_there_is_cleared() {
        let folder = std::env::temp_dir().join(format!("alula-runtime-{}", std::process::id()));
        let path = folder.join("alula/web.sock");
        prepare_at(&path).unwrap();
        let mode = std::fs::metadata(folder.join("alula")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let listener = UnixListener::bind(&path).unwrap();
        let listen = || {
            prepare_at(&path).unwrap();
            Listener::bind("socket", &path)
        };
        assert!(listen().is_err() && path.exists(), "somebody listens there");
        drop(listener);
        // A child that another case begins has the listener, too, until it executes its program.
        let cleared = (0..1000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            listen().is_ok()
        });
        assert!(cleared, "what was left there is in nobody's way");
        std::fs::write(&path, "no socket").unwrap();
        assert!(listen().is_err() && path.exists(), "a file of somebody else's stays");
        let error = prepare_at(&path.join("a/b")).unwrap_err().to_string();
        assert!(error.starts_with("make the folder `"), "{error}");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
