//! The working set of a restored guest: the pages that it needs first are noted when it is ready, and later restores ask
//! the kernel for them.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use vm_memory::GuestAddressSpace;

use super::{Finish, Microvm};
use crate::carry::folder::{self, Beside};
use crate::carry::pagemap::Pagemap;
use crate::carry::stored::{Location, Stored};
use crate::carry::working_set::WorkingSet;
use crate::descriptors::Named;
use crate::error::{Context, Error, Result};
use crate::history::{self, Event};
use crate::jobs::Ticket;
use crate::log;
use crate::memory::Memory;
use crate::memory::singly::Singly;
use crate::poll;
use crate::walls;

/// The longest time that a guest can be given until it is ready: a job waits for that, of which there are few.
pub const TIME_MAX: Duration = Duration::from_secs(3600);

/// The folder that a guest was restored from, and its memory's number there.
#[derive(Debug)]
pub(super) struct Origin {
    folder: PathBuf,
    memory: u128,
    /// Has the guest's pages come one by one, until they are noted; none: what is noted has what the kernel maps around, too.
    singly: Option<Singly>,
}

impl Origin {
    /// The folder of the snapshot at `location`, which says of itself what `stored` has; None: it is in no folder of
    /// ours.
    pub(super) fn of(location: &Location, stored: &Stored) -> Option<Self> {
        let Location::Folder(folder) = location else { return None };
        let memory = folder::number_of(stored.memory.name.as_deref()?)?;
        Some(Self { folder: folder.clone(), memory, singly: None })
    }

    /// The working set that was noted there, if it is of this memory, whose file has `size` bytes.
    pub(super) fn working_set(&self, size: u64) -> Option<WorkingSet> {
        WorkingSet::read(&self.folder, self.memory, size)
    }
}

/// Has a thread ask the kernel for the pages of `set`, unless `file`, of `size` bytes, is in memory already. The guest
/// does not wait for that, and is none the worse if it cannot be done.
pub(super) fn read_ahead(set: WorkingSet, file: &Named<std::fs::File>, size: u64) {
    if set.is_in_memory(file, size) {
        return;
    }
    let start = || -> Result<()> {
        let file = Named::new("memory that is read ahead", file.try_clone().context("keep its file open")?);
        let work = move || {
            poll::leave_signals_to_others();
            walls::enclose(walls::Kind::Job);
            if let Err(error) = set.ask_for(&file) {
                log::debug(format_args!("{error}"));
            }
        };
        let thread = std::thread::Builder::new().name("ahead".to_owned()).spawn(work);
        thread.context("start the thread `ahead`").map(drop)
    };
    if let Err(error) = start() {
        log::line(format_args!("have the guest's memory read ahead: {error}"));
    }
}

impl Microvm {
    /// Notes beside the snapshot that this microVM was restored from, when the time `after` is over, which of its
    /// pages have been touched by then. A job does that, whose ticket is returned. Until then, pages that were not touched
    /// before come one by one, if this kernel can do that: what it would map beside them is not noted.
    ///
    /// # Errors
    /// The microVM was not restored from a folder, or its pages are being noted already.
    pub fn note_working_set(&mut self, after: Duration) -> Result<Ticket> {
        self.started()?;
        if self.origin.is_none() {
            return Err(Error::config(
                "its memory is not from the folder of a snapshot (`alula run --restore FOLDER`, `folder` of \
                 `/snapshot/load`): what it needs first can be noted in such a folder alone",
            ));
        }
        if self.noting.is_some_and(|ticket| self.jobs.is_open(ticket)) {
            return Err(Error::config("it is being noted already what the guest needs first"));
        }
        if after > TIME_MAX {
            let seconds = TIME_MAX.as_secs();
            return Err(Error::config(format!("a guest is given at most {seconds} s until it is ready")));
        }
        let ticket = self.start_job("note", move || -> Finish {
            std::thread::sleep(after);
            Box::new(Self::note_now)
        })?;
        self.noting = Some(ticket);
        // A guest that is ready has touched its pages already.
        if !after.is_zero() {
            self.map_singly();
        }
        Ok(ticket)
    }

    /// Has the guest's pages come one by one from now on, until they are noted.
    fn map_singly(&mut self) {
        let Some(memory) = self.machine.as_ref().map(|machine| machine.memory().memory()) else { return };
        match (Singly::map(&memory), &mut self.origin) {
            (Ok(singly), Some(origin)) => origin.singly = Some(singly),
            (Err(error), _) => {
                log::info(format_args!("{error}: what the kernel maps around a page is noted, too"))
            }
            (Ok(_), None) => {}
        }
    }

    /// The guest is ready: has the job go on, which can open nothing by itself.
    fn note_now(&mut self) -> Result<Option<Value>> {
        let begun = (|| {
            let memory = self.started()?.memory().clone();
            let origin =
                self.origin.as_mut().ok_or_else(|| Error::host("its snapshot is not known any more"))?;
            let (number, singly) = (origin.memory, origin.singly.take());
            let (pagemap, file) = (Pagemap::open()?, Beside::new(&origin.folder)?);
            let ticket = self.noting.ok_or_else(|| Error::host("its job is not known any more"))?;
            self.jobs.go_on(ticket, "note", move || -> Finish {
                let noted = note(&memory, &pagemap, file, number);
                drop(singly);
                Box::new(|_| tell(noted))
            })
        })();
        match begun {
            Ok(()) => Ok(None),
            Err(error) => tell(Err(error)),
        }
    }
}

fn note(memory: &Memory, pagemap: &Pagemap, file: Beside, number: u128) -> Result<u64> {
    let set = WorkingSet::note(&memory.memory(), pagemap)?;
    file.keep(&set.to_bytes(number))?;
    Ok(set.pages())
}

/// Tells the log and the events how it ended: a note that the command line asked for has no client to be answered.
fn tell(noted: Result<u64>) -> Result<Option<Value>> {
    match &noted {
        Ok(pages) => history::tell(|| Event::WorkingSetNoted { pages: *pages }),
        Err(error) => log::line(format_args!("note what the guest needs first: {error}")),
    }
    noted.map(|_| None)
}
