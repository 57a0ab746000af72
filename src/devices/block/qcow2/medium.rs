//! The file of an image, as everything that reads or writes it does: within its bounds, and where a test
//! can see what reaches it, and when.

use std::fs::File;
use std::io::{Error, ErrorKind, Result, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use super::header;
use crate::descriptors::Named;
use crate::devices::block::holes;
use crate::virtio::buffers::Buffers;

/// What is written where no holes can be.
static ZEROS: [u8; 4096] = [0; 4096];

/// An open file, and where it ends at the latest.
pub struct Medium {
    file: Named<File>,
    /// The file never becomes longer. A damaged table may name a place a million gigabytes away.
    end: u64,
    /// A sync failed. The host tells of a writeback error once, so a later sync that succeeds says nothing, nor
    /// one at the same time: locked during each.
    failed: Mutex<bool>,
    /// A sync has failed at some time: what is read back may be in the page cache alone.
    doubted: AtomicBool,
    /// Features are on in the header that the first write makes untrue, for whoever knows them.
    claims: Option<Claims>,
}

/// The autoclear features of an image that was opened to be written, and may never be.
struct Claims {
    are_there: AtomicBool,
    /// Held while they are taken away.
    lock: Mutex<()>,
    /// On stable storage before anything else is written.
    durable: bool,
}

impl Medium {
    /// A file that is written up to `end`; 0: it is only read.
    pub fn new(file: Named<File>, end: u64) -> Self {
        Self { file, end, failed: Mutex::default(), doubted: AtomicBool::new(false), claims: None }
    }

    /// This file as that of an image whose autoclear features are on: the first write turns them off. If
    /// `durable`, the header without them is synced before that write.
    pub fn with_claims(self, durable: bool) -> Self {
        Self { claims: Some(Claims { are_there: true.into(), lock: Mutex::default(), durable }), ..self }
    }

    /// The claims of the header that are still there and not to be seen, in what was read from byte `offset` on:
    /// `imago` would write all of the header anew when it opens the image.
    pub fn hide_claims(&self, bytes: &mut [u8], offset: u64) {
        if self.claims.as_ref().is_some_and(|claims| claims.are_there.load(Ordering::Acquire)) {
            header::hide_autoclear(bytes, offset);
        }
    }

    /// Takes the claims of the header away, which what is written next makes untrue.
    fn disclaim(&self) -> Result<()> {
        let Some(claims) = &self.claims else { return Ok(()) };
        if !claims.are_there.load(Ordering::Acquire) {
            return Ok(());
        }
        let _alone = claims.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if claims.are_there.load(Ordering::Acquire) {
            self.file.write_all_at(&[0; header::AUTOCLEAR_LENGTH], header::AUTOCLEAR)?;
            self.note(header::AUTOCLEAR, header::AUTOCLEAR_LENGTH as u64);
            if claims.durable {
                self.sync()?;
            }
            claims.are_there.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// The file itself, to read from.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes ready to write there, if it can be: asked before each write, whoever does it.
    pub fn check(&self, offset: u64, length: u64) -> Result<()> {
        match offset.checked_add(length).is_some_and(|end| end <= self.end) {
            true => self.disclaim(),
            false => Err(Error::new(
                ErrorKind::FileTooLarge,
                format!(
                    "its tables name byte {offset} of the file, which sound ones keep below {}: \
                     `qemu-img check -r all` it",
                    self.end
                ),
            )),
        }
    }

    /// How many bytes it has.
    pub fn size(&self) -> Result<u64> {
        (&*self.file).seek(SeekFrom::End(0))
    }

    /// Reads from byte `offset` on. What is beyond the end of the file reads as zeros, as `imago` asks.
    pub fn read(&self, mut rest: &mut [u8], mut offset: u64) -> Result<()> {
        while !rest.is_empty() {
            match self.file.read_at(rest, offset) {
                Ok(0) => {
                    rest.fill(0);
                    break;
                }
                Ok(count) => {
                    rest = &mut rest[count..];
                    offset += count as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes from byte `offset` on.
    pub fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.check(offset, bytes.len() as u64)?;
        self.file.write_all_at(bytes, offset)?;
        self.note(offset, bytes.len() as u64);
        Ok(())
    }

    /// Writes the first `count` bytes of a guest's buffers, which are then taken away.
    pub fn put(&self, buffers: &mut Buffers, offset: u64, count: usize) -> Result<()> {
        self.check(offset, count as u64)?;
        buffers.write_some_at(&self.file, offset, count)?;
        self.note(offset, count as u64);
        Ok(())
    }

    /// Makes a range zeros; the file then reaches to its end at least.
    pub fn zero(&self, offset: u64, length: u64) -> Result<()> {
        self.check(offset, length)?;
        match holes::zero(&self.file, offset, length, true) {
            // A file system without holes.
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                let end = offset + length;
                let piece = |at: u64| &ZEROS[..ZEROS.len().min((end - at) as usize)];
                let mut pieces = (offset..end).step_by(ZEROS.len());
                pieces.try_for_each(|at| self.file.write_all_at(piece(at), at))?;
            }
            // A hole does not make a file longer.
            Ok(()) if self.size()? < offset + length => self.file.set_len(offset + length)?,
            result => result?,
        }
        self.note(offset, length);
        Ok(())
    }

    /// Makes a range zeros that keeps its blocks.
    pub fn zero_in_place(&self, offset: u64, length: u64) -> Result<()> {
        self.check(offset, length)?;
        holes::zero(&self.file, offset, length, false)?;
        self.note(offset, length);
        Ok(())
    }

    /// Gives the blocks of a range back, which reads as zeros then. The tables may still name it: a device
    /// that would not promise zeros does nothing.
    pub fn punch(&self, offset: u64, length: u64) -> Result<()> {
        self.check(offset, length)?;
        holes::punch_zeros(&self.file, offset, length)?;
        self.note(offset, length);
        Ok(())
    }

    /// Makes the file longer or shorter.
    pub fn resize(&self, length: u64) -> Result<()> {
        self.check(length, 0)?;
        self.file.set_len(length)
    }

    /// Returns when all that was written is on stable storage. After one failure every sync fails, whoever
    /// asks for it: data whose loss a write was told of must not be confirmed to a flush.
    pub fn sync(&self) -> Result<()> {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if *failed {
            return Err(Error::other("an earlier write to stable storage failed"));
        }
        if let Err(error) = self.sync_data() {
            *failed = true;
            self.doubted.store(true, Ordering::Release);
            return Err(error);
        }
        Ok(())
    }

    /// Syncs are tried again, because the user opens the image anew or it is closed.
    pub fn try_again(&self) {
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }

    /// Whether what is read from the file may not be on stable storage although it was not changed since.
    pub fn is_doubted(&self) -> bool {
        self.doubted.load(Ordering::Acquire)
    }

    #[cfg(not(test))]
    fn sync_data(&self) -> Result<()> {
        self.file.sync_data()
    }

    #[cfg(test)]
    fn sync_data(&self) -> Result<()> {
        record::sync()?;
        self.file.sync_data()
    }

    #[cfg(not(test))]
    fn note(&self, _: u64, _: u64) {}

    #[cfg(test)]
    fn note(&self, offset: u64, length: u64) {
        record::wrote(self, offset, length);
    }
}

/// What reaches the files of this thread, for tests.
#[cfg(test)]
pub mod record {
    use std::cell::{Cell, RefCell};

    use super::Medium;

    /// One step of what reached a file.
    pub enum Step {
        Write { offset: u64, bytes: Vec<u8> },
        Sync,
    }

    thread_local! {
        static STEPS: RefCell<Option<Vec<Step>>> = const { RefCell::new(None) };
    }

    /// Begins to record.
    pub fn begin() {
        STEPS.set(Some(Vec::new()));
    }

    /// How many steps there were.
    pub fn count() -> usize {
        STEPS.with_borrow(|steps| steps.as_ref().map_or(0, Vec::len))
    }

    /// Ends; returns the steps.
    pub fn end() -> Vec<Step> {
        STEPS.take().expect("it was begun")
    }

    fn add(step: impl FnOnce() -> Step) {
        STEPS.with_borrow_mut(|steps| steps.as_mut().map(|steps| steps.push(step())));
    }

    pub(super) fn wrote(medium: &Medium, offset: u64, length: u64) {
        add(|| {
            let mut bytes = vec![0; length as usize];
            medium.read(&mut bytes, offset).expect("it was written just now");
            Step::Write { offset, bytes }
        });
    }

    thread_local! {
        static FAILS: Cell<bool> = const { Cell::new(false) };
    }

    /// Lets the next sync of this thread fail, as the host tells of a writeback error: once.
    pub fn fail_next_sync() {
        FAILS.set(true);
    }

    pub(super) fn sync() -> std::io::Result<()> {
        if FAILS.take() {
            return Err(std::io::Error::from_raw_os_error(libc::EIO));
        }
        add(|| Step::Sync);
        Ok(())
    }
}
