//! Backends that lie, hang, break off or die.

use std::fs;
use std::io::Write;

use super::backend::{
    Act, Backend, CONFIG, F_PROTOCOL_FEATURES, F_VERSION_1, GET_CONFIG, GET_FEATURES, GET_INFLIGHT_FD,
    GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_VRING_BASE, INFLIGHT, REPLY_ACK, SET_FEATURES, SET_MEM_TABLE,
    SET_OWNER, SET_VRING_ENABLE,
};
use super::*;

/// How many descriptors this process has.
fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The head of an answer, with these flags and size, to this request.
fn head(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size].map(u32::to_le_bytes).concat()
}

#[test]
fn a_backend_that_cannot_be_is_refused_with_the_reason() {
    let place = Place::new();
    let meet = |backend: &Backend| {
        assert_eq!(backend.path, place.folder.path("backend"));
        let result = place.config(json!({ "num_queues": 2 })).open("vm", &mut Host::default());
        result.map(drop).unwrap_err().to_string()
    };
    let body = |length: usize| Act::Body(vec![0; length]);
    let cases: [(u32, Act, &str); 16] = [
        (GET_FEATURES, Act::Close, "is lost at GET_FEATURES: it has ended the connection"),
        (GET_FEATURES, body(7), "at GET_FEATURES: its answer has 7 bytes instead of 8"),
        (GET_FEATURES, body(0), "its answer has 0 bytes"),
        (GET_FEATURES, Act::Bytes(head(2, 5, 8)), "its answer is none (request 2, flags 0x5, 8 bytes)"),
        (GET_FEATURES, Act::Bytes(head(1, 1, 8)), "its answer is none (request 1, flags 0x1, 8 bytes)"),
        (GET_FEATURES, Act::Bytes(head(1, 4, 8)), "its answer is none (request 1, flags 0x4, 8 bytes)"),
        (GET_FEATURES, Act::Bytes(head(1, 5, u32::MAX)), "4294967295 bytes)"),
        (GET_FEATURES, Act::Bytes(head(1, 5, 8)), "at GET_FEATURES: it does not answer in time"),
        (GET_PROTOCOL_FEATURES, Act::Hang, "at GET_PROTOCOL_FEATURES: it does not answer in time"),
        (
            GET_QUEUE_NUM,
            Act::Body(1_u64.to_le_bytes().to_vec()),
            "`num_queues` is 2, and the vhost-user backend has 1",
        ),
        (SET_OWNER, Act::Body(1_u64.to_le_bytes().to_vec()), "at SET_OWNER: it refuses that (1)"),
        (SET_OWNER, Act::Hang, "at SET_OWNER: it does not answer in time"),
        (GET_CONFIG, body(0), "at GET_CONFIG: it tells 0 bytes of configuration instead of 60"),
        (GET_CONFIG, body(71), "it tells 59 bytes of configuration"),
        (GET_CONFIG, body(73), "it tells 61 bytes of configuration"),
        (GET_CONFIG, Act::Bytes(head(24, 5, 300)), "its answer is none (request 24, flags 0x5, 300 bytes)"),
    ];
    let before = descriptors();
    for (request, act, expected) in cases {
        let backend = place.backend(64);
        backend.act(request, act.clone());
        let error = meet(&backend);
        assert!(error.contains(expected), "{request} {act:?}: {error}");
        drop(backend);
        assert_eq!(descriptors(), before, "{request} {act:?}");
    }
    for (features, protocol, expected) in [
        (F_PROTOCOL_FEATURES, CONFIG, "is one of virtio before 1.0"),
        (F_VERSION_1, CONFIG, "cannot tell its configuration (it lacks protocol features)"),
        (F_VERSION_1 | F_PROTOCOL_FEATURES, REPLY_ACK, "lacks VHOST_USER_PROTOCOL_F_CONFIG"),
        (F_VERSION_1 | F_PROTOCOL_FEATURES, CONFIG, "`num_queues` is 2, and the vhost-user backend has 1"),
    ] {
        let backend = place.backend(64);
        (backend.plan.lock().unwrap().features, backend.plan.lock().unwrap().protocol) = (features, protocol);
        let error = meet(&backend);
        assert!(error.contains(expected), "{error}");
    }
    fs::remove_file(place.folder.path("backend")).unwrap();
    let gone = place.config(json!({}));
    for error in [gone.open("vm", &mut Host::default()).map(drop), gone.look()] {
        let error = error.unwrap_err().to_string();
        assert!(error.contains("there is no socket: start what shall listen there first"), "{error}");
    }
}

#[test]
fn descriptors_that_nobody_asked_for_are_not_taken() {
    let place = Place::new();
    let backend = place.backend(64);
    let before = descriptors();
    for request in [GET_FEATURES, GET_CONFIG, SET_OWNER] {
        backend.act(request, Act::Descriptors);
    }
    let device = place.config(json!({})).open("vm", &mut Host::default()).unwrap();
    // The connection, with both ends in this process, and what the backend waits by.
    common::wait_for(|| descriptors() == before + 3);
    drop(device);
    common::wait_for(|| descriptors() == before);
}

#[test]
fn a_backend_that_fails_while_it_starts_has_the_driver_reset() {
    let place = Place::new();
    for kind in TRANSPORTS {
        for (request, act) in [
            (SET_FEATURES, Act::Body(1_u64.to_le_bytes().to_vec())),
            (SET_MEM_TABLE, Act::Close),
            (SET_MEM_TABLE, Act::Hang),
            (SET_VRING_ENABLE, Act::Body(vec![0; 9])),
            (SET_VRING_ENABLE, Act::Bytes(vec![0xff; 100])),
        ] {
            let backend = place.backend(64);
            let mut guest = place.guest(kind, json!({}));
            backend.act(request, act.clone());
            guest.start(0);
            guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
            // The backend stays lost, at no cost of time, until it is met again.
            backend.plan.lock().unwrap().acts.clear();
            guest.start(0);
            guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
            patch(&mut guest, json!({ "drive_id": "d" })).unwrap();
            guest.start(0);
            assert_eq!(ask(&mut guest, 0, 1, 1, &[5; SECTOR]).0, 0, "{kind:?} {request} {act:?}");
        }
    }
}

#[test]
fn a_backend_that_dies_or_speaks_unasked_has_the_driver_reset() {
    let place = Place::new();
    for kind in TRANSPORTS {
        for is_dead in [true, false] {
            let backend = place.backend(64);
            let mut guest = place.guest(kind, json!({}));
            guest.start(0);
            assert_eq!(ask(&mut guest, 0, 1, 1, &[5; SECTOR]).0, 0);
            match is_dead {
                true => backend.hang_up(),
                false => backend.plan.lock().unwrap().says = vec![0],
            }
            guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
            assert!(guest.is_interrupted(None), "{kind:?}: the driver is told");
            guest.pause();
            guest.resume();
            patch(&mut guest, json!({ "drive_id": "d" })).unwrap();
            guest.start(0);
            assert_eq!(ask(&mut guest, 0, 0, 1, &[0; SECTOR]), (0, vec![5; SECTOR]));
        }
    }
}

#[test]
fn another_backend_has_what_the_guest_was_told_or_is_refused() {
    let place = Place::new();
    let backend = place.backend(64);
    let mut guest = place.guest(TransportKind::Mmio, json!({}));
    guest.start(0);
    drop(backend);
    guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
    let error = patch(&mut guest, json!({ "drive_id": "d" })).unwrap_err();
    assert!(error.contains("nobody listens there"), "{error}");
    let less = place.backend(64);
    less.plan.lock().unwrap().features &= !F_FLUSH;
    let error = patch(&mut guest, json!({ "drive_id": "d" })).unwrap_err();
    assert!(error.contains("cannot do what the guest was told"), "{error}");
    less.plan.lock().unwrap().features |= F_FLUSH;
    patch(&mut guest, json!({ "drive_id": "d" })).unwrap();
    guest.start(0);
    assert_eq!(ask(&mut guest, 0, 1, 1, &[5; SECTOR]).0, 0);
}

#[test]
fn a_backend_that_does_not_stop_is_left_behind() {
    let place = Place::new();
    for act in [
        Act::Hang,
        Act::Close,
        Act::Body(vec![0; 7]),
        Act::Body([1; 8].to_vec()),
        Act::Body(vec![0, 0, 0, 0, 0, 0, 1, 0]),
    ] {
        let backend = place.backend(64);
        let mut guest = place.guest(TransportKind::Pci, json!({}));
        guest.start(0);
        assert_eq!(ask(&mut guest, 0, 1, 1, &[5; SECTOR]).0, 0);
        backend.act(GET_VRING_BASE, act.clone());
        // Returns for all that.
        guest.reset();
        guest.start(0);
        guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
        backend.plan.lock().unwrap().acts.clear();
        patch(&mut guest, json!({ "drive_id": "d" })).unwrap();
        guest.start(0);
        assert_eq!(ask(&mut guest, 0, 0, 1, &[0; SECTOR]), (0, vec![5; SECTOR]), "{act:?}");
    }
}

#[test]
fn another_backend_does_no_request_again_that_is_done() {
    let place = Place::new();
    let backend = place.backend(64);
    let mut guest = place.guest(TransportKind::Mmio, json!({}));
    guest.start(0);
    assert_eq!(ask(&mut guest, 0, 1, 1, &[5; SECTOR]).0, 0);
    backend.act(GET_VRING_BASE, Act::Close);
    guest.pause();
    backend.plan.lock().unwrap().acts.clear();
    backend.plan.lock().unwrap().content.fill(0);
    patch(&mut guest, json!({ "drive_id": "d" })).unwrap();
    guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
    assert!(backend.plan.lock().unwrap().content.iter().all(|byte| *byte == 0));
    // The backend is not at fault, and is there for the driver that resets the device.
    guest.start(0);
    assert_eq!(ask(&mut guest, 0, 1, 1, &[6; SECTOR]).0, 0);
}

#[test]
fn a_patch_of_a_backend_that_hangs_fails_and_the_next_one_meets_it_again() {
    let place = Place::new();
    let backend = place.backend(64);
    let mut guest = place.guest(TransportKind::Mmio, json!({}));
    backend.act(GET_CONFIG, Act::Hang);
    let error = patch(&mut guest, json!({ "drive_id": "d" })).unwrap_err();
    assert!(error.contains("at GET_CONFIG: it does not answer in time"), "{error}");
    backend.plan.lock().unwrap().acts.clear();
    patch(&mut guest, json!({ "drive_id": "d" })).unwrap();
    guest.start(0);
    assert_eq!(ask(&mut guest, 0, 1, 1, &[5; SECTOR]).0, 0);
}

#[test]
fn a_ring_that_leaves_guest_memory_goes_to_no_backend() {
    let place = Place::new();
    let backend = place.backend(64);
    for used in [MEMORY - 64, MEMORY, u64::MAX - 63] {
        let mut guest = place.guest(TransportKind::Mmio, json!({}));
        assert!(guest.negotiate(F_VERSION_1));
        let [table, available, _] = Guest::parts(0);
        guest.set_queue(0, 16, [table, available, used]);
        backend.heard();
        guest.set_status(15);
        guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
        assert!(backend.heard().iter().all(|(request, _)| *request != SET_MEM_TABLE), "{used:#x}");
    }
}

/// A backend that notes what it has in flight.
fn noting(place: &Place) -> Backend {
    let backend = place.backend(64);
    backend.plan.lock().unwrap().protocol |= INFLIGHT;
    backend
}

#[test]
fn a_backend_that_comes_again_goes_on_with_what_was_in_flight() {
    let place = Place::new();
    for kind in TRANSPORTS {
        for is_paused in [false, true] {
            let backend = noting(&place);
            let mut guest = place.guest(kind, json!({}));
            guest.start(F_EVENT_IDX);
            assert_eq!(ask(&mut guest, 0, 1, 1, &[5; SECTOR]).0, 0);
            let [given, got] = backend.plan.lock().unwrap().notes;
            assert!(given != 0 && got == given, "{kind:?}");
            // It takes a request, and ends.
            backend.plan.lock().unwrap().holds = true;
            let (head, status) =
                (guest.allocate(&[1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]), guest.allocate(&[0xff]));
            let data = guest.allocate(&[9; SECTOR]);
            guest.offer(0, &[(head, 0), (data, 0), (status, WRITE)]);
            guest.kick(0);
            guest.interrupts();
            drop(backend);
            if is_paused {
                guest.pause();
                guest.resume();
            }
            guest.turn();
            assert_eq!(guest.status() & NEEDS_RESET, 0, "{kind:?}: another one is waited for");
            let again = noting(&place);
            guest.wait_for(|guest| guest.has_used(0));
            assert_eq!(guest.next_used(0).1, 1);
            assert_eq!(guest.bytes(status), [0]);
            let plan = again.plan.lock().unwrap();
            assert!(plan.content[7 * SECTOR..8 * SECTOR] == [9; SECTOR]);
            assert_eq!(plan.notes[1], given, "the notes are those of the one before");
            assert!(plan.heard.contains(&(SET_VRING_BASE, 1 << 32)), "one request was done before");
            drop(plan);
            assert!(guest.interrupts() > 0, "{kind:?}");
            assert_eq!(ask(&mut guest, 0, 0, 7, &[0; SECTOR]), (0, vec![9; SECTOR]));
        }
    }
}

#[test]
fn notes_of_what_is_in_flight_end_with_the_queues_that_they_are_of() {
    let place = Place::new();
    for kind in TRANSPORTS {
        let backend = noting(&place);
        let mut guest = place.guest(kind, json!({}));
        guest.start(0);
        assert_eq!(ask(&mut guest, 0, 1, 1, &[5; SECTOR]).0, 0);
        let [given, _] = backend.plan.lock().unwrap().notes;
        drop(backend);
        guest.turn();
        // The driver gives its queues up: the next backend must not do what was in them.
        guest.reset();
        let again = noting(&place);
        patch(&mut guest, json!({ "drive_id": "d" })).unwrap();
        guest.start(0);
        assert_eq!(ask(&mut guest, 0, 1, 1, &[6; SECTOR]).0, 0);
        let [own, got] = again.plan.lock().unwrap().notes;
        assert!(own == got && got != given, "{kind:?}");
        drop(again);
        // One that cannot go on is no successor, whatever it is asked for.
        let lesser = place.backend(64);
        std::thread::sleep(std::time::Duration::from_millis(1500));
        guest.turn();
        assert_eq!(guest.status() & NEEDS_RESET, 0, "{kind:?}");
        drop(lesser);
        let _right = noting(&place);
        assert_eq!(ask(&mut guest, 0, 1, 1, &[7; SECTOR]).0, 0, "{kind:?}");
    }
}

#[test]
fn memory_for_notes_that_cannot_be_is_refused() {
    let place = Place::new();
    for (act, expected) in [
        (Act::Body(vec![0; 24]), "at GET_INFLIGHT_FD: no memory comes with its answer"),
        (Act::Body(vec![0; 20]), "its answer has 20 bytes instead of 24"),
        (Act::Close, "at GET_INFLIGHT_FD: it has ended the connection"),
        (Act::Hang, "at GET_INFLIGHT_FD: it does not answer in time"),
    ] {
        let before = descriptors();
        let backend = noting(&place);
        backend.act(GET_INFLIGHT_FD, act);
        let error =
            place.config(json!({})).open("vm", &mut Host::default()).map(drop).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        drop(backend);
        assert_eq!(descriptors(), before);
    }
    // Of several descriptors, one is kept: the notes.
    let backend = noting(&place);
    let before = descriptors();
    backend.act(GET_INFLIGHT_FD, Act::Descriptors);
    let device = place.config(json!({})).open("vm", &mut Host::default()).unwrap();
    common::wait_for(|| descriptors() == before + 4);
    drop(device);
    common::wait_for(|| descriptors() == before);
}

/// The whole monitor, with its walls: the thread of the device meets the backend that comes again.
#[test]
fn a_guest_hears_nothing_of_a_backend_that_ends_and_comes_again() {
    let place = Place::new();
    for transport in qemu::TRANSPORT_WORDS {
        let backend = noting(&place);
        let events = place.folder.path("events");
        let _ = fs::remove_file(&events);
        let disk = format!("socket={},id=d", backend.path.display());
        let words = ["run", "--events", events.to_str().unwrap(), "--disk", &disk, "--cmdline", "bench"];
        let mut guest = common::Process::start([&words, transport].concat());
        guest.expect("bench: ready");
        let mut stdin = guest.stdin.take().unwrap();
        stdin.write_all(b"write 4096 8 100\n").unwrap();
        guest.expect("done 100");
        backend.plan.lock().unwrap().holds = true;
        stdin.write_all(b"write 4096 4 100\n").unwrap();
        common::wait_for(|| backend.plan.lock().unwrap().held > 0);
        drop(backend);
        let told = || fs::read_to_string(&events).unwrap();
        common::wait_for(|| told().contains("device_error"));
        let _again = noting(&place);
        guest.expect("done 100");
        let told = told();
        let errors: Vec<Value> = told
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .filter(|event: &Value| event["event"] == "device_error")
            .collect();
        assert!(
            errors.len() == 1 && errors[0]["needs_reset"] == false && errors[0]["device"] == "disk `d`",
            "{errors:?}"
        );
        stdin.write_all(b"read 4096 4 100\n").unwrap();
        guest.expect("done 100");
    }
}
