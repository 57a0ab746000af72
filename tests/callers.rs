//! Callers of an agent by vsock. The agent is in this process, and its listener is a Unix socket: what the kernel says of the
//! caller is made up. An agent reaps all children of its process, so no other test is here.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::cell::Cell;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use alula::agent::{Agent, Listener};
use alula::protocol::frame::{Inbox, Type, put};
use common::{Folder, PATIENCE};

thread_local! {
    /// The CID of whoever connects to a listener of this thread; None: what the kernel says.
    static CALLER: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Takes the C library's place.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
unsafe extern "C" fn accept4(
    listener: i32,
    address: *mut libc::sockaddr,
    length: *mut libc::socklen_t,
    flags: i32,
) -> i32 {
    // SAFETY: what the caller promises is passed on.
    let accepted = unsafe { libc::syscall(libc::SYS_accept4, listener, address, length, flags) as i32 };
    if let (true, Some(cid)) = (accepted >= 0, CALLER.get()) {
        // SAFETY: the structure is plain data of which zeros are valid.
        let mut told: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
        (told.svm_family, told.svm_cid, told.svm_port) = (libc::AF_VSOCK as _, cid, 1000);
        // SAFETY: the agent, whose threads alone have set a caller, gives room for such an address.
        unsafe { address.cast::<libc::sockaddr_vm>().write_unaligned(told) };
    }
    accepted
}

/// An agent in a thread, which ends with this process, whose clients all call from `cid`. What it listens at.
fn called_from(folder: &Folder, cid: u32) -> PathBuf {
    let path = folder.path(&format!("agent-{cid}"));
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        CALLER.set(Some(cid));
        Agent::new(Listener::unix(listener).unwrap()).unwrap().run()
    });
    path
}

/// The kinds of the frames that an agent sends to who wants to know how its machine is, until it closes the connection.
fn answers(agent: &Path) -> Vec<Type> {
    let mut stream = UnixStream::connect(agent).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut request = Vec::new();
    put(&mut request, Type::Request, br#"{"protocol": 1, "ask": {"info": {}}}"#);
    // Whoever is refused may be so before this is sent.
    let _ = stream.write_all(&request);
    let (mut inbox, mut bytes, mut kinds) = (Inbox::default(), [0; 4096], Vec::new());
    loop {
        match stream.read(&mut bytes) {
            Ok(count) if count > 0 => inbox.push(&bytes[..count]),
            Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => panic!("{error}"),
            _ => return kinds,
        }
        while let Some((kind, _)) = inbox.pop().unwrap() {
            kinds.push(kind);
        }
    }
}

#[test]
fn an_agent_answers_its_host_and_nobody_else() {
    const HOST: u32 = 2;
    let folder = Folder::new();
    // The hypervisor, a program of the same guest, the host, and other guests: a caller that is answered is root there.
    for cid in [0, 1, HOST, 3, 52, u32::MAX - 1, u32::MAX] {
        let agent = called_from(&folder, cid);
        for _ in 0..3 {
            let expected: &[Type] = if cid == HOST { &[Type::Greeting, Type::Exited] } else { &[] };
            assert_eq!(answers(&agent), expected, "CID {cid}");
        }
    }
}
