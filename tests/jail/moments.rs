//! The jail's maker at moments that others could use: it is held up there, and what they would do is done.

use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use crate::common::Process;
use crate::common::held::Held;
use crate::looked::Looked;
use crate::site::Site;

/// The command, begun once a line comes.
fn waiting(command: &Command) -> Process {
    let mut shell = Command::new("sh");
    shell.args(["-c", "read line; exec \"$@\"", "sh"]).arg(command.get_program()).args(command.get_args());
    shell.env("SECRET", "1");
    Process::spawn(shell)
}

/// The maker of a jail as it is about to make a call that `is_meant`.
fn held(maker: &mut Process, is_meant: impl Fn(i64, [u64; 6]) -> bool) -> Held {
    let mut stdin = maker.stdin.take().unwrap();
    let begin = move || std::io::Write::write_all(&mut stdin, b"\n").unwrap();
    Held::at_call(&maker.child, begin, is_meant)
}

#[test]
fn a_folder_that_becomes_a_link_leads_nowhere() {
    let site = Site::new();
    // The folder was there before, and belongs to the user.
    let dev = site.root("swapped").join("dev");
    std::fs::create_dir_all(&dev).unwrap();
    let elsewhere = site.folder.path("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    std::fs::write(elsewhere.join("kvm"), "of the host").unwrap();
    let mut command = site.jail("swapped");
    command.args(["--", "run", "nonesuch"]);
    let mut maker = waiting(&command);
    let is_device =
        |number, arguments: [u64; 6]| number == libc::SYS_mknodat && arguments[3] == libc::makedev(10, 200);
    let held = held(&mut maker, is_device);
    std::fs::rename(&dev, dev.with_extension("away")).unwrap();
    symlink(&elsewhere, &dev).unwrap();
    drop(held);
    maker.end();
    let names: Vec<_> =
        std::fs::read_dir(&elsewhere).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["kvm"], "something was made there, or removed");
}

#[test]
fn a_user_who_may_look_finds_nothing_of_the_makers() {
    let site = Site::new();
    let mut command = site.jail("looked");
    command.args(site.limits()).args(["--", "run", "nonesuch"]).stdin(Stdio::null());
    let mut maker = waiting(&command);
    let shows = |number, arguments: [u64; 6]| {
        number == libc::SYS_prctl && arguments[..2] == [libc::PR_SET_DUMPABLE as u64, 1]
    };
    let held = held(&mut maker, shows);
    let looked = Looked(maker.child.id());
    let opened = looked.descriptors();
    // The device for page faults was opened for the guest that comes.
    let is_the_guests = |number, name: &str| number < 3 || name == "userfaultfd";
    assert!(opened.iter().all(|(number, name)| is_the_guests(*number, name)), "{opened:?}");
    assert_eq!(looked.read("environ").trim_matches('\0'), "");
    drop(held);
    maker.end();
}
