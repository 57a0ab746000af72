//! A root that a jail can leave.

use alula::sys::{confine, machine};

use super::Folder;

/// Gives this thread a mount namespace of its own, with a root that a jail can leave: that of a rig is its initial
/// ramdisk.
pub fn settle() {
    confine::unshare(libc::CLONE_NEWNS).unwrap();
    confine::keep_mounts_apart().unwrap();
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    if !mounts.lines().any(|line| line.split(' ').nth(4) == Some("/") && !line.contains(" - rootfs ")) {
        let place = Folder::new();
        machine::mount("/", place.0.to_str().unwrap(), "", libc::MS_BIND | libc::MS_REC, "").unwrap();
        std::env::set_current_dir(&place.0).unwrap();
        machine::become_root().unwrap();
        std::mem::forget(place);
    }
}
