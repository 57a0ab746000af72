//! What requests cost in memory, counted by the allocator of this program: nothing, once there were as
//! many in flight as there will be.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use common::Folder;
use common::disk::{DISCARD, Disk, FLUSH, IN, IN_FLIGHT_MAX, OUT};
use serde_json::{Value, json};

/// Counts what is allocated, by all threads.
struct Counting;

static COUNT: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicI64 = AtomicI64::new(0);

#[allow(unsafe_code)]
// SAFETY: all work is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        BYTES.fetch_sub(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test at a time: they count for the whole program.
static ALONE: Mutex<()> = Mutex::new(());

fn disk(folder: &Folder, more: Value) -> Disk {
    let path = folder.write("image", vec![1; 8 << 20]);
    let mut config = json!({
        "drive_id": "d", "is_root_device": false, "path_on_host": path, "cache_type": "Writeback",
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    Disk::new(config).unwrap()
}

/// Keeps `in_flight` requests of a kind in flight until `count` are done.
fn run(disk: &mut Disk, in_flight: u16, count: usize) {
    (0..in_flight).for_each(|slot| disk.offer(0, slot));
    disk.kick(0);
    for done in 0..count {
        let (slot, _) = disk.wait(0);
        if done + usize::from(in_flight) < count {
            disk.offer(0, slot);
            disk.kick(0);
        }
    }
}

/// How many allocations a request takes, at last.
fn allocations(disk: &mut Disk, kind: u32, length: usize) -> f64 {
    let in_flight = 32;
    for slot in 0..in_flight {
        disk.set_data(0, slot, &vec![0; length]);
        disk.put(0, slot, kind, u64::from(slot) * 8, length);
        disk.kick(0);
        disk.wait(0);
        assert_eq!(disk.status(0, slot), 0, "{kind}");
    }
    run(disk, in_flight, 1000);
    let before = COUNT.load(Ordering::Relaxed);
    run(disk, in_flight, 1000);
    (COUNT.load(Ordering::Relaxed) - before) as f64 / 1000.0
}

#[test]
fn no_request_allocates_on_either_engine() {
    let _alone = ALONE.lock();
    for engine in ["Sync", "Async"] {
        for more in [json!({}), json!({ "direct_io": true }), json!({ "num_queues": 2, "threads": 2 })] {
            let folder = Folder::new();
            let mut config = json!({ "io_engine": engine });
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let mut disk = disk(&folder, config);
            for (kind, length) in [(IN, 4096), (OUT, 4096), (FLUSH, 0), (DISCARD, 16)] {
                if more.get("direct_io").is_some() && kind != IN {
                    // Each waits for the host's disk.
                    continue;
                }
                for misalignment in [0, 8] {
                    disk.misalignment = misalignment;
                    assert_eq!(allocations(&mut disk, kind, length), 0.0, "{engine} {more} {kind}");
                }
            }
        }
    }
}

#[test]
fn what_is_there_in_a_qcow2_image_is_read_and_written_without_allocations() {
    let _alone = ALONE.lock();
    for engine in ["Sync", "Async"] {
        let folder = Folder::new();
        let path = folder.path("image");
        let create = ["create", "-q", "-f", "qcow2"];
        let made = std::process::Command::new("qemu-img").args(create).arg(&path).arg("8M").status();
        assert!(made.expect("qemu-img is needed: `apt-get install qemu-utils`").success());
        let mut disk = Disk::new(json!({
            "drive_id": "d", "is_root_device": false, "path_on_host": path, "format": "qcow2",
            "io_engine": engine,
        }))
        .unwrap();
        for place in 0..128 {
            assert_eq!(disk.write(place * 128, &[1; 64 << 10]), Ok(()));
        }
        for kind in [IN, OUT] {
            assert_eq!(allocations(&mut disk, kind, 4096), 0.0, "{engine} {kind}");
        }
    }
}

#[test]
fn a_queue_holds_no_more_however_much_is_in_flight() {
    let _alone = ALONE.lock();
    for engine in ["Sync", "Async"] {
        let folder = Folder::new();
        let mut disk = disk(&folder, json!({ "io_engine": engine }));
        for slot in 0..IN_FLIGHT_MAX {
            disk.put(0, slot, IN, 0, 4096);
        }
        run(&mut disk, 1, 100);
        let before = BYTES.load(Ordering::Relaxed);
        for in_flight in [2, 32, IN_FLIGHT_MAX] {
            run(&mut disk, in_flight, 2000);
            assert_eq!(BYTES.load(Ordering::Relaxed) - before, 0, "{engine}, {in_flight}");
        }
    }
}
