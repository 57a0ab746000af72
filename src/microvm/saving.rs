//! A microVM that is saved to files.

use std::time::{Duration, Instant};

use serde_json::Value;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use super::counts::LATENCIES;
use super::live::Live;
use super::{Finish, Microvm, note};
use crate::carry::folder::Draft;
use crate::carry::line::{After, Line, Place};
use crate::carry::memory_file::{self, MemoryFile};
use crate::carry::pagemap::Pagemap;
use crate::carry::stored::{self, Location, Sums};
use crate::carry::{diff, pages};
use crate::error::{Context, Error, Result};
use crate::history::{self, Event};
use crate::jobs::Ticket;
use crate::machine::{Hold, RunState};
use crate::memory::page_set::PageSet;
use crate::memory::{Memory, Region};

/// Who has a machine stand still while it is saved.
const REASON: &str = "snapshot";

/// What is to be saved, and where to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Save {
    /// Where to.
    pub location: Location,
    /// How much of the memory.
    pub kind: Kind,
    /// A guest that runs goes on while most of it is written.
    pub is_live: bool,
    /// A guest that writes faster than the disk takes it is slowed down meanwhile.
    pub slows_down: bool,
}

/// How much of a microVM's memory is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All of it.
    Full,
    /// What was written since the last snapshot if writes are noted, else what is this process's own.
    Diff,
}

impl Kind {
    /// The word of the API for it.
    fn name(self) -> &'static str {
        match self {
            Self::Full => "Full",
            Self::Diff => "Diff",
        }
    }
}

/// A snapshot that is being written.
pub(super) struct Saving {
    kind: Kind,
    /// The snapshot's number among those of this microVM.
    number: u32,
    begun: Instant,
    /// Since when the guest stands still, which ran before, and is to go on when the snapshot is there.
    stands_since: Option<Instant>,
    /// How long the guest has stood still in all before it went on again.
    stood: Duration,
    /// The job, which has more than one part if the guest goes on meanwhile.
    ticket: Ticket,
    /// The memory of the guest stays the one that is written.
    _hold: Option<Hold>,
}

impl Saving {
    /// Tells that it is there.
    fn tell(&self, pages: u64, pause: Duration) {
        let latencies = match self.kind {
            Kind::Full => [&LATENCIES.full_create_snapshot, &LATENCIES.vmm_full_create_snapshot],
            Kind::Diff => [&LATENCIES.diff_create_snapshot, &LATENCIES.vmm_diff_create_snapshot],
        };
        note(self.begun, latencies);
        let (time_us, pause_us) = (self.begun.elapsed().as_micros() as u64, pause.as_micros() as u64);
        history::tell(|| Event::SnapshotCreated { kind: self.kind.name(), pages, pause_us, time_us });
    }

    /// Somebody else wants the guest to stand still, and sees to it that it goes on.
    pub(super) fn leave_paused(&mut self) {
        self.stands_since = None;
    }
}

/// The snapshots of this microVM so far.
#[derive(Default)]
pub(super) struct Taken {
    /// The random number by which this microVM's snapshots are known, from the first one on.
    microvm: Option<u128>,
    /// How many snapshots were begun.
    count: u32,
    /// The number of the last snapshot that was written to its end.
    last: u32,
    /// The snapshot that the microVM was restored from, if there is one and its place is known.
    restored_from: Option<Place>,
}

impl Taken {
    /// No snapshots yet, of a microVM that was restored from the snapshot at `restored_from`.
    pub(super) fn from(restored_from: Option<Place>) -> Self {
        Self { restored_from, ..Self::default() }
    }
}

/// All that a job needs to write a snapshot, with every file open.
pub(super) struct Writing {
    pub(super) kind: Kind,
    pub(super) draft: Draft,
    pub(super) pagemap: Pagemap,
    boot_id: [u8; 16],
    line: Line,
    pub(super) memory: Memory,
}

impl Writing {
    /// The words of errors for what is attempted.
    pub(super) fn attempt(&self) -> String {
        format!("write the memory of the guest to `{}`", self.draft.memory_path().display())
    }

    /// Writes the memory and then the state, of which `machine` are the bytes, and makes both the snapshot that counts;
    /// returns how many pages of memory were written. Of a difference, these are the pages `written`; None: those that
    /// this process has of its own.
    fn write(self, machine: Vec<u8>, written: Option<PageSet>) -> Result<u64> {
        let (memory, file) = (self.memory.memory(), self.draft.memory_file());
        let attempt = || self.attempt();
        let (sums, pages) = match self.kind {
            Kind::Full => {
                let written = memory_file::write(&memory, &self.pagemap, file).with_context(attempt)?;
                (Sums::Whole(written.checksums), written.pages)
            }
            Kind::Diff => {
                let written = match written {
                    Some(written) => written,
                    None => pages::own(&memory, &self.pagemap)?,
                };
                let blocks = diff::write(&memory, &written, file).with_context(attempt)?;
                (Sums::Diff(blocks), written.count())
            }
        };
        self.keep(machine, &sums)?;
        Ok(pages)
    }

    /// Writes the state, of which `machine` are the bytes, beside the memory, which is written, and makes both the
    /// snapshot that counts.
    pub(super) fn keep(self, machine: Vec<u8>, sums: &Sums) -> Result<()> {
        let (size, file) = (self.memory.memory().iter().map(Region::len).sum(), self.draft.memory_file());
        let attempt = || self.attempt();
        file.set_len(size).context("set its length").with_context(attempt)?;
        file.sync_all().context("flush it to the disk").with_context(attempt)?;
        let memory_file = MemoryFile { name: self.draft.memory_name(), size };
        self.draft.keep(&stored::state(machine, &memory_file, sums, self.boot_id, Some(&self.line))?)
    }
}

impl Microvm {
    /// Saves the machine to files. A guest that runs stands still meanwhile, or for a moment. A job writes, whose
    /// ticket is returned.
    ///
    /// # Errors
    /// The machine cannot be saved now, or nothing can be made there: then nothing was.
    pub fn create_snapshot(&mut self, save: &Save) -> Result<Ticket> {
        self.begin_snapshot(save, Instant::now()).inspect_err(|error| {
            history::tell(|| Event::SnapshotFailed { reason: history::text(error) });
        })
    }

    fn begin_snapshot(&mut self, save: &Save, begun: Instant) -> Result<Ticket> {
        let Save { location, kind, is_live, slows_down } = save;
        self.check_not_saving()?;
        let machine = self.started()?;
        if machine.is_changing() {
            return Err(Error::config("a change of a device waits for what it has in flight: wait for that"));
        }
        machine.check_to_save()?;
        let resumes = machine.state() == RunState::Running;
        let is_live = resumes && *is_live;
        if resumes && !is_live && matches!(location, Location::Files { .. }) {
            // As in Firecracker, whose clients see to that themselves.
            return Err(Error::config("the microVM runs: pause it first (`PATCH /vm`), or say `live`"));
        }
        if *kind == Kind::Diff {
            if machine.plugs_memory() {
                return Err(Error::config(
                    "a difference (`Diff`, --diff) has the memory of the snapshot before it, and that of this guest comes \
                     and goes (`/hotplug/memory`): save all of it (`Full`)",
                ));
            }
            location.check_free()?;
        }
        // All that can be known to fail does so before the guest is disturbed.
        let memory = machine.memory().clone();
        let pagemap = Pagemap::open_or_take_all();
        // No boot of any host is called by a random number: the snapshot is then checked as one of another host.
        let boot_id = match stored::boot_id() {
            Some(boot_id) => boot_id,
            None => stored::random()?.to_be_bytes(),
        };
        let line = self.next_in_line(*kind)?;
        let number = line.place.number;
        let writing = Writing { kind: *kind, draft: location.begin()?, pagemap, boot_id, line, memory };
        let stands_since = (resumes && !is_live).then(Instant::now);
        if stands_since.is_some() {
            self.pause(REASON)?;
        }
        // Taken before the guest's memory is looked at.
        let hold = self.started()?.hold_slots();
        let started = if is_live { self.copy_live(writing, *slows_down) } else { self.save_to(writing) };
        match &started {
            Ok(ticket) => {
                let (kind, ticket, stood) = (*kind, *ticket, Duration::ZERO);
                self.saving = Some(Saving { kind, number, begun, stands_since, stood, ticket, _hold: hold });
            }
            Err(_) if stands_since.is_some() => self.resume(REASON)?,
            Err(_) => {}
        }
        started
    }

    /// Has a job copy the memory of a guest that runs, as far as it can be copied while the guest goes on.
    fn copy_live(&mut self, writing: Writing, slows_down: bool) -> Result<Ticket> {
        let unsaved = self.unsaved.clone();
        let machine = self.started()?;
        let brake = slows_down.then(|| machine.brake()).transpose()?;
        let mut live = Live::new(writing, machine.tracker(), machine.tracks_writes(), brake);
        self.start_job("snapshot", move || -> Finish {
            let copied = live.copy(unsaved);
            Box::new(move |microvm| microvm.end_round(live, copied))
        })
    }

    /// What can be copied of a guest that goes on was copied, or could not be: now it stands still for the rest.
    fn end_round(&mut self, mut live: Live, copied: Result<()>) -> Result<Option<Value>> {
        let last = copied.with_context(|| live.attempt()).and_then(|()| self.copy_last(&mut live));
        // KVM's dirty log tells of a page once: if this snapshot fails, the next one must have these pages, too.
        self.unsaved.iter_mut().for_each(|unsaved| unsaved.add(&live.written));
        let ticket = self.saving.as_ref().map_or(0, |saving| saving.ticket);
        let goes_on = match last {
            Ok(Some((machine, last))) => self.jobs.go_on(ticket, "snapshot", move || -> Finish {
                let pages = live.finish(machine, &last);
                Box::new(move |microvm| microvm.end_snapshot(pages))
            }),
            Ok(None) => self.jobs.go_on(ticket, "snapshot", move || -> Finish {
                let copied = live.copy(None);
                Box::new(move |microvm| microvm.end_round(live, copied))
            }),
            Err(error) => Err(error),
        };
        match goes_on {
            Ok(()) => Ok(None),
            Err(error) => self.end_snapshot(Err(error)),
        }
    }

    /// Has the guest stand still while the state is taken, and the rest of the memory is copied. None: it has written
    /// too much for that meanwhile.
    fn copy_last(&mut self, live: &mut Live) -> Result<Option<(Vec<u8>, PageSet)>> {
        let begun = Instant::now();
        let runs = self.state() == Some(RunState::Running);
        if runs {
            self.pause(REASON)?;
        }
        // The state first: to take it may write to memory.
        let saved = self.started()?.save();
        let copied = saved.and_then(|saved| Ok(live.copy_last()?.map(|pages| (saved, pages))));
        if runs {
            self.go_on(REASON)?;
            let stood = begun.elapsed();
            self.saving.iter_mut().for_each(|saving| saving.stood += stood);
        }
        copied?.map(|(saved, pages)| Ok((saved.to_bytes()?, pages))).transpose()
    }

    /// Takes the machine's state, and has a job write it, with the memory.
    fn save_to(&mut self, writing: Writing) -> Result<Ticket> {
        let saved = self.started()?.save()?.to_bytes()?;
        let written = self.take_unsaved()?;
        self.start_job("snapshot", move || -> Finish {
            let pages = writing.write(saved, written);
            Box::new(move |microvm| microvm.end_snapshot(pages))
        })
    }

    /// The pages that were written since the last snapshot that is whole. They count as written until the next one
    /// is. None: that is not known.
    fn take_unsaved(&mut self) -> Result<Option<PageSet>> {
        let machine = self.started()?;
        if machine.tracks_writes() {
            let taken = machine.tracker().take()?;
            self.unsaved.iter_mut().for_each(|unsaved| unsaved.add(&taken));
        }
        Ok(self.unsaved.clone())
    }

    /// The snapshot is there, with so many pages of memory, or could not be written.
    fn end_snapshot(&mut self, written: Result<u64>) -> Result<Option<Value>> {
        let saving = self.saving.take();
        if written.is_ok() {
            self.taken.last = saving.as_ref().map_or(self.taken.last, |saving| saving.number);
            // What is written from here on is for the next one.
            self.unsaved = self.started()?.tracks_writes().then(PageSet::default);
        }
        let since = saving.as_ref().and_then(|saving| saving.stands_since);
        let went_on = if since.is_some() { self.resume(REASON) } else { Ok(()) };
        let stood = since.map_or(Duration::ZERO, |since| since.elapsed());
        match (&written, &saving) {
            (Ok(pages), Some(saving)) => saving.tell(*pages, stood + saving.stood),
            (Ok(_), None) => {}
            (Err(error), _) => history::tell(|| Event::SnapshotFailed { reason: history::text(error) }),
        }
        went_on?;
        written.map(|_| None)
    }

    /// Gives the next snapshot its place, and says what that snapshot comes after.
    fn next_in_line(&mut self, kind: Kind) -> Result<Line> {
        let noted_since = self.unsaved.is_some();
        let Taken { microvm, count, last, restored_from } = &mut self.taken;
        let microvm = match microvm {
            Some(microvm) => *microvm,
            None => *microvm.insert(stored::random()?),
        };
        *count = count.saturating_add(1);
        // A difference has the pages that were noted since the last snapshot, or all that are this process's own.
        let after = match noted_since {
            true => After { number: *last, restored_from: None },
            false => After { number: 0, restored_from: *restored_from },
        };
        Ok(Line { place: Place { microvm, number: *count }, after: (kind == Kind::Diff).then_some(after) })
    }

    /// While a snapshot is being written, nothing may change what it is of.
    pub(super) fn check_not_saving(&self) -> Result<()> {
        match self.saving {
            None => Ok(()),
            Some(_) => {
                Err(Error::config("a snapshot of the microVM is being written: wait until it is done"))
            }
        }
    }
}
