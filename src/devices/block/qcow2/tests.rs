//! Tests of how the file of an image is read and written, by one request or by none.

use super::medium::record::{self, Step};
use super::model::{CLUSTER, ImageForm, Opened, PACKED_MAX, PLAIN, image, open, open_again, walk};
use super::tables::HELD_MAX;
use crate::devices::block::config::{Backing, CacheType, Config, Format, Patch};
use crate::devices::kind::DeviceConfig;
use crate::host::Host;
use crate::virtio::buffers::Buffers;

#[test]
fn a_sync_that_failed_in_a_write_fails_every_flush_after_it() {
    let opened = open(&image(PLAIN), CacheType::Writeback);
    opened.write(1, 0, 4);
    opened.qcow2.flush(true).unwrap();
    // Acknowledged, and not yet flushed.
    opened.write(2, 0, 1);
    // Clusters that were given back must be durable before one is allocated again: the next write syncs.
    opened.qcow2.discard(2 * CLUSTER as u64, CLUSTER as u64).unwrap();
    record::fail_next_sync();
    let mut buffers = Buffers::new(opened.memory.clone());
    buffers.add_piece(0, CLUSTER as u32).unwrap();
    opened.qcow2.write(&mut buffers, 300 * CLUSTER as u64).unwrap_err();
    for _ in 0..3 {
        opened.qcow2.flush(true).expect_err("the host has told of the loss, and only once");
    }
    // The image that is opened anew is written whole, and flushed again.
    let again = opened.qcow2.again(&opened.config, &mut Host::default()).unwrap();
    again.flush(true).unwrap();
    let content = walk(&opened.content()).unwrap();
    assert_eq!(content[..4], [2, 1, 0, 1]);
}

/// How many syncs `work` brings to the file.
fn syncs(work: impl FnOnce()) -> usize {
    record::begin();
    work();
    record::end().iter().filter(|step| matches!(step, Step::Sync)).count()
}

#[test]
fn a_request_for_many_compressed_clusters_commits_once() {
    const LENGTH: u64 = PACKED_MAX as u64 * CLUSTER as u64;
    type Work = fn(&Opened);
    let works: [(&str, u64, Work); 4] = [
        ("discard", 0, |opened| opened.qcow2.discard(0, LENGTH).unwrap()),
        ("zero", 0, |opened| opened.qcow2.zero(0, LENGTH, false).unwrap()),
        ("unmap", 0, |opened| opened.qcow2.zero(0, LENGTH, true).unwrap()),
        ("write", 3, |opened| opened.write(3, 0, PACKED_MAX as u64)),
    ];
    for (what, number, work) in works {
        for (has_snapshot, every) in [(false, 1), (false, 2), (true, 1), (true, 2)] {
            let kind = ImageForm { order: 3, sectors: 200, packed: PACKED_MAX, has_snapshot, ..PLAIN };
            let opened = open(&image(kind), CacheType::Writeback);
            let what = format!("{what}, {has_snapshot}, one of {every}");
            // Between them what does not follow on them: zeros, which have no place.
            if every > 1 {
                let sectors = (1..PACKED_MAX as u64).step_by(every);
                sectors.for_each(|sector| {
                    opened.qcow2.discard(sector * CLUSTER as u64, CLUSTER as u64).unwrap()
                });
                opened.qcow2.flush(true).unwrap();
            }
            let syncs = syncs(|| work(&opened));
            // A commit, because a table was copied: three syncs at most.
            assert!(syncs <= 3, "{what}: {syncs} syncs");
            opened.qcow2.flush(true).unwrap();
            let content = walk(&opened.content()).unwrap();
            assert!(content[..PACKED_MAX].iter().all(|found| *found == number), "{what}");
        }
    }
}

#[test]
fn one_request_to_give_back_own_clusters_holds_no_more() {
    const TABLES: usize = HELD_MAX / CLUSTER * 4;
    /// A table tells of so many sectors.
    const TOLD: u64 = CLUSTER as u64 / 8;
    let sectors = TABLES as u64 * TOLD;
    for is_zero in [false, true] {
        let opened = open(&image(ImageForm { sectors, ..PLAIN }), CacheType::Writeback);
        for table in 0..TABLES as u64 {
            opened.write(1, table * TOLD, 1);
        }
        opened.qcow2.flush(true).unwrap();
        let length = sectors * CLUSTER as u64;
        let syncs = syncs(|| match is_zero {
            false => opened.qcow2.discard(0, length).unwrap(),
            true => opened.qcow2.zero(0, length, false).unwrap(),
        });
        assert!(syncs > 0, "zero: {is_zero}: all is held");
        opened.qcow2.flush(true).unwrap();
        assert!(walk(&opened.content()).unwrap().iter().all(|number| *number == 0));
    }
}

/// An image whose autoclear features are on.
fn claiming(kind: ImageForm) -> Vec<u8> {
    let mut image = image(kind);
    image[95] = 3;
    image
}

#[test]
fn an_image_that_is_only_opened_or_refused_stays_as_it_is() {
    let before = claiming(PLAIN);
    let opened = open(&before, CacheType::Writeback);
    // Nor is one that is read, flushed, and asked for where a read may be.
    let mut buffers = Buffers::new(opened.memory.clone());
    buffers.add_piece(0, CLUSTER as u32).unwrap();
    opened.qcow2.read(&mut buffers, 0).unwrap();
    assert!(opened.qcow2.place(0, CLUSTER as u64, false).is_some());
    opened.qcow2.flush(true).unwrap();
    let Opened { qcow2, file, mut config, .. } = opened;
    drop(qcow2);
    let content = || std::fs::read(file.as_path()).unwrap();
    assert!(content() == before, "opened, and read");
    // Refused when all else is read: nothing is beneath it.
    config.backing = Some(vec![Backing { path_on_host: file.as_path().to_owned(), format: Format::Raw }]);
    open_again(&config).err().expect("it is refused");
    assert!(content() == before, "refused");
    (config.backing, config.is_read_only) = (None, true);
    drop(open_again(&config).unwrap());
    assert!(content() == before, "opened to be read");
}

#[test]
fn autoclear_features_are_off_before_anything_is_written() {
    type Work = fn(&Opened);
    let works: [(&str, Work); 5] = [
        ("write in place", |opened| opened.write(2, 0, 1)),
        ("place", |opened| assert!(opened.qcow2.place(0, CLUSTER as u64, true).is_some())),
        ("grow", |opened| opened.write(2, 300, 1)),
        ("discard", |opened| opened.qcow2.discard(0, CLUSTER as u64).unwrap()),
        ("zero", |opened| opened.qcow2.zero(0, CLUSTER as u64 / 2, false).unwrap()),
    ];
    for (what, work) in works {
        for (cache_type, is_durable) in [(CacheType::Writeback, true), (CacheType::Unsafe, false)] {
            let opened = open(&claiming(PLAIN), cache_type);
            record::begin();
            work(&opened);
            let steps = record::end();
            let is_off = |step: &Step| matches!(step, Step::Write { offset: 88, bytes } if *bytes == [0; 8]);
            assert!(steps.first().is_some_and(is_off), "{what}");
            let is_synced = steps.get(1).is_some_and(|step| matches!(step, Step::Sync));
            assert_eq!(is_synced, is_durable, "{what}");
            opened.qcow2.flush(true).unwrap();
            assert_eq!(opened.content()[88..96], [0; 8], "{what}");
        }
    }
}

#[test]
fn an_image_of_version_2_is_read_as_it_is() {
    let mut image = image(ImageForm { version: 2, has_base: true, ..PLAIN });
    // The name of what is beneath lies where later versions have their marks.
    let name = b"backing-name";
    image[8..16].copy_from_slice(&72_u64.to_be_bytes());
    image[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
    image[72..72 + name.len()].copy_from_slice(name);
    let Opened { file, mut config, .. } = open(&image, CacheType::Writeback);
    (config.backing, config.is_read_only) = (None, true);
    let error = open_again(&config).err().expect("nobody says where that is");
    assert!(error.to_string().contains("`backing-name`"), "{error}");
    assert!(std::fs::read(file.as_path()).unwrap() == image);
}

#[test]
fn another_image_has_nothing_of_what_is_beneath_the_first() {
    let list = |path: &str| vec![Backing { path_on_host: path.into(), format: Format::Raw }];
    let first = Config { format: Format::Qcow2, backing: Some(list("/b")), ..Config::new("d", "/d") };
    for (path, given, expected) in [
        ("/d", None, Some(list("/b"))),
        ("/e", None, None),
        ("/e", Some(list("/c")), Some(list("/c"))),
        ("/d", Some(list("/c")), Some(list("/c"))),
    ] {
        let patch = Patch {
            drive_id: "d".to_owned(),
            path_on_host: Some(path.into()),
            backing: given,
            rate_limiter: None,
        };
        let new = first.patched(&patch).unwrap();
        assert_eq!((new.path_on_host, new.backing), (Some(path.into()), expected), "{path}");
    }
}
