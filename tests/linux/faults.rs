//! Disks on devices of the host that fail, by device-mapper, which the kernels of the rigs have: no guest, but the
//! driver's side of the queues.

use alula::history::{self, Reader};
use serde_json::Value;

use super::common::loopback::{BlockDevice, Mapped};
use super::*;

const SECTORS: u64 = 4096;
/// The device fails from this sector on.
const BAD: u64 = 2048;
/// The status of an answer: VIRTIO_BLK_S_IOERR.
const IO_ERROR: Result<(), u8> = Err(1);
const OK: Result<(), u8> = Ok(());

/// Engines, and whether they go past the page cache: as many as have room for their errors among the events of ten seconds
/// (`DEVICE_ERRORS_MAX` of src/history.rs).
const KINDS: [(&str, bool); 3] = [("Sync", false), ("Async", false), ("Async", true)];

/// A disk under Writeback on a device of device-mapper's, over a loop device, over a file.
struct Bench {
    what: String,
    image: PathBuf,
    under: BlockDevice,
    mapped: Mapped,
    disk: Disk,
    events: Reader,
    _folder: Folder,
}

impl Bench {
    fn new((engine, direct_io): (&str, bool)) -> Self {
        history::open("vm");
        let folder = Folder::on_disk();
        let image = folder.write("image", vec![0; 512 * SECTORS as usize]);
        let under = BlockDevice::new(&image, 512);
        let mapped = Mapped::new(&[(SECTORS, "linear", &format!("{} 0", under.path.display()))]);
        let disk = Disk::new(json!({
            "drive_id": "d", "is_root_device": false, "path_on_host": mapped.path, "io_engine": engine,
            "cache_type": "Writeback", "direct_io": direct_io,
        }))
        .unwrap();
        let mut events = Reader::default();
        while !events.read(usize::MAX).is_empty() {}
        let what = format!("{engine}, past the page cache: {direct_io}");
        Self { what, image, under, mapped, disk, events, _folder: folder }
    }

    /// The device of the file, from this sector on, as the table of a device names it.
    fn from(&self, sector: u64) -> String {
        format!("{} {sector}", self.under.path.display())
    }

    /// The 4096 bytes that the file beneath has at a sector.
    fn beneath(&self, sector: u64) -> Vec<u8> {
        let content = std::fs::read(&self.image).unwrap();
        content[512 * sector as usize..][..4096].to_vec()
    }

    /// The reasons of the errors that were told since this was asked last.
    fn told(&mut self) -> Vec<String> {
        let lines = self.events.read(usize::MAX);
        let events = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let errors = events.filter(|event| event["event"] == "device_error");
        errors
            .map(|event| {
                assert_eq!((&event["device"], &event["needs_reset"]), (&json!("disk `d`"), &json!(false)));
                event["reason"].as_str().unwrap().to_owned()
            })
            .collect()
    }

    /// Data that the guest was told is on stable storage.
    fn write_and_flush(&mut self, sector: u64, byte: u8) {
        assert_eq!(self.disk.write(sector, &[byte; 4096]), OK, "{}", self.what);
        assert_eq!(self.disk.flush(), OK, "{}", self.what);
        assert!(self.beneath(sector) == [byte; 4096], "{}: acknowledged, and not there", self.what);
    }
}

/// Reads fail at once; writes by then, or with the flush that finds out what became of them, and with each after it.
fn fails(bench: &mut Bench, sector: u64, is_direct: bool) {
    let what = bench.what.clone();
    let at = format!("at byte {}: Input/output error", 512 * sector);
    assert_eq!(bench.disk.read(sector, 4096).map(drop), IO_ERROR, "{what}");
    assert!(bench.told()[0].contains(&format!("read {at}")), "{what}");
    let written = bench.disk.write(sector, &[0xee; 4096]);
    if is_direct {
        assert_eq!(written, IO_ERROR, "{what}");
        assert!(bench.told()[0].contains(&format!("write {at}")), "{what}");
    } else {
        assert_eq!((written, bench.disk.flush()), (OK, IO_ERROR), "{what}");
        assert!(bench.told()[0].starts_with("flush: Input/output error"), "{what}");
        assert_eq!(bench.disk.flush(), IO_ERROR, "a flush succeeds though data is gone: {what}");
    }
}

#[test]
#[ignore = "device-mapper: scripts/test runs it"]
fn a_disk_with_a_bad_part_keeps_what_was_acknowledged() {
    for kind in KINDS {
        let mut bench = Bench::new(kind);
        bench.write_and_flush(0, 1);
        bench.write_and_flush(BAD, 2);
        bench.mapped.map_to(&[(BAD, "linear", &bench.from(0)), (SECTORS - BAD, "error", "")]);
        fails(&mut bench, BAD + 8, kind.1);
        // The good part goes on.
        assert_eq!(bench.disk.write(8, &[3; 4096]), OK, "{}", bench.what);
        assert!(bench.disk.read(8, 4096).unwrap() == [3; 4096], "{}", bench.what);
        assert!(bench.beneath(0) == [1; 4096] && bench.beneath(BAD) == [2; 4096], "{}", bench.what);
        assert!(!bench.disk.is_broken());
    }
}

#[test]
#[ignore = "device-mapper: scripts/test runs it"]
fn a_disk_that_fails_for_a_while_keeps_what_was_acknowledged() {
    for kind in KINDS {
        let mut bench = Bench::new(kind);
        bench.write_and_flush(0, 1);
        // Up for no second, down for 60, and so on.
        bench.mapped.map_to(&[(SECTORS, "flakey", &format!("{} 0 60", bench.from(0)))]);
        fails(&mut bench, 64, kind.1);
        bench.mapped.map_to(&[(SECTORS, "linear", &bench.from(0))]);
        if !kind.1 {
            assert_eq!(bench.disk.flush(), IO_ERROR, "{}", bench.what);
        }
        // Whoever names the image says that what is in it now is what is wanted.
        bench.disk.patch(json!({ "drive_id": "d", "path_on_host": bench.mapped.path })).unwrap();
        bench.write_and_flush(64, 4);
        assert!(bench.beneath(0) == [1; 4096] && !bench.disk.is_broken(), "{}", bench.what);
    }
}
