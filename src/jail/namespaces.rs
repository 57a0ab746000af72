//! The namespaces of a jail, before anything is in them.

use std::fs::File;
use std::io::Error as IoError;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::User;
use crate::error::{Context, Error, Result};
use crate::paths;
use crate::sys::{confine, machine, process};

/// Has this process join a network namespace that is there.
///
/// # Errors
/// The file is that of something else, or this user may not.
pub fn join_network(path: &Path) -> Result<()> {
    // Without waiting for somebody who writes to a FIFO.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(|error| {
        let why = paths::cannot_open(path, &error, false);
        Error::config(format!("--netns {}: {why}", path.display()))
    })?;
    confine::join(&file, libc::CLONE_NEWNET).map_err(|error| cannot_join(path, &error))
}

fn cannot_join(path: &Path, error: &IoError) -> Error {
    let path = path.display();
    match error.raw_os_error() {
        Some(libc::EINVAL) => Error::config(format!(
            "--netns {path}: it is no network namespace: `ip netns add NAME` makes one at /run/netns/NAME"
        )),
        Some(libc::EPERM) => Error::config(format!(
            "--netns {path}: {error}: only root may join it: leave it out, or call this as root, without --userns"
        )),
        _ => Error::host(format!("--netns {path}: join it: {error}")),
    }
}

/// Moves this process into mount, IPC and UTS namespaces of its own, where the host is called `id`. What is mounted
/// later is not seen outside.
///
/// # Errors
/// This user, or this kernel, may not have such namespaces.
pub fn enter(user: User, id: &str) -> Result<()> {
    let kinds = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    match user.is_mapped {
        true => enter_user_namespace(user, kinds)?,
        false => confine::unshare(kinds).context("make mount, IPC and UTS namespaces for the jail")?,
    }
    machine::set_hostname(id).context("--id: give the jail its name")?;
    confine::keep_mounts_apart().context("keep the mounts of the jail apart from the host's")
}

/// As an ordinary user: this process has all rights in there until it becomes another program, and whoever made the
/// jail has the program's numbers.
fn enter_user_namespace(user: User, kinds: i32) -> Result<()> {
    let (uid, gid) = process::identity();
    confine::unshare(libc::CLONE_NEWUSER | kinds).context(
        "--userns: make a user namespace (the host may forbid them: sysctl user.max_user_namespaces and \
         kernel.unprivileged_userns_clone, or AppArmor)",
    )?;
    let map = |inside: u32, outside: u32| format!("{inside} {outside} 1");
    let files =
        [("setgroups", "deny".to_owned()), ("uid_map", map(user.uid, uid)), ("gid_map", map(user.gid, gid))];
    files.iter().try_for_each(|(file, text)| {
        let path = format!("/proc/self/{file}");
        std::fs::write(&path, text).with_context(|| format!("--userns: write `{text}` to {path}"))
    })
}
