//! The firmware guest's own driver, on KVM: its cases for the device, and this side of their connections.

use super::*;

/// The number of bytes that a test sends to the guest after `more!`: `MORE` of firmware/src/vsock.rs.
const MORE: usize = 350;

/// Serves `count` connections of the guest, one after the other, in a thread.
fn serve(listener: UnixListener, serve: fn(UnixStream), count: usize) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        listener.incoming().take(count).for_each(|stream| serve(patient(stream.unwrap())))
    })
}

fn echo(stream: &mut UnixStream) {
    let said = read(stream, 5);
    stream.write_all(&said).unwrap();
}

#[test]
fn the_firmware_talks_both_ways_and_ends_one_after_the_other() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for transport in [&[][..], &["--enable-pci"]] {
        let folder = Folder::new();
        let socket = folder.path("v");
        let vsock = format!("{},cid=77", socket.display());
        // When nobody listens on the host, the case says what it can of the device alone.
        let ended = common::run([&["run", "--vsock", &vsock], transport].concat());
        assert!(ended.text.contains("\nvsock: ok (CID 77)"), "{}", ended.text);
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        let listener = UnixListener::bind(folder.path("v_80")).unwrap();
        let other_side = |mut stream: UnixStream| {
            echo(&mut stream);
            assert_eq!(read(&mut stream, 5), b"more!");
            stream.write_all(&(0..MORE).map(|index| index as u8).collect::<Vec<_>>()).unwrap();
            let mut nothing = Vec::new();
            stream.read_to_end(&mut nothing).unwrap();
            assert!(nothing.is_empty());
            stream.write_all(b"rest").unwrap();
        };
        let thread = serve(listener, other_side, 1);
        let ended = common::run([&["run", "--vsock", &vsock, "--cmdline", "case=vsock"], transport].concat());
        assert!(ended.text.contains("vsock: ok (CID 77, 359 bytes in)"), "{}", ended.text);
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        thread.join().unwrap();
    }
}

#[test]
fn the_firmware_hears_that_it_was_restored() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for transport in [&[][..], &["--enable-pci"]] {
        let mut service = Service::start(transport);
        let folder = Folder::new();
        let listener = UnixListener::bind(folder.path("v_80")).unwrap();
        let stay = |mut stream: UnixStream| {
            echo(&mut stream);
            // The guest's end is gone when its machine is, or its case is over.
            assert!(is_closed(&mut stream));
        };
        let thread = serve(listener, stay, 2);
        let mut client = service.client();
        let vsock = json!({ "guest_cid": 3, "uds_path": folder.path("v") });
        client.ok("PUT", "/vsock", &vsock.to_string());
        service.boot_source("case=vsock-restored");
        client.ok("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
        service.process.expect("connected");
        client.ok("PATCH", "/vm", r#"{"state": "Paused"}"#);
        let saved = folder.path("saved");
        client.ok("PUT", "/snapshot/create", &json!({ "folder": saved }).to_string());
        drop(client);
        service.process.send(libc::SIGTERM);
        service.process.end();
        let restored = Service::start(&[]);
        let load = json!({ "folder": saved, "resume_vm": true });
        restored.client().ok("PUT", "/snapshot/load", &load.to_string());
        let ended = restored.process.end();
        assert!(ended.text.contains("told, and connected again\n"), "{}", ended.text);
        assert_eq!(ended.code, Some(0), "{}", ended.text);
        thread.join().unwrap();
    }
}
