//! What happens to the microVM, one JSON object a line, for whoever wants to know without asking again
//! and again: readers of `GET /events` and of `--events`.
//!
//! The history is one bounded ring. A reader is a place in it: a new one begins at the beginning, a
//! slow one finds that what it has not read is gone, and is told how much. So readers cost no memory
//! of their own, and nobody waits for them.

mod feed;

use std::collections::VecDeque;
use std::fmt::{Display, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use crate::clock::{self, Utc};
use crate::error::Result;
use crate::log;
use crate::poll::{self, EventFd};

pub use feed::{Feed, tell_at_once};

/// So many events are kept: a client or a guest that causes them for ever must not make us grow.
const KEPT_MAX: usize = 256;
/// Texts in an event are cut at this length: parts of some come from clients and guests.
const TEXT_MAX: usize = 512;
/// So many device errors are kept in one period, the others counted as lost: a guest can cause them at
/// the speed of its rings.
const DEVICE_ERRORS_MAX: u32 = 20;
const PERIOD: Duration = Duration::from_secs(10);

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A part of the microVM was configured: `/drives/root`.
    Configured {
        /// The API's path of what was configured, or the file that says everything.
        what: String,
    },
    /// The guest runs for the first time.
    Started {
        /// Who wanted it: a request, or the command line.
        reason: &'static str,
    },
    /// The guest was stopped by a reset of its machine, and boots again.
    Restarted {
        /// Who wanted it: a request, or the command line.
        reason: &'static str,
    },
    /// The guest says that it has booted (`--boot-timer`).
    Booted {
        /// So long after its start began, in microseconds.
        time_us: u64,
        /// The CPU time of all threads in that time.
        cpu_us: u64,
    },
    /// The agent in the guest listens: the guest takes commands from now on.
    GuestReady,
    /// Its CPUs and devices stand still.
    Paused {
        /// As above.
        reason: &'static str,
    },
    /// They go on.
    Resumed {
        /// As above.
        reason: &'static str,
    },
    /// A guest that was saved is in this process, and stands still where it was saved.
    Restored {
        /// As above.
        reason: &'static str,
    },
    /// The guest was saved to files.
    SnapshotCreated {
        /// `Full`: with all of its memory. `Diff`: with what was written of it since the snapshot before.
        kind: &'static str,
        /// So many pages of its memory were written to the file.
        pages: u64,
        /// So long the guest stood still for it, in microseconds.
        pause_us: u64,
        /// So long it took, in microseconds.
        time_us: u64,
    },
    /// The guest could not be saved, and goes on as before.
    SnapshotFailed {
        /// Why.
        reason: String,
    },
    /// The pages that the guest needs first after a restore were noted beside the snapshot.
    WorkingSetNoted {
        /// The number of these pages, of 4 KiB each, in its memory file.
        pages: u64,
    },
    /// A page that the guest needs has not come from its page-fault handler for 5 s: it waits.
    PageAwaited {
        /// The handler's socket.
        path: PathBuf,
    },
    /// The guest asked for a reset.
    Reset,
    /// The guest powered off.
    PoweredOff,
    /// The guest's kernel says that it panicked.
    Panicked,
    /// The guest has let its watchdog expire.
    WatchdogExpired {
        /// What is done: `reset`, `poweroff` (the guest ends), or `none`.
        action: &'static str,
    },
    /// Every CPU is halted for good.
    Halted,
    /// The guest crashed: a triple fault (x86_64).
    Crashed,
    /// The guest wrote its own code to the exit register.
    Exited {
        /// The code.
        code: u32,
    },
    /// KVM could not go on running the guest.
    Failed {
        /// Why.
        reason: String,
    },
    /// A device could not do what it was asked.
    DeviceError {
        /// The device.
        device: String,
        /// Why.
        reason: String,
        /// It does nothing more until its driver resets it.
        needs_reset: bool,
    },
    /// Another image is under a disk.
    DiskSwapped {
        /// The disk.
        drive_id: String,
        /// The new image.
        path: PathBuf,
    },
    /// The image of a disk is used although somebody else uses it, and one of both writes.
    DiskShared {
        /// The disk, as messages name it.
        device: String,
        /// The image.
        path: PathBuf,
        /// Who uses it.
        reason: String,
    },
    /// Something else of a device was changed while it is in use.
    DeviceChanged {
        /// The device.
        device: String,
        /// The body of the request.
        change: Value,
    },
    /// The guest has one more device.
    DevicePlugged {
        /// The device, as messages name it.
        device: String,
    },
    /// The guest was asked to let a device go, which stays until the guest has.
    DeviceAskedToGo {
        /// The device, as messages name it.
        device: String,
    },
    /// A device was taken away from the guest.
    DeviceGone {
        /// The device, as messages name it.
        device: String,
        /// Who had it gone: its owner (`DELETE`), the guest, which was asked to let it go (`guest`), or a reset before the
        /// guest had (`reset`).
        reason: &'static str,
    },
    /// The guest has more CPUs (`PATCH /machine-config`).
    CpusPlugged {
        /// How many it has now.
        vcpu_count: u16,
    },
    /// The guest was asked to let CPUs go, which stay until it has.
    CpusAskedToGo {
        /// How many it is to have then.
        vcpu_count: u16,
    },
    /// CPUs were taken away from the guest.
    CpusGone {
        /// How many it has now.
        vcpu_count: u16,
        /// The reason: the guest has let them go when it was asked (`guest`), or a reset came before it had (`reset`).
        reason: &'static str,
    },
    /// The guest has plugged, or unplugged, as much memory as was requested (`PATCH /hotplug/memory`).
    MemoryResized {
        /// The memory that is plugged now, in MiB.
        plugged_mib: u64,
    },
    /// A TAP interface that was named was not there, and was made.
    TapMade {
        /// Its name.
        host_dev_name: String,
        /// How it is.
        reason: &'static str,
    },
    /// A request of the API was refused.
    ApiError {
        /// The request.
        request: String,
        /// What its client was told.
        reason: String,
    },
    /// The process ends; always the last event.
    Ended {
        /// How the guest ended, in the words of the line on standard error.
        reason: String,
        /// The process's exit code.
        exit_code: u8,
    },
    /// So many events were not kept until this reader read them.
    Lost {
        /// How many.
        count: u64,
    },
}

impl Event {
    /// Goes first when there is no room: it says nothing of the guest's life, or a guest can cause it again and again.
    fn is_noise(&self) -> bool {
        matches!(self, Self::DeviceError { .. } | Self::ApiError { .. } | Self::WatchdogExpired { .. })
    }
}

/// As much of a text as an event has room for.
pub fn text(of: impl Display) -> String {
    let mut text = of.to_string();
    text.truncate(text.floor_char_boundary(TEXT_MAX));
    text
}

#[derive(Clone)]
struct Record {
    number: u64,
    time: Utc,
    uptime: Duration,
    event: Event,
}

#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    event: &'a Event,
    time: &'a str,
    uptime_ms: u64,
    id: &'a str,
}

#[derive(Default)]
struct History {
    id: String,
    records: VecDeque<Record>,
    /// The number of the next event: how many there were.
    next: u64,
    period: Option<(Instant, u32)>,
}

impl History {
    const fn new() -> Self {
        Self { id: String::new(), records: VecDeque::new(), next: 0, period: None }
    }

    fn add(&mut self, event: Event) {
        let number = self.next;
        self.next += 1;
        if matches!(event, Event::DeviceError { .. }) && !self.has_room_for_device_error() {
            return;
        }
        if self.records.len() == KEPT_MAX {
            let noise = self.records.iter().position(|record| record.event.is_noise());
            self.records.remove(noise.unwrap_or(0));
        }
        let (time, uptime) = (Utc::now(), clock::uptime());
        self.records.push_back(Record { number, time, uptime, event });
    }

    fn has_room_for_device_error(&mut self) -> bool {
        let now = Instant::now();
        let (begun, count) = self.period.filter(|(begun, _)| now - *begun <= PERIOD).unwrap_or((now, 0));
        self.period = Some((begun, count.saturating_add(1)));
        count < DEVICE_ERRORS_MAX
    }

    /// Appends lines to `output`, from the reader's place on, until it has `room` bytes or there are
    /// no more.
    fn read(&self, reader: &mut Reader, room: usize, output: &mut String) {
        let from = self.records.partition_point(|record| record.number < reader.next);
        for record in self.records.range(from..) {
            if output.len() >= room {
                return;
            }
            if record.number > reader.next {
                let event = Event::Lost { count: record.number - reader.next };
                self.print(&Record { event, ..record.clone() }, output);
            }
            self.print(record, output);
            reader.next = record.number + 1;
        }
    }

    fn print(&self, record: &Record, output: &mut String) {
        let line = Line {
            event: &record.event,
            time: &record.time.to_string(),
            uptime_ms: record.uptime.as_millis() as u64,
            id: &self.id,
        };
        let line = serde_json::to_string(&line).expect("names, numbers and texts are JSON");
        writeln!(output, "{line}").expect("a String takes everything");
    }
}

/// A place in the history: whose lines come next.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reader {
    next: u64,
}

impl Reader {
    /// The next lines: at least one, and no further one once there are `room` bytes. Empty: there are
    /// none.
    pub fn read(&mut self, room: usize) -> String {
        let mut output = String::new();
        lock().read(self, room, &mut output);
        output
    }

    /// Whether there is something to read.
    pub fn is_behind(&self) -> bool {
        lock().records.back().is_some_and(|last| last.number >= self.next)
    }
}

static HISTORY: Mutex<History> = Mutex::new(History::new());
/// There may be readers: without an API and `--events` there are none, and nothing is kept.
static OPEN: AtomicBool = AtomicBool::new(false);
static WAKE: OnceLock<EventFd> = OnceLock::new();

fn lock() -> MutexGuard<'static, History> {
    HISTORY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps what happens from now on to the microVM called `id`.
pub fn open(id: &str) {
    lock().id = id.to_owned();
    OPEN.store(true, Ordering::Release);
}

/// It happened. Threads that cause events at once have them in one order, the same for all readers. A
/// log that wants to know has it too.
#[track_caller]
pub fn tell(event: impl FnOnce() -> Event) {
    let (is_kept, is_logged) = (OPEN.load(Ordering::Acquire), log::wants(log::Level::Info));
    if !is_kept && !log::wants(log::Level::Warning) {
        return;
    }
    let event = event();
    if let Event::ApiError { request, reason } = &event {
        log::line(format_args!("`{request}` was refused: {reason}"));
    }
    // Those are in the log in their own words.
    let has_words = matches!(
        event,
        Event::ApiError { .. } | Event::DeviceError { .. } | Event::Booted { .. } | Event::Ended { .. }
    );
    if is_logged && !has_words {
        log::info(serde_json::to_string(&event).expect("names, numbers and texts are JSON"));
    }
    if !is_kept {
        return;
    }
    lock().add(event);
    if let Some(wake) = WAKE.get() {
        // A counter that is full wakes as well.
        let _ = wake.write(1);
    }
}

/// Readable when something has happened since it was read; made for the first reader.
pub fn wake() -> Result<&'static EventFd> {
    if WAKE.get().is_none() {
        let event = poll::event("what happens")?;
        // What was faster is as good.
        let _ = WAKE.set(event);
    }
    Ok(WAKE.get().expect("it was just set"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history() -> History {
        History { id: "vm".to_owned(), ..Default::default() }
    }

    fn lines(history: &History, reader: &mut Reader, room: usize) -> Vec<Value> {
        let mut output = String::new();
        history.read(reader, room, &mut output);
        output.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn api_error(number: usize) -> Event {
        Event::ApiError { request: format!("GET /{number}"), reason: "no".to_owned() }
    }

    fn device_error() -> Event {
        Event::DeviceError { device: "disk `a`".to_owned(), reason: "broken".to_owned(), needs_reset: true }
    }

    #[test]
    fn a_reader_that_keeps_up_gets_everything_in_order() {
        let (mut history, mut reader) = (history(), Reader::default());
        let mut seen = Vec::new();
        for number in 0..10 * KEPT_MAX {
            history.add(api_error(number));
            if number % 100 == 0 {
                seen.extend(lines(&history, &mut reader, usize::MAX));
            }
        }
        seen.extend(lines(&history, &mut reader, usize::MAX));
        assert_eq!(seen.len(), 10 * KEPT_MAX);
        for (number, line) in seen.iter().enumerate() {
            assert_eq!(line["request"], format!("GET /{number}"));
        }
    }

    #[test]
    fn a_line_has_what_when_and_who() {
        let mut history = history();
        history.add(Event::Ended { reason: text("the guest powered off"), exit_code: 0 });
        let line = &lines(&history, &mut Reader::default(), 1)[0];
        assert_eq!(line["event"], "ended");
        assert_eq!(line["reason"], "the guest powered off");
        assert_eq!((&line["exit_code"], &line["id"]), (&0.into(), &"vm".into()));
        assert!(line["time"].as_str().unwrap().ends_with('Z') && line["uptime_ms"].is_u64());
        assert_eq!(text("x".repeat(9999)).len(), TEXT_MAX);
    }

    #[test]
    fn a_slow_reader_is_told_how_many_it_lost() {
        let (mut history, mut reader) = (history(), Reader::default());
        history.add(Event::Started { reason: "test" });
        assert_eq!(lines(&history, &mut reader, 1).len(), 1);
        for _ in 0..KEPT_MAX + 10 {
            history.add(Event::Paused { reason: "test" });
        }
        assert_eq!(history.records.len(), KEPT_MAX);
        let seen = lines(&history, &mut reader, usize::MAX);
        assert_eq!((&seen[0]["event"], &seen[0]["count"]), (&"lost".into(), &10.into()));
        assert_eq!((seen.len(), &seen[1]["event"]), (1 + KEPT_MAX, &"paused".into()));
        assert!(lines(&history, &mut reader, usize::MAX).is_empty());
    }

    #[test]
    fn a_new_reader_finds_the_guests_life_whatever_noise_there_was() {
        let mut history = history();
        history.add(Event::Started { reason: "test" });
        (0..KEPT_MAX * 2).for_each(|number| history.add(api_error(number)));
        history.add(Event::PoweredOff);
        let seen = lines(&history, &mut Reader::default(), usize::MAX);
        let names: Vec<_> = seen.iter().map(|line| line["event"].as_str().unwrap()).collect();
        assert_eq!(names[..3], ["started", "lost", "api_error"]);
        assert_eq!(seen[1]["count"], KEPT_MAX + 2);
        assert_eq!(names.last(), Some(&"powered_off"));
        let kept = names.iter().filter(|name| **name == "api_error").count();
        assert_eq!(kept as u64 + seen[1]["count"].as_u64().unwrap(), 2 * KEPT_MAX as u64);
    }

    #[test]
    fn a_guest_that_breaks_a_device_in_a_loop_is_told_of_a_few_times() {
        let (mut history, mut reader) = (history(), Reader::default());
        (0..1000).for_each(|_| history.add(device_error()));
        history.add(Event::PoweredOff);
        let seen = lines(&history, &mut reader, usize::MAX);
        assert_eq!(seen.len(), DEVICE_ERRORS_MAX as usize + 2);
        assert_eq!(seen[DEVICE_ERRORS_MAX as usize]["count"], 1000 - DEVICE_ERRORS_MAX);
    }
}
