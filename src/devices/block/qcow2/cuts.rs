//! Power cuts: what reaches the file of an image is recorded, and cut off at every point, between two syncs
//! in any order. What is left must be a sound image, with all that was flushed.

use super::medium::record::{self, Step};
use super::model::{CLUSTER, ImageForm, PACKED_MAX, PLAIN, Random, image, open, walk};
use crate::devices::block::config::CacheType;

/// A request: when it began and ended, in recorded steps, and what it made of which sectors.
struct Request {
    began: usize,
    ended: usize,
    /// None: a flush.
    made: Option<(u64, u64, u64)>,
}

/// The requests of a run, and what reached the file.
struct Run {
    before: Vec<u8>,
    requests: Vec<Request>,
    steps: Vec<Step>,
}

/// So many sectors are written at a time to fill a disk.
const FULL: usize = 100;

fn run(kind: ImageForm, cache_type: CacheType, requests: u64, longest: u64, random: &mut Random) -> Run {
    let image = open(&image(kind), cache_type);
    let durable = cache_type == CacheType::Writeback;
    (0..kind.full).step_by(FULL).for_each(|sector| image.write(1, sector, FULL as u64));
    image.qcow2.flush(durable).unwrap();
    let before = image.content();
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
        let image = again.content();
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
    let mut random = Random(7);
    let packed = ImageForm { sectors: 200, packed: PACKED_MAX, ..PLAIN };
    for kind in [
        PLAIN,
        ImageForm { version: 2, ..PLAIN },
        ImageForm { order: 3, has_snapshot: true, ..PLAIN },
        ImageForm { order: 6, has_snapshot: true, ..PLAIN },
        ImageForm { has_base: true, ..PLAIN },
        packed,
        ImageForm { version: 2, has_base: true, ..packed },
        ImageForm { order: 3, has_snapshot: true, has_base: true, ..packed },
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
        let kind = ImageForm { order: 6, sectors: 4800, has_snapshot, full: 3900, ..PLAIN };
        let run = run(kind, CacheType::Writeback, 30, 30, &mut random);
        let is_header = |step: &Step| matches!(step, Step::Write { offset: 0, .. });
        assert!(run.steps.iter().any(is_header), "it did not move");
        println!("{} cuts", run.cut(true, &mut random, &format!("{kind:?}")));
    }
}
