//! A microVM that is saved to files.

use std::time::{Duration, Instant};

use serde_json::Value;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use super::counts::LATENCIES;
use super::{Finish, Microvm, note};
use crate::carry::folder::Draft;
use crate::carry::memory_file::{self, Pagemap};
use crate::carry::stored::{self, Location, MemoryFile, Sums};
use crate::carry::{diff, pages};
use crate::error::{Context, Error, Result};
use crate::history::{self, Event};
use crate::jobs::Ticket;
use crate::machine::RunState;
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
    begun: Instant,
    /// Since when the guest stands still, which ran before, and is to go on when the snapshot is there.
    stands_since: Option<Instant>,
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

/// What a job needs to write a snapshot: all that it opens is open.
struct Writing {
    kind: Kind,
    draft: Draft,
    pagemap: Pagemap,
    boot_id: [u8; 16],
    memory: Memory,
}

impl Writing {
    /// Writes the memory and then the state, of which `machine` are the bytes, and makes both the snapshot that counts;
    /// returns how many pages of memory were written. Of a difference, these are the pages `written`; None: those that
    /// this process has of its own.
    fn write(self, machine: Vec<u8>, written: Option<PageSet>) -> Result<u64> {
        let (memory, file) = (self.memory.memory(), self.draft.memory_file());
        const ATTEMPT: &str = "write the memory of the guest";
        let (sums, pages) = match self.kind {
            Kind::Full => {
                let written = memory_file::write(&memory, &self.pagemap, file).context(ATTEMPT)?;
                (Sums::Whole(written.checksums), written.pages)
            }
            Kind::Diff => {
                let written = match written {
                    Some(written) => written,
                    None => pages::own(&memory, &self.pagemap)?,
                };
                pages::write(&memory, &written, file).context(ATTEMPT)?;
                (Sums::Diff(diff::describe(&memory, &written, file)?), written.count())
            }
        };
        let size = memory.iter().map(Region::len).sum();
        file.set_len(size).context("give it its length").context(ATTEMPT)?;
        file.sync_all().context("flush it to the disk").context(ATTEMPT)?;
        let memory_file = MemoryFile { name: self.draft.memory_name(), size };
        self.draft.keep(&stored::state(machine, &memory_file, &sums, self.boot_id)?)?;
        Ok(pages)
    }
}

impl Microvm {
    /// Saves the machine to files. A guest that runs stands still meanwhile. A job writes, whose ticket is
    /// returned.
    ///
    /// # Errors
    /// The machine cannot be saved now, or nothing can be made there: then nothing was.
    pub fn create_snapshot(&mut self, save: &Save) -> Result<Ticket> {
        self.begin_snapshot(save, Instant::now()).inspect_err(|error| {
            history::tell(|| Event::SnapshotFailed { reason: history::text(error) });
        })
    }

    fn begin_snapshot(&mut self, save: &Save, begun: Instant) -> Result<Ticket> {
        let Save { location, kind } = save;
        self.check_not_saving()?;
        let machine = self.started()?;
        if machine.is_changing() {
            return Err(Error::config("a change of a device waits for what it has in flight: wait for that"));
        }
        let resumes = machine.state() == RunState::Running;
        if resumes && matches!(location, Location::Files { .. }) {
            // As in Firecracker, whose clients see to that themselves.
            return Err(Error::config("the microVM runs: pause it first (`PATCH /vm`)"));
        }
        if *kind == Kind::Diff {
            location.check_free()?;
        }
        // All that can be known to fail does so before the guest is disturbed.
        let memory = machine.memory().clone();
        let (pagemap, boot_id) = (Pagemap::open()?, stored::boot_id()?);
        let writing = Writing { kind: *kind, draft: location.begin()?, pagemap, boot_id, memory };
        let stands_since = resumes.then(Instant::now);
        if resumes {
            self.pause(REASON)?;
        }
        let started = self.save_to(writing);
        match &started {
            Ok(_) => self.saving = Some(Saving { kind: *kind, begun, stands_since }),
            Err(_) if resumes => self.resume(REASON)?,
            Err(_) => {}
        }
        started
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
            // What is written from here on is for the next one.
            self.unsaved = self.started()?.tracks_writes().then(PageSet::default);
        }
        let stood = saving.as_ref().and_then(|saving| saving.stands_since);
        let went_on = if stood.is_some() { self.resume(REASON) } else { Ok(()) };
        let pause = stood.map_or(Duration::ZERO, |since| since.elapsed());
        match (&written, &saving) {
            (Ok(pages), Some(saving)) => saving.tell(*pages, pause),
            (Ok(_), None) => {}
            (Err(error), _) => history::tell(|| Event::SnapshotFailed { reason: history::text(error) }),
        }
        went_on?;
        written.map(|_| None)
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
