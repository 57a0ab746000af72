//! A jail that cannot be made is refused by the name of the option, and nothing of it is left.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;

use crate::common;
use crate::site::{Site, end};

/// The IDs of jails that something stands in the way of, and the words that each is refused with.
const IN_THE_WAY: &[(&str, &str)] = &[
    ("leads", "root` is a symbolic link, which could lead anywhere: remove it, or choose another --id"),
    ("away", "alula/away` is a symbolic link"),
    ("there", "root/dev` is a symbolic link"),
    ("file", "root` is no folder: remove it, or choose another --id"),
    ("left", "alula` is left from an earlier jail: if that has ended, remove its folder"),
];

/// Options, in which a word in capitals is a file of the test's, and the words that they are refused with.
const OPTIONS: &[(&str, &str)] = &[
    ("--netns /dev/null", "--netns /dev/null: it is no network namespace: `ip netns add NAME` makes one"),
    ("--netns /nonexistent", "--netns /nonexistent: No such file"),
    (
        "--exec-file LINK",
        "it is a symbolic link: name the program that it leads to, or give that a second name",
    ),
    ("--exec-file PLAIN", "it is not executable: make it so by `chmod +x`, if it is a program"),
    ("--exec-file /dev", "--exec-file /dev: it is no file: name a program"),
    ("--exec-file /nonexistent", "--exec-file /nonexistent: No such file"),
    ("--exec-file SCRIPT", "--exec-file: execute `SCRIPT`: No such file or directory"),
    ("--exec-file PRIVATE", "user 1234 may not execute it: `chmod a+rx`"),
    ("--daemonize --new-pid-ns --exec-file PRIVATE", "user 1234 may not execute it"),
    ("--cgroup pids.nonesuch=1", "pids.nonesuch`: this kernel has no such limit"),
    ("--cgroup pids.maxx=1", "in the other --cgroup-version (is `pids.max` meant?)"),
    (
        "--cgroup-version 2 --cgroup pid.max=1",
        " (is `pids.max` meant?): where a hierarchy of version 1 has it",
    ),
    ("--cgroup pids.max=many", "--cgroup pids.max=many: write to `"),
    (
        "--cgroup-version 1 --cgroup nonesuch.max=1",
        "no hierarchy of version 1 with the controller `nonesuch`",
    ),
    ("--cgroup-version 2 --cgroup nonesuch.max=1", "does not offer the controller `nonesuch` (it offers: "),
    ("--cgroup-version 2 --parent-cgroup nonesuch", "--parent-cgroup nonesuch: open `"),
    ("--keep-fd 199", "--keep-fd 199: no descriptor of this number was inherited"),
    ("--resource-limit no-file=999999999999", "--resource-limit no-file=999999999999: set it"),
    ("--userns", "--userns: root would still own the host's files in there"),
];

/// Puts something in the way of each jail of [`IN_THE_WAY`].
fn obstruct(site: &Site) {
    let elsewhere = site.folder.path("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    std::fs::create_dir_all(site.root("there")).unwrap();
    for id in ["leads", "file"] {
        std::fs::create_dir_all(site.root(id).parent().unwrap()).unwrap();
    }
    symlink(&elsewhere, site.root("leads")).unwrap();
    std::fs::write(site.root("file"), "").unwrap();
    symlink(&elsewhere, site.base().join("alula/away")).unwrap();
    symlink(&elsewhere, site.root("there").join("dev")).unwrap();
    // The jail `left` has ended, and is in the way of the next one.
    let mut command = site.jail("left");
    command.args(["--", "run", "vmlinux"]);
    let ended = end(command);
    let root = site.root("left");
    let expected = format!(
        "open kernel `vmlinux`: No such file or directory (os error 2): it was looked for in `/`, and `/` is the jail's root, \
         which is `{}` outside: put it there",
        root.display()
    );
    assert!(ended.code == Some(125) && ended.text.contains(&expected), "{ended:?}");
}

/// Makes the files that [`OPTIONS`] name.
fn put_programs(site: &Site) {
    let put = |name: &str, mode, content: &[u8]| {
        let path = site.folder.write(name, content);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
    };
    put("SCRIPT", 0o755, b"#!/bin/sh\n");
    put("PLAIN", 0o644, b"#!/bin/sh\n");
    put("PRIVATE", 0o700, &std::fs::read(common::alula()).unwrap());
    symlink(common::alula(), site.folder.path("LINK")).unwrap();
}

#[test]
fn what_cannot_be_a_jail_leaves_nothing_behind() {
    let site = Site::new();
    obstruct(&site);
    put_programs(&site);
    let before = site.everything();
    let ids = IN_THE_WAY.iter().map(|(id, expected)| (*id, "", *expected));
    for (id, options, expected) in
        ids.chain(OPTIONS.iter().map(|(options, expected)| ("x", *options, *expected)))
    {
        let mut command = site.jail(id);
        // The fault of the case comes after limits that can be set, which are to be undone with all else.
        if !options.contains("cgroup") {
            command.args(site.limits());
        } else if options.starts_with("--cgroup pids") {
            command.args(["--cgroup-version", site.version, "--parent-cgroup", &site.parent]);
        }
        let is_file = |word: &str| word.bytes().all(|byte| byte.is_ascii_uppercase());
        for word in options.split_whitespace() {
            command.arg(if is_file(word) { site.folder.path(word) } else { word.into() });
        }
        let ended = end(command);
        assert!(ended.code == Some(1) && ended.text.contains(expected), "{id} {options}: {ended:?}");
        assert_eq!(site.everything(), before, "{id} {options}");
    }
}

#[test]
fn wrong_arguments_of_the_monitor_are_told_before_a_jail_is_made() {
    let site = Site::new();
    let before = site.everything();
    for (options, words) in [
        (&[][..], &["--bogus"][..]),
        (&["--daemonize"], &["--bogus"]),
        (&["--daemonize", "--new-pid-ns"], &["run", "--bogus"]),
    ] {
        let mut command = site.jail("x");
        command.args(options).arg("--").args(words);
        let ended = end(command);
        assert!(ended.code == Some(153) && ended.text.contains("'--bogus'"), "{options:?}: {ended:?}");
        assert_eq!(site.everything(), before, "{options:?}");
    }
}

#[test]
fn a_user_who_may_not_open_kvm_is_told_before_anything_is_made() {
    let site = Site::new();
    // What this thread mounts, it and its children see alone: a device that is closed to all but root.
    let own = site.folder.path("own");
    std::fs::create_dir(&own).unwrap();
    common::mount_tmpfs(&own, 4096);
    let closed = own.join("kvm");
    std::fs::write(&closed, "").unwrap();
    std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o600)).unwrap();
    common::output("mount", &["--bind", closed.to_str().unwrap(), "/dev/kvm"]);
    let base = site.base();
    let words = ["jail", "--id", "x", "--userns", "--chroot-base-dir", base.to_str().unwrap(), "--", "run"];
    let command = common::as_nobody(&site.folder, &words);
    let before = site.everything();
    let ended = end(command);
    let expected = "alula: --userns: the guest in the jail needs KVM: open /dev/kvm: Permission denied";
    assert!(ended.code == Some(1) && ended.text.contains(expected), "{ended:?}");
    assert_eq!(site.everything(), before);
    common::output("umount", &["/dev/kvm"]);
}

#[test]
fn an_ordinary_user_is_told_how_to_name_another_place() {
    common::open_devices();
    let folder = common::Folder::new();
    std::fs::set_permissions(&folder.0, PermissionsExt::from_mode(0o755)).unwrap();
    let ended = end(common::as_nobody(&folder, &["jail", "--id", "x", "--userns", "--", "run"]));
    let expected = "Permission denied (os error 13): `--chroot-base-dir DIR` names a place that this user may write to\n";
    assert!(ended.code == Some(1) && ended.text.ends_with(expected), "{ended:?}");
}

/// The place of the hierarchy of version 2, which this thread mounts where nobody has.
fn hierarchy(site: &Site) -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let mounted = mounts.lines().find(|line| line.contains(" - cgroup2 "));
    let place = mounted.map(|line| PathBuf::from(line.split(' ').nth(4).unwrap()));
    place.unwrap_or_else(|| {
        let place = site.folder.path("two");
        std::fs::create_dir(&place).unwrap();
        common::mount(&place, "cgroup2", "rw");
        place
    })
}

/// A part of the hierarchy of version 2 that no controllers were given to stands for one that has none.
#[test]
fn a_hierarchy_of_version_2_without_controllers_is_told_of() {
    let site = Site::new();
    let root = hierarchy(&site);
    let parent = root.join(format!("{}-bare", site.parent));
    let bare = parent.join("below");
    std::fs::create_dir_all(&bare).unwrap();
    common::output("mount", &["--bind", bare.to_str().unwrap(), root.to_str().unwrap()]);
    let before = site.everything();
    for option in ["memory.max=1G", "cpu.max=max", "pids.max=1"] {
        let mut command = site.jail("x");
        command.args(["--cgroup-version", "2", "--cgroup", option]);
        let ended = end(command);
        let controller = option.split('.').next().unwrap();
        let expected = format!("does not offer the controller `{controller}` (it offers: none)");
        assert!(ended.code == Some(1) && ended.text.contains(&expected), "{option}: {ended:?}");
        assert_eq!(site.everything(), before, "{option}");
    }
    common::output("umount", &[root.to_str().unwrap()]);
    [bare, parent].iter().for_each(|group| std::fs::remove_dir(group).unwrap());
}
