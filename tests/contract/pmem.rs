//! Persistent memory, beyond what every device promises: flushes that are done, fail, wait, or are none.

use super::*;
use alula::devices::pmem;
use common::loopback::BlockDevice;

pub const FLUSH: u32 = 0;
const DONE: [u8; 4] = [0; 4];
const FAILED: [u8; 4] = [0xff; 4];

fn config(more: serde_json::Value) -> ConfiguredDevice {
    let mut config = json!({ "id": "p" });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    KINDS.iter().find(|kind| kind.section == "pmem").unwrap().parse(config.to_string().as_bytes()).unwrap()
}

/// A file has one writer, and a program that another test starts would for a moment have it open, too.
fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open(config: &ConfiguredDevice) -> Result<Box<dyn VirtioDevice>> {
    config.open("contract", &mut host::Host::default())
}

fn by_hand(config: &ConfiguredDevice) -> Guest {
    let memory = memory::allocate(&[memory::Range { start: 0, size: driver::MEMORY }]).unwrap();
    let mut guest = Guest::by_hand(TransportKind::Mmio, open(config).unwrap(), memory);
    guest.start(F_EVENT_IDX);
    guest.turn();
    guest
}

/// Offers a flush; where its answer will be.
fn offer(guest: &mut Guest) -> (u64, u32) {
    let (flush, answer) = (guest.allocate(&FLUSH.to_le_bytes()), guest.allocate(&[0x55; 4]));
    guest.offer(0, &[(flush, 0), (answer, WRITE)]);
    answer
}

fn flush(guest: &mut Guest) -> Vec<u8> {
    let answer = offer(guest);
    guest.kick(0);
    assert_eq!(guest.next_used(0).1, 4);
    guest.bytes(answer)
}

fn counted(guest: &Guest, name: &str) -> u64 {
    guest.transport.lock().unwrap().metrics(View::Total)[name].as_u64().unwrap()
}

#[test]
fn the_size_of_persistent_memory_is_whole_huge_pages() {
    let _alone = alone();
    let folder = Folder::new();
    for (length, size) in [(1, 2), (2 << 20, 2), ((2 << 20) + 1, 4), (3 << 20, 4)] {
        let path = folder.path("file");
        std::fs::File::create(&path).unwrap().set_len(length).unwrap();
        let mut device = open(&config(json!({ "path_on_host": path }))).unwrap();
        let word = |device: &dyn VirtioDevice, offset: u64| {
            let mut bytes = [0; 8];
            device.read_config(offset, &mut bytes);
            u64::from_le_bytes(bytes)
        };
        assert_eq!([0, 8, 16].map(|offset| word(&*device, offset)), [0, size << 20, 0]);
        device.set_window(memory::Range { start: 5 << 30, size: size << 20 });
        // Nothing of it can be written.
        device.write_config(0, &[0xff; 16]);
        assert_eq!([0, 8].map(|offset| word(&*device, offset)), [5 << 30, size << 20]);
        assert_eq!(device.features(), 0);
    }
}

#[test]
fn what_is_no_flush_is_refused_and_the_next_one_is_done() {
    let _alone = alone();
    let folder = Folder::new();
    let path = folder.write("file", [0; 4096]);
    for is_read_only in [false, true] {
        let mut guest = by_hand(&config(json!({ "path_on_host": path, "read_only": is_read_only })));
        for kind in [1_u32, 7, u32::MAX, 1 << 8] {
            let (request, answer) = (guest.allocate(&kind.to_le_bytes()), guest.allocate(&[0x55; 4]));
            assert_eq!(guest.request(0, &[(request, 0), (answer, WRITE)]), 4);
            assert_eq!(guest.bytes(answer), FAILED, "{kind}");
        }
        let (short, whole) = (guest.allocate(&[0; 3]), guest.allocate(&[0; 4]));
        let (room, narrow) = (guest.allocate(&[0x55; 8]), guest.allocate(&[0x55; 3]));
        // Half a request is none; an answer needs room, and has no more than it needs.
        assert_eq!(guest.request(0, &[(short, 0), (room, WRITE)]), 4);
        assert_eq!(guest.bytes(room), [0xff, 0xff, 0xff, 0xff, 0x55, 0x55, 0x55, 0x55]);
        assert_eq!(guest.request(0, &[(whole, 0), (narrow, WRITE)]), 0);
        assert_eq!(guest.request(0, &[(whole, 0)]), 0);
        assert_eq!(guest.request(0, &[(room, WRITE)]), 4);
        assert_eq!(guest.bytes(narrow), [0x55; 3]);
        // The parts of a request and of its answer may lie anywhere.
        let parts = [guest.allocate(&[0; 1]), guest.allocate(&[0; 3])];
        let rooms = [guest.allocate(&[0x55; 3]), guest.allocate(&[0x55; 1])];
        let all = [(parts[0], 0), (parts[1], 0), (rooms[0], WRITE), (rooms[1], WRITE)];
        assert_eq!(guest.request(0, &all), 4);
        assert_eq!(rooms.map(|room| guest.bytes(room)).concat(), DONE);
        assert_eq!(flush(&mut guest), DONE);
        assert_eq!((counted(&guest, "invalid_reqs_count"), counted(&guest, "flush_count")), (8, 2));
        assert_eq!(guest.status() & NEEDS_RESET, 0);
    }
}

#[test]
fn flushes_that_come_meanwhile_are_one_flush() {
    let _alone = alone();
    let folder = Folder::new();
    let path = folder.write("file", [0; 4096]);
    // As many as there may be, of which none comes back for longer than any test takes.
    let limits = json!({ "ops": { "size": 3, "refill_time": 1_u64 << 40 } });
    let mut guest = by_hand(&config(json!({ "path_on_host": path, "rate_limiter": limits })));
    for round in 1..=3 {
        let answers: Vec<_> = (0..5).map(|_| offer(&mut guest)).collect();
        guest.kick(0);
        guest.wait_for(|guest| guest.used_index(0) == 5 * round);
        (0..5).for_each(|_| _ = guest.next_used(0));
        assert!(answers.into_iter().all(|answer| guest.bytes(answer) == DONE));
    }
    let answer = offer(&mut guest);
    guest.kick(0);
    guest.turn();
    assert!(guest.used_index(0) == 15 && counted(&guest, "rate_limiter_throttled_events") == 1);
    // A restore gives nothing back; what the user changes does.
    let suspended = guest.suspend();
    let opened = config(json!({ "path_on_host": path, "rate_limiter": limits }));
    let mut guest = by_hand(&opened);
    guest.take_over(&suspended).unwrap();
    guest.resume();
    guest.kick(0);
    guest.turn();
    assert_eq!(guest.used_index(0), 15);
    let body = br#"{"id": "p", "rate_limiter": {"ops": {"size": 0, "refill_time": 0}}}"#;
    let change = opened.kind().parse_patch("", body).unwrap();
    guest.pause();
    let patched = guest.transport.lock().unwrap().patch(change.patch(), &mut host::Host::default());
    patched.unwrap();
    guest.resume();
    guest.kick(0);
    guest.wait_for(|guest| guest.has_used(0));
    assert_eq!(guest.bytes(answer), DONE);
    let patched = opened.patched(&change).unwrap();
    assert!(patched.config::<pmem::Config>().unwrap().rate_limiter.is_some());
}

#[test]
fn limits_of_bytes_count_the_whole_file() {
    let _alone = alone();
    let folder = Folder::new();
    let path = folder.write("file", [0; 4096]);
    let limits = json!({ "bandwidth": { "size": 3 * 4096, "refill_time": 1_u64 << 40 } });
    let mut guest = by_hand(&config(json!({ "path_on_host": path, "rate_limiter": limits })));
    for _ in 0..3 {
        assert_eq!(flush(&mut guest), DONE);
    }
    offer(&mut guest);
    guest.kick(0);
    guest.turn();
    assert_eq!((guest.used_index(0), counted(&guest, "rate_limiter_throttled_events")), (3, 1));
}

#[test]
fn a_host_without_rings_flushes_all_the_same() {
    let _alone = alone();
    let test = || {
        let folder = Folder::new();
        let path = folder.write("file", [0; 4096]);
        common::forbid(libc::SYS_io_uring_setup, libc::ENOSYS);
        let mut guest = by_hand(&config(json!({ "path_on_host": path })));
        assert_eq!([(); 3].map(|()| flush(&mut guest)), [DONE; 3]);
        common::forbid(libc::SYS_fdatasync, libc::EIO);
        assert_eq!(flush(&mut guest), FAILED);
    };
    std::thread::spawn(test).join().unwrap();
}

#[test]
fn after_a_flush_of_memory_that_failed_none_succeeds() {
    let _alone = alone();
    let folder = Folder::on_disk();
    let place = folder.path("small");
    std::fs::create_dir(&place).unwrap();
    // A device over a hole of a full file system takes what is written, and finds no room for it when it is written
    // back: the host tells that once.
    common::mount_tmpfs(&place, 64 << 10);
    let image = place.join("image");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    assert!(std::fs::write(place.join("filler"), vec![0; 65 << 10]).is_err());
    {
        let device = BlockDevice::new(&image, 512);
        let opened = config(json!({ "path_on_host": device.path }));
        let mut guest = by_hand(&opened);
        assert_eq!(flush(&mut guest), DONE);
        let written = std::fs::File::options().write(true).open(&device.path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&written, &[7; 64 << 10], 0).unwrap();
        assert_eq!(flush(&mut guest), FAILED);
        for is_reset in [false, true, false] {
            if is_reset {
                guest.start(0);
            }
            guest.pause();
            guest.resume();
            assert_eq!(flush(&mut guest), FAILED, "a flush succeeds though data is gone");
        }
        assert_eq!((counted(&guest, "flush_count"), counted(&guest, "flush_fails")), (1, 4));
        assert_eq!(guest.status() & NEEDS_RESET, 0);
    }
    common::output("umount", &["-l", place.to_str().unwrap()]);
}

#[test]
fn a_file_of_another_size_is_not_the_one_that_was_saved() {
    let _alone = alone();
    let folder = Folder::new();
    let path = folder.write("file", [0; 4096]);
    let opened = config(json!({ "path_on_host": path }));
    let state = open(&opened).unwrap().save_state().unwrap();
    open(&opened).unwrap().restore_state(&state).unwrap();
    std::fs::write(&path, [0; 4097]).unwrap();
    let error = open(&opened).unwrap().restore_state(&state).unwrap_err().to_string();
    let expected = format!("`{}` has 4097 bytes, and had 4096 when the guest was saved", path.display());
    assert!(error.contains(&expected), "{error}");
}

#[test]
fn files_that_are_no_memory_are_refused_by_name() {
    let _alone = alone();
    let folder = Folder::new();
    let path = |name: &str| folder.path(name);
    common::output("mkfifo", &[path("fifo").to_str().unwrap()]);
    folder.write("empty", []);
    folder.write("file", [0; 4096]);
    for (name, expected) in [
        ("empty", "it is empty: give it the size"),
        ("fifo", "it is a FIFO, a file or block device is needed"),
        (".", "it is a directory"),
        ("none", "No such file"),
        ("file/file", "Not a directory"),
    ] {
        for is_read_only in [false, true] {
            let device = config(json!({ "path_on_host": path(name), "read_only": is_read_only }));
            for error in [open(&device).err(), device.look().err()] {
                let error = error.unwrap().to_string();
                assert!(error.contains("pmem device `p`") && error.contains(expected), "{name}: {error}");
            }
        }
    }
    // One writer or many readers, as of a disk.
    let one = |more: serde_json::Value| {
        let mut body = json!({ "path_on_host": path("file") });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        open(&config(body))
    };
    let [reader, other] = [(); 2].map(|()| one(json!({ "read_only": true })).unwrap());
    let error = one(json!({})).err().unwrap().to_string();
    assert!(error.contains("it is in use by another disk or pmem device of this microVM"), "{error}");
    one(json!({ "lock": false })).unwrap();
    drop((reader, other));
    let _writer = one(json!({})).unwrap();
    assert!(one(json!({})).is_err() && one(json!({ "read_only": true })).is_err());
    let disk = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": path("file") });
    let disk = KINDS[0].parse(disk.to_string().as_bytes()).unwrap();
    assert!(open(&disk).err().unwrap().to_string().contains("it is in use by"));
}
