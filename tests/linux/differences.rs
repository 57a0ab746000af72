//! Snapshots that have only what was written since the one before, of a Linux guest whose memory lies on both sides of the
//! addresses of devices: 3.5 GiB of it, mostly untouched. A guest of aarch64 has all of its memory in one piece.

use std::fs::File;
use std::os::unix::fs::FileExt;

use alula::sys::descriptor::next_data;

use super::*;

/// The first byte of the memory file that the guest has beyond the addresses of devices.
const BEYOND: u64 = 3 << 30;
/// How many differences there are in a row.
const DIFFERENCES: usize = 5;
const PAUSE: &str = r#"{"state": "Paused"}"#;
const GO_ON: &str = r#"{"state": "Resumed"}"#;

/// Sees that `other` has all that `one` has, which is something on both sides.
fn has_all_of(one: &File, other: &File) {
    let (mut from, mut sides) = (0, [0; 2]);
    while let Some((start, end)) = next_data(one, from).unwrap() {
        from = end;
        for place in (start..end).step_by(1 << 20) {
            let mut bytes = [one, other].map(|file| (file, vec![0; (1 << 20).min(end - place) as usize]));
            bytes.iter_mut().for_each(|(file, bytes)| file.read_exact_at(bytes, place).unwrap());
            let [(_, one), (_, other)] = bytes;
            let differs = one.iter().zip(&other).position(|(one, other)| one != other);
            assert_eq!(differs, None, "the byte of the MiB at {place:#x} that differs");
            sides[usize::from(place >= BEYOND)] += one.len();
        }
    }
    assert!(sides.iter().all(|side| *side > 1 << 20), "{sides:?} bytes below and beyond");
}

/// The body of a request for a snapshot called `name`.
fn create(folder: &Folder, kind: &str, name: &str) -> String {
    let [state, memory] = ["", ".memory"].map(|end| folder.path(&format!("{name}{end}")));
    json!({ "snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory }).to_string()
}

/// Has the guest behind `vsock` run a shell script.
fn shell(vsock: &Path, script: &str) -> String {
    let mut command = Command::new(common::alula());
    command.arg("exec").arg("--vsock").arg(vsock).args([
        "--timeout",
        "100s",
        "--",
        "busybox",
        "sh",
        "-c",
        script,
    ]);
    shared::said(command.stdin(Stdio::null()).output().unwrap())
}

/// Goes on from the snapshot called `name` in another process, which notes what is written.
fn restored(folder: &Folder, name: &str) -> Service {
    let service = Service::start(&[]);
    let [state, memory] = ["", ".memory"].map(|end| folder.path(&format!("{name}{end}")));
    let load = json!({
        "snapshot_path": state,
        "mem_backend": { "backend_type": "File", "backend_path": memory },
        "track_dirty_pages": true,
        "resume_vm": true,
    });
    service.client().ok("PUT", "/snapshot/load", &load.to_string());
    service
}

#[test]
#[ignore = "a stock kernel: scripts/test runs it"]
fn differences_come_to_a_whole_beyond_the_devices() {
    let folder = Folder::new();
    let vsock = folder.path("vsock");
    let mut command = Command::new(common::alula());
    command.env("ALULA_KERNEL", asset(KERNELS[0])).args(["run", "--memory", "3584M"]);
    command.arg("--api-sock").arg(folder.path("api")).arg("--vsock").arg(&vsock);
    command.args(["--rootfs".as_ref(), asset("root.ext4").as_os_str(), "--".as_ref()]);
    command.args(["busybox", "sh", "-c", "echo up; while :; do busybox sleep 1000; done"]);
    let mut guest = Process::spawn(command);
    guest.expect("up\n");
    let mut client = common::Client::connect(&folder.path("api"));
    client.ok("PATCH", "/vm", PAUSE);
    client.ok("PUT", "/snapshot/create", &create(&folder, "Full", "whole"));
    guest.send(libc::SIGTERM);
    assert_eq!(guest.end().code, Some(128 + libc::SIGTERM));

    let service = restored(&folder, "whole");
    let mut client = service.client();
    for number in 0..DIFFERENCES {
        // Linux takes memory from above first, so that there is something on both sides.
        shell(
            &vsock,
            &format!("cd /tmp; dd if=/dev/urandom of={number} bs=1M count=3; md5sum {number} >>sums"),
        );
        client.ok("PATCH", "/vm", PAUSE);
        client.ok("PUT", "/snapshot/create", &create(&folder, "Diff", &number.to_string()));
        if number + 1 == DIFFERENCES {
            client.ok("PUT", "/snapshot/create", &create(&folder, "Full", "same"));
        }
        client.ok("PATCH", "/vm", GO_ON);
    }
    drop(service);
    let file = |name: &str| folder.path(name).to_str().unwrap().to_owned();
    for number in 0..DIFFERENCES {
        let [diff, memory] = [format!("{number}"), format!("{number}.memory")].map(|name| file(&name));
        let merged = run(["snapshot", "merge", &file("whole"), &file("whole.memory"), &diff, &memory]);
        assert_eq!(merged.code, Some(0), "{}", merged.text);
    }
    let [merged, same] = ["whole.memory", "same.memory"].map(|name| File::open(folder.path(name)).unwrap());
    has_all_of(&merged, &same);
    has_all_of(&same, &merged);
    let _service = restored(&folder, "whole");
    let checked = shell(&vsock, "cd /tmp; md5sum -c sums | grep -c OK");
    assert_eq!(checked.trim(), DIFFERENCES.to_string());
}
