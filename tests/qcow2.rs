//! qcow2 images under disks, made and checked by `qemu-img`: chains, snapshots, compression, and images
//! that are broken or say what is not so.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

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
    let output = Command::new("qemu-img").args(arguments).current_dir(&folder.0).output();
    let output = output.expect("qemu-img is needed: `apt-get install qemu-utils`");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
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
    (0..length as u64 / 8).flat_map(word).collect()
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

#[test]
fn a_chain_is_followed_within_its_folder_or_where_it_is_named() {
    let folder = Folder::new();
    let expected = chain(&folder, &[]);
    let create = |above: &str, beneath: &str, format: &str| {
        qemu_img(&folder, &["create", "-q", "-f", "qcow2", "-u", "-b", beneath, "-F", format, above, "4M"]);
    };
    create("top", "disk", "qcow2");
    std::fs::create_dir(folder.path("inner")).unwrap();
    create("inner/up", "../disk", "qcow2");
    create("absolute", folder.path("disk").to_str().unwrap(), "qcow2");
    symlink("disk", folder.path("link")).unwrap();
    create("linked", "link", "qcow2");
    let open = |name: &str, more: Value| Disk::new(config(&folder.path(name), more));
    for name in ["disk", "top", "absolute", "linked"] {
        assert!(content(&mut open(name, json!({})).unwrap()) == expected, "{name}");
    }
    // Above the folder; where a link leads out of it; what is no file.
    create("inner/deep", "../inner/../base", "raw");
    symlink("../base", folder.path("inner/out")).unwrap();
    create("inner/outside", "out", "raw");
    create("protocol", "nbd://127.0.0.1/x", "raw");
    create("json", r#"json:{"driver":"file","filename":"base"}"#, "raw");
    for (name, expected) in [
        ("inner/up", "outside the image's folder: name it in `backing`"),
        ("inner/deep", "outside the image's folder: name it in `backing`"),
        ("inner/outside", "outside the image's folder: name it in `backing`"),
        ("protocol", "it is not the path of a file"),
        ("json", "it is not the path of a file"),
    ] {
        let error = open(name, json!({})).err().unwrap();
        assert!(error.contains(expected) && error.contains("use the image beneath it, `"), "{name}: {error}");
    }
    let base = json!({ "path_on_host": folder.path("base"), "format": "raw" });
    let disk = json!({ "path_on_host": folder.path("disk"), "format": "qcow2" });
    for name in ["inner/up", "protocol"] {
        let chain = if name == "protocol" { json!([base]) } else { json!([disk, base]) };
        let mut named = open(name, json!({ "backing": chain })).unwrap();
        assert!(content(&mut named) == expected, "{name}");
    }
    let refused = |name: &str, backing: Value| open(name, json!({ "backing": backing })).err().unwrap();
    assert!(refused("inner/up", json!([disk])).contains("`backing` does not name it: add it"));
    assert!(refused("disk", json!([])).contains("`backing` does not name it: add it"));
    assert!(refused("disk", json!([base, base])).contains("but no image says that something is beneath"));
}

#[test]
fn what_cannot_be_beneath_is_said() {
    let folder = Folder::new();
    chain(&folder, &[]);
    let create = |above: &str, beneath: &str, more: &[&str]| {
        let options = ["create", "-q", "-f", "qcow2", "-u", "-b", beneath];
        qemu_img(&folder, &[&options, more, &[above, "4M"]].concat());
    };
    let qcow2 = &["-F", "qcow2"];
    create("missing", "nowhere", qcow2);
    create("itself", "other", qcow2);
    symlink("itself", folder.path("other")).unwrap();
    create("one", "two", qcow2);
    create("two", "one", qcow2);
    create("wrong", "base", qcow2);
    create("vmdk", "base", &["-F", "vmdk"]);
    create("format", "base", qcow2);
    // The extension that tells the format is made one that nobody knows.
    let image = File::options().read(true).write(true).open(folder.path("format")).unwrap();
    let mut header = [0; 512];
    image.read_exact_at(&mut header, 0).unwrap();
    let at = header.windows(4).position(|bytes| bytes == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    image.write_all_at(&[0x12, 0x34, 0x56, 0x78], at as u64).unwrap();
    for depth in 0..20 {
        let beneath = if depth == 0 { "disk".to_owned() } else { format!("deep{}", depth - 1) };
        create(&format!("deep{depth}"), &beneath, qcow2);
    }
    for (name, expected) in [
        ("missing", "use the image beneath it, `nowhere`: find it: No such file"),
        ("itself", "it is beneath itself: the images form a loop"),
        ("one", "it is beneath itself: the images form a loop"),
        ("wrong", "it is not a qcow2 image: give `raw` as its format"),
        ("vmdk", "its format `vmdk` is not supported"),
        ("format", "its format is not told, and never guessed"),
        ("deep19", "more than 16 images are beneath"),
    ] {
        let error = refused(config(&folder.path(name), json!({})));
        assert!(error.contains(expected), "{name}: {error}");
    }
    Disk::new(config(&folder.path("deep13"), json!({}))).unwrap();
}

#[test]
fn a_format_told_wrongly_is_an_error_or_exactly_that_format() {
    let folder = Folder::new();
    chain(&folder, &[]);
    let error = refused(config(&folder.path("base"), json!({})));
    assert!(error.contains("it is not a qcow2 image: give `raw` as its format"), "{error}");
    // A qcow2 image as a raw one is its own bytes: nothing is guessed from them.
    let raw = json!({ "format": "raw" });
    let mut disk = Disk::new(config(&folder.path("disk"), raw)).unwrap();
    assert_eq!(disk.read(0, 512).unwrap()[..4], *b"QFI\xfb");
}

#[test]
fn what_is_not_supported_is_said_with_what_to_do() {
    let folder = Folder::new();
    let create =
        |options: &str| qemu_img(&folder, &["create", "-q", "-f", "qcow2", "-o", options, "disk", "4M"]);
    for (options, expected) in [
        ("data_file=other", "its data is in another file, which is not followed"),
        ("compression_type=zstd", "its compression is not zlib"),
        ("extended_l2=on", "it has features that are not supported"),
    ] {
        create(options);
        let error = refused(config(&folder.path("disk"), json!({})));
        assert!(error.contains(expected), "{options}: {error}");
    }
    create("cluster_size=64k");
    let image = File::options().write(true).open(folder.path("disk")).unwrap();
    for (at, bytes, expected) in [
        (32, vec![0, 0, 0, 1], "it is encrypted"),
        (79, vec![1], "its reference counts are not in order: `qemu-img check -r all` it"),
        (79, vec![2], "it is marked as corrupt"),
        (4, vec![0, 0, 0, 9], "its header is broken: it tells of version 9"),
        (20, vec![0, 0, 0, 40], "its header is broken: it tells of clusters of 2^40 bytes"),
        (36, vec![0xff; 4], "a table of clusters of 34359738360 bytes, at most 33554432 are sane"),
        (24, vec![0x7f; 8], "for which its tables are too small"),
        (40, vec![0, 0, 1], "a table of clusters that is not within the file"),
        (56, vec![0, 0, 1, 0], "a table of reference counts of 16777216 bytes, at most 8388608 are sane"),
    ] {
        create("cluster_size=64k");
        image.write_all_at(&bytes, at).unwrap();
        let error = refused(config(&folder.path("disk"), json!({})));
        assert!(error.contains(expected), "{at}: {error}");
    }
}

#[test]
fn a_virtual_disk_that_grew_is_measured_again() {
    for engine in ["Sync", "Async"] {
        let folder = Folder::new();
        qemu_img(&folder, &["create", "-q", "-f", "qcow2", "disk", "1M"]);
        let path = folder.path("disk");
        let mut disk = Disk::new(config(&path, json!({ "io_engine": engine }))).unwrap();
        assert_eq!(disk.write(0, &pattern(9, 4096)), Ok(()));
        disk.pause();
        let resize = ["resize", "-q", "--shrink", "-f", "qcow2"];
        // Locked against others, as QEMU's own tools respect it: asked by force.
        let output = Command::new("qemu-img").args(resize).arg(&path).arg("4M").output().unwrap();
        assert!(!output.status.success(), "another process could write to an image in use");
        // What such a tool writes.
        let image = File::options().write(true).open(&path).unwrap();
        image.write_all_at(&(2_u64 << 20).to_be_bytes(), 24).unwrap();
        disk.resume();
        disk.was_interrupted();
        disk.patch(json!({ "drive_id": "d", "path_on_host": path })).unwrap();
        assert!(disk.was_interrupted(), "the guest is not told");
        assert_eq!(disk.config(0, 8), 4096);
        assert_eq!(disk.write(4095, &[1; 512]), Ok(()));
        assert!(disk.read(0, 4096).unwrap() == pattern(9, 4096));
        disk.end();
        qemu_img(&folder, &["check", "disk"]);
    }
}

#[test]
fn a_place_far_beyond_the_end_of_the_file_is_not_written() {
    const FAR: u64 = 1 << 40;
    for engine in ["Sync", "Async"] {
        for (what, table) in [("data", 1), ("a table", 0)] {
            let folder = Folder::new();
            qemu_img(&folder, &["create", "-q", "-f", "qcow2", "disk", "4M"]);
            let open = || Disk::new(config(&folder.path("disk"), json!({ "io_engine": engine }))).unwrap();
            let mut disk = open();
            assert_eq!(disk.write(0, &pattern(1, CLUSTER)), Ok(()));
            disk.end();
            // The first entry of the table of tables, or that of the table which it names.
            let image = File::options().read(true).write(true).open(folder.path("disk")).unwrap();
            let entry = |at: u64| {
                let mut entry = [0; 8];
                image.read_exact_at(&mut entry, at).unwrap();
                u64::from_be_bytes(entry)
            };
            let at = (0..table).fold(entry(40), |at, _| entry(at) & 0xff_ffff_ffff_fe00);
            let sound = entry(at);
            image.write_all_at(&(1 << 63 | FAR).to_be_bytes(), at).unwrap();
            let mut disk = open();
            let written = disk.write(0, &pattern(2, 4096));
            let zeros = disk.ranges(WRITE_ZEROES, &[(8, 8, 0)]);
            let flushed = disk.flush();
            match table {
                1 => assert_eq!((written, flushed), (Err(1), Ok(())), "{engine}"),
                // Tables are written late.
                _ => assert_eq!(flushed, Err(1), "{engine} {written:?} {zeros:?}"),
            }
            assert!(disk.read(0, 4096).is_ok(), "a read does no harm");
            assert!(!disk.is_broken());
            disk.end();
            let length = image.metadata().unwrap().len();
            assert!(length <= SIZE as u64, "{engine}, {what}: the file grew to {length} bytes");
            // It can be repaired.
            image.write_all_at(&sound.to_be_bytes(), at).unwrap();
            assert!(open().read(0, CLUSTER).unwrap() == pattern(1, CLUSTER), "{engine}, {what}");
        }
    }
}

#[test]
fn a_disk_written_all_over_again_and_again_stays_within_its_bounds() {
    // The smallest clusters, the largest reference counts: the most tables.
    for options in ["cluster_size=512,refcount_bits=64", "cluster_size=2M"] {
        let folder = Folder::new();
        qemu_img(&folder, &["create", "-q", "-f", "qcow2", "-o", options, "disk", "4M"]);
        for round in 1..4 {
            let mut expected = pattern(round, SIZE);
            let mut disk = Disk::new(config(&folder.path("disk"), json!({}))).unwrap();
            for at in (0..SIZE).step_by(CLUSTER) {
                assert_eq!(disk.write((at / 512) as u64, &expected[at..at + CLUSTER]), Ok(()), "{options}");
            }
            let half = (SIZE / 512 / 2) as u64;
            assert_eq!(disk.ranges(DISCARD, &[(half, half as u32, 0)]), Ok(()));
            assert_eq!(disk.flush(), Ok(()));
            expected[SIZE / 2..].fill(0);
            disk.end();
            check(&folder, &expected);
            // What was there stays in the snapshot: all of it is written anew.
            qemu_img(&folder, &["snapshot", "-c", &round.to_string(), "disk"]);
        }
    }
}

#[test]
fn an_image_may_lie_where_nothing_is_taken_back() {
    let test = || {
        let folder = Folder::on_disk();
        // Files in this kind of memory have no holes.
        common::mount(&folder.0, "ramfs", "mode=755");
        let mut expected = chain(&folder, &[]);
        let mut disk = Disk::new(config(&folder.path("disk"), json!({}))).unwrap();
        scribble(&mut disk, &mut expected, 11);
        assert_eq!(disk.ranges(DISCARD, &[(0, (SIZE / 512) as u32, 0)]), Ok(()));
        expected.fill(0);
        scribble(&mut disk, &mut expected, 12);
        assert_eq!(disk.flush(), Ok(()));
        disk.end();
        check(&folder, &expected);
        common::output("umount", &["-l", folder.0.to_str().unwrap()]);
    };
    std::thread::spawn(test).join().unwrap();
}

#[test]
fn a_host_without_room_is_an_error_for_the_guest_and_no_harm_to_the_image() {
    let test = || {
        let folder = Folder::on_disk();
        common::mount_tmpfs(&folder.0, 1 << 20);
        qemu_img(&folder, &["create", "-q", "-f", "qcow2", "disk", "4M"]);
        let mut disk = Disk::new(config(&folder.path("disk"), json!({}))).unwrap();
        let mut expected = vec![0; SIZE];
        let mut refused = 0;
        for cluster in 0..SIZE / CLUSTER {
            let at = cluster * CLUSTER;
            let bytes = pattern(at as u64, CLUSTER);
            match disk.write((at / 512) as u64, &bytes) {
                Ok(()) => expected[at..at + CLUSTER].copy_from_slice(&bytes),
                Err(_) => refused += 1,
            }
            if cluster == 0 {
                // The tables have their places.
                assert_eq!(disk.flush(), Ok(()));
            }
        }
        assert!((40..60).contains(&refused), "{refused}");
        assert!(content(&mut disk) == expected, "what was refused is as it was");
        assert_eq!(disk.ranges(DISCARD, &[(0, 512, 0)]), Ok(()));
        expected[..4 * CLUSTER].fill(0);
        let bytes = pattern(5, 4096);
        assert_eq!(disk.write(6144, &bytes), Ok(()), "there is room again");
        expected[3 << 20..(3 << 20) + 4096].copy_from_slice(&bytes);
        assert_eq!(disk.flush(), Ok(()));
        disk.end();
        let roomy = Folder::on_disk();
        std::fs::copy(folder.path("disk"), roomy.path("disk")).unwrap();
        check(&roomy, &expected);
        common::output("umount", &["-l", folder.0.to_str().unwrap()]);
    };
    std::thread::spawn(test).join().unwrap();
}

#[test]
fn an_image_may_be_in_a_block_device_however_large() {
    for (engine, length) in [("Sync", 64 << 20), ("Async", 5 << 30)] {
        let folder = Folder::on_disk();
        let file = folder.write("file", []);
        File::options().write(true).open(&file).unwrap().set_len(length).unwrap();
        let device = BlockDevice::new(&file, 512);
        let path = device.path.to_str().unwrap();
        qemu_img(&folder, &["create", "-q", "-f", "qcow2", path, "4M"]);
        let mut disk = Disk::new(config(&device.path, json!({ "io_engine": engine }))).unwrap();
        let mut expected = vec![0; SIZE];
        scribble(&mut disk, &mut expected, 13);
        assert_eq!(disk.ranges(DISCARD, &[(1024, 1024, 0)]), Ok(()));
        expected[512 << 10..1 << 20].fill(0);
        assert!(content(&mut disk) == expected, "{engine}");
        disk.end();
        let mut disk = Disk::new(config(&device.path, json!({ "io_engine": engine }))).unwrap();
        assert!(content(&mut disk) == expected, "{engine}");
        disk.end();
        folder.write("expected", &expected);
        qemu_img(&folder, &["check", "-f", "qcow2", path]);
        qemu_img(&folder, &["compare", "-f", "qcow2", "-F", "raw", path, "expected"]);
    }
}

/// The most memory that this process has had, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[test]
fn two_hundred_damaged_images_are_refused_or_read_and_nothing_worse() {
    let folder = Folder::new();
    let mut sound = chain(&folder, &[]);
    let mut disk = Disk::new(config(&folder.path("disk"), json!({}))).unwrap();
    scribble(&mut disk, &mut sound, 8);
    disk.end();
    let image = std::fs::read(folder.path("disk")).unwrap();
    let mut random = 1_u64;
    let mut pick = |below: usize| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (random >> 33) as usize % below
    };
    let before = peak();
    let (mut works, mut refused) = (0, 0);
    for round in 0..200 {
        let mut damaged = image.clone();
        // The header, then the tables: L1, refcounts and L2 are within the first clusters.
        let reach = if round % 2 == 0 { 256 } else { damaged.len() };
        for _ in 0..1 + pick(4) {
            let at = match pick(3) {
                0 => pick(reach),
                1 => pick(reach.min(112)) & !7,
                _ => pick(reach / CLUSTER + 1) * CLUSTER + pick(64),
            };
            let length = 1 + pick(8);
            let value = [0, 0xff, 0x7f, 0x80, 1, pick(256) as u8][pick(6)];
            let at = at.min(image.len() - 1);
            damaged[at..(at + length).min(image.len())].fill(value);
        }
        if pick(10) == 0 {
            damaged.truncate(pick(image.len()));
        }
        folder.write("damaged", &damaged);
        match Disk::new(config(&folder.path("damaged"), json!({}))) {
            Ok(mut disk) => {
                works += 1;
                for _ in 0..20 {
                    let sector = pick(SIZE / 512) as u64;
                    // Whatever comes: the guest gets an answer.
                    let _ = disk.read(sector, 4096);
                    let _ = disk.write(sector, &[1; 4096]);
                    let _ = disk.ranges(DISCARD, &[(sector, 256, 0)]);
                }
                let _ = disk.flush();
                assert!(!disk.is_broken());
            }
            Err(error) => {
                refused += 1;
                assert!(error.contains("damaged`: "), "{error}");
            }
        }
    }
    println!("{works} could be used, {refused} were refused");
    assert!(works > 20 && refused > 20);
    let grown = peak() - before;
    assert!(grown < 100 << 20, "{} MiB more were needed", grown >> 20);
}

#[test]
fn a_shrunk_image_opens_and_a_marked_one_is_only_read() {
    let folder = Folder::new();
    // Blocks of reference counts that tell of nothing are gone, but not the last one.
    let expected = pattern(3, SIZE);
    folder.write("raw", &expected);
    let options = "cluster_size=512,refcount_bits=64";
    qemu_img(&folder, &["convert", "-q", "-f", "raw", "-O", "qcow2", "-o", options, "raw", "disk"]);
    qemu_img(&folder, &["resize", "-q", "--shrink", "-f", "qcow2", "disk", "1M"]);
    let image = File::options().read(true).write(true).open(folder.path("disk")).unwrap();
    let entry = |at: u64| {
        let mut entry = [0; 8];
        image.read_exact_at(&mut entry, at).unwrap();
        u64::from_be_bytes(entry)
    };
    let blocks: Vec<u64> = (0..64).map(|index| entry(entry(48) + index * 8)).collect();
    assert!(blocks.contains(&0), "{blocks:?}");
    let mut disk = Disk::new(config(&folder.path("disk"), json!({}))).unwrap();
    let mut expected = expected[..1 << 20].to_vec();
    for at in (0..1 << 20).step_by(CLUSTER) {
        let bytes = pattern(at as u64, 8192);
        assert_eq!(disk.write((at / 512) as u64, &bytes), Ok(()));
        expected[at..at + 8192].copy_from_slice(&bytes);
    }
    disk.end();
    check(&folder, &expected);
    // Marked, it is read, itself and beneath another one.
    qemu_img(&folder, &["create", "-q", "-f", "qcow2", "-b", "disk", "-F", "qcow2", "above", "1M"]);
    for (mark, reason) in [(1, "its reference counts are not in order"), (2, "it is marked as corrupt")] {
        image.write_all_at(&[mark], 79).unwrap();
        let error = refused(config(&folder.path("disk"), json!({})));
        assert!(error.contains(reason) && error.contains("it can only be read (`is_read_only`"), "{error}");
        for (name, read_only) in [("disk", true), ("above", false)] {
            let more = json!({ "is_read_only": read_only });
            let mut disk = Disk::new(config(&folder.path(name), more)).unwrap();
            assert!(disk.read(128, CLUSTER).unwrap() == expected[CLUSTER..2 * CLUSTER], "{name} {mark}");
        }
        image.write_all_at(&[0], 79).unwrap();
    }
    image.write_all_at(&[1], 7).unwrap();
    let error = refused(config(&folder.path("disk"), json!({ "is_read_only": true })));
    assert!(error.contains("it is a qcow image of version 1, which is not supported"), "{error}");
}

/// The environment variable by which a test tells its own program, started again, which image to write to.
const VICTIM: &str = "ALULA_TEST_VICTIM";
/// How often the process is killed, if that is told.
const KILLS: &str = "ALULA_TEST_KILLS";
const QUEUES: usize = 3;
/// Sectors of a block, each of which is written at once; a queue has those whose number it is modulo 3.
const BLOCK: usize = 8;

/// What the `number`th round of a victim does with a block, if anything: bytes of that value, or zeros.
fn deed(seed: u64, round: u64, block: usize) -> Option<(u32, u8)> {
    let hash = (seed << 40 ^ round << 20 ^ block as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    match hash % 64 {
        0..8 => Some((OUT, 1 + (hash >> 8) as u8 % 250)),
        8 => Some((DISCARD, 0)),
        9 => Some((WRITE_ZEROES, 0)),
        _ => None,
    }
}

/// Not a test, but the process that is killed: writes and flushes, and tells on its output what it did.
#[test]
fn a_victim_writes_until_it_is_killed() {
    let Ok(victim) = std::env::var(VICTIM) else { return };
    let (seed, path) = victim.split_once(':').unwrap();
    let seed = seed.parse().unwrap();
    let more = json!({ "num_queues": QUEUES, "threads": QUEUES });
    let mut disk = Disk::new(config(Path::new(path), more)).unwrap();
    let can_discard = disk.features() >> 13 & 1 == 1;
    for round in 0.. {
        eprintln!("begun {round}");
        let mut in_flight = [0; QUEUES];
        for block in 0..SIZE / 512 / BLOCK {
            let Some((kind, value)) = deed(seed, round, block).filter(|deed| deed.0 == OUT || can_discard)
            else {
                continue;
            };
            let (queue, sector) = (block % QUEUES, (block * BLOCK) as u64);
            let slot = in_flight[queue];
            let data = match kind {
                OUT => vec![value; BLOCK * 512],
                _ => [&sector.to_le_bytes()[..], &(BLOCK as u32).to_le_bytes(), &[0; 4]].concat(),
            };
            disk.set_data(queue, slot, &data);
            disk.put(queue, slot, kind, sector, data.len());
            in_flight[queue] += 1;
        }
        (0..QUEUES).for_each(|queue| disk.kick(queue));
        for (queue, in_flight) in in_flight.into_iter().enumerate() {
            (0..in_flight).for_each(|_| assert_eq!(disk.wait(queue).1, 1));
        }
        assert_eq!(disk.flush(), Ok(()));
        eprintln!("flushed {round}");
    }
}

#[test]
fn an_image_whose_process_is_killed_has_all_that_was_flushed() {
    use std::io::{BufRead, BufReader};
    let kills = std::env::var(KILLS).map_or(20, |kills| kills.parse().unwrap());
    for seed in 0..kills {
        let folder = Folder::new();
        let options =
            ["cluster_size=4k", "compat=0.10", "lazy_refcounts=on", "cluster_size=512,refcount_bits=64"];
        qemu_img(&folder, &["create", "-q", "-f", "qcow2", "-o", options[seed as usize % 4], "disk", "4M"]);
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_victim_writes_until_it_is_killed", "--nocapture"])
            .env(VICTIM, format!("{seed}:{}", folder.path("disk").display()))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // It is killed some lines later, in the middle of something.
        let mut lines = BufReader::new(victim.stderr.take().unwrap()).lines().map_while(Result::ok);
        let mut told: Vec<String> = lines.by_ref().take(2 + seed as usize % 5).collect();
        std::thread::sleep(std::time::Duration::from_micros(seed * 7919 % 5000));
        victim.kill().unwrap();
        victim.wait().unwrap();
        told.extend(lines);
        let count = |word: &str| told.iter().filter(|line| line.starts_with(word)).count() as u64;
        let (begun, flushed) = (count("begun "), count("flushed "));
        assert!(flushed > 0 || begun == 1, "{told:?}");
        // Without a version that knows zeros, nothing is given back; of large clusters, no part.
        let does = move |kind| kind == OUT || seed % 4 != 1 && (kind != DISCARD || seed % 4 != 2);
        let deeds = |block, rounds: std::ops::Range<u64>| {
            let of = move |round| deed(seed, round, block).filter(|deed| does(deed.0));
            rounds.filter_map(of).map(|(_, value)| value).collect::<Vec<u8>>()
        };
        let status =
            Command::new("qemu-img").args(["check", "-q", "disk"]).current_dir(&folder.0).status().unwrap();
        // 3: clusters that nothing uses.
        assert!(matches!(status.code(), Some(0 | 3)), "{seed}: {status}");
        let mut disk = Disk::new(config(&folder.path("disk"), json!({}))).unwrap();
        let found = content(&mut disk);
        for (block, bytes) in found.chunks(BLOCK * 512).enumerate() {
            let mut allowed = deeds(block, flushed..begun);
            allowed.push(deeds(block, 0..flushed).last().copied().unwrap_or(0));
            for sector in bytes.chunks(512) {
                assert!(sector.iter().all(|byte| *byte == sector[0]), "{seed}: block {block} is mixed");
                assert!(
                    allowed.contains(&sector[0]),
                    "{seed}: block {block} is {}, not of {allowed:?}",
                    sector[0]
                );
            }
        }
        assert_eq!(disk.write(0, &found[..512]), Ok(()));
        disk.end();
        let raw = folder.write("expected", &found);
        qemu_img(&folder, &["compare", "-f", "qcow2", "-F", "raw", "disk", raw.to_str().unwrap()]);
    }
}
