//! Block devices of the host as disks.

use super::*;

#[test]
fn a_block_device_is_a_disk_whose_blocks_go_to_it_and_are_given_back() {
    for (engine, direct_io, block) in
        ENGINES.iter().flat_map(|e| [(e, false, 512), (e, false, 4096), (e, true, 512), (e, true, 4096)])
    {
        let what = format!("{engine}, direct: {direct_io}, blocks of {block}");
        let folder = Folder::on_disk();
        let (path, file) = image(&folder, 1 << 20);
        let device = BlockDevice::new(&path, block);
        println!("{what}: {}", device.path.display());
        let more = json!({ "direct_io": direct_io });
        let mut disk = Disk::new(config(&device.path, engine, more.clone())).unwrap();
        assert_eq!((disk.config(0, 8), disk.config(20, 4)), (2048, block), "{what}");
        assert_eq!(disk.features() >> 13 & 3, 3, "{what}");
        let mut expected = pattern(0, 1 << 20);
        for misalignment in [0, 512, 24] {
            disk.misalignment = misalignment;
            let new = pattern(misalignment + 1, 32 << 10);
            assert_eq!(disk.write(64, &new), OK, "{what}");
            assert_eq!(disk.flush(), OK, "{what}");
            expected[32 << 10..64 << 10].copy_from_slice(&new);
            // Flushed: beneath the device's own page cache.
            assert!(content(&file, 0, 1 << 20) == expected, "{what}");
            assert!(disk.read(64, 32 << 10).unwrap() == new, "{what}");
        }
        let blocks = || file.metadata().unwrap().blocks();
        file.sync_all().unwrap();
        let before = blocks();
        assert_eq!(disk.ranges(DISCARD, &[(0, 64, 0), (256, 128, 0)]), OK, "{what}");
        assert_eq!(blocks(), before - 192, "{what}");
        assert_eq!(disk.ranges(WRITE_ZEROES, &[(512, 128, 1)]), OK, "{what}");
        assert_eq!(blocks(), before - 320, "{what}");
        assert_eq!(disk.ranges(WRITE_ZEROES, &[(640, 128, 0), (1024, 8, 0)]), OK, "{what}");
        assert_eq!(disk.flush(), OK);
        for zeros in [0..64, 256..384, 512..768, 1024..1032] {
            expected[zeros.start * 512..zeros.end * 512].fill(0);
        }
        assert!(content(&file, 0, 1 << 20) == expected, "{what}");
        // The file system may need a block for what it notes of the file.
        assert!(blocks() >= before - 320, "zeros that are not to be given back keep their blocks: {what}");
        let sub = if block == 512 { OK } else { IO_ERROR };
        assert_eq!(disk.read(1, 512).map(drop), sub, "{what}");
        assert_eq!(disk.ranges(WRITE_ZEROES, &[(1025, 1, 0)]), sub, "{what}");
        for sector in [2048, 2041, u64::MAX / 512] {
            assert_eq!(disk.read(sector, 4096).map(drop), IO_ERROR, "{what} {sector}");
            assert_eq!(disk.write(sector, &[1; 4096]), IO_ERROR, "{what} {sector}");
            assert_eq!(disk.ranges(DISCARD, &[(sector, 8, 0)]), IO_ERROR, "{what} {sector}");
        }
        assert_eq!(disk.flush(), OK);
        assert!(content(&file, 0, 1 << 20) == expected, "{what}");
        let error = Disk::new(config(&device.path, engine, more)).err().unwrap();
        assert!(error.contains("it is in use by"), "{error}");
        // The host device grows.
        file.set_len(2 << 20).unwrap();
        device.measure_again();
        disk.was_interrupted();
        disk.patch(json!({ "drive_id": "d", "path_on_host": device.path })).unwrap();
        assert!(disk.was_interrupted(), "the guest is not told: {what}");
        assert_eq!(disk.config(0, 8), 4096, "{what}");
        assert_eq!(disk.write(4088, &[1; 4096]), OK, "{what}");
        assert!(!disk.is_broken());
    }
}

#[test]
fn many_requests_in_flight_on_a_block_device_all_reach_their_places() {
    for engine in ENGINES {
        for (direct_io, block) in [(false, 512), (true, 512), (true, 4096)] {
            let folder = Folder::on_disk();
            let (path, _) = image(&folder, 8 << 20);
            let device = BlockDevice::new(&path, block);
            let more = json!({ "num_queues": 2, "threads": 2, "direct_io": direct_io });
            let mut disk = Disk::new(config(&device.path, engine, more)).unwrap();
            shuffle(&mut disk, 2, 1);
        }
    }
}

#[test]
fn a_block_device_that_is_in_use_is_not_written() {
    let folder = Folder::on_disk();
    let (path, _) = image(&folder, 1 << 20);
    let device = BlockDevice::new(&path, 512);
    let node = device.path.to_str().unwrap();
    let open = |more| Disk::new(config(&device.path, "Sync", more));
    output("mke2fs", &["-q", "-F", node]);
    // Mounted on the host, if only for reading.
    let place = folder.path("mounted");
    std::fs::create_dir(&place).unwrap();
    mount_tmpfs(&place, 4096);
    let mounted = place.to_str().unwrap();
    for options in ["rw", "ro"] {
        output("mount", &["-o", options, node, mounted]);
        let error = open(json!({})).err().unwrap();
        assert!(error.contains(&format!("open disk `d` `{node}`: it is in use by")), "{error}");
        assert!(error.contains(&format!("mounted at `{mounted}`")), "{error}");
        assert!(error.contains("`\"lock\": false`, `lock=off`"), "{error}");
        assert!(open(json!({ "is_read_only": true })).is_ok());
        assert!(open(json!({ "lock": false })).is_ok());
        output("umount", &[mounted]);
    }
    // Ours, by another node of the same device: a lock on a node's inode does not tell.
    let mut disk = open(json!({})).unwrap();
    let other = folder.path("node");
    let number = std::fs::metadata(&device.path).unwrap().rdev();
    let (major, minor) = (libc::major(number).to_string(), libc::minor(number).to_string());
    output("mknod", &[other.to_str().unwrap(), "b", &major, &minor]);
    let error = Disk::new(config(&other, "Sync", json!({}))).err().unwrap();
    assert!(error.contains("it is in use by another disk or pmem device of this microVM"), "{error}");
    for path in [&device.path, &other] {
        disk.patch(json!({ "drive_id": "d", "path_on_host": path })).unwrap();
        assert_eq!(disk.write(0, &[1; 512]), OK);
    }
    drop(disk);
    // A process that another test has just started may hold the device until it has become its program.
    wait_for(|| open(json!({})).is_ok());
    output("umount", &[mounted]);
}

#[test]
fn a_disk_of_which_a_partition_is_in_use_is_not_written() {
    let folder = Folder::on_disk();
    let (path, _) = image(&folder, 4 << 20);
    let (device, part) = BlockDevice::with_partition(&path, 1 << 20, 2 << 20);
    let whole = device.path.clone();
    output("mke2fs", &["-q", "-F", part.to_str().unwrap()]);
    let place = folder.path("mounted");
    std::fs::create_dir(&place).unwrap();
    mount_tmpfs(&place, 4096);
    let mounted = place.to_str().unwrap();
    let open = |path: &Path, more| Disk::new(config(path, "Sync", more)).map(drop);
    for options in ["rw", "ro"] {
        output("mount", &["-o", options, part.to_str().unwrap(), mounted]);
        for (path, what) in [(&whole, "a part of it"), (&part, "it")] {
            let error = open(path, json!({})).unwrap_err();
            let reason = format!("it is in use by the host, which has {what} mounted at `{mounted}`");
            assert!(error.contains(&reason), "{error}");
            open(path, json!({ "is_read_only": true })).unwrap();
            open(path, json!({ "lock": false })).unwrap();
        }
        output("umount", &[mounted]);
    }
    // Of a disk and its partition, one is written at a time.
    let of_part = Disk::new(config(&part, "Sync", json!({}))).unwrap();
    let error = open(&whole, json!({})).unwrap_err();
    assert!(error.contains("it is in use by"), "{error}");
    drop(of_part);
    wait_for(|| open(&whole, json!({})).is_ok());
    output("umount", &[mounted]);
}

#[test]
fn a_block_device_that_cannot_be_written_is_only_read() {
    for engine in ENGINES {
        let folder = Folder::on_disk();
        let (path, _) = image(&folder, 1 << 20);
        let device = BlockDevice::read_only(&path);
        let error = Disk::new(config(&device.path, engine, json!({}))).err().unwrap();
        assert!(error.contains("the device cannot be written: `is_read_only` (`ro`)"), "{error}");
        let open = || Disk::new(config(&device.path, engine, json!({ "is_read_only": true }))).unwrap();
        let mut disks = [open(), open()];
        for disk in &mut disks {
            assert!(disk.read(2040, 4096).unwrap() == pattern(0, 1 << 20)[2040 * 512..]);
            assert_eq!(disk.write(0, &[1; 512]), IO_ERROR);
        }
    }
}

#[test]
fn a_block_device_that_cannot_give_back_offers_no_discard() {
    let test = || {
        for engine in ENGINES {
            let folder = Folder::on_disk();
            // Files in this kind of memory have no holes.
            common::mount(&folder.0, "ramfs", "mode=755");
            let (path, file) = image(&folder, 1 << 20);
            let device = BlockDevice::new(&path, 512);
            let error = Disk::new(config(&device.path, engine, json!({ "discard": true }))).err().unwrap();
            assert!(error.contains("blocks of it cannot be given back (`discard`)"), "{error}");
            let mut disk = Disk::new(config(&device.path, engine, json!({}))).unwrap();
            assert_eq!(disk.features() >> 13 & 3, 0);
            assert_eq!(disk.ranges(DISCARD, &[(0, 8, 0)]), UNSUPPORTED);
            assert_eq!(disk.write(0, &[1; 4096]), OK);
            assert_eq!(disk.flush(), OK);
            assert!(content(&file, 0, 4096) == [1; 4096]);
            disk.end();
            drop((device, file));
            common::output("umount", &["-l", folder.0.to_str().unwrap()]);
        }
    };
    std::thread::spawn(test).join().unwrap();
}
