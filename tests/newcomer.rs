//! What a newcomer gets wrong is told in words that lead on: what was attempted, on what, why not, what to do.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::process::Command;

use common::{Folder, Process, alula};
use serde_json::json;

/// How `command` ends without input: its code and its words.
fn ended(command: Command) -> (Option<i32>, String) {
    let mut process = Process::spawn(command);
    process.stdin = None;
    let ended = process.end();
    (ended.code, ended.text)
}

/// The same of the monitor, in `folder`, with these arguments.
fn tried(folder: &Folder, line: &str) -> (Option<i32>, String) {
    let mut command = Command::new(alula());
    command.args(line.split(' ')).current_dir(&folder.0);
    ended(command)
}

#[test]
fn a_path_that_leads_nowhere_is_told_with_where_it_breaks_off() {
    let folder = Folder::new();
    symlink("gone", folder.path("link")).unwrap();
    let here = folder.0.display();
    for (line, expected) in [
        (
            "run vmlinux",
            format!(
                "open kernel `vmlinux`: No such file or directory (os error 2): it was looked for in `{here}`\n"
            ),
        ),
        ("run images/vmlinux", format!("(os error 2): there is no folder `images` in `{here}`\n")),
        ("run link", "(os error 2): it is a link to `gone`, which is not there\n".to_owned()),
        (
            "run --disk d.img",
            format!(
                "open disk `disk0` `d.img`: No such file or directory (os error 2): it was looked for in `{here}`\n"
            ),
        ),
        (
            "run --config vm.json",
            format!(
                "read config file `vm.json`: No such file or directory (os error 2): it was looked for in `{here}`\n"
            ),
        ),
        (
            "run --log-path logs/x",
            "open log file `logs/x` (`log_path`, --log-path): there is no folder `logs`: create it\n"
                .to_owned(),
        ),
        ("run --api-sock s/x", "listen on API socket `s/x`: there is no folder `s`: create it\n".to_owned()),
    ] {
        let (code, text) = tried(&folder, line);
        assert_eq!(code, Some(125), "{line}: {text}");
        assert!(text.ends_with(&expected), "{line}: {text}");
    }
}

#[test]
fn what_a_user_may_not_use_is_told_with_what_to_do() {
    common::open_devices();
    let folder = Folder::new();
    std::fs::set_permissions(&folder.0, PermissionsExt::from_mode(0o755)).unwrap();
    let readable = folder.write("readable", vec![0; 512]);
    let secret = folder.write("secret", vec![0; 512]);
    std::fs::set_permissions(&readable, PermissionsExt::from_mode(0o644)).unwrap();
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o600)).unwrap();
    let (readable, secret) = (readable.to_str().unwrap(), secret.to_str().unwrap());
    let own = folder.path("own");
    let own = own.to_str().unwrap();
    let nobody = "this user may not";
    for (arguments, code, expected) in [
        (&["run", secret][..], 125, format!("{nobody} open it, or not enter its folder\n")),
        (&["run", "--disk", readable], 125, "give it read-only (`is_read_only`, `ro`)".to_owned()),
        (&["run", "--disk", secret], 125, format!("{nobody} open it, or not enter its folder\n")),
        (&["run", "--log-path", secret], 125, format!("{nobody} write it\n")),
        (&["run", "--log-path", own], 125, format!("{nobody} make files in `{}`", folder.0.display())),
        (&["run", "--api-sock", own], 125, format!("{nobody} make files in `{}`", folder.0.display())),
        (&["serve", "--api-sock", own], 1, format!("{nobody} make files in `{}`", folder.0.display())),
    ] {
        let (ended_with, text) = ended(common::as_nobody(&folder, arguments));
        assert_eq!(ended_with, Some(code), "{arguments:?}: {text}");
        assert!(text.contains("Permission denied") && text.contains(&expected), "{arguments:?}: {text}");
    }
}

#[test]
fn what_is_at_the_sockets_path_is_told_as_what_it_is() {
    let folder = Folder::new();
    let _listener = UnixListener::bind(folder.path("busy")).unwrap();
    folder.write("file", "precious");
    std::fs::create_dir(folder.path("folder")).unwrap();
    for (name, expected) in [
        ("busy", "another process serves it: choose another path"),
        ("file", "there is something else already: choose another path, or move that away"),
        ("folder", "there is something else already: choose another path, or move that away"),
    ] {
        let (code, text) = tried(&folder, &format!("serve --api-sock {name}"));
        assert_eq!(code, Some(1), "{name}: {text}");
        assert_eq!(text, format!("alula: listen on API socket `{name}`: {expected}\n"));
    }
}

#[test]
fn a_raw_image_that_looks_like_another_kind_is_warned_of() {
    // Files in memory may know no direct I/O.
    let folder = Folder::on_disk();
    let image = |begin: &[u8]| [begin, &vec![0; 1 << 20][begin.len()..]].concat();
    for (begin, format, expected) in [
        (
            &b"QFI\xfb"[..],
            "",
            "begins like a qcow2 image: if it is one, say `format=qcow2` (`\"format\": \"qcow2\"`)",
        ),
        (b"KDMV", "", "begins like a VMDK image: if it is one, convert it (`qemu-img convert -O raw`)"),
        (b"\x1f\x8b\x08", ",direct", "begins like a file of gzip: if it is one, unpack it"),
        (b"\xfd7zXZ\0", ",ro", "begins like a file of xz: if it is one, unpack it"),
        (b"\x28\xb5\x2f\xfd", "", "begins like a file of zstd: if it is one, unpack it"),
        (b"EFI PART", "", ""),
        (b"", "", ""),
    ] {
        folder.write("image", image(begin));
        let (code, text) = tried(&folder, &format!("run --disk image{format} --cmdline case=serial"));
        assert_eq!(code, Some(0), "{text}");
        assert_eq!(text.contains("is used as a raw one"), !expected.is_empty(), "{text}");
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn more_memory_than_kvm_takes_is_told_as_that() {
    let (code, text) = tried(&Folder::new(), "run --memory 9999G");
    assert_eq!(code, Some(125), "{text}");
    // Some hosts have no room for the mapping, others no KVM for it.
    let said = ["give the guest less (`mem_size_mib`, --memory)", "of guest memory: give the guest less"];
    assert!(said.iter().any(|said| text.contains(said)), "{text}");
}

#[test]
fn outputs_of_a_config_file_are_refused_before_the_guest_runs() {
    let folder = Folder::new();
    for (section, expected) in [
        (json!({ "logger": { "log_path": "none/x" } }), "open log file `none/x` (`log_path`, --log-path)"),
        (
            json!({ "metrics": { "metrics_path": "none/x" } }),
            "open metrics file `none/x` (`metrics_path`, --metrics-path)",
        ),
        (
            json!({ "serial": { "serial_out_path": "none/x" } }),
            "start the guest: open serial output `none/x` (`serial_out_path`)",
        ),
    ] {
        let mut config = json!({
            "boot-source": { "kernel_image_path": folder.firmware(), "boot_args": "case=serial" },
        });
        config.as_object_mut().unwrap().extend(section.as_object().unwrap().clone());
        folder.write("vm.json", config.to_string());
        for (line, failed) in [
            ("run --config vm.json", 125),
            ("run --config vm.json --api-sock s", 125),
            ("serve --no-api --config-file vm.json", 1),
            ("serve --api-sock s --config-file vm.json", 1),
        ] {
            let (code, text) = tried(&folder, line);
            let said = format!("alula: {expected}: there is no folder `none`: create it\n");
            assert_eq!((code, text), (Some(failed), said), "{line}");
            assert!(!folder.path("s").exists(), "{line}: its socket is left");
        }
    }
}
