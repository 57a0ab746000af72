//! Disks over the driver's side of their queues: each engine, format and number of queues, without a
//! guest.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "../common/mod.rs"]
mod common;
mod flushes;
mod host_devices;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use alula::metrics::View;
use alula::uring::Uring;
use common::disk::{DISCARD, Disk, FLUSH, GET_ID, IN, IN_FLIGHT_MAX, OUT, WRITE_ZEROES};
use common::loopback::BlockDevice;
use common::{Folder, mount_tmpfs, output, wait_for};
use serde_json::{Value, json};

const ENGINES: [&str; 2] = ["Sync", "Async"];
const OK: Result<(), u8> = Ok(());
const IO_ERROR: Result<(), u8> = Err(1);
const UNSUPPORTED: Result<(), u8> = Err(2);

fn config(path: &Path, engine: &str, more: Value) -> Value {
    let mut config = json!({
        "drive_id": "d", "is_root_device": false, "path_on_host": path, "io_engine": engine,
        "cache_type": "Writeback",
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

/// Bytes that tell where they belong.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let word = |index: u64| (seed << 32 | index).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    // Word by word: a debug build takes long for an iterator's bytes.
    let mut bytes = Vec::with_capacity(length);
    (0..length as u64 / 8).for_each(|index| bytes.extend_from_slice(&word(index)));
    bytes
}

/// Files in memory (tmpfs) refuse direct I/O before Linux 6.6: the folder is on a disk.
fn image(folder: &Folder, length: u64) -> (std::path::PathBuf, File) {
    let path = folder.write("image", pattern(0, length as usize));
    let file = File::options().read(true).write(true).open(&path).unwrap();
    file.sync_all().unwrap();
    (path, file)
}

fn content(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn reads_writes_flushes_and_names_are_answered_and_what_is_outside_is_not_touched() {
    for engine in ENGINES {
        for direct_io in [false, true] {
            let folder = Folder::on_disk();
            let (path, file) = image(&folder, 1 << 20);
            let mut disk = Disk::new(config(&path, engine, json!({ "direct_io": direct_io }))).unwrap();
            assert_eq!(disk.config(0, 8), 2048);
            // Not a multiple of a page: what the host does not take as it is.
            for misalignment in [0, 512, 24] {
                disk.misalignment = misalignment;
                let new = pattern(misalignment + 1, 32 << 10);
                assert_eq!(disk.write(64, &new), OK, "{engine} {direct_io} {misalignment}");
                assert_eq!(disk.flush(), OK);
                assert!(content(&file, 32 << 10, 32 << 10) == new);
                assert!(disk.read(64, 32 << 10).unwrap() == new);
                assert!(disk.read(2040, 4096).unwrap() == content(&file, 2040 * 512, 4096));
            }
            assert_eq!(disk.id()[..2], *b"d\0");
            // What is told to be written is, beyond the name as well.
            disk.set_data(0, 0, &[0xff; 100]);
            disk.put(0, 0, GET_ID, 0, 100);
            disk.kick(0);
            assert_eq!((disk.wait(0), disk.status(0, 0)), ((0, 101), 0));
            assert_eq!(disk.get_data(0, 0, 100), [&b"d"[..], &[0; 99]].concat());
            let before = content(&file, 0, 1 << 20);
            for (sector, length) in
                [(2048, 512), (2041, 4096), (u64::MAX, 512), (u64::MAX / 512, 4096), (0, 100)]
            {
                assert_eq!(disk.read(sector, length).map(drop), IO_ERROR, "{sector} {length}");
                assert_eq!(disk.write(sector, &vec![1; length]), IO_ERROR, "{sector} {length}");
            }
            assert!(content(&file, 0, 1 << 20) == before);
            assert!(disk.was_interrupted() && !disk.is_broken());
        }
    }
}

#[test]
fn blocks_are_given_back_to_the_host_and_zeros_are_written() {
    for engine in ENGINES {
        let folder = Folder::on_disk();
        let (path, file) = image(&folder, 1 << 20);
        let mut disk = Disk::new(config(&path, engine, json!({}))).unwrap();
        assert_eq!(disk.features() >> 13 & 3, 3);
        let blocks = || file.metadata().unwrap().blocks();
        let before = blocks();
        assert_eq!(disk.ranges(DISCARD, &[(0, 128, 0), (256, 128, 0)]), OK);
        assert_eq!(blocks(), before - 256);
        assert_eq!(disk.ranges(WRITE_ZEROES, &[(512, 128, 1)]), OK);
        assert_eq!(blocks(), before - 384);
        assert_eq!(disk.ranges(WRITE_ZEROES, &[(640, 128, 0), (1000, 1, 0)]), OK);
        assert_eq!(blocks(), before - 384);
        let zeros =
            |sector: u64, sectors: usize| content(&file, sector * 512, sectors * 512).iter().all(|b| *b == 0);
        assert!(zeros(0, 128) && zeros(256, 128) && zeros(512, 256) && zeros(1000, 1));
        for kept in [128..256, 384..512, 768..1000, 1001..2048] {
            let (start, end) = (kept.start * 512, kept.end * 512);
            assert!(content(&file, start as u64, end - start) == pattern(0, 1 << 20)[start..end], "{kept:?}");
        }
        let kept = content(&file, 0, 1 << 20);
        let many = [(0, 1, 0); 17];
        for (kind, ranges, expected) in [
            (DISCARD, &many[..], IO_ERROR),
            (DISCARD, &[(0, 1, 1)], UNSUPPORTED),
            (WRITE_ZEROES, &[(0, 1, 2)], UNSUPPORTED),
            (DISCARD, &[(2047, 2, 0)], IO_ERROR),
            (DISCARD, &[(800, 8, 0), (u64::MAX, 1, 0)], IO_ERROR),
            (DISCARD, &[(0, u32::MAX, 0)], IO_ERROR),
            (WRITE_ZEROES, &[(0, 0, 0)], OK),
            (99, &[(0, 1, 0)], UNSUPPORTED),
        ] {
            assert_eq!(disk.ranges(kind, ranges), expected, "{kind} {ranges:?}");
        }
        assert!(content(&file, 0, 1 << 20) == kept);
    }
}

#[test]
fn large_ranges_are_given_back_one_turn_after_the_other() {
    for engine in ENGINES {
        let folder = Folder::on_disk();
        let path = folder.path("sparse");
        File::create(&path).unwrap().set_len(4 << 30).unwrap();
        let mut disk = Disk::new(config(&path, engine, json!({}))).unwrap();
        for kind in [DISCARD, WRITE_ZEROES] {
            // A gigabyte, or as much as may be zeros: more than a turn's share, each.
            let sectors: u32 = if kind == DISCARD { 2 << 20 } else { 128 << 10 };
            for slot in 0..32 {
                let sector = u64::from(slot % 4) * u64::from(sectors);
                let range = [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &[0; 4]].concat();
                disk.set_data(0, slot, &range);
                disk.put(0, slot, kind, 0, range.len());
            }
            disk.kick(0);
            (0..32).for_each(|_| _ = disk.wait(0));
            assert!((0..32).all(|slot| disk.status(0, slot) == 0), "{engine} {kind}");
        }
    }
}

#[test]
fn a_disk_that_cannot_be_written_or_is_told_not_to_offers_no_discard() {
    let folder = Folder::on_disk();
    let (path, file) = image(&folder, 1 << 20);
    for more in [json!({ "is_read_only": true }), json!({ "discard": false })] {
        for engine in ENGINES {
            let mut disk = Disk::new(config(&path, engine, more.clone())).unwrap();
            assert_eq!(disk.features() >> 13 & 3, 0);
            assert!(disk.ranges(DISCARD, &[(0, 8, 0)]).is_err());
            if more.get("is_read_only").is_some() {
                assert_eq!(disk.write(0, &[1; 512]), IO_ERROR);
                // The device refuses the write, and does not leave that to the file.
                let metrics = disk.transport.lock().unwrap().metrics(View::Total);
                assert_eq!(
                    (&metrics["invalid_reqs_count"], &metrics["execute_fails"]),
                    (&json!(2), &json!(0))
                );
            }
        }
    }
    assert!(content(&file, 0, 1 << 20) == pattern(0, 1 << 20));
}

/// Writes and reads all over the disk with as much in flight as there is room for, each queue in a
/// part of its own, and checks every byte.
fn shuffle(disk: &mut Disk, queues: usize, rounds: usize) {
    const LENGTH: usize = 4096;
    let per_queue = (8 << 20) / LENGTH / queues;
    let mut seeds = vec![0_u64; per_queue * queues];
    let mut random = 1_u64;
    let mut pick = |below: usize| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (random >> 33) as usize % below
    };
    for round in 0..rounds {
        let mut places = vec![];
        for queue in 0..queues {
            let mut taken = std::collections::HashSet::new();
            for slot in 0..IN_FLIGHT_MAX {
                let block = queue * per_queue + pick(per_queue);
                if !taken.insert(block) {
                    continue;
                }
                let write = seeds[block] == 0 || pick(2) == 0;
                if write {
                    seeds[block] = (round * 1_000_000 + block + 1) as u64;
                    disk.set_data(queue, slot, &pattern(seeds[block], LENGTH));
                }
                let kind = if write { OUT } else { IN };
                disk.put(queue, slot, kind, (block * LENGTH / 512) as u64, LENGTH);
                places.push((queue, slot, block, write));
                if pick(16) == 0 {
                    disk.kick(queue);
                }
            }
            disk.kick(queue);
        }
        for (queue, ..) in &places {
            disk.wait(*queue);
        }
        for (queue, slot, block, write) in places {
            assert_eq!(disk.status(queue, slot), 0);
            if !write {
                assert!(disk.get_data(queue, slot, LENGTH) == pattern(seeds[block], LENGTH), "{block}");
            }
        }
    }
    for (block, seed) in seeds.iter().enumerate().filter(|(_, seed)| **seed > 0) {
        assert!(
            disk.read((block * LENGTH / 512) as u64, LENGTH).unwrap() == pattern(*seed, LENGTH),
            "{block}"
        );
    }
}

#[test]
fn many_requests_in_flight_on_many_queues_all_reach_their_places() {
    for engine in ENGINES {
        for (num_queues, threads) in [(1, 0), (4, 0), (4, 1), (3, 3)] {
            for direct_io in [false, true] {
                let folder = Folder::on_disk();
                let (path, _) = image(&folder, 8 << 20);
                let more = json!({ "num_queues": num_queues, "threads": threads, "direct_io": direct_io });
                let mut disk = Disk::new(config(&path, engine, more)).unwrap();
                assert_eq!(disk.config(34, 2), num_queues);
                assert_eq!(disk.features() >> 12 & 1, u64::from(num_queues > 1));
                shuffle(&mut disk, num_queues as usize, if direct_io { 1 } else { 2 });
            }
        }
    }
}

#[test]
fn more_data_than_may_be_in_flight_goes_one_after_the_other_and_too_much_at_once_not_at_all() {
    const MIB: usize = 1 << 20;
    for engine in ["Sync", "Async"] {
        let folder = Folder::new();
        let (path, file) = image(&folder, 0);
        file.set_len(4 << 30).unwrap();
        file.write_all_at(&[7; 512], 90 << 20).unwrap();
        let mut disk = Disk::new(config(&path, engine, json!({}))).unwrap();
        // Behind the headers of all.
        disk.misalignment = 16 << 20;
        for slot in 0..5 {
            disk.put(0, slot, IN, 0, 80 * MIB + usize::from(slot) * 512);
        }
        disk.kick(0);
        for slot in 0..5 {
            assert_eq!(disk.wait(0).1 as usize, 80 * MIB + slot * 512 + 1, "{engine}");
        }
        for (times, expected) in [(12, 0), (13, 1)] {
            disk.put_repeated(0, 0, IN, 0, 80 * MIB, times);
            disk.kick(0);
            disk.wait(0);
            assert_eq!(disk.status(0, 0), expected, "{engine}, {times}");
        }
        assert_eq!(disk.read((90 << 20) / 512, 512), Ok(vec![7; 512]));
    }
}

#[test]
fn what_is_in_flight_is_finished_on_the_old_image_when_another_is_put_in_its_place() {
    for engine in ENGINES {
        let folder = Folder::on_disk();
        let (path, file) = image(&folder, 8 << 20);
        let other = folder.write("other", pattern(7, 1 << 20));
        let mut disk = Disk::new(config(&path, engine, json!({}))).unwrap();
        for slot in 0..IN_FLIGHT_MAX {
            disk.set_data(0, slot, &pattern(100 + u64::from(slot), 4096));
            disk.put(0, slot, OUT, 8 * u64::from(slot), 4096);
        }
        disk.kick(0);
        // All of them, or those of them that the device has seen by now; the rest goes to the new one.
        disk.patch(json!({ "drive_id": "d", "path_on_host": other })).unwrap();
        let done = disk.config(0, 8);
        assert_eq!(done, 2048);
        for _ in 0..IN_FLIGHT_MAX {
            disk.wait(0);
        }
        let new = File::open(&other).unwrap();
        for slot in 0..IN_FLIGHT_MAX {
            assert_eq!(disk.status(0, slot), 0);
            let at = 4096 * u64::from(slot);
            let written = pattern(100 + u64::from(slot), 4096);
            assert!(content(&file, at, 4096) == written || content(&new, at, 4096) == written, "{slot}");
        }
        // The old one is free again, and one that is refused changes nothing.
        Disk::new(config(&path, engine, json!({}))).unwrap();
        let error = disk.patch(json!({ "drive_id": "d", "path_on_host": folder.path("none") })).unwrap_err();
        assert!(error.contains("No such file"), "{error}");
        assert!(disk.read(1000, 4096).unwrap() == pattern(7, 1 << 20)[512_000..516_096]);
    }
}

#[test]
fn a_file_that_grew_is_measured_again() {
    for engine in ENGINES {
        let folder = Folder::on_disk();
        let (path, file) = image(&folder, 1 << 20);
        let mut disk = Disk::new(config(&path, engine, json!({}))).unwrap();
        assert_eq!(disk.write(2048, &[1; 512]), IO_ERROR);
        file.set_len(2 << 20).unwrap();
        // That of the answer: it comes after what was used can be seen.
        wait_for(|| disk.was_interrupted());
        let limits = json!({ "ops": { "size": 9, "refill_time": 9 } });
        disk.patch(json!({ "drive_id": "d", "rate_limiter": limits })).unwrap();
        assert!(!disk.was_interrupted(), "limits are not the guest's business");
        disk.patch(json!({ "drive_id": "d", "path_on_host": path })).unwrap();
        assert!(disk.was_interrupted(), "the guest is not told");
        assert_eq!(disk.config(0, 8), 4096);
        assert_eq!(disk.write(4095, &[1; 512]), OK);
    }
}

#[test]
fn what_a_disk_does_is_counted() {
    for engine in ENGINES {
        let folder = Folder::on_disk();
        let (path, file) = image(&folder, 1 << 20);
        let mut disk = Disk::new(config(&path, engine, json!({}))).unwrap();
        for _ in 0..2 {
            assert_eq!(disk.write(0, &[1; 32 << 10]), OK);
        }
        for _ in 0..3 {
            assert!(disk.read(0, 16 << 10).is_ok());
        }
        for _ in 0..4 {
            assert_eq!(disk.flush(), OK);
        }
        for _ in 0..5 {
            assert_eq!(disk.ranges(DISCARD, &[(64, 8, 0)]), OK);
        }
        for _ in 0..6 {
            assert_eq!(disk.ranges(WRITE_ZEROES, &[(64, 8, 0), (128, 8, 1)]), OK);
        }
        assert_eq!(disk.id()[0], b'd');
        for _ in 0..7 {
            assert_eq!(disk.ranges(99, &[(0, 1, 0)]), UNSUPPORTED);
        }
        // The host has less than it said.
        file.set_len(0).unwrap();
        assert_eq!(disk.read(0, 512).map(drop), IO_ERROR);
        disk.patch(json!({ "drive_id": "d", "path_on_host": path })).unwrap();
        for body in [json!({ "drive_id": "d" }), json!({ "drive_id": "d", "path_on_host": "/nowhere" })] {
            disk.patch(body).unwrap_err();
        }
        let metrics = disk.transport.lock().unwrap().metrics(View::Total);
        for (name, expected) in [
            ("write_count", 2),
            ("write_bytes", 64 << 10),
            ("read_count", 3),
            ("read_bytes", 48 << 10),
            ("flush_count", 4),
            ("discard_count", 5),
            ("write_zeroes_count", 6),
            ("invalid_reqs_count", 7),
            ("execute_fails", 1),
            ("update_count", 1),
            ("update_fails", 2),
            ("rate_limiter_throttled_events", 0),
        ] {
            assert_eq!(metrics[name], json!(expected), "{engine}: {name}");
        }
        assert!(metrics["queue_event_count"].as_u64() >= Some(29), "{metrics:?}");
        for name in ["read_agg", "write_agg"] {
            let [min, max, sum] =
                ["min_us", "max_us", "sum_us"].map(|what| metrics[name][what].as_u64().unwrap());
            assert!(0 < sum && min <= max && max <= sum, "{engine}: {name}: {metrics:?}");
        }
    }
}

#[test]
fn a_host_that_forbids_io_uring_is_an_error_that_says_so() {
    for (errno, expected) in [
        (libc::EPERM, "this process may not use io_uring: a seccomp filter"),
        (libc::ENOSYS, "this kernel has no io_uring"),
    ] {
        let told = std::thread::spawn(move || {
            common::forbid(libc::SYS_io_uring_setup, errno);
            Uring::new(8).err().map(|error| error.to_string())
        });
        let told = told.join().unwrap().unwrap();
        assert!(told.contains(expected), "{told}");
    }
}

#[test]
fn the_sync_engine_goes_on_where_io_uring_is_forbidden() {
    let test = || {
        common::forbid(libc::SYS_io_uring_setup, libc::EPERM);
        let folder = Folder::on_disk();
        let (path, _) = image(&folder, 8 << 20);
        let more = json!({ "num_queues": 2, "threads": 2 });
        let mut disk = Disk::new(config(&path, "Async", more)).unwrap();
        shuffle(&mut disk, 2, 2);
        assert_eq!(disk.flush(), OK);
    };
    std::thread::spawn(test).join().unwrap();
}

#[test]
fn limits_hold_requests_back_until_they_are_changed() {
    // So slow that none comes back while this runs.
    let bucket = |size: u64| json!({ "size": size, "refill_time": 1_000_000_000 });
    let none = json!({ "size": 0, "refill_time": 0 });
    for engine in ENGINES {
        for (limits, allowed) in [
            (json!({ "ops": bucket(5) }), 5),
            (json!({ "bandwidth": bucket(7 * 4096) }), 7),
            (json!({ "ops": bucket(8), "bandwidth": bucket(9 * 4096) }), 8),
        ] {
            let folder = Folder::on_disk();
            let (path, _) = image(&folder, 1 << 20);
            let mut disk = Disk::new(config(&path, engine, json!({ "rate_limiter": limits }))).unwrap();
            for slot in 0..20 {
                disk.put(0, slot, IN, 8 * u64::from(slot), 4096);
            }
            disk.kick(0);
            for slot in 0..allowed {
                assert_eq!(disk.wait(0).0, slot, "{engine} {limits}");
            }
            // A stop and a start are no way around a limit; nor is a change of another bucket.
            let other = if limits.get("ops").is_some() { "bandwidth" } else { "ops" };
            disk.patch(json!({ "drive_id": "d", "rate_limiter": { other: none } })).unwrap();
            disk.pause();
            disk.resume();
            disk.kick(0);
            disk.pause();
            assert_eq!(disk.take(0), None, "{engine} {limits}");
            disk.resume();
            disk.patch(json!({ "drive_id": "d", "rate_limiter": { "ops": none, "bandwidth": none } }))
                .unwrap();
            for slot in allowed..20 {
                assert_eq!(disk.wait(0).0, slot, "{engine} {limits}");
                assert_eq!(disk.status(0, slot), 0);
            }
            let metrics = disk.transport.lock().unwrap().metrics(View::Total);
            assert_eq!((&metrics["read_count"], &metrics["read_bytes"]), (&json!(20), &json!(20 * 4096)));
            assert_eq!((&metrics["update_count"], &metrics["execute_fails"]), (&json!(2), &json!(0)));
            assert!(metrics["rate_limiter_throttled_events"].as_u64() > Some(0));
        }
    }
}
