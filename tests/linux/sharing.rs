//! Clones of a Linux guest that read the same files, of their root by DAX and of a disk: what that costs the host.
//! Debian's kernel for arm64 has no DAX.

use std::os::unix::fs::PermissionsExt;

use super::clones::{Clones, User};
use super::*;

/// How many clones there are in the normal run and in the long series, and the memory that they may take for what they
/// read by DAX, as a part of what they take for the same from disks. Three of them share one copy, where four are with
/// disks: one of each guest, and the host's.
const NORMAL: (usize, f64) = (3, 0.4);
const LONG: (usize, f64) = (50, 0.15);
/// The size of the file that each of them reads. An emulated machine needs seconds for it.
const FILE_MIB: u64 = 8;

/// Makes the image of a root with busybox and a file of random bytes. Of an image so small, mke2fs makes blocks of 1 KiB
/// if it is not told: DAX takes a file system whose blocks are pages.
fn image(folder: &Folder) -> String {
    let (root, image) = (folder.path("root"), folder.path("image"));
    let busybox = root.join("bin/busybox");
    std::fs::create_dir_all(root.join("bin")).unwrap();
    let request = format!("dump /bin/busybox {}", busybox.display());
    common::output("debugfs", &["-R", &request, asset("root.ext4").to_str().unwrap()]);
    std::fs::set_permissions(&busybox, PermissionsExt::from_mode(0o755)).unwrap();
    let mut file = std::fs::File::create(root.join("file")).unwrap();
    let mut random = std::fs::File::open("/dev/urandom").unwrap().take(FILE_MIB << 20);
    std::io::copy(&mut random, &mut file).unwrap();
    let [root, image] = [root, image].map(|path| path.to_str().unwrap().to_owned());
    common::output("mke2fs", &["-q", "-F", "-t", "ext4", "-b", "4096", "-d", &root, &image, "32M"]);
    image
}

/// The memory of these clones, in which each page counts by how many share it (`Pss`, proc_pid_smaps(5)), in KiB.
fn memory_of(clones: &Clones) -> u64 {
    let of = |pid: &u32| -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        line_of(&text, "Pss:").trim_end_matches(" kB").parse().unwrap()
    };
    clones.0.iter().map(of).sum()
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn guests_have_what_they_read_by_dax_in_memory_once() {
    let (count, part_max) = if times() > 1 { LONG } else { NORMAL };
    let user = User { folder: Folder::new() };
    let image = image(&user.folder);
    let (pmem, disk) = (format!("{image},root,ro"), format!("{image},ro"));
    let script = "busybox mkdir /tmp/disk && busybox mount -t ext4 -o ro /dev/vda /tmp/disk &&
        busybox cat /proc/fs/ext4/pmem0/options && echo up; while :; do busybox sleep 1000; done";
    let mut first = Process::spawn({
        let words = ["run", "--pmem", &pmem, "--disk", &disk, "--vsock", "v.sock", "--id", "first"];
        user.command(&[&words[..], &["--", "busybox", "sh", "-c", script]].concat())
    });
    first.expect("dax=always\n");
    first.expect("up\n");
    user.says(&["ctl", "first", "snapshot", "saved"]);
    first.send(libc::SIGTERM);
    assert_eq!(first.end().code, Some(128 + libc::SIGTERM));
    let clones = user.clones(count, &["--paused"]);
    println!("sharing: there are {count} clones");

    // The clones read so many pieces of 64 KiB one after the other, as one CPU is too slow for all of them at once; the
    // memory that they take for that is returned.
    let read = |path: &str, pieces: u64| {
        let before = memory_of(&clones);
        for number in 1..=count {
            let id = format!("web-{number}");
            user.says(&["ctl", &id, "resume"]);
            let said = user.shell(&id, &format!("busybox dd if={path} bs=64k 2>&1 >/dev/null"));
            user.says(&["ctl", &id, "pause"]);
            assert!(said.contains(&format!("{pieces}+0 records out")), "{path}: {said}");
        }
        let taken = memory_of(&clones).saturating_sub(before);
        println!("sharing: {path} took {taken} KiB");
        taken
    };
    // A program in the guest takes memory itself: the first one is for that alone.
    read("/dev/null", 0);
    let (kib, pieces) = (FILE_MIB << 10, FILE_MIB << 4);
    let by_dax = read("/file", pieces);
    // Of what is on a disk, the host's own page cache has a copy beside those of the guests.
    let from_disks = read("/tmp/disk/file", pieces) + kib;
    clones.end();
    println!(
        "sharing: {count} guests take {by_dax} KiB for {FILE_MIB} MiB by DAX, {from_disks} KiB from disks"
    );
    // Each of them read all of it, and one copy at least is counted.
    assert!(by_dax >= kib, "{by_dax} KiB by DAX");
    assert!(from_disks >= (count as u64 + 1) * kib, "{from_disks} KiB from disks");
    assert!(
        by_dax as f64 <= from_disks as f64 * part_max,
        "{by_dax} KiB by DAX, {from_disks} KiB from disks"
    );
}
