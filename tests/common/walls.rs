//! The walls of a process, as the kernel tells of them, and somebody who has broken into one of its threads.

use super::inject::{Injected, Outcome};
use super::wait_for;

/// The threads of a process, by their names: `Seccomp`, and `NoNewPrivs` of their status (proc(5)).
pub fn walls(process: u32) -> Vec<(String, String, String)> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let threads = tasks.filter_map(|task| {
        // The thread may just have ended.
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).ok()?;
        let field = |name: &str| {
            status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t")).unwrap().to_owned()
        };
        Some((field("Name"), field("Seccomp"), field("NoNewPrivs")))
    });
    threads.collect()
}

/// Waits until a process has these threads, and looks whether each has walls.
pub fn assert_walled(process: u32, expected: &[&str]) {
    let names = || {
        let mut names: Vec<_> = walls(process).into_iter().map(|(name, ..)| name).collect();
        // Threads of the kernel's own, where KVM and io_uring have them, do not count.
        names.retain(|name| !["kvm-", "iou-"].iter().any(|own| name.starts_with(own)));
        names.sort_unstable();
        names
    };
    wait_for(|| names() == expected);
    wait_for(|| walls(process).iter().all(|thread| thread.1 == "2"));
    let all = walls(process);
    for thread in &all {
        assert_eq!((thread.1.as_str(), thread.2.as_str()), ("2", "1"), "{all:?}");
    }
}

const IN: u64 = libc::AF_INET as u64;
const STREAM: u64 = libc::SOCK_STREAM as u64;
/// A process that cannot be there: its number is larger than any (PID_MAX_LIMIT).
const NOBODY: u64 = 0x7fff_fff0;
/// A key pressed on somebody's terminal.
const TIOCSTI: u32 = 0x5412;
/// A file that is there, as a thread is to open or execute it.
const PATH: &[u8] = b"/proc/self/exe\0";
/// A path at which there is nothing, and where a node of a device could be made.
const NODE: &[u8] = b"/tmp/alula-test-node\0";

/// Has a thread try what somebody who has broken into it would, by the name of the call.
pub fn trespass(thread: &mut Injected, what: &str) -> Outcome {
    let here = libc::AT_FDCWD as u64;
    match what {
        "ptrace" => thread.call(libc::SYS_ptrace, [u64::from(libc::PTRACE_ATTACH), NOBODY, 0], (0, b"")),
        "bpf" => thread.call(libc::SYS_bpf, [0; 3], (0, b"")),
        "mount" => thread.call(libc::SYS_mount, [0, 0, 0], (1, PATH)),
        // A character device of the number 0 is none, but a whiteout, which anybody may make (since Linux 5.8).
        "mknodat" => thread.call(libc::SYS_mknodat, [here, 0, u64::from(libc::S_IFBLK)], (1, NODE)),
        "openat" => thread.call(libc::SYS_openat, [here, 0, 0], (1, PATH)),
        "execve" => thread.call(libc::SYS_execve, [0, 0, 0], (0, PATH)),
        "socket" => thread.call(libc::SYS_socket, [IN, STREAM, 0], (0, b"")),
        "kill" => thread.call(libc::SYS_kill, [NOBODY, 9, 0], (0, b"")),
        "tgkill" => thread.call(libc::SYS_tgkill, [NOBODY, 1, 6], (0, b"")),
        "ioctl" => thread.call(libc::SYS_ioctl, [0, u64::from(TIOCSTI), 0], (0, b"")),
        // Port 1 of 127.0.0.1, by a socket if there can be one.
        _ => match thread.call(libc::SYS_socket, [IN, STREAM, 0], (0, b"")) {
            Outcome::Returned(socket) if socket >= 0 => {
                let address =
                    [&(libc::AF_INET as u16).to_ne_bytes()[..], &[0, 1, 127, 0, 0, 1], &[0; 8]].concat();
                thread.call(libc::SYS_connect, [socket as u64, 0, 16], (1, &address))
            }
            outcome => outcome,
        },
    }
}
