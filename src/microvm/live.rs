//! A snapshot of a guest that works: its memory is copied to the file while it goes on, then what it has written
//! meanwhile, and so on until that is little. Only for the last of it does the guest stand still, and that is copied
//! to memory, which waits for no disk.

use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::saving::{Kind, Writing};
use crate::carry::stored::Sums;
use crate::carry::{diff, memory_file, pages};
use crate::error::{Context, Error, Result};
use crate::log;
use crate::machine::{Brake, Tracker};
use crate::memory::Piece;
use crate::memory::page_set::PageSet;

/// A round of at most so many bytes is the last one before the guest stands still: it is written in a few
/// milliseconds, in which the guest does not write much more.
const SMALL: u64 = 4 << 20;
/// The most bytes that are copied while the guest stands still; a guest that has written more goes on for another
/// round. It decides for how long the guest may stand, and how much memory the copy takes.
const LAST_MAX: u64 = 16 << 20;
/// After so many rounds, a guest that writes as fast as the disk does is given up: else it would have its memory
/// written again and again for ever.
const ROUNDS_MAX: u32 = 24;

/// A snapshot under way of a guest that works.
pub(super) struct Live {
    pub(super) writing: Writing,
    tracking: Tracking,
    /// The pages that were written to the file, or are to be, but for those of a `Full` one's first round.
    pub(super) written: PageSet,
    /// The checksums of a `Full` one's first round.
    first: Option<Vec<u32>>,
    rounds: u32,
    /// The brake that slows the guest down, if that is asked for.
    brake: Option<Brake>,
    /// Pages that are to be written in the next round, whether they were written to since or not.
    left: PageSet,
    /// How many pages were written to the file.
    count: u64,
    /// Room for what is copied while the guest stands still, of which all pages are there already.
    room: Vec<u8>,
}

/// A record of the guest's writes, which ends with this value unless somebody else keeps one.
struct Tracking {
    tracker: Tracker,
    is_ours: bool,
}

impl Drop for Tracking {
    fn drop(&mut self) {
        if self.is_ours
            && let Err(error) = self.tracker.stop()
        {
            log::error(format_args!("writes of the guest are noted still: {error}"));
        }
    }
}

impl Live {
    /// A snapshot of a guest of which writes are noted already if `is_tracked`, and which `brake`, if there is one,
    /// slows down as far as needed.
    pub(super) fn new(writing: Writing, tracker: Tracker, is_tracked: bool, brake: Option<Brake>) -> Self {
        let tracking = Tracking { tracker, is_ours: !is_tracked };
        let (written, left) = (PageSet::default(), PageSet::default());
        Self { writing, tracking, written, first: None, rounds: 0, brake, left, count: 0, room: Vec::new() }
    }

    /// The words of errors for what is attempted.
    pub(super) fn attempt(&self) -> String {
        self.writing.attempt()
    }

    /// Copies memory to the file until little is left to be copied. `unsaved`: the pages that a difference has
    /// beside those that are written from now on; None: those that are this process's own.
    ///
    /// # Errors
    /// The file cannot be written, or the guest writes faster.
    pub(super) fn copy(&mut self, unsaved: Option<PageSet>) -> Result<()> {
        if self.rounds == 0 {
            self.begin(unsaved)?;
        }
        let Self { writing, tracking, written, rounds, brake, left, count, .. } = self;
        let (memory, file) = (writing.memory.memory(), writing.draft.memory_file());
        let take = || {
            let mut taken = tracking.tracker.take()?;
            written.add(&taken);
            taken.add(&std::mem::take(left));
            Ok(taken)
        };
        let write = |taken: &PageSet| {
            *count += taken.count();
            pages::write(&memory, taken, file)
        };
        go_round(rounds, take, write, brake.as_mut().map(|brake| || press(brake)))
    }

    fn begin(&mut self, unsaved: Option<PageSet>) -> Result<()> {
        // Zeros would be pages that the kernel has not given yet.
        self.room = vec![1; LAST_MAX as usize];
        if self.tracking.is_ours {
            self.tracking.tracker.start()?;
        }
        let taken = self.tracking.tracker.take()?;
        self.written.add(&taken);
        let (memory, file) = (self.writing.memory.memory(), self.writing.draft.memory_file());
        match self.writing.kind {
            Kind::Full => {
                let written = memory_file::write(&memory, &self.writing.pagemap, file)?;
                (self.first, self.count) = (Some(written.checksums), written.pages);
            }
            Kind::Diff => {
                match unsaved {
                    Some(unsaved) => self.written.add(&unsaved),
                    None => self.written.add(&pages::own(&memory, &self.writing.pagemap)?),
                }
                self.count = self.written.count();
                pages::write(&memory, &self.written, file)?;
            }
        }
        Ok(())
    }

    /// Copies what was written since the last round to memory, while the guest stands still, and returns which pages
    /// these are. None: they are too many, and the next round has to write them.
    ///
    /// # Errors
    /// KVM's.
    pub(super) fn copy_last(&mut self) -> Result<Option<PageSet>> {
        let last = self.tracking.tracker.take()?;
        self.written.add(&last);
        if last.bytes() > LAST_MAX {
            self.left = last;
            return Ok(None);
        }
        self.brake = None;
        let memory = self.writing.memory.memory();
        let mut room = &mut self.room[..];
        for Piece { range, .. } in pages::pieces(&pages::places(&memory), &last) {
            let (bytes, rest) = room.split_at_mut(range.size as usize);
            memory.read_slice(bytes, GuestAddress(range.start)).context("read pages of the guest")?;
            room = rest;
        }
        Ok(Some(last))
    }

    /// Writes what was copied to memory, and then the state, of which `machine` are the bytes; returns how many pages
    /// were written.
    ///
    /// # Errors
    /// A file cannot be written.
    pub(super) fn finish(self, machine: Vec<u8>, last: &PageSet) -> Result<u64> {
        let Self { writing, tracking, written, first, room, count, .. } = self;
        // Nobody asks any more, and it costs the guest time.
        drop(tracking);
        let (memory, file) = (writing.memory.memory(), writing.draft.memory_file());
        let mut room = &room[..];
        for Piece { range, position } in pages::pieces(&pages::places(&memory), last) {
            let (bytes, rest) = room.split_at(range.size as usize);
            file.write_all_at(bytes, position).with_context(|| writing.attempt())?;
            room = rest;
        }
        let sums = match first {
            None => Sums::Diff(diff::describe(&memory, &written, file)?),
            Some(mut checksums) => {
                let places = pages::places(&memory);
                memory_file::check_anew(file, pages::pieces(&places, &written), &mut checksums)?;
                Sums::Whole(checksums)
            }
        };
        writing.keep(machine, &sums)?;
        Ok(count + last.count())
    }
}

fn press(brake: &mut Brake) {
    brake.press();
    log::debug(format_args!("the guest's CPUs rest {} % of the time", brake.percent()));
}

/// Takes the pages that were written since the last time and writes them, until they are few. A guest that has written
/// not much less than in the round before is slowed down by `slow`.
fn go_round(
    rounds: &mut u32,
    mut take: impl FnMut() -> Result<PageSet>,
    mut write: impl FnMut(&PageSet) -> Result<()>,
    mut slow: Option<impl FnMut()>,
) -> Result<()> {
    let mut before = u64::MAX;
    loop {
        let taken = take()?;
        write(&taken)?;
        *rounds += 1;
        let left = taken.bytes();
        log::debug(format_args!("round {rounds} of a snapshot: {left} bytes"));
        if left <= SMALL {
            return Ok(());
        }
        if *rounds >= ROUNDS_MAX {
            let else_slow = if slow.is_some() { "" } else { ", or have it slowed down (`slow_down`)" };
            return Err(Error::guest(format!(
                "the guest writes to its memory faster than the disk takes it: {} MiB were left after \
                 {rounds} rounds: save to a faster disk, or pause the guest first{else_slow}",
                left >> 20
            )));
        }
        if let Some(slow) = &mut slow
            && left > before / 2
        {
            slow();
        }
        before = left;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    use crate::memory::Range;
    use crate::memory::mapping::page_size;

    const NOT_SLOW: Option<fn()> = None;

    /// So many bytes of a large region.
    fn pages(bytes: u64) -> PageSet {
        let range = Range { start: 0, size: 1 << 30 };
        let pages = (bytes / page_size()) as usize;
        let mut words = vec![u64::MAX; pages / 64];
        words.push((1 << (pages % 64)) - 1);
        PageSet::new(vec![(range, words)])
    }

    #[test]
    fn rounds_end_when_little_is_left() {
        let (mut rounds, mut written) = (0, 0);
        let mut left = [64_u64 << 20, 5 << 20, SMALL, 1].into_iter();
        let take = || Ok(pages(left.next().unwrap()));
        let write = |pages: &PageSet| {
            written += pages.bytes();
            Ok(())
        };
        go_round(&mut rounds, take, write, NOT_SLOW).unwrap();
        assert_eq!((rounds, written), (3, (69 << 20) + SMALL));
        assert_eq!(left.next(), Some(1));
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_disk_is_given_up() {
        let mut rounds = 0;
        for round in [ROUNDS_MAX, ROUNDS_MAX + 1] {
            let error =
                go_round(&mut rounds, || Ok(pages(SMALL + page_size())), |_| Ok(()), NOT_SLOW).unwrap_err();
            let expected =
                "the guest writes to its memory faster than the disk takes it: 4 MiB were left after";
            assert!(error.to_string().contains(expected), "{error}");
            assert!(error.to_string().ends_with("or have it slowed down (`slow_down`)"), "{error}");
            assert_eq!(rounds, round);
        }
        // What cannot be written ends it at once.
        rounds = 0;
        go_round(&mut rounds, || Ok(pages(0)), |_| Err(Error::host("full")), NOT_SLOW).unwrap_err();
        assert_eq!(rounds, 0);
    }

    #[test]
    fn a_guest_is_slowed_down_until_it_writes_less_and_less() {
        let (mut rounds, speed) = (0, Cell::new(64_u64 << 20));
        let slow = || speed.set(speed.get() / 4);
        go_round(&mut rounds, || Ok(pages(speed.get())), |_| Ok(()), Some(slow)).unwrap();
        // The first round says nothing of the next; 64, 64, 16, 16 and 4 MiB.
        assert_eq!((rounds, speed.get()), (5, 4 << 20));
        rounds = 0;
        let error = go_round(&mut rounds, || Ok(pages(5 << 20)), |_| Ok(()), Some(|| ())).unwrap_err();
        assert!(error.to_string().ends_with("or pause the guest first"), "{error}");
    }
}
