//! qcow2 images from anybody: refused, or a disk whose every request is answered; the file takes
//! no more of the host than it should. What was not damaged reads as it was written.

use alula::devices::block;
use alula::devices::kind::ConfiguredDevice;
use alula::virtio::VirtioDevice;
use arbitrary::Unstructured;
use serde_json::json;

use crate::driver::{Guest, NEEDS_RESET, TransportKind, WRITE};
use crate::host::{self, BASE, Host, SECTOR, SECTORS};
use crate::{ground, state};

const STEPS_MAX: usize = 24;
/// Clusters are as small as they can be: all tables have room in some hundred bytes.
const CLUSTER: usize = SECTOR;
/// Each of the disk's clusters once, their tables, and what damage lets be allocated in vain.
const FILE_MAX: u64 = 1 << 20;

/// A header may claim so much of tables, and each move once.
const TABLES_MAX: u64 = 256 << 20;

/// Request types.
const IN: u8 = 0;
const OUT: u8 = 1;
const FLUSH: u8 = 4;
const DISCARD: u8 = 11;
const WRITE_ZEROES: u8 = 13;
/// struct virtio_blk_discard_write_zeroes.
const UNMAP: u8 = 1;

pub fn run(bytes: &[u8]) {
    host::with(|host| {
        let mut bytes = Unstructured::new(bytes);
        let choice = bytes.arbitrary::<u8>().unwrap_or(0);
        let mut image = [image(choice & 1 != 0)];
        let sound = choice & 2 == 0;
        if !sound {
            state::change(&mut image, &mut bytes).expect("numbers end as zeros");
        }
        host.put_disk(&image[0]);
        let device = device(choice & 4 != 0);
        match host.try_open(&device) {
            Ok(device) => use_disk(host, device, bytes, sound.then_some(choice & 1 != 0), choice & 4 != 0),
            Err(error) => assert!(!sound, "{error}"),
        }
    });
}

fn device(read_only: bool) -> ConfiguredDevice {
    let config = json!({
        "drive_id": "disk", "path_on_host": host::DISK, "is_root_device": false, "is_read_only": read_only,
        "cache_type": "Writeback", "format": "qcow2",
    });
    ConfiguredDevice::new(serde_json::from_value::<block::Config>(config).unwrap())
}

/// An image of `SECTORS` sectors with one cluster of data, and with zeros or another image beneath.
fn image(backed: bool) -> Vec<u8> {
    let mut image = vec![0; 6 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let cluster = |number: usize| ((number * CLUSTER) as u64).to_be_bytes();
    let copied = |number: usize| ((number * CLUSTER) as u64 | 1 << 63).to_be_bytes();
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &CLUSTER.trailing_zeros().to_be_bytes());
    put(24, &((SECTORS * SECTOR) as u64).to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &cluster(3));
    put(48, &cluster(1));
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    if backed {
        // The format of what is beneath, and its name.
        put(104, &[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 3, b'r', b'a', b'w']);
        put(8, &200_u64.to_be_bytes());
        put(16, &(BASE_NAME.len() as u32).to_be_bytes());
        put(200, BASE_NAME.as_bytes());
    }
    put(CLUSTER, &cluster(2));
    for number in 0..6 {
        put(2 * CLUSTER + 2 * number, &[0, 1]);
    }
    put(3 * CLUSTER, &copied(4));
    // The first cluster has data, the second is zeros; the others are what is beneath.
    put(4 * CLUSTER, &copied(5));
    put(4 * CLUSTER + 8, &1_u64.to_be_bytes());
    put(5 * CLUSTER, &[DATA; CLUSTER]);
    image
}

const DATA: u8 = 0x77;
const BASE_NAME: &str = host::BASE_NAME;

/// `beneath`: of an undamaged image, whether it has another one beneath it.
fn use_disk(
    host: &Host,
    device: Box<dyn VirtioDevice>,
    mut bytes: Unstructured<'_>,
    beneath: Option<bool>,
    read_only: bool,
) {
    let mut disk = Disk { guest: Guest::by_hand(TransportKind::Mmio, device, ground::memory()), read_only };
    disk.guest.start(0);
    let mut sectors = [0; 8];
    disk.guest.config(0, &mut sectors);
    let capacity = u64::from_le_bytes(sectors).saturating_mul(SECTOR as u64).min(u64::MAX / 4);
    let mut expected = beneath.map(|beneath| {
        let mut content = vec![if beneath { BASE } else { 0 }; SECTORS * SECTOR];
        content[..CLUSTER].fill(DATA);
        content[CLUSTER..2 * CLUSTER].fill(0);
        content
    });
    for _ in 0..STEPS_MAX {
        if bytes.is_empty() {
            break;
        }
        disk.step(&mut bytes, expected.as_mut()).expect("numbers end as zeros");
        assert_eq!(disk.guest.status() & NEEDS_RESET, 0);
        // Holes and all, at most what its disk could need, however large damage has made that, and tables.
        assert!(host.disk_length() <= 2 * capacity + TABLES_MAX, "{} bytes", host.disk_length());
        assert!(host.disk_usage() <= FILE_MAX, "the file grew to {}", host.disk_usage());
    }
    if let Some(expected) = expected {
        disk.compare(0, SECTORS, &expected);
    }
}

struct Disk {
    guest: Guest,
    read_only: bool,
}

impl Disk {
    fn step(
        &mut self,
        bytes: &mut Unstructured<'_>,
        expected: Option<&mut Vec<u8>>,
    ) -> arbitrary::Result<()> {
        let kind = [IN, OUT, OUT, FLUSH, DISCARD, WRITE_ZEROES][usize::from(bytes.arbitrary::<u8>()?) % 6];
        let flags = bytes.arbitrary::<u8>()? & UNMAP;
        // Damage may have made the disk larger than it was.
        let sector = u64::from(bytes.arbitrary::<u8>()?) * if expected.is_none() { 3 } else { 1 };
        let count = 1 + usize::from(bytes.arbitrary::<u8>()?) % 16;
        let fill = bytes.arbitrary::<u8>()?;
        let status = self.request(kind, sector, count, flags, fill);
        let Some(expected) = expected else { return Ok(()) };
        let end = sector as usize + count;
        let inside = end <= SECTORS || kind == FLUSH;
        let allowed = !self.read_only || kind == IN || kind == FLUSH;
        assert_eq!(status == 0, inside && allowed, "{kind} at {sector}: {status}");
        if status == 0 && kind != FLUSH {
            let range = sector as usize * SECTOR..end * SECTOR;
            match kind {
                OUT => expected[range].fill(fill),
                WRITE_ZEROES => expected[range].fill(0),
                // Clusters of this size are given back or stay.
                DISCARD => self.learn(sector, count, &mut expected[range]),
                _ => self.compare(sector, count, expected),
            }
        }
        Ok(())
    }

    /// Does a request; returns its status.
    fn request(&mut self, kind: u8, sector: u64, count: usize, flags: u8, fill: u8) -> u8 {
        let guest = &mut self.guest;
        guest.notes.allocated = 0;
        let mut header = [0; 16];
        header[0] = kind;
        let mut data = vec![fill; if kind == FLUSH { 0 } else { count * SECTOR }];
        match kind {
            DISCARD | WRITE_ZEROES => {
                data = [&sector.to_le_bytes()[..], &(count as u32).to_le_bytes(), &[flags, 0, 0, 0]].concat();
                // Only zeros may be asked to be given back.
                if kind == DISCARD {
                    data[12] = 0;
                }
            }
            _ => header[8..].copy_from_slice(&sector.to_le_bytes()),
        }
        let header = guest.allocate(&header);
        let data = guest.allocate(&data);
        let status = guest.allocate(&[0xff]);
        let way = if kind == IN { WRITE } else { 0 };
        let chain = [(header, 0), (data, way), (status, WRITE)];
        match data.1 {
            0 => guest.request(0, &[chain[0], chain[2]]),
            _ => guest.request(0, &chain),
        };
        let answer = guest.bytes(status)[0];
        assert!(answer <= 2, "status {answer}");
        answer
    }

    fn read(&mut self, sector: u64, count: usize) -> Vec<u8> {
        assert_eq!(self.request(IN, sector, count, 0, 0), 0);
        self.guest.bytes((crate::driver::DATA + 64, (count * SECTOR) as u32))
    }

    fn compare(&mut self, sector: u64, count: usize, expected: &[u8]) {
        let start = sector as usize * SECTOR;
        let found = self.read(sector, count);
        let wrong = found.iter().zip(&expected[start..]).position(|(found, expected)| found != expected);
        assert_eq!(wrong, None, "byte from sector {sector} on");
    }

    /// After a discard each sector is what it was, or zeros.
    fn learn(&mut self, sector: u64, count: usize, expected: &mut [u8]) {
        let found = self.read(sector, count);
        for (found, expected) in found.chunks(SECTOR).zip(expected.chunks_mut(SECTOR)) {
            assert!(found == expected || found.iter().all(|byte| *byte == 0));
            expected.copy_from_slice(found);
        }
    }
}
