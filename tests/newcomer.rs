//! What a newcomer gets wrong is told in words that lead on: what was attempted, on what, why not, what to do.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use common::{Folder, Process, Service, alula, run};
use serde_json::{Value, json};

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

#[test]
fn several_files_are_checked_and_standard_input_and_told_as_json() {
    let folder = Folder::new();
    let good = json!({ "boot-source": { "kernel_image_path": folder.firmware() }, "comment": 1 }).to_string();
    let good_file = folder.write("good.json", &good);
    let bad = "{\n \"machine-config\": {\"vcpu_count\": 1, \"mem_size_mib\": -1}}";
    let (good_file, none) = (good_file.to_str().unwrap(), folder.path("none.json"));
    let none = none.to_str().unwrap();
    let check = |arguments: &[&str], input: &str| {
        let mut command = Command::new(alula());
        command.arg("check").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        // One that reads no input may have ended.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, told, _) = check(&[good_file, "-"], &good);
    assert_eq!((code, told.matches(": ok\n").count()), (Some(0), 2), "{told}");
    assert!(told.contains("\n(standard input): ok\n"), "{told}");
    let (code, told, errors) = check(&["-", none, good_file], bad);
    assert_eq!(code, Some(1), "{told}");
    assert!(
        told.starts_with("(standard input):2:55: `machine-config`: `mem_size_mib`: expected a number"),
        "{told}"
    );
    assert!(told.contains("good.json: ok\n"), "{told}");
    assert!(errors.contains("read config file `") && errors.contains("No such file"), "{errors}");

    let (code, told, errors) = check(&["--json", "-", none, good_file], bad);
    assert_eq!((code, errors.as_str()), (Some(1), ""));
    let told: Value = serde_json::from_str(&told).unwrap();
    let first = &told[0]["problems"][0];
    assert_eq!((&first["line"], &first["column"]), (&json!(2), &json!(55)), "{told}");
    let oks: Vec<_> = told.as_array().unwrap().iter().map(|file| &file["ok"]).collect();
    assert_eq!(oks, [&json!(false), &json!(false), &json!(true)], "{told}");
    assert_eq!(told[0]["file"], "(standard input)");
    assert_eq!((&told[2]["file"], &told[2]["problems"][0]["warning"]), (&json!(good_file), &json!(true)));
    assert!(check(&["-", "-"], "{}").2.contains("can be read but once"));
}

#[test]
fn a_missing_file_is_told_before_a_guest_boots_for_it() {
    let ended = common::run(["run", "--copy", "/none:/src", "--", "true"]);
    assert_eq!(ended.code, Some(125));
    assert!(
        ended.text.starts_with("alula: copy `/none` to `/src` in the guest: No such file"),
        "{}",
        ended.text
    );
}

/// How `alula run` ends with these words in `folder`, whose kernel is the firmware guest: what stands in the way of a command
/// is told before that matters.
fn tried_for_a_command(folder: &Folder, line: &str) -> (Option<i32>, String) {
    let mut command = Command::new(alula());
    command.arg("run").args(line.split(' ')).args(["--", "true"]);
    command.current_dir(&folder.0).env("ALULA_KERNEL", folder.firmware());
    ended(command)
}

#[test]
fn what_cannot_come_out_of_a_guest_is_told_before_it_boots() {
    let folder = Folder::new();
    folder.write("file", "");
    for (line, code, expected) in [
        (
            "--copy-out /a:none/b",
            125,
            "copy `/a` in the guest to `none/b`: there is no folder `none`: create it\n",
        ),
        ("--copy-out /a:file/b", 125, "there is no folder `file`: create it\n"),
        ("--copy-out a:b", 153, "expected GUEST:HOST, GUEST with a slash before"),
        (
            "--copy file:b",
            153,
            "--copy file:b: expected HOST, which is there, or HOST:GUEST, GUEST with a slash",
        ),
    ] {
        let (ended_with, text) = tried_for_a_command(&folder, line);
        assert!(ended_with == Some(code) && text.contains(expected), "{line}: {text}");
    }
    std::fs::set_permissions(&folder.0, PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = common::as_nobody(&folder, &["run", "--copy-out", "/a:b", "--", "true"]);
    command.current_dir(&folder.0);
    let (code, text) = ended(command);
    let expected =
        "copy `/a` in the guest to `b`: Permission denied (os error 13): this user may not make files in `.`";
    assert!(code == Some(125) && text.contains(expected), "{text}");
}

#[test]
fn the_root_of_a_command_is_what_a_disk_that_is_called_so_has() {
    let folder = Folder::new();
    folder.write("image", vec![0; 1 << 20]);
    let part = json!({ "drive_id": "d", "path_on_host": "image", "is_root_device": true, "partuuid": "1-1" });
    let boot = json!({ "kernel_image_path": folder.firmware() });
    folder.write("vm.json", json!({ "boot-source": boot, "drives": [part] }).to_string());
    let zeros = "read root file system `image`: it has nothing but zeros at its beginning";
    for (line, expected) in [
        ("--disk image,root", format!("boot a command's guest from disk `disk0`: {zeros}")),
        ("--pmem image,root,ro", format!("boot a command's guest from pmem device `pmem0`: {zeros}")),
        ("--config vm.json", "from disk `d`: its root is a partition (`partuuid`)".to_owned()),
        ("--disk image,root --rootfs image", zeros.to_owned()),
    ] {
        let (code, text) = tried_for_a_command(&folder, line);
        assert!(code == Some(125) && text.contains(&expected), "{line}: {text}");
    }
}

#[test]
fn a_failure_is_told_once_where_log_and_errors_go_one_way() {
    let folder = Folder::new();
    let said = |redirection: &str, log: &str, arguments: &str| {
        let script = format!("exec \"$0\" run --log-path {log} {arguments} 2>{redirection}");
        let mut command = Command::new("sh");
        command.args(["-c", &script]).arg(std::path::absolute(alula()).unwrap()).current_dir(&folder.0);
        let ended = Process::spawn(command).end();
        ended.text + &std::fs::read_to_string(folder.path("both")).unwrap_or_default()
    };
    for (redirection, log) in [("&1", "/dev/stderr"), ("both", "both"), ("&1", "fd:2")] {
        let text = said(redirection, log, "gone");
        assert_eq!(text.matches("open kernel `gone`").count(), 1, "{redirection} {log}: {text}");
        let _ = std::fs::remove_file(folder.path("both"));
        // What the log leaves out is said all the same.
        let text = said(redirection, log, "--level Error --cmdline end=7");
        assert_eq!(text.matches("ended with code 7").count(), 1, "{redirection} {log}: {text}");
        let _ = std::fs::remove_file(folder.path("both"));
    }
    let text = said("&1", "log", "gone");
    let log = std::fs::read_to_string(folder.path("log")).unwrap();
    assert!([text, log].iter().all(|text| text.matches("open kernel `gone`").count() == 1));
}

#[test]
fn a_way_out_is_named_for_who_asks_nobody_and_may_write_nowhere() {
    common::open_devices();
    // In this thread's namespace: that of a rig may be written to by everybody.
    common::mount(std::path::Path::new("/run"), "tmpfs", "mode=755");
    let folder = Folder::new();
    drop(UnixListener::bind(folder.path("left")).unwrap());
    for (line, expected) in [
        ("clone --template left", "nobody listens there: the template has ended, and `alula template FOLDER"),
        (
            "clone --template gone",
            "there is no such socket: `alula template FOLDER --api-sock SOCKET` makes one",
        ),
        ("ctl --api-sock left status", "or it is no API socket (`alula ctl list` has those that there are)"),
    ] {
        let (code, text) = tried(&folder, line);
        assert!(code == Some(1) && text.contains(expected), "{line}: {text}");
    }
    std::fs::set_permissions(&folder.0, PermissionsExt::from_mode(0o755)).unwrap();
    let runtime = folder.path("runtime");
    std::fs::create_dir_all(runtime.join("alula")).unwrap();
    for (arguments, code, expected) in [
        (&["kernel", "fetch"][..], 1, "(ALULA_CACHE names another folder for what is fetched and made)"),
        (
            &["serve", "--id", "web"],
            1,
            "serve guest `web` by its name (set XDG_RUNTIME_DIR, or give --api-sock)",
        ),
        // The guest runs all the same.
        (
            &["run", "--id", "web", "--cmdline", "end=7"],
            7,
            "(set XDG_RUNTIME_DIR, or give --api-sock): make a socket",
        ),
        (&["serve"], 1, "serve where --api-sock names no other place: "),
    ] {
        let mut command = common::as_nobody(&folder, arguments);
        command.env("ALULA_CACHE", folder.path("cache")).env("XDG_RUNTIME_DIR", &runtime);
        let (ended_with, text) = ended(command);
        assert!(ended_with == Some(code) && text.contains("Permission denied"), "{arguments:?}: {text}");
        assert!(text.contains(expected), "{arguments:?}: {text}");
    }
}

#[test]
fn who_may_not_look_for_roots_guests_is_told_where_they_are() {
    // In this thread's namespace: the folder of the system's guests is root's alone.
    common::mount(std::path::Path::new("/run"), "tmpfs", "mode=755");
    std::fs::create_dir("/run/alula").unwrap();
    std::fs::set_permissions("/run/alula", PermissionsExt::from_mode(0o700)).unwrap();
    let _listener = UnixListener::bind("/run/alula/web.sock").unwrap();
    let folder = Folder::new();
    std::fs::set_permissions(&folder.0, PermissionsExt::from_mode(0o755)).unwrap();
    let runtime = folder.path("runtime");
    std::fs::create_dir_all(runtime.join("alula")).unwrap();
    for arguments in [
        &["exec", "web", "true"][..],
        &["ctl", "web", "status"],
        &["ctl", "web", "stop"],
        &["cp", "web:/a", "b"],
        &["wait", "--timeout", "1ms", "web"],
    ] {
        for own in [Some(&runtime), None] {
            let mut command = common::as_nobody(&folder, arguments);
            command.env_remove("XDG_RUNTIME_DIR").envs(own.map(|own| ("XDG_RUNTIME_DIR", own)));
            let (code, text) = ended(command);
            assert!(code.is_some_and(|code| code != 0), "{arguments:?}: {text}");
            let expected = "guests of root are in `/run/alula`, where this user cannot look: ask for one as root (`sudo`)";
            assert!(text.contains(expected), "{arguments:?}: {text}");
            assert_eq!(text.contains(" of this user's that"), own.is_some(), "{arguments:?}: {text}");
        }
    }
}

#[test]
fn a_socket_that_nobody_serves_is_explained() {
    let folder = Folder::new();
    let at = |name: &str| {
        let path = folder.path(name);
        let ended = run(["ctl", "--api-sock", path.to_str().unwrap(), "status"]);
        assert_eq!(ended.code, Some(1), "{}", ended.text);
        ended.text
    };
    assert!(at("none").contains("none`: there is no such socket: `alula serve`"));
    drop(UnixListener::bind(folder.path("left")).unwrap());
    assert!(at("left").contains("left`: nobody listens there: the process that made it has ended"));
    // One that takes connections and hangs up.
    let listener = UnixListener::bind(folder.path("mute")).unwrap();
    let server = std::thread::spawn(move || {
        let _ = listener.accept().unwrap().0.read(&mut [0; 1000]).unwrap();
    });
    assert!(at("mute").contains("wait for the answer to `GET /`: the monitor hung up"));
    server.join().unwrap();
}

#[test]
fn a_monitor_that_does_not_answer_is_not_waited_for_long() {
    let folder = Folder::new();
    let path = folder.path("stopped");
    // The kernel takes connections here for a process that never does, as that of a stopped one.
    let _listener = UnixListener::bind(&path).unwrap();
    let socket = path.to_str().unwrap();
    let full = folder.path("full");
    let _also = UnixListener::bind(&full).unwrap();
    let mut waiting = Vec::new();
    while let Ok(client) = alula::host::socket::open(&full) {
        waiting.push(client);
    }
    let at_full = Process::start(["ctl", "--api-sock", full.to_str().unwrap(), "status"]);
    let asked = [
        &["ctl", "--api-sock", socket, "status"][..],
        &["ctl", "--api-sock", socket, "snapshot", "folder"],
        &["ctl", "--api-sock", socket, "events"],
        &["clone", "--template", socket, "--id", "one"],
        &["exec", "--api-sock", socket, "--", "true"],
    ];
    let processes = asked.map(|words| Process::start(words.iter().copied()));
    for (process, code) in processes.into_iter().zip([1, 1, 1, 1, 125]) {
        let ended = process.end();
        assert_eq!(ended.code, Some(code), "{}", ended.text);
        let us = std::process::id();
        let expected =
            format!("who serves `{socket}` (process {us}) has not answered for 10 s: it was stopped");
        assert!(ended.text.contains(&expected), "{}", ended.text);
        assert!(ended.text.contains(&format!("`kill -CONT {us}`")), "{}", ended.text);
    }
    let ended = at_full.end();
    assert_eq!(ended.code, Some(1), "{}", ended.text);
    assert!(ended.text.contains("full`: who serves it takes no clients, and no more of them can wait"));
}

#[test]
fn who_has_read_enough_is_no_failure() {
    let service = Service::start(&[]);
    // One event that has happened.
    service.boot_source("case=serial end=idle");
    let socket = service.socket.to_str().unwrap();
    for words in [
        &["--help"][..],
        &["schema", "openapi"],
        &["ctl", "list", "--watch"],
        &["ctl", "--api-sock", socket, "status"],
        &["ctl", "--api-sock", socket, "events"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = Command::new(alula()).args(words).stdout(writer).output().unwrap();
        assert_eq!((output.status.code(), &output.stderr[..]), (Some(0), &b""[..]), "{words:?}");
    }
}
