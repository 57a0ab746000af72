//! Flushes, from one queue or several, that succeed or fail.

use super::*;

/// Four flushes on each queue at once, with a pause meanwhile or without; how they are answered.
fn flush_at_once(disk: &mut Disk, queues: usize, pauses: bool) -> Vec<u8> {
    let all = |queues| (0..queues).flat_map(|queue| (0..4).map(move |slot| (queue, slot)));
    all(queues).for_each(|(queue, slot)| disk.put(queue, slot, FLUSH, 0, 0));
    (0..queues).for_each(|queue| disk.kick(queue));
    if pauses {
        disk.pause();
        disk.resume();
    }
    for (queue, _) in all(queues) {
        disk.wait(queue);
    }
    all(queues).map(|(queue, slot)| disk.status(queue, slot)).collect()
}

/// Three queues of a disk, whose image `make` makes at a path, each with several flushes at once.
fn flush_several_queues(format: &str, make: impl Fn(&Path)) {
    for (engine, threads) in ENGINES.iter().flat_map(|engine| [(engine, 1), (engine, 3)]) {
        let folder = Folder::on_disk();
        let path = folder.path(format);
        make(&path);
        let more = json!({ "num_queues": 3, "threads": threads, "format": format });
        let mut disk = Disk::new(config(&path, engine, more)).unwrap();
        for round in 0..60 {
            assert_eq!(disk.write(round, &pattern(round, 512)), OK);
            let statuses = flush_at_once(&mut disk, 3, round % 2 == 0);
            assert_eq!(statuses, [0; 12], "{engine}, {threads} threads, {format}, round {round}");
        }
        assert!(!disk.is_broken());
    }
}

#[test]
fn flushes_of_several_queues_are_all_answered() {
    flush_several_queues("raw", |path| File::create(path).unwrap().set_len(1 << 20).unwrap());
}

#[test]
fn flushes_of_several_queues_of_a_qcow2_image_are_answered() {
    flush_several_queues("qcow2", |path| {
        output("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1M"]);
    });
}

#[test]
fn after_a_flush_that_failed_no_flush_succeeds() {
    let folder = Folder::on_disk();
    let place = folder.path("small");
    std::fs::create_dir(&place).unwrap();
    // A device over a hole of a full file system takes what is written, and finds no room for it when it is
    // written back: the host tells that once.
    mount_tmpfs(&place, 64 << 10);
    let images: Vec<_> = (0..2 * ENGINES.len()).map(|number| place.join(format!("image{number}"))).collect();
    for image in &images {
        File::create(image).unwrap().set_len(1 << 20).unwrap();
    }
    assert!(std::fs::write(place.join("filler"), vec![0; 65 << 10]).is_err());
    for (number, (engine, queues)) in ENGINES.iter().flat_map(|e| [(e, 1), (e, 2)]).enumerate() {
        let what = format!("{engine}, {queues} queues");
        let device = BlockDevice::new(&images[number], 512);
        let mut disk =
            Disk::new(config(&device.path, engine, json!({ "num_queues": queues, "threads": queues })))
                .unwrap();
        assert_eq!(disk.flush(), OK, "{what}");
        for sector in [0, 128, 256, 384] {
            assert_eq!(disk.write(sector, &pattern(sector, 64 << 10)), OK, "{what}");
        }
        // The host tells one of those that are with it at the same time.
        assert_eq!(flush_at_once(&mut disk, queues, false), vec![1; 4 * queues], "{what}");
        for _ in 0..3 {
            assert_eq!(disk.flush(), IO_ERROR, "a flush succeeds though data is gone: {what}");
        }
        assert_eq!(disk.write(0, &[1; 512]).and(disk.read(0, 512).map(drop)), OK, "{what}");
        assert_eq!(disk.flush(), IO_ERROR, "{what}");
        assert!(!disk.is_broken());
        // Whoever names an image says that what is in it now is what is wanted.
        let (other, _) = image(&folder, 1 << 20);
        disk.patch(json!({ "drive_id": "d", "path_on_host": other })).unwrap();
        assert_eq!(disk.write(0, &[1; 512]).and(disk.flush()), OK, "{what}");
    }
    output("umount", &["-l", place.to_str().unwrap()]);
}
