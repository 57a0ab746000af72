//! `alula kernel fetch`, of packages that are made here: by apt and dpkg, as on any machine, into a cache of the test's own.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::Folder;
use common::terminal::Terminal;

const VERSION: &str = "6.9-test";
/// Modules that guests need and that none of the packages here has as a file.
const BUILTIN: &str = "virtio_pci virtio_blk virtio_net virtio_rng virtio_balloon virtio_mem virtio_pmem nd_pmem \
    vmw_vsock_virtio_transport erofs squashfs";

/// Makes a package of these files.
fn package(folder: &Folder, name: &str, files: &[(&str, &str)]) -> PathBuf {
    let root = folder.path(&format!("{name}.root"));
    let control = format!(
        "Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\nDescription: a part\n"
    );
    for (path, content) in [&[("DEBIAN/control", &control[..])], files].concat() {
        let path = root.join(path.replace("VERSION", VERSION));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    let file = folder.path(&format!("{name}.deb"));
    let [root, to] = [&root, &file].map(|path| path.to_str().unwrap());
    common::output("dpkg-deb", &["--root-owner-group", "-Znone", "-b", root, to]);
    file
}

/// The list of what is in a kernel itself.
fn builtin() -> String {
    BUILTIN.split_whitespace().map(|name| format!("kernel/drivers/{name}.ko\n")).collect()
}

/// The modules in `kernel/` of a version: two that guests need, one that these two need, and one that nobody needs.
const MODULES: [(&str, &str); 4] = [
    ("virtio_mmio.ko", "\x7fELF\0depends=more\0"),
    ("overlay.ko", "\x7fELF\0depends=\0"),
    ("more.ko", "\x7fELF\0depends=\0"),
    ("unneeded.ko", "\x7fELF\0depends=\0"),
];

fn command(cache: &Path, from: &[&str]) -> Command {
    let mut command = Command::new(common::alula());
    command.args(["kernel", "fetch"]).args(from.iter().flat_map(|from| ["--from", from]));
    command.env("ALULA_CACHE", cache).stdin(Stdio::null());
    command
}

fn fetch(cache: &Path, from: &[&str]) -> Output {
    command(cache, from).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Whether a fetch that went well has put a kernel with this content, and its modules alone, into the cache.
fn is_there(cache: &Path, output: &Output, kernel: &str) {
    assert!(output.status.success(), "{output:?}");
    let place = cache.join(format!("kernel-{}", std::env::consts::ARCH));
    assert_eq!(text(&output.stdout), format!("{}\n", place.join("kernel").display()));
    assert_eq!(fs::read_to_string(place.join("kernel")).unwrap(), kernel);
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&place.join("modules")), ["modules.builtin", "more.ko", "overlay.ko", "virtio_mmio.ko"]);
    // Nothing of the work is left.
    assert_eq!(names(cache).len(), 1);
}

#[test]
fn a_kernel_comes_out_of_a_file_and_out_of_a_url() {
    let folder = Folder::new();
    let paths = MODULES.map(|(name, _)| format!("lib/modules/VERSION/kernel/{name}"));
    let list = builtin();
    let mut files =
        vec![("boot/vmlinuz-VERSION", "of a file"), ("lib/modules/VERSION/modules.builtin", &list)];
    files.extend(paths.iter().zip(MODULES).map(|(path, (_, content))| (&path[..], content)));
    let file = package(&folder, "linux-image-a", &files);
    files[0].1 = "of a URL";
    let other = package(&folder, "linux-image-b", &files);
    let (cache, url) = (folder.path("cache"), format!("file://{}", other.display()));
    let output = fetch(&cache, &[file.to_str().unwrap()]);
    is_there(&cache, &output, "of a file");
    assert_eq!(text(&output.stderr), "alula: taking the kernel and its modules out of it\n");
    // Another one takes its place, and no terminal is there to show how the download goes on. The cache is named from the
    // current folder.
    let output = command(Path::new("cache"), &[&url]).current_dir(folder.path("")).output().unwrap();
    is_there(&cache, &output, "of a URL");
    let said = format!("alula: fetching {url}\nalula: taking the kernel and its modules out of it\n");
    assert_eq!(text(&output.stderr), said);
    // On a terminal apt says itself what has come, and of how much.
    let terminal = Terminal::new();
    let mut command = command(&cache, &[&url]);
    let output = command.stderr(terminal.monitor.try_clone().unwrap()).output().unwrap();
    is_there(&cache, &output, "of a URL");
    let Terminal { mut user, monitor } = terminal;
    drop((command, monitor));
    let mut shown = Vec::new();
    // Linux says EIO where the other side of a terminal is closed.
    let _ = user.read_to_end(&mut shown);
    let shown = text(&shown);
    assert!(shown.contains(&format!("Get:1 {url} [")) && shown.contains("100%"), "{shown}");
}

#[test]
fn a_kernel_comes_out_of_the_parts_that_newer_ones_have() {
    let folder = Folder::new();
    let list = builtin();
    let image = package(
        &folder,
        "linux-binary",
        &[
            ("usr/lib/modules/VERSION/vmlinuz", "of parts"),
            ("usr/lib/modules/VERSION/modules.builtin", &list),
        ],
    );
    let paths = MODULES.map(|(name, _)| format!("usr/lib/modules/VERSION/kernel/{name}"));
    let files: Vec<_> = paths.iter().zip(MODULES).map(|(path, (_, content))| (&path[..], content)).collect();
    let modules = package(&folder, "linux-modules", &files);
    let [image, modules] = [&image, &modules].map(|path| path.to_str().unwrap());
    let cache = folder.path("cache");
    // One part alone says that there are more.
    let again = "other packages of the same version have parts: --from may be given again)\n";
    let output = fetch(&cache, &[modules]);
    assert_eq!(output.status.code(), Some(1));
    let told = text(&output.stderr);
    assert!(told.contains("it has no /boot/vmlinuz-VERSION (") && told.ends_with(again), "{told}");
    let output = fetch(&cache, &[image, &format!("file://{modules}")]);
    is_there(&cache, &output, "of parts");
}

#[test]
fn what_no_kernel_comes_out_of_is_told_with_a_way_on() {
    let folder = Folder::new();
    let none = package(&folder, "none", &[("usr/share/doc/none/copyright", "")]);
    let text_file = folder.write("text.deb", "no package\n");
    let [none, text_file] = [&none, &text_file].map(|path| path.to_str().unwrap());
    let gone = folder.path("gone.deb").to_str().unwrap().to_owned();
    let otherwise =
        "(a file that was downloaded otherwise does: --from FILE): `/usr/lib/apt/apt-helper` failed: E: ";
    let cache = folder.path("cache");
    for (from, told) in [
        (&gone[..], format!("alula: fetch a kernel: there is no file `{gone}`\n")),
        (text_file, format!("unpack `{text_file}` (a Debian package is needed): `dpkg-deb` failed: ")),
        (
            none,
            "it has no /lib/modules/VERSION (of newer kernels, other packages of the same version".to_owned(),
        ),
        (&format!("file://{gone}"), format!("fetch file://{gone} {otherwise}Failed to fetch ")),
        ("nothing://host/package.deb", format!("fetch nothing://host/package.deb {otherwise}")),
    ] {
        let output = fetch(&cache, &[from]);
        let errors = text(&output.stderr);
        assert!(output.status.code() == Some(1) && errors.contains(&told), "{from}: {errors}");
        let lines = errors
            .lines()
            .filter(|line| !line.starts_with("alula: fetching ") && !line.starts_with("alula: taking "));
        assert_eq!(lines.count(), 1, "{errors}");
        // Nothing of the work is left.
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 0, "{from}");
    }
    // Apt goes on without lists that it cannot fetch. The programs of this name find no package here.
    let tools = folder.path("tools");
    fs::create_dir(&tools).unwrap();
    for (name, script) in [("apt-cache", ""), ("apt-get", "echo \"W: Failed to fetch $LIST\" >&2")] {
        fs::write(tools.join(name), format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(tools.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap());
    let output =
        command(&cache, &[]).env("PATH", path).env("LIST", "http://host/list  Could not connect").output();
    let told = "fetch a kernel: its lists cannot be fetched: http://host/list  Could not connect (name a package by --from";
    let errors = text(&output.unwrap().stderr);
    assert!(errors.contains(told), "{errors}");
    // A kernel that was fetched before stays as it is.
    let kernel = cache.join(format!("kernel-{}/kernel", std::env::consts::ARCH));
    fs::create_dir(kernel.parent().unwrap()).unwrap();
    fs::write(&kernel, "kept").unwrap();
    assert!(!fetch(&cache, &[none]).status.success());
    assert_eq!(fs::read_to_string(&kernel).unwrap(), "kept");
}
