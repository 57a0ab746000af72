//! How large an image grows, and where it finds no room.

use super::*;

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
        // The image is locked against other programs, and QEMU's tools heed the lock.
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
            // The image can be repaired.
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
