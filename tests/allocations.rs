//! What requests cost in memory, counted by the allocator of this program: nothing, once there were as
//! many in flight as there will be.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::sync::Mutex;

use common::Folder;
use common::allocator::{self, Counting};
use common::disk::{DISCARD, Disk, FLUSH, IN, IN_FLIGHT_MAX, OUT, WRITE_ZEROES};
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test at a time: all disks' threads are counted.
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
    let before = allocator::allocations();
    run(disk, in_flight, 1000);
    (allocator::allocations() - before) as f64 / 1000.0
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

fn qemu_img(folder: &Folder, arguments: &[&str]) {
    let status = std::process::Command::new("qemu-img").args(arguments).current_dir(&folder.0).status();
    assert!(status.expect("qemu-img is needed: `apt-get install qemu-utils`").success());
}

fn qcow2(folder: &Folder, engine: &str) -> Disk {
    Disk::new(json!({
        "drive_id": "d", "is_root_device": false, "path_on_host": folder.path("image"), "format": "qcow2",
        "io_engine": engine,
    }))
    .unwrap()
}

#[test]
fn what_is_there_in_a_qcow2_image_is_read_and_written_without_allocations() {
    let _alone = ALONE.lock();
    for engine in ["Sync", "Async"] {
        let folder = Folder::new();
        qemu_img(&folder, &["create", "-q", "-f", "qcow2", "image", "8M"]);
        let mut disk = qcow2(&folder, engine);
        for place in 0..128 {
            assert_eq!(disk.write(place * 128, &[1; 64 << 10]), Ok(()));
        }
        for kind in [IN, OUT] {
            assert_eq!(allocations(&mut disk, kind, 4096), 0.0, "{engine} {kind}");
        }
    }
}

/// Sectors of a cluster of 64 KiB.
const CLUSTER: u64 = 128;

/// How many allocations a request takes, of requests at these sectors, one after the other.
fn at(disk: &mut Disk, kind: u32, length: usize, sectors: impl Iterator<Item = u64>) -> f64 {
    let (mut requests, mut before) = (0, 0);
    for sector in sectors {
        if kind == DISCARD || kind == WRITE_ZEROES {
            let mut range = [0; 16];
            range[..8].copy_from_slice(&sector.to_le_bytes());
            range[8] = if kind == DISCARD { CLUSTER as u8 } else { 8 };
            disk.set_data(0, 0, &range);
        }
        if requests == 0 {
            disk.put(0, 0, kind, sector, length);
            before = allocator::allocations();
        } else {
            disk.set_sector(0, 0, sector);
            disk.offer(0, 0);
        }
        disk.kick(0);
        disk.wait(0);
        assert_eq!(disk.status(0, 0), 0, "{kind} at {sector}");
        requests += 1;
    }
    (allocator::allocations() - before) as f64 / f64::from(requests)
}

/// What `imago` allocates for a mapping that it prepares: the list of its clusters, and the box of both.
const MAPPING: f64 = 2.0;
/// The allocations by `imago` to give clusters back: a list of them, and the same list again, sorted.
const GIVING_BACK: f64 = 2.0;
/// The allocations by `imago` to write a table: the list of the buffer's pieces, and the range that is written.
/// (The buffer itself it has from the system's allocator, past this one.) Then the table as it is held until
/// it may be in the file, and a place for it; of reference counts, those in the file and those that are higher.
const TABLE: f64 = 4.5;

#[test]
fn a_new_cluster_of_a_qcow2_image_takes_two_small_allocations_and_what_is_there_none() {
    let _alone = ALONE.lock();
    for engine in ["Sync", "Async"] {
        for beneath in [&[][..], &["-b", "base", "-F", "raw"]] {
            let folder = Folder::new();
            folder.write("base", vec![1; 40 << 20]);
            qemu_img(&folder, &[&["create", "-q", "-f", "qcow2"], beneath, &["image", "64M"]].concat());
            let mut disk = qcow2(&folder, engine);
            let what = format!("{engine} {beneath:?}");
            // The tables, and room for what is copied, and for ranges.
            assert_eq!(disk.write(8, &[1; 4096]), Ok(()));
            assert_eq!(disk.ranges(WRITE_ZEROES, &[(8, 8, 0)]), Ok(()));
            assert_eq!(disk.flush(), Ok(()));
            // Somewhere within 256 clusters, in no order.
            let scattered = |first: u64| (0..256).map(move |at| (first + at * 73 % 256) * CLUSTER + 24);
            for length in [4096, 64 << 10] {
                assert_eq!(at(&mut disk, IN, length, scattered(1)), 0.0, "{what}: what is not there");
            }
            let new = at(&mut disk, OUT, 4096, scattered(1));
            assert!(new <= MAPPING, "{what}: {new} for a new cluster");
            assert_eq!(at(&mut disk, OUT, 4096, scattered(1)), 0.0, "{what}: what is there");
            assert_eq!(at(&mut disk, WRITE_ZEROES, 16, scattered(1)), 0.0, "{what}: zeros there");
            let new = at(&mut disk, OUT, 64 << 10, (300..500).map(|cluster| cluster * CLUSTER));
            assert!(new <= MAPPING, "{what}: {new} for a whole new cluster");
            let new = at(&mut disk, OUT, 4096, (0..1600).map(|block| 500 * CLUSTER + block * 8));
            assert!(new <= MAPPING / 16.0, "{what}: {new} for a block, one after the other");
            // Of both kinds, that were dirty.
            let tables = at(&mut disk, FLUSH, 0, std::iter::once(0));
            assert!(tables > 0.0 && tables <= 2.0 * TABLE, "{what}: {tables} for a flush");
            assert_eq!(at(&mut disk, FLUSH, 0, 0..10), 0.0, "{what}: nothing to flush");
            let given_back = at(&mut disk, DISCARD, 16, (1..200).map(|cluster| cluster * CLUSTER));
            // The first one writes tables.
            assert!(given_back < GIVING_BACK + 0.1, "{what}: {given_back} to give a cluster back");
            let again = at(&mut disk, OUT, 4096, scattered(1).filter(|sector| *sector < 200 * CLUSTER));
            assert!(again < MAPPING + 0.1, "{what}: {again} for a cluster that is there again");
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
        let before = allocator::bytes();
        for in_flight in [2, 32, IN_FLIGHT_MAX] {
            run(&mut disk, in_flight, 2000);
            assert_eq!(allocator::bytes() - before, 0, "{engine}, {in_flight}");
        }
    }
}
