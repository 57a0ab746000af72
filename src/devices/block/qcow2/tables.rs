//! The tables of an image on their way to its file. What `imago` writes of them is held here, and
//! `commit` puts it into the file in an order that leaves a sound image wherever it ends: see `qcow2`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Result;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::header::{self, Header, MAGIC};
use super::medium::Medium;

/// So much is held at most before it goes to the file, in bytes: a guest that writes all over a large
/// disk and never flushes would have us hold all its tables.
#[cfg(not(test))]
const HELD_MAX: usize = 16 << 20;
/// Tests have small disks.
#[cfg(test)]
pub const HELD_MAX: usize = 64 << 10;

/// Where an entry of a table of tables or of reference counts points to.
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;
/// An entry whose table or cluster is this image's alone.
const COPIED: u64 = 1 << 63;
/// An entry has so many bytes.
const ENTRY: usize = 8;
/// Where the header tells of the table of reference counts: its place, and how many clusters it has.
const COUNTS_PLACE: usize = 48;
const COUNTS_CLUSTERS: usize = 56;

/// The tables of one image.
pub struct Tables {
    medium: Arc<Medium>,
    cluster: u64,
    /// Reference counts have 2^`order` bits.
    order: u32,
    /// What is written is on stable storage before what needs it is written.
    durable: bool,
    held: RwLock<Held>,
    /// Clusters were freed that the file may still name: before that is over, none is allocated.
    freed: AtomicBool,
}

struct Held {
    /// Where the table of tables is, and that of reference counts.
    links: Range<u64>,
    counts: Range<u64>,
    /// Where the blocks of reference counts are, sorted.
    blocks: Vec<u64>,
    /// Whole tables, by their places.
    tables: BTreeMap<u64, Vec<u8>>,
    /// Those of them that nothing in the file names yet.
    new: BTreeSet<u64>,
    /// Entries of the two tables above, by their places.
    entries: BTreeMap<u64, [u8; ENTRY]>,
    /// The header's front.
    header: Option<Vec<u8>>,
    /// How many bytes of tables are held.
    bytes: usize,
}

impl Tables {
    /// The tables of the image in `medium`; `durable`: a flush is one to stable storage.
    pub fn new(medium: Arc<Medium>, header: &Header, durable: bool) -> Self {
        let held = Held {
            links: header.links.clone(),
            counts: header.counts.clone(),
            blocks: header.blocks.clone(),
            tables: BTreeMap::new(),
            new: BTreeSet::new(),
            entries: BTreeMap::new(),
            header: None,
            bytes: 0,
        };
        Self {
            medium,
            cluster: header.cluster,
            order: header.order,
            durable,
            held: RwLock::new(held),
            freed: AtomicBool::new(false),
        }
    }

    /// The file.
    pub fn medium(&self) -> &Arc<Medium> {
        &self.medium
    }

    fn held(&self) -> RwLockReadGuard<'_, Held> {
        self.held.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) -> RwLockWriteGuard<'_, Held> {
        self.held.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads from byte `offset` on, a table as it is held.
    pub fn read(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        match self.held().tables.get(&offset) {
            Some(table) if table.len() == bytes.len() => {
                bytes.copy_from_slice(table);
                Ok(())
            }
            _ => self.medium.read(bytes, offset),
        }
    }

    /// Takes what `imago` writes: tables, entries of them, the header; also the data of a cluster that it
    /// copies, which `release` then writes.
    pub fn take(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.medium.check(offset, bytes.len() as u64)?;
        let mut held = self.change();
        if offset == 0 && bytes.starts_with(&MAGIC.to_be_bytes()) && bytes.len() >= header::LENGTH {
            self.take_header(&mut held, bytes);
        } else if let Ok(entry) = bytes.try_into()
            && held.is_entry(offset)
        {
            held.take_entry(offset, entry);
        } else {
            held.bytes += bytes.len();
            if let Some(before) = held.tables.insert(offset, bytes.to_vec()) {
                held.bytes -= before.len();
            }
        }
        Ok(())
    }

    fn take_header(&self, held: &mut Held, bytes: &[u8]) {
        let place = u64::from_be_bytes(bytes[COUNTS_PLACE..][..8].try_into().expect("8 bytes"));
        if place != held.counts.start {
            let clusters = u32::from_be_bytes(bytes[COUNTS_CLUSTERS..][..4].try_into().expect("4 bytes"));
            held.move_counts(place..place.saturating_add(u64::from(clusters) * self.cluster));
            self.note_freed();
        }
        held.header = Some(bytes.to_vec());
    }

    /// Notes that clusters were freed which the file may still name.
    pub fn note_freed(&self) {
        self.freed.store(true, Ordering::Relaxed);
    }

    /// Whether clusters may be allocated now; else all is to be committed first.
    pub fn may_allocate(&self) -> bool {
        !self.freed.load(Ordering::Relaxed) && !self.is_full()
    }

    /// Whether as much is held as may be: all is to be committed before anything is changed.
    pub fn is_full(&self) -> bool {
        self.held().bytes > HELD_MAX
    }

    /// Whether the table that tells of byte `at` of the disk is there, and this image's alone: then nothing
    /// is allocated where it is changed.
    pub fn has_table(&self, at: u64) -> Result<bool> {
        let held = self.held();
        let clusters = self.cluster / ENTRY as u64;
        let place = held.links.start + at / self.cluster / clusters * ENTRY as u64;
        let mut entry = [0; ENTRY];
        match held.entries.get(&place) {
            Some(held) => entry = *held,
            None => self.medium.read(&mut entry, place)?,
        }
        let entry = u64::from_be_bytes(entry);
        Ok(entry & COPIED != 0 && entry & PLACE != 0)
    }

    /// A range of the file becomes data, and what `imago` copied there with it: into whole clusters, also where
    /// the range begins in the middle of one.
    pub fn release(&self, range: Range<u64>) -> Result<()> {
        let range = self.clusters(range);
        if self.held().tables.range(range.clone()).next().is_none() {
            return Ok(());
        }
        let mut held = self.change();
        for (at, data) in held.tables.range(range.clone()) {
            self.medium.write(data, *at)?;
        }
        held.forget(range);
        Ok(())
    }

    /// A range of the file is not used after all, nor what `imago` copied there.
    pub fn forget(&self, range: Range<u64>) {
        self.change().forget(self.clusters(range));
    }

    /// The clusters in which a range of the file lies, from the start of the first.
    fn clusters(&self, range: Range<u64>) -> Range<u64> {
        range.start / self.cluster * self.cluster..range.end
    }

    /// Puts what is held into the file; `last`: returns when everything is on stable storage. The caller
    /// keeps others from changing the tables, and has had `imago` write what it has of them.
    pub fn commit(&self, last: bool) -> Result<()> {
        let held = self.held();
        if held.is_empty() {
            drop(held);
            return if last { self.medium.sync() } else { Ok(()) };
        }
        let write = |(at, bytes): (&u64, &[u8])| self.medium.write(bytes, *at);
        // What nothing names yet, and each reference count that is higher than in the file.
        let mut lower = Vec::new();
        for (at, table) in &held.tables {
            if held.new.contains(at) {
                self.medium.write(table, *at)?;
            } else if held.is_block(*at) && self.raise(*at, table)? {
                lower.push(*at);
            }
        }
        self.order()?;
        // What counts: all is counted then that will be named.
        let (links, counts): (Vec<_>, Vec<_>) = held
            .entries
            .iter()
            .map(|(at, entry)| (at, &entry[..]))
            .partition(|(at, _)| held.links.contains(at));
        if held.header.is_some() || !counts.is_empty() {
            counts.into_iter().try_for_each(write)?;
            held.header.iter().try_for_each(|header| self.medium.write(header, 0))?;
            self.order()?;
        }
        // What names clusters: entry by entry, in any order.
        let old = |(at, _): &(&u64, &[u8])| !held.new.contains(at) && !held.is_block(**at);
        held.tables.iter().map(|(at, table)| (at, &table[..])).filter(old).try_for_each(write)?;
        links.into_iter().try_for_each(write)?;
        if last {
            self.medium.sync()?;
        } else if self.freed.load(Ordering::Relaxed) || !lower.is_empty() {
            self.order()?;
        }
        // What nothing names any more. (Lost, it stays counted.)
        lower.iter().try_for_each(|at| self.medium.write(&held.tables[at], *at))?;
        drop(held);
        self.change().clear();
        self.freed.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn order(&self) -> Result<()> {
        if self.durable { self.medium.sync() } else { Ok(()) }
    }

    /// Writes a block of reference counts, each count as in the file where that is higher; whether one was.
    fn raise(&self, at: u64, block: &[u8]) -> Result<bool> {
        let mut before = vec![0; block.len()];
        self.medium.read(&mut before, at)?;
        let mut raised = block.to_vec();
        raise(self.order, &mut raised, &before);
        if raised != before || self.medium.is_doubted() {
            self.medium.write(&raised, at)?;
        }
        Ok(raised != block)
    }
}

impl Held {
    fn is_empty(&self) -> bool {
        self.tables.is_empty() && self.entries.is_empty() && self.header.is_none()
    }

    fn clear(&mut self) {
        self.tables.clear();
        self.new.clear();
        self.entries.clear();
        self.header = None;
        self.bytes = 0;
    }

    fn forget(&mut self, range: Range<u64>) {
        while let Some(at) = self.tables.range(range.clone()).next().map(|(at, _)| *at) {
            let data = self.tables.remove(&at).unwrap_or_default();
            self.new.remove(&at);
            self.bytes -= data.len();
        }
    }

    fn is_block(&self, at: u64) -> bool {
        self.blocks.binary_search(&at).is_ok()
    }

    fn is_entry(&self, offset: u64) -> bool {
        self.links.contains(&offset) || self.counts.contains(&offset)
    }

    fn take_entry(&mut self, offset: u64, entry: [u8; ENTRY]) {
        let place = u64::from_be_bytes(entry) & PLACE;
        if self.tables.contains_key(&place) {
            self.new.insert(place);
        }
        if self.counts.contains(&offset) {
            self.add_block(place);
            // The table itself may be new.
            if let Some(table) = self.tables.get_mut(&self.counts.start) {
                table[(offset - self.counts.start) as usize..][..ENTRY].copy_from_slice(&entry);
                return;
            }
        }
        self.entries.insert(offset, entry);
    }

    fn add_block(&mut self, place: u64) {
        if let Err(index) = self.blocks.binary_search(&place)
            && place != 0
        {
            self.blocks.insert(index, place);
        }
    }

    /// The table of reference counts is another one, which is held.
    fn move_counts(&mut self, place: Range<u64>) {
        let before = std::mem::replace(&mut self.counts, place);
        self.entries.retain(|at, _| !before.contains(at));
        self.new.insert(self.counts.start);
        let table = self.tables.get(&self.counts.start).map(Vec::as_slice).unwrap_or_default();
        let entries =
            table.chunks_exact(ENTRY).map(|entry| u64::from_be_bytes(entry.try_into().expect("8 bytes")));
        let places: Vec<u64> = entries.map(|entry| entry & PLACE).filter(|place| *place != 0).collect();
        for place in places {
            if !self.is_block(place) {
                self.new.insert(place);
                self.add_block(place);
            }
        }
    }
}

/// Raises each count of `2^order` bits in `counts` to what it is in `before`.
fn raise(order: u32, counts: &mut [u8], before: &[u8]) {
    if let Some(width) = order.checked_sub(3) {
        let width = 1 << width;
        for (count, before) in counts.chunks_exact_mut(width).zip(before.chunks_exact(width)) {
            // The first byte counts most.
            if *count < *before {
                count.copy_from_slice(before);
            }
        }
        return;
    }
    let width = 1 << order;
    for (counts, before) in counts.iter_mut().zip(before) {
        for at in (0..8).step_by(width) {
            let mask = (1_u8 << width).wrapping_sub(1) << at;
            if *counts & mask < before & mask {
                *counts = *counts & !mask | before & mask;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_are_raised_and_never_lowered() {
        for order in 0..7 {
            let bits = 1_usize << order;
            let put = |counts: [u8; 8]| {
                let mut bytes = [0; 64];
                for (index, count) in counts.into_iter().enumerate() {
                    // In bytes the least bits come first, in longer counts the first byte is the highest.
                    let at = if bits < 8 { index * bits / 8 } else { (index + 1) * (bits / 8) - 1 };
                    bytes[at] |= count << if bits < 8 { index * bits % 8 } else { 0 };
                }
                bytes
            };
            let (before, after) = ([0, 1, 0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 0, 1, 0]);
            let mut counts = put(after);
            raise(order, &mut counts, &put(before));
            assert_eq!(counts, put([1, 1, 0, 1, 1, 0, 1, 1]), "{bits} bits");
        }
        let mut counts = [1, 0, 0, 0xff];
        raise(4, &mut counts, &[0, 0xff, 1, 0]);
        assert_eq!(counts, [1, 0, 1, 0]);
        let mut counts = [0b01_11_10_00];
        raise(1, &mut counts, &[0b10_01_10_11]);
        assert_eq!(counts, [0b10_11_10_11]);
    }
}
