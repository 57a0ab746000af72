//! The socket's file, from before the start until after the end.

use super::*;

#[test]
fn the_socket_is_gone_when_the_guest_has_ended() {
    for (words, code) in
        [("case=serial end=7", 7), ("case=serial end=poweroff", 0), ("case=serial end=reset", 0)]
    {
        let service = Service::running(words);
        let Service { process, socket, folder } = service;
        let ended = process.end();
        assert_eq!(ended.code, Some(code), "{}", ended.text);
        assert!(!socket.exists(), "{words}");
        drop(folder);
    }
}

#[test]
fn a_signal_ends_the_service_and_removes_its_socket() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        let mut service = Service::running("hello");
        service.process.send(signal);
        let Service { process, socket, folder } = service;
        assert_eq!(process.end().code, Some(128 + signal));
        assert!(!socket.exists());
        drop(folder);
    }
}

#[test]
fn a_signal_at_the_start_leaves_no_socket_behind() {
    let folder = common::Folder::new();
    // Each comes at another moment after the socket is there, most of them before anything else is.
    for number in 0..60 {
        let socket = folder.path(&number.to_string());
        let mut process = common::Process::start(["serve", "--api-sock", socket.to_str().unwrap()]);
        while !socket.exists() {
            assert!(process.is_running());
            std::thread::yield_now();
        }
        process.send(libc::SIGTERM);
        let ended = process.end();
        assert_eq!(ended.code, Some(128 + libc::SIGTERM), "{number}: {}", ended.text);
        assert!(!socket.exists(), "{number}");
    }
}

#[test]
#[allow(unsafe_code)]
fn a_socket_path_of_somebody_who_hangs_is_refused_too() {
    use std::os::fd::AsRawFd;
    let folder = common::Folder::new();
    let socket = folder.path("s");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    // SAFETY: the call takes numbers. One client may wait, the next one does so in its connect.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    let _waiting = UnixStream::connect(&socket).unwrap();
    let ended = run(["serve", "--api-sock", socket.to_str().unwrap()]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.text.contains("another process serves it: choose another path"), "{}", ended.text);
    assert!(socket.exists());
}

#[test]
fn a_socket_path_that_is_taken_is_refused_with_advice() {
    let service = Service::start(&[]);
    let socket = service.socket.to_str().unwrap();
    let second = run(["serve", "--api-sock", socket]);
    assert_eq!(second.code, Some(1));
    assert!(second.text.contains("another process serves it: choose another path"), "{}", second.text);
    service.client().ok("GET", "/", "");

    // One that was left by a process that was killed is the next one's.
    let mut killed = Service::start(&[]);
    killed.process.send(libc::SIGKILL);
    wait_for(|| UnixStream::connect(&killed.socket).is_err());
    assert!(killed.socket.exists());
    let path = killed.socket.to_str().unwrap();
    let mut next = Process::start(["serve", "--api-sock", path]);
    wait_for(|| UnixStream::connect(&killed.socket).is_ok());
    Client::connect(&killed.socket).ok("GET", "/", "");
    next.send(libc::SIGTERM);
    assert_eq!(next.end().code, Some(128 + libc::SIGTERM));
    assert!(!killed.socket.exists());

    let file = service.folder.write("file", "");
    let next = run(["serve", "--api-sock", file.to_str().unwrap()]);
    assert_eq!(next.code, Some(1));
    assert!(file.exists());

    let long = format!("/tmp/{}", "x".repeat(200));
    let next = run(["serve", "--api-sock", &long]);
    assert!(next.text.contains("too long for a socket"), "{}", next.text);
    let missing = run(["serve", "--api-sock", "/nonexistent/folder/s"]);
    assert!(missing.text.contains("there is no folder `/nonexistent/folder`: create it"), "{}", missing.text);
}
