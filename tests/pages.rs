//! The pages of `docs` and the README: each command of Alula's in their blocks of shell is one that Alula understands,
//! and what can run here does.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{Folder, PATIENCE, alula, called, network};

/// An option that no command has.
const NONE: &str = "--frobnicate";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The README and every page of `docs`: path and text.
fn pages() -> Vec<(PathBuf, String)> {
    let docs = std::fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let paths = docs.chain([root().join("README.md")]);
    let pages: Vec<_> = paths.map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect();
    assert!(pages.len() > 15, "{pages:?}");
    pages
}

/// The blocks of shell of a page.
fn blocks(page: &str) -> impl Iterator<Item = &str> {
    page.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap())
}

/// The simple commands of a script, as lists of words without quotes. A variable's value is `1`. Redirections stay as
/// words, which none of the commands that are looked at minds.
fn commands(script: &str) -> Vec<Vec<String>> {
    let (mut commands, mut words, mut word) = (vec![], vec![], None::<String>);
    let mut letters = script.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '\'' => {
                word.get_or_insert_default().extend(letters.by_ref().take_while(|letter| *letter != '\''))
            }
            '"' => word.get_or_insert_default().extend(letters.by_ref().take_while(|letter| *letter != '"')),
            '#' if word.is_none() => while letters.next_if(|letter| *letter != '\n').is_some() {},
            '\\' if letters.peek() == Some(&'\n') => drop(letters.next()),
            ' ' | '\n' | ';' | '|' | '&' | '(' | ')' => {
                words.extend(word.take());
                if letter != ' ' {
                    commands.push(std::mem::take(&mut words));
                }
            }
            _ => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word);
    commands.push(words);
    commands
}

/// The words after `alula` in this command, if it is one.
fn arguments(words: &[String]) -> Option<Vec<String>> {
    let leading = ["until", "if", "while", "do", "then", "!", "sudo", "exec"];
    let is_before = |word: &&String| leading.contains(&word.as_str()) || word.contains('=');
    let mut words = words.iter().skip_while(is_before);
    let rest = (words.next()? == "alula").then_some(words)?;
    let rest = rest.take_while(|word| !word.starts_with(['<', '>']) && !word.starts_with("2>"));
    let is_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let without_variables = |word: &String| {
        let mut parts = word.split('$');
        let first = parts.next().unwrap().to_owned();
        parts.fold(first, |text, part| text + "1" + part.trim_start_matches(is_name))
    };
    Some(rest.map(without_variables).collect())
}

/// Alula's answer to `arguments` with an option among its own that there is not.
fn said_of(arguments: &[String]) -> String {
    let mut words = arguments.to_vec();
    let place = words.iter().position(|word| word == "--").unwrap_or(words.len());
    // The words after a guest's name are a program's: the option is the first of the command's own.
    let place = if words.first().is_some_and(|word| word == "exec") { 1 } else { place };
    words.insert(place, NONE.to_owned());
    let output = Command::new(alula()).args(words).stdin(Stdio::null()).output().unwrap();
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn each_command_of_the_pages_is_one_that_there_is() {
    let expected = format!("alula: invalid option '{NONE}'");
    let mut seen = 0;
    for (path, text) in pages() {
        for words in blocks(&text).flat_map(commands) {
            let Some(arguments) = arguments(&words) else { continue };
            let said = said_of(&arguments);
            assert!(said.starts_with(&expected), "{}: {arguments:?}: {said}", path.display());
            seen += 1;
        }
    }
    assert!(seen > 60, "only {seen} commands were found");
    // A word that there is not is told before the option.
    for wrong in ["run --rotfs x", "ctl --wach list", "run --memory much", "jail --uid x", "template --api s"]
    {
        let words: Vec<_> = wrong.split(' ').map(str::to_owned).collect();
        assert!(!said_of(&words).starts_with(&expected), "{wrong}");
    }
}

#[test]
fn loops_of_the_pages_that_wait_give_up() {
    let mut seen = 0;
    for (path, text) in pages() {
        for line in blocks(&text).flat_map(str::lines).filter(|line| line.contains("until ")) {
            assert!(line.trim().starts_with("timeout 10 sh "), "{}: {line}", path.display());
            seen += 1;
        }
    }
    assert!(seen > 5, "only {seen} loops were found");
}

#[test]
fn the_readme_leads_to_each_page() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    for (path, _) in pages() {
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(name == "README.md" || readme.contains(&format!("](docs/{name}")), "{name}: no link");
    }
}

/// The block of shell of this page that contains `text`.
fn block(page: &str, text: &str) -> String {
    let page = std::fs::read_to_string(root().join("docs").join(page)).unwrap();
    blocks(&page).find(|block| block.contains(text)).unwrap().to_owned()
}

/// Runs a script in `folder`, which is also where guests have their sockets, and returns what it prints.
fn ran(folder: &Folder, script: &str) -> String {
    let path = format!("{}:{}", folder.path("bin").display(), std::env::var("PATH").unwrap());
    let mut command = Command::new("bash");
    command.args(["-e", "-c", script]).current_dir(&folder.0).env("PATH", path);
    command.env("XDG_RUNTIME_DIR", folder.path("run")).env_remove("SUDO_USER");
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{script}: {text}");
    text
}

/// The processes that scripts have started in this folder: what still runs of a test that fails ends with this value.
struct Started<'f>(&'f Folder);

impl Drop for Started<'_> {
    fn drop(&mut self) {
        for process in std::fs::read_dir("/proc").unwrap().flatten() {
            let number = process.file_name().to_str().and_then(|name| name.parse().ok());
            let is_there = |pid: &u32| {
                let place = std::fs::read_link(format!("/proc/{pid}/cwd"));
                place.is_ok_and(|place| place == self.0.0)
            };
            number.filter(is_there).into_iter().for_each(|pid| common::send_to(pid, libc::SIGKILL));
        }
    }
}

/// A folder in which `alula` is found, with one for the sockets of names.
fn with_alula() -> Folder {
    let folder = Folder::new();
    ["bin", "run"].into_iter().for_each(|name| std::fs::create_dir(folder.path(name)).unwrap());
    called("bin/alula", &folder);
    folder
}

#[test]
fn a_fleet_lives_and_is_cloned_as_the_page_says() {
    let folder = with_alula();
    let _started = Started(&folder);
    // Guests and template print to elsewhere: this test waits for the commands alone.
    let quiet = |text: &str| {
        text.replace("< /dev/null &", "< /dev/null > guest 2>&1 &")
            .replace(".sock &", ".sock > template 2>&1 &")
    };
    let text = ran(&folder, &quiet(&block("fleet.md", "\"web-$n\" --cmdline")));
    for name in ["web-1", "web-2", "web-3"] {
        assert!(text.contains(&format!("{name}: Running")), "{name}: {text}");
        assert!(text.matches(name).count() >= 3, "{name}: {text}");
    }
    let text = ran(&folder, &quiet(&block("fleet.md", "alula template")));
    for name in ["copy-1", "copy-2", "copy-3"] {
        assert!(text.matches(name).count() >= 2, "{name}: {text}");
    }
    assert!(ran(&folder, "ls run/alula").is_empty(), "sockets are left");
}

/// A guest of the firmware in the place of the page's Linux guest, with the same other options, and the wait for it. What
/// waits for a line goes on when the guest gets one.
fn as_firmware(block: &str, words: &str) -> String {
    let line = |line: &str| {
        let Some((before, rest)) = line.split_once(" vmlinux --rootfs debian.ext4") else {
            return line.replace("alula run --restore", "echo | alula run --restore");
        };
        let options = rest.split(" -- ").next().unwrap();
        let started = format!("{before}{options} --cmdline '{words}' < /dev/null > guest 2>&1 &");
        let of = options.split_once("--id ").map_or("--api-sock a.sock", |(_, id)| id);
        format!("{started}\ntimeout 10 sh -c 'until alula ctl {of} status; do sleep 0.1; done'")
    };
    block.lines().map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn snapshots_are_saved_merged_and_cloned_as_the_page_says() {
    let folder = with_alula();
    let _started = Started(&folder);
    let of_page = |text: &str, words: &str| ran(&folder, &as_firmware(&block("snapshots.md", text), words));
    let goes_on = |text: &str| assert!(text.contains("2 cases, 0 failed"), "{text}");
    goes_on(&of_page("alula run vmlinux --rootfs debian.ext4 --api-sock", "echo case=memory,identity"));
    let text = of_page("snapshot monday --diff", "");
    assert!(text.contains("monday") && text.contains("tuesday"), "{text}");
    goes_on(&text);
    ran(
        &folder,
        "alula ctl --api-sock a.sock snapshot saved; alula ctl --api-sock a.sock snapshot diff --diff",
    );
    let text = of_page("alula snapshot inspect saved", "");
    assert!(text.contains("\"kind\": \"Full\"") && text.contains(": ok, with "), "{text}");
    ran(
        &folder,
        "alula ctl --api-sock a.sock stop --force; timeout 10 sh -c 'while [ -e a.sock ]; do sleep 0.1; done'",
    );
    let warm = block("snapshots.md", "--warm")
        .replace("memory=128M\n", "memory=128M < /dev/null > guest 2>&1 &\nWAIT\n");
    ran(
        &folder,
        &warm.replace(
            "WAIT",
            "timeout 10 sh -c 'until alula ctl --api-sock a.sock status; do sleep 0.1; done'",
        ),
    );
    let text = ran(&folder, "alula ctl --api-sock a.sock status; alula ctl --api-sock a.sock stop --force");
    assert!(text.contains("Running"), "{text}");
    ran(&folder, "rm -r saved; truncate -s 4M data.img");

    // The firmware has no agent that runs commands, or tells of itself.
    let script = as_firmware(&block("snapshots.md", "--disk data.img,id=data"), "hello end=idle");
    let script = script.replace("t.sock &\n", "t.sock > template 2>&1 &\necho $! > pid\n");
    let lines = script.lines().filter(|line| !line.starts_with("alula exec "));
    let script = lines.map(|line| line.replace("$n guest;", "$n status;")).collect::<Vec<_>>().join("\n");
    let text = ran(&folder, &script);
    let text = text
        + &ran(&folder, &(block("snapshots.md", "curl --unix-socket t.sock") + "alula ctl web-11 status"));
    for number in 1..=11 {
        let name = format!("web-{number}");
        assert!(text.contains(&format!("{name}: Running")), "{name}: {text}");
        // The eleventh says its lines where the template does.
        for of in ["qcow2", "vsock", "log"].iter().take(if number == 11 { 2 } else { 3 }) {
            assert!(folder.path(&format!("{name}.{of}")).exists(), "{name}.{of}");
        }
    }
    ran(&folder, "for n in 1 2 3 4 5 6 7 8 9 10 11; do alula ctl web-$n stop --force; done; kill $(cat pid)");
    assert!(ran(&folder, "ls run/alula").is_empty(), "sockets are left");
}

/// Carries frames between two interfaces for as long as this process lives.
fn connect(one: &File, other: &File) {
    for (from, to) in [(one, other), (other, one)] {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        std::thread::spawn(move || {
            let mut frame = [0; 1 << 16];
            while let Ok(count) = from.read(&mut frame) {
                // An interface that is down, or gone, takes no frame.
                let _ = to.write(&frame[..count]);
            }
        });
    }
}

/// In a network of its own, with an interface `eth0`: sets it up with `script`, and does `work` there.
fn elsewhere(script: String, work: impl FnOnce() + Send + 'static) -> (File, std::thread::JoinHandle<()>) {
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        network::enter();
        sender.send(network::open_tap("eth0", network::TAP)).unwrap();
        ran(&Folder::new(), &script);
        work();
    });
    (receiver.recv().unwrap(), thread)
}

/// The host's lines about a TAP, those that `rules` are in, and the guest's: the guest reaches the world, and the world the
/// guest's port.
fn a_guest_reaches_the_world_and_is_reached(rules: &[&str]) {
    const WORLD: &str = "198.51.100.7:53";
    network::enter();
    let uplink = network::open_tap("up0", network::TAP);
    let folder = Folder::new();
    ran(
        &folder,
        "ip link set lo up; ip link set up0 up; ip addr add 10.9.8.2/24 dev up0; \
         ip route add default via 10.9.8.1",
    );
    ran(&folder, &block("host-networks.md", "ip tuntap"));
    rules.iter().for_each(|rule| drop(ran(&folder, &block("host-networks.md", rule))));
    let tap = network::open_tap("tap0", network::TAP);

    let world = "ip link set lo up; ip link set eth0 up; ip addr add 10.9.8.1/24 dev eth0; \
                 ip addr add 198.51.100.7/32 dev lo";
    let (asked, told) = std::sync::mpsc::channel();
    let (world, world_thread) = elsewhere(world.to_owned(), move || {
        let socket = UdpSocket::bind(WORLD).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        asked.send(()).unwrap();
        let (_, from) = socket.recv_from(&mut [0; 8]).unwrap();
        assert_eq!(from.ip().to_string(), "10.9.8.2", "the guest's own address is seen");
        socket.send_to(b"answer", from).unwrap();
        let mut stream = TcpStream::connect("10.9.8.2:8080").unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).unwrap();
        assert_eq!(page, "a page");
    });
    // The name servers of this machine are left alone, and the guest has no `/etc` before.
    let guest = block("host-networks.md", "dev eth0").replace("/etc", "etc");
    let (guest, guest_thread) = elsewhere(guest, move || {
        let listener = TcpListener::bind("172.16.0.2:80").unwrap();
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(std::time::Duration::from_millis(100))).unwrap();
        told.recv().unwrap();
        let mut answer = [0; 16];
        // An interface drops frames until its link is settled.
        common::wait_for(|| {
            socket.send_to(b"question", WORLD).unwrap();
            socket.recv(&mut answer).is_ok()
        });
        assert!(answer.starts_with(b"answer"));
        network::accept(&listener).write_all(b"a page").unwrap();
    });
    connect(&uplink, &world);
    connect(&tap, &guest);
    guest_thread.join().unwrap();
    world_thread.join().unwrap();
}

#[test]
fn a_guest_has_a_network_by_the_lines_for_nft() {
    a_guest_reaches_the_world_and_is_reached(&["masquerade", "chain ip alula in"]);
    let folder = Folder::new();
    ran(&folder, &block("host-networks.md", "ip link delete"));
    assert_eq!(ran(&folder, "nft list tables; ip -o link show type tun | grep -c tap0 || true"), "0\n");
}

#[test]
fn a_guest_has_a_network_by_the_lines_for_iptables() {
    a_guest_reaches_the_world_and_is_reached(&["POSTROUTING", "FORWARD"]);
}

#[test]
fn a_guest_of_busybox_alone_has_what_passt_told_its_udhcpc() {
    network::enter();
    let _eth0 = network::open_tap("eth0", network::TAP);
    let folder = Folder::new();
    std::fs::create_dir(folder.path("bin")).unwrap();
    for (name, text) in [
        ("busybox", "shift; exec sh \"$@\""),
        (
            "udhcpc",
            "export ip=10.9.8.7 mask=24 router=10.9.8.1 dns='9.9.9.9 1.1.1.1' interface=\"$4\"; exec \"$6\" bound",
        ),
    ] {
        let path = folder.write(&format!("bin/{name}"), format!("#!/bin/sh\n{text}\n"));
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    ran(&folder, &block("host-networks.md", "udhcpc").replace("/etc", "etc"));
    let told = ran(&folder, "ip -o -4 addr show eth0; ip route; cat etc/resolv.conf");
    for expected in
        ["10.9.8.7/24", "default via 10.9.8.1 dev eth0", "nameserver 9.9.9.9\nnameserver 1.1.1.1\n"]
    {
        assert!(told.contains(expected), "{told}");
    }
}
