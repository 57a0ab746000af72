//! Disks, and other devices, of vhost-user backends: over the driver's side of their queues, with a backend of our own that is honest or not,
//! and with QEMU's.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "../common/vhost_user.rs"]
mod backend;
#[path = "../common/mod.rs"]
mod common;
mod devices;
mod hostile;
mod qemu;

use std::sync::{Mutex, MutexGuard, PoisonError};

use alula::devices::block::Config;
use alula::devices::kind::{DeviceConfig, DeviceKind};
use alula::host::Host;
use alula::memory::{self, Memory, Range, Source};
use backend::{
    Backend, F_FLUSH, F_MQ, F_RINGS, GET_CONFIG, GET_FEATURES, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM,
    GET_VRING_BASE, SET_FEATURES, SET_MEM_TABLE, SET_OWNER, SET_PROTOCOL_FEATURES, SET_VRING_ADDR,
    SET_VRING_BASE, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_KICK, SET_VRING_NUM,
};
use common::Folder;
use common::driver::{
    F_EVENT_IDX, F_VERSION_1, Guest, MEMORY, NEEDS_RESET, TRANSPORTS, TransportKind, WRITE,
};
use serde_json::{Value, json};

const SECTOR: usize = 512;

/// One test at a time: some count the descriptors of this process.
static ALONE: Mutex<()> = Mutex::new(());

/// A place for backends.
struct Place {
    folder: Folder,
    _alone: MutexGuard<'static, ()>,
}

impl Place {
    fn new() -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        Self { folder: Folder::new(), _alone: alone }
    }

    fn backend(&self, sectors: usize) -> Backend {
        let path = self.folder.path("backend");
        let _ = std::fs::remove_file(&path);
        Backend::new(&path, sectors)
    }

    fn config(&self, more: Value) -> Config {
        let mut config = json!({ "drive_id": "d", "is_root_device": false, "socket": self.folder.path("backend"),
                                 "cache_type": "Writeback" });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let config: Config = serde_json::from_value(config).unwrap();
        config.check().unwrap();
        config
    }

    /// A guest whose disk is the backend's. It does nothing by itself.
    fn guest(&self, kind: TransportKind, more: Value) -> Guest {
        let device = self.config(more).open("vm", &mut Host::default()).unwrap();
        Guest::by_hand(kind, device, shared_memory())
    }
}

fn shared_memory() -> Memory {
    memory::map(&[Range { start: 0, size: MEMORY }], Source::Shared).unwrap()
}

/// A request to the disk through `queue`; returns its status and its data.
fn ask(guest: &mut Guest, queue: usize, kind: u32, sector: u64, data: &[u8]) -> (u8, Vec<u8>) {
    let mut head = [0; 16];
    head[..4].copy_from_slice(&kind.to_le_bytes());
    head[8..].copy_from_slice(&sector.to_le_bytes());
    let (head, data, status) = (guest.allocate(&head), guest.allocate(data), guest.allocate(&[0xff]));
    let data_flags = if kind == 1 { 0 } else { WRITE };
    guest.request(queue, &[(head, 0), (data, data_flags), (status, WRITE)]);
    (guest.bytes(status)[0], guest.bytes(data))
}

fn patch(guest: &mut Guest, body: Value) -> Result<(), String> {
    let kind = DeviceKind::of::<Config>();
    let change = kind.parse_patch("", body.to_string().as_bytes()).map_err(|error| error.to_string())?;
    guest.pause();
    let result = guest.transport.lock().unwrap().patch(change.patch(), &mut Host::default());
    guest.resume();
    result.map_err(|error| error.to_string())
}

#[test]
fn a_driver_works_with_a_backend_by_both_transports() {
    let place = Place::new();
    for kind in TRANSPORTS {
        for features in [0, F_EVENT_IDX, F_RINGS] {
            let backend = place.backend(64);
            let mut guest = place.guest(kind, json!({ "num_queues": 2 }));
            assert_eq!(guest.features(), F_VERSION_1 | F_RINGS | F_FLUSH | F_MQ, "{kind:?}");
            let mut config = [0; 36];
            guest.config(0, &mut config);
            assert_eq!((config[..8].to_vec(), config[34]), (64_u64.to_le_bytes().to_vec(), 2));
            guest.start(features);
            for (queue, byte) in [(0, 7), (1, 8)] {
                let data = [byte; 2 * SECTOR];
                assert_eq!(ask(&mut guest, queue, 1, 3, &data).0, 0);
                guest.wait_for(|guest| guest.is_interrupted(Some(queue)));
                assert!(guest.interrupts() > 0, "{kind:?} {features:#x}");
                assert!(backend.plan.lock().unwrap().content[3 * SECTOR..5 * SECTOR] == data);
                assert_eq!(ask(&mut guest, queue, 0, 3, &[0; 2 * SECTOR]), (0, data.to_vec()));
                assert_eq!(ask(&mut guest, queue, 0, 64, &[0; SECTOR]).0, 1);
            }
            assert_eq!(guest.status() & NEEDS_RESET, 0);
        }
    }
}

#[test]
fn a_backend_is_told_what_it_needs_in_an_order_that_it_takes() {
    let place = Place::new();
    let backend = place.backend(64);
    let mut guest = place.guest(TransportKind::Pci, json!({}));
    let requests = || backend.heard().into_iter().map(|(request, _)| request).collect::<Vec<_>>();
    assert_eq!(
        requests(),
        [GET_FEATURES, GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_OWNER, GET_CONFIG]
    );
    guest.start(F_EVENT_IDX);
    ask(&mut guest, 0, 1, 0, &[1; SECTOR]);
    let started = [
        SET_FEATURES,
        SET_MEM_TABLE,
        SET_VRING_NUM,
        SET_VRING_BASE,
        SET_VRING_ADDR,
        SET_VRING_CALL,
        SET_VRING_KICK,
        SET_VRING_ENABLE,
    ];
    assert_eq!(requests(), started);
    guest.pause();
    assert_eq!(requests(), [GET_VRING_BASE]);
    guest.resume();
    ask(&mut guest, 0, 1, 0, &[2; SECTOR]);
    let again = backend.heard();
    assert_eq!(again.iter().map(|heard| heard.0).collect::<Vec<_>>(), started);
    assert!(again.contains(&(SET_VRING_BASE, 1 << 32)), "one request was done before: {again:?}");
    guest.reset();
    assert_eq!(requests(), [GET_VRING_BASE]);
    guest.start(0);
    assert_eq!(ask(&mut guest, 0, 0, 0, &[0; SECTOR]), (0, vec![2; SECTOR]));
    assert!(backend.heard().contains(&(SET_VRING_BASE, 0)), "a ring begins anew");
}

#[test]
fn a_stop_waits_for_nothing_and_requests_are_done_afterwards() {
    let place = Place::new();
    for kind in TRANSPORTS {
        let backend = place.backend(64);
        let mut guest = place.guest(kind, json!({}));
        guest.start(F_EVENT_IDX);
        for round in 0..20 {
            guest.pause();
            let head = guest.allocate(&[1, 0, 0, 0, 0, 0, 0, 0, round, 0, 0, 0, 0, 0, 0, 0]);
            let (data, status) = (guest.allocate(&[round + 1; SECTOR]), guest.allocate(&[0xff]));
            guest.offer(0, &[(head, 0), (data, 0), (status, WRITE)]);
            guest.kick(0);
            assert!(!guest.has_used(0), "{kind:?}: a device that is paused does nothing");
            guest.resume();
            guest.wait_for(|guest| guest.has_used(0));
            guest.next_used(0);
            assert_eq!(guest.bytes(status), [0]);
        }
        let content = backend.plan.lock().unwrap().content.clone();
        let expected: Vec<u8> = (0..20).flat_map(|round| [round + 1; SECTOR]).collect();
        assert!(content[..20 * SECTOR] == expected, "{kind:?}");
    }
}

#[test]
fn a_patch_reads_the_configuration_again_and_the_guest_is_told() {
    let place = Place::new();
    for kind in TRANSPORTS {
        let backend = place.backend(64);
        let mut guest = place.guest(kind, json!({}));
        guest.start(0);
        backend.plan.lock().unwrap().content.resize(100 * SECTOR, 0);
        patch(&mut guest, json!({ "drive_id": "d" })).unwrap();
        let mut sectors = [0; 8];
        guest.config(0, &mut sectors);
        assert_eq!(u64::from_le_bytes(sectors), 100);
        assert!(guest.is_interrupted(None), "{kind:?}");
        assert_eq!(ask(&mut guest, 0, 1, 99, &[9; SECTOR]).0, 0);
        for body in [
            json!({ "drive_id": "d", "path_on_host": "/x" }),
            json!({ "drive_id": "d", "rate_limiter": { "ops": { "size": 1, "refill_time": 1 } } }),
        ] {
            let error = patch(&mut guest, body).unwrap_err();
            assert!(error.contains("is given beside `socket`"), "{error}");
        }
        assert_eq!(ask(&mut guest, 0, 0, 99, &[0; SECTOR]), (0, vec![9; SECTOR]));
    }
}

#[test]
fn what_cannot_be_beside_a_socket_is_refused_by_name() {
    for (field, value) in [
        ("path_on_host", json!("/x")),
        ("is_read_only", json!(true)),
        ("rate_limiter", json!({})),
        ("io_engine", json!("Async")),
        ("discard", json!(false)),
        ("format", json!("qcow2")),
        ("backing", json!([])),
        ("direct_io", json!(true)),
        ("threads", json!(1)),
        ("lock", json!(false)),
    ] {
        let mut body = json!({ "drive_id": "d", "is_root_device": true, "socket": "/s", "partuuid": "x" });
        let check = |body: &Value| serde_json::from_value::<Config>(body.clone()).unwrap().check();
        check(&body).unwrap();
        body[field] = value;
        let error = check(&body).unwrap_err().to_string();
        assert!(error.contains(&format!("`{field}` is given beside `socket`")), "{error}");
    }
    let option = |text: &str| Config::from_option(text, 0);
    let disk = option("socket=/s,root,id=a,queues=2").unwrap();
    assert_eq!((disk.socket.as_deref(), disk.path_on_host.as_deref()), (Some("/s".as_ref()), None));
    assert!(disk.is_root_device && disk.drive_id == "a" && disk.num_queues == 2);
    let error = option("socket=").unwrap().check().unwrap_err().to_string();
    assert!(error.contains("`socket` is empty"), "{error}");
}

#[test]
fn memory_that_is_not_shared_is_an_error_that_says_what_to_do() {
    let place = Place::new();
    let _backend = place.backend(64);
    let device = place.config(json!({})).open("vm", &mut Host::default()).unwrap();
    let mut guest = Guest::by_hand(
        TransportKind::Mmio,
        device,
        memory::allocate(&[Range { start: 0, size: MEMORY }]).unwrap(),
    );
    guest.start(0);
    guest.wait_for(|guest| guest.status() & NEEDS_RESET != 0);
}
