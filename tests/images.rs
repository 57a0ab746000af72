//! Images of folders in a cache. They are locked by descriptors, of which a process that is just being started has a copy for
//! a moment: the cases run one after the other, in a process of their own.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;
#[path = "common/left.rs"]
mod left;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::Seek;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use alula::agent::init::Boot;
use alula::guest::boot;
use alula::guest::images::{Image, Images, Kept};
use alula::guest::kernel::Kernel;
use alula::guest::program::program;
use alula::guest::tree::Tree;
use common::{Ended, Folder, Process};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

struct Place {
    folder: Folder,
    _alone: MutexGuard<'static, ()>,
}

impl Place {
    fn new() -> Self {
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = Folder::on_disk();
        fs::create_dir(folder.path("a")).unwrap();
        Self { folder, _alone: alone }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path(name)
    }

    fn images(&self) -> Images {
        Images { folder: self.path("cache/images") }
    }

    fn tree(&self, name: &str) -> Tree {
        Tree::read(&self.path(name)).unwrap()
    }
}

const LIMIT: u64 = 1000;

fn nothing(_: &str) {}

/// What debugfs says of an image.
fn asked(image: &Path, request: &str) -> String {
    let output = program("debugfs").args(["-R", request]).arg(image).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Gives a file an extended attribute.
#[allow(unsafe_code)]
fn set_attribute(path: &Path) {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let value = b"a value";
    // SAFETY: the call reads strings with their ends, and as many bytes of the value as it has.
    let result = unsafe {
        libc::setxattr(path.as_ptr(), c"user.alula".as_ptr(), value.as_ptr().cast(), value.len(), 0)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_folder_with_attributes_does_not_go_into_a_ramdisk() {
    let place = Place::new();
    fs::write(place.path("a/file"), "content").unwrap();
    assert!(boot::fits(&place.tree("a"), 128));
    set_attribute(&place.path("a/file"));
    assert!(!boot::fits(&place.tree("a"), 128), "the attribute would be lost");
}

/// The owner of what has this name in an initial ramdisk, in words of cpio: user and group.
fn owner_in(mut ramdisk: File, name: &str) -> [u32; 2] {
    ramdisk.rewind().unwrap();
    let output = Command::new("cpio").args(["-itvn", "--quiet"]).stdin(ramdisk).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let list = String::from_utf8(output.stdout).unwrap();
    // Mode, links, user, group, size and three words of time are before the name.
    let lines = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let line = lines.into_iter().find(|words| words[8] == name).unwrap_or_else(|| panic!("{list}"));
    [2, 3].map(|column| line[column].parse().unwrap())
}

#[test]
fn files_in_a_ramdisk_keep_their_owners_if_that_is_asked_for() {
    let place = Place::new();
    let (folder, file) = (place.path("a/folder"), place.path("a/folder/file"));
    fs::create_dir(&folder).unwrap();
    fs::write(&file, "hello").unwrap();
    symlink("folder/file", place.path("a/link")).unwrap();
    // Root gives them to somebody; those of anybody else are somebody's already.
    if fs::metadata(&file).unwrap().uid() == 0 {
        chown(&folder, Some(1001), Some(70_001)).unwrap();
        chown(&file, Some(1002), Some(70_002)).unwrap();
        lchown(place.path("a/link"), Some(1003), Some(70_003)).unwrap();
    }
    let kernel = Kernel { path: place.path("kernel"), modules: None };
    let tree = place.tree("a");
    assert!(boot::fits(&tree, 128));
    let ramdisk =
        |keep_owners| boot::pack(&kernel, &[], Boot::default(), Some((&tree, keep_owners))).unwrap();
    for name in ["folder", "folder/file", "link"] {
        let there = place.path("a").join(name).symlink_metadata().unwrap();
        assert_ne!(there.uid(), 0);
        assert_eq!(owner_in(ramdisk(true), name), [there.uid(), there.gid()], "{name}");
        assert_eq!(owner_in(ramdisk(false), name), [0, 0], "{name}");
    }
    // Files of ours are root's in any case.
    assert_eq!(owner_in(ramdisk(true), ".alula/init"), [0, 0]);
}

#[test]
fn a_folder_is_packed_once_and_again_when_it_changes() {
    let place = Place::new();
    let images = place.images();
    let of = || {
        let said = Cell::new(0);
        let say = |line: &str| said.set(said.get() + u32::from(line.starts_with("packing")));
        let image = images.of(&place.tree("a"), false, LIMIT, say).unwrap();
        (image.path, said.get())
    };
    let (first, said) = of();
    assert_eq!(said, 1);
    assert_eq!(fs::metadata(&first).unwrap().mode() & 0o777, 0o600, "others could read what is the user's");
    assert_eq!(of(), (first.clone(), 0));
    // Each of these is a change that something else shows: a name, a size, a time, another file of the same size.
    let (file, other) = (place.path("a/file"), place.path("a/other"));
    let mut paths = vec![first];
    let changes: [&dyn Fn(); 6] = [
        &|| fs::write(&file, "one").unwrap(),
        &|| fs::write(&file, "four").unwrap(),
        &|| fs::write(&file, "five").unwrap(),
        &|| fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap(),
        &|| fs::rename(&file, &other).unwrap(),
        &|| symlink("nowhere", &file).unwrap(),
    ];
    for (number, change) in changes.iter().enumerate() {
        change();
        let (path, said) = of();
        assert!(said == 1 && !paths.contains(&path), "change {number}");
        paths.push(path);
    }
    // Of a folder's states the last is kept.
    let list = images.list();
    assert_eq!(list.len(), 1);
    assert_eq!(list[0].origin, place.path("a").canonicalize().unwrap());
    let owned = images.of(&place.tree("a"), true, LIMIT, nothing).unwrap();
    assert_ne!(owned.path, paths[6]);
    // A process that was killed leaves these.
    fs::write(images.folder.join("x.new"), "").unwrap();
    symlink("/", images.folder.join("x.from")).unwrap();
    let removed = images.clear(nothing).unwrap();
    assert_eq!((removed.count, removed.in_use), (1, 1));
    drop(owned);
    assert_eq!(images.clear(nothing).unwrap().count, 1);
    let left: Vec<_> =
        fs::read_dir(&images.folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["lock"]);
}

#[test]
fn what_is_in_a_folder_is_in_its_image() {
    let place = Place::new();
    let a = place.path("a");
    let strange = a.join("a name with \" and\nspaces");
    fs::create_dir(&strange).unwrap();
    fs::write(strange.join("file"), "hello").unwrap();
    fs::set_permissions(strange.join("file"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::hard_link(strange.join("file"), a.join("hard")).unwrap();
    symlink("a name", a.join("soft")).unwrap();
    let holes = File::create(a.join("holes")).unwrap();
    holes.set_len(300 << 20).unwrap();
    set_attribute(&strange.join("file"));
    let socket = UnixListener::bind(a.join("socket")).unwrap();
    assert!(Command::new("mkfifo").arg(a.join("fifo")).status().unwrap().success());
    // These take root: without it the test sees what it can see.
    let is_root = fs::metadata(&a).unwrap().uid() == 0;
    if is_root {
        chown(a.join("hard"), Some(1234), Some(70_000)).unwrap();
        fs::set_permissions(strange.join("file"), fs::Permissions::from_mode(0o4751)).unwrap();
        assert!(
            Command::new("mknod").arg(a.join("device")).args(["c", "1", "3"]).status().unwrap().success()
        );
    }
    fs::set_permissions(&a, fs::Permissions::from_mode(0o751)).unwrap();
    let images = place.images();
    let image = images.of(&place.tree("a"), false, LIMIT, nothing).unwrap();
    let size = fs::metadata(&image.path).unwrap();
    assert!(size.len() > 300 << 20 && size.blocks() * 512 < 20 << 20, "{} blocks", size.blocks());
    let of = |image: &Image, path: &str| asked(&image.path, &format!("stat {path}"));
    let hard = of(&image, "/hard");
    assert!(hard.contains("Mode:  04751") && hard.contains("User:     0   Group:     0"), "{hard}");
    assert!(hard.contains("Links: 2") && hard.contains("Size: 5"), "{hard}");
    assert!(of(&image, "/").contains("Mode:  0751"), "{}", of(&image, "/"));
    assert!(of(&image, "/soft").contains("Fast link dest: \"a name\""));
    assert!(of(&image, "/holes").contains("Size: 314572800"));
    assert_eq!(asked(&image.path, "cat /hard"), "hello");
    assert!(asked(&image.path, "ea_get /hard user.alula").contains("a value"));
    assert!(of(&image, "/fifo").contains("Type: FIFO"));
    assert!(of(&image, "/socket").contains("Type: socket"));
    if is_root {
        assert!(of(&image, "/device").contains("Type: character special"));
        let owned = images.of(&place.tree("a"), true, LIMIT, nothing).unwrap();
        let hard = of(&owned, "/hard");
        assert!(hard.contains("User:  1234   Group: 70000"), "{hard}");
    }
    let check = program("e2fsck").args(["-f", "-n"]).arg(&image.path).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    drop(socket);
}

#[test]
fn the_oldest_go_when_there_is_no_room_and_those_in_use_do_not() {
    let place = Place::new();
    let images = place.images();
    let limit = 40;
    for (number, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
        let _ = fs::create_dir(place.path(name));
        // What a file is not a hole by.
        let content: Vec<u8> = (0..10 << 20).map(|at: u32| (at ^ at >> 7) as u8 | 1).collect();
        fs::write(place.path(name).join("file"), content).unwrap();
        if number < 3 {
            drop(images.of(&place.tree(name), false, limit, nothing).unwrap());
        }
    }
    let names = || -> Vec<String> {
        let of = |kept: Kept| kept.origin.file_name().unwrap().to_str().unwrap().to_owned();
        images.list().into_iter().map(of).collect()
    };
    assert_eq!(names(), ["a", "b", "c"]);
    // The image `a` was the oldest; now it is in use, and the one used last.
    let used = images.of(&place.tree("a"), false, limit, nothing).unwrap();
    let other = images.of(&place.tree("d"), false, limit, nothing).unwrap();
    assert_eq!(names(), ["c", "a", "d"]);
    // Whatever has been used last.
    let before = SystemTime::now() - Duration::from_secs(1000);
    File::open(&used.path).unwrap().set_modified(before).unwrap();
    drop(images.of(&place.tree("b"), false, limit, nothing).unwrap());
    assert_eq!(names(), ["a", "d", "b"]);
    let error = images.of(&place.tree("c"), false, 25, nothing).unwrap_err().to_string();
    assert!(
        error.contains("it has 10 MiB, images may take 25 MiB, and guests that run use images of "),
        "{error}"
    );
    assert!(error.ends_with("allow more by --cache-limit, or wait for them"), "{error}");
    let error = images.of(&place.tree("c"), false, 9, nothing).unwrap_err().to_string();
    assert!(
        error.contains("it has 10 MiB, and images may take 9 MiB: allow more by --cache-limit"),
        "{error}"
    );
    drop((used, other));
}

#[test]
fn runs_at_once_share_one_image() {
    let place = Place::new();
    fs::write(place.path("a/file"), "content").unwrap();
    let images = &place.images();
    let packed = &AtomicU32::new(0);
    let paths: Vec<PathBuf> = std::thread::scope(|scope| {
        let one = || {
            let say = |line: &str| {
                let is_packing = line.starts_with("packing");
                packed.fetch_add(is_packing.into(), Ordering::Relaxed);
            };
            let image = images.of(&place.tree("a"), false, LIMIT, say).unwrap();
            // Others clear the cache meanwhile.
            let _ = images.clear(nothing).unwrap();
            assert_eq!(asked(&image.path, "cat /file"), "content");
            image
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(one)).collect();
        let all: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        all.into_iter().map(|image| image.path).collect()
    });
    assert!(paths.iter().all(|path| *path == paths[0]));
    assert_eq!(packed.load(Ordering::Relaxed), 1);
}

/// How `alula run --rootfs ROOTFS -- true` ends, whose kernel is the firmware guest, which has no agent: what is wrong with
/// the root file system is told before that matters. `through` comes before the program.
fn run(place: &Place, through: &[&str], rootfs: &Path, more: &[&str]) -> Ended {
    let alula = common::for_everybody(&place.folder);
    let words = [through, &[alula.to_str().unwrap(), "run", "--memory", "64M", "--rootfs"]].concat();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).arg(rootfs).args(more).args(["--", "true"]);
    command.env("ALULA_CACHE", place.path("cache")).env("ALULA_KERNEL", place.folder.firmware());
    let mut process = Process::spawn(command);
    process.stdin = None;
    process.end()
}

/// `alula cache`, in the case's own cache.
fn cache(place: &Place, more: &[&str]) -> String {
    let mut command = Command::new(common::alula());
    command.arg("cache").args(more).env("ALULA_CACHE", place.path("cache"));
    let output = command.output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

/// One that is whole but for its last byte, one whose journal was not written back, one in a container, and none.
fn images_that_no_guest_mounts(place: &Place) -> [PathBuf; 4] {
    let paths = ["short", "unclean", "qcow2", "text"].map(|name| place.path(name));
    let [short, unclean, qcow2, text] = &paths;
    let make = Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(short).arg("4M").output();
    assert!(make.unwrap().status.success());
    fs::copy(short, unclean).unwrap();
    fs::File::options().write(true).open(short).unwrap().set_len((4 << 20) - 1).unwrap();
    let set = Command::new("debugfs").args(["-w", "-R", "feature needs_recovery"]).arg(unclean).output();
    assert!(set.unwrap().status.success());
    fs::write(qcow2, b"QFI\xfb\0\0\0\x03").unwrap();
    fs::write(text, "no image\n").unwrap();
    paths
}

#[test]
fn what_cannot_be_a_root_file_system_is_told() {
    let place = Place::new();
    let (a, fifo, socket) = (place.path("a"), place.path("fifo"), place.path("socket"));
    fs::write(a.join("file"), vec![1; 17 << 20]).unwrap();
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let listener = UnixListener::bind(&socket).unwrap();
    fs::create_dir_all(place.path("shut/inside")).unwrap();
    fs::write(place.path("shut/file"), vec![1; 17 << 20]).unwrap();
    let open =
        |path: &str, mode| fs::set_permissions(place.path(path), fs::Permissions::from_mode(mode)).unwrap();
    let nobody: &[&str] = &["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let bare: &[&str] = &[
        "unshare",
        "-m",
        "sh",
        "-c",
        "mount -t tmpfs none /usr/sbin && { [ -L /sbin ] || mount -t tmpfs none /sbin; } && exec \"$@\"",
        "sh",
    ];
    fs::create_dir(place.path("cache")).unwrap();
    open("cache", 0o777);
    let needed = "a file or block device is needed";
    let written = place.path("a,rw");
    let [short, unclean, qcow2, text] = images_that_no_guest_mounts(&place);
    let of = |path: &Path, what: &str| format!("alula: read root file system `{}`: {what}", path.display());
    for (through, path, more, expected) in [
        (&[][..], &fifo, &[][..], format!("it is a FIFO, {needed}")),
        (&[], &written, &[], "`rw` is for images: a folder goes along as a copy".to_owned()),
        (&[], &socket, &[], format!("it is a socket, {needed}")),
        (&[], &PathBuf::from("/dev/null"), &[], format!("it is a character device, {needed}")),
        (&[], &place.path("none"), &[], "No such file or directory".to_owned()),
        (&[], &text, &[], of(&text, "it has no file system at its beginning (a root is an image of ext4,")),
        (&[], &qcow2, &[], of(&qcow2, "it is a qcow2 image: give it as `--disk IMAGE,root,format=qcow2`")),
        (
            &[],
            &short,
            &[],
            of(&short, "a part of it is missing: its ext4 has 4194304 bytes, and the file 4194303"),
        ),
        (&[], &unclean, &[], of(&unclean, "its ext4 was not unmounted, and nothing can be read before")),
        (
            &[],
            &a,
            &["--cache-limit", "8M"],
            "it has 17 MiB, and images may take 8 MiB: allow more".to_owned(),
        ),
        (bare, &a, &[], "there is no `mke2fs` on this machine: install e2fsprogs".to_owned()),
    ] {
        let ended = run(&place, through, path, more);
        assert!(ended.code == Some(125) && ended.text.contains(&expected), "{expected}: {}", ended.text);
    }
    // The images so far are root's alone.
    fs::remove_dir_all(place.path("cache/images")).unwrap();
    for (path, mode) in [("shut/file", 0o600), ("shut/inside", 0o700)] {
        open(path, mode);
        let ended = run(&place, nobody, &place.path("shut"), &[]);
        let expected = format!("read `{}`: Permission denied", place.path(path).display());
        assert!(ended.code == Some(125) && ended.text.contains(&expected), "{}", ended.text);
        open(path, 0o755);
    }
    drop(listener);
}

#[test]
fn images_are_shown_and_removed_on_demand() {
    let place = Place::new();
    fs::write(place.path("a/file"), vec![1; 17 << 20]).unwrap();
    assert!(cache(&place, &[]).starts_with("0 images, 0 MiB, in `"));
    for _ in 0..2 {
        let ended = run(&place, &[], &place.path("a"), &[]);
        assert!(ended.text.contains("the guest ended before the command in it did"), "{}", ended.text);
        assert!(!ended.text.contains("packing"), "the command's standard error: {}", ended.text);
    }
    let shown = cache(&place, &[]);
    let lines: Vec<_> = shown.lines().collect();
    let origin = place.path("a").canonicalize().unwrap();
    assert!(lines.len() == 2 && lines[0].ends_with(&format!("Z  {}", origin.display())), "{shown}");
    assert!(lines[1].starts_with("1 images, "), "{shown}");
    let used = place.images().of(&place.tree("a"), false, LIMIT, |line| panic!("{line}")).unwrap();
    assert!(cache(&place, &[]).contains("  in use  "));
    assert_eq!(cache(&place, &["clear"]), "removed 0 images, 0 MiB; guests use 1\n");
    drop(used);
    assert!(cache(&place, &["clear"]).starts_with("removed 1 images, "));
    assert!(cache(&place, &[]).starts_with("0 images, 0 MiB, in `"));
}

/// `alula run -- true`, whose kernel is the firmware guest: a machine that ends before there is an agent in it.
fn ends_early(place: &Place, words: &str, options: &[&str]) -> Command {
    let mut command = left::alula(&place.folder);
    command.env("ALULA_KERNEL", place.path("firmware")).args(["run", "--memory", "64M", "--cmdline", words]);
    command.args(options).args(["--", "true"]);
    command
}

#[test]
fn of_runs_in_a_row_and_at_once_nothing_is_left() {
    let place = Place::new();
    place.folder.firmware();
    File::create(place.path("a/hole")).unwrap().set_len(17 << 20).unwrap();
    left::make_places(&place.folder);
    let before = left::left(&place.folder);
    assert_eq!(before.len(), 0, "{before:?}");
    let is_over = |output: std::process::Output| {
        let errors = String::from_utf8_lossy(&output.stderr);
        let told = "the guest ended before the command in it did: the guest ended with code 0\n";
        assert!(output.status.code() == Some(125) && errors.contains(told), "{output:?}");
    };
    // Without a folder of sockets, a run has its own in that for temporary files.
    for number in 0..20 {
        is_over(ends_early(&place, "case=serial end=0", &[]).output().unwrap());
        assert_eq!(left::left(&place.folder), before, "run {number}");
    }
    // A folder that is packed, by the first of them, and names by which they are found.
    let (root, names) = (place.path("a"), (0..10).map(|number| format!("guest-{number}")));
    let options = names.map(|name| ["--id", &name, "--rootfs", root.to_str().unwrap()].map(str::to_owned));
    let options: Vec<_> = options.collect();
    let runs = options
        .iter()
        .map(|words| ends_early(&place, "case=serial end=0", &words.each_ref().map(String::as_str)));
    left::at_once(runs).into_iter().for_each(is_over);
    assert_eq!(left::left(&place.folder), before);
    let images = place.images().list();
    assert!(images.len() == 1 && !images[0].is_in_use, "{images:?}");

    // Traces are looked for in the right places: while a guest runs, its folder's socket, its named one and its process are
    // found there.
    let mut guest = Process::spawn(ends_early(&place, "case=serial end=idle", &["--id", "web"]));
    let own = format!("alula-{}/vsock", guest.child.id());
    let has = |all: &BTreeSet<String>, name: &str| all.iter().any(|path| path.ends_with(name));
    common::wait_for(|| {
        let all = left::left(&place.folder);
        has(&all, &own)
            && has(&all, "run/alula/web.sock")
            && has(&all, &format!("/proc/{}", guest.child.id()))
    });
    guest.send(libc::SIGTERM);
    assert_eq!(guest.end().code, Some(143));
    assert_eq!(left::left(&place.folder), before);
}
