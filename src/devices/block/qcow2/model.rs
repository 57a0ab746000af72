//! Images for tests: made by hand, with clusters so small that all tables have many of them, and read by a
//! second reading of the format, which finds what is not sound.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::tempfile::TempFile;

use super::Qcow2;
use crate::devices::block::config::{Backing, CacheType, Config, Format};
use crate::host::Host;
use crate::memory::{Memory, Range, allocate};
use crate::virtio::buffers::Buffers;

/// Sectors are clusters.
pub const CLUSTER: usize = 512;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;

/// The head of a compressed cluster of these images: deflate (RFC 1951, 3.2.4) allows a block that is stored
/// without compression, and the cluster's bytes follow this head.
const STORED: [u8; 5] = [1, 0, 2, 0xff, 0xfd];
const PACKED: usize = STORED.len() + CLUSTER;

/// The form and the first content of an image.
#[derive(Clone, Copy, Debug)]
pub struct ImageForm {
    pub version: u32,
    /// Reference counts have 2^`order` bits.
    pub order: u32,
    pub sectors: u64,
    pub has_snapshot: bool,
    /// There is a raw image beneath.
    pub has_base: bool,
    /// The number of sectors, counted from the second one, that are compressed: at most [`PACKED_MAX`].
    pub packed: usize,
    /// The number of sectors that are written before the recorder begins.
    pub full: u64,
}

/// An image of which one sector has data.
pub const PLAIN: ImageForm = ImageForm {
    version: 3,
    order: 4,
    sectors: 700,
    has_snapshot: false,
    has_base: false,
    packed: 0,
    full: 0,
};

/// Most compressed clusters that an image has: they share one table, and each starts in the first 507 bytes of a
/// cluster, so that each lies in two.
pub const PACKED_MAX: usize = 60;

/// The number that a compressed sector holds at first, and the number that one of the image beneath holds.
pub fn packed(sector: u64) -> u64 {
    4000 + sector
}

fn beneath(sector: u64) -> u64 {
    7000 + sector
}

pub fn long(image: &[u8], at: usize) -> u64 {
    image.get(at..at + 8).map_or(0, |bytes| u64::from_be_bytes(bytes.try_into().unwrap()))
}

pub fn word(image: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(image[at..at + 4].try_into().unwrap())
}

/// An image with one cluster of data, and some that are compressed, which a snapshot may share.
pub fn image(kind: ImageForm) -> Vec<u8> {
    let links = (kind.sectors as usize * 8).div_ceil(CLUSTER);
    let link_clusters = (links * 8).div_ceil(CLUSTER);
    let (counts, block, table, data) = (1, 2, 3 + link_clusters, 4 + link_clusters);
    let (snapshots, shadow) = (data + 1, data + 2);
    let front = if kind.has_snapshot { shadow + link_clusters } else { data + 1 };
    assert!(kind.packed <= PACKED_MAX);
    let end = front + (kind.packed * PACKED).div_ceil(CLUSTER);
    let mut image = vec![0; end * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let place = |cluster: usize| (cluster * CLUSTER) as u64;
    let own = if kind.has_snapshot { 0 } else { COPIED };
    put(0, b"QFI\xfb");
    put(4, &kind.version.to_be_bytes());
    put(20, &CLUSTER.trailing_zeros().to_be_bytes());
    put(24, &(kind.sectors * CLUSTER as u64).to_be_bytes());
    put(36, &(links as u32).to_be_bytes());
    put(40, &place(3).to_be_bytes());
    put(48, &place(counts).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    if kind.version > 2 {
        put(96, &kind.order.to_be_bytes());
        put(100, &104_u32.to_be_bytes());
    }
    if kind.has_base {
        // Its name, which the configuration replaces.
        let name = b"base";
        put(8, &200_u64.to_be_bytes());
        put(16, &(name.len() as u32).to_be_bytes());
        put(200, name);
    }
    put(counts * CLUSTER, &place(block).to_be_bytes());
    put(3 * CLUSTER, &(place(table) | own).to_be_bytes());
    put(table * CLUSTER, &(place(data) | own).to_be_bytes());
    put(data * CLUSTER, &value(1));
    if kind.has_snapshot {
        put(60, &1_u32.to_be_bytes());
        put(64, &place(snapshots).to_be_bytes());
        put(snapshots * CLUSTER, &place(shadow).to_be_bytes());
        put(snapshots * CLUSTER + 8, &(links as u32).to_be_bytes());
        put(shadow * CLUSTER, &place(table).to_be_bytes());
    }
    let mut names = vec![1_u8; front];
    names.resize(end, 0);
    for index in 0..kind.packed {
        let at = front * CLUSTER + index * PACKED;
        put(at, &STORED);
        put(at + STORED.len(), &value(packed(1 + index as u64)));
        // The cluster reaches into one more sector: the bit above the place says so.
        put(table * CLUSTER + (1 + index) * 8, &(COMPRESSED | 1 << 61 | at as u64).to_be_bytes());
        (0..2).for_each(|next| names[at / CLUSTER + next] += 1);
    }
    for (cluster, names) in names.into_iter().enumerate() {
        let is_shared = kind.has_snapshot && (cluster == table || cluster == data || cluster >= front);
        let width = 1 << kind.order >> 3;
        put(block * CLUSTER + (cluster + 1) * width - 1, &[names << u8::from(is_shared)]);
    }
    image
}

/// The number that the `number`th request writes to a sector; 0: zeros.
pub fn value(number: u64) -> [u8; CLUSTER] {
    let mut value = [0; CLUSTER];
    value.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&number.to_be_bytes()));
    value
}

/// The clusters of an image, as its tables say.
struct Walk<'a> {
    image: &'a [u8],
    /// How often each cluster is named, and how often by compressed ones that lie in it.
    named: BTreeMap<u64, u64>,
    packed: BTreeMap<u64, u64>,
}

impl Walk<'_> {
    fn name(&mut self, place: u64, clusters: u64) -> Result<(), String> {
        if !place.is_multiple_of(CLUSTER as u64) || place >= self.image.len() as u64 {
            return Err(format!("{place:#x} is named, of {:#x}", self.image.len()));
        }
        (0..clusters).for_each(|at| *self.named.entry(place / CLUSTER as u64 + at).or_default() += 1);
        Ok(())
    }

    fn count(&self, cluster: u64) -> u64 {
        let order = word(self.image, 96);
        let width = 1_usize << if word(self.image, 4) > 2 { order - 3 } else { 1 };
        let per_block = CLUSTER / width;
        let (block, index) = (cluster as usize / per_block, cluster as usize % per_block);
        if block * 8 >= word(self.image, 56) as usize * CLUSTER {
            return 0;
        }
        let place = long(self.image, long(self.image, 48) as usize + block * 8) as usize;
        if place == 0 {
            return 0;
        }
        let count = self.image.get(place + index * width..place + (index + 1) * width).unwrap_or(&[]);
        count.iter().fold(0, |count, byte| count << 8 | u64::from(*byte))
    }

    /// Names the two clusters in which a compressed one lies.
    fn pack(&mut self, entry: u64) -> Result<(), String> {
        unpack(self.image, entry)?;
        let first = place_of_packed(entry) as u64 / CLUSTER as u64;
        (first..first + 2).for_each(|at| *self.packed.entry(at).or_default() += 1);
        Ok(())
    }

    /// Names the tables that `links` name, and what those name; returns the disk's clusters.
    fn tables(&mut self, links: u64, entries: u64) -> Result<Vec<u64>, String> {
        self.name(links, (entries * 8).div_ceil(CLUSTER as u64))?;
        let mut disk = Vec::new();
        for index in 0..entries {
            let link = long(self.image, (links + index * 8) as usize);
            let table = link & PLACE;
            for at in 0..CLUSTER as u64 / 8 {
                let entry = if table == 0 { 0 } else { long(self.image, (table + at * 8) as usize) };
                disk.push(entry);
                if entry & COMPRESSED != 0 {
                    self.pack(entry)?;
                    continue;
                }
                if entry & !(COPIED | PLACE | 1) != 0 {
                    return Err(format!("an entry is {entry:#x}, in a table at {table:#x}"));
                }
                if entry & PLACE != 0 {
                    self.name(entry & PLACE, 1)?;
                }
            }
            if table != 0 {
                self.name(table, 1)?;
            }
        }
        Ok(disk)
    }
}

fn place_of_packed(entry: u64) -> usize {
    (entry & (COMPRESSED - 1) & !(1 << 61)) as usize
}

/// The content of a compressed cluster.
fn unpack(image: &[u8], entry: u64) -> Result<u64, String> {
    let bytes = image.get(place_of_packed(entry)..).and_then(|rest| rest.get(..PACKED));
    let data = bytes.and_then(|bytes| bytes.strip_prefix(&STORED));
    let number = data.filter(|data| *data == value(long(data, 0))).map(|data| long(data, 0));
    number.ok_or(format!("an entry is {entry:#x}, where nothing is compressed"))
}

/// The number that each sector of the disk holds, if the image is sound.
pub fn walk(image: &[u8]) -> Result<Vec<u64>, String> {
    let mut walk = Walk { image, named: BTreeMap::new(), packed: BTreeMap::new() };
    walk.name(0, 1)?;
    let (counts, clusters) = (long(image, 48), u64::from(word(image, 56)));
    walk.name(counts, clusters)?;
    for at in (0..clusters * CLUSTER as u64).step_by(8) {
        match long(image, (counts + at) as usize) {
            0 => {}
            block => walk.name(block, 1)?,
        }
    }
    if word(image, 60) > 0 {
        let snapshots = long(image, 64);
        walk.name(snapshots, 1)?;
        walk.tables(long(image, snapshots as usize), word(image, snapshots as usize + 8).into())?;
    }
    let before = walk.named.clone();
    let disk = walk.tables(long(image, 40), word(image, 36).into())?;
    for (cluster, named) in &walk.named {
        let count = walk.count(*cluster);
        if count < *named || *named > 2 || *named == 2 && before.get(cluster) != Some(&1) {
            return Err(format!("cluster {cluster} is named {named} times, and counts {count}"));
        }
    }
    for (cluster, packed) in &walk.packed {
        let count = walk.count(*cluster);
        if walk.named.contains_key(cluster) || count < *packed {
            return Err(format!("compressed clusters name {cluster} {packed} times, and it counts {count}"));
        }
    }
    let links =
        (0..u64::from(word(image, 36))).map(|index| long(image, (long(image, 40) + index * 8) as usize));
    for entry in links.chain(disk.iter().copied()) {
        let count = walk.count((entry & PLACE) / CLUSTER as u64);
        if entry & COMPRESSED == 0 && entry & PLACE != 0 && (entry & COPIED != 0) != (count == 1) {
            return Err(format!("an entry is {entry:#x}, of a cluster that counts {count}"));
        }
    }
    let has_base = long(image, 8) != 0;
    let sector = |(sector, entry): (usize, &u64)| match *entry {
        entry if entry & COMPRESSED != 0 => unpack(image, entry),
        0 if has_base => Ok(beneath(sector as u64)),
        entry if entry & 1 != 0 || entry & PLACE == 0 => Ok(0),
        entry => {
            let at = (entry & PLACE) as usize;
            let bytes = image.get(at..at + CLUSTER).unwrap_or(&[0; CLUSTER]);
            let number = long(bytes, 0);
            (bytes == value(number)).then_some(number).ok_or(format!("{at:#x} is mixed"))
        }
    };
    disk.iter().take(long(image, 24) as usize / CLUSTER).enumerate().map(sector).collect()
}

/// Numbers that are the same in each run.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % below
    }
}

/// An open image, in a file that is gone with it.
pub struct Opened {
    pub qcow2: Qcow2,
    pub memory: Memory,
    pub file: TempFile,
    pub config: Config,
    _base: TempFile,
}

/// Opens an image in a file of its own.
pub fn open(image: &[u8], cache_type: CacheType) -> Opened {
    let file = TempFile::new().unwrap();
    file.as_file().write_all_at(image, 0).unwrap();
    let base = TempFile::new().unwrap();
    let mut config = Config::new("d", file.as_path());
    (config.format, config.cache_type) = (Format::Qcow2, cache_type);
    if long(image, 8) != 0 {
        let sectors = long(image, 24) / CLUSTER as u64;
        let content: Vec<u8> = (0..sectors).flat_map(|sector| value(beneath(sector))).collect();
        base.as_file().write_all_at(&content, 0).unwrap();
        let beneath = Backing { path_on_host: base.as_path().to_owned(), format: Format::Raw };
        config.backing = Some(vec![beneath]);
    }
    let qcow2 = open_again(&config).unwrap();
    let memory = allocate(&[Range { start: 0, size: 2 << 20 }]).unwrap();
    Opened { qcow2, memory, file, config, _base: base }
}

/// The image that `config` names.
pub fn open_again(config: &Config) -> crate::error::Result<Qcow2> {
    let file = File::options().read(true).write(!config.is_read_only).open(config.file().1).unwrap();
    Qcow2::open(config, crate::descriptors::Named::new("image", file), &mut Host::default())
}

impl Opened {
    /// Writes `number` to sectors.
    pub fn write(&self, number: u64, sector: u64, sectors: u64) {
        let bytes = value(number).repeat(sectors as usize);
        self.memory.memory().write_slice(&bytes, GuestAddress(0)).unwrap();
        let mut buffers = Buffers::new(self.memory.clone());
        buffers.add_piece(0, bytes.len() as u32).unwrap();
        self.qcow2.write(&mut buffers, sector * CLUSTER as u64).unwrap();
    }

    /// The content of the file.
    pub fn content(&self) -> Vec<u8> {
        std::fs::read(self.file.as_path()).unwrap()
    }
}
