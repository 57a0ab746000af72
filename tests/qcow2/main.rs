//! qcow2 images under disks, made and checked by `qemu-img`: chains, snapshots, compression, and images
//! that are broken or say what is not so.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod bounds;
#[path = "../common/mod.rs"]
mod common;
mod damage;
mod layers;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;
use std::process::Command;

use common::Folder;
use common::disk::{DISCARD, Disk, OUT, WRITE_ZEROES};
use common::loopback::BlockDevice;
use serde_json::{Value, json};

const SIZE: usize = 4 << 20;
const CLUSTER: usize = 64 << 10;

/// Runs `qemu-img` (Debian package qemu-utils) in `folder`.
fn qemu_img(folder: &Folder, arguments: &[&str]) -> String {
    let (mut text, mut is_done) = (String::new(), false);
    // A process that another test has just started holds the locks of its parent until it has become its program.
    common::wait_for(|| {
        let output = Command::new("qemu-img").args(arguments).current_dir(&folder.0).output();
        let output = output.expect("qemu-img is needed: `apt-get install qemu-utils`");
        text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        is_done = output.status.success();
        is_done || !text.contains("Is another process using the image")
    });
    assert!(is_done, "qemu-img {arguments:?}: {text}");
    text
}

fn config(path: &Path, more: Value) -> Value {
    let mut config = json!({
        "drive_id": "d", "is_root_device": false, "path_on_host": path, "format": "qcow2",
        "cache_type": "Writeback",
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

fn refused(config: Value) -> String {
    Disk::new(config).err().expect("it is refused")
}

/// Bytes that tell where they belong.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let word = |index: u64| (seed << 32 | index).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    // Word by word: a debug build takes long for an iterator's bytes.
    let mut bytes = Vec::with_capacity(length);
    (0..length as u64 / 8).for_each(|index| bytes.extend_from_slice(&word(index)));
    bytes
}

/// A raw image `base`, and `disk` above it.
fn chain(folder: &Folder, options: &[&str]) -> Vec<u8> {
    let base = pattern(1, SIZE / 2);
    folder.write("base", &base);
    let create = ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw"];
    qemu_img(folder, &[&create, options, &["disk", "4M"]].concat());
    [base, vec![0; SIZE / 2]].concat()
}

/// Writes at many places, of many sizes, and keeps `expected` in step.
fn scribble(disk: &mut Disk, expected: &mut [u8], seed: u64) {
    let mut random = seed;
    let mut pick = |below: u64| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (random >> 33) % below
    };
    for round in 0..60 {
        let sector = pick(SIZE as u64 / 512 - 128);
        let sectors = 1 + pick(100);
        let (at, length) = ((sector * 512) as usize, (sectors * 512) as usize);
        match pick(8) {
            0 => {
                assert_eq!(disk.ranges(WRITE_ZEROES, &[(sector, sectors as u32, pick(2) as u32)]), Ok(()));
                expected[at..at + length].fill(0);
            }
            1 => assert_eq!(disk.flush(), Ok(())),
            2 => assert!(disk.read(sector, length).unwrap() == expected[at..at + length], "{round}"),
            _ => {
                let bytes = pattern(seed + round, length);
                assert_eq!(disk.write(sector, &bytes), Ok(()));
                expected[at..at + length].copy_from_slice(&bytes);
            }
        }
    }
}

fn check(folder: &Folder, expected: &[u8]) {
    qemu_img(folder, &["check", "disk"]);
    folder.write("expected", expected);
    qemu_img(folder, &["compare", "-f", "qcow2", "-F", "raw", "disk", "expected"]);
}

fn content(disk: &mut Disk) -> Vec<u8> {
    (0..SIZE / CLUSTER)
        .flat_map(|cluster| disk.read((cluster * CLUSTER / 512) as u64, CLUSTER).unwrap())
        .collect()
}

#[test]
fn what_is_written_through_either_engine_is_what_qemu_reads() {
    for engine in ["Sync", "Async"] {
        for options in
            [&[][..], &["-o", "cluster_size=4k"], &["-o", "compat=0.10"], &["-o", "refcount_bits=1"]]
        {
            let folder = Folder::new();
            let mut expected = chain(&folder, options);
            for seed in [10, 1000] {
                // Version 2 does not tell formats.
                let base = json!([{ "path_on_host": folder.path("base"), "format": "raw" }]);
                let more = json!({ "io_engine": engine, "backing": base });
                let mut disk = Disk::new(config(&folder.path("disk"), more)).unwrap();
                assert_eq!(disk.config(0, 8), SIZE as u64 / 512);
                if options != ["-o", "compat=0.10"] {
                    scribble(&mut disk, &mut expected, seed);
                } else {
                    assert_eq!(disk.features() >> 13 & 3, 0, "version 2 cannot give back");
                    assert_eq!(disk.write(1, &pattern(seed, 4096)), Ok(()));
                    expected[512..4608].copy_from_slice(&pattern(seed, 4096));
                }
                assert!(content(&mut disk) == expected);
                disk.end();
                check(&folder, &expected);
            }
            assert!(
                std::fs::read(folder.path("base")).unwrap() == pattern(1, SIZE / 2),
                "the base was written"
            );
        }
    }
}

#[test]
fn a_flush_reaches_the_file_whatever_happens_then() {
    for cache_type in ["Unsafe", "Writeback"] {
        let folder = Folder::new();
        let mut expected = chain(&folder, &[]);
        let mut disk = Disk::new(config(&folder.path("disk"), json!({ "cache_type": cache_type }))).unwrap();
        assert_eq!(disk.features() >> 9 & 1, 1, "it can be flushed");
        scribble(&mut disk, &mut expected, 5);
        assert_eq!(disk.flush(), Ok(()));
        // As it is in the file now, while nobody has closed it.
        std::fs::copy(folder.path("disk"), folder.path("copy")).unwrap();
        drop(disk);
        std::fs::rename(folder.path("copy"), folder.path("disk")).unwrap();
        check(&folder, &expected);
    }
}

#[test]
fn what_is_around_a_write_stays_whatever_lies_beneath() {
    // Neither the images nor what is beneath them end with a cluster.
    const TOP: usize = SIZE - 1536;
    let folder = Folder::new();
    let mut base = pattern(1, SIZE / 2 + 2560);
    base[100 << 10..300 << 10].fill(0);
    folder.write("base", &base);
    qemu_img(
        &folder,
        &["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "base", "small"],
    );
    let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
    qemu_img(&folder, &[&create[..], &["small", "-o", "cluster_size=512", "middle", "3M"]].concat());
    qemu_img(&folder, &[&create[..], &["middle", "disk", &TOP.to_string()]].concat());
    let mut expected = [base, vec![0; TOP]].concat();
    expected.truncate(TOP);
    // Pieces of each kind within the clusters of the image above.
    let mut disk = Disk::new(config(&folder.path("middle"), json!({}))).unwrap();
    for at in (0..3 << 20).step_by(40 << 10) {
        let bytes = pattern(at as u64, 3072);
        assert_eq!(disk.write((at / 512) as u64, &bytes), Ok(()));
        expected[at..at + 3072].copy_from_slice(&bytes);
        assert_eq!(disk.ranges(DISCARD, &[((at / 512) as u64 + 2, 1, 0)]), Ok(()));
        expected[at + 1024..at + 1536].fill(0);
    }
    disk.end();
    let mut disk = Disk::new(config(&folder.path("disk"), json!({}))).unwrap();
    for cluster in 0..SIZE / CLUSTER {
        // The front, the middle, the end, and beyond that.
        let at = cluster * CLUSTER + [0, 20 << 10, 60 << 10, 40 << 10][cluster % 4];
        let bytes = pattern(at as u64, [512, 5120, 4096, 30 << 10][cluster % 4].min(TOP - at));
        assert_eq!(disk.write((at / 512) as u64, &bytes), Ok(()));
        expected[at..at + bytes.len()].copy_from_slice(&bytes);
        if cluster % 4 == 2 {
            assert_eq!(disk.ranges(WRITE_ZEROES, &[((at / 512) as u64 + 1, 3, 0)]), Ok(()));
            expected[at + 512..at + 2048].fill(0);
        }
    }
    disk.end();
    check(&folder, &expected);
}

#[test]
fn what_several_queues_write_to_the_same_new_clusters_is_all_there() {
    for options in [&[][..], &["-o", "cluster_size=2M"]] {
        let folder = Folder::new();
        let mut expected = chain(&folder, options);
        let more = json!({ "num_queues": 2, "threads": 2 });
        let mut disk = Disk::new(config(&folder.path("disk"), more)).unwrap();
        // 64 blocks at a time: every other one by the other queue, some of them made zeros.
        for first in (0..SIZE / 4096).step_by(64) {
            for (slot, block) in (first..first + 64).enumerate() {
                let (queue, slot) = (slot % 2, (slot / 2) as u16);
                let (sector, at) = ((block * 8) as u64, block * 4096);
                if block % 5 == 0 {
                    let range = [&sector.to_le_bytes()[..], &8_u32.to_le_bytes(), &[0; 4]].concat();
                    disk.set_data(queue, slot, &range);
                    disk.put(queue, slot, WRITE_ZEROES, 0, range.len());
                    expected[at..at + 4096].fill(0);
                } else {
                    let bytes = pattern(at as u64, 4096);
                    disk.set_data(queue, slot, &bytes);
                    disk.put(queue, slot, OUT, sector, bytes.len());
                    expected[at..at + 4096].copy_from_slice(&bytes);
                }
            }
            (0..2).for_each(|queue| disk.kick(queue));
            for _ in 0..32 {
                for queue in 0..2 {
                    let (slot, _) = disk.wait(queue);
                    assert_eq!(disk.status(queue, slot), 0);
                }
            }
        }
        assert!(content(&mut disk) == expected);
        disk.end();
        check(&folder, &expected);
    }
}

#[test]
fn discarded_clusters_are_given_back_to_the_host() {
    let folder = Folder::new();
    qemu_img(&folder, &["create", "-q", "-f", "qcow2", "disk", "4M"]);
    let mut disk = Disk::new(config(&folder.path("disk"), json!({}))).unwrap();
    assert_eq!(disk.config(44, 4), CLUSTER as u64 / 512, "what is given back at once");
    let mut expected = pattern(3, SIZE);
    for cluster in 0..SIZE / CLUSTER {
        let at = cluster * CLUSTER;
        assert_eq!(disk.write(at as u64 / 512, &expected[at..at + CLUSTER]), Ok(()));
    }
    assert_eq!(disk.flush(), Ok(()));
    let blocks = || std::fs::metadata(folder.path("disk")).unwrap().blocks();
    let before = blocks();
    // From the middle of a cluster to the middle of another: whole ones between are given back.
    assert_eq!(disk.ranges(DISCARD, &[(64, 2048, 0)]), Ok(()));
    assert_eq!(blocks(), before - 15 * CLUSTER as u64 / 512);
    expected[CLUSTER..16 * CLUSTER].fill(0);
    assert!(content(&mut disk) == expected);
    disk.end();
    check(&folder, &expected);
}

#[test]
fn internal_snapshots_and_compressed_clusters_survive() {
    let folder = Folder::new();
    let mut expected = pattern(4, SIZE);
    folder.write("raw", &expected);
    qemu_img(&folder, &["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "raw", "disk"]);
    qemu_img(&folder, &["snapshot", "-c", "before", "disk"]);
    let mut disk = Disk::new(config(&folder.path("disk"), json!({}))).unwrap();
    assert!(content(&mut disk) == expected);
    scribble(&mut disk, &mut expected, 6);
    assert_eq!(disk.ranges(DISCARD, &[(1024, 1024, 0)]), Ok(()));
    expected[512 << 10..1 << 20].fill(0);
    disk.end();
    check(&folder, &expected);
    qemu_img(&folder, &["snapshot", "-a", "before", "disk"]);
    check(&folder, &pattern(4, SIZE));
}

#[test]
fn what_is_around_a_write_to_a_compressed_cluster_stays() {
    let folder = Folder::new();
    let mut expected = pattern(4, SIZE / 2);
    expected.chunks_exact_mut(8).for_each(|word| word[1..].fill(7));
    expected.resize(SIZE, 0);
    folder.write("raw", &expected);
    qemu_img(&folder, &["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "raw", "disk"]);
    let mut disk = Disk::new(config(&folder.path("disk"), json!({}))).unwrap();
    // The front, the middle, the end of one cluster; then from the middle of one to that of a later one.
    for (at, length) in [(0, 1), (5, 2), (3, 1), (7, 1), (16, 4), (28, 16), (44, 4)]
        .map(|(at, sectors)| (at * 8192, sectors * 8192))
    {
        let bytes = pattern(at as u64, length);
        assert_eq!(disk.write((at / 512) as u64, &bytes), Ok(()));
        expected[at..at + length].copy_from_slice(&bytes);
        assert!(content(&mut disk) == expected, "{at}");
    }
    disk.end();
    check(&folder, &expected);
}

#[test]
fn a_file_that_ends_in_the_middle_of_a_cluster_goes_on_with_zeros() {
    for engine in ["Sync", "Async"] {
        let folder = Folder::new();
        qemu_img(&folder, &["create", "-q", "-f", "qcow2", "disk", "4M"]);
        let open = || Disk::new(config(&folder.path("disk"), json!({ "io_engine": engine }))).unwrap();
        let mut disk = open();
        assert_eq!(disk.write(0, &pattern(1, CLUSTER)), Ok(()));
        disk.end();
        let image = File::options().write(true).open(folder.path("disk")).unwrap();
        let length = image.metadata().unwrap().len();
        image.set_len(length / CLUSTER as u64 * CLUSTER as u64 - CLUSTER as u64 + 1000).unwrap();
        let mut expected = pattern(1, CLUSTER);
        expected[1000..].fill(0);
        let mut disk = open();
        assert!(disk.read(0, CLUSTER).unwrap() == expected, "{engine}");
    }
}
