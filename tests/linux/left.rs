//! Runs of commands, one after the other and at once: nothing is left of them.

use std::process::Output;

use alula::guest::images::Images;

use super::left_behind::{alula, at_once, left, make_places};
use super::*;

/// The size of a file that has no room in a quarter of a guest's memory, so that its folder is packed into an image.
const HOLE: u64 = 100 << 20;

/// Makes the folders `small` and `big` with a busybox and a shell, of which the big one has no room in memory.
fn make_roots(folder: &Folder) {
    for root in ["small", "big"].map(|name| folder.path(name)) {
        std::fs::create_dir_all(root.join("bin")).unwrap();
        let program = root.join("bin/busybox");
        let request = format!("dump -p /bin/busybox {}", program.display());
        common::output("debugfs", &["-R", &request, asset("root.ext4").to_str().unwrap()]);
        std::os::unix::fs::symlink("busybox", root.join("bin/sh")).unwrap();
    }
    std::fs::write(folder.path("big/a file"), "of the folder\n").unwrap();
    std::os::unix::fs::symlink("a file", folder.path("big/link")).unwrap();
    std::fs::File::create(folder.path("big/holes")).unwrap().set_len(HOLE).unwrap();
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn of_commands_in_a_row_and_at_once_nothing_is_left() {
    let folder = Folder::new();
    make_roots(&folder);
    make_places(&folder);
    let before = left(&folder);
    let run = |root: &str, options: &[&str], script: &str| {
        let mut command = alula(&folder);
        command.env("ALULA_KERNEL", asset(KERNELS[0])).arg("run").args(options);
        command.arg("--rootfs").arg(folder.path(root)).args(["--", "sh", "-c", script]);
        command
    };
    let (row, many) = if times() > 1 { (20, 10) } else { (2, 3) };
    for number in 0..row {
        let Output { status, stdout, stderr } =
            run("small", &[], "echo hi; echo err >&2; exit 7").output().unwrap();
        let errors = String::from_utf8_lossy(&stderr);
        assert_eq!((status.code(), &stdout[..], &errors[..]), (Some(7), &b"hi\n"[..], "err\n"));
        assert_eq!(left(&folder), before, "run {number}");
    }
    // The first of them makes an image, which the others wait for.
    let script =
        "cd /; busybox cat link; busybox stat -c '%s %b %u' holes; busybox id -u; echo >new && busybox mount";
    let ids: Vec<String> = (0..many).map(|number| format!("at-once-{number}")).collect();
    for output in at_once(ids.iter().map(|id| run("big", &["--id", id], script))) {
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        assert!(text.starts_with(&format!("of the folder\n{HOLE} 0 0\n0\n")), "{output:?}");
        assert!(text.contains("overlay on / type overlay"), "{output:?}");
    }
    assert_eq!(left(&folder), before);
    let images = Images { folder: folder.path("cache/images") }.list();
    assert!(images.len() == 1 && !images[0].is_in_use, "{images:?}");
}
