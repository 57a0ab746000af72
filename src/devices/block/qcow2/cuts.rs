//! Power cuts: what reaches the file of an image is recorded, and cut off at every point, between two syncs
//! in any order. What is left must be a sound image, with all that was flushed.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::tempfile::TempFile;

use super::Qcow2;
use super::medium::record::{self, Step};
use crate::devices::block::config::{CacheType, Config, Format};
use crate::host::Local;
use crate::memory::{Memory, Range, allocate};
use crate::virtio::buffers::Buffers;

/// Sectors are clusters: all tables have room in some hundred bytes, and there are many of them.
const CLUSTER: usize = 512;
const COPIED: u64 = 1 << 63;
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;

/// What an image is like at first.
#[derive(Clone, Copy, Debug)]
struct Kind {
    version: u32,
    /// Reference counts have 2^`order` bits.
    order: u32,
    sectors: u64,
    has_snapshot: bool,
    /// So many sectors are written before what is recorded.
    full: u64,
}

fn long(image: &[u8], at: usize) -> u64 {
    image.get(at..at + 8).map_or(0, |bytes| u64::from_be_bytes(bytes.try_into().unwrap()))
}

fn word(image: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(image[at..at + 4].try_into().unwrap())
}

/// An image with one cluster of data, which a snapshot may share.
fn image(kind: Kind) -> Vec<u8> {
    let links = (kind.sectors as usize * 8).div_ceil(CLUSTER);
    let link_clusters = (links * 8).div_ceil(CLUSTER);
    let (counts, block, table, data) = (1, 2, 3 + link_clusters, 4 + link_clusters);
    let (snapshots, shadow) = (data + 1, data + 2);
    let end = if kind.has_snapshot { shadow + link_clusters } else { data + 1 };
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
    for cluster in 0..end {
        let is_shared = kind.has_snapshot && (cluster == table || cluster == data);
        let width = 1 << kind.order >> 3;
        put(block * CLUSTER + (cluster + 1) * width - 1, &[1 + u8::from(is_shared)]);
    }
    image
}

/// What the `number`th request writes to a sector; 0: zeros.
fn value(number: u64) -> [u8; CLUSTER] {
    let mut value = [0; CLUSTER];
    value.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&number.to_be_bytes()));
    value
}

/// What an image says of its clusters.
struct Walk<'a> {
    image: &'a [u8],
    /// How often each cluster is named.
    named: BTreeMap<u64, u64>,
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

/// What each sector of the disk holds, if the image is sound.
fn walk(image: &[u8]) -> Result<Vec<u64>, String> {
    let mut walk = Walk { image, named: BTreeMap::new() };
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
    let links =
        (0..u64::from(word(image, 36))).map(|index| long(image, (long(image, 40) + index * 8) as usize));
    for entry in links.chain(disk.iter().copied()) {
        let count = walk.count((entry & PLACE) / CLUSTER as u64);
        if entry & PLACE != 0 && (entry & COPIED != 0) != (count == 1) {
            return Err(format!("an entry is {entry:#x}, of a cluster that counts {count}"));
        }
    }
    let sector = |entry: &u64| match entry {
        entry if entry & 1 != 0 || entry & PLACE == 0 => Ok(0),
        entry => {
            let at = (entry & PLACE) as usize;
            let bytes = image.get(at..at + CLUSTER).unwrap_or(&[0; CLUSTER]);
            let number = long(bytes, 0);
            (bytes == value(number)).then_some(number).ok_or(format!("{at:#x} is mixed"))
        }
    };
    disk.iter().take(long(image, 24) as usize / CLUSTER).map(sector).collect()
}

/// A request: when it began and ended, in recorded steps, and what it made of which sectors.
struct Request {
    began: usize,
    ended: usize,
    /// None: a flush.
    made: Option<(u64, u64, u64)>,
}

struct Random(u64);

impl Random {
    fn below(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % below
    }
}

/// The requests of a run, and what reached the file.
struct Run {
    before: Vec<u8>,
    requests: Vec<Request>,
    steps: Vec<Step>,
}

/// An open image, in a file that is gone with it.
struct Opened {
    qcow2: Qcow2,
    memory: Memory,
    file: TempFile,
}

fn open(image: &[u8], cache_type: CacheType) -> Opened {
    let file = TempFile::new().unwrap();
    file.as_file().write_all_at(image, 0).unwrap();
    let mut config = Config::new("d", file.as_path());
    (config.format, config.cache_type) = (Format::Qcow2, cache_type);
    let host = File::options().read(true).write(true).open(file.as_path()).unwrap();
    let qcow2 = Qcow2::open(&config, host, &mut Local::default()).unwrap();
    Opened { qcow2, memory: allocate(&[Range { start: 0, size: 2 << 20 }]).unwrap(), file }
}

impl Opened {
    fn write(&self, number: u64, sector: u64, sectors: u64) {
        let bytes = value(number).repeat(sectors as usize);
        self.memory.memory().write_slice(&bytes, GuestAddress(0)).unwrap();
        let mut buffers = Buffers::new(self.memory.clone());
        buffers.add_piece(0, bytes.len() as u32).unwrap();
        self.qcow2.write(&mut buffers, sector * CLUSTER as u64).unwrap();
    }
}

/// So many sectors are written at a time to fill a disk.
const FULL: usize = 100;

fn run(kind: Kind, cache_type: CacheType, requests: u64, longest: u64, random: &mut Random) -> Run {
    let image = open(&image(kind), cache_type);
    let durable = cache_type == CacheType::Writeback;
    (0..kind.full).step_by(FULL).for_each(|sector| image.write(1, sector, FULL as u64));
    image.qcow2.flush(durable).unwrap();
    let before = std::fs::read(image.file.as_path()).unwrap();
    let mut done = Vec::new();
    record::begin();
    for number in 2..2 + requests {
        let began = record::count();
        let first = kind.full / 10 * 9;
        let sector = first + random.below(kind.sectors - first);
        let sectors = (1 + random.below(longest)).min(kind.sectors - sector);
        let range = (sector * CLUSTER as u64, sectors * CLUSTER as u64);
        let choice = random.below(if kind.version > 2 { 12 } else { 7 });
        let made = match choice {
            0 | 1 => image.qcow2.flush(durable).map(|()| None).unwrap(),
            2..7 => {
                image.write(number, sector, sectors);
                Some(number)
            }
            7 | 8 => image.qcow2.discard(range.0, range.1).map(|()| Some(0)).unwrap(),
            _ => image.qcow2.zero(range.0, range.1, choice == 9).map(|()| Some(0)).unwrap(),
        };
        let made = made.map(|number| (sector, sectors, number));
        done.push(Request { began, ended: record::count(), made });
    }
    drop(image);
    Run { before, requests: done, steps: record::end() }
}

/// Of so many writes between two syncs at most, each is left out once; then some of them.
const MOST: usize = 12;

impl Run {
    /// What each sector may hold when the last step that may have been done is `end`.
    fn allowed(&self, end: usize) -> Vec<Vec<u64>> {
        let mut allowed: Vec<Vec<u64>> =
            walk(&self.before).unwrap().into_iter().map(|value| vec![value]).collect();
        let flushed =
            self.requests.iter().rposition(|request| request.made.is_none() && request.ended <= end);
        for (index, request) in self.requests.iter().enumerate() {
            let Some((sector, sectors, number)) = request.made.filter(|_| request.began <= end) else {
                continue;
            };
            for values in &mut allowed[sector as usize..(sector + sectors) as usize] {
                if flushed.is_some_and(|flushed| index < flushed) {
                    values.clear();
                }
                values.push(number);
            }
        }
        allowed
    }

    fn check(image: &[u8], allowed: &[Vec<u64>], end: usize, what: &str) {
        let found = walk(image).unwrap_or_else(|error| panic!("{what}, step {end}: {error}"));
        for (sector, (found, allowed)) in found.iter().zip(allowed).enumerate() {
            assert!(
                allowed.contains(found),
                "{what}, step {end}: sector {sector} is {found}, not of {allowed:?}"
            );
        }
    }

    /// Goes on with what a cut left: the image is opened, written and flushed.
    fn go_on(image: &[u8], what: &str) {
        let mut expected = walk(image).unwrap();
        let again = open(image, CacheType::Writeback);
        for sector in (0..expected.len() as u64).step_by(7) {
            again.write(9999, sector, 1);
            expected[sector as usize] = 9999;
        }
        again.qcow2.flush(true).unwrap();
        let image = std::fs::read(again.file.as_path()).unwrap();
        assert_eq!(walk(&image).as_ref(), Ok(&expected), "{what}, after it was opened again");
    }

    /// Cuts at every step; `reorders`: what was written since the last sync may be there in any part.
    fn cut(&self, reorders: bool, random: &mut Random, what: &str) -> u64 {
        let mut cuts = 0;
        let mut durable = self.before.clone();
        let mut start = 0;
        while start < self.steps.len() {
            let rest = self.steps[start..].iter().position(|step| matches!(step, Step::Sync));
            let end = rest.map_or(self.steps.len(), |rest| start + rest);
            let mut next = durable.clone();
            for at in start..end {
                apply(&mut next, &self.steps[at], |_| true);
                Self::check(&next, &self.allowed(at), at, what);
                cuts += 1;
            }
            if reorders && end > start {
                // Every write alone, and all but that one; then any sectors of all.
                let allowed = self.allowed(end - 1);
                let mut subset = |keep: &mut dyn FnMut(usize, usize) -> bool| {
                    let mut image = durable.clone();
                    for (index, step) in self.steps[start..end].iter().enumerate() {
                        apply(&mut image, step, |at| keep(index, at));
                    }
                    Self::check(&image, &allowed, end - 1, what);
                    cuts += 1;
                    if cuts % 400 == 0 {
                        Self::go_on(&image, what);
                    }
                };
                for at in 0..(end - start).min(MOST) {
                    let one =
                        if end - start <= MOST { at } else { random.below((end - start) as u64) as usize };
                    subset(&mut |index, _| index == one);
                    subset(&mut |index, _| index != one);
                }
                for share in [1, 5, 9].repeat(4) {
                    subset(&mut |_, _| random.below(10) < share);
                }
            }
            durable = next;
            start = end + 1;
        }
        cuts
    }
}

/// Does a step, those of its sectors that `keep` takes.
fn apply(image: &mut Vec<u8>, step: &Step, mut keep: impl FnMut(usize) -> bool) {
    let Step::Write { offset, bytes } = step else { return };
    // An entry of a table is never torn.
    let mut at = *offset as usize;
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.len().min(CLUSTER - at % CLUSTER));
        if keep(at) {
            image.resize(image.len().max(at + piece.len()), 0);
            image[at..at + piece.len()].copy_from_slice(piece);
        }
        at += piece.len();
        rest = after;
    }
}

#[test]
fn an_image_cut_off_anywhere_is_sound_with_all_that_was_flushed() {
    let plain = Kind { version: 3, order: 4, sectors: 700, has_snapshot: false, full: 0 };
    let mut random = Random(7);
    for kind in [
        plain,
        Kind { version: 2, ..plain },
        Kind { order: 3, has_snapshot: true, ..plain },
        Kind { order: 6, has_snapshot: true, ..plain },
    ] {
        for cache_type in [CacheType::Writeback, CacheType::Unsafe] {
            let run = run(kind, cache_type, 70, 40, &mut random);
            let what = format!("{kind:?}, {cache_type:?}");
            let cuts = run.cut(cache_type == CacheType::Writeback, &mut random, &what);
            let syncs = run.steps.iter().filter(|step| matches!(step, Step::Sync)).count();
            println!("{what}: {} writes, {syncs} syncs, {cuts} cuts", run.steps.len() - syncs);
            assert!(cuts > 100, "{what}: {cuts}");
            assert_eq!(syncs > 0, cache_type == CacheType::Writeback, "{what}");
        }
    }
}

#[test]
fn a_table_of_reference_counts_may_move_wherever_it_is_cut_off() {
    let mut random = Random(3);
    for has_snapshot in [false, true] {
        // A cluster of the table tells of 2 MiB.
        let kind = Kind { version: 3, order: 6, sectors: 4800, has_snapshot, full: 3900 };
        let run = run(kind, CacheType::Writeback, 30, 30, &mut random);
        let is_header = |step: &Step| matches!(step, Step::Write { offset: 0, .. });
        assert!(run.steps.iter().any(is_header), "it did not move");
        println!("{} cuts", run.cut(true, &mut random, &format!("{kind:?}")));
    }
}

#[test]
fn a_sync_that_failed_in_a_write_fails_every_flush_after_it() {
    let kind = Kind { version: 3, order: 4, sectors: 700, has_snapshot: false, full: 0 };
    let opened = open(&image(kind), CacheType::Writeback);
    opened.write(1, 0, 4);
    opened.qcow2.flush(true).unwrap();
    // Acknowledged, and not yet flushed.
    opened.write(2, 0, 1);
    // What is given back must be durable before a cluster is allocated: the next write syncs.
    opened.qcow2.discard(2 * CLUSTER as u64, CLUSTER as u64).unwrap();
    record::fail_next_sync();
    let mut buffers = Buffers::new(opened.memory.clone());
    buffers.add_piece(0, CLUSTER as u32).unwrap();
    opened.qcow2.write(&mut buffers, 300 * CLUSTER as u64).unwrap_err();
    for _ in 0..3 {
        opened.qcow2.flush(true).expect_err("the host has told of the loss, and only once");
    }
    // The image that is opened anew is written whole, and flushed again.
    let mut config = Config::new("d", opened.file.as_path());
    (config.format, config.cache_type) = (Format::Qcow2, CacheType::Writeback);
    let again = opened.qcow2.again(&config, &mut Local::default()).unwrap();
    again.flush(true).unwrap();
    let content = walk(&std::fs::read(opened.file.as_path()).unwrap()).unwrap();
    assert_eq!(content[..4], [2, 1, 0, 1]);
}
