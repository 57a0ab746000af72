//! The reader of events that this process writes to (`--events`).

use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use super::{Event, HISTORY, OPEN, Reader};
use crate::error::Result;
use crate::sink::{Purpose, Sink};
use crate::sys::descriptor;

/// The descriptor of the feed, and the number of the event that it gets next; -1: there is none.
static FEED: AtomicI32 = AtomicI32::new(-1);
static FED: AtomicU64 = AtomicU64::new(0);

/// A file, FIFO or inherited descriptor that gets every line (`--events`).
pub struct Feed {
    sink: Sink,
    reader: Reader,
    /// The last line could not be written, and not because there is no room now: the other side is gone.
    is_broken: bool,
}

impl Feed {
    /// Opens it, as any sink.
    pub fn open(path: &Path) -> Result<Self> {
        let feed =
            Self { sink: Sink::open(Purpose::Events, path)?, reader: Reader::default(), is_broken: false };
        feed.note();
        Ok(feed)
    }

    /// Notes how far it is, for [`tell_at_once`].
    fn note(&self) {
        FED.store(self.reader.next, Ordering::Relaxed);
        FEED.store(self.sink.as_raw_fd(), Ordering::Relaxed);
    }

    /// Writes what it has not got yet, as far as it goes without waiting.
    pub fn tell(&mut self) {
        // Only what is written counts as read: the history keeps the rest.
        let mut ahead = self.reader;
        self.is_broken = false;
        while self.sink.flush() {
            let lines = ahead.read(1);
            if lines.is_empty() {
                return;
            }
            // There was room.
            self.is_broken = !self.sink.write_line(lines.as_bytes());
            if self.is_broken {
                return;
            }
            self.reader = ahead;
            self.note();
        }
    }

    /// Whether it has not got everything, and may still get it.
    pub fn is_behind(&mut self) -> bool {
        !self.is_broken && (!self.sink.flush() || self.reader.is_behind())
    }
}

impl AsRawFd for Feed {
    fn as_raw_fd(&self) -> RawFd {
        self.sink.as_raw_fd()
    }
}

/// Adds the last event of a process that ends at once, and writes all that the feed has not got yet, as far as nobody is
/// in the midst of that.
pub fn tell_at_once(last: Event) {
    let feed = FEED.load(Ordering::Relaxed);
    let Ok(mut history) = HISTORY.try_lock() else { return };
    if OPEN.load(Ordering::Acquire) && feed >= 0 {
        history.add(last);
        let (mut reader, mut lines) = (Reader { next: FED.load(Ordering::Relaxed) }, String::new());
        history.read(&mut reader, usize::MAX, &mut lines);
        descriptor::write(feed, lines.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::super::lock;
    use super::*;

    #[test]
    fn nobody_waits_for_a_feed_whose_reader_is_gone() {
        lock().add(Event::PoweredOff);
        let (reader, writer) = std::io::pipe().unwrap();
        let mut feed = Feed::open(Path::new(&crate::descriptors::hand_over(&writer))).unwrap();
        assert!(feed.is_behind());
        drop(reader);
        feed.tell();
        assert!(!feed.is_behind());
    }
}
